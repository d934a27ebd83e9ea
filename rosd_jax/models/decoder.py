"""Prefill and decoding: the layers of qwen3.py as pure functions over one paged KV cache.

The cache holds the keys and values of every layer and is carried through the scan over the layers, so that
XLA writes it in place; kernels/paged_attention states its layout. All of this may run under `jax.shard_map`:
`Decoder.axis` then names the mesh axis that splits heads, inner width and vocabulary. A dimension that the
axis does not divide is whole on every device.

    fuse(params, config)                             -> weights, cast and joined once per call
    prefill_step(decoder, weights, prompts, cache)   -> cache
    decode_step(decoder, weights, inputs, cache)     -> hidden_BD, cache
    local_logits(decoder, weights, hidden_BD)        -> float32 logits of this device's ids
    kv_heads(qkv, config)                            -> number of key-value heads on this device

Arrays without a suffix have the leading axes of a decoding step, B, or of a prefill pass, N and T; their last
axes are in brackets. H, K, V and W count what is on one device.

Dimensions: B rows, N prompts, T tokens of a prompt (padded), D model width, H query heads, K key-value heads,
E head width, V vocabulary, W keys and values of all heads (2 K), X pages of all layers, P positions per page,
M pages per table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rosd_jax.kernels.flash_attention import causal_attention
from rosd_jax.kernels.paged_attention import Implementation, write_and_attend
from rosd_jax.models.lora import merged_kernel
from rosd_jax.models.qwen3 import Qwen3Config, apply_rope, frequencies, head_VD, rope_angles
from rosd_jax.types import Params

Weights = dict[str, Any]
# (queries [..., H, E], keys [..., K, E], values [..., K, E], cache, layer) -> (outputs [..., H, E], cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Decoder:
    """How a device runs the model; fixed when a program is compiled (hashable)."""

    config: Qwen3Config
    axis: str | None = None  # under shard_map, the mesh axis that splits heads and vocabulary
    attention: Implementation | None = None  # kernel of a decoding step; None: the best for the device


class StepInputs(NamedTuple):
    """What one decoding step reads for each row (all int32)."""

    token_B: jax.Array
    position_B: jax.Array  # the token's position in its sequence; -1: the row is idle
    table_BM: jax.Array  # the row's page table


class PromptInputs(NamedTuple):
    """The prompts of one prefill pass (all int32)."""

    tokens_NT: jax.Array  # right-padded
    length_N: jax.Array
    first_N: jax.Array  # each prompt's first page; the others follow it


def fuse(params: Params, config: Qwen3Config) -> Weights:
    """The weights in the compute type, adapters merged, and matrices with the same input joined into one.

    Norm scales keep their type, since `_norm` computes in float32.
    """

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(config.dtype)

    # A decoding step is many small operations, and each join saves one or two of them per layer.
    def join(leaves: list[jax.Array]) -> jax.Array:
        return jnp.concatenate([cast(x) for x in leaves], axis=-1)

    def kernel(layer: Params) -> jax.Array:
        return merged_kernel(layer, config.lora_scale, config.dtype)

    blocks = params["blocks"]
    attention = blocks["attention"]
    qkv = [attention[name] for name in ("q_proj", "k_proj", "v_proj")]

    def repeated_scale(name: str, heads: int) -> jax.Array:
        """A norm's scale [layers, E] once per head, [layers, heads, E]."""
        return jnp.repeat(attention[name]["scale"][:, None], heads, axis=1)

    H = attention["q_proj"]["kernel"].shape[-1] // config.head_dim
    K = attention["k_proj"]["kernel"].shape[-1] // config.head_dim
    joined = dict(
        qkv=join([kernel(x) for x in qkv]),
        out=kernel(attention["o_proj"]),
        gate_up=join([kernel(blocks[name]) for name in ("gate_proj", "up_proj")]),
        down=kernel(blocks["down_proj"]),
        input_norm=blocks["input_norm"]["scale"],
        post_norm=blocks["post_norm"]["scale"],
    )
    if config.qk_norm:
        scales = [repeated_scale("q_norm", H), repeated_scale("k_norm", K)]
        joined["head_norm"] = jnp.concatenate(scales, axis=1)
    if config.attention_bias:
        joined["qkv_bias"] = join([x["bias"] for x in qkv])
    if config.output_bias:
        joined["out_bias"] = cast(attention["o_proj"]["bias"])
    # Tied models have no head of their own.
    tables = {name: cast(params[name]) for name in ("embed", "head") if name in params}
    return dict(tables, final_norm=params["final_norm"]["scale"], blocks=joined)


def decode_step(
    decoder: Decoder, weights: Weights, inputs: StepInputs, cache_XPWE: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Feeds each row one token: hidden_BD after the final norm, and the cache with the tokens in it.

    An idle row writes nothing to the cache, and its hidden state is undefined.
    """
    config = decoder.config
    pages = cache_XPWE.shape[0] // config.num_hidden_layers

    def paged(
        q_BHE: jax.Array, k_BKE: jax.Array, v_BKE: jax.Array, cache_XPWE: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return write_and_attend(
            q_BHE,
            k_BKE,
            v_BKE,
            cache_XPWE,
            inputs.table_BM,
            inputs.position_B,
            layer * pages,
            implementation=decoder.attention,
        )

    x_BD = _embed(decoder, weights, inputs.token_B)
    x_BD, cache_XPWE = _layers(decoder, weights, x_BD, inputs.position_B, cache_XPWE, paged)
    return _norm(x_BD, weights["final_norm"], config), cache_XPWE


def prefill_step(
    decoder: Decoder, weights: Weights, prompts: PromptInputs, cache_XPWE: jax.Array
) -> jax.Array:
    """The cache with the prompts' keys and values in it.

    In every layer, prompt n fills ceil(length_N[n] / P) pages from first_N[n] on. Its padding is not written.
    """
    tokens_NT, length_N, first_N = prompts
    X, P, W, E = cache_XPWE.shape
    N, T = tokens_NT.shape
    pages = X // decoder.config.num_hidden_layers
    t = jnp.arange(T, dtype=jnp.int32)
    # Padding gets an index beyond the cache, which the scatter drops.
    at_NT = jnp.where(t < length_N[:, None], first_N[:, None] * P + t, X * P)

    def fill(
        q_NTHE: jax.Array, k_NTKE: jax.Array, v_NTKE: jax.Array, cache_XPWE: jax.Array, layer: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        kv_NTWE = jnp.stack([k_NTKE, v_NTKE], axis=3).reshape(N, T, W, E)
        # Position by position: if whole pages were written, XLA for TPU would keep a second cache.
        flat = cache_XPWE.reshape(X * P, W, E).at[at_NT + layer * pages * P].set(kv_NTWE, mode="drop")
        return causal_attention(q_NTHE, k_NTKE, v_NTKE), flat.reshape(X, P, W, E)

    x_NTD = _embed(decoder, weights, tokens_NT)
    position_NT = jnp.broadcast_to(jnp.arange(T), (N, T))
    return _layers(decoder, weights, x_NTD, position_NT, cache_XPWE, fill)[1]


def local_logits(decoder: Decoder, weights: Weights, hidden_BD: jax.Array) -> tuple[jax.Array, str | None]:
    """float32 logits [B, V] of the ids on this device, padding ids at -inf, and the axis that splits V.

    The axis is None if every device has the whole vocabulary.
    """
    config = decoder.config
    z_BV = jnp.einsum("bd,vd->bv", hidden_BD, head_VD(weights), preferred_element_type=jnp.float32)
    V = z_BV.shape[1]
    split = decoder.axis if config.vocab_size != V else None
    if config.num_tokens is None:
        return z_BV, split
    first = 0 if split is None else lax.axis_index(split) * V
    return jnp.where(first + jnp.arange(V) < config.num_tokens, z_BV, -jnp.inf), split


def _layers(
    decoder: Decoder,
    weights: Weights,
    x: jax.Array,
    position: jax.Array,
    cache_XPWE: jax.Array,
    attend: Attend,
) -> tuple[jax.Array, jax.Array]:
    """All layers over activations [..., D]; `attend` writes keys and values to the cache and attends."""
    config = decoder.config
    axis = decoder.axis
    cos, sin = rope_angles(position, frequencies(config))

    # Kernels split along the axis give partial sums, once after attention and once after the MLP.
    def block(
        carry: tuple[jax.Array, jax.Array], scanned: tuple[Weights, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        x, cache_XPWE = carry
        w, layer = scanned
        q, k, v = _heads(w, config, _norm(x, w["input_norm"], config), cos, sin)
        out, cache_XPWE = attend(q, k, v, cache_XPWE, layer)
        out = out.reshape(*x.shape[:-1], -1)
        out = _summed(out @ w["out"], out.shape[-1], config.num_attention_heads * config.head_dim, axis)
        x = x + (out + w["out_bias"] if config.output_bias else out)
        gate, up = jnp.split(_norm(x, w["post_norm"], config) @ w["gate_up"], 2, axis=-1)
        down = (jax.nn.silu(gate) * up) @ w["down"]
        return (x + _summed(down, gate.shape[-1], config.intermediate_size, axis), cache_XPWE), None

    layers = (weights["blocks"], jnp.arange(config.num_hidden_layers))
    return lax.scan(block, (x, cache_XPWE), layers)[0]


def kv_heads(qkv: jax.Array, config: Qwen3Config) -> int:
    """Number of key-value heads on this device, given its columns of the joined q, k, v matrix."""
    queries = config.num_attention_heads
    keys = config.num_key_value_heads
    return qkv.shape[-1] // config.head_dim * keys // (queries + 2 * keys)


def _heads(
    w: Weights, config: Qwen3Config, x: jax.Array, cos: jax.Array, sin: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Rotated queries [..., H, E], rotated keys and values [..., K, E] of this device's heads."""
    qkv = x @ w["qkv"]
    if config.attention_bias:
        qkv = qkv + w["qkv_bias"]
    qkv = qkv.reshape(*qkv.shape[:-1], -1, config.head_dim)
    K = kv_heads(w["qkv"], config)
    H = qkv.shape[-2] - 2 * K
    # Queries and keys are normed and rotated together, to save operations.
    qk = qkv[..., : H + K, :]
    if config.qk_norm:
        qk = _norm(qk, w["head_norm"], config)
    qk = apply_rope(qk, cos, sin)
    return qk[..., :H, :], qk[..., H:, :], qkv[..., H + K :, :]


def _norm(x: jax.Array, scale: jax.Array, config: Qwen3Config) -> jax.Array:
    """RMSNorm as in qwen3.py: over the last axis, in float32."""
    y = x.astype(jnp.float32)
    y = y * lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + config.rms_norm_eps)
    return (y * scale.astype(jnp.float32)).astype(x.dtype)


def _embed(decoder: Decoder, weights: Weights, token: jax.Array) -> jax.Array:
    """Embeddings [..., D] of token ids [...], also where each device has a part of the vocabulary."""
    embed_VD = weights["embed"]
    axis = decoder.axis
    V = embed_VD.shape[0]
    if V == decoder.config.vocab_size:
        return embed_VD[token]
    assert axis is not None
    local = token - lax.axis_index(axis) * V
    mine = (local >= 0) & (local < V)  # the other devices add zeros
    return lax.psum(jnp.where(mine[..., None], embed_VD[jnp.clip(local, 0, V - 1)], 0), axis)


def _summed(x: jax.Array, here: int, whole: int, axis: str | None) -> jax.Array:
    """Adds up a product over the axis if each device has only `here` of the `whole` terms."""
    if here == whole:
        return x
    assert axis is not None
    return lax.psum(x, axis)
