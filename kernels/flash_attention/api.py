"""The public function: checks, and the choice of implementation.

Letters: B rows, T positions, H query heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from . import gpu, reference, tpu, xla
from .reference import SAVED

Implementation = Literal["xla", "splash_tpu", "cudnn_gpu", "reference"]
_IMPLEMENTATIONS = {
    "xla": xla.attend,
    "splash_tpu": tpu.attend,
    "cudnn_gpu": gpu.attend,
    "reference": reference.attend,
}


def causal_attention(
    q_BTHE: jax.Array,
    k_BTKE: jax.Array,
    v_BTKE: jax.Array,
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    """Softmax attention of every position to itself and those before it, with grouped queries.

    Query head h reads key-value head h // (H // K); scores are scaled by 1 / sqrt(E), and scores and sums
    are float32. Rows may be right-padded: no position sees what stands behind it. Differentiable once.

    Args:
      q_BTHE: queries; H is a multiple of K.
      k_BTKE, v_BTKE: keys and values, in the queries' dtype.
      implementation: "splash_tpu", "cudnn_gpu" (both bfloat16) and "xla" never make an array of T x T;
        "reference" does. None takes, of bfloat16 operands, "splash_tpu" where it is compiled for a TPU and
        "cudnn_gpu" on a GPU from Ampere on; else "xla".

    Under `jax.checkpoint` the result bears the name SAVED, for policies that keep it.

    Returns:
      [B, T, H, E] in the queries' dtype. Raises ValueError on shapes or dtypes that do not fit.
    """
    _check(q_BTHE, k_BTKE, v_BTKE, implementation)
    operands = (q_BTHE, k_BTKE, v_BTKE)
    if implementation:
        out = _IMPLEMENTATIONS[implementation](*operands)
    elif q_BTHE.dtype != jnp.bfloat16:
        out = xla.attend(*operands)
    else:
        kernels = {"tpu": tpu.attend} | ({"cuda": gpu.attend} if gpu.fits(q_BTHE) else {})
        out = lax.platform_dependent(*operands, **kernels, default=xla.attend)
    return checkpoint_name(out, SAVED)


def _check(q_BTHE, k_BTKE, v_BTKE, implementation) -> None:
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}, not one of {', '.join(_IMPLEMENTATIONS)}")
    shapes = q_BTHE.shape, k_BTKE.shape, v_BTKE.shape
    if any(len(shape) != 4 for shape in shapes) or k_BTKE.shape != v_BTKE.shape:
        raise ValueError(f"q, k, v of shapes {', '.join(map(str, shapes))} do not fit")
    (B, T, H, E), (_, _, K, _) = shapes[:2]
    if k_BTKE.shape != (B, T, K, E) or K == 0 or H % K:
        raise ValueError(f"q, k, v of shapes {', '.join(map(str, shapes))} do not fit")
    dtypes = q_BTHE.dtype, k_BTKE.dtype, v_BTKE.dtype
    if len(set(dtypes)) > 1:
        raise ValueError(f"q, k, v must be of one dtype, not {', '.join(map(str, dtypes))}")
    if implementation in ("splash_tpu", "cudnn_gpu") and q_BTHE.dtype != jnp.bfloat16:
        raise ValueError(f"{implementation} takes bfloat16, not {q_BTHE.dtype}; use xla")
