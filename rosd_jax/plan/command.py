"""What a run would keep in memory and compute, stage by stage, on chips that need not be present.

Bytes are estimates; for a stage that is compiled (`--compile`) they are the compiler's. Times are lower
bounds from the chips' peak rates (plan/roofline.py). The plan is only printed: no file is written, no weights
are read and nothing runs on a device.

    plan(config, directory, Asked(...))    prints the plan of one run
    make_plan(job, slice, ...)             -> Plan; needs no data
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosd_jax.errors import UserError
from rosd_jax.fields import replace, value
from rosd_jax.models.weights import check_weights
from rosd_jax.plan import printed
from rosd_jax.plan.budget import Job
from rosd_jax.plan.chips import Slice, read_topology
from rosd_jax.plan.printed import Plan, StagePlan
from rosd_jax.plan.programs import Program, compile_stage
from rosd_jax.plan.roofline import Work, at_limits, realistic
from rosd_jax.plan.stages import Stage, lower, make_job, stage_names, stages
from rosd_jax.rollout.stops import Stops
from rosd_jax.settings import Settings
from rosd_jax.train.devices import split_cpu
from rosd_jax.train.engines import capability, check_attention
from rosd_jax.train.inputs import Inputs, headline, read_inputs

# Fields that save memory, and the value that is tried for each if a stage does not fit.
LEVERS: tuple[tuple[str, Callable[[Any], Any]], ...] = (
    ("batch.device_rows", lambda n: 1),
    ("model.remat", lambda remat: "block"),
    ("model.remat", lambda remat: "offload"),
    ("model.frozen", lambda where: "host"),
    ("optimizer.grad_dtype", lambda dtype: "bfloat16"),
    ("optimizer.mu_dtype", lambda dtype: "bfloat16"),
    ("loss.chunk", lambda n: max(128, n // 2)),
    ("rollout.cache_tokens", lambda n: n // 2),
    ("rollout.prompt_tokens", lambda n: n // 2),
    ("mesh.tensor", lambda n: 2 * n),
)


@dataclass(frozen=True)
class Asked:
    """The flags of `--mode=plan`."""

    topology: str = "local"
    compile: tuple[str, ...] = ()  # names of stages, or "all"
    json: bool = False


def plan(config: Settings, directory: Path, asked: Asked, announce: Callable[[str], None]) -> None:
    """Prints the plan. announce: called with what is done from now on.

    Raises UserError for an unknown slice or stage, and if the mesh or rollout.attention does not fit the
    slice or the model.
    """
    wanted = compiled_stages(asked.compile, stage_names(config))
    if asked.topology == "local":
        split_cpu(config)  # before JAX is initialized
    chips = read_topology(asked.topology)
    announce("reading the model's files and the data")
    inputs = read_inputs(config)
    job = make_job(config, inputs.model, chips.devices)
    platform = "gpu" if chips.platform == "cuda" else chips.platform
    check_attention(config, inputs.model, platform, capability(chips.devices[0]))
    largest = _largest_set(inputs)
    found = make_plan(job, chips, inputs.tokenizer.stop_ids, inputs.stops, largest, wanted, announce)
    if asked.json:
        print(printed.as_json(found))
        return
    print(f"{headline(inputs, config, directory, 0)}\n{_about(config, inputs)}\n\n{printed.as_text(found)}")


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
) -> Plan:
    """The plan of all stages.

    Stages are lowered if the chips' compiler is available, and those in `compiled` are compiled. `evaluated`
    is the number of items of the largest evaluation set. Raises UserError if stages are to be compiled for
    GPUs that are absent.
    """
    if compiled and not chips.compiles:
        raise UserError(
            f"--compile needs the compiler of {chips.name}, which is only available on a machine with such "
            "GPUs; leave it out, or plan there with --topology=local"
        )
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
    found = Plan(job, chips, lengths, tuple(planned), ())
    if found.fits is False:
        return dataclasses.replace(found, changes=_changes(job, stop_ids, stops, evaluated, planned))
    return found


def _stage_plan(
    stage: Stage, chips: Slice, lowered: float | None, compiled: Program | None, work: dict[str, Work]
) -> StagePlan:
    limit = None if chips.chip is None else chips.chip.memory
    total = sum(stage.bytes.values())
    if compiled is not None and not compiled.refused:
        total = sum(stage.resident.values()) + compiled.working
    fits = None if limit is None else total <= limit and not (compiled and compiled.refused)
    return StagePlan(stage.name, stage.bytes, total, fits, lowered, compiled, work)


def _changes(
    job: Job, stop_ids: tuple[int, ...], stops: Stops | None, evaluated: int, planned: Sequence[StagePlan]
) -> tuple[str, ...]:
    """Fields to change, one sentence each: those that make the largest stage smaller, the best first.

    Each change is tried alone, by arithmetic.
    """
    largest = max((plan for plan in planned if plan.fits is False), key=lambda plan: plan.total)
    before = sum(largest.bytes.values())
    found: list[tuple[int, str]] = []
    for field, change in LEVERS:
        config = _changed(job.config, field, change)
        if config is None:
            continue
        model = job.model.replace(remat=config.model.remat)
        try:
            changed = make_job(config, model, job.mesh.devices.flatten().tolist())
            others = {stage.name: stage for stage in stages(changed, stop_ids, stops, evaluated)}
        except UserError:  # the change would break another rule
            continue
        after = sum(others[largest.name].bytes.values())
        if after < before:
            gain = f"{largest.name} takes {after / 1e9:.1f} GB per chip instead of {before / 1e9:.1f}"
            found.append((after, f"{field} to {value(config, field)}: {gain}"))
    return tuple(sentence for _, sentence in sorted(found))


def _changed(config: Settings, field: str, change: Callable[[Any], Any]) -> Settings | None:
    """The config with that change; None if the field has the new value already."""
    new = change(value(config, field))
    if new == value(config, field):
        return None
    changed = replace(config, field, new)
    if field == "mesh.tensor" and changed.mesh.data != -1:  # more tensor devices leave fewer row devices
        changed = replace(changed, "mesh.fsdp", -1)
    return changed


def _largest_set(inputs: Inputs) -> int:
    """Number of items of the largest evaluation or validation set; 1 if there are none."""
    sets = [*inputs.evals.values(), *inputs.validation.values()]
    return max(map(len, sets), default=1)


def _about(config: Settings, inputs: Inputs) -> str:
    """The lines about weights, data and sizes."""
    try:
        check_weights(config.model.path, inputs.model)
        weights = "can be loaded"
    except UserError as error:
        weights = f"cannot be loaded: {error}"
    rows = config.batch.prompts * config.batch.samples
    sets = ", ".join(f"{name} {len(items)}" for name, items in inputs.evals.items()) or "none"
    return (
        f"weights     {weights}\n"
        f"a step      {config.batch.prompts} prompts x {config.batch.samples} samples = {rows} rollouts of "
        f"up to {config.rollout.max_new_tokens} tokens\n"
        f"evaluation  {sets}; {config.eval.samples} samples per item\n"
        f"left out    {sum(map(len, inputs.overlong.values()))} prompts longer than data.max_prompt_tokens"
    )
