"""What a run would keep in memory and compute, stage by stage, on chips that need not be present.

Bytes are estimates; for a stage that is compiled (`--compile`) they are the compiler's. Times are lower
bounds from the chips' peak rates (plan/roofline.py). The plan is only printed: no file is written, no weights
are read and nothing runs on a device.

    plan(config, Asked(...), announce)     prints the plan of one run
    make_plan(job, slice, ...)             -> Plan; needs no data
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rosd_jax.errors import UserError
from rosd_jax.models.weights import check_weights
from rosd_jax.plan import printed
from rosd_jax.plan.budget import Job
from rosd_jax.plan.chips import CHIPS, NO_LIBTPU, Slice, read_topology, slice_name
from rosd_jax.plan.printed import Plan, StagePlan
from rosd_jax.plan.programs import Program, compile_stage
from rosd_jax.plan.remedies import Trial, changes, remedies
from rosd_jax.plan.roofline import Work, at_limits, realistic
from rosd_jax.plan.stages import Stage, lower, make_job, stage_names, stages
from rosd_jax.plan.whole_run import scored_sets, scorings
from rosd_jax.rollout.stops import Stops
from rosd_jax.settings import MeshSettings, Settings
from rosd_jax.train.devices import split_cpu
from rosd_jax.train.engines import capability, check_attention
from rosd_jax.train.inputs import Inputs, read_inputs, trained_on

WEIGHT_FILES = ("*.safetensors*", "*.bin", "*.pt*")


@dataclass(frozen=True)
class Asked:
    """The flags of `--mode=plan`."""

    topology: str = "local"
    compile: tuple[str, ...] = ()  # names of stages, or "all"
    json: bool = False


def plan(config: Settings, asked: Asked, announce: Callable[[str], None]) -> None:
    """Prints the plan. announce: called with what is done from now on.

    Raises UserError for an unknown slice or stage, and if the mesh or rollout.attention does not fit the
    slice or the model.
    """
    wanted = compiled_stages(asked.compile, stage_names(config))
    if asked.topology == "local":
        split_cpu(config)  # before JAX is initialized
    chips = read_topology(asked.topology)
    check_mesh(config.mesh, chips)
    announce("reading the model's files and the data")
    inputs = read_inputs(config)
    job = make_job(config, inputs.model, chips)
    platform = "gpu" if chips.platform == "cuda" else chips.platform
    check_attention(config, inputs.model, platform, capability(chips.devices[0]))
    largest = _largest_set(inputs)
    sets = scored_sets(config, inputs)
    found = make_plan(job, chips, inputs.tokenizer.stop_ids, inputs.stops, largest, wanted, announce, sets)
    if asked.json:
        print(printed.as_json(found))
        return
    print(f"{_about(config, inputs)}\n\n{printed.as_text(found)}")


def check_mesh(mesh: MeshSettings, chips: Slice) -> None:
    """Raises UserError, which names a topology for the mesh, if its product is not the number of chips."""
    given = [n for n in (mesh.data, mesh.fsdp, mesh.tensor) if n != -1]
    needed = math.prod(given)
    count = len(chips.devices)
    if needed == count or needed < 1 or (len(given) < 3 and count % needed == 0):
        return
    kinds = [chips.chip] if chips.chip else list(CHIPS.values())
    suitable = ", ".join(name for kind in kinds if (name := slice_name(kind, needed)))
    such = f", such as {suitable}," if suitable else ""
    whose = "this machine has" if chips.name == "local" else f"{chips.name} has"
    multiple = "" if len(given) == 3 else "a multiple of "
    raise UserError(
        f"mesh.data={mesh.data}, mesh.fsdp={mesh.fsdp}, mesh.tensor={mesh.tensor} is a mesh of {multiple}"
        f"{needed} chips, and {whose} {count}; name a slice of that size{such} with --topology, or change "
        "the mesh"
    )


def compiled_stages(names: Sequence[str], known: tuple[str, ...]) -> tuple[str, ...]:
    """The stages that --compile names. Raises UserError if the run has no such stage."""
    for name in names:
        if name not in (*known, "all"):
            raise UserError(f"--compile names {name!r}; it must be all, or some of {', '.join(known)}")
    return known if "all" in names else tuple(names)


def make_plan(
    job: Job,
    chips: Slice,
    stop_ids: tuple[int, ...],
    stops: Stops | None,
    evaluated: int,
    compiled: Sequence[str] = (),
    announce: Callable[[str], None] = lambda what: None,
    sets: Mapping[int, int] | None = None,
) -> Plan:
    """The plan of all stages.

    Stages are lowered if the chips' compiler is available, and those in `compiled` are compiled. `evaluated`
    is the number of items of the largest evaluation set, `sets` how often each number of items is scored in
    the run. Raises UserError if stages are to be compiled for GPUs that are absent, or without libtpu.
    """
    if compiled and not chips.compiles:
        raise UserError(_no_compiler(chips))
    lengths = (at_limits(job.config), realistic(job.config))
    planned = []
    found_stages = list(stages(job, stop_ids, stops, evaluated))
    for number, stage in enumerate(found_stages, start=1):
        seconds = None
        program = None
        if chips.compiles:
            announce(f"lowering {stage.name} (stage {number}/{len(found_stages)})")
            start = time.perf_counter()
            lowered = lower(stage, job)
            seconds = time.perf_counter() - start
            if stage.name in compiled:
                announce(f"compiling {stage.name} (stage {number}/{len(found_stages)})")
                program = compile_stage(lowered, chips.platform)
        work = {n.name: stage.work(n) for n in lengths}
        planned.append(_stage_plan(stage, chips, seconds, program, work))
    evaluation = next(stage for stage in found_stages if stage.name == "evaluation")
    scored = scorings(job.config, evaluation, sets or {})
    found = Plan(job, chips, lengths, tuple(planned), scored)
    if found.fits is not False:
        return found
    largest = max((plan for plan in planned if plan.fits is False), key=lambda plan: plan.total)
    trial = Trial(job.config, job.model, chips, stop_ids, stops, evaluated)
    return dataclasses.replace(found, changes=changes(trial, largest.name), remedies=remedies(trial))


def _no_compiler(chips: Slice) -> str:
    if chips.platform == "tpu":
        return NO_LIBTPU
    return (
        f"--compile needs the compiler of {chips.name}, which is only available on a machine with such "
        "GPUs; leave it out, or plan there with --topology=local"
    )


def _stage_plan(
    stage: Stage, chips: Slice, lowered: float | None, compiled: Program | None, work: dict[str, Work]
) -> StagePlan:
    limit = None if chips.chip is None else chips.chip.memory
    total = sum(stage.bytes.values())
    if compiled is not None and not compiled.refused:
        total = sum(stage.resident.values()) + compiled.working
    fits = None if limit is None else total <= limit and not (compiled and compiled.refused)
    return StagePlan(stage.name, stage.bytes, total, fits, lowered, compiled, work)


def _largest_set(inputs: Inputs) -> int:
    """Number of items of the largest evaluation or validation set; 1 if there are none."""
    sets = [*inputs.evals.values(), *inputs.validation.values()]
    return max(map(len, sets), default=1)


def _about(config: Settings, inputs: Inputs) -> str:
    """The lines about the run, its weights, its data and its sizes."""
    rows = config.batch.prompts * config.batch.samples
    sets = ", ".join(f"{name} {len(items)}" for name, items in inputs.evals.items()) or "none"
    return (
        f"{config.name}: {len(inputs.train)} problems of {trained_on(config)[0]}, {config.steps} steps\n"
        f"weights     {_weights(config, inputs)}\n"
        f"a step      {config.batch.prompts} prompts x {config.batch.samples} samples = {rows} rollouts of "
        f"up to {config.rollout.max_new_tokens} tokens\n"
        f"evaluation  {sets}; {config.eval.samples} samples per item\n"
        f"left out    {sum(map(len, inputs.overlong.values()))} prompts longer than data.max_prompt_tokens"
    )


def _weights(config: Settings, inputs: Inputs) -> str:
    """Whether a run could load the weights. A plan needs none, but reports those that are damaged."""
    path = Path(config.model.path)
    if not any(file for pattern in WEIGHT_FILES for file in path.glob(pattern)):
        return f"not in {path}, and not needed for a plan; a run needs them there"
    try:
        check_weights(config.model.path, inputs.model)
    except UserError as error:
        return f"cannot be loaded: {error}"
    return "can be loaded"
