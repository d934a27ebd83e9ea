"""The GPU row kernel: its values in the Mosaic GPU interpreter, and its lowering for CUDA."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu import core as mosaic_gpu_core
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.interpreters import mlir

from rosd_jax.kernels.topk_jsd import reference, topk_jsd_from_logits, topk_jsd_loss
from rosd_jax.kernels.topk_jsd.pallas_gpu import TILE_TOKENS, row_terms
from rosd_jax.kernels.topk_jsd.records import Options, Rows
from support import nightly_but

V = 2 * TILE_TOKENS + 76  # two whole tiles and a ragged one

if jax.__version_info__ < (0, 11):
    # That interpreter binds layout casts, which have no rule for the CPU: here they are the identity.
    mlir.register_lowering(mosaic_gpu_core.layout_cast_p, lambda ctx, x, **_: [x], platform="cpu")

interpreted = partial(row_terms, interpret=InterpretGPUParams())


def logits(vocab=V, seed=0):
    """Rows: peaked, flat, tied, all equal, with -inf, best k in one lane, zeros of both signs, dead."""
    rng = np.random.default_rng(seed)
    student = 3 * rng.normal(size=(8, vocab))
    student[1] *= 0.1
    student[2] = np.round(student[2])
    student[3] = 1.5
    student[4, ::2] = -np.inf
    student[5, 7::TILE_TOKENS] += 40 if vocab > TILE_TOKENS else 0
    student[6] = np.where(np.abs(student[6]) < 1.5, np.copysign(0.0, student[6]), -1.0)
    teacher = student + np.where(np.isfinite(student), 0.5 * rng.normal(size=student.shape), 0)
    student[7, 3] = np.nan
    return jnp.asarray(student, jnp.float32), jnp.asarray(teacher, jnp.float32)


def rows_of(n_rows, vocab=V, seed=0):
    rng = np.random.default_rng(seed)
    tokens = jnp.asarray(1 + 2 * rng.integers(0, vocab // 4, n_rows), jnp.int32)
    floats = (jnp.asarray(x, jnp.float32) for x in (0.1 + rng.random(n_rows), -20 * rng.random(n_rows)))
    weight, sampler_logp = floats
    return Rows(weight, tokens, sampler_logp), jnp.arange(n_rows) != 7


def oracle(options, student, teacher, rows, live):
    """Aux and the gradient of the plain loss, in float64."""
    with jax.enable_x64(True):

        def wide(x):
            return None if x is None else jnp.asarray(np.asarray(x), jnp.float64)

        weight = jnp.where(np.asarray(live), wide(rows.weight_N), 0)
        tokens = None if rows.tokens_N is None else jnp.asarray(np.asarray(rows.tokens_N))
        wide_rows = Rows(weight, tokens, wide(rows.sampler_logp_N))

        def loss(student):
            return reference.loss_from_logits(options, student, wide(teacher), wide_rows)

        (_, aux), grad = jax.value_and_grad(loss, has_aux=True)(wide(student))
        return jax.tree.map(np.asarray, (aux, grad))


def assert_equals_oracle(options, student, teacher, rows, live):
    aux, grad = interpreted(options, student, teacher, rows, live, jnp.float32)
    wanted_aux, wanted_grad = oracle(options, student, teacher, rows, live)
    close = partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)
    jax.tree.map(close, aux, wanted_aux)
    for ours, wanted in zip(np.asarray(grad), wanted_grad, strict=True):
        close(ours, wanted, rtol=0, atol=3e-6 * np.abs(wanted).max() + 2e-7)


GRID = [
    {"alpha": 0.0},
    {"alpha": 1.0},
    {"alpha": 0.3, "k": 1},
    {"tail": "renorm"},
    {"tail": "renorm", "alpha": 1.0},
    {"k": None, "alpha": 0.3},
    {"k": V - 1},
    {"k": 7, "temperature": 0.5, "num_tokens": V - 90, "ratio_cap": 1.5},
    {"k": 40, "num_tokens": TILE_TOKENS - 5},
]


@pytest.mark.parametrize("case", nightly_but(GRID, keep=[4, 7]), ids=str)
def test_interpreted_kernel_equals_the_oracle(case):
    options = Options(**{"k": 20, **case})
    assert_equals_oracle(options, *logits(), *rows_of(8))


@pytest.mark.parametrize("vocab", nightly_but([5, TILE_TOKENS + 1], keep=[0]))
def test_any_vocabulary_size(vocab):
    assert_equals_oracle(Options(k=3, alpha=0.3), *logits(vocab), *rows_of(8, vocab))


def test_scores_of_minus_infinity_are_chosen_by_id_when_too_few_are_finite():
    student, teacher = logits()
    student = jnp.where(jnp.arange(V) % 300 == 5, student, -jnp.inf)
    assert_equals_oracle(Options(k=20), student, teacher, *rows_of(8))


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_a_nan_reaches_its_own_row_only(who, tail):
    student, teacher = logits()

    def spoil(x):
        return x.at[0, 700].set(jnp.nan).at[1].set(jnp.nan)

    student, teacher = (spoil(student), teacher) if who == "student" else (student, spoil(teacher))
    rows, live = rows_of(8)
    aux, grad = interpreted(Options(k=20, tail=tail), student, teacher, rows, live, jnp.float32)
    bad = np.arange(8) < 2
    np.testing.assert_array_equal(np.isnan(aux.divergence_N), bad)
    np.testing.assert_array_equal(np.isnan(grad).any(1), bad)
    np.testing.assert_array_equal(np.isnan(grad).all(1), bad)


def test_a_dead_row_gives_zeros_and_no_gradient_is_made_unasked():
    student, teacher = logits()
    rows, live = Rows(jnp.ones(8)), jnp.zeros(8, bool)
    aux, grad = interpreted(Options(k=None), student, teacher, rows, live, jnp.bfloat16)
    assert grad.dtype == jnp.bfloat16 and not np.asarray(grad, np.float32).any()
    assert aux.student_logp_N is None and not any(x.any() for x in jax.tree.leaves(aux))
    assert interpreted(Options(k=None), student, teacher, rows, live, None)[1] is None


# ---- lowering ------------------------------------------------------------------------------------


def lowered(options, grad_dtype, platform, vocab=151936):
    logits_CV = jax.ShapeDtypeStruct((1024, vocab), jnp.float32)
    float_C = jax.ShapeDtypeStruct((1024,), jnp.float32)
    rows = Rows(float_C, jax.ShapeDtypeStruct((1024,), jnp.int32), float_C)
    run = jax.jit(lambda *operands: row_terms(options, *operands, grad_dtype))
    traced = run.trace(logits_CV, logits_CV, rows, jax.ShapeDtypeStruct((1024,), jnp.bool_))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("grad_dtype", nightly_but([None, jnp.bfloat16, jnp.float32], keep=[1]))
@pytest.mark.parametrize(
    "case", [{}, {"tail": "renorm", "num_tokens": 151669, "ratio_cap": 2.0}, {"k": None}], ids=str
)
def test_lowers_for_cuda_at_qwen3s_vocabulary(case, grad_dtype):
    text = lowered(Options(**{"k": 100, **case}), grad_dtype, "cuda")
    assert "mosaic_gpu" in text and "tpu_custom_call" not in text


@pytest.mark.parametrize("vocab", [151938, 151937])
def test_lowers_where_rows_are_not_aligned_to_16_bytes(vocab):
    assert "mosaic_gpu" in lowered(Options(k=100), jnp.bfloat16, "cuda", vocab)


def test_the_whole_loss_lowers_for_cuda_from_hidden_states_and_from_narrow_logits():
    on_gpu = {"k": 100, "implementation": "pallas_gpu"}

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    def loss(*args):
        return topk_jsd_loss(*args, chunk=32, **on_gpu)

    whole = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    models, weight = (array(64, 128), array(9000, 128)) * 2, jax.ShapeDtypeStruct((64,), jnp.float32)
    by_logits = jax.jit(jax.grad(partial(topk_jsd_from_logits, **on_gpu), has_aux=True))
    for traced in (whole.trace(*models, weight), by_logits.trace(array(64, 9000), array(64, 9000), weight)):
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("capability, ours", [("9.0", True), ("8.0", False), (None, False)])
def test_is_the_default_on_hopper_gpus(capability, ours, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])

    def bf16(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    models, weight = (bf16(64, 128), bf16(9000, 128)) * 2, jax.ShapeDtypeStruct((64,), jnp.float32)
    traced = jax.jit(lambda *args: topk_jsd_loss(*args, chunk=32)[0]).trace(*models, weight)
    assert ("mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()) == ours


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_refuses_any_other_platform(platform):
    with pytest.raises(ValueError, match=f"needs a CUDA GPU, and this program is compiled for {platform}"):
        lowered(Options(k=100), None, platform)


def test_refuses_other_dtypes_and_shapes():
    rows, live = Rows(jnp.ones(2)), jnp.ones(2, bool)
    with pytest.raises(ValueError, match="this kernel takes float32"):
        row_terms(Options(), jnp.zeros((2, V), jnp.bfloat16), jnp.zeros((2, V)), rows, live, None)
    with pytest.raises(ValueError, match=r"both must be \[C, V\]"):
        row_terms(Options(), jnp.zeros((2, V)), jnp.zeros((2, 5)), rows, live, None)
