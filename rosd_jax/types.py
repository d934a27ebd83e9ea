"""The records that travel through one step, and the dimension key.

    prompts -> rollout -> grade -> reflect -> lesson -> update -> (evaluate | checkpoint | report)

Every stage reads one record and returns the next; nothing later writes to anything earlier.
Records of text live on the host (tuples, NumPy); records of arrays are pytrees. A rollout may be in either
place, and its type says where: `HostRollout` or `DeviceRollout`.

Dimension key, used as a suffix of array names:
B rows (prompts x samples), G samples a prompt, N prompts, P prompt tokens, Q teacher-prompt tokens,
R response tokens, T = P + R, K top-k, V vocabulary, D model width, H heads, L layers, C chunk of rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, TypeVar

import jax
import numpy as np

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Array = jax.Array | np.ndarray
Params = Any  # a tree of arrays, as models/qwen3.py lays it out
Span = tuple[int, int]  # half-open [start, stop)
A = TypeVar("A", jax.Array, np.ndarray)  # where a record's arrays are: on the devices, or on the host


class Stream(IntEnum):
    """The streams of random numbers of a run, each folded into the key of its seed."""

    ROLLOUT = 0
    REFLECT = 1
    EVAL = 2
    ADAPTERS = 2**32 - 1  # the adapters' first values

    def key(self, seed_key: jax.Array) -> jax.Array:
        """The stream's key."""
        return jax.random.fold_in(seed_key, int(self))


@dataclass(frozen=True)
class Problem:
    """One row of a data set, as text (host)."""

    uid: str  # "<set>/<row number>", stable across runs
    dataset: str  # the set it came from: "physics", "tooluse", "aime24", ...
    kind: str  # which checker grades it: "mcq" | "math" | "tooluse" | "gym" | "own" (the user's function)
    messages: tuple[Message, ...]  # the task's own system and user text, in chat form
    answer: str  # the gold answer, empty only for the kind "own"
    extra: str = ""  # the row's other fields, a JSON object, for a reward function of the user's

    @property
    def question(self) -> str:
        """The last user message: what the reflector and the teacher are shown as the problem."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")


@dataclass(frozen=True)
class Prompts:
    """The N problems of one step with their chat-templated prompt ids (host)."""

    problems: tuple[Problem, ...]
    ids: tuple[Sequence[int], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeStats(Generic[A]):
    """What decoding took: one number for each shard of the rows, int32 where not said."""

    steps: A  # steps of the model
    busy: A  # slots that held a sequence, summed over steps
    slots: A  # all slots, summed over steps
    preempted: A  # sequences that were preempted for want of pages
    read: A  # float32: positions that live slots attended to, summed over steps

    @property
    def idle_share(self) -> float:
        """Share of the slots' steps in which a slot was empty; 0 where nothing was decoded."""
        slots = int(np.sum(self.slots))
        return 1 - int(np.sum(self.busy)) / slots if slots else 0.0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout(Generic[A]):
    """B sampled responses. Rows are prompt-major: row b answers prompt b // G."""

    tokens_BR: A  # int32; beyond length: 0
    length_B: A  # int32, the stop token counted
    logp_BR: A  # float32, log-prob of each token at the sampling temperature; 0 beyond length
    finished_B: A  # bool: ended on a stop token or string (False: cut at the limit)
    stats: DecodeStats[A] | None = None


HostRollout = Rollout[np.ndarray]
DeviceRollout = Rollout[jax.Array]


@dataclass(frozen=True)
class Graded:
    """A rollout with its text and reward (host)."""

    prompts: Prompts
    rollout: HostRollout
    texts: tuple[str, ...]  # B decoded responses, special tokens removed
    rewards_B: np.ndarray  # float32 in [0, 1]
    thinking_open: bool = False  # the prompts ended inside a thinking block, so the texts begin there

    @property
    def group_size(self) -> int:
        """G: responses to each prompt."""
        return len(self.texts) // len(self.prompts.problems)

    def problem(self, row: int) -> Problem:
        """What row number `row` answers."""
        return self.prompts.problems[row // self.group_size]


@dataclass(frozen=True)
class Reflection:
    """What the reflector said of one rollout and where that points (host)."""

    raw: str | None = None  # the reflector's whole text; None: this rollout was not reflected
    idea: str | None = None  # the corrective (or key) idea; None: no tag found
    quote: str | None = None  # the error quote, as written
    char_span: Span | None = None  # where the quote stands in the response text
    token_span: Span | None = None  # the same in response tokens
    ambiguous: bool = False  # the quote stands in the text more than once
    solution: str | None = None  # the correct sibling that was shown, if any
    note: str = ""  # why the rollout left the loss, a key of distill/reflect.py: NOTES; "": it did not


@dataclass(frozen=True)
class Reflected:
    """A graded rollout with one reflection a row (host)."""

    graded: Graded
    reflections: tuple[Reflection, ...]  # B
    answers: HostRollout | None = None  # the reflector's, about the rollouts that it was asked about


@dataclass(frozen=True)
class Lesson:
    """What the update consumes (host). Response ids are the sampled ones, never re-tokenised."""

    prompts: Sequence[Sequence[int]]  # B: the ids that the student saw
    teacher_prompts: Sequence[Sequence[int]]  # B: the ids that the teacher sees; any in a row without weight
    response_BR: np.ndarray  # int32
    weight_BR: np.ndarray  # float32: 1 where the loss lies, 0 elsewhere
    sampler_logp_BR: np.ndarray  # float32: log-probs that the sampler reported


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that learns. The frozen tree is a separate argument everywhere."""

    step: jax.Array  # int32: updates tried so far
    params: Params  # float32 master weights
    opt_state: Any
