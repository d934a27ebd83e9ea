"""The update: one optimizer step from one lesson, with gradients accumulated over micro-batches.

    input    a TrainState, the frozen tree, a Lesson (host)
    output   the next TrainState, a dict of float32 scalars, and the divergence of each response token
    correct  when loss and gradients depend neither on the micro-batches nor on the number of devices

The host groups the rows into micro-batches (train/microbatches.py) and calls five compiled functions: the
first and the last once, the others for every micro-batch.

    zeros()                                                     -> grads, sums
    teach(teacher, teacher_BT)                                  -> hidden_BTD
    align(hidden_BTD, shift_B, S)                               -> hidden_BSD, at the student's positions
    learn(params, base, grads, sums, hidden_BSD, microbatch)    -> grads, sums, divergence_BS
    apply(state, grads, sums, active, taught)                   -> state, metrics

`teacher` is the frozen tree, or with lesson.teacher_weights=ema the state's moving average. `base` has the
teacher's head: it is the teacher, or with adapters the frozen tree that they are on.

`teach` is compiled once per width T and `learn` once per width S, when that width first occurs. `align` is
separate, so that only this cheap function is compiled for pairs of widths. `teach` and `align` are left out
for micro-batches of which the teacher teaches no row; `learn` is then compiled without hidden_BSD.

The loss is the sum of two parts, of which a method may lack one:

- distillation: the mean over the taught tokens of the whole lesson. The released code averages within each
  micro-batch of two sequences first, so that its gradient depends on the number of devices.
- the policy gradient, whose tokens are weighted on the host (distill/policy.py).

Dimensions: B rows of a micro-batch, S positions of a student's row, T positions of a teacher's row, N = B x S
positions, D model width, V vocabulary, R response tokens.
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

from rosd_jax.kernels.topk_jsd import Sharding, topk_jsd_loss
from rosd_jax.kernels.topk_jsd.row_math import capped_ratio
from rosd_jax.models import qwen3
from rosd_jax.models.lora import combine, init_adapters
from rosd_jax.models.sharding import AXES, fetch, on_device, place_rows, row_devices, row_sharding
from rosd_jax.settings import Settings
from rosd_jax.train.microbatches import MicroBatch, by_response, plan_microbatches
from rosd_jax.train.token_logp import Options, token_logp
from rosd_jax.types import Array, Lesson, Params, Progress, TrainState, no_progress

Metrics = dict[str, jax.Array]
States = tuple[jax.Array, jax.Array]  # hidden states [N, D] and the head [V, D]
# Accumulated over micro-batches: losses, which are already divided, and sums over tokens.
LOSSES = ("loss", "policy_loss")
OF_TAUGHT = ("divergence", "student_topk_mass", "teacher_topk_mass")  # sums over the tokens that are taught
SUMS = (*LOSSES, *OF_TAUGHT, "ratio", "logp_gap")


def make_optimizer(config: Settings) -> optax.GradientTransformation:
    """AdamW after a global-norm clip, with linear warm-up to a constant learning rate.

    Step k (from 0) of n warm-up steps has the rate lr (k + 1) / n, or lr k / n with warmup_from_zero, as in
    the released code, whose first step therefore changes nothing.
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
    """Randomly initialised trainable parameters: the adapters with model.lora, else the whole model."""
    lora = config.model.lora
    if lora.rank:
        return init_adapters(model, lora.rank, tuple(lora.targets), key)
    return qwen3.init_params(model, key)


def learning_shapes(config: Settings, model: qwen3.Qwen3Config) -> Params:
    """Shapes of `learning_params`."""
    if config.model.lora.rank:
        return jax.eval_shape(lambda: learning_params(config, model, jax.random.key(0)))
    return qwen3.param_shapes(model)


def learner(params: Params, frozen_params: Params, config: Settings) -> Params:
    """The student's whole parameter tree: params, or with LoRA the frozen tree combined with the adapters."""
    if not config.model.lora.rank:
        return params
    return combine(on_device(frozen_params), params)


def init_state(
    params: Params, optimizer: optax.GradientTransformation, *, average: bool = False
) -> TrainState:
    """The state before the first step. average: it has a moving average, which starts as the weights."""
    # A copy, since no buffer may be in the donated state twice.
    ema_params = jax.tree.map(jnp.copy, params) if average else None
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), ema_params)


def moved_average(average: Params, params: Params, rate: float) -> Params:
    """(1 - rate) average + rate params, for each weight. Equal weights stay equal to the last bit.

    Both are float32. In bfloat16 the average would stand still: at a rate of .05, a weight would only be
    rounded to the next one if the student's differed from it by 4 % or more.
    """
    return jax.tree.map(lambda old, new: old + rate * (new - old), average, params)


@dataclass(frozen=True)
class Update:
    """The compiled functions of the update (the module's docstring has their signatures), called in order.

    `__call__` donates the state: its buffers are reused for the next state.
    """

    config: Settings
    zeros: Callable[[], tuple[Params, Metrics]]  # initial gradients and sums
    teach: Any
    align: Any
    learn: Any
    apply: Any
    model: qwen3.Qwen3Config
    mesh: Mesh
    device_rows: int
    longest: tuple[int, int]  # the most positions of a student's and of a teacher's row
    before: Callable[[str], None]  # called before each micro-batch, with its shape in words; may raise
    progress: Progress  # called before each micro-batch: how many are done, of how many

    @property
    def rows(self) -> int:
        """Rows of one micro-batch."""
        return row_devices(self.mesh) * self.device_rows

    def trace(self, like: TrainState, frozen_like: Params, S: int, T: int) -> dict[str, Any]:
        """The functions by name, traced at these widths, ready to be lowered for devices that need not exist.

        like, frozen_like: shapes with shardings. The mesh must be in context (jax.set_mesh).
        """

        def rows(dtype, *shape) -> Any:
            return jax.ShapeDtypeStruct((self.rows, *shape), dtype, sharding=row_sharding(self.mesh))

        def placed(grad, param) -> Any:
            return jax.ShapeDtypeStruct(grad.shape, grad.dtype, sharding=param.sharding)

        ints = rows("int32", S)
        floats = rows("float32", S)
        shift_B = rows("int32")
        policy_BS = floats if self.config.reinforces else None
        microbatch = MicroBatch(ints, rows("int32", 0), shift_B, ints, floats, floats, policy_BS)
        teacher, base = self.teaching(like, frozen_like)
        D = self.model.hidden_size
        dtype = self.model.dtype
        grads, sums = jax.eval_shape(self.zeros)
        grads = jax.tree.map(placed, grads, like.params)
        count = jax.ShapeDtypeStruct((), jnp.float32)
        traced = {}
        teacher_BSD = None
        if self.config.distills:
            teacher_BSD = rows(dtype, S, D)
            traced["teach"] = self.teach.trace(teacher, rows("int32", T))
            traced["align"] = self.align.trace(rows(dtype, T, D), shift_B, S)
        traced["learn"] = self.learn.trace(like.params, base, grads, sums, teacher_BSD, microbatch)
        traced["apply"] = self.apply.trace(like, grads, sums, count, count)
        return traced

    def __call__(
        self, state: TrainState, frozen_params: Params, lesson: Lesson
    ) -> tuple[TrainState, Metrics, np.ndarray]:
        """The next state, the metrics of the step as float32 scalars on the devices, and divergence_BR.

        divergence_BR: float32 [B, R] on the host, in nats. Of each taught response token, the divergence of
        student and teacher before the update, without weight and ratio; 0 elsewhere.
        """
        taught = np.float32(lesson.weight_BR.sum())  # tokens of the whole lesson
        active = np.float32(lesson.active_BR.sum())
        teacher, base = self.teaching(state, frozen_params)
        grads, sums = self.zeros()
        microbatches = plan_microbatches(lesson, self.rows, self.longest)
        divergences = []
        for number, microbatch in enumerate(microbatches):
            sizes = (*microbatch.student_BS.shape, microbatch.teacher_BT.shape[1])
            self.before(f"micro-batch {number} of {len(microbatches)}, {sizes}")
            self.progress(number, len(microbatches))
            previous_sums = sums
            teacher_BSD = self.teacher_states(teacher, microbatch)
            microbatch = place_rows(without_teacher(scaled(microbatch, taught)), self.mesh)
            grads, sums, divergence_BS = self.learn(state.params, base, grads, sums, teacher_BSD, microbatch)
            divergences.append(divergence_BS)
            # Calls are asynchronous. Without this wait for the previous micro-batch, the host would enqueue
            # them all, and the hidden states of each would be allocated at once.
            jax.block_until_ready(previous_sums)
        state, metrics = self.apply(state, grads, sums, active, taught)
        # Only now, so that no micro-batch waits for a copy to the host.
        fetched = [fetch(divergence_BS) for divergence_BS in divergences]
        return state, metrics, by_response(fetched, lesson, self.rows, self.longest)

    def teaching(self, state: TrainState, frozen_params: Params) -> tuple[Params, Params]:
        """The trees `teacher` and `base` of the module's docstring. No array is copied."""
        adapters = self.config.model.lora.rank > 0
        teacher = frozen_params
        if state.ema_params is not None:
            teacher = combine(frozen_params, state.ema_params) if adapters else state.ema_params
        return teacher, frozen_params if adapters else teacher

    def teacher_states(self, teacher: Params, microbatch: MicroBatch) -> jax.Array | None:
        """The teacher's hidden states at the student's positions; None if it teaches none of the rows."""
        if microbatch.teacher_BT.shape[1] == 0:
            return None
        teacher_BT, shift_B = place_rows((microbatch.teacher_BT, microbatch.shift_B), self.mesh)
        teacher_BTD = self.teach(teacher, teacher_BT)
        return self.align(teacher_BTD, shift_B, microbatch.student_BS.shape[1])


def scaled(microbatch: MicroBatch, taught: np.float32) -> MicroBatch:
    """The micro-batch with its weights divided by `taught`, so that its loss is its share of the mean."""
    return replace(microbatch, weight_BS=microbatch.weight_BS / max(taught, np.float32(1)))


def without_teacher(microbatch: MicroBatch) -> MicroBatch:
    """The micro-batch for `learn`, which is compiled again for each shape of its arguments."""
    return replace(microbatch, teacher_BT=microbatch.teacher_BT[:, :0])


def make_update(
    config: Settings,
    model: qwen3.Qwen3Config,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    state_shardings: TrainState,
    before: Callable[[str], None] = lambda what: None,
    progress: Progress = no_progress,
) -> Update:
    """The update of one experiment on one mesh. Compiles nothing yet."""
    param_shardings = state_shardings.params
    replicated = NamedSharding(mesh, PartitionSpec())
    shapes = learning_shapes(config, model)

    # Under jit and with shardings, so that each device allocates its own shard of the gradient only.
    def zeros() -> tuple[Params, Metrics]:
        grads = jax.tree.map(lambda x: jnp.zeros(x.shape, config.optimizer.grad_dtype), shapes)
        return grads, dict.fromkeys(sums_of(config), jnp.zeros((), jnp.float32))

    def learn(params, base, grads, sums, teacher_BSD, microbatch):
        def loss(params):
            return microbatch_loss(params, base, teacher_BSD, microbatch, config, model, mesh)

        (_, (new_sums, divergence_BS)), new_grads = jax.value_and_grad(loss, has_aux=True)(params)
        return add(grads, new_grads), add(sums, new_sums), divergence_BS

    def apply(state, grads, sums, active, taught):
        # The accumulator may be bfloat16 (optimizer.grad_dtype); clipping and AdamW compute in float32.
        grads = jax.tree.map(lambda x: x.astype(jnp.float32), grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes its integer count into floats
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        norm = optax.tree.norm(grads)  # before clipping
        empty = active == 0
        keep = jnp.isfinite(norm) & (~empty | (config.optimizer.empty_batch == "step"))
        ema_params = state.ema_params
        if ema_params is not None:
            ema_params = moved_average(ema_params, params, config.lesson.ema_rate)
        # A skipped step leaves weights, moments and average unchanged, but advances state.step. Selecting
        # here, inside the compiled function, lets the old state's buffers be donated all the same.
        params, opt_state, ema_params = jax.tree.map(
            lambda new, old: jnp.where(keep, new, old),
            (params, opt_state, ema_params),
            (state.params, state.opt_state, state.ema_params),
        )
        state = TrainState(state.step + 1, params, opt_state, ema_params)
        return state, summarise(sums, active, taught, norm, keep, empty)

    return Update(
        config=config,
        zeros=jax.jit(zeros, out_shardings=(param_shardings, replicated)),
        teach=jax.jit(partial(teach, model=model), out_shardings=row_sharding(mesh)),
        align=jax.jit(align, static_argnums=2, out_shardings=row_sharding(mesh)),
        # grads is donated, so that the accumulated gradient is in memory once.
        learn=jax.jit(
            learn,
            donate_argnums=2,
            out_shardings=(param_shardings, replicated, row_sharding(mesh)),
        ),
        # The state is donated, so that weights and moments are in memory once.
        apply=jax.jit(apply, donate_argnums=0, out_shardings=(state_shardings, replicated)),
        model=model,
        mesh=mesh,
        device_rows=config.batch.device_rows,
        longest=longest_rows(config),
        before=before,
        progress=progress,
    )


def longest_rows(config: Settings) -> tuple[int, int]:
    """The most positions that a student's and a teacher's row may have."""
    R = config.rollout.max_new_tokens
    return config.data.max_prompt_tokens + R, config.lesson.max_teacher_tokens + R


def teach(teacher: Params, teacher_BT: jax.Array, *, model: qwen3.Qwen3Config) -> jax.Array:
    """The teacher's hidden states [B, T, D]. Weights that are on the host are transferred."""
    return qwen3.hidden_states(on_device(teacher), model, teacher_BT)


def align(teacher_BTD: jax.Array, shift_B: jax.Array, S: int) -> jax.Array:
    """The teacher's hidden states [B, S, D] at the student's response positions; arbitrary ones elsewhere."""
    # Positions outside a response have weight 0, so they only need to stay in range.
    at_BS = jnp.clip(jnp.arange(S) + shift_B[:, None], 0, teacher_BTD.shape[1] - 1)
    return jnp.take_along_axis(teacher_BTD, at_BS[..., None], axis=1)


def sums_of(config: Settings) -> tuple[str, ...]:
    """The SUMS of a method; policy_loss only if it has a policy gradient."""
    return SUMS if config.reinforces else tuple(name for name in SUMS if name != "policy_loss")


def microbatch_loss(
    params: Params,
    base: Params,
    teacher_BSD: jax.Array | None,
    microbatch: MicroBatch,
    config: Settings,
    model: qwen3.Qwen3Config,
    mesh: Mesh,
) -> tuple[jax.Array, tuple[Metrics, jax.Array]]:
    """One micro-batch's share of the loss, the SUMS over its active tokens, and their divergence [B, S].

    base: a tree with the teacher's head; with LoRA the frozen tree, whose head is the student's too, so XLA
    drops the matmul for its gradient. teacher_BSD: None if the teacher teaches none of the rows.
    """
    student = learner(params, base, config)
    student_BSD = qwen3.hidden_states(student, model, jnp.asarray(microbatch.student_BS))
    student_head_VD = qwen3.head_VD(student).astype(model.dtype)
    learns = (flat(student_BSD), student_head_VD)
    loss = jnp.zeros((), jnp.float32)
    sums = dict.fromkeys(sums_of(config), loss)
    divergence_BS = jnp.zeros(microbatch.weight_BS.shape, jnp.float32)
    if teacher_BSD is not None:
        teacher_head_VD = qwen3.head_VD(base).astype(model.dtype)
        teaches = (flat(teacher_BSD), jax.lax.stop_gradient(on_device(teacher_head_VD)))
        loss, more, divergence_BS = distillation_loss(learns, teaches, microbatch, config, model, mesh)
        sums |= more
    if microbatch.policy_BS is not None:
        policy_loss, more = policy_gradient_loss(learns, microbatch, config, model, mesh)
        loss = loss + policy_loss
        sums |= {name: sums[name] + x for name, x in more.items()} | {"policy_loss": policy_loss}
    return loss, jax.lax.stop_gradient(({**sums, "loss": loss}, divergence_BS))


def distillation_loss(
    student: States,
    teacher: States,
    microbatch: MicroBatch,
    config: Settings,
    model: qwen3.Qwen3Config,
    mesh: Mesh,
) -> tuple[jax.Array, Metrics, jax.Array]:
    """The loss of student and teacher, sums over the taught tokens, and the divergence of each [B, S]."""
    loss, aux = topk_jsd_loss(
        *student,
        *teacher,
        flat(microbatch.weight_BS),
        tokens_N=flat(microbatch.target_BS),
        sampler_logp_N=flat(microbatch.sampler_logp_BS),
        k=config.loss.topk,
        alpha=config.loss.alpha,
        tail=config.loss.tail,
        ratio_cap=config.loss.ratio_cap,
        chunk=config.loss.chunk,
        num_tokens=model.num_tokens,
        # The importance ratio compares two log-probs of a token, so both are at the sampling temperature.
        temperature=config.rollout.temperature,
        sharding=loss_sharding(mesh, model.vocab_size),
    )
    assert aux.student_logp_N is not None  # given, because the loss was passed the tokens
    taught_N = flat(microbatch.weight_BS) != 0
    per_token = {
        "divergence": aux.divergence_N,
        "ratio": aux.ratio_N,
        "logp_gap": jnp.abs(aux.student_logp_N - flat(microbatch.sampler_logp_BS)),
        "student_topk_mass": aux.student_mass_N,
        "teacher_topk_mass": aux.teacher_mass_N,
    }
    sums = {name: jnp.where(taught_N, x, 0.0).sum() for name, x in per_token.items()}
    return loss, sums, aux.divergence_N.reshape(microbatch.weight_BS.shape)


def policy_gradient_loss(
    student: States, microbatch: MicroBatch, config: Settings, model: qwen3.Qwen3Config, mesh: Mesh
) -> tuple[jax.Array, Metrics]:
    """The loss that distill/policy.py writes down, and sums over its tokens that no teacher teaches."""
    policy_N = flat(jnp.asarray(microbatch.policy_BS))
    options = Options(
        chunk=config.loss.chunk,
        temperature=config.rollout.temperature,
        num_tokens=model.num_tokens,
        sharding=loss_sharding(mesh, model.vocab_size),
    )
    logp_N = token_logp(options, *student, flat(microbatch.target_BS), policy_N != 0)
    detached_N = jax.lax.stop_gradient(logp_N)
    sampler_logp_N = flat(microbatch.sampler_logp_BS)
    ratio_N = capped_ratio(detached_N, sampler_logp_N, config.loss.ratio_cap)
    # Selected, not multiplied by 0, since what the sampler reports of other tokens may be NaN.
    weight_N = jnp.where(policy_N != 0, policy_N * ratio_N, 0.0)
    gain_N = weight_N * jnp.exp(logp_N - detached_N)
    untaught_N = (policy_N != 0) & (flat(microbatch.weight_BS) == 0)
    per_token = {"ratio": ratio_N, "logp_gap": jnp.abs(detached_N - sampler_logp_N)}
    return -gain_N.sum(), {name: jnp.where(untaught_N, x, 0.0).sum() for name, x in per_token.items()}


def add(total: Any, more: Any) -> Any:
    """The sum of two trees, in the dtypes of the first."""
    return jax.tree.map(lambda a, b: a + b.astype(a.dtype), total, more)


def flat(x: Array) -> jax.Array:
    """Reshapes [B, S, ...] to [N, ...]."""
    return jnp.asarray(x).reshape(-1, *x.shape[2:])


def loss_sharding(mesh: Mesh, vocab: int) -> Sharding | None:
    """How the loss is split over the mesh; None on one device.

    The vocabulary is split over `tensor`, like the head, if it divides the vocabulary; otherwise rows are
    split over all axes.
    """
    if mesh.size == 1:
        return None
    tensor = mesh.shape["tensor"]
    if tensor > 1 and vocab % tensor == 0:
        return Sharding(mesh, rows=("data", "fsdp"), vocab="tensor")
    return Sharding(mesh, rows=AXES)


def summarise(sums: Metrics, active, taught, norm, keep, empty) -> Metrics:
    """The metrics of one step: losses, means over tokens, the gradient norm, and whether it was skipped.

    active, taught: how many tokens are in the loss, and how many of them a teacher teaches.
    """

    def shown(name: str, x: jax.Array) -> jax.Array:
        if name in LOSSES:
            return jnp.where(empty, jnp.nan, x)
        return x / (taught if name in OF_TAUGHT else active)  # 0 / 0 = NaN without such tokens

    return {
        **{name: shown(name, x) for name, x in sums.items()},
        "grad_norm": norm,
        "active_tokens": active,
        "skipped_empty": (empty & ~keep).astype(jnp.float32),
        "skipped_nonfinite": (~jnp.isfinite(norm)).astype(jnp.float32),
    }
