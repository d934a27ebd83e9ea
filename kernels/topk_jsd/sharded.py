"""The loss over a mesh, every collective written out: a compiler cannot split a kernel by itself.

Rows alone are split: each device runs the chunk loop over its rows with the whole head. The loop holds
no collective, so devices may run different numbers of trips; the head's gradient is summed over
devices once, behind it.

The vocabulary is split as well: each device holds some rows of the heads, and those that share rows of
the batch go through the loop together. A trip exchanges a few numbers a row (`rows_xla.py`), the top k
scores of each shard (`selection.py`) and the hidden states' gradient.

Gradients are computed in the forward pass inside one shard_map and nothing differentiates through it,
so replication need not be tracked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from . import chunked
from .reference import LossAux, Options, Rows


@dataclass(frozen=True)
class Sharding:
    """How `topk_jsd_loss` splits its work over a mesh; operands may lie anywhere on it.

    mesh: its axes all Auto or all Explicit; those that neither field names repeat the work.
    rows: the axes that split the rows; a number of rows that they do not divide is padded.
    vocab: the axis that splits the vocabulary, which it must divide; None gathers the heads. Only
      the "xla" implementation can do it.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    vocab: str | None = None

    @property
    def row_devices(self) -> int:
        """The number of shards of the rows."""
        return math.prod(self.mesh.shape[axis] for axis in self.rows)


def check(sharding: Sharding, implementation: str | None, vocab: int) -> None:
    """Raises ValueError where the axes do not fit the mesh, the vocabulary or the implementation."""
    axes = (*sharding.rows, *filter(None, [sharding.vocab]))
    if len(set(axes)) < len(axes) or not set(axes) <= set(sharding.mesh.axis_names):
        raise ValueError(
            f"sharding.rows is {sharding.rows!r} and sharding.vocab {sharding.vocab!r}; they must name "
            f"axes of the mesh, {sharding.mesh.axis_names!r}, each at most once"
        )
    if implementation == "reference":
        raise ValueError("implementation is 'reference', which cannot be sharded; use 'xla' or None")
    if sharding.vocab is None:
        return
    if str(implementation).startswith("pallas"):
        raise ValueError(
            f"implementation is {implementation!r} and sharding.vocab {sharding.vocab!r}; "
            "only 'xla' can split the vocabulary"
        )
    shards = sharding.mesh.shape[sharding.vocab]
    if vocab % shards:
        raise ValueError(
            f"the vocabulary is {vocab}; the {shards} devices of sharding.vocab {sharding.vocab!r} must "
            "divide it: pad the heads (num_tokens) or set sharding.vocab to None"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def loss_from_hidden(
    sharding: Sharding, options: Options, student_hidden_ND: jax.Array, student_head_VD: jax.Array,
    teacher_hidden_ND: jax.Array, teacher_head_VD: jax.Array, rows: Rows,
) -> tuple[jax.Array, LossAux]:  # fmt: skip
    """`chunked.loss_from_hidden` over the mesh. Loss and chunks_run are replicated."""
    student, teacher = (student_hidden_ND, student_head_VD), (teacher_hidden_ND, teacher_head_VD)
    return _over_mesh(sharding, options, False, student, teacher, rows)[:2]


def _forward(sharding, options, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, rows):
    student = chunked.once_differentiable("topk_jsd_loss with sharding", (hidden_ND, head_VD))
    teacher = (teacher_hidden_ND, teacher_head_VD)
    loss, aux, grads = _over_mesh(sharding, options, True, student, teacher, rows)
    return (loss, aux), grads


def _backward(sharding, options, grads, cotangents):
    del sharding, options
    return *chunked.scale_grads(grads, cotangents[0]), None, None, None


loss_from_hidden.defvjp(_forward, _backward)


@partial(jax.jit, static_argnums=(0, 1, 2))  # so that callers outside of jit run it compiled
def _over_mesh(sharding: Sharding, options: Options, with_grad: bool, student: Any, teacher: Any, rows: Rows):
    """What `chunked.run_chunks` returns, of all rows."""
    n_rows, vocab = rows.weight_N.shape[0], student[1].shape[0]
    spare = -n_rows % sharding.row_devices
    of_rows, of_head = P(sharding.rows), P(sharding.vocab)
    local_vocab = vocab // (sharding.mesh.shape[sharding.vocab] if sharding.vocab else 1)
    scatter = local_vocab % sharding.row_devices == 0
    of_grad = P((*filter(None, [sharding.vocab]), *sharding.rows)) if scatter else of_head
    run = jax.shard_map(
        partial(_on_device, sharding, replace(options, vocab_axis=sharding.vocab), with_grad, scatter),
        mesh=sharding.mesh,
        in_specs=((of_rows, of_head), (of_rows, of_head), of_rows),
        out_specs=(P(), of_rows, P(), (of_rows, of_grad) if with_grad else P()),
        check_vma=False,
    )
    lay = partial(_lay, sharding)
    pad = lambda x_N: jnp.pad(lay(x_N, P()), ((0, spare), *((0, 0),) * (x_N.ndim - 1))) if spare else x_N
    cut = lambda x_N: lay(x_N, P())[:n_rows] if spare else x_N
    of_model = lambda hidden_ND, head_VD: (lay(pad(hidden_ND), of_rows), lay(head_VD, of_head))
    rows = jax.tree.map(lambda x_N: lay(pad(x_N), of_rows), rows)
    loss, aux, trips, grads = run(of_model(*student), of_model(*teacher), rows)
    aux = jax.tree.map(cut, aux)._replace(chunks_run=trips)
    if with_grad:
        spec = lambda x: jax.typeof(x).sharding.spec
        grads = (lay(cut(grads[0]), spec(student[0])), lay(grads[1], spec(student[1])))
    return loss, aux, grads


def _lay(sharding, x, spec):
    """Explicit axes are moved by hand; of Auto ones the compiler does the same where they are used."""
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def _on_device(sharding, options, with_grad, scatter, student, teacher, rows):
    loss, aux, grads = chunked.run_chunks(options, student, teacher, rows, with_grad)
    loss, trips = lax.psum(loss, sharding.rows), lax.pmax(aux.chunks_run, sharding.rows)
    if grads is not None:
        # Summed once and in the accumulator's dtype; where it can, each device keeps its part alone.
        reduce = partial(lax.psum_scatter, scatter_dimension=0, tiled=True) if scatter else lax.psum
        grads = (grads[0], reduce(grads[1], sharding.rows))
    return loss, aux._replace(chunks_run=None), trips, grads
