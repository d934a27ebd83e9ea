"""Stop strings: a table that reads the text of a response token by token, inside the compiled loop.

The state of a row is the longest end of its text that begins a stop string (Aho and Corasick's automaton,
over bytes). A token takes every state to another, or to the end; tokens that do the same to all states are
of one class. So a step costs two gathers of a number a row, and a stop string is found wherever it begins
and ends, however it is cut into tokens.

Dimensions: B rows, V tokens of the vocabulary, S states, C classes of tokens, M bytes of the longest token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rosd_jax.types import Array


class Stops(NamedTuple):
    """State 0 has read nothing of use; the number of states means that a stop string was completed."""

    class_V: Array  # int32
    next_SC: Array  # int32: the state after a token of each class

    def step(self, state_B: jax.Array, token_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States after these tokens, and bool: whether a stop string ends in the token."""
        next_SC, class_V = jnp.asarray(self.next_SC), jnp.asarray(self.class_V)
        state_B = next_SC.at[state_B, class_V[token_B]].get(mode="clip")
        return state_B, state_B == len(next_SC)


def make_stops(texts: Sequence[str], tokens: Sequence[bytes]) -> Stops:
    """The table for one text or more, none empty, and the bytes of every token."""
    step_S256 = _automaton([text.encode() for text in texts])
    size_V = np.array([len(token) for token in tokens])
    order_V = np.argsort(-size_V, kind="stable")  # the longest first, so that those that go on are in front
    byte_VM = np.zeros((len(tokens), size_V.max()), np.uint8)
    for row_M, v in zip(byte_VM, order_V, strict=True):
        row_M[: size_V[v]] = np.frombuffer(tokens[v], np.uint8)
    state_VS = np.tile(np.arange(len(step_S256) - 1, dtype=np.int16), (len(tokens), 1))
    for m in range(size_V.max()):
        longer = int(np.sum(size_V > m))
        state_VS[:longer] = step_S256[state_VS[:longer], byte_VM[:longer, m, None]]
    classes: dict[bytes, int] = {}
    class_V = np.zeros(len(tokens), np.int32)
    class_V[order_V] = [classes.setdefault(row_S.tobytes(), len(classes)) for row_S in state_VS]
    next_CS = np.frombuffer(b"".join(classes), np.int16).reshape(len(classes), -1)
    return Stops(class_V, next_CS.T.astype(np.int32))


def _automaton(stops: Sequence[bytes]) -> np.ndarray:
    """The state after each byte; the last state is the end, which no byte leaves."""
    states = list(dict.fromkeys(stop[:n] for stop in stops for n in range(len(stop))))
    number = {state: i for i, state in enumerate(states)}
    step_S256 = np.zeros((len(states) + 1, 256), np.int16)
    for state, i in number.items():
        for byte in set(b"".join(stops)):
            read = state + bytes([byte])
            rest = next(read[n:] for n in range(len(read) + 1) if read[n:] in number)
            step_S256[i, byte] = len(states) if read.endswith(tuple(stops)) else number[rest]
    step_S256[-1] = len(states)
    return step_S256
