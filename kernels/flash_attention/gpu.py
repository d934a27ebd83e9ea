"""cuDNN's flash attention, as JAX offers it.

Dimensions: B rows, T positions, H query heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

import jax

WIDEST = 128  # heads that cuDNN takes on every GPU from Ampere (compute capability 8.0) on


def attend(q_BTHE: jax.Array, k_BTKE: jax.Array, v_BTKE: jax.Array) -> jax.Array:
    """`api.causal_attention` for bfloat16 operands."""
    return jax.nn.dot_product_attention(q_BTHE, k_BTKE, v_BTKE, is_causal=True, implementation="cudnn")


def fits(q_BTHE: jax.Array) -> bool:
    """Whether the default device is a GPU whose cuDNN takes heads of this width."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    if capability is None or q_BTHE.shape[3] % 8 or q_BTHE.shape[3] > WIDEST:
        return False
    return float(capability) >= 8.0
