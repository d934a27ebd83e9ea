"""Memory, open files and compiled programs of a long run of the shipped tiny model, step by step.

    python -m benchmarks.long_run --out=DIR [--steps=500]

Starts `run.py` with small batches, a checkpoint every 10 steps and an evaluation every 50, and reads the
process's resident memory and open files from /proc whenever a step is written. On a CPU the device's memory
is part of the resident memory. Prints a table; DIR gets the run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SHOWN = 50  # steps between two lines of the table
FIELDS = dict(
    batch__prompts=4,
    batch__samples=8,
    batch__device_rows=8,
    eval__every=50,
    eval__limit=16,
    validation__sets="",
    checkpoint__every=10,
    checkpoint__keep=2,
)


@dataclass(frozen=True)
class Sample:
    """The process when a step was written."""

    step: int
    seconds: float  # since the start
    resident: int  # bytes
    files: int  # open descriptors
    threads: int
    programs: int  # compiled since the start


def main() -> None:
    """Runs, watches and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=500)
    args = parser.parse_args()
    fields = FIELDS | {"steps": args.steps}
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    config = f"--config={ROOT / 'configs' / 'quickstart.py'}"
    command = [sys.executable, str(ROOT / "run.py"), config, f"--workdir={args.out}", *overrides]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment) as run:
        samples = watch(run, args.out / "metrics.jsonl")
    if run.returncode:
        sys.exit(f"the run ended with status {run.returncode}")
    print(table(samples))


def watch(run: subprocess.Popen[bytes], metrics: Path) -> list[Sample]:
    """A sample for each step, taken within a tenth of a second of its line."""
    began = time.monotonic()
    samples: list[Sample] = []
    programs = 0
    read = 0
    while run.poll() is None:
        time.sleep(0.1)
        if not metrics.exists():
            continue
        with open(metrics, "rb") as file:
            file.seek(read)
            lines = file.readlines()
        for line in lines:
            if not line.endswith(b"\n"):
                break
            read += len(line)
            row = json.loads(line)
            if row["split"] == "train":
                programs += row["programs_compiled"]
                samples.append(sample(run.pid, row["step"], time.monotonic() - began, programs))
    return samples


def sample(pid: int, step: int, seconds: float, programs: int) -> Sample:
    """What /proc says of the process now."""
    proc = Path("/proc", str(pid))
    status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
    return Sample(
        step=step,
        seconds=seconds,
        resident=1024 * int(status["VmRSS"].split()[0]),
        files=len(list((proc / "fd").iterdir())),
        threads=int(status["Threads"]),
        programs=programs,
    )


def table(samples: list[Sample]) -> str:
    """One line every SHOWN steps."""
    lines = [
        "| step | s | resident, MB | open files | threads | programs compiled |",
        "|---|---|---|---|---|---|",
    ]
    for s in samples:
        if s.step % SHOWN == 0 or s.step == 1:
            numbers = f"{s.resident / 1e6:.0f} | {s.files} | {s.threads} | {s.programs}"
            lines.append(f"| {s.step} | {s.seconds:.0f} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
