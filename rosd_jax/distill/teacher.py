"""What the teacher sees, and on which response tokens it teaches (host)."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import cast

import numpy as np

from rosd_jax.config import Config
from rosd_jax.distill.reflect import NOTES, SUCCESS
from rosd_jax.text.prompts import ENGLISH, Wording, idea_text, solution_text
from rosd_jax.text.tokenizer import Tokenizer
from rosd_jax.types import Message, Problem, Reflected, Reflection


def teacher_messages(
    problem: Problem, reflection: Reflection, lesson: Config, wording: Wording = ENGLISH
) -> list[Message]:
    """The problem's own system messages, then problem + idea (or + solution) as one user message.

    Raises ValueError for a rollout that has neither what lesson.teacher_context asks for.
    """
    idea, solution = reflection.idea, reflection.solution
    if lesson.teacher_context != "solution" and idea is not None:
        if lesson.gold_in_idea == "strip":
            idea = strip_gold(idea, problem.answer)
        text = idea_text(problem.question, idea, wording)
    elif lesson.teacher_context != "idea" and solution is not None:
        text = solution_text(problem.question, solution, wording)
    else:
        raise ValueError("a rollout without idea or solution has no teacher")
    system = [dict(m) for m in problem.messages if m["role"] == "system"]
    return [*system, {"role": "user", "content": text}]


def teacher_prompts(
    reflected: Reflected,
    tokenizer: Tokenizer,
    lesson: Config,
    *,
    thinking: bool,
    wording: Wording = ENGLISH,
) -> tuple[Reflected, list[list[int] | None]]:
    """Teacher prompt ids a row; None where the rollout is out of the loss.

    A prompt above lesson.max_teacher_tokens is never cut: the rollout leaves the loss, which the
    returned record notes as "teacher_overlong".
    """
    limit = cast(int, lesson.max_teacher_tokens)
    reflections, prompts = [], []
    for row, reflection in enumerate(reflected.reflections):
        ids = None
        if not reflection.note:
            messages = teacher_messages(_problem(reflected, row), reflection, lesson, wording)
            ids = tokenizer.chat_ids(messages, thinking=thinking)
            if len(ids) > limit:
                ids, reflection = None, replace(reflection, note="teacher_overlong")
        reflections.append(reflection)
        prompts.append(ids)
    return replace(reflected, reflections=tuple(reflections)), prompts


def region_weights(reflected: Reflected, lesson: Config, R: int) -> np.ndarray:
    """1 where the loss lies, 0 elsewhere: float32 [B, R].

    Rollouts with a note weigh 0. Correct rollouts, and wrong ones that stay without a located
    quote, are taught in full; the others in lesson.region: the error's tokens ("span"), from its
    first token to the end ("suffix"), or all ("full"). The stop token is part of the response.
    """
    length_B = np.asarray(reflected.graded.rollout.length_B)
    weight_BR = np.zeros((len(length_B), R), np.float32)
    for row, reflection in enumerate(reflected.reflections):
        if reflection.note:
            continue
        start, stop = 0, int(length_B[row])
        if reflection.token_span and lesson.region != "full":
            start = reflection.token_span[0]
            stop = min(stop, reflection.token_span[1]) if lesson.region == "span" else stop
        weight_BR[row, start:stop] = 1.0
    return weight_BR


def count(reflected: Reflected, weight_BR: np.ndarray) -> dict[str, int]:
    """Numbers of the reflection stage over the B rows, to be logged and summed.

    Every row is in the loss (`taught`) or out of it for one reason, so `taught` and the `out_*` add up to B.
    """
    rows = reflected.reflections
    answered = [row for row, reflection in enumerate(rows) if reflection.raw is not None]
    wrong = [row for row in answered if reflected.graded.rewards_B[row] < SUCCESS]
    found = [row for row in wrong if rows[row].char_span]
    ideas = [(rows[row].idea, _problem(reflected, row).answer) for row in answered]
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


def repeats_gold(idea: str, gold: str) -> bool:
    """Whether the gold answer, if there is one, stands in the idea, as a word or number of its own."""
    return bool(gold) and _gold(gold).search(idea) is not None


def strip_gold(idea: str, gold: str) -> str:
    """The idea without the gold answer."""
    return _gold(gold).sub("", idea).strip()


def _gold(gold: str) -> re.Pattern[str]:
    name = re.escape(gold.strip())
    if re.fullmatch("[A-Z]", name):  # as an option, not as the article "A" or a unit
        return re.compile(rf"\({name}\)|\b(?i:answer|option|choice|choose)(?: is)?:? {name}\b")
    return re.compile(rf"(?<![\w.,-]){name}(?!\w|[.,]\d)")


def _problem(reflected: Reflected, row: int) -> Problem:
    problems = reflected.graded.prompts.problems
    return problems[row * len(problems) // len(reflected.reflections)]
