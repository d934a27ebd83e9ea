"""What a stopped step has sampled is used by the next start, and by no other run or step."""

import signal

import numpy as np
import pytest
from test_hosts import on_each
from test_run import Run, arguments, assert_same_run, finish, finished_run

import tiny
from rosd_jax.hosts import Hosts
from rosd_jax.train.unfinished import Unfinished
from rosd_jax.types import DecodeStats, Rollout


def rollout(seed=0, stats=True):
    random = np.random.default_rng(seed)
    counts = [random.integers(1, 9, 2).astype(np.int32) for _ in range(4)]
    return Rollout(
        random.integers(0, 99, (4, 3)).astype(np.int32),
        np.array([3, 0, 1, 2], np.int32),
        random.normal(size=(4, 3)).astype(np.float32),
        np.array([True, False, True, True]),
        DecodeStats(*counts, np.float32([1.5, 2.5])) if stats else None,
    )


def leaves(found):
    names = ("tokens_BR", "length_B", "logp_BR", "finished_B")
    arrays = [getattr(found, name) for name in names]
    if found.stats:
        arrays += [
            found.stats.steps,
            found.stats.busy,
            found.stats.slots,
            found.stats.preempted,
            found.stats.read,
        ]
    return arrays


def assert_equal(found, wanted):
    for a, b in zip(leaves(found), leaves(wanted), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def never():
    raise AssertionError("sampled again")


@pytest.mark.parametrize("stats", [True, False])
def test_a_stage_is_sampled_once_and_comes_back_exactly(tmp_path, stats):
    wanted = rollout(stats=stats)
    found, earlier = Unfinished(tmp_path, Hosts(), "origin").rollout(5, "rollout", lambda: wanted)
    assert found is wanted and earlier == 0
    found, earlier = Unfinished(tmp_path, Hosts(), "origin").rollout(5, "rollout", never)
    assert_equal(found, wanted)
    assert earlier > 0


def test_another_step_stage_or_run_samples_its_own(tmp_path):
    kept = Unfinished(tmp_path, Hosts(), "origin")
    kept.rollout(5, "rollout", lambda: rollout(0))
    for other, step, stage in [
        (kept, 6, "rollout"),
        (kept, 6, "reflect"),
        (Unfinished(tmp_path, Hosts(), "other weights"), 6, "rollout"),
    ]:
        own = rollout(step)
        assert other.rollout(step, stage, lambda own=own: own)[0] is own


@pytest.mark.parametrize("how", ["flip", "cut", "empty"])
def test_a_damaged_file_is_sampled_again(tmp_path, how):
    kept = Unfinished(tmp_path, Hosts(), "origin")
    kept.rollout(5, "rollout", lambda: rollout())
    (path,) = (tmp_path / "unfinished").iterdir()
    content = path.read_bytes()
    at = content.index(b"tokens_BR.npy") + 160  # in the array's own bytes
    flipped = content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]
    path.write_bytes({"flip": flipped, "cut": content[: len(content) // 2], "empty": b""}[how])
    own = rollout(1)
    assert kept.rollout(5, "rollout", lambda: own)[0] is own


def test_no_flip_of_a_bit_is_taken_for_what_was_sampled(tmp_path):
    kept = Unfinished(tmp_path, Hosts(), "origin")
    wanted = kept.rollout(5, "rollout", lambda: rollout())[0]
    (path,) = (tmp_path / "unfinished").iterdir()
    content = path.read_bytes()
    own = rollout(1)
    directory = content.index(b"PK\x01\x02")  # of the zip file, which no checksum protects
    for at in range(directory, len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        found = kept.rollout(5, "rollout", lambda: own)[0]
        if found is not own:
            assert_equal(found, wanted)


def test_what_other_steps_have_left_is_dropped(tmp_path):
    kept = Unfinished(tmp_path, Hosts(), "origin")
    kept.rollout(4, "reflect", lambda: rollout())
    kept.rollout(5, "rollout", lambda: rollout())
    kept.drop_unless(5)
    assert [path.name for path in (tmp_path / "unfinished").iterdir()] == ["rollout.npz"]
    kept.drop()
    kept.drop()
    assert not (tmp_path / "unfinished").exists()


def test_all_processes_use_what_the_first_has_kept(tmp_path):
    def program(hosts):
        kept = Unfinished(tmp_path, hosts, "origin")
        first = kept.rollout(5, "rollout", lambda: rollout(7))[0]
        return first, kept.rollout(5, "rollout", never)[0]

    for first, second in on_each(3, program):
        assert_equal(first, rollout(7))
        assert_equal(second, rollout(7))


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_stopped_inside_a_step_goes_on_from_there(cache, tmp_path, tmp_path_factory):
    expected = finished_run(cache, tmp_path_factory)[0]
    directory = tmp_path / "run"
    command = arguments(tiny.model_dir(tmp_path_factory), directory)
    run = Run(command, tmp_path, **cache)
    run.wait_for(directory, 2)
    kept = directory / "unfinished" / "reflect.npz"
    before = kept.stat().st_mtime_ns
    while kept.stat().st_mtime_ns == before:
        assert run.process.poll() is None
    run.signal(signal.SIGINT)
    assert run.end()[0] == 130
    with np.load(kept) as arrays:
        step = int(arrays["step"])
    printed = finish(command, tmp_path, **cache)
    # The signal came before the update's last micro-batch; or else the step was made, and the next stopped.
    assert f"resumes after step {step}," in printed or f"resumes after step {step + 1}," in printed
    assert_same_run(directory, expected)
    assert not (directory / "unfinished").exists()
