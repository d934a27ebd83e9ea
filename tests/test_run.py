"""The command: what a run leaves, that it can be cut off anywhere, and how it answers mistakes."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import tiny
from rosd_jax.config import default_config, validate
from rosd_jax.errors import UserError
from rosd_jax.gym import problems as gym
from rosd_jax.models.families import read_config
from rosd_jax.models.weights import load_params
from rosd_jax.rewards import mcq
from rosd_jax.text.tokenizer import load_tokenizer
from rosd_jax.train import workdir
from rosd_jax.train.compiling import keep_programs
from support import QUICK_FLAGS, ROOT, made_once, run_environment, shared_dir

QUICKSTART = f"--config={ROOT / 'configs' / 'quickstart.py'}:debug"
STEPS, SETS = 6, ("gym:chain", "gym:words")
FIELDS = dict(
    seed=2,
    steps=STEPS,
    batch__samples=32,
    batch__prompts=2,
    batch__device_rows=16,
    rollout__max_new_tokens=16,
    reflect__max_new_tokens=16,
    eval__max_new_tokens=16,
    eval__sets=",".join(SETS),
    eval__limit=8,
    eval__batch=16,
    eval__every=2,
    checkpoint__every=2,
    validation__sets="",
    compile_cache="",
)
OWN_FLAGS = (
    "config",
    "workdir",
    "mode",
    "topology",
    "compile",
    "json",
    "profile",
    "labels",
    "compare",
    "coordinator",
    "processes",
    "process",
)
TIMES = ("seconds", "tokens_per_second", "roofline", "programs_compiled")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory)


def arguments(model, directory, mode="train", **fields):
    """The command line of a small run."""
    named = {"model__path": model} | FIELDS | fields
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in named.items()]
    return [QUICKSTART, f"--workdir={directory}", f"--mode={mode}", *overrides]


class Run:
    """The command as a process of its own, in its own session, with what it prints in files."""

    def __init__(self, arguments, cwd, **environment):
        self.out, self.err = cwd / "stdout", cwd / "stderr"
        environment = run_environment(**environment)
        with open(self.out, "w") as out, open(self.err, "w") as err:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "run.py", *arguments],
                stdout=out,
                stderr=err,
                cwd=cwd,
                env=environment,
                start_new_session=True,
            )

    def wait_for(self, directory, step):
        """Returns as soon as the line of training step `step` is written."""
        wanted = f'{{"step": {step}, "split": "train"'
        path, began = directory / "metrics.jsonl", time.monotonic()
        while not (path.exists() and wanted in path.read_text()):
            assert self.process.poll() is None, self.err.read_text()
            assert time.monotonic() - began < 300
            time.sleep(0.005)

    def signal(self, number):
        assert self.process.poll() is None
        os.killpg(self.process.pid, number)

    def end(self):
        """Exit status and the text on stderr."""
        status = self.process.wait(300)
        return status, self.err.read_text()


def finish(arguments, cwd, **environment):
    """Runs to the end, which must be a good one."""
    run = Run(arguments, cwd, **environment)
    assert run.end() == (0, "")
    return run.out.read_text()


def finished_run(cache, tmp_path_factory):
    """A run that nothing disturbed, made once a session: its directory, and what it printed."""

    def make(path):
        path.mkdir()
        command = arguments(tiny.model_dir(tmp_path_factory), path / "run", trackers="tensorboard")
        finish([*command, "--profile"], path, **cache)

    path = made_once(shared_dir(tmp_path_factory) / "finished", make)
    return path / "run", (path / "stdout").read_text()


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    return finished_run(cache, tmp_path_factory)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def numbers(directory):
    """Every line of the metrics without its times."""
    rows = read_lines(directory / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def assert_same_run(directory, other):
    assert numbers(directory) == numbers(other)
    for folder in ("export", "rollouts", "evals", "report"):
        files = {p.relative_to(other) for p in (other / folder).rglob("*") if p.is_file()}
        assert files == {p.relative_to(directory) for p in (directory / folder).rglob("*") if p.is_file()}
        for name in files:
            assert (directory / name).read_bytes() == (other / name).read_bytes(), name


# --- what a run leaves -------------------------------------------------------------------------------


def test_a_run_leaves_all_that_the_readme_names(finished):
    directory, printed = finished
    names = {path.name for path in directory.iterdir()}
    assert names == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "rollouts",
        "evals",
        "checkpoints",
        "export",
        "report",
        "report.html",
        "report.md",
        "report.png",
        "tensorboard",
        "profile",
    }
    config = json.loads((directory / "config.json").read_text())
    assert (config["seed"], config["steps"], config["batch"]["samples"]) == (2, STEPS, 32)
    assert {p.name for p in (directory / "checkpoints").iterdir()} == {"4", "6"}  # keep is 2
    assert {p.name for p in (directory / "rollouts").iterdir()} == {f"step_{n}.jsonl" for n in range(1, 7)}
    assert {p.name for p in (directory / "report").iterdir()} == {f"step_{n}.js" for n in range(1, 7)}
    for name in SETS:
        assert name in (directory / "report.md").read_text() and name in printed
    assert list((directory / "profile").rglob("perfetto_trace.json.gz"))
    assert (directory / "export" / "README.md").read_text().startswith("---\nlibrary_name:")
    assert f"step 6/{STEPS}" in printed and "\r" not in printed and "\x1b" not in printed


def test_the_metrics_come_in_order_with_the_named_numbers(finished):
    rows = read_lines(finished[0] / "metrics.jsonl")

    def evals(step):
        return [(step, f"eval/{name}") for name in SETS]

    wanted = evals(0)
    for step in range(1, STEPS + 1):
        wanted += [(step, "train"), *(evals(step) if step % 2 == 0 else [])]
    assert [(row["step"], row["split"]) for row in rows] == wanted
    train = [row for row in rows if row["split"] == "train"]
    for row in train:
        named = {
            "loss",
            "reward",
            "reflected",
            "quote_found",
            "active_tokens",
            "active_tokens_share",
            "grad_norm",
            "ratio",
            "skipped_empty",
            "skipped_nonfinite",
            "quote_exact",
            "out_overlong",
            "tokens_per_second_rollout",
            "idle_share_rollout",
            "roofline_rollout",
            "tokens_per_second_reflect",
            "idle_share_reflect",
            "roofline_reflect",
            "preempted_rollout",
            "preempted_reflect",
            "seconds",
            "seconds_rollout",
            "seconds_grade",
            "seconds_reflect",
            "seconds_lesson",
            "seconds_update",
        }
        assert named <= row.keys() and row.keys() == train[0].keys()
        if row["active_tokens"]:
            assert row["loss"] > 0 and row["grad_norm"] > 0 and abs(row["ratio"] - 1) < 1e-4
            assert row["logp_gap"] < 1e-5
    assert sum(row["active_tokens"] > 0 for row in train) >= 3
    for row in rows:
        if row["split"] != "train":
            assert {"avg", "avg_se", "pass", "maj"} <= row.keys() and (row["k"], row["n"]) == (2, 8)


def test_rollouts_are_records_that_agree_with_themselves_and_the_metrics(finished, model):
    directory, tokenizer = finished[0], load_tokenizer(model)
    train = [row for row in read_lines(directory / "metrics.jsonl") if row["split"] == "train"]
    located = 0
    for row in train:
        records = read_lines(directory / "rollouts" / f"step_{row['step']}.jsonl")
        assert len(records) == 64 and len({(r["uid"], r["sample"]) for r in records}) == 64
        assert sum(r["active_tokens"] for r in records) == row["active_tokens"]
        assert np.mean([r["reward"] for r in records]) == pytest.approx(row["reward"])
        assert np.mean([r["reflection"] is not None for r in records]) == pytest.approx(row["reflected"])
        for r in records:
            assert tokenizer.decode(r["token_ids"]) == r["response"]
            assert r["prompt"][0]["role"] == "user" and r["answer"]
            assert bool(r["note"]) == (r["active_tokens"] == 0)
            if r["error_span_tokens"]:
                start, stop = r["error_span_tokens"]
                assert tokenizer.decode(r["token_ids"][start:stop]) == r["quote"]
                assert r["response"][slice(*r["error_span_chars"])] == r["quote"]
                assert r["reward"] == 0 and r["active_tokens"] == stop - start
                located += 1
        assert_tokens_in_the_loss(records, row, tokenizer)
    assert located


def assert_tokens_in_the_loss(records, row, tokenizer):
    """Their texts are those of the response, and their divergences have the mean that the metrics tell."""
    divergences = []
    for r in records:
        if not r["active_tokens"]:
            assert r["active_span_tokens"] is r["active_span_chars"] is r["divergence"] is None
            continue
        start, stop = r["active_span_tokens"]
        at, end = r["active_span_chars"]
        assert len(r["divergence"]) == r["active_tokens"] == stop - start
        for token, width in zip(r["token_ids"][start:stop], r["active_widths"], strict=True):
            assert r["response"][at : at + width] == tokenizer.decode([token])
            at += width
        assert at == end
        divergences += r["divergence"]
    assert len(divergences) == row["active_tokens"]
    if divergences:
        assert np.mean(divergences) == pytest.approx(row["divergence"], rel=1e-3)


def test_the_export_is_the_trained_model(finished, model):
    path = finished[0] / "export"
    tokenizer = load_tokenizer(path)

    def read(path):
        return read_config(path, num_tokens=tokenizer.num_tokens, dtype="float32", remat="none")

    config = read(path)
    assert config == read(model)
    assert tokenizer.stop_ids == load_tokenizer(model).stop_ids
    message = [{"role": "user", "content": "12 +7 *3 -5 +9"}]
    assert (
        tokenizer.encode_chats([message], thinking=False)[0]
        == load_tokenizer(model).encode_chats([message], thinking=False)[0]
    )
    before, after = load_params(model, config), load_params(path, config)
    moved = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), before, after)
    assert 0 < max(jax.tree.leaves(moved)) < 0.02  # six steps of AdamW at 3e-4 or less


# --- the same again, cut off or elsewhere --------------------------------------------------------------


@pytest.mark.nightly
@pytest.mark.slow
def test_the_same_seed_gives_the_same_run(finished, model, tmp_path):
    finish(arguments(model, tmp_path / "run"), tmp_path)  # compiled again
    assert_same_run(tmp_path / "run", finished[0])


@pytest.mark.slow
def test_a_second_start_of_a_config_compiles_nothing(finished, model, cache, tmp_path):
    """`finished` has filled the directory that the field names here."""
    fields = {"compile_cache": Path(cache["JAX_COMPILATION_CACHE_DIR"]).parent, "steps": 2}
    finish(arguments(model, tmp_path / "run", **fields), tmp_path)
    lines = [row for row in read_lines(tmp_path / "run" / "metrics.jsonl") if row["split"] == "train"]
    assert [row["programs_compiled"] for row in lines] == [0, 0]
    first = next(row for row in read_lines(finished[0] / "metrics.jsonl") if row["split"] == "train")
    assert lines[0]["seconds_compiling"] < first["seconds_compiling"]


@pytest.mark.slow
def test_a_run_that_was_killed_equals_one_that_was_not(finished, model, cache, tmp_path):
    directory = tmp_path / "run"
    command = arguments(model, directory)
    run = Run(command, tmp_path, **cache)
    run.wait_for(directory, 5)  # before the checkpoint of step 4 was begun, that of step 2 was whole
    run.signal(signal.SIGKILL)
    assert run.end()[0] == -signal.SIGKILL

    assert "resumes after step" in finish(command, tmp_path, **cache)
    assert_same_run(directory, finished[0])


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_that_was_cut_off_twice_equals_one_that_was_not(finished, model, cache, tmp_path):
    directory = tmp_path / "run"
    command = arguments(model, directory)
    run = Run(command, tmp_path, **cache)
    run.wait_for(directory, 1)  # before the first checkpoint
    run.signal(signal.SIGKILL)
    assert run.end()[0] == -signal.SIGKILL

    run = Run(command, tmp_path, **cache)
    run.wait_for(directory, 3)  # behind a checkpoint
    run.signal(signal.SIGINT)
    status, printed = run.end()
    assert status == 130 and printed.endswith("resumes\n")
    assert not (directory / "export").exists()

    assert "resumes after step" in finish(command, tmp_path, **cache)
    assert_same_run(directory, finished[0])


@pytest.mark.nightly
@pytest.mark.slow
def test_a_moved_run_goes_on_from_the_checkpoint_before_a_damaged_one(finished, model, cache, tmp_path):
    """The directory is moved, its files come from the future, and the newest checkpoint is damaged."""
    directory = tmp_path / "elsewhere" / "run"
    shutil.copytree(finished[0], directory)
    shutil.rmtree(directory / "export")
    newest = directory / "checkpoints" / "6"
    largest = max((newest / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    for path in directory.rglob("*"):
        os.utime(path, (4e9, 4e9))
    run = Run(arguments(model, directory), tmp_path, **cache)
    status, printed = run.end()
    assert status == 0
    assert f"checkpoint {newest} cannot be read" in printed and "the one of step 4 is used" in printed
    assert "resumes after step 4" in run.out.read_text()
    assert_same_run(directory, finished[0])
    assert (directory / "checkpoints" / "6.damaged").is_dir()


@pytest.mark.nightly
@pytest.mark.slow
def test_a_finished_run_can_be_evaluated_and_started_again(finished, model, cache, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    for mode in ("eval", "train"):
        finish(arguments(model, directory, mode=mode), tmp_path, **cache)
        assert numbers(directory) == numbers(finished[0])
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (directory / "export" / name).read_bytes() == (finished[0] / "export" / name).read_bytes()


@pytest.mark.nightly
@pytest.mark.slow
def test_eight_devices_learn_what_one_learns(finished, model, tmp_path):
    fields = dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2, steps=2)
    eight = f"{QUICK_FLAGS} --xla_force_host_platform_device_count=8"
    run = Run(arguments(model, tmp_path / "run", **fields), tmp_path, XLA_FLAGS=eight)
    assert run.end()[0] == 0  # XLA may remark on how it lays things out
    found, wanted = numbers(tmp_path / "run"), numbers(finished[0])[: 2 * len(SETS) + 2]
    assert [row.keys() for row in found] == [row.keys() for row in wanted]
    for a, b in zip(found, wanted, strict=True):
        close = {k: v if isinstance(v, str) else pytest.approx(v, rel=2e-3, abs=1e-6) for k, v in b.items()}
        assert a == close


@pytest.mark.nightly
def test_evaluating_a_new_directory_measures_the_model_as_it_came(finished, model, cache, tmp_path):
    finish(arguments(model, tmp_path / "run", mode="eval"), tmp_path, **cache)
    assert numbers(tmp_path / "run") == numbers(finished[0])[: len(SETS)]


# --- a workdir that was used before --------------------------------------------------------------------


def files_of(directory):
    """Every file with its content, but for the lock."""
    return {p: p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("how", ["removed", "emptied"])
def test_a_run_whose_checkpoints_were_removed_is_not_trained_over(how, finished, run, model, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    shutil.rmtree(directory / "checkpoints")
    if how == "emptied":
        (directory / "checkpoints").mkdir()
    before = files_of(directory)
    for command in (arguments(model, directory, steps=9), [f"--workdir={directory}"]):
        status, printed = run(*command)
        assert status == 2 and is_one_sentence(printed.err) and has_only_started(printed.out)
        assert f"contains a run up to step {STEPS}, but no checkpoint to resume it from" in printed.err
        assert files_of(directory) == before and (directory / "checkpoints").exists() == (how == "emptied")


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_whose_checkpoints_were_removed_is_evaluated_by_its_export(finished, cache, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    shutil.rmtree(directory / "checkpoints")
    shutil.rmtree(directory / "evals" / f"step_{STEPS}")
    shutil.rmtree(directory / "tensorboard")  # every start makes its files again
    before = files_of(directory)
    command = [f"--workdir={directory}", "--mode=eval", "--config.trackers="]
    printed = finish(command, tmp_path, **cache)
    assert f"evaluates {directory / 'export'}, the model of step {STEPS}" in printed
    assert_same_run(directory, finished[0])
    after = files_of(directory)
    changed = {path.name for path in before if before[path] != after[path]}
    assert changed <= {"metrics.jsonl", "report.html", "report.md", "report.png"}


@pytest.mark.slow
def test_the_workdir_alone_is_evaluated_by_its_own_config_with_what_is_asked(finished, cache, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished[0], directory)
    command = [
        f"--workdir={directory}",
        "--mode=eval",
        "--config.eval.samples=1",
        f"--config.eval.sets={SETS[1]}",
    ]
    printed = finish(command, tmp_path, **cache)
    assert f"evaluates the checkpoint of step {STEPS}" in printed
    *others, asked = numbers(directory)
    assert others == numbers(finished[0])[:-1]
    assert (asked["split"], asked["step"], asked["k"]) == (f"eval/{SETS[1]}", STEPS, 1)
    assert "k 2 -> 1: pass@k is not comparable" in printed
    assert (directory / "config.json").read_bytes() == (finished[0] / "config.json").read_bytes()


def test_the_workdir_alone_is_planned_and_resumed_by_its_own_config(finished, run, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    status, printed = run(f"--workdir={tmp_path / 'run'}", "--mode=plan", "--config.eval.samples=7")
    assert status == 0 and "7 samples per item" in printed.out and "2 prompts x 32 samples" in printed.out
    status, printed = run("--workdir", tmp_path / "run", "--config.steps=5")
    assert status == 2 and "steps is 5; this run has made 6 already" in printed.err


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"steps": 6, "magic": 1}, "sets magic to 1"),
        ({"eval": {"speed": "x"}}, "sets eval.speed to 'x'"),
        ({"eval": {}}, "sets eval to {}"),
        ({"steps": "six"}, "sets steps to 'six'"),
        ({"seed": None}, "sets seed to None"),
    ],
)
def test_a_stored_config_of_another_version_is_one_sentence(fields, words, run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(fields))
    status, printed = run(f"--workdir={tmp_path}", "--mode=eval")
    assert status == 2 and is_one_sentence(printed.err)
    assert f"{tmp_path / 'config.json'} {words}, which this version does not accept" in printed.err


def as_killed_after(directory, finished, step):
    """A copy of the finished run with the checkpoints up to `step`, and no export."""
    shutil.copytree(finished[0], directory)
    shutil.rmtree(directory / "export")
    for path in list((directory / "checkpoints").iterdir()):
        if int(path.name) > step:
            shutil.rmtree(path)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_that_is_to_end_at_its_newest_checkpoint_is_evaluated_there(finished, model, cache, tmp_path):
    directory = tmp_path / "run"
    as_killed_after(directory, finished, 4)
    path = directory / "metrics.jsonl"
    lines = [line for line in path.read_text().splitlines(True) if '"step": 4, "split": "eval' not in line]
    path.write_text("".join(lines))
    printed = finish(arguments(model, directory, steps=4), tmp_path, **cache)
    wanted = [row for row in numbers(finished[0]) if row["step"] <= 4]
    assert numbers(directory) == wanted
    assert "steps after 4, up to 6, have no checkpoint and are dropped" in printed
    assert "step 0 -> step 4" in printed and (directory / "export" / "trained_steps.txt").read_text() == "4\n"


@pytest.mark.slow
def test_evaluation_and_the_models_path_may_change_on_the_way(finished, model, cache, tmp_path):
    directory = tmp_path / "run"
    as_killed_after(directory, finished, 4)
    shutil.copytree(model, tmp_path / "copy")
    changed = dict(eval__samples=3, eval__every=5)
    printed = finish(arguments(tmp_path / "copy", directory, **changed), tmp_path, **cache)
    rows, old = numbers(directory), numbers(finished[0])
    assert [row for row in rows if row["split"] == "train"] == [row for row in old if row["split"] == "train"]
    assert [row for row in rows if row["step"] <= 4] == [row for row in old if row["step"] <= 4]
    asked = [(row["step"], row["k"]) for row in rows if row["step"] > 4 and row["split"] != "train"]
    assert asked == [(5, 3), (5, 3), (6, 3), (6, 3)]
    assert "k 2 -> 3: pass@k is not comparable" in printed
    config = json.loads((directory / "config.json").read_text())
    assert config["eval"]["samples"] == 3 and config["model"]["path"] == str(tmp_path / "copy")


def write_problems(path, answers):
    tail = "-5 +9" if path.name == "train.jsonl" else "-4 +9"
    rows = [{"prompt": f"{n} +{n} *3 {tail}", "answer": answer} for n, answer in enumerate(answers, 2)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def own(model, cache, tmp_path_factory):
    """A run of one step on files of one's own, and on a copy of the model: their folder, and its fields."""
    path = tmp_path_factory.mktemp("own")
    shutil.copytree(model, path / "model")
    write_problems(path / "train.jsonl", "1234")
    write_problems(path / "test.jsonl", "567")
    fields = dict(data__train="jsonl:train.jsonl", eval__sets="jsonl:test.jsonl", checkpoint__every=1)
    finish(arguments("model", "run", steps=1, **fields), path, **cache)
    return path, fields


def with_another_template(path):
    fields = json.loads((path / "model" / "tokenizer_config.json").read_text())
    fields["chat_template"] += " "
    (path / "model" / "tokenizer_config.json").write_text(json.dumps(fields))


def with_other_weights(path):
    file = path / "model" / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def with_another_base(path):
    fields = json.loads((path / "model" / "config.json").read_text())
    (path / "model" / "config.json").write_text(json.dumps(fields | {"rms_norm_eps": 1e-3}))


CHANGES = {
    "row": (
        lambda path: write_problems(path / "train.jsonl", "12345"),
        "training problems of jsonl:train.jsonl (4 rows then, 5 now)",
    ),
    "gold": (
        lambda path: write_problems(path / "train.jsonl", "1239"),
        "training problems of jsonl:train.jsonl (4 rows then, 4 now)",
    ),
    "template": (
        with_another_template,
        "the tokenizer, chat template or stop tokens of model.path ('model')",
    ),
    "weights": (with_other_weights, "the weights of model.path ('model')"),
    "model config": (with_another_base, "config.json of model.path ('model')"),
    "evaluation gold": (
        lambda path: write_problems(path / "test.jsonl", "568"),
        "problems or gold answers of jsonl:test.jsonl in eval.sets",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_is_not_resumed_on_anything_else_than_it_began_with(name, own, run, tmp_path, monkeypatch):
    change, words = CHANGES[name]
    folder, fields = own
    shutil.copytree(folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    change(tmp_path / "here")
    before = files_of(tmp_path / "here" / "run")
    status, printed = run(*arguments("model", "run", steps=2, **fields))
    assert status == 2 and is_one_sentence(printed.err), printed.err
    assert words in printed.err and "changed since this run" in printed.err
    assert files_of(tmp_path / "here" / "run") == before


@pytest.mark.slow
def test_a_finished_run_is_evaluated_on_corrected_golds_and_the_report_says_so(own, cache, tmp_path):
    shutil.copytree(own[0], tmp_path / "here")
    write_problems(tmp_path / "here" / "test.jsonl", "568")
    write_problems(tmp_path / "here" / "train.jsonl", "12345")  # no evaluation depends on it
    printed = finish(["--workdir=run", "--mode=eval"], tmp_path / "here", **cache)
    assert "evaluates the checkpoint of step 1" in printed
    assert "not comparable: other problems or gold answers" in printed


# --- full disks --------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path, size):
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(path)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest.mark.slow
def test_a_disk_that_cannot_hold_the_checkpoints_is_named_at_the_start(model, tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        status, printed = Run(arguments(model, disk / "run"), tmp_path).end()
        assert status == 2 and is_one_sentence(printed)
        assert printed.startswith("error: no disk space for 3 checkpoints and the exported model")
        assert list(disk.iterdir()) == []


@pytest.mark.nightly
@pytest.mark.slow
def test_a_disk_that_fills_up_ends_the_run_and_room_resumes_it(finished, model, cache, tmp_path):
    with small_disk(tmp_path / "disk", "16m") as disk:
        directory, command = disk / "run", arguments(model, disk / "run")
        run = Run(command, tmp_path, **cache)
        run.wait_for(directory, 1)
        with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        status, printed = run.end()
        assert status == 2 and is_one_sentence(printed), printed
        (disk / "filler").unlink()
        finish(command, tmp_path, **cache)
        assert_same_run(directory, finished[0])


@pytest.mark.nightly
@pytest.mark.slow
def test_an_answer_in_thinking_that_the_template_opens_earns_nothing(model, cache, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"chat_template": settings["chat_template"] + "{{ '<think>\n' }}"}))
    fields = dict(steps=4, eval__sets="gym:chain", eval__samples=16)
    finish(arguments(tmp_path / "model", tmp_path / "run", **fields), tmp_path, **cache)
    problems = [*gym.load("chain", "train"), *gym.load("chain", "test")]
    gold = {problem.uid: problem.answer for problem in problems}
    for folder in ("rollouts", "evals"):
        rows = [row for path in (tmp_path / "run" / folder).rglob("*.jsonl") for row in read_lines(path)]
        drafts = [mcq.grade_gym(row["response"], gold[row["uid"]], thinking_open=False).score for row in rows]
        assert any(drafts) and not any(row["reward"] for row in rows)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_set_with_a_name_is_called_by_it_and_judged_by_its_files(model, cache, tmp_path):
    problems = gym.load("chain", "train")
    lines = [json.dumps({"prompt": p.question, "answer": p.answer}) + "\n" for p in problems[:24]]
    (tmp_path / "own").mkdir()
    for number, file in enumerate(("own/train.jsonl", "own/test.jsonl", "else.jsonl")):
        (tmp_path / file).write_text("".join(lines[8 * number : 8 * number + 8]))
    sets = f"sums=jsonl:{tmp_path}/own/test.jsonl,other=jsonl:{tmp_path}/else.jsonl"
    fields = dict(data__train=f"mine=jsonl:{tmp_path}/own", eval__sets=sets, steps=1)
    printed = finish(arguments(model, tmp_path / "run", **fields), tmp_path, **cache)
    assert "8 problems of mine" in printed and str(tmp_path / "own") not in printed
    table = (tmp_path / "run" / "report.md").read_text()
    inside, outside = table.partition("out of domain (not mine)")[::2]
    assert "\nin domain\n  sums " in inside and outside.startswith("\n  other ")
    assert sorted(p.name for p in (tmp_path / "run/evals/step_1").iterdir()) == ["other.jsonl", "sums.jsonl"]
    assert {row["split"] for row in read_lines(tmp_path / "run/metrics.jsonl")} == {
        "train",
        "eval/sums",
        "eval/other",
    }


# --- the step that validation chooses ----------------------------------------------------------------


VALIDATED = dict(
    steps=4,
    validation__sets="gym:chain",
    validation__every=1,
    eval__sets="gym:words",
    eval__every=0,
    checkpoint__every=2,
    checkpoint__keep=1,
)


@pytest.fixture(scope="module")
def validated(model, cache, tmp_path_factory):
    """The directory of a run that validates after every step."""
    path = tmp_path_factory.mktemp("validated")
    finish(arguments(model, path / "run", **VALIDATED), path, **cache)
    return path / "run"


@pytest.mark.slow
def test_the_best_step_is_kept_scored_and_exported(validated):
    whole = validated
    rows = read_lines(whole / "metrics.jsonl")
    scores = {row["step"]: row["avg"] for row in rows if row["split"] == "validation/gym:chain"}
    assert list(scores) == list(range(5))
    best = max(scores, key=lambda step: (scores[step], -step))
    kept = {int(path.name) for path in (whole / "checkpoints").iterdir()}
    scored = {row["step"] for row in rows if row["split"] == "eval/gym:words"}
    assert scored == {0, best, 4} and kept == {best, 4} - {0}
    assert (whole / "export_best").exists() == (best not in (0, 4))
    if best not in (0, 4):
        assert (whole / "export_best" / "trained_steps.txt").read_text() == f"{best}\n"


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_that_was_cut_off_keeps_and_exports_the_same_best_step(validated, model, cache, tmp_path):
    directory = tmp_path / "run"
    command = arguments(model, directory, **VALIDATED)
    run = Run(command, tmp_path, **cache)
    run.wait_for(directory, 3)
    run.signal(signal.SIGKILL)
    run.end()
    finish(command, tmp_path, **cache)
    assert sorted(map(str, numbers(directory))) == sorted(map(str, numbers(validated)))
    for path in validated.glob("export*/model.safetensors"):
        assert (directory / path.relative_to(validated)).read_bytes() == path.read_bytes()


# --- mistakes ----------------------------------------------------------------------------------------


def is_one_sentence(printed):
    return printed.startswith("error: ") and printed.count("\n") == 1 and printed.endswith("\n")


def has_only_started(printed):
    """Whether a run printed nothing, or the line that comes before model and data are read."""
    return re.fullmatch(r"(\w+: reads the model and the data\n)?", printed) is not None


def load_run():
    """The command as a module with flags of its own, so that one process can start it many times."""
    for name in list(flags.FLAGS):
        if name in OWN_FLAGS or name.startswith("config."):
            delattr(flags.FLAGS, name)
    spec = importlib.util.spec_from_file_location("run_once", ROOT / "rosd_jax" / "cli.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """Calls the command in this process: its exit status, and what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        status = load_run().main(["run.py", *map(str, arguments)])
        return status, capfd.readouterr()

    return call


FLAG_MISTAKES = {
    "no config": ([], "--config is missing"),
    "no run": (["--workdir=none", "--config.eval.samples=1"], "there is no run in none; to start one"),
    "no such config": (["--config=configs/none.py"], "--config names 'configs/none.py', which is no file"),
    "no labels": ([QUICKSTART, "--mode=localize"], "--mode=localize needs --labels=FILE"),
    "labels of no use": ([QUICKSTART, "--labels=x"], "--labels is for --mode=localize"),
    "a trace of no use": ([QUICKSTART, "--mode=eval", "--profile"], "--profile is for --mode=train"),
    "a field as a flag": (
        [QUICKSTART, "--trackers=tensorboard"],
        "--trackers is not a flag; fields of the config are given as --config.trackers=VALUE",
    ),
    "unknown flag": ([QUICKSTART, "--workdri=x"], "Unknown command line flag 'workdri'"),
    "no flag": ([QUICKSTART, "train"], "'train' is not a flag"),
    "unknown mode": ([QUICKSTART, "--mode=dance"], "<train|eval|localize|plan|data|report>"),
    "unknown variant": (
        [f"{QUICKSTART},turbo"],
        "'turbo'; it must be one of paper, span, official, sdpo, grpo,",
    ),
    "method without its fields": ([QUICKSTART, "--config.method=grpo"], "choose a method by its preset"),
    "unknown field": (
        [QUICKSTART, "--config.loss.alhpa=1"],
        "the config has no field 'loss.alhpa'; docs/fields.md lists the fields; similar names: loss.alpha",
    ),
    "field without its section": ([QUICKSTART, "--config.lr=1"], "similar names: optimizer.lr"),
    "field of a field": ([QUICKSTART, "--config.steps.x=1"], "no field 'steps.x'"),
    "item of a field": ([QUICKSTART, "--config.steps[0]=1"], "no field 'steps[0]'"),
    "section": (
        [QUICKSTART, "--config.optimizer={'lr': 1}"],
        "optimizer is a section; set one of its fields",
    ),
    "wrong type": ([QUICKSTART, "--config.steps=many"], "steps is 'many'; it must be of type int"),
    "no whole number": ([QUICKSTART, "--config.steps=1.5"], "steps is '1.5'; it must be of type int"),
    "tuple for an int": ([QUICKSTART, "--config.steps=(1,2)"], "steps is '(1,2)'; it must be of type int"),
    "no number": (
        [QUICKSTART, "--config.optimizer.lr", "abc"],
        "optimizer.lr is 'abc'; it must be of type float",
    ),
    "null": (
        [QUICKSTART, "--config.rollout.slots=null"],
        "rollout.slots is 'null'; it must be of type int, null (null is None, which only a config file can",
    ),
    "open list": (
        [QUICKSTART, "--config.rollout.stop=('a', 'b'"],
        """rollout.stop is "('a', 'b'"; it must be a list of strings, as a flag a,b or ('a, b', 'c')""",
    ),
    "no strings": (
        [QUICKSTART, "--config.rollout.stop=(1, 2)"],
        "rollout.stop is (1, 2); it must contain only",
    ),
    "two configs": ([QUICKSTART, QUICKSTART, "--config.steps=1"], "--config is given more than once"),
    "no flag file": ([QUICKSTART, "--flagfile=none"], "Unable to open flagfile"),
    "empty workdir": ([QUICKSTART, "--workdir="], "--workdir is empty; give it a directory"),
    "home directory": ([QUICKSTART, "--workdir=~/run"], "--workdir is '~/run', where ~ would be a directory"),
    "long name": ([QUICKSTART, "--workdir=a/b/" + "x" * 256], "each name in it of at most 255"),
    "long path": ([QUICKSTART, "--workdir=" + "x/" * 2048], "it must be a path of at most 3584 bytes"),
    "long name of an experiment": ([QUICKSTART, "--config.name=" + "x" * 256], "--workdir is 'runs/xxx"),
    "long workdir of a run": (["--workdir=" + "x" * 256], "each name in it of at most 255"),
    "huge number": ([QUICKSTART, "--config.optimizer.lr=1e400"], "optimizer.lr is inf; it must be above 0"),
    "wrong value": ([QUICKSTART, "--config.loss.alpha=2"], "loss.alpha is 2.0; it must lie in [0, 1]"),
    "not a number": ([QUICKSTART, "--config.optimizer.lr=nan"], "optimizer.lr is nan"),
    "wrong choice": ([QUICKSTART, "--config.lesson.region=word"], "one of span, suffix, full"),
    "no rows": (
        [QUICKSTART, "--config.batch.device_rows=0"],
        "batch.device_rows is 0; it must be at",
    ),
    "one sample": ([QUICKSTART, "--config.batch.samples=1"], "batch.samples is 1"),
    "no model": ([QUICKSTART, "--config.model.path="], "pass --config.model.path=DIR"),
    "missing model": ([QUICKSTART, "--config.model.path=/no/such"], "'/no/such', which is not a directory"),
}


@pytest.mark.parametrize("name", FLAG_MISTAKES)
def test_a_mistake_on_the_command_line_is_one_sentence(name, run, tmp_path):
    given, words = FLAG_MISTAKES[name]
    status, printed = run(*given)
    assert status == 2 and is_one_sentence(printed.err) and words in printed.err
    assert has_only_started(printed.out) and list(tmp_path.iterdir()) == []


def in_get_config(line):
    head = "from rosd_jax.config import default_config\ndef get_config():\n    c = default_config()\n"
    return f"{head}    {line}\n"


CONFIG_FILES = {
    "no Python": ("def get_config(:\n", "mine.py line 1 raises SyntaxError: invalid syntax; correct it"),
    "null byte": ("x = 1\0\n", "SyntaxError: source code string cannot contain null bytes"),
    "unknown name": (in_get_config("return d"), "mine.py line 4 raises NameError: name 'd' is not defined"),
    "no module": ("import nope\n", "line 1 raises ModuleNotFoundError: No module named 'nope'"),
    "no key": (in_get_config("{}['a']"), "line 4 raises KeyError: 'a'"),
    "no section": (
        in_get_config("c.optimzer.lr = 1"),
        "AttributeError: 'optimzer' Did you mean \"optimizer\"",
    ),
    "no number": (in_get_config("int('x')"), "line 4 raises ValueError: invalid literal for int()"),
    "no text": (in_get_config("b'\\xff'.decode()"), "line 4 raises UnicodeDecodeError: 'utf-8' codec"),
    "no file": (in_get_config("open('none')"), "line 4 raises FileNotFoundError: [Errno 2] No such file"),
    "no file at the top": ("open('none')\n", "mine.py line 1 raises FileNotFoundError"),
    "wrong type": (
        in_get_config("c.steps = 'many'"),
        "line 4 raises TypeError: Could not override field 'steps'",
    ),
    "huge number": (in_get_config("c.optimizer.lr = 10**400"), "OverflowError: int too large"),
    "failed check": (in_get_config("assert c.steps == 1"), "line 4 raises AssertionError; correct it"),
    "exit": ("raise SystemExit('no')\n", "line 1 raises SystemExit: no"),
    "several lines": ("raise ValueError('one\\ntwo')\n", "ValueError: one two; correct it"),
    "nothing returned": (
        in_get_config("pass"),
        "mine.py: get_config returns None; it must return a ConfigDict",
    ),
    "something else": ("def get_config():\n    return [1]\n", "get_config returns [1]; it must return a Con"),
    "no get_config": ("x = 1\n", "has no get_config; pass a Python file with a get_config"),
    "no variants": (in_get_config("return c"), "takes 0 positional arguments but 1 was given"),
    "huge int": (
        in_get_config("c.steps = 10**5000; return c"),
        "steps is a whole number of 16610 bits; it must",
    ),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_mistake_in_a_config_file_is_one_sentence_with_its_line(name, run, tmp_path):
    text, words = CONFIG_FILES[name]
    (tmp_path / "mine.py").write_text(text)
    status, printed = run("--config=mine.py:x" if name == "no variants" else "--config=mine.py")
    assert status == 2 and is_one_sentence(printed.err) and words in printed.err
    assert printed.out == "" and {path.name for path in tmp_path.iterdir()} <= {"mine.py", "__pycache__"}


@pytest.mark.parametrize(
    "given, strings",
    [
        (["a,b"], ("a", "b")),
        (["a, b"], ("a", " b")),
        (["('a, b', 'c')"], ("a, b", "c")),
        (["'a,b'"], ("a,b",)),
        (["[END],[STOP]"], ("[END]", "[STOP]")),
        (["###"], ("###",)),
        (["("], ("(",)),
        (["7"], ("7",)),
        ([""], ()),
        (["a,b", "c"], ("a", "b", "c")),
    ],
)
def test_a_list_of_strings_is_given_with_commas_or_as_python(given, strings):
    flags = [f"--config.rollout.stop={text}" for text in given]
    config = load_run().read_flags(["run.py", QUICKSTART, *flags])
    assert validate(config).rollout.stop == strings


FIELD_MISTAKES = {
    "unknown set": (dict(data__train="gym:maze"), "the gym has chain, long, words"),
    "unknown source": (dict(eval__sets="biologie"), "'biologie' is not a known set"),
    "no such file": (dict(data__train="jsonl:none.jsonl"), "'jsonl:none.jsonl' names no file"),
    "a known name": (dict(data__train="gsm8k=jsonl:x"), "names a set 'gsm8k'; a name must"),
    "one name for two sets": (
        dict(eval__sets="a=jsonl:models/x.jsonl,a=jsonl:models/y.jsonl"),
        "name two sets 'a', 'a=jsonl:models/x.jsonl' and 'a=jsonl:models/y.jsonl'",
    ),
    "no data dir": (dict(data__train="biology"), "data.dir is ''"),
    "long prompts": (dict(data__max_prompt_tokens=4), "all of the 2048 prompts are longer"),
    "too few problems": (dict(batch__prompts=4096), "batch.prompts is 4096; it must be at most 2048"),
    "too long answers": (dict(rollout__max_new_tokens=512), "the model has 256 positions"),
    "small prompt room": (dict(rollout__prompt_tokens=100), "may have reflect.max_prompt_tokens = 128, so"),
    "unknown attention": (
        dict(rollout__attention="cudnn"),
        "'cudnn'; it must be one of null, xla, ragged_tpu",
    ),
    "small cache": (dict(rollout__cache_tokens=16), "cache_tokens is 16; a response of 16 tokens needs 32"),
    "no slot": (dict(rollout__slots=0), "rollout.slots is 0; it must be at least 1"),
    "long file name": (dict(data__train="jsonl:" + "x" * 256), "each name in it of at most 255"),
    "no such home": (dict(data__train="jsonl:~no-such-user/x"), "'jsonl:~no-such-user/x' names no file"),
    "too many responses": (dict(eval__samples=2**31 - 1), "lower it or eval.limit"),
    "too large a step": (
        dict(batch__samples=2**26),
        "x rollout.max_new_tokens is 2147483648; it must be below",
    ),
    "too large a microbatch": (
        dict(batch__device_rows=2**31 - 1),
        "batch.device_rows x the longest sequence is",
    ),
    "too large an evaluation": (
        dict(eval__batch=2**28),
        "eval.batch x eval.max_new_tokens is 4294967296; it",
    ),
    "nothing to evaluate": (
        dict(mode="eval", eval__sets=""),
        "eval.sets is empty, so --mode=eval has nothing",
    ),
    "attention for TPU": (
        dict(rollout__attention="ragged_tpu"),
        "rollout.attention is 'ragged_tpu', a kernel for tpu, and the devices are cpu; leave the field out",
    ),
    "attention for GPU": (dict(rollout__attention="pallas_gpu"), "a kernel for gpu, and the devices are cpu"),
}


@pytest.mark.parametrize("name", FIELD_MISTAKES)
def test_a_mistake_in_a_field_is_one_sentence(name, run, model, tmp_path):
    fields, words = FIELD_MISTAKES[name]
    status, printed = run(*arguments(model, tmp_path / "run", **fields))
    assert status == 2 and is_one_sentence(printed.err) and words in printed.err
    assert has_only_started(printed.out) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("directory", ["~no-such-user/x", "/dev/null"])
def test_a_compile_cache_that_cannot_be_made_is_named(directory):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        with pytest.raises(UserError, match=f"compile_cache is '{directory}', which cannot be made"):
            keep_programs(directory)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_data_row_without_an_answer_is_named_by_file_line_and_field(run, model, tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "12 +7", "answer": "2"}\n\n{"prompt": "12 +8"}\n')
    status, printed = run(*arguments(model, tmp_path / "run", data__train=f"jsonl:{path}"))
    assert status == 2 and is_one_sentence(printed.err)
    assert f"{path} line 3: field 'answer' is missing" in printed.err
    assert list(tmp_path.iterdir()) == [path]


def without_tokenizer(model):
    for path in model.glob("tokenizer*"):
        path.unlink()


def with_fewer_rows(model):
    fields = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(fields | {"vocab_size": 64}))


def without_weights(model):
    (model / "model.safetensors").unlink()


def with_torn_weights(model):
    os.truncate(model / "model.safetensors", 1000)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_tokenizer, "holds no tokenizer"),
        (with_fewer_rows, "whose vocabulary is too small for its tokenizer"),
        (without_weights, "contains no model.safetensors"),
        (with_torn_weights, "is not a safetensors file"),
    ],
)
def test_a_model_that_does_not_fit_is_one_sentence(spoil, words, run, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    spoil(tmp_path / "model")
    status, printed = run(*arguments(tmp_path / "model", tmp_path / "run"))
    assert status == 2 and is_one_sentence(printed.err) and words in printed.err
    assert not (tmp_path / "run").exists()


def test_a_mesh_that_does_not_fit_leaves_no_directory(run, model, tmp_path):
    status, printed = run(*arguments(model, tmp_path / "new" / "run", mesh__data=3))
    assert status == 2 and is_one_sentence(printed.err) and "mesh.data=3" in printed.err
    assert list(tmp_path.iterdir()) == []


def test_the_workdir_of_another_config_is_left_alone(run, model, tmp_path):
    config = default_config()
    config.batch.samples = 4
    workdir.prepare(tmp_path / "run", validate(config))
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    status, printed = run(*arguments(model, tmp_path / "run"))
    assert (
        status == 2 and is_one_sentence(printed.err) and "contains a run with another config" in printed.err
    )
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_a_workdir_in_use_is_named_with_its_process(run, model, tmp_path):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); f.write('77\\n'); "
    hold += "f.flush(); print(flush=True); sys.stdin.read()"
    (tmp_path / "run").mkdir()
    command = [sys.executable, "-c", hold, str(tmp_path / "run" / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        status, printed = run(*arguments(model, tmp_path / "run"))
        other.stdin.close()
    assert status == 2 and is_one_sentence(printed.err)
    assert "is in use by another run (process 77)" in printed.err


@pytest.mark.parametrize("mistake", [pytest.param("--config.optimizer.lr=-1"), "--config.nope=1"])
def test_a_mistake_ends_the_process_with_status_2(mistake, tmp_path):
    status, printed = Run([QUICKSTART, mistake], tmp_path).end()
    assert status == 2 and is_one_sentence(printed)


def test_fewer_steps_than_were_made_are_refused(finished, run, model, tmp_path):
    shutil.copytree(finished[0], tmp_path / "run")
    for checkpoint in (6, 4):  # the second time by the export alone, which would be lost
        assert (tmp_path / "run" / "checkpoints" / str(checkpoint)).exists()
        before = files_of(tmp_path / "run")
        status, printed = run(*arguments(model, tmp_path / "run", steps=STEPS - 2))
        assert status == 2 and is_one_sentence(printed.err)
        assert f"steps is {STEPS - 2}; this run has made {STEPS} already" in printed.err
        assert files_of(tmp_path / "run") == before
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "6", ignore_errors=True)


def test_a_plan_is_printed_and_nothing_is_written(run, model, tmp_path):
    status, printed = run(*arguments(model, tmp_path / "run", mode="plan"))
    assert status == 0 and printed.err == "" and list(tmp_path.iterdir()) == []
    assert "2 prompts x 32 samples = 64 rollouts of up to 16 tokens" in printed.out
    assert "gym:chain 8, gym:words 8; 2 samples per item" in printed.out


def test_a_plan_without_weights_says_so_and_prints_the_rest(run, model, tmp_path):
    shutil.copytree(model, tmp_path / "model")
    without_weights(tmp_path / "model")
    status, printed = run(*arguments(tmp_path / "model", tmp_path / "run", mode="plan"))
    assert status == 0 and not (tmp_path / "run").exists()
    (line,) = [line for line in printed.out.splitlines() if line.startswith("weights ")]
    assert "not needed for a plan" in line and "cannot be loaded" not in line
    assert "64 rollouts of up to 16 tokens" in printed.out


def test_prompts_that_are_too_long_are_counted_and_named(run, model, tmp_path):
    path = tmp_path / "mine.jsonl"
    long = "12" + " +7" * 40
    rows = [{"prompt": text, "answer": "2"} for text in ("1 +1", "2 +2", long, "3 +3")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = dict(data__train=f"jsonl:{path}", data__max_prompt_tokens=40)
    status, printed = run(*arguments(model, tmp_path / "run", mode="plan", **fields))
    assert status == 0 and "left out    1 prompts" in printed.out
