"""The definition: all T x T scores at once. The oracle of the tests."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

SAVED = "attention"  # the name under which policies of `jax.checkpoint` know the result


def working_dtype(x: jax.Array) -> jnp.dtype:
    """float32, or float64 of float64."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def attend(q_BTHE: jax.Array, k_BTKE: jax.Array, v_BTKE: jax.Array) -> jax.Array:
    """`api.causal_attention`, in float32, or in float64 of float64 operands."""
    (B, T, H, E), K = q_BTHE.shape, k_BTKE.shape[2]
    dtype = working_dtype(q_BTHE)
    q_BTKGE = q_BTHE.astype(dtype).reshape(B, T, K, H // K, E)
    scores = jnp.einsum("btkge,bske->bkgts", q_BTKGE, k_BTKE.astype(dtype)) / math.sqrt(E)
    seen_TS = jnp.tril(jnp.ones((T, T), bool))
    weights = jax.nn.softmax(jnp.where(seen_TS, scores, -jnp.inf), axis=-1)
    out_BTKGE = jnp.einsum("bkgts,bske->btkge", weights, v_BTKE.astype(dtype))
    return out_BTKGE.reshape(q_BTHE.shape).astype(q_BTHE.dtype)
