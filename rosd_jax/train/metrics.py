"""What a run reports: metrics.jsonl for programs; a line per step and a progress bar for people.

    MetricsLog(path).write(step, split, numbers)
    MetricsLog(path).replace(step, split, numbers)   also removes earlier lines of that step and split
    MetricsLog.resume(path, keep)                    the log with only the lines for which keep(step, split)
    Console(total_steps).stage(name) / .line(step, numbers) / .say(text) / .close()

loop.py says in which order a step writes, which resuming relies on.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rosd_jax import atomic
from rosd_jax.distill.notes import NOTES
from rosd_jax.errors import UserError
from rosd_jax.train import stopping
from rosd_jax.train.stopping import ERASE

RESERVED = ("step", "split")
BAR_WIDTH = 20
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


class Console:
    """Progress for people: on a terminal lines above a progress bar, elsewhere plain lines.

    If nobody reads the stream any more, the run is asked to stop.
    """

    def __init__(self, total_steps: int, start_step: int = 0, stream: TextIO | None = None):
        self.total = total_steps
        self.start = start_step
        self.step = start_step
        self.stream = sys.stdout if stream is None else stream
        self.live = self.stream.isatty() and os.environ.get("TERM") != "dumb"
        self.began = time.monotonic()
        self.stage_name = ""

    def stage(self, name: str) -> None:
        """Shows on the bar what the run is doing."""
        self.stage_name = name
        self._draw()

    def line(self, step: int, numbers: Mapping[str, Any]) -> None:
        """Prints the line of a step, why rollouts were not taught, and a long compilation."""
        self.step = step
        self.say(format_step(step, self.total, numbers))
        for more in (format_left_out(numbers), format_compiled(numbers)):
            if more:
                self.say(f"  {more}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        self._print(f"{ERASE}{text}\n" if self.live else f"{text}\n")
        self._draw()

    def close(self) -> None:
        """Erases the bar."""
        if self.live:
            self._print(ERASE)

    def _draw(self) -> None:
        if not self.live:
            return
        elapsed = time.monotonic() - self.began
        bar = format_bar(self.step, self.start, self.total, elapsed, self.stage_name)
        width = shutil.get_terminal_size().columns - 1  # a bar of full width would wrap
        self._print(ERASE + bar[:width])

    def _print(self, text: str) -> None:
        try:
            print(text, end="", file=self.stream, flush=True)
        except BrokenPipeError:
            stopping.reader_left()


def format_step(step: int, total: int, numbers: Mapping[str, Any]) -> str:
    """The line of a step. A number that is missing, NaN or infinite is shown as `-`."""
    taught = numbers.get("taught")
    rows = sum(left_out(numbers).values())
    exact = f" exact {_show(numbers['quote_exact'], '.0%')}" if "quote_exact" in numbers else ""
    return "  ".join(
        (
            f"step {step:>{len(str(total))}}/{total}",
            f"reward {_show(numbers.get('reward'), '.3f'):>5}",
            "taught -" if taught is None else f"taught {taught}/{taught + rows}",
            f"quotes found {_show(numbers.get('quote_found'), '.0%'):>4}{exact}",
            f"active tokens {_show(numbers.get('active_tokens_share'), '.1%'):>5}",
            f"loss {_show(numbers.get('loss'), '.5f'):>7}",
            f"{_show(numbers.get('tokens_per_second_rollout'), ',.0f'):>6} tokens/s",
        )
    )


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


def format_bar(step: int, start: int, total: int, elapsed: float, stage: str) -> str:
    """`[====>     ] 4/10  elapsed 0:12  left 0:18  rollout`; `left` assumes the pace since this start."""
    filled = BAR_WIDTH * min(step, total) // max(total, 1)
    left = elapsed * (total - step) / (step - start) if step > start else math.nan
    bar = ("=" * filled + ">" * (filled < BAR_WIDTH)).ljust(BAR_WIDTH)
    return f"[{bar}] {step}/{total}  elapsed {_clock(elapsed)}  left {_clock(left)}  {stage}"


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


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "-"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
