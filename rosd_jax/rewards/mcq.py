r"""Checkers that read an answer from a tag: multiple choice, and the gym.

`fixed` reads the last complete `<answer>...</answer>` outside the thinking, with any spacing and case of the
tags, and the one letter chosen there (choice.py). The tag is required: a letter without it scores 0.
`official` is the released checker: what follows the last `<answer>` (or the whole text, without a tag) must
equal the gold letter exactly.
"""

from __future__ import annotations

import re

from rosd_jax.rewards.choice import read_choice
from rosd_jax.rewards.grade import Grade, Mode
from rosd_jax.text.thinking import outside_thinking

_TAG = re.compile(r"[<＜]\s{0,9}(\\?/?)\s{0,9}answer\s{0,9}[>＞]", re.IGNORECASE)  # JSON may escape the slash

_TAGGED_LETTER_AT_END = re.compile(r"<answer>\s*[ABCD]\s*</answer>$")


def grade(response: str, answer: str, *, mode: Mode, thinking_open: bool) -> Grade:
    """Grades a multiple-choice response against the gold letter.

    thinking_open: the prompt ended inside `<think>`; the mode "official" ignores it.
    """
    if mode == "official":
        return _grade_official(response, answer)
    content = last_answer(outside_thinking(response, opened=thinking_open))
    letter = read_choice(content) if content is not None else ""
    return Grade(float(letter == answer.strip().upper()), letter, bool(letter))


def grade_gym(response: str, answer: str, *, thinking_open: bool) -> Grade:
    """Grades a gym response: the last `<answer>` block must equal the gold answer up to white space."""
    content = last_answer(outside_thinking(response, opened=thinking_open))
    if content is None:
        return Grade(0.0, "", False)
    prediction = " ".join(content.split())
    return Grade(float(prediction == " ".join(answer.split())), prediction, True)


def last_answer(text: str) -> str | None:
    """The content of the last complete `<answer>...</answer>`; None if there is none."""
    content = start = None
    for tag in _TAG.finditer(text):
        if not tag[1]:
            start = tag.end()
        elif start is not None:
            content = text[start : tag.start()]
            start = None
    return content


def _grade_official(response: str, answer: str) -> Grade:
    # The released `incorrect_format` is 1 for a correct format; well_formed is true for one.
    tail = response.rpartition("<answer>")[2]
    prediction = tail.partition("</answer>")[0].strip()
    well_formed = _TAGGED_LETTER_AT_END.search(response) is not None
    return Grade(float(prediction == answer), prediction, well_formed)
