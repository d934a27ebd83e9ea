"""Which sequence sits in which slot, and which pages hold it: the part of decoding without a model.

A slot is a row of the batch that is decoded; a sequence waits in a queue until a slot is free. The first
pages of the store hold the prompts and never change; a slot's table starts with its prompt's full pages
and goes on with pages of its own, taken from a stack as the sequence grows and given back when it ends.
If the stack runs dry, the youngest sequences go back to the queue and start anew later: their tokens
depend on uid and position alone, so they come out the same.

Slots change rarely, so each change is one turn of a loop that mostly makes no turn, and a step in which
nothing happens pays for a few comparisons. Where slots and pages suffice for all sequences, `seat` deals
them out before the first step, and the steps know nothing of queue and stack: less to run and to compile.

    seat(state, given) -> state       every sequence has a slot and all its pages
    refill(state, rows) -> state      free slots take sequences from the queue
    reserve(state) -> state           every live slot owns the page that its next token goes to
    record(state, token_S, logp_S, stop_ids, stops) -> state, ended_S    tokens are kept
    leave(state, ended_S) -> state    ended sequences give slots and pages back
    compact(slots_SC, N, count) -> slots_SC    fewer slots
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from rosd_jax.rollout.stops import Stops
from rosd_jax.types import DecodeStats, Rollout

LONGEST_PAGE = 64  # positions


class Rows(NamedTuple):
    """What is known of N sequences before they start."""

    given_N4: jax.Array  # int32: last prompt token, fed first; prompt length; its first page; most tokens
    u_NR: jax.Array  # float32: the uniform number of every token
    stops: Stops | None = None  # stop strings


# A slot is one row of int32, so that filling, emptying or moving it is one write: its sequence (N where it
# is empty), its newest token, how many tokens it has, how far a stop string is read, its prompt's length, the
# most tokens it may have, the number of the refill that brought it, pages of the prompt at the head of its
# table, pages of its own behind them, and from column TABLE on the table.
ROW, LAST, COUNT, MATCH, START, LIMIT, BORN, SHARED, OWN, TABLE = range(10)


class State(NamedTuple):
    """All that a decoding step changes; scalars are int32."""

    store: jax.Array  # [L x pages, P, 2 K, E]
    slots_SC: jax.Array
    free_F: jax.Array  # the stack of free pages, with room for one table behind it
    top: jax.Array  # how many are free
    queue_N: jax.Array  # sequences in order of their turn: those from head to tail - 1 wait
    head: jax.Array
    tail: jax.Array
    held: jax.Array  # bool: pages ran out, so nobody starts before somebody ends
    born: jax.Array  # refills so far
    out: Rollout
    stats: DecodeStats


def page_length(max_new: int) -> int:
    """Positions a page: 16 or more, fewer than the longest where a response would fill little of its last."""
    return min(LONGEST_PAGE, max(16, 1 << max(0, max_new.bit_length() - 2)))


def most_own(page: int, max_new: int) -> int:
    """Pages that a sequence may need behind those it shares."""
    return (max_new + page - 2) // page + 1


def table_width(page: int, prompt: int, max_new: int) -> int:
    """Pages of the longest sequence; its last token is never fed."""
    return -(-(prompt + max_new - 1) // page)


def empty(store: jax.Array, rows: Rows, slots: int, pinned: int, pool: int, width: int) -> State:
    """The state before the first step: `pool` pages from number `pinned` on are free."""
    N, R = rows.u_NR.shape
    zeros = lambda *shape: jnp.zeros(shape, jnp.int32)
    waiting_N = rows.given_N4[:, 3] > 0  # a sequence that may have no token never waits
    out = Rollout(
        tokens_BR=zeros(N, R),
        length_B=zeros(N),
        logp_BR=jnp.zeros((N, R), jnp.float32),
        finished_B=jnp.zeros(N, bool),
    )
    return State(
        store=store,
        slots_SC=zeros(slots, TABLE + width).at[:, ROW].set(N),
        free_F=jnp.arange(pinned, pinned + pool + width, dtype=jnp.int32),
        top=jnp.int32(pool),
        queue_N=indices(waiting_N, N),
        head=zeros(),
        tail=jnp.sum(waiting_N, dtype=jnp.int32),
        held=jnp.bool(False),
        born=zeros(),
        out=out,
        stats=DecodeStats(zeros(), zeros(), zeros(), zeros(), jnp.zeros((), jnp.float32)),
    )


def indices(mask_N: jax.Array, size: int) -> jax.Array:
    """Where the mask is True, in order (int32); N in the places behind."""
    N = len(mask_N)
    return jnp.sort(jnp.where(mask_N, jnp.arange(N, dtype=jnp.int32), N))[:size]


def live(state: State) -> jax.Array:
    """Which slots hold a sequence: bool [S]."""
    return state.slots_SC[:, ROW] < len(state.queue_N)


def position(state: State) -> jax.Array:
    """Where each slot's newest token stands, which is fed next; -1 in an empty slot: int32 [S]."""
    return jnp.where(live(state), state.slots_SC[:, START] - 1 + state.slots_SC[:, COUNT], -1)


def seat(state: State, given_S: tuple[jax.Array, ...], layers: int) -> State:
    """Every sequence sits in a slot of its own, with all the pages that it may come to need.

    Takes what `empty` returns, with as many slots as sequences and `most_own` pages for each. Nobody waits.
    given_S: the columns of Rows.given_N4.
    """
    (S, C), P, R = state.slots_SC.shape, state.store.shape[1], state.out.tokens_BR.shape[1]
    most, row_S = most_own(P, R), jnp.arange(S, dtype=jnp.int32)
    first_S, start_S, page_S, limit_S = given_S
    shared_S, own_S = (start_S - 1) // P, state.free_F[0] + most * row_S
    ahead_SM = jnp.arange(C - TABLE) - shared_S[:, None]  # of the pages that are shared
    mine_SM = own_S[:, None] + jnp.minimum(ahead_SM, most - 1)
    table_SM = jnp.where(ahead_SM < 0, page_S[:, None] + jnp.arange(C - TABLE), mine_SM)
    row_S = jnp.where(limit_S > 0, row_S, S)
    head = [row_S, first_S, 0 * row_S, 0 * row_S, start_S, limit_S, 0 * row_S, shared_S, 0 * row_S + most]
    return state._replace(
        store=_copy_pages(state.store, page_S + shared_S, own_S, layers),
        slots_SC=jnp.concatenate([jnp.stack(head, axis=1), table_SM], axis=1),
        queue_N=jnp.zeros_like(state.queue_N),
        tail=state.head,
        top=state.top - S * most,
    )


def refill(state: State, rows: Rows, layers: int) -> State:
    """Free slots take the next sequences of the queue while pages last.

    One page stays free for each live sequence that may yet need another: to start a sequence only to put
    it back again is a page copied in every layer for nothing.
    """

    def wanted(state: State) -> jax.Array:
        spare = state.top > jnp.sum(_growing(state))
        return (state.head < state.tail) & ~jnp.all(live(state)) & spare & ~state.held

    return lax.while_loop(wanted, lambda state: _start(state, rows, layers), state)


def _start(state: State, rows: Rows, layers: int) -> State:
    """Puts the next sequence in the first empty slot, with a page of its own for its next tokens."""
    s, row = jnp.argmin(live(state)), state.queue_N[state.head]
    first, start, page, limit = rows.given_N4[row]
    shared = (start - 1) // state.store.shape[1]  # the prompt's pages that nothing is written to any more
    own = state.free_F[state.top - 1]
    m = jnp.arange(state.slots_SC.shape[1] - TABLE)
    table_M = jnp.where(m < shared, page + m, own)
    head = [row, first, 0, 0, start, limit, state.born, shared, 1]
    return state._replace(
        store=_copy_pages(state.store, (page + shared)[None], own[None], layers),
        slots_SC=state.slots_SC.at[s].set(jnp.concatenate([jnp.stack(head), table_M])),
        top=state.top - 1,
        head=state.head + 1,
        born=state.born + 1,
    )


def _copy_pages(store: jax.Array, source_n: jax.Array, target_n: jax.Array, layers: int) -> jax.Array:
    """Copies pages in every layer: those that prompt and response share become the slots' own."""
    pages = len(store) // layers

    def one(i: jax.Array, store: jax.Array) -> jax.Array:
        base, n = lax.rem(i, layers) * pages, lax.div(i, layers)
        page = lax.dynamic_slice_in_dim(store, base + source_n[n], 1)
        return lax.dynamic_update_slice_in_dim(store, page, base + target_n[n], axis=0)

    def in_all_layers(n: jax.Array, store: jax.Array) -> jax.Array:
        at_L = jnp.arange(layers) * pages
        return store.at[at_L + target_n[n]].set(store[at_L + source_n[n]], unique_indices=True)

    # One slice at a time: with an index array, or slices over all layers, XLA for TPU or CPU copies the
    # store. For GPU it does not, and each slice would be three more kernels to start.
    return lax.platform_dependent(
        store,
        cuda=lambda store: lax.fori_loop(0, len(source_n), in_all_layers, store),
        default=lambda store: lax.fori_loop(0, len(source_n) * layers, one, store),
    )


def reserve(state: State) -> State:
    """Every live slot owns the page of its next token; the youngest leave where pages do not suffice."""
    (S, C), R = state.slots_SC.shape, state.out.tokens_BR.shape[1]
    if len(state.free_F) - (C - TABLE) < S * most_own(state.store.shape[1], R):  # else they always suffice
        state = lax.while_loop(lambda state: jnp.sum(_lacking(state)) > state.top, _preempt, state)
    need_S = _lacking(state)
    page_S = state.free_F[jnp.maximum(state.top - jnp.cumsum(need_S), 0)]
    at_S = jnp.where(need_S, TABLE + state.slots_SC[:, SHARED] + state.slots_SC[:, OWN], C)
    slots_SC = state.slots_SC.at[jnp.arange(S), at_S].set(page_S, mode="drop")
    return state._replace(
        slots_SC=slots_SC.at[:, OWN].add(need_S.astype(jnp.int32)),
        top=state.top - jnp.sum(need_S, dtype=jnp.int32),
    )


def _growing(state: State) -> jax.Array:
    """The slots whose sequence may come to need a page that they do not own yet."""
    slots_SC = state.slots_SC
    last_S = (slots_SC[:, START] + slots_SC[:, LIMIT] - 2) // state.store.shape[1]
    return live(state) & (last_S >= slots_SC[:, SHARED] + slots_SC[:, OWN])


def _lacking(state: State) -> jax.Array:
    """The slots whose next token begins a page that they do not own yet."""
    page_S = position(state) // state.store.shape[1]
    return live(state) & (page_S >= state.slots_SC[:, SHARED] + state.slots_SC[:, OWN])


def _preempt(state: State) -> State:
    """Puts the youngest sequence back at the head of the queue."""
    s = jnp.argmax(jnp.where(live(state), state.slots_SC[:, BORN], -1))
    head = state.head - 1
    stats = replace(state.stats, preempted=state.stats.preempted + 1)
    queue_N = state.queue_N.at[head].set(state.slots_SC[s, ROW])
    return _vacate(state, s)._replace(queue_N=queue_N, head=head, held=jnp.bool(True), stats=stats)


def _vacate(state: State, s: jax.Array) -> State:
    """Empties a slot and puts its own pages on the stack."""
    slot_C = state.slots_SC[s]
    M = len(slot_C) - TABLE
    # What the whole table leaves above the new top is no page yet, and is overwritten by the next one.
    own_M = slot_C[TABLE + (jnp.arange(M) + slot_C[SHARED]) % M]
    return state._replace(
        slots_SC=state.slots_SC.at[s, ROW].set(len(state.queue_N)),
        free_F=lax.dynamic_update_slice_in_dim(state.free_F, own_M, state.top, axis=0),
        top=state.top + slot_C[OWN],
    )


def record(
    state: State,
    token_S: jax.Array,
    logp_S: jax.Array,
    stop_ids: tuple[int, ...],
    stops: Stops | None = None,
) -> tuple[State, jax.Array]:
    """Keeps the live slots' tokens; bool [S]: which sequences end, by a stop or at their limit."""
    live_S, slots_SC, out = live(state), state.slots_SC, state.out
    row_S, at_S, count_S = slots_SC[:, ROW], slots_SC[:, COUNT], slots_SC[:, COUNT] + 1
    stop_S = jnp.any(token_S[:, None] == jnp.array(stop_ids, jnp.int32), axis=1)
    new = [token_S, count_S]
    if stops:
        match_S, matched_S = stops.step(slots_SC[:, MATCH], token_S)
        stop_S, new = stop_S | matched_S, [*new, match_S]
    ended_S = stop_S | (count_S >= slots_SC[:, LIMIT])
    out = replace(
        out,
        tokens_BR=out.tokens_BR.at[row_S, at_S].set(token_S, mode="drop"),
        logp_BR=out.logp_BR.at[row_S, at_S].set(logp_S, mode="drop"),
        length_B=out.length_B.at[row_S].set(count_S, mode="drop"),
        finished_B=out.finished_B.at[row_S].set(stop_S, mode="drop"),
    )
    state = state._replace(
        slots_SC=slots_SC.at[:, LAST : LAST + len(new)].set(jnp.stack(new, axis=1)),
        out=out,
        stats=_count(state, live_S),
    )
    return state, live_S & ended_S


def leave(state: State, ended_S: jax.Array) -> State:
    """Empties the slots of ended sequences for others, who may start again."""
    still_S = lambda state: live(state) & ended_S
    one = lambda state: _vacate(state, jnp.argmax(still_S(state)))
    state = state._replace(held=state.held & ~jnp.any(ended_S))
    return lax.while_loop(lambda state: jnp.any(still_S(state)), one, state)


def leave_for_good(state: State, ended_S: jax.Array) -> State:
    """Empties the slots of ended sequences, in which nobody is seated again."""
    row_S = jnp.where(ended_S, len(state.queue_N), state.slots_SC[:, ROW])
    return state._replace(slots_SC=state.slots_SC.at[:, ROW].set(row_S))


def _count(state: State, live_S: jax.Array) -> DecodeStats:
    stats = state.stats
    return replace(
        stats,
        steps=stats.steps + 1,
        busy=stats.busy + jnp.sum(live_S, dtype=jnp.int32),
        slots=stats.slots + len(live_S),
        read=stats.read + jnp.sum(position(state) + 1, dtype=jnp.float32),
    )


def compact(slots_SC: jax.Array, sequences: int, count: int) -> jax.Array:
    """`count` slots, among them all that hold one of the N sequences; nothing but small integers moves."""
    return slots_SC[jnp.argsort(slots_SC[:, ROW] >= sequences, stable=True)[:count]]
