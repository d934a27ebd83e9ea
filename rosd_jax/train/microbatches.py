"""Cuts the rows of a lesson and groups them into micro-batches, each one forward and backward pass.

    input    a Lesson of B rows (host) and the number of rows in a micro-batch
    output   micro-batches (host), longest first: every row with an active token is in exactly one; and a
             number for each of their positions, brought back to the response tokens
    correct  when each active token keeps its position, its prediction and all that it attends to

A token is active if the teacher teaches it (weight_BR) or if it is in the policy gradient (policy_BR).
Attention is causal, so nothing after a row's last active token reaches the loss: the row is cut there, and
a row without active tokens is left out. Rows of similar length share a micro-batch, which is as wide as its
longest row needs. Widths are rounded up to one of few, because each is compiled separately. Student and
teacher have separate widths; the teacher reads nothing of a row that it does not teach.

Dimensions: B rows, S positions of a student's row, T positions of a teacher's row, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import numpy as np

from rosd_jax.types import Array, Lesson

SHORTEST = 64  # smallest width: shorter rows are padded to it, which saves compilations


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MicroBatch:
    """The rows of one forward and backward pass, right-padded, as student and teacher read them."""

    student_BS: Array  # int32; the student's prompt and the response
    teacher_BT: Array  # int32; the teacher's prompt and the same response
    shift_B: Array  # int32; a response token's position in the teacher's row minus that in the student's
    target_BS: Array  # int32; the response token that each position predicts, 0 if none
    weight_BS: Array  # float32; that token's weight, 0 if none
    sampler_logp_BS: Array  # float32; its log-prob as the sampler reported it, 0 if none
    policy_BS: Array | None  # float32; its weight in the policy gradient, 0 if none; None: there is none


class RowGroup(NamedTuple):
    """The rows of a lesson that form one micro-batch, and its widths."""

    chosen: list[int]
    S: int
    T: int  # 0 if the teacher teaches none of them


def plan_microbatches(lesson: Lesson, rows: int, longest: tuple[int, int]) -> list[MicroBatch]:
    """The micro-batches of a lesson, `rows` rows each; the last is filled up with rows of weight 0.

    longest: the most positions that a student's and a teacher's row may have; no width exceeds them.
    """
    cut_B = cuts(lesson.active_BR)
    groups = group_rows(*needs(lesson, cut_B), rows, longest)
    return [make_microbatch(lesson, cut_B, group, rows) for group in groups]


def by_response(
    values: Sequence[np.ndarray], lesson: Lesson, rows: int, longest: tuple[int, int]
) -> np.ndarray:
    """Values of the positions of a lesson's micro-batches, as values of its response tokens: float32 [B, R].

    values: one array [rows, S] for each micro-batch of `plan_microbatches(lesson, rows, longest)`. The value
    of a token is that of the position that predicts it; of a token after the last active one it is 0.
    """
    cut_B = cuts(lesson.active_BR)
    groups = group_rows(*needs(lesson, cut_B), rows, longest)
    values_BR = np.zeros(lesson.weight_BR.shape, np.float32)
    for group, values_BS in zip(groups, values, strict=True):
        for b, row in enumerate(group.chosen):
            cut = int(cut_B[row])
            values_BR[row, :cut] = values_BS[b, predicting(lesson.prompts[row], cut)]
    return values_BR


def predicting(prompt: Sequence[int], cut: int) -> slice:
    """The positions of the student's row that predict the first `cut` response tokens.

    A token is predicted from the position before it, the first one from the prompt's last.
    """
    return slice(len(prompt) - 1, len(prompt) - 1 + cut)


def cuts(weight_BR: np.ndarray) -> np.ndarray:
    """Response tokens of each row up to its last one with a weight, which is included; 0 if none has one."""
    R = weight_BR.shape[1]
    return np.where(weight_BR != 0, np.arange(1, R + 1), 0).max(axis=1)


def needs(lesson: Lesson, cut_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of each row that student and teacher must read; 0 if they need not read the row.

    cut_B: response tokens of each row up to its last active one.
    """

    def positions(prompts: Sequence[Sequence[int]], cut_B: np.ndarray) -> np.ndarray:
        prompt_B = np.array([len(ids) for ids in prompts])
        # The last token is predicted from the position before it, so it is not read itself.
        return np.where(cut_B > 0, prompt_B + cut_B - 1, 0)

    return positions(lesson.prompts, cut_B), positions(lesson.teacher_prompts, cuts(lesson.weight_BR))


def group_rows(
    student_B: np.ndarray, teacher_B: np.ndarray, rows: int, longest: tuple[int, int]
) -> list[RowGroup]:
    """Groups of up to `rows` rows of similar length, each with its widths S and T, most expensive first.

    student_B, teacher_B: the positions that `needs` gives; rows of which the student reads none are left out.
    """
    active = np.flatnonzero(student_B).tolist()
    S_of = {row: width(int(student_B[row]), longest[0]) for row in active}
    T_of = {row: width(int(teacher_B[row]), longest[1]) if teacher_B[row] else 0 for row in active}

    def cost(row: int) -> tuple[int, int]:
        # In units of a forward pass, the student takes 4 (forward 1, recomputed 1, backward 2), the
        # teacher 1.
        return 4 * S_of[row] + T_of[row], int(student_B[row])

    order = sorted(active, key=cost, reverse=True)
    groups = []
    for first in range(0, len(order), rows):
        chosen = order[first : first + rows]
        S = max(S_of[row] for row in chosen)
        T = max(T_of[row] for row in chosen)
        groups.append(RowGroup(chosen, S, T))
    return groups


def width(positions: int, longest: int) -> int:
    """The smallest of 2^n, 3 x 2^n and `longest` that is at least `positions`, and at least SHORTEST."""
    power = 1 << (positions - 1).bit_length()
    three_quarters = power // 4 * 3
    least = three_quarters if positions <= three_quarters else power
    return min(max(least, SHORTEST), longest)


def make_microbatch(lesson: Lesson, cut_B: np.ndarray, group: RowGroup, rows: int) -> MicroBatch:
    """The rows of a group, each cut after cut_B[row] response tokens, filled up with rows of weight 0."""
    _, S, T = group
    taught_B = cuts(lesson.weight_BR)
    student_BS = np.zeros((rows, S), np.int32)
    teacher_BT = np.zeros((rows, T), np.int32)
    shift_B = np.zeros(rows, np.int32)
    target_BS = np.zeros((rows, S), np.int32)
    weight_BS = np.zeros((rows, S), np.float32)
    sampler_logp_BS = np.zeros((rows, S), np.float32)
    policy_BS = None if lesson.policy_BR is None else np.zeros((rows, S), np.float32)
    for b, row in enumerate(group.chosen):
        prompt = lesson.prompts[row]
        teacher_prompt = lesson.teacher_prompts[row]
        cut = int(cut_B[row])
        taught = int(taught_B[row])
        student_BS[b, : len(prompt) + cut - 1] = [*prompt, *lesson.response_BR[row, : cut - 1]]
        if taught:
            read = lesson.response_BR[row, : taught - 1]
            teacher_BT[b, : len(teacher_prompt) + taught - 1] = [*teacher_prompt, *read]
        # The response is the same in both rows, so one number maps every position of it.
        shift_B[b] = len(teacher_prompt) - len(prompt)
        at = predicting(prompt, cut)
        target_BS[b, at] = lesson.response_BR[row, :cut]
        weight_BS[b, at] = lesson.weight_BR[row, :cut]
        sampler_logp_BS[b, at] = lesson.sampler_logp_BR[row, :cut]
        if policy_BS is not None and lesson.policy_BR is not None:
            policy_BS[b, at] = lesson.policy_BR[row, :cut]
    return MicroBatch(student_BS, teacher_BT, shift_B, target_BS, weight_BS, sampler_logp_BS, policy_BS)
