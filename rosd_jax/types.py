"""The records of one training step, and the key to array names.

    prompts -> rollout -> grade -> reflect -> lesson -> update -> (evaluate | checkpoint | report)

Each stage reads one record and returns the next; nothing later writes to anything earlier. Records of text
are on the host (tuples, NumPy); records of arrays are pytrees. A rollout may be in either place, and its type
says where: `HostRollout` or `DeviceRollout`.

Names of arrays end in their dimensions. Modules with dimensions of their own have their own key.
Dimensions: B rows of a step's batch, R response tokens.
A batch has N prompts with G samples each, prompt by prompt, so B = N x G.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Generic, Literal, TypeVar

import jax
import numpy as np

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}
Array = jax.Array | np.ndarray
Params = Any  # a tree of arrays as models/qwen3.py defines it
Span = tuple[int, int]  # half-open [start, stop)
Progress = Callable[[int, int], None]  # called with how much of a stage is done, and of how much
A = TypeVar("A", jax.Array, np.ndarray)  # where a record's arrays are: on the devices, or on the host


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


class Stream(IntEnum):
    """The independent streams of random numbers in a run, each folded into the key of its seed."""

    ROLLOUT = 0
    REFLECT = 1
    EVAL = 2
    ADAPTERS = 2**32 - 1  # initial values of LoRA adapters

    def key(self, seed_key: jax.Array) -> jax.Array:
        """The key of this stream. seed_key: jax.random.key(seed)."""
        return jax.random.fold_in(seed_key, int(self))


@dataclass(frozen=True)
class Problem:
    """One row of a data set, as text (host)."""

    uid: str  # "<set>/<row number>", stable across runs
    dataset: str  # the data set: "physics", "tooluse", "aime24", ...
    kind: str  # its grader: "mcq" | "math" | "tooluse" | "gym" | "own" (the user's reward function)
    messages: tuple[Message, ...]  # system and user messages
    answer: str  # the gold answer; empty only if kind is "own"
    extra: str = ""  # the row's other fields as a JSON object, for the user's reward function

    @property
    def question(self) -> str:
        """The last user message, which reflector and teacher are shown as the problem."""
        return next(m["content"] for m in reversed(self.messages) if m["role"] == "user")


@dataclass(frozen=True)
class Prompts:
    """The N problems of one step and their prompts (host)."""

    problems: tuple[Problem, ...]
    ids: tuple[Sequence[int], ...]  # token ids of each prompt, chat template applied


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class DecodeStats(Generic[A]):
    """Counts of a decoding call, one entry per shard of the rows; int32 unless noted."""

    steps: A  # decoding steps
    busy: A  # occupied slots, summed over steps
    slots: A  # all slots, summed over steps
    preempted: A  # sequences preempted because no page was free
    read: A  # float32: positions attended to, summed over occupied slots and steps

    @property
    def idle_share(self) -> float:
        """Share of slot-steps in which the slot held no sequence; 0 if nothing was decoded."""
        slots = int(np.sum(self.slots))
        if slots == 0:
            return 0.0
        return 1 - int(np.sum(self.busy)) / slots


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout(Generic[A]):
    """B sampled responses. Rows are prompt-major: row b answers prompt b // G."""

    tokens_BR: A  # int32; 0 after the end
    length_B: A  # int32; includes the stop token
    logp_BR: A  # float32; log-prob of each token at the sampling temperature, 0 after the end
    finished_B: A  # bool; True: ended with a stop token or string, False: truncated at the token limit
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
    thinking_open: bool  # the prompts end inside a thinking block, so the texts begin in it

    @property
    def group_size(self) -> int:
        """G: responses to each prompt."""
        return len(self.texts) // len(self.prompts.problems)

    def problem(self, row: int) -> Problem:
        """The problem that a row answers."""
        return self.prompts.problems[row // self.group_size]


@dataclass(frozen=True)
class Reflection:
    """What the reflector said about one rollout, and where its quote is in the response (host).

    Methods that do not reflect have one too: with the solution that the teacher is shown, and the note.
    """

    raw: str | None = None  # the reflector's whole answer; None: it was not asked about this rollout
    idea: str | None = None  # the corrective (or key) idea; None: the answer has no such tag
    idea_source: Literal["reflector", "oracle", "swapped"] = "reflector"  # else distill/ablation.py's
    quote: str | None = None  # the error quote as the reflector wrote it
    char_span: Span | None = None  # where the quote is in the response, in characters
    token_span: Span | None = None  # the same in tokens
    span_source: Literal["reflector", "oracle", "moved"] = "reflector"  # of both
    ambiguous: bool = False  # the quote occurs more than once
    solution: str | None = None  # the correct sibling that the reflector, or the teacher, is shown, if any
    note: str = ""  # why the rollout is out of the loss, a key of distill/notes.py: NOTES; "": it is in it


@dataclass(frozen=True)
class Reflected:
    """A graded rollout with one reflection per row (host)."""

    graded: Graded
    reflections: tuple[Reflection, ...]  # B
    answers: HostRollout | None = None  # the reflector's, one row per rollout it was asked about


@dataclass(frozen=True)
class Lesson:
    """The input of the update (host). Response ids are the sampled ones, never tokenised again."""

    prompts: Sequence[Sequence[int]]  # B: token ids of the student's prompt
    teacher_prompts: Sequence[Sequence[int]]  # B: token ids of the teacher's; unused if a row is not taught
    response_BR: np.ndarray  # int32
    weight_BR: np.ndarray  # float32; 1 for tokens on which the teacher teaches, else 0
    sampler_logp_BR: np.ndarray  # float32; log-probs that the sampler reported
    # float32; weights of the tokens in the policy gradient (distill/policy.py); None: there is none
    policy_BR: np.ndarray | None = None

    @property
    def active_BR(self) -> np.ndarray:
        """Which tokens are in the loss: taught, in the policy gradient, or both."""
        taught_BR = self.weight_BR != 0
        return taught_BR if self.policy_BR is None else taught_BR | (self.policy_BR != 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that training changes. The frozen tree is a separate argument everywhere."""

    step: jax.Array  # int32; updates so far, skipped ones included
    params: Params  # float32 master weights; with LoRA, the adapters only
    opt_state: Any  # of optax
    ema_params: Params | None = None  # float32 moving average of params, which teaches; None: there is none
