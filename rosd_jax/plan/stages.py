"""Every compiled stage of a run, from its config alone: its memory, its work and its lowered program.

    make_job(config, model, chips)                -> Job
    stages(job, stop_ids, stops, evaluated)       -> one Stage each, in the order of a step
    stage_names(config)                           -> the names of STAGES that a method has
    lower(stage, job)                             -> jax.stages.Lowered; needs no weights and no device

Dimensions: B rows. S and T are the widths of the student's and the teacher's rows in tokens.
"""

from __future__ import annotations

from collections.abc import Callable
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
from rosd_jax.plan.chips import Slice
from rosd_jax.plan.roofline import Lengths, MeshSplit, Work
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
    """One compiled stage at its largest shapes. Bytes are per chip."""

    name: str
    resident: Bytes  # in memory before and after the stage too
    working: Bytes  # needed in addition while it runs, estimated
    work: Callable[[Lengths], Work]  # of one chip in one step
    lower: Callable[[], jax.stages.Lowered]  # call it under the job's mesh

    @property
    def bytes(self) -> Bytes:
        """Both together, by kind."""
        both = {kind: self.resident.get(kind, 0) + self.working.get(kind, 0) for kind in budget.MEMORY_KINDS}
        return {kind: n for kind, n in both.items() if n}


def make_job(config: Settings, model: Qwen3Config, chips: Slice) -> Job:
    """The run on this slice. Raises UserError if the mesh does not fit the slice or the model."""
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor, chips.devices)
    validate_mesh_for(model, mesh)
    check_rows(config, row_devices(mesh))
    optimizer = make_optimizer(config)
    trees = Trees(config, model, mesh, optimizer)
    update = make_update(config, model, optimizer, mesh, trees.shardings)
    return Job(config, model, mesh, chips.platform, trees, update)


def stages(job: Job, stop_ids: tuple[int, ...], stops: Stops | None, evaluated: int) -> list[Stage]:
    """All stages; `evaluated` is the number of items of the largest evaluation set."""
    return [*_decoding(job, stop_ids, stops, evaluated), *_updating(job)]


def stage_names(config: Settings) -> tuple[str, ...]:
    """The stages that a step of this config has."""
    lacking = {"reflections": not config.reflects, "teacher": not config.distills}
    return tuple(name for name in STAGES if not lacking.get(name))


def lower(stage: Stage, job: Job) -> jax.stages.Lowered:
    """The stage's program, lowered in the same context as in a run (train/loop.py, train/build.py)."""
    precision = "highest" if job.model.dtype == "float32" else None
    promotion = jax.numpy_dtype_promotion("standard")  # JAX's default; tests set another
    with jax.set_mesh(job.mesh), jax.default_matmul_precision(precision), promotion:
        return stage.lower()


# --- decoding -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LargestCall:
    """The largest call of one engine."""

    name: str
    engine: Engine
    samples: int  # responses per prompt
    shape: CallShape
    spec: DecodeSpec
    frozen: bool  # whether the frozen weights decode, not the trained ones

    @property
    def capacity(self) -> Capacity:
        """The capacity of one shard."""
        shape = self.shape
        return self.spec.capacity(shape.prompts, shape.longest, shape.rows // self.engine.shards)


def _decoding(job: Job, stop_ids: tuple[int, ...], stops: Stops | None, evaluated: int) -> list[Stage]:
    calls = _calls(job, stop_ids, stops, evaluated)
    return [_decoding_stage(job, call) for call in calls if call.name in stage_names(job.config)]


def _calls(job: Job, stop_ids: tuple[int, ...], stops: Stops | None, evaluated: int) -> list[LargestCall]:
    """The largest calls of the engines (train/engines.py) by train/step.py and train/loop.py."""
    c = job.config
    rows = c.batch.prompts * c.batch.samples
    engines = make_engines(c, job.model, job.mesh, Ends(stop_ids, stops))

    def call(name: str, engine: Engine, requests: int, samples: int, frozen: bool) -> LargestCall:
        return LargestCall(name, engine, samples, *engine.largest(requests, samples), frozen)

    frozen_reflector = c.reflect.weights == "frozen"
    return [
        call("rollouts", engines.rollouts, rows, c.batch.samples, False),
        call("reflections", engines.reflections, rows, 1, frozen_reflector),
        call("evaluation", engines.evaluation, evaluated * c.eval.samples, c.eval.samples, False),
    ]


def _decoding_stage(job: Job, call: LargestCall) -> Stage:
    resident = budget.resident(job)
    if (call.frozen or job.adapters) and job.config.model.frozen == "host":
        resident["frozen"] = budget.frozen_bytes(job)  # transferred to the devices for this stage

    def work(lengths: Lengths) -> Work:
        prompt, length_B = {
            "rollouts": (lengths.prompt, lengths.response_B),
            "reflections": (lengths.reflector, lengths.reflection_B),
            "evaluation": (lengths.prompt, lengths.evaluated_B),
        }[call.name]
        capacity = call.capacity
        mean = sum(length_B) / len(length_B)
        fitting = int(capacity.response_pages * call.engine.limits.page / mean)
        at_once = max(1, min(capacity.slots, fitting))
        shard_rows = len(length_B) // call.engine.shards
        prompts = -(-shard_rows // call.samples)
        return roofline.decode_work(job.model, split(job), prompts, prompt, length_B, at_once)

    return Stage(
        call.name,
        resident,
        budget.decoding(job, call.engine, call.shape, call.capacity),
        work,
        lambda: _lower_decoding(job, call),
    )


def _lower_decoding(job: Job, call: LargestCall) -> jax.stages.Lowered:
    frozen = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding.with_memory_kind("device")),
        job.trees.frozen_like,
    )
    params = frozen if call.frozen else job.trees.like.params
    if job.adapters and not call.frozen:
        params = combine(frozen, params)
    return call.engine.lower(params, call.shape, call.spec)


def split(job: Job) -> MeshSplit:
    """The sizes of the job's mesh and of its compute type, for the roofline."""
    return MeshSplit(row_devices(job.mesh), job.tensor, job.mesh.shape["fsdp"], job.item)


# --- the update -----------------------------------------------------------------------------------


def _updating(job: Job) -> list[Stage]:
    resident = budget.resident(job) | budget.gradients(job)
    trees = job.trees
    S, T = job.update.longest

    @cache  # the three stages share one trace
    def programs() -> dict[str, Any]:
        return job.update.trace(trees.like, trees.frozen_like, S, T)

    def stage(name: str, working: Bytes, work: Callable[[Job, Lengths], Work], function: str) -> Stage:
        return Stage(name, resident, working, partial(work, job), lambda: programs()[function].lower())

    found = [
        stage("teacher", budget.teacher(job), _teaching, "teach"),
        stage("student", budget.student(job), _learning, "learn"),
        stage("optimizer", budget.optimizer(job), _applying, "apply"),
    ]
    return [each for each in found if each.name in stage_names(job.config)]


def microbatch_widths(job: Job, lengths: Lengths) -> list[tuple[int, int, int]]:
    """The student's width, the teacher's width and a row device's active tokens, for each micro-batch.

    All tokens of every response are in the loss, which is the most work.
    """
    response_B = np.array(lengths.response_B)
    student_B = lengths.prompt + response_B - 1
    teacher_B = lengths.teacher + response_B - 1 if job.config.distills else np.zeros_like(response_B)
    groups = group_rows(student_B, teacher_B, job.update.rows, job.update.longest)
    return [(S, T, -(-int(response_B[rows].sum()) // row_devices(job.mesh))) for rows, S, T in groups]


def _teaching(job: Job, lengths: Lengths) -> Work:
    rows = job.config.batch.device_rows
    widths = microbatch_widths(job, lengths)
    return sum((roofline.teach_work(job.model, split(job), rows, T) for _, T, _ in widths), Work())


def _learning(job: Job, lengths: Lengths) -> Work:
    rows = job.config.batch.device_rows
    remat = job.config.model.remat
    grads = budget.gradients(job)["gradients"]
    microbatches = (
        roofline.learn_work(job.model, split(job), rows, S, active, remat, grads, job.adapters)
        for S, _, active in microbatch_widths(job, lengths)
    )
    return sum(microbatches, Work())


def _applying(job: Job, lengths: Lengths) -> Work:
    resident = budget.resident(job)
    state_bytes = resident["parameters"] + resident["optimizer"] + resident.get("moving average", 0)
    return roofline.apply_work(state_bytes, budget.gradients(job)["gradients"])
