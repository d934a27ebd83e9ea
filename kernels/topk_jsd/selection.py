"""The k largest scores of a row, exactly, by counting: no gather or scatter over the vocabulary, no sort.

The ids of a row are dealt into bins, each of which keeps its three largest scores. The k-th largest of what
they kept is found by bisection on the bits. Where a bin dropped a score that counts, the search is repeated
over the whole row.

Dimensions: C rows, V vocabulary, B bins, M candidates of a row, K scores that a shard offers, S shards of
the vocabulary.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

KEEP = 3  # scores that a bin keeps
BINS_PER_K = 40  # for tokens dealt at random, one row in 16 000 would have four of its k in one bin


def bin_count(k: int, vocab: int) -> int:
    """A multiple of 1024; 0 where bins would keep more than half of the row."""
    bins = -(-BINS_PER_K * k // 1024) * 1024
    return 0 if KEEP * bins > vocab // 2 else bins


@partial(jax.jit, static_argnums=(2, 3))  # so that callers outside of jit compile its loops once
def select_top_k(scores_CV: jax.Array, live_C: jax.Array, k: int, axis: str | None = None) -> jax.Array:
    """True at the k largest scores of each row, ties to the lowest id; 0 and -0 tie.

    k < V, over all shards where `axis` splits the vocabulary. The result for rows that are not live is
    arbitrary.
    """
    if axis is None:
        threshold_C = _threshold(scores_CV, live_C, k)
        excess_C = jnp.sum(scores_CV >= threshold_C[:, None], axis=-1, dtype=jnp.int32) - k
    else:
        threshold_C, excess_C = _shared_threshold(scores_CV, live_C, k, axis)
    excess_C = jnp.where(live_C, excess_C, 0)
    reached_CV = scores_CV >= threshold_C[:, None]

    def break_ties():
        equal_CV = scores_CV == threshold_C[:, None]
        # Counted from the right, so that the highest ids among the equals are given up.
        rank_CV = lax.cumsum(equal_CV.astype(jnp.int32), axis=1, reverse=True)
        return reached_CV & ~(equal_CV & (rank_CV <= excess_C[:, None]))

    # float32 logits rarely tie, and the cumulative sum is the slowest step here.
    return lax.cond(jnp.any(excess_C > 0), break_ties, lambda: reached_CV)


def _threshold(scores_CV, live_C, k):
    """A score that exactly k of the row reach, or the k-th largest where ties allow no such score."""
    kept_CM, dropped_C = _candidates(scores_CV, k)
    threshold_C = _bisect(kept_CM, live_C, k)
    if kept_CM is scores_CV:
        return threshold_C
    overflow = jnp.any(live_C & (dropped_C >= threshold_C))
    return lax.cond(overflow, lambda: _bisect(scores_CV, live_C, k), lambda: threshold_C)


def _shared_threshold(scores_CV, live_C, k, axis):
    """The k-th largest score of all shards, and how many scores equal to it this shard gives up.

    Lower shards hold lower ids and keep theirs first. Only values travel: k a row from each shard.
    """
    offered = min(k, scores_CV.shape[1])
    kept_CM, dropped_C = _candidates(scores_CV, k)
    largest_CK = lax.top_k(kept_CM, offered)[0]
    if kept_CM is not scores_CV:
        overflow = jnp.any(live_C & (dropped_C >= largest_CK[:, -1]))
        largest_CK = lax.cond(overflow, lambda: lax.top_k(scores_CV, offered)[0], lambda: largest_CK)
    all_CM = lax.all_gather(largest_CK, axis, axis=1, tiled=True)
    threshold_C = lax.top_k(all_CM, k)[0][:, -1]

    equal_C = _count(scores_CV == threshold_C[:, None])
    equal_SC = lax.all_gather(equal_C, axis)
    shards_S = jnp.arange(equal_SC.shape[0], dtype=jnp.int32)
    is_lower_SC = shards_S[:, None] < lax.axis_index(axis)
    in_lower_C = jnp.sum(jnp.where(is_lower_SC, equal_SC, 0), axis=0, dtype=jnp.int32)
    wanted_C = k - _count(all_CM > threshold_C[:, None]) - in_lower_C
    return threshold_C, equal_C - jnp.clip(wanted_C, 0, equal_C)


def _count(mask_CM):
    return jnp.sum(mask_CM, axis=-1, dtype=jnp.int32)


def _candidates(scores_CV, k):
    """The three largest of each bin with the lanes after the last round of bins; the largest dropped.

    Bin b holds the ids that are b modulo the number of bins. A short row is its own candidates.
    """
    size, vocab = scores_CV.shape
    bins = bin_count(k, vocab)
    if not bins:
        return scores_CV, jnp.full(size, -jnp.inf, scores_CV.dtype)
    nothing_CB = jnp.full((size, bins), -jnp.inf, scores_CV.dtype)

    def insert(i, state):
        kept, dropped_CB = state
        score_CB = lax.dynamic_slice_in_dim(scores_CV, i * bins, bins, axis=1)
        # A step of insertion sort, in all bins at once: the larger stays, the smaller moves on.
        longer = []
        for kept_CB in kept:
            longer.append(jnp.maximum(score_CB, kept_CB))
            score_CB = jnp.minimum(score_CB, kept_CB)
        return tuple(longer), jnp.maximum(dropped_CB, score_CB)

    rounds = vocab // bins
    kept, dropped_CB = lax.fori_loop(0, rounds, insert, ((nothing_CB,) * KEEP, nothing_CB))
    rest_CM = scores_CV[:, rounds * bins :]
    return jnp.concatenate([*kept, rest_CM], axis=1), jnp.max(dropped_CB, axis=-1)


def _bisect(scores_CM, live_C, k):
    """A score that at least k of the row reach, and as few more as there are scores to tell them apart.

    Decides the bits of the threshold from the top; ends early once exactly k of every live row reach it.
    """
    keys_CM = _ordered_bits(scores_CM)
    rows, width = keys_CM.shape
    word = keys_CM.dtype

    def unsettled(state):
        bit, _, count_C = state
        return (bit > 0) & jnp.any(count_C != k)

    def try_bit(state):
        bit, threshold_C, count_C = state
        trial_C = jnp.where(count_C == k, threshold_C, threshold_C | bit)
        trial_count_C = jnp.sum(keys_CM >= trial_C[:, None], axis=-1, dtype=jnp.int32)
        reached_C = trial_count_C >= k
        threshold_C = jnp.where(reached_C, trial_C, threshold_C)
        return bit >> 1, threshold_C, jnp.where(reached_C, trial_count_C, count_C)

    top = jnp.array(1 << (jnp.iinfo(word).bits - 1), word)
    # A threshold of 0 is reached by the whole row. Dead rows start settled, so that the loop need not
    # wait for them.
    start = (top, jnp.zeros(rows, word), jnp.where(live_C, jnp.int32(width), jnp.int32(k)))
    _, threshold_C, _ = lax.while_loop(unsettled, try_bit, start)
    return lax.bitcast_convert_type(
        jnp.where(threshold_C >= top, threshold_C ^ top, ~threshold_C), scores_CM.dtype
    )


def _ordered_bits(scores_CM):
    """Unsigned integers in the order of the floats; 0 and -0 give the same."""
    bits = jnp.finfo(scores_CM.dtype).bits
    word = jnp.uint32 if bits == 32 else jnp.uint64
    raw_CM = lax.bitcast_convert_type(jnp.where(scores_CM == 0, 0, scores_CM), word)
    # Negative floats order backwards by their bits, so all their bits are flipped; positive ones only
    # need to come after them.
    sign = jnp.array(1 << (bits - 1), word)
    return jnp.where(raw_CM >= sign, ~raw_CM, raw_CM | sign)
