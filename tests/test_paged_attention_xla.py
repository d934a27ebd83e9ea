"""Attention in plain XLA: rows in groups and pages in trips give what the definition gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosd_jax.kernels.paged_attention import write_and_attend, xla

PAGE, WIDTH, K, E = 4, 9, 2, 8


def operands(lengths, seed=0):
    """Rows whose newest token is number `length` - 1, in the second layer of two; 0: idle."""
    rng, B = np.random.default_rng(seed), len(lengths)
    pages = B * WIDTH
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    table_BM = jnp.asarray(rng.permutation(pages).reshape(B, WIDTH), jnp.int32)
    position_B = jnp.asarray(lengths, jnp.int32) - 1
    store_XPWE = normal(2 * pages, PAGE, 2 * K, E)
    return normal(B, 3 * K, E), normal(B, K, E), normal(B, K, E), store_XPWE, table_BM, position_B, pages


def by_hand(q_BHE, k_BKE, v_BKE, store_XPWE, table_BM, position_B, page_base):
    """The output in float64, row by row and head by head."""
    q, k, v, store, table, position = map(np.asarray, (q_BHE, k_BKE, v_BKE, store_XPWE, table_BM, position_B))
    out = np.zeros(q.shape)
    for b, at in enumerate(position):
        kept = store[table[b] + page_base].reshape(-1, K, 2, E)[: max(at, 0)].astype(np.float64)
        for h in range(q.shape[1] if at >= 0 else 0):
            keys = np.vstack([kept[:, h // 3, 0], k[b, h // 3]])
            values = np.vstack([kept[:, h // 3, 1], v[b, h // 3]])
            weight = np.exp(keys @ q[b, h] / np.sqrt(E))
            out[b, h] = weight @ values / weight.sum()
    return out


@pytest.mark.parametrize("group, block", [(1, 1), (3, 8), (4, 12), (7, 64)])
@pytest.mark.parametrize("lengths", [[36, 0, 1, 5, 4, 0, 20], [0, 0, 3], [0, 0], [36, 36, 36, 36, 36]])
def test_groups_of_rows_and_trips_of_pages_change_nothing(lengths, group, block):
    args = operands(lengths, seed=group)
    grouped = jax.jit(partial(xla.grouped, group=group, block=block))
    for attend in (grouped, jax.jit(xla.short), jax.jit(xla.reference)):
        out_BHE, store_XPWE = attend(*args)
        np.testing.assert_allclose(out_BHE, by_hand(*args), atol=1e-6)
        np.testing.assert_array_equal(store_XPWE, xla.write(*args[1:]))


def test_writing_reaches_the_newest_position_of_live_rows_alone():
    lengths = [36, 0, 1, 5]
    _, k_BKE, v_BKE, store_XPWE, table_BM, _, page_base = args = operands(lengths)
    want = np.array(store_XPWE)
    for b, length in enumerate(lengths):
        if length:
            at = np.asarray(table_BM)[b, (length - 1) // PAGE] + page_base, (length - 1) % PAGE
            want[at] = np.stack([k_BKE[b], v_BKE[b]], axis=1).reshape(2 * K, E)
    np.testing.assert_array_equal(xla.write(*args[1:]), want)


@pytest.mark.parametrize("longest", [1, 12, 13, 24, 25, 36])
def test_a_short_table_is_read_as_far_as_the_longest_row(longest):
    """Nine pages of four, three to a quarter: what lies behind the one with the longest row is not read."""
    q_BHE, k_BKE, v_BKE, store_XPWE, table_BM, position_B, base = args = operands([longest, 1, 0])
    read = -(-longest // 12) * 3
    unread = (table_BM[:, read:] + base).reshape(-1)
    args = q_BHE, k_BKE, v_BKE, store_XPWE.at[unread].set(jnp.nan), table_BM, position_B, base
    out_BHE = jax.jit(xla.short)(*args)[0]
    np.testing.assert_allclose(out_BHE, by_hand(*args), atol=1e-6)


def test_a_short_table_is_read_at_once_and_a_long_one_in_trips():
    loops = lambda args: jax.jit(write_and_attend).lower(*args).compile().as_text().count(" while(")
    short = operands([36, 0, 1])
    many = -(-(xla.SHORT + 1) // (WIDTH * PAGE))
    long = (*short[:4], jnp.tile(short[4], (1, many)), *short[5:])
    assert loops(short) == 0 and loops(long) >= 2
    for args in (short, long):
        np.testing.assert_allclose(jax.jit(write_and_attend)(*args)[0], by_hand(*args), atol=1e-6)
