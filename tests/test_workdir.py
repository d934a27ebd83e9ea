"""The run's directory: one config, one writer, rollouts that survive any text."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from test_hosts import on_each

from rosd_jax.config import default_config, validate
from rosd_jax.errors import UserError
from rosd_jax.settings import Settings
from rosd_jax.step_files import drop_after
from rosd_jax.train import workdir
from support import ROOT

DEFAULT = validate(default_config())


def config_with(**fields) -> Settings:
    config = default_config()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return validate(config)


def began(run):
    """As a run leaves its workdir once it has written a line."""
    (run / "metrics.jsonl").touch()


def test_a_run_that_never_began_does_not_pin_its_workdir(tmp_path):
    workdir.prepare(tmp_path, config_with(batch__prompts=8))
    assert workdir.prepare(tmp_path, config_with(batch__prompts=16)) is False
    assert json.loads((tmp_path / "config.json").read_text())["batch"]["prompts"] == 16


def test_new_workdir_gets_the_resolved_config_and_the_next_run_resumes(tmp_path):
    run = tmp_path / "runs" / "one"
    draft = default_config()
    draft.steps = 7
    draft.eval.limit = draft.get_ref("steps")
    draft.rollout.stop = ("a", "b")
    config = validate(draft)
    assert workdir.prepare(run, config) is False
    written = json.loads((run / "config.json").read_text())
    assert written["eval"]["limit"] == 7 and written["rollout"]["stop"] == ["a", "b"]
    assert list(written) == sorted(written)
    assert sorted(p.name for p in run.iterdir()) == [".lock", "config.json"]
    assert workdir.prepare(run, config) is False  # nothing has been written yet
    began(run)
    assert workdir.prepare(run, config) is True


def test_floats_are_the_same_however_they_were_typed(tmp_path):
    first = config_with(optimizer__lr=1e-5, optimizer__clip_norm=1.0, loss__alpha=0.1)
    again = config_with(optimizer__lr=0.00001, optimizer__clip_norm=1, loss__alpha=0.10)
    workdir.prepare(tmp_path, first)
    began(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert '"lr": 1e-05' in text and '"clip_norm": 1.0' in text
    assert workdir.prepare(tmp_path, again)
    assert (tmp_path / "config.json").read_text() == text
    assert workdir.fingerprint(first) == workdir.fingerprint(again)


def test_steps_evaluation_and_the_models_path_may_change_and_are_recorded_once_the_run_goes_on(tmp_path):
    workdir.prepare(tmp_path, config_with(steps=7))
    began(tmp_path)
    before = (tmp_path / "config.json").read_text()
    other = config_with(steps=9, checkpoint__keep=5, eval__samples=3, eval__sets="a", model__path="elsewhere")
    assert workdir.prepare(tmp_path, other)
    assert (tmp_path / "config.json").read_text() == before  # the start may still be refused
    workdir.record(tmp_path, other)
    there = json.loads((tmp_path / "config.json").read_text())
    assert there == json.loads(json.dumps(dataclasses.asdict(other)))
    assert workdir.fingerprint(other) == workdir.fingerprint(config_with(steps=7))


def test_another_config_is_refused_with_every_field_and_both_values(tmp_path):
    workdir.prepare(tmp_path, config_with(batch__prompts=8))
    began(tmp_path)
    before = (tmp_path / "config.json").read_text()
    other = config_with(batch__prompts=16, steps=5, seed=3, model__dtype="float32")
    with pytest.raises(UserError) as caught:
        workdir.prepare(tmp_path, other)
    assert str(caught.value) == (
        f"workdir {tmp_path} contains a run with another config: batch.prompts is 8 there and 16 here, "
        "model.dtype is 'bfloat16' there and 'float32' here, seed is 0 there and 3 here; "
        "use another --workdir or the same config"
    )
    assert (tmp_path / "config.json").read_text() == before
    assert workdir.fingerprint(other) != workdir.fingerprint(config_with(batch__prompts=8))


def older_run(path, change):
    """A run of a version with other fields."""
    workdir.prepare(path, DEFAULT)
    began(path)
    fields = json.loads((path / "config.json").read_text())
    change(fields)
    (path / "config.json").write_text(json.dumps(fields))


def test_a_field_that_only_an_older_version_knows_is_a_difference(tmp_path):
    older_run(tmp_path, lambda fields: fields.update(old=1))
    with pytest.raises(UserError, match="old is 1 there and absent here"):
        workdir.prepare(tmp_path, DEFAULT)


def test_a_field_that_is_newer_than_the_run_had_its_default(tmp_path):
    older_run(tmp_path, lambda fields: fields["loss"].pop("alpha"))
    assert workdir.prepare(tmp_path, DEFAULT)
    with pytest.raises(UserError, match="loss.alpha is 0.5 there and 0.25 here"):
        workdir.prepare(tmp_path, config_with(loss__alpha=0.25))


@pytest.mark.parametrize(
    ("directories", "words"),
    [
        (["a", "a"], None),
        (["a", "b"], "is not that of process 0 on the host of process 1"),
        (["a", "absent/b"], r"cannot be written \(No such file or directory\) on the host of process 1"),
    ],
)
def test_hosts_that_do_not_share_the_workdir_are_refused(directories, words, tmp_path, monkeypatch):
    monkeypatch.setattr(workdir, "LATE_S", 0.2)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()

    def program(hosts):
        try:
            workdir.require_shared(tmp_path / directories[hosts.index], hosts)
        except UserError as error:
            return str(error)

    for sentence in on_each(2, program):
        assert sentence is None if words is None else re.search(words, sentence)
    assert not list(tmp_path.rglob(".shared*"))


def test_a_start_that_fails_takes_the_directory_that_it_made_away(tmp_path):
    run = tmp_path / "new" / "newer" / "run"
    for error in (UserError, KeyboardInterrupt):
        with pytest.raises(error), workdir.claim(run, DEFAULT):
            (run / "checkpoints").mkdir()
            raise error
        assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_is_refused_leaves_nothing_above_it(tmp_path, monkeypatch):
    def full(path, chunks):
        raise OSError("the disk is full")

    monkeypatch.setattr(workdir.atomic, "write_text", full)
    (tmp_path / "mine").mkdir()
    with pytest.raises(OSError, match="full"):
        workdir.prepare(tmp_path / "mine" / "new" / "run", DEFAULT)
    with pytest.raises(UserError, match="each name in it of at most 255"):
        workdir.prepare(tmp_path / "mine" / "new" / ("x" * 256), DEFAULT)
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_workdir_that_another_process_made_meanwhile_is_not_taken_away(tmp_path, monkeypatch):
    def lock(path):
        workdir.record(path, DEFAULT)  # as the other process does
        raise UserError("in use")

    monkeypatch.setattr(workdir, "lock", lock)
    with pytest.raises(UserError, match="in use"):
        workdir.prepare(tmp_path / "new" / "run", DEFAULT)
    assert (tmp_path / "new" / "run" / "config.json").exists()


@pytest.mark.parametrize("name", ["metrics.jsonl", "notes.txt", "checkpoints/1"])
def test_a_start_that_wrote_something_keeps_its_directory(tmp_path, name):
    with pytest.raises(UserError), workdir.claim(tmp_path / "run", DEFAULT):
        (tmp_path / "run" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "run" / name).write_text("x")
        raise UserError
    assert (tmp_path / "run" / name).read_text() == "x"
    assert workdir.prepare(tmp_path / "run", DEFAULT) is (name != "notes.txt")


def test_a_directory_that_was_there_stays(tmp_path):
    with pytest.raises(UserError), workdir.claim(tmp_path, DEFAULT):
        (tmp_path / "checkpoints").mkdir()
        raise UserError
    assert tmp_path.is_dir()
    # Empty checkpoints/ are nothing yet that pins a config.
    assert workdir.prepare(tmp_path, config_with(batch__prompts=16)) is False


@pytest.mark.parametrize("text", ["", "{", "[]", '{"a": \udcff}'])
def test_broken_config_json_is_named(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "config.json"))):
        workdir.prepare(tmp_path, DEFAULT)


def test_a_file_and_a_path_below_a_file_are_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="is a file; give --workdir a directory"):
        workdir.prepare(file, DEFAULT)
    with pytest.raises(UserError, match="cannot be made or read .*; use another --workdir"):
        workdir.prepare(file / "below", DEFAULT)


def test_a_directory_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="contains files but no config.json"):
        workdir.prepare(tmp_path, DEFAULT)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_kill_before_the_config_leaves_is_a_new_run(tmp_path):
    (tmp_path / ".lock").write_text("1\n")
    (tmp_path / "config.json.tmp").write_text("{")
    assert workdir.prepare(tmp_path, DEFAULT) is False
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.json"]


@pytest.fixture
def read_only_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(disk)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a read-only tmpfs is not permitted here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_directory_that_cannot_be_written_is_refused(read_only_disk):
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\)"):
        workdir.prepare(read_only_disk, DEFAULT)


HOLD = """
import sys, time
from pathlib import Path
from rosd_jax.config import default_config, validate
from rosd_jax.train import workdir
print(workdir.prepare(Path(sys.argv[1]), validate(default_config())), flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert child.stdout is not None
    try:
        assert child.stdout.readline() == "False\n"
        with pytest.raises(UserError, match=rf"in use by another run \(process {child.pid}\)"):
            workdir.prepare(tmp_path, DEFAULT)
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert workdir.prepare(tmp_path, DEFAULT) is False


def test_default_workdir_is_under_runs_and_safe_as_a_path():
    assert re.fullmatch(r"runs/quickstart-\d{8}-\d{6}", str(workdir.default_workdir("quickstart")))
    name = workdir.default_workdir("../a b:physics,debug")
    assert re.fullmatch(r"runs/a-b-physics-debug-\d{8}-\d{6}", str(name))


# "a€b" as the tokens "a", two bytes of "€", its last byte, "b" and a stop token.
SPLIT = [[0, 1], [1, 2], [1, 2], [2, 3], [3, 3]]


@pytest.mark.parametrize(
    "weights, tokens, chars, widths",
    [
        ([1, 1, 1, 1, 1], (0, 5), (0, 3), [1, 1, 0, 1, 0]),
        ([0, 1, 1, 0, 0], (1, 3), (1, 2), [1, 0]),
        ([0, 0, 1, 1, 1], (2, 5), (2, 3), [0, 1, 0]),  # "€" is the text of a token that is not in the loss
        ([0, 0, 0, 0, 1], (4, 5), (3, 3), [0]),
    ],
)
def test_the_tokens_in_the_loss_are_recorded_with_their_text_and_divergence(weights, tokens, chars, widths):
    split = SimpleNamespace(offsets=lambda ids: np.array(SPLIT)[: len(ids)])
    divergence_R = np.float32([0.1234567, 1e-7, 0.5, np.nan, 0, 7, 7])
    weight_R = np.float32([*weights, 0, 0])
    found = workdir.active_tokens(np.arange(5), weight_R, divergence_R, split)
    assert (found["active_span_tokens"], found["active_span_chars"]) == (tokens, chars)
    assert found["active_widths"] == widths
    assert found["divergence"] == [0.1235, 1e-7, 0.5, None, 0.0][slice(*tokens)]


def test_a_rollout_without_tokens_in_the_loss_has_no_divergence():
    none = workdir.active_tokens(np.arange(5), np.zeros(7), np.zeros(7), SimpleNamespace())
    assert len(none) == 4 and set(none.values()) == {None}


def test_rollouts_keep_hostile_text_and_arrays(tmp_path):
    text = 'lone \ud800, \u2028, </script>, "quotes"\n\0 \U0001f600'
    row = {"response": text, "ids": np.arange(3, dtype=np.int32), "reward": np.float32(0.5)}
    path = workdir.write_rollouts(tmp_path, 12, [row, {"quote": None, "span": (1, 2)}])
    assert path == tmp_path / "rollouts" / "step_12.jsonl"
    assert path.read_bytes().isascii()
    first, second = map(json.loads, path.read_text().splitlines())
    assert first == {"response": text, "ids": [0, 1, 2], "reward": 0.5}
    assert second == {"quote": None, "span": [1, 2]}


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    path = workdir.write_rollouts(tmp_path, 1, [{"a": 1}])
    with pytest.raises(AttributeError):
        workdir.write_rollouts(tmp_path, 1, [{"a": 2}, {"a": object()}])
    assert path.read_text() == '{"a": 1}\n'
    assert [p.name for p in path.parent.iterdir()] == ["step_1.jsonl"]


def test_resuming_drops_rollouts_of_later_steps(tmp_path):
    drop_after(tmp_path / "rollouts", ".jsonl", 5)
    for step in (2, 9, 10, 100):
        workdir.write_rollouts(tmp_path, step, [{"step": step}])
    (tmp_path / "rollouts" / "step_11.jsonl.tmp").write_text("{")
    (tmp_path / "rollouts" / "notes.txt").write_text("mine")
    drop_after(tmp_path / "rollouts", ".jsonl", 9)
    names = sorted(p.name for p in (tmp_path / "rollouts").iterdir())
    assert names == ["notes.txt", "step_2.jsonl", "step_9.jsonl"]
