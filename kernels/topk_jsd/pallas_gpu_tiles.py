"""A row in tiles: how the GPU row kernel reads it, and loops over it.

A tile is [LANES] tokens. Where the vocabulary is no multiple of that, the last tile is ragged: it begins
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

from .pallas_gpu_math import LANES
from .records import Options

Tile = tuple[jax.Array, ...]  # logits of student and teacher


@dataclass(frozen=True)
class Plan:
    """What is known of a row before it is read."""

    options: Options
    k: int | None  # None: all tokens are chosen
    vocab: int  # tokens of a row in memory, LANES or more
    limit: int  # ids from here on have probability 0

    @property
    def layout(self) -> Any:
        """How a tile is spread over the threads of a block."""
        # In vectors of 16 bytes, or fewer where the rows' starts are not aligned to that.
        return plgpu.Layout.WG_STRIDED((LANES,), vec_size=int(np.gcd(4, self.vocab)))

    def full(self, value: Any, dtype: Any = jnp.float32) -> jax.Array:
        """A tile of one value."""
        return plgpu.layout_cast(jnp.full((LANES,), value, dtype), self.layout)


def tile_start(plan: Plan, i: Any, ragged: bool) -> Any:
    """Id of the first token of tile i."""
    return jnp.minimum(i * LANES, plan.vocab - LANES) if ragged else i * LANES


def load_tile(plan: Plan, refs: tuple[Any, Any], row: Any, i: Any, ragged: bool) -> Tile:
    """Logits of both models; a ragged tile reaches to the row's end at most."""
    at = pl.ds(tile_start(plan, i, ragged), LANES)
    return tuple(plgpu.layout_cast(ref[row, at], plan.layout) for ref in refs)


def scores_of(
    plan: Plan, i: Any, ragged: bool, tile: Tile, again: bool = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores of both models, and ids.

    In a ragged tile, tokens past the limit get -inf as score and the limit as id. So do those of the tile
    before, unless they are wanted `again`.
    """
    student, teacher = (x / np.float32(plan.options.temperature) for x in tile)
    iota = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=plan.layout)
    ids = iota + tile_start(plan, i, ragged)
    if not ragged:
        return student, teacher, ids
    fresh = ids < plan.limit
    if not again:
        fresh = fresh & (ids >= i * LANES)
    student = jnp.where(fresh, student, -jnp.inf)
    teacher = jnp.where(fresh, teacher, -jnp.inf)
    return student, teacher, jnp.where(fresh, ids, plan.limit)


def for_tiles(plan: Plan, load: Callable, end: int, body: Callable, carry: Any) -> Any:
    """Folds body(i, ragged, tile, carry) over the tiles of the tokens before `end`.

    load(i, ragged) gives a tile.
    """
    whole = np.int32(plan.limit // LANES)
    tiles = np.int32(-(-end // LANES))

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
