"""What a step has sampled so far, on disk: a run that is stopped inside a step does not sample it again.

    kept = Unfinished(directory, hosts, origin)
    kept.rollout(step, stage, sample)   -> what was kept of that stage, or else sample(), which is then kept
    kept.drop_unless(step)              removes what other steps have left

    DIR/unfinished/STAGE.npz            tokens, log-probs, statistics and seconds of one stage of one step

The state determines what a step samples. So a run that goes on from the state before the step gets what it
would have sampled itself, and a run that goes on from an earlier one drops the files. `origin` tells runs
apart that begin with other weights, data or settings, or under another version of JAX.
"""

from __future__ import annotations

import io
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from rosd_jax import atomic
from rosd_jax.hosts import Hosts
from rosd_jax.types import DecodeStats, HostRollout, Rollout

FOLDER = "unfinished"
COLUMNS = [field.name for field in fields(Rollout) if field.name != "stats"]
STATS = [field.name for field in fields(DecodeStats)]


@dataclass(frozen=True)
class Unfinished:
    """The files of the step that is being made. Only the first process writes them; all read them."""

    directory: Path  # of the run
    hosts: Hosts
    origin: str

    def rollout(self, step: int, stage: str, sample: Callable[[], HostRollout]) -> tuple[HostRollout, float]:
        """The rollout of a stage, and the seconds that an earlier start spent on it.

        It is sampled now if no earlier start has kept it; the seconds are then 0.
        """
        path = self.directory / FOLDER / f"{stage}.npz"
        arrays = self._kept(path, step) if self.hosts.first else None
        if self.hosts.once(f"kept {stage}", lambda: arrays is not None):
            arrays = arrays or self._kept(path, step)
            assert arrays is not None, f"{path} is not what process 0 has read"
            return _rollout(arrays), float(arrays["seconds"])
        began = time.perf_counter()
        rollout = sample()
        if self.hosts.first:
            about = dict(step=np.int64(step), origin=np.array(self.origin))
            seconds = np.float64(time.perf_counter() - began)
            kept = {"seconds": seconds} | _arrays(rollout)
            _write(path, about | {"names": np.array(list(kept))} | kept)
        return rollout, 0.0

    def drop_unless(self, step: int) -> None:
        """Removes the files, except those of this step (from 0)."""
        for path in (self.directory / FOLDER).glob("*"):
            if self._kept(path, step) is None:
                path.unlink()

    def drop(self) -> None:
        """Removes the files, at the end of a run."""
        shutil.rmtree(self.directory / FOLDER, ignore_errors=True)

    def _kept(self, path: Path, step: int) -> dict[str, np.ndarray] | None:
        """All arrays of a file; None unless it is whole, and of this step of this run."""
        try:
            with open(path, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                # Arrays are read one by one, so a file of another step costs a few bytes.
                if int(arrays["step"]) != step or str(arrays["origin"]) != self.origin:
                    return None
                # Reading checks their CRC-32, but not what a damaged directory of the file leaves out.
                return {str(name): arrays[str(name)] for name in arrays["names"]}
        except Exception:  # NumPy and zipfile raise many types for damaged files
            return None


def _arrays(rollout: HostRollout) -> dict[str, np.ndarray]:
    arrays = {name: getattr(rollout, name) for name in COLUMNS}
    if rollout.stats:
        arrays |= {f"stats.{name}": getattr(rollout.stats, name) for name in STATS}
    return arrays


def _rollout(arrays: dict[str, np.ndarray]) -> HostRollout:
    stats = None
    if f"stats.{STATS[0]}" in arrays:
        stats = DecodeStats(**{name: arrays[f"stats.{name}"] for name in STATS})
    return Rollout(**{name: arrays[name] for name in COLUMNS}, stats=stats)


def _write(path: Path, arrays: dict[str, Any]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path.parent.mkdir(exist_ok=True)
    atomic.write_bytes(path, [buffer.getvalue()])
