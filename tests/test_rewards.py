"""The checkers on the defects they correct, on real gold answers and on hostile text."""

import json
import os
import signal
import subprocess
import sys
import threading

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_jax.errors import UserError
from rosd_jax.rewards import Grade, Grader, mcq, tooluse
from rosd_jax.rewards.maths import checker
from rosd_jax.types import Problem
from support import ROOT, data_dir


def _problem(kind, answer):
    return Problem("set/7", "set", kind, ({"role": "user", "content": "?"},), answer)


def _score(grader, kind, response, answer):
    return grader.grade_all([response], [_problem(kind, answer)], thinking_open=False)[0].score


@pytest.fixture(scope="module")
def grader():
    with Grader(timeout_s=20) as grader:
        yield grader


# ---- multiple choice


@pytest.mark.parametrize(
    "written",
    [
        "B",
        "b",
        " B\n",
        "B.",
        "(B)",
        "B)",
        "B: text",
        "B. text",
        "(B) text",
        "\\boxed{B}",
        "$B$",
        "**B**",
        "**B.** text",
        "\\boxed{\\text{B}}",
    ],
)
def test_mcq_accepts_the_usual_spellings(written):
    response = f"<reasoning>A?</reasoning>\n<answer>{written}</answer>"
    assert mcq.grade(response, "B", mode="fixed", thinking_open=False) == Grade(1.0, "B", True)
    assert mcq.grade(response, "A", mode="fixed", thinking_open=False) == Grade(0.0, "B", True)


@pytest.mark.parametrize("written", ["", "C, B", "B or C", "A and B", "Because", "ABCD", "be: it"])
def test_mcq_reads_no_choice_from_other_text(written):
    response = f"<answer>{written}</answer>"
    assert mcq.grade(response, "B", mode="fixed", thinking_open=False) == Grade(0.0, "", False)


def test_mcq_needs_the_tag():
    assert mcq.grade("B", "B", mode="official", thinking_open=False).score == 1
    for response in ("B", "The answer is B.", "\\boxed{B}", "<answer>B", "</answer>B<answer>"):
        assert mcq.grade(response, "B", mode="fixed", thinking_open=False).score == 0


def test_mcq_takes_the_last_block_outside_the_thinking():
    twice = "<answer>A</answer> no, <answer>B</answer> so"
    assert mcq.grade(twice, "B", mode="fixed", thinking_open=False).score == 1
    thought = "<think>maybe <answer>A</answer></think><answer>B</answer>"
    assert mcq.grade(thought, "B", mode="fixed", thinking_open=False).score == 1
    assert mcq.grade("<think><answer>B</answer>", "B", mode="fixed", thinking_open=False).score == 0


def test_gym_compares_the_whole_block(grader):
    assert _score(grader, "gym", "x\n<answer> 1  2\n</answer>\n", "1 2") == 1
    assert _score(grader, "gym", "<answer>1 2 3</answer>", "1 2") == 0
    assert _score(grader, "gym", "<answer>1 2", "1 2") == 0
    assert _score(grader, "gym", "1 2", "1 2") == 0


# ---- tool use


def _tool_response(calls):
    return "\n".join(
        f"Thought: I call a tool.\nAction: {call['Action']}\nAction Input: {call['Action_Input']}"
        for call in calls
    )


TWO_CALLS = [
    {"Action": "convert", "Action_Input": '{"from": "EUR", "options": {"a": [1, {"b": "}"}]}}'},
    {"Action": "set-alert.v2", "Action_Input": "{}"},
]


def test_tooluse_accepts_every_gold_answer_of_the_test_set():
    lines = data_dir("tooluse", "test.json").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == 68
    grades = [
        tooluse.grade(_tool_response(json.loads(a)), a, mode="fixed", thinking_open=False) for a in answers
    ]
    assert {(grade.score, grade.well_formed) for grade in grades} == {(1.0, True)}
    official = [
        tooluse.grade(_tool_response(json.loads(a)), a, mode="official", thinking_open=False) for a in answers
    ]
    assert sum(grade.score for grade in official) == 66  # the released checker's ceiling


@pytest.mark.parametrize("as_text", [True, False])
def test_tooluse_compares_calls_pairwise(as_text):
    answer = json.dumps(TWO_CALLS) if as_text else TWO_CALLS
    good = _tool_response(TWO_CALLS)
    assert tooluse.grade(good, answer, mode="fixed", thinking_open=False).score == 1
    assert (
        tooluse.grade("<think>Action: no\n</think>" + good, answer, mode="fixed", thinking_open=False).score
        == 1
    )
    swapped = [
        {"Action": TWO_CALLS[0]["Action"], "Action_Input": TWO_CALLS[1]["Action_Input"]},
        {"Action": TWO_CALLS[1]["Action"], "Action_Input": TWO_CALLS[0]["Action_Input"]},
    ]
    for wrong in (TWO_CALLS[::-1], swapped, TWO_CALLS[:1], [*TWO_CALLS, TWO_CALLS[1]]):
        assert tooluse.grade(_tool_response(wrong), answer, mode="fixed", thinking_open=False).score == 0


@pytest.mark.parametrize(
    "response",
    [
        "Action: f\nAction Input: {",
        "Action: f\nAction Input: {bad}",
        "Action: f\nAction Input: []",
        "Action: f\nAction Input: null",
        "Action: f",
        "Action: f\nAction Input: {}\nAction: g",  # half a call next to a right one
        "Action: f\nAction Input: {}\nAction Input: {}",
        "Action: f-v2\nAction Input: {}",
        "Action: f\nAction Input: " + '{"a":' * 5000 + "1" + "}" * 5000,
        "",
    ],
)
def test_tooluse_garbage_is_not_an_empty_input(response):
    grade = tooluse.grade(
        response, '[{"Action": "f", "Action_Input": "{}"}]', mode="fixed", thinking_open=False
    )
    assert grade.score == 0


def test_tooluse_values_are_compared_by_type():
    answer = '[{"Action": "f", "Action_Input": {"n": 5, "yes": true, "text": "5"}}]'
    for given_, score in (
        ('{"text": "5", "yes": true, "n": 5.0}', 1),
        ('{"text": "5", "yes": 1, "n": 5}', 0),
        ('{"text": 5, "yes": true, "n": 5}', 0),
        ('{"text": "Action: g", "yes": true, "n": 5}', 0),
    ):
        response = f"Action: f\nAction Input: {given_}"
        assert tooluse.grade(response, answer, mode="fixed", thinking_open=False).score == score


@pytest.mark.parametrize("answer", ["not json", "{}x", '{"Action": "f"}', "[1]", '[{"Action": 1,'])
def test_tooluse_gold_that_is_no_list_of_calls_is_named(grader, answer):
    with pytest.raises(UserError, match="set/7.*must be a JSON list"):
        _score(grader, "tooluse", "Action: f\nAction Input: {}", answer)


# ---- mathematics


@pytest.mark.parametrize(
    ("response", "box"),
    [
        ("\\boxed{1} or \\boxed {2}" + " so we are done" * 30, "2"),
        ("\\fbox{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\boxed{5}}", "5"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("{ } } \\boxed{3} \\boxed{4", "3"),
        ("<think>\\boxed{3}</think> \\boxed{4}", "4"),
        ("<think>\\boxed{3}", ""),
        ("\\boxed{}", ""),
        ("\\boxed{3} \\boxed{\\hspace{1cm}} \\boxed{\\_\\_} \\boxed{\\underline{\\phantom{xx}}}", "3"),
        ("**\\boxed 3**", "3"),
        ("\\boxed $3$", "3"),
        ("no box", ""),
    ],
)
def test_math_reads_the_last_balanced_box(response, box):
    assert checker.predict(response, mode="fixed", thinking_open=False) == box


@pytest.mark.parametrize(
    ("written", "gold", "score"),
    [
        ("\\dfrac{5}{9}", "\\frac{5}{9}", 1),
        ("0.5", "\\frac12", 1),
        ("2^{9}", "512", 1),
        ("(9,8)", "(9, 8)", 1),
        ("\\{1,2\\}", "\\{2,1\\}", 1),
        ("x^2+8", "8+x^2", 1),
        ("1,204", "1204", 1),
        ("1, 204", "204", 0),  # the release scores 1
        ("(8,9)", "(9,8)", 0),
        ("-5", "5", 0),
        ("", "5", 0),
        ("5" * 2000, "5", 0),
    ],
)
def test_math_compares_as_latex(grader, written, gold, score):
    assert _score(grader, "math", f"so \\boxed{{{written}}}.", gold) == score


def _math500():
    return [json.loads(line) for line in data_dir("eval", "math500.jsonl").read_text().splitlines()]


def test_math_accepts_every_gold_solution(grader):
    rows = _math500()
    problems = [_problem("math", row["answer"]) for row in rows]
    grades = grader.grade_all([row["solution"] for row in rows], problems, thinking_open=False)
    assert [r["unique_id"] for r, g in zip(rows, grades, strict=True) if g.score != 1] == []


def test_it_tells_how_many_comparisons_are_done():
    told = []
    answers = ["\\boxed{1/2}", "\\boxed{2/4}", "\\boxed{3}", "none"]
    with Grader(progress=lambda *counts: told.append(counts)) as grader:
        grader.grade_all(answers, [_problem("math", "0.5")] * 4, thinking_open=False)
    assert told == [(1, 3), (2, 3), (3, 3)]


def _check_gold_against_itself(grader, rows):
    # Gold solutions box the gold text itself, so the grade above never asks math-verify; this does.
    verdicts = grader._pool.answer_all([(row["answer"], row["answer"], "fixed") for row in rows])
    assert [r["unique_id"] for r, ok in zip(rows, verdicts, strict=True) if not ok] == []


def test_math_verify_reads_gold_answers(grader):
    _check_gold_against_itself(grader, _math500()[::8])


@pytest.mark.slow
def test_math_verify_reads_every_gold_answer(grader):
    _check_gold_against_itself(grader, _math500())


def test_a_comparison_without_end_costs_only_itself():
    answers = ["$9^{9^{9^{9}}}$", "7\ud800", "\x00", '__import__("os")', "6", "5.0"]
    responses = [f"\\boxed{{{answer}}}" for answer in answers]
    with Grader("official", timeout_s=3) as grader:  # math-verify has no limit of its own here
        grades = grader.grade_all(responses, [_problem("math", "5")] * len(responses), thinking_open=False)
        assert [grade.score for grade in grades] == [0, 0, 0, 0, 0, 1]
        assert grader.timeouts == 1
        assert _score(grader, "math", "\\boxed{5.00}", "5") == 1
        assert grader.timeouts == 1


IGNORING = r"""
import signal, time
from rosd_jax.rewards import Grader
from rosd_jax.types import Problem

signal.signal(signal.SIGPROF, signal.SIG_IGN)  # as libtpu does, and children inherit it
problem = Problem("m/0", "m", "math", ({"role": "user", "content": ""},), "5")
with Grader("official", timeout_s=1) as grader:
    grader.start()
    began = time.monotonic()
    grader.grade_all([r"\boxed{$9^{9^{9^{9}}}$}"], [problem], thinking_open=False)
    print(grader.timeouts, time.monotonic() - began)
"""


def test_the_limit_holds_in_a_process_that_ignores_the_timers_signal():
    run = subprocess.run(
        [sys.executable, "-c", IGNORING], capture_output=True, text=True, cwd=ROOT, check=True
    )
    timeouts, seconds = run.stdout.split()
    assert timeouts == "1" and float(seconds) < 45  # else the parent ends the worker, after a minute


def test_a_worker_that_died_between_batches_costs_nothing(grader):
    assert _score(grader, "math", "\\boxed{5.0}", "5") == 1
    worker = grader._pool._idle.queue[-1]
    os.kill(worker.process.pid, signal.SIGKILL)
    worker.process.wait()
    assert _score(grader, "math", "\\boxed{5.00}", "5") == 1
    assert grader.timeouts == 0


def test_grading_works_off_the_main_thread_beside_jax(grader):
    jax.numpy.zeros(2).block_until_ready()
    scores = []

    def work():
        return scores.append(_score(grader, "math", "\\boxed{\\frac{10}{2}}", "5"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert scores == [1]


def test_workers_start_with_the_first_math_problem_and_import_no_jax():
    code = (
        "import sys, rosd_jax.rewards.maths.checker as m\n"
        "assert m.agree('0.5', '1/2', 'fixed')\n"
        "print('jax' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
    with Grader() as grader:
        assert _score(grader, "mcq", "<answer>B</answer>", "B") == 1
        assert _score(grader, "math", "\\boxed{5}", "5") == 1  # equal as text
        assert set(grader._pool._idle.queue) == {None}


# ---- all kinds together


DRAFTS = [
    ("mcq", "Perhaps <answer>B</answer> is the form. Wait,", "B"),
    ("math", "A guess: \\boxed{5}. But let me check", "5"),
    ("tooluse", "I would do\nAction: f\nAction Input: {}\nbut", '[{"Action": "f"}]'),
    ("gym", "Is it <answer>7</answer>?", "7"),
]


@pytest.mark.parametrize(("kind", "draft", "answer"), DRAFTS)
def test_a_draft_in_thinking_that_the_prompt_opened_is_no_answer(grader, kind, draft, answer):
    problem = [_problem(kind, answer)]
    for response, opened, score in (
        (draft, False, 1),
        (draft, True, 0),
        (f"hm</think>{draft}", True, 1),
        (f"{draft}</think>", True, 0),
        (f"{draft}</think>so", True, 0),
        (f"hm</think>{draft}<think>more", True, 1),
    ):
        assert grader.grade_all([response], problem, thinking_open=opened)[0].score == score
    with Grader("official") as official:  # its recorded verdicts know nothing of it; the gym has none
        plain = official.grade_all([draft], problem, thinking_open=False)
        assert (official.grade_all([draft], problem, thinking_open=True) == plain) is (kind != "gym")


def test_batches_keep_their_order(grader):
    responses = ["<answer>B</answer>", "\\boxed{1.0}", "<answer>7</answer>", "\\boxed{2}"]
    answers = [("mcq", "B"), ("math", "1"), ("gym", "7"), ("math", "1")]
    grades = grader.grade_all(responses, [_problem(*answer) for answer in answers], thinking_open=False)
    assert [grade.score for grade in grades] == [1, 1, 1, 0]
    assert [grade.prediction for grade in grades] == ["B", "1.0", "7", "2"]


def test_mistakes_are_named(grader):
    with pytest.raises(UserError, match="set/7.*'essay'"):
        _score(grader, "essay", "x", "x")
    with pytest.raises(UserError, match="rewards is 'lenient'"):
        Grader(mode="lenient")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError):
        grader.grade_all(["x"], [], thinking_open=False)


PIECES = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "\\boxed{",
        "{",
        "}",
        "\\",
        "B",
        "\ud800",
        "Action: f\n",
        "Action Input: ",
        '{"a": ',
        "[" * 2000,
        "1e999",
        "9" * 5000,
        " ",
        "\n",
    ]
)


@settings(deadline=None, max_examples=60)
@given(st.lists(PIECES | st.text(max_size=5), max_size=12).map("".join))
def test_no_text_breaks_a_checker(response):
    for mode in ("fixed", "official"):
        assert mcq.grade(response, "B", mode=mode, thinking_open=False).score in (0, 1)
        assert tooluse.grade(response, '[{"Action": "f"}]', mode=mode, thinking_open=False).score in (0, 1)
        assert isinstance(checker.predict(response, mode=mode, thinking_open=False), str)
    assert mcq.grade_gym(response, "B", thinking_open=False).score in (0, 1)


@pytest.mark.parametrize(
    "piece",
    [
        "\\boxed{",
        "{",
        "<think>",
        "</think>",
        "<answer>",
        "<answer>A</answer>",
        "(",
        "Action: ",
        "Action Input: {",
        "Action: f\nAction Input: ",
        " ",
        "answer is ",
        "\n",
        "- ",
        "Action: f\n",
        "Action",
        "`",
    ],
)
def test_a_megabyte_is_read_in_linear_time(piece):
    response = piece * (1_000_000 // len(piece))
    for mode in ("fixed", "official"):
        mcq.grade(response, "B", mode=mode, thinking_open=False)
        tooluse.grade(response, '[{"Action": "f"}]', mode=mode, thinking_open=False)
        checker.predict(response, mode=mode, thinking_open=False)
