"""Packs requests into calls of one fixed shape each, which compiles once.

Equal prompts are prefilled once on each shard of the rows. Every shard gets an equal share of the requests,
neighbours together. Where a shard's distinct prompts do not fit, the requests take several turns.

    check(requests, vocab)             raises ValueError for one that cannot be answered
    pack(requests, limits, shards)     -> a Turn each
    prompt_pages(batch, page, shards)  -> pages that a call's prompts take on a shard

Dimensions: M requests, N distinct prompts, T tokens of a prompt (padded), B rows of a call.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple

import numpy as np

from rosd_jax.rollout.limits import LONGEST_PAGE, Limits
from rosd_jax.types import A

LEAST_TOKENS = 8192  # the smallest cache for prompts, so that fewer shapes are compiled
SHORT = 1024  # prompts up to this length are padded to a power of two, longer ones to a multiple of 256


@dataclass(frozen=True)
class Request:
    """One response to be sampled."""

    prompt: Sequence[int]  # its ids, at least one
    uid: int  # names its stream of random numbers
    max_new: int | None = None  # tokens of the response, 0 for none; None: the engine's limit


class Batch(NamedTuple, Generic[A]):
    """The arrays of one call (all int32). Spare rows have a limit of 0, spare prompts no row."""

    prompt_NT: A  # right-padded
    prompt_len_N: A  # at least 1
    prompt_of_B: A
    uid_B: A
    limit_B: A  # tokens of a row's response, at most


class Turn(NamedTuple):
    """One call."""

    batch: Batch[np.ndarray]
    row_M: np.ndarray  # the row of each of its requests


def pack(requests: Sequence[Request], limits: Limits, shards: int) -> list[Turn]:
    """The calls that answer the requests, in their order, all of one shape.

    Raises ValueError for a prompt longer than limits.max_prompt. `check` finds every other mistake.
    """
    number: dict[tuple[int, ...], int] = {}
    prompt_of_M = np.array([number.setdefault(tuple(r.prompt), len(number)) for r in requests])
    uid_M = np.array([r.uid for r in requests])
    limit_M = np.array([limits.max_new if r.max_new is None else r.max_new for r in requests])
    spare = -len(number) % limits.prompts
    prompt_NT, prompt_len_N = pad_rows([*number, *[[0]] * spare], limits.max_prompt)
    rows = call_rows(len(requests), limits, shards)

    def turn(part_M: np.ndarray) -> Turn:
        row_M = deal(len(part_M), rows, shards)

        def by_row(values_M: np.ndarray) -> np.ndarray:
            values_B = np.zeros(rows, np.int32)
            values_B[row_M] = values_M[part_M]
            return values_B

        columns = by_row(prompt_of_M), by_row(uid_M), by_row(limit_M)
        return Turn(Batch(prompt_NT, prompt_len_N, *columns), row_M)

    parts = split(prompt_len_N, prompt_of_M, shards, limits.prompt_tokens)
    return [turn(part_M) for part_M in parts]


def pad_rows(rows: Sequence[Sequence[int]], maximum: int) -> tuple[np.ndarray, np.ndarray]:
    """tokens [N, T] int32, right-padded with 0 to a bucketed length, and lengths [N].

    Raises ValueError for a row longer than `maximum`.
    """
    length_N = np.array([len(ids) for ids in rows], np.int32)
    tokens_NT = np.zeros((len(rows), bucket_length(int(length_N.max()), maximum)), np.int32)
    for row_T, ids in zip(tokens_NT, rows, strict=True):
        row_T[: len(ids)] = ids
    return tokens_NT, length_N


def bucket_length(n: int, maximum: int) -> int:
    """The padded length for n tokens: a power of two from 16 to SHORT, then a multiple of 256.

    Few different lengths mean few compilations. At most `maximum`; raises ValueError if n is more.
    """
    if n > maximum:
        raise ValueError(f"{n} tokens do not fit the maximum of {maximum}")
    bucket = max(16, 1 << (n - 1).bit_length()) if n <= SHORT else -(-n // 256) * 256
    return min(bucket, maximum)


def check(requests: Sequence[Request], vocab: int) -> None:
    """Raises ValueError if there is no request, or for the first that cannot be answered.

    The prompt must not be empty, its ids must be in [0, vocab), and uid and token limit must fit int32.
    """
    if not requests:
        raise ValueError("there is no request")
    for request in requests:
        _check_one(request, vocab)


def _check_one(request: Request, vocab: int) -> None:
    if len(request.prompt) == 0:
        raise ValueError(f"the prompt of request {request.uid} is empty; it must have at least one token")
    if not 0 <= min(request.prompt) <= max(request.prompt) < vocab:
        raise ValueError(f"the prompt of request {request.uid} has ids outside [0, {vocab})")
    if not 0 <= request.uid < 2**31:
        raise ValueError(f"uid is {request.uid}; it must be at least 0 and below 2**31")
    if request.max_new is not None and not 0 <= request.max_new < 2**31:
        raise ValueError(f"max_new of request {request.uid} is {request.max_new}; it must be 0 or more")


def call_rows(requests: int, limits: Limits, shards: int) -> int:
    """B: rows of a call, a multiple of limits.rows and of the shards."""
    multiple = math.lcm(limits.rows, shards)
    return -(-requests // multiple) * multiple


def deal(requests: int, rows: int, shards: int) -> np.ndarray:
    """The row of each request: an equal share at the start of every shard's rows."""
    shares = np.array_split(np.arange(requests), shards)
    starts = range(0, rows, rows // shards)
    return np.concatenate([s + np.arange(len(x)) for s, x in zip(starts, shares, strict=True)])


def split(
    prompt_len_N: np.ndarray, prompt_of_M: np.ndarray, shards: int, prompt_tokens: int | None
) -> list[np.ndarray]:
    """The requests in as few equal parts as it takes for each shard's prompts of a part to fit.

    A single prompt fits: `Limits` refuses a smaller prompt_tokens.
    """
    padded_N = -(-prompt_len_N // LONGEST_PAGE) * LONGEST_PAGE  # prompts take whole pages
    M = len(prompt_of_M)

    def fits(part_M: np.ndarray) -> bool:
        shares = np.array_split(part_M, shards)
        tokens = [padded_N[np.unique(prompt_of_M[share])].sum() for share in shares]
        return prompt_tokens is None or max(tokens) <= prompt_tokens

    for count in range(1, M):
        parts = np.array_split(np.arange(M), count)
        if all(fits(part_M) for part_M in parts):
            return parts
    return np.array_split(np.arange(M), M)


def prompt_pages(batch: Batch[np.ndarray], page: int, shards: int) -> int:
    """Pages for the prompts of any one shard, rounded."""
    pages_N = -(-batch.prompt_len_N // page)
    by_shard = (np.reshape(x, (shards, -1)) for x in (batch.prompt_of_B, batch.limit_B))
    wanted = (np.unique(of_B[limit_B > 0]) for of_B, limit_B in zip(*by_shard, strict=True))
    return rounded_pages(max(int(pages_N[some].sum()) for some in wanted), page)


def rounded_pages(pages: int, page: int) -> int:
    """A power of two, of LEAST_TOKENS tokens or more, so that fewer numbers of pages are compiled."""
    return 1 << (max(1, pages, LEAST_TOKENS // page) - 1).bit_length()
