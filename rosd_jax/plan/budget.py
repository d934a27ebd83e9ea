"""Bytes of one chip in every stage, by kind.

What lies in memory between stages is exact: the sizes of its shards. What else a stage holds is
arithmetic over the arrays that it cannot do without at its fullest; XLA decides about the rest. So a plan
is an estimate until a stage is compiled (docs/performance.md compares the two: "The plan against the
compiler").

    resident(job)                    -> bytes by kind between the stages of an update
    decoding(job, engine, shape, capacity), teacher(job), student(job), optimizer(job)
                                     -> bytes by kind while the stage runs, what is resident left out
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rosd_jax.kernels.flash_attention.xla import QUERIES
from rosd_jax.models.decoder import fuse
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import decoder_specs, row_devices
from rosd_jax.plan.roofline import layer_weights
from rosd_jax.rollout.bandwidth import position_bytes
from rosd_jax.rollout.decode_loop import Capacity
from rosd_jax.rollout.engine import CallShape, Engine
from rosd_jax.rollout.prefill import PASS_TOKENS, pass_widths
from rosd_jax.settings import Settings
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import Update

Bytes = dict[str, int]
KINDS = (
    "parameters",
    "optimizer",
    "frozen",
    "gradients",
    "decoding weights",
    "cache",
    "activations",
    "temporaries",
)
BACKWARD_BLOCKS = 2  # a layer computed again, and the gradients of what it computes


@dataclass(frozen=True)
class Job:
    """One experiment on one mesh, without its weights."""

    config: Settings
    model: Qwen3Config
    mesh: Mesh
    trees: Trees
    update: Update

    @property
    def item(self) -> int:
        """Bytes of a number of the compute type."""
        return jnp.dtype(self.model.dtype).itemsize

    @property
    def tensor(self) -> int:
        """Devices that split heads and widths."""
        return self.mesh.shape["tensor"]

    @property
    def adapters(self) -> bool:
        """Whether adapters learn, in place of the whole model."""
        return self.config.model.lora.rank > 0

    @property
    def table(self) -> int:
        """Numbers of the embedding, or the head, on one chip where it is gathered along fsdp."""
        V = self.model.vocab_size
        return (V // self.tensor if V % self.tensor == 0 else V) * self.model.hidden_size

    @property
    def layer(self) -> int:
        """Numbers of one layer's matrices on one chip, gathered likewise."""
        return layer_weights(self.model) // self.tensor


def shard_bytes(tree: Any, shardings: Any, dtype: Any = None) -> int:
    """Of one chip's shards of a tree of arrays or shapes."""
    sizes = jax.tree.map(
        lambda x, s: math.prod(s.shard_shape(x.shape)) * jnp.dtype(dtype or x.dtype).itemsize, tree, shardings
    )
    return sum(jax.tree.leaves(sizes))


def resident(job: Job) -> Bytes:
    """What stays while stages come and go."""
    state, places = job.trees.state, job.trees.shardings
    return {
        "parameters": shard_bytes(state.params, places.params),
        "optimizer": shard_bytes(state.opt_state, places.opt_state),
        "frozen": frozen_bytes(job) if job.config.model.frozen == "device" else 0,
    }


def gradients(job: Job) -> Bytes:
    """The sum of gradients, which an update's micro-batches add to."""
    params, places = job.trees.state.params, job.trees.shardings.params
    return {"gradients": shard_bytes(params, places, job.config.optimizer.grad_dtype)}


def decoding(job: Job, engine: Engine, shape: CallShape, capacity: Capacity) -> Bytes:
    """Rollouts, reflections or an evaluation, in a call of this shape. capacity: of a shard.

    Next to weights and cache there is either a pass over prompts or a step's logits, and a copy of the
    table and of a layer that they are multiplied by.
    """
    model, mine = job.model, shape.rows // row_devices(job.mesh)
    shapes = jax.eval_shape(partial(fuse, config=model), job.trees.base)
    places = jax.tree.map(lambda spec: NamedSharding(job.mesh, spec), decoder_specs(model, job.mesh))
    positions = (capacity.prompt_pages + capacity.response_pages) * engine.limits.page
    lasting = {
        "decoding weights": shard_bytes(shapes, places),
        "cache": positions * position_bytes(model) // job.tensor,
    }
    width = pass_widths(shape.longest)[0]
    at_once = max(1, min(shape.prompts, PASS_TOKENS // width))
    # Random numbers, tokens and log-probs, and the last two once more.
    texts = 5 * 4 * mine * engine.limits.max_new
    logits = 2 * 4 * capacity.slots * job.table // model.hidden_size
    prefill = {"activations": block_bytes(job, at_once * width) + scores_bytes(job, at_once, width)}
    step = {"temporaries": (job.table + job.layer) * job.item + logits + texts}
    return lasting | max(prefill, step, key=_total)


def teacher(job: Job) -> Bytes:
    """One micro-batch's forward pass over teacher's rows of the greatest width, and its hidden states."""
    S, T = job.update.longest
    rows = job.config.batch.device_rows
    hidden = rows * (T + S) * job.model.hidden_size * job.item
    brought = 0 if job.config.model.frozen == "device" else frozen_bytes(job)
    block = block_bytes(job, rows * T) + scores_bytes(job, rows, T)
    return {"frozen": brought, "activations": block + hidden}


def student(job: Job) -> Bytes:
    """One micro-batch's forward and backward pass over the student's rows of the greatest width.

    It is fullest in the loss, which holds whole tables, or in the backward pass, which holds the
    micro-batch's gradients next to their sum.
    """
    model, config = job.model, job.config
    S, _ = job.update.longest
    tokens = config.batch.device_rows * S
    stream = tokens * model.hidden_size * job.item
    block = block_bytes(job, tokens) + scores_bytes(job, config.batch.device_rows, S)
    attended = tokens * model.num_attention_heads * model.head_dim * job.item // job.tensor
    kept = {
        "none": model.num_hidden_layers * kept_bytes(job, config.batch.device_rows, S),
        "block": model.num_hidden_layers * stream,
        "attention": model.num_hidden_layers * (stream + attended),
        "offload": 2 * stream,
    }[config.model.remat]
    params, places = job.trees.state.params, job.trees.shardings.params
    learning = params["blocks"], places["blocks"]
    cast = 0 if job.item == 4 else shard_bytes(*learning, model.dtype)
    # Heads of student and teacher, which adapters leave one and frozen, and the gradient of the student's.
    head, gradient = (job.item, 0) if job.adapters else (2 * job.item, 4)
    logits = min(config.loss.chunk, tokens) * job.table // model.hidden_size * (8 + job.item)
    # Adapters are trained on the frozen tree, which is brought to the device if it is kept on the host.
    brought = frozen_bytes(job) if job.adapters and config.model.frozen == "host" else 0
    loss = {
        "frozen": brought,
        "activations": kept + stream,
        "temporaries": cast + job.table * (head + gradient) + logits,
    }
    backward = {
        "frozen": brought,
        "activations": kept + BACKWARD_BLOCKS * block,
        "temporaries": cast + shard_bytes(*learning) + job.table * gradient,
    }
    return max(loss, backward, key=_total)


def optimizer(job: Job) -> Bytes:
    """AdamW's step. XLA for TPU writes over the state that it is given; for CPU it keeps two more trees."""
    if job.mesh.devices.flat[0].platform == "tpu":
        return {"temporaries": 0}
    return {"temporaries": 2 * shard_bytes(job.trees.state.params, job.trees.shardings.params)}


def frozen_bytes(job: Job) -> int:
    """Of the frozen tree's shards."""
    return shard_bytes(job.trees.base, job.trees.frozen_shardings, job.model.dtype)


def block_bytes(job: Job, tokens: int) -> int:
    """The arrays of one layer's forward pass that are there together, of so many tokens."""
    D, F, heads = widths(job)
    norm = 4 * D  # float32
    return tokens * (2 * D * job.item + norm + max(heads, 3 * F) * job.item)


def widths(job: Job) -> tuple[int, int, int]:
    """Of the model, and on one chip of the inner layer and of queries, keys, values and output together."""
    model = job.model
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    inner = model.intermediate_size // job.tensor
    return model.hidden_size, inner, heads * model.head_dim // job.tensor


def scores_bytes(job: Job, rows: int, T: int) -> int:
    """Of a block of queries, where attention has no kernel: in float32 (kernels/flash_attention)."""
    if job.item < 4:
        return 0
    return 2 * 4 * rows * (job.model.num_attention_heads // job.tensor) * min(T, QUERIES) * T


def kept_bytes(job: Job, rows: int, T: int) -> int:
    """What one layer keeps for its backward pass where nothing is computed again."""
    D, F, heads = widths(job)
    return rows * T * (8 * D + 2 * heads + 5 * F) * job.item + scores_bytes(job, rows, T)


def _total(some: Bytes) -> int:
    return sum(some.values())
