"""Worker processes that answer questions, so that a question without an answer affects nothing else.

Workers are fresh interpreters: a process that runs JAX is not forked, and the caller's main module is not
imported. A worker imports one module, and `module.answerer(*given)` makes the function that answers.
"""

from __future__ import annotations

import importlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from rosd_jax.errors import UserError

_START_S = 120.0  # for a worker to import its module on a busy machine
_GRACE_S = 60.0  # beyond the worker's own limit on CPU time, after which the parent kills it
_LONGEST_WAIT_S = 2e6  # poll counts milliseconds in 32 bits


@dataclass(frozen=True)
class Unanswered:
    """Replaces an answer, and is false: the worker was stuck or died."""

    status: int | None  # exit status, -N after signal N; None: the parent ended the worker

    def __bool__(self) -> bool:
        return False

    @property
    def late(self) -> bool:
        """Whether a time limit ended the worker."""
        return self.status in (None, -signal.SIGPROF)


def serve(descriptor: int, module: str, given: Sequence[str], parent: int) -> None:
    """The main function of a worker: answers questions from the pipe until the parent closes it.

    The limit for a question is CPU time, so that a busy machine does not change a reward. The kernel's timer
    ends the process, which also stops C code that never returns to the interpreter. A worker that sleeps uses
    no CPU time, so a thread ends one that has lost its parent. Signals that ask the run to stop are left to
    the parent: a worker that ended at once would give the current answer a score of 0.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # a cluster manager may signal every process of a run
        signal.signal(
            number, lambda *_: None
        )  # processes that a reward function starts would inherit SIG_IGN
    # A child inherits what its parent ignores, and libraries (libtpu for one) ignore the timer's signal.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    pipe = Connection(descriptor)
    try:
        answer = importlib.import_module(module).answerer(*given)
    except UserError as error:
        pipe.send(error)
        return
    try:
        pipe.send(getattr(answer, "greeting", None))
        while True:
            _answer_one(pipe, answer)
    except (EOFError, OSError):  # the parent closed the pipe, or is gone
        return


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _answer_one(pipe: Connection, answer: Callable[[Any], Any]) -> None:
    timeout_s, question = pipe.recv()
    signal.setitimer(signal.ITIMER_PROF, timeout_s)
    try:
        reply = answer(question)
    except UserError as error:
        reply = error
    signal.setitimer(signal.ITIMER_PROF, 0)
    pipe.send(reply)


class _Worker:
    """One worker process and the parent's end of its pipe."""

    def __init__(self, module: str, given: Sequence[str]):
        self.greeting: Any = None
        self.pipe, theirs = Pipe()
        arguments = (theirs.fileno(), module, tuple(given), os.getpid())
        code = f"from {__name__} import serve; serve(*{arguments!r})"
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", code],
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": path},
            process_group=0,  # since Ctrl-C signals the whole group of the run
        )
        theirs.close()

    def start(self) -> None:
        """Waits for its greeting. Raises like `answer`."""
        self.greeting = self._receive(_START_S)

    def answer(self, question: Any, timeout_s: float) -> Any:
        """Raises OSError or EOFError if the worker is stuck or dead, UserError if it sends one."""
        self.pipe.send((timeout_s, question))
        return self._receive(timeout_s + _GRACE_S)

    def _receive(self, seconds: float) -> Any:
        if not self.pipe.poll(min(seconds, _LONGEST_WAIT_S)):
            raise TimeoutError
        reply = self.pipe.recv()
        if isinstance(reply, UserError):
            raise reply
        return reply

    def alive(self) -> bool:
        return self.process.poll() is None

    def status(self) -> int | None:
        """The exit status, if the process ends by itself within a second; otherwise None."""
        try:
            return self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.pipe.close()


class Pool:
    """Up to `size` workers, each started when first needed. `close` ends them.

    `timeouts` counts the questions so far whose worker was stuck or died. progress: called with how many of
    the questions asked together are answered.
    """

    def __init__(
        self,
        timeout_s: float,
        size: int,
        module: str,
        given: Sequence[str] = (),
        progress: Callable[[int, int], None] | None = None,
    ):
        self.timeouts = 0
        self._progress = progress
        self._timeout_s = timeout_s
        self._size = size
        self._made_by = module, given
        self._lock = threading.Lock()
        self._idle: queue.LifoQueue[_Worker | None] = queue.LifoQueue()
        for _ in range(size):
            self._idle.put(None)

    def greeting(self) -> Any:
        """The attribute `greeting` of the function that answers.

        Raises UserError if its module raises one, RuntimeError if no worker starts.
        """
        worker = self._idle.get()
        try:
            worker = self._ready(worker)
            return worker.greeting
        finally:
            self._idle.put(worker)

    def answer_all(self, questions: Sequence[Any], times: int = 1) -> list[Any]:
        """The answers in order, `Unanswered` where a worker was stuck or died.

        times: a factor for the time limit of each question. Raises the first UserError that a worker answers
        with, and asks no further questions.
        """
        answers = []
        with ThreadPoolExecutor(self._size) as threads:
            for answer in threads.map(lambda question: self._answer(question, times), questions):
                answers.append(answer)
                if self._progress:
                    self._progress(len(answers), len(questions))
        return answers

    def _answer(self, question: Any, times: int) -> Any:
        worker = self._idle.get()
        try:
            worker = self._ready(worker)
            try:
                return worker.answer(question, times * self._timeout_s)
            except (OSError, EOFError):
                status = worker.status()
                worker.close()
                with self._lock:
                    self.timeouts += 1
                return Unanswered(status)
        finally:
            self._idle.put(worker)

    def _ready(self, worker: _Worker | None) -> _Worker:
        """The worker if it is alive, or a new one. Raises RuntimeError if that does not start."""
        if worker and worker.alive():
            return worker
        if worker:
            worker.close()
        worker = _Worker(*self._made_by)
        try:
            worker.start()
        except (OSError, EOFError) as error:
            worker.close()
            raise RuntimeError(f"a worker of {self._made_by[0]} did not start; its error is above") from error
        except UserError:
            worker.close()
            raise
        return worker

    def close(self) -> None:
        """Ends every worker, once the current questions are answered. A later question starts a new one."""
        workers = [self._idle.get() for _ in range(self._size)]
        for worker in workers:
            if worker:
                worker.close()
            self._idle.put(None)
