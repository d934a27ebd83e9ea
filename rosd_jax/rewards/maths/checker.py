r"""The mathematics checker: the boxed answer against the gold one, compared in workers.

Reading the box is a pure function of the text. Comparing two answers is not so tame: it computes what
a model wrote, and math-verify, which `official` needs, may take a lifetime (for 9^{9^{9^{9}}}) and guards
itself with an alarm that works on a main thread only. So the comparison runs in worker processes
(workers.py); this module imports neither JAX nor (in the parent) math-verify.

`fixed` takes the last box of the whole response (box.py), outside the thinking, and compares both
answers as mathematics (equal.py; docs/grading.md has the rules). `official` is the released checker: only
the last 100 characters are searched, and the answers are compared as bare strings, which leaves most
LaTeX unread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from rosd_jax.rewards.grade import Mode
from rosd_jax.rewards.maths.box import last_box
from rosd_jax.text.thinking import outside_thinking

Question = tuple[str, str, Mode]  # prediction, gold answer, mode

_OFFICIAL_WINDOW = 100  # characters
_MAX_ANSWER = 1000  # characters; nothing longer is an answer, and parsing it may take minutes


def predict(response: str, *, mode: Mode, thinking_open: bool = False) -> str:
    """The content of the last box of a response, "" where there is none.

    thinking_open: the prompt ended inside `<think>`; mode "official" does not look at it.
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
    """Whether two answers are equal; an overlong prediction equals nothing.

    May never return: call it in a worker only.
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
    """What a worker answers with (workers.py): whether the two answers of a question agree."""
    if mode == "official":
        import math_verify  # noqa: F401  (now, so that it takes no time of the first question)

        logging.disable(logging.CRITICAL)  # it logs what it cannot parse

    def answer(question: Question) -> bool:
        try:
            return agree(*question)
        except Exception:
            return False  # the release, too, scores an answer 0 that breaks the comparison

    return answer
