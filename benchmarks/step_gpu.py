"""Attention, updates and a whole step at real shapes and with random weights on one GPU, in a few minutes.

    python -m benchmarks.step_gpu --out=DIR
        [--parts=attention,update-0.6b,update-1.7b,update-4b-lora,loss,step-4b-lora]
        [--scale=0.25] [--prompts=32] [--minutes=9] [--tiny]

    attention    `cudnn_gpu`, `xla` and `reference`: times, and errors relative to float32
    update-*     one update of rows of 8,192 tokens: MFU, compile seconds, peak memory
    loss         benchmarks/topk_jsd.py with 2560 x 16384: also torch and Liger, if installed
    step-*       rollouts, reflections and update of `prompts` x 8 rows at `scale` times the paper's lengths:
                 seconds and share of each stage, roofline fraction of decoding, MFU

`*` is 0.6b, 1.7b, 4b or 8b; `-lora` trains adapters of rank 64 instead of all parameters. The estimated
memory is 15 GB for 0.6b, 40 to 50 for 1.7b, 100 for 4b, and 40 for 4b with adapters.

Each part runs in a process of its own, so that its peak memory is measured and a failure does not stop the
others. step_gpu.json and step_gpu.md in DIR are rewritten after each part. `--tiny` shrinks everything for a
trial on CPU.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import step_stages
from benchmarks.decode_peers import MARK, ROOT
from benchmarks.step_flops import QWEN3
from benchmarks.step_rows import Lengths, Sizes, lesson
from benchmarks.timing import seconds, summary, table, versions
from rosd_jax.config import default_config, validate
from rosd_jax.kernels.flash_attention import causal_attention
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import make_mesh
from rosd_jax.settings import Settings
from rosd_jax.train.update import make_optimizer, make_update

TINY = Qwen3Config(512, 64, 96, 2, 4, 2, 16, tie_word_embeddings=True)
RANK = 64  # of the adapters
PROMPT = 512  # prompt tokens of a row of the update
PARTS = "attention,update-0.6b,update-1.7b,update-4b-lora,loss,step-4b-lora"
Record = dict[str, Any]


def main(argv: list[str] | None = None) -> None:
    """Runs the parts, each in a new process; with --part, measures one part in this process."""
    args = parse(argv)
    if args.part:
        record = run_part(args.part, args)
        print(MARK + json.dumps(record), flush=True)
        return
    stop_at = time.monotonic() + 60 * args.minutes
    results: Record = {"date": time.strftime("%Y-%m-%d"), "versions": versions("jax", "jaxlib"), "parts": {}}
    args.out.mkdir(parents=True, exist_ok=True)
    for part in args.parts.split(","):
        results["parts"][part] = work(part, args, stop_at - time.monotonic())
        (args.out / "step_gpu.json").write_text(json.dumps(results, indent=1) + "\n")
        (args.out / "step_gpu.md").write_text(render(results) + "\n")
    print(render(results))


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command-line options."""
    parser = argparse.ArgumentParser(description="The update and a whole step on one GPU")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", default=PARTS)
    parser.add_argument("--scale", type=float, default=0.25, help="the step's lengths over the paper's")
    parser.add_argument("--prompts", type=int, default=32, help="number of prompts of the step")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit for all parts together")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def work(part: str, args: argparse.Namespace, left: float) -> Record:
    """Runs one part in a new process, for at most `left` seconds. A failure gives a record too."""
    command = [sys.executable, "-m", "benchmarks.step_gpu", f"--part={part}", f"--out={args.out.absolute()}"]
    command += [f"--prompts={args.prompts}", f"--scale={args.scale}", *["--tiny"] * args.tiny]
    env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    start = time.monotonic()
    try:
        ran = subprocess.run(command, cwd=ROOT, env=env, timeout=max(left, 1), capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return {"outcome": "out of time", "wall_s": time.monotonic() - start}
    found = [line for line in ran.stdout.splitlines() if line.startswith(MARK)]
    record = json.loads(found[-1].removeprefix(MARK)) if found else {"outcome": ran.stderr[-2000:]}
    return record | {"wall_s": time.monotonic() - start}


def run_part(part: str, args: argparse.Namespace) -> Record:
    """Measures one part in this process."""
    kind, _, which = part.partition("-")
    if kind == "attention":
        return attention(args.tiny)
    if kind == "loss":
        return loss(args.out, args.tiny)
    name, _, suffix = which.partition("-")
    model = TINY if args.tiny else QWEN3[name]
    lora = suffix == "lora"
    if kind == "update":
        return update(model, lora, args.tiny)
    if kind == "step":
        return whole_step(model, lora, args.scale, args.prompts, args.tiny)
    raise ValueError(f"there is no part {part!r}; see --help for the default parts")


def attention(tiny: bool) -> Record:
    """Values, gradients and times of each implementation, for one row of 8,192 tokens of Qwen3-4B or 8B.

    T tokens, H query heads, K key-value heads, E head width.
    """
    T, H, K, E = (96, 4, 2, 16) if tiny else (8192, 32, 8, 128)
    names: tuple[Any, ...] = (
        ("xla", "reference") if jax.default_backend() == "cpu" else ("cudnn_gpu", "xla", "reference")
    )
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((1, T, H, E), (1, T, K, E), (1, T, K, E), (1, T, H, E))
    arrays = [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in zip(keys, shapes, strict=True)]
    operands = arrays[:3]
    weight = arrays[3]

    def with_grads(name: Any) -> Callable[..., Any]:
        out = partial(causal_attention, implementation=name)

        def scalar(*qkv: jax.Array) -> jax.Array:
            return jnp.vdot(out(*qkv).astype(jnp.float32), weight.astype(jnp.float32))

        return jax.jit(lambda *qkv: (out(*qkv), *jax.grad(scalar, argnums=(0, 1, 2))(*qkv)))

    with jax.default_matmul_precision("highest"):
        exact = with_grads("reference")(*(x.astype(jnp.float32) for x in operands))
    found: Record = {"device": jax.devices()[0].device_kind, "shape": [1, T, H, K, E]}
    forward_flops = 4 * T * T * H * E / 2  # causal; the backward pass takes 2.5 times as many
    for name in names:
        forward = jax.jit(partial(causal_attention, implementation=name))
        both = with_grads(name)
        pairs = zip("out dq dk dv".split(), both(*operands), exact, strict=True)
        errors = {what: relative_error(got, want) for what, got, want in pairs}
        times = {"forward_ms": timed(forward, operands), "forward_backward_ms": timed(both, operands)}
        rate = 3.5 * forward_flops / times["forward_backward_ms"]["median"] * 1e3
        found[name] = {"error": errors, **times, "flops_s": rate}
    return found


def relative_error(got: jax.Array, want: jax.Array) -> float:
    """Norm of the difference divided by the norm of `want`."""
    return float(jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want))


def timed(call: Callable[..., Any], operands: list[jax.Array]) -> dict[str, float]:
    """Milliseconds of ten calls, after one that compiles."""
    times = [1e3 * seconds(lambda: jax.block_until_ready(call(*operands))) for _ in range(11)]
    return summary(times[1:])


def settings(
    model: Qwen3Config, lora: bool, tiny: bool, limits: dict[str, int] | None = None
) -> tuple[Settings, Qwen3Config]:
    """The paper's preset on one device, and the model with its compute type, remat and adapters."""
    config = default_config()
    if lora:
        config.model.lora.rank = RANK
        model = model.replace(lora_scale=config.model.lora.alpha / RANK)
    config.model.update(dtype="float32" if tiny else "bfloat16", remat="block")
    config.loss.topk = 20 if tiny else 100
    config.update_from_flattened_dict(limits or {})
    return validate(config), model.replace(dtype=config.model.dtype, remat=config.model.remat)


def update(model: Qwen3Config, lora: bool, tiny: bool, rows: int = 4, rounds: int = 3) -> Record:
    """Whole updates of rows that need 8,192 positions, with loss on the last quarter."""
    config, model = settings(model, lora, tiny)
    need = 96 if tiny else 8192
    prompt = 16 if tiny else PROMPT
    last = np.full(rows, need - prompt + 1)
    prompt_B = np.full(rows, prompt)
    lengths = Lengths(prompt_B, prompt_B, last, last - need // 4, last)
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    optimizer = make_optimizer(config)
    state, frozen, trees = step_stages.random_trees(config, model, mesh, optimizer)
    run = make_update(config, model, optimizer, mesh, trees.shardings)
    given = lesson(lengths, model.vocab_size)
    losses = []

    def turn() -> None:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics, _ = run(state, frozen, given)
        jax.block_until_ready(state)
        losses.append(float(metrics["loss"]))

    first = seconds(turn)
    times = [seconds(turn) for _ in range(rounds)]
    if not np.isfinite(losses).all():
        raise ValueError(f"the losses are {losses}")
    took = float(np.median(times))
    return {
        "device": jax.devices()[0].device_kind,
        "rows": rows,
        "positions": need,
        "first_s": first,
        "s": summary(times),
        "tokens_s": rows * need / took,
        "peak_bytes": step_stages.peak_bytes(),
    } | step_stages.mfu(model, lengths, took, mesh)


def whole_step(model: Qwen3Config, lora: bool, scale: float, prompts: int, tiny: bool) -> Record:
    """Two steps; the second is timed."""
    sizes = Sizes().scaled(1 / 64, prompts=2) if tiny else Sizes().scaled(scale, prompts)
    workload = step_stages.Workload(sizes)
    if tiny:
        workload = step_stages.Workload(sizes, answer=4.0, most_answer=16)
    config, model = settings(model, lora, tiny, sizes.limits)
    return step_stages.measure(workload, config, model)


def loss(out: Path, tiny: bool) -> Record:
    """Runs the benchmark of the loss kernel, which writes its own files under DIR/loss."""
    quick = ["--quick", "--masks=1,0.3", "--minutes=3", "--only=time", f"--out={out / 'loss'}"]
    small = ["--tiny", "--sizes=16x64"] if tiny else ["--sizes=2560x16384"]
    ran = subprocess.run([sys.executable, "-m", "benchmarks.topk_jsd", *quick, *small], capture_output=True)
    return {"files": str(out / "loss"), "rc": ran.returncode}


def render(results: Record) -> str:
    """One section per part."""
    lines = [f"{results['date']}, {results['versions']}"]
    for part, found in results["parts"].items():
        lines.append(f"\n## {part}, {found['wall_s']:.0f} s\n")
        if "outcome" in found:
            lines.append(found["outcome"])
        elif part == "attention":
            lines.append(render_attention(found))
        elif part.startswith("step"):
            lines.append(step_stages.render(found))
        else:
            lines.append(table(["", "value"], [[key, str(value)] for key, value in found.items()]))
    return "\n".join(lines)


def render_attention(found: Record) -> str:
    """A table with one row per implementation."""
    head = ["attention", "forward ms", "with backward ms", "TFLOP/s", "error of out, dq, dk, dv"]
    rows = []
    for name, got in found.items():
        if isinstance(got, dict):
            times = [f"{got[key]['median']:.3f}" for key in ("forward_ms", "forward_backward_ms")]
            errors = ", ".join(f"{x:.1e}" for x in got["error"].values())
            rows.append([name, *times, f"{got['flops_s'] / 1e12:.1f}", errors])
    return f"{found['device']}, {found['shape']}\n\n{table(head, rows)}"


if __name__ == "__main__":
    main()
