"""The terms of one chunk's rows on NVIDIA GPUs from Hopper on: a Pallas (Mosaic GPU) kernel.

A block of 128 threads takes a row, in tiles of `TILE_TOKENS` tokens, and passes over it twice:

    survey    online exponent sums of both models and, per lane (token id modulo `TILE_TOKENS`), the `DEPTH`
              largest student scores with the teacher's of the same tokens. What drops out of those
              goes to sums of its own, so that the tail is summed and never a difference. Threshold,
              masses and divergence then come from registers (`pallas_gpu_terms.py`).
    gradient  elementwise; a tile without a chosen token takes one exponential per token.

16 V bytes are read per row (8 V without the gradient) and the gradient is written. The rows in flight
outgrow the L2 cache at a vocabulary of 150 000, so each further pass would be paid in HBM traffic.

The survey settles a row unless a lane dropped a token that might be chosen, or tokens tie at the
threshold: for k = 100 spread evenly 0.1 % of rows, plus ties. Those rows are read again: at most 11
passes over the student's scores for the threshold and one for ties, then two over both models' for the
sums. k = None takes one pass for sums in addition to the survey.

Lanes meet only in reductions of a tile to a scalar, the one kind that the strided layout has: no
sort, scan, gather or scatter. Division is Mosaic GPU's, good to 2 units in the last place: at a
temperature other than 1, ties that rounding makes or breaks may be decided differently than in XLA.
Checked in the interpreter and on an H200.

Inside the kernel, arrays are [TILE_TOKENS] unless called otherwise.

Dimensions: C rows, V vocabulary, F fields of a row (its scalar inputs or results), N rows in the fields of
a record.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import pallas_gpu_math as calc
from .pallas_gpu_math import TILE_TOKENS
from .pallas_gpu_terms import RowTerms, row_sums
from .pallas_gpu_tiles import RowSpec, for_tiles, load_tile, scores_of, tile_start
from .records import LossAux, Options, Rows
from .row_math import capped_ratio

_LIVE, _WEIGHT, _TOKEN_SCORE, _SAMPLER_LOGP = range(4)  # fields of the [4, C] operand
_DIVERGENCE, _LOGSUMEXP, _RATIO, _STUDENT_MASS, _TEACHER_MASS = range(5)  # fields of the [5, C] result


def row_terms(
    options: Options,
    student_CV: jax.Array,
    teacher_CV: jax.Array,
    rows_C: Rows,
    live_C: jax.Array,
    grad_dtype: Any,
    *,
    interpret: Any = None,
) -> tuple[LossAux, jax.Array | None]:
    """Each row's share of aux, and d(weight x ratio x divergence)/d(student logits) [C, V].

    Args:
      student_CV, teacher_CV: float32 logits.
      rows_C: weights and, if any, sampled tokens and their log-probs.
      live_C: bool; where it is false both results are 0, whatever the logits.
      grad_dtype: of the gradient; None: no gradient is computed, and None is returned for it.
      interpret: parameters of the Mosaic GPU interpreter, to run without a GPU.

    Raises ValueError on logits other than two float32 arrays of one shape, and when compiled for
    anything but a CUDA GPU.
    """
    if student_CV.ndim != 2 or student_CV.shape != teacher_CV.shape:
        raise ValueError(f"logits have shapes {student_CV.shape} and {teacher_CV.shape}; both must be [C, V]")
    if student_CV.dtype != jnp.float32 or teacher_CV.dtype != jnp.float32:
        raise ValueError(f"logits are {student_CV.dtype} and {teacher_CV.dtype}; this kernel takes float32")
    grad_dtype = None if grad_dtype is None else jnp.dtype(grad_dtype)
    return _row_terms(options, grad_dtype, interpret, student_CV, teacher_CV, rows_C, live_C)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _row_terms(options, grad_dtype, interpret, student_CV, teacher_CV, rows_C, live_C):
    n_rows, vocab = student_CV.shape
    if interpret is None:
        student_CV = _cuda_only_p.bind(student_CV)
    # The kernel cannot gather, so the sampled tokens' scores are picked here.
    token_score_C = _token_scores(options, student_CV, rows_C.tokens_N)
    given_FC = _given(live_C, rows_C.weight_N, token_score_C, rows_C.sampler_logp_N)

    # A row shorter than a tile is padded to one; the spec's limit keeps the padding out.
    def widen(x_CV):
        return jnp.pad(x_CV, ((0, 0), (0, max(TILE_TOKENS - vocab, 0))))

    spec = RowSpec(options, options.top_k(vocab), max(vocab, TILE_TOKENS), options.num_tokens or vocab)
    out_type = [jax.ShapeDtypeStruct((5, n_rows), jnp.float32)]
    if grad_dtype is not None:
        out_type.append(jax.ShapeDtypeStruct((n_rows, spec.vocab), grad_dtype))
    run = plgpu.kernel(
        partial(_kernel, spec),
        out_type=out_type,
        grid=(n_rows,),
        grid_names=("row",),
        kernel_name="topk_jsd_row",
        interpret=interpret,
    )
    stats_FC, *grads_CV = run(widen(student_CV), widen(teacher_CV), given_FC)
    logp_C = None if token_score_C is None else token_score_C - stats_FC[_LOGSUMEXP]
    masses = (stats_FC[_STUDENT_MASS], stats_FC[_TEACHER_MASS])
    stats_C = LossAux(stats_FC[_DIVERGENCE], logp_C, stats_FC[_RATIO], *masses)
    # The kernel writes no stats for a dead row.
    stats_C = jax.tree.map(lambda x_C: jnp.where(live_C, x_C, 0), stats_C)
    return stats_C, grads_CV[0][:, :vocab] if grads_CV else None


def _token_scores(options, student_CV, tokens_C):
    if tokens_C is None:
        return None
    score_C = jnp.take_along_axis(student_CV, tokens_C[:, None], axis=-1)[:, 0] / options.temperature
    return jnp.where(tokens_C < (options.num_tokens or student_CV.shape[1]), score_C, -jnp.inf)


def _given(*fields):
    none_C = jnp.zeros(fields[0].shape, jnp.float32)
    return jnp.stack([none_C if x_C is None else x_C.astype(jnp.float32) for x_C in fields])


def _refuse(ctx, x):
    del x
    target = ", ".join(ctx.module_context.platforms)
    raise ValueError(f"topk_jsd's GPU kernel needs a CUDA GPU, and this program is compiled for {target}")


# The identity for CUDA, and the error above for any other platform. Only lowering can tell which: a
# program may be lowered for a machine other than this one.
_cuda_only_p = Primitive("topk_jsd_cuda_only")
_cuda_only_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_cuda_only_p, _refuse)
mlir.register_lowering(_cuda_only_p, lambda ctx, x: [x], platform="cuda")


# ---- the kernel ----------------------------------------------------------------------------------


def _kernel(spec: RowSpec, student_ref, teacher_ref, given_ref, stats_ref, *grad_refs):
    row = lax.axis_index("row")
    load = partial(load_tile, spec, (student_ref, teacher_ref), row)

    def write_gradient(grad_ref, values):
        def put(i, ragged, tile, carry):
            # Where the last tile overlaps the one before, both write the same values.
            at = pl.ds(tile_start(spec, i, ragged), TILE_TOKENS)
            scores = scores_of(spec, i, ragged, tile, again=True)
            grad_ref[row, at] = values(*scores).astype(grad_ref.dtype)
            return carry

        for_tiles(spec, load, spec.vocab, put, np.int32(0))

    @pl.when(given_ref[_LIVE, row] != 0)
    def _():
        terms, lse = row_sums(spec, load)
        ratio = _ratio(spec.options, given_ref, row, lse)
        stats = (terms.divergence, lse, ratio, *terms.masses)
        for field, value in enumerate(stats):
            stats_ref[field, row] = value
        scale = given_ref[_WEIGHT, row] * ratio / spec.options.temperature
        for grad_ref in grad_refs:
            write_gradient(grad_ref, lambda *scores: scale * _slope(spec, terms, *scores))

    # A dead row still owns its place in the gradient, which nothing else would clear.
    @pl.when(given_ref[_LIVE, row] == 0)
    def _():
        for grad_ref in grad_refs:
            write_gradient(grad_ref, lambda *_: spec.full(0.0))


def _ratio(options, given_ref, row, lse):
    if options.ratio_cap is None:
        return jnp.float32(1)
    return capped_ratio(given_ref[_TOKEN_SCORE, row] - lse, given_ref[_SAMPLER_LOGP, row], options.ratio_cap)


def _slope(spec: RowSpec, terms: RowTerms, student, teacher, ids):
    """d(divergence)/d(score)."""
    logq = student - terms.shifts[0]
    logr = teacher - terms.shifts[1]

    def of_chosen():
        return calc.share(spec.options.alpha)(logq, logr)[1] - jnp.exp(logq) * terms.pull

    if spec.k is None:
        return of_chosen()
    rest = jnp.exp(logq) * (terms.others - terms.pull)
    if spec.options.tail == "renorm":
        # 0, or NaN where the row holds one.
        rest = spec.full(0.0) * terms.pull

    def mixed():
        return jnp.where(terms.choice.of(student, ids), of_chosen(), rest)

    # Nearly all tiles hold no chosen token, and skip the logarithms.
    return lax.cond(calc.largest_key(student) >= terms.choice.key, mixed, lambda: rest)
