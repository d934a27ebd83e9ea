"""The loss in XLA, chunk by chunk, with the gradient taken in the forward pass.

Rows of weight 0 cost nothing: the others are brought to the front and a loop takes them `chunk` at
a time, ceil(live / chunk) trips, decided at run time. A trip makes two [C, V] blocks of float32
logits (two matmuls), turns them into the divergence and its gradient with elementwise work and row
sums, and at once multiplies that gradient into the hidden states' rows and the head's float32
accumulator (two more matmuls): four in all, the fewest without approximation, and no block outlives
its trip.

With q the student's probabilities, S the chosen tokens, g = d(divergence)/dq by bucket and A the
sum of q g over the buckets, the gradient in the scores is elementwise, with no gather or scatter:

    q_j (g_j - A)  for j in S        q_j (g_tail - A)  for the others

The code calls q g the pull. The choice of S is exact: the k-th largest score is found by bisection
on the scores' bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .reference import TAIL_FLOOR, LossAux, Options, Rows, capped_ratio, to_scores, working_dtype

# ---- from hidden states ------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss_from_hidden(
    options: Options, student_hidden_ND: jax.Array, student_head_VD: jax.Array,
    teacher_hidden_ND: jax.Array, teacher_head_VD: jax.Array, rows: Rows,
) -> tuple[jax.Array, LossAux]:  # fmt: skip
    """Sum over rows of weight x ratio x divergence; not differentiable twice."""
    student, teacher = (student_hidden_ND, student_head_VD), (teacher_hidden_ND, teacher_head_VD)
    return _run_chunks(options, student, teacher, rows, with_grad=False)[:2]


def _hidden_fwd(options, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, rows):
    student, teacher = (hidden_ND, head_VD), (teacher_hidden_ND, teacher_head_VD)
    loss, aux, grads = _run_chunks(options, student, teacher, rows, with_grad=True)
    return (loss, aux), grads


def _hidden_bwd(options, grads, cotangents):
    del options
    hidden_ND, head_VD = grads
    scale = lambda grad: (cotangents[0] * grad.astype(cotangents[0].dtype)).astype(hidden_ND.dtype)
    return scale(hidden_ND), scale(head_VD), None, None, None


loss_from_hidden.defvjp(_hidden_fwd, _hidden_bwd)


def _run_chunks(options: Options, student: Any, teacher: Any, rows: Rows, with_grad: bool):
    """Loss, aux and, if asked for, (hidden gradient [N, D], float32 head gradient [V, D])."""
    hidden_ND, head_VD = student
    n_rows, width = hidden_ND.shape
    size = min(options.chunk, n_rows)
    live_N = rows.weight_N != 0
    n_live = jnp.sum(live_N, dtype=jnp.int32)
    order_N = jnp.argsort(~live_N, stable=True)
    padded = -(-n_rows // size) * size
    order_M = jnp.pad(order_N, (0, padded - n_rows))
    wide = working_dtype(hidden_ND)
    grads = None
    if with_grad:
        grads = (jnp.zeros((padded, width), hidden_ND.dtype), jnp.zeros(head_VD.shape, wide))

    def trip(i, carry):
        stats_M, sums, trips = carry
        at = i * size
        ids_C = lax.dynamic_slice_in_dim(order_M, at, size)
        live_C = at + jnp.arange(size, dtype=jnp.int32) < n_live
        stats_C, grads_C = _chunk(options, student, teacher, rows, ids_C, live_C, with_grad)
        put = lambda all_M, x_C: lax.dynamic_update_slice_in_dim(all_M, x_C, at, 0)
        if grads_C is not None:
            sums = (put(sums[0], grads_C[0].astype(hidden_ND.dtype)), sums[1] + grads_C[1])
        return jax.tree.map(put, stats_M, stats_C), sums, trips + 1

    zero_M = jnp.zeros(padded, wide)
    logp_M = None if rows.tokens_N is None else zero_M
    start = (LossAux(zero_M, logp_M, zero_M, zero_M, zero_M), grads, jnp.int32(0))
    stats_M, grads, trips = lax.fori_loop(jnp.int32(0), (n_live + size - 1) // size, trip, start)
    back_N = jnp.argsort(order_N)
    aux = jax.tree.map(lambda x_M: x_M[back_N], stats_M)
    if grads is not None:
        grads = (grads[0][back_N], grads[1])
    return _total(rows, aux), aux._replace(chunks_run=trips), grads


def _chunk(options, student, teacher, rows, ids_C, live_C, with_grad):
    take = lambda hidden_ND: jnp.where(live_C[:, None], hidden_ND[ids_C], 0)
    student_CD, (_, head_VD) = take(student[0]), student
    student_CV = _matmul(student_CD, head_VD, (1, 1))
    teacher_CV = _matmul(take(teacher[0]), teacher[1], (1, 1))
    rows_C = jax.tree.map(lambda x_N: x_N[ids_C], rows)
    stats_C, grad_CV = _row_terms(options, student_CV, teacher_CV, rows_C, live_C)
    if not with_grad:
        return stats_C, None
    grad_CV = grad_CV.astype(head_VD.dtype)
    return stats_C, (_matmul(grad_CV, head_VD, (1, 0)), _matmul(grad_CV, student_CD, (0, 0)))


def _matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts one axis of each; accumulates and returns float32 (float64 for float64)."""
    # The default precision of an accelerator would round float32 operands to 10 bits or fewer.
    precision = None if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=working_dtype(a))


# ---- from logits -------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss_from_logits(
    options: Options, student_NV: jax.Array, teacher_NV: jax.Array, rows: Rows
) -> tuple[jax.Array, LossAux]:
    """The same of logits that already exist; all rows at once."""
    return _logits_fwd(options, student_NV, teacher_NV, rows)[0]


def _logits_fwd(options, student_NV, teacher_NV, rows):
    live_N = rows.weight_N != 0
    clear = lambda logits_NV: jnp.where(live_N[:, None], logits_NV, 0)
    aux, grad_NV = _row_terms(options, clear(student_NV), clear(teacher_NV), rows, live_N)
    return (_total(rows, aux), aux), grad_NV.astype(student_NV.dtype)


def _logits_bwd(options, grad_NV, cotangents):
    del options
    return cotangents[0].astype(grad_NV.dtype) * grad_NV, None, None


loss_from_logits.defvjp(_logits_fwd, _logits_bwd)


# ---- rows --------------------------------------------------------------------------------------


def _total(rows, aux):
    live_N = rows.weight_N != 0
    scale_N = rows.weight_N.astype(aux.ratio_N.dtype) * aux.ratio_N
    return jnp.sum(jnp.where(live_N, scale_N * aux.divergence_N, 0))


def _row_terms(options, student_CV, teacher_CV, rows_C, live_C):
    """Each row's share of aux, and d(weight x ratio x divergence)/d(student logits); dead rows: 0."""
    scores_CV = to_scores(student_CV, options)
    logq_CV = _log_softmax(scores_CV)
    logr_CV = _log_softmax(to_scores(teacher_CV, options))
    logp_C, ratio_C = None, jnp.ones_like(logq_CV[:, 0])
    if rows_C.tokens_N is not None:
        logp_C = jnp.take_along_axis(logq_CV, rows_C.tokens_N[:, None], axis=-1)[:, 0]
        if options.ratio_cap is not None:
            ratio_C = capped_ratio(logp_C, rows_C.sampler_logp_N, options.ratio_cap)
    k = options.top_k(scores_CV.shape[-1])
    chosen_CV = jnp.bool_(True) if k is None else select_top_k(scores_CV, live_C, k)
    divergence_C, slope_CV, *masses = _divergence(options, k, logq_CV, logr_CV, chosen_CV)
    scale_C = rows_C.weight_N.astype(ratio_C.dtype) * ratio_C / options.temperature
    grad_CV = jnp.where(live_C[:, None], scale_C[:, None] * slope_CV, 0)
    stats_C = LossAux(divergence_C, logp_C, ratio_C, *masses)
    return jax.tree.map(lambda x_C: jnp.where(live_C, x_C, 0), stats_C), grad_CV


def _log_softmax(scores_CV):
    return scores_CV - jax.nn.logsumexp(scores_CV, axis=-1, keepdims=True)


def _divergence(options, k, logq_CV, logr_CV, chosen_CV):
    """Divergence and its slope in the student's scores, and the two masses of the chosen tokens."""
    keep = lambda logp_CV: jnp.where(chosen_CV, logp_CV, -jnp.inf)
    masses = tuple(jnp.sum(jnp.exp(keep(logp_CV)), axis=-1) for logp_CV in (logq_CV, logr_CV))
    if k is not None and options.tail == "renorm":
        logq_CV, logr_CV = _log_softmax(keep(logq_CV)), _log_softmax(keep(logr_CV))
    value_CV, pull_CV = _bucket(logq_CV, logr_CV, options.alpha)
    divergence_C = jnp.sum(jnp.where(chosen_CV, value_CV, 0), axis=-1)
    pull_C = jnp.sum(jnp.where(chosen_CV, pull_CV, 0), axis=-1)
    q_CV = jnp.exp(logq_CV)
    if k is not None and options.tail == "bucket":
        tail_q_C = jnp.sum(jnp.where(chosen_CV, 0, q_CV), axis=-1)
        tail_r_C = jnp.sum(jnp.where(chosen_CV, 0, jnp.exp(logr_CV)), axis=-1)
        value_C, tail_pull_C = _tail_bucket(tail_q_C, tail_r_C, options.alpha)
        divergence_C, pull_C = divergence_C + value_C, pull_C + tail_pull_C
        others_C = tail_pull_C / jnp.maximum(tail_q_C, TAIL_FLOOR)
        pull_CV = jnp.where(chosen_CV, pull_CV, q_CV * others_C[:, None])
    return divergence_C, pull_CV - q_CV * pull_C[:, None], *masses


def _tail_bucket(tail_q_C, tail_r_C, alpha):
    logq_C, logr_C = (jnp.log(jnp.maximum(tail_C, TAIL_FLOOR)) for tail_C in (tail_q_C, tail_r_C))
    value_C, pull_C = _bucket(logq_C, logr_C, alpha)
    return value_C, jnp.where(tail_q_C < TAIL_FLOOR, 0, pull_C)


def _bucket(logq, logr, alpha):
    """Elementwise share of the divergence, and q d(divergence)/dq. Nothing where q (or r) is 0."""
    q, r, delta = jnp.exp(logq), jnp.exp(logr), logr - logq
    if alpha == 0:
        value = jnp.where(r == 0, 0, r * delta)
        return value, -r
    if alpha == 1:
        value = jnp.where(q == 0, 0, -q * delta)
        return value, value + q
    # log(m / q) and log(m / r), written so that no exponential overflows and equal logits give 0.
    soft = jnp.log1p(jnp.where(delta > 0, 1 - alpha, alpha) * jnp.expm1(-jnp.abs(delta)))
    pull = jnp.where(q == 0, 0, -(1 - alpha) * q * (soft + jnp.maximum(delta, 0)))
    return pull + jnp.where(r == 0, 0, -alpha * r * (soft + jnp.maximum(-delta, 0))), pull


@partial(jax.jit, static_argnums=2)  # so that callers outside of jit compile its loop once
def select_top_k(scores_CV: jax.Array, live_C: jax.Array, k: int) -> jax.Array:
    """True at the k largest scores of a row (k < V), ties to the lowest id; 0 and -0 tie.

    All of a dead row is chosen: its equal scores would cost a full search.
    """
    keys_CV = _ordered_bits(scores_CV)
    threshold_C, count_C = _threshold(keys_CV, live_C, k)
    above_CV = keys_CV >= threshold_C[:, None]

    def break_ties():
        equal_CV = keys_CV == threshold_C[:, None]
        spare_C = count_C - k
        # Counted from the right: the highest ids among the equals go.
        rank_CV = lax.cumsum(equal_CV.astype(jnp.int32), axis=1, reverse=True)
        return above_CV & ~(equal_CV & (rank_CV <= spare_C[:, None]))

    return lax.cond(jnp.any(count_C > k), break_ties, lambda: above_CV)


def _ordered_bits(scores_CV):
    """Unsigned integers in the order of the floats."""
    bits = jnp.finfo(scores_CV.dtype).bits
    word = jnp.uint32 if bits == 32 else jnp.uint64
    raw_CV = lax.bitcast_convert_type(jnp.where(scores_CV == 0, 0, scores_CV), word)
    sign = jnp.array(1 << (bits - 1), word)
    return jnp.where(raw_CV >= sign, ~raw_CV, raw_CV | sign)


def _threshold(keys_CV, live_C, k):
    """The largest key that at least k keys of the row reach, and how many reach it.

    Bit by bit from the top; ends early once every row's count is exactly k. Dead rows: 0 and k.
    """
    rows, vocab = keys_CV.shape
    word = keys_CV.dtype

    def unsettled(state):
        bit, _, count_C = state
        return (bit > 0) & jnp.any(count_C != k)

    def try_bit(state):
        bit, threshold_C, count_C = state
        trial_C = jnp.where(count_C == k, threshold_C, threshold_C | bit)
        trial_count_C = jnp.sum(keys_CV >= trial_C[:, None], axis=-1, dtype=jnp.int32)
        reached_C = trial_count_C >= k
        threshold_C = jnp.where(reached_C, trial_C, threshold_C)
        return bit >> 1, threshold_C, jnp.where(reached_C, trial_count_C, count_C)

    top = jnp.array(1 << (jnp.iinfo(word).bits - 1), word)
    start = (top, jnp.zeros(rows, word), jnp.where(live_C, jnp.int32(vocab), jnp.int32(k)))
    _, threshold_C, count_C = lax.while_loop(unsettled, try_bit, start)
    return threshold_C, count_C
