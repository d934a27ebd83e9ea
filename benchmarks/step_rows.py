"""Rows of one training step as they occur in practice: lengths, where the loss lies, and a Lesson of them.

    draw(sizes, preset, seed)        -> Lengths
    lesson(lengths, vocab)           -> Lesson of random ids, on the host
    needs(lengths)                   -> tokens that each model must read of each row

Response lengths are lognormal, with mean `mean` before the cut at `most`. Half of the responses are right,
six groups in ten hold right and wrong ones, and errors occur early. The tokens with loss, by preset:

    span     right responses whole, wrong ones on the error's span
    paper    right responses whole, wrong ones from the error to the end
    errors   wrong ones on the error's span; right ones are left out
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rosd_jax.rollout.batching import pad_rows
from rosd_jax.types import Lesson

Preset = Literal["span", "paper", "errors"]
PRESETS: tuple[Preset, ...] = ("span", "paper", "errors")
SIGMA = 0.8  # standard deviation of the logarithm of a response's length
MIXED = 0.6  # share of the groups that hold right and wrong responses
RIGHT = 0.5  # share of right responses
EARLY = (1.2, 3.0)  # parameters of the beta distribution of an error's place in its response


@dataclass(frozen=True)
class Sizes:
    """The paper's number of rows, and lengths in tokens: medians of the lognormal ones, and limits."""

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
        """The number of rows of one step."""
        return self.prompts * self.samples

    @property
    def limits(self) -> dict[str, int]:
        """The fields of a run with such rows, for its config's `update_from_flattened_dict`."""
        prompt = self.prompt_limits[1]
        idea = self.idea_limits[1]
        return {
            "data.max_prompt_tokens": prompt,
            "lesson.max_teacher_tokens": prompt + self.frame + idea,
            "rollout.max_new_tokens": self.most,
        }

    def scaled(self, by: float, prompts: int) -> "Sizes":
        """Lengths `by` times as long, and another number of prompts."""

        def times(n: int) -> int:
            return max(1, round(by * n))

        def both(limits: tuple[int, int]) -> tuple[int, int]:
            return times(limits[0]), times(limits[1])

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
    rng = np.random.default_rng(seed)
    B = sizes.rows

    def lognormal(median, sigma, n):
        return rng.lognormal(np.log(median), sigma, n)

    def within(x, limits):
        return np.clip(x, *limits).astype(np.int32)

    # exp(-sigma^2 / 2) makes the given number the mean of the lognormal, instead of its median.
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
    first_B = np.where(taught_B, first_B, 0)
    last_B = np.where(taught_B, last_B, 0)
    return Lengths(prompt_B, teacher_prompt_B, response_B, first_B, last_B)


def needs(lengths: Lengths) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that student and teacher must read of rows with loss: up to the last one's predecessor."""
    live_B = lengths.active_B > 0

    def need(prompt_B):
        return (prompt_B + lengths.last_B - 1)[live_B].astype(np.int64)

    return need(lengths.prompt_B), need(lengths.teacher_prompt_B)


def lesson(lengths: Lengths, vocab: int, seed: int = 0) -> Lesson:
    """Random ids of these lengths."""
    rng = np.random.default_rng(seed)
    B = len(lengths.prompt_B)
    at_R = np.arange(lengths.response_B.max())

    def padded(length_B: np.ndarray) -> np.ndarray:
        width = length_B.max()
        ids = rng.integers(2, vocab, (B, width))
        return np.where(np.arange(width) < length_B[:, None], ids, 0).astype(np.int32)

    def texts(length_B: np.ndarray) -> list[list[int]]:
        return [ids[:length].tolist() for ids, length in zip(padded(length_B), length_B, strict=True)]

    def inside(low_B, high_B):
        return (low_B[:, None] <= at_R) & (at_R < high_B[:, None])

    logp_BR = np.where(inside(0 * lengths.response_B, lengths.response_B), -np.log(vocab), 0.0)
    return Lesson(
        prompts=texts(lengths.prompt_B),
        teacher_prompts=texts(lengths.teacher_prompt_B),
        response_BR=padded(lengths.response_B),
        weight_BR=inside(lengths.first_B, lengths.last_B).astype(np.float32),
        sampler_logp_BR=logp_BR.astype(np.float32),
    )


def padded(lengths: Lengths, vocab: int) -> dict[str, np.ndarray]:
    """The rows of `lesson` as arrays alone, prompts padded to the longest, for peers that take them so."""
    rows = lesson(lengths, vocab)
    prompt_BP, prompt_len_B = pad_rows(rows.prompts, max(map(len, rows.prompts)))
    teacher_BQ, teacher_len_B = pad_rows(rows.teacher_prompts, max(map(len, rows.teacher_prompts)))
    return {
        "prompt_BP": prompt_BP,
        "prompt_len_B": prompt_len_B,
        "teacher_prompt_BQ": teacher_BQ,
        "teacher_prompt_len_B": teacher_len_B,
        "response_BR": rows.response_BR,
        "response_len_B": lengths.response_B,
        "weight_BR": rows.weight_BR,
        "sampler_logp_BR": rows.sampler_logp_BR,
    }
