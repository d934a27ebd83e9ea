"""The row kernel for the hardware at hand: what turns logits into divergence and gradient.

    row_terms(options, student_CV, teacher_CV, rows_C, live_C, grad_dtype)  -> LossAux of [C], grad_CV

`rows_xla.py` says what it computes; `pallas_tpu.py` and `pallas_gpu.py` compute the same.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import pallas_tpu, rows_xla
from .reference import LossAux, Options, Rows, working_dtype


def row_terms(
    options: Options, student_CV: jax.Array, teacher_CV: jax.Array, rows_C: Rows, live_C: jax.Array,
    grad_dtype: Any,
) -> tuple[LossAux, jax.Array | None]:  # fmt: skip
    """By `options.implementation`; None: pallas_tpu on a TPU, pallas_gpu on a Hopper GPU, else xla."""
    operands = (student_CV, teacher_CV, rows_C, live_C)
    in_xla = partial(rows_xla.row_terms, options, grad_dtype=grad_dtype, axis=options.vocab_axis)
    on_tpu = partial(pallas_tpu.row_terms, options, grad_dtype=grad_dtype)
    on_gpu = partial(_on_gpu, options, grad_dtype)
    match options.implementation:
        case "xla":
            return in_xla(*operands)
        case "pallas_tpu":
            return on_tpu(*operands)
        case "pallas_gpu":
            return on_gpu(*operands)
    if working_dtype(student_CV).itemsize > 4 or options.vocab_axis:
        return in_xla(*operands)
    kernels = {"tpu": on_tpu} if pallas_tpu.fits(options, student_CV.shape[1], grad_dtype) else {}
    if getattr(jax.devices()[0], "compute_capability", None) == "9.0":  # Hopper, where it has been run
        kernels["cuda"] = on_gpu
    return lax.platform_dependent(*operands, **kernels, default=in_xla)


def _on_gpu(options, grad_dtype, student_CV, teacher_CV, rows_C, live_C):
    from . import pallas_gpu  # Mosaic GPU is a large import that few need

    wide = (x_CV.astype(jnp.float32) for x_CV in (student_CV, teacher_CV))
    return pallas_gpu.row_terms(options, *wide, rows_C, live_C, grad_dtype)
