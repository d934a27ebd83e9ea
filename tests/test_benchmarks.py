"""The loss kernel's benchmarks: contestants agree in value, and the files they promise come out."""

import importlib.util
import json
import os
import subprocess
import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import topk_jsd, topk_jsd_cpu
from benchmarks.timing import interleaved
from benchmarks.topk_jsd_contestants import Case, first_rows, jax_contestant, jax_inputs, span_weights
from benchmarks.topk_jsd_report import render
from support import ROOT, nightly_but

CASE = Case(width=16, tokens=64, vocab=512, k=10, chunk=16, dtype="float32")
needs_torch = pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="PyTorch is not installed")


@cache
def compiled(name):
    return jax.jit(jax_contestant(name, CASE))


def ours(weights):
    return compiled("ours-xla")(*jax_inputs(CASE), jnp.asarray(weights))


@pytest.mark.parametrize("share", nightly_but([1.0, 0.3], keep=[1]))
@pytest.mark.parametrize("name", ["ours@32", "checkpoint", "naive"])
def test_contestants_in_jax_agree(name, share):
    weights = span_weights(CASE, share)
    other = compiled(name)(*jax_inputs(CASE), jnp.asarray(weights))
    assert float(other[0]) > 1e-4
    for got, want in zip(other, ours(weights), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-7)


@needs_torch
def test_official_loss_in_torch_agrees():
    from benchmarks import topk_jsd_torch

    inputs, weights = topk_jsd_torch.torch_inputs(CASE, "cpu"), span_weights(CASE, 0.3)
    for ours_in, theirs in zip(jax_inputs(CASE), inputs, strict=True):
        np.testing.assert_array_equal(ours_in, theirs.detach())
    run = topk_jsd_torch.torch_contestant("torch-eager", CASE)
    result = run(*inputs, topk_jsd_torch.torch.from_numpy(weights))
    for got, want in zip(result, ours(weights), strict=True):
        np.testing.assert_allclose(got.numpy(), want, rtol=2e-4, atol=2e-7)


def test_weights_average_over_live_rows():
    case = Case(16, 1024, 512, 10, 16)
    for share in (1.0, 0.3, 0.1):
        weights = span_weights(case, share)
        assert weights.sum() == pytest.approx(1)
        assert (weights != 0).mean() == pytest.approx(share, abs=0.01)
        assert np.count_nonzero(np.diff(weights != 0)) < 12  # four spans, not scattered rows
    assert np.flatnonzero(first_rows(case, 5)).tolist() == [0, 1, 2, 3, 4]


def test_inputs_are_as_certain_as_a_language_model():
    case = Case(64, 256, 8192, 10, 16, "float32")
    hidden, head, teacher_hidden, teacher_head = jax_inputs(case)
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    largest = jax.nn.softmax(student).max(axis=1)
    assert np.mean(largest > 0.9) > 0.3
    assert np.mean(largest < 0.5) > 0.1
    assert 0.05 < float((student - teacher).std()) < 0.5


def test_turns_alternate_and_a_failure_stops_only_itself():
    log = []

    def fail():
        raise MemoryError("out of memory")

    calls = {"a": lambda: log.append("a"), "b": lambda: log.append("b"), "bad": fail}
    times, errors = interleaved(calls, warmups=1, reps=2)
    assert "".join(log) == "ab" + "ab" + "ba"
    assert (len(times["a"]), len(times["b"]), times["bad"]) == (2, 2, [])
    assert str(errors["bad"]) == "out of memory"


def test_cpu_script_writes_its_table(tmp_path):
    results = topk_jsd_cpu.measure(CASE, reps=1)
    assert set(results["ms"]) >= {"ours-xla 100%", "ours-xla@4 30%", "checkpoint 100%", "naive 100%"}
    losses = [program["loss"] for name, program in results["programs"].items() if name != "matmuls"]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)
    assert all(program["temporary"] > 0 for program in results["programs"].values())
    text = topk_jsd_cpu.render(
        json.loads(json.dumps({"date": "", "command": "", "environment": {}} | results))
    )
    assert "| ours-xla@4 30% |" in text and "30% mask against all rows: " in text


@pytest.mark.nightly
def test_gpu_script_runs_and_reports_what_failed(tmp_path):
    command = [
        "-m",
        "benchmarks.topk_jsd",
        f"--out={tmp_path}",
        "--tiny",
        "--quick",
        "--sizes=16x64",
        "--masks=1",
    ]
    command += ["--only=time", "--contestants=matmuls,ours@32,ours-pallas_gpu"]
    env = os.environ | {"XLA_FLAGS": ""}
    subprocess.run([sys.executable, *command], cwd=ROOT, env=env, check=True, capture_output=True)
    results = json.loads((tmp_path / "topk_jsd.json").read_text())
    records = results["records"]
    assert results["environment"]["jax"]["platform"] == "cpu"
    assert {record["name"] for record in records if "ms" in record} == {"matmuls", "ours@32"}
    (checked,) = [record["values"] for record in records if "values" in record]
    assert checked["loss_error"] < 1e-3 and checked["hidden_error"] < 0.01 and checked["head_error"] < 0.01
    (failure,) = [record for record in records if "outcome" in record]
    assert failure["name"] == "ours-pallas_gpu" and "CUDA" in failure["error"]
    assert (tmp_path / "topk_jsd.md").read_text() == render(results)


def test_a_contestant_that_ends_its_process_is_left_out_of_the_next(monkeypatch):
    started = []

    def work(session, case, spec, record):
        started.append(spec["names"])
        if "naive" in spec["names"]:
            record(name="naive", outcome="the process ended with -6")
            return True
        return False

    monkeypatch.setattr(topk_jsd, "work", work)
    args = topk_jsd.parse(["--out=x", "--tiny", "--quick", "--contestants=ours,naive,matmuls"])
    topk_jsd.measure_times(None, CASE, args, lambda **what: None)
    assert started[:2] == [["ours", "naive", "matmuls"], ["ours", "matmuls"]]


def test_unknown_contestant_is_refused(capsys):
    with pytest.raises(SystemExit):
        topk_jsd.parse(["--out=x", "--contestants=theirs"])
    assert "no contestant 'theirs'" in capsys.readouterr().err
