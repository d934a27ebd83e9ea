"""Every compiled stage of a run, from its config alone: what it holds, what it works, how it is lowered.

make_job(config, model, devices)              -> Job
stages(job, stop_ids, stops, evaluated)       -> a Stage each, in the order of a step
lower(stage, job)                             -> jax.stages.Lowered; no weights, no device
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from rosd_jax.models.lora import combine
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import make_mesh, row_devices, validate_mesh_for
from rosd_jax.plan import budget, roofline
from rosd_jax.plan.budget import Bytes, Job
from rosd_jax.plan.roofline import Lengths, Split, Work
from rosd_jax.rollout.decode_loop import Capacity, DecodeSpec
from rosd_jax.rollout.engine import CallShape, Engine
from rosd_jax.rollout.stops import Stops
from rosd_jax.settings import Settings
from rosd_jax.train.devices import check_rows
from rosd_jax.train.engines import Ends, make_engines
from rosd_jax.train.microbatches import group_rows
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import make_optimizer, make_update

STAGES = ("rollouts", "reflections", "evaluation", "teacher", "student", "optimizer")


@dataclass(frozen=True)
class Stage:
    """One compiled stage at its largest."""

    name: str
    resident: Bytes  # what lies in memory whatever the stage does
    working: Bytes  # what it holds in addition, by arithmetic
    work: Callable[[Lengths], Work]  # of one chip in one step
    lower: Callable[[], Any]  # -> jax.stages.Lowered, under the job's mesh

    @property
    def bytes(self) -> Bytes:
        """By kind, all together."""
        both = {kind: self.resident.get(kind, 0) + self.working.get(kind, 0) for kind in budget.KINDS}
        return {kind: n for kind, n in both.items() if n}


def make_job(config: Settings, model: Qwen3Config, devices: Sequence[Any]) -> Job:
    """The experiment on these devices. Raises UserError where the mesh does not fit them or the model."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, devices)
    validate_mesh_for(model, mesh)
    check_rows(config, row_devices(mesh))
    optimizer = make_optimizer(config)
    trees = Trees(config, model, mesh, optimizer)
    return Job(config, model, mesh, trees, make_update(config, model, optimizer, mesh, trees.shardings))


def stages(job: Job, stop_ids: tuple[int, ...], stops: Stops | None, evaluated: int) -> list[Stage]:
    """All stages. evaluated: items of the largest set that is evaluated."""
    return [*_decoding(job, stop_ids, stops, evaluated), *_updating(job)]


def lower(stage: Stage, job: Job) -> Any:
    """The stage's program, as a run makes it (train/loop.py, train/build.py); needs no weights."""
    precision = "highest" if job.model.dtype == "float32" else None
    promoted = jax.numpy_dtype_promotion("standard")  # JAX's default, whatever the caller has
    with jax.set_mesh(job.mesh), jax.default_matmul_precision(precision), promoted:
        return stage.lower()


# --- decoding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LargestCall:
    """The largest call of one engine."""

    name: str
    engine: Engine
    samples: int  # responses to a prompt
    shape: CallShape
    spec: DecodeSpec
    frozen: bool  # whose weights

    @property
    def capacity(self) -> Capacity:
        """Of one shard."""
        shape = self.shape
        return self.spec.capacity(shape.prompts, shape.longest, shape.rows // self.engine.shards)


def _decoding(job: Job, stop_ids, stops, evaluated: int) -> list[Stage]:
    return [_decoding_stage(job, call) for call in _calls(job, stop_ids, stops, evaluated)]


def _calls(job: Job, stop_ids, stops: Stops | None, evaluated: int) -> list[LargestCall]:
    """The engines of train/engines.py as train/step.py and train/loop.py call them."""
    c = job.config
    rows = c.batch.prompts * c.batch.samples
    engines = make_engines(c, job.model, job.mesh, Ends(stop_ids, stops))

    def call(name: str, engine: Engine, requests: int, samples: int, frozen: bool) -> LargestCall:
        return LargestCall(name, engine, samples, *engine.largest(requests, samples), frozen)

    answers, frozen = evaluated * c.eval.samples, c.reflect.weights == "frozen"
    return [
        call("rollouts", engines.rollouts, rows, c.batch.samples, False),
        call("reflections", engines.reflections, rows, 1, frozen),
        call("evaluation", engines.evaluation, answers, c.eval.samples, False),
    ]


def _decoding_stage(job: Job, call: LargestCall) -> Stage:
    resident = budget.resident(job)
    if (call.frozen or job.adapters) and job.config.model.frozen == "host":
        resident["frozen"] = budget.frozen_bytes(job)  # brought to the devices for as long

    def work(lengths: Lengths) -> Work:
        prompt, length_B = {
            "rollouts": (lengths.prompt, lengths.response_B),
            "reflections": (lengths.reflector, lengths.reflection_B),
            "evaluation": (lengths.prompt, lengths.evaluated_B),
        }[call.name]
        mine, capacity = len(length_B) // call.engine.shards, call.capacity
        mean = sum(length_B) / len(length_B)
        fitting = int(capacity.response_pages * call.engine.limits.page / mean)
        at_once = max(1, min(capacity.slots, fitting))
        prompts = -(-mine // call.samples)
        return roofline.decode_work(job.model, split(job), prompts, prompt, length_B, at_once)

    return Stage(
        call.name,
        resident,
        budget.decoding(job, call.engine, call.shape, call.capacity),
        work,
        lambda: _lower_decoding(job, call),
    )


def _lower_decoding(job: Job, call: LargestCall) -> Any:
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind("device")),
        job.trees.frozen_like,
    )
    params = frozen if call.frozen else job.trees.like.params
    if job.adapters and not call.frozen:
        params = combine(frozen, params)
    return call.engine.lower(params, call.shape, call.spec)


def split(job: Job) -> Split:
    """The mesh as the roofline wants it."""
    return Split(row_devices(job.mesh), job.tensor, job.mesh.shape["fsdp"], job.item)


# --- the update -----------------------------------------------------------------------------------


def _updating(job: Job) -> list[Stage]:
    resident = budget.resident(job) | budget.gradients(job)
    trees, (S, T) = job.trees, job.update.longest
    programs = cache(lambda: job.update.trace(trees.like, trees.frozen_like, S, T))

    def stage(name, held, work, function):
        return Stage(name, resident, held, partial(work, job), lambda: programs()[function].lower())

    return [
        stage("teacher", budget.teacher(job), _teaching, "teach"),
        stage("student", budget.student(job), _learning, "learn"),
        stage("optimizer", budget.optimizer(job), _applying, "apply"),
    ]


def microbatch_widths(job: Job, lengths: Lengths) -> list[tuple[int, int, int]]:
    """Student's width, teacher's width and active tokens of a row device, micro-batch by micro-batch.

    Every response is taught in full, the most that can be.
    """
    response_B = np.array(lengths.response_B)
    student_B, teacher_B = (prompt + response_B - 1 for prompt in (lengths.prompt, lengths.teacher))
    groups = group_rows(student_B, teacher_B, job.update.rows, job.update.longest)
    return [(S, T, -(-int(response_B[rows].sum()) // row_devices(job.mesh))) for rows, S, T in groups]


def _teaching(job: Job, lengths: Lengths) -> Work:
    rows = job.config.batch.device_rows
    widths = microbatch_widths(job, lengths)
    return sum((roofline.teach_work(job.model, split(job), rows, T) for _, T, _ in widths), Work())


def _learning(job: Job, lengths: Lengths) -> Work:
    rows, remat = job.config.batch.device_rows, job.config.model.remat
    grads = budget.gradients(job)["gradients"]
    microbatches = (
        roofline.learn_work(job.model, split(job), rows, S, active, remat, grads, job.adapters)
        for S, _, active in microbatch_widths(job, lengths)
    )
    return sum(microbatches, Work())


def _applying(job: Job, lengths: Lengths) -> Work:
    kept = budget.resident(job)
    return roofline.apply_work(kept["parameters"] + kept["optimizer"], budget.gradients(job)["gradients"])
