"""What a config's data sets look like to the model: lengths, prompts left out, duplicates, an example each.

preview(config)   -> the text that `--mode=data` prints
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

import numpy as np

from rosd_jax.data.pipeline import Encoded
from rosd_jax.settings import Settings
from rosd_jax.train.inputs import FILES, Inputs, question, read_inputs, set_name
from rosd_jax.types import Problem

SAME = "Problems with the same question, but for case and white space:"
NAMED = 3  # duplicates that are named for a pair of sets
ROW = "{:<26} {:>8} {:>8}  {:>6} {:>6} {:>6} {:>6}  {}"
LONGEST_EXAMPLE = 4000  # characters of a prompt that are shown


def preview(config: Settings) -> str:
    """A line for each set, the problems that two sets share, and the first prompt of each set.

    Reads and checks what a run would; no device is used. Raises UserError as `read_inputs` does.
    """
    inputs = read_inputs(config)
    sets = dict(_sets(config, inputs))
    lines = [ROW.format("set", "problems", "left out", "least", "median", "95 %", "most", "kind")]
    lines += [_summary(name, encoded, inputs) for name, encoded in sets.items()]
    limit = config.data.max_prompt_tokens
    lines += ["", f"Tokens of prompts; left out are those above data.max_prompt_tokens ({limit})."]
    shared = _shared(sets)
    lines += ["", SAME if shared else "No problem is in two sets, or in one set twice.", *shared]
    for name, encoded in sets.items():
        lines += ["", *_example(name, encoded, inputs, config)]
    return "\n".join(lines)


def _sets(config: Settings, inputs: Inputs) -> Iterator[tuple[str, Encoded]]:
    """Every set of the config, by its name and the split that is read."""
    yield f"{set_name(config.data.train)}/train", inputs.train
    for name, encoded in inputs.validation.items():
        yield f"{name}/{FILES['validation']}", encoded
    for name, encoded in inputs.evals.items():
        yield f"{name}/{FILES['eval']}", encoded


def _summary(name: str, encoded: Encoded, inputs: Inputs) -> str:
    lengths = [len(ids) for _, ids in encoded]
    least, median, high, most = np.percentile(lengths, [0, 50, 95, 100]).astype(int)
    kinds = " ".join(sorted({problem.kind for problem, _ in encoded}))
    left_out = len(inputs.overlong.get(name, ()))
    return ROW.format(name, len(encoded), left_out, least, median, high, most, kinds)


def _shared(sets: dict[str, Encoded]) -> list[str]:
    """A line for each pair of sets with the same questions, but for case and white space."""
    first_with: dict[str, tuple[str, Problem]] = {}
    pairs: dict[tuple[str, str], list[str]] = {}
    for name, encoded in sets.items():
        for problem, _ in encoded:
            other, earlier = first_with.setdefault(question(problem), (name, problem))
            if earlier is not problem:
                same = f"{earlier.uid} = {problem.uid}" if earlier.uid != problem.uid else problem.uid
                pairs.setdefault((other, name), []).append(same)
    return [_duplicates(name, other, found) for (other, name), found in pairs.items()]


def _duplicates(name: str, other: str, found: list[str]) -> str:
    where = "repeated" if name == other else f"also in {other}"
    more = ", ..." if len(found) > NAMED else ""
    return f"{name}: {len(found)} {where}: {', '.join(found[:NAMED])}{more}"


def _example(name: str, encoded: Encoded, inputs: Inputs, config: Settings) -> list[str]:
    problem, ids = encoded[0]
    prompt = inputs.tokenizer.render(problem.messages, config.thinking.student)
    cut = f" ... ({len(prompt)} characters)" if len(prompt) > LONGEST_EXAMPLE else ""
    return [
        f"--- {name}, {problem.uid}: {len(ids)} tokens, as the model sees it ---",
        _visible(prompt[:LONGEST_EXAMPLE]) + cut,
        f"--- gold answer: {_visible(problem.answer[:LONGEST_EXAMPLE]) or 'none'} ---",
    ]


def _visible(text: str) -> str:
    """The text with control and format characters escaped, which could change what a terminal shows."""
    return "".join(
        character
        if character == "\n" or unicodedata.category(character)[0] != "C"
        else character.encode("unicode_escape").decode()
        for character in text
    )
