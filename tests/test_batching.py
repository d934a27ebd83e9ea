"""Requests as calls: dealt over the shards, in turns where prompts are too many, and in order again."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import make_mesh
from rosd_jax.rollout.batching import Request, bucket_length, check, pack, pad_rows, split
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import LONGEST_PAGE as PAGE
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.types import DecodeStats, Rollout

PROMPTS = [[7, 7], [1, 2, 3], [7, 7], [4] * 70, [5], [1, 2, 3], [6] * 3]
UID = np.array([11, 12, 13, 14, 15, 16, 17])
LIMIT = np.array([3, 1, 2, 3, 3, 2, 1])
REQUESTS = [Request(*given) for given in zip(PROMPTS, UID.tolist(), LIMIT.tolist(), strict=True)]
MODEL = Qwen3Config(16, 16, 16, 1, 2, 2, 8)


class Told(Engine):
    """An engine whose devices say of a row its uid and the first and last token of its prompt."""

    def call(self, params, batch, key, ended):
        params.append(batch)
        first_B = batch.prompt_NT[batch.prompt_of_B, 0]
        last_B = batch.prompt_NT[batch.prompt_of_B, batch.prompt_len_N[batch.prompt_of_B] - 1]
        tokens_BR = np.stack([batch.uid_B, first_B, last_B], axis=1)
        stats = DecodeStats(*[np.ones(self.shards)] * 5)
        return Rollout(tokens_BR, batch.limit_B, tokens_BR * 0.0, batch.limit_B > 1, stats)


def decode(shards=1, rows=8, prompt_tokens=None, check=lambda what: None):
    limits = Limits(max_new=3, max_prompt=128, prompt_tokens=prompt_tokens, rows=rows, prompts=6)
    mesh = make_mesh(shards, 1, 1, jax.devices()[:shards])
    engine, batches = Told(MODEL, mesh, limits, Sampling(1.0), before_call=check), []
    return batches, engine.generate(batches, REQUESTS, jax.random.key(0))


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("prompt_tokens", [None, 2 * PAGE])
def test_every_response_comes_back_in_its_place(shards, prompt_tokens):
    batches, rollout = decode(shards, prompt_tokens=prompt_tokens)
    want = [[uid, ids[0], ids[-1]] for uid, ids in zip(UID, PROMPTS, strict=True)]
    np.testing.assert_array_equal(rollout.tokens_BR, want)
    np.testing.assert_array_equal(rollout.length_B, LIMIT)
    np.testing.assert_array_equal(rollout.finished_B, LIMIT > 1)
    assert {batch.prompt_NT.shape for batch in batches} == {(6, 128)}
    assert {batch.limit_B.shape for batch in batches} == {(8,)}
    assert {x.dtype for batch in batches for x in batch} == {np.dtype(np.int32)}
    assert sum((batch.limit_B > 0).sum() for batch in batches) == len(PROMPTS)
    assert rollout.stats.steps.tolist() == [len(batches)] * shards


def test_shards_get_equal_shares_of_neighbours():
    batches, _ = decode(4, rows=12)
    by_shard = batches[0].limit_B.reshape(4, 3)
    assert [(shard > 0).sum() for shard in by_shard] == [2, 2, 2, 1]
    np.testing.assert_array_equal(by_shard[by_shard > 0], LIMIT)


@pytest.mark.parametrize("rows, shards, want", [(1, 1, 7), (1, 4, 8), (3, 2, 12), (16, 4, 16), (5, 1, 10)])
def test_rows_are_a_multiple_of_what_is_asked_and_of_the_shards(rows, shards, want):
    (turn,) = pack(REQUESTS, Limits(max_new=3, max_prompt=128, rows=rows), shards)
    assert turn.batch.limit_B.shape == (want,) and turn.batch.prompt_NT.shape == (5, 128)
    assert not np.delete(turn.batch.limit_B, turn.row_M).any()  # spare rows have no token


def test_a_request_without_a_limit_has_the_engine_s():
    requests = [Request([5], 0), Request([5], 1, 0), Request([5], 2, 2)]
    ((batch, row_M),) = pack(requests, Limits(max_new=9, max_prompt=4), 1)
    assert batch.limit_B[row_M].tolist() == [9, 0, 2]


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(max_new=0), "max_new is 0; it must be an int of at least 1 and below 2"),
        (dict(max_prompt=-1), "max_prompt is -1"),
        (dict(max_new=2**31), "max_new is 2147483648"),
        (dict(max_prompt=1.5), "max_prompt is 1.5"),
        (dict(slots=0), "slots is 0"),
        (dict(page_length=0), "page_length is 0"),
        (dict(rows=True), "rows is True"),
        (dict(prompts="8"), "prompts is '8'"),
        (dict(response_pages=1), "response_pages is 1; one sequence alone may need 2"),
        (dict(prompt_tokens=64), "prompt_tokens is 64; one prompt of max_prompt = 65 tokens may need 128"),
    ],
)
def test_limits_that_no_engine_can_have_are_refused(changes, words):
    limits = Limits(max_new=3, max_prompt=65, prompt_tokens=128)
    with pytest.raises(ValueError, match=words):
        replace(limits, **changes)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="70 tokens do not fit the maximum of 64"):
        pack(REQUESTS, Limits(max_new=3, max_prompt=64), 1)
    with pytest.raises(ValueError, match="no request"):
        check([], 16)


def test_every_call_of_the_devices_is_preceded_by_the_check():
    checks = []
    batches, _ = decode(prompt_tokens=2 * PAGE, check=checks.append)
    assert len(checks) == len(batches) > 1 and all(what.startswith("decode ") for what in checks)


def test_prompts_that_do_not_fit_take_turns_and_shared_ones_count_once():
    length_N, of_M = np.array([1, 64, 65, 10]), np.array([0, 0, 1, 1, 2, 2, 3, 3])

    def sizes(shards, pages):
        return [len(part) for part in split(length_N, of_M, shards, pages * PAGE)]

    assert sizes(1, 5) == [8] and sizes(1, 4) == [4, 4] and sizes(1, 3) == [4, 4]
    assert sizes(1, 2) == [2] * 4  # the longest takes two pages
    assert sizes(2, 3) == [8] and sizes(8, 2) == [8]
    assert [len(part) for part in split(length_N, of_M, 1, None)] == [8]
    np.testing.assert_array_equal(np.concatenate(split(length_N, of_M, 1, 2 * PAGE)), np.arange(8))


@pytest.mark.parametrize(
    ("n", "bucket"),
    [
        (1, 16),
        (16, 16),
        (17, 32),
        (512, 512),
        (513, 1024),
        (1024, 1024),
        (1025, 1280),
        (1281, 1536),
    ],
)
def test_bucket_lengths(n, bucket):
    assert bucket_length(n, 1 << 20) == bucket


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_a_bucket_holds_its_tokens_and_keeps_the_maximum(n, maximum):
    if n > maximum:
        with pytest.raises(ValueError, match="do not fit"):
            bucket_length(n, maximum)
    else:
        assert n <= bucket_length(n, maximum) <= maximum


def test_rows_are_padded_on_the_right_to_a_bucket():
    ids = [[7] * n for n in (3, 20, 9, 40)]
    tokens_NT, length_N = pad_rows(ids, 40)
    assert tokens_NT.shape == (4, 40)  # not 64: no row may be longer
    assert tokens_NT.dtype == length_N.dtype == np.int32
    for row_T, length, row in zip(tokens_NT, length_N, ids, strict=True):
        assert length == len(row)
        assert (row_T[:length] == 7).all() and not row_T[length:].any()


@pytest.mark.parametrize(
    "request_, words",
    [
        (Request([], 3), "the prompt of request 3 is empty"),
        (Request([1, 16], 3), "request 3 has ids outside"),
        (Request([-1], 3), "request 3 has ids outside"),
        (Request([1], 2**31), "uid is 2147483648"),
        (Request([1], 3, max_new=-1), "max_new of request 3 is -1"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused(request_, words):
    engine = Engine(MODEL, None, Limits(3, 80), Sampling(0.0))
    with pytest.raises(ValueError, match=words):
        engine.generate({}, [Request([1], 0), request_], jax.random.key(0))
