"""The slots of a shard: the sequences that are decoded together, and their page tables.

A slot is one row of int32, so that to fill, empty or move it is one write. Only this module knows
the columns.

Dimensions: S slots, C packed columns, M pages of a table.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Slot(NamedTuple):
    """The columns before the page table, in their order: int32, of one slot or of all of them [S]."""

    sequence: jax.Array  # its number; in an empty slot the number of sequences
    token: jax.Array  # its newest token, which is fed next
    generated: jax.Array  # its tokens so far
    match: jax.Array  # how far a stop string is read
    prompt_len: jax.Array
    limit: jax.Array  # the most tokens that it may have
    admission: jax.Array  # admission number: the newest is preempted first
    shared: jax.Array  # pages of the prompt, at the head of its table
    own: jax.Array  # pages of its own, after them

    @property
    def pages(self) -> jax.Array:
        """Pages of the table that it holds."""
        return self.shared + self.own

    @property
    def position(self) -> jax.Array:
        """The position of its newest token."""
        return self.prompt_len - 1 + self.generated


SEQUENCE, TOKEN, OWN = (Slot._fields.index(name) for name in ("sequence", "token", "own"))
TABLE = len(Slot._fields)  # the table's first column


class Slots(NamedTuple):
    """All slots, packed."""

    packed_SC: jax.Array

    @classmethod
    def empty(cls, slots: int, pages: int, sequences: int) -> Slots:
        """Slots without a sequence, with tables of `pages` pages."""
        return cls(jnp.zeros((slots, TABLE + pages), jnp.int32).at[:, SEQUENCE].set(sequences))

    @classmethod
    def filled(cls, slot: Slot, table_SM: jax.Array) -> Slots:
        """Slots that hold these."""
        return cls(jnp.concatenate([jnp.stack(slot, axis=1), table_SM], axis=1))

    @property
    def columns(self) -> Slot:
        """Each column, of all slots."""
        return Slot(*(self.packed_SC[:, column] for column in range(TABLE)))

    @property
    def table_SM(self) -> jax.Array:
        """Page tables. Entries after a slot's own pages are arbitrary."""
        return self.packed_SC[:, TABLE:]

    def fill(self, s: jax.Array, slot: Slot, table_M: jax.Array) -> Slots:
        """With a sequence in slot s."""
        return Slots(self.packed_SC.at[s].set(jnp.concatenate([jnp.stack(slot), table_M])))

    def clear(self, s: jax.Array, sequences: int) -> Slots:
        """Without the sequence in slot s."""
        return Slots(self.packed_SC.at[s, SEQUENCE].set(sequences))

    def clear_where(self, ended_S: jax.Array, sequences: int) -> Slots:
        """Without the sequences that ended."""
        sequence_S = jnp.where(ended_S, sequences, self.packed_SC[:, SEQUENCE])
        return Slots(self.packed_SC.at[:, SEQUENCE].set(sequence_S))

    def advance(self, token_S: jax.Array, count_S: jax.Array, match_S: jax.Array | None) -> Slots:
        """With the newest token of each; match_S is None where there are no stop strings."""
        new = [token_S, count_S] if match_S is None else [token_S, count_S, match_S]
        return Slots(self.packed_SC.at[:, TOKEN : TOKEN + len(new)].set(jnp.stack(new, axis=1)))

    def append_page(self, needs_S: jax.Array, page_S: jax.Array) -> Slots:
        """With page_S at the end of the tables of the slots that need one."""
        S, C = self.packed_SC.shape
        at_S = jnp.where(needs_S, TABLE + self.columns.pages, C)  # C: past the end, so it is dropped
        packed_SC = self.packed_SC.at[jnp.arange(S), at_S].set(page_S, mode="drop")
        return Slots(packed_SC.at[:, OWN].add(needs_S.astype(jnp.int32)))

    def own_pages(self, s: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The table of slot s [M] from its own first page on, and how many of them are its own."""
        slot_C = self.packed_SC[s]
        slot, M = Slot(*slot_C[:TABLE]), len(slot_C) - TABLE
        # Rotated rather than sliced, since its length must be known when it is compiled.
        return slot_C[TABLE + (jnp.arange(M) + slot.shared) % M], slot.own

    def compact(self, slots: int, sequences: int) -> Slots:
        """As many slots, among them all that hold a sequence; nothing but small integers moves."""
        order_S = jnp.argsort(self.packed_SC[:, SEQUENCE] >= sequences, stable=True)
        return Slots(self.packed_SC[order_S[:slots]])
