"""One decoding step at the shapes of Qwen3-4B on one device: time, roofline fraction, peak memory.

    python -m benchmarks.decode_gpu --implementation=pallas_gpu --out=FILE [--rows=128] [--context=2048] ...

Weights are random bfloat16. Every row is `context` tokens long, and every step feeds its greedy token back at
the same position, so all steps do the same work. The roofline fraction is the memory-bound ideal divided by
the measured time. The ideal reads the weights (except the embedding, of which a step reads a few rows) and
the live keys and values at the bandwidth of a large copy on the same device.

Each process measures one implementation, because the peak memory is the process's; it is null if the device
does not report it. First, attention is compared with its definition on a few rows of different lengths. With
the defaults, weights and KV cache take 44 GiB; `pallas_gpu` needs a Hopper GPU.

Dimensions: B rows, V vocabulary, K key-value heads, E head width, P positions per page, M pages per table.
"""

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode_shared import QWEN3_4B, random_weights
from benchmarks.timing import summary, versions
from rosd_jax.kernels.paged_attention import Operands, write_and_attend, xla
from rosd_jax.models.decoder import Decoder, StepInputs, Weights, decode_step, fuse, local_logits
from rosd_jax.models.qwen3 import Qwen3Config, param_shapes
from rosd_jax.rollout.bandwidth import copy_bandwidth, read_each_step
from rosd_jax.rollout.engine import GPU_OPTIONS

RUN = dict(rows=128, context=2048, page=64, copy_mib=4096, rounds=10, steps=10)


def main(argv: list[str] | None = None) -> None:
    """Measures one implementation and writes one JSON object."""
    parser = argparse.ArgumentParser(description="One decoding step compared with the memory roofline")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--implementation", choices=("xla", "pallas_gpu"), required=True)
    for name, value in (QWEN3_4B | RUN).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    args = parser.parse_args(argv)
    chosen = {name: getattr(args, name) for name in QWEN3_4B | RUN}
    device = jax.devices()[0]
    model = Qwen3Config(*(chosen[name] for name in QWEN3_4B), tie_word_embeddings=True, dtype="bfloat16")
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "device": device.device_kind,
        "versions": versions("jax", "jaxlib"),
        "implementation": args.implementation,
        "sizes": chosen,
        "error": attention_error(args),
        "copy_bytes_a_s": copy_bandwidth(args.copy_mib << 20, args.rounds),
    }
    record |= measure(args, model, record["copy_bytes_a_s"])
    record["peak_bytes"] = (device.memory_stats() or {}).get("peak_bytes_in_use")
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def timed(call: Callable[[], Any], rounds: int, calls: int) -> list[float]:
    """Seconds per call in each round of `calls` calls, which are waited for together; two calls warm up."""
    jax.block_until_ready([call() for _ in range(2)][-1])
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        results = [call() for _ in range(calls)]
        jax.block_until_ready(results[-1])
        times.append((time.perf_counter() - start) / calls)
    return times


def attention_error(args: argparse.Namespace) -> float:
    """Largest difference from the definition, for rows that are idle, short, or end near a page's end."""
    P = args.page
    K = args.kv_heads
    E = args.width
    lengths = np.array([0, 1, P - 1, P, P + 1, args.context], np.int32)
    B = len(lengths)
    M = -(-max(args.context, P + 1) // P)
    q_key, kv_key, cache_key = jax.random.split(jax.random.key(0), 3)
    k_BKE, v_BKE = jax.random.normal(kv_key, (2, B, K, E), jnp.bfloat16)
    operands = Operands(
        jax.random.normal(q_key, (B, args.heads, E), jnp.bfloat16),
        k_BKE,
        v_BKE,
        jax.random.normal(cache_key, (B * M, P, 2 * K, E), jnp.bfloat16),
        jnp.arange(B * M, dtype=jnp.int32).reshape(B, M),
        jnp.asarray(lengths - 1),
        0,
    )
    ours = jax.jit(partial(write_and_attend, implementation=args.implementation))
    pairs = zip(ours(*operands), jax.jit(xla.reference)(operands), strict=True)

    def difference(got: jax.Array, want: jax.Array) -> float:
        return float(np.max(np.abs(np.asarray(got, np.float32) - np.asarray(want, np.float32))))

    return max(difference(got, want) for got, want in pairs)


def measure(args: argparse.Namespace, model: Qwen3Config, bandwidth: float) -> dict[str, Any]:
    """Milliseconds per step, and the roofline fraction at the copy's bandwidth (bytes per second)."""
    # The shapes of `fuse`'s weights, filled directly: float32 parameters would not fit next to them.
    shapes = jax.eval_shape(partial(fuse, config=model), param_shapes(model))
    weights = random_weights(shapes)
    pages = -(-args.context // args.page)
    page = jax.random.normal(
        jax.random.key(1), (args.page, 2 * model.num_key_value_heads, model.head_dim), jnp.bfloat16
    )
    shape = (model.num_hidden_layers * args.rows * pages, *page.shape)
    cache = jax.jit(partial(jnp.broadcast_to, shape=shape))(page)
    table_BM = jnp.arange(args.rows * pages, dtype=jnp.int32).reshape(args.rows, pages)
    position_B = jnp.full(args.rows, args.context - 1, jnp.int32)

    decoder = Decoder(model, attention=args.implementation)
    options = GPU_OPTIONS if jax.default_backend() == "gpu" else None

    @partial(jax.jit, donate_argnums=(1, 2), compiler_options=options)
    def step(weights: Weights, token_B: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        hidden_BD, cache = decode_step(decoder, weights, StepInputs(token_B, position_B, table_BM), cache)
        logits_BV, _ = local_logits(decoder, weights, hidden_BD)
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32), cache

    state = [jnp.zeros(args.rows, jnp.int32), cache]
    del cache  # the step's argument is donated

    def call() -> jax.Array:
        state[:] = step(weights, *state)
        return state[0]

    times = timed(call, args.rounds, args.steps)
    read = sum(x.nbytes for x in jax.tree.leaves(read_each_step(weights)))
    token = 2 * model.num_key_value_heads * model.head_dim * page.dtype.itemsize
    kv = args.rows * args.context * model.num_hidden_layers * token
    ideal = (read + kv) / bandwidth
    return {
        "step_ms": summary(1e3 * s for s in times),
        "weight_bytes": read,
        "kv_bytes": kv,
        "ideal_ms": 1e3 * ideal,
        "roofline": ideal / float(np.median(times)),
    }


if __name__ == "__main__":
    main()
