r"""The mathematics checker: the boxed answer against the gold one, by math-verify in workers.

Reading the box is a pure function of the text. Comparing two answers is not so tame: math-verify
runs a parser and a computer algebra system on what a model wrote, may need a millisecond or (for
9^{9^{9^{9}}}) a lifetime, and guards itself with an alarm that works on a main thread only. So the
comparison runs in worker processes (workers.py); this module imports neither JAX nor (in the parent)
math-verify.

`fixed` takes the last `\boxed{...}` or `\fbox{...}` of the whole response, outside the thinking,
and compares both answers as LaTeX. `release` is the released checker: only the last 100 characters
are searched, and the answers are compared as bare strings, which leaves most LaTeX unread.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable

from rosd_jax.rewards.grade import Mode, strip_thinking

Question = tuple[str, str, Mode]  # prediction, gold answer, mode

_RELEASE_WINDOW = 100  # characters
_MAX_ANSWER = 1000  # characters; nothing longer is an answer, and parsing it may take minutes
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)


def predict(response: str, *, mode: Mode) -> str:
    """The content of the last box of a response, "" where there is none."""
    if mode == "release":
        return _last_box_release(response[-_RELEASE_WINDOW:])
    return _last_box(strip_thinking(response)).strip()


def _last_box(text: str) -> str:
    """Of the boxes whose braces balance, the one that opens last; escaped braces do not count."""
    opened: list[tuple[bool, int]] = []  # (is a box, where its content starts)
    last = (-1, -1)
    for mark in _BRACE.finditer(text):
        if mark[0].endswith("{") and mark[0] != r"\{":
            opened.append((mark[0] != "{", mark.end()))
        elif mark[0] == "}" and opened:
            is_box, start = opened.pop()
            if is_box and start > last[0]:
                last = (start, mark.start())
    return text[slice(*last)] if last[0] >= 0 else ""


def _last_box_release(text: str) -> str:
    _, opened, rest = text.rpartition("\\boxed{")
    depth = 1
    for position, character in enumerate(rest if opened else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:position]
    return ""


def agree(prediction: str, answer: str, mode: Mode) -> bool:
    """Whether math-verify finds two answers equal; an overlong prediction equals nothing.

    May never return: call it in a worker only.
    """
    from math_verify import parse, verify

    if len(prediction) > _MAX_ANSWER:
        return False
    if mode == "fixed":
        prediction, answer = f"\\boxed{{{prediction}}}", f"\\boxed{{{answer}}}"
    gold = parse(answer, parsing_timeout=0)
    return verify(gold, parse(prediction, parsing_timeout=0), timeout_seconds=0)


def answerer() -> Callable[[Question], bool]:
    """What a worker answers with (workers.py): whether the two answers of a question agree."""
    import math_verify  # noqa: F401

    logging.disable(logging.CRITICAL)

    def answer(question: Question) -> bool:
        try:
            return agree(*question)
        except Exception:
            return False  # the release, too, scores an answer 0 that breaks the comparison

    return answer
