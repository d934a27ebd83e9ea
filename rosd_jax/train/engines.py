"""The decoding engines of a run: rollouts, reflections and evaluation, with the limits that settings give."""

from __future__ import annotations

from jax.sharding import Mesh

from rosd_jax.config import UserError
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.rollout import pages
from rosd_jax.rollout.loop import Decoding, settings
from rosd_jax.settings import EvalSettings, ReflectSettings, RolloutSettings, Settings


def engines(
    config: Settings, model: Qwen3Config, mesh: Mesh, stop_ids: tuple[int, ...]
) -> dict[str, Decoding]:
    """The decoding engines of a run, by what they decode."""

    def engine(
        section: RolloutSettings | ReflectSettings | EvalSettings, top_p: float, slots: int | None
    ) -> Decoding:
        return settings(
            model,
            mesh,
            max_new=section.max_new_tokens,
            temperature=section.temperature,
            top_p=top_p,
            stop_ids=stop_ids,
            slots=slots,
            pool=cache_pages(config, section.max_new_tokens),
            implementation=config.rollout.attention,
        )

    return {
        "rollouts": engine(config.rollout, config.rollout.top_p, config.rollout.slots),
        "reflections": engine(config.reflect, 1.0, config.rollout.slots),
        "evaluation": engine(config.eval, config.eval.top_p, config.eval.batch),
    }


def cache_pages(config: Settings, max_new: int) -> int:
    """Pages for responses on each row device. Raises UserError where a single one might not fit."""
    page = pages.page_length(max_new)
    pool, least = config.rollout.cache_tokens // page, pages.most_own(page, max_new)
    if pool < least:
        raise UserError(
            f"rollout.cache_tokens is {config.rollout.cache_tokens}; a response of {max_new} tokens needs "
            f"{least * page}, so raise it or lower the limit of rollout, reflect and eval"
        )
    return pool
