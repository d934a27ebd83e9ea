"""A finished plan, as text and as JSON.

as_text(plan), as_json(plan)  -> str
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from rosd_jax.plan.budget import MEMORY_KINDS, Bytes, Job
from rosd_jax.plan.chips import Slice
from rosd_jax.plan.collectives import COLLECTIVES
from rosd_jax.plan.programs import Program
from rosd_jax.plan.roofline import Lengths, Work
from rosd_jax.plan.whole_run import Scoring

GPU_NOTE = "By default JAX uses only 75 % of a GPU's memory; this plan assumes XLA_CLIENT_MEM_FRACTION=0.95"

TITLES = {"limits": "at the length limits", "realistic": "at realistic lengths"}
NOT_COUNTED = (
    "The bounds count matmuls, memory traffic and GB sent, each by formula. They leave out norms, softmax,\n"
    "sampling, the latency of collectives, compiling, and the host (grading, reading weights, checkpoints)."
)


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan. Bytes are per chip."""

    name: str
    bytes: Bytes  # by kind, estimated
    total: int  # from the compiler if the stage is compiled, otherwise estimated
    fits: bool | None  # None: the chip's memory is not known
    lowered: float | None  # seconds that lowering took; None: not lowered
    compiled: Program | None
    work: dict[str, Work]  # of one step, by name of the lengths


@dataclass(frozen=True)
class Plan:
    """All stages of one run on one slice."""

    job: Job
    chips: Slice
    lengths: Sequence[Lengths]
    stages: Sequence[StagePlan]
    scorings: Sequence[Scoring]  # of the whole run
    changes: Sequence[str] = ()  # fields to change if it does not fit, each alone
    remedies: Sequence[str] = ()  # what makes it fit then

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits; None if the chip's memory is not known."""
        each = [stage.fits for stage in self.stages]
        return None if None in each else all(each)

    @property
    def verdict(self) -> str:
        """`fits` in words."""
        return {None: "unknown", True: "fits", False: "does not fit"}[self.fits]

    def seconds(self, lengths: Lengths) -> dict[str, float]:
        """Lower bounds on the time of each stage and of a step; empty if the chip is not known."""
        chip = self.chips.chip
        if chip is None:
            return {}
        each = {stage.name: stage.work[lengths.name].seconds(chip) for stage in self.stages}
        return each | {"step": sum(s for name, s in each.items() if name != "evaluation")}

    def run_seconds(self, lengths: Lengths) -> dict[str, float]:
        """Lower bounds on the time of all steps, of all evaluations and of both.

        Empty if the chip is not known. Evaluations before the first step and on validation sets are included.
        """
        chip = self.chips.chip
        if chip is None:
            return {}
        steps = self.job.config.steps * self.seconds(lengths)["step"]
        evaluations = sum(s.times * s.work[lengths.name].seconds(chip) for s in self.scorings)
        return {"steps": steps, "evaluations": evaluations, "run": steps + evaluations}

    @property
    def parameters(self) -> int:
        """Number of parameters of the model, without adapters."""
        return sum(x.size for x in jax.tree.leaves(self.job.trees.base))


def as_json(plan: Plan) -> str:
    """One JSON object."""
    chip = plan.chips.chip
    return json.dumps(
        dict(
            topology=plan.chips.name,
            chip=None if chip is None else asdict(chip),
            chips=plan.job.mesh.size,
            mesh=dict(plan.job.mesh.shape),
            parameters=plan.parameters,
            verdict=plan.verdict,
            stages=[_stage_json(stage) for stage in plan.stages],
            lengths={lengths.name: asdict(lengths) for lengths in plan.lengths},
            seconds={lengths.name: plan.seconds(lengths) for lengths in plan.lengths},
            run_seconds={lengths.name: plan.run_seconds(lengths) for lengths in plan.lengths},
            change=list(plan.changes),
            remedy=list(plan.remedies),
        )
    )


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    return dict(
        name=stage.name,
        bytes=stage.bytes,
        held=stage.total,
        counted_by="arithmetic" if _by_arithmetic(stage) else "compiler",
        fits=stage.fits,
        lowering_seconds=stage.lowered,
        compiled=None if stage.compiled is None else asdict(stage.compiled),
        work={name: asdict(work) for name, work in stage.work.items()},
    )


def _by_arithmetic(stage: StagePlan) -> bool:
    return stage.compiled is None or bool(stage.compiled.refused)


def as_text(plan: Plan) -> str:
    """Tables and a verdict."""
    parts = [_head(plan), _memory(plan), *(_roofline(plan, lengths) for lengths in plan.lengths)]
    parts += [_whole_run(plan), _compiling(plan), _verdict(plan)]
    return "\n\n".join(part for part in parts if part)


def _head(plan: Plan) -> str:
    chip = plan.chips.chip
    mesh = plan.job.mesh.shape
    kind = plan.chips.platform if chip is None else f"{chip.name}, {chip.memory / 1e9:.1f} GB each"
    note = f"\n{GPU_NOTE}" if chip is not None and chip.platform == "gpu" else ""
    return (
        f"model       {plan.parameters / 1e6:,.1f} M parameters\n"
        f"chips       {plan.job.mesh.size} ({plan.chips.name}: {kind}), mesh.data={mesh['data']} "
        f"mesh.fsdp={mesh['fsdp']} mesh.tensor={mesh['tensor']}{note}"
    )


def _memory(plan: Plan) -> str:
    kinds = [kind for kind in MEMORY_KINDS if any(kind in stage.bytes for stage in plan.stages)]
    rows = [["GB per chip", *kinds, "total", "according to"]]
    for stage in plan.stages:
        numbers = [f"{stage.bytes.get(kind, 0) / 1e9:.3g}" for kind in kinds]
        by = "arithmetic" if _by_arithmetic(stage) else "compiler"
        rows.append([stage.name, *numbers, f"{stage.total / 1e9:.3g}", by])
    return _table(rows)


def _roofline(plan: Plan, lengths: Lengths) -> str:
    seconds = plan.seconds(lengths)
    rows = [[lengths.name, "TFLOP", "GB of memory traffic", "GB sent", "seconds, lower bound"]]
    for stage in plan.stages:
        work = stage.work[lengths.name]
        numbers = [f"{n:.3g}" for n in (work.flops / 1e12, work.bytes / 1e9, work.sent / 1e9)]
        bound = f"{seconds[stage.name]:.3g}" if seconds else "-"
        rows.append([stage.name, *numbers, bound])
    if seconds:
        rows.append(["step", "", "", "", f"{seconds['step']:.3g}"])
    note = "Every response is in the loss in full. Evaluation is of eval.batch rows and not part of a step."
    return f"Per chip and step, {TITLES[lengths.name]}: {lengths}.\n{note}\n{_table(rows)}"


def _whole_run(plan: Plan) -> str:
    """The time of the run; empty if the chip is not known."""
    if plan.chips.chip is None:
        return ""
    times = sum(scoring.times for scoring in plan.scorings)
    bounds = []
    for lengths in plan.lengths:
        took = {part: _duration(seconds) for part, seconds in plan.run_seconds(lengths).items()}
        bounds.append(
            f"at least {took['run']} {TITLES[lengths.name]}: {plan.job.config.steps} steps {took['steps']}, "
            f"{times} evaluations of one set {took['evaluations']}"
        )
    indented = "\n            ".join(bounds)
    return f"whole run   {indented}\n{NOT_COUNTED}"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.3g} h" if seconds >= 360 else f"{seconds:.3g} s"


def _compiling(plan: Plan) -> str:
    lines = [
        f"{stage.name:12}lowered in {stage.lowered:.1f} s{_compiled(stage.compiled)}"
        for stage in plan.stages
        if stage.lowered is not None
    ]
    why = ", since libtpu is not installed" if plan.chips.platform == "tpu" else ""
    return "\n".join(lines) or f"By arithmetic alone: the stages were not lowered or compiled{why}."


def _compiled(compiled: Program | None) -> str:
    if compiled is None:
        return ", not compiled"
    if compiled.refused:
        return f", rejected by the compiler after {compiled.seconds:.0f} s: {compiled.refused}"
    text = f", compiled in {compiled.seconds:.1f} s"
    if compiled.collectives is None:
        return f"{text}; its collectives are not known, because the program's text is not available"
    sums = []
    for kind in COLLECTIVES:
        mine = [c for c in compiled.collectives if c.kind == kind]
        if mine:
            largest = max(mine, key=lambda c: c.bytes)
            sums.append(
                f"{sum(c.count for c in mine)} {kind}, {sum(c.total for c in mine) / 1e9:.3g} GB in total "
                f"(largest {largest.bytes / 1e6:.3g} MB)"
            )
    loops = any(c.data_loop for c in compiled.collectives)
    note = " (one iteration is counted of loops whose trip count depends on data)" if loops else ""
    return f"{text}; collectives: {'; '.join(sums) or 'none'}{note}"


def _verdict(plan: Plan) -> str:
    if plan.chips.platform == "cpu":
        return "verdict     unknown: a CPU's memory is not checked; --topology names other chips to plan for"
    if plan.fits is None:
        return "verdict     unknown: rosd_jax/plan/chips.py does not list the memory of this device"
    largest = max(plan.stages, key=lambda stage: stage.total)
    chip = plan.chips.chip
    assert chip is not None
    used = f"{largest.name} takes {largest.total / 1e9:.1f} of {chip.memory / 1e9:.1f} GB"
    lines = [f"verdict     {plan.verdict}: {used}"]
    lines += [f"            change {change}" for change in plan.changes]
    lines += [f"            {remedy}" for remedy in plan.remedies]
    return "\n".join(lines)


def _table(rows: list[list[str]]) -> str:
    """Columns of one width; the first is left-aligned, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
