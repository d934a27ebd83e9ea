"""A parent process on each host of a run, so that a host that fails ends all of them with a sentence.

JAX notices a dead process late, and then aborts the others without saying which host it was. A process that
waits for another inside a program on the devices can notice nothing at all. So the command starts the run as
a child process. The parents are connected to the first host's parent by TCP. Each watches its child, and when
one fails, all print why and kill theirs. A child or a parent that says nothing for SILENCE_S has failed too.

    supervise(place)        in the parent: runs the same command as its child -> exit status
    given()                 in the child: its place; None in a process without a supervisor
    report_end(status)      in the child: the run ends in good order, as on all hosts
    report_failure(text, status)   in the child: the run failed; does not return

Messages are lines of JSON. A child sends {"ended": status} or {"failed": text, "status": n} to its parent.
A parent sends {"process": i, "host": name} to the first host's parent, and later {"ended": status} or
{"failed": the fields of a Failure}; that one sends every failure on to all others, and {"refused": the same}
to a process that is there already. Children to their parents, and parents to those that they are connected
to, also send {"alive": true} every BEAT_S.
"""

from __future__ import annotations

import ctypes
import json
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from rosd_jax.errors import UserError
from rosd_jax.hosts.place import PATIENCE_S, Place

PLACE = "ROSD_JAX_PLACE"  # environment variable of the child: its place and its pipe to the parent
BEAT_S = 5
SILENCE_S = 120  # a thread of Python sends the beats, and a call into C may keep it from running for long
CLEANING_S = 3  # after a mistake, in which children find it themselves and remove what they have made
LAST_WORDS_S = 20  # how long a failure waits for a connection to the first host
PR_SET_PDEATHSIG = 1  # from linux/prctl.h
USERS_MISTAKE = 2
STOPPED = {128 + number: number.name for number in (signal.SIGINT, signal.SIGTERM)}  # by exit status
_pipe: int | None = None  # in a child: to its parent


@dataclass(frozen=True)
class Failure:
    """Why a process failed."""

    process: int
    host: str
    text: str
    status: int

    def sentence(self, processes: int) -> str:
        """What the other hosts print."""
        return f"error: process {self.process} of {processes}, on host {self.host}: {self.text}"


# --- in the child -------------------------------------------------------------------------------------------


def given() -> Place | None:
    """The place that the parent passed on. From then on, this process ends if its parent dies."""
    global _pipe
    if PLACE not in os.environ:
        return None
    passed = json.loads(os.environ.pop(PLACE))  # not for the processes that this one starts
    _pipe = passed["pipe"]
    fields = passed["place"]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != passed["parent"]:  # it died before
        os._exit(1)
    threading.Thread(target=_beat, daemon=True).start()
    devices = fields.pop("devices")
    return Place(**fields, devices=None if devices is None else tuple(devices))


def _beat() -> None:
    while True:
        _report({"alive": True})
        time.sleep(BEAT_S)


def report_end(status: int) -> None:
    """Tells the parent, if there is one, that the run ends with this exit status."""
    _report({"ended": status})


def report_failure(text: str, status: int) -> None:
    """Tells the parent, if there is one, which then kills this process."""
    if _pipe is not None:
        _report({"failed": text, "status": status})
        time.sleep(LAST_WORDS_S)  # JAX would wait for the other processes at exit, for minutes


def _report(message: dict[str, Any]) -> None:
    if _pipe is not None:
        os.write(_pipe, json.dumps(message).encode() + b"\n")


# --- in the parent ------------------------------------------------------------------------------------------


def supervise(place: Place) -> int:
    """Runs this process's command line as a child that knows its place. Returns the exit status for the host.

    It is the child's, or 1 if another host failed (if that was a user's mistake or a signal, its status).
    Raises UserError if one of the first host's two ports is taken.
    """
    server = _listen(place) if place.process == 0 else None
    reading, writing = os.pipe()
    passed = {"place": asdict(place), "pipe": writing, "parent": os.getpid()}
    environment = os.environ | {PLACE: json.dumps(passed)}
    child = subprocess.Popen(
        [sys.executable, *sys.orig_argv[1:]],
        pass_fds=[writing],
        env=environment,
        process_group=0,  # signals reach it through `_forward` alone, once
    )
    os.close(writing)
    _forward(child)
    supervisor = _Supervisor(place, child, reading, server)
    try:
        return supervisor.run()
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _listen(place: Place) -> socket.socket:
    """The first host's end of all connections."""
    _open(place.address[1]).close()  # JAX would crash if it cannot open its port
    return _open(place.supervisor_port)


def _open(port: int) -> socket.socket:
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        return socket.create_server(("", port))
    except OSError as error:
        raise UserError(
            f"port {port} cannot be opened ({error.strerror}); free it, or pass another port in --coordinator"
        ) from error


def _forward(child: subprocess.Popen[bytes]) -> None:
    """Passes Ctrl-C and SIGTERM on to the child; it decides when the run stops."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: child.send_signal(number))


class _Link:
    """One end of a connection, or of the child's pipe: complete messages in the order of their arrival."""

    def __init__(self, end: socket.socket | int):
        self.end = end
        self.rest = b""
        self.process: int | None = None  # at the other end
        self.host = ""
        self.ended = False
        self.heard: float | None = None  # when it last sent something

    def read(self) -> list[dict[str, Any]] | None:
        """The messages that have arrived; None if the other end is closed, or does not send messages."""
        try:
            data = os.read(self.end, 1 << 16) if isinstance(self.end, int) else self.end.recv(1 << 16)
        except OSError:  # a connection that timed out or was reset
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self.rest = (self.rest + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:
            return None

    def send(self, message: dict[str, Any]) -> None:
        assert isinstance(self.end, socket.socket)
        try:
            self.end.sendall(json.dumps(message).encode() + b"\n")
        except OSError:  # its end is found by `read`
            pass


class _Supervisor:
    """What a parent knows: its child, its connections, who has ended, who has failed."""

    def __init__(self, place: Place, child: subprocess.Popen[bytes], pipe: int, server: socket.socket | None):
        self.place = place
        self.child = child
        self.host = socket.gethostname()
        self.selector = selectors.DefaultSelector()
        self.pipe = _Link(pipe)
        self.selector.register(pipe, selectors.EVENT_READ, self.pipe)
        self.links: list[_Link] = []  # in the first host's parent to all others, elsewhere to the first
        self.ended = False  # the own child, in good order
        self.failure: Failure | None = None  # the first that this parent heard of
        self.until = time.monotonic() + PATIENCE_S  # when all must be connected
        self.beat = 0.0  # when the last one was sent
        self.kill_at = float("inf")  # when the child is killed, if it has not ended by then
        if server:
            self.selector.register(server, selectors.EVENT_READ, server)

    def run(self) -> int:
        """Returns the exit status once the child has ended everywhere, or failed anywhere."""
        while True:
            self._connect()
            self._send_beat()
            for key, _ in self.selector.select(0.5):
                if isinstance(key.data, _Link):
                    self._read(key.data)
                else:
                    self._watch(key.data.accept()[0])
            self._find_silent()
            late = not self._complete() and time.monotonic() > self.until
            if self.failure:
                if self.child.poll() is None and time.monotonic() > self.kill_at:
                    os.killpg(self.child.pid, signal.SIGKILL)
                # It waits for those that are not connected yet, so that they hear of it.
                if (self._complete() or late) and self.child.poll() is not None:
                    return self._status(self.failure)
                continue
            if self.ended and self._all_ended():
                return self.child.wait()
            if late:
                self._fail(self._who_is_missing(), 1)
                print(f"error: {self._who_is_missing()}", file=sys.stderr, flush=True)
                return 1

    def _status(self, failure: Failure) -> int:
        """This parent's exit status."""
        mine = failure.process == self.place.process
        return failure.status if mine or failure.status in (USERS_MISTAKE, *STOPPED) else 1

    def _complete(self) -> bool:
        """Whether all connections of this parent are made."""
        return len(self.links) == (self.place.processes - 1 if self.place.process == 0 else 1)

    def _all_ended(self) -> bool:
        """Whether nobody needs this parent any more, once its child has ended."""
        return self._complete() and (self.place.process > 0 or all(link.ended for link in self.links))

    def _who_is_missing(self) -> str:
        if self.place.process:
            return (
                f"process 0 does not answer at {self.place.coordinator}; start it, or correct --coordinator"
            )
        here = {link.process for link in self.links}
        missing = ", ".join(str(i) for i in range(1, self.place.processes) if i not in here)
        return f"no sign of process {missing} after {PATIENCE_S} s; start the same command on every host"

    def _connect(self) -> None:
        """One attempt to reach the first host's parent, if this is another's."""
        if self.place.process == 0 or self.links:
            return
        host, _ = self.place.address
        try:
            end = socket.create_connection((host, self.place.supervisor_port), timeout=2)
        except OSError:
            return
        link = self._watch(end)
        link.process = 0
        link.host = host
        link.send({"process": self.place.process, "host": self.host})
        self.links.append(link)
        if self.failure:
            self._send({"failed": asdict(self.failure)})
        elif self.ended:
            self._send({"ended": 0})

    def _send_beat(self) -> None:
        if time.monotonic() > self.beat + BEAT_S:
            self.beat = time.monotonic()
            for link in self.links:
                link.send({"alive": True})

    def _find_silent(self) -> None:
        """Takes the own child, or a process at the other end of a connection, for failed if it is silent."""
        for link in (self.pipe, *self.links):
            if link.ended or link.heard is None or time.monotonic() < link.heard + SILENCE_S:
                continue
            text = f"has sent no sign of life for {SILENCE_S} s; it is stopped, or its host is overloaded"
            if link is self.pipe:
                print(f"error: the run {text}", file=sys.stderr, flush=True)
                self._fail(text, 1)
            else:
                self._failed(Failure(link.process or 0, link.host or "unknown", text, 1))
            return

    def _watch(self, end: socket.socket) -> _Link:
        """A new connection. One that was accepted counts once it has said which process it is."""
        end.settimeout(None)
        # A host that lost its power or network closes nothing, and is noticed after half a minute.
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
            if hasattr(socket, option):
                end.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        link = _Link(end)
        self.selector.register(end, selectors.EVENT_READ, link)
        return link

    def _read(self, link: _Link) -> None:
        messages = link.read()
        if messages is None:
            self.selector.unregister(link.end)
            if link is self.pipe or link in self.links:  # not a stranger, such as a port scanner
                self._closed(link)
            return
        for message in messages:
            if link is not self.pipe and link not in self.links:
                self._introduce(link, message)
            elif "alive" in message:
                pass
            elif "ended" in message:
                link.ended = True
                if link is self.pipe:
                    self.ended = True
                    self._send(message)
            elif link is self.pipe:
                self._fail(message["failed"], message["status"])
            elif "refused" in message:
                self._failed(Failure(**message["refused"]))
                self.kill_at = 0.0  # the child must not join the other run
            else:
                self._failed(Failure(**message["failed"]))

    def _introduce(self, link: _Link, message: Any) -> None:
        """The first message of a connection that was accepted.

        A process that is there already, or of another run, is told so; this run goes on.
        """
        if not isinstance(message, dict) or message.keys() != {"process", "host"}:
            return
        process = message["process"]
        if not isinstance(process, int):
            return
        there = {other.process: other.host for other in self.links}
        if process in there or process not in range(1, self.place.processes):
            why = f"a process {process} is there already, on host {there.get(process)}"
            if process not in there:
                why = f"it has {self.place.processes} processes, and no process {process}"
            why += "; give each host a --process of its own, or another run another --coordinator"
            link.send({"refused": asdict(Failure(0, self.host, why, USERS_MISTAKE))})
            return
        link.process = process
        link.host = message["host"]
        self.links.append(link)
        if self.failure:
            link.send({"failed": asdict(self.failure)})

    def _closed(self, link: _Link) -> None:
        """The other end is gone: in good order, or not."""
        if link.ended or self.failure:
            return
        if link is self.pipe:
            text, status = _death(self.child.wait())
            if status not in STOPPED:
                print(f"error: the run {text}", file=sys.stderr, flush=True)
            self._fail(text, status)
        elif self.place.process and self.ended:
            link.ended = True  # the first host's parent leaves when all have ended
        else:
            text = "its connection was lost; the host may be down or cut off, or the process was killed"
            self._failed(Failure(link.process or 0, link.host or "unknown", text, 1))

    def _fail(self, text: str, status: int) -> None:
        """The own child failed."""
        self._failed(Failure(self.place.process, self.host, text, status))

    def _failed(self, failure: Failure) -> None:
        """Some process failed: says so, unless the own child did; tells the others; ends the own child."""
        if self.failure:
            return
        self.failure = failure
        self.until = time.monotonic() + LAST_WORDS_S
        if failure.process != self.place.process:
            print(failure.sentence(self.place.processes), file=sys.stderr, flush=True)
        self._send({"failed": asdict(failure)})
        self.kill_at = time.monotonic()
        if failure.status == USERS_MISTAKE:
            # The first child ends last: without its coordination service, JAX would abort the others.
            self.kill_at += CLEANING_S + (self.place.process == 0)

    def _send(self, message: dict[str, Any]) -> None:
        """To the first host's parent; from there, failures to all others."""
        for link in self.links:
            if self.place.process or "failed" in message:
                link.send(message)


def _death(status: int) -> tuple[str, int]:
    """What a child's exit status says, and that of its parent."""
    if status == -signal.SIGKILL:
        return "was killed by SIGKILL; if nobody sent it, the host was out of memory", 128 + signal.SIGKILL
    if status in STOPPED:
        return f"was stopped by {STOPPED[status]}", status
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}", 128 - status
    return f"ended alone, with exit status {status}; its own output says why", status or 1
