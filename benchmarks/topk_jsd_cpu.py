"""The loss kernel's XLA path on a CPU: against plain XLA, and on a mask of 30 % against all rows.

    JAX_PLATFORMS=cpu python -m benchmarks.topk_jsd_cpu [--out=DIR] [--width=512] [--tokens=512]
        [--vocab=151936] [--chunk=128] [--k=100] [--reps=5]

Float32, one process, interleaved; times in ms. The mask is measured with chunks of a quarter of the size, so
that there are enough of them to skip. Temporary memory is what the compiler planned in addition to inputs
and results. With --out it writes DIR/topk_jsd_cpu.json and DIR/topk_jsd_cpu.md.
"""

import argparse
import datetime
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import cells, interleaved, summary, table, versions
from benchmarks.topk_jsd_contestants import Case, jax_contestant, jax_inputs, span_weights

OURS = "ours-xla"
MASK = 0.3


def main() -> None:
    parser = argparse.ArgumentParser(description="The loss kernel's XLA path on a CPU")
    parser.add_argument("--out")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--chunk", type=int, default=128)
    parser.add_argument("--k", type=int, default=100)
    parser.add_argument("--reps", type=int, default=5)
    args = parser.parse_args()
    case = Case(args.width, args.tokens, args.vocab, args.k, args.chunk, "float32")
    results = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.topk_jsd_cpu", *sys.argv[1:]]),
        "environment": {"cores": len(os.sched_getaffinity(0)), **versions("jax", "jaxlib")},
        **measure(case, args.reps),
    }
    text = render(results)
    print(text)
    if args.out:
        Path(args.out).mkdir(parents=True, exist_ok=True)
        Path(args.out, "topk_jsd_cpu.json").write_text(json.dumps(results, indent=1))
        Path(args.out, "topk_jsd_cpu.md").write_text(text)


def measure(case: Case, reps: int) -> dict[str, Any]:
    """Times of each (contestant, mask), and loss and temporary bytes of each contestant on all rows."""
    inputs = jax_inputs(case)
    masked = f"{OURS}@{case.chunk // 4}"
    weights = {share: jnp.asarray(span_weights(case, share)) for share in (1.0, MASK)}
    calls = {}
    programs = {}
    for name in ("matmuls", OURS, masked, "checkpoint", "naive"):
        compiled = jax.jit(jax_contestant(name, case)).lower(*inputs, weights[1.0]).compile()
        planned: Any = compiled.memory_analysis()
        loss = float(compiled(*inputs, weights[1.0])[0])
        programs[name] = {"loss": loss, "temporary": planned.temp_size_in_bytes}
        for share in weights if name == masked else [1.0]:
            run = partial(compiled, *inputs, weights[share])
            calls[f"{name} {share:.0%}"] = lambda run=run: jax.block_until_ready(run())
    times, errors = interleaved(calls, warmups=0, reps=reps)  # each program has just run for its loss
    for error in errors.values():
        raise error
    return {"case": vars(case), "programs": programs, "ms": times}


def render(results: dict[str, Any]) -> str:
    """The results in markdown."""
    stats = {name: summary(ms) for name, ms in results["ms"].items()}
    masked = f"{OURS}@{results['case']['chunk'] // 4}"
    ours = stats[f"{OURS} 100%"]["median"]
    all_rows = stats[f"{masked} 100%"]["median"]
    some_rows = stats[f"{masked} {MASK:.0%}"]["median"]
    rows = [[name, *cells(s, 0), f"{s['median'] / ours:.3f}"] for name, s in stats.items()]
    programs = [
        [name, f"{p['loss']:.7f}", f"{p['temporary'] / 1e6:.0f}"] for name, p in results["programs"].items()
    ]
    facts = [f"{key} {value}" for part in ("environment", "case") for key, value in results[part].items()]
    parts = [
        f"`{results['command']}`, {results['date']}",
        ", ".join(facts),
        table(["contestant, mask", "ms", "20 - 80 %", "n", "to ours"], rows),
        f"{MASK:.0%} mask against all rows: {some_rows / all_rows:.3f}",
        table(["contestant", "loss", "temporary MB"], programs),
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
