"""One bucket's share of the divergence and of its gradient: elementwise, for every backend."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from .reference import TAIL_FLOOR


def bucket(
    logq: jax.Array,
    logr: jax.Array,
    alpha: float,
    expm1: Callable[[jax.Array], jax.Array] = jnp.expm1,
    log1p: Callable[[jax.Array], jax.Array] = jnp.log1p,
) -> tuple[jax.Array, jax.Array]:
    """Elementwise share of the divergence, and q d(divergence)/dq. Nothing where q (or r) is 0.

    expm1 and log1p: for backends that lack them.
    """
    q, r, delta = jnp.exp(logq), jnp.exp(logr), logr - logq
    if alpha == 0:
        value = jnp.where(r == 0, 0, r * delta)
        return value, -r
    if alpha == 1:
        value = jnp.where(q == 0, 0, -q * delta)
        return value, value + q
    # log(m / q) and log(m / r), written so that no exponential overflows and equal logits give 0.
    # Constants, not full_like: with a mesh in context, JAX 0.12 cannot lower that in a kernel for GPUs.
    constant = delta.dtype.type
    share = jnp.where(delta > 0, constant(1 - alpha), constant(alpha))
    soft = log1p(share * expm1(-jnp.abs(delta)))
    pull = jnp.where(q == 0, 0, -(1 - alpha) * q * (soft + jnp.maximum(delta, 0)))
    return pull + jnp.where(r == 0, 0, -alpha * r * (soft + jnp.maximum(-delta, 0))), pull


def tail_bucket(
    tail_q: jax.Array, tail_r: jax.Array, share: Callable[..., tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """`share` (a `bucket`) of the bucket of all other tokens; no pull below its floor."""
    logq, logr = (jnp.log(jnp.maximum(tail, TAIL_FLOOR)) for tail in (tail_q, tail_r))
    value, pull = share(logq, logr)
    return value, jnp.where(tail_q < TAIL_FLOOR, 0, pull)


def small_expm1(x: jax.Array) -> jax.Array:
    """expm1 of x <= 0 in float32, for backends without one: a polynomial above -0.35."""
    terms = [1 / math.factorial(n) for n in range(8, 0, -1)]
    y = terms[0]
    for term in terms[1:]:
        y = y * x + term
    return jnp.where(x > -0.35, y * x, jnp.exp(x) - 1)
