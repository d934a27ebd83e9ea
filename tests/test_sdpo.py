"""SDPO: what is taught without a reflector, its loss by hand, and a teacher that is a moving average."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_checkpoint import assert_equal, damage, like_of, make_state, restore, save
from test_lora import LAYERS, RANK, SCALE, adapters_of, config_of, merged
from test_plan import job_of, on_first_device, planned_of
from test_reflect import Letters, graded_rows
from test_run import QUICKSTART, arguments, assert_same_run, finish, model, numbers, read_lines  # noqa: F401
from test_update import (
    MODEL,
    TEMPERATURE,
    B,
    R,
    assert_near,
    assert_same,
    gradient,
    make_lesson,
    plain,
    prepared,
    quickly,
    trees,
    uncut_loss,
)

import tiny
from configs import quickstart
from rosd_jax.config import default_config, use_preset, validate
from rosd_jax.distill import reflect, teacher
from rosd_jax.distill.notes import NOTES
from rosd_jax.errors import UserError
from rosd_jax.fields import replace as with_field
from rosd_jax.hosts import Hosts
from rosd_jax.models.families import read_config
from rosd_jax.models.sharding import make_mesh
from rosd_jax.plan import printed
from rosd_jax.plan.budget import gradients, resident
from rosd_jax.plan.chips import Slice
from rosd_jax.plan.stages import make_job
from rosd_jax.text.prompts import ENGLISH
from rosd_jax.train import checkpoint
from rosd_jax.train.metrics import format_step
from rosd_jax.train.microbatches import MicroBatch
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import distillation_loss, init_state, make_optimizer, make_update

RATE = 0.05


def settings_of(**fields):
    config = use_preset(default_config(), "sdpo")
    config.update_from_flattened_dict({name.replace("__", "."): value for name, value in fields.items()})
    return validate(config)


# --- what is taught --------------------------------------------------------------------------------------

# Four groups of three: one right, two right (the second is shorter), all right, all wrong.
TEXTS = ["no", "it is 4", "5", "is it 4", "4", "6", "4", "is 4", "so 4", "1", "2", "3"]
REWARDS = [0, 1, 0, 1, 1, 0, 1, 1, 1, 0, 0, 0]
SHOWN = [1, None, 1, 4, 3, 3, 7, 6, 6, None, None, None]  # the row whose text the teacher sees
LEFT_OUT = {1: "no_solution", 9: "all_wrong", 10: "all_wrong", 11: "all_wrong"}


def taught(config):
    """The reflected rollouts, the teacher's prompts as text, and the weights, as in train/step.py."""
    assert not config.reflects
    graded = graded_rows(TEXTS, REWARDS, samples=3)
    uniform = config.lesson.uniform_groups
    plans = reflect.plan_rollouts(graded, config.reflect, uniform_taught=uniform)
    reflected = reflect.gather(graded, plans, {}, {}, config.lesson)
    reflected, prompts = teacher.teacher_prompts(
        reflected, Letters(), config.lesson, thinking=False, wording=ENGLISH
    )
    R = graded.rollout.tokens_BR.shape[1]
    texts = [None if ids is None else Letters().decode(ids) for ids in prompts]
    return reflected, texts, teacher.region_weights(reflected, config.lesson, R)


def test_every_rollout_with_a_right_sibling_is_taught_in_full_with_the_first_one():
    reflected, prompts, weight_BR = taught(settings_of())
    for row, (prompt, shown) in enumerate(zip(prompts, SHOWN, strict=True)):
        assert reflected.reflections[row].note == LEFT_OUT.get(row, ""), row
        length = reflected.graded.rollout.length_B[row]
        assert weight_BR[row].sum() == weight_BR[row, :length].sum() == (0 if shown is None else length)
        if shown is None:
            assert prompt is None
        else:
            assert f"<correct_solution>\n{TEXTS[shown]}\n</correct_solution>" in prompt and "2+2?" in prompt
    counts = teacher.count(reflected, weight_BR)
    assert counts["taught"] == 8 and counts["out_all_wrong"] == 3 and counts["out_no_solution"] == 1
    assert counts["taught"] + sum(counts[f"out_{note}"] for note in NOTES) == len(TEXTS)
    assert counts["reflected"] == counts["quotes_asked"] == 0


@pytest.mark.parametrize(
    ("fields", "out"),
    [
        ({"lesson__uniform_groups": False}, dict.fromkeys((6, 7, 8), "all_right")),
        ({"reflect__correct": False}, dict.fromkeys((1, 3, 4, 6, 7, 8), "correct_left_out")),
    ],
)
def test_right_rollouts_leave_the_loss_for_a_reason_where_the_config_says_so(fields, out):
    reflected, _, weight_BR = taught(settings_of(**fields))
    notes = {row: r.note for row, r in enumerate(reflected.reflections) if r.note}
    assert notes == LEFT_OUT | out
    assert not weight_BR[list(notes)].any()


def test_uniform_groups_may_be_taught_with_ideas_too():
    graded = graded_rows(["4", "is 4"], [1, 1])
    config = default_config()
    for uniform in (False, True):
        plans = reflect.plan_rollouts(graded, config.reflect, uniform_taught=uniform)
        kept = ("right", "") if uniform else (None, "all_right")
        assert [(plan.kind, plan.note) for plan in plans] == [kept] * 2


@pytest.mark.parametrize(
    ("context", "region", "reflects"),
    [
        ("solution", "full", False),
        ("solution", "span", True),
        ("idea", "full", True),
        ("idea_or_solution", "full", True),
    ],
)
def test_the_reflector_is_asked_only_if_its_answers_are_used(context, region, reflects):
    config = use_preset(default_config(), "span")
    config.lesson.update(teacher_context=context, region=region)
    assert validate(config).reflects == reflects
    assert not validate(use_preset(default_config(), "grpo")).reflects


@pytest.mark.parametrize(
    ("method", "fields", "words"),
    [
        (
            "grpo",
            {"lesson.teacher_weights": "ema"},
            "teacher_weights is 'ema'; it must be frozen if lesson.te",
        ),
        ("sdpo", {"lesson.ema_rate": 0.0}, r"lesson.ema_rate is 0.0; it must lie in \(0, 1\]"),
        ("sdpo", {"lesson.ema_rate": 1.5}, r"lesson.ema_rate is 1.5; it must lie in \(0, 1\]"),
        ("sdpo", {"lesson.ema_rate": 1e-45}, r"it must lie in \(0, 1\], also in float32"),
        (
            "sdpo",
            {"lesson.teacher_context": "none"},
            "it must be std or mean if lesson.teacher_context is none",
        ),
    ],
)
def test_what_the_teacher_cannot_be_is_refused(method, fields, words):
    config = use_preset(default_config(), method)
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=words):
        validate(config)


# --- the loss, by hand -----------------------------------------------------------------------------------


def divergences_by_hand(student_NV, teacher_NV, k):
    """Of rows of scores: the Jensen-Shannon divergence over the student's top k and the rest, in float64.

    And its gradient in the student's scores. With buckets q and t of both and m = (q + t) / 2, the
    derivative in bucket j is log(q_j / m_j) / 2; a softmax follows.
    """
    values, grads = [], []
    for z, u in zip(student_NV, teacher_NV, strict=True):
        p, r = (np.exp(x - x.max()) / np.exp(x - x.max()).sum() for x in (z, u))
        best = np.argsort(-z)[:k]
        q, t = (np.append(x[best], 1 - x[best].sum()) for x in (p, r))
        m = (q + t) / 2
        values.append((q @ np.log(q / m) + t @ np.log(t / m)) / 2)
        of_bucket = np.log(q / m) / 2
        slope = np.full(len(z), of_bucket[-1])
        slope[best] = of_bucket[:-1]
        grads.append(p * (slope - p @ slope))
    return np.array(values), np.array(grads)


def test_loss_and_gradient_of_a_hand_made_batch_are_the_float64_formula():
    """The head is the unit matrix, so scores are hidden states. Of 2 rows of 6 tokens, 9 are taught."""
    V, k, N = 7, 3, 12
    config = settings_of(loss__topk=k, loss__chunk=4, rollout__temperature=TEMPERATURE)
    assert (config.loss.alpha, config.loss.tail, config.loss.ratio_cap) == (0.5, "bucket", 2)
    rng = np.random.default_rng(3)
    student_NV, teacher_NV = rng.normal(0, 2, (2, N, V))
    tokens_N = rng.integers(0, V, N)
    taught_N = np.arange(N) % 4 != 3
    logp_NV = student_NV / TEMPERATURE
    logp_NV = logp_NV - np.log(np.exp(logp_NV).sum(1, keepdims=True))
    sampler_N = logp_NV[np.arange(N), tokens_N] + rng.normal(0, 2, N)
    ratio_N = np.minimum(np.exp(logp_NV[np.arange(N), tokens_N] - sampler_N), 2)
    assert 0 < (ratio_N == 2).sum() < N
    weight_N = taught_N / taught_N.sum()

    def rows(x, dtype):
        return np.asarray(x, dtype).reshape(2, N // 2)

    microbatch = MicroBatch(
        student_BS=rows(tokens_N, np.int32),
        teacher_BT=np.zeros((2, 0), np.int32),
        shift_B=np.zeros(2, np.int32),
        target_BS=rows(tokens_N, np.int32),
        weight_BS=rows(weight_N, np.float32),
        sampler_logp_BS=rows(sampler_N, np.float32),
        policy_BS=None,
    )
    small = MODEL.replace(vocab_size=V, num_tokens=V)
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

    def loss(hidden_NV):
        teaches = jnp.asarray(teacher_NV, jnp.float32), jnp.eye(V)
        return distillation_loss((hidden_NV, jnp.eye(V)), teaches, microbatch, config, small, mesh)[::2]

    (value, divergence_BS), grad_NV = jax.value_and_grad(loss, has_aux=True)(
        jnp.asarray(student_NV, jnp.float32)
    )
    wanted_N, slope_NV = divergences_by_hand(student_NV / TEMPERATURE, teacher_NV / TEMPERATURE, k)
    np.testing.assert_allclose(value, weight_N @ (ratio_N * wanted_N), rtol=1e-5)
    np.testing.assert_allclose(np.ravel(divergence_BS)[taught_N], wanted_N[taught_N], rtol=1e-4)
    wanted_NV = (weight_N * ratio_N)[:, None] * slope_NV / TEMPERATURE
    np.testing.assert_allclose(grad_NV, wanted_NV, rtol=1e-4, atol=1e-7)


# --- the moving average ----------------------------------------------------------------------------------


def averaged(average, params, rate=RATE):
    """The next average in float64."""
    return jax.tree.map(
        lambda old, new: (1 - rate) * np.float64(old) + rate * np.float64(new), average, params
    )


@cache
def taught_by_average(shape, device_rows=8):
    """One update whose average is the other tree. The frozen tree is not a number, so it is not read."""
    update, lay, mesh = prepared(shape, device_rows, method="sdpo")
    state, frozen, lesson = lay(make_lesson(), jax.tree.map(lambda x: np.full_like(x, np.nan), trees()[1]))
    places = jax.tree.map(lambda x: x.sharding, state.ema_params)
    state = replace(state, ema_params=jax.device_put(trees()[1], places))
    with jax.set_mesh(mesh), quickly(True):
        state, metrics, divergence_BR = update(state, frozen, lesson)
    split = {name: x.sharding.shard_shape(x.shape) for name, x in state.ema_params.items() if name == "embed"}
    assert split["embed"] == (64 // shape[2], 16 // shape[1])  # laid as the weights are
    return jax.device_get((state, metrics, divergence_BR))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 2)], ids=str)
def test_the_average_teaches_as_a_frozen_tree_would_on_any_mesh(shape):
    """test_update checks the update with a frozen tree, against float64."""
    state, metrics, divergence_BR = taught_by_average(shape, 1 if shape == (2, 2, 2) else 8)
    wanted, plain_metrics, plain_divergence_BR = plain()
    assert_near(gradient(state), gradient(wanted), 3e-5)
    assert_near(state.params, wanted.params, 1e-5)
    assert_near(metrics, plain_metrics, 3e-5)
    assert_near(divergence_BR, plain_divergence_BR, 3e-4)
    assert_near(state.ema_params, averaged(trees()[1], wanted.params), 1e-6)


def test_after_three_steps_the_average_is_the_float64_one_and_a_skipped_step_leaves_it():
    update, lay, mesh = prepared(method="sdpo", lr=0.1)
    state, frozen, _ = lay(make_lesson())
    wanted = trees()[0]  # it starts as the weights
    assert_same(jax.device_get(state.ema_params), wanted)
    empty = make_lesson(weight_BR=np.zeros((B, R), np.float32))
    broken = make_lesson(sampler_logp_BR=np.full((B, R), np.nan, np.float32))
    with jax.set_mesh(mesh):
        for number, lesson in enumerate((make_lesson(), make_lesson(1), empty, broken, make_lesson(2))):
            before = jax.device_get(state.ema_params)
            state, metrics, _ = update(state, frozen, lesson)
            after = jax.device_get(state.ema_params)
            if number in (2, 3):
                assert metrics["skipped_empty"] + metrics["skipped_nonfinite"] == 1
                assert_same(after, before)
            else:
                wanted = averaged(wanted, jax.device_get(state.params))
    assert state.opt_state[1][1][0].count == 3 and state.step == 5
    moved = jax.tree.map(np.subtract, after, trees()[0])
    assert_near(moved, jax.tree.map(np.subtract, wanted, trees()[0]), 1e-4)
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(moved))


def test_with_adapters_the_average_is_of_the_adapters_alone():
    config = with_field(config_of(RANK, LAYERS), "lesson.teacher_weights", "ema")
    mesh = make_mesh(2, 2, 2)
    adapted = MODEL.replace(lora_scale=SCALE)
    layout = Trees(config, adapted, mesh, make_optimizer(config))
    update = make_update(config, adapted, layout.optimizer, mesh, layout.shardings)
    base = trees()[0]
    student = adapters_of(LAYERS, adapted)
    average = jax.tree.map(lambda x: x[::-1] * 0.5, student)
    lesson = make_lesson()
    with jax.set_mesh(mesh):
        state = jax.device_put(init_state(student, layout.optimizer, average=True), layout.shardings)
        assert_same(jax.device_get(state.ema_params), student)
        state = replace(state, ema_params=jax.device_put(average, layout.shardings.ema_params))
        frozen = jax.device_put(base, layout.frozen_shardings)
        state, metrics, _ = jax.device_get(update(state, frozen, lesson))
    assert jax.tree.structure(state.ema_params) == jax.tree.structure(student)
    assert_near(state.ema_params, averaged(average, state.params), 1e-6)
    wanted = uncut_loss(merged(base, student), merged(base, average), lesson)
    assert metrics["loss"] == pytest.approx(float(wanted), rel=3e-5)


# --- checkpoints, the plan, the line of a step, a run ---------------------------------------------------


def averaging_state(step):
    state = make_state(step)
    return replace(state, ema_params=jax.tree.map(lambda x: 2 * x, state.params))


def test_the_average_is_in_the_checkpoint_and_a_state_without_one_is_another(tmp_path):
    manager = checkpoint.open_manager(tmp_path)
    for step in (1, 2):
        save(manager, averaging_state(step), step, {})
    found = restore(checkpoint.open_manager(tmp_path), like_of(averaging_state(0)))
    assert_equal(found[0], averaging_state(2))
    with pytest.raises(UserError, match="arrays of another model or optimizer"):
        restore(checkpoint.open_manager(tmp_path), like_of(make_state(0)))
    files = [p for p in (tmp_path / "checkpoints" / "2" / "ema_params").rglob("*") if p.is_file()]
    damage(max(files, key=lambda p: p.stat().st_size), "flip")
    manager = checkpoint.open_manager(tmp_path)
    found = checkpoint.restore_latest(manager, like_of(averaging_state(0)), Hosts())
    assert found is not None and list(found.damaged) == [2]
    assert_equal(found.state, averaging_state(1))


def test_the_plan_counts_the_average_and_has_no_reflections(tmp_path_factory):
    path = tiny.model_dir(tmp_path_factory)
    config = quickstart.get_config("sdpo,debug")
    config.model.path = str(path)
    config = validate(config)
    sizes = read_config(path, num_tokens=None, dtype="float32", remat="none")
    job = make_job(config, sizes, Slice("local", None, jax.devices()[:2], "cpu", compiles=True))
    state = job.trees.first()
    frozen = job.trees.frozen(state)
    buffers = {x.addressable_shards[0].data.unsafe_buffer_pointer() for x in jax.tree.leaves(state)}
    assert len(buffers) == len(jax.tree.leaves(state))  # none is shared, since the state is donated
    assert_same(state.ema_params, state.params)
    assert resident(job) | gradients(job) == {
        "parameters": on_first_device(state.params),
        "optimizer": on_first_device(state.opt_state),
        "moving average": on_first_device(state.ema_params),
        "frozen": on_first_device(frozen),
        "gradients": on_first_device(job.update.zeros()[0]),
    }


def test_a_plan_at_full_size_has_a_teacher_and_an_average_but_no_reflector():
    found = planned_of(job_of("8b", "h100:8", "8b", "h100x8", "sdpo"), "h100:8")
    names = ("rollouts", "evaluation", "teacher", "student", "optimizer")
    assert tuple(stage.name for stage in found.stages) == names
    text = printed.as_text(found)
    assert "teacher prompts" in text and "moving average" in text and "reflect" not in text
    for stage in found.stages:
        assert stage.bytes["moving average"] == stage.bytes["parameters"]
    frozen = planned_of(
        job_of("8b", "h100:8", "8b", "h100x8", "sdpo", **{"lesson.teacher_weights": "frozen"}), "h100:8"
    )
    assert "moving average" not in printed.as_text(frozen)


def test_the_line_of_a_step_has_quotes_only_if_something_was_reflected():
    numbers = {"reward": 0.5, "taught": 8, "loss": 0.01, "seconds": 1.0}
    assert format_step(1, 8, numbers | {"reflected": 0.0}) == (
        "step 1/8  reward 0.500  taught 8/8  loss 0.01000   1.0 s"
    )
    assert "quotes 75%" in format_step(1, 8, numbers | {"reflected": 0.5, "quote_found": 0.75}).replace(
        "  ", " "
    )


def average_of(directory, step):
    """Weights and average of a checkpoint, on the host."""
    manager = ocp.CheckpointManager((directory / "checkpoints").absolute())
    items = {name: ocp.args.StandardRestore() for name in ("params", "ema_params")}
    found = manager.restore(step, args=ocp.args.Composite(**items))
    return jax.tree.map(np.asarray, (found["params"], found["ema_params"]))


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_resumes_exactly_and_asks_no_reflector(model, cache, tmp_path):  # noqa: F811
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fields = dict(eval__sets="", checkpoint__every=1, checkpoint__keep=3, optimizer__lr=0.01)

    def train(directory, steps):
        _, *rest = arguments(model, directory, **fields, steps=steps)
        finish([f"{QUICKSTART},sdpo", *rest], tmp_path, **cache)

    train(whole, 3)
    for steps in (1, 3):
        train(cut, steps)
    assert_same_run(cut, whole)
    states = {step: average_of(whole, step) for step in (1, 2, 3)}
    for step, found in states.items():
        assert_same(found, average_of(cut, step))
        if step > 1:
            assert_near(found[1], averaged(states[step - 1][1], found[0]), 1e-6)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(*map(jax.tree.leaves, states[3]), strict=True))
    for line in (row for row in numbers(whole) if row["split"] == "train"):
        rows = read_lines(whole / "rollouts" / f"step_{line['step']}.jsonl")
        assert line["taught"] + sum(line[f"out_{note}"] for note in NOTES) == len(rows) == 64
        assert line["taught"] == sum(row["note"] == "" for row in rows) > 0
        assert line["reflected"] == line["ideas_missing"] == 0 and line["quote_found"] is None
        for row in rows:
            assert row["active_tokens"] == (0 if row["note"] else len(row["token_ids"]))
            assert row["reflection"] is None
    card = (whole / "export" / "README.md").read_text()
    assert "whose weights are a moving average" in card and "a frozen copy" not in card
    assert "quotes" not in card and "| `lesson.teacher_weights` | `ema` |" in card
