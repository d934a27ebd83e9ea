"""Rows on the host: dealt over the shards, in turns where prompts are too many, and back in their order."""

import jax
import numpy as np
import pytest

from rosd_jax.rollout.pages import LONGEST_PAGE as PAGE
from rosd_jax.rollout.rows import decode_rows, split
from rosd_jax.types import DecodeStats, Rollout

PROMPTS = [[7, 7], [1, 2, 3], [7, 7], [4] * 70, [5], [1, 2, 3], [6] * 3]
UID = np.array([11, 12, 13, 14, 15, 16, 17])
LIMIT = np.array([3, 1, 2, 3, 3, 2, 1])


class Engine:
    """Stands for `make_generate`: a row says its uid and the first and last token of its prompt."""

    def __init__(self, shards):
        self.shards, self.calls = shards, []

    def __call__(self, params, tokens_NP, length_N, prompt_of_B, uid_B, limit_B, key):
        self.calls.append((tokens_NP.shape, np.array(prompt_of_B), np.array(limit_B)))
        last_B = tokens_NP[prompt_of_B, length_N[prompt_of_B] - 1]
        tokens_BR = np.stack([uid_B, tokens_NP[prompt_of_B, 0], last_B], axis=1)
        ones = np.ones(self.shards)
        return Rollout(tokens_BR, limit_B, tokens_BR * 0.0, limit_B > 1, DecodeStats(*[ones] * 5))


def decode(shards=1, rows=8, **options):
    engine = Engine(shards)
    how = dict(rows=rows, shards=shards, longest=128, prompts=6) | options
    return engine, decode_rows(engine, None, PROMPTS, UID, LIMIT, jax.random.key(0), **how)


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("room", [None, 2 * PAGE])
def test_every_row_comes_back_in_its_place(shards, room):
    engine, rollout = decode(shards, room=room)
    want = [[uid, ids[0], ids[-1]] for uid, ids in zip(UID, PROMPTS, strict=True)]
    np.testing.assert_array_equal(rollout.tokens_BR, want)
    np.testing.assert_array_equal(rollout.length_B, LIMIT)
    np.testing.assert_array_equal(rollout.finished_B, LIMIT > 1)
    assert {shape for shape, *_ in engine.calls} == {(6, 128)}
    assert sum((limit_B > 0).sum() for *_, limit_B in engine.calls) == len(PROMPTS)
    assert rollout.stats.steps.tolist() == [len(engine.calls)] * shards


def test_shards_get_equal_shares_of_neighbours():
    engine, _ = decode(4, rows=12)
    by_shard = engine.calls[0][2].reshape(4, 3)
    assert [(shard > 0).sum() for shard in by_shard] == [2, 2, 2, 1]
    np.testing.assert_array_equal(by_shard[by_shard > 0], LIMIT)


def test_prompts_that_do_not_fit_take_turns_and_shared_ones_count_once():
    length_N, of_M = np.array([1, 64, 65, 10]), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    sizes = lambda shards, pages: [len(part) for part in split(length_N, of_M, shards, pages * PAGE)]
    assert sizes(1, 5) == [8] and sizes(1, 4) == [4, 4] and sizes(1, 3) == [4, 4]
    assert sizes(1, 2) == [2] * 4  # the longest takes two pages
    assert sizes(2, 3) == [8] and sizes(8, 2) == [8] and sizes(1, 1) == [1] * 8
    assert [len(part) for part in split(length_N, of_M, 1, None)] == [8]
    np.testing.assert_array_equal(np.concatenate(split(length_N, of_M, 1, 2 * PAGE)), np.arange(8))
