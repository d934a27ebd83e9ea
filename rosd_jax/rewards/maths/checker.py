r"""The mathematics checker: reads the boxed answer and compares it with the gold answer.

Reading the box is a pure function of the text. Comparing two answers computes what a model wrote, and
math-verify, which `official` needs, may never return (for 9^{9^{9^{9}}}); its own time limit is an alarm that
works in a main thread only. So answers are compared in worker processes (workers.py). This module imports
neither JAX nor, in the parent, math-verify.

`fixed` takes the last box of the response outside the thinking (box.py) and compares the answers as
mathematics (equal.py; docs/grading.md has the rules). `official` is the released checker: it searches only
the last 100 characters, and compares the answers as plain strings, so most LaTeX is not read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from rosd_jax.rewards.grade import Mode
from rosd_jax.rewards.maths.box import last_box
from rosd_jax.text.thinking import outside_thinking

Question = tuple[str, str, Mode]  # prediction, gold answer, mode

_OFFICIAL_WINDOW = 100  # characters
_MAX_ANSWER = 1000  # characters; a longer text is not an answer, and parsing it may take minutes


def predict(response: str, *, mode: Mode, thinking_open: bool) -> str:
    """The content of the last box of a response, "" if there is none.

    thinking_open: the prompt ended inside `<think>`; the mode "official" ignores it.
    """
    if mode == "official":
        return _last_box_official(response[-_OFFICIAL_WINDOW:])
    return last_box(outside_thinking(response, opened=thinking_open))


def _last_box_official(text: str) -> str:
    _, opened, rest = text.rpartition("\\boxed{")
    depth = 1
    for position, character in enumerate(rest if opened else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return ""


def agree(prediction: str, answer: str, mode: Mode) -> bool:
    """Whether two answers are equal. An overlong prediction equals nothing.

    May never return, so call it in a worker only.
    """
    if len(prediction) > _MAX_ANSWER:
        return False
    if mode == "fixed":
        from rosd_jax.rewards.maths.equal import equal

        return equal(prediction, answer)
    from math_verify import parse, verify

    gold = parse(answer, parsing_timeout=0)
    return verify(gold, parse(prediction, parsing_timeout=0), timeout_seconds=0)


def answerer(mode: Mode) -> Callable[[Question], bool]:
    """The function that a worker answers with (workers.py): whether the answers of a question agree."""
    if mode == "official":
        import math_verify  # noqa: F401  (now, so that its import does not count for the first question)

        logging.disable(logging.CRITICAL)  # it logs what it cannot parse

    def answer(question: Question) -> bool:
        try:
            return agree(*question)
        except Exception:
            return False  # as in the released code, an answer that breaks the comparison scores 0

    return answer
