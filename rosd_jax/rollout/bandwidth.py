"""The roofline of decoding: how fast it could be if memory were all that it waits for.

A step must read the weights once, and every live sequence's keys and values. The memory-bound ideal is the
time that these bytes take at the bandwidth of a large copy on the same device. Divided by the time that was
measured it gives the roofline fraction, which says how much of what the device can do was used.

    measure_roofline(model, tensor)   -> MemoryRoofline
    roofline.seconds(stats)           -> the ideal of one rollout
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from rosd_jax.models.decoder import Weights, fuse
from rosd_jax.models.qwen3 import Qwen3Config, param_shapes
from rosd_jax.types import DecodeStats

COPY_BYTES = 128 << 20
# How many copies are waited for together, as starting one and waiting take time too. On a CPU, where a copy
# takes tens of milliseconds, that does not matter.
COPIES = 8


@dataclass(frozen=True)
class MemoryRoofline:
    """What one device reads, and how fast it can."""

    weight_bytes: float  # a step
    position_bytes: float  # keys and values of one position, all layers
    bandwidth: float  # bytes a second

    def seconds(self, stats: DecodeStats[np.ndarray]) -> float:
        """The memory-bound ideal of the shard of rows that takes longest."""
        shard_bytes = stats.steps * self.weight_bytes + stats.read * self.position_bytes
        return float(np.max(shard_bytes)) / self.bandwidth


def measure_roofline(model: Qwen3Config, tensor: int) -> MemoryRoofline:
    """The roofline of a device that holds 1 / tensor of the heads, inner widths and vocabulary."""
    weights = jax.eval_shape(partial(fuse, config=model), param_shapes(model))
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(read_each_step(weights)))
    bandwidth = copy_bandwidth(COPY_BYTES)
    return MemoryRoofline(weight_bytes / tensor, position_bytes(model) / tensor, bandwidth)


def position_bytes(model: Qwen3Config) -> int:
    """Bytes of the keys and values of one position in all layers."""
    width = 2 * model.num_key_value_heads * model.head_dim * jnp.dtype(model.dtype).itemsize
    return model.num_hidden_layers * width


def read_each_step(weights: Weights) -> Weights:
    """The weights that a step reads whole. Of an embedding that is not the head too, it reads a few rows."""
    return {name: leaves for name, leaves in weights.items() if name != "embed" or "head" not in weights}


def copy_bandwidth(size: int, rounds: int = 3) -> float:
    """Bytes a second, read and written, of copying an array of `size` bytes; the best round."""
    # A mere copy could be elided, and without a donation a CPU's time goes into fresh memory's page faults.
    copy = jax.jit(lambda x: x + 1, donate_argnums=0)
    copies = 1 if jax.default_backend() == "cpu" else COPIES
    x = jax.block_until_ready(copy(jnp.zeros(size // 4, jnp.int32)))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(copies):
            x = copy(x)
        jax.block_until_ready(x)
        times.append(time.perf_counter() - start)
    return 2 * size * copies / min(times)
