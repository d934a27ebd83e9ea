"""The policy gradient: weights, loss and gradient by hand, and equal for any micro-batches and any mesh."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from test_reflect import graded_rows
from test_run import QUICKSTART, arguments, assert_same_run, finish, model, numbers, read_lines  # noqa: F401
from test_update import (
    CAP,
    MODEL,
    TEMPERATURE,
    B,
    P,
    R,
    assert_near,
    assert_same_update,
    gradient,
    make_lesson,
    prepared,
    step,
    trees,
    uncut_loss,
)

from rosd_jax.config import OTHERS, default_config, use_preset, validate
from rosd_jax.distill import policy
from rosd_jax.distill.notes import NOTES
from rosd_jax.models import qwen3
from rosd_jax.models.sharding import make_mesh
from rosd_jax.train.microbatches import MicroBatch, plan_microbatches
from rosd_jax.train.token_logp import Options, token_logp
from rosd_jax.train.update import loss_sharding, policy_gradient_loss
from rosd_jax.types import Reflected, Reflection
from support import nightly_but

# --- weights, by hand --------------------------------------------------------------------------------

# Two prompts with three rollouts each. A rollout has a token for each letter, and a stop token.
TEXTS, REWARDS, LONGEST = ["a", "bcd", "ef", "", "g", "hij"], [1, 0, 0, 1, 1, 1], 4
LENGTHS = [2, 4, 3, 1, 2, 4]  # 16 in all
STD = np.sqrt((4 / 9 + 1 / 9 + 1 / 9) / 2)  # of the rewards 1, 0, 0
MEAN_ADVANTAGES = [2 / 3, -1 / 3, -1 / 3, 0, 0, 0]
STD_ADVANTAGES = [x / (STD + 1e-6) for x in MEAN_ADVANTAGES]
BY_HAND = {  # advantages, and what each token of a rollout is divided by
    "grpo": (STD_ADVANTAGES, [6 * n for n in LENGTHS]),
    "dr_grpo": (MEAN_ADVANTAGES, [6 * LONGEST] * 6),
    "dapo_loss": (STD_ADVANTAGES, [16] * 6),
    "grpo_strong": (MEAN_ADVANTAGES, [16] * 6),
    "rosd_grpo": (MEAN_ADVANTAGES, [16] * 6),
}


def settings_of(method, **fields):
    config = use_preset(default_config(), method)
    config.loss.update(ratio_cap=CAP, chunk=4)
    config.rollout.temperature = TEMPERATURE
    config.policy.update(fields)
    return validate(config)


def weights(config, weight_BR=None):
    graded = graded_rows(TEXTS, REWARDS, samples=3)
    assert graded.rollout.length_B.tolist() == LENGTHS
    weight_BR = np.zeros((6, LONGEST), np.float32) if weight_BR is None else weight_BR
    advantage_B = policy.advantages(graded, config.policy)
    return policy.policy_weights(advantage_B, graded.rollout.length_B, weight_BR, config.policy)


def test_every_method_with_a_policy_gradient_is_worked_out_by_hand():
    assert {method for method in OTHERS if settings_of(method).reinforces} == set(BY_HAND)


@pytest.mark.parametrize("method", BY_HAND)
def test_every_token_has_the_weight_of_its_papers_formula(method):
    advantages, divisors = BY_HAND[method]
    wanted = np.zeros((6, LONGEST))
    for row, (advantage, divisor) in enumerate(zip(advantages, divisors, strict=True)):
        wanted[row, : LENGTHS[row]] = advantage / divisor
    np.testing.assert_allclose(weights(settings_of(method)), wanted, rtol=1e-6)
    np.testing.assert_allclose(weights(settings_of(method, weight=0.5)), wanted / 2, rtol=1e-6)


def test_taught_rollouts_are_left_to_the_teacher_where_the_config_says_so():
    weight_BR = np.zeros((6, LONGEST), np.float32)
    weight_BR[1, 2] = 1
    both, divided = (weights(settings_of("rosd_grpo", rows=rows), weight_BR) for rows in ("all", "untaught"))
    assert both[1].any() and not divided[1].any()
    np.testing.assert_array_equal(np.delete(both, 1, 0), np.delete(divided, 1, 0))


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("advantage", ["mean", "std"])
def test_equal_rewards_have_no_advantage_at_all(advantage, reward):
    graded = graded_rows(["a"] * 14, [reward] * 7 + [1 / 3] * 7, samples=7)
    assert not policy.advantages(graded, settings_of("grpo", advantage=advantage).policy).any()


# --- loss and gradient, by hand ----------------------------------------------------------------------


@pytest.mark.parametrize("method", BY_HAND)
def test_loss_and_gradient_of_a_batch_worked_out_on_paper(method):
    """Two words. Of each token the model thinks it has 1/4, and the sampler said 1/4, or 1/8 of the "b".

    So the ratio is 1, or 2 capped at CAP. The gradient in the two scores is weight x ratio x (3/4, -3/4) over
    the temperature, since the scores are divided by it.
    """
    config = settings_of(method)
    weight_BR = weights(config)
    ratio_BR = np.ones((6, LONGEST))
    ratio_BR[1, 0] = CAP
    sampler_BR = np.full((6, LONGEST), np.log(1 / 4))
    sampler_BR[1, 0] = np.log(1 / 8)
    hidden_ND = np.tile(TEMPERATURE * np.log([1 / 4, 3 / 4]), (24, 1)).astype(np.float32)
    ids = np.zeros((6, LONGEST), np.int32)
    microbatch = MicroBatch(
        student_BS=ids,
        teacher_BT=ids[:, :0],
        shift_B=ids[:, 0],
        target_BS=ids,
        weight_BS=np.zeros((6, LONGEST), np.float32),
        sampler_logp_BS=sampler_BR.astype(np.float32),
        policy_BS=weight_BR,
    )
    two = MODEL.replace(vocab_size=2, num_tokens=2)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def loss(hidden_ND):
        return policy_gradient_loss((hidden_ND, jnp.eye(2)), microbatch, config, two, mesh)

    (value, sums), grad_ND = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(hidden_ND))
    gain_BR = weight_BR.astype(np.float64) * ratio_BR
    np.testing.assert_allclose(value, -gain_BR.sum(), atol=1e-7)
    wanted = -gain_BR.reshape(-1, 1) * [[3 / 4, -3 / 4]] / TEMPERATURE
    np.testing.assert_allclose(grad_ND, wanted, rtol=1e-5, atol=1e-9)
    active_BR = weight_BR != 0
    np.testing.assert_allclose(sums["ratio"], ratio_BR[active_BR].sum(), rtol=1e-5)
    np.testing.assert_allclose(sums["logp_gap"], np.log(2), rtol=1e-4)


# --- the update --------------------------------------------------------------------------------------


@cache
def lesson_of(kind):
    """alone: no teacher. divided: as in rosd_grpo, no rollout is in both losses. both: some are."""
    rng = np.random.default_rng(5)
    lesson = make_lesson()
    length_B = rng.integers(1, R + 1, B)
    scale_B = np.where(np.arange(B) % 5 == 4, 0, rng.normal(0, 0.02, B))
    policy_BR = np.where(np.arange(R) < length_B[:, None], scale_B[:, None], 0).astype(np.float32)
    if kind == "alone":
        lesson = replace(lesson, teacher_prompts=[[]] * B, weight_BR=np.zeros((B, R), np.float32))
    if kind == "divided":
        policy_BR[lesson.weight_BR.any(1)] = 0
        assert (lesson.weight_BR.any(1) | policy_BR.any(1)).sum() > policy_BR.any(1).sum() > 2
    return replace(lesson, policy_BR=policy_BR)


def method_of(kind):
    return "grpo" if kind == "alone" else "rosd_grpo"


@cache
def plain(kind):
    return step(lesson_of(kind), method=method_of(kind))


def written_loss(params, lesson):
    """The formula of distill/policy.py, of all rows at full width, with plain autodiff."""
    rows = [[*prompt, *response] for prompt, response in zip(lesson.prompts, lesson.response_BR, strict=True)]
    tokens_BT = np.array([row + [0] * (P + R - len(row)) for row in rows], np.int32)
    scores = qwen3.logits(params, MODEL, qwen3.hidden_states(params, MODEL, tokens_BT)) / TEMPERATURE
    logp_BTV = jax.nn.log_softmax(scores[..., : MODEL.num_tokens])
    at_BR = np.array([len(prompt) for prompt in lesson.prompts])[:, None] - 1 + np.arange(R)
    logp_BRV = jnp.take_along_axis(logp_BTV, at_BR[..., None], axis=1)
    logp_BR = jnp.take_along_axis(logp_BRV, lesson.response_BR[..., None], axis=2)[..., 0]
    fixed_BR = jax.lax.stop_gradient(logp_BR)
    ratio_BR = jnp.minimum(jnp.exp(fixed_BR - lesson.sampler_logp_BR), CAP)
    return -(lesson.policy_BR * ratio_BR * jnp.exp(logp_BR - fixed_BR)).sum()


@pytest.mark.parametrize("kind", nightly_but(["alone", "divided", "both"], keep=[2]))
def test_the_gradient_is_that_of_the_written_formula(kind):
    lesson = lesson_of(kind)

    def loss(params, frozen):
        taught = 0.0 if kind == "alone" else uncut_loss(params, frozen, lesson)
        return written_loss(params, lesson) + taught

    wanted, grads = jax.jit(jax.value_and_grad(loss))(*trees())
    state, metrics, divergence_BR = plain(kind)
    assert metrics["loss"] == pytest.approx(float(wanted), rel=1e-4)
    assert metrics["policy_loss"] == pytest.approx(float(written_loss(trees()[0], lesson)), rel=1e-4)
    assert_near(gradient(state), jax.device_get(grads), 3e-5)
    assert metrics["active_tokens"] == ((lesson.weight_BR != 0) | (lesson.policy_BR != 0)).sum()
    assert (divergence_BR != 0).sum() == (lesson.weight_BR != 0).sum()
    assert np.isfinite(metrics["divergence"]) == (kind != "alone")


@pytest.mark.parametrize(("kind", "rows"), nightly_but([("alone", 16), ("divided", 2)], keep=[1]))
def test_the_rows_of_a_microbatch_do_not_matter(kind, rows):
    update, _, _ = prepared(method=method_of(kind), device_rows=rows)
    shapes = {m.teacher_BT.shape[1] for m in plan_microbatches(lesson_of(kind), rows, update.longest)}
    assert (0 in shapes) == (rows == 2 or kind == "alone")  # some have no taught row
    assert_same_update(
        nan_as_0(step(lesson_of(kind), method=method_of(kind), device_rows=rows)), nan_as_0(plain(kind))
    )


@pytest.mark.parametrize("shape", nightly_but(zip([(2, 4, 1), (1, 2, 4)]), keep=[1]), ids=str)
def test_the_mesh_does_not_matter(shape):
    found = step(lesson_of("divided"), method="rosd_grpo", shape=shape, device_rows=1)
    assert_same_update(found, plain("divided"), 3e-5)


def nan_as_0(updated):
    """Means over the taught tokens are NaN where there are none."""
    state, metrics, divergence_BR = updated
    return state, jax.tree.map(np.nan_to_num, metrics), divergence_BR


def test_without_a_teacher_none_is_compiled():
    update, lay, mesh = prepared(method="grpo")

    def refuse(*_):
        raise AssertionError("a teacher is asked")

    with jax.set_mesh(mesh):
        _, metrics, _ = replace(update, teach=refuse, align=refuse)(*lay(lesson_of("alone")))
    assert metrics["active_tokens"] > 0


def test_what_is_in_rows_without_an_advantage_does_not_matter():
    lesson, garbage = lesson_of("alone"), make_lesson(seed=9)
    idle_B = ~lesson.active_BR.any(1)
    assert 0 < idle_B.sum() < B
    changed = replace(
        lesson,
        response_BR=np.where(idle_B[:, None], garbage.response_BR, lesson.response_BR),
        sampler_logp_BR=np.where(lesson.active_BR, lesson.sampler_logp_BR, np.nan).astype(np.float32),
    )
    assert_same_update(nan_as_0(step(changed, method="grpo")), nan_as_0(plain("alone")), 1e-6)


# --- log-probs ---------------------------------------------------------------------------------------


def test_a_head_that_is_split_over_the_vocabulary_is_not_gathered():
    mesh = make_mesh(1, 2, 4)
    options = Options(chunk=4, sharding=loss_sharding(mesh, 64))
    rng = np.random.default_rng(0)
    hidden_ND = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    head_VD = jnp.asarray(rng.normal(size=(64, 8)), jnp.float32)
    head_VD = jax.device_put(head_VD, NamedSharding(mesh, PartitionSpec("tensor")))
    tokens_N = jnp.arange(16, dtype=jnp.int32)

    def total(hidden_ND, head_VD):
        return token_logp(options, hidden_ND, head_VD, tokens_N, tokens_N % 3 != 0).sum()

    split = NamedSharding(mesh, PartitionSpec("tensor"))
    run = jax.jit(jax.grad(total, argnums=(0, 1)), out_shardings=(None, split))
    assert "all-gather" not in run.lower(hidden_ND, head_VD).compile().as_text()


# --- notes and runs ----------------------------------------------------------------------------------


def test_a_rollout_has_a_note_only_if_it_is_in_neither_loss():
    graded = graded_rows(TEXTS, REWARDS, samples=3)
    said = ["quote_missing", "", "quote_missing", "all_right", "all_right", ""]
    reflected = Reflected(graded, tuple(Reflection(note=note) for note in said))
    lesson = make_lesson()
    weight_BR, policy_BR = np.zeros((2, 6, LONGEST), np.float32)
    weight_BR[1, 2] = policy_BR[0, 0] = 1
    lesson = replace(lesson, weight_BR=weight_BR, policy_BR=policy_BR)
    noted = policy.with_notes(reflected, lesson).reflections
    wanted = ["", "", "quote_missing", "all_right", "all_right", "no_advantage"]
    assert [reflection.note for reflection in noted] == wanted


def train(method, directory, steps, model, cache):  # noqa: F811
    fields = dict(eval__sets="", checkpoint__every=1, optimizer__lr=0.01)
    _, *rest = arguments(model, directory, **fields, steps=steps)
    finish([f"{QUICKSTART},{method}", *rest], directory.parent, **cache)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("method", ["grpo_strong", "rosd_grpo"])
def test_a_run_counts_every_rollout(method, model, cache, tmp_path):  # noqa: F811
    whole = tmp_path / "whole"
    train(method, whole, 2, model, cache)
    card = (whole / "export" / "README.md").read_text()
    assert "A policy gradient trains" in card and ("frozen copy" in card) == (method == "rosd_grpo")
    for line in (row for row in numbers(whole) if row["split"] == "train"):
        rows = read_lines(whole / "rollouts" / f"step_{line['step']}.jsonl")
        assert line["taught"] + sum(line[f"out_{note}"] for note in NOTES) == len(rows) == 64
        assert line["taught"] == sum(row["note"] == "" for row in rows) > 0
        assert line["active_tokens"] == sum(row["active_tokens"] for row in rows) > 0
        assert 0 < line["advantage_share"] <= 1 and line["grad_norm"] > 0
        assert all((row["active_tokens"] > 0) == (row["note"] == "") for row in rows)
        taught = sum(row["divergence"] is not None for row in rows)
        assert (line["reflected"] > 0) == (taught > 0) == (method == "rosd_grpo")
        assert abs(line["ratio"] - 1) < 1e-3  # one update per batch


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_resumes_exactly(model, cache, tmp_path):  # noqa: F811
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train("rosd_grpo", whole, 2, model, cache)
    train("rosd_grpo", cut, 1, model, cache)
    train("rosd_grpo", cut, 2, model, cache)
    assert_same_run(cut, whole)
