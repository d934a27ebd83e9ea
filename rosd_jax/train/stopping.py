"""Ctrl-C and SIGTERM: how a run is stopped without losing what it has made.

    watch()                      once, at the start of the process: a signal ends it at once
    with deferred(directory):    in here the first signal asks, and a second ends the process at once
        check()                  raises Stopped where a signal has asked
    done()                       once, at the end of the process: signals are ignored from now on
    reader_left()                nobody reads stdout any more: asks, as a signal does
    tell(text)                   a line on stderr

Nothing here raises out of a signal handler: an exception that arrives inside XLA or one of its callbacks
ends the process by a segmentation fault, or is dropped. Handlers written in Python are also late: they
wait for the main thread, which a compilation may keep for minutes. CPython's own handler is not: on
whatever thread the signal lands, it writes the signal's number to the wake-up descriptor. A thread waits
there, answers, and notes the request for `check`. (Blocking the signals and waiting for them with sigwait
would do as well, but child processes inherit blocked signals.)

run.py imports this module before anything slow, so it uses the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

WATCHED = (signal.SIGINT, signal.SIGTERM)
REASONS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGPIPE: "nobody reads the output"}
REPEAT_S = 0.05  # `timeout` and other launchers send a signal twice; before our answer, both are one request
STDOUT, STDERR = 1, 2
ERASE = "\r\x1b[K"  # to the start of the terminal's line, and clear it


class Stopped(Exception):
    """A run ends because a signal asked for it. `status` is the exit status, 128 + the signal's number."""

    def __init__(self, number: signal.Signals, directory: Path):
        super().__init__(f"{REASONS[number]}: stopped; {_resume(directory)}")
        self.status = 128 + number


class _Shared:
    """What the watching thread and the run tell each other, under `lock`."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deferred = False
        self.directory: Path | None = None  # of the run, once it has begun
        self.asked: signal.Signals | None = None  # the signal that asked the run to stop


_shared = _Shared()


def watch() -> None:
    """Answers SIGINT and SIGTERM from now on. To be called once, on the main thread.

    A signal that is ignored already (by nohup, or for a shell's background job) stays ignored.
    """
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    for number in WATCHED:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _do_nothing)  # CPython writes to the descriptor for signals with a handler
            signal.siginterrupt(number, False)  # no system call of a C++ library fails with EINTR
    threading.Thread(target=_listen, args=(reading,), name="signals", daemon=True).start()


def done() -> None:
    """Nothing is left to stop: signals are ignored from here on, else one would kill Python as it ends."""
    for number in WATCHED:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def deferred(directory: Path) -> Iterator[None]:
    """The run in `directory` is under way: the first signal in here only asks.

    Raises Stopped at the end where a signal has asked and no `check` has seen it.
    """
    with _shared.lock:
        _shared.deferred, _shared.directory = True, directory
    try:
        yield
    finally:
        with _shared.lock:
            _shared.deferred = False
    check()


def check() -> None:
    """Raises Stopped where a signal has asked the run to stop. To be called where the run can stop."""
    with _shared.lock:
        asked, directory = _shared.asked, _shared.directory
    if asked is not None and directory is not None:
        raise Stopped(asked, directory)


def reader_left() -> None:
    """Asks the run to stop; what is still printed to stdout goes nowhere, so that no flush fails again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, STDOUT)
    os.close(nowhere)
    with _shared.lock:
        _shared.asked = _shared.asked or signal.SIGPIPE


def tell(text: str) -> None:
    """Writes a line to stderr, over the progress bar where one stands there.

    It goes straight to the descriptor, since another thread may hold the lock of sys.stderr. A pipe or
    terminal that takes nothing goes without: waiting for it would keep the next signal from its answer.
    """
    with contextlib.suppress(OSError):
        terminal = os.isatty(STDERR) and os.environ.get("TERM") != "dumb"
        if select.select([], [STDERR], [], 0.5)[1]:
            os.write(STDERR, os.fsencode(f"{ERASE if terminal else ''}{text}\n"))


def _listen(descriptor: int) -> None:
    """Answers each signal whose number arrives; never returns."""
    while True:
        number = os.read(descriptor, 1)[0]
        if number in WATCHED:
            _answer(signal.Signals(number), descriptor)


def _answer(number: signal.Signals, descriptor: int) -> None:
    with _shared.lock:  # to the end, so that the run does not stop before it is said that it will
        if not _shared.deferred or _shared.asked is not None:
            tell(f"{REASONS[number]}: {_last_words()}")
            os._exit(128 + number)
        _shared.asked = number
        time.sleep(REPEAT_S)
        while select.select([descriptor], [], [], 0)[0]:
            os.read(descriptor, 1)
        tell(
            f"{REASONS[number]}: the run stops once the call under way returns (compiling may take minutes); "
            "a second signal ends it at once"
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
