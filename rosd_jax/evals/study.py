"""Compares methods: trains each with several seeds, one run after another, and writes one table.

    python -m rosd_jax.evals.study --config=configs/quickstart.py --methods=span,paper --seeds=0,1,2 \\
        --out=runs/study [--rates=1e-4,2.5e-4,5e-4] [--config.FIELD=VALUE ...]

A method is a variant of the config file, as after the colon of `rosd --config=FILE:VARIANT`; `default` is
the file without one. Every cell of the table is an ordinary run in OUT/METHOD-SEED, with the same fields,
so that all have the same budget of prompts, rollouts and updates. The same command continues where it was
stopped, and runs that are finished only report again.

With --rates, the learning rate of each method is chosen first: every method runs with every rate, on the
first seed, and takes the rate whose best validated step has the highest validation score, the first of equal
ones. The other seeds then run with it. These runs are in OUT/METHOD-lrRATE-SEED.

At the end it writes into OUT

    study.md     for each evaluated set, the scores of each method: means over seeds with 95 % intervals, at
                 the last step and at the one that validation chose; the rates; and the exact commands
    study.png    reward and validation score by step, and the change on each evaluated set
"""

from __future__ import annotations

import argparse
import itertools
import math
import platform
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

import rosd_jax
from rosd_jax import atomic
from rosd_jax.errors import UserError
from rosd_jax.evals.health import GUARDED
from rosd_jax.evals.outcome import (
    MetricsRow,
    Outcome,
    best_step,
    compare,
    number,
    read_metrics,
    validation_scores,
)
from rosd_jax.evals.page import read_config, training_sets
from rosd_jax.evals.report import Z, percent, show, with_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

DEFAULT = "default"  # the name of the config without a variant
COLUMNS = ("before", "last step", "change", "best step", "change", "pass@k", "maj@k", "tokens")


@dataclass(frozen=True)
class Asked:
    """The command line: the flags of the same names, and fields of the config for all runs."""

    config: str
    methods: list[str]
    seeds: list[int]
    rates: list[str]
    out: Path
    fields: list[str]


@dataclass(frozen=True)
class Cell:
    """One run: a method with a seed."""

    method: str
    seed: int
    directory: Path
    flags: tuple[str, ...]  # of its command
    rate: str = ""  # its learning rate, as in --rates; empty: the config's


@dataclass(frozen=True)
class Trial:
    """A run that tries a learning rate: its best validated step, and the validation score there."""

    cell: Cell
    step: int
    score: float


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    cell: Cell
    rows: list[MetricsRow]
    steps: tuple[int, int]  # made, and asked for
    last: dict[str, Outcome]  # by set
    best: dict[str, Outcome]  # at the step that validation chose; without one, at the last


class Mean(NamedTuple):
    """A mean, and half of its 95 % interval; NaN if that is not known."""

    value: float
    half: float


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit status: that of the first run that failed, if one does."""
    shown = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("rosd_jax.evals.study", description=__doc__, formatter_class=shown)
    parser.add_argument("--config", required=True, help="a config file, with variants for all runs")
    parser.add_argument("--methods", required=True, type=_names, help="variants, separated by commas")
    parser.add_argument("--seeds", required=True, type=_numbers, help="numbers, separated by commas")
    parser.add_argument("--out", required=True, type=Path, help="directory of the study")
    parser.add_argument("--rates", default=[], type=_rates, help="learning rates to choose from")
    given, fields = parser.parse_known_args(argv)
    asked = Asked(**vars(given), fields=fields)
    try:
        text = study(asked)
    except subprocess.CalledProcessError as error:
        mistake = error.returncode == 2
        hint = "the sentence above says why" if mistake else "the same command goes on from here"
        print(f"--- ended with status {error.returncode}; {hint}", file=sys.stderr)
        return error.returncode
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(text)
    print(f"Files in {asked.out}: study.md, which is the text above, and study.png, its picture")
    return 0


def study(asked: Asked) -> str:
    """Makes all runs, writes study.md and study.png, and returns the text of study.md.

    Raises CalledProcessError if a run fails, and UserError as `check` and `read_trial` do.
    """
    check(asked)
    first = asked.seeds[:1]
    # The runs of the first seed with the chosen rates are among the trials.
    total = len(asked.methods) * (len(asked.rates) + len(asked.seeds) - bool(asked.rates))
    count = itertools.count(1)
    trials = []
    for rate in asked.rates:
        for cell in make_cells(asked, first, dict.fromkeys(asked.methods, rate)):
            run(cell, f"run {next(count)} of {total}")
            trials.append(read_trial(cell))
    cells = make_cells(asked, asked.seeds, choose_rates(trials))
    tried = {trial.cell for trial in trials}
    for cell in cells:
        if cell not in tried:
            run(cell, f"run {next(count)} of {total}")
    return write([read_result(cell) for cell in cells], asked.out, trials)


def check(asked: Asked) -> None:
    """Raises UserError for what is no field of a config, and for what is named twice."""
    for field in asked.fields:
        if not field.startswith("--config.") or "=" not in field:
            raise UserError(f"{field!r} is no flag of a study; fields are written --config.FIELD=VALUE")
    for named in (asked.methods, asked.seeds):
        if len(set(named)) < len(named):
            raise UserError(f"{','.join(map(str, named))} repeats a name; name each method and seed once")
    if len(set(map(float, asked.rates))) < len(asked.rates):
        raise UserError(f"--rates={','.join(asked.rates)} repeats a rate; name each one once")
    if any(field.startswith("--config.seed=") for field in asked.fields):
        raise UserError("--seeds and --config.seed are both given; leave --config.seed out")
    if asked.rates and any(field.startswith("--config.optimizer.lr=") for field in asked.fields):
        raise UserError("--rates and --config.optimizer.lr are both given; leave one of them out")


def make_cells(asked: Asked, seeds: Sequence[int], rates: Mapping[str, str]) -> list[Cell]:
    """The runs of some seeds, seed by seed, so that a stopped study has compared all methods on the first.

    rates: of the methods whose learning rate is not the config's.
    """
    mark = "," if ":" in asked.config else ":"
    cells = []
    for seed in seeds:
        for method in asked.methods:
            rate = rates.get(method, "")
            directory = asked.out / (f"{method}-lr{rate}-{seed}" if rate else f"{method}-{seed}")
            config = asked.config if method == DEFAULT else f"{asked.config}{mark}{method}"
            flags = (f"--config={config}", f"--workdir={directory}", f"--config.seed={seed}", *asked.fields)
            if rate:
                flags = (*flags, f"--config.optimizer.lr={rate}")
            cells.append(Cell(method, seed, directory, flags, rate))
    return cells


def run(cell: Cell, place: str) -> None:
    """Makes the run of a cell, or resumes it. Raises CalledProcessError if it fails.

    place: among all runs, in words.
    """
    rate = f", learning rate {cell.rate}" if cell.rate else ""
    print(f"--- {cell.method}, seed {cell.seed}{rate}: {place}", flush=True)
    command = [sys.executable, "-m", "rosd_jax", *cell.flags]
    status = status_of(command)
    # A run that its guard ends is a result too: its rate or its method makes it collapse.
    if status not in (0, GUARDED):
        raise subprocess.CalledProcessError(status, command)


def status_of(command: Sequence[str]) -> int:
    """Runs a command and returns its exit status, as a shell has it: 128 + its number after a signal.

    On Ctrl-C and SIGTERM the command saves its last step, so it is waited for. A signal that comes while it
    ends by itself counts too.
    """
    process = subprocess.Popen(command)
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        # A terminal sends Ctrl-C to the command too, for which a second one means to end at once.
        if number != signal.SIGINT or not sys.stderr.isatty():
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if received:
        return 128 + received[0]
    return status if status >= 0 else 128 - status


def read_trial(cell: Cell) -> Trial:
    """What the run of a cell says about its rate. Raises UserError if it has no validation scores."""
    rows = read_metrics(cell.directory / "metrics.jsonl")
    step = best_step(rows)
    if step is None:
        raise UserError(
            f"{cell.directory} has no validation score, by which --rates chooses; set validation.sets, or "
            "leave --rates out"
        )
    return Trial(cell, step, validation_scores(rows)[step])


def choose_rates(trials: Sequence[Trial]) -> dict[str, str]:
    """The rate of each method with the highest validation score, the first of equal ones."""
    best: dict[str, Trial] = {}
    for trial in trials:
        method = trial.cell.method
        if method not in best or trial.score > best[method].score:
            best[method] = trial
    return {method: trial.cell.rate for method, trial in best.items()}


def read_result(cell: Cell) -> Result:
    """What the run of a cell left."""
    rows = read_metrics(cell.directory / "metrics.jsonl")
    config = read_config(cell.directory)
    made = max((row["step"] for row in rows if row["split"] == "train"), default=0)
    trained_on = training_sets(config)
    last = {outcome.name: outcome for outcome in compare(rows, cell.directory, trained_on)}
    step = best_step(rows)
    if step == 0:  # the model before training
        best = {name: replace(found, after=found.before, differences=()) for name, found in last.items()}
    else:
        chosen = compare(rows, cell.directory, trained_on, until=step)
        best = last | {found.name: found for found in chosen if found.after}
    return Result(cell, rows, (made, config["steps"]), last, best)


def write(results: Sequence[Result], out: Path, trials: Sequence[Trial]) -> str:
    """Writes study.md, whose text it returns, and study.png."""
    text = as_markdown(results, trials)
    atomic.write_text(out / "study.md", [text])
    draw(results, out / "study.png")
    return text


def as_markdown(results: Sequence[Result], trials: Sequence[Trial] = ()) -> str:
    """A table for each set, those in domain first, the rates, and what is needed to make it all again."""
    lines = [
        "# Study",
        "",
        "avg@k, pass@k and maj@k in %, and tokens of a response: means over the seeds. Changes are those of",
        "avg@k since before the training, with the 95 % interval of their mean over the seeds (Student's t),",
        "or of the mean over the problems where there is one seed. The best step is the one with the highest",
        "validation score, or the last one without validation. pass@k, maj@k and tokens are those of the",
        "last step.",
        "",
    ]
    for name, where in sets_of(results).items():
        lines += [
            f"## {name}, {where}",
            "",
            f"| method | seeds | {' | '.join(COLUMNS)} |",
            "|---|--:|" + "--:|" * len(COLUMNS),
        ]
        for method in methods_of(results):
            found = [result for result in results if result.cell.method == method]
            cells = table_row(
                [result.last[name] for result in found], [result.best[name] for result in found]
            )
            lines.append(f"| {method} | {len(found)} | {' | '.join(cells)} |")
        lines.append("")
    for result in results:
        made, asked = result.steps
        if made < asked:
            lines += [f"The guard of {result.cell.directory.name} ended it after step {made} of {asked}.", ""]
    if trials:
        lines += rates_table(trials)
    cells = dict.fromkeys([*(trial.cell for trial in trials), *(result.cell for result in results)])
    commands = [f"    rosd {shlex.join(cell.flags)}" for cell in cells]
    return "\n".join([*lines, "## How it was made", "", made_by(), "", *commands, ""])


def rates_table(trials: Sequence[Trial]) -> list[str]:
    """The validation score of each method with each rate, and which rate was chosen."""
    rates = list(dict.fromkeys(trial.cell.rate for trial in trials))
    edges = (min(rates, key=float), max(rates, key=float))
    found = {(trial.cell.method, trial.cell.rate): trial for trial in trials}
    lines = [
        "## Learning rates",
        "",
        f"Validation scores in % at the best validated step (in brackets), with seed {trials[0].cell.seed}.",
        "Each method takes the rate with the highest score, the first of equal ones. *: the lowest or the",
        "highest rate that was tried, so a better one may lie beyond it.",
        "",
        f"| method | {' | '.join(rates)} | chosen |",
        "|---|" + "--:|" * (len(rates) + 1),
    ]
    for method, rate in choose_rates(trials).items():
        scores = [found[method, each] for each in rates]
        cells = [f"{percent(trial.score)} ({trial.step})" for trial in scores]
        lines.append(f"| {method} | {' | '.join(cells)} | {rate}{'*' if rate in edges else ''} |")
    return [*lines, ""]


def table_row(last: Sequence[Outcome], best: Sequence[Outcome]) -> list[str]:
    """The cells of one method on one set: COLUMNS."""

    def after(outcomes: Sequence[Outcome], field: str) -> float:
        return over_seeds(number(outcome.after or {}, field) for outcome in outcomes).value

    return [
        percent(over_seeds(number(outcome.before, "avg") for outcome in last).value),
        percent(after(last, "avg")),
        with_interval(*mean_change(last)),
        percent(after(best, "avg")),
        with_interval(*mean_change(best)),
        percent(after(last, "pass")),
        percent(after(last, "maj")),
        show(after(last, "length"), ".0f"),
    ]


def methods_of(results: Sequence[Result]) -> list[str]:
    """The methods, in the order in which they were named."""
    return list(dict.fromkeys(result.cell.method for result in results))


def sets_of(results: Sequence[Result]) -> dict[str, str]:
    """The evaluated sets, those in domain first, and in words whether training drew from them."""
    sets = {name: outcome.in_domain for result in results for name, outcome in result.last.items()}
    ordered = sorted(sets, key=lambda name: not sets[name])
    return {name: "in domain" if sets[name] else "out of domain" for name in ordered}


def mean_change(outcomes: Sequence[Outcome]) -> Mean:
    """The change of avg@k on one set, with the interval over the seeds; of one seed, over the problems."""
    if len(outcomes) == 1:
        return Mean(change(outcomes[0]), Z * outcomes[0].change_se)
    return over_seeds(map(change, outcomes))


def change(outcome: Outcome) -> float:
    """The change of avg@k; NaN if the two evaluations cannot be compared."""
    if outcome.differences:
        return math.nan
    return number(outcome.after or {}, "avg") - number(outcome.before, "avg")


def over_seeds(values: Iterable[float]) -> Mean:
    """The mean of one value a seed, with half of its 95 % interval by Student's t."""
    found = np.array(list(values), np.float64)
    if len(found) < 2:
        return Mean(float(found.mean()) if len(found) else math.nan, math.nan)
    from scipy.stats import t  # takes half a second

    error = found.std(ddof=1) / math.sqrt(len(found))
    return Mean(float(found.mean()), float(t.ppf(0.975, len(found) - 1) * error))


def made_by() -> str:
    """The versions and the machine."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "jaxlib", "numpy"))
    python = f"Python {platform.python_version()}"
    return f"rosd_jax {rosd_jax.__version__}, {python}, {packages}; {platform.platform()}."


def draw(results: Sequence[Result], path: Path) -> None:
    """Reward and validation score by step, and the change on each set since before the training.

    By step: a line for the mean of each method, and a band over its seeds.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), dpi=110, layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    left.set(title="training", xlabel="step", ylabel="reward")
    middle.set(title="validation", xlabel="step", ylabel="avg@k in %")
    for method in methods_of(results):
        found = [result for result in results if result.cell.method == method]
        draw_band(left, method, [rewards(result.rows) for result in found])
        draw_band(middle, method, [scores(result.rows) for result in found])
    draw_changes(right, results)
    left.legend(frameon=False)
    figure.savefig(path)


def draw_changes(axes: Axes, results: Sequence[Result]) -> None:
    """A row for each set, the first at the top, and in it a point with its 95% interval for each method."""
    sets = sets_of(results)
    methods = methods_of(results)
    axes.axvline(0, color="tab:gray", lw=1)
    for count, method in enumerate(methods):
        last = [result.last for result in results if result.cell.method == method]
        changes = [mean_change([found[name] for found in last]) for name in sets]
        # A point is drawn without its bar if its interval is not known.
        bars = [100 * found.half if math.isfinite(found.half) else 0.0 for found in changes]
        rows = np.arange(len(sets)) + 0.5 * (count + 0.5) / len(methods) - 0.25
        axes.errorbar([100 * found.value for found in changes], rows, xerr=bars, fmt="o", capsize=3)
    axes.set_yticks(range(len(sets)), [f"{name}\n{where}" for name, where in sets.items()])
    axes.set_ylim(len(sets) - 0.5, -0.5)
    axes.set(title="before to last step", xlabel="change of avg@k in points, 95% interval")


def rewards(rows: Sequence[MetricsRow]) -> dict[int, float]:
    """The mean reward of each step."""
    return {row["step"]: number(row, "reward") for row in rows if row["split"] == "train"}


def scores(rows: Sequence[MetricsRow]) -> dict[int, float]:
    """The validation score in %, by step."""
    return {step: 100 * score for step, score in validation_scores(rows).items()}


def draw_band(axes: Axes, label: str, curves: Sequence[dict[int, float]]) -> None:
    """The mean of some curves, at the steps that all have, and a band from the lowest to the highest."""
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    if not steps:
        return
    values = np.array([[curve[step] for step in steps] for curve in curves])
    (line,) = axes.plot(steps, values.mean(axis=0), marker=".", label=label)
    axes.fill_between(steps, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15, lw=0)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; separate names by one comma")
    return names


def _rates(text: str) -> list[str]:
    """Rates as they are written, which is how commands and directories name them."""
    names = _names(text)
    try:
        good = all(0 < float(name) < math.inf for name in names)
    except ValueError:
        good = False
    if not good:
        raise argparse.ArgumentTypeError(f"{text!r} must be numbers above 0, separated by commas")
    return names


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be whole numbers, separated by commas") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
