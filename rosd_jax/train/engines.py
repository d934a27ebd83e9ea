"""The three engines of a run, for rollouts, reflections and evaluation, and their limits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from rosd_jax.errors import UserError
from rosd_jax.kernels.paged_attention import misfit, platform_of
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import LONGEST_PAGE, Limits, own_pages, page_length
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.rollout.stops import Stops
from rosd_jax.settings import EvalSettings, ReflectSettings, RolloutSettings, Settings
from rosd_jax.train import stopping
from rosd_jax.types import Progress, no_progress

HOPPER = "9.0"  # the compute capability of H100 and H200
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
    config: Settings,
    model: Qwen3Config,
    mesh: Mesh,
    ends: Ends,
    longest_train: int | None = None,
    progress: Progress = no_progress,
) -> Engines:
    """The engines of a run. Raises UserError if rollout.cache_tokens is too small for one response.

    longest_train: tokens of the longest training prompt; None: data.max_prompt_tokens.
    progress: called by every engine as responses end.
    """
    c = config
    rows = config.rows
    prompt = c.data.max_prompt_tokens
    longest = longest_train or prompt

    def engine(section: Sampled, limits: Limits, top_p: float, stops: Stops | None) -> Engine:
        sampling = Sampling(section.temperature, top_p, ends.stop_ids)
        return Engine(model, mesh, limits, sampling, stops, c.rollout.attention, stopping.check, progress)

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


def capability(device: Any) -> str:
    """The compute capability of a GPU; HOPPER for other devices, which have none."""
    return getattr(device, "compute_capability", HOPPER)


def check_attention(config: Settings, model: Qwen3Config, platform: str, capability: str = HOPPER) -> None:
    """Raises UserError if rollout.attention is for other devices, or does not take the model's heads.

    platform: that of the devices, "cpu", "gpu" or "tpu". capability: of GPUs.
    """
    name = config.rollout.attention
    wanted = platform_of(name)
    remedy = "leave the field out, which takes the best for the platform"
    if wanted not in (None, platform):
        raise UserError(
            f"rollout.attention is {name!r}, a kernel for {wanted}, and the devices are {platform}; {remedy}"
        )
    if name == "pallas_gpu" and capability != HOPPER:
        raise UserError(
            f"rollout.attention is 'pallas_gpu', a kernel for H100 and H200 (compute capability {HOPPER}); "
            f"these GPUs have {capability}, so {remedy}"
        )
    dtype = jnp.dtype(model.dtype)
    heads = model.num_key_value_heads
    queries = jax.ShapeDtypeStruct((1, model.num_attention_heads, model.head_dim), dtype)
    cache = jax.ShapeDtypeStruct((1, LONGEST_PAGE, 2 * heads, model.head_dim), dtype)
    if wrong := misfit(name, queries, cache):
        raise UserError(f"rollout.attention is {name!r}, and the model has {wrong}; {remedy}")


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
