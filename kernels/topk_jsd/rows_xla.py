"""The row kernel in XLA: from two blocks of logits to divergences and their gradient, on any backend.

    takes  student and teacher logits [C, V], one weight a row
    gives  the divergence and its by-products of each row, and its gradient in the student's logits
    right  when it agrees with `reference.py` in values and gradients

With q the student's probabilities, S the chosen tokens, g = d(divergence)/dq by bucket and A the sum
of q g over the buckets, the gradient in the scores is elementwise, with no gather or scatter:

    q_j (g_j - A)  for j in S        q_j (g_tail - A)  for the others

The code calls q g the pull. A few rows are computed at a time: what is between logits and gradient is
then small, and stays in cache. `selection.py` chooses S.

With `axis` the vocabulary is split along that mesh axis (under shard_map), lower ids on lower shards.
Each shard holds its columns; maxima and sums of rows are exchanged, in as few messages as possible.

Dimensions: C rows, V vocabulary (with `axis` this shard's part of it), N rows in the fields of a record.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .records import LossAux, Options, Rows, working_dtype
from .row_math import TAIL_FLOOR, bucket, capped_ratio, tail_bucket
from .selection import select_top_k

BLOCKS = 64  # of rows, so that temporaries are a small part of the logits
MIN_BLOCK = 16


def row_terms(
    options: Options,
    student_CV: jax.Array,
    teacher_CV: jax.Array,
    rows_C: Rows,
    live_C: jax.Array,
    grad_dtype: Any,
    axis: str | None = None,
) -> tuple[LossAux, jax.Array | None]:
    """Each row's share of aux [C], and d(weight x ratio x divergence)/d(student logits) [C, V].

    Both are 0 for rows that are not live, whatever their logits. grad_dtype None: no gradient.
    """
    size = student_CV.shape[0]
    shards = 1 if axis is None else lax.axis_size(axis)
    # A shard's rows are narrower, so a block takes more of them, for fewer exchanges.
    block = max(MIN_BLOCK, size * shards // BLOCKS)
    terms = partial(_block_terms, options, grad_dtype=grad_dtype, axis=axis)
    operands = (student_CV, teacher_CV, rows_C, live_C)
    if size <= block:
        return terms(*operands)

    def trip(i, out):
        at = jnp.minimum(i * block, size - block)  # the last block may overlap the one before

        def put(whole, part):
            return lax.dynamic_update_slice_in_dim(whole, part, at, 0)

        piece = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, block), operands)
        *_, live = piece
        return lax.cond(jnp.any(live), lambda: jax.tree.map(put, out, terms(*piece)), lambda: out)

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct((block, *x.shape[1:]), x.dtype), operands)
    out = jax.eval_shape(terms, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), out)
    return lax.fori_loop(0, -(-size // block), trip, zeros)


def _block_terms(options, student_CV, teacher_CV, rows_C, live_C, *, grad_dtype, axis):
    ids_V = jnp.arange(student_CV.shape[1], dtype=jnp.int32)
    shards = 1
    if axis is not None:
        ids_V = ids_V + lax.axis_index(axis) * ids_V.size
        shards = lax.axis_size(axis)
    scores_CV = _scores(options, student_CV, live_C, ids_V)
    teacher_scores_CV = _scores(options, teacher_CV, live_C, ids_V)
    logq_CV, logr_CV = _log_softmax(axis, scores_CV, teacher_scores_CV)
    logp_C = None
    ratio_C = jnp.ones_like(logq_CV[:, 0])
    if rows_C.tokens_N is not None:
        logp_C = _of_tokens(logq_CV, rows_C.tokens_N, ids_V, axis)
        if options.ratio_cap is not None:
            ratio_C = capped_ratio(logp_C, rows_C.sampler_logp_N, options.ratio_cap)
    k = options.top_k(ids_V.size * shards)
    chosen_CV = jnp.bool_(True) if k is None else select_top_k(scores_CV, live_C, k, axis)
    divergence_C, slope_CV, *masses = _divergence(options, k, logq_CV, logr_CV, chosen_CV, axis)
    stats_C = LossAux(divergence_C, logp_C, ratio_C, *masses)
    stats_C = jax.tree.map(lambda x_C: jnp.where(live_C, x_C, 0), stats_C)
    if grad_dtype is None:
        return stats_C, None
    scale_C = rows_C.weight_N.astype(ratio_C.dtype) * ratio_C / options.temperature
    # A select and not a product: dead rows have a weight of 0, and their slope may be NaN.
    return stats_C, jnp.where(live_C[:, None], scale_C[:, None] * slope_CV, 0).astype(grad_dtype)


def _scores(options, logits_CV, live_C, ids_V):
    logits_CV = jnp.where(live_C[:, None], logits_CV, 0)
    scores_CV = logits_CV.astype(working_dtype(logits_CV)) / options.temperature
    if options.num_tokens is None:
        return scores_CV
    return jnp.where(ids_V < options.num_tokens, scores_CV, -jnp.inf)


def _sums(axis, *parts_CV):
    """The sum of each over the vocabulary, [C]; over all its shards in one exchange."""
    sums = [jnp.sum(x_CV, axis=-1) for x_CV in parts_CV]
    return sums if axis is None else jnp.unstack(lax.psum(jnp.stack(sums), axis))


def _log_softmax(axis, *scores):
    peaks = [jnp.max(x_CV, axis=-1) for x_CV in scores]
    if axis is not None:
        peaks = jnp.unstack(lax.pmax(jnp.stack(peaks), axis))
    # Shift first, then the logarithm of the sum: their total has lost the digits that tell two close
    # models apart.
    shifted = [x_CV - peak_C[:, None] for x_CV, peak_C in zip(scores, peaks, strict=True)]
    totals = _sums(axis, *(jnp.exp(x_CV) for x_CV in shifted))
    return [x_CV - jnp.log(total_C)[:, None] for x_CV, total_C in zip(shifted, totals, strict=True)]


def _of_tokens(logq_CV, tokens_C, ids_V, axis):
    if axis is None:
        return jnp.take_along_axis(logq_CV, tokens_C[:, None], axis=-1)[:, 0]
    # One shard holds the token; the others add 0.
    return _sums(axis, jnp.where(ids_V == tokens_C[:, None], logq_CV, 0))[0]


def _divergence(options, k, logq_CV, logr_CV, chosen_CV, axis):
    """Divergence and its slope in the student's scores, and the two masses of the chosen tokens."""

    def keep(x_CV, otherwise=0.0):
        return jnp.where(chosen_CV, x_CV, otherwise)

    # Log-probabilities that the divergence compares: renormalised to the chosen tokens if asked for.
    logs = (logq_CV, logr_CV)
    if k is not None and options.tail == "renorm":
        logs = _log_softmax(axis, *(keep(logp_CV, -jnp.inf) for logp_CV in logs))
    value_CV, pull_CV = bucket(*logs, options.alpha)
    q_CV = jnp.exp(logq_CV)
    r_CV = jnp.exp(logr_CV)
    parts = [keep(x_CV) for x_CV in (value_CV, pull_CV, q_CV, r_CV)]
    if k is not None and options.tail == "bucket":
        # The tail is summed over its tokens, since 1 - mass would lose a small one to rounding.
        parts += [jnp.where(chosen_CV, 0, p_CV) for p_CV in (q_CV, r_CV)]
    divergence_C, pull_C, mass_q_C, mass_r_C, *tails = _sums(axis, *parts)
    if tails:
        tail_q_C, tail_r_C = tails
        value_C, tail_pull_C = tail_bucket(tail_q_C, tail_r_C, partial(bucket, alpha=options.alpha))
        divergence_C = divergence_C + value_C
        pull_C = pull_C + tail_pull_C
        # A token of the tail takes its part of the tail's pull, in proportion to its probability.
        others_C = tail_pull_C / jnp.maximum(tail_q_C, TAIL_FLOOR)
        pull_CV = jnp.where(chosen_CV, pull_CV, q_CV * others_C[:, None])
    return divergence_C, pull_CV - jnp.exp(logs[0]) * pull_C[:, None], mass_q_C, mass_r_C
