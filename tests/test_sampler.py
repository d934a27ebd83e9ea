"""The sampler against softmax, a sorting oracle and its edge cases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rosd_jax.models.sharding import make_mesh
from rosd_jax.rollout.sampler import Sampling, invert_cdf, nucleus, row_uniforms, sample
from rosd_jax.types import Stream
from support import nightly_but

uniforms = jax.vmap(jax.random.uniform)
jit_sample = jax.jit(
    lambda logits_BV, key_B, **how: sample(logits_BV, uniforms(key_B), **how),
    static_argnames=("temperature", "top_p"),
)
jit_invert = jax.jit(invert_cdf)
jit_uniforms = jax.jit(row_uniforms, static_argnums=2)
DRAWS, CHUNK = 200_000, 2_000
BELOW_ONE = float(np.float32(1) - np.float32(2**-24))


def _logits(seed, *shape, scale=1.0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * scale, jnp.float32)


def _softmax(logits):
    z = np.asarray(logits, np.float64)
    p = np.exp(z - z.max(-1, keepdims=True))
    return p / p.sum(-1, keepdims=True)


def _draw(logits_V, temperature, top_p):
    def chunk(u_B):
        logits_BV = jnp.broadcast_to(logits_V, (CHUNK, logits_V.size))
        return sample(logits_BV, u_B, temperature=temperature, top_p=top_p)[0]

    u_BR = jit_uniforms(jax.random.key(3), jnp.arange(DRAWS), 1)
    return np.asarray(jax.jit(lambda u: jax.lax.map(chunk, u))(u_BR.reshape(-1, CHUNK))).ravel()


def _chi_square_z(token, p):
    counts = np.bincount(token, minlength=p.size)
    assert counts[p == 0].sum() == 0
    live = p > 0
    expected = DRAWS * p[live]
    dof = live.sum() - 1
    return (((counts[live] - expected) ** 2 / expected).sum() - dof) / np.sqrt(2 * dof)


def _sorted_nucleus(p, top_p):
    """The textbook rule on sorted probabilities, with ties on the last one kept."""
    ordered = np.sort(p)[::-1]
    least = ordered[np.searchsorted(np.cumsum(ordered), top_p)]
    return p >= least


@pytest.mark.parametrize("vocab, temperature", nightly_but([(272, 1.0), (1000, 0.7)], keep=[1]))
def test_draws_follow_the_softmax_at_the_sampling_temperature(vocab, temperature):
    logits_V = _logits(vocab, vocab)
    z = _chi_square_z(_draw(logits_V, temperature, 1.0), _softmax(logits_V / temperature))
    assert abs(z) < 4


def test_top_p_draws_follow_the_renormalised_nucleus():
    logits_V = _logits(1, 272, scale=1.5)
    p = _softmax(logits_V)
    kept = _sorted_nucleus(p, 0.8)
    z = _chi_square_z(_draw(logits_V, 1.0, 0.8), np.where(kept, p, 0) / p[kept].sum())
    assert abs(z) < 4


@pytest.mark.parametrize("step", [None, 0.5], ids=["distinct", "ties"])
@pytest.mark.parametrize("top_p", [0.003, 0.3, 0.803, 0.9503, 0.9993])
def test_nucleus_is_the_set_that_sorting_finds(top_p, step):
    z = _logits(2, 16, 300, scale=2.0)
    z = z if step is None else jnp.round(z / step) * step
    kept = np.asarray(nucleus(jnp.exp(z - z.max(-1, keepdims=True)), top_p))
    want = np.stack([_sorted_nucleus(p, top_p) for p in _softmax(z)])
    np.testing.assert_array_equal(kept, want)


def test_logp_is_of_the_untruncated_distribution_at_the_sampling_temperature():
    logits_BV, key_B = _logits(4, 64, 272), jax.random.split(jax.random.key(0), 64)
    for top_p in (1.0, 0.5):
        token_B, logp_B = jit_sample(logits_BV, key_B, temperature=0.6, top_p=top_p)
        want = np.log(_softmax(logits_BV / 0.6))[np.arange(64), token_B]
        np.testing.assert_allclose(logp_B, want, atol=2e-6, rtol=0)
    assert token_B.dtype == jnp.int32 and logp_B.dtype == jnp.float32


def test_greedy_takes_the_lowest_of_equal_ids_with_logp_at_temperature_one():
    logits_BV = _logits(5, 3, 272).at[:, jnp.array([40, 200])].set(9.0).at[2, 271].set(10.0)
    key_B = jax.random.split(jax.random.key(0), 3)
    token_B, logp_B = jit_sample(logits_BV, key_B, temperature=0.0, top_p=0.5)
    np.testing.assert_array_equal(token_B, [40, 40, 271])
    np.testing.assert_allclose(logp_B, np.log(_softmax(logits_BV))[range(3), token_B], atol=2e-6)


@pytest.mark.parametrize("rest", [-jnp.inf, -1e4])
@pytest.mark.parametrize("vocab", [1, 300])
def test_a_token_with_all_the_mass_is_drawn_with_logp_zero(vocab, rest):
    for token in sorted({0, vocab // 2, vocab - 1}):
        logits_BV = jnp.full((64, vocab), rest, jnp.float32).at[:, token].set(-3.0)
        key_B = jax.random.split(jax.random.key(token), 64)
        for top_p in (1.0, 0.9):
            token_B, logp_B = jit_sample(logits_BV, key_B, temperature=1.0, top_p=top_p)
            assert set(np.asarray(token_B).tolist()) == {token}
            np.testing.assert_array_equal(logp_B, 0.0)


@pytest.mark.parametrize("vocab", [128, 150, 272, 1000])
def test_the_ends_of_the_vocabulary_are_reached_and_never_passed(vocab):
    weight_BV = jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, (4, vocab)), jnp.float32)
    u_B = jnp.array([0.0, BELOW_ONE, 1.0, 0.5], jnp.float32)
    token_B = jit_invert(weight_BV, u_B)
    np.testing.assert_array_equal(token_B[:3], [0, vocab - 1, vocab - 1])


def test_ids_of_no_weight_are_never_chosen_whatever_the_uniform():
    rng = np.random.default_rng(1)
    weight_BV = rng.uniform(size=(4000, 700)) * (rng.uniform(size=(4000, 700)) < 0.01)
    weight_BV[:, 650:] = 0
    weight_BV[:, 300] = 1e-6
    u_B = np.concatenate([[0.0, BELOW_ONE, 1.0] * 500, rng.uniform(size=2500)])
    token_B = jit_invert(jnp.asarray(weight_BV, jnp.float32), jnp.asarray(u_B, jnp.float32))
    assert (weight_BV[np.arange(4000), token_B] > 0).all()


def test_a_tiny_temperature_is_greedy_and_finite():
    logits_BV = _logits(6, 32, 150, scale=100.0)
    key_B = jax.random.split(jax.random.key(0), 32)
    token_B, logp_B = jit_sample(logits_BV, key_B, temperature=1e-30, top_p=1.0)
    np.testing.assert_array_equal(token_B, np.argmax(logits_BV, -1))
    np.testing.assert_array_equal(logp_B, 0.0)


@pytest.mark.parametrize("seed", [9, 2**31 - 1, -1])
def test_a_uniform_is_that_of_jax_random_for_uid_and_position_alone(seed):
    key, uid_B = jax.random.key(seed), jnp.array([5, 0, 2**31 - 1, 5])
    u_BR = jit_uniforms(key, uid_B, 4)
    np.testing.assert_array_equal(u_BR[0], u_BR[3])
    for uid, u_R in zip(uid_B, u_BR, strict=True):
        keys = [jax.random.fold_in(jax.random.fold_in(key, uid), r) for r in range(4)]
        np.testing.assert_array_equal(u_R, uniforms(jnp.stack(keys)))
    grid = np.asarray(jit_uniforms(key, jnp.arange(100), 100))
    assert len(np.unique(grid)) > 9980 and abs(grid.mean() - 0.5) < 0.01 and 0 <= grid.min() < grid.max() < 1


def test_keys_of_another_kind_give_uniforms_of_their_own():
    grids = [
        np.asarray(jit_uniforms(jax.random.key(seed, impl="rbg"), jnp.arange(50), 50)) for seed in (1, 2)
    ]
    assert len(np.unique(grids)) > 4990 and abs(np.mean(grids) - 0.5) < 0.02


@pytest.mark.parametrize("vocab", nightly_but([16, 1048], keep=[1]))
def test_a_vocabulary_split_over_devices_gives_the_tokens_of_a_whole_one(vocab):
    """Eight devices; the likeliest ids tie across two of them, and one holds no id that may be drawn."""
    mesh, step = make_mesh(1, 1, 8), vocab // 8
    logits_BV = _logits(8, 500, vocab, scale=3.0).at[:, 3 * step : 4 * step].set(-jnp.inf)
    logits_BV = logits_BV.at[:100, step].set(30.0).at[:100, 2 * step].set(30.0)
    u_B = jnp.linspace(0, BELOW_ONE, 500)
    for how in (
        dict(temperature=1.0, top_p=1.0),
        dict(temperature=0.7, top_p=0.9),
        dict(temperature=0.0, top_p=1.0),
    ):
        split = jax.shard_map(
            partial(sample, axis="tensor", **how),
            mesh=mesh,
            in_specs=(P(None, "tensor"), P()),
            out_specs=P(),
            check_vma=False,
        )
        got, want = jax.jit(split)(logits_BV, u_B), jax.jit(partial(sample, **how))(logits_BV, u_B)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_allclose(got[1], want[1], atol=2e-6)


def test_sampling_is_traced_once_for_new_values():
    traces = []

    @jax.jit
    def draw(logits_BV, key_B):
        traces.append(1)
        return sample(logits_BV, uniforms(key_B), temperature=0.6, top_p=0.95)

    for seed in range(3):
        draw(_logits(seed, 8, 150), jax.random.split(jax.random.key(seed), 8))
    assert len(traces) == 1


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(temperature=-1), "temperature is -1; it must be 0 .greedy. or lie in"),
        (dict(temperature=1e-7), "temperature is 1e-07"),
        (dict(temperature=float("nan")), "temperature is nan"),
        (dict(temperature="hot"), "temperature is 'hot'"),
        (dict(temperature=1, top_p=0), "top_p is 0; it must lie in .0, 1., also in float32"),
        (dict(temperature=1, top_p=1e-50), "top_p is 1e-50"),
        (dict(temperature=1, top_p=1.1), "top_p is 1.1"),
        (dict(temperature=1, stop_ids=[1]), r"stop_ids is \[1\]; it must be a tuple of token ids"),
        (dict(temperature=1, stop_ids=(-1,)), r"stop_ids is \(-1,\)"),
    ],
)
def test_sampling_that_means_nothing_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        Sampling(**given)


def test_the_streams_of_a_run_are_pinned():
    """A resumed run relies on them."""
    assert {stream.name: stream.value for stream in Stream} == {
        "ROLLOUT": 0,
        "REFLECT": 1,
        "EVAL": 2,
        "ADAPTERS": 2**32 - 1,
    }
    for stream in Stream:
        want = jax.random.fold_in(jax.random.key(3), stream.value)
        assert (jax.random.key_data(stream.key(jax.random.key(3))) == jax.random.key_data(want)).all()
