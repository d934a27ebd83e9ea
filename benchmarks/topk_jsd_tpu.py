"""The loss as compiled for TPUs, without a TPU: memory, work, and instructions of the row kernel.

    python -m benchmarks.topk_jsd_tpu [--topology=v5p:2x2x1]      one JSON object a line

libtpu compiles ahead of time for a TPU that need not exist here, and dumps the instruction bundles of each
kernel. A bundle takes at least one cycle, so bundles x trips is a lower bound on the kernel's time, without
stalls and memory traffic. Clock rates are assumptions (the vendor's peak / multipliers).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import jax

VOCAB = 151936
K = 100
CHUNK = 1024
# Trips of the bisection: 15.8 on average over blocks of eight rows, half normal and half Zipf logits.
TRIPS = 16

COMPILE_ONLY = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}


class Machine(NamedTuple):
    """One chip: cores that run the kernel, assumed clock in GHz, peak in TFLOP/s, memory in TB/s."""

    cores: int
    ghz: float
    tflops: float
    terabytes: float


MACHINES = {
    "v5e:2x2": Machine(1, 1.5, 197, 0.82),
    "v5p:2x2x1": Machine(2, 1.75, 459, 2.77),
    "v6e:2x2": Machine(1, 1.75, 918, 1.64),
}
# The loops of each pass, by their place in the code.
PASSES = {"candidates": [1], "threshold": [2, 3, 4], "sums": [8, 9, 10], "gradient": [11]}
BISECTION = (3, 4)  # those that run TRIPS times


def main() -> None:
    """Prints one JSON object for each topology."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", choices=MACHINES)
    parser.add_argument("--dump", type=Path, help="compile the row kernel only, and read its bundles here")
    args = parser.parse_args()
    if args.dump:
        compile_rows(args.topology)
        print(json.dumps(row_cycles(args.dump)))
        return
    for name in [args.topology] if args.topology else MACHINES:
        print(json.dumps(report(name)), flush=True)


def report(topology: str) -> dict:
    """Memory of the loss at the widths of Qwen3-4B and 8B, and the row kernel's cycles a row."""
    machine = MACHINES[topology]
    sizes = ((2560, 4096), (4096, 65536))  # width, rows
    cycles = measure_rows(topology)
    total = sum(cycles.values())
    matmul_us = {width: 8 * width * VOCAB / machine.tflops / 1e6 for width, _ in sizes}
    row_us = total / machine.ghz / machine.cores / 1e3
    return {
        "topology": topology,
        "losses": [loss_memory(topology, width, rows) for width, rows in sizes],
        "cycles_a_row": {name: round(x) for name, x in cycles.items()} | {"all": round(total)},
        "row_us": round(row_us, 3),
        "memory_bound_us": round(10 * VOCAB / machine.terabytes / 1e6, 3),
        "share_of_matmuls": {str(width): round(row_us / us, 4) for width, us in matmul_us.items()},
    }


def measure_rows(topology: str) -> dict[str, float]:
    """`row_cycles` from a fresh process, since libtpu reads its flags once. Raises on a failed compile."""
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        env = os.environ | COMPILE_ONLY | {"LIBTPU_INIT_ARGS": flags}
        module = [sys.executable, "-m", "benchmarks.topk_jsd_tpu"]
        command = [*module, f"--topology={topology}", f"--dump={dump}"]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"compiling for {topology} failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def compile_rows(topology: str) -> None:
    """Compiles the row kernel at its real size, with tokens and ratio, for a bfloat16 gradient."""
    import jax
    import jax.numpy as jnp

    from rosd_jax.kernels.topk_jsd import topk_jsd_rows

    put = on_device(topology)
    logits = put(64, VOCAB, dtype=jnp.float32)
    per_row = put(64, dtype=jnp.float32)
    tokens = put(64, dtype=jnp.int32)

    def run(student, teacher, weight, tokens, sampler_logp):
        given = {"tokens_N": tokens, "sampler_logp_N": sampler_logp, "ratio_cap": 2.0}
        return topk_jsd_rows(student, teacher, weight, k=K, grad_dtype=jnp.bfloat16, **given)

    jax.jit(run).lower(logits, logits, per_row, tokens, per_row).compile()


def loss_memory(topology: str, width: int, rows: int) -> dict:
    """Bytes and FLOPs of the compiled loss with both gradients, for bfloat16 operands."""
    import jax
    import jax.numpy as jnp

    from rosd_jax.kernels.topk_jsd import topk_jsd_loss

    put = on_device(topology)

    def loss(hidden, head, teacher_hidden, teacher_head, weight, tokens, sampler_logp):
        given = {"tokens_N": tokens, "sampler_logp_N": sampler_logp, "ratio_cap": 2.0}
        return topk_jsd_loss(hidden, head, teacher_hidden, teacher_head, weight, k=K, chunk=CHUNK, **given)

    models = (put(rows, width), put(VOCAB, width), put(rows, width), put(VOCAB, width))
    per_row = (put(rows, dtype=jnp.float32), put(rows, dtype=jnp.int32), put(rows, dtype=jnp.float32))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    compiled = run.lower(*models, *per_row).compile()
    memory = compiled.memory_analysis()
    cost = compiled.cost_analysis()
    text = compiled.as_text()
    assert memory is not None and cost is not None and text is not None
    temp = memory.temp_size_in_bytes
    flops = cost["flops"]  # the loop's body is counted once
    return {
        "width": width,
        "rows": rows,
        "temp_bytes": temp,
        "bytes_a_logit": round((temp - 4 * VOCAB * width) / (CHUNK * VOCAB), 3),
        "matmuls_a_chunk": round(flops / (2 * CHUNK * VOCAB * width), 3),
        "row_kernel": "tpu_custom_call" in text,
    }


def on_device(topology: str) -> Callable[..., jax.ShapeDtypeStruct]:
    """f(*shape, dtype=bfloat16) makes an abstract array on the first chip of a topology."""
    os.environ.update(COMPILE_ONLY)
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])

    def put(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    return put


# ---- instruction bundles -------------------------------------------------------------------------


def row_cycles(dump: Path) -> dict[str, float]:
    """Cycles (bundles x trips) a row on the short way, by pass; "around" is the code outside of their loops.

    Code of the long way that is in no loop counts as "around" too.
    """
    from rosd_jax.kernels.topk_jsd import pallas_tpu

    final = [path for path in dump.glob("*topk_jsd_rows*-final_bundles.txt") if "schedule" not in path.name]
    loops = read_loops(max(final, key=lambda path: path.stat().st_mtime).read_text())
    cycles = {name: sum(loop_cycles(loops, i) for i in places) for name, places in PASSES.items()}
    cycles["around"] = loops[0]["bundles"]
    return {name: x / pallas_tpu.ROWS for name, x in cycles.items()}


def loop_cycles(loops: list[dict], i: int) -> int:
    """Bundles x trips of one loop of the kernel."""
    repeats = TRIPS if i in BISECTION else 1
    return loops[i]["bundles"] * (loops[i]["trips"] or 1) * repeats


def read_loops(text: str) -> list[dict]:
    """Loops in the order of the code: their bundles without inner loops', and trips where constant."""
    loops = []
    current = {}  # the open loop at each depth
    for line in text.splitlines():
        bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]*)\s*:\s*(>*) ?\{", line)
        if not bundle:
            continue
        depth = len(bundle[2])
        if bundle[1] == "LB":
            current = {d: loop for d, loop in current.items() if d < depth}
            current[depth] = {"bundles": 0, "trips": None}
            loops.append(current[depth])
        # Bundles of two loops may interleave where one ends and the next begins. Depth tells them apart.
        here = max((d for d in current if d <= depth), default=0)
        if depth and here:
            current[here]["bundles"] += 1
            end = re.search(r"scmp\.\w+\.s32\.totalorder %s\w+, (\d+) /\* loop exit test", line)
            if end:
                current[here]["trips"] = int(end[1])
    return loops


if __name__ == "__main__":
    main()
