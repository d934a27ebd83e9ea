"""What the TPU compiler makes of the loss, without a TPU: memory, work, and instructions of the row kernel.

    python -m benchmarks.topk_jsd_tpu [--topology=v5p:2x2x1]      one JSON object a line

libtpu compiles ahead of time for a machine that is not there, and writes out the instruction bundles of
each kernel. A bundle is at least one cycle, so bundles x trips is a lower bound of the kernel's time: no
stall and no memory traffic is in it. Clock rates are assumptions (the vendor's peak / multipliers).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

VOCAB, K, CHUNK = 151936, 100, 1024
TRIPS = 16  # of the bisection: 15.8 on average over blocks of eight rows, half of normal, half of Zipf logits


COMPILE_ONLY = {"JAX_PLATFORMS": "cpu", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}


class Machine(NamedTuple):
    """One chip: cores that take rows, assumed clock in GHz, peak in Tflop/s, memory in TB/s."""

    cores: int
    ghz: float
    tflops: float
    terabytes: float


MACHINES = {
    "v5e:2x2": Machine(1, 1.5, 197, 0.82),
    "v5p:2x2x1": Machine(2, 1.75, 459, 2.77),
    "v6e:2x2": Machine(1, 1.75, 918, 1.64),
}
PASSES = {"candidates": [1], "threshold": [2, 3, 4], "sums": [8, 9, 10], "gradient": [11]}  # loops by place


def main() -> None:
    """Prints one JSON object for each topology."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--topology", choices=MACHINES)
    parser.add_argument("--dump", type=Path, help="compile the row kernel alone; its bundles lie there")
    args = parser.parse_args()
    if args.dump:
        compile_rows(args.topology)
        print(json.dumps(row_cycles(args.dump)))
        return
    for name in [args.topology] if args.topology else MACHINES:
        print(json.dumps(report(name)), flush=True)


def report(topology: str) -> dict:
    """Memory of the loss for D of Qwen3-4B and 8B, and the row kernel's cycles a row."""
    machine = MACHINES[topology]
    sizes = ((2560, 4096), (4096, 65536))
    cycles = measure_rows(topology)
    total = sum(cycles.values())
    floor_us = {width: 8 * width * VOCAB / machine.tflops / 1e6 for width in (2560, 4096)}
    row_us = total / machine.ghz / machine.cores / 1e3
    return {
        "topology": topology,
        "losses": [loss_memory(topology, width, rows) for width, rows in sizes],
        "cycles_a_row": {name: round(x) for name, x in cycles.items()} | {"all": round(total)},
        "row_us": round(row_us, 3),
        "memory_bound_us": round(10 * VOCAB / machine.terabytes / 1e6, 3),
        "share_of_matmul_floor": {str(width): round(row_us / us, 4) for width, us in floor_us.items()},
    }


def measure_rows(topology: str) -> dict[str, float]:
    """`row_cycles` from a fresh process, since libtpu reads its flags once. Raises on a failed compile."""
    with tempfile.TemporaryDirectory() as dump:
        flags = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        env = os.environ | COMPILE_ONLY | {"LIBTPU_INIT_ARGS": flags}
        command = [
            sys.executable,
            "-m",
            "benchmarks.topk_jsd_tpu",
            f"--topology={topology}",
            f"--dump={dump}",
        ]
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
    logits, per_row = put(64, VOCAB, dtype=jnp.float32), put(64, dtype=jnp.float32)

    def run(student, teacher, weight, tokens, sampler_logp):
        given = {"tokens_N": tokens, "sampler_logp_N": sampler_logp, "ratio_cap": 2.0}
        return topk_jsd_rows(student, teacher, weight, k=K, grad_dtype=jnp.bfloat16, **given)

    jax.jit(run).lower(logits, logits, per_row, put(64, dtype=jnp.int32), per_row).compile()


def loss_memory(topology: str, width: int, rows: int) -> dict:
    """Bytes and flops of the compiled loss with both gradients, bfloat16 operands."""
    import jax
    import jax.numpy as jnp

    from rosd_jax.kernels.topk_jsd import topk_jsd_loss

    put = on_device(topology)

    def loss(hidden, head, teacher_hidden, teacher_head, weight, tokens, sampler_logp):
        return topk_jsd_loss(
            hidden, head, teacher_hidden, teacher_head, weight, k=K, chunk=CHUNK,
            tokens_N=tokens, sampler_logp_N=sampler_logp, ratio_cap=2.0,
        )  # fmt: skip

    models = (put(rows, width), put(VOCAB, width), put(rows, width), put(VOCAB, width))
    per_row = (put(rows, dtype=jnp.float32), put(rows, dtype=jnp.int32), put(rows, dtype=jnp.float32))
    run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    compiled = run.lower(*models, *per_row).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes
    flops = compiled.cost_analysis()["flops"]  # the loop's body is counted once
    return {
        "width": width,
        "rows": rows,
        "temp_bytes": temp,
        "bytes_a_logit": round((temp - 4 * VOCAB * width) / (CHUNK * VOCAB), 3),
        "matmuls_a_chunk": round(flops / (2 * CHUNK * VOCAB * width), 3),
        "row_kernel": "tpu_custom_call" in compiled.as_text(),
    }


def on_device(topology: str):
    """f(*shape, dtype=bfloat16): an abstract array on the first chip of a topology that is not there."""
    os.environ.update(COMPILE_ONLY)
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    sharding = jax.sharding.SingleDeviceSharding(devices[0])
    return lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)


# ---- instruction bundles -------------------------------------------------------------------------


def row_cycles(dump: Path) -> dict[str, float]:
    """Bundles x trips of the short way a row, by pass; "around" is what stands outside of their loops.

    Code of the long way that no loop encloses is in "around" too.
    """
    final = [path for path in dump.glob("*topk_jsd_rows*-final_bundles.txt") if "schedule" not in path.name]
    loops = read_loops(max(final, key=lambda path: path.stat().st_mtime).read_text())
    from rosd_jax.kernels.topk_jsd import pallas_tpu

    trips = lambda i: TRIPS if i in (3, 4) else 1
    cost = lambda i: loops[i]["bundles"] * (loops[i]["trips"] or 1) * trips(i)
    cycles = {name: sum(cost(i) for i in places) for name, places in PASSES.items()}
    cycles["around"] = loops[0]["bundles"]
    return {name: x / pallas_tpu.ROWS for name, x in cycles.items()}


def read_loops(text: str) -> list[dict]:
    """Loops in the order of the code: own bundles (inner loops left out), and trips where constant."""
    loops, current = [], {}
    for line in text.splitlines():
        bundle = re.match(r"\s*(?:0x[0-9a-f]+|0)\s+([A-Z]*)\s*:\s*(>*) ?\{", line)
        if not bundle:
            continue
        depth = len(bundle[2])
        if bundle[1] == "LB":
            current = {d: loop for d, loop in current.items() if d < depth}
            current[depth] = {"bundles": 0, "trips": None}
            loops.append(current[depth])
        # Bundles of two loops may interleave where one ends and the next begins: depth tells them apart.
        here = max((d for d in current if d <= depth), default=0)
        if depth and here:
            current[here]["bundles"] += 1
            end = re.search(r"scmp\.\w+\.s32\.totalorder %s\w+, (\d+) /\* loop exit test", line)
            if end:
                current[here]["trips"] = int(end[1])
    return loops


if __name__ == "__main__":
    main()
