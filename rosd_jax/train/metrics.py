"""What a run reports: metrics.jsonl for programs, and lines of a step for people.

    MetricsLog(path).write(step, split, numbers)
    MetricsLog(path).replace(step, split, numbers)   also removes earlier lines of that step and split
    MetricsLog.resume(path, keep)                    the log with only the lines for which keep(step, split)
    step_lines(step, total, numbers)                 what the console prints of a step

loop.py says in which order a step writes, which resuming relies on.
"""

from __future__ import annotations

import json
import math
import os
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rosd_jax import atomic
from rosd_jax.distill.notes import NOTES
from rosd_jax.errors import UserError

RESERVED = ("step", "split")
COLUMNS = 80  # of a terminal
NOTED = 10  # seconds of compiling in a step from which on the console mentions it


class MetricsLog:
    """An append-only file of JSON lines: `step`, `split`, then numbers in the given order."""

    def __init__(self, path: Path):
        self.path = path

    def write(self, step: int, split: str, numbers: Mapping[str, Any]) -> None:
        """Appends one line and returns once it is on the disk.

        Numbers are Python, NumPy or JAX scalars. Each is written as the shortest decimal that reads back as
        the same float64 (a float32 is first widened, exactly), so equal numbers are equal text. NaN and
        infinity, which JSON lacks, become null. Raises ValueError for a reserved key and TypeError for a
        value that is not a number.
        """
        line = _line(step, split, numbers)
        with open(self.path, "a", encoding="ascii", newline="\n") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def replace(self, step: int, split: str, numbers: Mapping[str, Any]) -> None:
        """Like `write`, but removes earlier lines of that step and split. The file is replaced atomically."""
        line = _line(step, split, numbers)
        kept = _kept_lines(self.path, lambda *place: place != (step, split))
        atomic.write_text(self.path, [text + "\n" for text in (*kept, line)])

    @classmethod
    def resume(cls, path: Path, keep: Callable[[int, str], bool]) -> MetricsLog:
        """The log with only the lines for which keep(step, split) is true.

        A last line that a kill cut off is dropped too. The file is replaced atomically. Raises UserError for
        a damaged line before the last.
        """
        if path.exists():
            atomic.write_text(path, [line + "\n" for line in _kept_lines(path, keep)])
        return cls(path)


def step_lines(step: int, total: int, numbers: Mapping[str, Any]) -> list[str]:
    """What is printed of a step: its line, why rollouts were not taught, and a long compilation.

    No line is wider than COLUMNS, unless the numbers are.
    """
    lines = [format_step(step, total, numbers)]
    for more in (format_left_out(numbers), format_compiled(numbers)):
        lines += textwrap.wrap(more, COLUMNS, initial_indent="  ", subsequent_indent="    ")
    return lines


def format_step(step: int, total: int, numbers: Mapping[str, Any]) -> str:
    """The line of a step. A number that is missing, NaN or infinite is shown as `-`.

    Quotes are left out if no rollout was reflected.
    """
    taught = numbers.get("taught")
    rows = sum(left_out(numbers).values())
    seconds = numbers.get("seconds")
    parts = [
        f"step {step:>{len(str(total))}}/{total}",
        f"reward {_show(numbers.get('reward'), '.3f'):>5}",
        "taught -" if taught is None else f"taught {taught}/{taught + rows}",
        f"loss {_show(numbers.get('loss'), '.5f'):>7}",
        f"{_show(seconds, '.1f' if (seconds or 0) < 100 else '.0f'):>4} s",
    ]
    if numbers.get("reflected") != 0:
        parts.insert(3, f"quotes {_show(numbers.get('quote_found'), '.0%'):>4}")
    return "  ".join(parts)


def left_out(numbers: Mapping[str, Any]) -> dict[str, int]:
    """Numbers of rollouts that were not taught, by reason."""
    return {note: int(numbers.get(f"out_{note}") or 0) for note in NOTES}


def format_left_out(numbers: Mapping[str, Any]) -> str:
    """`not taught: 40 group all right, 24 group all wrong`; empty if every rollout was taught."""
    counts = [f"{count} {NOTES[note]}" for note, count in left_out(numbers).items() if count]
    return f"not taught: {', '.join(counts)}" if counts else ""


def format_compiled(numbers: Mapping[str, Any]) -> str:
    """`compiled 7 programs in 81 s`; empty if it took less than NOTED seconds."""
    programs = numbers.get("programs_compiled") or 0
    seconds = numbers.get("seconds_compiling") or 0.0
    if seconds < NOTED:
        return ""
    return f"compiled {programs} programs in {seconds:.0f} s"


def _line(step: int, split: str, numbers: Mapping[str, Any]) -> str:
    taken = [name for name in RESERVED if name in numbers]
    if taken:
        raise ValueError(f"metric names {taken} are reserved")
    values = {name: _plain(name, value) for name, value in numbers.items()}
    return json.dumps({"step": int(step), "split": split, **values}, allow_nan=False)


def _kept_lines(path: Path, keep: Callable[[int, str], bool]) -> list[str]:
    """The lines for which keep(step, split) is true; none without a file. See `MetricsLog.resume`."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.removesuffix("\n").split("\n")
    kept = []
    for number, line in enumerate(lines, start=1):
        place = _place_of(line)
        # A kill can cut off only the last line; any other damage is reported, not dropped.
        if place is None and number < len(lines):
            raise UserError(
                f"{path}, line {number}: not a line of metrics, so the run cannot be resumed; "
                "remove that line or use another --workdir"
            )
        if place is not None and keep(*place):
            kept.append(line)
    return kept


def _place_of(line: str) -> tuple[int, str] | None:
    """Step and split of a line; None if it is damaged."""
    try:
        row = json.loads(line)
        return int(row["step"]), str(row["split"])
    except (ValueError, TypeError, KeyError):
        return None


def _plain(name: str, value: Any) -> int | float | None:
    number = np.asarray(value).item()
    if not isinstance(number, int | float):
        raise TypeError(f"metric {name} is {value!r}; it must be a number")
    if isinstance(number, bool):  # JSON would have true
        return int(number)
    return number if math.isfinite(number) else None


def _show(value: Any, form: str) -> str:
    return "-" if value is None or not math.isfinite(value) else format(float(value), form)
