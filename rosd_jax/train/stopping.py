"""Ctrl-C and SIGTERM: stops a run without losing a step.

    watch()                      once, when the process starts: from now on a signal ends it at once
    with deferred(directory):    in this block the first signal is a request; a second one ends the process
        check(what)              raises Stopped if a signal has asked the run to stop
    done()                       once, when the process ends: from now on signals are ignored
    reader_left()                nobody reads stdout any more: a request to stop, like a signal
    tell(text)                   writes a line to stderr

No signal handler raises an exception here: one that arrives inside XLA or one of its callbacks causes a
segmentation fault or is dropped. Handlers written in Python also come too late, because they wait for the
main thread, which a compilation can block for minutes. CPython's own C handler does not wait: whichever
thread receives the signal, it writes the signal's number to the wake-up descriptor. A thread reads from
there, acknowledges the signal, and records the request for `check`. (Blocking the signals and waiting with
sigwait would work too, but child processes inherit blocked signals.)

The command imports this module before all slow ones, so it uses only the standard library.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

WATCHED = (signal.SIGINT, signal.SIGTERM)
REASONS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGPIPE: "nobody reads the output"}
# `timeout` and other launchers send a signal twice. Those that arrive within this time are one request.
REPEAT_S = 0.05
STDOUT = 1
STDERR = 2
ERASE = "\r\x1b[K"  # moves to the start of the terminal's line and clears it


class Stopped(Exception):
    """The run stops before its last step, for a reason in words. `status` is the exit status.

    That is 128 + its number after a signal, and health.GUARDED if the run ends by itself.
    """

    def __init__(self, reason: str, status: int):
        super().__init__(reason)
        self.status = status


# What any process of the run was asked, from what this one was. `what` names the place in the program.
Agree = Callable[[str, signal.Signals | None], signal.Signals | None]


def _alone(what: str, asked: signal.Signals | None) -> signal.Signals | None:
    return asked


class _Shared:
    """What the signal thread and the run share; `lock` guards it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deferred = False
        self.directory: Path | None = None  # the run's, once it has begun
        self.asked: signal.Signals | None = None  # the signal that has asked the run to stop
        self.agree: Agree = _alone


_shared = _Shared()


def watch() -> None:
    """Handles SIGINT and SIGTERM from now on. Call it once, on the main thread.

    A signal that is already ignored (by nohup, or in a shell's background job) stays ignored.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in WATCHED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            # CPython writes to the wake-up descriptor only for signals that have a Python handler.
            signal.signal(number, _do_nothing)
            # Restart interrupted system calls: C++ libraries may not expect EINTR.
            signal.siginterrupt(number, False)
    threading.Thread(target=_listen, args=(reading,), name="signals", daemon=True).start()


def done() -> None:
    """Ignores signals from now on. Otherwise one could kill Python while it shuts down, after the run."""
    for number in WATCHED:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def deferred(directory: Path, agree: Agree = _alone) -> Iterator[None]:
    """In this block, the first signal only asks the run in `directory` to stop.

    agree: of several processes, all stop at the same `check` if one of them was asked to.
    Raises Stopped at the end if a signal has asked and no `check` has raised.
    """
    with _shared.lock:
        _shared.deferred = True
        _shared.directory = directory
        _shared.agree = agree
    try:
        yield
    finally:
        with _shared.lock:
            _shared.deferred = False
    check("the end")


def check(what: str) -> None:
    """Raises Stopped if a signal has asked the run to stop. Called wherever the run can stop safely.

    what: names the place in the program, for several processes that must be there at the same time.
    """
    with _shared.lock:
        asked = _shared.asked
        directory = _shared.directory
        agree = _shared.agree
    if directory is None:
        return
    asked = agree(what, asked)
    if asked is not None:
        raise Stopped(f"{REASONS[asked]}: stopped; {_resume(directory)}", 128 + asked)


def reader_left() -> None:
    """Asks the run to stop. Redirects stdout to /dev/null, so that no later flush fails."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    os.close(nowhere)
    with _shared.lock:
        _shared.asked = _shared.asked or signal.SIGPIPE


def tell(text: str) -> None:
    """Writes a line to stderr, over a progress bar on the terminal.

    It writes to the descriptor itself, because another thread may hold the lock of sys.stderr. If the pipe or
    terminal accepts nothing for half a second, the line is dropped: waiting longer would delay the answer to
    the next signal.
    """
    with contextlib.suppress(OSError):
        terminal = os.isatty(STDERR) and os.environ.get("TERM") != "dumb"
        if select.select([], [STDERR], [], 0.5)[1]:
            os.write(STDERR, os.fsencode(f"{ERASE if terminal else ''}{text}\n"))


def _listen(descriptor: int) -> None:
    """Handles each signal whose number arrives. Never returns."""
    while True:
        number = os.read(descriptor, 1)[0]
        if number in WATCHED:
            _answer(signal.Signals(number), descriptor)


def _answer(number: signal.Signals, descriptor: int) -> None:
    with _shared.lock:  # until the line below is written, so that the run does not stop before it
        if not _shared.deferred or _shared.asked is not None:
            tell(f"{REASONS[number]}: {_last_words()}")
            os._exit(128 + number)
        _shared.asked = number
        time.sleep(REPEAT_S)
        while select.select([descriptor], [], [], 0)[0]:
            os.read(descriptor, 1)
        tell(
            f"{REASONS[number]}: the run stops when the current device call returns (compiling may take "
            "minutes); a second signal ends it at once"
        )


def _last_words() -> str:
    directory = _shared.directory
    if directory is None:
        return "ended before the run began"
    return f"ended at once; {_resume(directory)}"


def _resume(directory: Path) -> str:
    return f"the same command with --workdir={directory} resumes"


def _do_nothing(number: int, frame: object) -> None:
    pass
