"""The k largest scores of a row, exactly, by counting: no gather or scatter over the vocabulary, no sort.

The row is dealt into bins that keep their three largest; the k-th largest of what they kept is found by
bisection on the bits. Where a bin held a fourth that counts, the search runs over the whole row.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

KEEP = 3  # scores a bin keeps
BINS_PER_K = 40  # were tokens dealt at random, one row in 16 000 would have four of its k in one bin


def bin_count(k: int, vocab: int) -> int:
    """A multiple of 1024; 0 where bins would keep more than half of the row."""
    bins = -(-BINS_PER_K * k // 1024) * 1024
    return 0 if KEEP * bins > vocab // 2 else bins


@partial(jax.jit, static_argnums=(2, 3))  # so that callers outside of jit compile its loops once
def select_top_k(scores_CV: jax.Array, live_C: jax.Array, k: int, axis: str | None = None) -> jax.Array:
    """True at the k largest scores of a row, ties to the lowest id; 0 and -0 tie.

    k < V, over all shards where `axis` splits the vocabulary. What it gives a dead row is arbitrary.
    """
    if axis is None:
        floor_C = _floor(scores_CV, live_C, k)
        excess_C = jnp.sum(scores_CV >= floor_C[:, None], axis=-1, dtype=jnp.int32) - k
    else:
        floor_C, excess_C = _shared_floor(scores_CV, live_C, k, axis)
    excess_C = jnp.where(live_C, excess_C, 0)
    above_CV = scores_CV >= floor_C[:, None]

    def break_ties():
        equal_CV = scores_CV == floor_C[:, None]
        # Counted from the right: the highest ids among the equals go.
        rank_CV = lax.cumsum(equal_CV.astype(jnp.int32), axis=1, reverse=True)
        return above_CV & ~(equal_CV & (rank_CV <= excess_C[:, None]))

    return lax.cond(jnp.any(excess_C > 0), break_ties, lambda: above_CV)


def _floor(scores_CV, live_C, k):
    """A score that exactly k of the row reach, or the k-th largest where ties allow no such score."""
    kept_CM, left_out_C = _candidates(scores_CV, k)
    floor_C = _bisect(kept_CM, live_C, k)
    if kept_CM is scores_CV:
        return floor_C
    overflow = jnp.any(live_C & (left_out_C >= floor_C))
    return lax.cond(overflow, lambda: _bisect(scores_CV, live_C, k), lambda: floor_C)


def _shared_floor(scores_CV, live_C, k, axis):
    """The k-th largest score of all shards, and how many of those equal to it this shard gives up.

    Lower shards hold lower ids and keep theirs first. Only values travel: k a row from each shard.
    """
    n = min(k, scores_CV.shape[1])
    kept_CM, left_out_C = _candidates(scores_CV, k)
    largest_Cn = lax.top_k(kept_CM, n)[0]
    if kept_CM is not scores_CV:
        overflow = jnp.any(live_C & (left_out_C >= largest_Cn[:, -1]))
        largest_Cn = lax.cond(overflow, lambda: lax.top_k(scores_CV, n)[0], lambda: largest_Cn)
    all_CM = lax.all_gather(largest_Cn, axis, axis=1, tiled=True)
    floor_C = lax.top_k(all_CM, k)[0][:, -1]
    count = lambda mask_CM: jnp.sum(mask_CM, axis=-1, dtype=jnp.int32)
    held_C = count(scores_CV == floor_C[:, None])
    held_SC = lax.all_gather(held_C, axis)
    shards_S = jnp.arange(held_SC.shape[0], dtype=jnp.int32)
    lower_SC = shards_S[:, None] < lax.axis_index(axis)
    in_lower_C = jnp.sum(jnp.where(lower_SC, held_SC, 0), axis=0, dtype=jnp.int32)
    wanted_C = k - count(all_CM > floor_C[:, None]) - in_lower_C
    return floor_C, held_C - jnp.clip(wanted_C, 0, held_C)


def _candidates(scores_CV, k):
    """The three largest of each bin and the lanes behind the last round of bins; the largest left out.

    Bin b holds the ids that are b modulo the number of bins. A short row is its own candidates.
    """
    size, vocab = scores_CV.shape
    bins = bin_count(k, vocab)
    if not bins:
        return scores_CV, jnp.full(size, -jnp.inf, scores_CV.dtype)
    nothing_CB = jnp.full((size, bins), -jnp.inf, scores_CV.dtype)

    def insert(i, state):
        kept, left_out_CB = state
        key_CB, longer = lax.dynamic_slice_in_dim(scores_CV, i * bins, bins, axis=1), []
        for held_CB in kept:
            longer.append(jnp.maximum(key_CB, held_CB))
            key_CB = jnp.minimum(key_CB, held_CB)
        return tuple(longer), jnp.maximum(left_out_CB, key_CB)

    rounds = vocab // bins
    kept, left_out_CB = lax.fori_loop(0, rounds, insert, ((nothing_CB,) * KEEP, nothing_CB))
    behind_CM = scores_CV[:, rounds * bins :]
    return jnp.concatenate([*kept, behind_CM], axis=1), jnp.max(left_out_CB, axis=-1)


def _bisect(scores_CM, live_C, k):
    """A score that at least k of the row reach, and as few more as there are scores to tell them apart.

    Bit by bit from the top; ends early once exactly k of every live row reach it.
    """
    keys_CM = _ordered_bits(scores_CM)
    rows, width = keys_CM.shape
    word = keys_CM.dtype

    def unsettled(state):
        bit, _, count_C = state
        return (bit > 0) & jnp.any(count_C != k)

    def try_bit(state):
        bit, floor_C, count_C = state
        trial_C = jnp.where(count_C == k, floor_C, floor_C | bit)
        trial_count_C = jnp.sum(keys_CM >= trial_C[:, None], axis=-1, dtype=jnp.int32)
        reached_C = trial_count_C >= k
        floor_C = jnp.where(reached_C, trial_C, floor_C)
        return bit >> 1, floor_C, jnp.where(reached_C, trial_count_C, count_C)

    top = jnp.array(1 << (jnp.iinfo(word).bits - 1), word)
    start = (top, jnp.zeros(rows, word), jnp.where(live_C, jnp.int32(width), jnp.int32(k)))
    _, floor_C, _ = lax.while_loop(unsettled, try_bit, start)
    return lax.bitcast_convert_type(jnp.where(floor_C >= top, floor_C ^ top, ~floor_C), scores_CM.dtype)


def _ordered_bits(scores_CM):
    """Unsigned integers in the order of the floats; 0 and -0 give the same."""
    bits = jnp.finfo(scores_CM.dtype).bits
    word = jnp.uint32 if bits == 32 else jnp.uint64
    raw_CM = lax.bitcast_convert_type(jnp.where(scores_CM == 0, 0, scores_CM), word)
    sign = jnp.array(1 << (bits - 1), word)
    return jnp.where(raw_CM >= sign, ~raw_CM, raw_CM | sign)
