"""What a person sees of a run while it goes on, on terminals of any kind and in files."""

import contextlib
import fcntl
import io
import logging
import os
import struct
import subprocess
import sys
import termios
import threading
import time
import tty

import jax
import jax.numpy as jnp
import pytest

from rosd_jax.config import default_config
from rosd_jax.train.compiling import Compiled
from rosd_jax.train.console import Console, Remaining, bar, clock_text, fitted
from rosd_jax.train.schedule import work_after
from support import ROOT


class Clock:
    """A clock that a test sets."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Screen:
    """A terminal that knows what the console uses. It fails where a line of the console would wrap."""

    def __init__(self, columns=80):
        self.columns = columns
        self.master, slave = os.openpty()
        tty.setraw(slave)
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.set_blocking(self.master, False)
        self.stream = open(slave, "w")
        self.lines = [""]
        self.column = 0
        self.drawn = 0  # how often the line was drawn

    def read(self):
        """Takes what was written, and returns what the last line shows."""
        text = ""
        with contextlib.suppress(BlockingIOError):
            while True:
                text += os.read(self.master, 4096).decode()
        while text:
            text = self._take(text)
        return self.lines[-1]

    def close(self):
        self.stream.close()
        os.close(self.master)

    def _take(self, text):
        if text.startswith("\x1b[K"):
            self.lines[-1] = self.lines[-1][: self.column]
            self.drawn += 1
            return text[3:]
        if text[0] == "\r":
            self.column = 0
        elif text[0] == "\n":
            self.lines.append("")
            self.column = 0
        else:
            assert " " <= text[0] <= "~"
            line = self.lines[-1]
            self.lines[-1] = line[: self.column] + text[0] + line[self.column + 1 :]
            self.column += 1
            assert self.column < self.columns or self.lines[-1].startswith("printed"[: self.column])
        return text[1:]


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def screen(monkeypatch, request):
    monkeypatch.setenv("TERM", "xterm")
    screen = Screen(getattr(request, "param", 80))
    yield screen
    screen.close()


def notes(stream):
    return stream.getvalue().splitlines()


# --- on a terminal -------------------------------------------------------------------------------------


def test_one_line_shows_step_stage_progress_compilation_and_times(screen, clock):
    console = Console(screen.stream, clock)
    console.stage("reading the weights")
    assert screen.read() == "reading the weights  0:00"
    console.begin(0, 10)
    console.at(3)
    console.stage("rollout")
    console.progress(96, 128)
    console.compiling("advance")
    clock.now = 7.9
    console.tick()
    assert screen.read() == "[===>        ]  step 3/10  rollout 96/128  compiling advance  0:07"
    console.compiling(None)
    console.tick()
    assert screen.read() == "[===>        ]  step 3/10  rollout 96/128  0:07"
    with console.work("step"):
        console.tick()
    assert screen.read().startswith("[==>         ]  step 3/10"), "a step that is being made is not made"
    assert len(screen.lines) == 1


@pytest.mark.parametrize("screen", [1, 2, 10, 40, 80, 200], indirect=True)
def test_the_line_never_wraps_and_lines_above_it_are_whole(screen, clock):
    console = Console(screen.stream, clock)
    console.begin(0, 1000)
    printed = []
    for step in range(1, 20):
        console.at(step)
        clock.now += 1000
        console.stage("eval gym:\t漢字\x1b[2J" * step)
        console.progress(step, 20)
        console.tick()
        printed.append(f"printed {step}")
        console.say(printed[-1])
    screen.read()
    assert screen.lines[:-1] == printed


def test_what_does_not_fit_is_cut_and_the_times_stay():
    what, times = "step 3/10  eval one", "0:07  left 1:00"
    whole = f"[===>   ]  {what}  {times}"
    assert fitted("[===>   ]", what, times, len(whole)) == whole
    assert fitted("[===>   ]", what, times, len(whole) - 1) == f"{what}  {times}"
    assert fitted("", what, times, 30) == f"step 3/10 ...  {times}"
    for width in range(-1, 60):
        assert len(fitted("[===>   ]", what, times, width)) <= max(width, 0)


def test_the_bar_and_the_clock():
    assert (bar(0, 10), bar(5, 10), bar(10, 10), bar(0, 0)) == (
        "[>           ]",
        "[======>     ]",
        "[============]",
        "",
    )
    assert [clock_text(seconds) for seconds in (0, 7.9, 750, 4000)] == ["0:00", "0:07", "12:30", "1:06:40"]


def test_the_line_moves_while_the_run_waits_and_the_thread_ends_with_it(screen):
    with Console(screen.stream) as console:
        console.say("printed")
        console.stage("update")
        seen = []
        for _ in range(3):
            time.sleep(1)
            seen.append(screen.read())
        assert "console" in [thread.name for thread in threading.enumerate()]
    assert seen == sorted(set(seen)) and all(line.startswith("update  0:0") for line in seen), seen
    assert screen.read() == "" and screen.lines == ["printed", ""] and screen.column == 0
    assert "console" not in [thread.name for thread in threading.enumerate()]
    console.tick()
    assert screen.read() == "", "nothing is drawn after the end"


def test_a_fault_ends_the_thread_and_clears_the_line(screen):
    with pytest.raises(ZeroDivisionError), Console(screen.stream) as console:
        console.stage("update")
        raise ZeroDivisionError
    assert screen.read() == "" and "console" not in [thread.name for thread in threading.enumerate()]


def test_quick_changes_are_drawn_ten_times_a_second_at_most(screen, clock):
    console = Console(screen.stream, clock)
    for number in range(1000):
        clock.now = number / 1000
        console.stage(f"stage {number}")
        console.progress(number, 1000)
    screen.read()
    assert 5 <= screen.drawn <= 11
    console.tick()
    assert screen.read() == "stage 999 999/1000  0:00"


def test_what_is_written_to_stderr_stands_above_the_line(screen, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen.stream)
    with Console(screen.stream) as console:
        console.stage("update")
        handler = logging.StreamHandler()  # which keeps the stream, as absl's does
        handler.emit(logging.makeLogRecord({"msg": "printed by a logger"}))
        print("printed in", end=" ", file=sys.stderr)
        console.tick()
        print("two pieces", file=sys.stderr)
        console.tick()
        assert screen.read() == "update  0:00"
    handler.emit(logging.makeLogRecord({"msg": "printed at the end"}))
    screen.read()
    assert screen.lines == ["printed by a logger", "printed in two pieces", "printed at the end", ""]
    assert sys.stderr is screen.stream


def test_a_paused_terminal_does_not_hold_up_the_run(screen, clock):
    console = Console(screen.stream, clock)
    console.stage("rollout")
    screen.read()
    termios.tcflow(screen.stream.fileno(), termios.TCOOFF)  # Ctrl-S
    for clock.now in (1.0, 2.0, 3.0):
        console.stage("update")
        console.tick()
    termios.tcflow(screen.stream.fileno(), termios.TCOON)
    assert screen.read() == "rollout  0:00"
    console.tick()
    assert screen.read() == "update  0:00"


DRAWS = """
import os, sys
from rosd_jax.train.console import Console
if {background}:
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        sys.exit()
    os.setpgid(0, 0)
console = Console(sys.stdout)
console.stage("update")
console.say("printed")
console.tick()
"""


@pytest.mark.parametrize("background", [False, True])
def test_a_run_in_the_background_of_a_shell_draws_nothing(background):
    spawn = "import pty, sys; pty.spawn(sys.argv[1:])"
    command = [sys.executable, "-c", spawn, sys.executable, "-c", DRAWS.format(background=background)]
    environment = os.environ | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    pipes = dict(stdin=subprocess.DEVNULL, capture_output=True)
    printed = subprocess.run(command, env=environment, timeout=60, **pipes).stdout
    assert b"printed\r\n" in printed
    assert (printed == b"printed\r\n") == background and (b"update  0:00" in printed) != background


# --- elsewhere -----------------------------------------------------------------------------------------


def test_off_a_terminal_a_short_run_prints_its_lines_alone(clock):
    stream = io.StringIO()
    console = Console(stream, clock)
    console.say("headline")
    for stage in ("rollout", "reflect", "update"):
        console.stage(stage)
        console.progress(1, 2)
        clock.now += 9.9
        console.tick()
    console.say("step 1/1")
    assert notes(stream) == ["headline", "step 1/1"]


def test_off_a_terminal_a_long_stage_is_told_at_growing_intervals(clock):
    stream = io.StringIO()
    console = Console(stream, clock)
    console.stage("reading the weights")
    told = {}
    for second in range(200):
        clock.now = float(second)
        if second == 25:
            console.begin(0, 10)
            console.at(1)
            console.progress(3, 8)
            console.compiling("advance")
        before = len(notes(stream))
        console.tick()
        for line in notes(stream)[before:]:
            told[second] = line
    assert told == {
        10: "reading the weights, 10 s",
        30: "step 1: reading the weights 3/8, compiling advance, 30 s",
        60: "step 1: reading the weights 3/8, compiling advance, 60 s",
        120: "step 1: reading the weights 3/8, compiling advance, 2 min",
        180: "step 1: reading the weights 3/8, compiling advance, 3 min",
    }
    assert stream.getvalue().replace("\n", "").isprintable()


def test_a_log_is_never_silent_for_more_than_a_minute(clock):
    stream = io.StringIO()
    console = Console(stream, clock)
    last = 0.0
    for second in range(1000):
        clock.now = float(second)
        if second % 9 == 0:
            console.stage(f"stage {second // 9}")
        before = len(notes(stream))
        console.tick()
        assert len(notes(stream)) <= before + 1
        last = clock.now if len(notes(stream)) > before else last
        assert clock.now - last <= 60
    assert len(notes(stream)) == 16


def test_a_dumb_terminal_gets_plain_lines(screen, monkeypatch, clock):
    monkeypatch.setenv("TERM", "dumb")
    console = Console(screen.stream, clock)
    console.stage("rollout")
    clock.now = 10.0
    console.tick()
    assert os.read(screen.master, 1000) == b"rollout, 10 s\n"


def test_without_a_stream_nothing_runs(clock):
    with Console(None, clock) as console:
        console.stage("rollout")
        console.say("headline")
        assert "console" not in [thread.name for thread in threading.enumerate()]


# --- the time that is left -----------------------------------------------------------------------------


def measured(*steps, left, **others):
    remaining = Remaining()
    for kind, seconds in others.items():
        remaining.done(kind, seconds)
    remaining.expect(left)
    for seconds in steps:
        remaining.done("step", seconds)
    return remaining


def test_no_time_is_told_before_the_second_step():
    left = {"step": 10, "eval": 1}
    assert measured(left=left, eval=5).seconds("step", 3) is None
    assert measured(99, left=left, eval=5).seconds("step", 3) is None
    assert measured(99, 2, left=left, eval=5).seconds(None, 0) == (8 * 2 + 5, [])


def test_the_work_under_way_counts_down_but_no_further_than_its_usual_time():
    remaining = measured(99, 2, left={"step": 10})
    times = [remaining.seconds("step", spent)[0] for spent in (0, 0.5, 2, 50)]
    assert times == [16, 15.5, 14, 14]


def test_an_evaluation_that_was_not_timed_yet_is_told():
    remaining = measured(99, 2, left={"step": 3, "eval": 2})
    assert remaining.seconds(None, 0) == (2, ["eval"])
    remaining.done("eval", 30)
    assert remaining.seconds(None, 0) == (2 + 30, [])


def test_what_is_not_included_in_the_time_is_named(screen, clock):
    console = Console(screen.stream, clock)
    console.begin(0, 3)
    console.expect({"step": 3, "eval b": 1, "eval a": 1, "validation a": 1})
    for step in (1, 2):
        console.at(step)
        with console.work("step"):
            clock.now += 70
    console.stage("rollout")
    assert screen.read() == "[========>   ]  step 2/3  rollout  0:00  left 1:10 + eval + validation"


def test_nothing_is_told_where_no_time_is_left():
    remaining = measured(99, 2, left={"step": 2, "eval": 1}, eval=5)
    assert remaining.seconds("eval", 3) == (2, [])
    assert remaining.seconds("eval", 5) is None
    remaining.done("eval", 5)
    assert remaining.seconds(None, 0) is None


class Sets:
    """The named sets of a run."""

    def sets(self, split):
        return {"validation": ["a"], "eval": ["a", "b"]}[split]


def test_the_work_to_come_is_what_the_config_says():
    config = default_config()
    config.steps = 10
    config.validation.every = 4
    config.eval.every = 0
    config.checkpoint.every = 5
    work = dict(work_after(config, Sets(), 0))
    assert work == {"step": 10, "validation a": 3, "eval a": 1, "eval b": 1, "checkpoint": 2}
    assert dict(work_after(config, Sets(), 8)) == {
        "step": 2,
        "validation a": 1,
        "eval a": 1,
        "eval b": 1,
        "checkpoint": 1,
    }
    assert not work_after(config, Sets(), 10).total()


def test_compiling_does_not_count_as_work(screen, clock):
    console = Console(screen.stream, clock)
    console.begin(0, 5)
    console.expect({"step": 5})
    for step, compiling in ((1, 100), (2, 50), (3, 0)):
        console.at(step)
        console.stage("update")
        with console.work("step"):
            if compiling:
                console.compiling("learn")
                clock.now += compiling
                console.tick()
                console.compiling(None)
            clock.now += 4
        console.tick()
        shown = screen.read()
        assert ("left" in shown) == (step > 1)
        if step > 1:
            assert shown.endswith(f"left 0:{4 * (5 - step):02}"), shown


# --- compilations --------------------------------------------------------------------------------------


def test_a_program_is_named_while_it_compiles():
    def advance(x):
        return x * 2 + 1

    told = []
    compiled = Compiled(told.append)
    x = jnp.ones(17)
    told.clear()
    jax.jit(advance)(x)
    assert told == ["advance", None]
    assert compiled.since()[0] >= 1
    jax.jit(advance)(x)
    assert told == ["advance", None], "a program that is there is not told"
