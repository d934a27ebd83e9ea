"""The row kernel in XLA: from two blocks of logits to divergences and their gradient, on any backend.

    takes  student and teacher logits [C, V], one weight a row
    gives  the divergence and its by-products of each row, and its gradient in the student's logits
    right  when it agrees with `reference.py` in values and gradients

With q the student's probabilities, S the chosen tokens, g = d(divergence)/dq by bucket and A the sum
of q g over the buckets, the gradient in the scores is elementwise, with no gather or scatter:

    q_j (g_j - A)  for j in S        q_j (g_tail - A)  for the others

The code calls q g the pull. Rows go through a few at a time, so that what lies between logits and
gradient is small, and stays in cache. `selection.py` chooses S.

With `axis` the vocabulary is split along that mesh axis (under shard_map), lower ids on lower shards:
each shard holds its columns, and maxima and sums of rows are exchanged, as few times as may be.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .divergence import bucket, tail_bucket
from .reference import TAIL_FLOOR, LossAux, Options, Rows, capped_ratio, working_dtype
from .selection import select_top_k

BLOCKS = 64  # of rows, so that temporaries are a small part of the logits
MIN_BLOCK = 16


def row_terms(
    options: Options, student_CV: jax.Array, teacher_CV: jax.Array, rows_C: Rows, live_C: jax.Array,
    grad_dtype: Any, axis: str | None = None,
) -> tuple[LossAux, jax.Array | None]:  # fmt: skip
    """Each row's share of aux [C], and d(weight x ratio x divergence)/d(student logits) [C, V].

    Rows that are not live give 0, whatever their logits. grad_dtype None: no gradient.
    """
    size = student_CV.shape[0]
    shards = 1 if axis is None else lax.axis_size(axis)
    block = max(MIN_BLOCK, size * shards // BLOCKS)  # narrower rows, more of them: fewer exchanges
    terms = partial(_block_terms, options, grad_dtype=grad_dtype, axis=axis)
    operands = (student_CV, teacher_CV, rows_C, live_C)
    if size <= block:
        return terms(*operands)

    def trip(i, out):
        at = jnp.minimum(i * block, size - block)  # the last block may overlap the one before
        piece = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, at, block), operands)
        put = lambda whole, part: lax.dynamic_update_slice_in_dim(whole, part, at, 0)
        return lax.cond(jnp.any(piece[3]), lambda: jax.tree.map(put, out, terms(*piece)), lambda: out)

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct((block, *x.shape[1:]), x.dtype), operands)
    out = jax.eval_shape(terms, *first)
    zeros = jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), out)
    return lax.fori_loop(0, -(-size // block), trip, zeros)


def _block_terms(options, student_CV, teacher_CV, rows_C, live_C, *, grad_dtype, axis):
    ids_V = jnp.arange(student_CV.shape[1], dtype=jnp.int32)
    shards = 1
    if axis is not None:
        ids_V, shards = ids_V + lax.axis_index(axis) * ids_V.size, lax.axis_size(axis)
    clear = lambda x_CV: jnp.where(live_C[:, None], x_CV, 0)
    scores_CV, logr_CV = (_scores(options, clear(x_CV), ids_V) for x_CV in (student_CV, teacher_CV))
    logq_CV, logr_CV = _log_softmax(axis, scores_CV, logr_CV)
    logp_C, ratio_C = None, jnp.ones_like(logq_CV[:, 0])
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
    return stats_C, jnp.where(live_C[:, None], scale_C[:, None] * slope_CV, 0).astype(grad_dtype)


def _scores(options, logits_CV, ids_V):
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
    shifted = [x_CV - peak_C[:, None] for x_CV, peak_C in zip(scores, peaks, strict=True)]
    totals = _sums(axis, *(jnp.exp(x_CV) for x_CV in shifted))
    return [x_CV - jnp.log(total_C)[:, None] for x_CV, total_C in zip(shifted, totals, strict=True)]


def _of_tokens(logq_CV, tokens_C, ids_V, axis):
    if axis is None:
        return jnp.take_along_axis(logq_CV, tokens_C[:, None], axis=-1)[:, 0]
    return _sums(axis, jnp.where(ids_V == tokens_C[:, None], logq_CV, 0))[0]


def _divergence(options, k, logq_CV, logr_CV, chosen_CV, axis):
    """Divergence and its slope in the student's scores, and the two masses of the chosen tokens."""
    keep = lambda x_CV, otherwise=0.0: jnp.where(chosen_CV, x_CV, otherwise)
    logs = (logq_CV, logr_CV)
    if k is not None and options.tail == "renorm":
        logs = _log_softmax(axis, *(keep(logp_CV, -jnp.inf) for logp_CV in logs))
    value_CV, pull_CV = bucket(*logs, options.alpha)
    probs = [jnp.exp(logp_CV) for logp_CV in (logq_CV, logr_CV)]
    parts = [keep(x_CV) for x_CV in (value_CV, pull_CV, *probs)]
    if k is not None and options.tail == "bucket":
        parts += [jnp.where(chosen_CV, 0, p_CV) for p_CV in probs]
    divergence_C, pull_C, mass_q_C, mass_r_C, *tails = _sums(axis, *parts)
    if tails:
        value_C, tail_pull_C = tail_bucket(tails[0], tails[1], partial(bucket, alpha=options.alpha))
        divergence_C, pull_C = divergence_C + value_C, pull_C + tail_pull_C
        others_C = tail_pull_C / jnp.maximum(tails[0], TAIL_FLOOR)
        pull_CV = jnp.where(chosen_CV, pull_CV, probs[0] * others_C[:, None])
    return divergence_C, pull_CV - jnp.exp(logs[0]) * pull_C[:, None], mass_q_C, mass_r_C
