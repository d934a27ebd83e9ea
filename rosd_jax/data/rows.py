"""The text sets as files: where each lies, what a row must hold, and how it becomes a problem.

Every file holds one JSON object a line, whatever its suffix. Science and tool-use files carry the
fields of the released splits, of which `prompt`, `answer`, `system` and `kind` are read. A set of
one's own is `jsonl:PATH`, with fields `prompt` and `answer`, and optionally `system` and `kind`
("math" unless given, or "mcq", "tooluse" or "own"). Its prompt is sent as it stands, so a "math" prompt
should itself ask for a final \\boxed{} answer; it is one split, whichever is asked for. Only a reward
function of one's own grades the kind "own", whose answer may be anything, or absent; such a function is
handed all other fields of a row too.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rosd_jax.config import UserError

FIELDS = ("uid", "dataset", "kind", "system", "user", "answer", "extra")
READ = ("prompt", "system", "kind", "answer")  # what we take from a row of one's own
MATH_REQUEST = "Reason step by step, then state the final answer inside \\boxed{}."

Example = dict[str, str]  # FIELDS, as TFDS stores them


@dataclass(frozen=True)
class Row:
    """One line of a file, with the words that say where it stands."""

    where: str  # "<path> line <number>"
    fields: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where a set's splits lie and how one of its rows is read."""

    files: dict[str, str]  # split -> path under data.dir (for jsonl: under the file's own folder)
    read_row: Callable[[Row], Example]


def read_examples(name: str, split: str, path: Path) -> list[Example]:
    """Reads and checks a whole file, in file order.

    Raises UserError naming file and line, and the field, of the first malformed row.
    """
    read_row = source(name).read_row
    return [
        {"uid": f"{name}/{split}/{i}", "dataset": name, "extra": "", **read_row(row)}
        for i, row in enumerate(_read_rows(path))
    ]


def source(name: str) -> Source:
    """The source of a known set, or of "jsonl:PATH"."""
    if name.startswith("jsonl:"):
        return Source({"train": _jsonl_path(name).name}, _own_row)
    return SOURCES[name]


def present(name: str, folder: str) -> dict[str, Path]:
    """The splits of a set whose files are at hand (the tool-use training file often is not)."""
    paths = {split: Path(folder, file) for split, file in source(name).files.items()}
    return {split: path for split, path in paths.items() if path.is_file()}


def locate(name: str, split: str, data_dir: str) -> tuple[str, str]:
    """The folder and split to read. Raises UserError for an unknown set, split, folder or file."""
    if name.startswith("jsonl:"):
        path = _jsonl_path(name)
        if not path.is_file():
            raise UserError(f"{name!r} names no file; give data.train or eval.sets jsonl:PATH of a real one")
        return str(path.parent), "train"
    if name not in SOURCES:
        known = ", ".join((*SOURCES, "jsonl:PATH", "gym:FAMILY"))
        raise UserError(f"{name!r} is no known set; give data.train or eval.sets one of {known}")
    files = SOURCES[name].files
    if split not in files:
        raise UserError(f"{name!r} has no {split!r} split, only {', '.join(files)}; choose another set")
    folder = Path(data_dir).expanduser()
    if not data_dir or not folder.is_dir():
        raise UserError(f"data.dir is {data_dir!r}; it must be the folder that holds {files[split]}")
    if split not in present(name, str(folder)):
        raise UserError(f"{folder / files[split]} is missing; set data.dir to the folder that holds it")
    return str(folder), split


def file_bytes(path: Path) -> bytes:
    """The file's content. Raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error


def _jsonl_path(name: str) -> Path:
    return Path(name.removeprefix("jsonl:")).expanduser().absolute()


def _read_rows(path: Path) -> list[Row]:
    lines = file_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = [_parse(f"{path} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path} holds no rows; it must hold one JSON object a line")
    return rows


def _parse(where: str, line: bytes) -> Row:
    try:
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); mend or drop the row") from None
    if not isinstance(fields, dict):
        raise UserError(f"{where} is a {type(fields).__name__}; a row must be one JSON object")
    return Row(where, fields)


def _wrong(row: Row, field: str, what: str) -> UserError:
    return UserError(f"{row.where}: field {field!r} {what}; mend or drop the row")


def _text(row: Row, field: str, default: str | None = None) -> str:
    """The field as text; absent or blank it is the default, or an error where there is none."""
    value = row.fields.get(field)
    if value is not None and not isinstance(value, str):
        raise _wrong(row, field, f"is {type(value).__name__} and must be a string")
    if not value or not value.strip():
        if default is None:
            raise _wrong(row, field, "is missing" if value is None else "is empty")
        return default
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _wrong(row, field, "holds half a surrogate pair, which is not text") from None
    return value


def _math_answer(row: Row) -> str:
    """Text, or a number as text: 70 and 27.0 become "70" and "27"."""
    value = row.fields.get("answer")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _text(row, "answer").strip()
    if not math.isfinite(value):
        raise _wrong(row, "answer", f"is {value} and must be finite")
    return str(int(value) if value == int(value) else value)


def _tool_answer(row: Row) -> str:
    """The gold calls as JSON text: a list of {"Action": name, "Action_Input": input}."""
    value = row.fields.get("answer")
    listed = isinstance(value, list)
    text = json.dumps(value, ensure_ascii=False) if listed else _text(row, "answer")
    calls = json.loads(text) if _is_json(text) else None
    if not isinstance(calls, list) or not calls or not all(map(_is_call, calls)):
        raise _wrong(row, "answer", "must be a JSON list of calls with Action and Action_Input (JSON)")
    return text


def _is_call(call: object) -> bool:
    """What the grader can compare; a call without an input has the input {}."""
    if not isinstance(call, dict) or not isinstance(call.get("Action"), str):
        return False
    given = call.get("Action_Input", {})
    return isinstance(given, dict) or (isinstance(given, str) and _is_json(given))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _letter_answer(row: Row) -> str:
    letter = _text(row, "answer").strip()
    if len(letter) != 1 or not "A" <= letter <= "Z":
        raise _wrong(row, "answer", f"is {letter[:20]!r} and must be one capital letter")
    return letter


def _any_answer(row: Row) -> str:
    """Text, any other value as JSON text, or "" where there is none."""
    value = row.fields.get("answer")
    if value is None:
        return ""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise _wrong(row, "answer", "must not be nested so deeply") from None
    return _text(Row(row.where, {"answer": text}), "answer", "")


GOLD = {"mcq": _letter_answer, "math": _math_answer, "tooluse": _tool_answer, "own": _any_answer}


def _chat_row(row: Row, kind: str) -> Example:
    """A row of the released schema or of a user's own file; `kind` serves rows that name none."""
    kind = _text(row, "kind", kind)
    if kind not in GOLD:
        raise _wrong(row, "kind", f"is {kind[:20]!r} and must be one of {', '.join(GOLD)}")
    system, user = _text(row, "system", ""), _text(row, "prompt")
    return {"kind": kind, "system": system, "user": user, "answer": GOLD[kind](row)}


def _own_row(row: Row) -> Example:
    """A row of a user's own file; `extra` keeps, as a JSON object, what a reward function may want to see."""
    example = _chat_row(row, kind="math")
    whole = example["kind"] == "own" and not isinstance(row.fields.get("answer", ""), str)
    extra = {k: v for k, v in row.fields.items() if k not in READ or (k == "answer" and whole)}
    try:
        return {**example, "extra": json.dumps(extra) if extra else ""}
    except RecursionError:
        raise UserError(f"{row.where} nests its fields too deeply; flatten or drop the row") from None


def _math_row(row: Row) -> Example:
    return _math_example(_text(row, "problem"), _math_answer(row))


def _gsm8k_row(row: Row) -> Example:
    """The answer stands behind the last "####" of the worked solution."""
    _, mark, answer = _text(row, "answer").rpartition("####")
    answer = answer.replace(",", "").strip()
    if not mark or not answer:
        raise _wrong(row, "answer", 'has no final answer behind "####"')
    return _math_example(_text(row, "question"), answer)


def _math_example(problem: str, answer: str) -> Example:
    user = f"{problem.strip()}\n\n{MATH_REQUEST}"
    return {"kind": "math", "system": "", "user": user, "answer": answer}


def _splits(pattern: str) -> dict[str, str]:
    return {split: pattern.format(split) for split in ("train", "test")}


SCIENCE = ("biology", "chemistry", "material", "physics")
CONTESTS = ("aime24", "aime25", "amc23", "math500")
_mcq_row = functools.partial(_chat_row, kind="mcq")
_tool_row = functools.partial(_chat_row, kind="tooluse")
SOURCES = {
    **{name: Source(_splits(f"sciknoweval-{name}/{{}}.json"), _mcq_row) for name in SCIENCE},
    "tooluse": Source(_splits("tooluse/{}.json"), _tool_row),
    **{name: Source({"test": f"eval/{name}.jsonl"}, _math_row) for name in CONTESTS},
    "gsm8k": Source(_splits("eval/gsm8k_{}.jsonl"), _gsm8k_row),
}
