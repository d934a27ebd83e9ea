"""The evaluations of a whole run, for a lower bound on its time.

scored_sets(config, inputs)     -> number of problems -> how often a set of that size is scored
scorings(config, stage, sets)   -> a Scoring for each size
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from rosd_jax.plan.roofline import Work, at_limits, realistic
from rosd_jax.plan.stages import Stage
from rosd_jax.settings import Settings
from rosd_jax.train.inputs import Inputs
from rosd_jax.train.schedule import scored_every, work_after


@dataclass(frozen=True)
class Scoring:
    """How often a run scores a set with this number of problems."""

    problems: int
    times: int
    work: dict[str, Work]  # of one chip and one time, by name of the lengths


def scored_sets(config: Settings, inputs: Inputs) -> Counter[int]:
    """Number of problems -> how often a run scores a set of that size, validation sets included."""
    work = work_after(config, inputs, 0)
    sets: Counter[int] = Counter()
    for split in scored_every(config):
        for name, items in inputs.sets(split).items():
            sets[len(items)] += 1 + work[f"{split} {name}"]  # once before the first step
    return sets


def scorings(config: Settings, evaluation: Stage, sets: Mapping[int, int]) -> tuple[Scoring, ...]:
    """The work of scoring whole sets. evaluation: that stage; sets: as `scored_sets` returns them."""
    found = []
    for problems, times in sets.items():
        responses = problems * config.eval.samples
        lengths = (at_limits(config, responses), realistic(config, responses))
        found.append(Scoring(problems, times, {n.name: evaluation.work(n) for n in lengths}))
    return tuple(found)
