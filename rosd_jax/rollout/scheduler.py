"""Which sequence is in which slot, and which pages it holds: the part of decoding without a model.

Sequences wait in a queue until they are admitted to a slot. The first pages of the KV cache hold the prompts
and never change; a slot's page table starts with its prompt's full pages and goes on with pages of its own,
taken from a stack of free pages as the sequence grows and released when it ends. If the stack runs dry, the
newest sequences are preempted: they go back to the queue and start again later. Tokens depend on uid and
position alone, so they come out the same.

Slots change rarely, so each change is one iteration of a loop that mostly makes none, and a step in which
nothing happens pays for a few comparisons. Where slots and pages suffice for all sequences, `admit_all` deals
them out before the first step, and the steps have no queue and no stack: less to run and to compile.

    admit_all(state, start, layers) -> state       every sequence gets a slot and all its pages
    admit(state, sequences, layers) -> state       empty slots take sequences from the queue
    reserve(state) -> state                        every live slot owns the page that its next token goes to
    record(state, token_S, logp_S, stop_ids, stops) -> state, ended_S    keeps the tokens
    release(state, ended_S) -> state               ended sequences give slots and pages back
    retire(state, ended_S) -> state                ended sequences leave slots that nobody needs again

Dimensions: B sequences, R tokens of a response, S slots, M pages of a table, F places of the stack of free
pages, J pages to copy, L layers; of the cache X pages of all layers, P positions of a page, W heads of keys
and values, E head width.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rosd_jax.rollout.limits import own_pages
from rosd_jax.rollout.slots import Slot, Slots
from rosd_jax.rollout.stops import Stops
from rosd_jax.types import DecodeStats, DeviceRollout, Rollout


class Start(NamedTuple):
    """Where a sequence starts: int32, of one sequence or of all of them [B]."""

    token: jax.Array  # the prompt's last, which is fed first
    prompt_len: jax.Array
    page: jax.Array  # the prompt's first
    limit: jax.Array  # the most tokens that it may have; 0: it is never admitted


class Sequences(NamedTuple):
    """What is known of the B sequences before they start."""

    start_B4: jax.Array  # int32: the fields of Start, packed so that admitting reads one row
    u_BR: jax.Array  # float32: the uniform number of every token
    stops: Stops | None = None  # stop strings


class State(NamedTuple):
    """All that a decoding step changes; scalars are int32."""

    cache_XPWE: jax.Array
    slots: Slots
    free_F: jax.Array  # the stack of free pages, followed by space for one table
    free: jax.Array  # how many are free
    queue_B: jax.Array  # sequences in the order of admission: those from head to tail - 1 wait
    head: jax.Array
    tail: jax.Array
    paused: jax.Array  # bool: pages ran out, so nobody is admitted before somebody ends
    admissions: jax.Array  # so far
    out: DeviceRollout
    stats: DecodeStats[jax.Array]


def initial(cache_XPWE: jax.Array, sequences: Sequences, slots: Slots, free_F: jax.Array) -> State:
    """The state before the first step: no slot is filled. free_F: the free pages."""
    B, R = sequences.u_BR.shape

    def zeros(*shape):
        return jnp.zeros(shape, jnp.int32)

    waiting_B = Start(*sequences.start_B4.T).limit > 0
    out = Rollout(
        tokens_BR=zeros(B, R),
        length_B=zeros(B),
        logp_BR=jnp.zeros((B, R), jnp.float32),
        finished_B=jnp.zeros(B, bool),
    )
    return State(
        cache_XPWE=cache_XPWE,
        slots=slots,
        free_F=jnp.pad(free_F, (0, slots.table_SM.shape[1])),
        free=jnp.int32(len(free_F)),
        queue_B=indices(waiting_B),
        head=zeros(),
        tail=jnp.sum(waiting_B, dtype=jnp.int32),
        paused=jnp.bool(False),
        admissions=zeros(),
        out=out,
        stats=DecodeStats(zeros(), zeros(), zeros(), zeros(), jnp.zeros((), jnp.float32)),
    )


def indices(mask_B: jax.Array) -> jax.Array:
    """Where the mask is True, in order (int32 [B]), then B."""
    B = len(mask_B)
    # A sort compiles in a fifth of the time of a prefix sum and a scatter (docs/log.md, 2026-11-26).
    return jnp.sort(jnp.where(mask_B, jnp.arange(B, dtype=jnp.int32), B))


def live(state: State) -> jax.Array:
    """Which slots hold a sequence: bool [S]."""
    return state.slots.columns.sequence < len(state.queue_B)


def position(state: State) -> jax.Array:
    """Position of each slot's newest token, which is fed next; -1 for an empty slot: int32 [S]."""
    return jnp.where(live(state), state.slots.columns.position, -1)


def left(state: State) -> jax.Array:
    """Sequences that wait or are in a slot."""
    return state.tail - state.head + jnp.sum(live(state), dtype=jnp.int32)


def admit_all(state: State, start: Start, layers: int) -> State:
    """Every sequence gets a slot of its own, with all the pages that it may come to need.

    Takes what `initial` returns, with as many slots as sequences and `own_pages` free pages for each. Nobody
    waits. start: of all sequences.
    """
    (S, M), P, R = state.slots.table_SM.shape, state.cache_XPWE.shape[1], state.out.tokens_BR.shape[1]
    most, sequence_S = own_pages(P, R), jnp.arange(S, dtype=jnp.int32)
    # The prompt's last token is fed again and written to its page, so that page cannot be shared. The free
    # pages are consecutive, and each slot takes `most` of them.
    shared_S, own_S = (start.prompt_len - 1) // P, state.free_F[0] + most * sequence_S
    ahead_SM = jnp.arange(M) - shared_S[:, None]  # of the pages that are shared
    # Entries after a slot's own pages repeat its last one: attention may read them, and ignores them.
    mine_SM = own_S[:, None] + jnp.minimum(ahead_SM, most - 1)
    table_SM = jnp.where(ahead_SM < 0, start.page[:, None] + jnp.arange(M), mine_SM)
    zero_S = 0 * sequence_S
    slot = Slot(
        sequence=jnp.where(start.limit > 0, sequence_S, S),
        token=start.token,
        generated=zero_S,
        match=zero_S,
        prompt_len=start.prompt_len,
        limit=start.limit,
        admission=zero_S,
        shared=shared_S,
        own=zero_S + most,
    )
    return state._replace(
        cache_XPWE=_copy_pages(state.cache_XPWE, start.page + shared_S, own_S, layers),
        slots=Slots.filled(slot, table_SM),
        queue_B=jnp.zeros_like(state.queue_B),
        tail=state.head,
        free=state.free - S * most,
    )


def admit(state: State, sequences: Sequences, layers: int) -> State:
    """Empty slots take the next sequences of the queue while pages last.

    One page stays free for each live sequence that may yet need another: to admit a sequence only to preempt
    it is a page copied in every layer for nothing.
    """

    def wanted(state: State) -> jax.Array:
        spare = state.free > jnp.sum(_growing(state))
        return (state.head < state.tail) & ~jnp.all(live(state)) & spare & ~state.paused

    return lax.while_loop(wanted, lambda state: _admit_next(state, sequences, layers), state)


def _admit_next(state: State, sequences: Sequences, layers: int) -> State:
    """Puts the next sequence in the first empty slot, with a page of its own for its next tokens."""
    s, sequence = jnp.argmin(live(state)), state.queue_B[state.head]
    start = Start(*sequences.start_B4[sequence])
    # The prompt's pages that nothing is written to any more.
    shared = (start.prompt_len - 1) // state.cache_XPWE.shape[1]
    own = state.free_F[state.free - 1]
    m = jnp.arange(state.slots.table_SM.shape[1])
    table_M = jnp.where(m < shared, start.page + m, own)
    zero = jnp.int32(0)
    slot = Slot(
        sequence=sequence,
        token=start.token,
        generated=zero,
        match=zero,
        prompt_len=start.prompt_len,
        limit=start.limit,
        admission=state.admissions,
        shared=shared,
        own=zero + 1,
    )
    return state._replace(
        cache_XPWE=_copy_pages(state.cache_XPWE, (start.page + shared)[None], own[None], layers),
        slots=state.slots.fill(s, slot, table_M),
        free=state.free - 1,
        head=state.head + 1,
        admissions=state.admissions + 1,
    )


def _copy_pages(cache_XPWE: jax.Array, source_J: jax.Array, target_J: jax.Array, layers: int) -> jax.Array:
    """Copies pages in every layer: those that prompt and response share become the slots' own."""
    pages = len(cache_XPWE) // layers

    def one(i: jax.Array, cache_XPWE: jax.Array) -> jax.Array:
        base, j = lax.rem(i, layers) * pages, lax.div(i, layers)
        page = lax.dynamic_slice_in_dim(cache_XPWE, base + source_J[j], 1)
        return lax.dynamic_update_slice_in_dim(cache_XPWE, page, base + target_J[j], axis=0)

    def in_all_layers(j: jax.Array, cache_XPWE: jax.Array) -> jax.Array:
        at_L = jnp.arange(layers) * pages
        page_LPWE = cache_XPWE[at_L + source_J[j]]
        return cache_XPWE.at[at_L + target_J[j]].set(page_LPWE, unique_indices=True)

    # One slice at a time: with an index array, or slices over all layers, XLA for TPU or CPU copies the
    # cache. For GPU it does not, and each slice would be three more kernels to start.
    return lax.platform_dependent(
        cache_XPWE,
        cuda=lambda cache: lax.fori_loop(0, len(source_J), in_all_layers, cache),
        default=lambda cache: lax.fori_loop(0, len(source_J) * layers, one, cache),
    )


def reserve(state: State) -> State:
    """Every live slot owns the page of its next token; where pages are short, the newest are preempted."""
    (S, M), R = state.slots.table_SM.shape, state.out.tokens_BR.shape[1]
    pages = len(state.free_F) - M
    if pages < S * own_pages(state.cache_XPWE.shape[1], R):  # else they always suffice
        # Ends with one sequence left at the latest, since `Engine` has checked that a single one always fits.
        def short(state):
            return jnp.sum(_lacking(state)) > state.free

        state = lax.while_loop(short, _preempt, state)
    needs_S = _lacking(state)
    # The n-th slot in need takes the n-th page from the top of the stack; the others' entries are not used.
    page_S = state.free_F[jnp.maximum(state.free - jnp.cumsum(needs_S), 0)]
    return state._replace(
        slots=state.slots.append_page(needs_S, page_S),
        free=state.free - jnp.sum(needs_S, dtype=jnp.int32),
    )


def _growing(state: State) -> jax.Array:
    """The slots whose sequence may come to need a page that they do not own yet: bool [S]."""
    slot = state.slots.columns
    last_S = (slot.prompt_len + slot.limit - 2) // state.cache_XPWE.shape[1]
    return live(state) & (last_S >= slot.pages)


def _lacking(state: State) -> jax.Array:
    """The slots whose next token begins a page that they do not own yet: bool [S]."""
    page_S = position(state) // state.cache_XPWE.shape[1]
    return live(state) & (page_S >= state.slots.columns.pages)


def _preempt(state: State) -> State:
    """Puts the newest sequence back at the head of the queue."""
    slot = state.slots.columns
    s = jnp.argmax(jnp.where(live(state), slot.admission, -1))
    head = state.head - 1  # never below 0: this sequence was taken from the queue
    stats = replace(state.stats, preempted=state.stats.preempted + 1)
    queue_B = state.queue_B.at[head].set(slot.sequence[s])
    return _release_one(state, s)._replace(queue_B=queue_B, head=head, paused=jnp.bool(True), stats=stats)


def _release_one(state: State, s: jax.Array) -> State:
    """Empties a slot and puts its own pages on the stack."""
    page_M, count = state.slots.own_pages(s)
    # What of the table lands above the new top of the stack is no page of the slot, and is overwritten next.
    return state._replace(
        slots=state.slots.clear(s, len(state.queue_B)),
        free_F=lax.dynamic_update_slice_in_dim(state.free_F, page_M, state.free, axis=0),
        free=state.free + count,
    )


def record(
    state: State,
    token_S: jax.Array,
    logp_S: jax.Array,
    stop_ids: tuple[int, ...],
    stops: Stops | None = None,
) -> tuple[State, jax.Array]:
    """Keeps the live slots' tokens; bool [S]: which sequences end, by a stop or at their limit."""
    live_S, slot, out = live(state), state.slots.columns, state.out
    count_S = slot.generated + 1
    stop_S = jnp.any(token_S[:, None] == jnp.array(stop_ids, jnp.int32), axis=1)
    match_S = None
    if stops:
        match_S, matched_S = stops.step(slot.match, token_S)
        stop_S = stop_S | matched_S
    ended_S = stop_S | (count_S >= slot.limit)
    # Empty slots have sequence B, an index past the end, whose writes are dropped.
    out = replace(
        out,
        tokens_BR=out.tokens_BR.at[slot.sequence, slot.generated].set(token_S, mode="drop"),
        logp_BR=out.logp_BR.at[slot.sequence, slot.generated].set(logp_S, mode="drop"),
        length_B=out.length_B.at[slot.sequence].set(count_S, mode="drop"),
        finished_B=out.finished_B.at[slot.sequence].set(stop_S, mode="drop"),
    )
    stats = _counted(state, live_S)
    state = state._replace(slots=state.slots.advance(token_S, count_S, match_S), out=out, stats=stats)
    return state, live_S & ended_S


def release(state: State, ended_S: jax.Array) -> State:
    """Empties the slots of ended sequences for others, who may be admitted again."""

    def still_S(state):
        return live(state) & ended_S

    def one(state):
        return _release_one(state, jnp.argmax(still_S(state)))

    state = state._replace(paused=state.paused & ~jnp.any(ended_S))
    return lax.while_loop(lambda state: jnp.any(still_S(state)), one, state)


def retire(state: State, ended_S: jax.Array) -> State:
    """Empties the slots of ended sequences, which nobody else waits for."""
    return state._replace(slots=state.slots.clear_where(ended_S, len(state.queue_B)))


def _counted(state: State, live_S: jax.Array) -> DecodeStats[jax.Array]:
    """The statistics with the step that the state is about to record."""
    stats = state.stats
    return replace(
        stats,
        steps=stats.steps + 1,
        busy=stats.busy + jnp.sum(live_S, dtype=jnp.int32),
        slots=stats.slots + len(live_S),
        read=stats.read + jnp.sum(position(state) + 1, dtype=jnp.float32),
    )
