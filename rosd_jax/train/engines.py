"""The three engines of a run, for rollouts, reflections and evaluation, and their limits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jax.sharding import Mesh

from rosd_jax.errors import UserError
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits, own_pages, page_length
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.rollout.stops import Stops
from rosd_jax.settings import EvalSettings, ReflectSettings, RolloutSettings, Settings
from rosd_jax.train import stopping

Sampled = RolloutSettings | ReflectSettings | EvalSettings


@dataclass(frozen=True)
class Engines:
    """The engines of a run."""

    rollouts: Engine
    reflections: Engine
    evaluation: Engine  # for eval.sets and validation.sets


@dataclass(frozen=True)
class Ends:
    """What ends a response before its token limit."""

    stop_ids: tuple[int, ...]
    stops: Stops | None  # stop strings; not used for reflections


def make_engines(
    config: Settings, model: Qwen3Config, mesh: Mesh, ends: Ends, longest_train: int | None = None
) -> Engines:
    """The engines of a run. Raises UserError if rollout.cache_tokens is too small for one response.

    longest_train: tokens of the longest training prompt; None: data.max_prompt_tokens.
    """
    c = config
    rows = config.rows
    prompt = c.data.max_prompt_tokens
    longest = longest_train or prompt

    def engine(section: Sampled, limits: Limits, top_p: float, stops: Stops | None) -> Engine:
        sampling = Sampling(section.temperature, top_p, ends.stop_ids)
        return Engine(model, mesh, limits, sampling, stops, c.rollout.attention, stopping.check)

    return Engines(
        rollouts=engine(
            c.rollout,
            limits_of(c, c.rollout.max_new_tokens, longest, rows=rows, prompts=c.batch.prompts),
            c.rollout.top_p,
            ends.stops,
        ),
        reflections=engine(
            c.reflect,
            limits_of(c, c.reflect.max_new_tokens, c.reflect.max_prompt_tokens, rows=rows, prompts=rows),
            1.0,
            None,
        ),
        evaluation=engine(
            c.eval,
            replace(limits_of(c, c.eval.max_new_tokens, prompt, rows=c.eval.batch), slots=c.eval.batch),
            c.eval.top_p,
            ends.stops,
        ),
    )


def limits_of(config: Settings, max_new: int, max_prompt: int, *, rows: int, prompts: int = 1) -> Limits:
    """The limits of an engine. Its calls have multiples of `rows` rows and of `prompts` distinct prompts."""
    return Limits(
        max_new=max_new,
        max_prompt=max_prompt,
        slots=config.rollout.slots,
        response_pages=cache_pages(config, max_new),
        prompt_tokens=config.rollout.prompt_tokens,
        rows=rows,
        prompts=prompts,
    )


def cache_pages(config: Settings, max_new: int) -> int:
    """Pages for responses on each row device. Raises UserError if a single response might not fit."""
    page = page_length(max_new)
    pages = config.rollout.cache_tokens // page
    least = own_pages(page, max_new)
    if pages < least:
        raise UserError(
            f"rollout.cache_tokens is {config.rollout.cache_tokens}; a response of {max_new} tokens needs "
            f"{least * page}, so raise it, or lower max_new_tokens of rollout, reflect and eval"
        )
    return pages
