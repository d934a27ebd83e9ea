"""What a run would hold in memory and compute on chips that need not be there, stage by stage.

Bytes are arithmetic until a stage is compiled (`--compile`), and the compiler's from then on; seconds are
the least that the chips' peaks allow (plan/roofline.py). Nothing is written but what is printed, no
weights are read and nothing runs on a device.

    plan(config, directory, Asked(...))    prints the plan of one experiment
    make_plan(job, slice, ...)             -> Plan, without any data
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging

from rosd_jax.config import UserError
from rosd_jax.fields import replace, value
from rosd_jax.models.weights import check_weights
from rosd_jax.plan import printed
from rosd_jax.plan.budget import Job
from rosd_jax.plan.chips import Slice, read_topology
from rosd_jax.plan.printed import Plan, StagePlan
from rosd_jax.plan.programs import Program, compile_stage
from rosd_jax.plan.roofline import Work, at_limits, realistic
from rosd_jax.plan.stages import STAGES, Stage, lower, make_job, stages
from rosd_jax.rollout.stops import Stops
from rosd_jax.settings import Settings
from rosd_jax.train.devices import split_cpu
from rosd_jax.train.inputs import Inputs, headline, read_inputs

# Fields that make a stage smaller, and what they are set to where it does not fit.
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
    """What the command line asks of a plan."""

    topology: str = "local"
    compile: tuple[str, ...] = ()  # names of stages, or "all"
    json: bool = False


def plan(config: Settings, directory: Path, asked: Asked) -> None:
    """Prints the plan. Raises UserError for an unknown slice or stage, or a mesh that does not fit."""
    wanted = compiled_stages(asked.compile)
    if asked.topology == "local":
        split_cpu(config)  # before JAX starts
    chips = read_topology(asked.topology)
    inputs = read_inputs(config)
    job = make_job(config, inputs.model, chips.devices)
    found = make_plan(job, chips, inputs.tokenizer.stop_ids, inputs.stops, _most_items(inputs), wanted)
    if asked.json:
        print(printed.as_json(found))
        return
    print(f"{headline(inputs, config, directory, 0)}\n{_about(config, inputs)}\n\n{printed.as_text(found)}")


def compiled_stages(names: Sequence[str]) -> tuple[str, ...]:
    """The stages that --compile names. Raises UserError for one that does not exist."""
    for name in names:
        if name not in (*STAGES, "all"):
            raise UserError(f"--compile names {name!r}; it must be all, or some of {', '.join(STAGES)}")
    return STAGES if "all" in names else tuple(names)


def make_plan(
    job: Job,
    chips: Slice,
    stop_ids: tuple[int, ...],
    stops: Stops | None,
    evaluated: int,
    compiled: Sequence[str] = (),
) -> Plan:
    """The plan of all stages, lowered where the chips' compiler is available; those named are compiled.

    Raises UserError where stages are to be compiled for GPUs that are not there.
    """
    if compiled and not chips.compiles:
        raise UserError(
            f"--compile needs the compiler of {chips.name}, which is only where such GPUs are; leave it out, "
            "or plan there with --topology=local"
        )
    lengths = at_limits(job.config), realistic(job.config)
    done = []
    for stage in stages(job, stop_ids, stops, evaluated):
        made = _lower(stage, job, chips, stage.name in compiled) if chips.compiles else (None, None)
        done.append(_stage_plan(stage, chips, *made, {n.name: stage.work(n) for n in lengths}))
    settled = Plan(job, chips, lengths, tuple(done), ())
    if settled.fits is False:
        return Plan(job, chips, lengths, tuple(done), tuple(_changes(job, stop_ids, stops, evaluated, done)))
    return settled


def _lower(stage: Stage, job: Job, chips: Slice, compiled: bool) -> tuple[float, Program | None]:
    """Seconds that lowering took, and the compiled stage where it is asked for."""
    logging.info("lowering %s", stage.name)
    began = time.perf_counter()
    program = lower(stage, job)
    seconds = time.perf_counter() - began
    return seconds, compile_stage(program, chips.platform) if compiled else None


def _stage_plan(
    stage: Stage, chips: Slice, lowered: float | None, compiled: Program | None, work: dict[str, Work]
) -> StagePlan:
    limit = None if chips.chip is None else chips.chip.memory
    held = sum(stage.bytes.values())
    if compiled is not None and not compiled.refused:
        held = sum(stage.resident.values()) + compiled.working
    fits = None if limit is None else held <= limit and not (compiled and compiled.refused)
    return StagePlan(stage.name, stage.bytes, held, fits, lowered, compiled, work)


def _changes(
    job: Job, stop_ids: tuple[int, ...], stops: Stops | None, evaluated: int, done: Sequence[StagePlan]
) -> list[str]:
    """Fields to change, those first that leave the fullest stage the least; only such as help it."""
    fullest = max((plan for plan in done if plan.fits is False), key=lambda plan: plan.held)
    before = sum(fullest.bytes.values())
    found: list[tuple[int, str]] = []
    for field, change in LEVERS:
        config = _changed(job.config, field, change)
        if config is None:
            continue
        model = job.model.replace(remat=config.model.remat)
        try:
            smaller = make_job(config, model, job.mesh.devices.flatten().tolist())
            others = {stage.name: stage for stage in stages(smaller, stop_ids, stops, evaluated)}
        except UserError:  # the change would break another rule
            continue
        after = sum(others[fullest.name].bytes.values())
        if after < before:
            gain = f"{fullest.name} at {after / 1e9:.1f} GB a chip for {before / 1e9:.1f}"
            found.append((after, f"{field} to {value(config, field)}: {gain}"))
    return [sentence for _, sentence in sorted(found)]


def _changed(config: Settings, field: str, change: Callable[[Any], Any]) -> Settings | None:
    """The config with that change, or None where the field has that value already."""
    new = change(value(config, field))
    if new == value(config, field):
        return None
    changed = replace(config, field, new)
    if field == "mesh.tensor" and changed.mesh.data != -1:  # at the cost of row devices
        changed = replace(changed, "mesh.fsdp", -1)
    return changed


def _most_items(inputs: Inputs) -> int:
    """Of the sets that are evaluated."""
    sets = [*inputs.evals.values(), *inputs.validation.values()]
    return max(map(len, sets), default=1)


def _about(config: Settings, inputs: Inputs) -> str:
    """What a run would read and do."""
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
        f"evaluation  {sets}; {config.eval.samples} samples an item\n"
        f"left out    {sum(map(len, inputs.overlong.values()))} prompts above data.max_prompt_tokens"
    )
