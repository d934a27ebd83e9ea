"""One update side by side with plain Flax, tunix and TRL: the same random weights, the same rows, the same CPU.

    JAX_PLATFORMS=cpu python -m benchmarks.step --out=DIR [--tunix-python=FILE] [--trl-python=FILE]
        [--preset=span] [--rounds=3] [--contestants=ours,plain,tunix,trl]

Every contestant is a process of its own (benchmarks/step_peers.py says what each computes) and makes whole
updates: forward, backward, clip and AdamW. Rows are those of one step that have a token with loss
(benchmarks/step_rows.py draws them), at an eighth of the paper's lengths; a contestant that pads, pads to
the longest of them. One without an interpreter is left out.

The losses of the first update must be ours within `TOLERANCE`, those of the next, which see the gradient,
are reported. Then contestants take turns; the first update, which compiles, is reported by itself. DIR
gets step.json and step.md.
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

from benchmarks.decode_peers import Peer, seconds
from benchmarks.step_rows import PRESETS, Lengths, Sizes, draw, lesson
from benchmarks.timing import cells, interleaved, summary, table
from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.models.weights import save_pretrained

CONTESTANTS = ("ours", "plain", "tunix", "trl")
GOAL = 3.0  # times as long as ours
TOLERANCE = 1e-3  # of the first losses, relative


@dataclass(frozen=True)
class Contest:
    """The model, the rows, and what all contestants are told."""

    model: Qwen3Config = Qwen3Config(8192, 256, 768, 4, 4, 2, 64, tie_word_embeddings=True)
    sizes: Sizes = Sizes().scaled(1 / 8, prompts=6)
    rows: int = 24  # of the step's, those that are taught
    micro: int = 4  # rows of a forward and backward pass of a contestant that pads
    devices: int = 2  # of ours
    k: int = 100
    lr: float = 1e-4

    def settings(self) -> dict[str, Any]:
        """What settings.json holds."""
        how = dict(k=self.k, cap=2.0, rows=self.micro, devices=self.devices)
        return how | dict(lr=self.lr, b2=0.999, weight_decay=0.01, clip=1.0)


def main(argv: list[str] | None = None, contest: Contest = Contest()) -> None:  # noqa: B008
    """Runs what the arguments say."""
    parser = argparse.ArgumentParser(description="The update against plain Flax, tunix and TRL")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tunix-python")
    parser.add_argument("--trl-python")
    parser.add_argument("--preset", choices=PRESETS, default="span")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    args = parser.parse_args(argv)
    pythons = {"ours": sys.executable, "plain": sys.executable}
    pythons |= {"tunix": args.tunix_python, "trl": args.trl_python}
    lengths = taught_rows(contest, args.preset)
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), contest, lengths)
        peers = {
            name: Peer(name, pythons[name], folder, module="benchmarks.step_peers")
            for name in args.contestants.split(",")
            if pythons[name]
        }
        record = {
            "date": time.strftime("%Y-%m-%d"), "cpus": os.cpu_count(), "preset": args.preset,
            "contest": asdict(contest), "lengths": describe(lengths), "load": [os.getloadavg()],
            "versions": {name: peer.versions for name, peer in peers.items()},
            "results": measure(peers, args.rounds),
        }  # fmt: skip
        for peer in peers.values():
            peer.close()
    record["load"].append(os.getloadavg())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "step.json").write_text(json.dumps(record, indent=1) + "\n")
    (args.out / "step.md").write_text(render(record) + "\n")


def taught_rows(contest: Contest, preset: Any) -> Lengths:
    """The first rows that have a token with loss; raises ValueError where a step has too few."""
    lengths = draw(contest.sizes, preset, seed=0)
    rows = np.flatnonzero(lengths.active_B)[: contest.rows]
    if len(rows) < contest.rows:
        raise ValueError(f"{len(rows)} rows of a step are taught, for {contest.rows}")
    return lengths.only(rows)


def write_inputs(folder: Path, contest: Contest, lengths: Lengths) -> None:
    """What the workers read."""
    params = init_params(contest.model, jax.random.key(0))
    # Matrices so large that a teacher who sees more says something else.
    params = jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)
    save_pretrained(folder / "model", params, contest.model)
    np.savez(folder / "rows.npz", **vars(lesson(lengths, contest.model.vocab_size)))
    (folder / "settings.json").write_text(json.dumps(contest.settings()))


def describe(lengths: Lengths) -> dict[str, float]:
    """What a reader wants to know of the rows."""
    longest = dict(response=lengths.response_B, prompt=lengths.prompt_B, teacher=lengths.teacher_prompt_B)
    return {
        "rows": len(lengths.prompt_B), "active tokens": int(lengths.active_B.sum()),
        "response tokens": int(lengths.response_B.sum()),
        **{f"longest {name}": int(x.max()) for name, x in longest.items()},
    }  # fmt: skip


def measure(peers: dict[str, Peer], rounds: int) -> dict[str, Any]:
    """First updates, which must agree, and then the rounds."""
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in peers}
    turn = lambda name: answers[name].append(peers[name].ask("step"))
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
            "first_s": first[name], "s": [t / 1e3 for t in ms[name]],
            "cpu_s": [answer["cpu_s"] for answer in answers[name][1:]],
            "losses": [answer["loss"] for answer in answers[name]],
            "peak_bytes": answers[name][-1]["peak_bytes"],
        }
        for name in peers
    }  # fmt: skip


def render(record: dict[str, Any]) -> str:
    """One row a contestant."""
    head = ["contestant", "s", "p20 - p80", "n", "x ours", "CPU s", "x ours in CPU s", "first update s",
            "peak GB", "losses"]  # fmt: skip
    medians = lambda result: [float(np.median(result[key])) for key in ("s", "cpu_s")]
    base = medians(next(iter(record["results"].values())))
    rows = []
    for name, result in record["results"].items():
        s, cpu_s = medians(result)
        losses = ", ".join(f"{loss:.6f}" for loss in result["losses"][:3])
        rows.append([
            name, *cells(summary(result["s"]), 2), f"{s / base[0]:.2f}", f"{cpu_s:.1f}",
            f"{cpu_s / base[1]:.2f}", f"{result['first_s']:.1f}", f"{result['peak_bytes'] / 1e9:.2f}", losses,
        ])  # fmt: skip
    load = ", ".join(f"{load[0]:.1f}" for load in record["load"])
    what = ", ".join(f"{name} {n}" for name, n in record["lengths"].items())
    return f"{record['date']}, {record['preset']}: {what}; load {load}\n\n{table(head, rows)}"


if __name__ == "__main__":
    main()
