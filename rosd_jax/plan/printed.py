"""A finished plan, as text and as JSON.

as_text(plan), as_json(plan)  -> str
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax

from rosd_jax.plan.budget import KINDS, Bytes, Job
from rosd_jax.plan.chips import Slice
from rosd_jax.plan.collectives import KINDS as COLLECTIVES
from rosd_jax.plan.programs import Program
from rosd_jax.plan.roofline import Lengths, Work

GPU_NOTE = (
    "JAX takes 75 % of a GPU's memory unless told otherwise: set XLA_CLIENT_MEM_FRACTION=0.95, as is "
    "counted here"
)


@dataclass(frozen=True)
class StagePlan:
    """One stage of a plan; bytes are those of one chip."""

    name: str
    bytes: Bytes  # by kind, by arithmetic
    held: int  # in all: by the compiler where the stage is compiled, else by arithmetic
    fits: bool | None  # None: the chip's memory is not known
    lowered: float | None  # seconds; None: not lowered
    compiled: Program | None
    work: dict[str, Work]  # of one step, by the lengths' name


@dataclass(frozen=True)
class Plan:
    """All stages of one experiment on one slice."""

    job: Job
    chips: Slice
    lengths: Sequence[Lengths]
    stages: Sequence[StagePlan]
    changes: Sequence[str]  # fields to change where it does not fit

    @property
    def fits(self) -> bool | None:
        """Whether every stage fits; None where the chip's memory is not known."""
        each = [stage.fits for stage in self.stages]
        return None if None in each else all(each)

    @property
    def verdict(self) -> str:
        """In words."""
        return {None: "unknown", True: "fits", False: "does not fit"}[self.fits]

    def seconds(self, lengths: Lengths) -> dict[str, float]:
        """The least that each stage of a step can take, and their sum; empty where the chip is not known."""
        chip = self.chips.chip
        if chip is None:
            return {}
        each = {stage.name: stage.work[lengths.name].seconds(chip) for stage in self.stages}
        return each | {"step": sum(s for name, s in each.items() if name != "evaluation")}

    @property
    def parameters(self) -> int:
        """Of the model."""
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
            change=list(plan.changes),
        )
    )


def _stage_json(stage: StagePlan) -> dict[str, Any]:
    return dict(
        name=stage.name,
        bytes=stage.bytes,
        held=stage.held,
        counted_by="arithmetic" if _by_arithmetic(stage) else "compiler",
        fits=stage.fits,
        lower_seconds=stage.lowered,
        compiled=None if stage.compiled is None else asdict(stage.compiled),
        work={name: asdict(work) for name, work in stage.work.items()},
    )


def _by_arithmetic(stage: StagePlan) -> bool:
    return stage.compiled is None or bool(stage.compiled.refused)


def as_text(plan: Plan) -> str:
    """For people."""
    parts = [_head(plan), _memory(plan), *(_roofline(plan, lengths) for lengths in plan.lengths)]
    parts += [_compiling(plan), _verdict(plan)]
    return "\n\n".join(part for part in parts if part)


def _head(plan: Plan) -> str:
    chip, mesh = plan.chips.chip, plan.job.mesh.shape
    kind = plan.chips.platform if chip is None else f"{chip.name}, {chip.memory / 1e9:.1f} GB each"
    note = f"\n{GPU_NOTE}" if chip is not None and chip.platform == "gpu" else ""
    return (
        f"model       {plan.parameters / 1e6:,.1f} M parameters\n"
        f"chips       {plan.job.mesh.size} ({plan.chips.name}: {kind}), mesh.data={mesh['data']} "
        f"mesh.fsdp={mesh['fsdp']} mesh.tensor={mesh['tensor']}{note}"
    )


def _memory(plan: Plan) -> str:
    kinds = [kind for kind in KINDS if any(kind in stage.bytes for stage in plan.stages)]
    rows = [["GB of one chip", *kinds, "in all", "counted by"]]
    for stage in plan.stages:
        numbers = [f"{stage.bytes.get(kind, 0) / 1e9:.3g}" for kind in kinds]
        by = "arithmetic" if _by_arithmetic(stage) else "compiler"
        rows.append([stage.name, *numbers, f"{stage.held / 1e9:.3g}", by])
    return _table(rows)


def _roofline(plan: Plan, lengths: Lengths) -> str:
    seconds = plan.seconds(lengths)
    rows = [[lengths.name, "TFLOP", "GB moved", "GB sent", "seconds at least"]]
    for stage in plan.stages:
        work = stage.work[lengths.name]
        at_least = f"{seconds[stage.name]:.3g}" if seconds else "-"
        rows.append(
            [
                stage.name,
                *(f"{n:.3g}" for n in (work.flops / 1e12, work.bytes / 1e9, work.sent / 1e9)),
                at_least,
            ]
        )
    if seconds:
        rows.append(["step", "", "", "", f"{seconds['step']:.3g}"])
    rule = "every response taught in full; evaluation is of eval.batch rows, and not part of the step"
    return f"One chip, one step, {lengths}; {rule}\n{_table(rows)}"


def _compiling(plan: Plan) -> str:
    lines = []
    for stage in plan.stages:
        lowered = "not lowered" if stage.lowered is None else f"lowered in {stage.lowered:.1f} s"
        lines.append(f"{stage.name:12}{lowered}{_compiled(stage.compiled)}")
    return "\n".join(lines)


def _compiled(compiled: Program | None) -> str:
    if compiled is None:
        return ", not compiled: communication is not counted"
    if compiled.refused:
        return f", refused after {compiled.seconds:.0f} s: {compiled.refused}"
    text = f", compiled in {compiled.seconds:.1f} s"
    if compiled.collectives is None:
        return f"{text}; the program's text is not available, so communication is not counted"
    sums = []
    for kind in COLLECTIVES:
        mine = [c for c in compiled.collectives if c.kind == kind]
        if mine:
            largest = max(mine, key=lambda c: c.bytes)
            sums.append(
                f"{kind} {sum(c.count for c in mine)} of {sum(c.total for c in mine) / 1e9:.3g} GB "
                f"(largest {largest.bytes / 1e6:.3g} MB)"
            )
    loops = any(c.data_loop for c in compiled.collectives)
    note = " (loops whose length depends on data are counted once)" if loops else ""
    return f"{text}; communication: {', '.join(sums) or 'none'}{note}"


def _verdict(plan: Plan) -> str:
    if plan.fits is None:
        return "verdict     unknown: the memory of this device is not in the table (rosd_jax/plan/chips.py)"
    full = max(plan.stages, key=lambda stage: stage.held)
    chip = plan.chips.chip
    assert chip is not None
    line = (
        f"verdict     {plan.verdict}: {full.name} takes {full.held / 1e9:.1f} of {chip.memory / 1e9:.1f} GB"
    )
    return "\n".join([line, *(f"            change {change}" for change in plan.changes)])


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )
