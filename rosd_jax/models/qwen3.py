"""Qwen3, Qwen2 and Llama: one Flax Linen module, used only through pure functions over explicit params.

The families differ in norms on query and key heads, in biases and in RoPE scaling; fields of the config say
which apply.

Linen rather than NNX: its parameters are a plain nested dict that is passed as an argument, so the trained
tree and the frozen tree are two arguments of the same function.

One block is scanned over the layers (every leaf under params["blocks"] has a leading layer axis), so compile
time does not grow with depth. Rows are right-padded everywhere: under a causal mask, padding after the text
needs no mask of its own.

    init_params(config, key)                    -> params (float32)
    param_shapes(config)                        -> their shapes, without any array
    hidden_states(params, config, tokens_BT)    -> hidden_BTD, after the final norm
    head_VD(params)                             -> the output head, tied or separate
    logits(params, config, hidden)              -> float32 logits, padding ids at -inf

Dimensions: B rows, T positions, D model width, H query heads, K key-value heads, E head width, F inner width,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from rosd_jax.kernels.flash_attention import SAVED, causal_attention
from rosd_jax.types import Params

ROW_AXES = ("data", "fsdp")  # the mesh axes that rows of a batch are split over
# What is saved of a block for the backward pass, which recomputes the rest; the block's input always is.
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
    """RoPE scaling of type llama3: frequencies with a long wavelength are divided, the others kept.

    Between the two limits the scaled and the unscaled frequency are interpolated.
    """

    factor: float  # divides the frequencies of long wavelengths
    low_freq_factor: float  # long: above original_max_position_embeddings / low_freq_factor
    high_freq_factor: float  # short: below original_max_position_embeddings / high_freq_factor
    original_max_position_embeddings: int


@dataclass(frozen=True)
class Qwen3Config:
    """The architecture, under the field names of Hugging Face's config.json (hashable).

    The defaults are Qwen3's. Qwen2 has `attention_bias` and no `qk_norm`; Llama has neither.
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
    qk_norm: bool = True  # RMSNorm on every query and key head
    attention_bias: bool = False  # on queries, keys and values
    output_bias: bool = False  # on the attention's output
    max_position_embeddings: int = 40960
    num_tokens: int | None = None  # ids from here on are padding rows: never sampled, never scored
    lora_scale: float = 0.0  # factor of adapters, if the params have any (lora.py)
    dtype: str = "float32"  # compute type; parameters stay float32
    remat: str = "none"  # what the backward pass recomputes: "none" or a key of POLICIES

    replace = dataclasses.replace


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, computed in float32 whatever the type of x."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def rotate(x_BTHE: jax.Array, position_BT: jax.Array, frequency: np.ndarray) -> jax.Array:
    """Rotary position embedding (RoPE, arXiv 2104.09864) in float32; dimension i is paired with i + E / 2."""
    cos, sin = rope_angles(position_BT, frequency)
    return apply_rope(x_BTHE, cos, sin)


def frequencies(config: Qwen3Config) -> np.ndarray:
    """RoPE's frequencies in radians per position [E / 2], float32."""
    # On the host and in transformers' order of operations: an error in the last bit is an angle of a
    # thousandth of a radian at position 20,000, and accelerators round powers worse than that.
    E = config.head_dim
    exponent = np.arange(0, E, 2, dtype=np.float32) / np.float32(E)
    frequency = np.float32(1) / np.float32(config.rope_theta) ** exponent
    scaling = config.rope_scaling
    if scaling is None:
        return frequency
    wavelength = np.float32(2 * np.pi) / frequency
    periods = scaling.original_max_position_embeddings / wavelength
    low = scaling.low_freq_factor
    high = scaling.high_freq_factor
    kept = np.clip((periods - low) / (high - low), 0, 1)  # 1 for short wavelengths, 0 for long ones
    return ((1 - kept) * frequency / scaling.factor + kept * frequency).astype(np.float32)


def rope_angles(position: jax.Array, frequency: np.ndarray) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [..., 1, E / 2] (float32) of integer positions [...]; the 1 broadcasts over heads."""
    angle = position[..., None, None].astype(jnp.float32) * frequency
    return jnp.cos(angle), jnp.sin(angle)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates heads [..., H, E] by the angles of their positions; in float32, returned in the type of x."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x.dtype)


class Dense(nn.Module):
    """A linear layer in the compute type. An adapter next to its kernel adds scale (x A) B (lora.py)."""

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
        a = self.get_variable("params", "lora_a").astype(dtype)
        b = self.get_variable("params", "lora_b").astype(dtype)
        return y + self.config.lora_scale * (x @ a @ b)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array, position_BT: jax.Array) -> jax.Array:
        c = self.config
        B, T, _ = x_BTD.shape

        def heads(count: int, name: str) -> jax.Array:
            y = Dense(c, count * c.head_dim, c.attention_bias, name=name)(x_BTD)
            return y.reshape(B, T, count, c.head_dim)

        q_BTHE = heads(c.num_attention_heads, "q_proj")
        k_BTKE = heads(c.num_key_value_heads, "k_proj")
        v_BTKE = heads(c.num_key_value_heads, "v_proj")
        if c.qk_norm:
            q_BTHE = RMSNorm(c.rms_norm_eps, name="q_norm")(q_BTHE)
            k_BTKE = RMSNorm(c.rms_norm_eps, name="k_norm")(k_BTKE)
        frequency = frequencies(c)
        q_BTHE = rotate(q_BTHE, position_BT, frequency)
        k_BTKE = rotate(k_BTKE, position_BT, frequency)
        out = attend(q_BTHE, k_BTKE, v_BTKE).reshape(B, T, c.num_attention_heads * c.head_dim)
        return Dense(c, c.hidden_size, c.output_bias, name="o_proj")(out)


def attend(q_BTHE: jax.Array, k_BTKE: jax.Array, v_BTKE: jax.Array) -> jax.Array:
    """Causal attention; with a mesh in context, each device attends to its own rows and heads."""
    if not _rows_fit_mesh(q_BTHE.shape[0]):
        return causal_attention(q_BTHE, k_BTKE, v_BTKE)
    # XLA cannot split a kernel (Pallas or cuDNN) by itself: without shard_map it gathers all rows everywhere.
    spec = PartitionSpec(ROW_AXES, None, "tensor")
    local = jax.shard_map(causal_attention, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)
    return local(q_BTHE, k_BTKE, v_BTKE)


def pin_rows(x: jax.Array) -> jax.Array:
    """Splits the rows of activations [B, ...] over the mesh in context (`jax.set_mesh`), if there is one."""
    if not _rows_fit_mesh(x.shape[0]):
        return x
    # Left alone, XLA splits the embedding's output along D, and every device then holds all rows.
    return jax.lax.with_sharding_constraint(x, PartitionSpec(ROW_AXES))


def _rows_fit_mesh(rows: int) -> bool:
    """Whether a mesh is in context and its number of row devices divides the rows."""
    mesh = jax.sharding.get_abstract_mesh()
    return not mesh.empty and rows % (mesh.shape["data"] * mesh.shape["fsdp"]) == 0


class Block(nn.Module):
    """One layer, as the body of a scan: x_BTD is the carry, and nothing is stacked."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, x_BTD: jax.Array, position_BT: jax.Array) -> tuple[jax.Array, None]:
        c = self.config
        x_BTD = checkpoint_name(x_BTD, "block_input")
        h_BTD = RMSNorm(c.rms_norm_eps, name="input_norm")(x_BTD)
        x_BTD = x_BTD + Attention(c, name="attention")(h_BTD, position_BT)
        h_BTD = RMSNorm(c.rms_norm_eps, name="post_norm")(x_BTD)
        gate_BTF = nn.silu(Dense(c, c.intermediate_size, False, name="gate_proj")(h_BTD))
        up_BTF = Dense(c, c.intermediate_size, False, name="up_proj")(h_BTD)
        return x_BTD + Dense(c, c.hidden_size, False, name="down_proj")(gate_BTF * up_BTF), None


class Qwen3(nn.Module):
    """Embedding, scanned blocks and final norm; a separate head if the embedding is not tied."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        c = self.config
        embed = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), jnp.float32)
        if not c.tie_word_embeddings:
            self.param("head", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), jnp.float32)
        x_BTD = pin_rows(embed[tokens_BT].astype(c.dtype))
        # The scan already keeps XLA from merging forward and recomputation, so remat needs no barrier.
        block = Block if c.remat == "none" else nn.remat(Block, prevent_cse=False, policy=POLICIES[c.remat])
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, nn.broadcast),
            length=c.num_hidden_layers,
        )
        position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD, _ = blocks(c, name="blocks")(x_BTD, position_BT)
        return RMSNorm(c.rms_norm_eps, name="final_norm")(x_BTD)


def init_params(config: Qwen3Config, key: jax.Array) -> Params:
    """Random float32 parameters: kernels normal with standard deviation 0.02, biases 0, norms 1."""
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    return Qwen3(config).init(key, tokens_BT)["params"]


@cache
def param_shapes(config: Qwen3Config) -> Params:
    """Shapes and dtypes of `init_params`."""
    return jax.eval_shape(lambda: init_params(config, jax.random.key(0)))


def hidden_states(params: Params, config: Qwen3Config, tokens_BT: jax.Array) -> jax.Array:
    """Causal forward pass over right-padded rows: hidden_BTD after the final norm, in the compute type."""
    return cast(jax.Array, Qwen3(config).apply({"params": params}, tokens_BT))


def head_VD(params: Params) -> jax.Array:
    """The output head [V, D]: the separate one, or the embedding if the two are tied."""
    return params["head"] if "head" in params else params["embed"]


def logits(params: Params, config: Qwen3Config, hidden: jax.Array) -> jax.Array:
    """float32 logits [..., V] of hidden states [..., D]; padding ids (from num_tokens on) get -inf."""
    z = jnp.einsum(
        "...d,vd->...v",
        hidden,
        head_VD(params).astype(hidden.dtype),
        preferred_element_type=jnp.float32,
    )
    if config.num_tokens is None:
        return z
    return jnp.where(jnp.arange(config.vocab_size) < config.num_tokens, z, -jnp.inf)
