"""The data sets as files: where each is, what a row must have, and how a row becomes a problem.

Every file has one JSON object per line, whatever its suffix. Science and tool-use files have the fields of
the released splits; `prompt`, `answer`, `system` and `kind` are read.

A user's own set is `jsonl:PATH`. Its rows have `prompt` and `answer`, and optionally `system` and `kind`
("math" by default, or "mcq", "tooluse" or "own"). The prompt is sent unchanged, so a "math" prompt should
itself ask for a final \\boxed{} answer. A file serves as any split; a folder has train.jsonl,
validation.jsonl and test.jsonl, or some of them. `NAME=jsonl:PATH` gives the set a name in metrics, files
and report.

The kind "own" is graded by the user's reward function alone. Its answer may be anything, or absent, and the
function receives all other fields of the row too. For the other kinds, a row whose gold answer no response
could match is an error.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from rosd_jax.config import PATH_RULE, path_fits
from rosd_jax.errors import UserError
from rosd_jax.fields import shown
from rosd_jax.rewards import tooluse

FIELDS = ("uid", "dataset", "kind", "system", "user", "answer", "extra")
READ = ("prompt", "system", "kind", "answer")  # what is read from a row of a user's file
MATH_REQUEST = "Reason step by step, then state the final answer inside \\boxed{}."

# The files of a user's folder.
OWN_SPLITS = {"train": "train.jsonl", "validation": "validation.jsonl", "test": "test.jsonl"}
PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")
POSITIONAL = range(-30, 16)  # powers of ten that are written out even if the file has an exponent

# Marks that are no answer by themselves.
NO_CONTENT = re.compile(
    r"(?:\\(?:boxed|fbox|text|textbf|mathrm|mathbf|left|right|displaystyle|quad|[,;:! ()\[\]])"
    r"|[\s$*_`\"'.,:;!?{}~-])*"
)
LETTER_ANSWER = re.compile(r"[\s(\[*\"']*([A-Za-z])[\s.):\]*\"']*")

Example = dict[str, str]  # FIELDS, as TFDS stores them


class WrittenFloat(float):
    """A float of a JSON file, with the digits that the file has."""

    def __init__(self, written: str):
        self.written = written


@dataclass(frozen=True)
class SourceRow:
    """One line of a file, and where it is, in words."""

    where: str  # "<path> line <number>"
    fields: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """Where the splits of a set are and how its rows are read."""

    files: dict[str, str]  # split -> path under data.dir, or under the folder of jsonl:PATH
    read_row: Callable[[SourceRow], Example]


def read_examples(name: str, split: str, path: Path) -> list[Example]:
    """Reads and checks a whole file, in file order.

    Raises UserError naming file and line, and the field, of the first malformed row.
    """
    read_row = source(name).read_row
    called = set_name(name)
    return [
        {"uid": f"{called}/{split}/{i}", "dataset": called, "extra": "", **read_row(row)}
        for i, row in enumerate(read_rows(path))
    ]


def source(name: str) -> Source:
    """The source of a known set, or of a user's own."""
    path = own_path(name)
    if path is None:
        return SOURCES[name]
    files = OWN_SPLITS if path.is_dir() else {"train": path.name}
    return Source(files, own_row)


def set_name(name: str) -> str:
    """The name of a set in metrics, files and report: NAME of "NAME=jsonl:PATH", otherwise `name` itself.

    Raises UserError for a NAME that has other characters than PLAIN_NAME, or is that of a known set.
    """
    called, given, _ = name.partition("=jsonl:")
    if not given or ":" in called:
        return name
    if not PLAIN_NAME.fullmatch(called) or called in SOURCES:
        raise UserError(
            f"{name!r} names a set {called!r}; a name must have letters, digits, - and _ only, and not "
            "be that of a known set, so choose another"
        )
    return called


def own_path(name: str) -> Path | None:
    """The file or folder of "jsonl:PATH" or "NAME=jsonl:PATH"; None for another set.

    Raises UserError for a path that is too long for a file system.
    """
    asked = name if name.startswith("jsonl:") else name[len(set_name(name)) + 1 :]
    path = asked.removeprefix("jsonl:")
    if not path_fits(path):
        raise UserError(f"the path of the set {shown(name)} is no path of a file; it must {PATH_RULE}")
    return Path(os.path.expanduser(path)).absolute() if asked else None


def same_data(name: str, other: str, data_dir: str) -> bool:
    """Whether two sets are the same: by name or by file. The files of one folder are one set."""
    return name == other or not _all_files(name, data_dir).isdisjoint(_all_files(other, data_dir))


def listed(sets: str) -> tuple[str, ...]:
    """The set names in a field such as eval.sets, which separates them by commas."""
    return tuple(name.strip() for name in sets.split(",") if name.strip())


def names_of_same(train: str, sets: str, data_dir: str) -> tuple[str, ...]:
    """The name of the set `train`, then the names of those in `sets` that are the same data.

    sets: separated by commas, as in eval.sets.
    """
    same = [name for name in listed(sets) if same_data(name, train, data_dir)]
    return tuple(dict.fromkeys(set_name(name) for name in (train, *same)))


def _all_files(name: str, data_dir: str) -> set[Path]:
    """The files of all splits of a set, resolved. A gym family has none."""
    path = own_path(name)
    if path is None:
        files = SOURCES[name].files.values() if name in SOURCES else ()
        return {Path(os.path.expanduser(data_dir), file).resolve() for file in files}
    if path.is_dir():
        path /= OWN_SPLITS["train"]
    siblings = OWN_SPLITS.values() if path.name in OWN_SPLITS.values() else (path.name,)
    return {path.with_name(sibling).resolve() for sibling in siblings}


def present(name: str, folder: str) -> dict[str, Path]:
    """The splits of a set whose files exist (the tool-use training file often does not)."""
    paths = {split: Path(folder, file) for split, file in source(name).files.items()}
    return {split: path for split, path in paths.items() if path.is_file()}


def locate(name: str, split: str, data_dir: str) -> tuple[str, str]:
    """The folder and split to read. Raises UserError for an unknown set, split, folder or file."""
    path = own_path(name)
    if path is not None:
        return _locate_own(name, split, path)
    if name not in SOURCES:
        known = ", ".join((*SOURCES, "jsonl:PATH", "NAME=jsonl:PATH", "gym:FAMILY"))
        raise UserError(f"{name!r} is not a known set; set data.train or eval.sets to one of {known}")
    files = SOURCES[name].files
    if split not in files:
        raise UserError(f"{name!r} has no {split!r} split, only {', '.join(files)}; choose another set")
    folder = Path(os.path.expanduser(data_dir))
    if not data_dir or not folder.is_dir():
        raise UserError(f"data.dir is {data_dir!r}; it must be the folder with {files[split]}")
    if split not in present(name, str(folder)):
        raise UserError(f"{folder / files[split]} is missing; set data.dir to the folder that has it")
    return str(folder), split


def _locate_own(name: str, split: str, path: Path) -> tuple[str, str]:
    if path.is_dir():
        if not (path / OWN_SPLITS[split]).is_file():
            raise UserError(
                f"{name!r} has no {split!r} split, since {path / OWN_SPLITS[split]} is missing; "
                "add that file, or choose another set"
            )
        return str(path), split
    if not path.is_file():
        raise UserError(
            f"{name!r} names no file; set data.train or eval.sets to jsonl:PATH of an existing file, or of a "
            f"folder with {', '.join(OWN_SPLITS.values())}"
        )
    return str(path.parent), "train"


def file_bytes(path: Path) -> bytes:
    """The file's content. Raises UserError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); make it readable") from error


def read_rows(path: Path) -> list[SourceRow]:
    """The rows of a file of JSON lines. Raises UserError naming the first malformed line."""
    lines = file_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    rows = [_parse(f"{path} line {i}", line) for i, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path} has no rows; it must have one JSON object per line")
    return rows


def _parse(where: str, line: bytes) -> SourceRow:
    try:
        fields = json.loads(line.decode("utf-8"), parse_float=WrittenFloat, parse_int=_whole)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON ({error}); correct or drop the row") from None
    if not isinstance(fields, dict):
        raise UserError(
            f"{where} is {_short(fields)}, a {type(fields).__name__}; a row must be one JSON object, so "
            "correct or drop it"
        )
    return SourceRow(where, fields)


def _whole(written: str) -> int:
    try:
        return int(written)
    except ValueError:  # Python reads no more than 4300 digits
        raise ValueError(f"a number of {len(written)} digits, more than can be read") from None


def _short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _wrong(row: SourceRow, field: str, rule: str) -> UserError:
    value = _short(row.fields.get(field))
    return UserError(f"{row.where}: field {field!r} is {value}; it {rule}, so correct or drop the row")


def _absent(row: SourceRow, field: str) -> UserError:
    named = _short(", ".join(row.fields)).strip("'\"") or "no field"
    return UserError(
        f"{row.where}: field {field!r} is missing, and the row has {named}; add it, rename the field that "
        "has it, or drop the row"
    )


def _text(row: SourceRow, field: str, default: str | None = None) -> str:
    """The field as text. An absent or blank field is the default, or an error without a default."""
    value = row.fields.get(field)
    if value is None and default is None:
        raise _absent(row, field)
    if value is not None and not isinstance(value, str):
        raise _wrong(row, field, "must be a string")
    if not value or not value.strip():
        if default is None:
            raise _wrong(row, field, "must not be empty")
        return default
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _wrong(row, field, "must not have an unpaired surrogate, which is not text") from None
    return value


def _math_answer(row: SourceRow) -> str:
    """The answer as text; the numbers 70 and 27.0 become "70" and "27"."""
    value = row.fields.get("answer")
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _math_text(row, _text(row, "answer"))
    if isinstance(value, int):
        return str(value)
    try:
        number = Decimal(value.written if isinstance(value, WrittenFloat) else value)
        if number.is_finite():
            return _number_text(number, positional="e" not in str(getattr(value, "written", "")).lower())
    except InvalidOperation:  # the exponent has more digits than Decimal accepts
        pass
    raise _wrong(row, "answer", "must be a finite number")


def _number_text(number: Decimal, positional: bool) -> str:
    """The number in decimal digits, or in LaTeX if it is far from 1 and the file has an exponent."""
    sign, digits, exponent = number.as_tuple()
    written = "".join(map(str, digits)).lstrip("0")
    kept = written.rstrip("0")
    if not kept:
        return "0"
    assert isinstance(exponent, int)
    exponent += len(written) - len(kept)
    power = exponent + len(kept) - 1
    minus = "-" if sign else ""
    if not positional and power not in POSITIONAL:
        mantissa = f"{kept[0]}.{kept[1:]}" if kept[1:] else kept
        return f"{minus}{mantissa} \\times 10^{{{power}}}"
    return f"{Decimal((sign, tuple(map(int, kept)), exponent)):f}"


def _math_text(row: SourceRow, answer: str) -> str:
    if NO_CONTENT.fullmatch(answer):
        raise _wrong(row, "answer", "must be more than marks, which no response can match")
    return answer.strip()


def _tool_answer(row: SourceRow) -> str:
    """The gold calls as JSON text: a list of {"Action": name, "Action_Input": input}."""
    value = row.fields.get("answer")
    try:
        calls = tooluse.gold_calls(value if isinstance(value, list) else _text(row, "answer"))
    except UserError:
        raise
    except ValueError as error:
        raise _wrong(row, "answer", str(error)) from None
    return json.dumps(calls, ensure_ascii=False)


def _letter_answer(row: SourceRow) -> str:
    """The letter as a capital, without marks: "b" and "(B)" become "B"."""
    letter = LETTER_ANSWER.fullmatch(_text(row, "answer"))
    if letter is None:
        raise _wrong(row, "answer", "must be one letter")
    return letter[1].upper()


def _any_answer(row: SourceRow) -> str:
    """The answer as text; another value as JSON text; "" where there is none."""
    value = row.fields.get("answer")
    if value is None:
        return ""
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    except RecursionError:
        raise _wrong(row, "answer", "must not be nested so deeply") from None
    return _text(SourceRow(row.where, {"answer": text}), "answer", "")


GOLD = {"mcq": _letter_answer, "math": _math_answer, "tooluse": _tool_answer, "own": _any_answer}


def _chat_row(row: SourceRow, kind: str) -> Example:
    """A row of the released schema or of a user's file. `kind` is that of rows that name none."""
    kind = _text(row, "kind", kind)
    if kind not in GOLD:
        raise _wrong(row, "kind", f"must be one of {', '.join(GOLD)}")
    system = _text(row, "system", "")
    user = _text(row, "prompt")
    return {"kind": kind, "system": system, "user": user, "answer": GOLD[kind](row)}


def own_row(row: SourceRow) -> Example:
    """A row of a user's file. `extra` keeps the other fields, as a JSON object, for a reward function."""
    example = _chat_row(row, kind="math")
    whole = example["kind"] == "own" and not isinstance(row.fields.get("answer", ""), str)
    extra = {k: v for k, v in row.fields.items() if k not in READ or (k == "answer" and whole)}
    try:
        return {**example, "extra": json.dumps(extra) if extra else ""}
    except RecursionError:
        raise UserError(f"{row.where} nests its fields too deeply; flatten or drop the row") from None


def _math_row(row: SourceRow) -> Example:
    return _math_example(_text(row, "problem"), _math_answer(row))


def _gsm8k_row(row: SourceRow) -> Example:
    """The answer follows the last "####" of the worked solution."""
    _, mark, answer = _text(row, "answer").rpartition("####")
    answer = answer.replace(",", "").strip()
    if not mark or not answer:
        raise _wrong(row, "answer", 'must have a final answer after "####"')
    return _math_example(_text(row, "question"), _math_text(row, answer))


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
