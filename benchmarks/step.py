"""One update compared with plain Flax, tunix and TRL on one CPU, and a whole step stage by stage.

    JAX_PLATFORMS=cpu python -m benchmarks.step --out=DIR [--tunix-python=FILE] [--trl-python=FILE]
        [--cases=update,stages] [--preset=span] [--rows=24] [--rounds=3] [--contestants=ours,plain,tunix,trl]

    update   whole updates with forward, backward, clipping and AdamW, on the same random weights and rows
             for all. Every contestant runs in a process of its own (benchmarks/step_peers.py says what each
             computes); one without an interpreter is left out
    stages   our rollouts, reflections and update (benchmarks/step_stages.py)

Rows are drawn at an eighth of the paper's lengths (benchmarks/step_rows.py). `update` takes the rows with
loss of one step of 32 x 8, or `--rows` of them, evenly spaced from the longest to the shortest. So a
contestant that pads to the longest row pads as much as it would for all of them. The losses of the first
update must agree with ours within `TOLERANCE`; the next ones, which depend on the gradients, are reported.
Then contestants take turns. The first update, which compiles, is reported separately. DIR gets step.json and
step.md.

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
GOAL = 3.0  # how many times as long as ours
TOLERANCE = 1e-3  # of the first losses, relative


@dataclass(frozen=True)
class Contest:
    """The model, the rows, and the settings of all contestants."""

    model: Qwen3Config = Qwen3Config(8192, 256, 768, 4, 4, 2, 64, tie_word_embeddings=True)
    sizes: Sizes = Sizes().scaled(1 / 8, prompts=32)
    micro: int = 4  # rows per forward and backward pass of a contestant that pads
    devices: int = 2  # CPU devices of ours
    chunk: int = 128  # tokens per chunk of our loss
    k: int = 100
    lr: float = 1e-4
    slots: int = 64  # for decoding

    def settings(self) -> dict[str, Any]:
        """The contents of settings.json."""
        return dict(
            k=self.k,
            cap=2.0,
            rows=self.micro,
            devices=self.devices,
            chunk=self.chunk,
            limits=self.sizes.limits,
            lr=self.lr,
            b2=0.999,
            weight_decay=0.01,
            clip=1.0,
        )


CONTEST = Contest()


def main(argv: list[str] | None = None, contest: Contest = CONTEST) -> None:
    """Runs the cases. Both files are rewritten after each case."""
    parser = argparse.ArgumentParser(description="The update compared with plain Flax, tunix and TRL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tunix-python")
    parser.add_argument("--trl-python")
    parser.add_argument("--cases", default="update,stages")
    parser.add_argument("--preset", choices=PRESETS, default="span")
    parser.add_argument("--rows", type=int, default=24, help="number of taught rows; 0: all")
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
    """Updates of all contestants."""
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
    config = default_config()
    sizes = contest.sizes
    config.mesh.update(data=-1, fsdp=1)
    config.model.update(dtype="float32", remat="none")
    config.loss.topk = contest.k
    config.update_from_flattened_dict(sizes.limits)
    config.rollout.slots = contest.slots
    workload = step_stages.Workload(sizes, args.preset, answer=25.0, most_answer=128)
    return step_stages.measure(workload, validate(config), contest.model, args.rounds)


def taught_rows(contest: Contest, preset: Preset, rows: int) -> Lengths:
    """Rows that have a token with loss, the longest first: `rows` of them, evenly spaced, or all if it is 0.

    Their number is rounded down to a multiple of `contest.micro`. Raises ValueError if there are too few.
    """
    lengths = draw(contest.sizes, preset, seed=0)
    taught = np.flatnonzero(lengths.active_B)
    taught = taught[np.argsort(-lengths.response_B[taught], kind="stable")]
    rows = (rows or len(taught)) // contest.micro * contest.micro
    if not 0 < rows <= len(taught):
        raise ValueError(f"{len(taught)} rows of a step are taught; {rows} were asked for")
    return lengths.only(taught[np.linspace(0, len(taught) - 1, rows).round().astype(int)])


def write_inputs(folder: Path, contest: Contest, lengths: Lengths) -> None:
    """The files that the workers read."""
    params = init_params(contest.model, jax.random.key(0))
    # Matrices so large that the teacher's longer prompt changes its distribution.
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)
    save_pretrained(folder / "model", params, contest.model)
    np.savez(folder / "rows.npz", allow_pickle=False, **padded(lengths, contest.model.vocab_size))
    (folder / "settings.json").write_text(json.dumps(contest.settings()))


def describe(lengths: Lengths) -> dict[str, float]:
    """Number of rows and tokens, and the longest of each kind."""
    longest = dict(response=lengths.response_B, prompt=lengths.prompt_B, teacher=lengths.teacher_prompt_B)
    return {
        "rows": len(lengths.prompt_B),
        "active tokens": int(lengths.active_B.sum()),
        "response tokens": int(lengths.response_B.sum()),
        **{f"longest {name}": int(x.max()) for name, x in longest.items()},
    }


def measure(peers: dict[str, Peer], rounds: int) -> dict[str, Any]:
    """First updates, whose losses must agree with the first contestant's, and then the rounds."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in peers}

    def turn(name: str) -> None:
        answers[name].append(peers[name].ask("step"))

    first = {name: seconds(partial(turn, name)) for name in peers}
    wanted = answers[next(iter(peers))][0]["loss"]
    for name in peers:
        loss = answers[name][0]["loss"]
        if not np.isclose(loss, wanted, rtol=TOLERANCE, atol=0):
            raise ValueError(f"{name}: its first loss is {loss} instead of {wanted}")
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
    """The tables of the cases."""
    load = ", ".join(f"{load[0]:.1f}" for load in record["load"])
    rate = record["matmul_flops_s"] / 1e9
    parts = [f"{record['date']}, {record['preset']}; load {load}; a large matmul reaches {rate:.0f} GFLOP/s"]
    if "update" in record:
        parts.append(render_update(record["update"]))
    if "stages" in record:
        parts.append(step_stages.render(record["stages"]))
    return "\n\n".join(parts)


def render_update(found: dict[str, Any]) -> str:
    """A table with one row per contestant."""
    head = [
        "contestant",
        "s",
        "p20 - p80",
        "n",
        f"x ours (goal {GOAL:g})",
        "CPU s",
        "x ours in CPU s",
        "ideal's FLOPs, GFLOP/s",
        "first update s",
        "peak GB",
        "losses",
    ]

    ours = next(iter(found["results"].values()))
    rows = []
    for name, result in found["results"].items():
        s = np.median(result["s"])
        cpu_s = np.median(result["cpu_s"])
        losses = ", ".join(f"{loss:.6f}" for loss in result["losses"][:3])
        rows.append(
            [
                name,
                *cells(summary(result["s"]), 2),
                f"{s / np.median(ours['s']):.2f}",
                f"{cpu_s:.1f}",
                f"{cpu_s / np.median(ours['cpu_s']):.2f}",
                f"{found['ideal_flops'] / s / 1e9:.1f}",
                f"{result['first_s']:.1f}",
                f"{result['peak_bytes'] / 1e9:.2f}",
                losses,
            ]
        )
    about = ", ".join(f"{name} {n}" for name, n in found["rows"].items())
    return f"{about}\n\n{table(head, rows)}"


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", Contest.devices)
    main()
