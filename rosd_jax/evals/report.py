"""The results of a run: the lines printed at its end, report.md and report.png.

Reads metrics.jsonl and, for the interval of a change, the raw generations under evals/. A 95% interval is
1.96 standard errors to either side.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rosd_jax.distill.notes import NOTES
from rosd_jax.errors import UserError
from rosd_jax.evals.health import findings
from rosd_jax.evals.outcome import (
    MetricsRow,
    Outcome,
    best_step,
    compare,
    mean,
    number,
    read_metrics,
    validation_scores,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Z = 1.96  # standard errors on either side of a 95% interval
MAJORITY = "always the most frequent letter"
REWARD = "tab:blue"
LOSS = "tab:orange"
BEFORE = "tab:gray"
BEST = "tab:green"
AFTER = "tab:blue"
LABEL = 18  # characters of a set's name that fit into the table
MADE = {
    "report.html": "the same in a browser, with every rollout (in the folder report)",
    "metrics.jsonl": "all numbers, one object per line",
    "tensorboard": "for tensorboard --logdir",
    "profile": "a trace of one step (--profile)",
    "evals": "the raw generations of each evaluation",
    "validations": "the same for the sets that chose the best step",
    "rollouts": "responses, rewards and reflections of each step",
    "checkpoints": "what a resumed run starts from",
    "export": "the trained model as a Hugging Face directory",
    "export_best": "the model of the step that validation chose",
    "config.json": "all settings of the run",
}


def write_report(workdir: str | Path, trained_on: Sequence[str]) -> str:
    """Writes report.md and report.png into workdir; returns the lines to print, in ASCII.

    trained_on: the names of the set that training drew from; the first is shown. Each set's earliest
    evaluation is compared with its latest one and, if validation chose an earlier step, with the one at that
    step. Rows that a resumed run wrote again replace the older ones. Raises UserError for a malformed line of
    metrics.jsonl, and if the report cannot be written.
    """
    workdir = Path(workdir)
    rows = read_metrics(workdir / "metrics.jsonl")
    outcomes = compare(rows, workdir, trained_on)
    at_best = outcomes_at_best(rows, workdir, trained_on, outcomes)
    train = [row for row in rows if row["split"] == "train"]
    lines = [*_training_lines(train), *_findings_lines(train), *_validation_lines(rows), ""]
    if at_best:
        lines += [*_table_lines(at_best, trained_on[0]), ""]
    lines += _table_lines(outcomes, trained_on[0])
    try:
        _draw(workdir / "report.png", train, outcomes, at_best)
        (workdir / "report.md").write_text(_markdown(workdir, lines, rows), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"the report cannot be written to {workdir} ({error.strerror}); free space there and "
            "run the same command again"
        ) from error
    return "\n".join([*lines, "", *_file_lines(workdir)])


def _training_lines(train: Sequence[MetricsRow]) -> list[str]:
    if not train:
        return ["No training step was taken."]
    lines = [f"Training: {len(train)} steps, mean of the first and of the last {ends(train)}"]
    for field, form in (("reward", ".3f"), ("loss", ".3g")):
        lines.append(f"  {field:<8}{first_and_last(train, field, form)}")
    return lines


def ends(train: Sequence[MetricsRow]) -> int:
    """How many steps the mean of the first and of the last ones takes."""
    return min(5, (len(train) + 1) // 2)


def first_and_last(train: Sequence[MetricsRow], field: str, form: str) -> str:
    """A field's mean over the first and over the last `ends` steps. form: a format specification."""
    count = ends(train)
    first, last = (mean(rows, field) for rows in (train[:count], train[-count:]))
    return f"{show(first, form)} -> {show(last, form)}"


def _findings_lines(train: Sequence[MetricsRow]) -> list[str]:
    """What became of the rollouts and the quotes, and warnings."""
    said = [*_rollouts_said(train), *_quotes_said(train)]
    said += [f"Warning: {sentence}" for sentence in findings(train).values()]
    return [line for text in said for line in textwrap.wrap(text, 80, subsequent_indent="    ")]


def _rollouts_said(train: Sequence[MetricsRow]) -> list[str]:
    taught = sum(row.get("taught") or 0 for row in train)
    left_out = {words: sum(row.get(f"out_{note}") or 0 for row in train) for note, words in NOTES.items()}
    rows = taught + sum(left_out.values())
    if rows == 0:
        return []
    shares = [f"{taught / rows:.0%} taught"]
    shares += [f"{count / rows:.0%} {words}" for words, count in left_out.items() if count]
    return [f"  rollouts {rows}: {', '.join(shares)}"]


def _quotes_said(train: Sequence[MetricsRow]) -> list[str]:
    named = {"quote_found": "of the quotes were found", "quote_exact": "were exact"}
    shares = {words: mean(train, field) for field, words in named.items()}
    known = [f"{share:.0%} {words}" for words, share in shares.items() if math.isfinite(share)]
    return [f"  {', '.join(known)} (mean over steps)"] if known else []


def outcomes_at_best(
    rows: Sequence[MetricsRow], workdir: Path, trained_on: Sequence[str], outcomes: Sequence[Outcome]
) -> list[Outcome]:
    """The outcomes at the step that validation chose; none if that is the first or the last."""
    best = best_step(rows)
    if best is None or any(outcome.after and outcome.after["step"] == best for outcome in outcomes):
        return []
    return [outcome for outcome in compare(rows, workdir, trained_on, until=best) if outcome.after]


def _validation_lines(rows: Sequence[MetricsRow]) -> list[str]:
    """The step that validation chose, and the scores before, there and at the end."""
    scores = validation_scores(rows)
    best = best_step(rows)
    if best is None:
        return []
    names: dict[int, list[str]] = {}
    for step, name in ((min(scores), "before"), (best, "best"), (max(scores), "last")):
        names.setdefault(step, []).append(name)
    said = [f"{percent(scores[step])} at step {step} ({', '.join(names[step])})" for step in names]
    return [f"Validation: avg@k in %, {', '.join(said)}"]


def _table_lines(outcomes: Sequence[Outcome], train_set: str) -> list[str]:
    if not outcomes:
        return ["There was no evaluation."]
    span = steps_of(outcomes[0])
    lines = [
        f"Evaluation: avg@k in %, {span}, with 95% intervals",
        f"{'':<{LABEL + 2}}  k  before   after  {'change':<21}  pass@k",
    ]
    for in_domain in (True, False):
        group = [outcome for outcome in outcomes if outcome.in_domain == in_domain]
        if group:
            lines.append("in domain" if in_domain else f"out of domain (not {_label(train_set)})")
        for outcome in group:
            lines += [_table_row(outcome), *(f"      {note}" for note in notes_of(outcome, span))]
    return lines


def _table_row(outcome: Outcome) -> str:
    before = outcome.before
    after = outcome.after or {}
    old, new = (percent(number(row, "avg")) for row in (before, after))
    passed = percent(number(before, "pass"))
    if after:
        passed += f" -> {percent(number(after, 'pass'))}"
    change = shown_change(outcome) if after else "-"
    if outcome.differences:
        change = "not comparable"
    k = show(number(before, "k"), ".0f")
    return (
        f"  {_label(outcome.name):<{LABEL}}{k:>3}  {old:>6}  {new if after else '-':>6}"
        f"  {change:<21}  {passed}"
    )


def shown_change(outcome: Outcome) -> str:
    """The change of avg@k in percentage points, with its 95% interval if that is known."""
    change = number(outcome.after or {}, "avg") - number(outcome.before, "avg")
    return with_interval(change, Z * outcome.change_se)


def with_interval(change: float, half: float) -> str:
    """A change of a share in percentage points, with the interval of `half` to either side if it is known."""
    if not math.isfinite(change):
        return "n/a"
    if not math.isfinite(half):
        return f"{100 * change:+.1f}"
    return f"{100 * change:+.1f} [{100 * (change - half):+.1f}, {100 * (change + half):+.1f}]"


def notes_of(outcome: Outcome, span: str) -> list[str]:
    """What a reader must know about a row in addition to its numbers."""
    notes = []
    if steps_of(outcome) != span:
        notes.append(f"here {steps_of(outcome)}")
    notes += [f"not comparable: {difference}" for difference in outcome.differences]
    old = number(outcome.before, "k")
    new = number(outcome.after or {}, "k")
    if math.isfinite(old + new) and old != new:
        notes.append(f"k {old:g} -> {new:g}: pass@k is not comparable")
    if outcome.after is None or outcome.differences or not math.isfinite(outcome.change_se):
        rows = {"before": outcome.before, "after": outcome.after}
        notes += [f"{when}: interval {_interval(row)}" for when, row in rows.items() if row]
    elif not outcome.paired:
        notes.append("interval unpaired: the generations of the same items are missing")
    letter = number(outcome.before, "majority_letter")
    if math.isfinite(letter):
        notes.append(f"{MAJORITY}: {percent(letter)}")
    return notes


def _interval(row: MetricsRow) -> str:
    avg = number(row, "avg")
    half = Z * number(row, "avg_se")
    if not math.isfinite(avg + half):
        return "unknown"
    return f"[{percent(avg - half)}, {percent(avg + half)}]"


def steps_of(outcome: Outcome) -> str:
    """The two steps that an outcome compares."""
    if outcome.after is None:
        return f"step {outcome.before['step']} alone"
    return f"step {outcome.before['step']} -> step {outcome.after['step']}"


def show(value: float, form: str) -> str:
    """A number in a format specification; n/a if it is not finite."""
    return format(value, form) if math.isfinite(value) else "n/a"


def percent(share: float) -> str:
    """A share in %, or n/a."""
    return show(100 * share, ".1f")


def _label(name: str) -> str:
    """A set's name for terminals and figures: in ASCII, and shortened to its end if it is long."""
    name = name.encode("ascii", "replace").decode()
    return name if len(name) <= LABEL else ".." + name[2 - LABEL :]


def _file_lines(workdir: Path) -> list[str]:
    made = {"report.md": "this report, with every evaluation and report.png", **MADE}
    found = {name: what for name, what in made.items() if (workdir / name).exists()}
    return [f"Files in {workdir}", *(f"  {name:<14}{what}" for name, what in found.items())]


def _markdown(workdir: Path, lines: Sequence[str], rows: Sequence[MetricsRow]) -> str:
    """The printed lines, the figure, and every number of every evaluation."""
    fields = ("k", "n", "avg", "avg_se", "pass", "maj", "distinct", "length", "truncated")
    table = [f"| step | set | {' | '.join(fields)} |", "|--:|:--|" + "--:|" * len(fields)]
    for row in rows:
        kind, _, name = row["split"].partition("/")
        if kind in ("eval", "validation"):
            name = name.replace("|", "\\|")
            cells = " | ".join(show(number(row, field), ".4g") for field in fields)
            label = f"`{name}`" if kind == "eval" else f"`{name}` (validation)"
            table.append(f"| {row['step']} | {label} | {cells} |")
    about = "A change is taken item by item; an interval is 1.96 standard errors to either side."
    parts = [
        f"# {workdir.resolve().name}",
        "```text",
        *lines,
        "```",
        "",
        about,
        "",
        "![](report.png)",
    ]
    return "\n".join([*parts, "", "## Every evaluation", "", *table, ""])


def _draw(
    path: Path, train: Sequence[MetricsRow], outcomes: Sequence[Outcome], at_best: Sequence[Outcome]
) -> None:
    """Left: reward and loss by step. Right: avg@k of each set with 95% intervals."""
    # Imported here, since it takes a fifth of the time that the command needs to start.
    from matplotlib.figure import Figure

    height = max(4.0, 1.6 + 0.45 * len(outcomes))
    figure = Figure(figsize=(11, height), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_training(left, train)
    _draw_sets(right, outcomes, {outcome.name: outcome.after for outcome in at_best})
    figure.savefig(path)


def _draw_training(axes: Axes, train: Sequence[MetricsRow]) -> None:
    from matplotlib.ticker import MaxNLocator

    steps = [row["step"] for row in train]
    for field, colour, panel in (("reward", REWARD, axes), ("loss", LOSS, axes.twinx())):
        values = [number(row, field) for row in train]
        panel.plot(steps, values, color=colour, marker=".", label=field)
        panel.set_ylabel(field, color=colour)
        panel.tick_params(axis="y", colors=colour)
    axes.set(title="training", xlabel="step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _draw_sets(axes: Axes, outcomes: Sequence[Outcome], best: Mapping[str, MetricsRow | None]) -> None:
    """One line per set, the first at the top. A cross marks the accuracy of the most frequent letter."""
    for y, outcome in enumerate(outcomes):
        shown = (
            (outcome.before, BEFORE, -0.2),
            (best.get(outcome.name), BEST, 0.0),
            (outcome.after, AFTER, 0.2),
        )
        for row, colour, dy in shown:
            avg, half = (100 * number(row or {}, field) for field in ("avg", "avg_se"))
            bar = Z * half if math.isfinite(half) else 0.0
            axes.errorbar(avg, y + dy, xerr=bar, color=colour, marker="o", capsize=3)
    scale = "avg@k in %, 95% interval"
    letters = [100 * number(outcome.before, "majority_letter") for outcome in outcomes]
    if any(map(math.isfinite, letters)):
        axes.plot(letters, range(len(outcomes)), "x", color="black")
        scale += f"\nx: {MAJORITY}"
    names = [f"{_label(o.name)} ({'in' if o.in_domain else 'out'})" for o in outcomes]
    axes.set_yticks(range(len(outcomes)), names, parse_math=False)
    axes.set_ylim(max(len(outcomes), 1) - 0.5, -0.5)
    axes.grid(axis="x", alpha=0.3)
    chosen = "best (green), " if best else ""
    axes.set(title=f"evaluation: before (grey), {chosen}after (blue)", xlabel=scale)
