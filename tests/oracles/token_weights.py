"""How the released code weighs tokens: its aggregation modes and its rollout correction.

The update needs only one of these, the mean over active tokens, which it takes in NumPy. The others make
the released losses comparable: tests/golden records them in every mode.

Dimensions: B sequences, T tokens.
"""

from __future__ import annotations

from typing import Literal, get_args

import jax
import jax.numpy as jnp

Level = Literal["token", "sequence"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]

TOKEN_COUNT_EPS = 1e-8  # the released means divide by the token count plus this


def importance_weights(
    train_logp_BT: jax.Array,
    sampler_logp_BT: jax.Array,
    mask_BT: jax.Array,
    *,
    level: Level = "token",
    cap: float = 2.0,
    batch_normalize: bool = False,
) -> jax.Array:
    """Truncated importance weights [B, T] between sampler and trainer.

    min(exp(clip(r, +-20)), cap) with r the log-ratio of each token, or at level "sequence" its sum
    over the sequence; 0 off the mask. batch_normalize divides by the mean over active tokens, or
    over active sequences, unless that mean is not above 1e-8.
    """
    active_BT = mask_BT.astype(bool)
    log_ratio_BT = train_logp_BT - sampler_logp_BT
    if level == "sequence":
        log_ratio_BT = jnp.sum(jnp.where(active_BT, log_ratio_BT, 0), axis=1, keepdims=True)
    weight_BT = jnp.minimum(jnp.exp(jnp.clip(log_ratio_BT, -20.0, 20.0)), cap)
    weight_BT = jnp.where(active_BT, weight_BT, 0)
    if not batch_normalize:
        return weight_BT
    if level == "token":
        tokens = jnp.sum(active_BT, dtype=weight_BT.dtype)
        mean = jnp.sum(weight_BT) / (tokens + TOKEN_COUNT_EPS)
    else:
        tokens_B = jnp.sum(active_BT, axis=1, dtype=weight_BT.dtype)
        mean_B = jnp.sum(weight_BT, axis=1) / (tokens_B + TOKEN_COUNT_EPS)
        sequences = jnp.sum(tokens_B > 0, dtype=weight_BT.dtype)
        mean = jnp.sum(mean_B) / jnp.maximum(sequences, 1)
    return weight_BT / jnp.where(mean > 1e-8, mean, 1)


def aggregate_weights(mask_BT: jax.Array, mode: Aggregation = "token-mean") -> jax.Array:
    """Weights [B, T] with which a sum over tokens is the named mean over the mask.

    float32, or float64 for a float64 mask.

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
    raise ValueError(f"aggregation is {mode!r}; it must be one of {', '.join(get_args(Aggregation))}")
