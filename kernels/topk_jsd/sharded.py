"""The loss over a mesh, every collective written out: a compiler cannot split a kernel by itself.

Rows only: each device runs the chunk loop over its rows with the whole head. The loop holds no collective,
so devices may run different numbers of trips; the head's gradient is summed over devices once, after it.

Rows and vocabulary: each device holds some rows of the heads, and devices that share rows of the batch go
through the loop together. A trip exchanges a few numbers a row (`rows_xla.py`), the top k scores of each
shard (`selection.py`) and the hidden states' gradient.

Gradients are computed in the forward pass inside one shard_map. Nothing differentiates through it, so
replication need not be tracked (check_vma=False).

Dimensions: N rows, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from . import chunked
from .chunked import Model
from .records import LossAux, Options, Rows


@dataclass(frozen=True)
class Sharding:
    """How `topk_jsd_loss` splits its work over a mesh; operands may lie anywhere on it.

    mesh: its axes are all Auto or all Explicit; axes named by neither field repeat the work.
    rows: the axes that split the rows. The number of rows is padded to a multiple of their devices.
    vocab: the axis that splits the vocabulary, whose size must divide it; None gathers the heads. Only
      the "xla" implementation can split the vocabulary.
    """

    mesh: Mesh
    rows: tuple[str, ...]
    vocab: str | None = None

    @property
    def row_devices(self) -> int:
        """The number of shards of the rows."""
        return math.prod(self.mesh.shape[axis] for axis in self.rows)

    @property
    def vocab_devices(self) -> int:
        """The number of shards of the vocabulary."""
        return 1 if self.vocab is None else self.mesh.shape[self.vocab]

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """The axes that split the vocabulary: one or none."""
        return () if self.vocab is None else (self.vocab,)


def check(sharding: Sharding, implementation: str | None, vocab: int) -> None:
    """Raises ValueError where the axes do not fit the mesh, the vocabulary or the implementation."""
    axes = (*sharding.rows, *sharding.vocab_axes)
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
    if vocab % sharding.vocab_devices:
        raise ValueError(
            f"the vocabulary is {vocab}; the {sharding.vocab_devices} devices of sharding.vocab "
            f"{sharding.vocab!r} must divide it: pad the heads (num_tokens) or set sharding.vocab to None"
        )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def loss_from_hidden(
    sharding: Sharding,
    options: Options,
    student_hidden_ND: jax.Array,
    student_head_VD: jax.Array,
    teacher_hidden_ND: jax.Array,
    teacher_head_VD: jax.Array,
    rows: Rows,
) -> tuple[jax.Array, LossAux]:
    """`chunked.loss_from_hidden` over the mesh. Loss and chunks_run are replicated."""
    student = (student_hidden_ND, student_head_VD)
    teacher = (teacher_hidden_ND, teacher_head_VD)
    loss, aux, _ = _over_mesh(sharding, options, False, student, teacher, rows)
    return loss, aux


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
def _over_mesh(
    sharding: Sharding, options: Options, with_grad: bool, student: Model, teacher: Model, rows: Rows
) -> tuple[jax.Array, LossAux, Model | None]:
    """What `chunked.run_chunks` returns, for the rows of all devices."""
    n_rows = rows.weight_N.shape[0]
    vocab = student[1].shape[0]
    whole = PartitionSpec()
    by_rows = PartitionSpec(sharding.rows)
    by_vocab = PartitionSpec(sharding.vocab)
    # The head's gradient leaves split over the devices that sum it, where they divide it.
    scatter = vocab // sharding.vocab_devices % sharding.row_devices == 0
    head_grad = PartitionSpec((*sharding.vocab_axes, *sharding.rows)) if scatter else by_vocab
    run = jax.shard_map(
        partial(_on_device, sharding, replace(options, vocab_axis=sharding.vocab), with_grad, scatter),
        mesh=sharding.mesh,
        in_specs=((by_rows, by_vocab), (by_rows, by_vocab), by_rows),
        out_specs=(whole, by_rows, whole, (by_rows, head_grad) if with_grad else whole),
        check_vma=False,
    )
    lay = partial(_lay, sharding)
    spare = -n_rows % sharding.row_devices

    def pad(x_N):
        if not spare:
            return x_N
        # While replicated, since an Explicit axis cannot split a dimension that it does not divide.
        return jnp.pad(lay(x_N, whole), ((0, spare), *((0, 0),) * (x_N.ndim - 1)))

    def cut(x_N):
        return lay(x_N, whole)[:n_rows] if spare else x_N

    def lay_model(model):
        hidden_ND, head_VD = model
        return lay(pad(hidden_ND), by_rows), lay(head_VD, by_vocab)

    rows = jax.tree.map(lambda x_N: lay(pad(x_N), by_rows), rows)
    loss, aux, trips, grads = run(lay_model(student), lay_model(teacher), rows)
    aux = jax.tree.map(cut, aux)._replace(chunks_run=trips)
    if grads is not None:
        # Back to the layouts of the operands.
        hidden_grad_ND, head_grad_VD = grads
        hidden_spec, head_spec = (jax.typeof(x).sharding.spec for x in student)
        grads = (lay(cut(hidden_grad_ND), hidden_spec), lay(head_grad_VD, head_spec))
    return loss, aux, grads


def _lay(sharding, x, spec):
    """Explicit axes are moved here; for Auto ones the compiler does the same where they are used."""
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))


def _on_device(sharding, options, with_grad, scatter, student, teacher, rows):
    loss, aux, grads = chunked.run_chunks(options, student, teacher, rows, with_grad)
    # Over the rows' axes only: devices that share rows have computed the same loss.
    loss = lax.psum(loss, sharding.rows)
    trips = lax.pmax(aux.chunks_run, sharding.rows)
    if grads is not None:
        hidden_grad_ND, head_grad_VD = grads
        # Summed once, after the loop, and in the accumulator's float32.
        if scatter:
            head_grad_VD = lax.psum_scatter(head_grad_VD, sharding.rows, scatter_dimension=0, tiled=True)
        else:
            head_grad_VD = lax.psum(head_grad_VD, sharding.rows)
        grads = (hidden_grad_ND, head_grad_VD)
    return loss, aux._replace(chunks_run=None), trips, grads
