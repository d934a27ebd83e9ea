"""Prompts in the store: which ones are wanted, where each begins, and their prefill.

A shard prefills every prompt that one of its rows answers once, and the store's first pages hold them, the
longest first, each in whole pages and no more of them than its own tokens fill. A pass is as wide as its
first prompt needs, in halves of the longest of all.

    lay_out(length_N, wanted_N, page)                            -> Layout
    fill(weights, model, prompt_NP, layout, store, axis)         -> store
    room(length_N, prompt_of_B, limit_B, page, shards)           -> pages, on the host
    rounded(pages, page)                                         -> pages
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rosd_jax.models import decoder
from rosd_jax.models.decoder import Weights
from rosd_jax.models.qwen3 import Qwen3Config

PASS_TOKENS = 2048  # of one pass, unless a single prompt has more: bounds its activations
NARROWEST = 256  # tokens a prompt of a pass, unless all prompts are shorter
LEAST_TOKENS = 8192  # room is made for so many at least, so that fewer shapes are compiled


class Layout(NamedTuple):
    """N prompts in the order in which they stand in the store, the longest first."""

    order_N: jax.Array  # int32: which prompt
    length_N: jax.Array  # int32: its tokens; 0 from the first one on that nobody wants
    first_N: jax.Array  # int32: its first page


def lay_out(length_N: jax.Array, wanted_N: jax.Array, page: int) -> Layout:
    """Where the wanted prompts (bool) stand. length_N: int32; page: positions of one."""
    length_N = jnp.where(wanted_N, length_N, 0)
    order_N = jnp.argsort(-length_N)
    length_N = length_N[order_N]
    pages_N = (length_N + page - 1) // page
    return Layout(order_N, length_N, jnp.cumsum(pages_N) - pages_N)


def fill(
    weights: Weights,
    model: Qwen3Config,
    prompt_NP: jax.Array,
    layout: Layout,
    store_XPWE: jax.Array,
    axis: str | None,
) -> jax.Array:
    """The store with the prompts in it. prompt_NP: int32, right-padded; axis: as `decoder.prefill`."""
    N, widths = len(prompt_NP), pass_widths(prompt_NP.shape[1])
    prompt_NP = jnp.pad(prompt_NP, ((0, 0), (0, widths[0] - prompt_NP.shape[1])))
    order_N, length_N, first_N = (jnp.pad(x, (0, N)) for x in layout)  # a pass may reach over the end

    def one_pass(width: int, at_once: int, state: tuple[jax.Array, jax.Array]):
        done, store_XPWE = state
        some = lambda x_N: lax.dynamic_slice_in_dim(x_N, done, at_once)
        tokens = prompt_NP[some(order_N), :width]
        given = tokens, some(length_N), store_XPWE, some(first_N)
        return done + at_once, decoder.prefill(weights, model, *given, axis)

    state = jnp.int32(0), store_XPWE
    for width, shorter in zip(widths, [*widths[1:], 0], strict=True):
        # A loop for each width: a branch within one loop would make XLA copy the store.
        at_once = max(1, min(N, PASS_TOKENS // width))  # prompts of a pass
        longer = lambda state, shorter=shorter: length_N[state[0]] > shorter
        state = lax.while_loop(longer, partial(one_pass, width, at_once), state)
    return state[1]


def pass_widths(T: int) -> list[int]:
    """Widths of the passes over prompts of up to T tokens: halved down to NARROWEST, and multiples of it."""
    if T <= NARROWEST:
        return [T]
    whole = -(-T // NARROWEST) * NARROWEST
    return [whole, *(w for w in pass_widths(-(-whole // 2)) if w < whole)]


def room(length_N: Any, prompt_of_B: Any, limit_B: Any, page: int, shards: int) -> int:
    """Pages for the prompts of any one shard: a power of two, of LEAST_TOKENS tokens or more."""
    pages_N = -(-np.asarray(length_N) // page)
    by_shard = (np.reshape(np.asarray(x), (shards, -1)) for x in (prompt_of_B, limit_B))
    wanted = (np.unique(of_B[limit_B > 0]) for of_B, limit_B in zip(*by_shard, strict=True))
    return rounded(max(int(pages_N[some].sum()) for some in wanted), page)


def rounded(pages: int, page: int) -> int:
    """Pages that are made room for where so many are needed."""
    return 1 << (max(1, pages, LEAST_TOKENS // page) - 1).bit_length()
