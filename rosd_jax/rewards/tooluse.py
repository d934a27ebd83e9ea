"""The tool-use checker: the calls a response makes against the gold calls.

`fixed` reads `Action: name` followed by `Action Input: {json}` in order and compares the calls pair
by pair; the input may nest, and a call whose input cannot be read equals no gold call. `release` is
the released checker: it compares the names as a multiset and all inputs merged into one dictionary,
reads an input only as far as its first `}`, drops what does not parse and cuts a name at the first
character that is no letter, digit or `_`.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from rosd_jax.config import UserError
from rosd_jax.rewards.grade import Grade, Mode, strip_thinking

Call = tuple[str, str | None]  # name, and the input as canonical JSON (None: not readable)

# A call; or a line that opens half of one, which must not pass unseen beside a right call.
_CALL = re.compile(r"Action:\s*(?P<name>[\w\[\].-]+)\s*Action Input:\s*|^Action(?: Input)?:", re.MULTILINE)


def grade(response: str, answer: str | list[dict[str, Any]], *, mode: Mode) -> Grade:
    """Grades the calls of a response.

    `answer` is a list of `{"Action": name, "Action_Input": object or its JSON text}`, or that list
    as JSON text; a missing input means `{}`. Raises UserError for another `answer`, but in release
    mode an `answer` that is not JSON scores 0 and an input that is not JSON counts as `{}`.
    """
    if mode == "release":
        return _grade_release(response, answer)
    gold = [(name, _canonical(text)[0]) for name, text in _gold_calls(answer)]
    if any(value is None for _, value in gold):
        raise _bad_answer(answer)
    calls = list(_calls(strip_thinking(response)))
    readable = all(value is not None for _, value in calls)
    prediction = json.dumps(calls) if calls else ""
    return Grade(float(readable and calls == gold), prediction, readable and bool(calls))


def _calls(text: str) -> Iterator[Call]:
    """The calls in order, up to the first that cannot be read: no later one can mend the score."""
    position, value = 0, ""
    while value is not None and (mark := _CALL.search(text, position)):
        value, position = _canonical(text, mark.end()) if mark["name"] else (None, mark.end())
        yield mark["name"] or "", value


def _gold_calls(answer: str | list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The gold's names and inputs, the latter as JSON text."""
    try:
        items = json.loads(answer) if isinstance(answer, str) else answer
        inputs = [item.get("Action_Input", {}) for item in items]
        texts = [value if isinstance(value, str) else json.dumps(value) for value in inputs]
        return [(item["Action"], text) for item, text in zip(items, texts, strict=True)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _bad_answer(answer) from error


def _bad_answer(answer: object) -> UserError:
    return UserError(
        f"answer is {answer!r:.80}; a tool-use answer must be a JSON list of objects with Action "
        "and Action_Input (itself JSON), so mend the row"
    )


def _whole_or_float(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


# 5 and 5.0 are one number, while true and 1, or "5" and 5, are not: so JSON text is compared.
_DECODER = json.JSONDecoder(parse_float=_whole_or_float)


def _canonical(text: str, start: int = 0) -> tuple[str | None, int]:
    """The JSON value at `start` in one spelling, and where it ends; (None, start) if unreadable."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        return json.dumps(value, sort_keys=True), end
    except (ValueError, RecursionError):
        return None, start


def _grade_release(response: str, answer: str | list[dict[str, Any]]) -> Grade:
    if isinstance(answer, str) and _load(answer) is None:
        return Grade(0.0, "", False)
    gold = _gold_calls(answer)
    names = re.findall(r"Action:\s*(\w+)", response)
    inputs = _merge(_braced_inputs(response))
    same_names = Counter(names) == Counter(name for name, _ in gold)
    same_inputs = inputs == _merge(text for _, text in gold)
    # The released format pattern: an action, and an input at the start of a later line.
    action = response.find("Action:")
    well_formed = action >= 0 and response.find("\nAction Input:", action + len("Action:")) >= 0
    prediction = f"Actions: {names}, Inputs: {inputs}"
    return Grade(float(same_names and same_inputs), prediction, well_formed)


def _braced_inputs(text: str) -> Iterator[str]:
    # As the pattern `Action Input:\s*({.*?})` would find them, in linear time on any text.
    opening = re.compile(r"Action Input:\s*(?=\{)")
    mark = opening.search(text)
    while mark and (end := text.find("}", mark.end()) + 1):
        yield text[mark.end() : end]
        mark = opening.search(text, end)


def _merge(inputs: Iterable[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for text in inputs:
        merged.update(_load(text) or {})
    return merged


def _load(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
