"""From problems to fixed-shape batches: prompt lengths checked, order fixed by (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import grain
import numpy as np

from rosd_jax.config import UserError
from rosd_jax.types import Message, Problem, Prompts

Encoded = Sequence[tuple[Problem, list[int]]]  # each problem with its chat-templated prompt ids


def bucket_length(n: int, maximum: int) -> int:
    """The padded length for n tokens: a power of two from 16 to 1024, then a multiple of 256.

    Few lengths mean few compilations. Never above `maximum`; raises ValueError if n is.
    """
    if n > maximum:
        raise ValueError(f"{n} tokens do not fit the maximum of {maximum}")
    bucket = max(16, 1 << (n - 1).bit_length()) if n <= 1024 else -(-n // 256) * 256
    return min(bucket, maximum)


def encode_problems(
    problems: Sequence[Problem],
    chat_ids: Callable[[tuple[Message, ...]], list[int]],
    max_prompt_tokens: int,
) -> tuple[list[tuple[Problem, list[int]]], list[str]]:
    """The problems that fit, each with its prompt ids, and the uids of those that do not.

    Raises UserError if none fits.
    """
    encoded = [(problem, chat_ids(problem.messages)) for problem in problems]
    kept = [(problem, ids) for problem, ids in encoded if len(ids) <= max_prompt_tokens]
    overlong = [problem.uid for problem, ids in encoded if len(ids) > max_prompt_tokens]
    if not kept:
        shortest = min((len(ids) for _, ids in encoded), default=0)
        raise UserError(
            f"data.max_prompt_tokens is {max_prompt_tokens}, which none of {len(encoded)} prompts "
            f"fits; give at least {shortest}, the length of the shortest"
        )
    return kept, overlong


def batch_at(encoded: Encoded, step: int, seed: int, batch_prompts: int) -> Prompts:
    """The N = `batch_prompts` problems of one step: a pure function of (seed, step).

    Each epoch has its own order and drops its incomplete last batch, as the release's loader does,
    so no batch holds a problem twice. Prompts are padded to a bucketed length, at most that of the
    longest prompt.
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
    tokens_NP, length_N = _pad([ids for _, ids in chosen], max(len(ids) for _, ids in encoded))
    return Prompts(tuple(problem for problem, _ in chosen), tokens_NP, length_N)


def _pad(rows: Sequence[list[int]], maximum: int) -> tuple[np.ndarray, np.ndarray]:
    length_N = np.array([len(ids) for ids in rows], np.int32)
    tokens_NP = np.zeros((len(rows), bucket_length(int(length_N.max()), maximum)), np.int32)
    for row_P, ids in zip(tokens_NP, rows, strict=True):
        row_P[: len(ids)] = ids
    return tokens_NP, length_N


def eval_batches(
    encoded: Encoded, samples: int, rows: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Every item `samples` times, item by item, in batches of B = `rows` rows of one shape.

    Yields item_B (int32, an index into `encoded`), sample_B (int32) and active_B (bool). The rows
    that fill up the last batch are inactive and name item 0, sample 0.
    """
    total = len(encoded) * samples
    for start in range(0, total, rows):
        row_B = np.arange(start, start + rows)
        active_B = row_B < total
        item_B, sample_B = np.divmod(np.where(active_B, row_B, 0), samples)
        yield item_B.astype(np.int32), sample_B.astype(np.int32), active_B
