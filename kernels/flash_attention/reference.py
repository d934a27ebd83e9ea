"""The definition, with all T x T scores at once: the oracle of the tests.

Dimensions: B rows, T positions of queries, S positions of keys, H query heads, K key-value heads, G query
heads that share a key-value head, E width of a head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def attend(q_BTHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array) -> jax.Array:
    """`api.causal_attention` in float32, or in float64 for float64 operands."""
    B, T, H, E = q_BTHE.shape
    K = k_BSKE.shape[2]
    wide = jnp.float64 if q_BTHE.dtype == jnp.float64 else jnp.float32
    # Everything in the wide dtype: the faster versions are measured by their distance from this.
    q_BTKGE = q_BTHE.astype(wide).reshape(B, T, K, H // K, E)
    scores_BKGTS = jnp.einsum("btkge,bske->bkgts", q_BTKGE, k_BSKE.astype(wide)) / math.sqrt(E)
    seen_TS = jnp.tril(jnp.ones((T, T), bool))
    weights_BKGTS = jax.nn.softmax(jnp.where(seen_TS, scores_BKGTS, -jnp.inf), axis=-1)
    out_BTKGE = jnp.einsum("bkgts,bske->btkge", weights_BKGTS, v_BSKE.astype(wide))
    return out_BTKGE.reshape(q_BTHE.shape).astype(q_BTHE.dtype)
