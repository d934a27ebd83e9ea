"""Writes a data set of TFDS or of the Hugging Face Hub as the JSON lines that `jsonl:PATH` reads.

    python -m rosd_jax.data.convert hf:openai/gsm8k:main data/gsm8k \\
        --prompt='{question} Put the final answer in \\boxed{}.' --answer='{answer}' --answer-after='####'
    python -m rosd_jax.data.convert tfds:NAME data/NAME --prompt='{question}' --answer='{choice}' --kind=mcq

SOURCE is hf:NAME[:CONFIG], which needs the package `datasets`, or tfds:NAME, which needs a data set that TFDS
has or can prepare as array_record. NAME may be a local directory. In --prompt, --system and --answer, {FIELD}
stands for a field of the row; all other text, braces too, is kept. With --answer-after, the answer is what
follows the last of that mark. --split=THEIRS=OURS (several times) says which of their splits is written as
train, validation or test; without it, those that have our names are written.

Every row is checked as a run would check it. A run then reads the files alone: --config.data.train=jsonl:DIR.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rosd_jax import atomic
from rosd_jax.data.sources import GOLD, OWN_SPLITS, SourceRow, own_row
from rosd_jax.errors import UserError

FIELD = re.compile(r"\{(\w+)\}")


def main(argv: list[str]) -> int:
    """Runs the command line and returns its exit status: 0, or 2 after a user's mistake."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="rosd_jax.data.convert",
    )
    parser.add_argument("source", help="hf:NAME[:CONFIG] or tfds:NAME")
    parser.add_argument("out", type=Path, help="directory that is made")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--answer", required=True)
    parser.add_argument("--answer-after", default="")
    parser.add_argument("--system", default="")
    parser.add_argument("--kind", default="math", choices=list(GOLD))
    parser.add_argument("--split", action="append", default=[], metavar="THEIRS=OURS")
    try:
        convert(parser.parse_args(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(asked: argparse.Namespace) -> None:
    """Writes the files and says what is in them. Raises UserError for a mistake, before it writes."""
    if asked.out.exists():
        raise UserError(f"{asked.out} exists already; name a directory that does not")
    splits = open_source(asked.source)
    written = {}
    for ours, theirs in choose_splits(asked.split, list(splits)).items():
        where = f"{asked.source} {theirs} row"
        rows = enumerate(splits[theirs], start=1)
        written[ours] = [converted(SourceRow(f"{where} {i}", plain(row)), asked) for i, row in rows]
        if not written[ours]:
            raise UserError(f"the split {theirs!r} of {asked.source} has no rows; leave it out with --split")
    asked.out.mkdir(parents=True)
    for ours, rows in written.items():
        path = asked.out / OWN_SPLITS[ours]
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        atomic.write_text(path, (line + "\n" for line in lines))
        print(f"{path}: {len(lines)} rows, the first one:\n{lines[0]}")


def open_source(source: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """The rows of each split. Raises UserError for a source that cannot be read."""
    kind, _, name = source.partition(":")
    opens = {"hf": open_hf, "tfds": open_tfds}
    if kind not in opens or not name:
        raise UserError(f"the source {source!r} must be hf:NAME[:CONFIG] or tfds:NAME; correct it")
    try:
        return opens[kind](name)
    except ModuleNotFoundError as error:
        raise UserError(f"{source} needs the package {error.name}; pip install {error.name}") from error
    except Exception as error:  # of many kinds: no network, no such set, a set that needs code of its own
        words = " ".join(str(error).split())[:300]
        raise UserError(f"{source} cannot be read ({type(error).__name__}: {words})") from error


def open_hf(name: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """A data set of the Hub, or of a directory. Its own code is never run."""
    import datasets  # pyright: ignore[reportMissingImports]  # not among our requirements

    path, _, config = name.partition(":")
    return datasets.load_dataset(path, config or None)


def open_tfds(name: str) -> Mapping[str, Iterable[Mapping[str, Any]]]:
    """A data set that TFDS knows, prepared if it is not yet, or one that is in a directory."""
    import tensorflow_datasets as tfds

    if Path(name).is_dir():
        builder = tfds.builder_from_directory(name)
    else:
        builder = tfds.builder(name, file_format="array_record")
        builder.download_and_prepare()
    return {split: builder.as_data_source(split) for split in builder.info.splits}  # pyright: ignore[reportCallIssue]


def choose_splits(asked: Sequence[str], there: Sequence[str]) -> dict[str, str]:
    """Our split -> theirs. Raises UserError for a split that does not exist."""
    pairs = [text.partition("=")[::2] for text in asked] or [
        (name, name) for name in there if name in OWN_SPLITS
    ]
    for theirs, ours in pairs:
        if theirs not in there or ours not in OWN_SPLITS:
            raise UserError(
                f"--split={theirs}={ours} must be THEIRS=OURS; theirs are {', '.join(there)}, and ours are "
                f"{', '.join(OWN_SPLITS)}"
            )
    if not pairs:
        raise UserError(
            f"no split is named as ours are; choose with --split=THEIRS=train, of {', '.join(there)}"
        )
    return {ours: theirs for theirs, ours in pairs}


def converted(row: SourceRow, asked: argparse.Namespace) -> dict[str, Any]:
    """A row as our files have it. Raises UserError if a run would refuse it."""
    answer = filled(asked.answer, row, "--answer")
    if asked.answer_after:
        _, mark, after = str(answer).rpartition(asked.answer_after)
        answer = after.strip()
        if not mark:
            raise UserError(f"{row.where}: the answer has no {asked.answer_after!r}; correct --answer-after")
    made = {"kind": asked.kind, "prompt": filled(asked.prompt, row, "--prompt"), "answer": answer}
    if asked.system:
        made["system"] = filled(asked.system, row, "--system")
    if asked.kind == "own":  # a reward function receives all fields
        made = row.fields | made
    own_row(SourceRow(row.where, made))
    return made


def filled(template: str, row: SourceRow, flag: str) -> Any:
    """The template with the row's fields. One that is a single field is its value, which need not be text."""

    def field(found: re.Match[str]) -> Any:
        if found[1] not in row.fields:
            named = ", ".join(row.fields)
            raise UserError(
                f"{flag} names the field {found[1]!r}; {row.where} has {named}, so name one of these"
            )
        return row.fields[found[1]]

    whole = FIELD.fullmatch(template)
    if whole:
        return field(whole)
    return FIELD.sub(lambda found: str(field(found)), template)


def plain(value: Any) -> Any:
    """A value of TFDS or of `datasets` as JSON has it: text for bytes, lists for arrays."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if hasattr(value, "tolist"):  # a NumPy array or number
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
