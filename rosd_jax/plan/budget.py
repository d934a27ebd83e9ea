"""Memory per chip in every stage: bytes by kind.

What is resident between stages is exact: the sizes of its shards. What a stage needs in addition is estimated
from the arrays that it cannot do without at its peak; XLA decides about the rest. So a plan is an estimate
until the stage is compiled. docs/performance.md compares the two under "The plan against the compiler".

    resident(job)                    -> bytes by kind between the stages of an update
    decoding(job, engine, shape, capacity), teacher(job), student(job), optimizer(job)
                                     -> bytes by kind that the running stage needs in addition

S and T are the widths of the student's and the teacher's rows in tokens, D and F the model's outer and inner
width, V the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from rosd_jax.kernels.flash_attention.xla import QUERY_BLOCK
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
MEMORY_KINDS = (
    "parameters",
    "optimizer",
    "moving average",
    "frozen",
    "gradients",
    "decoding weights",
    "cache",
    "activations",
    "temporaries",
)
BACKWARD_BLOCKS = 2  # one layer's recomputed activations, and their gradients


@dataclass(frozen=True)
class Job:
    """One run on one mesh, without its weights."""

    config: Settings
    model: Qwen3Config
    mesh: Mesh
    platform: str  # of the chips: "tpu", "cuda" or "cpu". The mesh's devices may only represent them
    trees: Trees
    update: Update

    @property
    def item(self) -> int:
        """Bytes per number of the compute type."""
        return jnp.dtype(self.model.dtype).itemsize

    @property
    def tensor(self) -> int:
        """Number of devices that heads and widths are split over."""
        return self.mesh.shape["tensor"]

    @property
    def adapters(self) -> bool:
        """Whether adapters are trained instead of all weights."""
        return self.config.model.lora.rank > 0

    @property
    def table(self) -> int:
        """Numbers per chip in the embedding, or the head, once it is gathered along fsdp."""
        V = self.model.vocab_size
        return (V // self.tensor if V % self.tensor == 0 else V) * self.model.hidden_size

    @property
    def layer(self) -> int:
        """Numbers per chip in one layer's matrices, once they are gathered along fsdp."""
        return layer_weights(self.model) // self.tensor


def shard_bytes(tree: Any, shardings: Any, dtype: Any = None) -> int:
    """Bytes per chip of a tree of arrays or shapes; `dtype` replaces the leaves' own types."""

    def leaf_bytes(x: Any, sharding: NamedSharding) -> int:
        return math.prod(sharding.shard_shape(x.shape)) * jnp.dtype(dtype or x.dtype).itemsize

    return sum(jax.tree.leaves(jax.tree.map(leaf_bytes, tree, shardings)))


def resident(job: Job) -> Bytes:
    """What is in memory between stages."""
    state = job.trees.state
    places = job.trees.shardings
    kept = {
        "parameters": shard_bytes(state.params, places.params),
        "optimizer": shard_bytes(state.opt_state, places.opt_state),
        "frozen": frozen_bytes(job) if job.config.model.frozen == "device" else 0,
    }
    if state.ema_params is not None:
        kept["moving average"] = shard_bytes(state.ema_params, places.ema_params)
    return kept


def gradients(job: Job) -> Bytes:
    """The accumulated gradient, to which every micro-batch of an update adds."""
    params = job.trees.state.params
    places = job.trees.shardings.params
    return {"gradients": shard_bytes(params, places, job.config.optimizer.grad_dtype)}


def decoding(job: Job, engine: Engine, shape: CallShape, capacity: Capacity) -> Bytes:
    """Rollouts, reflections or an evaluation, in one engine call of this shape; `capacity` is one shard's.

    The peak is the weights and the KV cache together with the larger of two: the activations of a prefill
    pass, or one decoding step's logits with copies of the head and of one layer's weights.
    """
    model = job.model
    rows = shape.rows // row_devices(job.mesh)
    shapes = jax.eval_shape(partial(fuse, config=model), job.trees.base)
    places = jax.tree.map(lambda spec: NamedSharding(job.mesh, spec), decoder_specs(model, job.mesh))
    positions = (capacity.prompt_pages + capacity.response_pages) * engine.limits.page
    throughout = {
        "decoding weights": shard_bytes(shapes, places),
        "cache": positions * position_bytes(model) // job.tensor,
    }
    width = pass_widths(shape.longest)[0]
    prompts = max(1, min(shape.prompts, PASS_TOKENS // width))  # of one prefill pass
    # Four bytes each for random numbers, tokens and log-probs; the last two exist twice.
    responses = 5 * 4 * rows * engine.limits.max_new
    logits = 2 * 4 * capacity.slots * job.table // model.hidden_size
    prefill = {"activations": block_bytes(job, prompts * width) + scores_bytes(job, prompts, width)}
    step = {"temporaries": (job.table + job.layer) * job.item + logits + responses}
    return throughout | max(prefill, step, key=_total)


def teacher(job: Job) -> Bytes:
    """The forward pass of one micro-batch at the teacher's greatest width, and its hidden states."""
    S, T = job.update.longest
    rows = job.config.batch.device_rows
    hidden = rows * (T + S) * job.model.hidden_size * job.item
    block = block_bytes(job, rows * T) + scores_bytes(job, rows, T)
    averages = job.config.averages
    reads_frozen = not averages or job.adapters
    transferred = frozen_bytes(job) if reads_frozen and job.config.model.frozen == "host" else 0
    cast = cast_bytes(job) if averages else 0
    return {"frozen": transferred, "activations": block + hidden, "temporaries": cast}


def student(job: Job) -> Bytes:
    """The forward and backward pass of one micro-batch at the student's greatest width.

    The peak is either in the loss, which needs whole heads, or in the backward pass, where the gradients of
    the micro-batch exist next to the accumulated ones.
    """
    model = job.model
    config = job.config
    S, _ = job.update.longest
    rows = config.batch.device_rows
    tokens = rows * S
    block_input = tokens * model.hidden_size * job.item
    block = block_bytes(job, tokens) + scores_bytes(job, rows, S)
    attention = tokens * model.num_attention_heads * model.head_dim * job.item // job.tensor
    saved = {
        "none": model.num_hidden_layers * saved_bytes(job, rows, S),
        "block": model.num_hidden_layers * block_input,
        "attention": model.num_hidden_layers * (block_input + attention),
        "offload": 2 * block_input,  # two layers' inputs are on the device at a time
    }[config.model.remat]
    trained = job.trees.state.params["blocks"]
    places = job.trees.shardings.params["blocks"]
    cast = cast_bytes(job)
    if job.adapters:  # student and teacher have the same head, which is frozen
        head = job.item
        head_gradient = 0
    else:
        head = 2 * job.item if config.distills else job.item
        head_gradient = 4
    logits = min(config.loss.chunk, tokens) * job.table // model.hidden_size * (8 + job.item)
    # Adapters are trained on the frozen weights, which are transferred to the device if they are on the host.
    brought = frozen_bytes(job) if job.adapters and config.model.frozen == "host" else 0
    loss = {
        "frozen": brought,
        "activations": saved + block_input,
        "temporaries": cast + job.table * (head + head_gradient) + logits,
    }
    backward = {
        "frozen": brought,
        "activations": saved + BACKWARD_BLOCKS * block,
        "temporaries": cast + shard_bytes(trained, places) + job.table * head_gradient,
    }
    return max(loss, backward, key=_total)


def optimizer(job: Job) -> Bytes:
    """AdamW's step."""
    # XLA for TPU writes the new state over the old one. For CPU it needs two more trees, and a third for a
    # moving average; GPUs are assumed to be like CPUs here, which nothing has confirmed.
    if job.platform == "tpu":
        return {"temporaries": 0}
    more = 3 if job.config.averages else 2
    return {"temporaries": more * shard_bytes(job.trees.state.params, job.trees.shardings.params)}


def cast_bytes(job: Job) -> int:
    """Bytes per chip of the trained layers, or of their average, cast to the compute type; 0 for float32."""
    trained = job.trees.state.params["blocks"]
    places = job.trees.shardings.params["blocks"]
    return 0 if job.item == 4 else shard_bytes(trained, places, job.model.dtype)


def frozen_bytes(job: Job) -> int:
    """Bytes per chip of the frozen weights."""
    return shard_bytes(job.trees.base, job.trees.frozen_shardings, job.model.dtype)


def block_bytes(job: Job, tokens: int) -> int:
    """Bytes per chip of one layer's activations at the peak of its forward pass over `tokens` tokens."""
    D, F, heads = widths(job)
    norm = 4 * D  # float32
    return tokens * (2 * D * job.item + norm + max(heads, 3 * F) * job.item)


def widths(job: Job) -> tuple[int, int, int]:
    """D; and per chip F, and the width of queries, keys, values and attention output together."""
    model = job.model
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    inner = model.intermediate_size // job.tensor
    return model.hidden_size, inner, heads * model.head_dim // job.tensor


def scores_bytes(job: Job, rows: int, T: int) -> int:
    """Bytes per chip of the attention scores of one block of queries, and their softmax.

    Only float32 needs them: in bfloat16 attention is a kernel (kernels/flash_attention).
    """
    if job.item < 4:
        return 0
    return 2 * 4 * rows * (job.model.num_attention_heads // job.tensor) * min(T, QUERY_BLOCK) * T


def saved_bytes(job: Job, rows: int, T: int) -> int:
    """Bytes per chip that one layer saves for its backward pass if nothing is recomputed."""
    D, F, heads = widths(job)
    return rows * T * (8 * D + 2 * heads + 5 * F) * job.item + scores_bytes(job, rows, T)


def _total(by_kind: Bytes) -> int:
    return sum(by_kind.values())
