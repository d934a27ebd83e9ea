"""The loss of one update written plainly, for peers in JAX that come without it: all logits, `lax.top_k`.

Needs JAX alone, since a peer's interpreter may lack this project.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

MAX_LOG_RATIO = 20.0


def plain_loss(
    student: jax.Array,
    teacher: jax.Array,
    tokens: jax.Array,
    sampler_logp: jax.Array,
    weight: jax.Array,
    k: int,
    cap: float,
) -> jax.Array:
    """Sum of weight x capped ratio x JSD over the student's top k and a tail bucket.

    Logits [..., V], the rest [...]. Differentiable in the student's logits.
    """
    logq, logr = jax.nn.log_softmax(student), jax.nn.log_softmax(lax.stop_gradient(teacher))
    top = lax.top_k(lax.stop_gradient(student), k)[1]
    q, r = _buckets(logq, top), _buckets(logr, top)
    m = jnp.logaddexp(q, r) - math.log(2)
    divergence = 0.5 * jnp.sum(jnp.exp(q) * (q - m) + jnp.exp(r) * (r - m), axis=-1)
    logp = lax.stop_gradient(jnp.take_along_axis(logq, tokens[..., None], axis=-1)[..., 0])
    log_ratio = jnp.clip(logp - sampler_logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.minimum(jnp.exp(log_ratio), cap)
    return jnp.sum(weight * ratio * divergence)


def _buckets(logp: jax.Array, top: jax.Array) -> jax.Array:
    """Log-probabilities of the top tokens and of all others together."""
    inside = jnp.take_along_axis(logp, top, axis=-1)
    mass = jnp.minimum(jax.nn.logsumexp(inside, axis=-1, keepdims=True), -1e-7)
    return jnp.concatenate([inside, jnp.log(-jnp.expm1(mass))], axis=-1)
