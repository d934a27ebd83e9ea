"""Picks the row kernel for the hardware: what turns logits into divergence and gradient.

    row_terms(options, student_CV, teacher_CV, rows_C, live_C, grad_dtype)  -> LossAux of [C], grad_CV

`rows_xla.py` says what it computes; `pallas_tpu.py` and `pallas_gpu.py` compute the same. Under `jax.vmap`
a batch of row sets becomes one longer set, since rows are independent. So no kernel needs a batching rule,
and what is decided once for all rows of a call (a tie, a dead block) stays a branch.

Dimensions: C rows, V vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from . import pallas_tpu, rows_xla
from .records import LossAux, Options, Rows, working_dtype


def row_terms(
    options: Options,
    student_CV: jax.Array,
    teacher_CV: jax.Array,
    rows_C: Rows,
    live_C: jax.Array,
    grad_dtype: Any,
) -> tuple[LossAux, jax.Array | None]:
    """By `options.implementation`; None: pallas_tpu on a TPU, pallas_gpu on a Hopper GPU, else xla."""
    kernel = custom_vmap(partial(_row_terms, options, grad_dtype))
    n_rows = student_CV.shape[0]

    @kernel.def_vmap
    def batched(sets, is_batched, *operands):
        def to_rows(x, has_sets):
            x = x if has_sets else jnp.broadcast_to(x, (sets, *x.shape))
            return x.reshape(sets * n_rows, *x.shape[2:])

        operands = jax.tree.map(to_rows, operands, tuple(is_batched))
        # This function and not the kernel, so that the call can be batched again by an outer vmap.
        out = row_terms(options, *operands, grad_dtype=grad_dtype)
        out = jax.tree.map(lambda x: x.reshape(sets, n_rows, *x.shape[1:]), out)
        return out, jax.tree.map(lambda _: True, out)

    return kernel(student_CV, teacher_CV, rows_C, live_C)


def _row_terms(options, grad_dtype, student_CV, teacher_CV, rows_C, live_C):
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
    # The Pallas kernels compute in float32 and on whole rows.
    if working_dtype(student_CV).itemsize > 4 or options.vocab_axis:
        return in_xla(*operands)
    kernels = {}
    if pallas_tpu.fits(options, student_CV.shape[1], grad_dtype):
        kernels["tpu"] = on_tpu
    # Lowering knows the platform but not the GPU's generation, so that is asked of the default device.
    # 9.0 is Hopper, the one generation that the kernel has been run on.
    if getattr(jax.devices()[0], "compute_capability", None) == "9.0":
        kernels["cuda"] = on_gpu
    return lax.platform_dependent(*operands, **kernels, default=in_xla)


def _on_gpu(options, grad_dtype, student_CV, teacher_CV, rows_C, live_C):
    from . import pallas_gpu  # here, since Mosaic GPU is a large import that few need

    student_CV = student_CV.astype(jnp.float32)
    teacher_CV = teacher_CV.astype(jnp.float32)
    return pallas_gpu.row_terms(options, student_CV, teacher_CV, rows_C, live_C, grad_dtype)
