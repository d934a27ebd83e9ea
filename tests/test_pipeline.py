"""The order of training and evaluation: seeded, of few shapes, with nothing lost in silence."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_jax.data.pipeline import batch_at, encode_problems, problems_crc32
from rosd_jax.errors import UserError
from rosd_jax.types import Problem


def problems_of(*lengths: int) -> list[Problem]:
    return [
        Problem(f"s/train/{i}", "s", "math", ({"role": "user", "content": "x" * n},), "1")
        for i, n in enumerate(lengths)
    ]


def encode_chats(chats) -> list[list[int]]:
    return [[7] * len(messages[-1]["content"]) for messages in chats]


def encoded_of(*lengths: int):
    return encode_problems(problems_of(*lengths), encode_chats, 10_000)[0]


def uids(prompts) -> list[str]:
    return [problem.uid for problem in prompts.problems]


def test_the_checksum_of_problems_sees_text_gold_checker_order_and_number():
    problems = problems_of(5, 6, 7)

    def change(**fields):
        return [dataclasses.replace(problems[0], **fields), *problems[1:]]

    others = [
        change(answer="2"),
        change(kind="mcq"),
        change(messages=({"role": "user", "content": "xxxx "},)),
        change(messages=({"role": "system", "content": "x"}, *problems[0].messages)),
        change(messages=({"role": "user", "content": "\ud800"},)),  # a lone surrogate
        problems[::-1],
        problems[:2],
        [*problems, problems[0]],
        [],
    ]
    sums = [problems_crc32(found) for found in [problems, *others]]
    assert len(set(sums)) == len(sums)
    assert problems_crc32(change(uid="t/train/0", dataset="t")) == sums[0]  # the same file elsewhere


def test_overlong_prompts_are_named():
    problems = problems_of(5, 11, 10, 12)
    kept, overlong = encode_problems(problems, encode_chats, 10)
    assert [(p.uid, len(ids)) for p, ids in kept] == [("s/train/0", 5), ("s/train/2", 10)]
    assert overlong == ["s/train/1", "s/train/3"]


def test_no_prompt_that_fits_is_a_user_error():
    with pytest.raises(UserError, match="max_prompt_tokens is 4, and all of the 2 .* at least 5"):
        encode_problems(problems_of(5, 6), encode_chats, 4)


def test_a_batch_has_the_ids_of_its_problems():
    encoded = encoded_of(3, 20, 9, 40)
    batch = batch_at(encoded, 0, 0, 4)
    assert [list(ids) for ids in batch.ids] == [[7] * len(p.question) for p in batch.problems]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 2**40))
def test_a_step_of_a_seed_is_always_the_same_batch(step, seed):
    encoded = encoded_of(*range(1, 24))
    batch = batch_at(encoded, step, seed, 5)
    again = batch_at(list(encoded), step, seed, 5)
    assert uids(batch) == uids(again)
    assert batch.ids == again.ids
    assert len(set(uids(batch))) == 5


def test_an_epoch_visits_each_problem_once_and_the_next_reshuffles():
    encoded = encoded_of(*[4] * 24)
    epochs = [[u for s in range(6) for u in uids(batch_at(encoded, 6 * e + s, 3, 4))] for e in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch) == sorted(p.uid for p, _ in encoded)
    assert epochs[0] != epochs[1]
    assert uids(batch_at(encoded, 0, 3, 4)) != uids(batch_at(encoded, 0, 4, 4))


def test_the_order_is_pinned():
    """A resumed run relies on it: should grain's shuffle change, this says so."""
    encoded = encoded_of(*[4] * 10)
    order = [[int(u.rsplit("/")[-1]) for u in uids(batch_at(encoded, s, 0, 3))] for s in range(4)]
    assert order == [[1, 2, 4], [5, 9, 7], [8, 6, 0], [9, 6, 1]]


def test_one_problem_is_enough_for_a_batch_of_one():
    assert uids(batch_at(encoded_of(4), 9, 0, 1)) == ["s/train/0"]


def test_a_batch_larger_than_the_set_is_a_user_error():
    with pytest.raises(UserError, match="batch.prompts is 4; it must be at most 3"):
        batch_at(encoded_of(1, 2, 3), 0, 0, 4)
