"""Prompts in the KV cache: which ones are wanted, where each begins, and their prefill.

A shard prefills every prompt that one of its rows answers once, and the cache's first pages hold them, the
longest first, each in whole pages and no more of them than its own tokens fill. A pass is as wide as its
first prompt needs, in halves of the longest of all.

    lay_out(length_N, wanted_N, page)                            -> Layout
    prefill(decoder, weights, prompt_NT, layout, cache_XPWE)     -> cache_XPWE

Dimensions: N prompts, T tokens of a prompt (padded); of the cache X pages of all layers, P positions of a
page, W heads of keys and values, E head width.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rosd_jax.models.decoder import Decoder, PromptInputs, Weights, prefill_step

PASS_TOKENS = 2048  # of one pass, unless a single prompt has more: bounds its activations
NARROWEST = 256  # tokens a prompt of a pass, unless all prompts are shorter


class Layout(NamedTuple):
    """The prompts in the order in which they stand in the cache, the longest first."""

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


def prefill(
    decoder: Decoder, weights: Weights, prompt_NT: jax.Array, layout: Layout, cache_XPWE: jax.Array
) -> jax.Array:
    """The cache with the prompts in it. prompt_NT: int32, right-padded."""
    N, widths = len(prompt_NT), pass_widths(prompt_NT.shape[1])
    prompt_NT = jnp.pad(prompt_NT, ((0, 0), (0, widths[0] - prompt_NT.shape[1])))
    order_N, length_N, first_N = (jnp.pad(x, (0, N)) for x in layout)  # a pass may reach over the end

    def one_pass(width: int, at_once: int, state: tuple[jax.Array, jax.Array]):
        done, cache_XPWE = state

        def some(x_N):
            return lax.dynamic_slice_in_dim(x_N, done, at_once)

        # Prompts that nobody wants have length 0, so that nothing of them is written to the cache.
        inputs = PromptInputs(prompt_NT[some(order_N), :width], some(length_N), some(first_N))
        return done + at_once, prefill_step(decoder, weights, inputs, cache_XPWE)

    state = jnp.int32(0), cache_XPWE
    for width, shorter in zip(widths, [*widths[1:], 0], strict=True):
        # A loop for each width: a branch within one loop would make XLA copy the cache.
        at_once = max(1, min(N, PASS_TOKENS // width))  # prompts of a pass

        def longer(state, shorter=shorter):
            return length_N[state[0]] > shorter

        state = lax.while_loop(longer, partial(one_pass, width, at_once), state)
    return state[1]


def pass_widths(longest: int) -> list[int]:
    """Widths of the passes over prompts of up to `longest` tokens: halved to NARROWEST, multiples of it."""
    if longest <= NARROWEST:
        return [longest]
    whole = -(-longest // NARROWEST) * NARROWEST
    return [whole, *(w for w in pass_widths(-(-whole // 2)) if w < whole)]
