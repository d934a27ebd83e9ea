"""The loss written plainly: lax.top_k, gathers and autodiff. The oracle of every faster version.

For one row, with q the student's and r the teacher's distribution over the vocabulary:

    S       the k tokens with the largest student logits, ties to the lowest id
    buckets the tokens of S, and with tail="bucket" one more that holds all the others;
            tail="renorm" rescales both distributions to S instead
    m       (1 - alpha) q + alpha r
    loss    (1 - alpha) KL(q || m) + alpha KL(r || m);  alpha 0: KL(r || q);  alpha 1: KL(q || r)

as in arXiv 2605.28014. A tail bucket lighter than 1 - exp(-1e-7) counts as that much and passes no
gradient, as in the released code. Terms 0 log 0 are 0, in value and in gradient.

Shapes: N rows, D model width, V vocabulary, K buckets. Works in float32, or float64 under x64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

TAIL_FLOOR = -math.expm1(-1e-7)
MAX_LOG_RATIO = 20.0


@dataclass(frozen=True)
class Options:
    """What a compiled loss is specialised to (hashable). `api.py` documents the fields."""

    k: int | None = 100
    alpha: float = 0.5
    tail: str = "bucket"
    temperature: float = 1.0
    num_tokens: int | None = None
    ratio_cap: float | None = None
    chunk: int = 1024
    implementation: str | None = None
    vocab_axis: str | None = None  # the mesh axis that splits the vocabulary, inside shard_map

    def top_k(self, vocab: int) -> int | None:
        """The number of tokens to select among `vocab`; None where that is all of them."""
        tokens = vocab if self.num_tokens is None else self.num_tokens
        return None if self.k is None or self.k >= tokens else self.k


class Rows(NamedTuple):
    """What belongs to each row beside its hidden states or logits."""

    weight_N: jax.Array
    tokens_N: jax.Array | None = None
    sampler_logp_N: jax.Array | None = None


class LossAux(NamedTuple):
    """By-products, without gradient, in the order of the rows; 0 where the weight is 0."""

    divergence_N: jax.Array  # before weight and ratio
    student_logp_N: jax.Array | None  # of the given tokens; None: no tokens were given
    ratio_N: jax.Array  # the capped importance ratio; 1: none was asked for
    student_mass_N: jax.Array | None  # probability the student puts on its top k
    teacher_mass_N: jax.Array | None  # probability the teacher puts on the same tokens
    chunks_run: jax.Array | None = None  # int32 scalar; None: not a chunked computation


def working_dtype(x: jax.Array) -> jnp.dtype:
    """float64 for float64, else float32: the dtype of logits and of all that follows."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def to_scores(logits_NV: jax.Array, options: Options) -> jax.Array:
    """float32 (or float64) logits over the temperature; -inf at ids >= num_tokens."""
    scores_NV = logits_NV.astype(working_dtype(logits_NV)) / options.temperature
    if options.num_tokens is None:
        return scores_NV
    return jnp.where(jnp.arange(scores_NV.shape[-1]) < options.num_tokens, scores_NV, -jnp.inf)


def capped_ratio(logp_N: jax.Array, sampler_logp_N: jax.Array, cap: float) -> jax.Array:
    """min(exp(logp - sampler_logp), cap), the log-ratio clipped to +-20."""
    log_ratio_N = logp_N - sampler_logp_N.astype(logp_N.dtype)
    return jnp.minimum(jnp.exp(jnp.clip(log_ratio_N, -MAX_LOG_RATIO, MAX_LOG_RATIO)), cap)


def loss_from_hidden(
    options: Options, student_hidden_ND: jax.Array, student_head_VD: jax.Array,
    teacher_hidden_ND: jax.Array, teacher_head_VD: jax.Array, rows: Rows,
) -> tuple[jax.Array, LossAux]:  # fmt: skip
    """`loss_from_logits` of hidden states times heads; holds both [N, V] arrays."""
    live_N1 = rows.weight_N[:, None] != 0
    to_logits = lambda hidden_ND, head_VD: jnp.einsum(
        "nd,vd->nv",
        jnp.where(live_N1, hidden_ND, 0).astype(working_dtype(hidden_ND)),
        head_VD.astype(working_dtype(hidden_ND)),
        precision=lax.Precision.HIGHEST,
    )
    student_NV = to_logits(student_hidden_ND, student_head_VD)
    return loss_from_logits(options, student_NV, to_logits(teacher_hidden_ND, teacher_head_VD), rows)


def loss_from_logits(
    options: Options, student_NV: jax.Array, teacher_NV: jax.Array, rows: Rows
) -> tuple[jax.Array, LossAux]:
    """Sum over rows of weight x ratio x divergence, differentiable in the student's logits."""
    student_NV, teacher_NV, live_N = _live_scores(options, student_NV, teacher_NV, rows)
    logq_NV, logr_NV = jax.nn.log_softmax(student_NV), jax.nn.log_softmax(teacher_NV)
    ids_NK = _top_k_ids(student_NV, options.top_k(student_NV.shape[-1]))
    logq_NK, mass_q_N = _buckets(logq_NV, ids_NK, options.tail)
    logr_NK, mass_r_N = _buckets(logr_NV, ids_NK, options.tail)
    divergence_N = _divergence(logq_NK, logr_NK, options.alpha)
    logp_N = None if rows.tokens_N is None else _of_tokens(logq_NV, rows.tokens_N)
    return _weigh(options.ratio_cap, divergence_N, logp_N, (mass_q_N, mass_r_N), live_N, rows)


def sampled_token_loss(
    options: Options, student_NV: jax.Array, teacher_NV: jax.Array, rows: Rows
) -> tuple[jax.Array, LossAux]:
    """Sum over rows of weight x ratio x stopgrad(logp_s - logp_t) logp_s of the given token.

    Its gradient is an unbiased estimate of that of KL(student || teacher), for sampled tokens.
    """
    assert rows.tokens_N is not None
    student_NV, teacher_NV, live_N = _live_scores(options, student_NV, teacher_NV, rows)
    student_N = _of_tokens(jax.nn.log_softmax(student_NV), rows.tokens_N)
    teacher_N = _of_tokens(jax.nn.log_softmax(teacher_NV), rows.tokens_N)
    divergence_N = lax.stop_gradient(student_N - teacher_N) * student_N
    return _weigh(options.ratio_cap, divergence_N, student_N, None, live_N, rows)


def _live_scores(options, student_NV, teacher_NV, rows):
    # Rows of weight 0 are cleared before anything is computed, so that a NaN in them stays out of
    # the gradient too.
    live_N = rows.weight_N != 0
    student_NV = to_scores(jnp.where(live_N[:, None], student_NV, 0), options)
    teacher_NV = to_scores(jnp.where(live_N[:, None], teacher_NV, 0), options)
    return student_NV, lax.stop_gradient(teacher_NV), live_N


def _of_tokens(logp_NV, tokens_N):
    return jnp.take_along_axis(logp_NV, tokens_N[:, None], axis=-1)[:, 0]


def _top_k_ids(scores_NV, k):
    if k is None:
        return None
    scores_NV = lax.stop_gradient(scores_NV)
    # lax.top_k puts 0 before -0; here they tie.
    return lax.top_k(jnp.where(scores_NV == 0, 0, scores_NV), k)[1]


def _buckets(logp_NV, ids_NK, tail):
    if ids_NK is None:
        return logp_NV, jnp.sum(jnp.exp(logp_NV), axis=-1)
    logp_NK = jnp.take_along_axis(logp_NV, ids_NK, axis=-1)
    mass_N = jnp.sum(jnp.exp(logp_NK), axis=-1)
    if tail == "renorm":
        return jax.nn.log_softmax(logp_NK), mass_N
    # Summed, since 1 - mass would lose a small tail to rounding.
    others_NV = jnp.put_along_axis(jnp.exp(logp_NV), ids_NK, 0, axis=-1, inplace=False)
    tail_N1 = jnp.sum(others_NV, axis=-1, keepdims=True)
    return jnp.append(logp_NK, jnp.log(jnp.maximum(tail_N1, TAIL_FLOOR)), axis=-1), mass_N


def _divergence(logq_NK, logr_NK, alpha):
    if alpha == 0:
        return _kl(logr_NK, logq_NK)
    if alpha == 1:
        return _kl(logq_NK, logr_NK)
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


def _weigh(ratio_cap, divergence_N, logp_N, masses, live_N, rows):
    ratio_N = jnp.ones_like(divergence_N)
    if ratio_cap is not None:
        ratio_N = capped_ratio(lax.stop_gradient(logp_N), rows.sampler_logp_N, ratio_cap)
    scale_N = jnp.where(live_N, rows.weight_N.astype(divergence_N.dtype) * ratio_N, 0)
    loss = jnp.sum(jnp.where(live_N, scale_N * divergence_N, 0))
    student_mass_N, teacher_mass_N = masses or (None, None)
    aux = LossAux(divergence_N, logp_N, ratio_N, student_mass_N, teacher_mass_N)
    return loss, jax.tree.map(lambda x_N: lax.stop_gradient(jnp.where(live_N, x_N, 0)), aux)
