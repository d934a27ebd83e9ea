"""Low-rank adapters (LoRA, arXiv 2106.09685) on a frozen base model.

An adapted kernel W [layers, in, out] has a pair A [layers, in, r] and B [layers, r, out], and the layer
computes x W + scale (x A) B with scale = alpha / r. The adapters are a tree nested like params, so a model
with adapters is the two trees combined: `hidden_states` and `decoder.fuse` use adapters where they find them.

    init_adapters(config, rank, targets, key)   -> adapters (float32); the model starts equal to the base
    combine(base, adapters)                     -> params that contain both; no array is copied
    merged_kernel(layer, scale, dtype)          -> W + scale A B
    merge(params, config)                       -> params without adapters, which are merged into the kernels
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from rosd_jax.models.qwen3 import Qwen3Config, param_shapes
from rosd_jax.types import Params


def init_adapters(config: Qwen3Config, rank: int, targets: tuple[str, ...], key: jax.Array) -> Params:
    """Initialised as in PEFT: A uniform in +-1 / sqrt(in), B zero.

    `targets` are names of layers, such as "q_proj".
    """
    shapes = param_shapes(config)["blocks"]
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
    """The union of the two trees, recursively."""
    both = {name: combine(base[name], inner) for name, inner in adapters.items() if name in base}
    return base | adapters | both


def merged_kernel(layer: Params, scale: float, dtype: Any) -> jax.Array:
    """A stacked kernel [layers, in, out] with its adapter, if it has one, added in float32."""
    if "lora_a" not in layer:
        return layer["kernel"].astype(dtype)

    # One layer at a time: the product for the whole stack would be as large as its float32 kernel.
    def one(parts: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        kernel, a, b = parts
        change = jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
        return (kernel.astype(jnp.float32) + scale * change).astype(dtype)

    return lax.map(one, (layer["kernel"], layer["lora_a"], layer["lora_b"]))


def merge(params: Params, config: Qwen3Config) -> Params:
    """Params with the structure of `init_params`. Kernels without an adapter are passed through."""
    if "lora_a" in params:
        rest = {name: x for name, x in params.items() if name not in ("kernel", "lora_a", "lora_b")}
        return rest | {"kernel": merged_kernel(params, config.lora_scale, params["kernel"].dtype)}
    return {name: merge(x, config) if isinstance(x, dict) else x for name, x in params.items()}
