r"""The mathematics checker: the boxed answer against the gold one, compared in workers.

Reading the box is a pure function of the text. Comparing two answers is not so tame: it computes what
a model wrote, and math-verify, which `release` needs, may take a lifetime (for 9^{9^{9^{9}}}) and guards
itself with an alarm that works on a main thread only. So the comparison runs in worker processes, started
as fresh interpreters: no fork beside JAX, no import of the caller's main module; and this module imports
neither JAX nor (in the parent) math-verify.

`fixed` takes the last box of the whole response (box.py), outside the thinking, and compares both
answers as mathematics (equal.py; docs/grading.md has the rules). `release` is the released checker: only
the last 100 characters are searched, and the answers are compared as bare strings, which leaves most
LaTeX unread.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from rosd_jax.rewards.box import last_box
from rosd_jax.rewards.grade import Mode
from rosd_jax.text.thinking import outside_thinking

Question = tuple[str, str, Mode]  # prediction, gold answer, mode

_START_S = 120.0  # for a worker to import math-verify on a busy machine
_GRACE_S = 60.0  # beyond the worker's own limit (CPU time), before the parent kills it
_RELEASE_WINDOW = 100  # characters
_MAX_ANSWER = 1000  # characters; nothing longer is an answer, and parsing it may take minutes


def predict(response: str, *, mode: Mode, thinking_open: bool = False) -> str:
    """The content of the last box of a response, "" where there is none.

    thinking_open: the prompt ended inside `<think>`; release mode does not look at it.
    """
    if mode == "release":
        return _last_box_release(response[-_RELEASE_WINDOW:])
    return last_box(outside_thinking(response, opened=thinking_open))


def _last_box_release(text: str) -> str:
    _, opened, rest = text.rpartition("\\boxed{")
    depth = 1
    for position, character in enumerate(rest if opened else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return ""


def agree(prediction: str, answer: str, mode: Mode) -> bool:
    """Whether two answers are equal; an overlong prediction equals nothing.

    May never return: call it in a worker only.
    """
    if len(prediction) > _MAX_ANSWER:
        return False
    if mode == "fixed":
        from rosd_jax.rewards.equal import equal

        return equal(prediction, answer)
    from math_verify import parse, verify

    gold = parse(answer, parsing_timeout=0)
    return verify(gold, parse(prediction, parsing_timeout=0), timeout_seconds=0)


def serve(descriptor: int, timeout_s: float) -> None:
    """A worker's whole life: answers questions from the pipe until the parent closes it.

    The limit on a question is CPU time, so that a busy machine does not change a reward, kept by the
    kernel's timer with its default action, the end of the process:
    it also stops C code that never returns to the interpreter, and workers that lost their parent.
    What asks the run to stop is the parent's to obey: a worker that ended at once would score the answer in
    hand 0.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a manager may signal every process of a run
        signal.signal(number, signal.SIG_IGN)
    import math_verify  # noqa: F401

    logging.disable(logging.CRITICAL)
    pipe = Connection(descriptor)
    try:
        pipe.send(True)
        while True:
            _answer_one(pipe, timeout_s)
    except (EOFError, OSError):  # the parent closed the pipe, or is gone
        return


def _answer_one(pipe: Connection, timeout_s: float) -> None:
    question: Question = pipe.recv()
    signal.setitimer(signal.ITIMER_PROF, timeout_s)
    try:
        verdict = agree(*question)
    except Exception:
        verdict = False  # the release, too, scores an answer 0 that breaks the comparison
    signal.setitimer(signal.ITIMER_PROF, 0)
    pipe.send(verdict)


class _Worker:
    """One worker process and the parent's end of its pipe."""

    def __init__(self, timeout_s: float):
        self.timeout_s = timeout_s
        self.pipe, theirs = Pipe()
        code = f"from {__name__} import serve; serve({theirs.fileno()}, {timeout_s})"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
            process_group=0,  # a terminal's Ctrl-C goes to the whole group of the run
        )
        theirs.close()

    def answer(self, question: Question) -> bool:
        """Raises OSError or EOFError when the worker is stuck or dead."""
        self.pipe.send(question)
        return self.receive(self.timeout_s + _GRACE_S)

    def receive(self, seconds: float) -> bool:
        if not self.pipe.poll(seconds):
            raise TimeoutError
        return self.pipe.recv()

    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class Pool:
    """Up to `size` workers, each started when first needed. `close` ends them."""

    def __init__(self, timeout_s: float, size: int):
        self.timeouts = 0
        self._timeout_s = timeout_s
        self._size = size
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    def answer_all(self, questions: Iterable[Question]) -> list[bool]:
        """Answers in order. A question whose worker got stuck or died is False, and counted."""
        with ThreadPoolExecutor(self._size) as threads:
            return list(threads.map(self._answer, questions))

    def _answer(self, question: Question) -> bool:
        worker = self._idle.get()
        try:
            if worker is None or not worker.alive():
                worker = self._replace(worker)
            try:
                return worker.answer(question)
            except (OSError, EOFError):
                worker.close()
                worker = None
                with self._lock:
                    self.timeouts += 1
                return False
        finally:
            self._idle.put(worker)

    def _replace(self, worker: _Worker | None) -> _Worker:
        """A worker that is ready. Raises RuntimeError when it cannot start."""
        if worker:
            worker.close()
        worker = _Worker(self._timeout_s)
        try:
            worker.receive(_START_S)
        except (OSError, EOFError) as error:
            worker.close()
            raise RuntimeError("a math-verify worker did not start; its error is above") from error
        return worker

    def close(self) -> None:
        """Ends every worker, once the questions in hand are answered; a later one starts afresh."""
        workers = [self._idle.get() for _ in range(self._size)]
        for worker in workers:
            if worker:
                worker.close()
            self._idle.put(None)
