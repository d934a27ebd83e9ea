"""The elementwise arithmetic that the row kernels share: importance ratio and divergence by bucket.

`reference.py` uses none of it, so that a mistake here shows in every comparison with the reference.
Arguments of one function have one shape, whatever it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

MAX_LOG_RATIO = 20.0
TAIL_FLOOR = -math.expm1(-1e-7)  # the least probability of the tail bucket


def capped_ratio(logp: jax.Array, sampler_logp: jax.Array, cap: float) -> jax.Array:
    """min(exp(logp - sampler_logp), cap), with the log-ratio clipped to +-20."""
    log_ratio = logp - sampler_logp.astype(logp.dtype)
    return jnp.minimum(jnp.exp(jnp.clip(log_ratio, -MAX_LOG_RATIO, MAX_LOG_RATIO)), cap)


def bucket(
    logq: jax.Array,
    logr: jax.Array,
    alpha: float,
    expm1: Callable[[jax.Array], jax.Array] = jnp.expm1,
    log1p: Callable[[jax.Array], jax.Array] = jnp.log1p,
) -> tuple[jax.Array, jax.Array]:
    """A bucket's share of the divergence, and its pull q d(divergence)/dq.

    A bucket where q (or r) is 0 contributes nothing through q (or r). `expm1` and `log1p` can be
    replaced for backends that lack them.
    """
    q = jnp.exp(logq)
    r = jnp.exp(logr)
    delta = logr - logq
    if alpha == 0:
        value = jnp.where(r == 0, 0, r * delta)
        return value, -r
    if alpha == 1:
        value = jnp.where(q == 0, 0, -q * delta)
        return value, value + q
    # log(m / q) is soft + max(delta, 0), and log(m / r) is soft + max(-delta, 0). In this form no
    # exponential overflows, and equal logits give exactly 0.
    # Constants, not full_like: with a mesh in context, JAX 0.12 cannot lower that in a kernel for GPUs.
    constant = delta.dtype.type
    share = jnp.where(delta > 0, constant(1 - alpha), constant(alpha))
    soft = log1p(share * expm1(-jnp.abs(delta)))
    # In a mixture, q d(divergence)/dq equals the student's own share of the divergence.
    pull = jnp.where(q == 0, 0, -(1 - alpha) * q * (soft + jnp.maximum(delta, 0)))
    return pull + jnp.where(r == 0, 0, -alpha * r * (soft + jnp.maximum(-delta, 0))), pull


def tail_bucket(
    tail_q: jax.Array, tail_r: jax.Array, share: Callable[..., tuple[jax.Array, jax.Array]]
) -> tuple[jax.Array, jax.Array]:
    """`share` (a `bucket`) of the bucket of all other tokens, given its two probabilities.

    Probabilities below TAIL_FLOOR count as TAIL_FLOOR. As the derivative of a clamp, the pull is 0 there.
    """
    logq = jnp.log(jnp.maximum(tail_q, TAIL_FLOOR))
    logr = jnp.log(jnp.maximum(tail_r, TAIL_FLOOR))
    value, pull = share(logq, logr)
    return value, jnp.where(tail_q < TAIL_FLOOR, 0, pull)


def small_expm1(x: jax.Array) -> jax.Array:
    """expm1 of x <= 0 in float32, for backends that have none: a polynomial above -0.35."""
    # Below -0.35, exp(x) - 1 loses at most two bits to cancellation. Above it, eight terms of the series
    # leave an error under float32's rounding.
    coefficients = [1 / math.factorial(n) for n in range(8, 0, -1)]
    first, second, *rest = coefficients
    y = first * x + second
    for coefficient in rest:
        y = y * x + coefficient
    return jnp.where(x > -0.35, y * x, jnp.exp(x) - 1)
