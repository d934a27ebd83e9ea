"""The log-prob of given tokens from hidden states and a head, without a [rows, vocabulary] array.

    input    hidden states [N, D], a head [V, D], a token for each row, and which rows are asked for
    output   logp_N, differentiable in hidden states and head
    correct  when value and gradient are those of log_softmax(hidden @ head.T / temperature) at the tokens

Rows that are asked for are brought to the front, and a loop takes them `chunk` at a time. The backward pass
makes the logits of each chunk again and adds up the head's gradient in float32. Both passes are split over
a mesh as the distillation loss is (kernels/topk_jsd/sharded.py): if the vocabulary is split, each device has
its part of the head, and only a few numbers a row and the hidden states' gradient are exchanged.

Dimensions: N rows, C rows of one chunk, M rows padded to whole chunks, D model width, V vocabulary (a
device's part of it, if it is split).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from rosd_jax.kernels.topk_jsd import Sharding


@dataclass(frozen=True)
class Options:
    """What `token_logp` is compiled for. Hashable."""

    chunk: int  # rows whose logits are in memory at the same time, on each device
    temperature: float = 1.0
    num_tokens: int | None = None  # ids from here on are padding rows of the head
    sharding: Sharding | None = None  # None: one device

    @property
    def row_axes(self) -> tuple[str, ...]:
        """The axes of the mesh that split the rows."""
        return self.sharding.rows if self.sharding else ()

    @property
    def vocab_axes(self) -> tuple[str, ...]:
        """The axis that splits the vocabulary, if there is one."""
        return self.sharding.vocab_axes if self.sharding else ()


def token_logp(
    options: Options, hidden_ND: jax.Array, head_VD: jax.Array, tokens_N: jax.Array, asked_N: jax.Array
) -> jax.Array:
    """The log-prob of each row's token: float32 [N] (float64 for float64), 0 for rows not asked for.

    tokens_N: int32. asked_N: bool; other rows are not computed, and may contain anything. First derivatives
    in reverse mode only.
    """
    return cast(jax.Array, _token_logp(options, hidden_ND, head_VD, tokens_N, asked_N))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logp(options, hidden_ND, head_VD, tokens_N, asked_N):
    return _forward(options, hidden_ND, head_VD, tokens_N, asked_N)[0]


def _forward(options, hidden_ND, head_VD, tokens_N, asked_N):
    by_rows = PartitionSpec(options.row_axes)
    run = _over_mesh(options, _log_probs, (by_rows, by_rows), head_VD, (hidden_ND, tokens_N, asked_N))
    logp_N, log_sum_N = (x[: len(tokens_N)] for x in run)
    return logp_N, (hidden_ND, head_VD, tokens_N, asked_N, log_sum_N)


def _backward(options, kept, cotangent_N):
    hidden_ND, head_VD, tokens_N, asked_N, log_sum_N = kept
    out = (PartitionSpec(options.row_axes), PartitionSpec(options.vocab_axes))
    rows = (hidden_ND, tokens_N, asked_N, log_sum_N, cotangent_N)
    hidden_grad_ND, head_grad_VD = _over_mesh(options, _gradients, out, head_VD, rows)
    return hidden_grad_ND[: len(tokens_N)], head_grad_VD.astype(head_VD.dtype), None, None


_token_logp.defvjp(_forward, _backward)


def _over_mesh(options: Options, function: Callable, out: Any, head_VD: jax.Array, rows: Any) -> Any:
    """function(options, head_VD, *rows) on one device, or with its operands split over the mesh.

    out: how its results are split. Rows are padded to a multiple of the devices that split them. Nothing
    differentiates through it, so replication need not be tracked (check_vma=False).
    """
    sharding = options.sharding
    if sharding is None:
        return function(options, head_VD, *rows)
    spare = -len(rows[0]) % sharding.row_devices
    by_rows = PartitionSpec(options.row_axes)
    run = jax.shard_map(
        partial(function, options),
        mesh=sharding.mesh,
        in_specs=(PartitionSpec(options.vocab_axes), *(by_rows for _ in rows)),
        out_specs=out,
        check_vma=False,
    )
    return run(head_VD, *(jnp.pad(x, ((0, spare), *((0, 0),) * (x.ndim - 1))) for x in rows))


# ---- on one device -------------------------------------------------------------------------------


def _log_probs(options, head_VD, hidden_ND, tokens_N, asked_N):
    """Log-probs, and the logarithms of the sums that normalise them: [N] each."""

    def trip(ids_C, live_C, logp_N, log_sum_N):
        scores_CV, ids_V = _scores(options, _pick(hidden_ND, ids_C, live_C), head_VD)
        peak_C = _reduce(lax.pmax, options.vocab_axes, jnp.max(scores_CV, axis=-1))
        exp_C = jnp.sum(jnp.exp(scores_CV - peak_C[:, None]), axis=-1)
        is_token_CV = ids_V == _take(tokens_N, ids_C)[:, None]
        score_C = jnp.sum(jnp.where(is_token_CV, scores_CV, 0), axis=-1)  # 0 on shards without the token
        exp_C, score_C = _reduce(lax.psum, options.vocab_axes, (exp_C, score_C))
        log_sum_C = peak_C + jnp.log(exp_C)
        logp_C = jnp.where(live_C, score_C - log_sum_C, 0)
        return _put(logp_N, ids_C, logp_C), _put(log_sum_N, ids_C, log_sum_C)

    zero_N = jnp.zeros(len(tokens_N), _wide(hidden_ND))
    return _each_chunk(options, asked_N, trip, (zero_N, zero_N))


def _gradients(options, head_VD, hidden_ND, tokens_N, asked_N, log_sum_N, cotangent_N):
    """The gradients of sum(cotangent x logp) in the hidden states [N, D] and in the head [V, D]."""

    def trip(ids_C, live_C, hidden_grad_ND, head_grad_VD):
        hidden_CD = _pick(hidden_ND, ids_C, live_C)
        scores_CV, ids_V = _scores(options, hidden_CD, head_VD)
        p_CV = jnp.exp(scores_CV - _take(log_sum_N, ids_C)[:, None])
        is_token_CV = ids_V == _take(tokens_N, ids_C)[:, None]
        scale_C = jnp.where(live_C, _take(cotangent_N, ids_C), 0) / options.temperature
        # The dtype of the head, so that both matmuls have operands of one dtype, as in the distillation loss.
        slope_CV = (scale_C[:, None] * (jnp.where(is_token_CV, 1.0, 0.0) - p_CV)).astype(head_VD.dtype)
        hidden_grad_CD = _reduce(lax.psum, options.vocab_axes, _matmul(slope_CV, head_VD, (1, 0)))
        hidden_grad_ND = _put(hidden_grad_ND, ids_C, hidden_grad_CD.astype(hidden_ND.dtype))
        return hidden_grad_ND, head_grad_VD + _matmul(slope_CV, hidden_CD, (0, 0))

    start = (jnp.zeros_like(hidden_ND), jnp.zeros(head_VD.shape, _wide(hidden_ND)))
    hidden_grad_ND, head_grad_VD = _each_chunk(options, asked_N, trip, start)
    return hidden_grad_ND, _reduce(lax.psum, options.row_axes, head_grad_VD)


def _each_chunk(options: Options, asked_N: jax.Array, trip: Callable, start: tuple[Any, Any]) -> Any:
    """What is left of `start` after trip(ids_C, live_C, *carry) of every chunk of the rows asked for."""
    n_rows = len(asked_N)
    size = min(options.chunk, n_rows)
    n_asked = jnp.sum(asked_N, dtype=jnp.int32)
    # Stable, so that the rows of a chunk are near each other in memory. Padding ids lie past the last row:
    # reads of them are clipped, and writes dropped.
    order_N = jnp.argsort(~asked_N, stable=True).astype(jnp.int32)
    order_M = jnp.append(order_N, n_rows + jnp.arange(-n_rows % size, dtype=jnp.int32))

    def body(i, carry):
        ids_C = lax.dynamic_slice_in_dim(order_M, i * size, size)
        live_C = i * size + jnp.arange(size, dtype=jnp.int32) < n_asked
        return trip(ids_C, live_C, *carry)

    return lax.fori_loop(jnp.int32(0), (n_asked + size - 1) // size, body, start)


def _scores(options: Options, hidden_CD: jax.Array, head_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits over temperature, -inf for padding rows of the head; and the ids [V] of the tokens."""
    ids_V = jnp.arange(len(head_VD), dtype=jnp.int32)
    for axis in options.vocab_axes:
        ids_V = ids_V + lax.axis_index(axis) * ids_V.size
    scores_CV = _matmul(hidden_CD, head_VD, (1, 1)) / options.temperature
    if options.num_tokens is not None:
        scores_CV = jnp.where(ids_V < options.num_tokens, scores_CV, -jnp.inf)
    return scores_CV, ids_V


def _reduce(reduce: Callable, axes: tuple[str, ...], x: Any) -> Any:
    return reduce(x, axes) if axes else x


def _take(x_N: jax.Array, ids_C: jax.Array) -> jax.Array:
    return x_N.at[ids_C].get(mode="clip")


def _pick(hidden_ND: jax.Array, ids_C: jax.Array, live_C: jax.Array) -> jax.Array:
    # A row that is not asked for may be NaN, and 0 x NaN would spoil the head's gradient.
    return jnp.where(live_C[:, None], _take(hidden_ND, ids_C), 0)


def _put(all_N: jax.Array, ids_C: jax.Array, some_C: jax.Array) -> jax.Array:
    return all_N.at[ids_C].set(some_C, mode="drop", unique_indices=True)


def _matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Contracts one axis of each; accumulates and returns float32 (float64 for float64)."""
    # The default precision of an accelerator would round float32 operands to 10 bits or fewer.
    precision = None if a.dtype == jnp.bfloat16 else lax.Precision.HIGHEST
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=_wide(a))


def _wide(x: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
