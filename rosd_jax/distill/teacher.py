"""What the teacher sees, and the response tokens on which it teaches (host)."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np

from rosd_jax.distill.gold import repeats_gold, strip_gold
from rosd_jax.distill.notes import NOTES
from rosd_jax.rewards.grade import SUCCESS
from rosd_jax.settings import LessonSettings
from rosd_jax.text.prompts import Wording, idea_text, solution_text
from rosd_jax.text.tokenizer import Tokenizer
from rosd_jax.types import Message, Problem, Reflected, Reflection


def teacher_messages(
    problem: Problem, reflection: Reflection, lesson: LessonSettings, wording: Wording
) -> list[Message]:
    """The problem's system messages, then the problem with the idea (or the solution) as one user message.

    Raises ValueError for a rollout without what lesson.teacher_context asks for.
    """
    idea = taught_idea(problem, reflection, lesson)
    solution = reflection.solution
    if idea is not None:
        text = idea_text(problem.question, idea, wording)
    elif lesson.teacher_context != "idea" and solution is not None:
        text = solution_text(problem.question, solution, wording)
    else:
        raise ValueError("a rollout without idea or solution has no teacher")
    system = [dict(m) for m in problem.messages if m["role"] == "system"]
    return [*system, {"role": "user", "content": text}]


def taught_idea(problem: Problem, reflection: Reflection, lesson: LessonSettings) -> str | None:
    """The idea as the teacher sees it; None if it sees none, or if only the answer would be left of it."""
    idea = reflection.idea
    if idea is None or lesson.teacher_context == "solution":
        return None
    if lesson.gold_in_idea == "keep":
        return idea
    idea = strip_gold(idea, problem.answer)
    return idea if any(character.isalnum() for character in idea) else None


def teacher_prompts(
    reflected: Reflected,
    tokenizer: Tokenizer,
    lesson: LessonSettings,
    *,
    thinking: bool,
    wording: Wording,
) -> tuple[Reflected, list[list[int] | None]]:
    """Teacher prompt ids per row; None where the rollout is out of the loss.

    A rollout whose idea is empty without the gold answer leaves the loss with the note "no_idea", unless the
    teacher sees a solution instead. A prompt above lesson.max_teacher_tokens is never cut: the rollout leaves
    the loss with the note "teacher_overlong". The returned record has these notes.
    """
    limit = lesson.max_teacher_tokens
    reflections = list(reflected.reflections)
    prompts: list[list[int] | None] = [None] * len(reflections)
    chats: dict[int, list[Message]] = {}
    for row, reflection in enumerate(reflections):
        problem = reflected.graded.problem(row)
        if reflection.note:
            continue
        if _untaught(problem, reflection, lesson):
            reflections[row] = replace(reflection, note="no_idea")
        else:
            chats[row] = teacher_messages(problem, reflection, lesson, wording)
    encoded = tokenizer.encode_chats(chats.values(), thinking=thinking)
    for row, ids in zip(chats, encoded, strict=True):
        if len(ids) <= limit:
            prompts[row] = ids
        else:
            reflections[row] = replace(reflections[row], note="teacher_overlong")
    return replace(reflected, reflections=tuple(reflections)), prompts


def region_weights(reflected: Reflected, lesson: LessonSettings, R: int) -> np.ndarray:
    """1 on the tokens that enter the loss, 0 elsewhere: float32 [B, R].

    Rollouts with a note weigh 0. Correct rollouts, and wrong ones that stay in the loss without a located
    quote, are taught on all tokens. The others are taught on lesson.region: the quoted tokens ("span"), from
    the first of them to the end ("suffix"), all ("full"), or all but the quoted ones ("inverted"). The stop
    token is part of the response.
    """
    length_B = reflected.graded.rollout.length_B
    weight_BR = np.zeros((len(length_B), R), np.float32)
    for row, reflection in enumerate(reflected.reflections):
        if reflection.note:
            continue
        length = int(length_B[row])
        start = 0
        stop = length
        if reflection.token_span and lesson.region != "full":
            start = reflection.token_span[0]
            stop = length if lesson.region == "suffix" else min(length, reflection.token_span[1])
        weight_BR[row, start:stop] = 1.0
        if reflection.token_span and lesson.region == "inverted":
            weight_BR[row, :length] = 1.0 - weight_BR[row, :length]
    return weight_BR


def count(reflected: Reflected, weight_BR: np.ndarray) -> dict[str, int]:
    """Counts of the reflection stage over the B rows.

    Every row is in the loss (`taught`) or out of it for one reason, so `taught` and the `out_*` sum to B.
    """
    rows = reflected.reflections
    answered = [row for row, reflection in enumerate(rows) if reflection.raw is not None]
    wrong = [row for row in answered if reflected.graded.rewards_B[row] < SUCCESS]
    found = [row for row in wrong if rows[row].char_span]
    ideas = [(rows[row].idea, reflected.graded.problem(row).answer) for row in answered]
    notes = Counter(reflection.note for reflection in rows)
    return {
        "reflected": len(answered),
        "quotes_asked": len(wrong),
        "quotes_found": len(found),
        "ambiguous": sum(rows[row].ambiguous for row in found),
        "ideas_missing": sum(idea is None for idea, _ in ideas),
        "gold_repeated": sum(idea is not None and repeats_gold(idea, gold) for idea, gold in ideas),
        "taught": notes[""],
        **{f"out_{note}": notes[note] for note in NOTES},
        "active_tokens": int(weight_BR.sum()),
    }


def _untaught(problem: Problem, reflection: Reflection, lesson: LessonSettings) -> bool:
    """Whether the idea was all that the teacher would have seen, and stripping left nothing."""
    if lesson.teacher_context == "solution" or taught_idea(problem, reflection, lesson) is not None:
        return False
    return lesson.teacher_context == "idea" or reflection.solution is None
