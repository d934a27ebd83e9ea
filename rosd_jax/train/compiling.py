"""What a run compiles: kept on disk for later starts, and counted.

    keep_programs(config.compile_cache)
    compiled = Compiled(); ...; compiled.since()     -> programs compiled since the last call, and seconds

A program that the cache holds is loaded, not compiled: it is not counted, but its loading takes time too.
"""

from __future__ import annotations

import platform
import zlib
from pathlib import Path

import jax
from jax import monitoring

from rosd_jax.config import UserError

REQUEST = "/jax/core/compile/backend_compile_duration"  # a program compiled, or loaded from the cache
HIT = "/jax/compilation_cache/cache_hits"


def keep_programs(directory: str) -> None:
    """Keeps compiled programs under a directory; "": keeps none. A directory that JAX was told of stays.

    Raises UserError where it cannot be made.
    """
    if not directory or jax.config.values["jax_compilation_cache_dir"]:
        return
    path = Path(directory).expanduser() / processor()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"compile_cache is {directory!r}, which cannot be made ({error.strerror}); name another "
            "directory, or '' for none"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    # All of them: a start takes hundreds of small programs too.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def processor() -> str:
    """A name for this kind of processor: code that XLA compiled for a newer one may crash an older one."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"


class Compiled:
    """Counts the programs that this process compiles from now on."""

    def __init__(self) -> None:
        self._programs, self._seconds = 0, 0.0
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)

    def since(self) -> tuple[int, float]:
        """Programs compiled since the last call, and the seconds that these and loaded ones took."""
        found = self._programs, self._seconds
        self._programs, self._seconds = 0, 0.0
        return found

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event == REQUEST:
            self._programs += 1
            self._seconds += duration_secs

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        del kwargs
        if event == HIT:
            self._programs -= 1
