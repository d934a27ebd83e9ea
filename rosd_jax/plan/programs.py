"""Compiles a stage, possibly for absent chips, and reads its memory and collectives.

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
    """What the compiler says about a stage. Bytes are per chip."""

    seconds: float  # that compiling took
    arguments: int = 0
    working: int = 0  # temporaries, outputs that do not alias an argument, and the program itself
    collectives: tuple[Collective, ...] | None = None  # None: the program's text is not available
    refused: str = ""  # the compiler's message if the program does not fit the chip


def compile_stage(lowered: Any, platform: str) -> Program:
    """Compiles a stage. That it does not fit the chip is a result; any other error is raised."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="rosd-plan-") as dump:
        # A compiled TPU program that contains kernels cannot be printed (libtpu 0.0.52), only dumped.
        options = {"xla_dump_to": dump} if platform == "tpu" else None
        try:
            program = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return Program(time.perf_counter() - start, refused=" ".join(str(error).split())[:300])
        seconds = time.perf_counter() - start
        text = _dumped(Path(dump)) if platform == "tpu" else program.as_text()
    memory = program.memory_analysis()
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    code = 0 if platform == "cpu" else memory.generated_code_size_in_bytes
    return Program(
        seconds=seconds,
        arguments=memory.argument_size_in_bytes,
        working=memory.temp_size_in_bytes + outputs + code,
        collectives=tuple(count(text)) if text else None,
    )


def _dumped(directory: Path) -> str:
    """The optimized program's text; small helper programs are dumped next to it."""
    files = sorted(directory.glob("*.after_optimizations.txt"), key=lambda path: path.stat().st_size)
    return files[-1].read_text() if files else ""
