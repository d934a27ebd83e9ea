"""Tool calls in the marks that models write around them, and the gold calls that sets hold."""

import json

import pytest

from rosd_jax.errors import UserError
from rosd_jax.rewards import tooluse

GOLD = [{"Action": "getWeather", "Action_Input": '{"city": "Paris", "days": 3}'}]
INPUT = '{"city": "Paris", "days": 3}'
RIGHT = f"Action: getWeather\nAction Input: {INPUT}"

CALLS = [
    "Action: getWeather\nAction Input: ```json\n{}\n```",
    "Action: getWeather\nAction Input: ```json{}```",
    "Action: getWeather\nAction Input:\n```\n{}\n```",
    "Action: getWeather\nAction Input: ~~~JSON\n{}\n~~~",
    "```text\nAction: getWeather\nAction Input: {}\n```",
    "Action:\n```\ngetWeather\n```\nAction Input:\n```json\n{}\n```",
    "**Action:** getWeather\n**Action Input:** {}",
    "**Action**: **getWeather**\n**Action Input**: `{}`",
    "**Action: getWeather**\n**Action Input: {}**",
    "*Action:* getWeather\n*Action Input:* {}",
    "__Action:__ getWeather\n__Action Input:__ {}",
    "<b>Action:</b> getWeather\n<b>Action Input:</b> {}",
    "`Action: getWeather`\n`Action Input: {}`",
    "Action: `getWeather`\nAction Input: {}",
    "Action: «getWeather»\nAction Input: {}",
    "Action: getWeather。\nAction Input: {}",
    'Action: "getWeather"\nAction Input: {}',
    "Action: “getWeather”\nAction Input: '{}'",
    "### Action: getWeather\n### Action Input: {}",
    "### Action\ngetWeather\n\n### Action Input\n{}",
    "- Action: getWeather\n- Action Input: {}",
    "  * **Action**: `getWeather`\n  * **Action Input**: {}",
    "1. Action: getWeather\n2. Action Input: {}",
    "> Action: getWeather\n> Action Input: {}",
    "Action: getWeather()\nAction Input: {}",
    "Action: `getWeather()`.\nAction Input: {}.",
    "Action：getWeather\nAction Input：{}",
    "action: getWeather\naction_input: {}",
    "Action: getWeather Action Input: {}",
    "Thought: I ask. Action: getWeather\nAction Input: {}",
    "Action: getWeather\r\n\r\nAction Input: {}\r\n\r\nObservation: sun",
    "The form is Action: name, Action Input: json.\nAction: getWeather\nAction Input: {}",
    "### Action\n\nI ask for it.\n\nAction: getWeather\nAction Input: {}",
]


def grade(response, gold):
    return tooluse.grade(response, gold, mode="fixed", thinking_open=False)


@pytest.mark.parametrize("call", CALLS)
def test_a_call_is_read_whatever_marks_it(call):
    assert grade(call.replace("{}", INPUT), GOLD).score == 1
    assert grade(call.replace("{}", '{"city": "Rome", "days": 3}'), GOLD).score == 0
    assert grade(call.replace("{}", INPUT).replace("getW", "setW"), GOLD).score == 0


@pytest.mark.parametrize(
    "more",
    [
        "Action: other",
        "**Action:** other",
        "- Action: other",
        "`Action: other`",
        "### Action: other",
        "ACTION: x",
        "Action:",
        "1. Action: other",
        "Action Input: {}",
        "**Action Input:** {}",
        "Action: other\nAction Input: {}",
        "**Action:** other\n**Action Input:** {}",
        "> Action: other\n> Action Input: {}",
        "action: other\naction input: {}",
        "### Action\nother\n### Action Input\n{}",
        "Action: other\nAction Input: {bad",
        RIGHT,
    ],
)
def test_another_call_or_half_of_one_fails_a_right_one(more):
    assert grade(RIGHT, GOLD).score == 1
    assert grade(f"{RIGHT}\n{more}", GOLD).score == 0
    assert grade(f"{more}\n{RIGHT}", GOLD).score == 0


@pytest.mark.parametrize(
    "name",
    [
        "getweather",
        "get Weather",
        "getWeather2",
        "getWeather(city)",
        "getWeather or other",
        "other getWeather",
        "getWeather, other",
        "getWeather\nother",
        "",
        "_getWeather",
        "getWeather\nThought: hm",
    ],
)
def test_another_name_is_another_call(name):
    assert grade(f"Action: {name}\nAction Input: {INPUT}", GOLD).score == 0


NAMES = [
    "get weather",
    "ns:tool",
    "a/b",
    "@user/tool",
    "tool(v2)",
    "get weather (v2)",
    "wetter_für",
    "天气查询",
    "[Optional]f",
    "_private",
    "__init__",
    "C++",
    "a#b",
    "a,b",
    "Ask: user",
    "x — y",
    "Action",
    "λ",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_all_that_its_line_holds(name):
    gold = json.dumps([{"Action": name, "Action_Input": "{}"}])
    for form in ("Action: {}\nAction Input: {{}}", "**Action:** `{}`\n**Action Input:** `{{}}`"):
        assert grade(form.format(name), gold).score == 1
        assert grade(form.format(name + "x"), gold).score == 0


@pytest.mark.parametrize(
    "key",
    [
        "Action_Input",
        "Action Input",
        "ActionInput",
        "action_input",
        "action-input",
        "parameters",
        "arguments",
        "args",
        "input",
    ],
)
@pytest.mark.parametrize("name_key", ["Action", "action", "name", "tool", "tool_name"])
def test_the_usual_spellings_of_gold_keys_are_read(name_key, key):
    for value in ({"a": 1}, '{"a": 1}'):
        gold = [{name_key: "f", key: value}]
        assert grade('Action: f\nAction Input: {"a": 1}', gold).score == 1
        assert grade("Action: f\nAction Input: {}", gold).score == 0


@pytest.mark.parametrize(
    "call",
    [
        {"Action": ""},
        {"Action": "**"},
        {"Action": "a\nb"},
        {"Action": "f Action Input: {} g"},
        {"Action": 5},
        {"Action_Input": "{}"},
        {"Action": "f", "payload": {"a": 1}},
        {"Action": "f", "Action_Input": None},
        {"Action": "f", "Action_Input": "{} and"},
        {"Action": "f", "Action_Input": "{}", "arguments": {"a": 1}},
        {"name": "f", "tool": "g"},
        {"type": "function", "function": {"name": "f", "arguments": "{}"}},
        {},
    ],
)
def test_gold_calls_that_no_response_can_make_are_refused(call):
    with pytest.raises(UserError, match="answer is .*; it must .*, so correct the row"):
        grade(RIGHT, [call])
