"""The metrics of a training step that are computed on the host; the update returns those of the loss."""

from __future__ import annotations

import numpy as np

from rosd_jax.distill import teacher
from rosd_jax.rollout.bandwidth import MemoryRoofline
from rosd_jax.types import Graded, HostRollout, Reflected

Numbers = dict[str, float]


def of_rollouts(graded: Graded) -> Numbers:
    """Mean reward, mean response length in tokens, share of responses truncated at the limit, and entropy.

    The entropy of the model's next-token distribution, in nats, is estimated by the mean of -log p of the
    tokens that it sampled.
    """
    rollout = graded.rollout
    surprise = -np.sum(rollout.logp_BR, dtype=np.float64)  # a log-prob is 0 after the end of a response
    return dict(
        reward=float(graded.rewards_B.mean()),
        response_length=float(np.mean(rollout.length_B)),
        truncated=float(np.mean(~rollout.finished_B)),
        entropy=float(surprise / np.sum(rollout.length_B)),
    )


def of_advantages(advantage_B: np.ndarray) -> Numbers:
    """Mean absolute advantage of the rollouts, and the share of those that have one."""
    return dict(
        advantage_abs=float(np.mean(np.abs(advantage_B))),
        advantage_share=float(np.mean(advantage_B != 0)),
    )


def of_decoding(rollout: HostRollout | None, roofline: MemoryRoofline, seconds: float, stage: str) -> Numbers:
    """Tokens per second, idle share of the slots, roofline fraction and preemptions of a decoding stage.

    The roofline fraction is the memory-bound ideal divided by the measured time. `seconds` is the whole time
    of the stage, compilation included. All are NaN if nothing was decoded.
    """
    nan = float("nan")
    stats = rollout.stats if rollout else None
    return {
        f"tokens_per_second_{stage}": float(np.sum(rollout.length_B)) / seconds if rollout else nan,
        f"idle_share_{stage}": stats.idle_share if stats else nan,
        f"roofline_{stage}": roofline.seconds(stats) / seconds if stats else nan,
        f"preempted_{stage}": float(np.sum(stats.preempted)) if stats else nan,
    }


def of_reflections(reflected: Reflected, weight_BR: np.ndarray) -> Numbers:
    """Shares of rollouts reflected, quotes found and tokens in the loss; counts of rollouts by reason."""
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
