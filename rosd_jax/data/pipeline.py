"""From problems to batches of prompts, in an order that (seed, step) determines."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence

import grain
import numpy as np

from rosd_jax.errors import UserError
from rosd_jax.types import Message, Problem, Prompts

Encoded = Sequence[tuple[Problem, list[int]]]  # each problem with its chat-templated prompt ids


def problems_crc32(problems: Sequence[Problem]) -> int:
    """A checksum of the problems: their messages, gold answers, checkers and order."""
    check = 0
    for problem in problems:
        line = json.dumps([problem.kind, problem.messages, problem.answer, problem.extra], sort_keys=True)
        check = zlib.crc32(line.encode(), check)
    return check


def encode_problems(
    problems: Sequence[Problem],
    encode_chats: Callable[[list[tuple[Message, ...]]], list[list[int]]],
    max_prompt_tokens: int,
) -> tuple[list[tuple[Problem, list[int]]], list[str]]:
    """The problems that fit, each with its prompt ids, and the uids of those that do not.

    Raises UserError if none fits.
    """
    ids = encode_chats([problem.messages for problem in problems])
    encoded = list(zip(problems, ids, strict=True))
    kept = [(problem, ids) for problem, ids in encoded if len(ids) <= max_prompt_tokens]
    overlong = [problem.uid for problem, ids in encoded if len(ids) > max_prompt_tokens]
    if not kept:
        shortest = min((len(ids) for _, ids in encoded), default=0)
        raise UserError(
            f"data.max_prompt_tokens is {max_prompt_tokens}, and all of the {len(encoded)} prompts are "
            f"longer; give at least {shortest}, the length of the shortest"
        )
    return kept, overlong


def batch_at(encoded: Encoded, step: int, seed: int, batch_prompts: int) -> Prompts:
    """The N = `batch_prompts` problems of one step: a pure function of (seed, step).

    Each epoch has its own order and drops its incomplete last batch, as the released loader does, so no
    problem is in a batch twice.
    Raises UserError if there are fewer problems than N.
    """
    if batch_prompts > len(encoded):
        raise UserError(
            f"batch.prompts is {batch_prompts}; it must be at most {len(encoded)}, the number of "
            "training problems that fit data.max_prompt_tokens"
        )
    order = grain.MapDataset.source(range(len(encoded))).seed(seed).shuffle()
    batches = order.batch(batch_prompts, drop_remainder=True).repeat(None)
    chosen = [encoded[int(i)] for i in np.asarray(batches[step])]
    return Prompts(tuple(problem for problem, _ in chosen), tuple(ids for _, ids in chosen))
