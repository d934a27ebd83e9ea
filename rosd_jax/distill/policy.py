"""The policy gradient's weights: how much the log-prob of each sampled token is to rise or fall (host).

    loss = - sum over tokens of policy_BR x w x exp(logp - stop_gradient(logp))

policy_BR is made here: the advantage of a rollout, divided as the settings say. logp and w, the capped ratio
of trainer to sampler, come from the devices (train/update.py). The last factor is 1, and its gradient is that
of logp. PPO and GRPO have in its place the ratio to the policy before the batch's updates, and clip it; since
a batch gets one update, that ratio is 1, and no clip would ever bind.

Dimensions: B rows of a step's batch (N prompts with G samples each), R response tokens.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rosd_jax.settings import PolicySettings
from rosd_jax.types import Graded, Lesson, Reflected

STD_EPS = 1e-6


def advantages(graded: Graded, policy: PolicySettings) -> np.ndarray:
    """The advantage of each rollout among the G rollouts of its prompt: float64 [B].

    "std" divides by the sample standard deviation (of G - 1), as verl and TRL do; DeepSeekMath's paper does
    not say which. It is exactly 0 where all rewards of a prompt are equal.
    """
    rewards_NG = graded.rewards_B.astype(np.float64).reshape(-1, graded.group_size)
    advantage_NG = rewards_NG - rewards_NG.mean(axis=1, keepdims=True)
    if policy.advantage == "std":
        advantage_NG /= rewards_NG.std(axis=1, ddof=1, keepdims=True) + STD_EPS
    return advantage_NG.reshape(-1)


def policy_weights(
    advantage_B: np.ndarray, length_B: np.ndarray, weight_BR: np.ndarray, policy: PolicySettings
) -> np.ndarray:
    """`policy_BR` of the module's formula: float32 [B, R], 0 after the end of a response.

    length_B: tokens of the responses. weight_BR: those of the distillation. What the loss is divided by
    counts all B rollouts of the batch, so that a rollout weighs the same whether or not others are in it.
    """
    rows, R = weight_BR.shape
    tokens_B = {
        "sequence": rows * length_B,  # DeepSeekMath
        "constant": np.full(rows, rows * R),  # Dr. GRPO
        "token": np.full(rows, np.sum(length_B)),  # DAPO
    }[policy.normalise]
    scale_B = policy.weight * advantage_B / np.maximum(tokens_B, 1)
    if policy.rows == "untaught":
        scale_B = np.where(np.any(weight_BR, axis=1), 0, scale_B)
    return np.where(np.arange(R) < length_B[:, None], scale_B[:, None], 0).astype(np.float32)


def with_notes(reflected: Reflected, lesson: Lesson) -> Reflected:
    """The rollouts without a note if they are in the loss, and with one if they are not.

    A rollout that the teacher would not teach keeps that reason only if the policy gradient has no use for it
    either.
    """
    active_B = np.any(lesson.active_BR, axis=1)
    reflections = tuple(
        replace(reflection, note="" if active else reflection.note or "no_advantage")
        for reflection, active in zip(reflected.reflections, active_B, strict=True)
    )
    return replace(reflected, reflections=reflections)
