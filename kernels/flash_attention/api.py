"""The public function: checks, and the choice of implementation.

Dimensions: B rows, T positions, H query heads, K key-value heads, E width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from . import gpu, reference, tpu, xla
from .names import SAVED

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

    Query head h reads key-value head h // (H // K). Scores are scaled by 1 / sqrt(E); scores and sums are
    float32, or float64 for float64 operands. Rows may be right-padded, since no position sees later ones.
    Only first derivatives. Under `jax.checkpoint` the result has the name SAVED, for policies that keep it.

    Args:
      q_BTHE: queries; H is a multiple of K.
      k_BTKE, v_BTKE: keys and values, in the queries' dtype.
      implementation: "splash_tpu", "cudnn_gpu" (both bfloat16 only) and "xla" never hold an array of
        T x T; "reference" does. For bfloat16 operands None takes "splash_tpu" where the program is
        compiled for a TPU and "cudnn_gpu" on a GPU from Ampere on; otherwise it takes "xla".

    Returns:
      [B, T, H, E] in the queries' dtype.

    Raises:
      ValueError: for shapes or dtypes that do not fit together, and an unknown implementation.
    """
    _check(q_BTHE, k_BTKE, v_BTKE, implementation)
    operands = (q_BTHE, k_BTKE, v_BTKE)
    if implementation:
        out = _IMPLEMENTATIONS[implementation](*operands)
    elif q_BTHE.dtype != jnp.bfloat16:
        out = xla.attend(*operands)
    else:
        # Lowering knows the platform but not the GPU, so `fits` asks the default device.
        kernels: dict[str, Callable[..., jax.Array]] = {"tpu": tpu.attend}
        if gpu.fits(q_BTHE):
            kernels["cuda"] = gpu.attend
        out = lax.platform_dependent(*operands, **kernels, default=xla.attend)
    return checkpoint_name(out, SAVED)


def _check(q_BTHE, k_BTKE, v_BTKE, implementation) -> None:
    if implementation is not None and implementation not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}, not one of {', '.join(_IMPLEMENTATIONS)}")
    shapes = (q_BTHE.shape, k_BTKE.shape, v_BTKE.shape)
    if not _shapes_fit(*shapes):
        raise ValueError(
            f"q, k, v of shapes {', '.join(map(str, shapes))} do not fit; they must be [B, T, H, E] and "
            "twice [B, T, K, E], with H a multiple of K"
        )
    dtypes = (q_BTHE.dtype, k_BTKE.dtype, v_BTKE.dtype)
    if len(set(dtypes)) > 1:
        raise ValueError(f"q, k, v must be of one dtype, not {', '.join(map(str, dtypes))}")
    if implementation in ("splash_tpu", "cudnn_gpu") and q_BTHE.dtype != jnp.bfloat16:
        raise ValueError(f"{implementation} takes bfloat16, not {q_BTHE.dtype}; use xla")


def _shapes_fit(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> bool:
    if len(q) != 4 or len(k) != 4 or k != v:
        return False
    B, T, H, E = q
    K = k[2]
    return k == (B, T, K, E) and K > 0 and H % K == 0
