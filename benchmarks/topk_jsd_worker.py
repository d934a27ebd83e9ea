"""One process of the loss kernel's benchmark: measures what its argument says and prints JSON lines.

    python -m benchmarks.topk_jsd_worker '{"case": {...}, "names": [...], "task": "time", ...}'

A process holds contestants in JAX or in PyTorch, never both, since the two would compete for device memory.
It prints the environment, the contestant that it is about to prepare, and measurements, in lines marked so
that no other output is mistaken for them. When a contestant fails, the others go on unless the device no
longer answers.
"""

import gc
import json
import math
import sys
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import topk_jsd_contestants as contestants
from benchmarks.timing import interleaved, versions
from benchmarks.topk_jsd import MARK
from benchmarks.topk_jsd_contestants import Case
from rosd_jax.kernels.topk_jsd import topk_jsd_loss

CHECKED_ROWS = 512


class Library(NamedTuple):
    """What the worker needs from JAX or PyTorch. A call returns when its work is done."""

    environment: dict[str, str]
    inputs: tuple[Any, ...]
    to_device: Callable[[np.ndarray], Any]
    prepare: Callable[[str], tuple[Callable[[Any], Any], dict[str, Any]]]  # f(weights), and its cost
    oracle: Any  # f(k, rows): loss and gradients of the first rows in float32; caches the last result
    to_float32: Callable[[Any], Any]
    peak: Callable[[], int | None]  # bytes of device memory; None: the device does not say
    answers: Callable[[], object]  # raises if the device no longer works


def main() -> None:
    spec = json.loads(sys.argv[1])
    case = Case(**spec["case"])
    if spec["library"] == "torch":
        from benchmarks.topk_jsd_torch import torch_library  # PyTorch is no dependency of this project

        library = Library(**torch_library(case))
    else:
        library = jax_library(case)
    emit(environment=library.environment)
    if spec["task"] == "time":
        measure_times(library, case, spec)
    else:
        measure_memory(library, case, spec["names"][0])


def emit(**record: Any) -> None:
    """One line to the parent."""
    print(MARK + json.dumps(record), flush=True)


def measure_times(library: Library, case: Case, spec: dict[str, Any]) -> None:
    """Prepares and checks every contestant, then times those that work on each mask."""
    calls = {}
    for name in spec["names"]:
        emit(running=name)
        try:
            calls[name], record = library.prepare(name)
            record |= check(library, case, name, calls[name]) if spec["check"] else {}
        except Exception as error:
            calls.pop(name, None)
            emit(name=name, **outcome(error))
            del error  # its traceback holds arrays
            recover(library)
        else:
            emit(name=name, **record)
    library.oracle.cache_clear()
    emit(running="timing")
    for share in spec["masks"]:
        weight_N = contestants.span_weights(case, share)
        weights = library.to_device(weight_N)
        bound = {name: partial(call, weights) for name, call in calls.items()}
        times, errors = interleaved(
            bound, warmups=spec["warmups"], reps=spec["reps"], seconds=spec["seconds"]
        )
        for name, error in errors.items():
            emit(name=name, mask=share, **outcome(error))
        live = int((weight_N != 0).sum())
        for name in times.keys() - errors.keys():
            emit(name=name, mask=share, live=live, ms=times[name])


def measure_memory(library: Library, case: Case, name: str) -> None:
    """Peak memory of one contestant on all rows, in a process that has done nothing else."""
    emit(running=name)
    inputs = sum(x.nbytes for x in library.inputs)
    try:
        call, record = library.prepare(name)
        # Compiling may have tried matmuls on the device. Then the peak is not the program's.
        before = library.peak()
        call(library.to_device(contestants.span_weights(case, 1.0)))
        emit(name=name, memory={"inputs": inputs, "peak_before": before, "peak": library.peak()} | record)
    except Exception as error:
        emit(name=name, memory={"inputs": inputs} | outcome(error))


def outcome(error: Exception) -> dict[str, str]:
    """The record of a failure. Running out of memory is a result."""
    text = f"{type(error).__name__}: {error}"
    if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
        return {"outcome": "out of memory"}
    return {"outcome": "failed", "error": text[:400]}


def recover(library: Library) -> None:
    """Frees what a failure left behind. Ends the process if the device no longer answers."""
    gc.collect()
    try:
        library.answers()
    except Exception:
        sys.exit(3)


def check(library: Library, case: Case, name: str, call: Callable[[Any], Any]) -> dict[str, Any]:
    """Value and gradients on the first rows, by the same program, against float32."""
    if "matmuls" in name:
        return {}
    rows = min(CHECKED_ROWS, case.tokens // 2)
    k = None if name == "liger" else case.k
    got = call(library.to_device(contestants.first_rows(case, rows)))
    want = library.oracle(k, rows)
    result = {"loss": float(got[0]), "oracle_loss": float(want[0])}
    result["loss_error"] = abs(result["loss"] / result["oracle_loss"] - 1)
    for key, a, b in zip(("hidden", "head"), got[1:], want[1:], strict=True):
        b = library.to_float32(b)
        a = library.to_float32(a)[: b.shape[0]]
        aa = float((a * a).sum())
        ab = float((a * b).sum())
        bb = float((b * b).sum())
        result[f"{key}_cosine"] = ab / math.sqrt(aa * bb)
        result[f"{key}_error"] = math.sqrt(float(((a - b) ** 2).sum()) / bb)
    return {"values": result}


# ---- JAX ------------------------------------------------------------------------------------------


def jax_library(case: Case) -> Library:
    """JAX on its default device."""
    device = jax.devices()[0]
    inputs = jax.block_until_ready(contestants.jax_inputs(case))

    def prepare(name):
        start = time.perf_counter()
        weights = jax.ShapeDtypeStruct((case.tokens,), jnp.float32)
        compiled = jax.jit(contestants.jax_contestant(name, case)).lower(*inputs, weights).compile()
        memory = compiled.memory_analysis()
        cost = {"compile_s": round(time.perf_counter() - start, 1)}
        cost |= {f"program_{kind}": getattr(memory, f"{kind}_size_in_bytes") for kind in ("temp", "output")}
        return lambda weight_N: jax.block_until_ready(compiled(*inputs, weight_N)), cost

    @lru_cache(1)
    def oracle(k, rows):
        hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD = (x.astype(jnp.float32) for x in inputs)
        weight_N = jnp.full(rows, 1 / rows, jnp.float32)

        def loss(*args):
            return topk_jsd_loss(*args, k=k, implementation="reference")[0]

        # All arrays are arguments: closed over, they would become constants of the program.
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        value, grads = run(hidden_ND[:rows], head_VD, teacher_hidden_ND[:rows], teacher_head_VD, weight_N)
        return value, *grads

    def peak():
        stats = device.memory_stats()
        return stats and stats["peak_bytes_in_use"]

    return Library(
        environment={
            "device": device.device_kind,
            "platform": device.platform,
            **versions("jax", "jaxlib"),
        },
        inputs=inputs,
        to_device=jnp.asarray,
        prepare=prepare,
        oracle=oracle,
        to_float32=lambda x: x.astype(jnp.float32),
        peak=peak,
        answers=lambda: jnp.ones(8).sum().block_until_ready(),
    )


if __name__ == "__main__":
    main()
