"""Where a reflector points, against responses whose first error is known."""

import json
import math

import numpy as np
import pytest

from configs import quickstart
from rosd_jax.config import validate
from rosd_jax.errors import UserError
from rosd_jax.evals.localize import (
    Finding,
    Truth,
    gym_truth,
    localization_scores,
    processbench_truth,
)
from rosd_jax.fields import replace
from rosd_jax.gym import problems as gym
from rosd_jax.gym.texts import wrong_solution
from rosd_jax.train.console import Console
from rosd_jax.train.localize import localize
from support import ROOT, data_dir

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


# --- the command ------------------------------------------------------------------------------------------


@pytest.fixture
def settings():
    config = quickstart.get_config()
    config.model.path = str(ROOT / "models" / "gym")
    config.compile_cache = ""
    return validate(config)


def labelled(count):
    """Rows of the gym's shipped reflector, whose quotes are exact: every fourth response is right."""
    rng = np.random.default_rng(0)
    for i in range(count):
        chain = gym.sample_chain(rng, "chain", "test")
        solution = gym.respond(gym.solve(chain))
        response = gym.respond(wrong_solution(chain, rng)) if i % 4 else solution
        truth = gym_truth(chain.text, response)
        label = -1 if truth.error is None else truth.steps.index(truth.error)
        yield {
            "id": f"row {i}",
            "subset": "wrong" if i % 4 else "right",
            "problem": chain.text,
            "reference_solution": solution,
            "response": response,
            "step_char_spans": truth.steps,
            "label": label,
        }


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_shipped_reflector_is_scored_and_scored_again_without_it(settings, tmp_path):
    labels = write(tmp_path / "labels.jsonl", labelled(16))
    console = Console(None)
    said = localize(settings, labels, tmp_path / "run", console)
    scores = {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:4]}
    # wrong, right, quote found, exact, within one, early, right kept, F1
    assert scores["wrong"] == ["12", "0", "100.0", "100.0", "100.0", "0.0", "n/a", "n/a"]
    assert scores["all"][:2] == ["12", "4"] and scores["all"][3] == "100.0"
    again = localize(
        replace(settings, "model.path", ""), tmp_path / "run" / "localize.jsonl", tmp_path, console
    )
    assert again.splitlines()[:4] == said.splitlines()[:4]


def test_a_prompt_that_is_too_long_counts_as_without_a_quote(settings, tmp_path):
    rows = list(labelled(4))
    rows[1]["problem"] = " ".join(["12 +7"] * 40)
    said = localize(settings, write(tmp_path / "labels.jsonl", rows), tmp_path, Console(None))
    assert "1 prompts exceed reflect.max_prompt_tokens" in said
    kept = [json.loads(line) for line in (tmp_path / "localize.jsonl").read_text().splitlines()]
    assert [row["reflection"] is None for row in kept] == [False, True, False, False]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"problem": 7}, "labels.jsonl line 2: field 'problem' must be a string"),
        ({"reference_solution": None}, "line 2: field 'reference_solution' must be a string"),
        ({"label": 9}, "'row 1': label is 9"),
        ({"step_char_spans": [[0, 10**6]]}, "'row 1': step_char_spans must list"),
    ],
)
def test_a_wrong_row_is_named(change, words, settings, tmp_path):
    rows = list(labelled(2))
    rows[1] |= change
    with pytest.raises(UserError, match=words):
        localize(settings, write(tmp_path / "labels.jsonl", rows), tmp_path / "run", Console(None))
    assert not (tmp_path / "run").exists()
