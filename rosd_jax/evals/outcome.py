"""The numbers of a run read back, and each data set's change between two evaluations.

The items of a set are the same before and after, and some are harder than others; so the change is
taken item by item, and its standard error is that of the mean of these differences.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rosd_jax.config import UserError
from rosd_jax.evals.evaluate import generations_path

Row = dict[str, Any]  # one line of metrics.jsonl


@dataclass(frozen=True)
class Outcome:
    """The first and the last evaluation of one set; `after` is None where there is only one."""

    name: str
    in_domain: bool  # the set is the one that training drew from
    before: Row
    after: Row | None
    change_se: float  # standard error of the change of avg; NaN where it cannot be told
    paired: bool  # taken item by item


def read_metrics(path: Path) -> list[Row]:
    """Rows by step, the last written of each (step, split); [] where there is no file.

    A last line that a killed run left unfinished is passed over. Raises UserError for another line
    that is no row.
    """
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows: dict[tuple[int, str], Row] = {}
    for count, line in enumerate(lines[:-1], 1):  # behind the last line feed: unfinished
        if line.strip():
            row = _parse(f"{path} line {count}", line)
            rows[row["step"], row["split"]] = row
    return sorted(rows.values(), key=lambda row: row["step"])


def compare(rows: Sequence[Row], workdir: Path, trained_on: Sequence[str]) -> list[Outcome]:
    """One outcome a set: in-domain (`trained_on`) first, then in the order of their first appearance."""
    by_set: dict[str, list[Row]] = {}
    for row in rows:
        if row["split"].startswith("eval/"):
            by_set.setdefault(row["split"].removeprefix("eval/"), []).append(row)
    outcomes = []
    for name, found in by_set.items():
        before, after = found[0], found[-1] if len(found) > 1 else None
        se = _paired_se(workdir, name, before, after) if after else None
        paired = se is not None
        if se is None:
            se = math.hypot(number(before, "avg_se"), number(after or {}, "avg_se"))
        outcomes.append(Outcome(name, name in trained_on, before, after, se, paired))
    return sorted(outcomes, key=lambda outcome: not outcome.in_domain)


def number(row: Row, field: str) -> float:
    """The field as a float; NaN where it is absent, null or no number."""
    value = row.get(field)
    return float(value) if isinstance(value, int | float) else math.nan


def _parse(where: str, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    if isinstance(row, dict) and type(row.get("step")) is int and type(row.get("split")) is str:
        return row
    raise UserError(f"{where} must be a JSON object with step and split; mend or drop the line")


def _paired_se(workdir: Path, name: str, before: Row, after: Row) -> float | None:
    """Standard error of the mean item-wise change; None unless both files hold the same items."""
    old, new = (_item_means(workdir, row["step"], name) for row in (before, after))
    if not old or old.keys() != new.keys():
        return None
    change = np.array([new[uid] - old[uid] for uid in old])
    return float(change.std(ddof=1) / math.sqrt(len(change))) if len(change) > 1 else math.nan


def _item_means(workdir: Path, step: int, name: str) -> dict[str, float]:
    """Mean reward of each item of one evaluation; {} where its file is gone or was spoiled."""
    rewards: dict[str, list[float]] = {}
    try:
        text = generations_path(workdir, step, name).read_text(encoding="ascii")
        for row in map(json.loads, text.splitlines()):
            rewards.setdefault(row["uid"], []).append(float(row["reward"]))
    except (OSError, ValueError, LookupError, TypeError):
        return {}  # the report then says that the interval is unpaired
    return {uid: sum(found) / len(found) for uid, found in rewards.items()}
