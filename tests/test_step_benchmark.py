"""The update's benchmarks: planned FLOPs, rows, contestants that agree, and the GPU's script."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import step, step_gpu, step_peers
from benchmarks.step_flops import QWEN3, Flops, forward, heads, ideal, waste
from benchmarks.step_loss import plain_loss
from benchmarks.step_rows import PRESETS, Sizes, draw, lesson, needs, padded
from rosd_jax.kernels.topk_jsd import topk_jsd_loss
from rosd_jax.models.qwen3 import Qwen3Config, param_shapes
from rosd_jax.train import microbatches

TINY = step.Contest(
    Qwen3Config(512, 64, 96, 2, 4, 2, 16, tie_word_embeddings=True),
    Sizes().scaled(1 / 64, prompts=4),
    k=20,
    slots=8,
)


@pytest.mark.parametrize("preset", ["span", "paper"])
@pytest.mark.parametrize(("devices", "goal"), [(8, 1.55), (16, 2.0)])
def test_the_planned_flops_are_near_the_ideal(preset, devices, goal):
    plain, remat, count = waste(QWEN3["8b"], preset, devices, draws=4)
    assert 1 < plain <= goal and 1 < remat <= goal
    assert count >= 256 * 0.3 / devices


def test_flops_are_those_of_the_matrices_and_of_causal_attention():
    model = Qwen3Config(96, 32, 48, 3, 4, 2, 16)
    shapes = param_shapes(model)
    weights = sum(x.size for x in jax.tree.leaves(shapes["blocks"]) if x.ndim > 2)
    scores = np.tril(np.ones((64, 64))).sum()
    products = 2 * weights * 64 + 2 * 2 * 3 * 4 * 16 * scores
    assert forward(model, 64) == pytest.approx(products, rel=0.01)
    assert heads(model, 5) == 4 * 2 * 5 * 32 * 96
    assert Flops(10, 7, 4).total(remat=False, lora=True) == 30
    assert Flops(10, 7, 3).total(remat=False) == 40 and Flops(10, 7, 3).total(remat=True) == 50


def test_the_ideal_reads_what_the_update_must_read():
    lengths = draw(Sizes().scaled(1 / 32, prompts=8), "span", seed=3)
    given = lesson(lengths, 100)
    needed = microbatches.needs(given, microbatches.cuts(given.weight_BR))
    for ours, planned in zip(needs(lengths), needed, strict=True):
        np.testing.assert_array_equal(ours, planned[planned > 0])
    found, model = ideal(TINY.model, lengths), TINY.model
    assert found.heads == heads(model, given.weight_BR.sum())
    assert found.student == sum(float(forward(model, n)) for n in needed[0])


def test_rows_are_those_of_a_real_step():
    every = {preset: [draw(Sizes(), preset, seed) for seed in range(20)] for preset in PRESETS}
    for preset, steps in every.items():
        for rows in steps:
            assert len(rows.prompt_B) == 256 and rows.response_B.max() <= 8192
            assert (rows.last_B <= rows.response_B).all() and (rows.first_B <= rows.last_B).all()
            assert (rows.teacher_prompt_B > rows.prompt_B).all()
            assert (rows.prompt_B.reshape(32, 8) == rows.prompt_B[::8, None]).all()
        taught = np.mean([(rows.active_B > 0).mean() for rows in steps])
        assert taught == pytest.approx(0.3 if preset == "errors" else 0.6, abs=0.06)
    lengths = np.concatenate([rows.response_B for rows in every["span"]])
    assert lengths.mean() == pytest.approx(1450, rel=0.08)
    active = {preset: sum(rows.active_B.sum() for rows in steps) for preset, steps in every.items()}
    assert active["errors"] < 0.1 * active["span"] and 1.2 * active["span"] < active["paper"]


def test_a_sample_of_the_rows_has_the_longest_and_the_shortest():
    everything, some = (step.taught_rows(step.CONTEST, "span", rows) for rows in (0, 24))
    assert len(everything.prompt_B) % 4 == 0 and len(some.prompt_B) == 24
    assert some.response_B[0] == everything.response_B.max()
    assert some.response_B.mean() == pytest.approx(everything.response_B.mean(), rel=0.15)
    with pytest.raises(ValueError, match="10000 were asked for"):
        step.taught_rows(step.CONTEST, "span", 10000)


def test_the_loss_of_peers_is_ours():
    rng = np.random.default_rng(0)
    student_ND, teacher_ND = rng.normal(0, 1.5, (2, 12, 8)).astype(np.float32)
    head_VD, other_VD = rng.normal(size=(2, 50, 8)).astype(np.float32)
    tokens_N, logp_N = rng.integers(0, 50, 12), rng.normal(-4, 1, 12).astype(np.float32)
    weight_N = (rng.random(12) < 0.7).astype(np.float32) / 9

    def theirs(student_ND):
        logits = student_ND @ head_VD.T, teacher_ND @ other_VD.T
        return plain_loss(*logits, tokens_N, logp_N, weight_N, 7, 2.0)

    def ours(student_ND):
        given = map(jnp.asarray, (head_VD, teacher_ND, other_VD, weight_N))
        rows = {"tokens_N": jnp.asarray(tokens_N), "sampler_logp_N": jnp.asarray(logp_N)}
        return topk_jsd_loss(student_ND, *given, k=7, ratio_cap=2.0, **rows)[0]

    found, wanted = (jax.value_and_grad(loss)(jnp.asarray(student_ND)) for loss in (theirs, ours))
    assert float(found[0]) > 0.01
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    np.testing.assert_allclose(found[1], wanted[1], rtol=1e-3, atol=1e-6)


def test_padded_sequences_hold_each_row_once():
    lengths = draw(Sizes().scaled(1 / 64, prompts=2), "span", seed=0)
    rows = padded(lengths, 100)
    for who, prompt in (("", "prompt_BP"), ("teacher_", "teacher_prompt_BQ")):
        right, length_B = step_peers.sequences(rows, who, left=False)
        left, mask_BT = step_peers.sequences(rows, who, left=True)
        for row, n in enumerate(rows["response_len_B"]):
            whole = np.append(rows[prompt][row, : length_B[row]], rows["response_BR"][row, :n])
            np.testing.assert_array_equal(right[row, : len(whole)], whole)
            assert not right[row, len(whole) :].any()
            np.testing.assert_array_equal(left[row, mask_BT[row]], whole)
            start = left.shape[1] - rows["response_BR"].shape[1]
            np.testing.assert_array_equal(left[row, start : start + n], rows["response_BR"][row, :n])


@pytest.mark.nightly
@pytest.mark.slow
def test_ours_and_plain_flax_have_the_same_losses_update_after_update(tmp_path):
    told = [f"--out={tmp_path}", "--cases=update", "--contestants=ours,plain", "--rounds=2", "--rows=8"]
    step.main(told, TINY)
    found = json.loads((tmp_path / "step.json").read_text())["update"]
    ours, plain = (found["results"][name] for name in ("ours", "plain"))
    assert len(ours["losses"]) == 3 and len(ours["s"]) == 2 and ours["peak_bytes"] > 1e8
    np.testing.assert_allclose(ours["losses"], plain["losses"], rtol=1e-4)
    assert ours["losses"][0] > 1.01 * ours["losses"][2]  # it learns
    assert "| plain |" in (tmp_path / "step.md").read_text()


def test_a_contestant_with_another_loss_is_refused():
    class Other:
        def __init__(self, loss):
            self.loss = loss

        def ask(self, task):
            return {"loss": self.loss, "cpu_s": 0.0, "peak_bytes": 1}

    with pytest.raises(ValueError, match="b: its first loss is 0.11 instead of 0.1"):
        step.measure({"a": Other(0.1), "b": Other(0.11)}, rounds=1)


@pytest.mark.nightly
@pytest.mark.slow
def test_stages_of_a_whole_step_are_measured(tmp_path):
    small = replace(TINY, sizes=Sizes().scaled(1 / 64, prompts=2))
    step.main([f"--out={tmp_path}", "--cases=stages", "--rounds=1"], small)
    found = json.loads((tmp_path / "step.json").read_text())["stages"]
    stages = found["stages"]
    assert list(stages) == ["rollouts", "reflections", "update"]
    assert sum(stage["share"] for stage in stages.values()) == pytest.approx(1)
    assert stages["rollouts"]["tokens"] == draw(small.sizes, "span", 0).response_B.sum()
    assert 0 < stages["rollouts"]["roofline"] and 0 < stages["update"]["mfu_of_measured"]
    assert stages["update"]["first_s"] > stages["update"]["s"]


def test_the_gpu_script_measures_attention_and_an_update():
    found = step_gpu.attention(tiny=True)
    for name in ("xla", "reference"):
        assert max(found[name]["error"].values()) < 0.01 and found[name]["forward_backward_ms"]["n"] == 10
    found = step_gpu.update(step_gpu.TINY, lora=True, tiny=True, rows=1, rounds=1)
    assert found["positions"] == 96 and found["s"]["n"] == 1 and found["mfu_of_measured"] > 0
    text = step_gpu.render({"date": "", "versions": {}, "parts": {"update-0.6b": found | {"wall_s": 1.0}}})
    assert "| positions | 96 |" in text


def test_a_part_that_fails_is_a_record(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "nowhere")
    step_gpu.main([f"--out={tmp_path}", "--tiny", "--parts=attention"])
    found = json.loads((tmp_path / "step_gpu.json").read_text())["parts"]["attention"]
    assert "nowhere" in found["outcome"] and found["wall_s"] > 0
    assert "## attention" in (tmp_path / "step_gpu.md").read_text()
