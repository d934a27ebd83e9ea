"""The weights of the tokens in the loss, and the loss of one set of rows: thin over the kernel."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from rosd_jax import masked
from rosd_jax.kernels.topk_jsd import LossAux, Sharding, topk_jsd_loss

Level = Literal["token", "sequence"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

MAX_LOG_RATIO = 20.0
TOKEN_COUNT_EPS = 1e-8  # the released means divide by the token count plus this


def span_loss(
    student_hidden_ND: jax.Array,
    student_head_VD: jax.Array,
    teacher_hidden_ND: jax.Array,
    teacher_head_VD: jax.Array,
    weight_N: jax.Array,
    tokens_N: jax.Array,
    sampler_logp_N: jax.Array,
    *,
    k: int | None = 100,
    alpha: float = 0.5,
    tail: Literal["bucket", "renorm"] = "bucket",
    temperature: float = 1.0,
    num_tokens: int | None = None,
    ratio_cap: float | None = 2.0,
    chunk: int = 1024,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, LossAux]:
    """Sum over rows of weight x capped importance ratio x top-k JSD (arXiv 2605.28014).

    Row n holds the hidden states from which both models predict tokens_N[n], int32. weight_N is 0
    outside the distilled region and carries the global denominator. ratio_cap None: no ratio.
    sharding splits rows, and if asked the vocabulary, over a mesh; None: one device.
    Differentiable in the student's hidden states and head; raises what the kernel raises.
    """
    return topk_jsd_loss(
        student_hidden_ND, student_head_VD, teacher_hidden_ND, teacher_head_VD, weight_N,
        k=k, alpha=alpha, tail=tail, temperature=temperature, num_tokens=num_tokens,
        tokens_N=tokens_N, sampler_logp_N=sampler_logp_N, ratio_cap=ratio_cap, chunk=chunk,
        sharding=sharding,
    )  # fmt: skip


def importance_weights(
    train_logp_BT: jax.Array,
    sampler_logp_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    level: Level = "token",
    cap: float = 2.0,
    batch_normalize: bool = False,
) -> jax.Array:
    """Truncated importance weights [B, T] between sampler and trainer, without gradient.

    min(exp(clip(r, +-20)), cap) with r the log-ratio of each token, or at level "sequence" its sum
    over the sequence; 0 off the mask. batch_normalize divides by the mean over active tokens, or
    over active sequences, unless that mean is not above 1e-8. Agrees with the released rollout
    correction.
    """
    active_BT = mask_BT.astype(bool)
    log_ratio_BT = jax.lax.stop_gradient(train_logp_BT - sampler_logp_BT)
    if level == "sequence":
        log_ratio_BT = masked.sum(log_ratio_BT, active_BT, axis=1)[:, None]
    elif level != "token":
        raise ValueError(f"level is {level!r}; it must be 'token' or 'sequence'")
    weight_BT = jnp.exp(jnp.clip(log_ratio_BT, -MAX_LOG_RATIO, MAX_LOG_RATIO))
    weight_BT = jnp.where(active_BT, jnp.minimum(weight_BT, cap), 0)
    if not batch_normalize:
        return weight_BT
    by = 1 if level == "sequence" else None
    tokens = jnp.sum(active_BT, axis=by, dtype=weight_BT.dtype)
    mean = jnp.sum(weight_BT, axis=by) / (tokens + TOKEN_COUNT_EPS)
    if level == "sequence":
        mean = masked.mean(mean, tokens)
    return weight_BT / jnp.where(mean > 1e-8, mean, 1)


def aggregate_weights(mask_BT: jax.Array, mode: Aggregation = "token-mean") -> jax.Array:
    """Weights [B, T] with which a sum over tokens is the named mean over the mask.

    float32, or float64 of a float64 mask.

    token-mean: over the active tokens of the whole batch. seq-mean-*: over the sequences that have
    an active token, of their token sum, token mean, or (norm: over all sequences' tokens, no mean)
    token sum over T. Raises ValueError for another mode.

    Deviation: an empty mask gives zeros, where the released seq-mean modes give NaN.
    """
    dtype = jnp.float64 if mask_BT.dtype == jnp.float64 else jnp.float32
    active_BT = mask_BT.astype(bool).astype(dtype)
    tokens_B1 = jnp.sum(active_BT, axis=1, keepdims=True)
    sequences = jnp.maximum(jnp.sum(tokens_B1 > 0, dtype=dtype), 1)
    match mode:
        case "token-mean":
            return active_BT / jnp.maximum(jnp.sum(tokens_B1), 1)
        case "seq-mean-token-sum":
            return active_BT / sequences
        case "seq-mean-token-mean":
            return active_BT / (tokens_B1 + TOKEN_COUNT_EPS) / sequences
        case "seq-mean-token-sum-norm":
            return active_BT / mask_BT.shape[1]
    raise ValueError(f"aggregation is {mode!r}; it must be one of {', '.join(Aggregation.__args__)}")
