"""A stage compiled for chips that may not be there, and what its program says of itself.

compile_stage(lowered, platform)  -> Program
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from rosd_jax.plan.collectives import Collective, count


@dataclass(frozen=True)
class Program:
    """Bytes are those of one chip."""

    seconds: float  # that compiling took
    arguments: int = 0
    working: int = 0  # temporaries, outputs that take no argument's place, and the program itself
    collectives: tuple[Collective, ...] | None = None  # None: the program's text is not available
    refused: str = ""  # what the compiler said where the program does not fit the chip


def compile_stage(lowered: Any, platform: str) -> Program:
    """Compiles it. A program that does not fit is an answer; whatever else goes wrong is raised."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rosd-plan-") as dump:
        # The text of a TPU program with kernels in it cannot be printed (libtpu 0.0.52), but is dumped.
        options = {"xla_dump_to": dump} if platform == "tpu" else None
        try:
            program = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Program(time.perf_counter() - began, refused=" ".join(str(error).split())[:300])
        seconds = time.perf_counter() - began
        text = _dumped(Path(dump)) if platform == "tpu" else program.as_text()
    memory = program.memory_analysis()
    fresh = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = 0 if platform == "cpu" else memory.generated_code_size_in_bytes
    return Program(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        working=memory.temp_size_in_bytes + fresh + code,
        collectives=tuple(count(text)) if text else None,
    )


def _dumped(directory: Path) -> str:
    files = sorted(directory.glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
    return files[-1].read_text() if files else ""
