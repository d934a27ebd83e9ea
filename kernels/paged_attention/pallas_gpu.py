"""Our kernel for NVIDIA's Hopper GPUs (Pallas, Mosaic GPU): reads live pages only, rows in splits.

A block, one warpgroup of 128 threads, takes one split of one row and the queries of one key-value head. It
goes by tiles of TILE positions, which asynchronous tensor copies bring page by page, PIPELINE_STAGES of them
under way. Blocks are dealt out by the hardware, whatever the rows' lengths, and those of a split without a
live position leave at once. Splits are merged by log-sum-exp in plain XLA.

A warpgroup's matrix product has 64 rows, of which a head's queries fill a few; the others hold whatever is
there, since no row sees another's. They cost little: of 4.8 TB/s a multiprocessor of an H200 gets a tile's
keys, 16 KiB, in 790 clocks (1.75 GHz), and multiplies them by 64 rows in 256. Two blocks fit on a
multiprocessor, so that one computes while the other waits.

Weights are rounded to the cache's dtype before they meet the values, as in other kernels of this kind;
scores and sums are float32, and so is what a split returns, as a sum of two numbers of the cache's dtype.

Dimensions: B rows, S splits of a row, H query heads, K key-value heads, G queries of a key-value head
(padded), E head width, X pages of all layers, P positions of a page, W = 2 K, M pages of a table, j the two
terms of a sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .operands import Operands
from .xla import MINUS, write

TILE = 64  # positions a product takes, and the fewest rows that it has
PIPELINE_STAGES = 2
SPLIT = 1024  # positions of a split, more where a row would fall into over MAX_SPLITS
MAX_SPLITS = 16
_LOG2_E = math.log2(math.e)
# Layout of the products' operands in shared memory: 8 rows of 128 bytes.
_TRANSFORMS = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
_LAYOUT = plgpu.Layout.WGMMA
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)


def write_and_attend(
    operands: Operands,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`api.write_and_attend`; a row costs its live pages, an idle row nothing.

    Raises ValueError unless queries and cache are bfloat16, E is 64, 128, 192 or 256, a key-value head has
    at most TILE queries, and P divides TILE or is a multiple of it, in steps of 8. `interpret` takes
    parameters of the Mosaic GPU interpreter, to run without a GPU.
    """
    q_BHE, table_BM, position_B = operands.q_BHE, operands.table_BM, operands.position_B
    tiling = _make_tiling(q_BHE, operands.cache_XPWE, table_BM)
    cache_XPWE = write(operands)
    B, H, E = q_BHE.shape
    K, G = cache_XPWE.shape[2] // 2, tiling.queries
    q_BKGE = q_BHE.reshape(B, K, H // K, E)
    q_BKGE = jnp.pad(q_BKGE, ((0, 0), (0, 0), (0, G - H // K), (0, 0)))
    dtype, tiles = cache_XPWE.dtype, partial(plgpu.SMEM, transforms=_TRANSFORMS)
    run = plgpu.kernel(
        partial(_kernel, tiling),
        out_type=[
            jax.ShapeDtypeStruct((B, tiling.splits, K, 2, G, E), dtype),
            jax.ShapeDtypeStruct((B, tiling.splits, K, G), jnp.float32),
        ],
        # Heads of a row run side by side and so read neighbouring bytes at about the same time.
        grid=(B, tiling.splits, K),
        grid_names=("row", "split", "head"),
        scratch_types=[
            tiles((PIPELINE_STAGES, TILE, E), dtype),
            tiles((PIPELINE_STAGES, TILE, E), dtype),
            tiles((TILE, E), dtype),
            tiles((TILE, TILE), dtype),
            plgpu.SMEM((TILE,), jnp.float32),
            plgpu.Barrier(num_arrivals=tiling.copies, num_barriers=PIPELINE_STAGES),
            plgpu.Barrier(num_arrivals=tiling.copies, num_barriers=PIPELINE_STAGES),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="paged_attend",
        interpret=interpret,
    )
    out_BSKjGE, lse_BSKG = run(table_BM + operands.page_base, position_B, q_BKGE, cache_XPWE)
    out_BKGE = _merge(tiling, out_BSKjGE, lse_BSKG, position_B)[:, :, : H // K]
    return out_BKGE.reshape(B, H, E).astype(q_BHE.dtype), cache_XPWE


@dataclass(frozen=True)
class _Tiling:
    """Sizes; a split is a number of tiles, and a copy brings a page or as much of it as a tile takes."""

    width: int  # E
    queries: int  # of a key-value head, in steps of 8
    page: int  # P
    copies: int  # that make up a tile's keys
    tiles_a_split: int
    splits: int

    @property
    def positions(self) -> int:
        """Positions of one copy."""
        return TILE // self.copies


def fits(q_BHE: jax.Array | jax.ShapeDtypeStruct, cache_XPWE: jax.Array | jax.ShapeDtypeStruct) -> bool:
    """Whether the kernel takes these; arrays or their shapes and dtypes."""
    (_, H, E), (_, P, W, _) = q_BHE.shape, cache_XPWE.shape
    bfloat16 = q_BHE.dtype == cache_XPWE.dtype == jnp.bfloat16
    pages = P % 8 == 0 and (TILE % P == 0 or P % TILE == 0)
    return bfloat16 and pages and E % 64 == 0 and E <= 256 and H // (W // 2) <= TILE


def _make_tiling(q_BHE, cache_XPWE, table_BM) -> _Tiling:
    (_, H, E), (_, P, W, _) = q_BHE.shape, cache_XPWE.shape
    if not fits(q_BHE, cache_XPWE):
        raise ValueError(
            f"pallas_gpu takes bfloat16, heads 64, 128, 192 or 256 wide, at most {TILE} queries for a"
            f" key-value head and pages of 8, 16, 32 or a multiple of 64 positions, not {q_BHE.dtype}"
            f" queries, {cache_XPWE.dtype} cache, width {E}, {H} queries for {W // 2} heads and pages of {P}"
        )
    queries = pl.cdiv(H // (W // 2), 8) * 8
    tiles = pl.cdiv(table_BM.shape[1] * P, TILE)
    a_split = max(pl.cdiv(SPLIT, TILE), pl.cdiv(tiles, MAX_SPLITS))
    return _Tiling(E, queries, P, max(1, TILE // P), a_split, pl.cdiv(tiles, a_split))


def _merge(tiling: _Tiling, out_BSKjGE, lse_BSKG, position_B) -> jax.Array:
    """[B, K, G, E]: of all splits that were worked on; the others hold whatever was there before."""
    first_S = jnp.arange(tiling.splits, dtype=jnp.int32) * (tiling.tiles_a_split * TILE)
    live_BS11 = (first_S <= position_B[:, None])[..., None, None]
    lse_BSKG = jnp.where(live_BS11, lse_BSKG, MINUS)
    weight_BSKG = jnp.where(live_BS11, jnp.exp2(lse_BSKG - jnp.max(lse_BSKG, axis=1, keepdims=True)), 0.0)
    sum_BKG = jnp.sum(weight_BSKG, axis=1)
    out_BSKGE = jnp.sum(out_BSKjGE.astype(jnp.float32), axis=3)
    weighted_BSKGE = jnp.where(live_BS11[..., None], weight_BSKG[..., None] * out_BSKGE, 0.0)
    return jnp.sum(weighted_BSKGE, axis=1) / jnp.where(sum_BKG > 0, sum_BKG, 1.0)[..., None]


# ---- the kernel: scores are in units of log 2 -----------------------------------------------------


class _Share(NamedTuple):
    """A block's part of one row."""

    tiling: _Tiling
    row: Any
    head: Any
    first: Any  # tile of the row
    count: Any  # tiles
    position: Any
    table_ref: Any
    cache_ref: Any
    keys: tuple[Any, Any]  # their slots, and the barriers of those
    values: tuple[Any, Any]

    def pages(self, i: Any) -> list[Any]:
        """Pages of tile number i; after the newest token, its page again, which is finite."""
        tiling, live = self.tiling, lax.div(self.position, np.int32(self.tiling.page))

        def start(c):
            return (self.first + i) * TILE + c * tiling.positions

        def page(c):
            return jnp.minimum(lax.div(start(c), np.int32(tiling.page)), live)

        return [self.table_ref[self.row, page(c)] for c in range(tiling.copies)]

    def fetch(self, i: Any, pages: list[Any], which: int) -> None:
        """Starts the copies of the keys (0) or values (1) of tile number i, if there is one."""
        tiling, (smem, barrier) = self.tiling, (self.keys, self.values)[which]

        @pl.when(i < self.count)
        def _():
            slot = lax.rem(i, np.int32(PIPELINE_STAGES))
            offset = lax.rem((self.first + i) * TILE, np.int32(tiling.page)) if tiling.copies == 1 else 0
            for c, page in enumerate(pages):
                source = self.cache_ref.at[page, pl.ds(offset, tiling.positions), 2 * self.head + which]
                here = pl.ds(c * tiling.positions, tiling.positions)
                plgpu.copy_gmem_to_smem(source, smem.at[slot, here], barrier.at[slot])


class _Softmax(NamedTuple):
    """An online softmax for each row of queries."""

    top: jax.Array  # [TILE]
    total: jax.Array  # [TILE]
    out: jax.Array  # [TILE, E]


def _kernel(
    tiling,
    table_ref,
    position_ref,
    q_ref,
    cache_ref,
    out_ref,
    lse_ref,
    k_smem,
    v_smem,
    q_smem,
    weight_smem,
    lse_smem,
    k_barrier,
    v_barrier,
    q_barrier,
):
    row, split, head = (lax.axis_index(name) for name in ("row", "split", "head"))
    first, position = split * tiling.tiles_a_split, position_ref[row]
    count = jnp.minimum(lax.div(position + TILE, np.int32(TILE)) - first, tiling.tiles_a_split)
    keys, values = (k_smem, k_barrier), (v_smem, v_barrier)
    share = _Share(tiling, row, head, first, count, position, table_ref, cache_ref, keys, values)

    @pl.when(count > 0)
    def _():
        # Read before anything is copied: after a barrier, each read would wait for the one before.
        pages = [share.pages(jnp.int32(i)) for i in range(PIPELINE_STAGES)]
        queries = pl.ds(0, tiling.queries)
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem.at[queries], q_barrier)
        for i, some in enumerate(pages):
            for which in range(2):
                share.fetch(jnp.int32(i), some, which)
        plgpu.barrier_wait(q_barrier)
        out, lse_smem[...] = _attend(share, q_smem, weight_smem)
        for term in range(2):
            # The queries are no longer needed: the result takes their place.
            q_smem[...] = out.astype(q_smem.dtype)
            out = out - out.astype(q_smem.dtype).astype(jnp.float32)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem.at[queries], out_ref.at[row, split, head, term])
            if term == 0:
                plgpu.copy_smem_to_gmem(lse_smem.at[queries], lse_ref.at[row, split, head])
            plgpu.wait_smem_to_gmem(0)


def _attend(share: _Share, q_smem: Any, weight_smem: Any) -> tuple[jax.Array, jax.Array]:
    """The split's weighted means [TILE, E], and the log2 of their sums of weights [TILE]."""
    tiling = share.tiling
    (k_smem, k_barrier), (v_smem, v_barrier) = share.keys, share.values

    def tile(i, state):
        softmax, pages = state
        slot = lax.rem(i, np.int32(PIPELINE_STAGES))
        plgpu.barrier_wait(k_barrier.at[slot])
        score = _product((TILE, TILE), q_smem, k_smem.at[slot].transpose((1, 0)))
        softmax, weight = _weigh(softmax, score, share.position - (share.first + i) * TILE, tiling.width)
        weight_smem[...] = weight.astype(weight_smem.dtype)
        plgpu.commit_smem()  # also: all have read the keys before others take their place
        share.fetch(i + PIPELINE_STAGES, pages, 0)
        plgpu.barrier_wait(v_barrier.at[slot])
        part = _product((TILE, tiling.width), weight_smem, v_smem.at[slot])
        plgpu.commit_smem()  # all have read the values and the weights
        share.fetch(i + PIPELINE_STAGES, pages, 1)
        # The pages are read a trip before they are needed.
        return softmax._replace(out=softmax.out + part), share.pages(i + PIPELINE_STAGES + 1)

    def row(value):
        return plgpu.layout_cast(jnp.full(TILE, value, jnp.float32), _BY_ROW)

    out = plgpu.layout_cast(jnp.zeros((TILE, tiling.width), jnp.float32), _LAYOUT)
    start = _Softmax(row(MINUS), row(0.0), out), share.pages(jnp.int32(PIPELINE_STAGES))
    (top, total, out), _ = lax.fori_loop(jnp.int32(0), share.count, tile, start)
    return out / _across(total, tiling.width), top + jnp.log(total) * _LOG2_E


def _product(shape: tuple[int, int], a_smem: Any, b_smem: Any) -> jax.Array:
    def multiply(sum_ref):
        plgpu.wgmma(sum_ref, a_smem, b_smem)
        return sum_ref[...]

    return pl.run_scoped(multiply, plgpu.ACC(shape, jnp.float32))  # pyright: ignore[reportPrivateImportUsage]


def _weigh(softmax: _Softmax, score: jax.Array, last: Any, width: int) -> tuple[_Softmax, jax.Array]:
    """A tile's weights, and what came before on their scale; last: its last live position."""
    at = plgpu.broadcasted_iota(jnp.int32, (TILE, TILE), 1, layout=_LAYOUT)
    score = jnp.where(at <= last, score * np.float32(_LOG2_E / math.sqrt(width)), MINUS)
    top = jnp.maximum(softmax.top, jnp.max(score, axis=1))
    weight, shrink = jnp.exp2(score - _across(top, TILE)), jnp.exp2(softmax.top - top)
    total = softmax.total * shrink + jnp.sum(weight, axis=1)
    return _Softmax(top, total, softmax.out * _across(shrink, width)), weight


def _across(x: jax.Array, columns: int) -> jax.Array:
    """A number for each row, in all its columns."""
    return lax.broadcast_in_dim(x, (TILE, columns), (0,))
