"""The TPU row kernel, interpreted on CPU: the numbers of the reference, short way and long way."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from benchmarks.topk_jsd_tpu import TRIPS
from rosd_jax.kernels.topk_jsd import pallas_tpu, rows, topk_jsd_from_logits, topk_jsd_loss, topk_jsd_rows
from rosd_jax.kernels.topk_jsd.records import Options, Rows
from support import nightly_but

LONG = pallas_tpu.STATS.index("long")
BINNED = 6200  # wide enough that k = 20 goes through the bins


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    monkeypatch.setattr(rows.pallas_tpu, "row_terms", partial(pallas_tpu.row_terms, interpret=True))


def logits(vocab, seed=0, size=12, step=None, sharpness=2.0):
    """Student and teacher logits, weights (a quarter 0), tokens, log-probs at sampling time."""
    rng = np.random.default_rng(seed)
    student = rng.normal(size=(size, vocab)) * sharpness
    teacher = student + rng.normal(size=student.shape) * 0.5
    if step:
        student = np.round(student / step) * step
    weight = np.where(np.arange(size) % 4 == 3, 0.0, rng.random(size))
    tokens = rng.integers(0, vocab, size).astype(np.int32)
    return *(jnp.asarray(x, jnp.float32) for x in (student, teacher, weight)), tokens, -9 * rng.random(size)


@cache
def compiled(grad_dtype, **options):
    """The kernel and the reference, each ((loss, aux), grad), compiled once for all of a shape."""

    def kernel(student, teacher, weight, **given):
        return topk_jsd_rows(
            student, teacher, weight, implementation="pallas_tpu", grad_dtype=grad_dtype, **given, **options
        )

    def reference(student, teacher, weight, **given):
        def loss(z):
            return topk_jsd_from_logits(z, teacher, weight, implementation="reference", **given, **options)

        return jax.value_and_grad(loss, has_aux=True)(student)

    return jax.jit(kernel), jax.jit(reference)


def both(args, grad_dtype=None, **options):
    """((loss, aux), grad) by the kernel, and by the reference in float64."""
    student, teacher, weight, tokens, sampler_logp = args
    kernel, reference = compiled(grad_dtype, **options)
    given = {"tokens_N": tokens, "sampler_logp_N": jnp.float32(sampler_logp)}
    ours = kernel(student, teacher, weight, **given)
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in (student, teacher, weight)]
        wanted = reference(*wide, **given)
    return jax.tree.map(np.asarray, (ours, wanted))


def check(ours, wanted, rtol=5e-6):
    (loss, aux), grad = ours
    (wanted_loss, wanted_aux), wanted_grad = wanted
    np.testing.assert_allclose(loss, wanted_loss, rtol=rtol)
    for name in ("divergence_N", "student_logp_N", "ratio_N", "student_mass_N", "teacher_mass_N"):
        np.testing.assert_allclose(
            getattr(aux, name), getattr(wanted_aux, name), rtol=1e-5, atol=1e-6, err_msg=name
        )
    scale = np.abs(wanted_grad).max()
    np.testing.assert_allclose(grad, wanted_grad, rtol=1e-5, atol=1e-6 * scale)


GRID = [
    {"k": 20},
    {"k": 20, "alpha": 0.0, "step": 0.25},
    {"k": 20, "alpha": 1.0, "ratio_cap": 1.5},
    {"k": 20, "alpha": 0.3, "tail": "renorm", "temperature": 0.7},
    {"k": 20, "alpha": 1.0, "tail": "renorm", "vocab": 1000},
    {"k": 20, "alpha": 0.0, "tail": "renorm", "sharpness": 8.0},
    {"k": 20, "num_tokens": 6150, "ratio_cap": 1.5, "temperature": 1.3},
    {"k": 20, "vocab": 6199},
    {"k": None, "vocab": 900},
    {"k": None, "vocab": 900, "alpha": 1.0, "num_tokens": 700},
    {"k": 1, "vocab": 300},
    {"k": 299, "vocab": 300, "step": 0.5},
    {"k": 37, "vocab": 37},
    {"k": 300, "vocab": 5000, "alpha": 0.3},
]


@pytest.mark.parametrize(
    "options", nightly_but(GRID, keep=[3, 6, 9, 11]), ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items())
)
def test_agrees_with_the_reference(options):
    options = {"vocab": BINNED} | options
    shape = {name: options.pop(name) for name in ("vocab", "step", "sharpness") if name in options}
    args = logits(**shape)
    dead = np.asarray(args[2]) == 0
    args = (args[0].at[dead].set(jnp.nan), *args[1:])
    check(*both(args, **options))


def test_both_ways_are_taken_and_agree():
    """Blocks of eight rows: ties, a dead row and a full bin need the long way, others do not."""
    student, teacher, *_ = logits(BINNED, size=40)
    student = student.at[9, :60].set(50.0)  # a tie at the k-th place
    student = student.at[17, 5::1024].set(40.0 + jnp.arange(7.0))  # more of the k in a bin than it keeps
    weight = jnp.ones(40).at[25].set(0)
    options = Options(k=20, implementation="pallas_tpu")
    sizes = pallas_tpu.make_sizes(options, BINNED)
    assert sizes.bins == 1024 and sizes.candidates < BINNED
    row = Rows(weight)
    stats = jax.jit(
        lambda s, t: pallas_tpu.call(options, sizes, s, t, row, weight != 0, jnp.float32, interpret=True)[0]
    )(*(jnp.pad(x, ((0, 0), (0, sizes.vocab - BINNED))) for x in (student, teacher)))
    assert stats[[0, 8, 16, 24, 32], LONG].tolist() == [0, 1, 1, 1, 0]
    check(*both((student, teacher, weight, np.zeros(40, np.int32), np.zeros(40)), k=20))


@pytest.mark.nightly
def test_bfloat16_gradient_is_the_float32_one_rounded():
    args = logits(BINNED)
    exact, _ = both(args, k=20)
    rounded, _ = both(args, k=20, grad_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(rounded[1], exact[1].astype(jnp.bfloat16))
    assert rounded[0][0] == exact[0][0]


@pytest.mark.nightly
def test_the_bisection_takes_the_trips_that_the_benchmark_counts():
    V, C, options = 151936, 16, Options(k=100)
    rng = np.random.default_rng(0)
    ranks = rng.permuted(np.tile(np.arange(1, V + 1), (C, 1)), axis=1)
    zipf = -1.3 * np.log(ranks) + 0.5 * rng.normal(size=(C, V))
    student = jnp.asarray(np.concatenate([3 * rng.normal(size=(C, V)), zipf]), jnp.float32)
    sizes, row, live = pallas_tpu.make_sizes(options, V), Rows(jnp.ones(2 * C)), jnp.ones(2 * C, bool)

    def terms(s):
        return pallas_tpu.call(options, sizes, s, s, row, live, None, interpret=True)[0]

    stats = np.asarray(jax.jit(terms)(student))
    assert not stats[:, LONG].any()
    assert stats[:, pallas_tpu.STATS.index("trips")].mean() <= TRIPS


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("who", nightly_but(["student", "teacher", "both"], keep=[0, 2]))
def test_minus_infinite_logits(alpha, who):
    student, teacher, weight, *rest = logits(40, size=3)
    holes = jnp.arange(40) % 4 != 0  # ten finite logits, k = 12 takes two of the others
    student = jnp.where(holes & (who != "teacher"), -jnp.inf, student)
    teacher = jnp.where(holes & (who != "student"), -jnp.inf, teacher)
    ours, wanted = both((student, teacher, weight, *rest), k=12, alpha=alpha)
    if np.isfinite(wanted[0][0]):
        np.testing.assert_allclose(ours[0][0], wanted[0][0], rtol=2e-6)
        assert np.isfinite(ours[1]).all()
        np.testing.assert_allclose(ours[1], wanted[1], rtol=1e-5, atol=1e-7)
    else:
        assert ours[0][0] == wanted[0][0] == np.inf


@pytest.mark.parametrize("tail", ["bucket", "renorm"])
@pytest.mark.parametrize("who", nightly_but([0, 1], keep=[1]))
def test_a_live_nan_row_is_never_hidden(tail, who):
    args = list(logits(BINNED, size=8))
    args[2] = jnp.ones(8)
    args[who] = args[who].at[5, 3100].set(jnp.nan)
    (loss, aux), _ = both(args, k=20, tail=tail)[0]
    assert np.isnan(loss) and np.isnan(aux.divergence_N).tolist() == [i == 5 for i in range(8)]


def test_an_empty_mask_gives_zeros():
    student, teacher, weight, *rest = logits(BINNED)
    ((loss, aux), grad), _ = both((student * jnp.nan, teacher, weight * 0, *rest), k=20)
    assert loss == 0 and not grad.any() and not aux.divergence_N.any()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    step=st.sampled_from([0.25, 1.0, 4.0]),
    scale=st.sampled_from([0.1, 3.0, 30.0]),
)
def test_chooses_what_the_reference_chooses(seed, step, scale):
    """Few distinct values, so that most rows tie at the k-th place; the chosen mass tells the ids apart."""
    rng = np.random.default_rng(seed)
    student = np.round(rng.normal(size=(8, 200)) / step) * step * scale
    teacher = rng.normal(size=(8, 200))
    args = (jnp.float32(student), jnp.float32(teacher), jnp.ones(8), np.zeros(8, np.int32), np.zeros(8))
    ours, wanted = both(args, k=11)
    np.testing.assert_allclose(ours[0][1].teacher_mass_N, wanted[0][1].teacher_mass_N, rtol=1e-5)


def test_the_whole_loss_through_the_kernel():
    rng = np.random.default_rng(0)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    args = (draw(22, 16), draw(300, 16), draw(22, 16), draw(300, 16), jnp.arange(22.0) % 3)

    def run(implementation):
        def loss(h, w):
            return topk_jsd_loss(h, w, *args[2:], k=20, chunk=8, implementation=implementation)

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*args[:2])

    (loss, aux), grads = run("pallas_tpu")
    (wanted, wanted_aux), wanted_grads = run("reference")
    np.testing.assert_allclose(loss, wanted, rtol=2e-6)
    for ours, theirs in zip(grads, wanted_grads, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)
    assert aux.chunks_run == 2
    np.testing.assert_allclose(aux.divergence_N, wanted_aux.divergence_N, rtol=1e-4, atol=1e-7)


def test_no_race_between_two_simulated_cores(monkeypatch):
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
    monkeypatch.setattr(rows.pallas_tpu, "row_terms", partial(pallas_tpu.row_terms, interpret=params))
    args = logits(300, size=24)
    check(*both(args, k=20))
    assert not interpret_pallas_call.races.races_found


def test_what_cannot_run_says_so(monkeypatch):
    monkeypatch.undo()
    args = logits(300)[:3]
    with pytest.raises(ValueError, match="interpret mode"):
        topk_jsd_from_logits(*args, k=20, implementation="pallas_tpu")
    wide = jnp.zeros((1, 2**19))
    with pytest.raises(ValueError, match="use 'xla'"):
        topk_jsd_from_logits(wide, wide, jnp.ones(1), implementation="pallas_tpu")
    with jax.enable_x64(True), pytest.raises(ValueError, match="float64"):
        topk_jsd_from_logits(jnp.zeros((1, 9)), jnp.zeros((1, 9)), jnp.ones(1), implementation="pallas_tpu")
