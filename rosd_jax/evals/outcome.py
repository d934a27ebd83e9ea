"""Reads the numbers of a run back, and computes each data set's change between two evaluations.

The items of a set are the same before and after, and some are harder than others. So the change is taken
item by item, and its standard error is that of the mean of these differences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from rosd_jax.errors import UserError
from rosd_jax.evals.generations import generations_path

MetricsRow = dict[str, Any]  # one line of metrics.jsonl
# Fields that must agree, or else a change of avg@k is not due to the model. The samples per item (k) are not
# among them, since the mean of avg@k does not depend on k.
CONDITIONS = {
    "n": "items",
    "temperature": "temperature",
    "top_p": "top_p",
    "max_new_tokens": "max_new_tokens",
}
PROBLEMS = "problems_crc32"


@dataclass(frozen=True)
class Outcome:
    """The first and the last evaluation of one set. `after` is None if there is only one."""

    name: str
    in_domain: bool  # whether training drew from this set
    before: MetricsRow
    after: MetricsRow | None
    change_se: float  # standard error of the change of avg; NaN if unknown
    paired: bool  # whether it was taken item by item
    differences: tuple[str, ...] = ()  # why the two cannot be compared, in words


def read_metrics(path: Path) -> list[MetricsRow]:
    """Rows by step, the latest of each (step, split); [] if there is no file.

    A last line that a killed run left unfinished is ignored. Raises UserError for any other malformed line.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: dict[tuple[int, str], MetricsRow] = {}
    for count, line in enumerate(lines[:-1], 1):  # what follows the last line feed is unfinished
        if line.strip():
            row = _parse(f"{path} line {count}", line)
            rows[row["step"], row["split"]] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def validation_scores(rows: Sequence[MetricsRow]) -> dict[int, float]:
    """The mean avg@k over the validation sets, by step, of lines under the same conditions as the latest."""
    latest = {row["split"]: row for row in rows if row["split"].startswith("validation/")}
    found: dict[int, list[MetricsRow]] = {}
    for row in rows:
        if row["split"] in latest and not _differences(row, latest[row["split"]]):
            found.setdefault(row["step"], []).append(row)
    return {step: mean(scored, "avg") for step, scored in found.items()}


def best_step(rows: Sequence[MetricsRow]) -> int | None:
    """The step with the highest validation score, the earliest of equal ones; None without validation."""
    scores = {step: score for step, score in validation_scores(rows).items() if math.isfinite(score)}
    return max(scores, key=lambda step: (scores[step], -step)) if scores else None


def compare(
    rows: Sequence[MetricsRow], workdir: Path, trained_on: Sequence[str], until: int | None = None
) -> list[Outcome]:
    """One outcome per set: in-domain sets (`trained_on`) first, then in the order of first appearance.

    The earliest evaluation of each set is compared with that of step `until`, or by default with the latest.
    """
    by_set: dict[str, list[MetricsRow]] = {}
    for row in rows:
        if row["split"].startswith("eval/"):
            by_set.setdefault(row["split"].removeprefix("eval/"), []).append(row)
    outcomes = []
    for name, found in by_set.items():
        before = found[0]
        after = found[-1] if len(found) > 1 else None
        if until is not None:
            after = next((row for row in found[1:] if row["step"] == until), None)
        differences = _differences(before, after or {})
        se = _paired_se(workdir, name, before, after) if after and not differences else None
        paired = se is not None
        if se is None:
            se = math.hypot(number(before, "avg_se"), number(after or {}, "avg_se"))
        outcomes.append(Outcome(name, name in trained_on, before, after, se, paired, differences))
    return sorted(outcomes, key=lambda outcome: not outcome.in_domain)


def number(row: MetricsRow, field: str) -> float:
    """The field as a float; NaN if it is absent, null or not a number."""
    value = row.get(field)
    return float(value) if isinstance(value, int | float) else math.nan


def mean(rows: Sequence[MetricsRow], field: str) -> float:
    """The mean over the rows in which the field is a finite number; NaN if there is none."""
    found = [value for row in rows if math.isfinite(value := number(row, field))]
    return sum(found) / len(found) if found else math.nan


def _differences(before: MetricsRow, after: MetricsRow) -> tuple[str, ...]:
    """The conditions in which two evaluations differ. A field that one of them lacks does not count."""
    found = []
    for field, name in CONDITIONS.items():
        old = number(before, field)
        new = number(after, field)
        if math.isfinite(old + new) and old != new:
            found.append(f"{name} {old:g} -> {new:g}")
    old = number(before, PROBLEMS)
    new = number(after, PROBLEMS)
    if math.isfinite(old + new) and old != new:
        found.append("other problems or gold answers")
    return tuple(found)


def _parse(where: str, line: str) -> MetricsRow:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and type(row.get("step")) is int and type(row.get("split")) is str:
        return row
    raise UserError(f"{where} must be a JSON object with step and split; correct or delete the line")


def _paired_se(workdir: Path, name: str, before: MetricsRow, after: MetricsRow) -> float | None:
    """Standard error of the mean change per item; None unless both files have the same items."""
    old, new = (_item_means(workdir, row["step"], name) for row in (before, after))
    if not old or old.keys() != new.keys():
        return None
    change = np.array([new[uid] - old[uid] for uid in old])
    return float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else math.nan


def _item_means(workdir: Path, step: int, name: str) -> Mapping[str, float]:
    """Mean reward of each item of one evaluation; {} if its file is missing or damaged."""
    path = generations_path(workdir, step, name)
    try:
        found = path.stat()
    except OSError:
        return {}
    return _read_item_means(path, found.st_mtime_ns, found.st_size)


# The page is written after every step, and the files may have gigabytes.
@lru_cache(maxsize=256)
def _read_item_means(path: Path, mtime_ns: int, size: int) -> Mapping[str, float]:
    """`_item_means` of a file in the state that the time and the size name."""
    rewards: dict[str, list[float]] = {}
    try:
        with open(path, encoding="ascii") as lines:
            for row in map(json.loads, lines):
                rewards.setdefault(row["uid"], []).append(float(row["reward"]))
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # the report then says that the interval is unpaired
    return {uid: sum(found) / len(found) for uid, found in rewards.items()}
