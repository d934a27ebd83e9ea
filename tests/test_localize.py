"""Where a reflector points, against responses whose first error is known."""

import json
import math

import numpy as np
import pytest

from rosd_jax.errors import UserError
from rosd_jax.evals.localize import (
    Finding,
    Truth,
    gym_truth,
    localization_scores,
    processbench_truth,
)
from rosd_jax.gym import problems as gym
from support import data_dir

STEPS = ((0, 10), (12, 20), (22, 30), (32, 40))
TEXT = "12 +7 *3 -5 +9"
RIGHT = gym.respond(gym.solve(gym.Chain(12, (("+", 7), ("*", 3), ("-", 5), ("+", 9)))))


def wrong(span, quoted=True):
    return Finding(Truth((22, 30), STEPS), quoted, span)


def right(span=None, quoted=False):
    return Finding(Truth(None, STEPS), quoted, span)


def test_scores_by_hand():
    findings = [
        wrong((23, 28)),  # exact
        wrong((20, 24)),  # begins in white space: step 2 is the first it touches
        wrong((33, 36)),  # one late
        wrong((1, 4)),  # two early
        wrong((15, 35)),  # one early: a quote points where it begins
        wrong(None),  # quote not found
        wrong(None, quoted=False),
        wrong((20, 22)),  # between steps
        right(),
        right((1, 5), quoted=True),
        right(None, quoted=True),  # an invented quote marks an error all the same
        right(),
    ]
    got = localization_scores(findings)
    assert (got["n_wrong"], got["n_right"]) == (8, 4)
    assert got["quote_found"] == pytest.approx(7 / 9)
    assert got["exact"] == pytest.approx(2 / 8)
    assert got["within_one"] == pytest.approx(4 / 8)
    assert got["early"] == pytest.approx(2 / 8)
    assert got["right_kept"] == pytest.approx(2 / 4)
    assert got["f1"] == pytest.approx(2 * 0.25 * 0.5 / 0.75)


def test_scores_of_nothing_and_of_one_kind():
    assert math.isnan(localization_scores([])["f1"])
    only_wrong = localization_scores([wrong((23, 28))])
    assert only_wrong["exact"] == 1 and math.isnan(only_wrong["f1"])
    assert localization_scores([wrong(None), right((0, 3), quoted=True)])["f1"] == 0


def test_truth_of_gym_responses():
    assert gym_truth(TEXT, RIGHT).error is None
    assert [RIGHT[a:b] for a, b in gym_truth(TEXT, RIGHT).steps] == RIGHT.split("\n")
    slipped = RIGHT.replace("2*3=6", "2*3=7")
    truth = gym_truth(TEXT, slipped)
    assert truth.error == truth.steps[1] and slipped[slice(*truth.steps[1])] == "b 2*3=7"


@pytest.mark.parametrize("response", ["", "\n", "a 12+7=2", "a 12+7=2\n", "\ud800\x00" * 9, RIGHT * 2])
def test_an_error_of_the_gym_is_always_a_step(response):
    truth = gym_truth(TEXT, response)
    assert truth.error in truth.steps


def test_gym_truth_needs_a_gym_problem():
    with pytest.raises(ValueError, match="not a problem of the gym"):
        gym_truth("What is 2 + 2?", "4")


def test_a_perfect_reflector_of_the_gym_scores_one():
    rng, findings = np.random.default_rng(0), []
    for _ in range(60):
        chain = gym.sample_chain(rng, "chain", "test")
        response = gym.respond(gym.solve(chain, rng))
        truth = gym_truth(chain.text, response)
        findings.append(Finding(truth, truth.error is not None, truth.error))
    got = localization_scores(findings)
    assert got["n_wrong"] > 5 and got["n_right"] > 5
    assert got["exact"] == got["right_kept"] == got["f1"] == 1 and got["early"] == 0


def test_processbench_rows_become_truths():
    lines = data_dir("processbench", "reflector_bench.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    truths = [processbench_truth(row) for row in rows]
    assert len(truths) == 2386 and sum(truth.error is not None for truth in truths) == 1450
    for row, truth in zip(rows, truths, strict=True):
        assert "\n\n".join(row["response"][a:b] for a, b in truth.steps) == row["response"]
    perfect = [Finding(truth, truth.error is not None, truth.error) for truth in truths]
    assert localization_scores(perfect)["f1"] == 1
    first = [Finding(truth, True, truth.steps[0]) for truth in truths]
    got = localization_scores(first)
    assert got["right_kept"] == 0 and got["exact"] + got["early"] == pytest.approx(1)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"label": 4}, "label"),
        ({"label": None}, "label"),
        ({"label": True}, "label"),
        ({"step_char_spans": [[0, 99]]}, "step_char_spans"),
        ({"step_char_spans": None}, "step_char_spans"),
        ({"response": None}, "step_char_spans"),
    ],
)
def test_a_malformed_row_is_named(change, named):
    row = {"id": "math-7", "response": "one step", "step_char_spans": [[0, 8]], "label": 0}
    with pytest.raises(UserError, match=f"'math-7'.*{named}"):
        processbench_truth({**row, **change})
