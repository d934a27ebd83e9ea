"""Reading the text sets: what arrives, what is refused and how, what the cache serves."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rosd_jax.data import builders, sources
from rosd_jax.data.sets import load_problems
from rosd_jax.errors import UserError
from rosd_jax.gym import problems as gym
from support import data_dir

ROW = {
    "prompt": "Which?\nA: α\nB: β",
    "answer": "B",
    "kind": "mcq",
    "system": "Be brief.",
    "elo": 1,
}
COUNTS = {
    ("biology", "train"): 450,
    ("biology", "test"): 50,
    ("chemistry", "train"): 1890,
    ("chemistry", "test"): 210,
    ("material", "train"): 841,
    ("material", "test"): 94,
    ("physics", "train"): 720,
    ("physics", "test"): 80,
    ("tooluse", "test"): 68,
    ("aime24", "test"): 30,
    ("aime25", "test"): 30,
    ("amc23", "test"): 40,
    ("math500", "test"): 500,
    ("gsm8k", "test"): 1319,
}


def write(path: Path, *records: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def physics(tmp_path: Path, *records: object, split: str = "train") -> Path:
    return write(tmp_path / "data" / "sciknoweval-physics" / f"{split}.json", *records)


@pytest.fixture(autouse=True)
def prepared_copies(tmp_path, monkeypatch):
    """They go to a new folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def load(tmp_path: Path, name: str, split: str = "train"):
    return load_problems(name, split, str(tmp_path / "data"))


def refusal(tmp_path: Path, name: str, split: str = "train") -> str:
    """The one-line refusal; nothing may have been written for it."""
    with pytest.raises(UserError) as caught:
        load(tmp_path, name, split)
    assert not (tmp_path / "cache").exists()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_science_row_becomes_a_problem(tmp_path, capsys):
    physics(tmp_path, ROW, ROW | {"system": None, "answer": "A"})
    first, second = load(tmp_path, "physics")
    assert (first.uid, first.dataset, first.kind) == ("physics/train/0", "physics", "mcq")
    assert first.messages == (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": ROW["prompt"]},
    )
    assert first.answer == "B" and second.answer == "A"
    assert [m["role"] for m in second.messages] == ["user"]
    assert second.question == ROW["prompt"]
    assert capsys.readouterr() == ("", "")


def test_file_order_and_text_survive_the_cache(tmp_path):
    prompts = [f"{i} \u2028 {chr(0x1F600 + i)} \\frac <b>\x00</b>" for i in range(60)]
    physics(tmp_path, *({**ROW, "prompt": p} for p in prompts))
    for _ in range(2):  # prepared, then served
        problems = load(tmp_path, "physics")
        assert [p.question for p in problems] == prompts
        assert [p.uid for p in problems] == [f"physics/train/{i}" for i in range(60)]


def test_changed_data_are_never_served_stale(tmp_path):
    physics(tmp_path, ROW)
    assert [p.answer for p in load(tmp_path, "physics")] == ["B"]
    physics(tmp_path, ROW | {"answer": "C"}, ROW)
    assert [p.answer for p in load(tmp_path, "physics")] == ["C", "B"]
    physics(tmp_path, ROW)
    assert [p.answer for p in load(tmp_path, "physics")] == ["B"]


def test_a_second_run_that_prepares_the_same_copy_does_no_harm(tmp_path):
    path = physics(tmp_path, ROW)
    final = tmp_path / "cache" / "copy"
    expected = {"train": sources.read_examples("physics", "train", path)}
    for _ in range(2):
        with builders._quiet():
            builders._prepare("physics", str(tmp_path / "data"), final, expected)
    assert [p.name for p in final.parent.iterdir()] == ["copy"]


def test_a_copy_that_lost_rows_is_never_put_in_place(tmp_path, monkeypatch):
    physics(tmp_path, ROW, ROW)

    def lossy(self, examples):
        return enumerate(examples[:1])

    monkeypatch.setattr(builders._TextBuilder, "_generate_examples", lossy)
    with pytest.raises(RuntimeError, match="did not keep the train rows of physics"):
        load(tmp_path, "physics")
    assert not list((tmp_path / "cache" / "rosd_jax" / "tfds").iterdir())


@pytest.mark.parametrize("kept", [0, 100])
@pytest.mark.parametrize("file", ["*.array_record*", "dataset_info.json"])
def test_a_damaged_copy_is_refused(tmp_path, file, kept):
    physics(tmp_path, ROW, ROW)
    load(tmp_path, "physics")
    (damaged,) = (tmp_path / "cache").rglob(file)
    damaged.write_bytes(damaged.read_bytes()[:kept])
    with pytest.raises(UserError, match="is damaged .*; delete that folder"):
        load(tmp_path, "physics")


def test_an_unwritable_cache_is_told(tmp_path):
    physics(tmp_path, ROW)
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot be written .*; set XDG_CACHE_HOME"):
        load(tmp_path, "physics")


def test_the_cache_follows_xdg(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    physics(tmp_path, ROW)
    load(tmp_path, "physics")
    assert list((tmp_path / "xdg" / "rosd_jax" / "tfds").iterdir())


def test_without_array_record_the_same_problems_are_read_and_it_says_so(tmp_path, monkeypatch):
    physics(tmp_path, ROW, ROW | {"answer": "D"})
    prepared = load(tmp_path, "physics")
    told = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(logging, "log_first_n", lambda level, text, n: told.append(text))
    assert load(tmp_path, "physics") == prepared
    assert told == ["array_record is absent: files are read directly"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (
            {k: v for k, v in ROW.items() if k != "answer"},
            "field 'answer' is missing, and the row has prompt, kind, ",
        ),
        (ROW | {"answer": None}, "field 'answer' is missing"),
        ({"question": "Which?"}, "field 'prompt' is missing, and the row has question; add it, rename"),
        ({}, "field 'prompt' is missing, and the row has no field"),
        (ROW | {"answer": "  "}, "field 'answer' is '  '; it must not be empty, so correct or drop"),
        (ROW | {"answer": 3}, "field 'answer' is 3; it must be a string, so correct or drop the row"),
        (ROW | {"answer": "B: text"}, "field 'answer' is 'B: text'; it must be one letter"),
        (ROW | {"answer": "BC"}, "field 'answer' is 'BC'; it must be one letter"),
        (ROW | {"answer": "1"}, "field 'answer' is '1'; it must be one letter"),
        (ROW | {"kind": "math", "answer": "long " * 99 + "\ud800"}, "field 'answer' is 'long long long"),
        (ROW | {"prompt": ""}, "field 'prompt' is ''; it must not be empty"),
        (ROW | {"prompt": ["a"]}, "field 'prompt' is ['a']; it must be a string"),
        (ROW | {"prompt": "\ud800"}, "field 'prompt' is '\\ud800'; it must not have an unpaired surrogate"),
        (ROW | {"system": 5}, "field 'system' is 5; it must be a string"),
        (ROW | {"kind": "code"}, "field 'kind' is 'code'; it must be one of mcq, math, tooluse"),
        ([1, 2], "is [1, 2], a list; a row must be one JSON object"),
        (
            '{"prompt": "?", "answer": ' + "9" * 5000 + "}",
            "(a number of 5000 digits, more than can be read)",
        ),
        ('{"prompt": ', "is not valid JSON"),
        ("[" * 100_000, "is not valid JSON"),
    ],
)
def test_a_malformed_row_names_file_line_and_field(tmp_path, record, words):
    path = physics(tmp_path, ROW, "", record)
    message = refusal(tmp_path, "physics")
    assert message.startswith(f"{path} line 3")
    assert words in message and len(message) < len(str(path)) + 250


def test_bytes_that_are_no_utf8_name_their_line(tmp_path):
    path = physics(tmp_path, ROW)
    path.write_bytes(path.read_bytes() + b'{"prompt": "\xff"}\n')
    assert "line 2 is not valid JSON" in refusal(tmp_path, "physics")


def test_a_byte_order_mark_and_crlf_are_no_matter(tmp_path):
    path = physics(tmp_path, ROW)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") * 2)
    assert len(load(tmp_path, "physics")) == 2


def test_missing_things_name_the_path_and_the_field(tmp_path):
    assert "data.dir is " in refusal(tmp_path, "physics")
    with pytest.raises(UserError, match="data.dir is ''; it must be the folder with"):
        load_problems("physics", "train", "")
    physics(tmp_path, ROW)
    missing = tmp_path / "data" / "tooluse" / "train.json"
    assert refusal(tmp_path, "tooluse").startswith(f"{missing} is missing; set data.dir")
    assert "has no 'train' split" in refusal(tmp_path, "aime24")
    unknown = refusal(tmp_path, "phisics")
    assert "'phisics' is not a known set" in unknown
    assert all(name in unknown for name in ("physics", "gsm8k", "jsonl:PATH", "gym:FAMILY"))
    physics(tmp_path, "")
    assert "has no rows" in refusal(tmp_path, "physics")


def test_tool_use_may_have_a_test_file_only(tmp_path):
    calls = [{"Action": "find", "Action_Input": '{"naïve": [1]}'}]
    record = {"prompt": "Find it.", "answer": calls, "kind": "tooluse", "system": None}
    path = write(tmp_path / "data/tooluse/test.json", record, record | {"answer": json.dumps(calls)})
    problems = load(tmp_path, "tooluse", "test")
    assert [json.loads(p.answer) for p in problems] == [calls, calls]
    for broken in ("find()", "[]", "{}", [{"Action": "f", "Action_Input": "{"}], [3]):
        write(path, record | {"answer": broken})
        with pytest.raises(UserError, match="line 1: field 'answer' is .*; it must"):
            load(tmp_path, "tooluse", "test")


@pytest.mark.parametrize(
    ("written", "read"),
    [(70, "70"), (27.0, "27"), (-1.0, "-1"), (0.5, "0.5"), ("025", "025"), (" p - q ", "p - q")],
)
def test_number_answers_become_text(tmp_path, written, read):
    write(tmp_path / "data/eval/amc23.jsonl", {"problem": "How many?", "answer": written})
    (problem,) = load(tmp_path, "amc23", "test")
    assert (problem.answer, problem.kind) == (read, "math")
    assert problem.question.startswith("How many?") and "\\boxed{}" in problem.question


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("0.00001", "0.00001"),
        ("1e-05", "0.00001"),
        ("4.5e-6", "0.0000045"),
        ("6.02e23", "6.02 \\times 10^{23}"),
        ("-2.998E+25", "-2.998 \\times 10^{25}"),
        ("6.626e-34", "6.626 \\times 10^{-34}"),
        ("1e20", "1 \\times 10^{20}"),
        ("1e400", "1 \\times 10^{400}"),
        ("1.50e3", "1500"),
        ("27.0", "27"),
        ("-0.0", "0"),
        ("-0.50", "-0.5"),
        ("0.1000000000000000000000000000000000001", "0.1000000000000000000000000000000000001"),
        ("12345678901234567890.0", "12345678901234567890"),
        ("9007199254740993", "9007199254740993"),
        ("1" + "0" * 400, "1" + "0" * 400),
    ],
)
def test_a_number_is_the_one_that_the_file_says(tmp_path, written, read):
    path = write(tmp_path / "own.jsonl", f'{{"prompt": "?", "answer": {written}}}')
    (example,) = sources.read_examples(f"jsonl:{path}", "train", path)
    assert example["answer"] == read


@pytest.mark.parametrize(
    "answer", ["$$", "**", "\\boxed{}", "\\text{ }", "$\\boxed{\\text{}}$", ".", "\\(\\)", "``"]
)
def test_a_gold_of_marks_alone_is_refused(tmp_path, answer):
    write(tmp_path / "own.jsonl", {"prompt": "?", "answer": "\\{\\}"}, {"prompt": "?", "answer": answer})
    with pytest.raises(UserError, match="line 2: field 'answer' is .*; it must be more than marks"):
        load_problems(f"jsonl:{tmp_path}/own.jsonl", "train", "")


@pytest.mark.parametrize("written", ["B", "b", "(B)", "B.", "**B**", " [b] "])
def test_a_gold_letter_is_read_without_its_marks(tmp_path, written):
    physics(tmp_path, ROW | {"answer": written})
    assert [p.answer for p in load(tmp_path, "physics")] == ["B"]


@pytest.mark.parametrize("key", ["Action Input", "ActionInput", "action_input", "parameters"])
def test_gold_calls_are_stored_with_the_keys_that_every_checker_reads(tmp_path, key):
    calls = [{"name": "f", key: {"a": 1.5}}, {"tool": "g"}]
    write(tmp_path / "data/tooluse/test.json", {"prompt": "?", "answer": calls})
    (problem,) = load(tmp_path, "tooluse", "test")
    stored = [{"Action": "f", "Action_Input": {"a": 1.5}}, {"Action": "g", "Action_Input": {}}]
    assert json.loads(problem.answer) == stored


@pytest.mark.parametrize("answer", [True, float("nan"), float("inf"), [], {}])
def test_answers_that_are_no_number_are_refused(tmp_path, answer):
    write(tmp_path / "data/eval/aime25.jsonl", {"problem": "How many?", "answer": answer})
    assert "line 1: field 'answer'" in refusal(tmp_path, "aime25", "test")


def test_gsm8k_answers_follow_the_mark(tmp_path):
    path = tmp_path / "data/eval/gsm8k_train.jsonl"
    write(path, {"question": "Cost?", "answer": "2 * 60 <<x>>\n#### $1,200\n#### 1,080"})
    assert [p.answer for p in load(tmp_path, "gsm8k")] == ["1080"]
    write(path, {"question": "Cost?", "answer": "1080"})
    with pytest.raises(
        UserError, match='line 1: field .answer. is .1080.; it must have a final answer after "####"'
    ):
        load(tmp_path, "gsm8k")


def test_a_file_of_ones_own_serves_either_split(tmp_path, monkeypatch):
    write(tmp_path / "own.jsonl", {"prompt": "1 + 1?", "answer": 2}, ROW)
    monkeypatch.chdir(tmp_path)
    for name in (f"jsonl:{tmp_path}/own.jsonl", "jsonl:own.jsonl"):
        train = load_problems(name, "train", "")
        assert train == load_problems(name, "test", "")
        assert [(p.kind, p.answer, p.uid) for p in train] == [
            ("math", "2", f"{name}/train/0"),
            ("mcq", "B", f"{name}/train/1"),
        ]
        assert train[0].messages == ({"role": "user", "content": "1 + 1?"},)
    with pytest.raises(UserError, match="names no file; set data.train or eval.sets to jsonl:PATH"):
        load_problems("jsonl:absent.jsonl", "train", "")


def test_a_set_of_ones_own_may_have_a_name_and_two_splits(tmp_path):
    write(tmp_path / "own" / "train.jsonl", {"prompt": "1 + 1?", "answer": 2})
    write(tmp_path / "own" / "test.jsonl", {"prompt": "1 + 2?", "answer": 3})
    for name, called in (
        (f"jsonl:{tmp_path}/own", f"jsonl:{tmp_path}/own"),
        (f"sums=jsonl:{tmp_path}/own", "sums"),
    ):
        for split, answer in (("train", "2"), ("test", "3")):
            (problem,) = load_problems(name, split, "")
            assert (problem.uid, problem.dataset, problem.answer) == (f"{called}/{split}/0", called, answer)
    (problem,) = load_problems(f"sums=jsonl:{tmp_path}/own/test.jsonl", "train", "")
    assert (problem.uid, problem.answer) == ("sums/train/0", "3")
    (tmp_path / "own" / "test.jsonl").unlink()
    with pytest.raises(UserError, match="has no 'test' split, since .*test.jsonl is missing; add that file"):
        load_problems(f"jsonl:{tmp_path}/own", "test", "")
    for bad in ("physics", "a b", "", "a/b"):
        with pytest.raises(UserError, match=f"names a set '{bad}'; a name must"):
            load_problems(f"{bad}=jsonl:{tmp_path}/own", "train", "")


def test_sets_are_one_by_their_files_not_by_spelling(tmp_path):
    for file in ("own/train.jsonl", "own/test.jsonl", "own/other.jsonl"):
        write(tmp_path / file, ROW)
    physics(tmp_path, ROW)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "own" / "other.jsonl")

    def same(a, b):
        return sources.same_data(a.format(tmp_path), b.format(tmp_path), str(tmp_path / "data"))

    assert same("jsonl:{}/own/other.jsonl", "mine=jsonl:{}/own/../own/other.jsonl")
    assert same("jsonl:{}/own/other.jsonl", "jsonl:{}/link.jsonl")
    assert same("jsonl:{}/own", "a=jsonl:{}/own/") and same("jsonl:{}/own", "jsonl:{}/own/test.jsonl")
    assert same("jsonl:{}/own/train.jsonl", "jsonl:{}/own/test.jsonl")
    assert same("physics", "jsonl:{}/data/sciknoweval-physics/test.json")
    assert same("gym:chain", "gym:chain") and not same("gym:chain", "gym:words")
    assert not same("jsonl:{}/own", "jsonl:{}/own/other.jsonl") and not same("physics", "biology")


def test_gym_sets_come_from_the_gym(monkeypatch):
    monkeypatch.setattr(gym, "load", lambda family, split: [(family, split)])
    assert load_problems("gym:chain", "test", "") == [("chain", "test")]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=40),
        st.dictionaries(
            st.sampled_from(["prompt", "answer", "system", "kind"]),
            st.recursive(
                st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
                lambda inner: st.lists(inner, max_size=2),
                max_leaves=3,
            ),
        ).map(lambda record: json.dumps(record).encode()),
    )
)
def test_any_line_is_read_or_refused(tmp_path, line):
    path = tmp_path / "own.jsonl"
    path.write_bytes(line)
    try:
        examples = sources.read_examples(f"jsonl:{path}", "train", path)
    except UserError:
        return
    for example in examples:
        assert set(example) == set(sources.FIELDS)
        assert example["user"].strip() and example["answer"]
        assert all(value.encode("utf-8") is not None for value in example.values())


@pytest.fixture(scope="module")
def real_cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("real"))


@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_real_sets_are_whole(real_cache, monkeypatch, name, split):
    monkeypatch.setenv("XDG_CACHE_HOME", real_cache)
    problems = load_problems(name, split, str(data_dir()))
    assert len(problems) == COUNTS[name, split]
    assert len({p.uid for p in problems}) == len(problems)
    assert {p.dataset for p in problems} == {name}
    kind = "mcq" if name in sources.SCIENCE else "tooluse" if name == "tooluse" else "math"
    assert {p.kind for p in problems} == {kind}
    assert ("system" in {m["role"] for p in problems for m in p.messages}) == (kind == "mcq")


def test_real_physics_test_has_its_known_majority_letter(real_cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", real_cache)
    problems = load_problems("physics", "test", str(data_dir()))
    letters, counts = np.unique([p.answer for p in problems], return_counts=True)
    assert letters[counts.argmax()] == "B"
    assert counts.max() == 33
