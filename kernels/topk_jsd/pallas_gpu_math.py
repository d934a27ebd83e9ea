"""The arithmetic of the GPU row kernel: what Mosaic GPU lowers, and nothing about memory.

Arrays are [TILE_TOKENS], one number per lane. Integer keys stand for float32 scores: they order as the floats
do, with -0 just below 0.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .row_math import bucket, small_expm1

TILE_TOKENS = 512  # tokens of a tile, 4 for each thread of a block
KEY_OF_MINUS_INF = np.int32(-0x7F800001)  # the bits of -inf, all but the sign flipped


class Choice(NamedTuple):
    """The chosen tokens: scores above the float of `key`, and equal ones of ids below `cutoff`."""

    key: Any
    cutoff: Any

    def of(self, scores: jax.Array, ids: jax.Array) -> jax.Array:
        """Which lanes are chosen."""
        threshold = float_of(self.key)
        return (scores > threshold) | ((scores == threshold) & (ids < self.cutoff))


class Bracket(NamedTuple):
    """At least k items reach `low`, fewer reach `high`; and how many do (at first unknown)."""

    low: Any
    high: Any
    reach_low: Any = np.int32(np.iinfo(np.int32).max)
    reach_high: Any = np.int32(0)


def float_of(key: Any) -> jax.Array:
    """The float that a key encodes, in every lane."""
    # Arrays and not scalars, since not all of Mosaic GPU's lowerings bitcast a scalar. The sign bit stays,
    # and a negative float's other bits are flipped, since those order backwards.
    keys = jnp.full((TILE_TOKENS,), key, jnp.int32)
    return lax.bitcast_convert_type(keys ^ ((keys >> 31) & 0x7FFFFFFF), jnp.float32)


def largest_key(scores: jax.Array) -> jax.Array:
    """The largest key of all lanes: an int32 scalar."""
    bits = lax.bitcast_convert_type(scores, jnp.int32)
    return jnp.max(bits ^ ((bits >> 31) & 0x7FFFFFFF))


def search(count: Callable, bracket: Bracket, k: Any, depth: int) -> Bracket:
    """Narrows the bracket until exactly k items reach `low`, or `high` is `low` + 1.

    `count` takes 2^depth - 1 integers and returns how many items reach each.
    """

    def unsettled(bracket):
        return (bracket.low + 1 < bracket.high) & (bracket.reach_low != k)

    def narrow(bracket):
        low, high, reach_low, reach_high = bracket
        probes = _between(low, high, depth)
        for probe, reach in zip(probes, count(probes), strict=True):
            up = (reach >= k) & (probe > low)
            down = (reach < k) & (probe < high)
            low = jnp.where(up, probe, low)
            reach_low = jnp.where(up, reach, reach_low)
            high = jnp.where(down, probe, high)
            reach_high = jnp.where(down, reach, reach_high)
        return Bracket(low, high, reach_low, reach_high)

    return lax.while_loop(unsettled, narrow, bracket)


def _between(low, high, depth):
    if depth == 0:
        return []
    middle = (low & high) + ((low ^ high) >> 1)  # the average; low + high could overflow
    return [*_between(low, middle, depth - 1), middle, *_between(middle, high, depth - 1)]


def count_true(*conditions: jax.Array) -> jax.Array:
    """How often the conditions hold, over all lanes: an int32 scalar."""
    # Casts, not selects: Mosaic GPU makes a select of two integer constants unsigned.
    return jnp.sum(reduce(add, [condition.astype(jnp.int32) for condition in conditions]))


def add_exp(sums: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Takes x into (largest, sum of exp(x - largest)), in each lane; NaN makes the sum NaN."""
    largest, total = sums
    decay = jnp.exp(-jnp.abs(x - largest))  # the one exponential of the two that is not 1
    total = jnp.where(x > largest, total * decay + 1, total + decay)
    return jnp.maximum(largest, x), total


def log_sum_exp(arrays: list[jax.Array], sums: tuple[jax.Array, jax.Array]) -> jax.Array:
    """log-sum-exp over all lanes of the arrays and what `add_exp` took in: a scalar."""
    largest, total = sums
    top = jnp.max(reduce(jnp.maximum, arrays, largest))
    terms = (jnp.exp(x - top) for x in arrays)
    return top + jnp.log(jnp.sum(reduce(add, terms, total * jnp.exp(largest - top))))


def share(alpha: float) -> Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]:
    """`bucket` of (logq, logr), by functions that Mosaic GPU has."""
    return partial(bucket, alpha=alpha, expm1=small_expm1, log1p=_log1p)


def _log1p(x):
    # Kahan's: the rounding of 1 + x cancels in the quotient.
    y = 1 + x
    return jnp.where(y == 1, x, jnp.log(y) * (x / (y - 1)))
