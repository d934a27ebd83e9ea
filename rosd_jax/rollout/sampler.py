"""The next token of every row, from one uniform number a row and without sorting the vocabulary.

Sampling inverts the cumulative distribution in two levels: first the block of 128 ids the number
falls into, then the id of that block. A row costs one random number, where Gumbel-max needs one for
every id. The number has 23 random bits, so probabilities are met to about 1e-7, absolute.

    sample(logits_BV, key_B, temperature=, top_p=)   -> token_B, logp_B
    row_keys(key, uid_B, position_B)                 -> key_B
    invert_cdf(weight_BV, u_B)                       -> token_B
    nucleus(gap_BV, weight_BV, top_p)                -> kept_BV
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

LANES = 128  # ids a block
INF_BITS = 0x7F800000  # the bit pattern of float32 infinity


def sample(
    logits_BV: jax.Array, key_B: jax.Array, *, temperature: float, top_p: float
) -> tuple[jax.Array, jax.Array]:
    """Draws token_B (int32) and logp_B (float32) from float32 logits and one key a row.

    Temperature 0 takes the largest logit, the lowest id among equals, and reports log-probs at
    temperature 1. `top_p` in (0, 1) draws from the smallest set of likeliest ids whose mass reaches
    it (nucleus sampling, arXiv 1904.09751), plus all ids that tie with the least likely of them.
    `logp_B` is always that of the whole, untruncated distribution. A logit of -inf is never chosen.
    """
    gap_BV = jnp.max(logits_BV, axis=-1, keepdims=True) - logits_BV  # how far below the best, >= 0
    gap_BV = gap_BV / (temperature or 1.0)
    weight_BV = jnp.exp(-gap_BV)
    if temperature == 0:
        token_B = jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    else:
        kept_BV = weight_BV
        if top_p < 1:
            kept_BV = jnp.where(nucleus(gap_BV, weight_BV, top_p), weight_BV, 0.0)
        token_B = invert_cdf(kept_BV, jax.vmap(jax.random.uniform)(key_B))
    gap_B = jnp.take_along_axis(gap_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, -gap_B - jnp.log(jnp.sum(weight_BV, axis=-1))


def row_keys(key: jax.Array, uid_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """A key a row that depends on nothing but `key`, the row's uid and the token's position."""
    fold = lambda uid, position: jax.random.fold_in(jax.random.fold_in(key, uid), position)
    return jax.vmap(fold)(uid_B, position_B)


def invert_cdf(weight_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """The id (int32) at which the cumulative weight first exceeds u in [0, 1] of the row's total.

    Weights are float32, at least 0 and not normalised; an id of weight 0 is never returned.
    """
    B, V = weight_BV.shape
    lanes_BNL = jnp.pad(weight_BV, ((0, 0), (0, -V % LANES))).reshape(B, -1, LANES)
    block_BN = jnp.sum(lanes_BNL, axis=-1)
    ends_BN = jnp.cumsum(block_BN, axis=-1)
    target_B = u_B * ends_BN[:, -1]
    n_B = _first_over(ends_BN, block_BN, target_B)

    at_n = lambda x_BN: jnp.take_along_axis(x_BN, n_B[:, None], axis=1)[:, 0]
    lane_BL = jnp.take_along_axis(lanes_BNL, n_B[:, None, None], axis=1)[:, 0]
    rest_B = target_B - (at_n(ends_BN) - at_n(block_BN))
    return n_B * LANES + _first_over(jnp.cumsum(lane_BL, axis=-1), lane_BL, rest_B)


def _first_over(ends_BN: jax.Array, weight_BN: jax.Array, target_B: jax.Array) -> jax.Array:
    """The first slot of positive weight that ends beyond the target, else the last positive one.

    Both conditions guard against rounding: a parallel cumulative sum may rise over a slot of weight
    0, or end short of the target.
    """
    some_BN = weight_BN > 0
    over_BN = some_BN & (ends_BN > target_B[:, None])
    last_B = weight_BN.shape[1] - 1 - jnp.argmax(some_BN[:, ::-1], axis=1)
    first_B = jnp.argmax(over_BN, axis=1)
    return jnp.where(jnp.any(over_BN, axis=1), first_B, last_B).astype(jnp.int32)


def nucleus(gap_BV: jax.Array, weight_BV: jax.Array, top_p: float) -> jax.Array:
    """Boolean mask of the smallest set {gap <= threshold} that holds `top_p` of the row's weight.

    Bisects the threshold's bit pattern, since floats at or above 0 are ordered as their bits are:
    31 halvings find the least threshold exactly. Ties on it are kept.
    """
    enough_B = top_p * jnp.sum(weight_BV, axis=-1)

    def halve(_, bounds):
        low_B, high_B = bounds  # the set of `high` is large enough, that of `low` is not
        middle_B = low_B + (high_B - low_B) // 2
        mass_B = jnp.sum(jnp.where(_within(gap_BV, middle_B), weight_BV, 0.0), axis=-1)
        short_B = mass_B < enough_B
        return jnp.where(short_B, middle_B, low_B), jnp.where(short_B, high_B, middle_B)

    low_B = jnp.full_like(enough_B, -1, jnp.int32)
    high_B = jnp.full_like(enough_B, INF_BITS, jnp.int32)
    return _within(gap_BV, jax.lax.fori_loop(0, 31, halve, (low_B, high_B))[1])


def _within(gap_BV: jax.Array, bits_B: jax.Array) -> jax.Array:
    return gap_BV <= jax.lax.bitcast_convert_type(bits_B, jnp.float32)[:, None]
