"""Plain XLA: the definition that gathers every page, short tables at once, long ones by an online softmax."""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

GROUP, BLOCK = 32, 64  # on CPU: rows of like length that loop together; positions a trip reads
SHORT = 256  # on CPU: positions of a table that all rows read at once, as far as the longest of them
FEW = 4  # for that: heads of keys and of values, since each query is multiplied by all of them
WIDE_BLOCK = 512  # elsewhere, where all rows loop together, for the sake of few and large operations
MINUS = -1e30  # a score that no exponential survives, without the NaN of inf - inf


def write(
    k_BKE: jax.Array,
    v_BKE: jax.Array,
    store_XPWE: jax.Array,
    table_BM: jax.Array,
    position_B: jax.Array,
    page_base: jax.Array | int,
) -> jax.Array:
    """The store with each live row's token in its place: one row scatter, in place where donated."""
    X, P, W, E = store_XPWE.shape
    rows_BWE = jnp.stack([k_BKE, v_BKE], axis=2).reshape(-1, W, E)
    page_B = jnp.take_along_axis(table_BM, position_B[:, None] // P, axis=1, mode="clip")[:, 0] + page_base
    at_B = jnp.where(position_B < 0, X * P, page_B * P + position_B % P)
    flat = store_XPWE.reshape(X * P, W, E)
    return flat.at[at_B].set(rows_BWE, mode="drop").reshape(X, P, W, E)


def write_and_attend(*operands):
    """`api.write_and_attend`, by platform: a short table at once, groups of a few rows, or all rows."""
    q_BHE, _, _, store_XPWE, table_BM, *_ = operands
    (_, P, W, _), M = store_XPWE.shape, table_BM.shape[1]
    is_short = M * P <= SHORT and W <= FEW
    narrow = short if is_short else partial(grouped, group=min(GROUP, len(q_BHE)), block=BLOCK)
    wide = partial(grouped, group=len(q_BHE), block=WIDE_BLOCK)
    return lax.platform_dependent(*operands, cpu=narrow, default=wide)


def short(q_BHE, k_BKE, v_BKE, store_XPWE, table_BM, position_B, page_base):
    """All rows at once, reading the quarters of the table that the longest row reaches into.

    Pages are used as they lie, keys and values of all heads side by side (F = W E numbers a position), and
    all but one head's part of both products is for nothing. Yet to pull the heads apart XLA for CPU
    would copy the pages twice more, which takes longer.
    """
    store_XPWE = write(k_BKE, v_BKE, store_XPWE, table_BM, position_B, page_base)
    (B, H, E), (_, P, W, _), M = q_BHE.shape, store_XPWE.shape, table_BM.shape[1]
    K, quarter = W // 2, -(-M // 4)
    place_HW = jnp.arange(W) == jnp.arange(H)[:, None] // (H // K) * 2  # where the keys of a query lie
    q_BHF = jnp.where(place_HW[:, :, None], _scaled(q_BHE)[:, :, None], 0.0).reshape(B, H, W * E)

    def some(pages: int) -> tuple[jax.Array, jax.Array]:
        """The first pages' weighted sums of all F numbers, and the sums of weights."""
        S = pages * P
        kv_BSF = _gather(store_XPWE, table_BM[:, :pages] + page_base).reshape(B, S, W * E)
        score_BSH = jnp.einsum("bsf,bhf->bsh", kv_BSF, q_BHF)
        score_BSH = jnp.where(_seen(position_B, S)[:, 0, 0, :, None], score_BSH, MINUS)
        weight_BSH = jnp.exp(score_BSH - jnp.max(score_BSH, axis=1, keepdims=True))
        return jnp.einsum("bsh,bsf->bhf", weight_BSH, kv_BSF), jnp.sum(weight_BSH, axis=1)

    widths = [min(pages, M) for pages in range(quarter, M + quarter, quarter)]
    longest = jnp.maximum(jnp.max(position_B), 0)
    out_BHF, sum_BH = lax.switch(longest // (quarter * P), [partial(some, pages) for pages in widths])
    out_BKGKjE = out_BHF.reshape(B, K, H // K, K, 2, E)
    out_BKGE = jnp.stack([out_BKGKjE[:, k, :, k, 1] for k in range(K)], axis=1)
    out_BHE = out_BKGE.reshape(B, H, E) / sum_BH[..., None]
    return jnp.where(position_B[:, None, None] < 0, 0.0, out_BHE).astype(q_BHE.dtype), store_XPWE


def grouped(q_BHE, k_BKE, v_BKE, store_XPWE, table_BM, position_B, page_base, *, group: int, block: int):
    """Longest rows first, so many in a group, which makes as many trips as its first row needs.

    A trip reads `block` positions of each row, but at least a page.
    """
    store_XPWE = write(k_BKE, v_BKE, store_XPWE, table_BM, position_B, page_base)
    (B, K, _), pages = k_BKE.shape, max(1, block // store_XPWE.shape[1])
    ids_BM = jnp.pad(table_BM + page_base, ((0, 0), (0, -table_BM.shape[1] % pages)))
    position_R = jnp.pad(position_B, (0, -B % group), constant_values=-1)
    order_R = jnp.argsort(-position_R)
    row_R = jnp.minimum(order_R, B - 1)
    position_R, q_RKGE, ids_RM = position_R[order_R], _grouped(q_BHE, K)[row_R], ids_BM[row_R]

    def attend(g, out_RKGE):
        mine = lambda x_R: lax.dynamic_slice_in_dim(x_R, g * group, group)
        out_BKGE = _attend(mine(q_RKGE), store_XPWE, mine(ids_RM), mine(position_R), pages)
        return lax.dynamic_update_slice_in_dim(out_RKGE, out_BKGE, g * group, axis=0)

    groups = (jnp.sum(position_B >= 0) + group - 1) // group
    out_RKGE = lax.fori_loop(0, groups, attend, jnp.zeros_like(q_RKGE))
    out_BKGE = jnp.zeros_like(out_RKGE).at[order_R].set(out_RKGE)[:B]
    return out_BKGE.reshape(q_BHE.shape).astype(q_BHE.dtype), store_XPWE


def _attend(q_BKGE, store_XPWE, ids_BM, position_B, pages: int) -> jax.Array:
    """An online softmax over `pages` pages a trip, 0 for an idle row; the first row is the longest."""
    (B, K, G, _), P = q_BKGE.shape, store_XPWE.shape[1]
    block = pages * P

    def trip(i, state):
        kv_BSKjE = _gather(store_XPWE, lax.dynamic_slice_in_dim(ids_BM, i * pages, pages, axis=1))
        return _accumulate(state, q_BKGE, kv_BSKjE, _seen(position_B - i * block, block))

    zero_BKG = jnp.zeros((B, K, G), jnp.float32)
    state = jnp.zeros_like(q_BKGE), zero_BKG + MINUS, zero_BKG
    out_BKGE, _, sum_BKG = lax.fori_loop(0, (position_B[0] + block) // block, trip, state)
    out_BKGE = out_BKGE / jnp.where(sum_BKG > 0, sum_BKG, 1.0)[..., None]
    return jnp.where(position_B[:, None, None, None] < 0, 0.0, out_BKGE)


def reference(q_BHE, k_BKE, v_BKE, store_XPWE, table_BM, position_B, page_base):
    """`api.write_and_attend` by its definition, on all positions that the table can hold."""
    store_XPWE = write(k_BKE, v_BKE, store_XPWE, table_BM, position_B, page_base)
    q_BKGE = _grouped(q_BHE, k_BKE.shape[1])
    kv_BSKjE = _gather(store_XPWE, table_BM + page_base)
    score_BKGS = _scores(q_BKGE, kv_BSKjE)
    seen_B11S = _seen(position_B, kv_BSKjE.shape[1])
    weight_BKGS = jax.nn.softmax(jnp.where(seen_B11S, score_BKGS, -jnp.inf), axis=-1, where=seen_B11S)
    out_BKGE = _weighted(weight_BKGS, kv_BSKjE)
    return out_BKGE.reshape(q_BHE.shape).astype(q_BHE.dtype), store_XPWE


def _grouped(q_BHE: jax.Array, K: int) -> jax.Array:
    """Queries by key-value head, float32 and scaled: [B, K, H // K, E]."""
    B, H, E = q_BHE.shape
    return _scaled(q_BHE).reshape(B, K, H // K, E)


def _scaled(q_BHE: jax.Array) -> jax.Array:
    return q_BHE.astype(jnp.float32) / math.sqrt(q_BHE.shape[-1])


def _gather(store_XPWE: jax.Array, page_Bm: jax.Array) -> jax.Array:
    """Keys (j = 0) and values (j = 1) of m pages a row, float32: [B, m P, K, 2, E].

    Whole pages, each as one row: XLA for CPU copies long runs several times as fast as short ones.
    """
    X, P, W, E = store_XPWE.shape
    B, m = page_Bm.shape
    rows = store_XPWE.reshape(X, P * W * E).at[page_Bm.reshape(-1)].get(mode="promise_in_bounds")
    return rows.reshape(B, m * P, W // 2, 2, E).astype(jnp.float32)


def _scores(q_BKGE: jax.Array, kv_BSKjE: jax.Array) -> jax.Array:
    return jnp.einsum("bkge,bske->bkgs", q_BKGE, kv_BSKjE[:, :, :, 0])


def _weighted(weight_BKGS: jax.Array, kv_BSKjE: jax.Array) -> jax.Array:
    return jnp.einsum("bkgs,bske->bkge", weight_BKGS, kv_BSKjE[:, :, :, 1])


def _seen(position_B: jax.Array, S: int) -> jax.Array:
    return (jnp.arange(S) <= position_B[:, None])[:, None, None, :]


def _accumulate(state, q_BKGE, kv_BSKjE, seen_B11S):
    """One step of the online softmax: (weighted values, greatest score, sum of weights).

    An idle row sums up nonsense, since its greatest score is MINUS; nobody reads it.
    """
    out_BKGE, top_BKG, sum_BKG = state
    score_BKGS = jnp.where(seen_B11S, _scores(q_BKGE, kv_BSKjE), MINUS)
    new_BKG = jnp.maximum(top_BKG, jnp.max(score_BKGS, axis=-1))
    weight_BKGS = jnp.exp(score_BKGS - new_BKG[..., None])
    shrink_BKG = jnp.exp(top_BKG - new_BKG)
    return (
        out_BKGE * shrink_BKG[..., None] + _weighted(weight_BKGS, kv_BSKjE),
        new_BKG,
        sum_BKG * shrink_BKG + jnp.sum(weight_BKGS, axis=-1),
    )
