"""`load_problems`: the problems of a data set, whatever it is read from."""

from __future__ import annotations

import importlib.util

from absl import logging

from rosd_jax.data import sources
from rosd_jax.gym import problems as gym
from rosd_jax.types import Problem


def load_problems(name: str, split: str, data_dir: str) -> list[Problem]:
    """The problems of one split, in file order.

    `name` is one of sources.SOURCES, "jsonl:PATH", "NAME=jsonl:PATH" or "gym:FAMILY"; `split` is "train",
    "validation" or "test". Raises UserError for an unknown set or split, a missing file, a malformed row
    (before anything is written), and a cache that cannot be written.
    """
    if name.startswith("gym:"):
        return gym.load(name.removeprefix("gym:"), split)
    folder, split = sources.locate(name, split, data_dir)
    if importlib.util.find_spec("array_record") is None:
        logging.log_first_n(logging.WARNING, "array_record is absent: files are read directly", 1)
        examples = sources.read_examples(name, split, sources.present(name, folder)[split])
    else:
        # Imported here, since TFDS takes a quarter of a second and the gym needs none.
        from rosd_jax.data.builders import read_prepared

        examples = read_prepared(name, split, folder)
    return [_problem(example) for example in examples]


def _problem(example: sources.Example) -> Problem:
    messages = tuple({"role": role, "content": example[role]} for role in ("system", "user") if example[role])
    return Problem(
        uid=example["uid"],
        dataset=example["dataset"],
        kind=example["kind"],
        messages=messages,
        answer=example["answer"],
        extra=example["extra"],
    )
