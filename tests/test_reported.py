"""Failing inputs that users of this field's tools reported: tests/cases/reported.jsonl, or $ROSD_CASES_DIR.

Each line has `kind`, `input` and `expected`; KINDS says how a kind is run. A line may also have `ours` and
`why`, where `expected` is judged wrong. Cases that describe files or runs in words are read by the readers in
worded.py, which fail on a description that they do not understand.
"""

import json
import os
import re
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from test_export import ask, old_python  # noqa: F401  (a fixture)
from test_run import run  # noqa: F401  (a fixture)
from worded import (
    change,
    change_rows,
    change_tokenizer,
    copy_of,
    edit,
    exported_from,
    qwen3_directory,
    token_of,
    written_out,
)

from rosd_jax.data import sources
from rosd_jax.errors import UserError
from rosd_jax.evals.evaluate import scores
from rosd_jax.gym.problems import load as gym_problems
from rosd_jax.models.families import read_config
from rosd_jax.models.weights import load_params, weights_fingerprint
from rosd_jax.rewards import Grader, mcq, tooluse
from rosd_jax.text import spans
from rosd_jax.text.thinking import outside_thinking
from rosd_jax.text.tokenizer import load_tokenizer
from rosd_jax.types import Problem
from support import ROOT, nightly_but, run_environment

FILE = Path(os.environ.get("ROSD_CASES_DIR", ROOT / "tests" / "cases")) / "reported.jsonl"
CASES = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
SLOW = ("export-unreadable-in-transformers-4",)
NIGHTLY = ("resume-on-changed-data",)  # test_run.py asks the same of one run


@pytest.fixture(scope="module")
def grader():
    with Grader("fixed", timeout_s=20) as grader:
        yield grader


def problem(kind: str, gold: str) -> Problem:
    return Problem("case/0", "case", kind, ({"role": "user", "content": "?"},), gold)


def own_row(tmp_path: Path, line: str) -> Problem:
    """The problem that a line of a user's own file becomes."""
    path = tmp_path / "own.jsonl"
    path.write_text(line + "\n", encoding="utf-8")
    example = sources.read_examples(f"jsonl:{path}", "train", path)[0]
    return problem(example["kind"], example["answer"])


# --- text in, verdict out ---


def mathematics(case, grader, tmp_path):
    given = case["input"]
    problems = [problem("math", given["gold"])]
    return grader.grade_all([given["response"]], problems, thinking_open=False)[0].score


def thinking_left_open(case, grader, tmp_path):
    given, options = case["input"], {"mode": "fixed", "thinking_open": True}
    for checker in (mcq, tooluse):
        if checker.__name__.split(".")[-1] in case["function"]:
            return checker.grade(given["response"], given["gold"], **options).score
    problems = [problem("math", given["gold"])]
    return grader.grade_all([given["response"]], problems, thinking_open=True)[0].score


def choice(case, grader, tmp_path):
    given = case["input"]
    return mcq.grade(given["response"], given["gold"], mode="fixed", thinking_open=False).score


def tool_call(case, grader, tmp_path):
    given = case["input"]
    return tooluse.grade(given["response"], given["gold"], mode="fixed", thinking_open=False).score


def tool_gold(case, grader, tmp_path):
    """The gold as a row of a file holds it; a refused row is right where the case allows it."""
    line = json.dumps({"prompt": "q", "kind": "tooluse", "answer": case["input"]["gold"]})
    try:
        gold = own_row(tmp_path, line).answer
    except UserError as error:
        assert "own.jsonl line 1" in str(error) and "answer" in str(error)
        return case["expected"] if "UserError" in str(case["expected"]) else "UserError"
    score = tooluse.grade(case["input"]["response"], gold, mode="fixed", thinking_open=False).score
    return case["expected"] if "UserError" in str(case["expected"]) and score == 1 else score


def own_gold(case, grader, tmp_path):
    row = own_row(tmp_path, case["input"]["row"])
    return grader.grade_all([case["input"]["response"]], [row], thinking_open=False)[0].score


def vote(case, grader, tmp_path):
    boxed = [f"The answer is \\boxed{{{text}}}." for text in case["input"]["boxed"]]
    problems = [problem("math", case["input"]["gold"])] * len(boxed)
    grades = grader.grade_all(boxed, problems, thinking_open=False)
    votes = grader.votes([grade.prediction for grade in grades], problems)
    return {"maj": scores(np.array([[grade.score for grade in grades]]), [votes])["maj"]}


def reflection(case, grader, tmp_path):
    return list(spans.parse_reflection(outside_thinking(case["input"]["raw"], opened=False)))


def quote(case, grader, tmp_path):
    located = spans.locate_quote(case["input"]["text"], case["input"]["quote"])
    return located and case["input"]["text"][located.start : located.stop]


# --- model directories described in words ---


def stop_ids(case, grader, tmp_path):
    """`tokenizer_config eos=pad=TOKEN; config.json eos_token_id=JSON; ...`"""
    path = qwen3_directory(tmp_path)
    words = case["input"]
    edit(path / "tokenizer_config.json", **{f"{n}_token": token_of(n, words) for n in ("eos", "pad")})
    stated = 0
    for file in ("config.json", "generation_config.json"):
        content = json.loads((path / file).read_text()) if file == "config.json" else {}
        content.pop("eos_token_id", None)
        ids = rf"(?<![\w.]){re.escape(file)}[^;]*?eos_token_id\"?\s*[=:]?\s*(\[[\d,\s]*\]|\"?\d+\"?|null)"
        if named := re.search(ids, words):
            content["eos_token_id"] = json.loads(named[1])
            stated += 1
        (path / file).write_text(json.dumps(content))
        if re.search(rf"(?:no|without) {re.escape(file)}", words):
            (path / file).unlink()
    if not stated:
        pytest.fail(f"no reader for {words!r}")
    found = load_tokenizer(path).stop_ids
    wanted = [int(i) for i in re.findall(r"\d+", str(case["expected"]))]
    return case["expected"] if wanted and set(wanted) <= set(found) else list(found)


def refused_row(case, tmp_path):
    """A UserError; a number may also be read as it stands."""
    row = written_out(case["input"]["row"])
    try:
        found = own_row(tmp_path, row).answer
    except UserError as error:
        assert "own.jsonl line 1" in str(error)
        return case["expected"]
    if "number as text" not in case["expected"]:
        return found
    number = json.loads(row, parse_float=Decimal, parse_int=Decimal)["answer"]
    found = re.sub(r"\s*\\times\s*10\^\{(-?\d+)\}", r"e\1", found)
    return case["expected"] if Decimal(found) == number else found


def sentence_not_crash(case, grader, tmp_path):
    if "read_examples" in case["function"]:
        return refused_row(case, tmp_path)
    path = copy_of(ROOT / "models" / "gym", tmp_path)
    name, field = change(path, case["input"])
    try:
        if "load_tokenizer" in case["function"]:
            load_tokenizer(path)
        else:
            model = read_config(path, num_tokens=None, dtype="float32", remat="none")
            weights_fingerprint(path)
            load_params(path, model)
    except UserError as error:
        assert name in str(error) or (field and field in str(error))
        return case["expected"]
    return "no error"


def blames_the_right_file(case, grader, tmp_path, run):  # noqa: F811
    path = copy_of(ROOT / "models" / "gym", tmp_path)
    name, field = change(path, case["input"].partition("with ")[2])
    config = ROOT / "configs" / "quickstart.py"
    arguments = [f"--config={config}:debug", "--mode=plan", f"--config.model.path={path}"]
    status, printed = run(*arguments)
    said = printed.err
    right = status == 2 and f"/{name}" in said and field in said and said.count("\n") == 1
    return case["expected"] if right else said


def export(case, grader, tmp_path, old_python):  # noqa: F811
    path = exported_from(case["input"].partition(" with ")[2].partition(";")[0], tmp_path)
    load_tokenizer(path).save(tmp_path / "out")
    answer = ask(old_python, [tmp_path / "out"])[str(tmp_path / "out")]
    return answer.get("error", case["expected"])


# --- runs described in words ---


def resume_on_changed(case, grader, tmp_path, cache):
    """`...; then CHANGE; same command with larger steps`"""
    model = copy_of(ROOT / "models" / "gym", tmp_path)
    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "eval")}
    for name, file in files.items():
        problems = gym_problems("chain" if name == "train" else "words", "train")[:16]
        rows = [{"prompt": p.question, "kind": "math", "answer": p.answer} for p in problems]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def train_to(steps: int) -> tuple[int, str]:
        arguments = [
            f"--config={ROOT / 'configs' / 'quickstart.py'}:debug",
            f"--workdir={tmp_path / 'run'}",
            f"--config.model.path={model}",
            f"--config.data.train=jsonl:{files['train']}",
            f"--config.steps={steps}",
            f"--config.eval.sets=jsonl:{files['eval']}",
            "--config.validation.sets=",
        ]
        environment = run_environment(**cache)
        done = subprocess.run(
            [sys.executable, ROOT / "run.py", *arguments], env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stderr

    assert train_to(1)[0] == 0
    words = case["input"].partition("; then ")[2].partition(";")[0]
    file = files["eval" if re.search(r"eval|validation|test", words) else "train"]
    if not (change_tokenizer(model, words) or change_rows(file, words)):
        pytest.fail(f"no reader for {words!r}")
    status, said = train_to(2)
    refused = status == 2 and said.startswith("error: ") and "changed since this run" in said
    return case["expected"] if refused else said or "goes on"


KINDS = {
    "math-": mathematics,
    "box-": mathematics,
    "gold-no-answer-can-match-math": mathematics,
    "thinking-opened-by-prompt": thinking_left_open,
    "reflection-": reflection,
    "mcq-": choice,
    "tool-": tool_call,
    "gold-no-answer-can-match-tool": tool_gold,
    "gold-key-misread": tool_gold,
    "quote-": quote,
    "maj-": vote,
    "data-float-gold": own_gold,
    "crash-instead-of-sentence": sentence_not_crash,
    "stop-ids-of-config-json": stop_ids,
    "error-blames-wrong-file": blames_the_right_file,
    "export-unreadable-in-transformers-4": export,
    "resume-on-changed-data": resume_on_changed,
}


def kept():
    """The numbers of all cases that cost little, and of one of each kind that costs more."""
    kinds = [case["kind"] for case in CASES]
    first = [kinds.index(kind) for kind in SLOW if kind in kinds]
    return [*first, *(n for n, kind in enumerate(kinds) if kind not in SLOW + NIGHTLY)]


@pytest.mark.parametrize("case", nightly_but(CASES, keep=kept()), ids=lambda case: case["id"])
def test_reported(case, grader, tmp_path, request):
    runs = [runner for prefix, runner in KINDS.items() if case["kind"].startswith(prefix)]
    assert len(runs) == 1, f"KINDS must have one entry for {case['kind']}"
    wanted = {blames_the_right_file: "run", export: "old_python", resume_on_changed: "cache"}.get(runs[0])
    extra = {wanted: request.getfixturevalue(wanted)} if wanted else {}
    assert runs[0](case, grader, tmp_path, **extra) == case.get("ours", case["expected"])


def test_a_case_that_we_judge_otherwise_says_why():
    assert all(case["why"] for case in CASES if "ours" in case)
