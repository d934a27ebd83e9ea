"""The next token of every row, from one uniform number a row and without sorting the vocabulary.

Sampling inverts the cumulative distribution in two levels: first the block of 128 ids the number
falls into, then the id of that block. A row costs one random number, where Gumbel-max needs one for
every id. The number has 23 random bits, so probabilities are met to about 1e-7, absolute.

    sample(logits_BV, u_B, temperature=, top_p=)     -> token_B, logp_B
    row_uniforms(key, uid_B, R)                      -> u_BR
    invert_cdf(weight_BV, u_B)                       -> token_B
    nucleus(weight_BV, top_p)                        -> kept_BV

Where `axis` names a mesh axis, each device holds its share of the ids and the vocabulary is a third
level above the two: devices exchange a few numbers a row, never logits.

Dimensions: B rows, V ids (of this device), N blocks of ids, L ids of a block, D devices, R tokens of a
response.
"""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rosd_jax.errors import UserError
from rosd_jax.settings import TEMPERATURE_RULE, is_temperature

BLOCK_IDS = 128  # ids of a block: as many as a TPU's vector has lanes
ONE_BITS = 0x3F800000  # the bit pattern of 1 in float32


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn (`sample` says more), and which ones end a response (hashable).

    Raises UserError, which is a ValueError, for a value that breaks the rule given with its field.
    """

    temperature: float  # 0 (greedy) or in [1e-6, 1e6]
    top_p: float = 1.0  # in (0, 1], also in float32
    stop_ids: tuple[int, ...] = ()  # at least 0

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not is_temperature(self.temperature):
            raise UserError(f"temperature is {self.temperature!r}; it must {TEMPERATURE_RULE}")
        smallest = np.finfo(np.float32).tiny
        if not _is_number(self.top_p) or not smallest <= self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p!r}; it must lie in (0, 1], also in float32")
        ids = self.stop_ids
        if not isinstance(ids, tuple) or not all(_is_id(token) for token in ids):
            raise UserError(
                f"stop_ids is {ids!r}; it must be a tuple of token ids, which are ints of at least 0"
            )


def _is_number(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool)


def _is_id(x: Any) -> bool:
    return isinstance(x, int | np.integer) and not isinstance(x, bool) and 0 <= int(x) < 2**31


def sample(
    logits_BV: jax.Array, u_B: jax.Array, *, temperature: float, top_p: float, axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Draws token_B (int32) and logp_B (float32) from float32 logits and a uniform number a row.

    Temperature 0 takes the largest logit, the lowest id among equals, and reports log-probs at
    temperature 1. `top_p` in (0, 1) draws from the smallest set of likeliest ids whose mass reaches
    it (nucleus sampling, arXiv 1904.09751), plus all ids that tie with the least likely of them.
    `logp_B` is always that of the whole, untruncated distribution. A logit of -inf is never chosen.
    axis: the mesh axis that the ids are split along, under `jax.shard_map`.
    """
    top_B = jnp.max(logits_BV, axis=-1)
    gap_BV = _most(top_B, axis)[:, None] - logits_BV  # how far below the best, >= 0
    gap_BV = gap_BV / (temperature or 1.0)
    weight_BV = jnp.exp(-gap_BV)
    if temperature == 0:
        token_B = _lowest(gap_BV, axis)
    else:
        kept_BV = weight_BV
        if top_p < 1:
            kept_BV = jnp.where(nucleus(weight_BV, top_p, axis), weight_BV, 0.0)
        token_B = invert_cdf(kept_BV, u_B, axis)
    return token_B, -_at(gap_BV, token_B, axis) - jnp.log(_total(jnp.sum(weight_BV, axis=-1), axis))


def row_uniforms(key: jax.Array, uid_B: jax.Array, R: int) -> jax.Array:
    """float32 [B, R] in [0, 1): the number of row b's token r comes from key, uid_B[b] and r alone.

    For a key of JAX's default kind it is jax.random's `uniform(fold_in(fold_in(key, uid), r))`, in one fusion
    that compiles four times as fast on CPU, where JAX makes loops of it.
    """
    default = str(jax.random.key_impl(key)) == "threefry2x32"
    words = jax.random.key_data(key) if default else jax.random.bits(key, (2,))
    words_B1 = _threefry(words[0], words[1], uid_B.astype(jnp.uint32)[:, None])
    words_BR = _threefry(*words_B1, jnp.arange(R, dtype=jnp.uint32))
    high_BR, low_BR = _threefry(*words_BR, jnp.uint32(0))
    bits_BR = (high_BR ^ low_BR) >> 9 | jnp.uint32(ONE_BITS)
    return lax.bitcast_convert_type(bits_BR, jnp.float32) - 1.0


def _threefry(key0: jax.Array, key1: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Threefry-2x32 of 20 rounds (Salmon et al. 2011) of the counter (0, x), all uint32."""
    keys = key0, key1, key0 ^ key1 ^ jnp.uint32(0x1BD11BDA)
    high, low = keys[0], x + keys[1]
    for i in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[i % 2]:
            high = high + low
            low = (low << turn | low >> (32 - turn)) ^ high
        high, low = high + keys[(i + 1) % 3], low + keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return high, low


def invert_cdf(weight_BV: jax.Array, u_B: jax.Array, axis: str | None = None) -> jax.Array:
    """The id (int32) at which the cumulative weight first exceeds u in [0, 1] of the row's total.

    Weights are float32, at least 0 and not normalised; an id of weight 0 is never returned.
    """
    V = weight_BV.shape[1]
    lanes_BNL = jnp.pad(weight_BV, ((0, 0), (0, -V % BLOCK_IDS))).reshape(len(weight_BV), -1, BLOCK_IDS)
    block_BN = jnp.sum(lanes_BNL, axis=-1)
    ends_BN = jnp.cumsum(block_BN, axis=-1)
    if axis is None:
        return _invert(lanes_BNL, block_BN, ends_BN, u_B * ends_BN[:, -1])
    mass_BD = lax.all_gather(ends_BN[:, -1], axis, axis=1)  # of every device's ids
    ends_BD = jnp.cumsum(mass_BD, axis=1)
    target_B = u_B * ends_BD[:, -1]
    device_B = _first_over(ends_BD, mass_BD, target_B)
    rest_B = target_B - (_pick(ends_BD, device_B) - _pick(mass_BD, device_B))
    token_B = _invert(lanes_BNL, block_BN, ends_BN, rest_B) + device_B * V
    return lax.psum(jnp.where(device_B == lax.axis_index(axis), token_B, 0), axis)


def _invert(lanes_BNL: jax.Array, block_BN: jax.Array, ends_BN: jax.Array, target_B: jax.Array) -> jax.Array:
    """The id at which the cumulative weight first exceeds the target."""
    if lanes_BNL.shape[1] == 1:  # a single block needs no search for it
        return _first_over(jnp.cumsum(lanes_BNL[:, 0], axis=-1), lanes_BNL[:, 0], target_B)
    block_of_B = _first_over(ends_BN, block_BN, target_B)
    lane_BL = jnp.take_along_axis(lanes_BNL, block_of_B[:, None, None], axis=1)[:, 0]
    rest_B = target_B - (_pick(ends_BN, block_of_B) - _pick(block_BN, block_of_B))
    return block_of_B * BLOCK_IDS + _first_over(jnp.cumsum(lane_BL, axis=-1), lane_BL, rest_B)


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


def nucleus(weight_BV: jax.Array, top_p: float, axis: str | None = None) -> jax.Array:
    """Boolean mask of the smallest set {weight >= threshold} that holds `top_p` of the row's weight.

    Weights are float32 in [0, 1]. Bisects the threshold's bit pattern, since floats at or above 0 are
    ordered as their bits are: at most 30 halvings find the greatest threshold exactly, up to the rounding
    of sums. Ties on it are kept.
    """
    total_B = _total(jnp.sum(weight_BV, axis=-1), axis)

    def halve(bounds):
        low_B, high_B, over_B, under_B = bounds  # the set of `low` is large enough, that of `high` is not
        middle_B = low_B + (high_B - low_B) // 2
        mass_B = _total(_sum(jnp.where(_at_least(weight_BV, middle_B), weight_BV, 0.0)), axis)
        short_B = mass_B < top_p * total_B

        def pick(yes_B, no_B):
            return jnp.where(short_B, yes_B, no_B)

        return pick(low_B, middle_B), pick(middle_B, high_B), pick(over_B, mass_B), pick(mass_B, under_B)

    def several_between(bounds):
        """At least two ids that weigh `low` or more fit into the difference of the two sets' masses."""
        low_B, high_B, over_B, under_B = bounds
        lightest_B = lax.bitcast_convert_type(low_B, jnp.float32)
        return jnp.any((high_B - low_B > 1) & (over_B - under_B >= 1.5 * lightest_B))

    low_B = jnp.zeros_like(total_B, jnp.int32)
    bounds = low_B, low_B + ONE_BITS + 1, total_B, jnp.zeros_like(total_B)
    return _at_least(weight_BV, lax.while_loop(several_between, halve, bounds)[0])


def _sum(x_BV: jax.Array) -> jax.Array:
    """Over the vocabulary. XLA for CPU adds the terms of a matrix product several at a time, of a sum not."""

    def as_product(x_BV):
        return jnp.matmul(x_BV, jnp.ones(x_BV.shape[1]), precision=lax.Precision.HIGHEST)

    return lax.platform_dependent(x_BV, cpu=as_product, default=lambda x_BV: jnp.sum(x_BV, axis=-1))


def _at_least(weight_BV: jax.Array, bits_B: jax.Array) -> jax.Array:
    return weight_BV >= lax.bitcast_convert_type(bits_B, jnp.float32)[:, None]


def _pick(x_BN: jax.Array, at_B: jax.Array) -> jax.Array:
    return jnp.take_along_axis(x_BN, at_B[:, None], axis=1)[:, 0]


def _total(x_B: jax.Array, axis: str | None) -> jax.Array:
    return x_B if axis is None else lax.psum(x_B, axis)


def _most(x_B: jax.Array, axis: str | None) -> jax.Array:
    return x_B if axis is None else lax.pmax(x_B, axis)


def _lowest(gap_BV: jax.Array, axis: str | None) -> jax.Array:
    """The first id of gap 0."""
    token_B = jnp.argmin(gap_BV, axis=-1).astype(jnp.int32)
    if axis is None:
        return token_B
    V = gap_BV.shape[1]
    best_B = _pick(gap_BV, token_B) == 0
    everywhere = V * lax.axis_size(axis)
    return lax.pmin(jnp.where(best_B, token_B + lax.axis_index(axis) * V, everywhere), axis)


def _at(x_BV: jax.Array, token_B: jax.Array, axis: str | None) -> jax.Array:
    """x of each row's token, wherever the token's device is."""
    if axis is None:
        return _pick(x_BV, token_B)
    V = x_BV.shape[1]
    local_B = token_B - lax.axis_index(axis) * V
    mine_B = (local_B >= 0) & (local_B < V)
    return lax.psum(jnp.where(mine_B, _pick(x_BV, jnp.clip(local_B, 0, V - 1)), 0.0), axis)
