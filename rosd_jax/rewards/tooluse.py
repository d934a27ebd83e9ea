"""The tool-use checker: compares the calls in a response with the gold calls.

`fixed` reads `Action: name` followed by `Action Input: {json}`, in order, and compares the calls pair by
pair. An input may be nested, and a call whose input cannot be read equals no gold call. A name is the whole
rest of its line. Headings, bullets, bold, fences, quotation marks, `()` and final punctuation around labels,
names and inputs are ignored.

`official` is the released checker: it compares the names as a multiset and all inputs merged into one
dictionary, reads an input only up to its first `}`, ignores what does not parse, and cuts a name at the first
character that is not a letter, digit or `_`.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from rosd_jax.errors import UserError
from rosd_jax.rewards.grade import Grade, Mode
from rosd_jax.text.thinking import outside_thinking

Call = tuple[str, str | None]  # name, and the input as canonical JSON (None: it cannot be read)

# The spellings of the two keys of a gold call in data sets, letters only.
_NAME_KEYS = frozenset({"action", "name", "tool", "toolname", "function", "functionname", "api", "apiname"})
_INPUT_KEYS = frozenset(
    {"actioninput", "input", "toolinput", "inputs", "arguments", "args", "parameters", "params", "kwargs"}
)

# A label at the start of a line, after any marks, or inside one. Without a colon it may be a heading.
_LABEL = re.compile(
    r"(?:(?P<start>^[ \t>#*_`~\u2022\u00b7+.)\d-]*(?:<\w{1,6}>)?))?"
    r"(?<![^\W_])(?P<word>action)(?P<input>[ \t_-]?input)?[*_`]{0,3}(?:</\w{1,6}>)?"
    r"(?:[ \t]?(?P<colon>[:\uff1a])(?:</\w{1,6}>)?[*`]*(?:_{1,3}(?=\s))?|(?(start)[ \t]*$|(?!)))",
    re.MULTILINE | re.IGNORECASE,
)
_BEFORE_INPUT = re.compile(r"[\s*`~']*(?:(?<=```|~~~)(?:json\w{0,2}|[a-z]+(?=[ \t]*\n)))?\s*", re.IGNORECASE)
_FENCE = re.compile(r"(?:```+|~~~+)\s*\w*")
_TAG = re.compile(r"</?(?:b|i|em|strong|code)>", re.IGNORECASE)


def grade(response: str, answer: str | list[dict[str, Any]], *, mode: Mode, thinking_open: bool) -> Grade:
    """Grades the calls of a response.

    answer: as for `gold_calls`; raises UserError for a malformed one. thinking_open: the prompt ended inside
    `<think>`. The mode "official" ignores thinking; there an `answer` that is not JSON scores 0, and an input
    that is not JSON counts as `{}`.
    """
    if mode == "official":
        return _grade_official(response, answer)
    try:
        gold = [_comparable(call) for call in gold_calls(answer)]
    except ValueError as error:
        raise _bad_answer(answer, str(error)) from error
    calls = list(_calls(outside_thinking(response, opened=thinking_open)))
    readable = all(value is not None for _, value in calls)
    prediction = json.dumps(calls) if calls else ""
    return Grade(float(readable and calls == gold), prediction, readable and bool(calls))


def gold_calls(answer: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The gold calls as `{"Action": name, "Action_Input": object or its JSON text}`.

    answer: a list of such objects, or that list as JSON text. Other usual spellings of the keys are accepted,
    and a missing input means `{}`. Raises ValueError, with the rule that is broken, for a malformed list and
    for calls that no response could make.
    """
    calls = _loads(answer) if isinstance(answer, str) else answer
    if not isinstance(calls, list) or not calls or not all(isinstance(call, dict) for call in calls):
        raise ValueError("must be a JSON list of calls with Action and Action_Input (JSON)")
    read = [_gold_call(call) for call in calls]
    gold = [_comparable(call) for call in read]
    written = "\n".join(f"Action: {name}\nAction Input: {value}" for name, value in gold)
    if any(value is None for _, value in gold) or list(_calls(written)) != gold:
        raise ValueError("must have calls that a response can make: a name on one line, and an input in JSON")
    return read


def _gold_call(call: dict[str, Any]) -> dict[str, Any]:
    names, inputs = (
        [key for key in call if "".join(filter(str.isalnum, key)).lower() in known]
        for known in (_NAME_KEYS, _INPUT_KEYS)
    )
    keys = ", ".join(map(repr, call))[:80]
    if len(names) != 1 or len(inputs) > 1:
        raise ValueError(
            f"must give each call one Action and one Action_Input, not the keys {keys or 'none'}"
        )
    if not inputs and len(call) > 1:
        raise ValueError(f"must give each call an Action_Input, which none of the keys {keys} is")
    name = call[names[0]]
    value = call[inputs[0]] if inputs else {}
    if not isinstance(name, str) or not isinstance(value, dict | str):
        raise ValueError("must give each call a name, and as its input an object or JSON text")
    return {"Action": name, "Action_Input": value}


def _comparable(call: dict[str, Any]) -> Call:
    """A gold call in the form in which `_calls` reads one."""
    value = call["Action_Input"]
    text = value if isinstance(value, str) else json.dumps(value)
    return _name(call["Action"]) or "", _whole(text)


def _calls(text: str) -> Iterator[Call]:
    """The calls in order, up to the first that cannot be read, since no later one could repair it."""
    position = 0
    value = ""
    while value is not None and (label := _LABEL.search(text, position)):
        position = label.end()
        if label["input"] is None and (call := _call(text, label)):
            name, value, position = call
            yield name, value
        elif label["start"] is not None and label["colon"]:
            value = None  # half a call must not be overlooked next to a correct one
            yield "", value


def _call(text: str, action: re.Match[str]) -> tuple[str, str | None, int] | None:
    """The call that an `Action:` opens: its name, its input and where it ends; None for half a call."""
    given = _LABEL.search(text, action.end())
    if given is None or given["input"] is None:
        return None
    written = text[action.end() : given.start()]
    name = _name(written)
    if name is None or (action["start"] is None and not _is_call_inside_line(written, action, given)):
        return None
    start = _BEFORE_INPUT.match(text, given.end()).end()  # pyright: ignore[reportOptionalMemberAccess]
    return name, *_canonical(text, start)


def _is_call_inside_line(written: str, action: re.Match[str], given: re.Match[str]) -> bool:
    """Whether an `Action:` inside a line opens a call; "Use Action: a tool, Action Input: JSON" does not."""
    one_word = re.fullmatch(r"\s*[^\s,;]+\s*", written) is not None
    return action["word"] == "Action" and (given["start"] is not None or one_word)


def _name(written: str) -> str | None:
    """A tool's name without marks around it; None unless there is one, on a separate line."""
    lines = [line.strip() for line in written.splitlines()]
    lines = [line for line in lines if line and not _FENCE.fullmatch(line)]
    if len(lines) != 1:
        return None
    name = unicodedata.normalize("NFC", _TAG.sub("", lines[0])).replace("\\_", "_")
    before = None
    while name != before:
        before = name
        name = (
            name.strip(" \t*`\"'\u2018\u2019\u201c\u201d\u00ab\u00bb").rstrip(".,;:\u3002").removesuffix("()")
        )
    return " ".join(name.split()) or None


def _bad_answer(answer: object, rule: str) -> UserError:
    return UserError(f"answer is {answer!r:.80}; it {rule}, so correct the row")


def _whole_or_float(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


# 5 and 5.0 are the same number, but true and 1, or "5" and 5, are not. So JSON text is compared.
_DECODER = json.JSONDecoder(parse_float=_whole_or_float)


def _canonical(text: str, start: int = 0) -> tuple[str | None, int]:
    """The JSON value at `start` in canonical form, and where it ends; (None, start) if it cannot be read."""
    try:
        value, end = _DECODER.raw_decode(text, start)
        return json.dumps(value, sort_keys=True), end
    except (ValueError, RecursionError):
        return None, start


def _whole(text: str) -> str | None:
    """A text that is one JSON value, in canonical form; None for other text."""
    text = text.strip()
    value, end = _canonical(text)
    return value if end == len(text) else None


def _grade_official(response: str, answer: str | list[dict[str, Any]]) -> Grade:
    if isinstance(answer, str) and _loads(answer) is None:
        return Grade(0.0, "", False)
    gold = _official_gold(answer)
    names = re.findall(r"Action:\s*(\w+)", response)
    inputs = _merge(_braced_inputs(response))
    same_names = Counter(names) == Counter(name for name, _ in gold)
    same_inputs = inputs == _merge(text for _, text in gold)
    # The format pattern of the released code: an action, and an input at the start of a later line.
    action = response.find("Action:")
    well_formed = action >= 0 and response.find("\nAction Input:", action + len("Action:")) >= 0
    prediction = f"Actions: {names}, Inputs: {inputs}"
    return Grade(float(same_names and same_inputs), prediction, well_formed)


def _official_gold(answer: str | list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The names and the inputs of the gold calls, the latter as JSON text."""
    try:
        items = json.loads(answer) if isinstance(answer, str) else answer
        inputs = [item.get("Action_Input", {}) for item in items]
        texts = [value if isinstance(value, str) else json.dumps(value) for value in inputs]
        return [(item["Action"], text) for item, text in zip(items, texts, strict=True)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        rule = "must be a JSON list of calls with Action and Action_Input"
        raise _bad_answer(answer, rule) from error


def _braced_inputs(text: str) -> Iterator[str]:
    # Finds what the pattern `Action Input:\s*({.*?})` finds, but in linear time on any text.
    opening = re.compile(r"Action Input:\s*(?=\{)")
    mark = opening.search(text)
    while mark and (end := text.find("}", mark.end()) + 1):
        yield text[mark.end() : end]
        mark = opening.search(text, end)


def _merge(inputs: Iterable[str]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for text in inputs:
        merged.update(_loads(text) or {})
    return merged


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
