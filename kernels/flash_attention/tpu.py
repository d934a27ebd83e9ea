"""Splash attention, the kernel for TPU that JAX ships: lengths padded to its blocks, queries scaled."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

from .reference import SAVED

LANES = 128  # blocks and heads come in multiples of a TPU vector's width
BLOCK = 512  # queries, and keys, of one block


def attend(q_BTHE: jax.Array, k_BTKE: jax.Array, v_BTKE: jax.Array, *, interpret: bool = False) -> jax.Array:
    """`api.causal_attention` of bfloat16 operands. Padding behind the end is seen by no real query."""
    T, E = q_BTHE.shape[1], q_BTHE.shape[3]
    block = min(BLOCK, LANES * -(-T // LANES))
    kernel = _kernel(q_BTHE.shape[2], block * -(-T // block), block, interpret)

    # The kernel does not scale; done in float32, so that the queries are rounded once.
    q_BTHE = (q_BTHE.astype(jnp.float32) / math.sqrt(E)).astype(q_BTHE.dtype)
    q, k, v = (_heads_first(x, block) for x in (q_BTHE, k_BTKE, v_BTKE))
    # The kernel names no precision, and Mosaic refuses "highest" for bfloat16.
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision("default"):
        out_BHTE = jax.vmap(kernel)(q, k, v)
    return jnp.swapaxes(out_BHTE, 1, 2)[:, :T, :, :E]


def _heads_first(x_BTHE: jax.Array, block: int) -> jax.Array:
    """[B, H, T, E] with T padded to whole blocks and E to whole vectors, by zeros."""
    spare_T, spare_E = -x_BTHE.shape[1] % block, -x_BTHE.shape[3] % LANES
    padded = jnp.pad(x_BTHE, ((0, 0), (0, spare_T), (0, 0), (0, spare_E)))
    return jnp.swapaxes(padded, 1, 2)


def _kernel(heads: int, T: int, block: int, interpret: bool):
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
        masks.MultiHeadMask([masks.CausalMask((T, T))] * heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
        residual_checkpoint_name=SAVED,  # of the sums that the backward pass reads, too
    )
