"""Decoding side by side with tunix's Sampler and transformers' generate: same random weights, same CPU.

    JAX_PLATFORMS=cpu python -m benchmarks.decode --out=DIR [--tunix-python=FILE] [--hf-python=FILE]
        [--cases=fixed,ragged,evaluation,prompts,top_p] [--rounds=3] [--batches=16,32,64]

The peers' dependencies clash, so each runs in an interpreter of its own as a worker that waits for its
turn; one without an interpreter is left out. Greedy tokens of all must agree first.

    fixed       every row of one batch gets the same number of tokens
    ragged      lognormal lengths, the same for everybody: we are stopped at each row's own; a peer runs
                every batch until its longest row, with a cache for the most that a row might get
    evaluation  many short rows of few prompts: slots that are refilled against batch after batch
    prompts     prompts of lognormal lengths and one token each, against all padded to the longest
    top_p       the nucleus of a large vocabulary by bisection, against sorting it

We run one engine on each of DEVICES CPU devices, as run.py does where rows lie along mesh.data, and once
more all rows on a single one. The peers share their operations among the cores; tunix lays nothing over
several CPU devices. They take the batch size that is fastest for them. Times are the whole call's,
prompts included; contestants take turns, and their first call, which compiles, is reported by itself.
Processor seconds are given too, for runs on a machine that does other things too. DIR gets
decode.json and decode.md.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.decode_peers import Call, Peer, here
from benchmarks.decode_shared import lengths
from benchmarks.timing import cells, interleaved, seconds, summary, table, versions
from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.models.weights import save_pretrained
from rosd_jax.rollout.batching import Request
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling, invert_cdf, sample
from rosd_jax.train.devices import cpu_devices
from rosd_jax.types import HostRollout, Params

OURS, ONE, STATIC = "ours", "ours, one device", "ours, static batches"
PADDED, SORTING = "ours, prompts padded", "sorting"
DEVICES = cpu_devices(32, 16)  # the fewest rows of a batch below, and what divides all
GOALS = {
    ("fixed", "tunix"): 1.5,
    ("ragged", "tunix"): 4.0,
    ("ragged", "transformers"): 5.0,
    ("evaluation", STATIC): 1.9,
    ("top_p", SORTING): 20.0,
}
TOP_P = 0.95


@dataclass(frozen=True)
class Sizes:
    """Of the model and of the cases. Lengths are in tokens; a mean is that of the uncut lognormal."""

    model: Qwen3Config = Qwen3Config(4096, 256, 768, 8, 4, 2, 64, tie_word_embeddings=True)
    prompt: int = 64
    fixed: tuple[int, int] = 32, 128  # rows, tokens of each
    ragged_rows: int = 256
    ragged_mean: float = 96.0
    ragged_most: int = 512
    questions: int = 200
    samples: int = 16
    slots: int = 64
    short_mean: float = 6.0
    short_most: int = 32
    prompt_rows: int = 48
    prompt_mean: float = 400.0
    prompt_most: int = 2048
    top_p: tuple[int, int] = 16, 151936  # rows, vocabulary
    devices: int = DEVICES


SIZES = Sizes()


class Contest(NamedTuple):
    """Contestants, each of which yields the `wanted` tokens."""

    calls: dict[str, Call]
    wanted: int
    notes: dict[str, Any] = {}


def main(argv: list[str] | None = None, sizes: Sizes = SIZES) -> None:
    """Runs what the arguments say; both files are complete after every case."""
    parser = argparse.ArgumentParser(description="Decoding against tunix and transformers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tunix-python")
    parser.add_argument("--hf-python")
    parser.add_argument("--cases", default="fixed,ragged,evaluation,prompts,top_p")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="16,32,64", help="rows of a peer's ragged batch: the best wins")
    args = parser.parse_args(argv)
    params = random_params(sizes.model)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(folder, params, sizes.model)
        pythons = {"tunix": args.tunix_python, "transformers": args.hf_python}
        peers = {name: Peer(name, python, folder) for name, python in pythons.items() if python}
        cases = {
            "fixed": lambda: fixed(sizes, params, peers),
            "ragged": lambda: ragged(sizes, params, peers, [int(n) for n in args.batches.split(",")]),
            "evaluation": lambda: evaluation(sizes, params),
            "prompts": lambda: ragged_prompts(sizes, params),
            "top_p": lambda: top_p(sizes, peers, folder),
        }
        record = {
            "date": time.strftime("%Y-%m-%d"),
            "cpus": os.cpu_count(),
            "rounds": args.rounds,
            "sizes": asdict(sizes),
            "load": [os.getloadavg()],
            "cases": {},
            "versions": {name: peer.versions for name, peer in peers.items()} | {OURS: versions("jax")},
            "greedy": check_greedy(sizes, params, peers),
        }
        args.out.mkdir(parents=True, exist_ok=True)
        for case in args.cases.split(","):
            record["cases"][case] = measure(cases[case](), args.rounds)
            record["load"].append(os.getloadavg())
            (args.out / "decode.json").write_text(json.dumps(record, indent=1) + "\n")
            (args.out / "decode.md").write_text(render(record) + "\n")
        for peer in peers.values():
            peer.close()


def random_params(model: Qwen3Config) -> Params:
    """Matrices so large that greedy text does not repeat one id."""
    params = init_params(model, jax.random.key(0))
    return jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)


def prompts(sizes: Sizes, rows: int, length: int | None = None) -> np.ndarray:
    """Random ids [rows, length]; None: sizes.prompt."""
    shape = rows, length or sizes.prompt
    return np.random.default_rng(0).integers(2, sizes.model.vocab_size, shape, np.int32)


def engine(sizes: Sizes, params: Params, limits: Limits, temperature: float = 1.0):
    """Ours: requests -> a rollout."""
    mesh = make_mesh(-1, 1, 1, jax.devices()[: sizes.devices])
    params = jax.device_put(params, param_shardings(params, mesh))
    ours = Engine(sizes.model, mesh, limits, Sampling(temperature))

    def run(requests: Sequence[Request]) -> HostRollout:
        return ours.generate(params, requests, jax.random.key(1))

    return run


def asked(ids: np.ndarray, prompt_of_B: np.ndarray, limit_B: np.ndarray) -> list[Request]:
    """A request a row, for a response of `limit_B` tokens to a prompt of `ids`."""
    rows = zip(prompt_of_B.tolist(), limit_B.tolist(), strict=True)
    return [Request(ids[n].tolist(), uid, limit) for uid, (n, limit) in enumerate(rows)]


def check_greedy(sizes: Sizes, params: Params, peers: dict[str, Peer]) -> dict[str, Any]:
    """Raises ValueError unless the peers' greedy tokens are ours."""
    ids, new = prompts(sizes, 4), min(64, sizes.fixed[1])
    run = engine(sizes, params, Limits(new, sizes.prompt), temperature=0.0)
    wanted = run(asked(ids, np.arange(4), np.full(4, new))).tokens_BR
    for name, peer in peers.items():
        got = np.array(peer.generate(ids, new, sizes.prompt + new, greedy=True)["tokens"])
        if not np.array_equal(got, wanted):
            raise ValueError(f"{name}: {np.mean(got != wanted):.1%} of its greedy tokens are not ours")
    return {"tokens": wanted.size, "different ids": len(np.unique(wanted)), "equal": list(peers)}


def fixed(sizes: Sizes, params: Params, peers: dict[str, Peer]) -> Contest:
    """One batch, one length."""
    rows, new = sizes.fixed
    ids, limit_B = prompts(sizes, rows), np.full(rows, new, np.int32)
    limits, requests = Limits(new, sizes.prompt), asked(ids, np.arange(rows), limit_B)

    def run(sizes):
        return here(engine(sizes, params, limits), requests)

    calls = {OURS: run(sizes), ONE: run(replace(sizes, devices=1))}
    peers_calls = {name: partial(peer.generate, ids, new, sizes.prompt + new) for name, peer in peers.items()}
    return Contest(calls | peers_calls, rows * new)


def ragged(sizes: Sizes, params: Params, peers: dict[str, Peer], batches: list[int]) -> Contest:
    """One set of rows, in the peer's best batch."""
    rows, most = sizes.ragged_rows, sizes.ragged_most
    ids, limit_B = prompts(sizes, rows), lengths(rows, sizes.ragged_mean, most, seed=1)
    limits = Limits(most, sizes.prompt, slots=sizes.slots)
    requests = asked(ids, np.arange(rows), limit_B)

    def run(sizes):
        return here(engine(sizes, params, limits), requests)

    calls = {OURS: run(sizes), ONE: run(replace(sizes, devices=1))}
    notes: dict[str, Any] = {"longest": int(limit_B.max())}
    for name, peer in peers.items():
        batch, notes[name] = peer.best_batch(ids, limit_B, sizes.prompt + most, batches)
        calls[name] = partial(peer.in_batches, ids, limit_B, sizes.prompt + most, batch)
    return Contest(calls, int(limit_B.sum()), notes)


def evaluation(sizes: Sizes, params: Params) -> Contest:
    """Ours alone: one queue, or as many rows at a time as there are slots."""
    rows, slots = sizes.questions * sizes.samples, sizes.slots
    ids, prompt_of_B = prompts(sizes, sizes.questions), np.arange(rows) // sizes.samples
    limit_B = lengths(rows, sizes.short_mean, sizes.short_most, seed=2)
    limits, requests = Limits(sizes.short_most, sizes.prompt), asked(ids, prompt_of_B, limit_B)
    refilled = engine(sizes, params, replace(limits, slots=slots))
    static = engine(sizes, params, limits)

    def in_batches():
        for at in range(0, rows, slots):
            static(requests[at : at + slots])

    calls = {OURS: here(refilled, requests), STATIC: here(in_batches)}
    return Contest(calls, int(limit_B.sum()))


def ragged_prompts(sizes: Sizes, params: Params) -> Contest:
    """Ours alone: prompts of their own lengths, or all as long as the longest may be."""
    rows, most = sizes.prompt_rows, sizes.prompt_most
    ids, length_N = prompts(sizes, rows, most), lengths(rows, sizes.prompt_mean, most, seed=3)
    run = engine(sizes, params, Limits(1, most))
    padded = [Request(row.tolist(), uid) for uid, row in enumerate(ids)]
    ragged = [Request(r.prompt[:n], r.uid) for r, n in zip(padded, length_N.tolist(), strict=True)]
    calls = {OURS: here(run, ragged), PADDED: here(run, padded)}
    return Contest(calls, int(length_N.sum()), {"longest": int(length_N.max())})


def top_p(sizes: Sizes, peers: dict[str, Peer], folder: str) -> Contest:
    """One token a row. The peers sort too."""
    file = f"{folder}/logits.npy"
    np.save(file, (3 * np.random.default_rng(0).normal(size=sizes.top_p)).astype(np.float32))
    args = jnp.asarray(np.load(file)), jnp.linspace(0.01, 0.99, sizes.top_p[0])
    bisected = jax.jit(lambda z_BV, u_B: sample(z_BV, u_B, temperature=1.0, top_p=TOP_P)[0])

    def wait(call):
        return here(lambda: call(*args).block_until_ready())

    calls = {OURS: wait(bisected), SORTING: wait(jax.jit(by_sorting))}
    calls |= {name: partial(peer.ask, "top_p", logits=file, top_p=TOP_P) for name, peer in peers.items()}
    return Contest(calls, sizes.top_p[0])


def by_sorting(logits_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """Sorts values alone, which is cheaper than to sort ids with them."""
    weight_BV = jax.nn.softmax(logits_BV)
    sorted_BV = -jnp.sort(-weight_BV)
    last_B = jnp.sum(jnp.cumsum(sorted_BV, axis=-1) < TOP_P, axis=-1)
    least_B1 = jnp.take_along_axis(sorted_BV, last_B[:, None], axis=-1)
    return invert_cdf(jnp.where(weight_BV >= least_B1, weight_BV, 0.0), u_B)


def measure(contest: Contest, rounds: int) -> dict[str, Any]:
    """Every contestant's first call, then the rounds; raises what a contestant raises."""
    first = {name: seconds(call) for name, call in contest.calls.items()}
    cpu_s: dict[str, list[float]] = {name: [] for name in first}

    def turn(name):
        return cpu_s[name].append(contest.calls[name]()["cpu_s"])

    ms, errors = interleaved({name: partial(turn, name) for name in first}, warmups=0, reps=rounds)
    for error in errors.values():
        raise error
    results = {
        name: {"first_s": first[name], "s": [t / 1e3 for t in ms[name]], "cpu_s": cpu_s[name]}
        for name in first
    }
    return {"wanted": contest.wanted, "results": results, "notes": contest.notes}


def render(record: dict[str, Any]) -> str:
    """One row a case and contestant."""
    head = [
        "case",
        "contestant",
        "s",
        "p20 - p80",
        "n",
        "wanted tokens/s",
        "CPU s",
        "first call s",
        "x ours",
        "x ours in CPU s",
        "goal",
    ]
    rows = []
    for case, found in record["cases"].items():
        ours_s, ours_cpu_s = (np.median(found["results"][OURS][key]) for key in ("s", "cpu_s"))
        for name, result in found["results"].items():
            s, cpu_s = (np.median(result[key]) for key in ("s", "cpu_s"))
            numbers = f"{found['wanted'] / s:.0f}", f"{cpu_s:.3f}", f"{result['first_s']:.1f}"
            ratios = f"{s / ours_s:.2f}", f"{cpu_s / ours_cpu_s:.2f}", f"{GOALS.get((case, name), '')}"
            rows.append([case, name, *cells(summary(result["s"]), 3), *numbers, *ratios])
    load = ", ".join(f"{load[0]:.1f}" for load in record["load"])
    return f"{record['date']}, load before and after each case {load}:\n\n{table(head, rows)}"


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
