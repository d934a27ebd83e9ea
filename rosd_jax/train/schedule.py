"""What a run does after which step.

is_due(step, every, last)            -> whether something is due after a step
scored_every(config)                 -> after how many steps each split is scored
work_after(config, inputs, start)    -> how often each kind of work is still to come
"""

from __future__ import annotations

from collections import Counter

from rosd_jax.settings import Settings
from rosd_jax.train.console import STEP
from rosd_jax.train.inputs import Inputs, ScoredSplit


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something is due after `step`: every `every` steps (0: never), and at the last one."""
    return step == last or (every > 0 and step % every == 0)


def scored_every(config: Settings) -> dict[ScoredSplit, int]:
    """The splits that are scored, and every how many steps (0: only before the first and after the last)."""
    return {"validation": config.validation.every, "eval": config.eval.every}


def work_after(config: Settings, inputs: Inputs, start: int) -> Counter[str]:
    """How often each kind of work comes after step `start`: STEP, `eval SET`, `validation SET`, `checkpoint`.

    The scores of `start` itself, the exports and what depends on the validation are left out.
    """
    work = Counter({STEP: config.steps - start})
    for step in range(start + 1, config.steps + 1):
        for split, every in scored_every(config).items():
            if is_due(step, every, config.steps):
                work.update(f"{split} {name}" for name in inputs.sets(split))
        work["checkpoint"] += is_due(step, config.checkpoint.every, config.steps)
    return work
