"""The compiled program: prompts prefilled once, then slots that are refilled from a queue of sequences.

Response token r of a row is at position prompt_len + r of a paged KV cache, so rows share their prompt's
pages and attention costs what is live. Random numbers come from (uid, r) alone: a row's tokens do not depend
on its slot, its neighbours, when it was admitted or the number of devices, beyond what the compute type
rounds. Within one compiled program, tokens are identical; another batch size or another split of the sums may
round a bfloat16 logit the other way, and change a token with it.

Each shard of the rows is an engine of its own, with its queue, pages and slots, under `jax.shard_map`;
along the "tensor" axis its devices split heads, inner widths and the vocabulary.

    generate(params, batch, key, stops, spec=)    -> rollout, on the devices; pure
    begin, decode, finish                            its three parts
    decoding_weights, fill_cache                     the two parts of `begin`
    compact, advance                                 `decode` in pieces, between which the host may stop

Dimensions: B rows (within a shard: its own), N prompts, T tokens of a prompt (padded), R tokens of a
response, S slots, C packed columns of a slot, M pages of a table, F places of the stack of free pages, D
model width, V ids; of the cache X pages of all layers, P positions of a page, W heads of keys and values, E
head width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from rosd_jax.kernels.paged_attention import Implementation
from rosd_jax.models.decoder import Decoder, StepInputs, Weights, decode_step, fuse, kv_heads, local_logits
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import ROW_AXES, decoder_specs, row_devices, tensor_specs
from rosd_jax.rollout import scheduler
from rosd_jax.rollout.batching import SHORT, Batch
from rosd_jax.rollout.limits import Limits, own_pages, table_pages
from rosd_jax.rollout.prefill import lay_out, prefill
from rosd_jax.rollout.sampler import Sampling, row_uniforms, sample
from rosd_jax.rollout.scheduler import Sequences, Start, State
from rosd_jax.rollout.slots import Slots
from rosd_jax.rollout.stops import Stops
from rosd_jax.types import DeviceRollout, Params

FEWEST = 8  # slots below which compaction gains nothing
WHOLE, BY_ROW = PartitionSpec(), PartitionSpec(ROW_AXES)


class Capacity(NamedTuple):
    """What a shard has."""

    prompt_pages: int
    response_pages: int
    slots: int


@dataclass(frozen=True)
class DecodeSpec:
    """What is fixed when a call is compiled (hashable)."""

    model: Qwen3Config
    mesh: Mesh | None
    limits: Limits
    sampling: Sampling
    attention: Implementation | None = None  # of a decoding step; None: the best for the device
    prompt_pages: int | None = None  # a shard's pages for prompts; None: for all at full length
    first_slots: int | None = None  # slots that suffice for all that wait on a shard; None: not known
    compact: bool = False  # whether the loop goes on in fewer slots once half of them are empty for good

    @property
    def shards(self) -> int:
        """Engines that run next to each other, one for each shard of the rows."""
        return 1 if self.mesh is None else row_devices(self.mesh)

    @property
    def decoder(self) -> Decoder:
        """How each device runs the model."""
        return Decoder(self.model, None if self.mesh is None else "tensor", self.attention)

    def slots(self, rows: int) -> int:
        """Slots of a shard with that many rows."""
        slots = self.limits.slots
        return rows if slots is None else min(rows, -(-slots // self.shards))

    def most_response_pages(self, rows: int) -> int:
        """Pages for responses that a shard's slots may fill."""
        return self.slots(rows) * own_pages(self.limits.page, self.limits.max_new)

    def capacity(self, prompts: int, longest: int, rows: int) -> Capacity:
        """What a shard has. prompts: distinct ones of the call; longest: their tokens; rows: of the shard."""
        most_prompts = min(prompts, rows) * -(-longest // self.limits.page)
        most_responses = self.most_response_pages(rows)
        given = self.limits.response_pages
        return Capacity(
            prompt_pages=min(self.prompt_pages or most_prompts, most_prompts),
            response_pages=most_responses if given is None else min(given, most_responses),
            slots=self.slots(rows),
        )

    def admits_all(self, rows: int) -> bool:
        """Whether a shard's rows have slots and pages from the first step on."""
        given = self.limits.response_pages
        return self.slots(rows) == rows and (given is None or given >= self.most_response_pages(rows))

    def slot_counts(self, slots: int) -> list[int]:
        """The numbers of slots that a shard decodes in, one after the other, starting from `slots`."""
        first = self.first_slots or slots
        return [first, *(halvings(first) if self.compact else [])]


def generate(
    params: Params, batch: Batch[jax.Array], key: jax.Array, stops: Stops | None = None, *, spec: DecodeSpec
) -> DeviceRollout:
    """Samples one response a row; row b answers prompt `prompt_of_B[b]`, R = limits.max_new >= 1.

    A row ends with its first token in `sampling.stop_ids`, or the first that completes a string of `stops`
    (kept as part of the response; sets finished), or unfinished after min(limit_B, max_new) tokens; a limit
    of 0 yields none. uid_B names each row's random stream.

    With a mesh, whose "tensor" axis must divide the key-value heads, rows lie along "data" and "fsdp", which
    must divide B.
    """
    weights, sequences, state = begin(params, batch, key, stops, spec=spec)
    return finish(decode(weights, sequences, state, spec=spec))


def begin(
    params: Params, batch: Batch[jax.Array], key: jax.Array, stops: Stops | None = None, *, spec: DecodeSpec
) -> tuple[Weights, Sequences, State]:
    """Weights as decoding wants them, and every shard's prompts in its cache: what `decode` takes.

    Leaves of sequences and state have a leading axis of shards.
    """
    weights = decoding_weights(params, model=spec.model, mesh=spec.mesh)
    return weights, *fill_cache(weights, batch, key, stops, spec=spec)


def decoding_weights(params: Params, *, model: Qwen3Config, mesh: Mesh | None) -> Weights:
    """The weights as decoding wants them: in the compute type, joined, whole along all axes but "tensor"."""

    # Cast before the shards gather their weights, so that half as many bytes travel. Norms stay float32, and
    # so do adapters, whose product is added to the kernel in float32.
    def cast_kernel(path, x):
        name = jax.tree_util.keystr(path)
        return x if "scale" in name or "lora_" in name else x.astype(model.dtype)

    params = jax.tree_util.tree_map_with_path(cast_kernel, params)
    run = partial(fuse, config=model)
    if mesh is not None:
        run = jax.shard_map(
            run,
            mesh=mesh,
            in_specs=(tensor_specs(params, mesh),),
            out_specs=decoder_specs(model, mesh),
            check_vma=False,  # nothing differentiates through it, so replication need not be tracked
        )
    return run(params)


def fill_cache(
    weights: Weights, batch: Batch[jax.Array], key: jax.Array, stops: Stops | None = None, *, spec: DecodeSpec
) -> tuple[Sequences, State]:
    """Every shard's prompts in its cache, and the sequences that it is to decode."""

    def by_shard(x_B):
        return jnp.reshape(x_B, (spec.shards, -1))

    batch = batch._replace(
        prompt_of_B=by_shard(batch.prompt_of_B),
        uid_B=by_shard(batch.uid_B),
        limit_B=by_shard(batch.limit_B),
    )
    run = partial(_fill_shard, spec=spec)
    if spec.mesh is not None:
        specs = cast(Any, Batch)(WHOLE, WHOLE, BY_ROW, BY_ROW, BY_ROW)
        run = jax.shard_map(
            run,
            mesh=spec.mesh,
            in_specs=(decoder_specs(spec.model, spec.mesh), specs, WHOLE, WHOLE),
            out_specs=(BY_ROW, state_specs()),
            check_vma=False,
        )
    return run(weights, batch, key, stops)


def decode(weights: Weights, sequences: Sequences, state: State, *, spec: DecodeSpec) -> State:
    """Decodes until nothing is left, each shard by itself; under jit, donate the state."""
    run = partial(_decode_shard, spec=spec)
    if spec.mesh is not None:
        specs = decoder_specs(spec.model, spec.mesh), BY_ROW, state_specs()
        run = jax.shard_map(run, mesh=spec.mesh, in_specs=specs, out_specs=state_specs(), check_vma=False)
    return run(weights, sequences, state)


def compact(slots: Slots, *, count: int, sequences: int) -> Slots:
    """The slots of every shard in fewer ones, which must suffice for what is left there.

    sequences: rows of a shard.
    """
    return jax.vmap(lambda shard: shard.compact(count, sequences))(slots)


def advance(
    weights: Weights, sequences: Sequences, state: State, *, fewer: int, steps: int, spec: DecodeSpec
) -> tuple[State, jax.Array]:
    """Decodes until `fewer` sequences or less are left on a shard, but at most `steps` steps.

    Also returns how many are left on each shard. Under jit, donate the state.
    """
    run = partial(_advance_shard, fewer=fewer, steps=steps, spec=spec)
    if spec.mesh is not None:
        specs = decoder_specs(spec.model, spec.mesh), BY_ROW, state_specs()
        run = jax.shard_map(
            run, mesh=spec.mesh, in_specs=specs, out_specs=(state_specs(), BY_ROW), check_vma=False
        )
    return run(weights, sequences, state)


def finish(state: State) -> DeviceRollout:
    """The rows of all shards in their order; a sequence that was preempted leaves nothing of its past."""

    def by_row(x):
        return x.reshape(-1, *x.shape[2:])

    length_B, tokens_BR = by_row(state.out.length_B), by_row(state.out.tokens_BR)
    inside_BR = jnp.arange(tokens_BR.shape[1]) < length_B[:, None]
    return replace(
        state.out,
        tokens_BR=jnp.where(inside_BR, tokens_BR, 0),
        length_B=length_B,
        logp_BR=jnp.where(inside_BR, by_row(state.out.logp_BR), 0.0),
        finished_B=by_row(state.out.finished_B),
        stats=state.stats,
    )


def _fill_shard(weights: Weights, batch: Batch[jax.Array], key, stops, *, spec: DecodeSpec):
    """`fill_cache` on one shard: leaves of rows have a leading axis of length 1."""
    prompt_NT, prompt_len_N = batch.prompt_NT, batch.prompt_len_N
    prompt_of_B, uid_B, limit_B = batch.prompt_of_B[0], batch.uid_B[0], batch.limit_B[0]
    limits, model = spec.limits, spec.model
    limit_B = jnp.minimum(limit_B, limits.max_new)
    (N, T), B = prompt_NT.shape, len(uid_B)
    # Each shard prefills the prompts of its own rows, and none for spare rows.
    wanted_N = jnp.zeros(N, bool).at[prompt_of_B].max(limit_B > 0)
    layout = lay_out(prompt_len_N, wanted_N, limits.page)
    first_N = jnp.zeros(N, jnp.int32).at[layout.order_N].set(layout.first_N)  # in the prompts' own order
    prompt_len_B = prompt_len_N[prompt_of_B]
    # A sequence starts by feeding its prompt's last token once more, so prefill need not keep any logits.
    last_B = prompt_NT[prompt_of_B, prompt_len_B - 1]
    start = Start(last_B, prompt_len_B, first_N[prompt_of_B], limit_B)
    if spec.sampling.temperature:
        u_BR = row_uniforms(key, uid_B, limits.max_new)
    else:
        u_BR = jnp.zeros((B, limits.max_new), jnp.float32)  # greedy decoding draws nothing
    sequences = Sequences(jnp.stack(start, axis=1), u_BR, stops)
    capacity = spec.capacity(N, T, B)
    # Prompts have the first pages of the cache, responses all that follow.
    free_F = capacity.prompt_pages + jnp.arange(capacity.response_pages, dtype=jnp.int32)
    cache_XPWE = _empty_cache(spec, weights, capacity.prompt_pages + capacity.response_pages)
    cache_XPWE = prefill(spec.decoder, weights, prompt_NT, layout, cache_XPWE)
    # Longer prompts come in many lengths (`bucket_length`), and the loop is to be compiled for few.
    longest = T if T <= SHORT else 1 << (T - 1).bit_length()
    slots = Slots.empty(capacity.slots, table_pages(limits.page, longest, limits.max_new), B)
    state = scheduler.initial(cache_XPWE, sequences, slots, free_F)
    if spec.admits_all(B):
        state = scheduler.admit_all(state, start, model.num_hidden_layers)
    return jax.tree.map(lambda x: x[None], (sequences, state))


def _empty_cache(spec: DecodeSpec, weights: Weights, pages_a_layer: int) -> jax.Array:
    model = spec.model
    width = 2 * kv_heads(weights["blocks"]["qkv"], model)
    shape = model.num_hidden_layers * pages_a_layer, spec.limits.page, width, model.head_dim
    return jnp.zeros(shape, model.dtype)


def _decode_shard(weights: Weights, sequences: Sequences, state: State, *, spec: DecodeSpec) -> State:
    """`decode` on one shard, in ever fewer slots."""
    sequences, state = jax.tree.map(lambda x: x[0], (sequences, state))
    counts = spec.slot_counts(len(state.slots.packed_SC))
    # A loop ends once all that is left, in slots or waiting, fits the slots of the next one.
    for count, fewer in zip(counts, [*counts[1:], 0], strict=True):
        if count < len(state.slots.packed_SC):
            state = state._replace(slots=state.slots.compact(count, len(state.queue_B)))

        def more(state, fewer=fewer):
            return scheduler.left(state) > fewer

        state = lax.while_loop(more, partial(_step, weights, sequences, spec=spec), state)
    return jax.tree.map(lambda x: x[None], state)


def _advance_shard(
    weights: Weights, sequences: Sequences, state: State, *, fewer: int, steps: int, spec: DecodeSpec
) -> tuple[State, jax.Array]:
    """`advance` on one shard."""
    sequences, state = jax.tree.map(lambda x: x[0], (sequences, state))

    def more(carry: tuple[State, jax.Array]) -> jax.Array:
        state, done = carry
        return (scheduler.left(state) > fewer) & (done < steps)

    def step(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, done = carry
        return _step(weights, sequences, state, spec=spec), done + 1

    state, _ = lax.while_loop(more, step, (state, jnp.zeros((), jnp.int32)))
    return jax.tree.map(lambda x: x[None], (state, scheduler.left(state)))


def slots_for(sequences: int) -> int:
    """Slots for that many sequences: a power of two, so that few numbers of them are compiled."""
    return max(FEWEST, 1 << (sequences - 1).bit_length())


def halvings(slots: int) -> list[int]:
    """What a number of slots shrinks to: the powers of two below, down to FEWEST."""
    if slots <= FEWEST:
        return []
    fewer = slots_for(-(-slots // 2))
    return [fewer, *halvings(fewer)]


def _step(weights: Weights, sequences: Sequences, state: State, *, spec: DecodeSpec) -> State:
    """One token for every live slot."""
    # Known when the loop is compiled, which then has no queue and no stack of pages.
    all_admitted = spec.admits_all(len(sequences.start_B4))
    if not all_admitted:
        state = scheduler.admit(state, sequences, spec.model.num_hidden_layers)
        state = scheduler.reserve(state)
    slot, sampling = state.slots.columns, spec.sampling
    inputs = StepInputs(slot.token, scheduler.position(state), state.slots.table_SM)
    hidden_SD, cache_XPWE = decode_step(spec.decoder, weights, inputs, state.cache_XPWE)
    logits_SV, axis = local_logits(spec.decoder, weights, hidden_SD)
    # An empty slot has sequence B, and so reads the last row's number; `record` drops what it draws.
    u_S = sequences.u_BR.at[slot.sequence, slot.generated].get(mode="clip")
    token_S, logp_S = sample(
        logits_SV, u_S, temperature=sampling.temperature, top_p=sampling.top_p, axis=axis
    )
    state = state._replace(cache_XPWE=cache_XPWE)
    state, ended_S = scheduler.record(state, token_S, logp_S, sampling.stop_ids, sequences.stops)
    return scheduler.retire(state, ended_S) if all_admitted else scheduler.release(state, ended_S)


def state_specs() -> Any:
    """The cache is split by heads along the tensor axis; everything else is on its own shard."""
    specs = dict.fromkeys(State._fields, BY_ROW)
    specs["cache_XPWE"] = PartitionSpec(ROW_AXES, None, None, "tensor", None)
    return cast(Any, State)(**specs)
