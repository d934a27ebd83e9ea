"""The decoding loop: every prompt prefilled once, then one `lax.while_loop` over all rows.

Prompts are right-padded, and response token r of a row stands at position prompt_len + r: keys and
values of the response overwrite those of the padding, so a row has no gap. Random keys come from
(uid, r) alone: a row's tokens do not depend on its slot, its neighbours or the number of devices.

    generate(params, prompt_NP, ..., key, *, model, ...)   -> Rollout
    make_generate(model, mesh, ...)                        -> the same, compiled once a shape
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rosd_jax.config import UserError
from rosd_jax.models.qwen3 import Cache, Qwen3Config, decode_step, logits, prefill
from rosd_jax.models.sharding import row_sharding
from rosd_jax.rollout.sampler import row_keys, sample
from rosd_jax.types import Params, Rollout

ROWS = ("data", "fsdp")  # the mesh axes that rows lie along


class _State(NamedTuple):
    step: jax.Array  # int32: tokens emitted by the rows still alive
    cache: Cache
    last_B: jax.Array  # int32: the newest token
    rollout: Rollout


def generate(
    params: Params,
    prompt_NP: jax.Array,
    prompt_len_N: jax.Array,
    prompt_of_B: jax.Array,
    uid_B: jax.Array,
    limit_B: jax.Array,
    key: jax.Array,
    *,
    model: Qwen3Config,
    max_new: int,
    temperature: float,
    top_p: float,
    stop_ids: tuple[int, ...],
    mesh: Mesh | None = None,
) -> Rollout:
    """Samples one response a row; row b answers prompt `prompt_of_B[b]`, R = max_new >= 1.

    prompt_NP [N, P] int32, right-padded, of lengths prompt_len_N >= 1. A row ends with its first
    token in `stop_ids` (kept as part of the response; sets finished), or unfinished after
    min(limit_B, max_new) tokens; a limit of 0 yields none. uid_B (int32) names each row's random
    stream. `sample` describes temperature and top_p.

    With a mesh, whose "tensor" axis must divide the key-value heads, rows lie along "data" and
    "fsdp", and so do prompts where N divides by these. Raises UserError where B does not.
    """
    _check_rows(prompt_of_B.shape[0], mesh)
    prompt_of_B, uid_B, limit_B = (_lay(x, mesh, ROWS) for x in (prompt_of_B, uid_B, limit_B))
    start_B = prompt_len_N[prompt_of_B]

    def alive(state: _State) -> jax.Array:
        return ~state.rollout.finished_B & (state.step < limit_B)

    def emit(state: _State, hidden_BD: jax.Array) -> _State:
        key_B = row_keys(key, uid_B, jnp.full_like(uid_B, state.step))
        logits_BV = logits(params, model, hidden_BD)
        token_B, logp_B = sample(logits_BV, key_B, temperature=temperature, top_p=top_p)
        rollout = _append(state.rollout, state.step, alive(state), token_B, logp_B, stop_ids)
        return _State(state.step + 1, state.cache, token_B, rollout)

    def advance(state: _State) -> _State:
        position_B = start_B + state.step - 1
        hidden_BD, cache = decode_step(params, model, state.cache, state.last_B, position_B)
        return emit(state._replace(cache=cache), hidden_BD)

    hidden_BD, cache = _prefill_rows(params, model, prompt_NP, start_B, prompt_of_B, max_new, mesh)
    state = _State(jnp.int32(0), cache, jnp.zeros_like(uid_B), _empty(uid_B, max_new, mesh))
    more = lambda state: (state.step < max_new) & jnp.any(alive(state))
    return jax.lax.while_loop(more, advance, emit(state, hidden_BD)).rollout


def make_generate(
    model: Qwen3Config,
    mesh: Mesh | None,
    *,
    max_new: int,
    temperature: float,
    top_p: float,
    stop_ids: tuple[int, ...],
) -> Callable[..., Rollout]:
    """`generate` under jit, of (params, prompt_NP, prompt_len_N, prompt_of_B, uid_B, limit_B, key).

    Build it once and keep it: it is traced once for each combination of shapes. Params keep the
    sharding they come with; the rollout's rows lie along the mesh's "data" and "fsdp" axes.
    """
    fixed = partial(
        generate,
        model=model,
        mesh=mesh,
        max_new=max_new,
        temperature=temperature,
        top_p=top_p,
        stop_ids=stop_ids,
    )
    return jax.jit(fixed, out_shardings=None if mesh is None else row_sharding(mesh))


def _prefill_rows(
    params: Params,
    model: Qwen3Config,
    prompt_NP: jax.Array,
    start_B: jax.Array,
    prompt_of_B: jax.Array,
    max_new: int,
    mesh: Mesh | None,
) -> tuple[jax.Array, Cache]:
    """Each row's hidden state [B, D] at its last prompt token, and its cache with room for more."""
    N, P = prompt_NP.shape
    prompts = None if N % _row_devices(mesh) else ROWS  # None: every device prefills all prompts
    hidden_NPD, cache = prefill(params, model, _lay(prompt_NP, mesh, prompts), P)
    hidden_BD = _lay(hidden_NPD, mesh, prompts)[prompt_of_B, start_B - 1]
    # The last token of a response is never fed back, so max_new - 1 more positions suffice.
    room = ((0, 0), (0, 0), (0, max_new - 1), (0, 0), (0, 0))

    def to_rows(x_LNPKE: jax.Array) -> jax.Array:
        x_LBPKE = _lay(x_LNPKE, mesh, None, prompts, None, "tensor")[:, prompt_of_B]
        return _lay(jnp.pad(x_LBPKE, room), mesh, None, ROWS, None, "tensor")

    return _lay(hidden_BD, mesh, ROWS), jax.tree.map(to_rows, cache)


def _empty(uid_B: jax.Array, max_new: int, mesh: Mesh | None) -> Rollout:
    zeros = lambda dtype, *shape: _lay(jnp.zeros((uid_B.shape[0], *shape), dtype), mesh, ROWS)
    return Rollout(
        tokens_BR=zeros(jnp.int32, max_new),
        length_B=zeros(jnp.int32),
        logp_BR=zeros(jnp.float32, max_new),
        finished_B=zeros(jnp.bool),
    )


def _append(
    rollout: Rollout,
    step: jax.Array,
    alive_B: jax.Array,
    token_B: jax.Array,
    logp_B: jax.Array,
    stop_ids: tuple[int, ...],
) -> Rollout:
    """The rollout with one more token on the rows still alive."""
    stop_B = jnp.any(token_B[:, None] == jnp.array(stop_ids, jnp.int32), axis=1)
    return Rollout(
        tokens_BR=rollout.tokens_BR.at[:, step].set(jnp.where(alive_B, token_B, 0)),
        length_B=rollout.length_B + alive_B.astype(jnp.int32),
        logp_BR=rollout.logp_BR.at[:, step].set(jnp.where(alive_B, logp_B, 0.0)),
        finished_B=rollout.finished_B | (alive_B & stop_B),
    )


def _check_rows(rows: int, mesh: Mesh | None) -> None:
    devices = _row_devices(mesh)
    if rows % devices:
        raise UserError(
            f"batch rows are {rows}; they must be a multiple of mesh.data x mesh.fsdp = {devices}, "
            "so change the batch or the mesh"
        )


def _row_devices(mesh: Mesh | None) -> int:
    return 1 if mesh is None else mesh.shape[ROWS[0]] * mesh.shape[ROWS[1]]


def _lay(x: jax.Array, mesh: Mesh | None, *spec: str | tuple[str, ...] | None) -> jax.Array:
    """Constrains the leading dimensions of an array to lie along the mesh axes of `spec`."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))
