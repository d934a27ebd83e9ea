"""Our TPU kernel: writes the new tokens and attends in one call, reading nothing but live pages.

Rows are dealt to GROUPS grid steps, which chips with two cores run side by side. A group sends all its
new tokens to the cache, then walks through its live rows; a row's pages arrive in waves, and the waves
of this row and the next are under way while one is worked on.

A wave is used as it is stored, [positions x W, E], keys and values interleaved. Every query meets every
line of it, and a mask leaves the scores of its own head's keys; moved by one column, the weights stand at the
values. The surplus products are cheaper than pulling keys and values apart, since what a decoding step
waits for is memory.

Dimensions: B rows, R rows as they are dealt to groups, H query heads, K key-value heads, E head width, X
pages of all layers, P positions of a page, W = 2 K, M pages of a table, C lines of a wave.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from .operands import Operands
from .tpu import VMEM_LIMIT, ranks
from .xla import MINUS

GROUPS = 2
WAVE_BYTES = 512 << 10  # of pages copied at a time
WAVES = 4  # buffers: one is worked on, the others are on their way


def write_and_attend(
    operands: Operands,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """`api.write_and_attend`; a row costs its live pages, an idle row nothing."""
    q_BHE, k_BKE, v_BKE, cache_XPWE, table_BM, position_B, page_base = operands
    (B, H, E), (_, P, W, _) = q_BHE.shape, cache_XPWE.shape
    R, dtype = pl.cdiv(B, GROUPS), cache_XPWE.dtype
    rank_B, live = ranks(position_B)
    # Live rows go to the groups alternately, so that no group has more than one row more than another.
    place_B = rank_B % GROUPS * R + rank_B // GROUPS
    row_R = jnp.zeros(GROUPS * R, jnp.int32).at[place_B].set(jnp.arange(B, dtype=jnp.int32))
    at_R = jnp.pad(position_B[row_R], (0, 1))  # `_send` looks one past the last
    new_BWE = jnp.stack([k_BKE, v_BKE], axis=2).reshape(B, W, E)
    pages = max(1, min(table_BM.shape[1], WAVE_BYTES // (P * W * E * dtype.itemsize)))

    # Lying as lines, a page fills whole vectors; the interpreter cannot see a reference in another shape.
    page = (P, W, E) if interpret else (P * W, E)

    def block(*shape):
        return pl.BlockSpec((R, *shape), lambda g, *_: (g, 0, 0))

    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out_RHE, cache_XPWE = pl.pallas_call(
        _kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(GROUPS,),
            in_specs=[block(H, E), block(W, E), anywhere],
            out_specs=[block(H, E), anywhere],
            scratch_shapes=[
                pltpu.VMEM((WAVES, pages, *page), dtype),
                pltpu.SemaphoreType.DMA((WAVES,)),
                pltpu.SemaphoreType.DMA,
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((GROUPS * R, H, E), q_BHE.dtype),
            jax.ShapeDtypeStruct(cache_XPWE.shape, dtype),
        ],
        input_output_aliases={5: 1},  # the cache; the three prefetched operands count
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_LIMIT),
        interpret=interpret,
        name="paged_write_and_attend",
    )(live[None], table_BM[row_R] + page_base, at_R, q_BHE[row_R], new_BWE[row_R], cache_XPWE)
    return out_RHE[place_B], cache_XPWE


class Group(NamedTuple):
    """The live rows of one grid step: number r is at first + r of table and positions."""

    first: jax.Array
    rows: jax.Array
    page_ref: Any  # [GROUPS R, M]
    position_ref: Any
    cache_ref: Any
    buffer_ref: Any  # [WAVES, pages, P W, E]
    sem_ref: Any  # [WAVES]

    def position(self, r: jax.Array) -> jax.Array:
        return self.position_ref[self.first + r]

    def page(self, r: jax.Array, m: jax.Array) -> Any:
        return self.cache_ref.at[self.page_ref[self.first + r, m]]


def _kernel(
    live_ref, page_ref, position_ref, q_ref, new_ref, _, out_ref, cache_ref, buffer_ref, sem_ref, write_sem
):
    g = pl.program_id(0)
    count = lax.div(live_ref[0] + GROUPS - 1 - g, GROUPS)  # `//` asks which TPU the host has
    group = Group(g * len(q_ref), count, page_ref, position_ref, cache_ref, buffer_ref, sem_ref)
    out_ref[...] = jnp.zeros_like(out_ref)
    # What no copy reaches is multiplied by a weight of 0, which must not meet a NaN.
    buffer_ref[...] = jnp.zeros_like(buffer_ref)
    _write(group, new_ref, write_sem)

    ahead = jnp.int32(0), jnp.int32(0)
    for wave in range(WAVES - 1):
        ahead = _send(group, ahead, jnp.int32(wave))

    def row(r, state):
        out_HE, *state = _attend(group, q_ref[r], r, *state)
        out_ref[r] = out_HE.astype(out_ref.dtype)
        return tuple(state)

    lax.fori_loop(0, count, row, (jnp.int32(0), ahead))


def _write(group: Group, new_ref: Any, sem: Any) -> None:
    """New tokens into the cache; all are there when it returns, before any page is read."""
    P = group.cache_ref.shape[1]

    def copy(r):
        at = group.position(r)
        return pltpu.make_async_copy(new_ref.at[r], group.page(r, lax.div(at, P)).at[lax.rem(at, P)], sem)

    lax.fori_loop(0, group.rows, lambda r, _: copy(r).start(), None)
    lax.fori_loop(0, group.rows, lambda r, _: copy(r).wait(), None)


def _copies(group: Group, r: jax.Array, wave: jax.Array, slot: jax.Array, act: str) -> None:
    """Starts, or waits for, the copies of the wave's live pages into the slot."""
    pages, P = group.buffer_ref.shape[1], group.cache_ref.shape[1]
    for i in range(pages):
        m = wave * pages + i

        @pl.when(m * P <= group.position(r))
        def _(i=i, m=m):
            page, into = group.page(r, m), group.buffer_ref.at[slot, i]
            page = page if page.shape == into.shape else page.reshape(into.shape)
            getattr(pltpu.make_async_copy(page, into, group.sem_ref.at[slot]), act)()


def _send(group: Group, ahead: tuple[jax.Array, jax.Array], slot: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Starts the wave (row, number) into the slot, if there is such a row, and gives the wave after it."""
    r, wave = ahead
    pages, P = group.buffer_ref.shape[1], group.cache_ref.shape[1]

    @pl.when(r < group.rows)
    def _():
        _copies(group, r, wave, slot, "start")

    last = (wave + 1) * pages * P > group.position(r)
    return jnp.where(last, jnp.minimum(r + 1, group.rows), r), jnp.where(last, 0, wave + 1)


def _attend(group: Group, q_HE: jax.Array, r: jax.Array, slot: jax.Array, ahead: tuple[jax.Array, jax.Array]):
    """Row r's attention [H, E] in float32, and slot and wave to go on with; an online softmax."""
    (_, P, W, E), pages, H = group.cache_ref.shape, group.buffer_ref.shape[1], len(q_HE)
    lines = pages * P * W
    column_HC = lax.broadcasted_iota(jnp.int32, (H, lines), 1)
    head_HC = lax.div(lax.broadcasted_iota(jnp.int32, (H, lines), 0), 2 * H // W)
    own_HC = lax.rem(column_HC, W) == 2 * head_HC
    # Named for either dtype: the caller's default may be "highest", which Mosaic refuses for bfloat16.
    precision = lax.Precision.HIGHEST if group.buffer_ref.dtype == jnp.float32 else lax.Precision.DEFAULT
    dot = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def body(wave, state):
        out_HE, top_H1, sum_H1, slot, ahead = state
        ahead = _send(group, ahead, lax.rem(slot + WAVES - 1, WAVES))
        _copies(group, r, wave, slot, "wait")
        kv_CE = group.buffer_ref[slot].reshape(lines, E)
        score_HC = dot(q_HE.astype(kv_CE.dtype), kv_CE, (((1,), (1,)), ((), ()))) / math.sqrt(E)
        seen_HC = own_HC & (column_HC < (group.position(r) + 1 - wave * pages * P) * W)
        score_HC = jnp.where(seen_HC, score_HC, MINUS)
        new_H1 = jnp.maximum(top_H1, jnp.max(score_HC, axis=1, keepdims=True))
        weight_HC, shrink_H1 = jnp.exp(score_HC - new_H1), jnp.exp(top_H1 - new_H1)
        at_values_HC = pltpu.roll(weight_HC, 1, 1).astype(kv_CE.dtype)
        out_HE = out_HE * shrink_H1 + dot(at_values_HC, kv_CE, (((1,), (0,)), ((), ())))
        sum_H1 = sum_H1 * shrink_H1 + jnp.sum(weight_HC, axis=1, keepdims=True)
        return out_HE, new_H1, sum_H1, lax.rem(slot + 1, WAVES), ahead

    zero_H1 = jnp.zeros((H, 1), jnp.float32)
    state = jnp.zeros((H, E), jnp.float32), zero_H1 + MINUS, zero_H1, slot, ahead
    waves = lax.div(group.position(r), pages * P) + 1
    out_HE, _, sum_H1, slot, ahead = lax.fori_loop(0, waves, body, state)
    return out_HE / sum_H1, slot, ahead
