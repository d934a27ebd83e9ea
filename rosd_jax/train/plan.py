"""What a run would do and hold in memory, said before any device is touched."""

from __future__ import annotations

from pathlib import Path

import jax

from rosd_jax.config import Config, UserError
from rosd_jax.models.qwen3 import init_params
from rosd_jax.models.weights import check_weights
from rosd_jax.rollout.floor import position_bytes
from rosd_jax.train.setup import Inputs, read_inputs, trained_on


def plan(config: Config, directory: Path) -> None:
    """Prints what a run would do and hold in memory; writes nothing and touches no device."""
    inputs = read_inputs(config)
    try:
        check_weights(config.model.path, inputs.model)
        weights = "can be loaded"
    except UserError as error:
        weights = f"cannot be loaded: {error}"
    shapes = jax.eval_shape(lambda: init_params(inputs.model, jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    rows = config.batch.prompts * config.batch.samples
    frozen = count * (2 if config.model.dtype == "bfloat16" else 4)
    cache = (config.rollout.cache_tokens + config.rollout.prompt_tokens) * position_bytes(inputs.model)
    print(f"{headline(inputs, config, directory, 0)}\n"
          f"weights           {weights}\n"
          f"parameters        {count / 1e6:,.1f} M; master weights and AdamW {count * 12 / 1e9:.2f} GB, "
          f"frozen tree {frozen / 1e9:.2f} GB, over all devices\n"
          f"decoding          weights {frozen / 1e9:.2f} GB and up to {cache / 1e9:.2f} GB of keys and "
          f"values on each row device, shared by its tensor devices\n"
          f"a step            {config.batch.prompts} prompts x {config.batch.samples} samples = {rows} "
          f"rollouts of up to {config.rollout.max_new_tokens} tokens\n"
          f"evaluation        {', '.join(f'{k} {len(v)}' for k, v in inputs.evals.items()) or 'none'}; "
          f"{config.eval.samples} samples an item\n"
          f"left out          {sum(map(len, inputs.overlong.values()))} prompts above "
          f"data.max_prompt_tokens")  # fmt: skip


def headline(inputs: Inputs, config: Config, directory: Path, start: int) -> str:
    """What runs, where, and from which step."""
    begun = f"resumes after step {start}" if start else f"{config.steps} steps"
    name = trained_on(config)[0]
    return f"{config.name}: {len(inputs.train)} problems of {name}, {begun}, in {directory}"
