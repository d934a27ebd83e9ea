"""Reductions over the entries where a mask holds; what stands elsewhere, NaN too, is not read."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Axis = int | tuple[int, ...] | None


def sum(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Sum of x where the mask is true or nonzero; 0 where nothing is. The two broadcast."""
    return jnp.sum(jnp.where(mask.astype(bool), x, 0), axis=axis)


def mean(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Mean of floating x where the mask is true or nonzero; 0 where nothing is."""
    held = jnp.broadcast_to(mask.astype(bool), jnp.broadcast_shapes(jnp.shape(x), jnp.shape(mask)))
    count = jnp.sum(held, axis=axis, dtype=x.dtype)
    return sum(x, mask, axis) / jnp.maximum(count, 1)


def max(x: jax.Array, mask: jax.Array, axis: Axis = None) -> jax.Array:
    """Largest floating x where the mask is true or nonzero; -inf where nothing is."""
    return jnp.max(jnp.where(mask.astype(bool), x, -jnp.inf), axis=axis)
