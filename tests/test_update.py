"""The update against a plain float64 loss, and equal for any micro-batches, mesh and idle row."""

import itertools
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rosd_jax.config import default_config, use_preset, validate
from rosd_jax.kernels.topk_jsd import Sharding, topk_jsd_loss
from rosd_jax.models import qwen3
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import AXES, make_mesh, param_shardings, row_sharding
from rosd_jax.rollout.batching import Request
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.train.microbatches import plan_microbatches
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import (
    align,
    init_state,
    loss_sharding,
    make_optimizer,
    make_update,
    microbatch_loss,
    teach,
)
from rosd_jax.types import Lesson
from support import nightly_but

MODEL = Qwen3Config(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=4,
    num_tokens=60,
)
B, P, Q, R = 16, 6, 9, 8
TOPK, TEMPERATURE, CAP = 5, 0.7, 1.25
LR, WARMUP = 0.01, 4
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == 8] + [(1, 4, 1), (2, 1, 2)]
KEPT = [SHAPES.index(shape) for shape in [(2, 2, 2), (1, 2, 4)]]


def make_config(device_rows=8, method="paper", **optimizer):
    """Adam's eps is large, so that rounding of a tiny gradient does not turn into a whole step."""
    config = use_preset(default_config(), method)
    config.batch.device_rows = device_rows
    config.rollout.temperature = TEMPERATURE
    config.loss.update(topk=TOPK, ratio_cap=CAP, chunk=16)
    config.optimizer.update(lr=LR, warmup_steps=WARMUP, eps=1e-3, clip_norm=0.05)
    config.optimizer.update(optimizer)
    return validate(config)


def with_gradient(config):
    """The run's optimizer behind a stage that keeps the raw gradient in its state."""
    return optax.chain(optax.trace(decay=0.0), make_optimizer(config))


@cache
def trees():
    """Parameters of student and teacher: not small, not alike."""
    shapes = qwen3.param_shapes(MODEL)
    rng = np.random.default_rng(1)
    student = jax.tree.map(lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32), shapes)
    teacher = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), student)
    return student, teacher


def make_lesson(seed=0, **fields):
    """Spans of all kinds; a third of the rows has no weight, as rollouts that left the loss."""
    rng = np.random.default_rng(seed)

    def ids(*shape):
        return rng.integers(1, 60, shape).astype(np.int32)

    def texts(longest):
        rows = zip(ids(B, longest), rng.integers(1, longest + 1, B), strict=True)
        return [row[:length].tolist() for row, length in rows]

    length_B = rng.integers(1, R + 1, B).astype(np.int32)
    weight_BR = np.zeros((B, R), np.float32)
    for row in range(B):
        start = rng.integers(length_B[row])
        weight_BR[row, start : rng.integers(start, length_B[row]) + 1] = row % 3 != 1
    lesson = dict(
        prompts=texts(P),
        teacher_prompts=texts(Q),
        response_BR=ids(B, R),
        weight_BR=weight_BR,
        sampler_logp_BR=rng.normal(-4, 1, (B, R)).astype(np.float32),
    )
    return Lesson(**(lesson | fields))


@cache
def prepared(shape=(1, 1, 1), device_rows=8, model=MODEL, method="paper", **optimizer):
    """The update of one mesh, a function that lays its three arguments, and the mesh."""
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    config = make_config(device_rows, method, **optimizer)
    tx = with_gradient(config)

    def start(params):
        return init_state(params, tx, average=config.averages)

    places = param_shardings(jax.eval_shape(start, trees()[0]), mesh)

    def lay(lesson, frozen=None):
        state = jax.device_put(start(trees()[0]), places)
        frozen = jax.device_put(trees()[1] if frozen is None else frozen, places.params)
        return state, frozen, lesson

    return make_update(config, model, tx, mesh, places), lay, mesh


@contextmanager
def quickly(less):
    """Compiles with less optimisation, to save time, or with all of it."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, less)
    yield
    jax.config.update(name, before)


def step(lesson, *, frozen=None, **options):
    """State, metrics and divergences of one update, on the host. As in a run, the mesh is in context.

    All but the plain update are compiled with less optimisation.
    """
    update, lay, mesh = prepared(**options)
    with jax.set_mesh(mesh), quickly(bool(options)):
        return jax.device_get(update(*lay(lesson, frozen)))


def untouched():
    """Parameters and optimizer state before the first step."""
    state = init_state(trees()[0], with_gradient(make_config()))
    return state.params, state.opt_state


def gradient(state):
    return state.opt_state[0].trace


def assert_near(found, wanted, rtol=1e-5):
    """Every leaf within rounding of its own scale."""

    def near(path, a, b):
        scale = max(np.abs(b).max(), 1e-6)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(near, found, wanted)


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def assert_same_update(found, wanted, rtol=1e-5):
    """Gradient, parameters, moments, metrics and divergences of two updates."""
    assert_near(gradient(found[0]), gradient(wanted[0]), rtol)

    def change(updated):
        return jax.tree.map(np.subtract, updated[0].params, trees()[0])

    assert_near(change(found), change(wanted), 10 * rtol)
    assert_near(found[0].opt_state, wanted[0].opt_state, 10 * rtol)
    assert_near(found[1], wanted[1], rtol)
    assert_near(found[2], wanted[2], 10 * rtol)


@cache
def plain():
    return step(make_lesson())


# --- what the number is ------------------------------------------------------------------------------


@jax.jit
def scores(params, tokens_BT):
    return qwen3.logits(params, MODEL, qwen3.hidden_states(params, MODEL, tokens_BT)) / TEMPERATURE


def token_scores(params, prompts, response_BR):
    """Log-probs [B, R, V] in float64 of every response token's distribution."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, response_BR, strict=True)]
    padded = np.array([row + [59] * (Q + R - len(row)) for row in rows], np.int32)
    z = np.asarray(scores(params, padded), np.float64)[..., : MODEL.num_tokens]
    z = np.stack([x[len(ids) - 1 : len(ids) - 1 + R] for x, ids in zip(z, prompts, strict=True)])
    return z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)


def plain_terms(lesson, params, frozen):
    """Of every active token: ratio, JSD between (top-k, rest) buckets, both models' top-k mass."""
    student = token_scores(params, lesson.prompts, lesson.response_BR)
    teacher = token_scores(frozen, lesson.teacher_prompts, lesson.response_BR)
    terms = []
    for b, r in zip(*np.nonzero(lesson.weight_BR), strict=True):
        best = np.argsort(-student[b, r])[:TOPK]
        q, t = (np.exp(x[b, r][best]) for x in (student, teacher))
        q, t = np.append(q, 1 - q.sum()), np.append(t, 1 - t.sum())
        m = (q + t) / 2
        divergence = (q @ np.log(q / m) + t @ np.log(t / m)) / 2
        logp = student[b, r, lesson.response_BR[b, r]]
        ratio = min(np.exp(logp - lesson.sampler_logp_BR[b, r]), CAP)
        terms.append((ratio, divergence, q[:-1].sum(), t[:-1].sum()))
    return np.array(terms).T


def test_the_loss_is_the_float64_mean_over_active_tokens():
    lesson, (state, metrics, _) = make_lesson(), plain()
    terms = plain_terms(lesson, *trees())
    names = ("ratio", "divergence", "student_topk_mass", "teacher_topk_mass")
    np.testing.assert_allclose([metrics[name] for name in names], terms.mean(1), rtol=2e-5)
    assert metrics["loss"] == pytest.approx((terms[0] * terms[1]).mean(), rel=2e-5)
    assert metrics["active_tokens"] == lesson.weight_BR.sum() == terms.shape[1]
    assert (terms[0] == CAP).any() and (terms[0] < CAP).any()
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(gradient(state))), rel=1e-6)


@pytest.mark.parametrize("shape", nightly_but(zip([(1, 1, 1), (2, 4, 1)]), keep=[1]), ids=str)
def test_the_divergence_of_each_token_is_told_and_makes_up_the_loss(shape):
    """Of all rows in the order of the lesson, from several micro-batches on one device and on eight."""
    lesson = make_lesson()
    rows = 4 if shape == (1, 1, 1) else 1
    assert len(plan_microbatches(lesson, rows * np.prod(shape), (64, 64))) > 1
    _, metrics, divergence_BR = step(lesson, shape=shape, device_rows=rows)
    ratios, divergences, *_ = plain_terms(lesson, *trees())
    active_BR = lesson.weight_BR != 0
    # Rounding of the logits is larger than what float32 adds, so small divergences have an absolute error.
    np.testing.assert_allclose(divergence_BR[active_BR], divergences, rtol=1e-4, atol=1e-6)
    assert not divergence_BR[~active_BR].any()
    assert metrics["divergence"] == pytest.approx(divergence_BR[active_BR].mean(), rel=1e-5)
    assert metrics["loss"] == pytest.approx((ratios * divergence_BR[active_BR]).mean(), rel=2e-5)


def test_the_gradient_is_that_of_the_loss():
    """Along the gradient itself, with the ratios held where they were: they take no gradient."""
    lesson, grads, (student, frozen) = make_lesson(), gradient(plain()[0]), trees()
    norm, ratios = float(optax.tree.norm(grads)), plain_terms(lesson, *trees())[0]

    def loss(by):
        moved = jax.tree.map(lambda p, g: p + np.float32(by / norm) * g, student, grads)
        return (ratios * plain_terms(lesson, moved, frozen)[1]).mean()

    # Further out another token enters some top k, where the loss jumps.
    assert (loss(1e-3) - loss(-1e-3)) / 2e-3 == pytest.approx(norm, rel=2e-3)


def uncut_loss(params, frozen, lesson):
    """The same loss of all rows at full width in one pass, nothing cut or left out, with plain autodiff."""

    def hidden(params, prompts, width):
        prompt_BW = np.array([[*ids, *[0] * (width - len(ids))] for ids in prompts], np.int32)
        length_B = np.array([len(ids) for ids in prompts])
        at_BT = np.arange(prompt_BW.shape[1] + R) - length_B[:, None]
        response_BT = np.take_along_axis(lesson.response_BR, np.clip(at_BT, 0, R - 1), axis=1)
        tokens_BT = np.where(at_BT < 0, np.pad(prompt_BW, ((0, 0), (0, R))), response_BT)
        before_BR = length_B[:, None] - 1 + np.arange(R)
        hidden_BTD = qwen3.hidden_states(params, MODEL, tokens_BT)
        return jnp.take_along_axis(hidden_BTD, before_BR[..., None], axis=1).reshape(B * R, -1)

    return topk_jsd_loss(
        hidden(params, lesson.prompts, P),
        qwen3.head_VD(params),
        hidden(frozen, lesson.teacher_prompts, Q),
        qwen3.head_VD(frozen),
        (lesson.weight_BR / lesson.weight_BR.sum()).reshape(-1),
        k=TOPK,
        temperature=TEMPERATURE,
        num_tokens=MODEL.num_tokens,
        tokens_N=lesson.response_BR.reshape(-1),
        sampler_logp_N=lesson.sampler_logp_BR.reshape(-1),
        ratio_cap=CAP,
        implementation="reference",
    )[0]


def test_cutting_rows_changes_neither_the_loss_nor_its_gradient():
    lesson, (state, metrics, _) = make_lesson(), plain()
    loss, grads = jax.jit(jax.value_and_grad(partial(uncut_loss, lesson=lesson)))(*trees())
    assert metrics["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert_near(gradient(state), jax.device_get(grads), 3e-5)


# --- what must not matter ----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", nightly_but([1, 2, 4, 16], keep=[1, 3]))
def test_the_rows_of_a_microbatch_do_not_matter(rows):
    assert_same_update(step(make_lesson(), device_rows=rows), plain())


@pytest.mark.parametrize("shape", nightly_but(zip(SHAPES), keep=KEPT), ids=str)
def test_the_mesh_does_not_matter(shape):
    assert_same_update(step(make_lesson(), shape=shape), plain(), 3e-5)


@pytest.mark.parametrize(
    ("shape", "rows", "vocab"),
    [((1, 8, 1), AXES, None), ((2, 2, 2), AXES[:2], "tensor"), ((1, 1, 8), AXES, None)],
)
def test_the_loss_splits_the_vocabulary_as_the_head_lies(shape, rows, vocab):
    mesh = make_mesh(*shape)
    assert loss_sharding(mesh, 60) == Sharding(mesh, rows, vocab)  # which 8 does not divide
    assert loss_sharding(make_mesh(1, 1, 1, devices=jax.devices()[:1]), 60) is None


@pytest.mark.slow
def test_rematerialising_does_not_matter():
    assert_same_update(step(make_lesson(), model=MODEL.replace(remat="block")), plain())


@pytest.mark.slow
def test_under_its_mesh_every_device_holds_its_own_rows_only():
    model = MODEL.replace(hidden_size=48, intermediate_size=96)
    lesson = make_lesson()
    microbatch = plan_microbatches(lesson, B, (64, 64))[0]

    def wide(x):
        return jax.ShapeDtypeStruct((B, 128) if x.ndim > 1 else (B,), x.dtype)

    def memory(count):
        mesh = make_mesh(1, -1, 1, devices=jax.devices()[:count])
        trees = Trees(make_config(B // count), model, mesh, make_optimizer(make_config()))
        update = make_update(trees.config, model, trees.optimizer, mesh, trees.shardings)

        def rows(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=row_sharding(mesh))

        params, sums = trees.like.params, jax.eval_shape(update.zeros)[1]
        hidden = jax.ShapeDtypeStruct((B, 128, 48), np.float32)
        with jax.set_mesh(mesh):
            learn = update.learn.lower(
                params, params, params, sums, rows(hidden), jax.tree.map(rows, jax.tree.map(wide, microbatch))
            )
        return learn.compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes

    assert memory(8) < memory(1) / 4


def test_the_order_of_the_rows_does_not_matter():
    lesson = make_lesson()
    order = np.random.default_rng(3).permutation(B)
    shuffled = Lesson(
        prompts=[lesson.prompts[row] for row in order],
        teacher_prompts=[lesson.teacher_prompts[row] for row in order],
        response_BR=lesson.response_BR[order],
        weight_BR=lesson.weight_BR[order],
        sampler_logp_BR=lesson.sampler_logp_BR[order],
    )
    state, metrics, divergence_BR = step(shuffled)
    assert_same_update((state, metrics, divergence_BR[np.argsort(order)]), plain())


def test_what_follows_the_span_does_not_matter():
    lesson = make_lesson()
    garbage = make_lesson(seed=9)
    last_B = np.where(lesson.weight_BR.any(1), R - np.argmax(lesson.weight_BR[:, ::-1], 1), 0)
    after_BR = np.arange(R) >= last_B[:, None]
    changed = make_lesson(
        response_BR=np.where(after_BR, garbage.response_BR, lesson.response_BR),
        sampler_logp_BR=np.where(after_BR, np.nan, lesson.sampler_logp_BR).astype(np.float32),
    )
    assert (changed.response_BR != lesson.response_BR).sum() > B
    assert_same_update(step(changed), plain(), 1e-6)


def test_what_is_in_idle_rows_does_not_matter():
    lesson, garbage = make_lesson(), make_lesson(seed=9)
    idle_B = ~lesson.weight_BR.any(1)

    def pick(theirs, ours):
        return [a if idle else b for idle, a, b in zip(idle_B, theirs, ours, strict=True)]

    changed = make_lesson(
        prompts=pick(garbage.prompts, lesson.prompts),
        teacher_prompts=pick([[]] * B, lesson.teacher_prompts),
        response_BR=np.array(pick(garbage.response_BR, lesson.response_BR)),
    )
    assert_same_update(step(changed), plain(), 1e-6)


# --- steps that are not taken, and what never learns ---------------------------------------------------


def test_progress_is_told_before_each_micro_batch():
    told = []
    update, lay, mesh = prepared(device_rows=4)
    update = replace(update, progress=lambda done, total: told.append((done, total)))
    with jax.set_mesh(mesh), quickly(True):
        update(*lay(make_lesson()))
    assert len(told) > 1 and told == [(done, len(told)) for done in range(len(told))]


def test_an_empty_lesson_changes_nothing_and_is_counted():
    empty = make_lesson(weight_BR=np.zeros((B, R), np.float32))
    state, metrics, divergence_BR = step(empty)
    assert_same((state.params, state.opt_state), untouched())
    assert state.step == 1 and metrics["skipped_empty"] == 1 and metrics["skipped_nonfinite"] == 0
    assert metrics["grad_norm"] == metrics["active_tokens"] == 0
    assert np.isnan(metrics["loss"]) and np.isnan(metrics["ratio"])  # means over nothing
    assert divergence_BR.shape == (B, R) and not divergence_BR.any()
    assert plain()[1]["skipped_empty"] == 0


def test_an_empty_lesson_decays_the_weights_where_the_config_says_so():
    empty = make_lesson(weight_BR=np.zeros((B, R), np.float32))
    state, metrics, _ = step(empty, empty_batch="step", weight_decay=0.5)
    wanted = jax.tree.map(lambda x: x * (1 - LR / WARMUP * 0.5), trees()[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), state.params, wanted)
    assert metrics["skipped_empty"] == 0


@pytest.mark.parametrize("where", ["teacher", "sampler"])
def test_a_gradient_that_is_not_finite_skips_the_step_and_is_counted(where):
    frozen, lesson = jax.tree.map(np.copy, trees()[1]), make_lesson()
    if where == "teacher":
        frozen["embed"][:] = np.nan
    else:
        row, at = np.argwhere(lesson.weight_BR)[0]
        lesson.sampler_logp_BR[row, at] = np.nan
    state, metrics, _ = step(lesson, frozen=frozen)
    assert not np.isfinite(metrics["grad_norm"])
    assert_same((state.params, state.opt_state), untouched())
    assert metrics["skipped_nonfinite"] == 1 and metrics["skipped_empty"] == 0 and state.step == 1


def test_the_teacher_takes_no_gradient_and_is_left_as_it_was():
    update, lay, mesh = prepared()
    state, frozen, lesson = lay(make_lesson())
    with jax.set_mesh(mesh):
        update(state, frozen, lesson)
    assert_same(jax.device_get(frozen), trees()[1])
    microbatch = plan_microbatches(lesson, B, (64, 64))[0]

    def loss(student, frozen):
        hidden = align(teach(frozen, microbatch.teacher_BT, model=MODEL), microbatch.shift_B, 64)
        return microbatch_loss(student, frozen, hidden, microbatch, make_config(), MODEL, mesh)[0]

    own, other = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICK)(*trees())
    assert optax.tree.norm(own) > 0 and optax.tree.norm(other) == 0


# --- the optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("from_zero", [False, True])
def test_the_rate_warms_up_from_its_first_part_or_from_zero(from_zero):
    tx = make_optimizer(make_config(warmup_from_zero=from_zero, eps=1e-20))
    params, grads = {"w": jnp.zeros(3)}, {"w": jnp.array([1e-3, -2e-3, 3e-3])}
    state, rates = tx.init(params), []  # under a constant gradient, AdamW moves by its rate
    for _ in range(WARMUP + 2):
        with jax.numpy_dtype_promotion("standard"):
            updates, state = tx.update(grads, state, params)
        rates.append(-np.asarray(updates["w"]) * np.sign(grads["w"]))
    first = 0 if from_zero else 1
    wanted = [[LR * min(1, (k + first) / WARMUP)] * 3 for k in range(WARMUP + 2)]
    np.testing.assert_allclose(rates, wanted, rtol=1e-4)


def test_the_gradient_is_clipped_to_the_norm_before_adam_sees_it():
    state, metrics, _ = plain()
    assert metrics["grad_norm"] > 0.05
    adam = state.opt_state[1][1][0]
    assert float(optax.tree.norm(adam.mu)) == pytest.approx(0.1 * 0.05, rel=1e-5)


# --- the run's own rollouts --------------------------------------------------------------------------


def test_on_policy_rollouts_have_ratio_one():
    mesh = prepared()[2]
    lesson = make_lesson()
    engine = Engine(MODEL, mesh, Limits(R, P), Sampling(TEMPERATURE, stop_ids=(1, 2, 3, 4)))
    requests = [Request(ids, row) for row, ids in enumerate(lesson.prompts)]
    with jax.set_mesh(mesh):
        rollout = engine.generate(trees()[0], requests, jax.random.key(0))
    weight_BR = (np.arange(R) < rollout.length_B[:, None]).astype(np.float32)
    assert 0 < weight_BR.mean() < 1
    lesson = make_lesson(
        response_BR=rollout.tokens_BR,
        sampler_logp_BR=rollout.logp_BR,
        weight_BR=weight_BR,
    )
    metrics = step(lesson)[1]
    assert abs(metrics["ratio"] - 1) < 1e-5 and metrics["logp_gap"] < 1e-5
    assert metrics["active_tokens"] == rollout.length_B.sum()


def test_the_student_is_compiled_once_for_teachers_of_several_widths():
    lesson = make_lesson()
    teacher_prompts = [ids * (1 + 20 * (row % 2)) for row, ids in enumerate(lesson.teacher_prompts)]
    lesson = replace(lesson, teacher_prompts=teacher_prompts)
    update, lay, mesh = prepared(device_rows=4)
    update.learn.clear_cache()
    with jax.set_mesh(mesh), quickly(True):
        update(*lay(lesson))
    widths = {batch.teacher_BT.shape[1] for batch in plan_microbatches(lesson, 4, update.longest)}
    assert len(widths) > 1 and update.learn._cache_size() == 1


def test_lessons_of_like_lengths_are_compiled_once_and_the_state_goes_on():
    update, lay, mesh = prepared()
    state, frozen, _ = lay(make_lesson())
    with jax.set_mesh(mesh):
        for lesson in (
            make_lesson(),
            make_lesson(1),
            make_lesson(weight_BR=np.zeros((B, R), np.float32)),
            make_lesson(2),
        ):
            state, metrics, _ = update(state, frozen, lay(lesson)[2])
    for function in (update.teach, update.learn, update.apply):
        assert function._cache_size() <= 1  # 0: pushed out of the cache that all of JAX shares
    assert state.step == 4 and metrics["active_tokens"] > 0
    assert state.opt_state[1][1][0].count == 3
