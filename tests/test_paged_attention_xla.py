"""Attention in plain XLA: rows in pieces and positions in blocks give what the definition gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosd_jax.kernels.paged_attention import Operands, write_and_attend, xla
from support import nightly_but

PAGE, WIDTH, K, E = 4, 9, 2, 8


def operands(lengths, seed=0, K=K):
    """Rows whose newest token is number `length` - 1, in the second layer of two; 0: idle."""
    rng, B = np.random.default_rng(seed), len(lengths)
    pages = B * WIDTH

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    table_BM = jnp.asarray(rng.permutation(pages).reshape(B, WIDTH), jnp.int32)
    position_B = jnp.asarray(lengths, jnp.int32) - 1
    cache_XPWE = normal(2 * pages, PAGE, 2 * K, E)
    q_BHE, k_BKE, v_BKE = normal(B, 3 * K, E), normal(B, K, E), normal(B, K, E)
    return Operands(q_BHE, k_BKE, v_BKE, cache_XPWE, table_BM, position_B, pages)


def by_hand(q_BHE, k_BKE, v_BKE, cache_XPWE, table_BM, position_B, page_base):
    """The output in float64, row by row and head by head."""
    q, k, v, cache, table, position = map(np.asarray, (q_BHE, k_BKE, v_BKE, cache_XPWE, table_BM, position_B))
    out, K = np.zeros(q.shape), k.shape[1]
    for b, at in enumerate(position):
        kept = cache[table[b] + page_base].reshape(-1, K, 2, E)[: max(at, 0)].astype(np.float64)
        for h in range(q.shape[1] if at >= 0 else 0):
            keys = np.vstack([kept[:, h // 3, 0], k[b, h // 3]])
            values = np.vstack([kept[:, h // 3, 1], v[b, h // 3]])
            weight = np.exp(keys @ q[b, h] / np.sqrt(E))
            out[b, h] = weight @ values / weight.sum()
    return out


@pytest.mark.parametrize(
    "lengths",
    nightly_but([[36, 0, 1, 5, 4, 0, 20], [0, 0, 3], [0, 0], [36, 36, 36, 36, 36]], keep=[0, 2]),
)
@pytest.mark.parametrize("heads", nightly_but([1, 2, 3], keep=[2]))
def test_pieces_and_blocks_change_nothing(lengths, heads):
    args = operands(lengths, seed=heads, K=heads)
    number = PAGE * 2 * heads * E  # of a page
    pieces = [partial(xla.in_pieces, piece=n * number) for n in (1, 2, 4, WIDTH, 2 * WIDTH, 9 * WIDTH)]
    blocks = [partial(xla.together, block=n) for n in (1, 8, 12, 64)]

    def chosen(operands):
        return write_and_attend(*operands)

    for attend in (*pieces, *blocks, xla.reference, chosen):
        out_BHE, cache_XPWE = jax.jit(attend)(args)
        np.testing.assert_allclose(out_BHE, by_hand(*args), atol=1e-6)
        np.testing.assert_array_equal(cache_XPWE, xla.write(args))


def test_writing_reaches_the_newest_position_of_live_rows_alone():
    lengths = [36, 0, 1, 5]
    _, k_BKE, v_BKE, cache_XPWE, table_BM, _, page_base = args = operands(lengths)
    want = np.array(cache_XPWE)
    for b, length in enumerate(lengths):
        if length:
            at = np.asarray(table_BM)[b, (length - 1) // PAGE] + page_base, (length - 1) % PAGE
            want[at] = np.stack([k_BKE[b], v_BKE[b]], axis=1).reshape(2 * K, E)
    np.testing.assert_array_equal(xla.write(args), want)


@pytest.mark.parametrize("longest", [1, 12, 13, 24, 25, 36])
@pytest.mark.parametrize("rows_a_piece", [1, 4])
def test_a_piece_is_read_as_far_as_its_longest_row(longest, rows_a_piece):
    """Nine pages of four, three to a quarter: what lies behind the one with the longest row is not read."""
    lengths = [longest, 1, 0, 0, 13, 0, 0, 2]
    _, _, _, cache_XPWE, table_BM, _, base = args = operands(lengths)
    reach = np.max(np.reshape(lengths, (-1, rows_a_piece)), axis=1).repeat(rows_a_piece)
    unread = np.arange(WIDTH) >= -(-reach[:, None] // 12) * 3
    cache_XPWE = cache_XPWE.at[np.asarray(table_BM)[unread] + base].set(jnp.nan)
    attend = partial(xla.in_pieces, piece=rows_a_piece * WIDTH * PAGE * 2 * K * E)
    out_BHE = jax.jit(attend)(args._replace(cache_XPWE=cache_XPWE))[0]
    np.testing.assert_allclose(out_BHE, by_hand(*args), atol=1e-6)


def test_a_long_row_is_read_block_by_block_as_far_as_it_goes():
    """Two pages a block: of 20 positions two whole blocks and half of the third, of an idle row nothing."""
    _, _, _, cache_XPWE, table_BM, _, base = args = operands([20, 0, 36])
    unread = np.arange(WIDTH) >= np.array([5, 0, WIDTH])[:, None]
    cache_XPWE = cache_XPWE.at[np.asarray(table_BM)[unread] + base].set(jnp.nan)
    attend = partial(xla.in_pieces, piece=2 * PAGE * 2 * K * E)
    out_BHE = jax.jit(attend)(args._replace(cache_XPWE=cache_XPWE))[0]
    np.testing.assert_allclose(out_BHE, by_hand(*args), atol=1e-6)
