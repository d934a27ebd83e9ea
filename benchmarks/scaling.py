"""The plan's lower bound on the time of a step of Qwen3-8B, from 4 to 1,024 chips of TPU v5p.

    python -m benchmarks.scaling

Prints the table of docs/scaling.md. Everything is arithmetic (rosd_jax/plan/roofline.py): no chip is needed,
and nothing is compiled. A slice's mesh is the one with the shortest step among those that fit the chip's
memory, with `data` = 1.
"""

from __future__ import annotations

import argparse
import dataclasses

from benchmarks.step_flops import QWEN3
from configs import qwen3_science
from rosd_jax.config import validate
from rosd_jax.errors import UserError
from rosd_jax.plan.chips import Chip, Slice, read_topology
from rosd_jax.plan.command import make_plan
from rosd_jax.plan.printed import Plan
from rosd_jax.plan.roofline import Work
from rosd_jax.plan.stages import make_job

TOPOLOGIES = (
    "v5p:2x2x1",
    "v5p:2x2x2",
    "v5p:2x2x4",
    "v5p:2x4x4",
    "v5p:4x4x4",
    "v5p:4x4x8",
    "v5p:4x8x8",
    "v5p:8x8x8",
    "v5p:8x8x16",
)
TENSOR = (1, 2, 4, 8)  # 8 is the number of key-value heads
STAGES = ("rollouts", "reflections", "teacher", "student", "optimizer")
STOP_IDS = (151645, 151643)
EVALUATED = 210


def plans(topology: str, prompts: int) -> list[Plan]:
    """One plan for each mesh that the rows, the heads and the memory allow."""
    chips = dataclasses.replace(read_topology(topology), compiles=False)
    found = []
    for tensor in TENSOR:
        config = qwen3_science.get_config("8b")
        config.batch.prompts = prompts
        config.batch.device_rows = 1
        config.mesh.fsdp = -1
        config.mesh.data = 1
        config.mesh.tensor = tensor
        settings = validate(config)
        model = QWEN3["8b"].replace(num_tokens=151669, dtype="bfloat16", remat=settings.model.remat)
        try:
            job = make_job(settings, model, chips)
            plan = make_plan(job, chips, STOP_IDS, None, EVALUATED)
        except UserError:  # more shards of rows than rows
            continue
        if plan.fits:
            found.append(plan)
    return found


def seconds(plan: Plan) -> dict[str, float]:
    """Lower bounds at the mean lengths that the plan assumes."""
    return plan.seconds(plan.lengths[1])


def binds(work: Work, chip: Chip) -> str:
    """What a stage waits for."""
    times = {
        "matmuls": work.flops / chip.flops,
        "memory": work.bytes / chip.bandwidth,
        "links": work.sent / chip.links,
    }
    return max(times, key=lambda name: times[name])


def row(plan: Plan, chips: Slice) -> str:
    """One line of the table."""
    assert chips.chip is not None
    took = seconds(plan)
    mesh = plan.job.mesh.shape
    cells = [f"{plan.job.mesh.size:,}", f"{mesh['fsdp']}, {mesh['tensor']}", f"{took['step']:.1f}"]
    for stage in plan.stages:
        if stage.name in STAGES:
            work = stage.work[plan.lengths[1].name]
            cells.append(f"{took[stage.name]:.2f} {binds(work, chips.chip)}")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=32, help="prompts of a step, 8 responses each")
    args = parser.parse_args()
    print(f"| chips | fsdp, tensor | step, s | {' | '.join(STAGES)} |\n|{'---|' * (3 + len(STAGES))}")
    for topology in TOPOLOGIES:
        found = plans(topology, args.prompts)
        if found:
            best = min(found, key=lambda plan: seconds(plan)["step"])
            print(row(best, read_topology(topology)), flush=True)
        else:
            print(f"| {topology} | | no mesh fits |", flush=True)


if __name__ == "__main__":
    main()
