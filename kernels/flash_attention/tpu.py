"""Splash attention, the TPU kernel that JAX ships: lengths padded to its blocks, queries scaled.

Dimensions: B rows, T positions, H query heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from .names import SAVED

LANES = 128  # blocks and heads come in multiples of a TPU vector's width
BLOCK = 512  # queries, and keys, of one block


def attend(q_BTHE: jax.Array, k_BTKE: jax.Array, v_BTKE: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`api.causal_attention` for bfloat16 operands. No real query sees the padding, which comes after it."""
    _, T, H, E = q_BTHE.shape
    block = min(BLOCK, LANES * -(-T // LANES))
    kernel = _kernel(H, block * -(-T // block), block, interpret)

    # The kernel does not scale. Scaled in float32, so that the queries are rounded only once.
    q_BTHE = (q_BTHE.astype(jnp.float32) / math.sqrt(E)).astype(q_BTHE.dtype)
    q_BHTE = _heads_first(q_BTHE, block)
    k_BKTE = _heads_first(k_BTKE, block)
    v_BKTE = _heads_first(v_BTKE, block)
    # The kernel names no precision, and Mosaic refuses "highest" for bfloat16.
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("default"):
        out_BHTE = jax.vmap(kernel)(q_BHTE, k_BKTE, v_BKTE)
    assert isinstance(out_BHTE, jax.Array)  # a tuple only where the kernel is made to return its sums
    return jnp.swapaxes(out_BHTE, 1, 2)[:, :T, :, :E]


def _heads_first(x_BTHE: jax.Array, block: int) -> jax.Array:
    """[B, H, T, E] with T padded to whole blocks and E to whole vectors, by zeros."""
    _, T, _, E = x_BTHE.shape
    padded_BTHE = jnp.pad(x_BTHE, ((0, 0), (0, -T % block), (0, 0), (0, -E % LANES)))
    return jnp.swapaxes(padded_BTHE, 1, 2)


def _kernel(heads: int, length: int, block: int, interpret: bool):
    sizes = kernels.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return kernels.make_splash_mha(
        masks.MultiHeadMask([masks.CausalMask((length, length))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=SAVED,  # so that a policy keeps the sums for the backward pass too
    )
