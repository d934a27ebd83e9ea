"""JAX devices for a run's rows: the CPU split into one device per core, and the batches that must divide."""

from __future__ import annotations

import contextlib
import math
import os

import jax

from rosd_jax.config import UserError
from rosd_jax.settings import Settings

LEAST_ROWS = 8  # of a training batch that are worth a CPU device of their own
HOST_DEVICES = "xla_force_host_platform_device_count"


def deal_cores(config: Settings) -> None:
    """Where the mesh lays rows along all devices, makes several of JAX's CPU, one to a core.

    Their number stays what it is once JAX has started, or where the user chose it; other kinds of devices
    are none of its business.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if config.mesh.data != -1 or "JAX_NUM_CPU_DEVICES" in os.environ or HOST_DEVICES in flags:
        return
    rows = config.batch.prompts * config.batch.samples
    devices = cpu_devices(
        rows // max(LEAST_ROWS, config.batch.device_rows), math.gcd(*batches(config).values())
    )
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", devices)


def cpu_devices(most: int, divisor: int) -> int:
    """A power of two, at most `most` and a device for each core, that divides `divisor`.

    XLA for CPU attends to one row after another in one thread, and each device has its own.
    """
    most = max(1, min(cores(), most))
    return min(divisor & -divisor, 1 << most.bit_length() - 1)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches(config: Settings) -> dict[str, int]:
    """Rows of each batch that is laid over the row devices, by field."""
    return {
        "batch.prompts x batch.samples": config.batch.prompts * config.batch.samples,
        "eval.batch": config.eval.batch,
    }


def check_rows(config: Settings, devices: int) -> None:
    """Raises UserError where a batch's rows cannot be laid evenly over the row devices."""
    for field, n in batches(config).items():
        if n % devices:
            raise UserError(
                f"{field} is {n}; it must be a multiple of mesh.data x mesh.fsdp = {devices}, so "
                "change the batch or the mesh"
            )
