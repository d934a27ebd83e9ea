"""Prompts in the store: which ones are wanted, where each begins, and their prefill.

A shard prefills every prompt that one of its rows answers once, and the store's first pages hold them, the
longest first, each in whole pages and no more of them than its own tokens fill. Passes of like length
follow each other, so a pass is little wider than what it holds.

    lay_out(length_N, wanted_N, page)                            -> Layout
    fill(weights, model, prompt_NP, layout, store, axis)         -> store
    room(length_N, prompt_of_B, limit_B, page, shards)           -> pages, on the host
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

PASS_TOKENS = 2048  # of one pass: bounds its activations
LEAST_TOKENS = 8192  # room is made for so many at least, so that fewer shapes are compiled
WIDTHS = 4  # of passes over long prompts, each compiled for itself


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
    N, T = prompt_NP.shape
    at_once = max(1, min(N, PASS_TOKENS // T))  # prompts of a pass
    order_N, length_N, first_N = (jnp.pad(x, (0, -N % at_once)) for x in layout)

    def one_pass(width: int, i: jax.Array, store_XPWE: jax.Array) -> jax.Array:
        some = lambda x_N: lax.dynamic_slice_in_dim(x_N, i * at_once, at_once)
        tokens = prompt_NP[some(order_N), :width]
        return decoder.prefill(weights, model, tokens, some(length_N), store_XPWE, some(first_N), axis)

    longest, done, widths = length_N[::at_once], jnp.int32(0), pass_widths(T)
    for width, shorter in zip(widths, [*widths[1:], 0], strict=True):
        # A loop for each width: a branch within one loop would make XLA copy the store.
        until = jnp.sum(longest > shorter, dtype=jnp.int32)
        store_XPWE = lax.fori_loop(done, until, partial(one_pass, width), store_XPWE)
        done = until
    return store_XPWE


def pass_widths(T: int) -> list[int]:
    """Widths of the passes over prompts padded to T, from T down."""
    step = decoder.QUERIES * -(-T // (WIDTHS * decoder.QUERIES))
    return [*range(step, T, step), T][::-1]


def room(length_N: Any, prompt_of_B: Any, limit_B: Any, page: int, shards: int) -> int:
    """Pages for the prompts of any one shard: a power of two, of LEAST_TOKENS tokens or more."""
    pages_N = -(-np.asarray(length_N) // page)
    by_shard = (np.reshape(np.asarray(x), (shards, -1)) for x in (prompt_of_B, limit_B))
    wanted = (np.unique(of_B[limit_B > 0]) for of_B, limit_B in zip(*by_shard, strict=True))
    most = max(int(pages_N[some].sum()) for some in wanted)
    return 1 << (max(1, most, LEAST_TOKENS // page) - 1).bit_length()
