"""Which process of a run this is, and where the others are.

find(coordinator, processes, process)  -> Place; None for a run of one process
join(place)                            -> Hosts, connected; call it before JAX touches a device
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from absl import logging

from rosd_jax.errors import UserError
from rosd_jax.hosts.hosts import Hosts

PATIENCE_S = 300  # how long the processes wait for each other at the start
AUTOMATIC = 61440  # JAX chooses a port from here on, by the number of the job of SLURM or Open MPI
HOW = "--coordinator=HOST:PORT --processes=N --process=I, with I from 0 to N - 1"


@dataclass(frozen=True)
class Place:
    """One process of several."""

    coordinator: str  # HOST:PORT of process 0
    processes: int
    process: int
    devices: tuple[int, ...] | None = None  # local ids, where a launcher starts a process for each GPU

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of the first process."""
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def supervisor_port(self) -> int:
        """Where the first process's supervisor listens: the next port.

        If JAX chose the coordinator's port, the next one may be that of another job. Then it is 32768 lower,
        below the ports that Linux gives to outgoing connections.
        """
        port = self.address[1]
        return port + 1 if port < AUTOMATIC else port - 32768


def find(coordinator: str | None, processes: int | None, process: int | None) -> Place | None:
    """This process's place, from the three flags or, without them, from the launcher's environment.

    None if there is only one process. Raises UserError if some flags are missing or out of range.
    """
    given = (coordinator, processes, process)
    if given == (None, None, None):
        return _detected()
    if coordinator is None or processes is None or process is None:
        raise UserError(f"--coordinator, --processes and --process go together; pass {HOW}")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < AUTOMATIC:
        raise UserError(
            f"--coordinator is {coordinator!r}; it must be HOST:PORT of process 0, with a port below "
            f"{AUTOMATIC} that is free there, as is the next one"
        )
    if not 0 <= process < processes:
        raise UserError(f"--process is {process} and --processes {processes}; pass {HOW}")
    return Place(coordinator, processes, process) if processes > 1 else None


def _detected() -> Place | None:
    """What JAX finds out from a TPU slice, SLURM or Open MPI."""
    if not _launched():
        return None
    from jax._src import clusters  # what jax.distributed.initialize calls; no public name does it alone

    detect = clusters.ClusterEnv.auto_detect_unset_distributed_params
    try:
        coordinator, processes, process, devices = detect(None, None, None, None, None, PATIENCE_S)
    except Exception as error:  # a TPU outside Google Cloud's TPU VMs, as in a notebook, has no metadata
        logging.warning(
            "nothing names other hosts (%r), so this run has one process; else pass %s", error, HOW
        )
        return None
    if coordinator is None or processes is None or process is None or processes < 2:
        return None
    return Place(coordinator, processes, process, None if devices is None else tuple(devices))


def _launched() -> bool:
    """Whether a launcher of several processes may have started this one. Importing JAX takes longer."""
    # In a shell that `srun --pty` opened, the first of these is that of the shell, the second of the job.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS") or "1"
    if int(tasks) > 1 and "SLURM_PROCID" in os.environ:
        return True
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return True
    on_cpu = os.environ.get("JAX_PLATFORMS") == "cpu"
    return not on_cpu and (any(Path("/dev").glob("accel*")) or any(Path("/dev/vfio").glob("[0-9]*")))


def join(place: Place | None) -> Hosts:
    """Connects to the other processes, for at most PATIENCE_S. For one process it does nothing."""
    if place is None:
        return Hosts()
    import jax  # only here, since the supervisor does not need it
    from jax._src import distributed  # no public name gives its client

    # JAX's own service would take SIGTERM, which train/stopping.py handles.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=place.devices,
        cluster_detection_method="deactivate",
        initialization_timeout=PATIENCE_S,
        # JAX would abort the other processes, and not say which one is to blame. The supervisors are faster.
        heartbeat_timeout_seconds=PATIENCE_S,
    )
    return Hosts(place.process, place.processes, distributed.global_state.client)
