"""The tables of the loss kernel's benchmark, from its records."""

from typing import Any

from benchmarks.timing import cells, summary, table

NOTES = """
Times in ms: the median, the 20th and 80th percentile, and the number of measurements. TFLOP/s counts the four
matmuls of the live rows. Only the matmuls and ours skip rows outside of the mask. liger computes the JSD of
the whole vocabulary, a **different objective**, and is checked against that. Errors are relative, in norm,
against float32 on the first rows. Peak memory is in GB on top of the inputs, gradients included, with all
rows live.
"""
Records = list[dict[str, Any]]


def render(results: dict[str, Any]) -> str:
    """All that was measured so far, in markdown."""
    lines = [f"`{results['command']}`, {results['date']}", ""]
    for library, facts in results["environment"].items():
        lines.append(f"- {library}: " + ", ".join(f"{key} {value}" for key, value in facts.items()))
    lines.append(NOTES)
    for size in dict.fromkeys(map(_size, results["records"])):
        records = [record for record in results["records"] if _size(record) == size]
        lines.append("### Width {}, {} tokens, vocabulary {}\n".format(*size))
        lines += [part + "\n" for part in (times(records), values(records), memory(records)) if part]
        lines += [f"- {name}: {why}" for name, why in failures(records).items()]
    return "\n".join(lines) + "\n"


def _size(record: dict[str, Any]) -> tuple[int, int, int]:
    return record["width"], record["tokens"], record["vocab"]


def times(records: Records) -> str:
    """All rounds together, with ratios to the fastest matmuls in JAX and to ours at the same mask."""
    timed = [record for record in records if "ms" in record]
    rows = []
    for mask in dict.fromkeys(record["mask"] for record in timed):
        of_mask = [record for record in timed if record["mask"] == mask]
        names = dict.fromkeys(record["name"] for record in of_mask)
        stats = {name: summary(ms for r in of_mask if r["name"] == name for ms in r["ms"]) for name in names}
        flops = 8 * of_mask[0]["width"] * of_mask[0]["vocab"] * of_mask[0]["live"]
        matmuls = min((s["median"] for name, s in stats.items() if name.startswith("matmuls")), default=None)
        ours = stats["ours"]["median"] if "ours" in stats else None
        for name, s in sorted(stats.items(), key=lambda item: item[1]["median"]):
            tflops = f"{flops / s['median'] / 1e9:.1f}"
            ratios = [_ratio(matmuls, s["median"]), _ratio(s["median"], ours)]
            rows.append([f"{100 * mask:g} %", name, *cells(s, 2), tflops, *ratios])
    head = ["mask", "contestant", "ms", "20 - 80 %", "n", "TFLOP/s", "share of matmuls", "time / ours"]
    return table(head, rows) if rows else ""


def values(records: Records) -> str:
    """Errors of the loss and of both gradients."""
    checked = {record["name"]: record["values"] for record in records if "values" in record}
    keys = ["loss", "loss_error", "hidden_error", "hidden_cosine", "head_error", "head_cosine"]
    rows = [[name, *(_value(key, value[key]) for key in keys)] for name, value in checked.items()]
    return table(["contestant", *(key.replace("_", " ") for key in keys)], rows) if rows else ""


def _value(key: str, x: float) -> str:
    if "cosine" in key:
        return f"{x:.6f}"
    return f"{x:.3g}" if "error" in key else f"{x:.7f}"


def memory(records: Records) -> str:
    """Peaks that the allocator saw, and what the compiler planned where it says so."""
    rows = []
    for record in records:
        if "memory" not in record:
            continue
        measured = record["memory"]
        inputs = measured["inputs"]
        peak = measured.get("peak")
        note = measured.get("outcome", "")
        if peak is not None and peak == measured["peak_before"]:
            note = "reached while compiling"
        above_inputs = None if peak is None else peak - inputs
        columns = [inputs, above_inputs, measured.get("program_temp"), measured.get("program_output")]
        rows.append([record["name"], *map(_gigabytes, columns), note])
    head = ["contestant", "inputs", "peak above inputs", "program: temporary", "program: results", ""]
    return table(head, rows) if rows else ""


def failures(records: Records) -> dict[str, str]:
    """The first reason of each contestant that did not finish."""
    found: dict[str, str] = {}
    for record in records:
        if "outcome" in record:
            found.setdefault(record["name"], f"{record['outcome']} {record.get('error', '')}".strip())
    return found


def _ratio(a: float | None, b: float | None) -> str:
    return "" if a is None or b is None else f"{a / b:.2f}"


def _gigabytes(n: int | None) -> str:
    return "" if n is None else f"{n / 1e9:.3f}"
