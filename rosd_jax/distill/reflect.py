"""Which rollouts are reflected, what the reflector is asked, and where its quote is (host)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from rosd_jax.rewards.grade import SUCCESS
from rosd_jax.settings import LessonSettings, ReflectSettings
from rosd_jax.text import prompts, spans
from rosd_jax.text.prompts import Wording
from rosd_jax.text.thinking import outside_thinking
from rosd_jax.text.tokenizer import Tokenizer
from rosd_jax.types import Graded, Message, Reflected, Reflection, Span


@dataclass(frozen=True)
class ReflectionPlan:
    """What to do with one rollout."""

    kind: Literal["wrong", "right"] | None  # which question the reflector is asked; None: not asked
    solution: int | None  # row of the correct sibling
    note: str = ""  # why the rollout is out of the loss, whatever the reflector says


def choose(
    rewards_B: np.ndarray,
    group_B: np.ndarray,
    length_B: np.ndarray,
    *,
    solution: Literal["shortest", "first"],
    correct: bool = True,
    uniform_groups: bool = False,
    uniform_taught: bool = False,
) -> list[ReflectionPlan]:
    """One plan per row (released code: choice of the solution, skip flags and zero-deviation mask).

    group_B: rows with equal entries are siblings; rows are in sample order. length_B: tokens of the
    responses. The solution of a row is a correct sibling other than itself: the shortest, and of equally
    short ones the earliest (paper), or the first (released code). Only groups with both correct and wrong
    rows are reflected. uniform_groups: groups that are all correct too, as in the released code, although
    there a group whose rewards are all equal never enters the loss. uniform_taught: they are reflected, and
    enter it. correct: whether correct rows are reflected.
    """
    rows: dict[int, list[int]] = {}
    for row, group in enumerate(np.asarray(group_B).tolist()):
        rows.setdefault(group, []).append(row)
    plans = [ReflectionPlan(None, None)] * len(rewards_B)
    for siblings in rows.values():
        rewards = [float(rewards_B[row]) for row in siblings]
        solved = [row for row, reward in zip(siblings, rewards, strict=True) if reward >= SUCCESS]
        if solution == "shortest":
            # The sort is stable, so of equally short ones the earliest comes first.
            solved.sort(key=lambda row: int(length_B[row]))
        mixed = 0 < len(solved) < len(siblings)
        asked = mixed or ((uniform_groups or uniform_taught) and bool(solved))
        equal = len(siblings) > 1 and len(set(rewards)) == 1
        left_out = (equal and not uniform_taught) or not asked
        uniform = "all_right" if solved else "all_wrong"
        for row in siblings:
            plans[row] = _plan(
                right=row in solved,
                solution=next((other for other in solved if other != row), None),
                asked=asked and (row not in solved or correct),
                note=uniform if left_out else "",
            )
    return plans


def _plan(right: bool, solution: int | None, asked: bool, note: str) -> ReflectionPlan:
    if not asked:
        return ReflectionPlan(None, solution, note or "correct_left_out")
    return ReflectionPlan("right" if right else "wrong", solution, note)


def plan_rollouts(
    graded: Graded, reflect: ReflectSettings, *, uniform_taught: bool = False
) -> list[ReflectionPlan]:
    """`choose` for a graded batch, with the `reflect` section of the config and lesson.uniform_groups."""
    return choose(
        graded.rewards_B,
        np.arange(len(graded.texts)) // graded.group_size,
        graded.rollout.length_B,
        solution=reflect.solution,
        correct=reflect.correct,
        uniform_groups=reflect.uniform_groups,
        uniform_taught=uniform_taught,
    )


def reflector_messages(graded: Graded, row: int, plan: ReflectionPlan, wording: Wording) -> list[Message]:
    """What the reflector is asked about a row, without the task's own system prompt.

    Raises ValueError for a row that is not reflected.
    """
    problem = graded.problem(row)
    gold = problem.answer or None
    attempt = graded.texts[row]
    if plan.kind == "right":
        return prompts.right_messages(problem.question, attempt, gold, wording)
    solution = solution_of(graded, plan)
    if plan.kind is None or solution is None:
        raise ValueError(f"row {row} is not reflected")
    return prompts.wrong_messages(problem.question, solution, attempt, gold, wording)


def solution_of(graded: Graded, plan: ReflectionPlan) -> str | None:
    """The correct sibling's text without its thinking; None where there is no such sibling."""
    if plan.solution is None:
        return None
    return outside_thinking(graded.texts[plan.solution], opened=graded.thinking_open).strip()


def build_prompts(
    graded: Graded,
    plans: Sequence[ReflectionPlan],
    tokenizer: Tokenizer,
    reflect: ReflectSettings,
    *,
    thinking: bool,
    wording: Wording,
) -> list[list[int] | None]:
    """The reflector's prompt ids per row; None: not asked, or longer than reflect.max_prompt_tokens.

    A prompt that is too long is left out (overlong="skip"), or its user text is cut from the right until it
    fits (overlong="cut", as in the released code: the instruction at its end is lost first).
    """
    limit = reflect.max_prompt_tokens
    chats = {
        row: reflector_messages(graded, row, plan, wording) for row, plan in enumerate(plans) if plan.kind
    }
    encoded = tokenizer.encode_chats(chats.values(), thinking=thinking)
    built: list[list[int] | None] = [None] * len(plans)
    for (row, messages), ids in zip(chats.items(), encoded, strict=True):
        if len(ids) <= limit:
            built[row] = ids
        elif reflect.overlong == "cut":
            built[row] = cut(tokenizer, messages, ids, limit, thinking=thinking)
    return built


def cut(
    tokenizer: Tokenizer, messages: list[Message], ids: list[int], limit: int, *, thinking: bool
) -> list[int] | None:
    """Chat ids of at most `limit` tokens, or None if an empty user text would not fit either.

    ids: of the whole chat, which are more.
    """
    *head, user = messages
    text_ids = tokenizer.encode(user["content"])
    keep = len(text_ids)
    # The cut text may be split into other tokens, so one subtraction may not be enough.
    while len(ids) > limit and keep > 0:
        keep = max(0, keep - (len(ids) - limit))
        text = tokenizer.decode(text_ids[:keep]).rstrip("\ufffd")
        ids = tokenizer.encode_chats([[*head, {**user, "content": text}]], thinking=thinking)[0]
    return ids if len(ids) <= limit else None


def read_answer(
    graded: Graded, row: int, raw: str, tokenizer: Tokenizer, lesson: LessonSettings, *, thinking_open: bool
) -> Reflection:
    """What the reflector's answer about a row says: its idea, and for a wrong row the quote and its place.

    thinking_open: the reflector's prompt ended inside a thinking block.
    """
    idea, quote = parse(raw, official=lesson.locate == "reencode", thinking_open=thinking_open)
    if graded.rewards_B[row] >= SUCCESS:
        return Reflection(idea=idea)
    return with_place(Reflection(idea=idea, quote=quote), graded, row, tokenizer, lesson.locate)


def gather(
    graded: Graded,
    plans: Sequence[ReflectionPlan],
    raws: Mapping[int, str],
    answers: Mapping[int, Reflection],
    lesson: LessonSettings,
) -> Reflected:
    """One reflection per row, with a note where it is out of the loss.

    raws, answers: the reflector's text, and what `read_answer` makes of it, by row; only rows with a prompt,
    so none for methods that do not reflect.
    """
    reflections = []
    for row, plan in enumerate(plans):
        said = answers.get(row, Reflection())
        reflection = replace(said, raw=raws.get(row), solution=solution_of(graded, plan))
        reflections.append(replace(reflection, note=note_of(plan, reflection, lesson)))
    return Reflected(graded, tuple(reflections))


def parse(raw: str, *, official: bool, thinking_open: bool) -> tuple[str | None, str | None]:
    """The idea and the quote of an answer. Drafts inside its thinking are not read.

    official: as in the released code, which reads the whole answer.
    """
    if official:
        return spans.parse_official(raw)
    return spans.parse_reflection(outside_thinking(raw, opened=thinking_open))


def with_place(
    reflection: Reflection,
    graded: Graded,
    row: int,
    tokenizer: Tokenizer,
    how: Literal["offsets", "reencode"],
) -> Reflection:
    """The reflection with the place of its quote in the row's response, if the quote is there.

    how: `lesson.locate`, the way from characters to tokens.
    """
    text = graded.texts[row]
    located = locate(text, reflection.quote, official=how == "reencode")
    if located is None:
        return reflection
    char_span = (located.start, located.stop)
    ids = graded.rollout.tokens_BR[row, : int(graded.rollout.length_B[row])]
    token_span = _token_span(char_span, text, ids, tokenizer, how)
    return replace(reflection, char_span=char_span, token_span=token_span, ambiguous=located.ambiguous)


def locate(text: str, quote: str | None, *, official: bool) -> spans.Located | None:
    """Finds the quote as written, or else with our look-alike characters replaced by the originals.

    official: the first exact occurrence, as in the released code.
    """
    search: Callable[[str, str | None], spans.Located | None] = spans.locate_quote
    if official:
        search = _first_exact
    restored = prompts.restore(quote or "")
    return search(text, quote) or (search(text, restored) if restored != quote else None)


def _first_exact(text: str, quote: str | None) -> spans.Located | None:
    found = spans.find_exact(text, quote)
    return found and spans.Located(*found, ambiguous=text.find(text[slice(*found)], found[1]) >= 0)


def _token_span(char_span: Span, text: str, ids: np.ndarray, tokenizer: Tokenizer, how: str) -> Span:
    if how == "offsets":
        return spans.chars_to_tokens(char_span, tokenizer.offsets(ids))
    # As in the released code. The text encoded again may have more tokens than were sampled, hence the bound.
    start, stop = (spans.official_token_start(tokenizer.encode, text, at) for at in char_span)
    return min(start, len(ids)), min(stop, len(ids))


def note_of(plan: ReflectionPlan, reflection: Reflection, lesson: LessonSettings) -> str:
    """Why a rollout leaves the loss, a key of notes.NOTES; "" if it stays."""
    if plan.kind is None or plan.note:
        return plan.note
    lacking = _lacking(plan, reflection, lesson)
    # A rollout whose prompt was too long has neither idea nor quote; it stays if none of them is needed.
    unread = reflection.raw is None and lacking in ("no_idea", "quote_missing")
    return "overlong" if unread else lacking


def _lacking(plan: ReflectionPlan, reflection: Reflection, lesson: LessonSettings) -> str:
    """What the lesson needs of a reflected rollout and does not have; "" if it has all."""
    context = lesson.teacher_context
    solution = reflection.solution
    if context == "solution" and solution is None:
        return "no_solution"
    if reflection.idea is None and (
        context == "idea" or (context == "idea_or_solution" and solution is None)
    ):
        return "no_idea"
    needs_span = plan.kind == "wrong" and lesson.region != "full"
    if needs_span and reflection.token_span is None and lesson.quote_missing == "skip":
        return "quote_missing"
    return ""
