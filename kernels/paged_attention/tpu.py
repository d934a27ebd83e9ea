"""The stock TPU kernel of JAX: one row scatter, then `ragged_paged_attention` over the cache as it is stored.

Dimensions: B rows, H query heads, E head width, X pages of all layers, P positions of a page, W = 2 x key-
value heads, M pages of a table.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

from . import xla
from .operands import Operands

# The kernel would look sizes up by the local device, which is not the one that is compiled for.
KV_BLOCK = 512  # positions it reads at a time; it reads every row up to a multiple of them
QUERY_ROWS = 8  # rows whose queries lie in on-chip memory together
VMEM_LIMIT = 32 << 20


def write_and_attend(
    operands: Operands,
) -> tuple[jax.Array, jax.Array]:
    """`api.write_and_attend`; reads follow each row's own length, up to a multiple of KV_BLOCK.

    The kernel takes no sequence of length 0, so live rows are moved to the front and it is told their
    number. Where no row is live it reads one block of the first.
    """
    q_BHE, table_BM, position_B = operands.q_BHE, operands.table_BM, operands.position_B
    cache_XPWE = xla.write(operands)
    (B, _, E), M, P = q_BHE.shape, table_BM.shape[1], cache_XPWE.shape[1]
    rank_B, live = ranks(position_B)
    row_B = jnp.zeros_like(rank_B).at[rank_B].set(jnp.arange(B, dtype=jnp.int32))
    # The kernel names no precision, and Mosaic refuses "highest" for bfloat16.
    precision = "highest" if cache_XPWE.dtype == jnp.float32 else "default"
    with jax.numpy_dtype_promotion("standard"), jax.default_matmul_precision(precision):
        out_BHE = ragged_paged_attention(
            q_BHE[row_B],
            cache_XPWE,
            jnp.maximum(position_B[row_B] + 1, 1),
            table_BM[row_B] + operands.page_base,
            jnp.arange(B + 1, dtype=jnp.int32),
            jnp.maximum(live, 1)[None],
            sm_scale=1 / math.sqrt(E),
            num_kv_pages_per_block=min(M, max(1, KV_BLOCK // P)),
            num_queries_per_block=min(B, QUERY_ROWS),
            vmem_limit_bytes=VMEM_LIMIT,
        )
    return jnp.where(position_B[:, None, None] < 0, 0, out_BHE[rank_B]).astype(q_BHE.dtype), cache_XPWE


def ranks(position_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Each row's place if live rows came first (int32 [B], a permutation), and the number of live rows."""
    live_B = position_B >= 0
    live = jnp.sum(live_B, dtype=jnp.int32)

    def count(x_B):
        return jnp.cumsum(x_B, dtype=jnp.int32) - 1

    return jnp.where(live_B, count(live_B), live + count(~live_B)), live
