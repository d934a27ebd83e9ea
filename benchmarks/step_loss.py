"""The loss of one update written plainly, for JAX peers that have no such loss: all logits, `lax.top_k`.

It imports JAX only, since a peer's interpreter may lack this project.

Dimensions: V vocabulary, K buckets (the top k and the tail). All others are free.
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

    Logits are [..., V], all else [...]. Differentiable in the student's logits.
    """
    logq_V = jax.nn.log_softmax(student)
    logr_V = jax.nn.log_softmax(lax.stop_gradient(teacher))
    top = lax.top_k(lax.stop_gradient(student), k)[1]
    logq_K = _buckets(logq_V, top)
    logr_K = _buckets(logr_V, top)
    logm_K = jnp.logaddexp(logq_K, logr_K) - math.log(2)
    summands_K = jnp.exp(logq_K) * (logq_K - logm_K) + jnp.exp(logr_K) * (logr_K - logm_K)
    divergence = 0.5 * jnp.sum(summands_K, axis=-1)
    logp = lax.stop_gradient(jnp.take_along_axis(logq_V, tokens[..., None], axis=-1)[..., 0])
    log_ratio = jnp.clip(logp - sampler_logp, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = jnp.minimum(jnp.exp(log_ratio), cap)
    return jnp.sum(weight * ratio * divergence)


def _buckets(logp_V: jax.Array, top: jax.Array) -> jax.Array:
    """Log-probabilities of the top tokens and of all others together."""
    inside = jnp.take_along_axis(logp_V, top, axis=-1)
    # At most -1e-7, as in the released code, so that the tail has a logarithm.
    mass = jnp.minimum(jax.nn.logsumexp(inside, axis=-1, keepdims=True), -1e-7)
    return jnp.concatenate([inside, jnp.log(-jnp.expm1(mass))], axis=-1)
