"""What all parts of a run use, in one record."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp

from rosd_jax.hosts import Hosts
from rosd_jax.settings import Settings
from rosd_jax.train.compiling import Compiled
from rosd_jax.train.console import Console
from rosd_jax.train.inputs import Inputs
from rosd_jax.train.metrics import MetricsLog
from rosd_jax.train.step import Runtime
from rosd_jax.train.trackers import Trackers


@dataclass(frozen=True)
class Run:
    """What all parts of a run use."""

    runtime: Runtime
    inputs: Inputs
    directory: Path
    log: MetricsLog
    trackers: Trackers
    console: Console
    manager: ocp.CheckpointManager
    compiled: Compiled
    meta: dict[str, Any]  # saved with every checkpoint
    profile: bool = False  # whether one step is traced

    @property
    def config(self) -> Settings:
        return self.runtime.config

    @property
    def hosts(self) -> Hosts:
        return self.runtime.hosts
