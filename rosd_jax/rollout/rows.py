"""Prompts and rows on the host as calls of one shape, which compiles once.

decode_rows(generate, params, prompt_ids, uid_M, limit_M, key, rows=, longest=, ...)   -> Rollout
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rosd_jax.data.pipeline import pad_rows
from rosd_jax.rollout.pages import LONGEST_PAGE
from rosd_jax.types import Params, Rollout


def decode_rows(
    generate: Callable[..., Rollout],
    params: Params,
    prompt_ids: Sequence[Sequence[int]],
    uid_M: np.ndarray,
    limit_M: np.ndarray,
    key: jax.Array,
    *,
    rows: int,
    shards: int = 1,
    longest: int,
    prompts: int | None = None,
    room: int | None = None,
) -> Rollout:
    """Decodes M prompts as `rows` >= M rows of one shape; returns M rows, on the host.

    generate: of `make_generate`. Equal prompts are prefilled once on each shard of the rows, and every
    shard gets an equal share of the M, neighbours together. longest: the most tokens of a prompt.
    prompts: the shape's number of different ones; None: rows. room: tokens of prompts that a shard may
    hold at a time; where they are more, there are several calls, one after the other.
    """
    number: dict[tuple[int, ...], int] = {}
    prompt_of_M = np.array([number.setdefault(tuple(ids), len(number)) for ids in prompt_ids])
    tokens_NP, length_N = pad_rows([*number, *[[0]] * ((prompts or rows) - len(number))], longest)

    def decode(part: np.ndarray) -> Rollout:
        shares = np.array_split(part, shards)
        starts = range(0, rows, rows // shards)
        at = np.concatenate([s + np.arange(len(x)) for s, x in zip(starts, shares, strict=True)])

        def deal(values_M: np.ndarray) -> np.ndarray:
            row_B = np.zeros(rows, np.int32)
            row_B[at] = values_M[part]
            return row_B

        given = deal(prompt_of_M), deal(uid_M), deal(limit_M)  # the limit of spare rows is 0
        return pick(jax.device_get(generate(params, tokens_NP, length_N, *given, key)), at)

    return join([decode(part) for part in split(length_N, prompt_of_M, shards, room)])


def split(length_N: np.ndarray, prompt_of_M: np.ndarray, shards: int, room: int | None) -> list[np.ndarray]:
    """The rows in as few equal parts as it takes for each shard's share of a part to fit `room`."""
    padded_N = -(-length_N // LONGEST_PAGE) * LONGEST_PAGE  # prompts take whole pages
    held = lambda share: padded_N[np.unique(prompt_of_M[share])].sum()
    fits = lambda part: all(held(share) <= (room or np.inf) for share in np.array_split(part, shards))
    M = len(prompt_of_M)
    parts = (np.array_split(np.arange(M), count) for count in range(1, M + 1))
    return next(some for some in parts if len(some) == M or all(map(fits, some)))


def pick(rollout: Rollout, rows_M: np.ndarray) -> Rollout:
    """Some rows of a rollout on the host."""
    return Rollout(*(x[rows_M] for x in _columns(rollout)), stats=rollout.stats)


def join(rollouts: list[Rollout]) -> Rollout:
    """Their rows behind each other, their statistics added up."""
    columns: Any = (np.concatenate(some) for some in zip(*map(_columns, rollouts), strict=True))
    return Rollout(*columns, stats=jax.tree.map(lambda *some: sum(some), *(r.stats for r in rollouts)))


def _columns(rollout: Rollout) -> tuple[Any, ...]:
    return rollout.tokens_BR, rollout.length_B, rollout.logp_BR, rollout.finished_B
