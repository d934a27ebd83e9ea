"""Low-rank adapters (LoRA, arXiv 2106.09685): what learns in place of a base model that never changes.

Next to each adapted kernel W [L, in, out] lie A [L, in, r] and B [L, r, out], and the layer gives
x W + scale (x A) B with scale = alpha / r. The adapters are a tree nested as params are, so the model that
learns is both trees in one: `hidden_states` and `decoder.fuse` use adapters where they find them.

    init_adapters(config, rank, targets, key)   -> adapters (float32): at first the model is the base
    combine(base, adapters)                     -> params that hold both; no array is copied
    merged_kernel(layer, scale, dtype)          -> W + scale A B
    merge(params, config)                       -> params without adapters, their kernels merged
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.types import Params


def init_adapters(config: Qwen3Config, rank: int, targets: tuple[str, ...], key: jax.Array) -> Params:
    """A random, B zero, as PEFT begins: uniform in +-1 / sqrt(in)."""
    shapes = jax.eval_shape(lambda: init_params(config, key))["blocks"]
    keys = iter(jax.random.split(key, len(targets)))

    def among(layers: Params) -> Params:
        return {name: adapter(layer["kernel"].shape) for name, layer in layers.items() if name in targets}

    def adapter(shape: tuple[int, ...]) -> Params:
        L, width, out = shape
        bound = 1 / math.sqrt(width)
        a = jax.random.uniform(next(keys), (L, width, rank), jnp.float32, -bound, bound)
        return {"lora_a": a, "lora_b": jnp.zeros((L, rank, out), jnp.float32)}

    attention = among(shapes["attention"])
    return {"blocks": among(shapes) | ({"attention": attention} if attention else {})}


def combine(base: Params, adapters: Params) -> Params:
    """One tree of both: what only one of them has, and what both have, combined."""
    both = {name: combine(base[name], inner) for name, inner in adapters.items() if name in base}
    return base | adapters | both


def merged_kernel(layer: Params, scale: float, dtype: Any) -> jax.Array:
    """A layer's kernel with its adapter added in float32, if it has one.

    Layer by layer: the product of a whole stack would be as large as its float32 kernel.
    """
    if "lora_a" not in layer:
        return layer["kernel"].astype(dtype)

    def one(parts):
        kernel, a, b = parts
        change = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * change).astype(dtype)

    return lax.map(one, (layer["kernel"], layer["lora_a"], layer["lora_b"]))


def merge(params: Params, config: Qwen3Config) -> Params:
    """Params as `init_params` lays them out; kernels without an adapter stay the arrays that they are."""
    if "lora_a" in params:
        rest = {name: x for name, x in params.items() if name not in ("kernel", "lora_a", "lora_b")}
        return rest | {"kernel": merged_kernel(params, config.lora_scale, params["kernel"].dtype)}
    return {name: merge(x, config) if isinstance(x, dict) else x for name, x in params.items()}
