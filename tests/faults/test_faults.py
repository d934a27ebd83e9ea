"""Real runs that are killed again and again, at random moments, end with the bytes of one that was not.

A moment is a random time after the start of a process or after a line of metrics.jsonl, so it falls into
set-up, compiling, decoding, grading, the update, the writing of a checkpoint, evaluation or export. The seed
is in the name of the test.
"""

import os
import random
import signal
import time

import pytest
from pod import Pod, arguments, assert_same_texts, finish
from test_run import numbers

import tiny
from rosd_jax.hosts.place import PATIENCE_S
from support import made_once, shared_dir

pytestmark = [
    pytest.mark.nightly,
    pytest.mark.slow,
    pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc"),
]
SHORT = (1, 0, 2, 4)  # processes, seed, kills, steps of the run
LONG = [(seed, 10, 12) for seed in range(1, 4)]
LONGEST_S = 8  # after the start: until about the first step


def fields(steps):
    return dict(steps=steps, checkpoint__every=1, eval__every=4, eval__sets="gym:chain")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory)


@pytest.fixture(scope="module")
def undisturbed(model, cache, tmp_path_factory):
    """undisturbed(processes, steps): the directory of a run that nothing disturbed."""

    def directory(processes, steps):
        def make(path):
            finish(processes, arguments(model, path / "run", **fields(steps)), path, **cache)

        return made_once(shared_dir(tmp_path_factory) / f"undisturbed{processes}-{steps}", make) / "run"

    return directory


def kill_at_random(chance, processes, command, directory, cwd, environment):
    """Starts the run and signals one of its processes; whether the signal found it running."""
    run = Pod(processes, command, cwd, **environment)
    victim = chance.randrange(processes)
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    if chance.random() < 0.7:  # after the next line, when the run works; else anywhere after the start
        wait_for_more(run, directory)
        time.sleep(chance.uniform(0, 0.4))
    else:
        time.sleep(chance.uniform(0, LONGEST_S))
    alive = [process for process in run.started if process.poll() is None]
    if len(alive) == processes:
        signal_run(run, victim, number)
    # A process that a signal ends before its supervisor stands was never there, and the other waits for it.
    return run.end(60 + PATIENCE_S) != [0] * processes


def wait_for_more(run, directory):
    """Returns once metrics.jsonl is longer than now, or the run has ended."""
    path = directory / "metrics.jsonl"
    before = path.stat().st_size if path.exists() else 0
    while all(process.poll() is None for process in run.started):
        if path.exists() and path.stat().st_size > before:
            return
        time.sleep(0.005)


def signal_run(run, victim, number):
    """SIGTERM goes to the command, as from a cluster manager, SIGKILL to the process that does the work."""
    several = len(run.started) > 1
    try:
        pid = run.child(victim) if several and number == signal.SIGKILL else run.started[victim].pid
        os.kill(pid, number)
    except (IndexError, OSError):  # it has just ended
        pass


@pytest.mark.parametrize(
    "processes, seed, kills, steps",
    [SHORT, *[(n, *long) for n in (1, 2) for long in LONG]],
)
def test_killed_runs_resume_and_end_bit_exact(
    processes, seed, kills, steps, undisturbed, model, cache, tmp_path
):
    expected = undisturbed(processes, steps)
    chance = random.Random(100 * processes + seed)
    directory = tmp_path / "run"
    command = arguments(model, directory, **fields(steps))
    done = 0
    for number in range(5 * kills):
        done += kill_at_random(chance, processes, command, directory, tmp_path / f"start{number}", cache)
        if done == kills or (directory / "report.md").exists():
            break
    finish(processes, command, tmp_path / "last", **cache)
    assert numbers(directory) == numbers(expected)
    assert_same_texts(directory, expected)
    name = "export/model.safetensors"
    assert (directory / name).read_bytes() == (expected / name).read_bytes()
    assert done >= kills // 2, "the run ended before it was killed often enough"
