"""Runs of two and four processes: the numbers of one, one set of files, and an end for all if one fails."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
from pod import (
    DEVICES,
    FIELDS,
    Pod,
    arguments,
    assert_same_rows,
    assert_same_texts,
    finish,
    free_port,
    largest_difference,
)
from test_run import numbers

import tiny
from support import ROOT, made_once, run_environment, shared_dir

# Sums over devices of several processes are added in another order.
ROUNDING = 1e-5
# On another mesh matrices are multiplied in other pieces. The losses here are differences of nearly equal
# numbers, about 1e-5; test_run.py has the same bound.
MESH = 2e-3

pytestmark = pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="needs Linux's /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory)


@pytest.fixture(scope="module")
def alone(model, cache, tmp_path_factory):
    """The directory of the run as one process makes it."""

    def make(path):
        finish(1, arguments(model, path / "run"), path, **cache)

    return made_once(shared_dir(tmp_path_factory) / "alone", make) / "run"


@pytest.fixture(scope="module")
def pair(model, cache, tmp_path_factory):
    """The directory of the run as two processes make it, and what they printed."""

    def make(path):
        finish(2, arguments(model, path / "run"), path, **cache)

    return made_once(shared_dir(tmp_path_factory) / "pair", make)


def same(directory, other):
    """Bit for bit: runs of the same number of processes."""
    assert numbers(directory) == numbers(other)
    assert_same_texts(directory, other)
    name = "export/model.safetensors"
    assert (directory / name).read_bytes() == (other / name).read_bytes()


@pytest.mark.slow
def test_two_processes_do_what_one_does(pair, alone):
    assert_same_texts(pair / "run", alone, exact=False)
    assert largest_difference(pair / "run", alone) < ROUNDING
    assert left(pair / "run") == left(alone)


def left(directory):
    """All files of a run, except the inner ones of checkpoints."""
    paths = (path.relative_to(directory) for path in directory.rglob("*"))
    return {path for path in paths if path.parts[0] != "checkpoints" or len(path.parts) == 2}


def test_only_the_first_process_prints(pair):
    first, second = ((pair / f"out{i}").read_text().splitlines() for i in range(2))
    assert sum(line.startswith("step ") for line in first) == FIELDS["steps"]
    assert [line for line in second if not line.startswith("[Gloo]")] == []


@pytest.mark.nightly
@pytest.mark.slow
def test_four_processes_do_what_one_does(model, alone, cache, tmp_path):
    finish(4, arguments(model, tmp_path / "run"), tmp_path, **cache)
    assert_same_texts(tmp_path / "run", alone, exact=False)
    assert largest_difference(tmp_path / "run", alone) < ROUNDING


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes_and_another_mesh(model, alone, cache, tmp_path):
    directory = tmp_path / "run"
    # A resumed run must keep mesh.*, and data=-1 means whatever the number of devices leaves.
    fields = dict(mesh__data=-1, mesh__fsdp=1, eval__sets="")
    for turn, (processes, steps) in enumerate([(1, 1), (2, 2), (4, 3), (1, 4)]):
        cwd = tmp_path / f"turn{turn}"
        done = finish(processes, arguments(model, directory, **fields, steps=steps), cwd, **cache)
        assert turn == 0 or f"resumes after step {turn}" in (done.cwd / "out0").read_text()
    for step in range(1, FIELDS["steps"] + 1):
        name = f"rollouts/step_{step}.jsonl"
        assert_same_rows(directory / name, alone / name)
    assert largest_difference(directory, alone, only="train") < MESH


def test_weights_are_restored_exactly_by_another_number_of_processes(alone, model, cache, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(alone, directory)
    shutil.rmtree(directory / "export")
    finish(2, arguments(model, directory), tmp_path, **cache)
    same(directory, alone)


@pytest.mark.nightly
@pytest.mark.slow
def test_hosts_that_are_stopped_and_killed_end_together_and_lose_nothing(pair, model, cache, tmp_path):
    directory = tmp_path / "run"
    command = arguments(model, directory)

    run = Pod(2, command, tmp_path, **cache)
    run.wait_for_line(directory, 1)
    run.started[1].send_signal(signal.SIGTERM)
    assert run.end() == [143, 143]
    last = f"SIGTERM: stopped; the same command with --workdir={directory} resumes\n"
    assert run.printed(0).endswith(last) and run.printed(1).endswith(last)
    assert "the run stops when" in run.printed(1) and "the run stops when" not in run.printed(0)

    for killed, step in ((0, 2), (1, 3)):
        run = Pod(2, command, tmp_path, **cache)
        run.wait_for_line(directory, step)
        os.kill(run.child(killed), signal.SIGKILL)
        statuses = run.end(60)
        assert statuses[killed] == 128 + signal.SIGKILL and statuses[1 - killed] == 1
        assert f"error: process {killed} of 2, on host " in run.printed(1 - killed)

    finish(2, command, tmp_path, **cache)
    same(directory, pair / "run")


@pytest.mark.nightly
def test_hosts_with_different_commands_are_refused(model, tmp_path):
    command = arguments(model, tmp_path / "run")
    run = Pod(2, command, tmp_path, own={1: ["--config.seed=3"]})
    assert run.end(60) == [2, 2]
    assert "the config of process 1 differs from that of process 0: seed is 3 and 2" in run.printed(0)
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_a_file_that_one_host_lacks_is_named_on_all(model, tmp_path):
    command = arguments(model, tmp_path / "run")
    run = Pod(2, command, tmp_path, own={1: ["--config.data.train=jsonl:elsewhere.jsonl"]})
    assert run.end(60) == [2, 2]
    assert "process 1 of 2" in run.printed(0) and "elsewhere" in run.printed(0)


# --- weights by shard ------------------------------------------------------------------------------------

LOADS = f"""
import json, sys
import jax
from pathlib import Path
from rosd_jax.hosts import place
from rosd_jax.models import weights
from rosd_jax.models.families import read_config
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.models.qwen3 import param_shapes

process, path = int(sys.argv[2]), sys.argv[3]
hosts = place.join(place.Place(sys.argv[1], 2, process))
config = read_config(path, num_tokens=None, dtype="float32", remat="none")
read = 0
largest = 0

def counted(*arguments, original=weights._read_shard):
    global read, largest
    found = original(*arguments)
    read += found.nbytes
    largest = max(largest, found.nbytes)
    return found

weights._read_shard = counted
mesh = make_mesh(1, {DEVICES}, 1)
shapes = param_shapes(config)
params = weights.load_params(path, config, param_shardings(shapes, mesh))
whole = sum(x.nbytes for x in jax.tree.leaves(params))
print(json.dumps([read, largest, whole]))
jax.distributed.shutdown()
"""


def test_a_host_reads_only_its_own_shards(model):
    place = f"127.0.0.1:{free_port()}"
    environment = run_environment(JAX_NUM_CPU_DEVICES=str(DEVICES // 2), PYTHONPATH=str(ROOT))
    command = [sys.executable, "-c", LOADS, place]
    runs = [
        subprocess.Popen([*command, str(i), str(model)], stdout=subprocess.PIPE, text=True, env=environment)
        for i in range(2)
    ]
    for run in runs:
        read, largest, whole = json.loads(run.communicate(timeout=60)[0].splitlines()[-1])
        # Norms are on every device; all else is split over the four devices, of which a process has two.
        assert whole / 2 <= read < 0.53 * whole and largest < whole / 8
