"""The loss kernel against its own matmuls, plain XLA, PyTorch and Liger, on one GPU.

    python -m benchmarks.topk_jsd --out=DIR [--quick] [--tiny] [--sizes=4096x16384,...] [--masks=1,0.3]
        [--only=time] [--contestants=matmuls,ours@2048,...] [--chunk=1024] [--minutes=9.5]

Writes DIR/topk_jsd.json and DIR/topk_jsd.md after every measurement. A size is width x tokens; sizes run in
the given order. Times come from processes that hold all JAX contestants or all PyTorch ones, in two
alternating rounds, with bare matmuls in every process. Memory is measured in one process for each contestant.
Running out of memory is a result. `--tiny` shrinks everything, to try the script on a CPU.
"""

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.topk_jsd_contestants import IN_JAX, IN_TORCH, Case
from benchmarks.topk_jsd_report import render

MARK = "@@"  # begins each line that a worker reports
SIZES = "4096x16384,2560x16384,4096x65536,4096x4096,2560x65536,2560x4096"
VOCAB = 151_936  # rows of Qwen3's heads
Record = Callable[..., None]


class Session(NamedTuple):
    """What all worker processes of a run share."""

    env: dict[str, str]
    stop_at: float  # by time.monotonic()
    environment: dict[str, Any]  # filled in from the workers' reports


def main() -> None:
    args = parse(sys.argv[1:])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["python -m benchmarks.topk_jsd", *sys.argv[1:]]),
        "environment": {},
        "records": [],
    }

    def record(**what: Any) -> None:
        results["records"].append(what)
        (out / "topk_jsd.json").write_text(json.dumps(results, indent=1))
        (out / "topk_jsd.md").write_text(render(results))

    with tempfile.TemporaryDirectory() as cache:
        stop_at = time.monotonic() + 60 * args.minutes
        session = Session(worker_env(cache), stop_at, results["environment"])
        for size in args.sizes:
            case = make_case(size, args)
            if "time" in args.only:
                measure_times(session, case, args, record)
            if "memory" in args.only:
                measure_memory(session, case, args, record)
    print(render(results))


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with lists split."""
    parser = argparse.ArgumentParser(description="The loss kernel's benchmark")
    parser.add_argument("--out", required=True)
    parser.add_argument("--quick", action="store_true", help="5 repetitions in one round")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--sizes")
    parser.add_argument("--masks", default="1,0.3,0.1")
    parser.add_argument("--only", default="time,memory")
    parser.add_argument("--contestants", default=",".join([*IN_JAX, *IN_TORCH]))
    parser.add_argument("--chunk", type=int, default=1024)
    parser.add_argument("--minutes", type=float, default=9.5, help="limit of the whole run")
    args = parser.parse_args(argv)
    default_sizes = "32x256" if args.tiny else SIZES
    args.sizes = (args.sizes or default_sizes).split(",")
    args.masks = [float(mask) for mask in args.masks.split(",")]
    args.contestants = args.contestants.split(",")
    for name in args.contestants:
        if name.split("@")[0] not in (*IN_JAX, *IN_TORCH):
            parser.error(f"no contestant {name!r}; there are {', '.join([*IN_JAX, *IN_TORCH])}")
    return args


def make_case(size: str, args: argparse.Namespace) -> Case:
    """WIDTHxTOKENS with Qwen3's vocabulary and the paper's k, or with small ones."""
    width, tokens = map(int, size.split("x"))
    if args.tiny:
        return Case(width, tokens, vocab=4096, k=20, chunk=64)
    return Case(width, tokens, vocab=VOCAB, k=100, chunk=args.chunk)


def worker_env(cache: str) -> dict[str, str]:
    return os.environ | {
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # Shared caches: a program is compiled once, and the process that measures memory does no autotuning.
        "JAX_COMPILATION_CACHE_DIR": f"{cache}/jax",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/torch",
    }


def measure_times(session: Session, case: Case, args: argparse.Namespace, record: Record) -> None:
    """Rounds of one JAX and one PyTorch process. A contestant that failed is left out of later ones."""
    rounds = 1 if args.quick else 2
    reps = 5 if args.quick else 10
    seconds = 5 if args.quick else 10
    spec = {"task": "time", "masks": args.masks, "warmups": 3, "reps": reps, "seconds": seconds}
    failed: set[str] = set()

    def keep(**what: Any) -> None:
        if "outcome" in what:
            failed.add(what["name"])
        record(**what)

    for round in range(rounds):
        for library, all_names in libraries(args.contestants):
            again = True
            while again:  # without the contestant that ended the process
                names = [name for name in all_names if name not in failed]
                more = {"library": library, "names": names, "check": round == 0, "round": round}
                again = work(session, case, spec | more, keep)


def measure_memory(session: Session, case: Case, args: argparse.Namespace, record: Record) -> None:
    """One process for each contestant."""
    for library, names in libraries(args.contestants):
        for name in names:
            work(session, case, {"task": "memory", "library": library, "names": [name]}, record)


def libraries(names: list[str]) -> list[tuple[str, list[str]]]:
    """The contestants of each library that is installed."""
    has_torch = importlib.util.find_spec("torch") is not None
    has_liger = importlib.util.find_spec("liger_kernel") is not None
    kinds = {name: name.split("@")[0] for name in names}
    in_jax = [name for name in names if kinds[name] in IN_JAX]
    in_torch = [name for name in names if has_torch and kinds[name] in IN_TORCH]
    if not has_liger:
        in_torch = [name for name in in_torch if kinds[name] != "liger"]
    return [("jax", in_jax), ("torch", in_torch)]


def work(session: Session, case: Case, spec: dict[str, Any], record: Record) -> bool:
    """Runs one worker and records its reports. True if a contestant ended the process early."""
    seconds = session.stop_at - time.monotonic()
    if seconds < 5 or not spec["names"]:
        return False
    stamp = {"width": case.width, "tokens": case.tokens, "vocab": case.vocab, "round": spec.get("round")}
    command = [sys.executable, "-m", "benchmarks.topk_jsd_worker", json.dumps(spec | {"case": asdict(case)})]
    process = subprocess.Popen(command, env=session.env, stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    running = "start"
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(MARK):
            news = json.loads(line.removeprefix(MARK))
            running = news.pop("running", running)
            if "environment" in news:
                session.environment[spec["library"]] = news.pop("environment")
            if news:
                record(**stamp, **news)
    code = process.wait()
    in_time = timer.is_alive()
    timer.cancel()
    if code != 0:
        why = f"the process ended with {code}" if in_time else "out of time"
        record(**stamp, name=running, outcome=why)
    return code != 0 and in_time and running in spec["names"]


if __name__ == "__main__":
    main()
