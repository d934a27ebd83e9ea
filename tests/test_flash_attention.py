"""Attention without T x T scores: values and gradients, and what the programs hold."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosd_jax.kernels.flash_attention import causal_attention, gpu, reference, tpu, xla
from support import nightly_but

HEADS = [(32, 8), (9, 3), (16, 8)]
LONG = 18 * 1024


def operands(T, heads=(4, 2), E=64, rows=1, dtype=np.float64):
    """q, k, v and a cotangent."""
    rng = np.random.default_rng(0)
    H, K = heads
    return [rng.normal(size=(rows, T, n, E)).astype(dtype) for n in (H, K, K, H)]


def numpy_attention(q, k, v):
    """The definition in float64 NumPy, a loop over rows and heads."""
    out = np.zeros_like(q)
    group = q.shape[2] // k.shape[2]
    for b, h in np.ndindex(q.shape[0], q.shape[2]):
        scores = q[b, :, h] @ k[b, :, h // group].T / np.sqrt(q.shape[3])
        scores = np.where(np.tril(np.ones_like(scores)) > 0, scores, -np.inf)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        out[b, :, h] = weights / weights.sum(axis=1, keepdims=True) @ v[b, :, h // group]
    return out


def results(attend, q, k, v, cotangent):
    """The output and the three gradients, as float64."""

    @jax.jit
    def run(q, k, v, cotangent):
        out, back = jax.vjp(attend, q, k, v)
        return out, *back(cotangent)

    return [np.asarray(x, np.float64) for x in run(*map(jnp.asarray, (q, k, v, cotangent)))]


def errors(found, right):
    """Relative to the norm; absolute where a gradient is zero, as the scores' is of a single position."""
    return [np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0) for a, b in zip(found, right, strict=True)]


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("T", [1, 5, 257])
def test_the_reference_is_the_definition(double, T):
    q, k, v, _ = operands(T, (6, 2), 8, rows=2)
    found = reference.attend(*map(jnp.asarray, (q, k, v)))
    np.testing.assert_allclose(found, numpy_attention(q, k, v), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T", nightly_but([1, 256, 257, 700, 1025, 2100], keep=[0, 3]))
def test_blocks_of_queries_agree_in_float64(double, T):
    given = operands(T, (6, 2), 16, rows=2 if T < 1000 else 1)
    assert max(errors(results(xla.attend, *given), results(reference.attend, *given))) < 1e-13


@pytest.mark.parametrize("E", [64, 128])
@pytest.mark.parametrize("heads", nightly_but(zip(HEADS), keep=[1]))
def test_float32_takes_blocks_of_queries_and_agrees_with_float64(double, heads, E):
    given = operands(385, heads, E)
    narrow = [x.astype(np.float32) for x in given]
    right = results(reference.attend, *given)
    assert max(errors(results(causal_attention, *narrow), right)) < 2e-6


@pytest.mark.parametrize("attend", [xla.attend, partial(tpu.attend, interpret=True)], ids=["xla", "splash"])
@pytest.mark.parametrize(
    "heads, E, T",
    nightly_but([((4, 2), 64, 257), ((9, 3), 128, 130), ((4, 2), 128, 1), ((2, 2), 64, 600)], keep=[0, 1]),
)
def test_bfloat16_is_as_exact_as_whole_scores_in_bfloat16(attend, heads, E, T):
    given = operands(T, heads, E, dtype=np.float32)
    right = results(reference.attend, *given)
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in given]
    found, whole = (errors(results(f, *narrow), right) for f in (attend, reference.attend))
    assert max(found) < 6e-3
    if T > 1:  # a single position's scores have no gradient
        assert all(a <= 1.5 * b for a, b in zip(found, whole, strict=True))


@pytest.mark.parametrize("attend", [xla.attend, partial(tpu.attend, interpret=True)], ids=["xla", "splash"])
def test_padding_behind_a_row_changes_nothing_before_it(attend):
    q, k, v, _ = (jnp.asarray(x, jnp.bfloat16) for x in operands(300, rows=2))
    whole = attend(q, k, v)
    spoiled = attend(*(x.at[:, 170:].set(1e4) for x in (q, k, v)))
    np.testing.assert_array_equal(whole[:, :170], spoiled[:, :170])


def lowered(platform, T, dtype):
    """The program of output and gradients at the real length, for one row of Qwen3's heads."""

    def array(heads):
        return jax.ShapeDtypeStruct((1, T, heads, 128), dtype)

    def run(q, k, v):
        out, back = jax.vjp(causal_attention, q, k, v)
        return back(out)

    traced = jax.jit(run).trace(array(32), array(8), array(8))
    return traced.lower(lowering_platforms=(platform,)).as_text()


def square(text, T):
    """Shapes of the program with two axes of T or more."""
    shapes = {m[1] for m in re.finditer(r"tensor<((?:\d+x)+)\w+>", text)}
    return [shape for shape in shapes if sum(int(n) >= T for n in shape.split("x")[:-1]) > 1]


@pytest.mark.parametrize("platform", ["cpu", "tpu", "cuda"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_no_program_holds_an_array_of_the_length_squared(platform, dtype):
    text = lowered(platform, LONG, dtype)
    assert not square(text, LONG)
    assert ("splash" in text) == (platform == "tpu" and dtype == jnp.bfloat16)
    whole = partial(jax.jit(reference.attend).lower, *[jnp.zeros((1, 300, 2, 8))] * 3)
    assert square(whole().as_text(), 300), "the check finds what it looks for"


@pytest.mark.optimized
def test_the_compiled_program_for_cpu_needs_no_memory_of_the_length_squared():
    array = jax.ShapeDtypeStruct((1, LONG, 2, 64), jnp.float32)
    gradient = jax.grad(lambda q, k, v: causal_attention(q, k, v).sum(), (0, 1, 2))
    memory = jax.jit(gradient).lower(array, array, array).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2 * LONG**2  # float32 scores of two heads take 8 LONG^2


def test_a_gpu_from_ampere_on_takes_cudnn_for_bfloat16(monkeypatch):
    """cuDNN is asked for in the program; whether it is there is for the machine with the GPU to say."""
    asked = []
    monkeypatch.setattr(gpu, "attend", lambda q, k, v: asked.append(q.dtype) or jnp.zeros_like(q))
    device = type("Device", (), {})
    for capability, heads_E, takes in [
        ("9.0", 128, 1),
        ("8.0", 64, 1),
        ("7.5", 64, 0),
        (None, 64, 0),
        ("9.0", 100, 0),
    ]:
        device.compute_capability = capability
        monkeypatch.setattr(jax, "devices", lambda: [device])
        q = jnp.zeros((1, 4, 2, heads_E), jnp.bfloat16)
        assert gpu.fits(q) == bool(takes)


@pytest.mark.parametrize(
    "shapes, dtype, implementation, message",
    [
        (((1, 4, 4, 8), (1, 4, 3, 8), (1, 4, 3, 8)), "float32", None, "do not fit"),
        (((1, 4, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8)), "float32", None, "do not fit"),
        (((4, 4, 8), (4, 2, 8), (4, 2, 8)), "float32", None, "do not fit"),
        (((1, 4, 4, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "float32", "splash_tpu", "takes bfloat16"),
        (((1, 4, 4, 8), (1, 4, 2, 8), (1, 4, 2, 8)), "float32", "magic", "'magic', not one of xla"),
    ],
)
def test_mistakes_are_named(shapes, dtype, implementation, message):
    with pytest.raises(ValueError, match=message):
        causal_attention(*(jnp.zeros(shape, dtype) for shape in shapes), implementation=implementation)


def test_mixed_types_are_refused():
    q = jnp.zeros((1, 4, 2, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match="of one dtype, not bfloat16, float32, float32"):
        causal_attention(q, q.astype(jnp.float32), q.astype(jnp.float32))
