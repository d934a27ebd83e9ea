"""The decoding engine: prompts prefilled once, then slots that are refilled from a queue of sequences.

Response token r of a row stands at position prompt_len + r of a paged store (pages.py), so rows share
their prompt's pages and attention costs what is live. Random numbers come from (uid, r) alone: a row's
tokens do not depend on its slot, its neighbours, when it started or the number of devices, beyond what
the compute type rounds. In one compiled program not even that; another batch size or another split of the
sums may round a bfloat16 logit to its other side, and a token with it.

Each shard of the rows is an engine of its own, with its queue, pages and slots, under `jax.shard_map`;
along the "tensor" axis its devices split heads, inner widths and the vocabulary.

    settings(model, mesh, ...)                             -> Decoding, all that is fixed
    generate(params, prompt_NP, ..., key, stops, *, how)   -> Rollout; pure
    make_generate(how, stops)                              -> the same, compiled; jit_generate: for a plan
    begin, decode, finish                                  the three parts of generate
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from rosd_jax.config import UserError
from rosd_jax.kernels.paged_attention import Implementation
from rosd_jax.models.decoder import Weights, decode_step, fuse, kv_heads, local_logits
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import decoder_specs, row_devices, row_sharding, tensor_specs
from rosd_jax.rollout import pages, prompts
from rosd_jax.rollout.pages import COUNT, LAST, ROW, TABLE, Rows, State
from rosd_jax.rollout.sampler import row_uniforms, sample
from rosd_jax.rollout.stops import Stops
from rosd_jax.types import DecodeStats, Params, Rollout

ROWS = ("data", "fsdp")  # the mesh axes that rows lie along
FEWEST = 8  # slots below which compaction gains nothing
LONG = 256  # tokens from which a smaller batch repays its compilation
# XLA for GPU copies a layer's weights out of their stack before it multiplies by them, three bytes moved for
# one, unless it may start the product at their place, which it can for cuBLAS's products alone.
GPU_OPTIONS = {"xla_gpu_enable_dynamic_slice_fusion": True, "xla_gpu_enable_triton_gemm": False}


@dataclass(frozen=True)
class Decoding:
    """What is fixed when the engine is compiled (hashable). `settings` explains the fields."""

    model: Qwen3Config
    mesh: Mesh | None
    max_new: int
    temperature: float
    top_p: float
    stop_ids: tuple[int, ...]
    slots: int | None
    page: int
    pool: int | None = None
    prompt_pages: int | None = None
    implementation: Implementation | None = None
    enough: int | None = None  # slots of a shard that suffice for all that wait; None: not known
    compact: bool = False

    @property
    def shards(self) -> int:
        """Engines that run side by side."""
        return 1 if self.mesh is None else row_devices(self.mesh)

    @property
    def axis(self) -> str | None:
        """The axis that heads and vocabulary are split along, under shard_map."""
        return None if self.mesh is None else "tensor"

    def sized(self, rows: int, prompt_pages: int, waiting: int) -> Decoding:
        """For a call of so many rows, of which a shard has at most `waiting` to decode."""
        most, _ = _most_slots_and_pages(self, rows // self.shards)
        return replace(self, prompt_pages=prompt_pages, enough=min(most, enough(waiting)))

    def room(self, prompts: int, longest: int, rows: int) -> tuple[int, int, int]:
        """Of a shard of so many rows: its pages for prompts and for responses, and its slots."""
        most_prompts = min(prompts, rows) * -(-longest // self.page)
        pinned = min(self.prompt_pages or most_prompts, most_prompts)
        slots, most_pool = _most_slots_and_pages(self, rows)
        return pinned, most_pool if self.pool is None else min(self.pool, most_pool), slots


def generate(
    params: Params,
    prompt_NP: jax.Array,
    prompt_len_N: jax.Array,
    prompt_of_B: jax.Array,
    uid_B: jax.Array,
    limit_B: jax.Array,
    key: jax.Array,
    stops: Stops | None = None,
    *,
    how: Decoding,
) -> Rollout:
    """Samples one response a row; row b answers prompt `prompt_of_B[b]`, R = how.max_new >= 1.

    prompt_NP [N, P] int32, right-padded, of lengths prompt_len_N >= 1. A row ends with its first
    token in `how.stop_ids`, or the first that completes a string of `stops` (kept as part of the response;
    sets finished), or unfinished after min(limit_B, max_new) tokens; a limit of 0 yields none. uid_B
    (int32) names each row's random stream.

    With a mesh, whose "tensor" axis must divide the key-value heads, rows lie along "data" and
    "fsdp". Raises UserError where B does not, ValueError where a sequence would not fit the pool.
    """
    given = params, prompt_NP, prompt_len_N, prompt_of_B, uid_B, limit_B, key, stops
    weights, rows, state = begin(*given, how=how)
    state = decode(weights, rows, state, how=how)
    return finish(state.out, state.stats)


def settings(
    model: Qwen3Config,
    mesh: Mesh | None,
    *,
    max_new: int,
    temperature: float,
    top_p: float,
    stop_ids: tuple[int, ...],
    slots: int | None = None,
    page: int | None = None,
    pool: int | None = None,
    compact: bool = True,
    implementation: Implementation | None = None,
) -> Decoding:
    """What is fixed of an engine before it sees any prompts. `sample` describes temperature and top_p.

    slots: rows that decode together, over all shards; None: all. page: positions a page; None:
    `pages.page_length`. pool: pages of a shard for responses; None: enough for its slots at full length.
    With fewer, sequences may be put back and decoded again from their start. compact: once half of a
    shard's slots are empty for good, the rest goes on in the next power of two; each number of slots is
    compiled, so runs shorter than LONG do without.
    """
    return Decoding(
        model=model,
        mesh=mesh,
        max_new=max_new,
        temperature=temperature,
        top_p=top_p,
        stop_ids=stop_ids,
        slots=slots,
        page=page or pages.page_length(max_new),
        pool=pool,
        implementation=implementation,
        compact=compact and max_new >= LONG,
    )


def make_generate(how: Decoding, stops: Stops | None = None) -> Callable[..., Rollout]:
    """`generate`, compiled, of (params, prompt_NP, prompt_len_N, prompt_of_B, uid_B, limit_B, key).

    Build it once and keep it: it is traced once for each combination of shapes, of the room that the
    prompts need (powers of two) and of the number of slots that suffice for the rows with a limit above 0.
    Params keep the sharding they come with; the rollout's rows lie along the mesh's "data" and "fsdp" axes.
    """
    compiled = jit_generate(how.mesh)

    def run(params, prompt_NP, prompt_len_N, prompt_of_B, uid_B, limit_B, key) -> Rollout:
        _check_rows(len(prompt_of_B), how)
        waiting = int(np.sum(np.reshape(np.asarray(limit_B), (how.shards, -1)) > 0, axis=1).max())
        needed = prompts.room(prompt_len_N, prompt_of_B, limit_B, how.page, how.shards)
        given = params, prompt_NP, prompt_len_N, prompt_of_B, uid_B, limit_B, key, stops
        return compiled(*given, how=how.sized(len(prompt_of_B), needed, waiting))

    return run


def jit_generate(mesh: Mesh | None) -> Any:
    """The engine under jit, of (params, prompt_NP, ..., key, stops, how=)."""
    out = None if mesh is None else row_sharding(mesh)
    on = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    options = GPU_OPTIONS if on == "gpu" else None
    return jax.jit(generate, static_argnames="how", out_shardings=out, compiler_options=options)


def enough(left: int) -> int:
    """Slots for that many sequences: a power of two, so that few numbers of them are compiled."""
    return max(FEWEST, 1 << (left - 1).bit_length())


def begin(
    params: Params,
    prompt_NP: jax.Array,
    prompt_len_N: jax.Array,
    prompt_of_B: jax.Array,
    uid_B: jax.Array,
    limit_B: jax.Array,
    key: jax.Array,
    stops: Stops | None = None,
    *,
    how: Decoding,
) -> tuple[Weights, Rows, State]:
    """Weights as decoding wants them, and every shard's prompts in its store: what `decode` takes.

    Leaves of rows and state have a leading axis of shards.
    """
    _check_rows(prompt_of_B.shape[0], how)
    # Cast before the shards gather their weights, so that half as many bytes travel.
    cast = lambda path, x: x if "scale" in jax.tree_util.keystr(path) else x.astype(how.model.dtype)
    params = jax.tree_util.tree_map_with_path(cast, params)
    by_shard = [jnp.reshape(x, (how.shards, -1)) for x in (prompt_of_B, uid_B, limit_B)]
    run = partial(_begin_shard, how=how)
    if how.mesh is not None:
        whole = tensor_specs(params, how.mesh), P(), P(), P(), P()
        run = jax.shard_map(
            run, mesh=how.mesh, in_specs=(*whole, P(ROWS), P(ROWS), P(ROWS)),
            out_specs=(decoder_specs(how.model, how.mesh), P(ROWS), _state_specs()), check_vma=False,
        )  # fmt: skip
    return run(params, prompt_NP, prompt_len_N, key, stops, *by_shard)


def decode(weights: Weights, rows: Rows, state: State, *, how: Decoding) -> State:
    """Decodes until nothing is left, each shard by itself; under jit, donate the state."""
    run = partial(_decode_shard, how=how)
    if how.mesh is not None:
        specs = decoder_specs(how.model, how.mesh), P(ROWS), _state_specs()
        run = jax.shard_map(run, mesh=how.mesh, in_specs=specs, out_specs=_state_specs(), check_vma=False)
    return run(weights, rows, state)


def finish(out: Rollout, stats: DecodeStats) -> Rollout:
    """The rows of all shards in their order; a sequence that started anew leaves nothing of its past."""
    by_row = lambda x: x.reshape(-1, *x.shape[2:])
    tokens_BR, length_B, logp_BR, finished_B = map(
        by_row, (out.tokens_BR, out.length_B, out.logp_BR, out.finished_B)
    )
    inside_BR = jnp.arange(tokens_BR.shape[1]) < length_B[:, None]
    tokens_BR, logp_BR = jnp.where(inside_BR, tokens_BR, 0), jnp.where(inside_BR, logp_BR, 0.0)
    return Rollout(tokens_BR, length_B, logp_BR, finished_B, stats)


def _begin_shard(params, prompt_NP, prompt_len_N, key, stops, prompt_of_1B, uid_1B, limit_1B, *, how):
    """`begin` on one shard: its leaves have a leading axis of length 1."""
    prompt_of_B, uid_B, limit_B = prompt_of_1B[0], uid_1B[0], limit_1B[0]
    limit_B = jnp.minimum(limit_B, how.max_new)
    (N, T), B, weights = prompt_NP.shape, len(uid_B), fuse(params, how.model)
    wanted_N = jnp.zeros(N, bool).at[prompt_of_B].max(limit_B > 0)
    layout = prompts.lay_out(prompt_len_N, wanted_N, how.page)
    first_N = jnp.zeros(N, jnp.int32).at[layout.order_N].set(layout.first_N)
    start_B = prompt_len_N[prompt_of_B]
    given_B = prompt_NP[prompt_of_B, start_B - 1], start_B, first_N[prompt_of_B], limit_B
    if how.temperature:
        u_BR = row_uniforms(key, uid_B, how.max_new)
    else:
        u_BR = jnp.zeros((B, how.max_new), jnp.float32)  # greedy decoding draws nothing
    rows = Rows(jnp.stack(given_B, axis=1), u_BR, stops)
    pinned, pool, slots = how.room(N, T, B)
    store = _empty_store(how, weights, pinned + pool)
    store = prompts.fill(weights, how.model, prompt_NP, layout, store, how.axis)
    # Longer prompts come in many lengths (`bucket_length`), and the loop is to be compiled for few.
    longest = T if T <= 1024 else 1 << (T - 1).bit_length()
    width = pages.table_width(how.page, longest, how.max_new)
    state = pages.empty(store, rows, slots, pinned, pool, width)
    if _all_seated(how, B):
        state = pages.seat(state, given_B, how.model.num_hidden_layers)
    return weights, *jax.tree.map(lambda x: x[None], (rows, state))


def _most_slots_and_pages(how: Decoding, B: int) -> tuple[int, int]:
    """Slots of a shard with B rows, and the pages for responses that they may fill."""
    slots = min(B, -(-how.slots // how.shards)) if how.slots else B
    return slots, slots * pages.most_own(how.page, how.max_new)


def _all_seated(how: Decoding, B: int) -> bool:
    """Whether a shard's B rows have slots and pages from the first step on."""
    slots, most_pool = _most_slots_and_pages(how, B)
    return slots == B and (how.pool is None or how.pool >= most_pool)


def _empty_store(how: Decoding, weights: Weights, pages_a_layer: int) -> jax.Array:
    model = how.model
    width = 2 * kv_heads(weights["blocks"]["qkv"], model)
    shape = model.num_hidden_layers * pages_a_layer, how.page, width, model.head_dim
    return jnp.zeros(shape, model.dtype)


def _decode_shard(weights, rows, state, *, how: Decoding):
    """`decode` on one shard, in ever fewer slots."""
    rows, state = jax.tree.map(lambda x: x[0], (rows, state))
    first = how.enough or len(state.slots_SC)
    counts = [first, *(_counts(first) if how.compact else [])]
    for count, fewer in zip(counts, [*counts[1:], 0], strict=True):
        if count < len(state.slots_SC):
            state = state._replace(slots_SC=pages.compact(state.slots_SC, len(state.queue_N), count))
        more = lambda state, fewer=fewer: _left(state) > fewer
        state = lax.while_loop(more, partial(_step, weights, rows, how=how), state)
    return jax.tree.map(lambda x: x[None], state)


def _counts(slots: int) -> list[int]:
    """What they shrink to: the powers of two below, down to FEWEST."""
    if slots <= FEWEST:
        return []
    fewer = enough(-(-slots // 2))
    return [fewer, *_counts(fewer)]


def _left(state: State) -> jax.Array:
    """Sequences that wait or sit in a slot."""
    return state.tail - state.head + jnp.sum(pages.live(state), dtype=jnp.int32)


def _step(weights: Weights, rows: Rows, state: State, *, how: Decoding) -> State:
    """One token for every live slot."""
    seated = _all_seated(how, len(rows.given_N4))
    if not seated:
        state = pages.reserve(pages.refill(state, rows, how.model.num_hidden_layers))
    slots_SC = state.slots_SC
    hidden_SD, store = decode_step(
        weights, how.model, slots_SC[:, LAST], pages.position(state), state.store, slots_SC[:, TABLE:],
        how.axis, how.implementation,
    )  # fmt: skip
    logits_SV, axis = local_logits(weights, how.model, hidden_SD, how.axis)
    u_S = rows.u_NR.at[slots_SC[:, ROW], slots_SC[:, COUNT]].get(mode="clip")
    token_S, logp_S = sample(logits_SV, u_S, temperature=how.temperature, top_p=how.top_p, axis=axis)
    state, ended_S = pages.record(state._replace(store=store), token_S, logp_S, how.stop_ids, rows.stops)
    return (pages.leave_for_good if seated else pages.leave)(state, ended_S)


def _state_specs() -> Any:
    """The store is split by heads along the tensor axis; everything lies on its shard."""
    specs = {name: P(ROWS) for name in State._fields} | dict(store=P(ROWS, None, None, "tensor", None))
    return cast(Any, State)(**specs)


def _check_rows(rows: int, how: Decoding) -> None:
    if rows % how.shards:
        raise UserError(
            f"batch rows are {rows}; they must be a multiple of mesh.data x mesh.fsdp = {how.shards}, "
            "so change the batch or the mesh"
        )
    needed = pages.most_own(how.page, how.max_new)
    if how.pool is not None and how.pool < needed:
        raise ValueError(f"pool is {how.pool} pages; one sequence alone may need {needed}")
