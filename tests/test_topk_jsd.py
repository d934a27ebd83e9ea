"""The loss kernel: every implementation computes the same numbers, and pays for live rows only."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from oracles.token_weights import aggregate_weights, importance_weights
from rosd_jax.kernels.topk_jsd import (
    sampled_token_loss_from_logits,
    topk_jsd_from_logits,
    topk_jsd_loss,
)
from rosd_jax.kernels.topk_jsd.selection import select_top_k
from support import nightly_but

N, D, V = 22, 8, 128
IMPLEMENTATIONS = ["reference", "xla"]


def operands(seed=0, n=N, d=D, v=V, dtype=np.float32, step=None, sharpness=1.0):
    """Student hidden and head, teacher hidden and head, weights (two in five 0), tokens, log-probs.

    With `step` the hidden states and heads are its multiples, so that many logits tie exactly.
    """
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return rng.normal(size=shape) * sharpness

    hidden, head = draw(n, d), draw(v, d)
    arrays = [hidden, head, hidden + 0.5 * draw(n, d), head + 0.1 * draw(v, d)]
    if step:
        arrays = [np.round(x / step) * step for x in arrays]
    weight = np.where(np.arange(n) % 5 < 2, 0.0, rng.random(n))
    tokens = rng.integers(0, v, n).astype(np.int32)
    to = partial(jnp.asarray, dtype=dtype)
    return *map(to, arrays), to(weight), tokens, to(-20 * rng.random(n))


def value_and_grads(*args, **options):
    def loss(student_hidden, student_head):
        return topk_jsd_loss(student_hidden, student_head, *args[2:5], **options)

    (value, aux), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*args[:2])
    return value, grads, aux


@partial(jax.jit, static_argnames=("k", "alpha", "tail", "chunk"))
def chunked(*args, k=20, alpha=0.5, tail="bucket", chunk=8):
    return value_and_grads(*args[:5], k=k, alpha=alpha, tail=tail, chunk=chunk)


def close(ours, wanted, rtol, atol=0.0):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), ours, wanted)


# ---- chunked equals reference --------------------------------------------------------------------

GRID = [
    {"alpha": 0.0},
    {"alpha": 0.3},
    {"alpha": 1.0},
    {"alpha": 0.0, "tail": "renorm"},
    {"alpha": 0.5, "tail": "renorm"},
    {"alpha": 1.0, "tail": "renorm"},
    {"alpha": 0.5, "k": None},
    {"alpha": 1.0, "k": None},
    {"alpha": 0.0, "sharpness": 6.0},
    {"alpha": 1.0, "sharpness": 6.0},
    {"alpha": 0.3, "step": 1.0},
    {"k": 1},
    {"k": 127, "step": 0.5, "chunk": 1},
    {"k": 128},
    {"k": 36, "v": 37, "chunk": 100, "tail": "renorm"},
    {"k": 7, "v": 300, "temperature": 0.7, "num_tokens": 290, "ratio_cap": 1.5},
]


@pytest.mark.parametrize(
    "options",
    nightly_but(GRID, keep=[1, 4, 6, 12, 15]),
    ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items()),
)
def test_chunked_equals_reference(options):
    shape = {key: value for key, value in options.items() if key in ("v", "step", "sharpness")}
    options = {"k": 20, "chunk": 8} | {k: v for k, v in options.items() if k not in shape}
    with jax.enable_x64(True):
        *args, tokens, sampler_logp = operands(dtype=np.float64, **shape)
        args[0] = args[0].at[0].set(jnp.nan)  # weight 0
        given = options | {"tokens_N": tokens, "sampler_logp_N": sampler_logp}

        @partial(jax.jit, static_argnums=0)
        def run(implementation, *args):
            return value_and_grads(*args, implementation=implementation, **given)

        wanted, wanted_grads, wanted_aux = run("reference", *args)
        ours, grads, aux = run("xla", *args)
    assert np.isfinite(wanted)
    close((ours, aux._replace(chunks_run=None)), (wanted, wanted_aux), 1e-9, 1e-13)
    close(grads, wanted_grads, 1e-8, 1e-11)


def test_float32_is_as_exact_as_float32_allows():
    args = operands()
    ours, grads, _ = chunked(*args)
    with jax.enable_x64(True):
        wide = (jnp.asarray(x, jnp.float64) for x in args[:5])
        run = jax.jit(partial(value_and_grads, k=20, implementation="reference"))
        wanted, wanted_grads, _ = run(*wide)
    close(ours, wanted, 1e-6)
    close(grads, wanted_grads, 1e-5, 1e-6)


def test_bfloat16_keeps_float32_logits_and_gives_gradients_in_the_operands_dtype():
    narrow = operands(dtype=jnp.bfloat16)
    exact = [x.astype(jnp.float32) for x in narrow[:5]]
    ours, grads, aux = chunked(*narrow)
    wanted, wanted_grads, _ = chunked(*exact)
    assert ours.dtype == aux.divergence_N.dtype == jnp.float32
    close(ours, wanted, 1e-6)
    for grad, exact_grad in zip(grads, wanted_grads, strict=True):
        assert grad.dtype == jnp.bfloat16
        error = np.linalg.norm(grad.astype(jnp.float32) - exact_grad)
        assert error < 5e-3 * np.linalg.norm(exact_grad)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradient_is_the_slope_of_the_loss(alpha):
    with jax.enable_x64(True):
        args = operands(dtype=np.float64)
        rng = np.random.default_rng(1)
        ways = [jnp.asarray(rng.normal(size=x.shape)) for x in args[:2]]
        options = {"k": 20, "alpha": alpha, "implementation": "reference"}
        _, grads, _ = value_and_grads(*args[:5], **options)

        def at(t):
            moved = [x + t * way for x, way in zip(args[:2], ways, strict=True)]
            return topk_jsd_loss(*moved, *args[2:5], **options)[0]

        slope = (at(1e-6) - at(-1e-6)) / 2e-6
        along = sum(jnp.sum(g * way) for g, way in zip(grads, ways, strict=True))
    np.testing.assert_allclose(along, slope, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_logits_and_hidden_states_agree_and_the_cotangent_scales(implementation):
    hidden, head, teacher_hidden, teacher_head, weight, *_ = operands()
    options = {"k": 20, "implementation": implementation}
    run = jax.jit(partial(value_and_grads, **options))
    loss, (hidden_grad, _), _ = run(hidden, head, teacher_hidden, teacher_head, weight)

    def thrice(hidden):
        student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
        return 3 * topk_jsd_from_logits(student, teacher, weight, **options)[0]

    tripled, tripled_grad = jax.jit(jax.value_and_grad(thrice))(hidden)
    close(tripled, 3 * loss, 1e-5)
    close(tripled_grad, 3 * hidden_grad, 1e-4, 1e-5)


# ---- the selection -------------------------------------------------------------------------------


def stable_top_k(scores, k):
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :k]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order, True, axis=-1)
    return chosen


@settings(max_examples=60, deadline=None)
@given(
    scores=hnp.arrays(
        np.float32,
        (3, 37),
        elements=st.sampled_from([-np.inf, -3e38, -7.5, -1.0, -0.0, 0.0, 1e-30, 1.0, 7.5, 3e38]),
    ),
    k=st.sampled_from([1, 7, 36]),
)
def test_selects_the_k_largest_ties_to_the_lowest_id(scores, k):
    chosen = select_top_k(jnp.asarray(scores), jnp.ones(3, bool), k)
    np.testing.assert_array_equal(chosen, stable_top_k(scores, k))


@pytest.mark.parametrize("scores", [np.zeros((2, 50)), np.arange(100.0).reshape(2, 50) % 7])
def test_selection_of_equal_scores_and_of_float64(scores):
    chosen, live = stable_top_k(scores, 10), jnp.ones(2, bool)
    narrow = select_top_k(jnp.asarray(scores, jnp.float32), live, 10)
    np.testing.assert_array_equal(narrow, chosen)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(select_top_k(jnp.asarray(scores), live, 10), chosen)


# ---- edges ---------------------------------------------------------------------------------------


def test_a_row_of_weight_zero_contributes_nothing_even_if_nan():
    args = list(operands())
    dead = np.flatnonzero(args[4] == 0)
    clean = chunked(*args)
    for i in (0, 2):
        args[i] = args[i].at[dead].set(jnp.nan)
    loss, grads, aux = chunked(*args)
    jax.tree.map(np.testing.assert_array_equal, (loss, grads), clean[:2])
    assert not grads[0][dead].any() and not aux.divergence_N[dead].any()


@pytest.mark.parametrize("who", [0, 2])
def test_a_live_nan_row_is_never_hidden(who):
    args = list(operands())
    args[who] = args[who].at[int(np.flatnonzero(args[4])[0])].set(jnp.nan)
    loss, _, aux = chunked(*args)
    assert np.isnan(loss) and np.isnan(aux.divergence_N).sum() == 1


def test_an_empty_mask_gives_zeros_and_runs_nothing():
    args = list(operands())
    args[4] = jnp.zeros_like(args[4])
    loss, grads, aux = chunked(*args)
    assert loss == 0 and not any(grad.any() for grad in grads) and aux.chunks_run == 0


INFINITE_LOGITS = [
    # alpha, who holds the -inf, whether the divergence is finite
    (0.0, "teacher", True),
    (0.5, "teacher", True),
    (1.0, "student", True),
    (0.5, "student", True),
    (0.0, "both", True),
    (0.5, "both", True),
    (1.0, "both", True),
    (0.0, "student", False),
    (1.0, "teacher", False),
]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("alpha", "who", "finite"), INFINITE_LOGITS)
@pytest.mark.parametrize("k", nightly_but([None, 6], keep=[1]))
def test_minus_infinite_logits(alpha, who, finite, k, implementation):
    rng = np.random.default_rng(3)
    student, teacher = (jnp.asarray(rng.normal(size=(2, 12)), jnp.float32) for _ in range(2))
    student = student.at[:, 4].set(9.0)  # in every top-k
    if who in ("student", "both"):
        # Nine of twelve, so that -inf also enters the six largest.
        student = student.at[:, :9].set(-jnp.inf)
    if who in ("teacher", "both"):
        teacher = teacher.at[:, :9].set(-jnp.inf)

    def loss(student):
        return topk_jsd_from_logits(
            student, teacher, jnp.ones(2), k=k, alpha=alpha, implementation=implementation
        )

    (value, aux), grad = jax.value_and_grad(loss, has_aux=True)(student)
    assert np.isfinite(value) == finite and not np.isnan(value)
    if finite:
        assert np.isfinite(grad).all() and (grad[student == -jnp.inf] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_an_empty_tail_is_clamped_and_passes_no_gradient(implementation):
    student = jnp.array([[80.0, 79.0, 0.0, 0.0]])
    teacher = jnp.array([[1.0, 2.0, 3.0, 4.0]])

    def loss(z):
        return topk_jsd_from_logits(z, teacher, jnp.ones(1), k=2, alpha=0.0, implementation=implementation)

    (value, _), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(student)
    q = np.array([1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1)), 1e-7])
    r = np.exp(np.array([1.0, 2.0])) / np.exp(np.arange(1.0, 5.0)).sum()
    r = np.append(r, 1 - r.sum())
    np.testing.assert_allclose(value, np.sum(r * np.log(r / q)), rtol=1e-6)
    np.testing.assert_allclose(grad[0, :2], q[:2] * r[:2].sum() - r[:2], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_loss_lies_in_0_ln2_is_0_for_equals_and_grows_to_the_full_divergence(implementation):
    hidden, head, teacher_hidden, teacher_head, _, *_ = operands(sharpness=2.0)
    student, teacher = hidden @ head.T, teacher_hidden @ teacher_head.T
    run = partial(topk_jsd_from_logits, implementation=implementation)
    rows = {k: run(student, teacher, jnp.ones(N), k=k)[1].divergence_N for k in (1, 30, 127, None)}
    for fewer, more in ((1, 30), (30, 127), (127, None)):
        assert (rows[more] >= rows[fewer] - 1e-6).all()
    assert (rows[1] >= -1e-7).all() and (rows[None] <= np.log(2) + 1e-6).all()
    np.testing.assert_allclose(rows[127], rows[None], atol=1e-5)
    assert run(student, student, jnp.ones(N), k=30)[0] < 1e-6


def test_teacher_receives_no_gradient_not_even_as_the_same_array():
    args = operands()
    teacher_grads = jax.grad(
        lambda hidden, head: topk_jsd_loss(*args[:2], hidden, head, args[4])[0], argnums=(0, 1)
    )(*args[2:4])
    assert not any(grad.any() for grad in teacher_grads)
    shared = jax.grad(lambda w: topk_jsd_loss(args[0], w, args[2], w, args[4])[0])(args[1])
    apart = jax.grad(lambda w: topk_jsd_loss(args[0], w, args[2], args[1], args[4])[0])(args[1])
    np.testing.assert_array_equal(shared, apart)


def test_without_a_tail_bucket_lost_mass_goes_unseen():
    """A student that agrees within its top k and leaks half of its mass: why "bucket" is default."""
    teacher = jnp.where(jnp.arange(200) < 10, 8.0 + jnp.arange(200.0) / 10, 0.0)[None]
    leaking = teacher.at[:, 10:].add(5.5)

    def descend(tail, steps=300):
        def loss(z):
            return topk_jsd_from_logits(z, teacher, jnp.ones(1), k=10, alpha=1.0, tail=tail)

        step = jax.jit(lambda z: z - 2.0 * jax.grad(loss, has_aux=True)(z)[0])
        first, aux = loss(leaking)
        end = leaking
        for _ in range(steps):
            end = step(end)
        return first, aux.student_mass_N, loss(end)[1].student_mass_N

    blind, mass, unmoved = descend("renorm")
    assert mass < 0.6 and blind < 1e-6 and abs(unmoved - mass) < 1e-3
    seen, _, restored = descend("bucket")
    assert seen > 0.3 and restored > 0.95


# ---- ratios and weights --------------------------------------------------------------------------


def test_the_loss_weighs_rows_by_the_capped_ratio_without_gradient():
    *args, tokens, sampler_logp = operands()
    logp = jax.nn.log_softmax(args[0] @ args[1].T)[np.arange(N), tokens]
    ratio = np.minimum(np.exp(np.clip(logp - sampler_logp, -20, 20)), 1.5)
    given = {"tokens_N": tokens, "sampler_logp_N": sampler_logp}
    run = partial(topk_jsd_loss, k=20, ratio_cap=1.5, chunk=8, **given)
    value, aux = run(*args)
    live = np.asarray(args[4] != 0)
    close((aux.student_logp_N[live], aux.ratio_N[live]), (logp[live], ratio[live]), 1e-5)
    assert not aux.ratio_N[~live].any() and (aux.ratio_N[live] == 1.5).any()
    grad = jax.grad(lambda w: run(args[0], w, *args[2:])[0])(args[1])
    wanted, (_, wanted_grad), _ = chunked(*args[:4], args[4] * ratio)
    close((value, grad), (wanted, wanted_grad), 1e-5, 1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_log_ratios_are_clipped_to_20_either_way(implementation):
    equal = jnp.zeros((4, 8))
    tokens = jnp.zeros(4, jnp.int32)
    sampler_logp = -np.log(8) - jnp.array([-30.0, -3.0, 3.0, 30.0])
    options = {"k": 3, "ratio_cap": 1e12, "implementation": implementation}
    run = jax.jit(partial(topk_jsd_from_logits, **options))
    _, aux = run(equal, equal, jnp.ones(4), tokens_N=tokens, sampler_logp_N=sampler_logp)
    np.testing.assert_allclose(aux.ratio_N, np.exp([-20.0, -3.0, 3.0, 20.0]), rtol=1e-5)


def test_sampled_token_gradient_averages_to_that_of_the_reverse_kl():
    rng = np.random.default_rng(0)
    student, teacher = (jnp.asarray(rng.normal(size=(1, 5)), jnp.float32) for _ in range(2))
    every = jnp.arange(5, dtype=jnp.int32)
    probs = jax.nn.softmax(student)[0]

    def spread(z):
        return jnp.broadcast_to(z, (5, 5))

    sampled = jax.grad(lambda z: sampled_token_loss_from_logits(spread(z), spread(teacher), every, probs)[0])(
        student
    )
    exact = jax.grad(lambda z: topk_jsd_from_logits(z, teacher, jnp.ones(1), k=None, alpha=1.0)[0])(student)
    np.testing.assert_allclose(sampled, exact, atol=1e-6)


def test_weights_of_an_empty_mask_are_zero_in_every_mode():
    mask = jnp.zeros((2, 3))
    for mode in (
        "token-mean",
        "seq-mean-token-sum",
        "seq-mean-token-mean",
        "seq-mean-token-sum-norm",
    ):
        assert not aggregate_weights(mask, mode).any()
    for level in ("token", "sequence"):
        assert not importance_weights(mask, mask + 1, mask, level=level, cap=2.0, batch_normalize=True).any()


# ---- cost ----------------------------------------------------------------------------------------


def test_trips_follow_the_live_rows():
    args = list(operands(n=50))
    for live in (0, 1, 8, 9, 16, 50):
        args[4] = jnp.asarray(np.random.default_rng(live).permutation(np.arange(50) < live) * 1.0)
        assert chunked(*args)[2].chunks_run == -(-live // 8)


def sizes_in_jaxpr(jaxpr):
    for eqn in jaxpr.eqns:
        yield from (var.aval.size for var in eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from sizes_in_jaxpr(inner)


@pytest.mark.optimized
def test_no_array_is_larger_than_one_chunk_of_logits():
    args = operands(n=96, v=300)
    run = partial(value_and_grads, k=20, chunk=16, implementation="xla")
    largest = 16 * 300
    assert max(sizes_in_jaxpr(jax.make_jaxpr(run)(*args[:5]).jaxpr)) == largest
    text = jax.jit(run).lower(*args[:5]).compile().as_text()
    shapes = re.findall(r"(?:f32|bf16|s32|u32|pred)\[([\d,]+)\]", text)
    # XLA may pad the columns of a block.
    assert max(np.prod([int(n) for n in shape.split(",")]) for shape in shapes) < 1.1 * largest


def count_matmuls(function, *args):
    return len(re.findall(r" dot\(", jax.jit(function).lower(*args).compile().as_text()))


@pytest.mark.optimized
def test_matmuls_two_for_the_value_three_for_a_frozen_head_four_in_all():
    args = operands()[:5]

    def loss(*args):
        return topk_jsd_loss(*args, k=20, chunk=8)[0]

    assert count_matmuls(loss, *args) == 2
    assert count_matmuls(jax.grad(loss), *args) == 3
    assert count_matmuls(jax.grad(loss, argnums=(0, 1)), *args) == 4


# ---- composition ---------------------------------------------------------------------------------


def test_in_a_scan_the_parts_sum_to_the_whole():
    args = operands(n=24)
    loss, (_, head_grad), _ = chunked(*args)
    parts = [args[i].reshape(4, 6, *args[i].shape[1:]) for i in (0, 2, 4)]

    def body(total, part):
        student, teacher, weight = part
        value, grads, _ = chunked(student, args[1], teacher, args[3], weight, chunk=4)
        return jax.tree.map(jnp.add, total, (value, grads[1])), None

    start = (jnp.float32(0), jnp.zeros_like(head_grad))
    close(jax.jit(lambda: jax.lax.scan(body, start, parts))()[0], (loss, head_grad), 1e-5, 1e-6)


@pytest.mark.parametrize("head_axes", [("tensor", None), (None, "data")])
def test_eight_devices_equal_one(head_axes):
    args = operands(n=32)[:5]
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def put(x, *axes):
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    row, head = ("data", None), head_axes
    sharded = [put(x, *axes) for x, axes in zip(args, (row, head, row, head, ("data",)), strict=True)]
    ours, wanted = chunked(*sharded), chunked(*args)
    assert ours[2].chunks_run == wanted[2].chunks_run
    close(ours, wanted, 1e-5, 1e-6)


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = [
    ({"k": 0}, "k is 0"),
    ({"alpha": 1.5}, "alpha is 1.5"),
    ({"tail": "none"}, "tail is 'none'"),
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"chunk": 0}, "chunk is 0"),
    ({"num_tokens": V + 1}, f"num_tokens is {V + 1}"),
    ({"ratio_cap": 2.0}, "ratio_cap is 2.0; it must come with tokens_N"),
    ({"implementation": "fast"}, "implementation is 'fast'"),
    ({"tokens_N": jnp.zeros(3, jnp.int32)}, "tokens_N has shape"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES, ids=lambda x: str(x)[:20])
def test_a_mistake_is_named(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        topk_jsd_loss(*operands()[:5], **options)


def test_operands_that_do_not_fit_are_named():
    hidden, head, teacher_hidden, teacher_head, weight, *_ = operands()
    with pytest.raises(ValueError, match="dtypes agree"):
        topk_jsd_loss(hidden.astype(jnp.bfloat16), head, teacher_hidden, teacher_head, weight)
    with pytest.raises(ValueError, match="share one vocabulary"):
        topk_jsd_loss(hidden, head, teacher_hidden, teacher_head[:-1], weight)
    with pytest.raises(ValueError, match="weight_N has shape"):
        topk_jsd_loss(hidden, head, teacher_hidden, teacher_head, weight[:-1])
