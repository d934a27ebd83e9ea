"""Rows of one training step as they come in practice: lengths, where the loss lies, and a Lesson of them.

    draw(sizes, preset, seed)        -> Lengths
    lesson(lengths, vocab)           -> Lesson of random ids, on the host
    needs(lengths)                   -> tokens that each model must read of each row

Responses are lognormal (mean `mean` before the cut at `most`), half of them are right, six groups in ten
hold right and wrong ones, and errors lie early. What is taught, by preset:

    span     right responses whole, wrong ones on the error's span
    paper    right responses whole, wrong ones from the error to the end
    errors   wrong ones on the error's span; right ones are left out
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rosd_jax.types import Lesson

Preset = Literal["span", "paper", "errors"]
PRESETS: tuple[Preset, ...] = ("span", "paper", "errors")
SIGMA = 0.8  # of the responses' logarithms
MIXED, RIGHT = 0.6, 0.5  # shares of the groups that hold both kinds, and of their right responses
EARLY = 1.2, 3.0  # of the beta distribution of an error's place


@dataclass(frozen=True)
class Sizes:
    """How many rows, and lengths in tokens: medians of what is lognormal, and limits. The paper's."""

    prompts: int = 32
    samples: int = 8
    mean: float = 1500.0  # of responses
    most: int = 8192
    prompt: float = 250.0
    prompt_limits: tuple[int, int] = 60, 2048
    frame: int = 150  # of the teacher's prompt around the idea
    idea: float = 120.0
    idea_limits: tuple[int, int] = 20, 800
    span_limits: tuple[int, int] = 15, 80

    @property
    def rows(self) -> int:
        """Of one step."""
        return self.prompts * self.samples

    @property
    def limits(self) -> dict[str, int]:
        """The fields of a run with such rows, for its config's `update_from_flattened_dict`."""
        prompt, idea = self.prompt_limits[1], self.idea_limits[1]
        return {
            "data.max_prompt_tokens": prompt,
            "lesson.max_teacher_tokens": prompt + self.frame + idea,
            "rollout.max_new_tokens": self.most,
        }

    def scaled(self, by: float, prompts: int) -> "Sizes":
        """Lengths `by` times as long, and another number of prompts."""
        times = lambda n: max(1, round(by * n))
        both = lambda limits: (times(limits[0]), times(limits[1]))
        return Sizes(
            prompts,
            self.samples,
            by * self.mean,
            times(self.most),
            by * self.prompt,
            both(self.prompt_limits),
            times(self.frame),
            by * self.idea,
            both(self.idea_limits),
            both(self.span_limits),
        )


@dataclass(frozen=True)
class Lengths:
    """Tokens of each row: its two prompts, its response, and the part [first, last) with loss (host)."""

    prompt_B: np.ndarray
    teacher_prompt_B: np.ndarray
    response_B: np.ndarray
    first_B: np.ndarray
    last_B: np.ndarray

    @property
    def active_B(self) -> np.ndarray:
        """Tokens with loss."""
        return self.last_B - self.first_B

    def only(self, keep_B: np.ndarray) -> "Lengths":
        """These rows."""
        return Lengths(*(x[keep_B] for x in vars(self).values()))


def draw(sizes: Sizes, preset: Preset, seed: int) -> Lengths:
    """The rows of one step, the same for one seed."""
    rng, B = np.random.default_rng(seed), sizes.rows
    lognormal = lambda median, sigma, n: rng.lognormal(np.log(median), sigma, n)
    within = lambda x, limits: np.clip(x, *limits).astype(np.int32)
    response_B = within(lognormal(sizes.mean, SIGMA, B) * np.exp(-(SIGMA**2) / 2), (1, sizes.most))
    prompt_N = within(lognormal(sizes.prompt, 0.5, sizes.prompts), sizes.prompt_limits)
    prompt_B = np.repeat(prompt_N, sizes.samples)
    teacher_prompt_B = prompt_B + sizes.frame + within(lognormal(sizes.idea, 0.5, B), sizes.idea_limits)
    right_B = rng.random(B) < RIGHT
    taught_B = np.repeat(rng.random(sizes.prompts) < MIXED, sizes.samples)
    taught_B &= (preset != "errors") | ~right_B
    error_B = (rng.beta(*EARLY, B) * response_B).astype(np.int32)
    end_B = np.minimum(response_B, error_B + rng.integers(*sizes.span_limits, B, endpoint=True))
    last_B = np.where(right_B | (preset == "paper"), response_B, end_B)
    first_B = np.where(right_B, 0, error_B)
    first_B, last_B = np.where(taught_B, first_B, 0), np.where(taught_B, last_B, 0)
    return Lengths(prompt_B, teacher_prompt_B, response_B, first_B, last_B)


def needs(lengths: Lengths) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that student and teacher must read of rows with loss: up to the last one's predecessor."""
    live_B = lengths.active_B > 0
    need = lambda prompt_B: (prompt_B + lengths.last_B - 1)[live_B].astype(np.int64)
    return need(lengths.prompt_B), need(lengths.teacher_prompt_B)


def lesson(lengths: Lengths, vocab: int, seed: int = 0) -> Lesson:
    """Random ids of these lengths, padded to the longest of their kind."""
    rng, R = np.random.default_rng(seed), lengths.response_B.max()
    B, P, Q = len(lengths.prompt_B), lengths.prompt_B.max(), lengths.teacher_prompt_B.max()
    padded = lambda width, length_B: np.where(
        np.arange(width) < length_B[:, None], rng.integers(2, vocab, (B, width)), 0
    ).astype(np.int32)
    at_BR = np.arange(R)
    inside = lambda low_B, high_B: (low_B[:, None] <= at_BR) & (at_BR < high_B[:, None])
    logp_BR = np.where(inside(0 * lengths.response_B, lengths.response_B), -np.log(vocab), 0.0)
    return Lesson(
        prompt_BP=padded(P, lengths.prompt_B),
        prompt_len_B=lengths.prompt_B.astype(np.int32),
        teacher_prompt_BQ=padded(Q, lengths.teacher_prompt_B),
        teacher_prompt_len_B=lengths.teacher_prompt_B.astype(np.int32),
        response_BR=padded(R, lengths.response_B),
        response_len_B=lengths.response_B.astype(np.int32),
        weight_BR=inside(lengths.first_B, lengths.last_B).astype(np.float32),
        sampler_logp_BR=logp_BR.astype(np.float32),
    )
