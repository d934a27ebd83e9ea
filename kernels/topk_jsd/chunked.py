"""The loss chunk by chunk, with the gradient computed in the forward pass. Matmuls are XLA's.

Rows of weight 0 cost nothing: the others are brought to the front and a loop takes them `chunk` at a
time, in ceil(live / chunk) trips, a number known at run time only. A trip makes two [C, V] blocks of
float32 logits (two matmuls), turns them into the divergence and its gradient with elementwise work and
row sums, and at once multiplies that gradient into the hidden states' rows and the head's float32
accumulator (two more matmuls). That makes four, the fewest without approximation, and no block outlives
its trip.

The row kernel turns logits into divergence and gradient: an implementation of `row_terms` for the
hardware. It knows nothing of models, and this file knows nothing of divergences.

Dimensions: N rows of the call, M these padded to whole chunks, C rows of one chunk, D model width,
V vocabulary, S sets of rows under vmap.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from .records import LossAux, Options, Rows, working_dtype
from .rows import row_terms

Model = tuple[jax.Array, jax.Array]  # hidden states [N, D] and head [V, D]


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def once_differentiable(function: str, operands: Any) -> Any:
    """The operands of a forward pass that is itself a gradient; differentiating it raises."""
    del function
    return operands


@once_differentiable.defjvp
def _refuse_second_derivatives(function, operands, tangents):
    del operands, tangents
    raise NotImplementedError(
        f"{function} has first derivatives only, since it computes its gradient in the forward pass; "
        "implementation='reference' has all orders, and lax.stop_gradient around the student's operands "
        "leaves the derivative of this gradient out"
    )


# ---- from hidden states ------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss_from_hidden(
    options: Options,
    student_hidden_ND: jax.Array,
    student_head_VD: jax.Array,
    teacher_hidden_ND: jax.Array,
    teacher_head_VD: jax.Array,
    rows: Rows,
) -> tuple[jax.Array, LossAux]:
    """Sum over rows of weight x ratio x divergence; not differentiable twice."""
    student = (student_hidden_ND, student_head_VD)
    teacher = (teacher_hidden_ND, teacher_head_VD)
    loss, aux, _ = run_chunks(options, student, teacher, rows, with_grad=False)
    return loss, aux


def _hidden_fwd(options, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, rows):
    student = once_differentiable("topk_jsd_loss", (hidden_ND, head_VD))
    teacher = (teacher_hidden_ND, teacher_head_VD)
    loss, aux, grads = run_chunks(options, student, teacher, rows, with_grad=True)
    return (loss, aux), grads


def _hidden_bwd(options, grads, cotangents):
    del options
    # The loss's cotangent only: aux has no gradient.
    return *scale_grads(grads, cotangents[0]), None, None, None


loss_from_hidden.defvjp(_hidden_fwd, _hidden_bwd)


def scale_grads(grads: Model, by: jax.Array) -> Model:
    """Both gradients times a scalar, in the dtype of the hidden states."""
    hidden_ND, head_VD = grads
    return _scaled(by, hidden_ND, hidden_ND.dtype), _scaled(by, head_VD, hidden_ND.dtype)


def _scaled(by, grad, dtype):
    return (by * grad.astype(by.dtype)).astype(dtype)


def run_chunks(
    options: Options, student: Model, teacher: Model, rows: Rows, with_grad: bool
) -> tuple[jax.Array, LossAux, Model | None]:
    """Loss, aux and, if asked for, (hidden gradient [N, D], float32 head gradient [V, D])."""
    hidden_ND, head_VD = student
    n_rows = hidden_ND.shape[0]
    size = min(options.chunk, n_rows)
    live_N = rows.weight_N != 0
    n_live = jnp.sum(live_N, dtype=jnp.int32)
    # Live rows first. Stable, so that those of a chunk are near each other in memory.
    order_N = jnp.argsort(~live_N, stable=True).astype(jnp.int32)
    # Padding ids lie past the last row: reads of them are clipped, and writes dropped.
    padding = n_rows + jnp.arange(-n_rows % size, dtype=jnp.int32)
    order_M = jnp.append(order_N, padding)
    wide = working_dtype(hidden_ND)
    grads = (jnp.zeros_like(hidden_ND), jnp.zeros(head_VD.shape, wide)) if with_grad else None

    def trip(i, carry):
        stats_N, sums, trips = carry
        ids_C = lax.dynamic_slice_in_dim(order_M, i * size, size)
        live_C = i * size + jnp.arange(size, dtype=jnp.int32) < n_live
        stats_C, grads_C = _chunk(options, student, teacher, rows, ids_C, live_C, with_grad)

        def put(all_N, x_C):
            return all_N.at[ids_C].set(x_C, mode="drop", unique_indices=True)

        if grads_C is not None:
            # A row is in one chunk only, so its gradient is final and can be narrow. Every chunk adds to the
            # head's, which therefore accumulates in float32.
            hidden_grad_CD, head_grad_VD = grads_C
            sums = (put(sums[0], hidden_grad_CD.astype(hidden_ND.dtype)), sums[1] + head_grad_VD)
        return jax.tree.map(put, stats_N, stats_C), sums, trips + 1

    zero_N = jnp.zeros(n_rows, wide)
    logp_N = None if rows.tokens_N is None else zero_N
    start = (LossAux(zero_N, logp_N, zero_N, zero_N, zero_N), grads, jnp.int32(0))
    trips = _most((n_live + size - 1) // size)
    aux, grads, trips = lax.fori_loop(jnp.int32(0), trips, trip, start)
    return _total(rows, aux), aux._replace(chunks_run=trips), grads


@custom_vmap
def _most(trips: jax.Array) -> jax.Array:
    """The trips; under vmap, those of the fullest set."""
    # With a different number for each set, vmap would select between old and new carry on every trip,
    # and so copy the accumulators. Trips past the end of a set change nothing: its rows are dead there.
    return trips


@_most.def_vmap
def _most_of_all(sets, is_batched, trips_S):
    del sets, is_batched
    return _most(jnp.max(trips_S)), False


def _chunk(options, student, teacher, rows, ids_C, live_C, with_grad):
    """Stats [C] of the rows with these ids and, if asked for, their two gradients."""

    def pick(x_N):
        return x_N.at[ids_C].get(mode="clip")

    def pick_live(hidden_ND):
        # A dead row may be NaN, and 0 x NaN would spoil the head's gradient.
        return jnp.where(live_C[:, None], pick(hidden_ND), 0)

    hidden_ND, head_VD = student
    teacher_hidden_ND, teacher_head_VD = teacher
    student_CD = pick_live(hidden_ND)
    student_CV = _matmul(student_CD, head_VD, (1, 1))
    teacher_CV = _matmul(pick_live(teacher_hidden_ND), teacher_head_VD, (1, 1))
    rows_C = jax.tree.map(pick, rows)
    # The dtype of the head, so that both gradient matmuls have operands of one dtype.
    grad_dtype = head_VD.dtype if with_grad else None
    stats_C, grad_CV = row_terms(options, student_CV, teacher_CV, rows_C, live_C, grad_dtype)
    if grad_CV is None:
        return stats_C, None
    hidden_grad_CD = _matmul(grad_CV, head_VD, (1, 0))
    if options.vocab_axis is not None:
        hidden_grad_CD = lax.psum(hidden_grad_CD, options.vocab_axis)
    return stats_C, (hidden_grad_CD, _matmul(grad_CV, student_CD, (0, 0)))


def _matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts one axis of each; accumulates and returns float32 (float64 for float64)."""
    # The default precision of an accelerator would round float32 operands to 10 bits or fewer.
    precision = None if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=working_dtype(a))


# ---- from logits -------------------------------------------------------------------------------


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def loss_from_logits(
    options: Options, student_NV: jax.Array, teacher_NV: jax.Array, rows: Rows
) -> tuple[jax.Array, LossAux]:
    """`loss_from_hidden`, for logits that already exist."""
    return loss_and_grad(options, student_NV, teacher_NV, rows, None)[0]


def loss_and_grad(
    options: Options, student_NV: jax.Array, teacher_NV: jax.Array, rows: Rows, grad_dtype: Any
) -> tuple[tuple[jax.Array, LossAux], jax.Array | None]:
    """((loss, aux), gradient in the student's logits); grad_dtype None: no gradient."""
    aux, grad_NV = row_terms(options, student_NV, teacher_NV, rows, rows.weight_N != 0, grad_dtype)
    return (_total(rows, aux), aux), grad_NV


def _logits_fwd(options, student_NV, teacher_NV, rows):
    student_NV = once_differentiable("topk_jsd_from_logits", student_NV)
    return loss_and_grad(options, student_NV, teacher_NV, rows, student_NV.dtype)


def _logits_bwd(options, grad_NV, cotangents):
    del options
    return _scaled(cotangents[0], grad_NV, grad_NV.dtype), None, None


loss_from_logits.defvjp(_logits_fwd, _logits_bwd)


def _total(rows, aux):
    live_N = rows.weight_N != 0
    scale_N = rows.weight_N.astype(aux.ratio_N.dtype) * aux.ratio_N
    return jnp.sum(jnp.where(live_N, scale_N * aux.divergence_N, 0))
