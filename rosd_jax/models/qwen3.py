"""Qwen3 dense: a Flax Linen module, used only through pure functions over an explicit params tree.

Linen rather than NNX because its parameters are a plain nested dict that travels as an argument, so the
learning tree and the frozen tree are two arguments of the same function.

One block is scanned over the layers (every leaf under params["blocks"] has a leading axis L), so compile
time does not grow with depth. Rows are right-padded everywhere: with a causal mask padding needs no mask.

    init_params(config, key)                                  -> params (float32)
    hidden_states(params, config, tokens_BT)                  -> hidden_BTD, after the final norm
    prefill(params, config, tokens_BP, cache_len)             -> hidden_BPD, cache
    decode_step(params, config, cache, token_B, position_B)   -> hidden_BD, cache
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

from rosd_jax.types import Params


@dataclass(frozen=True)
class Qwen3Config:
    """The architecture's numbers, by the names of Hugging Face's config.json (hashable)."""

    vocab_size: int  # rows of the embedding, padding rows included
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    max_position_embeddings: int = 40960
    num_tokens: int | None = None  # ids at or above it are padding rows: never sampled, never scored
    dtype: str = "float32"  # of activations; parameters stay float32
    remat: bool = False

    replace = dataclasses.replace


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """Keys and values of S positions: [L, B, S, key-value heads, head width]."""

    k: jax.Array
    v: jax.Array


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.float32)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


def rotate(x_BTHE: jax.Array, position_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding, halves convention (RoPE, arXiv 2104.09864), in float32."""
    half = x_BTHE.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BT[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b = jnp.split(x_BTHE.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_BTHE.dtype)


class Attention(nn.Module):
    """Grouped-query attention with a norm on every query and key head."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, x_BTD, position_BT, layer, cache: Cache | None):
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        B, T, _ = x_BTD.shape
        dense = lambda width, name, bias: nn.Dense(
            width, use_bias=bias, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name
        )
        heads = lambda width, name: dense(width * c.head_dim, name, c.attention_bias)(x_BTD).reshape(
            B, T, width, c.head_dim
        )
        q = heads(c.num_attention_heads, "q_proj")
        k = heads(c.num_key_value_heads, "k_proj")
        v = heads(c.num_key_value_heads, "v_proj")
        q = rotate(RMSNorm(c.rms_norm_eps, name="q_norm")(q), position_BT, c.rope_theta)
        k = rotate(RMSNorm(c.rms_norm_eps, name="k_norm")(k), position_BT, c.rope_theta)
        if cache is None:
            out = attend(q, k, v, is_causal=True)
        else:
            cache, out = attend_cached(cache, layer, q, k, v, position_BT[:, 0])
        out = out.reshape(B, T, c.num_attention_heads * c.head_dim)
        return dense(c.hidden_size, "o_proj", c.attention_bias)(out), cache, (k, v)


def attend_cached(cache: Cache, layer, q_B1HE, k_B1KE, v_B1KE, position_B):
    """Writes one position a row into the cache and attends to all positions up to it."""
    rows = jnp.arange(position_B.shape[0])
    cache = Cache(
        k=cache.k.at[layer, rows, position_B].set(k_B1KE[:, 0]),
        v=cache.v.at[layer, rows, position_B].set(v_B1KE[:, 0]),
    )
    seen_BS = jnp.arange(cache.k.shape[2])[None, :] <= position_B[:, None]
    out = attend(q_B1HE, cache.k[layer], cache.v[layer], mask=seen_BS[:, None, None, :])
    return cache, out


def attend(q: jax.Array, k: jax.Array, v: jax.Array, **options) -> jax.Array:
    """Softmax attention with float32 scores, also where the caller forbids implicit promotion."""
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(q, k, v, **options)


def pin_rows(x: jax.Array) -> jax.Array:
    """Lays the rows of activations along the mesh in context (`jax.set_mesh`), if there is one.

    Left alone, XLA splits the embedding's output along D, and every device then holds all rows.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return x
    spec = jax.sharding.PartitionSpec(("data", "fsdp"))
    return jax.lax.with_sharding_constraint(x, spec)


class Block(nn.Module):
    """One layer. Scanned: the carry is (x, cache), the scanned input the layer's number."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, carry, layer, position_BT):
        x, cache = carry
        c, dtype = self.config, jnp.dtype(self.config.dtype)
        dense = lambda width, name: nn.Dense(
            width, use_bias=False, dtype=dtype, kernel_init=nn.initializers.normal(0.02), name=name
        )
        h, cache, kv = Attention(c, name="attention")(
            RMSNorm(c.rms_norm_eps, name="input_norm")(x), position_BT, layer, cache
        )
        x = x + h
        h = RMSNorm(c.rms_norm_eps, name="post_norm")(x)
        gate = nn.silu(dense(c.intermediate_size, "gate_proj")(h))
        h = dense(c.hidden_size, "down_proj")(gate * dense(c.intermediate_size, "up_proj")(h))
        return (x + h, cache), kv


class Qwen3(nn.Module):
    """Embedding, scanned blocks, final norm; an own head where the embedding is not tied."""

    config: Qwen3Config

    @nn.compact
    def __call__(self, tokens_BT, position_BT, cache: Cache | None = None):
        c = self.config
        embed = self.param("embed", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), jnp.float32)
        if not c.tie_word_embeddings:
            self.param("head", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), jnp.float32)
        x = pin_rows(embed[tokens_BT].astype(c.dtype))
        block = nn.remat(Block, prevent_cse=False) if c.remat and cache is None else Block
        blocks = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (0, nn.broadcast)),
            length=c.num_hidden_layers,
        )
        (x, cache), kv = blocks(c, name="blocks")((x, cache), jnp.arange(c.num_hidden_layers), position_BT)
        return RMSNorm(c.rms_norm_eps, name="final_norm")(x), cache, kv


def init_params(config: Qwen3Config, key: jax.Array) -> Params:
    """Random float32 parameters."""
    tokens_BT = jnp.zeros((1, 2), jnp.int32)
    return Qwen3(config).init(key, tokens_BT, tokens_BT)["params"]


def hidden_states(params: Params, config: Qwen3Config, tokens_BT: jax.Array) -> jax.Array:
    """Causal forward over right-padded rows: hidden states [B, T, D] after the final norm."""
    return _forward(params, config, tokens_BT)[0]


def prefill(
    params: Params, config: Qwen3Config, tokens_BP: jax.Array, cache_len: int
) -> tuple[jax.Array, Cache]:
    """Hidden states [B, P, D] of the prompts, and a cache of `cache_len` >= P positions."""
    hidden_BPD, _, (k, v) = _forward(params, config, tokens_BP)
    room = ((0, 0), (0, 0), (0, cache_len - tokens_BP.shape[1]), (0, 0), (0, 0))
    return hidden_BPD, Cache(jnp.pad(k, room), jnp.pad(v, room))


def decode_step(
    params: Params, config: Qwen3Config, cache: Cache, token_B: jax.Array, position_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """Feeds one token a row at its position: hidden states [B, D] and the longer cache."""
    hidden_B1D, cache, _ = _forward(params, config, token_B[:, None], position_B[:, None], cache)
    return hidden_B1D[:, 0], cache


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


def _forward(params: Params, config: Qwen3Config, tokens_BT, position_BT=None, cache=None) -> Any:
    if position_BT is None:
        position_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    return Qwen3(config).apply({"params": params}, tokens_BT, position_BT, cache)
