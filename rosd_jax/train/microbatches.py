"""Cuts the rows of a lesson and groups them into micro-batches, each one forward and backward pass.

    takes  a Lesson of B rows (host) and the number of rows in a micro-batch
    gives  micro-batches (host), longest first: every row with an active token is in exactly one
    right  when each active token keeps its position, its prediction and all that it attends to

Attention is causal, so nothing after a row's last active token reaches the loss: the row is cut there, and
a row without active tokens is left out. Rows of similar length share a micro-batch, which is as wide as its
longest row needs. Widths are rounded up to one of few, because each is compiled separately. Student and
teacher have separate widths.

Dimension key: B rows of a micro-batch (in `Lesson` and `needs`: of the whole lesson), S positions of a
student's row, T positions of a teacher's row, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np

from rosd_jax.types import Array, Lesson

SHORTEST = 64  # the least width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MicroBatch:
    """B rows as student (S positions) and teacher (T positions) read them. Padding weighs 0."""

    student_BS: Array  # int32: prompt and response
    teacher_BT: Array  # int32: the teacher's prompt and the same response
    shift_B: Array  # int32: a response token's position in the teacher's row less that in the student's
    target_BS: Array  # int32: the response token that each position predicts, 0 where it predicts none
    weight_BS: Array  # float32: that token's weight
    sampler_logp_BS: Array  # float32: its log-prob as the sampler reported it


def plan_microbatches(lesson: Lesson, rows: int, longest: tuple[int, int]) -> list[MicroBatch]:
    """Micro-batches of so many rows, spare ones of weight 0 behind the last.

    longest: the most positions that a student's and a teacher's row may have, which are widths too.
    """
    groups = group_rows(*needs(lesson), rows, longest)
    return [make_microbatch(lesson, some, rows, S, T) for some, S, T in groups]


def needs(lesson: Lesson) -> tuple[np.ndarray, np.ndarray]:
    """Positions that the student's and the teacher's forward passes need of each row; 0: it is inactive."""
    R = lesson.weight_BR.shape[1]
    cut_B = np.where(lesson.weight_BR != 0, np.arange(1, R + 1), 0).max(axis=1)
    # The last active token is predicted by the position before it, and need not be read itself.

    def positions(prompts: Sequence[Sequence[int]]) -> np.ndarray:
        return np.where(cut_B > 0, np.array([len(ids) for ids in prompts]) + cut_B - 1, 0)

    return positions(lesson.prompts), positions(lesson.teacher_prompts)


def group_rows(
    student_B: np.ndarray, teacher_B: np.ndarray, rows: int, longest: tuple[int, int]
) -> list[tuple[list[int], int, int]]:
    """Groups of up to `rows` active rows that need so many positions, and the widths S and T of each."""
    active = np.flatnonzero(student_B).tolist()
    S_of = {row: width(int(student_B[row]), longest[0]) for row in active}
    T_of = {row: width(int(teacher_B[row]), longest[1]) for row in active}

    def cost(row: int) -> tuple[int, int]:
        # A student's position goes forward, forward again and backward; a teacher's forward alone.
        return 4 * S_of[row] + T_of[row], int(student_B[row])

    order = sorted(active, key=cost, reverse=True)
    parts = [order[first : first + rows] for first in range(0, len(order), rows)]
    return [(some, max(S_of[row] for row in some), max(T_of[row] for row in some)) for some in parts]


def width(positions: int, longest: int) -> int:
    """The least of 2^n, 3 x 2^n and `longest` that holds so many positions."""
    power = 1 << (positions - 1).bit_length()
    three = power // 4 * 3
    return min(max(three if positions <= three else power, SHORTEST), longest)


def make_microbatch(lesson: Lesson, chosen: Sequence[int], rows: int, S: int, T: int) -> MicroBatch:
    """The chosen rows of a lesson at widths S and T, and spare ones up to `rows`."""
    student_BS = np.zeros((rows, S), np.int32)
    teacher_BT = np.zeros((rows, T), np.int32)
    shift_B = np.zeros(rows, np.int32)
    target_BS = np.zeros((rows, S), np.int32)
    weight_BS = np.zeros((rows, S), np.float32)
    sampler_logp_BS = np.zeros((rows, S), np.float32)
    for b, row in enumerate(chosen):
        prompt = lesson.prompts[row]
        teacher_prompt = lesson.teacher_prompts[row]
        cut = int(np.flatnonzero(lesson.weight_BR[row])[-1]) + 1
        read = lesson.response_BR[row, : cut - 1]
        student_BS[b, : len(prompt) + cut - 1] = [*prompt, *read]
        teacher_BT[b, : len(teacher_prompt) + cut - 1] = [*teacher_prompt, *read]
        shift_B[b] = len(teacher_prompt) - len(prompt)
        # A token is predicted by the position before it, the first one by the prompt's last.
        predicts = slice(len(prompt) - 1, len(prompt) - 1 + cut)
        target_BS[b, predicts] = lesson.response_BR[row, :cut]
        weight_BS[b, predicts] = lesson.weight_BR[row, :cut]
        sampler_logp_BS[b, predicts] = lesson.sampler_logp_BR[row, :cut]
    return MicroBatch(student_BS, teacher_BT, shift_B, target_BS, weight_BS, sampler_logp_BS)
