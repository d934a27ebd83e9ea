"""Memory and peak rates of chips, and the slices of them that a plan can be made for.

One table, CHIPS. A TPU's `memory` is what its compiler lets a program use, according to its own message when
one does not fit (libtpu 0.0.52, 2026-11-27). A GPU's is 95 % of what the driver shows; JAX reserves 75 %
unless XLA_CLIENT_MEM_FRACTION is set. `links` is the bandwidth from one chip to all its neighbours together,
one way: half of the bidirectional figure that vendors state. Sources:

v5e, v5p, v6e   docs.cloud.google.com/tpu/docs/v5e, .../v5p-training, .../v6e: peak compute (bf16), HBM
                bandwidth, bidirectional ICI bandwidth per chip
h100, h200      NVIDIA's data sheets of the SXM modules: bfloat16 without sparsity, memory bandwidth, NVLink;
                nvidia-smi shows 81,559 MiB and 143,771 MiB
SIDES           the same pages list the slices that Cloud TPU offers

    read_topology(name)     -> Slice; the name is "local", "v5p:2x2x2", "v5p-16" or "h100:8", for example
    slice_name(chip, count) -> the name of the slice with that number of chips, such as "v5p:2x2x2"
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from rosd_jax.errors import UserError

GIB = 2**30
# Lets libtpu compile for absent chips without asking a metadata server about them.
COMPILE_ONLY = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v6e-4",  # must be set, to anything; the topology's name overrides it
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True)
class Chip:
    """One chip's memory in bytes, and its peak rates."""

    name: str
    platform: str
    kinds: tuple[str, ...]  # JAX's device_kind of it
    memory: int  # bytes that a program may use
    bandwidth: float  # bytes per second of that memory
    flops: float  # bfloat16 FLOPs per second
    links: float  # bytes per second to other chips


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", ("TPU v5 lite", "TPU v5e"), int(15.75 * GIB), 819e9, 197e12, 200e9),
        Chip("v5p", "tpu", ("TPU v5", "TPU v5p"), int(95.73 * GIB), 2765e9, 459e12, 600e9),
        Chip("v6e", "tpu", ("TPU v6 lite", "TPU v6e"), int(31.24 * GIB), 1640e9, 918e12, 400e9),
        Chip("h100", "gpu", ("NVIDIA H100 80GB HBM3",), int(0.95 * 81559 * 2**20), 3350e9, 989e12, 450e9),
        Chip("h200", "gpu", ("NVIDIA H200",), int(0.95 * 143771 * 2**20), 4800e9, 989e12, 450e9),
    )
}
MOST_CHIPS = 16384  # of a slice; the largest that Google offers has 9216
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}
CUBIC = {
    4: "2x2x1",
    8: "2x2x2",
    16: "2x2x4",
    32: "2x4x4",
    64: "4x4x4",
    128: "4x4x8",
    256: "4x8x8",
    512: "8x8x8",
    1024: "8x8x16",
    2048: "8x16x16",
    4096: "16x16x16",
}
SIDES = {"v5e": FLAT, "v5p": CUBIC, "v6e": FLAT}  # number of chips -> sides of that slice
# What Cloud TPU's names count of one chip: the TensorCores of v5p, the chips of others.
COUNTED = {"v5e": 1, "v5p": 2, "v6e": 1}
FORMS = "local, a TPU slice such as v5p:2x2x2 or v5p-16, or a number of GPUs such as h100:8 or h200x1"
STAND_INS = 1024  # CPU devices that represent chips, at least; slices up to this size are tried (remedies.py)
NO_LIBTPU = "--compile needs libtpu: pip install libtpu (no TPU is needed)"


@dataclass(frozen=True)
class Slice:
    """The devices that a plan is made for.

    For a TPU slice they are the compiler's descriptions of its chips. Absent GPUs, and TPUs without libtpu,
    are represented by CPU devices, for which nothing is compiled. The arithmetic is the same.
    """

    name: str
    chip: Chip | None  # None: not in the table, so memory and speed are not known
    devices: Sequence[Any]
    platform: str  # programs are lowered for it: "tpu", "cuda" or "cpu"
    compiles: bool  # whether the compiler of these chips is available


def read_topology(name: str) -> Slice:
    """The slice of that name. Raises UserError if it does not exist."""
    if name == "local":
        return _local()
    full_name = _full_name(name)
    kind, _, shape = full_name.partition(":")
    chip = CHIPS.get(kind)
    if chip is None or not shape:
        raise UserError(f"--topology is {name!r}; it must be {FORMS}; known chips are {', '.join(CHIPS)}")
    jax.config.update("jax_platforms", "cpu")  # do not occupy this machine's accelerators
    return _gpus(chip, full_name, shape) if chip.platform == "gpu" else _tpus(chip, full_name, shape)


def slice_name(chip: Chip, count: int) -> str | None:
    """The name of the slice of `count` chips; None if Cloud TPU offers none of that size."""
    if chip.platform == "gpu":
        return f"{chip.name}:{count}"
    sides = SIDES[chip.name].get(count)
    return None if sides is None else f"{chip.name}:{sides}"


def represented(count: int) -> list[Any]:
    """That many CPU devices, or as many as there are, to represent absent chips."""
    with contextlib.suppress(RuntimeError):  # JAX is already initialized
        jax.config.update("jax_num_cpu_devices", max(count, STAND_INS))
    return jax.devices("cpu")[:count]


def _full_name(name: str) -> str:
    """`v5p-16` as v5p:2x2x2, and `h100x8` as h100:8; other names as they are."""
    if gpus := re.fullmatch(r"(h\d+)x(\d+)", name):
        return f"{gpus[1]}:{gpus[2]}"
    kind, dash, count = name.partition("-")
    if not dash or kind not in SIDES:
        return name
    names = {f"{kind}-{COUNTED[kind] * chips}": f"{kind}:{sides}" for chips, sides in SIDES[kind].items()}
    if name not in names:
        raise UserError(
            f"--topology is {name!r}; Cloud TPU has {', '.join(names)}; give one of these, or the sides of "
            f"the slice, as in {kind}:{SIDES[kind][8]}"
        )
    return names[name]


def _local() -> Slice:
    devices = jax.devices()
    kind = devices[0].device_kind
    platform = devices[0].platform
    chip = next((chip for chip in CHIPS.values() if kind in chip.kinds), None)
    return Slice("local", chip, devices, "cuda" if platform == "gpu" else platform, compiles=True)


def _gpus(chip: Chip, name: str, count: str) -> Slice:
    if not re.fullmatch(r"[1-9]\d{0,3}", count):
        raise UserError(
            f"--topology is {name!r}; after {chip.name}: it must give the number of GPUs, at most 9999, "
            "as in h100:8"
        )
    return _without_compiler(chip, name, int(count), "cuda")


def _without_compiler(chip: Chip, name: str, count: int, platform: str) -> Slice:
    devices = represented(count)
    if len(devices) < count:
        raise UserError(
            f"--topology is {name!r}, but JAX has already started with only {len(devices)} CPU devices to "
            "represent the chips; plan in a new process, without JAX_NUM_CPU_DEVICES"
        )
    return Slice(name, chip, devices, platform, compiles=False)


def _tpus(chip: Chip, name: str, shape: str) -> Slice:
    # libtpu crashes on a side of 0, and makes a list of all chips.
    is_shape = re.fullmatch(r"[1-9]\d{0,2}(x[1-9]\d{0,2}){1,2}", shape)
    sides = [int(side) for side in shape.split("x")] if is_shape else []
    if not sides or math.prod(sides) > MOST_CHIPS:
        raise UserError(
            f"--topology is {name!r}; after {chip.name}: it must give the sides of a slice of at most "
            f"{MOST_CHIPS} chips, as in v5p:2x2x2 or v6e:4x4"
        )
    if _has_libtpu():
        return _described(chip, name)
    if math.prod(sides) > 2 and (sides[0] % 2 or sides[1] % 2):
        raise UserError(
            f"--topology is {name!r}; the first two sides must be even, since a host has 2x2 chips; give a "
            "slice such as v5p:2x2x2, v6e:4x4 or v5e:8x8"
        )
    return _without_compiler(chip, name, math.prod(sides), "tpu")


def _has_libtpu() -> bool:
    return "TPU_LIBRARY_PATH" in os.environ or importlib.util.find_spec("libtpu") is not None


def _described(chip: Chip, name: str) -> Slice:
    """A TPU slice as the compiler describes it. Raises UserError if the compiler does not accept its name."""
    from jax.experimental import topologies

    represented(0)  # before JAX is initialized
    os.environ.update(COMPILE_ONLY)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except Exception as error:  # libtpu's errors have no type of their own
        raise UserError(
            f"--topology is {name!r}, which the TPU compiler does not accept ({_first_line(error)}); give a "
            "slice such as v5p:2x2x2, v6e:4x4 or v5e:8x8"
        ) from error
    return Slice(name, chip, devices, "tpu", compiles=True)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
