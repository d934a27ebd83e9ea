"""One optimizer step from one lesson: micro-batched, rematerialised, with a global active-token mean.

    takes  TrainState, the frozen tree, a Lesson of B rows
    gives  the next TrainState and a dict of float32 scalars
    right  when loss and gradients do not depend on the micro-batch size or the number of devices

Rows without an active token cost nothing: rows are sorted by activity and the loop over micro-batches
stops after the last active one. The release averages per micro-batch of two sequences instead, which
makes its gradient depend on the number of devices.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rosd_jax.config import Config
from rosd_jax.distill.loss import span_loss
from rosd_jax.kernels.topk_jsd import Sharding
from rosd_jax.models import qwen3
from rosd_jax.models.sharding import AXES, row_sharding
from rosd_jax.types import Lesson, Params, TrainState

Metrics = dict[str, jax.Array]


def make_optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW with linear warm-up to a constant rate, behind a global-norm clip.

    Step k (from 0) of the warm-up uses lr (k + 1) / n; the release's first step has rate 0.
    """
    c = config.optimizer
    first = 0 if c.warmup_from_zero else 1
    rate = lambda k: c.lr * jnp.minimum(1.0, (k + first) / max(c.warmup_steps, 1))
    return optax.chain(
        optax.clip_by_global_norm(c.clip_norm),
        optax.adamw(rate if c.warmup_steps else c.lr, c.b1, c.b2, c.eps, weight_decay=c.weight_decay),
    )


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_update(
    config: Config,
    model: qwen3.Qwen3Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings: TrainState,
) -> Callable[[TrainState, Params, Lesson], tuple[TrainState, Metrics]]:
    """The jitted update. The state it is given is donated: its buffers become the next state's."""

    def update(state: TrainState, frozen_params: Params, lesson: Lesson):
        total = lesson.weight_BR.sum()
        grads, sums = accumulate(
            state.params, frozen_params, lesson, total, config=config, model=model, mesh=mesh
        )
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer count into floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)
        empty = total == 0
        keep = jnp.isfinite(norm) & (~empty | (config.optimizer.empty_batch == "step"))
        pick = lambda new, old: jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, old)
        state = TrainState(state.step + 1, pick(params, state.params), pick(opt_state, state.opt_state))
        return state, summarise(sums, total, norm, keep, empty)

    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(update, donate_argnums=0, out_shardings=(state_shardings, replicated))


def accumulate(
    params: Params,
    frozen_params: Params,
    lesson: Lesson,
    total: jax.Array,
    *,
    config: Config,
    model: qwen3.Qwen3Config,
    mesh: Mesh,
) -> tuple[Params, Metrics]:
    """Gradients of the active-token mean over the whole lesson, and sums for the metrics."""
    rows, micro = lesson.weight_BR.shape[0], config.batch.micro
    active_B = (lesson.weight_BR != 0).any(axis=1)
    order_B = jnp.argsort(~active_B, stable=True)
    groups = jax.tree.map(lambda x: x[order_B].reshape(rows // micro, micro, *x.shape[1:]), lesson)
    denominator = jnp.maximum(total, 1.0)
    split = loss_sharding(mesh, model.vocab_size)

    def body(i, carry):
        group = jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x[i], row_sharding(mesh)), groups)
        objective = lambda p: micro_loss(p, frozen_params, group, denominator, config, model, split)
        (_, sums), grads = jax.value_and_grad(objective, has_aux=True)(params)
        # Without the barrier XLA for TPU moves the gradients' all-reduce out of the loop, and fails on it.
        grads = jax.lax.optimization_barrier(grads)
        return jax.tree.map(jnp.add, carry, (grads, sums))

    first = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), groups)
    _, sums = jax.eval_shape(
        lambda p, f, g: micro_loss(p, f, g, denominator, config, model, split),
        params,
        frozen_params,
        first,
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (params, sums))
    trips = -(-active_B.sum() // micro)
    return jax.lax.fori_loop(0, trips, body, zeros)


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


def micro_loss(
    params: Params,
    frozen_params: Params,
    lesson: Lesson,
    denominator: jax.Array,
    config: Config,
    model: qwen3.Qwen3Config,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, Metrics]:
    """The part of the loss that one micro-batch carries, and sums over its active tokens."""
    student_BRD = response_hidden(params, model, lesson.prompt_BP, lesson.prompt_len_B, lesson.response_BR)
    teacher_BRD = response_hidden(
        frozen_params,
        model,
        lesson.teacher_prompt_BQ,
        lesson.teacher_prompt_len_B,
        lesson.response_BR,
    )
    flat = lambda x: x.reshape(-1, *x.shape[2:])
    head = lambda tree: qwen3.head_VD(tree).astype(model.dtype)
    loss, aux = span_loss(
        flat(student_BRD),
        head(params),
        flat(jax.lax.stop_gradient(teacher_BRD)),
        jax.lax.stop_gradient(head(frozen_params)),
        flat(lesson.weight_BR) / denominator,
        flat(lesson.response_BR),
        flat(lesson.sampler_logp_BR),
        k=config.loss.topk,
        alpha=config.loss.alpha,
        tail=config.loss.tail,
        ratio_cap=config.loss.ratio_cap,
        chunk=config.loss.chunk,
        num_tokens=model.num_tokens,
        temperature=config.rollout.temperature,
        sharding=sharding,
    )
    active_N = flat(lesson.weight_BR) != 0
    per_token = {
        "divergence": aux.divergence_N,
        "ratio": aux.ratio_N,
        "logp_gap": jnp.abs(aux.student_logp_N - flat(lesson.sampler_logp_BR)),
        "student_topk_mass": aux.student_mass_N,
        "teacher_topk_mass": aux.teacher_mass_N,
    }
    sums = {name: jnp.where(active_N, x, 0.0).sum() for name, x in per_token.items()}
    return loss, {"loss": loss, **jax.lax.stop_gradient(sums)}


def response_hidden(
    params: Params, model: qwen3.Qwen3Config, prompt_BP, prompt_len_B, response_BR
) -> jax.Array:
    """Hidden states [B, R, D] from which response tokens 0..R-1 are predicted."""
    tokens_BT = join(prompt_BP, prompt_len_B, response_BR)
    hidden_BTD = qwen3.hidden_states(params, model, tokens_BT)
    before_BR = prompt_len_B[:, None] - 1 + jnp.arange(response_BR.shape[1])
    return jnp.take_along_axis(hidden_BTD, before_BR[..., None], axis=1)


def join(prompt_BP: jax.Array, prompt_len_B: jax.Array, response_BR: jax.Array) -> jax.Array:
    """tokens [B, P + R]: each row's prompt, its response right behind it, then padding."""
    P, R = prompt_BP.shape[1], response_BR.shape[1]
    at_BT = jnp.arange(P + R) - prompt_len_B[:, None]
    response = jnp.take_along_axis(response_BR, jnp.clip(at_BT, 0, R - 1), axis=1)
    prompt = jnp.pad(prompt_BP, ((0, 0), (0, R)))
    return jnp.where(at_BT < 0, prompt, jnp.where(at_BT < R, response, 0))


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
