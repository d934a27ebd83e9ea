"""Rows cut at their last active token and grouped: nothing is lost, and few widths occur."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_jax.train.microbatches import by_response, cuts, needs, plan_microbatches, width
from rosd_jax.types import Lesson


def make_lesson(seed, rows=13, P=40, Q=90, R=300):
    rng = np.random.default_rng(seed)
    weight_BR = np.zeros((rows, R), np.float32)
    for row in range(rows):
        start, stop = np.sort(rng.integers(0, R + 1, 2))
        weight_BR[row, start:stop] = row % 4 != 3

    def texts(longest):
        return [rng.integers(1, 99, rng.integers(1, longest + 1)).tolist() for _ in range(rows)]

    return Lesson(
        prompts=texts(P),
        teacher_prompts=texts(Q),
        response_BR=rng.integers(1, 99, (rows, R)).astype(np.int32),
        weight_BR=weight_BR,
        sampler_logp_BR=rng.normal(-3, 1, (rows, R)).astype(np.float32),
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rows", [1, 4, 6])
def test_every_active_token_is_in_one_microbatch_behind_all_that_it_attends_to(seed, rows):
    lesson = make_lesson(seed)
    wanted = set()
    for row, at in np.argwhere(lesson.weight_BR):
        response = tuple(lesson.response_BR[row, :at])
        student = (*lesson.prompts[row], *response)
        teacher = (*lesson.teacher_prompts[row], *response)
        wanted.add((student, teacher, lesson.response_BR[row, at], lesson.sampler_logp_BR[row, at]))
    found = []
    for batch in plan_microbatches(lesson, rows, (340, 390)):
        assert batch.weight_BS.shape[0] == rows
        for b, s in np.argwhere(batch.weight_BS):
            student = tuple(batch.student_BS[b, : s + 1])
            teacher = tuple(batch.teacher_BT[b, : s + batch.shift_B[b] + 1])
            found.append((student, teacher, batch.target_BS[b, s], batch.sampler_logp_BS[b, s]))
    assert len(found) == np.count_nonzero(lesson.weight_BR)
    assert set(found) == wanted


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_what_positions_give_comes_back_to_the_tokens_that_they_predict(rows):
    lesson = make_lesson(5)
    values = [batch.sampler_logp_BS for batch in plan_microbatches(lesson, rows, (340, 390))]
    found_BR = by_response(values, lesson, rows, (340, 390))
    read_BR = np.arange(lesson.weight_BR.shape[1]) < cuts(lesson.weight_BR)[:, None]
    np.testing.assert_array_equal(found_BR, np.where(read_BR, lesson.sampler_logp_BR, 0))


def test_a_row_ends_at_its_last_active_token_and_one_without_is_left_out():
    lesson = make_lesson(0, rows=4, P=10, Q=20, R=300)
    lesson.weight_BR[:] = 0
    lesson.weight_BR[1, 2:5] = 1
    student_B, teacher_B = needs(lesson, cuts(lesson.weight_BR))
    assert student_B.tolist() == [0, len(lesson.prompts[1]) + 4, 0, 0]
    assert teacher_B.tolist() == [0, len(lesson.teacher_prompts[1]) + 4, 0, 0]
    (microbatch,) = plan_microbatches(lesson, 1, (310, 320))
    assert microbatch.student_BS.shape == microbatch.teacher_BT.shape == (1, 64)
    assert np.count_nonzero(microbatch.weight_BS) == 3


def test_a_lesson_without_active_tokens_has_no_microbatches():
    lesson = make_lesson(0)
    lesson.weight_BR[:] = 0
    assert plan_microbatches(lesson, 4, (340, 390)) == []


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 30000))
def test_a_width_holds_its_row_and_wastes_at_most_half_of_it(positions):
    found = width(positions, 30000)
    assert positions <= found <= max(64, 1.5 * positions + 1)
    assert found in {64, 30000} or found & (found - 1) == 0 or (found // 3) & (found // 3 - 1) == 0


def test_there_are_few_widths_and_the_longest_row_is_one():
    widths = {width(n, 18432) for n in range(1, 18433)}
    assert len(widths) == 18 and max(widths) == 18432


def test_long_rows_run_first_and_each_model_has_its_own_width():
    lesson = make_lesson(1, Q=900)
    microbatches = plan_microbatches(lesson, 2, (340, 1200))
    widths = [batch.student_BS.shape[1] for batch in microbatches]
    assert widths[0] == max(widths) and len(set(widths)) > 1
    assert any(batch.teacher_BT.shape[1] > batch.student_BS.shape[1] for batch in microbatches)
