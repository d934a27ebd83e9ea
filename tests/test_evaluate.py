"""Scores of a set by hand, and generations that do not depend on how they were batched."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from rosd_jax.errors import UserError
from rosd_jax.evals.evaluate import majority_letter, requests_of, score_set, scores
from rosd_jax.evals.generations import generations_path, write_generations
from rosd_jax.rewards.grade import Grade
from rosd_jax.types import Problem, Rollout

R = 6  # the fake sampler's limit


def problem(i, answer="A", kind="mcq"):
    return Problem(f"s/test/{i}", "s", kind, ({"role": "user", "content": "?"},), answer)


def fake_sample(calls):
    """Request u: the token u, then the first id of its prompt; u % R + 1 tokens in all."""

    def sample(requests):
        calls.append(requests)
        uid_B = np.array([request.uid for request in requests], np.int32)
        length_B = uid_B % R + 1
        first_B = np.array([request.prompt[0] for request in requests])
        tokens_BR = np.where(np.arange(R) == 0, uid_B[:, None], first_B[:, None]).astype(np.int32)
        tokens_BR = np.where(np.arange(R) < length_B[:, None], tokens_BR, 0)
        return Rollout(tokens_BR, length_B, tokens_BR * 0.0, length_B < R)

    return sample


def fake_grades(texts, problems):
    letters = ["ABC"[int(text.split()[0]) % 3] for text in texts]
    return [
        Grade(float(letter == p.answer), letter, True) for letter, p in zip(letters, problems, strict=True)
    ]


def plain_votes(predictions):
    return list(predictions)


def evaluate(problems=None, *, samples=3, calls=None, votes=plain_votes):
    """Every part of an evaluation, with a fake engine, tokenizer and grader."""
    problems = problems or [problem(i, "AAB"[i % 3]) for i in range(5)]
    encoded = [(problem, [100 + i, 7]) for i, problem in enumerate(problems)]
    rollout = fake_sample([] if calls is None else calls)(requests_of("s", encoded, samples))
    rows = zip(rollout.tokens_BR, rollout.length_B, strict=True)
    texts = [" ".join(map(str, tokens_R[:length])) for tokens_R, length in rows]
    grades = fake_grades(texts, [problem for problem in problems for _ in range(samples)])
    return score_set(problems, rollout, texts, grades, votes([grade.prediction for grade in grades]))


def test_scores_by_hand():
    rewards = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], np.float32)
    names = [["a", "b", "b", "c"], ["x", "y", "", ""], ["q", "q", "q", "r"]]
    got = scores(rewards, names)
    assert got["avg"] == pytest.approx(1 / 3)
    assert got["avg_se"] == pytest.approx(np.std([0.25, 0, 0.75], ddof=1) / math.sqrt(3))
    assert got["pass"] == pytest.approx(2 / 3)
    assert got["maj"] == pytest.approx(1 / 3)
    assert got["distinct"] == pytest.approx((3 + 2 + 2) / 3)
    assert (got["k"], got["n"]) == (4, 3)


@pytest.mark.parametrize(
    "names, rewards, maj",
    [
        (["b", "a", "a", "b"], [1, 0, 0, 1], 1),  # a tie: b was seen first
        (["", "", "", "a"], [0, 0, 0, 1], 1),  # no prediction is no vote
        (["", "", "", ""], [0, 0, 0, 0], 0),
    ],
)
def test_majority_vote(names, rewards, maj):
    assert scores(np.array([rewards], np.float32), [names])["maj"] == maj


def test_one_item_has_no_standard_error():
    assert math.isnan(scores(np.ones((1, 4), np.float32), [["a"] * 4])["avg_se"])


def test_scores_reject_what_does_not_fit():
    with pytest.raises(ValueError, match="votes"):
        scores(np.ones((2, 2)), [["a", "b"]])
    with pytest.raises(ValueError, match="N >= 1"):
        scores(np.ones((0, 2)), [])


def test_most_frequent_letter():
    assert majority_letter([problem(i, letter) for i, letter in enumerate("ABBC")]) == 0.5


def test_generations_are_in_the_order_of_the_problems():
    _, generations = evaluate()
    assert [(g["uid"], g["sample"]) for g in generations[2:5]] == [
        ("s/test/0", 2),
        ("s/test/1", 0),
        ("s/test/1", 1),
    ]
    assert generations[4]["token_ids"] == [4, 101, 101, 101, 101]
    assert generations[5]["truncated"] and not generations[4]["truncated"]


def test_the_engine_is_asked_once_for_every_sample_up_to_its_own_limit():
    calls = []
    evaluate(calls=calls)
    (requests,) = calls
    assert [request.uid for request in requests] == list(range(15))
    assert [request.prompt[0] for request in requests] == [100 + i // 3 for i in range(15)]
    assert {request.max_new for request in requests} == {None}


def test_numbers_of_a_set():
    numbers, generations = evaluate()
    # Sample k of every item has uid 3n + k and so predicts "ABC"[k]: one of three is right.
    assert numbers["avg"] == pytest.approx(1 / 3) and numbers["avg_se"] == pytest.approx(0)
    assert numbers["pass"] == 1 and numbers["maj"] == pytest.approx(4 / 5)  # ties go to A
    assert numbers["majority_letter"] == pytest.approx(4 / 5)
    assert numbers["length"] == np.mean([len(g["token_ids"]) for g in generations])
    assert numbers["truncated"] == pytest.approx(2 / 15)


def test_without_predictions_of_a_users_function_there_is_no_majority():
    def none(predictions):
        return [""] * len(predictions)

    own = [replace(problem(i, "A"), kind="own") for i in range(5)]
    assert np.isnan(evaluate(own, votes=none)[0]["maj"])
    assert evaluate(own)[0]["maj"] == 1.0
    assert evaluate(votes=none)[0]["maj"] < 1  # no letter was read: wrong


def test_answers_that_are_equal_vote_together():
    def merged(predictions):
        return ["B" if p == "C" else p for p in predictions]

    for votes, maj, distinct in ((plain_votes, 0, 3), (merged, 1, 2)):
        numbers, generations = evaluate([problem(0, "B")], votes=votes)
        assert (numbers["maj"], numbers["distinct"]) == (maj, distinct)
        assert [g["prediction"] for g in generations] == ["A", "B", "C"]
    assert [g["vote"] for g in generations] == ["A", "B", "B"]


def test_only_multiple_choice_has_a_most_frequent_letter():
    numbers, _ = evaluate([problem(0), problem(1, kind="math")], samples=1)
    assert "majority_letter" not in numbers


def test_a_set_without_problems_is_named():
    with pytest.raises(UserError, match="eval.sets names 'aime24'"):
        requests_of("aime24", [], 1)


def test_generations_survive_the_disk(tmp_path):
    hostile = 'a\n\u2028<b>\ud83d "\U0001f600\\'
    rows = [{"uid": "gym:chain/test/0", "response": hostile, "token_ids": [1, 2], "reward": 1.0}]
    path = write_generations(tmp_path, 20, "gym:chain", rows)
    assert path == tmp_path / "evals" / "step_20" / "gym%3Achain.jsonl"
    assert path.read_bytes().isascii() and path.read_text().count("\n") == 1
    assert json.loads(path.read_text()) == rows[0]
    write_generations(tmp_path, 20, "gym:chain", rows * 2)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_set_names_never_share_a_file(tmp_path):
    names = [
        "jsonl:/a/b.jsonl",
        "jsonl:/a_b.jsonl",
        "jsonl:/a%2Fb.jsonl",
        "..",
        "../../x",
        "a b",
        "\u00e9",
        "jsonl:/" + "long/" * 90 + "a.jsonl",
        "jsonl:/" + "long/" * 90 + "b.jsonl",
    ]
    paths = {write_generations(tmp_path, 0, name, []) for name in names}
    assert len(paths) == len(names)
    assert {path.parent for path in paths} == {tmp_path / "evals" / "step_0"}
    assert generations_path(tmp_path, 0, "physics").name == "physics.jsonl"


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "evals").write_text("a file in the way")
    with pytest.raises(UserError, match="--workdir"):
        write_generations(tmp_path, 0, "physics", [{}])
