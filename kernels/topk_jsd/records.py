"""The records that the modules of this folder pass to each other.

Dimensions: N rows of whoever holds the record (all of a call or those of one chunk).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Options:
    """What a compiled loss is specialised to. Hashable. `api.py` documents the fields."""

    k: int | None = 100
    alpha: float = 0.5
    tail: str = "bucket"
    temperature: float = 1.0
    num_tokens: int | None = None
    ratio_cap: float | None = None
    chunk: int = 1024
    implementation: str | None = None
    vocab_axis: str | None = None  # inside shard_map: the mesh axis that splits the vocabulary

    def top_k(self, vocab: int) -> int | None:
        """How many tokens of `vocab` to select; None for all of them."""
        tokens = vocab if self.num_tokens is None else self.num_tokens
        if self.k is None or self.k >= tokens:
            return None
        return self.k


class Rows(NamedTuple):
    """The inputs of each row other than its hidden states or logits."""

    weight_N: jax.Array
    tokens_N: jax.Array | None = None  # int32
    sampler_logp_N: jax.Array | None = None


class LossAux(NamedTuple):
    """By-products, without gradient, in the order of the rows; 0 where the weight is 0."""

    divergence_N: jax.Array  # before weight and ratio
    student_logp_N: jax.Array | None  # of the given tokens; None without tokens
    ratio_N: jax.Array  # the capped importance ratio; 1 without a cap
    student_mass_N: jax.Array | None  # probability that the student puts on its top k
    teacher_mass_N: jax.Array | None  # probability that the teacher puts on the same tokens
    chunks_run: jax.Array | None = None  # int32 scalar; None where nothing is chunked


def working_dtype(x: jax.Array) -> jnp.dtype:
    """The dtype of logits and of all that follows: float64 for float64, float32 for anything else."""
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
