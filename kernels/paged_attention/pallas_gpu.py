"""Our kernel for NVIDIA GPUs from Hopper on (Pallas, Mosaic GPU): reads live pages only, rows in splits.

A block of 128 threads takes up to MOST / E queries of one key-value head, and one split of one row. Its
share of a page, [positions, key and value, E], comes by asynchronous tensor copies of at most
STAGE_BYTES, STAGES of them under way. With heads 128 wide two blocks fit on a multiprocessor, 192 KiB of
buffers. Blocks are dealt out by the hardware, whatever the rows' lengths, and those of a split without a
live position leave at once. Splits are merged by log-sum-exp in plain XLA.

Arithmetic, on paper: of 4.8 TB/s a multiprocessor of an H200 gets 21 bytes, 10 bfloat16 numbers, a clock
(1.75 GHz). With 4 queries a head these are 42 of its 128 multiply-adds a clock, and by the compiled loop's
9 instructions a number, 93 of its 128 instructions. So products stay float32 on the CUDA cores, exact
for either dtype; tensor cores would pad 4 queries to 8 or 64 and round float32.

Each of a block's ROWS rows of threads keeps an online softmax of its own over every ROWS-th position, so
that nothing crosses warps before the split ends. Not done: the new token is written by a row scatter
before the kernel, one more small launch a layer; queries beyond MOST / E of a head read its pages again,
from the L2 cache where blocks side by side keep step. Checked in the interpreter and compiled to machine
code for sm_90a; not yet run on a GPU.
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

from .xla import MINUS, write

ROWS = 16  # positions of a tile: 4 warps of 4, a position being 8 threads wide
MOST = 512  # queries of a block times E: what its registers hold
STAGE_BYTES = 32 << 10
STAGES = 3
SPLIT = 512  # positions of a split, more where a row would fall into over MAX_SPLITS
MAX_SPLITS = 16
_LOG2_E = math.log2(math.e)


def write_and_attend(
    q_BHE: jax.Array,
    k_BKE: jax.Array,
    v_BKE: jax.Array,
    store_XPWE: jax.Array,
    table_BM: jax.Array,
    position_B: jax.Array,
    page_base: jax.Array | int,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`api.write_and_attend`; a row costs its live pages, an idle row nothing.

    Raises ValueError unless E is a multiple of 64 up to 256, P one of 16, and the store bfloat16 or
    float32. `interpret` takes parameters of the Mosaic GPU interpreter, to run without a GPU.
    """
    plan = _plan(q_BHE, store_XPWE, table_BM)
    store_XPWE = write(k_BKE, v_BKE, store_XPWE, table_BM, position_B, page_base)
    B, H, E = q_BHE.shape
    L, G = plan.heads * plan.groups, plan.queries
    q_BKgE = q_BHE.reshape(B, plan.heads, -1, E)
    q_BKgE = jnp.pad(q_BKgE, ((0, 0), (0, 0), (0, plan.groups * G - q_BKgE.shape[2]), (0, 0)))
    q_BLTGE = _terms(q_BKgE.reshape(B, L, G, E), store_XPWE.dtype)
    run = plgpu.kernel(
        partial(_kernel, plan),
        out_type=[
            jax.ShapeDtypeStruct((B, plan.splits, L, G, E), jnp.float32),
            jax.ShapeDtypeStruct((B, plan.splits, L, G), jnp.float32),
        ],
        # Heads of a row run side by side and so read neighbouring bytes at about the same time.
        grid=(B, plan.splits, L),
        grid_names=("row", "split", "head"),
        scratch_types=[
            plgpu.SMEM((STAGES, plan.stage, 2, E), store_XPWE.dtype),
            plgpu.SMEM(q_BLTGE.shape[2:], store_XPWE.dtype),
            plgpu.SMEM((G, E), jnp.float32),
            plgpu.SMEM((ROWS, E), jnp.float32),
            plgpu.Barrier(num_barriers=STAGES),
            plgpu.Barrier(),
        ],
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=4 << 10, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        kernel_name="paged_attend",
        interpret=interpret,
    )
    out_BSLGE, lse_BSLG = run(table_BM + page_base, position_B, q_BLTGE, store_XPWE)
    out_BLGE = _merge(plan, out_BSLGE, lse_BSLG, position_B)
    out_BKgE = out_BLGE.reshape(B, plan.heads, -1, E)[:, :, : H // plan.heads]
    return out_BKgE.reshape(B, H, E).astype(q_BHE.dtype), store_XPWE


@dataclass(frozen=True)
class _Plan:
    """Sizes; a stage is what one copy brings, a split a number of stages."""

    width: int  # E
    dtype: Any  # of the store
    heads: int  # of keys and values
    groups: int  # of queries of one such head, a block each
    queries: int  # of a group
    stage: int  # positions
    stages_a_page: int
    stages_a_split: int
    splits: int

    @property
    def layout(self) -> Any:
        return _layout(self.dtype)

    @property
    def by_position(self) -> Any:
        return self.layout.reduce(1)

    @property
    def by_width(self) -> Any:
        return self.layout.reduce(0)

    def spread(self, x: jax.Array, axis: int) -> jax.Array:
        """A vector as a [ROWS, E] tile; axis: along which it lies there."""
        return plgpu.layout_cast(lax.broadcast_in_dim(x, (ROWS, self.width), (axis,)), self.layout)


def _layout(dtype: Any) -> Any:
    """Of a [ROWS, E] tile: 8 threads with vectors of 16 bytes side by side, 4 x 4 below each other."""
    vector = 16 // jnp.dtype(dtype).itemsize
    tiling = plgpu.Tiling(((ROWS, 8 * vector), (4, 8 * vector), (vector,)))
    return plgpu.Layout.TILED(tiling, warp_dims=(-5,), lane_dims=(-3, -2), vector_dim=-1)


def _plan(q_BHE, store_XPWE, table_BM) -> _Plan:
    (_, H, E), (_, P, W, _), dtype = q_BHE.shape, store_XPWE.shape, store_XPWE.dtype
    if E % 64 or E > 256 or P % ROWS or dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(
            f"pallas_gpu takes heads 64, 128, 192 or 256 wide, pages of a multiple of {ROWS} positions and"
            f" stores of bfloat16 or float32, not {E}, {P} and {dtype}"
        )
    most = STAGE_BYTES // (2 * E * dtype.itemsize)
    stage = max(s for s in range(ROWS, max(most, ROWS) + 1, ROWS) if P % s == 0)
    a_head = H // (W // 2)
    groups = pl.cdiv(a_head, MOST // E)
    stages = table_BM.shape[1] * P // stage
    a_split = max(pl.cdiv(SPLIT, stage), pl.cdiv(stages, MAX_SPLITS))
    sizes = W // 2, groups, pl.cdiv(a_head, groups), stage, P // stage, a_split, pl.cdiv(stages, a_split)
    return _Plan(E, dtype, *sizes)


def _terms(q_BLGE: jax.Array, dtype: Any) -> jax.Array:
    """[B, L, T, G, E]: the queries as a sum of T arrays of the store's dtype, exactly.

    Mosaic GPU loads both in the same registers' layout only where they have the same dtype.
    """
    exact = dtype in (q_BLGE.dtype, jnp.float32)
    rest, terms = q_BLGE.astype(jnp.float32), []
    for _ in range(1 if exact else 3):
        # Not a mere cast, which XLA may skip when it is undone at once.
        terms.append(rest if exact else lax.reduce_precision(rest, 8, 7))
        rest = rest - terms[-1]
    return jnp.stack(terms, axis=2).astype(dtype)


def _merge(plan: _Plan, out_BSLGE, lse_BSLG, position_B) -> jax.Array:
    """[B, L, G, E]: of all splits that were worked on; the others hold whatever was there before."""
    first_S = jnp.arange(plan.splits, dtype=jnp.int32) * (plan.stages_a_split * plan.stage)
    live_BS11 = (first_S <= position_B[:, None])[..., None, None]
    lse_BSLG = jnp.where(live_BS11, lse_BSLG, MINUS)
    weight_BSLG = jnp.where(live_BS11, jnp.exp2(lse_BSLG - jnp.max(lse_BSLG, axis=1, keepdims=True)), 0.0)
    sum_BLG = jnp.sum(weight_BSLG, axis=1)
    weighted_BSLGE = jnp.where(live_BS11[..., None], weight_BSLG[..., None] * out_BSLGE, 0.0)
    return jnp.sum(weighted_BSLGE, axis=1) / jnp.where(sum_BLG > 0, sum_BLG, 1.0)[..., None]


# ---- the kernel: scores are in units of log 2, arrays [ROWS] or [ROWS, E] -------------------------


class _Share(NamedTuple):
    """A block's part of one row."""

    plan: _Plan
    row: Any
    kv_head: Any
    first: Any  # stage of the row
    count: Any  # stages
    position: Any
    table_ref: Any
    store_ref: Any
    buffer_ref: Any
    barrier_ref: Any

    def page(self, i: Any) -> Any:
        """The page of stage number i, or of the last one if there are fewer."""
        stage = self.first + jnp.minimum(i, self.count - 1)
        return self.table_ref[self.row, lax.div(stage, np.int32(self.plan.stages_a_page))]

    def fetch(self, i: Any, page: Any) -> None:
        """Starts the copy of stage number i, if there is one, into its slot."""
        plan = self.plan

        @pl.when(i < self.count)
        def _():
            slot = lax.rem(i, np.int32(STAGES))
            start = lax.rem(self.first + i, np.int32(plan.stages_a_page)) * plan.stage
            source = self.store_ref.at[page, pl.ds(start, plan.stage), pl.ds(2 * self.kv_head, 2)]
            plgpu.copy_gmem_to_smem(source, self.buffer_ref.at[slot], self.barrier_ref.at[slot])

    def tile(self, slot: Any, t: int, which: int) -> jax.Array:
        """Keys (0) or values (1) of a stage's tile t, float32."""
        loaded = self.buffer_ref[slot, pl.ds(t * ROWS, ROWS), which]
        return plgpu.layout_cast(loaded, self.plan.layout).astype(jnp.float32)


class _Softmax(NamedTuple):
    """One query's online softmax, by thread row."""

    top: jax.Array  # [ROWS]
    total: jax.Array  # [ROWS]
    out: jax.Array  # [ROWS, E]


def _kernel(
    plan, table_ref, position_ref, q_ref, store_ref, out_ref, lse_ref,
    buffer_ref, q_smem, out_smem, tile_smem, barrier_ref, q_barrier,
):  # fmt: skip
    row, split, head = (lax.axis_index(name) for name in ("row", "split", "head"))
    first, position = split * plan.stages_a_split, position_ref[row]
    live = lax.div(position + plan.stage, np.int32(plan.stage))
    count = jnp.minimum(live - first, plan.stages_a_split)
    kv_head = lax.div(head, np.int32(plan.groups))
    share = _Share(
        plan, row, kv_head, first, count, position, table_ref, store_ref, buffer_ref, barrier_ref
    )  # fmt: skip

    @pl.when(count > 0)
    def _():
        # Read before anything is copied: behind a barrier, each read would wait for the one before.
        pages = [share.page(jnp.int32(i)) for i in range(STAGES)]
        plgpu.copy_gmem_to_smem(q_ref.at[row, head], q_smem, q_barrier)
        for i, page in enumerate(pages):
            share.fetch(jnp.int32(i), page)
        plgpu.barrier_wait(q_barrier)
        q = [_query(plan, q_smem, g) for g in range(plan.queries)]
        for g, softmax in enumerate(_attend(share, q)):
            out_smem[g], lse_ref[row, split, head, g] = _finish(plan, softmax, tile_smem)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_ref.at[row, split, head])
        plgpu.wait_smem_to_gmem(0)


def _query(plan: _Plan, q_smem: Any, g: int) -> jax.Array:
    """A query, scaled, in every row of a tile."""
    terms = [plgpu.layout_cast(q_smem[t, g], plan.by_width).astype(jnp.float32) for t in range(len(q_smem))]
    return plan.spread(sum(terms[1:], terms[0]) * np.float32(_LOG2_E / math.sqrt(plan.width)), 1)


def _attend(share: _Share, q: list[jax.Array]) -> list[_Softmax]:
    plan = share.plan

    def stage(i, state):
        softmaxes, page = state
        slot = lax.rem(i, np.int32(STAGES))
        plgpu.barrier_wait(share.barrier_ref.at[slot])
        softmaxes = _take(share, q, softmaxes, slot, share.position - (share.first + i) * plan.stage)
        plgpu.commit_smem()  # what was read here comes before what the copy writes
        share.fetch(i + STAGES, page)
        return softmaxes, share.page(i + STAGES + 1)  # read a trip before it is needed

    full = lambda value, shape, layout: plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)
    column = partial(full, shape=(ROWS,), layout=plan.by_position)
    none = _Softmax(column(MINUS), column(0.0), full(0.0, (ROWS, plan.width), plan.layout))
    start = [none] * plan.queries, share.page(jnp.int32(STAGES))
    softmaxes, _ = lax.fori_loop(jnp.int32(0), share.count, stage, start)
    return softmaxes


def _take(share: _Share, q, softmaxes, slot, last) -> list[_Softmax]:
    """A stage into each query's softmax; last: the greatest live position, counted from its first."""
    plan = share.plan
    tiles = range(plan.stage // ROWS)
    at = plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=plan.by_position)
    scores, states = [[] for _ in q], []
    for t in tiles:
        keys = share.tile(slot, t, 0)
        for query, mine in zip(q, scores, strict=True):
            score = jnp.sum(query * keys, axis=1)
            mine.append(jnp.where(at <= last - t * ROWS, score, MINUS))
    # Once for the whole stage: shrinking what was summed up costs as much as a quarter of a tile.
    for (top, total, out), mine in zip(softmaxes, scores, strict=True):
        new = top
        for score in mine:
            new = jnp.maximum(new, score)
        shrink = jnp.exp2(top - new)
        states.append(_Softmax(new, total * shrink, out * plan.spread(shrink, 0)))
    for t in tiles:
        values = share.tile(slot, t, 1)
        for g, (top, total, out) in enumerate(states):
            weight = jnp.exp2(scores[g][t] - top)
            states[g] = _Softmax(top, total + weight, out + plan.spread(weight, 0) * values)
    return states


def _finish(plan: _Plan, softmax: _Softmax, tile_smem: Any) -> tuple[jax.Array, jax.Array]:
    """The split's weighted mean [E], and the log2 of its sum of weights."""
    top = jnp.max(softmax.top)
    share = jnp.exp2(softmax.top - top)  # 0 for a thread row that saw no live position
    total = jnp.sum(softmax.total * share)
    # Mosaic GPU reduces across warps in vectors of 16 bytes, and a bfloat16 store's tiles have 32.
    _store(tile_smem, softmax.out * plan.spread(share / total, 0))
    out = jnp.sum(plgpu.layout_cast(tile_smem[...], _layout(jnp.float32)), axis=0)
    return out, top + jnp.log(total) * _LOG2_E


def _store(ref: Any, tile: jax.Array) -> None:
    # Vectors of 32 bytes meet in the banks of shared memory, which once a split may be. JAX 0.12 has to be
    # told so, JAX 0.10 cannot be told.
    store = getattr(plgpu, "store", None)
    if store:
        store(ref, tile, optimized=False)
    else:
        ref[...] = tile
