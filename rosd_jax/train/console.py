"""What a person sees of a run: lines, and between them what the run is doing.

    with Console(sys.stdout) as console:
        console.say(text)                   a line
        console.stage("rollout")            what the run does from now on
        console.progress(96, 128)           how much of that is done
        console.compiling("learn")          a program that is being compiled; None: it is done
        console.begin(start, total)         from now on there are steps; console.at(step): this one
        console.expect({"step": 8})         the work that is left, for the estimate of the time
        with console.work("step"): ...      one piece of that work

On a terminal, a thread redraws one line in place while the run works or waits, so it moves even during a
compilation. Elsewhere (a pipe, a file, TERM=dumb) nothing is redrawn, and a stage that takes long writes
plain lines at growing intervals.

The command imports this module before all slow ones, so it uses only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TextIO, cast

from rosd_jax.train import stopping
from rosd_jax.train.stopping import ERASE

BAR_WIDTH = 12
# The cursor goes back to the first column, so that what a C++ library writes to stderr begins there.
CLEAR_REST = "\x1b[K\r"
TICK_S = 0.25  # between two redraws by the thread
REDRAW_S = 0.1  # the least between two redraws that changes of stage cause
COMPILES_S = 0.5  # a program is named once it has been compiling for this long
NOTES_S = (10, 30, 60)  # off a terminal: when a stage writes a line; later every SILENT_S
SILENT_S = 60  # off a terminal: a line is written at the latest after this long
STEP = "step"  # the work of a step
RECENT = 10  # pieces of work whose mean predicts the next


class Work(NamedTuple):
    """A piece of work that is under way."""

    kind: str
    began: float
    compiled: float  # seconds that the run had compiled for by then


class Remaining:
    """How long the work that is left will take, judged by the same kind of work in this start of the run."""

    def __init__(self) -> None:
        self._left: Counter[str] = Counter()
        self._seconds: dict[str, list[float]] = {}

    def expect(self, left: Mapping[str, int]) -> None:
        """Sets how many pieces of each kind of work are left."""
        self._left = Counter(left)

    def done(self, kind: str, seconds: float) -> None:
        """Takes one piece of work off what is left. seconds: what it took, without compiling."""
        self._left[kind] = max(self._left[kind] - 1, 0)
        self._seconds.setdefault(kind, []).append(seconds)

    def pace(self, kind: str) -> float | None:
        """Seconds of a piece of work; None if unknown. The first step is not counted, since it warms up."""
        measured = self._seconds.get(kind, [])
        measured = measured[kind == STEP :][-RECENT:]
        return sum(measured) / len(measured) if measured else None

    def seconds(self, kind: str | None, spent: float) -> tuple[float, list[str]] | None:
        """The seconds left, and the kinds of work left that have not been timed and are not included.

        None if the pace of the steps is not known yet, or nothing is known to be left.
        kind, spent: the work under way, which counts as left, and the seconds that it has taken so far.
        """
        paces = {name: self.pace(name) for name, count in self._left.items() if count}
        if STEP in paces and paces[STEP] is None:
            return None
        total = sum(self._left[name] * pace for name, pace in paces.items() if pace is not None)
        total -= min(spent, paces.get(kind or "") or 0.0)
        missing = sorted(name for name, pace in paces.items() if pace is None)
        return (total, missing) if total >= 1 else None


class Console:
    """Progress for people. Nothing is printed without a stream.

    If nobody reads the stream any more, the run is asked to stop.
    """

    def __init__(self, stream: TextIO | None, clock: Callable[[], float] = time.monotonic):
        self.live = stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"
        self._stream = stream
        self._clock = clock
        # Guards what is written, and `_remaining`; taken for moments only. Reentrant, since Python may write
        # a warning to stderr at any moment.
        self._lock = threading.RLock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="console", daemon=True)
        self._step = 0
        self._total = 0  # steps of the run; 0: not known yet
        self._stage = ""
        self._progress: tuple[int, int] | None = None
        self._entered = clock()  # the stage
        self._note_at = float(NOTES_S[0])  # seconds into the stage at which the next note is due
        self._program: tuple[str, float] | None = None  # that is compiling, and since when
        self._compiled = 0.0  # seconds
        self._work: Work | None = None  # under way
        self._remaining = Remaining()
        self._printed = clock()
        self._drawn = -REDRAW_S
        self._shown = ""  # the line on the terminal
        self._open_line = False  # stderr is in the middle of a line
        self._stderr: TextIO | None = None

    def __enter__(self) -> Console:
        if self._stream is None:
            return self
        if self.live and sys.stderr.isatty():
            self._stderr = sys.stderr
            sys.stderr = cast(TextIO, _Above(self, sys.stderr))
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        if self._stream is None:
            return
        self._closed.set()
        self._thread.join()
        with self._lock:
            self._erase()
        if self._stderr is not None:
            sys.stderr = self._stderr

    def begin(self, start: int, total: int) -> None:
        """The run makes steps start + 1 to total."""
        self._step = start
        self._total = total

    def at(self, step: int) -> None:
        """The run works on a step, or on what follows it."""
        self._step = step

    def expect(self, left: Mapping[str, int]) -> None:
        """How many pieces of each kind of work are left."""
        with self._lock:
            self._remaining.expect(left)

    def stage(self, name: str) -> None:
        """What the run does from now on."""
        with self._lock:
            self._stage = name
            self._progress = None
            self._entered = self._clock()
            self._note_at = float(NOTES_S[0])
            if self._entered - self._drawn >= REDRAW_S:
                self._draw(self._entered)

    def progress(self, done: int, total: int) -> None:
        """How much of the stage is done. Costs nothing, so call it as often as you like."""
        self._progress = (done, total)

    def compiling(self, name: str | None) -> None:
        """JAX begins to compile a program, or ends."""
        now = self._clock()
        if self._program is not None:
            self._compiled += now - self._program[1]
        self._program = None if name is None else (name, now)

    @contextlib.contextmanager
    def work(self, kind: str) -> Iterator[None]:
        """One piece of the expected work."""
        work = Work(kind, self._clock(), self._compiled)
        self._work = work
        try:
            yield
        finally:
            self._work = None
        with self._lock:
            self._remaining.done(kind, self._spent(work, self._clock()))

    def say(self, text: str) -> None:
        """Prints a line, or several."""
        with self._lock:
            self._printed = self._clock()
            if not self._may_draw():
                self._erase()
                self._write(f"{text}\n")
                return
            line = self._line(self._printed) if self._stage else ""
            erase = ERASE if self._shown else ""
            self._shown = line
            self._drawn = self._printed
            self._write(f"{erase}{text}\n{line}{CLEAR_REST if line else ''}")

    def tick(self) -> None:
        """Redraws the line on a terminal; elsewhere writes a note if one is due. The thread calls this."""
        with self._lock:
            now = self._clock()
            if self.live:
                self._draw(now)
                return
            seconds = now - self._entered
            if not self._stage or (seconds < self._note_at and now - self._printed < SILENT_S):
                return
            self._note_at = next((s for s in NOTES_S if s > seconds), SILENT_S * (seconds // SILENT_S + 1))
            self.say(self._note(now))

    def above(self, stream: TextIO, text: str) -> int:
        """Writes text to a stream of the same terminal, above the line."""
        with self._lock:
            self._erase()
            written = stream.write(text)
            stream.flush()
            self._open_line = not text.endswith("\n")
        return written

    def _watch(self) -> None:
        # A full disk or a closed terminal: the run itself finds out when it prints its next line.
        with contextlib.suppress(OSError):
            while not self._closed.wait(TICK_S):
                self.tick()

    def _note(self, now: float) -> str:
        """`step 3: rollout 96/128, compiling advance, 30 s`."""
        step = f"step {self._step}: " if self._total else ""
        parts = [f"{step}{self._doing()}", *self._compiling(now), _duration(now - self._entered)]
        return ", ".join([*parts, *self._left(now)])

    def _line(self, now: float) -> str:
        """The line for the terminal, one column narrower than it: a full one would wrap."""
        step = f"step {self._step}/{self._total}" if self._total else ""
        what = "  ".join(part for part in (step, self._doing(), *self._compiling(now)) if part)
        times = "  ".join([clock_text(now - self._entered), *self._left(now)])
        return fitted(bar(self._finished(), self._total), what, times, self._width() - 1)

    def _finished(self) -> int:
        """Steps that are made."""
        work = self._work
        return self._step - (work is not None and work.kind == STEP)

    def _doing(self) -> str:
        """`rollout 96/128`."""
        progress = self._progress
        return self._stage if progress is None else f"{self._stage} {progress[0]}/{progress[1]}"

    def _compiling(self, now: float) -> list[str]:
        program = self._program  # read once: the run may change it
        return [f"compiling {program[0]}"] if program and now - program[1] >= COMPILES_S else []

    def _left(self, now: float) -> list[str]:
        """`left 4:10`, or `left 4:10 + eval` if no evaluation has been timed yet; empty if unknown."""
        work = self._work
        estimate = self._remaining.seconds(work and work.kind, self._spent(work, now) if work else 0.0)
        if estimate is None:
            return []
        seconds, missing = estimate
        words = dict.fromkeys(name.split()[0] for name in missing)  # without the names of sets
        return [" + ".join([f"left {clock_text(seconds)}", *words])]

    def _spent(self, work: Work, now: float) -> float:
        """Seconds spent on a piece of work so far, without compiling."""
        program = self._program
        compiled = self._compiled + (now - program[1] if program else 0.0)
        return max(now - work.began - (compiled - work.compiled), 0.0)

    def _draw(self, now: float) -> None:
        if not self._stage or not self._may_draw():
            return
        line = self._line(now)
        if line != self._shown:
            self._shown = line
            self._drawn = now
            self._write(f"\r{line}{CLEAR_REST}")

    def _may_draw(self) -> bool:
        """Whether the terminal takes more, shows this process, and stands at the start of a line."""
        if not self.live or self._open_line or self._closed.is_set():
            return False
        assert self._stream is not None
        terminal = self._stream.fileno()
        # A terminal that is paused (Ctrl-S) takes nothing, and to wait for it would hold up the run.
        return not in_background(terminal) and bool(select.select([], [terminal], [], 0)[1])

    def _erase(self) -> None:
        # In the background, the shell has written over the line.
        if self._shown and self._stream is not None and not in_background(self._stream.fileno()):
            self._write(ERASE)
        self._shown = ""

    def _width(self) -> int:
        assert self._stream is not None
        with contextlib.suppress(OSError):
            return os.get_terminal_size(self._stream.fileno()).columns or 80
        return 80

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            # In one call, which a terminal carries out whole: lines of other writers do not mix with this.
            print(text, end="", file=self._stream, flush=True)
        except BrokenPipeError:
            stopping.reader_left()


class _Above:
    """Stands for sys.stderr on a terminal with a line: what is written goes above the line."""

    def __init__(self, console: Console, stream: TextIO):
        self._console = console
        self._stream = stream

    def write(self, text: str) -> int:
        return self._console.above(self._stream, text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def in_background(terminal: int) -> bool:
    """Whether this process was put into the background of the terminal, where it should not draw."""
    try:
        return os.tcgetpgrp(terminal) != os.getpgrp()
    except OSError:  # not the terminal that controls this process
        return False


def bar(done: int, total: int) -> str:
    """`[====>       ]`; empty without steps."""
    if not total:
        return ""
    filled = BAR_WIDTH * min(done, total) // total
    return "[" + ("=" * filled + ">" * (filled < BAR_WIDTH)).ljust(BAR_WIDTH) + "]"


def fitted(bar: str, what: str, times: str, width: int) -> str:
    """A line of printable ASCII, at most `width` wide. If space is short, first the bar goes, then words."""
    # Other characters may be two columns wide, or none, or move the cursor.
    what = "".join(c if " " <= c <= "~" else "?" for c in what)
    whole = "  ".join(part for part in (bar, what, times) if part)
    if len(whole) <= width:
        return whole
    space = width - len(times) - 2
    if len(what) > space:
        what = what[: max(space - 3, 0)] + "..."
    return f"{what}  {times}"[: max(width, 0)]


def clock_text(seconds: float) -> str:
    """`0:07`, `12:30`, `1:06:40`."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _duration(seconds: float) -> str:
    """`30 s`, `2 min`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds // 60:.0f} min"
