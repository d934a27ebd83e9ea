"""One update side by side with plain Flax, tunix and TRL on one CPU, and a whole step stage by stage.

    JAX_PLATFORMS=cpu python -m benchmarks.step --out=DIR [--tunix-python=FILE] [--trl-python=FILE]
        [--cases=update,stages] [--preset=span] [--rows=24] [--rounds=3] [--contestants=ours,plain,tunix,trl]

    update   the same random weights and rows for all: whole updates with forward, backward, clip and AdamW.
             Every contestant is a process of its own (benchmarks/step_peers.py says what each computes);
             one without an interpreter is left out
    stages   rollouts, reflections and update of ours (benchmarks/step_stages.py)

Rows are drawn at an eighth of the paper's lengths (benchmarks/step_rows.py). For `update` they are those of
one step of 32 x 8 that have a token with loss, or `--rows` of them in even steps from the longest to the
shortest: so who pads to the longest, pads as it would for all. The losses of the first update must be ours
within `TOLERANCE`; those of the next, which see the gradient, are reported. Then contestants take turns; the
first update, which compiles, is reported by itself. DIR gets step.json and step.md.

The peers were google-tunix 0.1.7 with jax 0.10.2, and trl 1.16.0 with torch 2.13.0, each in an environment
of its own under Python 3.11.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import step_stages
from benchmarks.decode_peers import Peer
from benchmarks.step_flops import ideal
from benchmarks.step_rows import PRESETS, Lengths, Preset, Sizes, draw, padded
from benchmarks.timing import cells, interleaved, seconds, summary, table
from rosd_jax.config import default_config, validate
from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.models.sharding import make_mesh
from rosd_jax.models.weights import save_pretrained

CONTESTANTS = ("ours", "plain", "tunix", "trl")
GOAL = 3.0  # times as long as ours
TOLERANCE = 1e-3  # of the first losses, relative


@dataclass(frozen=True)
class Contest:
    """The model, the rows, and what all contestants are told."""

    model: Qwen3Config = Qwen3Config(8192, 256, 768, 4, 4, 2, 64, tie_word_embeddings=True)
    sizes: Sizes = Sizes().scaled(1 / 8, prompts=32)
    micro: int = 4  # rows of a forward and backward pass of a contestant that pads
    devices: int = 2  # of ours
    chunk: int = 128  # tokens of our loss at a time
    k: int = 100
    lr: float = 1e-4
    slots: int = 64  # of decoding

    def settings(self) -> dict[str, Any]:
        """What settings.json holds."""
        how = dict(k=self.k, cap=2.0, rows=self.micro, devices=self.devices, chunk=self.chunk)
        how |= dict(limits=self.sizes.limits)
        return how | dict(lr=self.lr, b2=0.999, weight_decay=0.01, clip=1.0)


CONTEST = Contest()


def main(argv: list[str] | None = None, contest: Contest = CONTEST) -> None:
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(description="The update against plain Flax, tunix and TRL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tunix-python")
    parser.add_argument("--trl-python")
    parser.add_argument("--cases", default="update,stages")
    parser.add_argument("--preset", choices=PRESETS, default="span")
    parser.add_argument("--rows", type=int, default=24, help="of the taught ones; 0: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "cpus": os.cpu_count(),
        "preset": args.preset,
        "contest": asdict(contest),
        "load": [os.getloadavg()],
        "matmul_flops_s": step_stages.matmul_rate("float32", make_mesh(-1, 1, 1)),
    }
    cases = {"update": update, "stages": stages}
    for case in args.cases.split(","):
        record[case] = cases[case](contest, args)
        record["load"].append(os.getloadavg())
        (args.out / "step.json").write_text(json.dumps(record, indent=1) + "\n")
        (args.out / "step.md").write_text(render(record) + "\n")


def update(contest: Contest, args: argparse.Namespace) -> dict[str, Any]:
    """The contest."""
    pythons = {"ours": sys.executable, "plain": sys.executable}
    pythons |= {"tunix": args.tunix_python, "trl": args.trl_python}
    lengths = taught_rows(contest, args.preset, args.rows)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), contest, lengths)
        peers = {
            name: Peer(name, pythons[name], folder, module="benchmarks.step_peers")
            for name in args.contestants.split(",")
            if pythons[name]
        }
        results = measure(peers, args.rounds)
        for peer in peers.values():
            peer.close()
    versions = {name: peer.versions for name, peer in peers.items()}
    flops = ideal(contest.model, lengths).total(remat=False)
    return {"rows": describe(lengths), "ideal_flops": flops, "versions": versions, "results": results}


def stages(contest: Contest, args: argparse.Namespace) -> dict[str, Any]:
    """A whole step of 32 x 8 rows."""
    config, sizes = default_config(), contest.sizes
    config.mesh.update(data=-1, fsdp=1)
    config.model.update(dtype="float32", remat="none")
    config.loss.topk = contest.k
    config.update_from_flattened_dict(sizes.limits)
    config.rollout.slots = contest.slots
    workload = step_stages.Workload(sizes, args.preset, answer=25.0, most_answer=128)
    return step_stages.measure(workload, validate(config), contest.model, args.rounds)


def taught_rows(contest: Contest, preset: Preset, rows: int) -> Lengths:
    """Rows that have a token with loss, the longest first; `rows` of them in even steps, 0: all.

    As many as are a multiple of a padding contestant's. Raises ValueError where they are too few.
    """
    lengths = draw(contest.sizes, preset, seed=0)
    taught = np.flatnonzero(lengths.active_B)
    taught = taught[np.argsort(-lengths.response_B[taught], kind="stable")]
    rows = (rows or len(taught)) // contest.micro * contest.micro
    if not 0 < rows <= len(taught):
        raise ValueError(f"{len(taught)} rows of a step are taught, for {rows}")
    return lengths.only(taught[np.linspace(0, len(taught) - 1, rows).round().astype(int)])


def write_inputs(folder: Path, contest: Contest, lengths: Lengths) -> None:
    """What the workers read."""
    params = init_params(contest.model, jax.random.key(0))
    # Matrices so large that a teacher who sees more says something else.
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)
    save_pretrained(folder / "model", params, contest.model)
    np.savez(folder / "rows.npz", allow_pickle=False, **padded(lengths, contest.model.vocab_size))
    (folder / "settings.json").write_text(json.dumps(contest.settings()))


def describe(lengths: Lengths) -> dict[str, float]:
    """What a reader wants to know of the rows."""
    longest = dict(response=lengths.response_B, prompt=lengths.prompt_B, teacher=lengths.teacher_prompt_B)
    return {
        "rows": len(lengths.prompt_B),
        "active tokens": int(lengths.active_B.sum()),
        "response tokens": int(lengths.response_B.sum()),
        **{f"longest {name}": int(x.max()) for name, x in longest.items()},
    }


def measure(peers: dict[str, Peer], rounds: int) -> dict[str, Any]:
    """First updates, which must agree, and then the rounds."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in peers}

    def turn(name):
        return answers[name].append(peers[name].ask("step"))

    first = {name: seconds(partial(turn, name)) for name in peers}
    for name in peers:
        ours, theirs = (answers[who][0]["loss"] for who in (next(iter(peers)), name))
        if not np.isclose(theirs, ours, rtol=TOLERANCE, atol=0):
            raise ValueError(f"{name}: its first loss is {theirs}, for {ours}")
    ms, errors = interleaved({name: partial(turn, name) for name in peers}, warmups=0, reps=rounds)
    for error in errors.values():
        raise error
    return {
        name: {
            "first_s": first[name],
            "s": [t / 1e3 for t in ms[name]],
            "cpu_s": [answer["cpu_s"] for answer in answers[name][1:]],
            "losses": [answer["loss"] for answer in answers[name]],
            "peak_bytes": answers[name][-1]["peak_bytes"],
        }
        for name in peers
    }


def render(record: dict[str, Any]) -> str:
    """Both tables."""
    load = ", ".join(f"{load[0]:.1f}" for load in record["load"])
    rate = record["matmul_flops_s"] / 1e9
    parts = [
        f"{record['date']}, {record['preset']}; load {load}; a matrix product reaches {rate:.0f} GFLOP/s"
    ]
    if "update" in record:
        parts.append(render_update(record["update"]))
    if "stages" in record:
        parts.append(step_stages.render(record["stages"]))
    return "\n\n".join(parts)


def render_update(found: dict[str, Any]) -> str:
    """One row a contestant."""
    head = [
        "contestant",
        "s",
        "p20 - p80",
        "n",
        f"x ours (goal {GOAL:g})",
        "CPU s",
        "x ours in CPU s",
        "GFLOP/s of the ideal's",
        "first update s",
        "peak GB",
        "losses",
    ]

    def medians(result):
        return [float(np.median(result[key])) for key in ("s", "cpu_s")]

    base = medians(next(iter(found["results"].values())))
    rows = []
    for name, result in found["results"].items():
        s, cpu_s = medians(result)
        losses = ", ".join(f"{loss:.6f}" for loss in result["losses"][:3])
        rows.append(
            [
                name,
                *cells(summary(result["s"]), 2),
                f"{s / base[0]:.2f}",
                f"{cpu_s:.1f}",
                f"{cpu_s / base[1]:.2f}",
                f"{found['ideal_flops'] / s / 1e9:.1f}",
                f"{result['first_s']:.1f}",
                f"{result['peak_bytes'] / 1e9:.2f}",
                losses,
            ]
        )
    what = ", ".join(f"{name} {n}" for name, n in found["rows"].items())
    return f"{what}\n\n{table(head, rows)}"


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", Contest.devices)
    main()
