"""The numbers of one training step that are counted on the host; the update gives those of the loss."""

from __future__ import annotations

import numpy as np

from rosd_jax.distill import teacher
from rosd_jax.rollout.bandwidth import MemoryRoofline
from rosd_jax.types import Graded, HostRollout, Reflected

Numbers = dict[str, float]


def of_rollouts(graded: Graded) -> Numbers:
    """Mean reward and length, and the share of responses cut at the limit."""
    rollout = graded.rollout
    return dict(
        reward=float(graded.rewards_B.mean()),
        response_length=float(np.mean(rollout.length_B)),
        truncated=float(np.mean(~rollout.finished_B)),
    )


def of_decoding(rollout: HostRollout | None, roofline: MemoryRoofline, seconds: float, stage: str) -> Numbers:
    """Tokens per second, idle share of the slots, roofline fraction, and preemptions of one decoding stage.

    The roofline fraction is the memory-bound ideal divided by the measured time. `seconds` is all the time
    of the stage, compilation included. NaN if nothing was decoded.
    """
    stats = rollout and rollout.stats
    tokens = float(np.sum(rollout.length_B)) if rollout else float("nan")
    return {
        f"tokens_per_second_{stage}": tokens / seconds,
        f"idle_share_{stage}": stats.idle_share if stats else float("nan"),
        f"roofline_{stage}": roofline.seconds(stats) / seconds if stats else float("nan"),
        f"preempted_{stage}": float(np.sum(stats.preempted)) if stats else float("nan"),
    }


def of_reflections(reflected: Reflected, weight_BR: np.ndarray) -> Numbers:
    """Shares of the reflection stage, with the counts behind them."""
    counts = teacher.count(reflected, weight_BR)
    rows = len(reflected.reflections)
    tokens = int(np.sum(reflected.graded.rollout.length_B))
    asked = counts["quotes_asked"]
    found = counts.pop("quotes_found")
    return dict(
        reflected=counts.pop("reflected") / rows,
        quote_found=found / asked if asked else float("nan"),
        active_tokens_share=counts.pop("active_tokens") / max(tokens, 1),
        **counts,
    )
