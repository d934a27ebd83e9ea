"""Mode "official" gives the released checkers' verdicts, predictions and format flags.

The mathematics vectors were made with math-verify 0.8.0. With 0.9.0 no case differs, so none is
excused here.
"""

import json

import pytest

from rosd_jax.rewards import Grader, mcq, tooluse
from rosd_jax.types import Problem
from support import golden_dir


def _cases(name):
    return json.loads((golden_dir() / f"reward_{name}.json").read_text())


def _differences(cases, grades, flag_is_inverted=False):
    """(case number, wanted, got) for each case whose score, prediction or flag differs."""
    wanted = [
        (case["score"], case["pred"], bool(case["incorrect_format"]) is flag_is_inverted) for case in cases
    ]
    got = [(grade.score, grade.prediction, grade.well_formed) for grade in grades]
    assert len(wanted) == len(got) > 0
    return [(i, w, g) for i, (w, g) in enumerate(zip(wanted, got, strict=True)) if w != g]


def _official(checker):
    return lambda response, answer: checker.grade(response, answer, mode="official", thinking_open=False)


@pytest.mark.parametrize(
    ("name", "grade", "flag_is_inverted"),
    [
        ("mcq", _official(mcq), True),  # the released flag is 1 for a well-formed response
        ("tooluse", _official(tooluse), False),
    ],
)
def test_official_mode_agrees(name, grade, flag_is_inverted):
    cases = _cases(name)
    grades = [grade(case["response"], case["ground_truth"]) for case in cases]
    assert _differences(cases, grades, flag_is_inverted) == []


def test_official_mode_agrees_on_math():
    cases = _cases("math")
    problems = [
        Problem(f"golden/{i}", "golden", "math", (), case["ground_truth"]) for i, case in enumerate(cases)
    ]
    with Grader(mode="official", timeout_s=20) as grader:
        grades = grader.grade_all([case["response"] for case in cases], problems, thinking_open=False)
        assert grader.timeouts == 0
    assert _differences(cases, grades) == []
