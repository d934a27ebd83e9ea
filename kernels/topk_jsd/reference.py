"""The loss written plainly, with lax.top_k, gathers and autodiff: the oracle of every faster version.

For one row, with q the student's and r the teacher's distribution over the vocabulary:

    S       the k tokens with the largest student logits, ties to the lowest id
    buckets the tokens of S, and with tail="bucket" one more that holds all other tokens;
            tail="renorm" rescales both distributions to S instead
    m       (1 - alpha) q + alpha r
    loss    (1 - alpha) KL(q || m) + alpha KL(r || m);  alpha 0: KL(r || q);  alpha 1: KL(q || r)

as in arXiv 2605.28014. A tail bucket lighter than 1 - exp(-1e-7) counts as that much and passes no
gradient, and log-ratios are clipped to +-20, as in the released code. Terms 0 log 0 are 0, in value and
in gradient.

Works in float32, or in float64 under x64. It shares no arithmetic with the fast versions, down to the
constants: a mistake that both made would pass every test that compares them.

Dimensions: N rows, D model width, V vocabulary, K buckets.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

from .records import LossAux, Options, Rows

LEAST_TAIL = -math.expm1(-1e-7)
LOG_RATIO_BOUND = 20.0


def loss_from_hidden(
    options: Options,
    student_hidden_ND: jax.Array,
    student_head_VD: jax.Array,
    teacher_hidden_ND: jax.Array,
    teacher_head_VD: jax.Array,
    rows: Rows,
) -> tuple[jax.Array, LossAux]:
    """`loss_from_logits` of hidden states times heads; holds both [N, V] arrays."""
    live_N = rows.weight_N != 0
    student_NV = _logits(student_hidden_ND, student_head_VD, live_N)
    teacher_NV = _logits(teacher_hidden_ND, teacher_head_VD, live_N)
    return loss_from_logits(options, student_NV, teacher_NV, rows)


def loss_from_logits(
    options: Options, student_NV: jax.Array, teacher_NV: jax.Array, rows: Rows
) -> tuple[jax.Array, LossAux]:
    """Sum over rows of weight x ratio x divergence, differentiable in the student's logits."""
    live_N = rows.weight_N != 0
    student_NV = _scores(options, student_NV, live_N)
    teacher_NV = lax.stop_gradient(_scores(options, teacher_NV, live_N))
    logq_NV = jax.nn.log_softmax(student_NV)
    logr_NV = jax.nn.log_softmax(teacher_NV)
    ids_NK = _top_k_ids(options, student_NV)
    logq_NK, mass_q_N = _buckets(logq_NV, ids_NK, options.tail)
    logr_NK, mass_r_N = _buckets(logr_NV, ids_NK, options.tail)
    divergence_N = _divergence(logq_NK, logr_NK, options.alpha)
    logp_N = None if rows.tokens_N is None else _of_tokens(logq_NV, rows.tokens_N)
    ratio_N = _ratio(options, divergence_N, logp_N, rows)
    return _weigh(LossAux(divergence_N, logp_N, ratio_N, mass_q_N, mass_r_N), rows)


def sampled_token_loss(
    options: Options, student_NV: jax.Array, teacher_NV: jax.Array, rows: Rows
) -> tuple[jax.Array, LossAux]:
    """Sum over rows of weight x ratio x stopgrad(logp_s - logp_t) logp_s of the given token.

    For sampled tokens its gradient is an unbiased estimate of that of KL(student || teacher).
    """
    assert rows.tokens_N is not None
    live_N = rows.weight_N != 0
    student_NV = _scores(options, student_NV, live_N)
    teacher_NV = lax.stop_gradient(_scores(options, teacher_NV, live_N))
    student_N = _of_tokens(jax.nn.log_softmax(student_NV), rows.tokens_N)
    teacher_N = _of_tokens(jax.nn.log_softmax(teacher_NV), rows.tokens_N)
    summand_N = lax.stop_gradient(student_N - teacher_N) * student_N
    ratio_N = _ratio(options, summand_N, student_N, rows)
    return _weigh(LossAux(summand_N, student_N, ratio_N, None, None), rows)


def _wide(x: jax.Array) -> jax.Array:
    return x if x.dtype == jnp.float64 else x.astype(jnp.float32)


def _logits(hidden_ND, head_VD, live_N):
    hidden_ND = jnp.where(live_N[:, None], hidden_ND, 0)
    # HIGHEST, since accelerators would round float32 operands to bfloat16 or the like.
    return jnp.einsum("nd,vd->nv", _wide(hidden_ND), _wide(head_VD), precision=lax.Precision.HIGHEST)


def _scores(options, logits_NV, live_N):
    """Logits over the temperature; -inf at padding ids."""
    # Rows of weight 0 are cleared before anything is computed: a NaN in them would reach the gradient
    # even through a product with 0.
    scores_NV = _wide(jnp.where(live_N[:, None], logits_NV, 0)) / options.temperature
    if options.num_tokens is None:
        return scores_NV
    return jnp.where(jnp.arange(scores_NV.shape[-1]) < options.num_tokens, scores_NV, -jnp.inf)


def _of_tokens(logp_NV, tokens_N):
    return jnp.take_along_axis(logp_NV, tokens_N[:, None], axis=-1)[:, 0]


def _top_k_ids(options, scores_NV):
    """The ids of S; None where S is the whole vocabulary."""
    tokens = options.num_tokens or scores_NV.shape[-1]
    if options.k is None or options.k >= tokens:
        return None
    scores_NV = lax.stop_gradient(scores_NV)
    # lax.top_k puts 0 before -0; here they tie.
    return lax.top_k(jnp.where(scores_NV == 0, 0, scores_NV), options.k)[1]


def _buckets(logp_NV, ids_NK, tail):
    """Log-probabilities of the buckets, and the probability of S."""
    if ids_NK is None:
        return logp_NV, jnp.sum(jnp.exp(logp_NV), axis=-1)
    logp_NK = jnp.take_along_axis(logp_NV, ids_NK, axis=-1)
    mass_N = jnp.sum(jnp.exp(logp_NK), axis=-1)
    if tail == "renorm":
        return jax.nn.log_softmax(logp_NK), mass_N
    # A sum over the other tokens, since 1 - mass would lose a small tail to rounding.
    others_NV = jnp.put_along_axis(jnp.exp(logp_NV), ids_NK, 0, axis=-1, inplace=False)
    tail_N1 = jnp.sum(others_NV, axis=-1, keepdims=True)
    return jnp.append(logp_NK, jnp.log(jnp.maximum(tail_N1, LEAST_TAIL)), axis=-1), mass_N


def _divergence(logq_NK, logr_NK, alpha):
    if alpha == 0:
        return _kl(logr_NK, logq_NK)
    if alpha == 1:
        return _kl(logq_NK, logr_NK)
    # logaddexp of two -inf has a NaN gradient, which the products with 0 below would not clear.
    empty_NK = (logq_NK == -jnp.inf) & (logr_NK == -jnp.inf)
    logm_NK = jnp.logaddexp(
        jnp.where(empty_NK, 0, logq_NK) + math.log1p(-alpha),
        jnp.where(empty_NK, 0, logr_NK) + math.log(alpha),
    )
    return (1 - alpha) * _kl(logq_NK, logm_NK) + alpha * _kl(logr_NK, logm_NK)


def _kl(logp_NK, logm_NK):
    empty_NK = logp_NK == -jnp.inf
    # Both operands are cleared, not only the product: the gradient of 0 x inf is NaN.
    log_ratio_NK = jnp.where(empty_NK, 0, logp_NK) - jnp.where(empty_NK, 0, logm_NK)
    return jnp.sum(jnp.exp(logp_NK) * log_ratio_NK, axis=-1)


def _ratio(options, divergence_N, logp_N, rows):
    """The capped importance ratio, without gradient; ones where no cap is given."""
    if options.ratio_cap is None:
        return jnp.ones_like(divergence_N)
    log_ratio_N = lax.stop_gradient(logp_N) - rows.sampler_logp_N.astype(logp_N.dtype)
    # Clipped before the exponential, so that it cannot overflow where no cap is reached.
    ratio_N = jnp.exp(jnp.clip(log_ratio_N, -LOG_RATIO_BOUND, LOG_RATIO_BOUND))
    return jnp.minimum(ratio_N, options.ratio_cap)


def _weigh(aux, rows):
    """The loss of the rows' terms, and the terms without gradient, 0 where the weight is."""
    # Selects, not products with a weight of 0: the ratio of a dead row may be NaN.
    live_N = rows.weight_N != 0
    scale_N = jnp.where(live_N, rows.weight_N.astype(aux.divergence_N.dtype) * aux.ratio_N, 0)
    loss = jnp.sum(jnp.where(live_N, scale_N * aux.divergence_N, 0))
    return loss, jax.tree.map(lambda x_N: lax.stop_gradient(jnp.where(live_N, x_N, 0)), aux)
