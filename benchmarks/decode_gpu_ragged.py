"""256 rows of ragged lengths on one GPU: our engine, or transformers with a static cache and torch.compile.

    python -m benchmarks.decode_gpu_ragged --contestant=ours --out=FILE [--share=0.25] [--rows=256] ...
    python -m benchmarks.decode_gpu_ragged --contestant=transformers --out=FILE [--batch=256] ...

The shapes are Qwen3-4B's, the weights random bfloat16. Each prompt has `samples` rows, and the lognormal
lengths are the same for both contestants. Ours stops each row at its own length and gets a KV cache of
`share` times the size of a dense one, [rows, prompt + most]. transformers runs batches of `batch` rows, each
until its longest row is done, with a dense static cache. Times are of whole calls, prefill included, after a
first one that compiles. Each process measures one contestant, because each reserves the device's memory.
"""

# pyright: reportMissingImports=false
# Peers are installed in environments of their own.

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.decode_shared import QWEN3_4B, lengths, random_weights
from benchmarks.timing import seconds, summary, versions

RUN = dict(rows=256, samples=8, prompt=256, mean=188, most=1024, batch=256, rounds=2, page=64)


def main(argv: list[str] | None = None) -> None:
    """Measures one contestant and writes one JSON object."""
    parser = argparse.ArgumentParser(description="Ragged rows on one GPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--contestant", choices=("ours", "transformers"), required=True)
    parser.add_argument("--share", type=float, default=0.25)
    for name, value in (QWEN3_4B | RUN).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    args = parser.parse_args(argv)
    measure = dict(ours=ours, transformers=transformers)[args.contestant]
    length_B = lengths(args.rows, args.mean, args.most, seed=0)
    record = dict(date=time.strftime("%Y-%m-%d"), contestant=args.contestant, tokens=int(length_B.sum()))
    record |= dict(longest=int(length_B.max()), sizes={name: getattr(args, name) for name in QWEN3_4B | RUN})
    record |= measure(args, prompts(args), length_B)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


def prompts(args: argparse.Namespace) -> np.ndarray:
    """Ids of the distinct prompts, [rows / samples, prompt]."""
    shape = (args.rows // args.samples, args.prompt)
    return np.random.default_rng(1).integers(2, args.vocab, shape).astype(np.int32)


def ours(args: argparse.Namespace, prompt_NP: np.ndarray, length_B: np.ndarray) -> dict[str, Any]:
    """Seconds of the engine, its memory and its roofline fraction."""
    import jax

    from rosd_jax.models.qwen3 import Qwen3Config, param_shapes
    from rosd_jax.rollout.bandwidth import measure_roofline, position_bytes
    from rosd_jax.rollout.batching import Request
    from rosd_jax.rollout.engine import Engine
    from rosd_jax.rollout.limits import Limits
    from rosd_jax.rollout.sampler import Sampling

    sizes = (getattr(args, name) for name in QWEN3_4B)
    model = Qwen3Config(*sizes, tie_word_embeddings=True, dtype="bfloat16")
    # bfloat16, since neither contestant needs float32 weights.
    params = random_weights(param_shapes(model))
    dense = args.rows * (args.prompt + args.most)  # positions
    pages = int(args.share * dense) // args.page
    response_pages = pages - len(prompt_NP) * -(-args.prompt // args.page)
    limits = Limits(args.most, args.prompt, page_length=args.page, response_pages=response_pages)
    engine = Engine(model, None, limits, Sampling(1.0))
    ids = [prompt_NP[row // args.samples].tolist() for row in range(args.rows)]
    requests = [Request(ids[row], row, int(length)) for row, length in enumerate(length_B)]
    rollouts = []

    def call() -> None:
        rollouts.append(engine.generate(params, requests, jax.random.key(0)))

    times = [seconds(call) for _ in range(args.rounds + 1)]
    rollout = rollouts[-1]
    np.testing.assert_array_equal(rollout.length_B, length_B)
    assert np.isfinite(rollout.logp_BR).all()
    stats = jax.tree.map(lambda x: float(np.sum(x)), rollout.stats)
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions("jax", "jaxlib"),
        "first_s": times[0],
        "seconds": summary(times[1:]),
        "steps": stats.steps,
        "preempted": stats.preempted,
        "idle_share": 1 - stats.busy / stats.slots,
        "roofline": measure_roofline(model, 1).seconds(rollout.stats) / float(np.median(times[1:])),
        "cache_bytes": pages * args.page * position_bytes(model),
        "dense_bytes": dense * position_bytes(model),
        "peak_bytes": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
    }


def transformers(args: argparse.Namespace, prompt_NP: np.ndarray, length_B: np.ndarray) -> dict[str, Any]:
    """Seconds of `generate`, which compiles its decoding step on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.width,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    gpu = torch.cuda.is_available()
    with torch.device("cuda" if gpu else "cpu"):
        net = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        ids = torch.tensor(np.repeat(prompt_NP, args.samples, axis=0)).long()

    @torch.inference_mode()
    def call(most: int = args.most) -> None:
        for at in range(0, args.rows, args.batch):
            some = ids[at : at + args.batch]
            new = min(most, int(length_B[at : at + args.batch].max()))

            def done(text: torch.Tensor, _: Any, new: int = new) -> torch.Tensor:
                return text.new_full((len(text),), text.shape[1] >= args.prompt + new, dtype=torch.bool)

            out = net.generate(
                some,
                attention_mask=torch.ones_like(some),
                pad_token_id=0,
                do_sample=True,
                temperature=1.0,
                top_p=1.0,
                top_k=0,
                cache_implementation="static",
                max_new_tokens=args.most,
                min_new_tokens=new,
                stopping_criteria=[done],
            )
            assert out.shape[1] == args.prompt + new, out.shape
        if gpu:
            torch.cuda.synchronize()

    first = seconds(lambda: call(16))  # compiles; the cache is as large as in the calls that are timed
    print(f"the first 16 tokens took {first:.0f} s", flush=True)
    times = [seconds(call) for _ in range(args.rounds)]
    return {
        "device": torch.cuda.get_device_name() if gpu else "cpu",
        "versions": versions("torch", "transformers"),
        "first_s": first,
        "seconds": summary(times),
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
    }


if __name__ == "__main__":
    main()
