"""Checkpoints: exact round trips, other meshes, kill -9, full disks, damaged files."""

import gc
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_hosts import on_each

from rosd_jax.config import default_config, validate
from rosd_jax.errors import UserError
from rosd_jax.hosts import Hosts
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.train import checkpoint
from rosd_jax.types import TrainState
from support import ROOT, nightly_but

OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))


def make_state(step, mesh=None, width=64):
    """A state whose every array depends on the step."""
    random = np.random.default_rng(step)

    def numbers(*shape):
        return jnp.asarray(random.standard_normal(shape, np.float32))

    params = {
        "layers": {"q_proj": {"kernel": numbers(2, width, 128)}},
        "embed": numbers(16, 8).astype(jnp.bfloat16),
    }

    def moved(x):
        return numbers(*x.shape).astype(x.dtype) if x.ndim else jnp.int32(step)

    state = TrainState(jnp.int32(step), params, jax.tree.map(moved, OPTIMIZER.init(params)))
    return state if mesh is None else jax.device_put(state, param_shardings(state, mesh))


def like_of(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_equal(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def save(manager, state, step, meta):
    """Returns once the checkpoint is on disk."""
    checkpoint.finish(manager, checkpoint.save(manager, state, step, meta))


def restore(manager, like):
    """State and meta, or None."""
    found = checkpoint.restore_latest(manager, like, Hosts())
    return found and (found.state, found.meta)


def test_round_trip_is_exact_and_nothing_saved_is_none(tmp_path):
    manager = checkpoint.open_manager(tmp_path)
    assert restore(manager, like_of(make_state(0))) is None
    config = validate(default_config())
    for step in (3, 4, 7):
        save(manager, make_state(step), step, checkpoint.run_meta(config, {"weights": "c0ffee"}))
        checkpoint.prune(manager, keep=2, best=None)
    assert sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir()) == [4, 7]

    again = checkpoint.open_manager(tmp_path)
    state, meta = restore(again, like_of(make_state(0)))
    assert_equal(state, make_state(7))
    assert meta["step"] == 7 and meta["seed"] == config.seed and meta["jax"] == jax.__version__
    assert meta["weights"] == "c0ffee"


def test_whether_anything_was_saved_is_told_without_touching_the_directory(tmp_path):
    assert not checkpoint.any_saved(tmp_path) and list(tmp_path.iterdir()) == []
    manager = checkpoint.open_manager(tmp_path)
    (tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "2.bad").mkdir()
    assert not checkpoint.any_saved(tmp_path)
    save(manager, make_state(4), 4, {})
    assert checkpoint.any_saved(tmp_path)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_restores_onto_another_mesh(tmp_path, shape):
    saved = make_state(5, make_mesh(2, 1, 4))
    save(checkpoint.open_manager(tmp_path), saved, 5, {})
    mesh = make_mesh(*shape)
    wanted = make_state(5, mesh)
    state, _ = restore(checkpoint.open_manager(tmp_path), like_of(make_state(0, mesh)))
    assert_equal(state, wanted)
    placed = jax.tree.map(lambda x: x.sharding, state)
    assert jax.tree.all(jax.tree.map(lambda a, b: a == b, placed, param_shardings(wanted, mesh)))
    assert state.step.sharding == NamedSharding(mesh, P())


def test_a_step_is_saved_once_and_is_the_states_own(tmp_path):
    manager = checkpoint.open_manager(tmp_path)
    save(manager, make_state(1), 1, {})
    with pytest.raises(ValueError, match="already exists"):
        save(manager, make_state(1), 1, {})
    with pytest.raises(ValueError, match="not the state's"):
        save(manager, make_state(2), 3, {})


CHILD = """
import sys
from pathlib import Path
from test_checkpoint import make_state, save
from rosd_jax.train import checkpoint
manager = checkpoint.open_manager(Path(sys.argv[1]))
for state in [make_state(step, width=512) for step in range(30)]:
    save(manager, state, int(state.step), {})
    print(int(state.step), flush=True)
"""


def test_kill_in_the_middle_of_saving_leaves_a_whole_checkpoint(tmp_path):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=env
    )
    assert child.stdout is not None
    for _ in range(3):
        child.stdout.readline()
    with pytest.raises(subprocess.TimeoutExpired):
        child.wait(0.05)
    child.kill()
    told = [int(line) for line in child.stdout.read().split()]
    child.stdout.close()
    child.wait()

    manager = checkpoint.open_manager(tmp_path)
    state, meta = restore(manager, like_of(make_state(0, width=512)))
    step = meta["step"]
    assert step >= max(told, default=2)
    assert_equal(state, make_state(step, width=512))
    save(manager, make_state(step + 1, width=512), step + 1, {})
    checkpoint.prune(manager, keep=1, best=None)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == [str(step + 1)]


def test_the_best_checkpoint_stays_next_to_the_newest_and_its_weights_come_back_alone(tmp_path):
    manager = checkpoint.open_manager(tmp_path)
    for step in (2, 4, 6, 8):
        save(manager, make_state(step), step, {})
        checkpoint.prune(manager, keep=1, best=min(step, 4))
    assert sorted(manager.all_steps()) == [4, 8]
    params = checkpoint.restore_params(manager, 4, like_of(make_state(0)).params, Hosts())
    assert_equal(params, make_state(4).params)
    checkpoint.prune(manager, keep=1, best=0)
    assert manager.all_steps() == [8], "a step that was never saved keeps nothing"


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


# Orbax drops the unfinished writes of a failed save, and Python reports them when it collects them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_full_disk_is_one_sentence_and_earlier_checkpoints_stay(small_disk, capfd):
    manager = checkpoint.open_manager(small_disk)
    with pytest.raises(UserError) as caught:
        for step in range(9):
            save(manager, make_state(step), step, {})
    text = str(caught.value)
    assert text.startswith("no disk space for a checkpoint: it needs about 192.8 KiB and ")
    assert str(small_disk / "checkpoints") in text and "free; free some space" in text
    assert "\n" not in text
    assert capfd.readouterr() == ("", "")

    names = sorted(p.name for p in (small_disk / "checkpoints").iterdir())
    assert names == [str(step) for step in range(len(names))] and len(names) >= 2
    last = len(names) - 1
    state, _ = restore(manager, like_of(make_state(0)))
    assert_equal(state, make_state(last))
    shutil.rmtree(small_disk / "checkpoints" / "0")
    shutil.rmtree(small_disk / "checkpoints" / "1")
    save(manager, make_state(last + 1), last + 1, {})
    gc.collect()  # here, not in a later test


def test_check_space_names_what_where_and_how_much(tmp_path):
    checkpoint.check_space(tmp_path / "not" / "made", 1, "a checkpoint")
    with pytest.raises(UserError, match=r"no disk space for an export: it needs about 8.0 TiB"):
        checkpoint.check_space(tmp_path, 1 << 43, "an export")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    middle = len(content) // 2
    flipped = bytes([content[middle] ^ 255])
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(content[:middle] + (flipped + content[middle + 1 :] if how == "flip" else b""))


@pytest.mark.parametrize("how", nightly_but(["flip", "truncate", "delete"], keep=[0]))
@pytest.mark.parametrize("item", ["params", "opt_state", "meta"])
def test_the_checkpoint_before_a_damaged_one_is_used(tmp_path, item, how, capfd):
    manager = checkpoint.open_manager(tmp_path)
    for step in (1, 2):
        save(manager, make_state(step), step, {})
    latest = tmp_path / "checkpoints" / "2"
    files = [p for p in (latest / item).rglob("*") if p.is_file()]
    damage(max(files, key=lambda p: p.stat().st_size), how)
    manager = checkpoint.open_manager(tmp_path)
    found = checkpoint.restore_latest(manager, like_of(make_state(0)), Hosts())
    assert found is not None and found.step == 1 and list(found.damaged) == [2]
    assert_equal(found.state, make_state(1))
    checkpoint.set_aside(manager, found.damaged, Hosts())
    save(manager, make_state(2), 2, {})
    assert {p.name for p in latest.parent.iterdir()} == {"1", "2", "2.damaged"}
    state, _ = restore(checkpoint.open_manager(tmp_path), like_of(make_state(0)))
    assert_equal(state, make_state(2))
    assert capfd.readouterr() == ("", "")


def test_files_that_were_added_do_no_harm(tmp_path):
    save(checkpoint.open_manager(tmp_path), make_state(2), 2, {})
    for folder in ("", "params", "meta"):
        (tmp_path / "checkpoints" / "2" / folder / ".DS_Store").write_text("from a file manager")
    state, _ = restore(checkpoint.open_manager(tmp_path), like_of(make_state(0)))
    assert_equal(state, make_state(2))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"a": 1}'])
def test_damaged_checksums_are_a_damaged_checkpoint(tmp_path, text):
    manager = checkpoint.open_manager(tmp_path)
    for step in (1, 2):
        save(manager, make_state(step), step, {})
    (tmp_path / "checkpoints" / "2" / "checksums.json").write_text(text)
    found = checkpoint.restore_latest(checkpoint.open_manager(tmp_path), like_of(make_state(0)), Hosts())
    assert found is not None and found.step == 1 and list(found.damaged) == [2]


@pytest.mark.parametrize("how", ["flip", "truncate", "delete"])
@pytest.mark.parametrize("host", [0, 1])
def test_what_one_host_cannot_read_no_host_restores(tmp_path, how, host):
    """Each host has its own copy here, as if the storage that they share served them different bytes."""
    save(checkpoint.open_manager(tmp_path), make_state(2), 2, {})
    copies = [tmp_path / f"host{i}" for i in range(2)]
    for copy in copies:
        shutil.copytree(tmp_path / "checkpoints" / "2", copy)
    assert on_each(2, lambda hosts: checkpoint._damage(copies[hosts.index], hosts)) == [None, None]
    files = [p.relative_to(copies[host]) for p in (copies[host] / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: (copies[host] / p).stat().st_size)
    for copy in copies if how == "flip" else [copies[host]]:
        damage(copy / largest, how)
    reasons = on_each(2, lambda hosts: checkpoint._damage(copies[hosts.index], hosts))
    assert reasons[0] == reasons[1] and reasons[0].endswith("differs from what was saved")


def test_a_run_whose_checkpoints_are_all_damaged_is_refused(tmp_path):
    manager = checkpoint.open_manager(tmp_path)
    save(manager, make_state(1), 1, {})
    (tmp_path / "checkpoints" / "1" / "meta" / "metadata").write_text("{")
    with pytest.raises(UserError, match=r"checkpoints/1 cannot be read \(.*\), nor any before it"):
        restore(checkpoint.open_manager(tmp_path), like_of(make_state(0)))
    with pytest.raises(UserError, match="best step by validation"):
        checkpoint.restore_params(manager, 1, like_of(make_state(0)).params, Hosts())


def test_a_save_returns_before_the_files_are_written(tmp_path):
    """The arrays may be donated meanwhile, and a reader sees no unfinished checkpoint."""
    manager = checkpoint.open_manager(tmp_path)
    state = make_state(1, width=2048)
    wanted = make_state(1, width=2048)
    saving = checkpoint.save(manager, state, 1, {})
    unfinished = not (tmp_path / "checkpoints" / "1").exists()
    jax.tree.map(lambda x: x.delete(), state)
    checkpoint.finish(manager, saving)
    assert unfinished
    found, _ = restore(checkpoint.open_manager(tmp_path), like_of(make_state(0, width=2048)))
    assert_equal(found, wanted)


def test_state_of_another_model_is_refused_in_one_sentence(tmp_path, capfd):
    save(checkpoint.open_manager(tmp_path), make_state(1), 1, {})
    with pytest.raises(UserError, match="arrays of another model or optimizer.*model.path"):
        restore(checkpoint.open_manager(tmp_path), like_of(make_state(0, width=32)))
    assert capfd.readouterr() == ("", "")


def test_orbax_is_silent_and_other_absl_users_are_not(tmp_path):
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger, level = logging.getLogger("absl"), logging.getLogger("absl").level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        manager = checkpoint.open_manager(tmp_path)
        save(manager, make_state(1), 1, {})
        logger.info("mine")
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)
    assert records == ["mine"]


def test_state_bytes_counts_arrays_and_shapes():
    tree = {"a": jnp.zeros((3, 4)), "b": jax.ShapeDtypeStruct((5,), jnp.bfloat16)}
    assert checkpoint.state_bytes(tree) == 58
