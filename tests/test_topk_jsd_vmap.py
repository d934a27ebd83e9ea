"""The loss under jax.vmap: a batch of row sets equals a loop over them, in one kernel call a trip."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu import core as mosaic_gpu_core
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.interpreters import mlir
from jax.sharding import AxisType

from rosd_jax.kernels.topk_jsd import (
    Sharding,
    pallas_gpu,
    pallas_tpu,
    topk_jsd_from_logits,
    topk_jsd_loss,
    topk_jsd_rows,
)
from support import nightly_but

SETS, N, D, V = 3, 6, 8, 40
OPTIONS = {"k": 7, "ratio_cap": 1.5}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}

if jax.__version_info__ < (0, 11):
    # The GPU interpreter binds layout casts, which have no rule for the CPU: here they are the identity.
    mlir.register_lowering(mosaic_gpu_core.layout_cast_p, lambda ctx, x, **_: [x], platform="cpu")


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(pallas_tpu, "row_terms", partial(pallas_tpu.row_terms, interpret=True))
    on_gpu = partial(pallas_gpu.row_terms, interpret=InterpretGPUParams())
    monkeypatch.setattr(pallas_gpu, "row_terms", on_gpu)


def operands(*sets):
    """Student hidden and head, teacher hidden and head, weights, tokens, log-probs; `sets` axes first.

    Two in five weights are 0, and all of the first set's.
    """
    rng = np.random.default_rng(0)
    shapes = (N, D), (V, D), (N, D), (V, D)
    models = [jnp.asarray(rng.normal(size=(*sets, *shape)), jnp.float32) for shape in shapes]
    weight = np.where(np.arange(N) % 5 < 2, 0, rng.random((*sets, N)))
    weight[(0,) * len(sets)] = 0
    tokens, sampler_logp = rng.integers(0, V, (*sets, N)), -5 * rng.random((*sets, N))
    return *models, jnp.float32(weight), jnp.int32(tokens), jnp.float32(sampler_logp)


def from_hidden(*args, **options):
    """((loss, aux), gradients in the student's hidden states and head)."""

    def loss(student_hidden, student_head):
        rows = {"tokens_N": args[5], "sampler_logp_N": args[6]}
        return topk_jsd_loss(student_hidden, student_head, *args[2:5], chunk=2, **rows, **OPTIONS, **options)

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(*args[:2])


def from_logits(student, teacher, weight, tokens, sampler_logp, **options):
    rows = {"tokens_N": tokens, "sampler_logp_N": sampler_logp}

    def loss(student):
        return topk_jsd_from_logits(student, teacher, weight, **rows, **OPTIONS, **options)

    return jax.value_and_grad(loss, has_aux=True)(student)


def bare_rows(student, teacher, weight, tokens, sampler_logp, **options):
    rows = {"tokens_N": tokens, "sampler_logp_N": sampler_logp}
    return topk_jsd_rows(student, teacher, weight, **rows, **OPTIONS, **options)


def logits(*sets):
    student, student_head, teacher, teacher_head, *rows = operands(*sets)
    product = partial(jnp.einsum, "...nd,...vd->...nv", precision="highest")
    return product(student, student_head), product(teacher, teacher_head), *rows


def assert_is_a_loop(function, args, in_axes):
    """vmap gives what a loop over the sets gives; chunks_run is the most of all sets."""
    args = [x if axis == 0 else x[1] for x, axis in zip(args, in_axes, strict=True)]
    found = jax.jit(jax.vmap(function, in_axes), compiler_options=QUICK)(*args)
    one = jax.jit(function, compiler_options=QUICK)
    alone = [
        one(*[x[i] if axis == 0 else x for x, axis in zip(args, in_axes, strict=True)]) for i in range(SETS)
    ]
    wanted = jax.tree.map(lambda *parts: jnp.stack(parts), *alone)
    (loss, aux), grads = found
    (wanted_loss, wanted_aux), wanted_grads = wanted
    if aux.chunks_run is not None:
        assert (aux.chunks_run == wanted_aux.chunks_run.max()).all()
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)

    def strip(aux):
        return aux._replace(chunks_run=None)

    jax.tree.map(close, (loss, strip(aux), grads), (wanted_loss, strip(wanted_aux), wanted_grads))
    assert np.abs(loss).max() > 0.01 and np.abs(jax.tree.leaves(grads)[0]).max() > 1e-3


# ---- values --------------------------------------------------------------------------------------

ALL = (0,) * 7
SHARED_HEADS = (0, None, 0, None, 0, 0, 0)
SHARED_MASK = (0, None, 0, None, None, 0, None)
ONE_STUDENT_HEAD_A_SET = (None, 0, None, None, None, None, None)
WEIGHTS = (None, None, None, None, 0, None, None)
HIDDEN_CASES = [
    *(("xla", axes) for axes in (ALL, SHARED_HEADS, SHARED_MASK, ONE_STUDENT_HEAD_A_SET, WEIGHTS)),
    ("pallas_tpu", ALL),
    ("reference", SHARED_HEADS),
]


@pytest.mark.parametrize(("implementation", "in_axes"), nightly_but(HIDDEN_CASES, keep=[2, 5]), ids=str)
def test_of_hidden_states_is_a_loop(implementation, in_axes, interpreted):
    assert_is_a_loop(partial(from_hidden, implementation=implementation), operands(SETS), in_axes)


# The GPU interpreter cannot run in the loop over chunks of a batch, so its kernel is checked on logits.
LOGIT_CASES = [
    (from_logits, (0,) * 5),
    (from_logits, (0, None, None, None, None)),
    (bare_rows, (None, None, 0, 0, 0)),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "in_axes"),
    nightly_but(LOGIT_CASES, keep=[1]),
    ids=lambda x: getattr(x, "__name__", str(x)),
)
@pytest.mark.parametrize("implementation", ["xla", "pallas_tpu", "pallas_gpu"])
def test_of_logits_is_a_loop(implementation, function, in_axes, interpreted):
    assert_is_a_loop(partial(function, implementation=implementation), logits(SETS), in_axes)


@pytest.mark.nightly
def test_nested_vmaps_are_nested_loops():
    args = operands(SETS, 2)
    heads = (0, None, 0, None, 0, 0, 0)  # of the outer batch only
    args = [x if axis == 0 else x[:, 0] for x, axis in zip(args, heads, strict=True)]
    assert_is_a_loop(jax.vmap(from_hidden, heads), args, ALL)


@pytest.mark.slow
@pytest.mark.parametrize("implementation", nightly_but(["pallas_tpu", "pallas_gpu"], keep=[1]))
def test_nested_vmaps_of_a_kernel_are_nested_loops(implementation, interpreted):
    function = partial(bare_rows, implementation=implementation)
    assert_is_a_loop(jax.vmap(function), logits(SETS, 2), (0,) * 5)


def test_the_gradient_of_a_batch_is_the_sum_of_its_sets():
    student, head, teacher, teacher_head, weight, *_ = operands(SETS)
    scale = jnp.arange(1.0, 1 + SETS)

    def of_set(student, head, teacher, weight, **options):
        return topk_jsd_loss(student, head, teacher, teacher_head[0], weight, k=7, **options)[0]

    def total(student, head):
        losses = jax.vmap(partial(of_set, chunk=2), (0, None, 0, 0))(student, head, teacher, weight)
        return losses @ scale

    grads = jax.jit(jax.grad(total, argnums=(0, 1)), compiler_options=QUICK)(student, head[0])
    plain = jax.grad(partial(of_set, implementation="reference"), argnums=(0, 1))
    plain = jax.jit(plain, compiler_options=QUICK)
    sets = [plain(student[i], head[0], teacher[i], weight[i]) for i in range(SETS)]
    hidden_grads, head_grads = (jnp.stack(parts) for parts in zip(*sets, strict=True))
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    close(grads[0], scale[:, None, None] * hidden_grads)
    close(grads[1], jnp.einsum("s,svd->vd", scale, head_grads))


@pytest.mark.parametrize("vocab", nightly_but([None, "y"], keep=[1]))
def test_over_a_mesh_it_is_a_loop_too(vocab):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = Sharding(mesh, ("x",), vocab)
    assert_is_a_loop(partial(from_hidden, sharding=sharding), operands(SETS), SHARED_HEADS)


def test_an_empty_set_that_is_nan_stays_out_of_the_others():
    args = list(operands(SETS))
    run = jax.jit(jax.vmap(from_hidden), compiler_options=QUICK)
    clean = run(*args)
    args[0] = args[0].at[0].set(jnp.nan)
    spoilt = run(*args)
    jax.tree.map(np.testing.assert_array_equal, spoilt, clean)
    assert not np.isnan(clean[0][0]).any()


# ---- lowering ------------------------------------------------------------------------------------

TRANSFORMS = {
    "vmap": lambda loss, axes: jax.vmap(loss, axes),
    "vmap of vmap": lambda loss, axes: jax.vmap(jax.vmap(loss, axes), axes),
    "vmap of grad": lambda loss, axes: jax.vmap(jax.grad(loss, (0, 1)), axes),
    "grad of vmap": lambda loss, axes: jax.grad(lambda *args: jax.vmap(loss, axes)(*args).sum(), (0, 1)),
}


@pytest.mark.parametrize("transform", nightly_but(TRANSFORMS, keep=[1, 3]))
@pytest.mark.parametrize(
    ("platform", "implementation"),
    nightly_but([("cuda", None), ("cuda", "pallas_gpu"), ("tpu", None)], keep=[0, 2]),
    ids=str,
)
def test_lowers_with_the_rows_of_all_sets_in_one_kernel_call(
    platform, implementation, transform, monkeypatch
):
    if platform == "cuda":
        monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    sets = (2, SETS) if transform == "vmap of vmap" else (SETS,)

    def bf16(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    args = bf16(*sets, 64, 128), bf16(9088, 128), bf16(*sets, 64, 128), bf16(9088, 128)
    weight = jax.ShapeDtypeStruct((*sets, 64), jnp.float32)

    def loss(*args):
        return topk_jsd_loss(*args, k=100, chunk=32, implementation=implementation)[0]

    function = jax.jit(TRANSFORMS[transform](loss, (0, None, 0, None, 0)))
    text = function.trace(*args, weight).lower(lowering_platforms=(platform,)).as_text()
    call = "mosaic_gpu" if platform == "cuda" else "tpu_custom_call"
    kernels = [line for line in text.splitlines() if f"@{call}" in line]
    assert kernels and all(f"tensor<{np.prod(sets) * 32}x9088xf32>" in line for line in kernels)


@pytest.mark.parametrize("function", [from_logits, bare_rows])
def test_logits_lower_for_cuda(function):
    bf16, row = (partial(jax.ShapeDtypeStruct, dtype=dtype) for dtype in (jnp.bfloat16, jnp.float32))
    rows = row((8,)), jax.ShapeDtypeStruct((8,), jnp.int32), row((8,))
    run = jax.vmap(partial(function, implementation="pallas_gpu"), (0, None, None, None, None))
    traced = jax.jit(run).trace(bf16((SETS, 8, 9000)), bf16((8, 9000)), *rows)
    assert f"tensor<{SETS * 8}x9000xf32>" in traced.lower(lowering_platforms=("cuda",)).as_text()
