"""What a user brings: a reward function, a wording, stop strings; and docs/own_task.md as it stands."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rosd_jax.config import default_config, validate
from rosd_jax.data.sets import load_problems
from rosd_jax.distill.teacher import repeats_gold
from rosd_jax.errors import UserError
from rosd_jax.rewards import Grade, Grader, check, workers
from rosd_jax.text import prompts
from rosd_jax.text.wording import read_wording
from rosd_jax.types import Problem
from support import ROOT, nightly_but, run_environment

REWARDS = """
import os, sys, time
import numpy as np
from rosd_jax.rewards import check

def plain(prompt, response, row):
    print("seen", flush=True)
    return response == row["answer"]

def told(prompt, response, row):
    return {"score": 0.25, "prediction": repr((prompt, response, row)), "well_formed": False}

def numpys(prompt, response, row):
    return {"score": np.float32(1) / 4, "well_formed": np.bool_(True), "prediction": None}

def longest(prompts, responses, rows):
    most = max(map(len, responses))
    return [{"score": len(r) == most, "prediction": f"{p[-1]['content']}/{row['uid']}"}
            for p, r, row in zip(prompts, responses, rows)]
longest.batched = True

def few(prompts, responses, rows):
    return [1] * (len(rows) - 1)
few.batched = True

def one_bad(prompts, responses, rows):
    return [1] * (len(rows) - 1) + [2]
one_bad.batched = True

def all_stuck(prompts, responses, rows):
    while True: pass
all_stuck.batched = True

def built_in(prompt, response, row):
    return check(response, row["answer"], row["kind"]).score

def by_response(prompt, response, row):
    if response == "spin":
        while True: pass
    if response == "sleep": time.sleep(100)
    if response == "raise": raise KeyError("no\\nkey")
    if response == "exit": sys.exit(3)
    if response == "die": os._exit(3)
    return eval(response)

def two(prompt, response): return 1
value = 3
"""


@pytest.fixture
def rewards(tmp_path, monkeypatch):
    """Makes the module own_rewards of the current directory, and gives graders of its functions."""
    (tmp_path / "own_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    made = []

    def grader(name, timeout_s=20.0):
        made.append(Grader(name if ":" in name else f"own_rewards:{name}", timeout_s))
        return made[-1]

    yield grader
    for one in made:
        one.__exit__()


def problem(answer="yes", kind="own", n=0, extra=""):
    return Problem(f"jsonl:x/train/{n}", "jsonl:x", kind, ({"role": "user", "content": "Q?"},), answer, extra)


def grade(grader, *responses):
    problems = [problem(n=n) for n in range(len(responses))]
    return grader.grade_all(list(responses), problems, thinking_open=False)


# ---- reward functions


def test_a_number_or_a_truth_value_is_a_score(rewards, capfd):
    assert grade(rewards("plain"), "yes", "no") == [Grade(1.0, "", True), Grade(0.0, "", True)]
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == "seen\nseen\n"
    assert grade(rewards("numpys"), "x") == [Grade(0.25, "", True)]


def test_a_function_is_told_prompt_response_and_row(rewards):
    extra = json.dumps({"tests": ["a", {"b": None}], "dataset": "mine", "\ud800": 1})
    told = [problem("gold", "math", 4, extra)]
    (found,) = rewards("told").grade_all(["said \ud800"], told, thinking_open=False)
    row = dict(uid="jsonl:x/train/4", dataset="mine", kind="math", answer="gold", tests=["a", {"b": None}])
    assert found.prediction == repr(([{"role": "user", "content": "Q?"}], "said \ud800", row | {"\ud800": 1}))
    assert (found.score, found.well_formed) == (0.25, False)


def test_a_batched_function_sees_all_at_once(rewards):
    grader = rewards("longest")
    grades = grade(grader, "a", "abc", "ab")
    assert [g.score for g in grades] == [0, 1, 0]
    assert [g.prediction for g in grades] == [f"Q?/jsonl:x/train/{n}" for n in range(3)]
    assert grade(grader) == []


def test_the_built_in_checkers_are_at_hand(rewards):
    rows = [
        ("<answer>B</answer>", "B", "mcq"),
        ("\\boxed{0.5}", "\\frac12", "math"),
        ("\\boxed{3}", "4", "math"),
    ]
    problems = [problem(answer, kind, n) for n, (_, answer, kind) in enumerate(rows)]
    grades = rewards("built_in").grade_all([r for r, *_ in rows], problems, thinking_open=False)
    assert [g.score for g in grades] == [1, 1, 0]
    assert check("<answer>7</answer>", "7", "gym") == Grade(1.0, "7", True)
    with pytest.raises(UserError, match="kind is 'own'; it must be one of mcq, math, tooluse, gym"):
        check("x", "x", "own")


@pytest.mark.parametrize("response", ["spin", "sleep"])
def test_over_the_limit_a_response_scores_0_and_is_counted(rewards, monkeypatch, response):
    monkeypatch.setattr(workers, "_GRACE_S", 1.0)
    grader = rewards("by_response", timeout_s=0.5)
    grades = grade(grader, "1", response, "1.0")
    assert [g.score for g in grades] == [1, 0, 1] and grader.timeouts == 1
    assert not grades[1].well_formed


def test_a_batch_over_its_limit_scores_0_as_a_whole(rewards):
    grader = rewards("all_stuck", timeout_s=0.2)
    assert [g.score for g in grade(grader, "a", "b")] == [0, 0] and grader.timeouts == 2


FAULTS = {
    "raise": "it raised KeyError: 'no\\nkey' (",
    "exit": "it raised SystemExit: 3 (",
    "die": "it ended its process (exit status 3)",
    "1/0": "it raised ZeroDivisionError: division by zero (",
    "1.5": "it returned the score 1.5; it must lie in [0, 1]",
    "-1": "it returned the score -1; it must lie in [0, 1]",
    "float('nan')": "it returned the score nan; it must lie in [0, 1]",
    "None": "it returned nothing (None) as the score; it must be a number",
    "'1'": "it returned a str as the score; it must be a number",
    "[1]": "it returned a list as the score; it must be a number",
    "np.ones(1)": "it returned a ndarray as the score; it must be a number",
    "{'reward': 1}": "it returned a dict with the keys reward; it must have score",
    "{'score': 1, 'predicted': ''}": "it returned a dict with the keys score, predicted; it must have score",
    "{'score': 1, 'prediction': 4}": "it returned a int as prediction; it must be a string",
    "{'score': 1, 'well_formed': 4}": "it returned a int as well_formed; it must be True or False",
}


@pytest.mark.parametrize("response", FAULTS)
def test_what_is_no_score_ends_the_run_and_names_function_and_problem(rewards, capfd, response):
    with pytest.raises(UserError) as caught:
        grade(rewards("by_response"), "1", response, "1")
    said = str(caught.value)
    assert said.startswith("rewards is 'own_rewards:by_response'; on problem jsonl:x/train/1 ")
    assert FAULTS[response] in said and "\n" not in said
    printed = capfd.readouterr()
    assert printed.out == "" and ("Traceback" in printed.err) == ("raised" in said)
    if "raised" in said:
        assert printed.err.count("own_rewards.py") == 1 and "own_rewards.py line " in said


def test_a_batch_of_another_length_and_a_bad_entry_are_named(rewards):
    with pytest.raises(
        UserError, match=r"batch of 3 from jsonl:x/train/0 on it returned 2 entries; .* list of 3"
    ):
        grade(rewards("few"), "a", "b", "c")
    with pytest.raises(UserError, match=r"on problem jsonl:x/train/2 it returned the score 2"):
        grade(rewards("one_bad"), "a", "b", "c")


def test_a_score_that_rounding_put_past_the_ends_is_at_the_end(rewards):
    grades = grade(rewards("by_response"), "1 + 3e-16", "-1e-9")
    assert [g.score for g in grades] == [1, 0]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("absent:f", "there is no module 'absent' in the current directory"),
        ("own_rewards.part:f", "there is no module 'own_rewards.part' in"),
        ("own_rewards:absent", "has no function 'absent'"),
        ("own_rewards:value", "has no function 'value'"),
        ("own_rewards:two", r"it must take three arguments, \(prompt, response, row\)"),
        ("broken:f", r"its import raised SyntaxError: .*\(broken.py, line 1\)"),
        ("needy:f", r"its import raised ModuleNotFoundError: No module named 'absent' \(.*needy.py line 2\)"),
        ("quitting:f", "its import raised SystemExit"),
        ("dying:f", "importing its module ended the process"),
    ],
)
def test_a_function_that_cannot_be_used_is_one_sentence_at_the_start(rewards, tmp_path, name, words):
    (tmp_path / "broken.py").write_text("def f(:")
    (tmp_path / "needy.py").write_text("\nimport absent")
    (tmp_path / "quitting.py").write_text("raise SystemExit")
    (tmp_path / "dying.py").write_text("import os; os._exit(1)")
    with pytest.raises(UserError, match=words) as caught:
        rewards(name).start()
    assert str(caught.value).startswith(f"rewards is {name!r}; ") and "\n" not in str(caught.value)


def test_signals_to_all_processes_change_no_reward_and_children_obey_them(rewards, tmp_path):
    """The worker outlives what asks the run to stop, and a process that a function starts does not."""
    (tmp_path / "signals.py").write_text(
        "import os, signal, subprocess\n"
        "def f(prompt, response, row):\n"
        "    for number in (signal.SIGINT, signal.SIGTERM): os.kill(os.getpid(), number)\n"
        "    child = subprocess.Popen(['sleep', '60'])\n"
        "    child.terminate()\n"
        "    return child.wait(10) == -signal.SIGTERM\n"
    )
    grader = rewards("signals:f")
    assert [g.score for g in grade(grader, "a", "b")] == [1, 1] and grader.timeouts == 0


# ---- rows


@pytest.fixture(autouse=True)
def prepared_copies(tmp_path, monkeypatch):
    """They go to a new folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def read(tmp_path, *rows):
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_problems(f"jsonl:{path}", "train", "")


def test_rows_keep_all_their_fields_and_need_no_answer(tmp_path, monkeypatch):
    rows = [
        {"prompt": "p", "kind": "own"},
        {"prompt": "p", "kind": "own", "answer": " so "},
        {"prompt": "p", "kind": "own", "answer": {"é": [1]}, "uid": "my 7", "tests": "\ud800"},
        {"prompt": "p", "answer": 7.0, "level": 3},
    ]
    problems = read(tmp_path, *rows)
    assert [p.answer for p in problems] == ["", " so ", '{"é": [1]}', "7"]
    assert [json.loads(p.extra or "null") for p in problems] == [
        None,
        None,
        {"answer": {"é": [1]}, "uid": "my 7", "tests": "\ud800"},
        {"level": 3},
    ]
    (tmp_path / "seen.py").write_text(
        "def f(prompt, response, row):\n    return {'score': 1, 'prediction': repr(row)}"
    )
    monkeypatch.chdir(tmp_path)
    with Grader("seen:f") as grader:
        seen = [eval(g.prediction) for g in grader.grade_all([""] * 4, problems, thinking_open=False)]
    name = problems[0].dataset

    def own(n, **fields):
        return dict(uid=f"{name}/train/{n}", dataset=name, kind="own") | fields

    assert seen[:2] == [own(0, answer=""), own(1, answer=" so ")]
    assert seen[2] == own(2, answer={"é": [1]}, uid="my 7", tests="\ud800")
    assert seen[3] == own(3, kind="math", answer="7", level=3)


def test_deep_rows_are_read_or_refused(tmp_path):
    for depth in (100, *range(900, 1000, 3)):
        nested = json.loads("[" * 90 + "]" * 90)
        line = json.dumps({"prompt": "p", "kind": "own", "answer": nested})
        path = tmp_path / "mine.jsonl"
        path.write_text(line.replace("[" * 90, "[" * depth).replace("]" * 90, "]" * depth))
        try:
            (found,) = load_problems(f"jsonl:{path}", "train", "")
        except UserError as error:
            assert f"{path} line 1" in str(error)
            assert depth > 100
        else:
            assert found.answer == "[" * depth + "]" * depth


def test_without_a_gold_answer_none_is_shown_or_looked_for():
    assert not repeats_gold("any idea", "") and repeats_gold("is 7", "7")


# ---- wordings


def write_wording(tmp_path, **changes):
    given = dataclasses.asdict(prompts.ENGLISH) | changes
    lines = [f"{name} = {json.dumps(text)}\n" for name, text in given.items() if text is not None]
    (tmp_path / "mine.toml").write_text("".join(lines))
    return str(tmp_path / "mine.toml")


def test_a_wording_comes_back_from_its_file(tmp_path):
    assert read_wording(write_wording(tmp_path)) == prompts.ENGLISH
    latex = "{problem} {solution} \\frac{1}{2} \\text{cm} \\boxed{} { x } {1,2}"
    path = write_wording(tmp_path, reflect_wrong_system="", teacher_solution_user=latex)
    assert read_wording(path).teacher_solution_user == latex and read_wording(path).reflect_wrong_system == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(teacher_idea_user=None), "'teacher_idea_user' is missing"),
        (dict(reflect_system="x"), "'reflect_system' is unknown; the fields are reflect_wrong_system, "),
        (dict(reflect_right_system=3), "'reflect_right_system' must be a string"),
        (
            dict(teacher_idea_user="{problem} {idea} {foo}"),
            "holds {foo}; its placeholders are {problem} {idea}, ",
        ),
        (dict(teacher_idea_user="{problem} {idea} {gold}"), "holds {gold}; its placeholders are"),
        (dict(teacher_idea_user="{problem} {Idea}"), "holds {Idea}; its placeholders are"),
        (dict(teacher_idea_user="{{problem}} {idea}"), "holds {{problem}}; its placeholders are"),
        (dict(teacher_idea_user="{problem} { idea }"), "holds { idea }; its placeholders are"),
        (dict(teacher_idea_user="{problem}"), "'teacher_idea_user' must hold {idea}"),
        (dict(teacher_solution_user="{solution}"), "must hold {problem}"),
        (dict(reflect_right_user="{solution} {attempt} <explanation>"), "holds {solution}"),
        (dict(reflect_right_user="<explanation>"), "must hold {attempt}"),
        (dict(reflect_right_user="{attempt}"), "'reflect_right_user' must ask for <explanation>"),
        (
            dict(reflect_wrong_user="{attempt} <explanation>"),
            "'reflect_wrong_user' must ask for <error_quote>",
        ),
        (
            dict(reflect_wrong_user="{attempt} <error_quote>"),
            "'reflect_wrong_user' must ask for <explanation>",
        ),
        (dict(reflect_right_user="{gold}: {attempt} <reflection>"), "must have {gold} on a separate line"),
    ],
)
def test_a_wording_that_breaks_a_rule_names_file_and_field(tmp_path, changes, words):
    path = write_wording(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        read_wording(path)
    said = str(caught.value)
    assert said.startswith(f"wording {path}: field ") and words in said and "\n" not in said


def test_files_that_are_no_wording_are_named(tmp_path):
    with pytest.raises(UserError, match="absent.toml', which cannot be read"):
        read_wording(str(tmp_path / "absent.toml"))
    for content in (b"reflect = ", b"\xff", b"reflect = " + b"[" * 10_000):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(UserError, match="bad.toml', which is not valid TOML"):
            read_wording(str(tmp_path / "bad.toml"))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("rewards", "lenient", "be fixed, official or MODULE:FUNCTION"),
        ("rewards", "my.py:f:g", "be fixed, official or MODULE:FUNCTION"),
        ("rewards", "dir/my:f", "be fixed, official or MODULE:FUNCTION"),
        ("wording", "klingon", "be english, gym or the path of a .toml file"),
        ("rollout.stop", ("a", ""), "contain only strings that are not empty"),
        ("rollout.stop", (7,), "contain only strings that are not empty"),
        ("reward_timeout", 0.0, "be above 0 and at most 3600"),
    ],
)
def test_fields_of_ones_own_are_checked_before_any_file(field, value, words):
    config = default_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=words):
        validate(config)


# ---- the example of docs/own_task.md

DOC = ROOT / "docs" / "own_task.md"


@pytest.fixture(scope="module")
def example(tmp_path_factory, cache):
    """Its files in a folder of their own, and what runs its commands there by their number."""
    folder = tmp_path_factory.mktemp("own")
    files = dict(re.findall(r"^`([\w.]+)`:\n\n```\w+\n(.*?)^```", DOC.read_text(), re.DOTALL | re.MULTILINE))
    assert set(files) == {"make_data.py", "reward.py", "wording.toml", "config.py"}
    for name, content in files.items():
        (folder / name).write_text(content)
    (commands,) = re.findall(r"```sh\n(.*?)```", DOC.read_text(), re.DOTALL)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = run_environment(ROSD=str(ROOT), PATH=path, XDG_CACHE_HOME=str(folder / "cache"), **cache)

    def run(*numbers, then=""):
        chosen = "\n".join(commands.splitlines()[n] for n in numbers) + then
        done = subprocess.run(["sh", "-ec", chosen], cwd=folder, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return folder, run


@pytest.mark.nightly
@pytest.mark.slow
def test_the_example_is_checked_before_any_device_is_touched(example):
    folder, run = example
    status, printed, errors = run(0, 1)
    assert (status, errors) == (0, "") and "chains: 64 problems of chains, 2 steps" in printed
    assert not (folder / "run").exists() and not (folder / "runs").exists()


@pytest.mark.parametrize(
    "flags, words",
    nightly_but(
        [
            ("rewards=fixed", "rewards is 'fixed', and the kind of problem chains/train/0 is 'own'"),
            ("wording=absent.toml", "wording is 'absent.toml', which cannot be read"),
        ],
        keep=[0],
    ),
)
def test_a_mistake_in_the_example_is_found_before_any_device_is_touched(example, flags, words):
    _, run = example
    status, printed, errors = run(0, 1, then=f" --config.{flags}")
    assert status == 2 and printed == "" and errors.count("\n") == 1 and words in errors


def test_the_example_of_the_checkers_runs(capsys):
    (code,) = re.findall(r"```python\n(from rosd_jax.rewards import check.*?)```", DOC.read_text(), re.DOTALL)
    exec(compile(code, str(DOC), "exec"), {})
    assert capsys.readouterr().out == "1.0\n"


@pytest.fixture(scope="module")
def trained(example):
    """The directory of the example's run."""
    folder, run = example
    status, _, errors = run(0, 2)
    assert (status, errors) == (0, "")
    return folder / "run"


@pytest.mark.slow
def test_the_example_trains_with_its_own_reward_wording_and_stop_string(trained):
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["split"] == "train"]
    assert len(train) == 2 and len(lines) == 4
    assert all(line["grader_timeouts"] == 0 and line["truncated"] < 0.2 for line in train)
    assert any(line["quote_found"] > 0.5 and line["active_tokens"] > 0 for line in train)
    text = (trained / "rollouts" / "step_1.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert {row["reward"] for row in rows} == {0.0, 1.0} and {row["answer"] for row in rows} == {""}
    ended = [row["response"] for row in rows if "</answer>" in row["response"]]
    assert len(ended) > 0.8 * len(rows) and all(text.endswith("</answer>") for text in ended)
    # What the model itself ends with is not sampled: the stop string is the last token.
    assert len({row["token_ids"][-1] for row in rows if row["response"] in ended}) == 1


@pytest.fixture
def changed(example, trained):
    """changed(text): appends it to the example's reward.py, for as long as a test runs."""
    path = trained.parent / "reward.py"
    before = path.read_text()

    def change(text):
        path.write_text(before + text)

    yield change
    path.write_text(before)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_reward_that_changed_on_the_way_is_told_and_ends_the_run_where_it_fails(example, changed):
    _, run = example
    changed("\n\ndef last_number(prompt, response, row):\n    return row['absent']\n")
    status, _, errors = run(2, then=" --config.steps=3")
    assert status == 2 and "rewards=reward:last_number has changed since step 2" in errors
    said = errors.splitlines()[-1]
    assert said.startswith("error: rewards is 'reward:last_number'; on problem chains/train/")
    assert "it raised KeyError: 'absent' (" in said and "Traceback" in errors


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_goes_on_with_a_reward_that_changed(example, changed):
    _, run = example
    changed("# stricter now\n")
    status, _, errors = run(2, then=" --config.steps=3")
    assert status == 0 and "rewards=reward:last_number has changed since step 2" in errors


@pytest.mark.nightly
def test_a_reward_that_fails_ends_the_run_with_its_traceback_and_one_sentence(example):
    folder, run = example
    (folder / "failing.py").write_text("def f(prompt, response, row):\n    return row['absent']\n")
    status, _, errors = run(0, 2, then="2 --config.rewards=failing:f")
    assert status == 2 and "Traceback" in errors
    said = errors.splitlines()[-1]
    assert said.startswith("error: rewards is 'failing:f'; on problem chains/test/")
    assert "it raised KeyError: 'absent' (" in said and "failing.py line 2)" in said
