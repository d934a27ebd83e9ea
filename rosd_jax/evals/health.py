"""Warnings that a run does not learn, printed when they first apply and again in the report.

Each finding depends only on the train lines of metrics.jsonl, so a resumed run and a later report say the
same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median
from typing import NamedTuple

from rosd_jax.evals.outcome import MetricsRow, mean, number
from rosd_jax.settings import GuardSettings

WINDOW = 5  # steps over which a mean is taken, and after which missing updates are reported
UNKNOWN = 0.2  # share of unknown tokens in the prompts; a suitable tokenizer has far fewer
TRUNCATED = 0.5  # share of responses
DEAD = 0.2  # share of steps that change no weight
COLLAPSE = 0.5  # the mean reward fell below this share of its best ...
LEAST_FALL = 0.1  # ... and by at least this much
SPIKE = 8.0  # times the median of all steps
SPIKING = {"loss": "the loss", "grad_norm": "the gradient norm", "seconds": "the time of a step"}

# What to try if most rollouts were out of the loss for this reason.
ADVICE = {
    "all_right": "the model solves nearly every problem: choose harder ones",
    "all_wrong": "the model solves nearly none: choose easier problems, a stronger model or more "
    "batch.samples, and look at rollouts/ for answers that the checker cannot read",
    "correct_left_out": "set reflect.correct=True to teach right rollouts too",
    "overlong": "raise reflect.max_prompt_tokens",
    "no_solution": "raise batch.samples",
    "no_idea": "the reflector writes no explanation: raise reflect.max_new_tokens, or look at rollouts/",
    "quote_missing": "the reflector's quotes are not in the responses: set lesson.quote_missing=full, or "
    "use a stronger model",
    "teacher_overlong": "raise lesson.max_teacher_tokens",
    "no_advantage": "the rollouts of most problems have equal rewards: choose problems that the model solves "
    "sometimes, or more batch.samples",
}


def findings(train: Sequence[MetricsRow]) -> dict[str, str]:
    """What is wrong with a run: a sentence with numbers and advice, by kind. {} if nothing is."""
    found = {
        "no_update": _no_update(train),
        "unknown_tokens": _unknown_tokens(train),
        "truncated": _truncated(train),
        "collapse": _collapse(train),
    }
    return {kind: sentence for kind, sentence in found.items() if sentence}


def new_findings(train: Sequence[MetricsRow]) -> list[str]:
    """The sentences that are new with the last row; none before step WINDOW, when it may all be chance."""
    if len(train) < WINDOW:
        return []
    before = findings(train[:-1]) if len(train) > WINDOW else {}
    return [sentence for kind, sentence in findings(train).items() if kind not in before]


def spikes(train: Sequence[MetricsRow]) -> list[str]:
    """A sentence for each number of SPIKING that is far above its median in some steps, the first left out.

    The first step compiles. Nothing is said about fewer than WINDOW steps.
    """
    return [said for field, words in SPIKING.items() if (said := _spike(train[1:], field, words))]


GUARDED = 3  # exit status of a run that its guard ends


def guard_sentence(train: Sequence[MetricsRow], guard: GuardSettings) -> str:
    """Why a run should end with its last row, as `guard` asks; "" if it need not."""
    guarded = {"reward": "reward", "entropy": "entropy", "length": "response_length"}
    for name, metric in guarded.items():
        share = getattr(guard, name)
        fall = _fall(train, metric)
        if fall is not None and fall.low < share * fall.high:
            return (
                f"{metric} fell from {fall.high:.3g} (steps {fall.first} to {fall.last}, the best ones) "
                f"to {fall.low:.3g}, below guard.{name}={share:g} times that"
            )
    return ""


def _spike(train: Sequence[MetricsRow], field: str, words: str) -> str:
    values = {row["step"]: value for row in train if math.isfinite(value := number(row, field))}
    if len(values) < WINDOW:
        return ""
    usual = median(values.values())
    high = [step for step, value in values.items() if usual > 0 and value > SPIKE * usual]
    if not high:
        return ""
    top = max(high, key=lambda step: values[step])
    times = f"{values[top] / usual:,.0f} times its median at step {top} ({values[top]:.3g}, {usual:.3g})"
    others = len(high) - 1
    if others == 0:
        return f"{words} was {times}"
    return f"{words} was {times}, and over {SPIKE:.0f} times at {others} other step{'s' * (others > 1)}"


def _no_update(train: Sequence[MetricsRow]) -> str:
    """Whether the last WINDOW steps, or a share of DEAD of all steps, changed no weight."""
    dead = [row for row in train if _dead(row)]
    least = min(WINDOW, len(train))
    lately = bool(train) and all(map(_dead, train[-WINDOW:]))
    if not dead or len(dead) < least or not (lately or len(dead) >= DEAD * len(train)):
        return ""
    said = f"{len(dead)} of {len(train)} steps (the last: step {dead[-1]['step']}) did not change the weights"
    if sum(number(row, "skipped_nonfinite") for row in dead) > len(dead) / 2:
        return f"{said}: their gradients were not finite; lower optimizer.lr"
    reasons = {note: sum(row.get(f"out_{note}") or 0 for row in dead) for note in ADVICE}
    reason = max(reasons, key=lambda note: reasons[note])
    return f"{said}: no token was in the loss; {ADVICE[reason]}"


def _dead(row: MetricsRow) -> bool:
    return number(row, "active_tokens") == 0 or number(row, "skipped_nonfinite") > 0


def _unknown_tokens(train: Sequence[MetricsRow]) -> str:
    share = mean(train[-WINDOW:], "unknown_tokens")
    return unknown_sentence(share) if share > UNKNOWN else ""


def unknown_sentence(share: float) -> str:
    """The warning about prompts with this share of unknown tokens."""
    return (
        f"{share:.0%} of the prompts' tokens are unknown to the tokenizer, so the model cannot read them; "
        "choose a model whose tokenizer covers this text"
    )


def _truncated(train: Sequence[MetricsRow]) -> str:
    share = mean(train[-WINDOW:], "truncated")
    if len(train) < WINDOW or not share > TRUNCATED:
        return ""
    return f"{share:.0%} of the responses were cut at the limit; raise rollout.max_new_tokens"


def _collapse(train: Sequence[MetricsRow]) -> str:
    """Whether the mean reward of the last steps is far below that of the best ones."""
    fall = _fall(train, "reward")
    if fall is None or not (fall.low < COLLAPSE * fall.high and fall.high - fall.low >= LEAST_FALL):
        return ""
    return (
        f"the reward fell from {fall.high:.2f} (steps {fall.first} to {fall.last}) to {fall.low:.2f}; lower "
        "optimizer.lr, or let validation.sets choose the best step"
    )


class Fall(NamedTuple):
    """How far a number fell: means over WINDOW steps."""

    high: float  # the highest
    first: int  # its steps
    last: int
    low: float  # that of the last steps of all


def _fall(train: Sequence[MetricsRow], metric: str) -> Fall | None:
    """How far a metric is below its best; None as long as the two means may share steps."""
    if len(train) < 2 * WINDOW:
        return None
    means = [mean(train[i : i + WINDOW], metric) for i in range(len(train) - WINDOW + 1)]
    known = [i for i in range(len(means)) if math.isfinite(means[i])]
    if not known:
        return None
    best = max(known, key=lambda i: means[i])
    return Fall(means[best], train[best]["step"], train[best + WINDOW - 1]["step"], means[-1])
