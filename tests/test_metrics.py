"""metrics.jsonl: exact text, resumable; and the lines of a step."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from rosd_jax.distill.notes import NOTES
from rosd_jax.errors import UserError
from rosd_jax.train.metrics import MetricsLog, format_step, step_lines
from rosd_jax.train.numbers import of_rollouts
from rosd_jax.types import Graded, Prompts, Rollout

NUMBERS = {
    "reward": 0.4531,
    "reflected": 0.62,
    "quote_found": 0.914,
    "active_tokens_share": 0.0321,
    "loss": 0.012345,
    "seconds": 12.34,
}
NOTED = [f"out_{note}" for note in NOTES]  # every reason for leaving the loss


def filled(path):
    """Evaluation before training, then three steps with an evaluation at the second."""
    log = MetricsLog(path)
    log.write(0, "eval/a", {"avg": 0.1})
    for step in (1, 2, 3):
        log.write(step, "train", {"loss": 1.0 / step})
        if step == 2:
            log.write(step, "eval/a", {"avg": 0.2})
            log.write(step, "eval/b", {"avg": 0.3})
    return path.read_text()


def test_a_line_is_step_split_and_the_numbers_in_their_order(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(3, "train", {"z": 1, "a": 0.1, "flag": True})
    log.write(np.int64(3), "eval/x", {"avg": jnp.float32(0.5)})
    assert log.path.read_text() == (
        '{"step": 3, "split": "train", "z": 1, "a": 0.1, "flag": 1}\n'
        '{"step": 3, "split": "eval/x", "avg": 0.5}\n'
    )


def test_equal_numbers_are_equal_text_whatever_carried_them(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    third = np.float32(1) / np.float32(3)
    for value in (third, jnp.asarray(third), float(third), np.float64(third), np.array(third)):
        log.write(1, "train", {"loss": value})
    (line,) = set(log.path.read_text().splitlines())
    assert json.loads(line)["loss"] == float(third)


def test_replacing_a_line_leaves_all_others_as_they_are(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = filled(path).splitlines()
    MetricsLog(path).replace(2, "eval/a", {"avg": 0.5})
    (old,) = [line for line in lines if line.startswith('{"step": 2, "split": "eval/a"')]
    lines.remove(old)
    assert path.read_text().splitlines() == [*lines, '{"step": 2, "split": "eval/a", "avg": 0.5}']
    with pytest.raises(TypeError):
        MetricsLog(path).replace(3, "train", {"loss": "x"})
    assert path.read_text().splitlines()[:-1] == lines
    MetricsLog(tmp_path / "new.jsonl").replace(0, "eval/a", {"avg": 1})
    assert (tmp_path / "new.jsonl").read_text() == '{"step": 0, "split": "eval/a", "avg": 1}\n'


def test_nan_and_infinity_become_null(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write(1, "train", {"a": float("nan"), "b": np.float32("inf"), "c": -jnp.inf, "d": 1e308})
    row = json.loads(log.path.read_text())
    assert row == {"step": 1, "split": "train", "a": None, "b": None, "c": None, "d": 1e308}


@pytest.mark.parametrize(
    "numbers, error",
    [
        ({"step": 1}, ValueError),
        ({"a": "x"}, TypeError),
        ({"a": None}, TypeError),
        ({"a": np.ones(2)}, ValueError),
    ],
)
def test_what_is_no_number_writes_nothing(tmp_path, numbers, error):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    with pytest.raises(error):
        log.write(1, "train", numbers)
    assert not log.path.exists()


@pytest.mark.parametrize("torn", ["", '{"step": 4, "spl', "{", "\0\0\0"])
def test_resuming_keeps_all_up_to_the_checkpoint_and_writing_on_restores_the_rest(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    whole = filled(path)
    with open(path, "a") as file:
        file.write(torn)
    log = MetricsLog.resume(path, keep=lambda step, split: step <= 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1, 2, 2, 2]
    log.write(3, "train", {"loss": 1.0 / 3})
    assert path.read_text() == whole
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resuming_without_a_checkpoint_starts_over(tmp_path):
    path = tmp_path / "metrics.jsonl"
    MetricsLog.resume(path, keep=lambda step, split: False)
    assert not path.exists()
    filled(path)
    MetricsLog.resume(path, keep=lambda step, split: False)
    assert path.read_text() == ""


def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = filled(path)
    broken = whole.replace('{"step": 1,', "step 1,")
    path.write_text(broken)
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a line of metrics"):
        MetricsLog.resume(path, keep=lambda step, split: step <= 2)
    assert path.read_text() == broken


def test_step_line_reads_well_and_shows_what_is_missing():
    counts = {"taught": 46, "out_all_right": 40, "out_quote_missing": 2, "out_no_idea": 0}
    assert format_step(7, 100, NUMBERS | counts) == (
        "step   7/100  reward 0.453  taught 46/88  quotes  91%  loss 0.01235  12.3 s"
    )
    empty = format_step(7, 100, {"loss": float("nan"), "reward": None})
    assert empty.split() == "step 7/100 reward - taught - quotes - loss - - s".split()


def test_the_lines_of_a_step_fit_a_terminal():
    many = {"reward": 1.0, "taught": 1000, "quote_found": 1.0, "seconds": 9999.9} | dict.fromkeys(NOTED, 900)
    lines = step_lines(999, 999, NUMBERS | many | {"programs_compiled": 300, "seconds_compiling": 5000.0})
    assert len(lines) > 3 and max(map(len, lines)) <= 80


def test_what_was_not_taught_is_said_with_the_reason():
    numbers = NUMBERS | {"taught": 46, "out_all_right": 40, "out_quote_missing": 2, "out_no_idea": 0}
    said = step_lines(7, 100, numbers)
    assert said == [format_step(7, 100, numbers), "  not taught: 40 group all right, 2 quote not found"]
    assert len(step_lines(8, 100, NUMBERS | {"taught": 88})) == 1, "nothing is said where all were taught"


def test_the_entropy_is_the_mean_surprise_over_all_tokens():
    logp_BR = np.log(np.array([[0.5, 0.25, 1.0], [0.125, 1.0, 1.0]], np.float32))  # 1: after the end
    rollout = Rollout(np.zeros((2, 3), np.int32), np.array([2, 1]), logp_BR, np.array([True, False]))
    graded = Graded(Prompts((), ()), rollout, ("", ""), np.array([0.0, 1.0], np.float32), thinking_open=False)
    found = of_rollouts(graded)
    assert found["entropy"] == pytest.approx((1 + 2 + 3) * np.log(2) / 3)
    assert (found["reward"], found["response_length"], found["truncated"]) == (0.5, 1.5, 0.5)
