"""Controlled experiments: the reflector's spans and ideas are replaced, to see what they are worth (host).

    oracle_spans    the span of a wrong rollout is its true first error, which only the gym knows
    oracle_ideas    the idea for a wrong rollout is the true right line, which only the gym knows
    swapped_ideas   this share of the ideas is that of another problem of the batch, drawn at random
    moved_spans     this share of the located spans is at another place of its response, drawn at random

They apply in this order. A draw depends on the run's seed and on the number of the rollout in the run alone,
so every host, and every start of a run, makes the same one. What is replaced for a smaller share is also
replaced for a larger one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from rosd_jax.gym.oracle import oracle
from rosd_jax.rewards.grade import SUCCESS
from rosd_jax.settings import AblationSettings, Settings
from rosd_jax.text import spans
from rosd_jax.text.tokenizer import Tokenizer
from rosd_jax.types import Graded, Reflection, Span

IDEAS = 1  # the streams of random numbers
SPANS = 2
Said = dict[int, Reflection]  # by row


def replaced(said: Said, graded: Graded, config: Settings, tokenizer: Tokenizer, first: int) -> Said:
    """The reflections with what `config.ablation` replaces. first: number of the batch's first rollout.

    Raises ValueError if an oracle is asked about a problem that is not of the gym.
    """
    ablation = config.ablation
    if ablation.oracle_spans or ablation.oracle_ideas:
        said = {row: with_truth(said[row], graded, row, ablation, tokenizer) for row in said}

    def chosen(share: float, stream: int) -> dict[int, np.random.Generator]:
        """The rows to replace, each with its random numbers."""
        if not share:
            return {}
        drawn = {row: np.random.default_rng([config.seed, first + row, stream]) for row in said}
        return {row: rng for row, rng in drawn.items() if rng.random() < share}

    said = with_swapped_ideas(said, graded, chosen(ablation.swapped_ideas, IDEAS))
    return with_moved_spans(said, graded, chosen(ablation.moved_spans, SPANS), tokenizer)


def with_truth(
    reflection: Reflection, graded: Graded, row: int, ablation: AblationSettings, tokenizer: Tokenizer
) -> Reflection:
    """The reflection with the true span, the true idea or both; as it is for a correct rollout.

    A response that was cut off behind a right line has no span: no token of it is wrong.
    """
    if graded.rewards_B[row] >= SUCCESS:
        return reflection
    char_span, idea = oracle(graded.problem(row).question, graded.texts[row])
    if ablation.oracle_ideas:
        reflection = replace(reflection, idea=idea, idea_source="oracle")
    if ablation.oracle_spans:
        token_span = None if char_span is None else tokens_at(char_span, offsets_of(graded, row, tokenizer))
        reflection = replace(
            reflection,
            char_span=token_span and char_span,
            token_span=token_span,
            span_source="oracle",
            ambiguous=False,
        )
    return reflection


def with_swapped_ideas(said: Said, graded: Graded, chosen: Mapping[int, np.random.Generator]) -> Said:
    """The reflections with another problem's idea in the rows `chosen` that have one.

    If no other problem has an idea in this batch, the row has none either, and leaves the loss if its teacher
    needs one. Ideas of the same question do not count as another problem's.
    """
    questions = {row: graded.problem(row).question for row in said}
    swapped = {}
    for row, rng in chosen.items():
        if said[row].idea is None:
            continue
        others = [
            other.idea
            for place, other in said.items()
            if other.idea is not None and questions[place] != questions[row]
        ]
        idea = others[rng.integers(len(others))] if others else None
        swapped[row] = replace(said[row], idea=idea, idea_source="swapped")
    return said | swapped


def with_moved_spans(
    said: Said, graded: Graded, chosen: Mapping[int, np.random.Generator], tokenizer: Tokenizer
) -> Said:
    """The reflections with the spans of the rows `chosen` at another place of the response.

    A span keeps its number of tokens. Each other place where it fits is equally likely. One that fills the
    response has no other place, and stays.
    """
    moved = {}
    for row, rng in chosen.items():
        span = said[row].token_span
        if span is None:
            continue
        length = span[1] - span[0]
        places = int(graded.rollout.length_B[row]) - length  # other than its own
        if places < 1:
            continue
        start = int(rng.integers(places))
        start += start >= span[0]
        token_span = (start, start + length)
        char_span = chars_at(token_span, offsets_of(graded, row, tokenizer))
        moved[row] = replace(said[row], char_span=char_span, token_span=token_span, span_source="moved")
    return said | moved


def count(reflections: tuple[Reflection, ...], ablation: AblationSettings) -> dict[str, int]:
    """The numbers of moved spans and swapped ideas, if a share of them is to be replaced."""
    counts = {}
    if ablation.moved_spans:
        counts["spans_moved"] = sum(found.span_source == "moved" for found in reflections)
    if ablation.swapped_ideas:
        swapped = [found for found in reflections if found.idea_source == "swapped"]
        counts["ideas_swapped"] = sum(found.idea is not None for found in swapped)
        counts["ideas_without_other"] = sum(found.idea is None for found in swapped)
    return counts


def offsets_of(graded: Graded, row: int, tokenizer: Tokenizer) -> np.ndarray:
    """Start and stop of each token of a response, in characters: int [tokens, 2]."""
    return tokenizer.offsets(graded.rollout.tokens_BR[row, : int(graded.rollout.length_B[row])])


def tokens_at(char_span: Span, offsets: np.ndarray) -> Span | None:
    """The tokens of some characters; for an empty span, the token that begins there, if there is one."""
    start, stop = char_span
    if start < stop:
        return spans.chars_to_tokens(char_span, offsets)
    behind = np.flatnonzero(offsets[:, 0] >= start)
    return (int(behind[0]), int(behind[0]) + 1) if len(behind) else None


def chars_at(token_span: Span, offsets: np.ndarray) -> Span:
    """The characters that some tokens add to the response, counted as in rollouts/step_N.jsonl."""
    ends = [0, *np.maximum.accumulate(offsets[:, 1]).tolist()]
    return ends[token_span[0]], ends[token_span[1]]
