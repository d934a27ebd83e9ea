"""Blocks of queries in plain XLA, for any platform and dtype.

The scores of one block exist at a time, [B, H, QUERY_BLOCK, keys]; the backward pass computes them again.
Queries are cut into SPANS, each of which reads keys only as far as its own end. Of the T x T products, half
of which a causal mask needs, (1 + 1 / SPANS) / 2 are computed.

Dimensions: B rows, T positions of the sequence, Q queries of a span or block, S keys that it reads, H query
heads, K key-value heads, G query heads that share a key-value head, E width of a head, N blocks of a span.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax import lax

QUERY_BLOCK = 256  # of one block
SPANS = 4


def attend(q_BTHE: jax.Array, k_BTKE: jax.Array, v_BTKE: jax.Array) -> jax.Array:
    """`api.causal_attention`; scores and sums are float32, or float64 for float64 operands."""
    T = q_BTHE.shape[1]
    if T <= QUERY_BLOCK:
        return _block(q_BTHE, k_BTKE, v_BTKE, 0)
    step = QUERY_BLOCK * -(-T // (QUERY_BLOCK * SPANS))  # queries of a span
    outs = []
    for start in range(0, T, step):
        stop = min(start + step, T)
        outs.append(_span(q_BTHE[:, start:stop], k_BTKE[:, :stop], v_BTKE[:, :stop], start))
    return jnp.concatenate(outs, axis=1)


def _span(q_BQHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, start: int) -> jax.Array:
    """Queries from position `start` on, a block at a time."""
    B, Q, H, E = q_BQHE.shape
    blocks = -(-Q // QUERY_BLOCK)
    q_BQHE = jnp.pad(q_BQHE, ((0, 0), (0, blocks * QUERY_BLOCK - Q), (0, 0), (0, 0)))

    # Without the checkpoint, the map would keep the scores of all blocks for the backward pass.
    @jax.checkpoint
    def block(first):
        block_BQHE = lax.dynamic_slice_in_dim(q_BQHE, first, QUERY_BLOCK, axis=1)
        return _block(block_BQHE, k_BSKE, v_BSKE, start + first)

    out_NBQHE = lax.map(block, jnp.arange(0, blocks * QUERY_BLOCK, QUERY_BLOCK))
    return jnp.moveaxis(out_NBQHE, 0, 1).reshape(B, -1, H, E)[:, :Q]


def _block(q_BQHE: jax.Array, k_BSKE: jax.Array, v_BSKE: jax.Array, start: jax.Array | int) -> jax.Array:
    """Queries at positions from `start` on against the keys at positions from 0 on."""
    B, Q, H, E = q_BQHE.shape
    S, K = k_BSKE.shape[1:3]
    wide = jnp.float64 if q_BQHE.dtype == jnp.float64 else jnp.float32
    q_BQKGE = q_BQHE.reshape(B, Q, K, H // K, E)
    # Operands stay narrow for the matrix units, which accumulate in float32.
    scores_BKGQS = jnp.einsum("bqkge,bske->bkgqs", q_BQKGE, k_BSKE, preferred_element_type=wide)
    scores_BKGQS = scores_BKGQS / math.sqrt(E)
    seen_QS = jnp.arange(S) <= start + jnp.arange(Q)[:, None]
    weights_BKGQS = jax.nn.softmax(jnp.where(seen_QS, scores_BKGQS, -jnp.inf), axis=-1)
    weights_BKGQS = weights_BKGQS.astype(v_BSKE.dtype)
    out_BQKGE = jnp.einsum("bkgqs,bske->bqkge", weights_BKGQS, v_BSKE, preferred_element_type=wide)
    return out_BQKGE.reshape(q_BQHE.shape).astype(q_BQHE.dtype)
