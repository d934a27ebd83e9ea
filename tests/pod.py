"""Runs of several processes on this machine's CPU, as on several hosts.

    PYTHONPATH=.:tests python -m tests.pod --processes=4

trains the same small run twice on four CPU devices, in one process and in several, and compares what they
leave. Collectives go through Gloo on 127.0.0.1.
"""

import argparse
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import test_run
from test_run import numbers

import tiny
from support import ROOT, run_environment

DEVICES = 4
# Different from those of test_run.py: the rows of its batch fit four devices.
FIELDS = dict(steps=4, batch__device_rows=4, mesh__data=1, mesh__fsdp=4)
GAP = 1e-6
DIVERGENCE = re.compile(rb'"divergence": (\[[^\]]*\])')


def free_port() -> int:
    """A port that is free, as is the next one."""
    while True:
        with socket.socket() as one, socket.socket() as two:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            try:
                two.bind(("127.0.0.1", port + 1))
            except (OSError, OverflowError):
                continue
            return port


class Pod:
    """The command on several hosts: `processes` supervised processes that share DEVICES devices."""

    def __init__(self, processes: int, arguments: list[str], cwd: Path, own: Any = None, **environment: str):
        """own: the arguments that process i gets in addition, by i."""
        cwd.mkdir(exist_ok=True)
        self.cwd = cwd
        self.started = []
        environment = run_environment(JAX_NUM_CPU_DEVICES=str(DEVICES // processes), **environment)
        place = [f"--coordinator=127.0.0.1:{free_port()}", f"--processes={processes}"]
        for i in range(processes):
            command = [sys.executable, str(ROOT / "run.py"), *arguments, *(own or {}).get(i, [])]
            if processes > 1:
                command += [*place, f"--process={i}"]
            with open(cwd / f"out{i}", "w") as out, open(cwd / f"err{i}", "w") as err:
                run = subprocess.Popen(command, stdout=out, stderr=err, cwd=cwd, env=environment)
            self.started.append(run)

    def printed(self, process: int) -> str:
        return (self.cwd / f"err{process}").read_text()

    def wait_for_line(self, directory: Path, step: int, split: str = "train") -> None:
        """Returns as soon as metrics.jsonl has the line."""
        wanted = f'{{"step": {step}, "split": "{split}"'
        path = directory / "metrics.jsonl"
        end = time.monotonic() + 300
        while not (path.exists() and wanted in path.read_text()):
            assert all(run.poll() is None for run in self.started), self.printed(0)
            assert time.monotonic() < end
            time.sleep(0.005)

    def child(self, process: int) -> int:
        """The pid of the run itself, whose parent is the supervisor."""
        parent = self.started[process].pid
        return int(Path(f"/proc/{parent}/task/{parent}/children").read_text().split()[0])

    def end(self, seconds: float = 300) -> list[int]:
        """The exit status of every process."""
        end = time.monotonic() + seconds
        try:
            return [run.wait(max(0.1, end - time.monotonic())) for run in self.started]
        finally:
            for run in self.started:
                if run.poll() is None:
                    run.kill()
                    run.wait()


def arguments(model: Path, directory: Path, **fields: Any) -> list[str]:
    """The command line of a small run."""
    return test_run.arguments(model, directory, **FIELDS | fields)


def finish(processes: int, command: list[str], cwd: Path, **environment: str) -> Pod:
    """Runs to the end, which must be a good one."""
    pod = Pod(processes, command, cwd, **environment)
    statuses = pod.end()
    said = [pod.printed(i) for i in range(processes)]
    assert statuses == [0] * processes and not any(said), (statuses, said)
    return pod


def assert_same_texts(directory: Path, other: Path, exact: bool = True) -> None:
    """Rollouts, reflections and generations are the same bytes.

    exact: so are the divergences; otherwise they may differ by rounding.
    """
    for folder in ("rollouts", "evals"):
        names = files_below(other, folder)
        assert names == files_below(directory, folder)
        for name in names:
            if exact:
                assert (directory / name).read_bytes() == (other / name).read_bytes(), name
            else:
                assert_same_rows(directory / name, other / name)


def assert_same_rows(path: Path, other: Path) -> None:
    """Two files of rollouts or generations have the same bytes, except for rounding in the divergences."""
    found, wanted = (DIVERGENCE.split(file.read_bytes()) for file in (path, other))
    assert found[::2] == wanted[::2], path
    for theirs, ours in zip(found[1::2], wanted[1::2], strict=True):
        np.testing.assert_allclose(
            json.loads(theirs), json.loads(ours), rtol=2e-3, atol=GAP, err_msg=str(path)
        )


def files_below(directory: Path, folder: str) -> list[Path]:
    """All files of a folder in a run's directory."""
    return sorted(p.relative_to(directory) for p in (directory / folder).rglob("*") if p.is_file())


def largest_difference(directory: Path, other: Path, only: str = "") -> float:
    """The largest relative difference of two runs' metrics; infinite if they differ otherwise.

    only: compares the lines whose split contains it. logp_gap is left out where it is below GAP, since it is
    a mean of rounding errors itself.
    """
    found, wanted = ([row for row in numbers(path) if only in row["split"]] for path in (directory, other))
    if [row.keys() for row in found] != [row.keys() for row in wanted]:
        return math.inf
    most = 0.0
    for row, expected in zip(found, wanted, strict=True):
        for name, value in expected.items():
            if row[name] == value or (name == "logp_gap" and row[name] < GAP):
                continue
            if isinstance(value, str) or value is None or row[name] is None:
                return math.inf
            most = max(most, abs(row[name] - value) / max(abs(value), 1e-6))
    return most


def main() -> None:
    """Compares one process with several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--processes", type=int, default=4, choices=[2, 4])
    processes = parser.parse_args().processes
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        model = root / "model"
        tiny.write(model)
        for count in (1, processes):
            began = time.monotonic()
            finish(count, arguments(model, root / f"run{count}"), root / f"cwd{count}")
            print(
                f"{count} processes: {FIELDS['steps']} steps in {time.monotonic() - began:.0f} s", flush=True
            )
        assert_same_texts(root / f"run{processes}", root / "run1", exact=False)
        difference = largest_difference(root / f"run{processes}", root / "run1")
    print(
        f"same rollouts, reflections and generations; metrics differ by {difference:.1e} or less, relatively"
    )


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main()
