"""Caches compiled programs on disk, and counts those that a run compiles.

    keep_programs(config.compile_cache)
    compiled = Compiled(begins); ...; compiled.since()   -> programs compiled since the last call, and seconds

A program found in the cache is loaded instead of compiled. It is not counted, but the time to load it is.
"""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
from jax import monitoring

from rosd_jax.errors import UserError

# Names of JAX's monitoring events. REQUEST comes for every program: as a scalar when JAX begins to compile
# it, as a duration when it is done. HIT comes also, for one that the cache had.
REQUEST = "/jax/core/compile/backend_compile_duration"
HIT = "/jax/compilation_cache/cache_hits"


def keep_programs(directory: str) -> None:
    """Makes JAX cache compiled programs in `directory`, unless it is "" or JAX has been given another one.

    Raises UserError if the directory cannot be made.
    """
    if not directory or jax.config.values["jax_compilation_cache_dir"]:
        return
    try:
        path = Path(directory).expanduser() / processor()
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: no such home directory
        raise UserError(
            f"compile_cache is {directory!r}, which cannot be made "
            f"({getattr(error, 'strerror', error)}); name another directory, or '' for none"
        ) from error
    jax.config.update("jax_compilation_cache_dir", str(path))
    # Cache every program. By default JAX leaves small ones out, but a start compiles hundreds of them.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def processor() -> str:
    """A name for this kind of processor. Code that XLA compiled for a newer one may crash on an older one."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{zlib.crc32(flags.encode()):08x}"


def ignore(name: str | None) -> None:
    """Tells nobody."""


class Compiled:
    """Counts the programs that this process compiles from now on.

    under_way: called with the name of a program when JAX begins to compile or load it, and with None at the
    end.
    """

    def __init__(self, under_way: Callable[[str | None], None] = ignore) -> None:
        self._programs = 0
        self._seconds = 0.0
        self._under_way = under_way
        monitoring.register_scalar_listener(self._on_scalar)
        monitoring.register_event_duration_secs_listener(self._on_duration)
        monitoring.register_event_listener(self._on_event)

    def since(self) -> tuple[int, float]:
        """Programs compiled since the last call, and the seconds spent on compiling and loading programs."""
        programs = self._programs
        seconds = self._seconds
        self._programs = 0
        self._seconds = 0.0
        return programs, seconds

    def _on_scalar(self, event: str, value: float | int, **kwargs: str | int) -> None:
        del value
        if event == REQUEST:
            name = str(kwargs.get("fun_name", "a program"))
            self._under_way(name.removeprefix("jit(").removesuffix(")"))

    def _on_duration(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del kwargs
        if event == REQUEST:
            self._under_way(None)
            self._programs += 1
            self._seconds += duration_secs

    def _on_event(self, event: str, **kwargs: str | int) -> None:
        del kwargs
        if event == HIT:
            self._programs -= 1
