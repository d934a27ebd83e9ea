"""A row in tiles: how the GPU row kernel reads it, and loops over it.

A tile is TILE_TOKENS tokens. Where the vocabulary is no multiple of that, the last tile is ragged: it begins
early, so that it ends with the row, and overlaps the one before.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .pallas_gpu_math import TILE_TOKENS
from .records import Options

Tile = tuple[jax.Array, ...]  # logits of student and teacher


@dataclass(frozen=True)
class RowSpec:
    """What is known of a row before it is read."""

    options: Options
    k: int | None  # None: all tokens are chosen
    vocab: int  # tokens of a row in memory, TILE_TOKENS or more
    limit: int  # ids from here on have probability 0

    @property
    def layout(self) -> Any:
        """How a tile is spread over the threads of a block."""
        # In vectors of 16 bytes, or fewer where the rows' starts are not aligned to that.
        return plgpu.Layout.WG_STRIDED((TILE_TOKENS,), vec_size=int(np.gcd(4, self.vocab)))

    def full(self, value: Any, dtype: Any = jnp.float32) -> jax.Array:
        """A tile of one value."""
        return plgpu.layout_cast(jnp.full((TILE_TOKENS,), value, dtype), self.layout)


def tile_start(spec: RowSpec, i: Any, ragged: bool) -> Any:
    """Id of the first token of tile i."""
    return jnp.minimum(i * TILE_TOKENS, spec.vocab - TILE_TOKENS) if ragged else i * TILE_TOKENS


def load_tile(spec: RowSpec, refs: tuple[Any, Any], row: Any, i: Any, ragged: bool) -> Tile:
    """Logits of both models; a ragged tile reaches to the row's end at most."""
    at = pl.ds(tile_start(spec, i, ragged), TILE_TOKENS)
    return tuple(plgpu.layout_cast(ref[row, at], spec.layout) for ref in refs)


def scores_of(
    spec: RowSpec, i: Any, ragged: bool, tile: Tile, again: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores of both models, and ids.

    In a ragged tile, tokens past the limit get -inf as score and the limit as id. So do those of the tile
    before, unless they are wanted `again`.
    """
    student, teacher = (x / np.float32(spec.options.temperature) for x in tile)
    iota = plgpu.broadcasted_iota(jnp.int32, (TILE_TOKENS,), 0, layout=spec.layout)
    ids = iota + tile_start(spec, i, ragged)
    if not ragged:
        return student, teacher, ids
    fresh = ids < spec.limit
    if not again:
        fresh = fresh & (ids >= i * TILE_TOKENS)
    student = jnp.where(fresh, student, -jnp.inf)
    teacher = jnp.where(fresh, teacher, -jnp.inf)
    return student, teacher, jnp.where(fresh, ids, spec.limit)


def for_tiles(spec: RowSpec, load: Callable, end: int, body: Callable, carry: Any) -> Any:
    """Folds body(i, ragged, tile, carry) over the tiles of the tokens before `end`.

    load(i, ragged) gives a tile.
    """
    whole = np.int32(spec.limit // TILE_TOKENS)
    tiles = np.int32(-(-end // TILE_TOKENS))

    def whole_tile(i, state):
        tile, carry = state
        # Loaded one trip ahead, so that the work on this tile hides the memory latency.
        ahead = load(jnp.minimum(i + 1, whole - 1), False)
        return ahead, body(i, False, tile, carry)

    def ragged_tile(i, carry):
        return body(i, True, load(i, True), carry)

    if whole:
        _, carry = lax.fori_loop(np.int32(0), whole, whole_tile, (load(0, False), carry))
    if whole < tiles:
        carry = lax.fori_loop(whole, tiles, ragged_tile, carry)
    return carry
