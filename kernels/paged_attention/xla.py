"""Plain XLA: the definition, which gathers every page, and an online softmax over blocks of positions.

On CPU a few rows at a time, as far as they go; elsewhere all rows at once, as far as the longest.

Dimensions: B rows, T pieces, R rows of a piece, H query heads, K key-value heads, G queries of a key-value
head, E head width, X pages of all layers, P positions of a page, W = 2 K, F = W E, M pages of a table, m
some of them, S positions read, j keys and values.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from .operands import Operands

PIECE = 2**16  # on CPU: numbers of keys and values that are read at once, so that they stay in a core's cache
FEW = 4  # on CPU: heads, of keys and of values, up to which every query is multiplied by all of them
WIDE_BLOCK = 512  # elsewhere, for the sake of few and large operations
MINUS = -1e30  # below any score, without the NaN of inf - inf
# For some positions: weighted values [B, K, G, E], greatest score and sum of weights [B, K, G].
Softmax = tuple[jax.Array, jax.Array, jax.Array]


def write(operands: Operands) -> jax.Array:
    """The cache with each live row's token in its place: one row scatter, in place where donated."""
    _, k_BKE, v_BKE, cache_XPWE, table_BM, position_B, page_base = operands
    X, P, W, E = cache_XPWE.shape
    rows_BWE = jnp.stack([k_BKE, v_BKE], axis=2).reshape(-1, W, E)
    page_B = jnp.take_along_axis(table_BM, position_B[:, None] // P, axis=1, mode="clip")[:, 0] + page_base
    # An idle row writes past the end of the cache, where a scatter drops it.
    at_B = jnp.where(position_B < 0, X * P, page_B * P + position_B % P)
    flat = cache_XPWE.reshape(X * P, W, E)
    return flat.at[at_B].set(rows_BWE, mode="drop").reshape(X, P, W, E)


def write_and_attend(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`api.write_and_attend`, by platform."""
    return lax.platform_dependent(operands, cpu=in_pieces, default=together)


def in_pieces(operands: Operands, *, piece: int = PIECE) -> tuple[jax.Array, jax.Array]:
    """A few rows and positions at a time, so that they are multiplied while they lie in the core's cache.

    That is whole rows while their tables fit, else a row by blocks of positions. Of the last block, or the
    only one, those quarters are read that the longest of the rows reaches into; of idle rows nothing.
    """
    q_BHE, table_BM, position_B = operands.q_BHE, operands.table_BM, operands.position_B
    cache_XPWE = write(operands)
    (_, P, W, E), (B, M) = cache_XPWE.shape, table_BM.shape
    pages = min(M, max(1, piece // (P * W * E)))
    quarter = -(-pages // 4)
    widths = [min(width, pages) for width in range(quarter, pages + quarter, quarter)]
    # A power of two: as many rows as have whole tables that fit one piece.
    rows = min(B, 1 << max(1, piece // (M * P * W * E)).bit_length() - 1)

    def pieces(x_B: jax.Array, fill: int = 0) -> jax.Array:
        x_B = jnp.pad(x_B, ((0, -B % rows), *((0, 0),) * (x_B.ndim - 1)), constant_values=fill)
        return x_B.reshape(-1, rows, *x_B.shape[1:])

    position_TR = pieces(position_B, -1)
    longest_T = jnp.max(position_TR, axis=1)
    before_T = lax.div(longest_T, pages * P)  # blocks that are read whole
    last_T = lax.div(longest_T - before_T * pages * P + quarter * P, quarter * P)  # quarters of the last one
    ids_BM = jnp.pad(table_BM + operands.page_base, ((0, 0), (0, -M % pages)))
    q_BKGE = _grouped(q_BHE, W // 2) if W > FEW else _spread(q_BHE, W)

    def attend(rows):
        return _attend(cache_XPWE, widths, *rows)

    out_TRKGE = lax.map(attend, (pieces(q_BKGE), pieces(ids_BM), position_TR, before_T, last_T))
    out_BKGE = out_TRKGE.reshape(-1, *q_BKGE.shape[1:])[:B]
    out_BHE = out_BKGE.reshape(q_BHE.shape) if W > FEW else _own_values(out_BKGE, W)
    return out_BHE.astype(q_BHE.dtype), cache_XPWE


def _attend(cache_XPWE, widths, q_BKGE, ids_BM, position_B, before, last) -> jax.Array:
    """Attention of one piece: `before` blocks of widths[-1] pages, then one of widths[last - 1] (0: none)."""
    P, W, _ = cache_XPWE.shape[1:]

    def some(first: jax.Array, width: int) -> Softmax:
        kv_BSKjE = _gather(cache_XPWE, lax.dynamic_slice_in_dim(ids_BM, first, width, axis=1))
        k_BSKE, v_BSKE = _keys_and_values(kv_BSKjE, apart=W > FEW)
        # XLA for CPU would fold the turn into the product, which then takes four times as long.
        score_BKSG = lax.optimization_barrier(jnp.einsum("bske,bkge->bksg", k_BSKE, q_BKGE))
        return _softmax(score_BKSG.swapaxes(2, 3), v_BSKE, _seen(position_B - first * P, width * P))

    block = widths[-1]
    ends = [partial(some, before * block, width) for width in widths]
    state = lax.switch(last, [lambda: _nothing(q_BKGE), *ends])
    if ids_BM.shape[1] > block:
        state = lax.fori_loop(0, before, lambda i, state: _merged(state, some(i * block, block)), state)
    return _normalised(state)


def together(operands: Operands, *, block: int = WIDE_BLOCK) -> tuple[jax.Array, jax.Array]:
    """All rows at once, `block` positions at a time, but at least a page."""
    q_BHE, table_BM, position_B = operands.q_BHE, operands.table_BM, operands.position_B
    cache_XPWE = write(operands)
    P = cache_XPWE.shape[1]
    q_BKGE = _grouped(q_BHE, operands.k_BKE.shape[1])
    pages = max(1, block // P)
    ids_BM = jnp.pad(table_BM + operands.page_base, ((0, 0), (0, -table_BM.shape[1] % pages)))

    def trip(i, state: Softmax) -> Softmax:
        kv_BSKjE = _gather(cache_XPWE, lax.dynamic_slice_in_dim(ids_BM, i * pages, pages, axis=1))
        k_BSKE, v_BSKE = _keys_and_values(kv_BSKjE)
        seen_B11S = _seen(position_B - i * pages * P, pages * P)
        return _merged(state, _softmax(_scores(q_BKGE, k_BSKE), v_BSKE, seen_B11S))

    trips = lax.div(jnp.max(position_B) + pages * P, pages * P)
    out_BKGE = _normalised(lax.fori_loop(0, trips, trip, _nothing(q_BKGE)))
    return out_BKGE.reshape(q_BHE.shape).astype(q_BHE.dtype), cache_XPWE


def reference(operands: Operands) -> tuple[jax.Array, jax.Array]:
    """`api.write_and_attend` by its definition, on all positions that the table can hold."""
    q_BHE, table_BM, position_B = operands.q_BHE, operands.table_BM, operands.position_B
    cache_XPWE = write(operands)
    k_BSKE, v_BSKE = _keys_and_values(_gather(cache_XPWE, table_BM + operands.page_base))
    score_BKGS = _scores(_grouped(q_BHE, operands.k_BKE.shape[1]), k_BSKE)
    seen_B11S = _seen(position_B, k_BSKE.shape[1])
    weight_BKGS = jax.nn.softmax(jnp.where(seen_B11S, score_BKGS, -jnp.inf), axis=-1, where=seen_B11S)
    out_BKGE = _weighted(weight_BKGS, v_BSKE)
    return out_BKGE.reshape(q_BHE.shape).astype(q_BHE.dtype), cache_XPWE


def _grouped(q_BHE: jax.Array, K: int) -> jax.Array:
    """Queries by key-value head, float32 and scaled: [B, K, H // K, E]."""
    B, H, E = q_BHE.shape
    return (q_BHE.astype(jnp.float32) / math.sqrt(E)).reshape(B, K, H // K, E)


def _spread(q_BHE: jax.Array, W: int) -> jax.Array:
    """Queries for all heads side by side: each where its own keys lie, 0 elsewhere: [B, 1, H, W E]."""
    (B, H, E), K = q_BHE.shape, W // 2
    place_HW = jnp.arange(W) == jnp.arange(H)[:, None] // (H // K) * 2
    q_BHE = _grouped(q_BHE, K).reshape(B, H, E)
    return jnp.where(place_HW[:, :, None], q_BHE[:, :, None], 0.0).reshape(B, 1, H, W * E)


def _own_values(out_B1HF: jax.Array, W: int) -> jax.Array:
    """Each query's own values [B, H, E], from the weighted keys and values of all heads."""
    (B, _, H, F), K = out_B1HF.shape, W // 2
    out_BKGKjE = out_B1HF.reshape(B, K, H // K, K, 2, F // W)
    return jnp.stack([out_BKGKjE[:, k, :, k, 1] for k in range(K)], axis=1).reshape(B, H, F // W)


def _gather(cache_XPWE: jax.Array, page_Bm: jax.Array) -> jax.Array:
    """Keys (j = 0) and values (j = 1) of m pages a row, float32: [B, m P, K, 2, E].

    Whole pages, each as one row: XLA for CPU copies long runs several times as fast as short ones.
    """
    X, P, W, E = cache_XPWE.shape
    B, m = page_Bm.shape
    rows = cache_XPWE.reshape(X, P * W * E).at[page_Bm.reshape(-1)].get(mode="promise_in_bounds")
    return rows.reshape(B, m * P, W // 2, 2, E).astype(jnp.float32)


def _keys_and_values(kv_BSKjE: jax.Array, apart: bool = True) -> tuple[jax.Array, jax.Array]:
    """Both by head; or, as they lie, all of both for a single head, where a copy would cost more."""
    if apart:
        return kv_BSKjE[:, :, :, 0], kv_BSKjE[:, :, :, 1]
    kv_BS1F = kv_BSKjE.reshape(*kv_BSKjE.shape[:2], 1, -1)
    return kv_BS1F, kv_BS1F


def _scores(q_BKGE: jax.Array, k_BSKE: jax.Array) -> jax.Array:
    return jnp.einsum("bkge,bske->bkgs", q_BKGE, k_BSKE)


def _weighted(weight_BKGS: jax.Array, v_BSKE: jax.Array) -> jax.Array:
    return jnp.einsum("bkgs,bske->bkge", weight_BKGS, v_BSKE)


def _seen(position_B: jax.Array, S: int) -> jax.Array:
    return (jnp.arange(S) <= position_B[:, None])[:, None, None, :]


def _softmax(score_BKGS: jax.Array, v_BSKE: jax.Array, seen_B11S: jax.Array) -> Softmax:
    score_BKGS = jnp.where(seen_B11S, score_BKGS, -jnp.inf)
    top_BKG = jnp.maximum(jnp.max(score_BKGS, axis=-1), MINUS)
    weight_BKGS = jnp.exp(score_BKGS - top_BKG[..., None])
    return _weighted(weight_BKGS, v_BSKE), top_BKG, jnp.sum(weight_BKGS, axis=-1)


def _nothing(q_BKGE: jax.Array) -> Softmax:
    """The softmax of no position."""
    zero_BKG = jnp.zeros(q_BKGE.shape[:3])
    return jnp.zeros_like(q_BKGE), zero_BKG + MINUS, zero_BKG


def _merged(one: Softmax, other: Softmax) -> Softmax:
    """Both softmaxes merged."""
    top_BKG = jnp.maximum(one[1], other[1])
    a_BKG, b_BKG = jnp.exp(one[1] - top_BKG), jnp.exp(other[1] - top_BKG)
    out_BKGE = one[0] * a_BKG[..., None] + other[0] * b_BKG[..., None]
    return out_BKGE, top_BKG, one[2] * a_BKG + other[2] * b_BKG


def _normalised(state: Softmax) -> jax.Array:
    """The weighted mean of the values; 0 where there is none."""
    out_BKGE, _, sum_BKG = state
    return out_BKGE / jnp.where(sum_BKG > 0, sum_BKG, 1.0)[..., None]
