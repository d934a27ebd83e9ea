"""The public function: checks, and the choice of implementation.

Dimensions: B rows, H query heads, K key-value heads, E head width, X pages of all layers, P positions of a
page, W = 2 K, M pages of a table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from . import pallas_tpu, tpu, xla
from .operands import Operands

Implementation = Literal["xla", "ragged_tpu", "pallas_tpu", "pallas_gpu", "reference"]


def _pallas_gpu(operands: Operands) -> tuple[jax.Array, jax.Array]:
    from . import pallas_gpu  # Mosaic GPU is a large import that few need

    return pallas_gpu.write_and_attend(operands)


Operand = jax.Array | jax.ShapeDtypeStruct
_IMPLEMENTATIONS = {
    "xla": xla.write_and_attend,
    "ragged_tpu": tpu.write_and_attend,
    "pallas_tpu": pallas_tpu.write_and_attend,
    "pallas_gpu": _pallas_gpu,
    "reference": xla.reference,
}
_PLATFORMS = {"ragged_tpu": "tpu", "pallas_tpu": "tpu", "pallas_gpu": "gpu"}  # the others run on all
LANES = 128  # of a TPU's vectors, which a head fills for the kernels to compile


def write_and_attend(
    q_BHE: jax.Array,
    k_BKE: jax.Array,
    v_BKE: jax.Array,
    cache_XPWE: jax.Array,
    table_BM: jax.Array,
    position_B: jax.Array,
    page_base: jax.Array | int,
    *,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Writes one token a row into its page, then attends to the row's positions 0..position.

    Softmax attention with grouped queries: query head h reads key-value head h // (H // K), scores
    are scaled by 1 / sqrt(E), and scores and sums are float32. Under jit with the cache donated, or
    carried through a loop, the write happens in place.

    Args:
      q_BHE: queries of B rows, H heads of width E; H is a multiple of K.
      k_BKE, v_BKE: the new token's keys and values, in the cache's dtype.
      cache_XPWE: X pages of P positions. W = 2 K heads, keys and values interleaved: k0, v0, k1, v1, ...
        It must be finite, also where nothing was written.
      table_BM: int32, the page of each row's positions m P .. m P + P - 1, counted from page_base.
        Entries after the page of `position` may be any page of the layer: they are
        read and ignored, or not read.
      position_B: int32, position of the new token; -1 marks an idle row, which writes nothing and
        gets zeros. Live rows own the page they write: no other row's table leads to it.
      page_base: the cache's page to which 0 in the table points: layer x pages of a layer.
      implementation: "xla", whose cost follows each row on CPU, elsewhere the longest live one;
        "pallas_tpu", "ragged_tpu" and "pallas_gpu", whose cost follows each row; "reference", which
        gathers every page of the table. None takes "pallas_tpu" where it is compiled for a TPU and E
        is a multiple of 128, "pallas_gpu" on a Hopper GPU (H100, H200) where all is bfloat16, E is 64,
        128, 192 or 256 and P is 8, 16, 32 or a multiple of 64, else "xla".

    Returns:
      (out_BHE in q's dtype, the cache). Raises ValueError on shapes or dtypes that do not fit.
    """
    operands = Operands(q_BHE, k_BKE, v_BKE, cache_XPWE, table_BM, position_B, page_base)
    _check(operands)
    if (implementation or "xla") not in _IMPLEMENTATIONS:
        raise ValueError(f"implementation is {implementation!r}, not one of {', '.join(_IMPLEMENTATIONS)}")
    if implementation:
        return _IMPLEMENTATIONS[implementation](operands)
    kernels: dict[str, Callable[[Operands], tuple[jax.Array, jax.Array]]]
    kernels = {"tpu": pallas_tpu.write_and_attend} if q_BHE.shape[-1] % LANES == 0 else {}
    if _on_hopper() and _fits_gpu(q_BHE, cache_XPWE):
        kernels["cuda"] = _pallas_gpu
    return lax.platform_dependent(operands, **kernels, default=xla.write_and_attend)


def platform_of(implementation: Implementation | None) -> str | None:
    """The platform that an implementation is for, as JAX names that of a device; None: any."""
    return None if implementation is None else _PLATFORMS.get(implementation)


def misfit(
    implementation: Implementation | None, q: jax.ShapeDtypeStruct, cache: jax.ShapeDtypeStruct
) -> str:
    """What an implementation does not take of such queries [B, H, E] and cache [X, P, W, E]; "" if nothing.

    Whatever the platform of this process, so that a run for another one can be checked.
    """
    E = q.shape[-1]
    if platform_of(implementation) == "tpu" and E % LANES:
        return f"heads {E} wide, which are no multiple of {LANES}"
    if implementation == "pallas_gpu" and not _fits_gpu(q, cache):
        return f"{q.dtype} heads {E} wide; it takes bfloat16 and a width of 64, 128, 192 or 256"
    return ""


def _on_hopper() -> bool:
    """Whether the default device is an NVIDIA GPU of compute capability 9.0 (H100, H200)."""
    return getattr(jax.devices()[0], "compute_capability", None) == "9.0"


def _fits_gpu(q_BHE: Operand, cache_XPWE: Operand) -> bool:
    from . import pallas_gpu

    return pallas_gpu.fits(q_BHE, cache_XPWE)


def _check(operands: Operands) -> None:
    q_BHE, k_BKE, v_BKE, cache_XPWE, table_BM, position_B, _ = operands
    (B, H, E), K = q_BHE.shape, k_BKE.shape[1]
    if k_BKE.shape != (B, K, E) or v_BKE.shape != k_BKE.shape or H % K:
        raise ValueError(f"q, k, v of shapes {q_BHE.shape}, {k_BKE.shape}, {v_BKE.shape} do not fit")
    if cache_XPWE.ndim != 4 or cache_XPWE.shape[2:] != (2 * K, E):
        raise ValueError(f"a cache of shape {cache_XPWE.shape} does not end in {(2 * K, E)}")
    if table_BM.ndim != 2 or table_BM.shape[0] != B or position_B.shape != (B,):
        raise ValueError(f"table {table_BM.shape} and positions {position_B.shape} are not of {B} rows")
    if table_BM.dtype != jnp.int32 or position_B.dtype != jnp.int32:
        raise ValueError("table and positions must be int32")
    if not k_BKE.dtype == v_BKE.dtype == cache_XPWE.dtype:
        raise ValueError(f"keys {k_BKE.dtype} and values {v_BKE.dtype} are not of {cache_XPWE.dtype}")
