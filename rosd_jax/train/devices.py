"""JAX devices for a run's rows: splits a CPU into one device per core; checks that batches divide evenly."""

from __future__ import annotations

import contextlib
import math
import os

import jax

from rosd_jax.errors import UserError
from rosd_jax.settings import Settings

LEAST_ROWS = 8  # rows of a training batch per CPU device; with fewer, another device does not pay
HOST_DEVICES = "xla_force_host_platform_device_count"


def split_cpu(config: Settings) -> None:
    """With mesh.data=-1 on CPU, splits the host into one JAX device per core, if there are enough rows.

    Does nothing once JAX has started, or if the user has set the number of CPU devices. Accelerators are not
    affected.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if config.mesh.data != -1 or "JAX_NUM_CPU_DEVICES" in os.environ or HOST_DEVICES in flags:
        return
    rows = config.batch.prompts * config.batch.samples
    most = rows // max(LEAST_ROWS, config.batch.device_rows)
    devices = cpu_devices(most, divisor=math.gcd(*batches(config).values()))
    with contextlib.suppress(RuntimeError):  # raised once JAX has started
        jax.config.update("jax_num_cpu_devices", devices)


def cpu_devices(most: int, divisor: int) -> int:
    """The largest power of two that divides `divisor` and is at most `most` and the number of cores.

    XLA for CPU computes attention row by row in one thread per device, so more devices use more cores.
    """
    most = max(1, min(cores(), most))
    largest_power = 1 << (most.bit_length() - 1)
    dividing_power = divisor & -divisor  # the lowest set bit
    return min(dividing_power, largest_power)


def cores() -> int:
    """Processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def batches(config: Settings) -> dict[str, int]:
    """Rows of each batch that is split over the row devices, by field."""
    return {
        "batch.prompts x batch.samples": config.batch.prompts * config.batch.samples,
        "eval.batch": config.eval.batch,
    }


def check_rows(config: Settings, devices: int) -> None:
    """Raises UserError if a batch cannot be split evenly over the row devices."""
    for field, n in batches(config).items():
        if n % devices:
            raise UserError(
                f"{field} is {n}; it must be a multiple of mesh.data x mesh.fsdp = {devices}, so "
                "change the batch or the mesh"
            )
