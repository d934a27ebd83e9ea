"""Qwen3, Qwen2 and Llama: a Flax Linen module, used only through pure functions over an explicit params tree.

Fields of the config say in what the families differ: norms on query and key heads, biases, RoPE's scaling.

Linen rather than NNX because its parameters are a plain nested dict that travels as an argument, so the
learning tree and the frozen tree are two arguments of the same function.

One block is scanned over the layers (every leaf under params["blocks"] has a leading axis L), so compile
time does not grow with depth. Rows are right-padded everywhere: with a causal mask padding needs no mask.

    init_params(config, key)                                  -> params (float32)
    hidden_states(params, config, tokens_BT)                  -> hidden_BTD, after the final norm
    head_VD(params)                                           -> the (tied or own) output head
    logits(params, config, hidden)                            -> float32, padded vocabulary at -inf
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rosd_jax.kernels.flash_attention import SAVED, causal_attention
from rosd_jax.types import Params

ROWS = ("data", "fsdp")  # the mesh axes along which rows lie
# What the backward pass finds of a block whose rest it computes again; its input is there in any case.
POLICIES = {
    "block": None,
    "attention": jax.checkpoint_policies.save_only_these_names(SAVED),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclass(frozen=True)
class Llama3Scaling:
    """RoPE of type llama3: wavelengths that the first training saw whole stay, long ones are stretched."""

    factor: float  # by which frequencies with a long wavelength are divided
    low_freq_factor: float  # long: above original_max_position_embeddings / low_freq_factor
    high_freq_factor: float  # short: below original_max_position_embeddings / high_freq_factor
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Qwen3Config:
    """The architecture's numbers, by the names of Hugging Face's config.json (hashable).

    The defaults are Qwen3's. Qwen2 has `attention_bias` and no `qk_norm`, Llama neither.
    """

    vocab_size: int  # rows of the embedding, padding rows included
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rope_scaling: Llama3Scaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    qk_norm: bool = True  # a norm on every query and key head
    attention_bias: bool = False  # on queries, keys and values
    output_bias: bool = False  # on the attention's output
    max_position_embeddings: int = 40960
    num_tokens: int | None = None  # ids at or above it are padding rows: never sampled, never scored
    lora_scale: float = 0.0  # of adapters, where the params have any (lora.py)
    dtype: str = "float32"  # of activations; parameters stay float32
    remat: str = "none"  # what the backward pass computes again; config.py says which there are

    replace = dataclasses.replace


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def rotate(x_BTHE: jax.Array, position_BT: jax.Array, frequency: np.ndarray) -> jax.Array:
    """Rotary position embedding, halves convention (RoPE, arXiv 2104.09864), in float32."""
    return turn(x_BTHE, *angles(position_BT, frequency))


def frequencies(config: Qwen3Config) -> np.ndarray:
    """Radians a position [E / 2], float32.

    On the host, in transformers' order of operations: at position 20,000 an error of the last bit turns by
    a thousandth, and accelerators round powers worse than that.
    """
    E = config.head_dim
    exponent = np.arange(0, E, 2, dtype=np.float32) / np.float32(E)
    frequency = np.float32(1) / np.float32(config.rope_theta) ** exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    wavelength = np.float32(2 * np.pi) / frequency
    turns = scaling.original_max_position_embeddings / wavelength
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)  # 1 for short wavelengths, 0 for long ones
    return ((1 - kept) * frequency / scaling.factor + kept * frequency).astype(np.float32)


def angles(position: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., 1, E / 2] (float32) of integer positions [...]."""
    angle = position[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def turn(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads [..., H, E] by their position's angles."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Dense(nn.Module):
    """A linear layer at the compute type; an adapter next to its kernel adds scale (x A) B (lora.py)."""

    config: Qwen3Config
    width: int
    bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        dtype = self.config.dtype
        shape = x.shape[-1], self.width
        kernel = self.param("kernel", nn.initializers.normal(0.02), shape, jnp.float32)
        y = x @ kernel.astype(dtype)
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32).astype(dtype)
        if not self.has_variable("params", "lora_a"):
            return y
        a, b = (self.get_variable("params", name).astype(dtype) for name in ("lora_a", "lora_b"))
        return y + self.config.lora_scale * (x @ a @ b)


class Attention(nn.Module):
    """Grouped-query attention."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, x_BTD, position_BT):
        c = self.config
        B, T, _ = x_BTD.shape

        def heads(count, name):
            y = Dense(c, count * c.head_dim, c.attention_bias, name=name)(x_BTD)
            return y.reshape(B, T, count, c.head_dim)

        q = heads(c.num_attention_heads, "q_proj")
        k = heads(c.num_key_value_heads, "k_proj")
        v = heads(c.num_key_value_heads, "v_proj")
        if c.qk_norm:
            q = RMSNorm(c.rms_norm_eps, name="q_norm")(q)
            k = RMSNorm(c.rms_norm_eps, name="k_norm")(k)
        frequency = frequencies(c)
        q, k = rotate(q, position_BT, frequency), rotate(k, position_BT, frequency)
        out = attend(q, k, v).reshape(B, T, c.num_attention_heads * c.head_dim)
        return Dense(c, c.hidden_size, c.output_bias, name="o_proj")(out)


def attend(q_BTHE: jax.Array, k_BTKE: jax.Array, v_BTKE: jax.Array) -> jax.Array:
    """Causal attention; under a mesh in context each device attends to its own rows and heads.

    XLA cannot split a kernel of ours or of JAX's by itself: it would gather all rows on every device.
    """
    if not _rows_fit_mesh(q_BTHE.shape[0]):
        return causal_attention(q_BTHE, k_BTKE, v_BTKE)
    spec = PartitionSpec(ROWS, None, "tensor")
    local = jax.shard_map(causal_attention, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    return local(q_BTHE, k_BTKE, v_BTKE)


def pin_rows(x: jax.Array) -> jax.Array:
    """Lays the rows of activations along the mesh in context (`jax.set_mesh`), if there is one.

    Left alone, XLA splits the embedding's output along D, and every device then holds all rows.
    """
    if not _rows_fit_mesh(x.shape[0]):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROWS))


def _rows_fit_mesh(rows: int) -> bool:
    """Whether there is a mesh in context whose row devices divide the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0


class Block(nn.Module):
    """One layer, as a scan wants it: the carry is x."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, x, position_BT):
        c = self.config
        x = checkpoint_name(x, "block_input")
        x = x + Attention(c, name="attention")(RMSNorm(c.rms_norm_eps, name="input_norm")(x), position_BT)
        h = RMSNorm(c.rms_norm_eps, name="post_norm")(x)
        gate = nn.silu(Dense(c, c.intermediate_size, False, name="gate_proj")(h))
        up = Dense(c, c.intermediate_size, False, name="up_proj")(h)
        h = Dense(c, c.hidden_size, False, name="down_proj")(gate * up)
        return x + h, None


class Qwen3(nn.Module):
    """Embedding, scanned blocks, final norm; an own head where the embedding is not tied."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, tokens_BT):
        c = self.config
        embed = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), jnp.float32)
        if not c.tie_word_embeddings:
            self.param("head", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), jnp.float32)
        x = pin_rows(embed[tokens_BT].astype(c.dtype))
        block = Block if c.remat == "none" else nn.remat(Block, prevent_cse=False, policy=POLICIES[c.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, nn.broadcast),
            length=c.num_hidden_layers,
        )
        position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x, _ = blocks(c, name="blocks")(x, position_BT)
        return RMSNorm(c.rms_norm_eps, name="final_norm")(x)


def init_params(config: Qwen3Config, key: jax.Array) -> Params:
    """Random float32 parameters."""
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    return Qwen3(config).init(key, tokens_BT)["params"]


def hidden_states(params: Params, config: Qwen3Config, tokens_BT: jax.Array) -> jax.Array:
    """Causal forward over right-padded rows: hidden states [B, T, D] after the final norm."""
    return cast(jax.Array, Qwen3(config).apply({"params": params}, tokens_BT))


def head_VD(params: Params) -> jax.Array:
    """The output head [V, D]: its own, or the embedding where the two are tied."""
    return params["head"] if "head" in params else params["embed"]


def logits(params: Params, config: Qwen3Config, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V]; ids from `config.num_tokens` on are padding rows and get -inf."""
    z = jnp.einsum(
        "...d,vd->...v",
        hidden,
        head_VD(params).astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if config.num_tokens is None:
        return z
    return jnp.where(jnp.arange(config.vocab_size) < config.num_tokens, z, -jnp.inf)
