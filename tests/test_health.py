"""A run that learns nothing says so, at the time and in the report."""

import pytest

from rosd_jax.distill.notes import NOTES
from rosd_jax.evals.health import ADVICE, findings, guard_sentence, new_findings
from rosd_jax.settings import GuardSettings


def row(step: int, **fields) -> dict:
    """A train line of a healthy step, but for the fields given."""
    healthy = {
        "reward": 0.6,
        "active_tokens": 90,
        "skipped_nonfinite": 0,
        "unknown_tokens": 0,
        "truncated": 0.1,
    }
    return {"step": step, "split": "train", **healthy, **{f"out_{note}": 0 for note in NOTES}, **fields}


def healthy(steps: int) -> list[dict]:
    return [row(step) for step in range(1, steps + 1)]


def test_a_healthy_run_and_an_empty_one_have_no_findings():
    assert findings(healthy(30)) == findings([]) == {}


@pytest.mark.parametrize("note", NOTES)
def test_steps_that_change_nothing_are_reported_with_the_commonest_reason(note):
    train = [row(step, active_tokens=0, **{f"out_{note}": 8}) for step in range(1, 4)]
    sentence = findings(train)["no_update"]
    assert sentence.startswith("3 of 3 steps (the last: step 3) did not change the weights")
    assert ADVICE[note] in sentence


def test_gradients_that_are_not_finite_are_named():
    train = [row(step, skipped_nonfinite=1) for step in range(1, 4)]
    assert "not finite; lower optimizer.lr" in findings(train)["no_update"]


def test_dead_steps_among_live_ones_are_reported_once_they_are_a_fifth():
    dead = [row(step, active_tokens=0) for step in range(21, 26)]
    assert "5 of 25 steps" in findings(healthy(20) + dead)["no_update"]
    alternating = [row(step, active_tokens=step % 5) for step in range(1, 26)]
    assert "5 of 25 steps (the last: step 25)" in findings(alternating)["no_update"]
    assert "no_update" not in findings([row(step, active_tokens=step % 7) for step in range(1, 36)])


def test_a_collapse_is_told_from_noise():
    rewards = [0.7, 0.8, 0.82, 0.84, 0.82, 0.8, 0.5, 0.2, 0.1, 0.1, 0.05, 0.0]
    train = [row(step, reward=reward) for step, reward in enumerate(rewards, 1)]
    assert "fell from 0.82 (steps 2 to 6) to 0.09" in findings(train)["collapse"]
    noisy = [row(step, reward=0.1 if step % 3 else 0.9) for step in range(1, 30)]
    assert "collapse" not in findings(noisy)
    low = [row(step, reward=0.04 if step < 10 else 0.01) for step in range(1, 20)]
    assert "collapse" not in findings(low)


def test_unknown_tokens_and_cut_responses_are_reported():
    assert (
        "80% of the prompts' tokens are unknown" in findings([row(1, unknown_tokens=0.8)])["unknown_tokens"]
    )
    train = [row(step, truncated=0.9) for step in range(1, 6)]
    assert "raise rollout.max_new_tokens" in findings(train)["truncated"]


def test_a_finding_is_said_when_it_appears_and_not_again():
    train = [row(step, active_tokens=0) for step in range(1, 9)]
    said = [len(new_findings(train[:count])) for count in range(1, 9)]
    assert said == [0, 0, 0, 0, 1, 0, 0, 0]
    late = healthy(20) + [row(step, truncated=0.9) for step in range(21, 30)]
    assert sum(len(new_findings(late[:count])) for count in range(1, 30)) == 1


def test_lines_of_an_older_run_without_the_counts_are_read():
    old = [{"step": step, "split": "train", "reward": 0.5, "active_tokens": 0} for step in range(1, 8)]
    assert "did not change the weights" in findings(old)["no_update"]


def test_a_guard_ends_a_run_whose_mean_of_five_steps_fell_too_far():
    high = [row(step, entropy=0.5 + step / 100) for step in range(1, 8)]  # steps 3 to 7: 0.55
    low = [row(step, entropy=0.2) for step in range(8, 14)]
    guard = GuardSettings(entropy=0.4)
    assert not guard_sentence(high + low[:4], guard), "the last five steps include a good one"
    assert guard_sentence(high + low[:5], guard) == (
        "entropy fell from 0.55 (steps 3 to 7, the best ones) to 0.2, below guard.entropy=0.4 times that"
    )
    assert guard_sentence(high + low, guard), "and it stays so when the run is resumed"
    for other in (GuardSettings(), GuardSettings(entropy=0.3), GuardSettings(reward=0.9, length=0.9)):
        assert not guard_sentence(high + low, other)


def test_a_guard_looks_at_the_steps_that_have_its_metric():
    older = [row(step) for step in range(1, 6)]
    train = older + [row(step, entropy=1.0 if step < 11 else 0.1) for step in range(6, 16)]
    assert guard_sentence(train, GuardSettings(entropy=0.5)).startswith("entropy fell from 1 ")
    assert not guard_sentence(older + older, GuardSettings(entropy=0.5))


@pytest.mark.parametrize("field, metric", [("reward", "reward"), ("length", "response_length")])
def test_guards_of_reward_and_length(field, metric):
    train = [row(step, **{metric: 0.1 if step > 5 else 1.0}) for step in range(1, 11)]
    for steps in range(10):
        assert not guard_sentence(train[:steps], GuardSettings(**{field: 0.5}))
    said = guard_sentence(train, GuardSettings(**{field: 0.5}))
    assert said.startswith(f"{metric} fell from 1 (steps 1 to 5, the best ones) to 0.1")
    rising = [row(step, **{metric: step / 20}) for step in range(1, 16)]
    assert not guard_sentence(rising, GuardSettings(**{field: 0.9}))
