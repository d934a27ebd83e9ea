"""One optimizer step from one lesson, micro-batch by micro-batch, with a global active-token mean.

    takes  TrainState, the frozen tree, a Lesson of B rows (host)
    gives  the next TrainState and a dict of float32 scalars
    right  when loss and gradients do not depend on the micro-batches or the number of devices

The host cuts the rows (train/microbatches.py) and calls four compiled functions:

    teach(frozen, teacher_BT)                                   -> hidden_BTD
    align(hidden_BTD, shift_B, S)                               -> hidden_BSD, at the student's positions
    learn(params, frozen, grads, sums, hidden_BSD, microbatch)  -> grads, sums
    apply(state, grads, sums, total)                            -> state, metrics

Each width compiles by itself when it first occurs, and is found in the compilation cache from then on.
The mean is over the active tokens of the whole lesson. The release averages per micro-batch of two
sequences instead, which makes its gradient depend on the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rosd_jax.distill.loss import span_loss
from rosd_jax.kernels.topk_jsd import Sharding
from rosd_jax.models import qwen3
from rosd_jax.models.lora import combine, init_adapters
from rosd_jax.models.sharding import AXES, on_device, row_devices, row_sharding
from rosd_jax.settings import Settings
from rosd_jax.train.microbatches import MicroBatch, plan_microbatches
from rosd_jax.types import Array, Lesson, Params, TrainState

Metrics = dict[str, jax.Array]
SUMS = ("loss", "divergence", "ratio", "logp_gap", "student_topk_mass", "teacher_topk_mass")


def make_optimizer(config: Settings) -> optax.GradientTransformation:
    """AdamW with linear warm-up to a constant rate, behind a global-norm clip.

    Step k (from 0) of the warm-up uses lr (k + 1) / n; the release's first step has rate 0.
    """
    c = config.optimizer
    first = 0 if c.warmup_from_zero else 1

    def warm_up(k: jax.typing.ArrayLike) -> jax.Array:
        return c.lr * jnp.minimum(1.0, (k + first) / c.warmup_steps)

    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(
            warm_up if c.warmup_steps else c.lr,
            c.b1,
            c.b2,
            c.eps,
            weight_decay=c.weight_decay,
            mu_dtype=c.mu_dtype,
        ),
    )


def learning_params(config: Settings, model: qwen3.Qwen3Config, key: jax.Array) -> Params:
    """What learns, at random: adapters where model.lora asks for them, else the whole model."""
    lora = config.model.lora
    if lora.rank:
        return init_adapters(model, lora.rank, tuple(lora.targets), key)
    return qwen3.init_params(model, key)


def learner(params: Params, frozen_params: Params, config: Settings) -> Params:
    """The model that learns: where params are adapters, the frozen tree with them; else params themselves."""
    return combine(on_device(frozen_params), params) if config.model.lora.rank else params


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


@dataclass(frozen=True)
class Update:
    """The update's compiled functions (the module says what each takes and gives) and their call in order.

    The state is donated: its buffers become the next state's.
    """

    zeros: Callable[[], tuple[Params, Metrics]]  # where gradients and sums begin
    teach: Any
    align: Any
    learn: Any
    apply: Any
    model: qwen3.Qwen3Config
    mesh: Mesh
    device_rows: int
    longest: tuple[int, int]  # positions of a student's and of a teacher's row

    @property
    def rows(self) -> int:
        """Rows of one micro-batch."""
        return row_devices(self.mesh) * self.device_rows

    def trace(self, like: TrainState, frozen_like: Params, S: int, T: int) -> dict[str, Any]:
        """The functions by name, traced at these widths, to be lowered for devices that need not be there.

        like, frozen_like: shapes with shardings. Call it with the mesh in context.
        """

        def rows(dtype, *shape) -> Any:
            return jax.ShapeDtypeStruct((self.rows, *shape), dtype, sharding=row_sharding(self.mesh))

        ints, floats = rows("int32", S), rows("float32", S)
        teacher_BT, shift_B = rows("int32", T), rows("int32")
        microbatch = MicroBatch(ints, teacher_BT, shift_B, ints, floats, floats)
        D, dtype = self.model.hidden_size, self.model.dtype
        grads, sums = jax.eval_shape(self.zeros)
        grads = jax.tree.map(
            lambda x, p: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=p.sharding), grads, like.params
        )
        total = jax.ShapeDtypeStruct((), jnp.float32)
        return {
            "teach": self.teach.trace(frozen_like, teacher_BT),
            "align": self.align.trace(rows(dtype, T, D), shift_B, S),
            "learn": self.learn.trace(like.params, frozen_like, grads, sums, rows(dtype, S, D), microbatch),
            "apply": self.apply.trace(like, grads, sums, total),
        }

    def __call__(
        self, state: TrainState, frozen_params: Params, lesson: Lesson
    ) -> tuple[TrainState, Metrics]:
        """The next state, and the step's numbers."""
        total = np.float32(lesson.weight_BR.sum())
        grads, sums = self.zeros()
        for microbatch in plan_microbatches(lesson, self.rows, self.longest):
            before = sums
            microbatch = jax.device_put(scaled(microbatch, total), row_sharding(self.mesh))
            teacher_BTD = self.teach(frozen_params, microbatch.teacher_BT)
            teacher_BSD = self.align(teacher_BTD, microbatch.shift_B, microbatch.student_BS.shape[1])
            grads, sums = self.learn(state.params, frozen_params, grads, sums, teacher_BSD, microbatch)
            jax.block_until_ready(before)  # else micro-batches queue up, and with them their hidden states
        return self.apply(state, grads, sums, total)


def scaled(microbatch: MicroBatch, total: np.float32) -> MicroBatch:
    """The micro-batch with its weights over the active tokens of the whole lesson."""
    return replace(microbatch, weight_BS=microbatch.weight_BS / total)


def make_update(
    config: Settings,
    model: qwen3.Qwen3Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Update:
    """The update of one experiment on one mesh."""
    places = state_shardings.params
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = jax.eval_shape(lambda: learning_params(config, model, jax.random.key(0)))

    def zeros() -> tuple[Params, Metrics]:
        grads = jax.tree.map(lambda x: jnp.zeros(x.shape, config.optimizer.grad_dtype), shapes)
        return grads, dict.fromkeys(SUMS, jnp.zeros((), jnp.float32))

    def learn(params, frozen_params, grads, sums, teacher_BSD, microbatch):
        def loss(params):
            return microbatch_loss(params, frozen_params, teacher_BSD, microbatch, config, model, mesh)

        (_, more), by = jax.value_and_grad(loss, has_aux=True)(params)
        return add(grads, by), add(sums, more)

    def apply(state, grads, sums, total):
        grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer count into floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        empty = total == 0
        keep = jnp.isfinite(norm) & (~empty | (config.optimizer.empty_batch == "step"))
        # A step that is not kept leaves weights and moments as they are, but counts.
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(keep, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        state = TrainState(state.step + 1, params, opt_state)
        return state, summarise(sums, total, norm, keep, empty)

    return Update(
        zeros=jax.jit(zeros, out_shardings=(places, replicated)),
        teach=jax.jit(partial(teach, model=model), out_shardings=row_sharding(mesh)),
        align=jax.jit(align, static_argnums=2, out_shardings=row_sharding(mesh)),
        learn=jax.jit(learn, donate_argnums=2, out_shardings=(places, replicated)),
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(state_shardings, replicated)),
        model=model,
        mesh=mesh,
        device_rows=config.batch.device_rows,
        longest=longest_rows(config),
    )


def longest_rows(config: Settings) -> tuple[int, int]:
    """The most positions of a student's and of a teacher's row."""
    R = config.rollout.max_new_tokens
    return config.data.max_prompt_tokens + R, config.lesson.max_teacher_tokens + R


def teach(frozen_params: Params, teacher_BT: jax.Array, *, model: qwen3.Qwen3Config) -> jax.Array:
    """The teacher's hidden states [B, T, D]."""
    return qwen3.hidden_states(on_device(frozen_params), model, teacher_BT)


def align(teacher_BTD: jax.Array, shift_B: jax.Array, S: int) -> jax.Array:
    """The teacher's hidden states [B, S, D] at the student's positions; elsewhere any."""
    at_BS = jnp.clip(jnp.arange(S) + shift_B[:, None], 0, teacher_BTD.shape[1] - 1)
    return jnp.take_along_axis(teacher_BTD, at_BS[..., None], axis=1)


def microbatch_loss(
    params: Params,
    frozen_params: Params,
    teacher_BSD: jax.Array,
    microbatch: MicroBatch,
    config: Settings,
    model: qwen3.Qwen3Config,
    mesh: Mesh,
) -> tuple[jax.Array, Metrics]:
    """The part of the loss that one micro-batch carries, and sums over its active tokens.

    Where adapters learn, the head is constant, and XLA drops the loss's matmul for its gradient.
    """
    student = learner(params, frozen_params, config)
    student_BSD = qwen3.hidden_states(student, model, jnp.asarray(microbatch.student_BS))
    loss, aux = span_loss(
        flat(student_BSD),
        qwen3.head_VD(student).astype(model.dtype),
        flat(teacher_BSD),
        jax.lax.stop_gradient(on_device(qwen3.head_VD(frozen_params).astype(model.dtype))),
        flat(microbatch.weight_BS),
        flat(microbatch.target_BS),
        flat(microbatch.sampler_logp_BS),
        k=config.loss.topk,
        alpha=config.loss.alpha,
        tail=config.loss.tail,
        ratio_cap=config.loss.ratio_cap,
        chunk=config.loss.chunk,
        num_tokens=model.num_tokens,
        temperature=config.rollout.temperature,
        sharding=loss_sharding(mesh, model.vocab_size),
    )
    assert aux.student_logp_N is not None  # since the loss was told the tokens
    active_N = flat(microbatch.weight_BS) != 0
    per_token = {
        "divergence": aux.divergence_N,
        "ratio": aux.ratio_N,
        "logp_gap": jnp.abs(aux.student_logp_N - flat(microbatch.sampler_logp_BS)),
        "student_topk_mass": aux.student_mass_N,
        "teacher_topk_mass": aux.teacher_mass_N,
    }
    sums = {name: jnp.where(active_N, x, 0.0).sum() for name, x in per_token.items()}
    return loss, {"loss": loss, **jax.lax.stop_gradient(sums)}


def add(total: Any, more: Any) -> Any:
    """The sum of two trees, at the types of the first."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def flat(x: Array) -> jax.Array:
    """[B, S, ...] as [B x S, ...]."""
    return jnp.asarray(x).reshape(-1, *x.shape[2:])


def loss_sharding(mesh: Mesh, vocab: int) -> Sharding | None:
    """The loss over a mesh: the vocabulary over tensor, as the head lies, where it divides; else rows.

    None on one device.
    """
    if mesh.size == 1:
        return None
    tensor = mesh.shape["tensor"]
    if tensor > 1 and vocab % tensor == 0:
        return Sharding(mesh, rows=("data", "fsdp"), vocab="tensor")
    return Sharding(mesh, rows=AXES)


def summarise(sums: Metrics, total, norm, keep, empty) -> Metrics:
    """Scalars of one step: means over active tokens, the gradient's norm, and what was skipped."""
    mean = {k: v / total for k, v in sums.items() if k != "loss"}  # NaN over nothing
    return {
        "loss": jnp.where(empty, jnp.nan, sums["loss"]),
        **mean,
        "grad_norm": norm,
        "active_tokens": total,
        "skipped_empty": (empty & ~keep).astype(jnp.float32),
        "skipped_nonfinite": (~jnp.isfinite(norm)).astype(jnp.float32),
    }
