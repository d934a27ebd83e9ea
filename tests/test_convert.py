"""Data sets of TFDS and of the Hub as files of a run: what is written, and what is refused."""

import json
import sys
import types

import pytest

from rosd_jax.data.convert import main
from rosd_jax.data.sets import load_problems

GSM8K = [
    {"question": "What is 2 + 3?", "answer": "2 + 3 is 5.\n#### 5", "level": 1},
    {"question": "What is 7 * 300?", "answer": "#### 2100", "level": 2},
]
PROMPT = "--prompt={question} Put it in \\boxed{}."


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets`, which is not among our requirements."""
    sets = {("openai/gsm8k", "main"): {"train": GSM8K, "test": GSM8K[:1], "socratic": []}}
    module = types.SimpleNamespace(load_dataset=lambda name, config: sets[name, config])
    monkeypatch.setitem(sys.modules, "datasets", module)


@pytest.fixture
def convert(tmp_path, monkeypatch, capsys):
    """Runs the command: its exit status, and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments):
        return main(list(arguments)), capsys.readouterr()

    return call


def test_a_set_of_the_hub_becomes_files_that_a_run_reads(hub, convert, tmp_path):
    asked = ["hf:openai/gsm8k:main", "out", PROMPT, "--answer={answer}", "--answer-after=####"]
    status, printed = convert(*asked)
    assert status == 0 and "out/train.jsonl: 2 rows" in printed.out
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"train.jsonl", "test.jsonl"}
    problems = load_problems("jsonl:out", "train", "")
    assert [problem.answer for problem in problems] == ["5", "2100"]
    user = {"role": "user", "content": "What is 2 + 3? Put it in \\boxed{}."}
    assert problems[0].messages == (user,)


def test_a_prepared_set_of_tfds_becomes_files_that_a_run_reads(convert, tmp_path):
    rows = [{"prompt": f"Is {n} even?", "answer": "AB"[n % 2], "kind": "mcq"} for n in range(3)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    load_problems("jsonl:mine.jsonl", "train", "")  # prepares it with TFDS
    (info,) = (tmp_path / "cache").rglob("dataset_info.json")
    asked = ["--prompt={user}", "--answer={answer}", "--kind=mcq", "--system=Be brief."]
    assert convert(f"tfds:{info.parent}", "out", *asked)[0] == 0
    problems = load_problems("jsonl:out", "train", "")
    assert [problem.answer for problem in problems] == ["A", "B", "A"]
    assert [message["content"] for message in problems[2].messages] == ["Be brief.", "Is 2 even?"]


def test_rows_of_a_users_own_kind_keep_all_fields(hub, convert):
    convert("hf:openai/gsm8k:main", "out", PROMPT, "--answer={level}", "--kind=own", "--split=train=train")
    problems = load_problems("jsonl:out", "train", "")
    assert [json.loads(problem.extra)["level"] for problem in problems] == [1, 2]


MISTAKES = {
    "exists": (["hf:openai/gsm8k:main", "."], [], "exists already"),
    "no kind": (["openai/gsm8k", "out"], [], "must be hf:NAME"),
    "unknown": (["hf:openai/math:main", "out"], [], "cannot be read (KeyError"),
    "no split": (["hf:openai/gsm8k:main", "out"], ["--split=dev=train"], "theirs are train, test, socratic"),
    "empty": (["hf:openai/gsm8k:main", "out"], ["--split=socratic=train"], "has no rows"),
    "no field": (["hf:openai/gsm8k:main", "out"], ["--answer={solution}"], "has question, answer, level"),
    "no mark": (
        ["hf:openai/gsm8k:main", "out"],
        ["--answer-after=@@"],
        "row 1: the answer has no '@@'",
    ),
    "a row": (["hf:openai/gsm8k:main", "out"], ["--kind=mcq"], "train row 1: field 'answer' is"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_no_file(case, hub, convert, tmp_path):
    source, more, words = MISTAKES[case]
    status, printed = convert(*source, PROMPT, "--answer={answer}", *more)
    assert status == 2 and words in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_the_package_of_the_hub_it_is_named(convert, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    status, printed = convert("hf:openai/gsm8k", "out", PROMPT, "--answer={answer}")
    assert status == 2 and "pip install datasets" in printed.err
