"""Decoding compared with tunix's Sampler and transformers' generate: same random weights, same CPU.

    JAX_PLATFORMS=cpu python -m benchmarks.decode --out=DIR [--tunix-python=FILE] [--hf-python=FILE]
        [--cases=fixed,ragged,evaluation,prompts,top_p] [--rounds=3] [--batches=16,32,64]

The peers' dependencies conflict, so each runs as a worker process with an interpreter of its own; a peer
without an interpreter is left out. First, the greedy tokens of all must agree.

    fixed       one batch, the same number of tokens for every row
    ragged      lognormal lengths, the same for every contestant. Ours stops each row at its own length; a
                peer runs a batch until its longest row is done, with a cache for the longest possible row
    evaluation  many short rows of few prompts: slots that are refilled, compared with static batches
    prompts     prompts of lognormal lengths and one token each, compared with all padded to the limit
    top_p       the nucleus of a large vocabulary by bisection, compared with sorting

Ours runs one engine on each of DEVICES CPU devices, as run.py does with mesh.data=-1, and once more with all
rows on one device. The peers use the cores within each operation; tunix does not use several CPU devices.
They run at the batch size that is fastest for them. Times are of whole calls, prefill included. Contestants
take turns; their first call, which compiles, is reported separately. CPU seconds are reported too, for runs
on a machine that is not idle. DIR gets decode.json and decode.md.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
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

OURS = "ours"
ONE = "ours, one device"
STATIC = "ours, static batches"
PADDED = "ours, prompts padded"
SORTING = "sorting"
DEVICES = cpu_devices(32, 16)  # the smallest batch below has 32 rows, and 16 divides all
GOALS = {  # how many times as long as ours
    ("fixed", "tunix"): 1.5,
    ("ragged", "tunix"): 4.0,
    ("ragged", "transformers"): 5.0,
    ("evaluation", STATIC): 1.9,
    ("top_p", SORTING): 20.0,
}
TOP_P = 0.95


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model and the cases. Lengths are in tokens, means those of the uncut lognormal."""

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
    """Contestants, each of which generates the `wanted` tokens."""

    calls: dict[str, Call]
    wanted: int
    notes: dict[str, Any] = {}


def main(argv: list[str] | None = None, sizes: Sizes = SIZES) -> None:
    """Runs the cases. Both files are rewritten after each case."""
    parser = argparse.ArgumentParser(description="Decoding against tunix and transformers")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tunix-python")
    parser.add_argument("--hf-python")
    parser.add_argument("--cases", default="fixed,ragged,evaluation,prompts,top_p")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", default="16,32,64", help="batch sizes of which a peer gets the fastest")
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
    """Random weights, with matrices so large that greedy decoding does not repeat one id."""
    params = init_params(model, jax.random.key(0))
    return jax.tree.map(lambda x: 3 * x if x.ndim > 2 else x, params)


def prompts(sizes: Sizes, rows: int, length: int | None = None) -> np.ndarray:
    """Random ids [rows, length]; the default length is sizes.prompt."""
    shape = (rows, length or sizes.prompt)
    return np.random.default_rng(0).integers(2, sizes.model.vocab_size, shape, np.int32)


def engine(
    sizes: Sizes, params: Params, limits: Limits, temperature: float = 1.0
) -> Callable[[Sequence[Request]], HostRollout]:
    """Ours, as a function from requests to a rollout."""
    mesh = make_mesh(-1, 1, 1, jax.devices()[: sizes.devices])
    params = jax.device_put(params, param_shardings(params, mesh))
    ours = Engine(sizes.model, mesh, limits, Sampling(temperature))

    def run(requests: Sequence[Request]) -> HostRollout:
        return ours.generate(params, requests, jax.random.key(1))

    return run


def asked(ids: np.ndarray, prompt_of_B: np.ndarray, limit_B: np.ndarray) -> list[Request]:
    """One request per row, for a response of limit_B tokens to prompt prompt_of_B in `ids`."""
    rows = zip(prompt_of_B.tolist(), limit_B.tolist(), strict=True)
    return [Request(ids[n].tolist(), uid, limit) for uid, (n, limit) in enumerate(rows)]


def check_greedy(sizes: Sizes, params: Params, peers: dict[str, Peer]) -> dict[str, Any]:
    """Raises ValueError unless the peers' greedy tokens equal ours."""
    ids = prompts(sizes, 4)
    new = min(64, sizes.fixed[1])
    run = engine(sizes, params, Limits(new, sizes.prompt), temperature=0.0)
    wanted = run(asked(ids, np.arange(4), np.full(4, new))).tokens_BR
    for name, peer in peers.items():
        got = np.array(peer.generate(ids, new, sizes.prompt + new, greedy=True)["tokens"])
        if not np.array_equal(got, wanted):
            raise ValueError(f"{name}: {np.mean(got != wanted):.1%} of its greedy tokens differ from ours")
    return {"tokens": wanted.size, "different ids": len(np.unique(wanted)), "equal": list(peers)}


def fixed(sizes: Sizes, params: Params, peers: dict[str, Peer]) -> Contest:
    """One batch, one length."""
    rows, new = sizes.fixed
    ids = prompts(sizes, rows)
    limits = Limits(new, sizes.prompt)
    requests = asked(ids, np.arange(rows), np.full(rows, new, np.int32))

    def run(sizes: Sizes) -> Call:
        return here(engine(sizes, params, limits), requests)

    calls = {OURS: run(sizes), ONE: run(replace(sizes, devices=1))}
    peers_calls = {name: partial(peer.generate, ids, new, sizes.prompt + new) for name, peer in peers.items()}
    return Contest(calls | peers_calls, rows * new)


def ragged(sizes: Sizes, params: Params, peers: dict[str, Peer], batches: list[int]) -> Contest:
    """One set of rows; peers at their fastest batch size."""
    rows = sizes.ragged_rows
    most = sizes.ragged_most
    ids = prompts(sizes, rows)
    limit_B = lengths(rows, sizes.ragged_mean, most, seed=1)
    limits = Limits(most, sizes.prompt, slots=sizes.slots)
    requests = asked(ids, np.arange(rows), limit_B)

    def run(sizes: Sizes) -> Call:
        return here(engine(sizes, params, limits), requests)

    calls = {OURS: run(sizes), ONE: run(replace(sizes, devices=1))}
    notes: dict[str, Any] = {"longest": int(limit_B.max())}
    for name, peer in peers.items():
        batch, notes[name] = peer.best_batch(ids, limit_B, sizes.prompt + most, batches)
        calls[name] = partial(peer.in_batches, ids, limit_B, sizes.prompt + most, batch)
    return Contest(calls, int(limit_B.sum()), notes)


def evaluation(sizes: Sizes, params: Params) -> Contest:
    """Ours only: one queue, or static batches of as many rows as there are slots."""
    rows = sizes.questions * sizes.samples
    slots = sizes.slots
    ids = prompts(sizes, sizes.questions)
    limit_B = lengths(rows, sizes.short_mean, sizes.short_most, seed=2)
    limits = Limits(sizes.short_most, sizes.prompt)
    requests = asked(ids, np.arange(rows) // sizes.samples, limit_B)
    refilled = engine(sizes, params, replace(limits, slots=slots))
    static = engine(sizes, params, limits)

    def in_batches() -> None:
        for at in range(0, rows, slots):
            static(requests[at : at + slots])

    calls = {OURS: here(refilled, requests), STATIC: here(in_batches)}
    return Contest(calls, int(limit_B.sum()))


def ragged_prompts(sizes: Sizes, params: Params) -> Contest:
    """Ours only: prompts of ragged lengths, or all padded to the limit."""
    rows = sizes.prompt_rows
    most = sizes.prompt_most
    ids = prompts(sizes, rows, most)
    length_N = lengths(rows, sizes.prompt_mean, most, seed=3)
    run = engine(sizes, params, Limits(1, most))
    padded = [Request(row.tolist(), uid) for uid, row in enumerate(ids)]
    ragged = [Request(r.prompt[:n], r.uid) for r, n in zip(padded, length_N.tolist(), strict=True)]
    calls = {OURS: here(run, ragged), PADDED: here(run, padded)}
    return Contest(calls, int(length_N.sum()), {"longest": int(length_N.max())})


def top_p(sizes: Sizes, peers: dict[str, Peer], folder: str) -> Contest:
    """One token per row. The peers sort too."""
    file = f"{folder}/logits.npy"
    np.save(file, (3 * np.random.default_rng(0).normal(size=sizes.top_p)).astype(np.float32))
    logits_BV = jnp.asarray(np.load(file))
    u_B = jnp.linspace(0.01, 0.99, sizes.top_p[0])

    def by_bisection(logits_BV: jax.Array, u_B: jax.Array) -> jax.Array:
        return sample(logits_BV, u_B, temperature=1.0, top_p=TOP_P)[0]

    def call_of(pick: Callable[[jax.Array, jax.Array], jax.Array]) -> Call:
        compiled = jax.jit(pick)
        return here(lambda: compiled(logits_BV, u_B).block_until_ready())

    calls = {OURS: call_of(by_bisection), SORTING: call_of(by_sorting)}
    calls |= {name: partial(peer.ask, "top_p", logits=file, top_p=TOP_P) for name, peer in peers.items()}
    return Contest(calls, sizes.top_p[0])


def by_sorting(logits_BV: jax.Array, u_B: jax.Array) -> jax.Array:
    """Top-p by sorting. It sorts values without their ids, which is cheaper."""
    weight_BV = jax.nn.softmax(logits_BV)
    sorted_BV = -jnp.sort(-weight_BV)
    last_B = jnp.sum(jnp.cumsum(sorted_BV, axis=-1) < TOP_P, axis=-1)
    least_B1 = jnp.take_along_axis(sorted_BV, last_B[:, None], axis=-1)
    return invert_cdf(jnp.where(weight_BV >= least_B1, weight_BV, 0.0), u_B)


def measure(contest: Contest, rounds: int) -> dict[str, Any]:
    """The first call of each contestant, then the rounds. Raises what a contestant raises."""
    first = {name: seconds(call) for name, call in contest.calls.items()}
    cpu_s: dict[str, list[float]] = {name: [] for name in first}

    def turn(name: str) -> None:
        cpu_s[name].append(contest.calls[name]()["cpu_s"])

    ms, errors = interleaved({name: partial(turn, name) for name in first}, warmups=0, reps=rounds)
    for error in errors.values():
        raise error
    results = {
        name: {"first_s": first[name], "s": [t / 1e3 for t in ms[name]], "cpu_s": cpu_s[name]}
        for name in first
    }
    return {"wanted": contest.wanted, "results": results, "notes": contest.notes}


def render(record: dict[str, Any]) -> str:
    """A table with one row per case and contestant."""
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
        ours = found["results"][OURS]
        for name, result in found["results"].items():
            s = np.median(result["s"])
            cpu_s = np.median(result["cpu_s"])
            rows.append(
                [
                    case,
                    name,
                    *cells(summary(result["s"]), 3),
                    f"{found['wanted'] / s:.0f}",
                    f"{cpu_s:.3f}",
                    f"{result['first_s']:.1f}",
                    f"{s / np.median(ours['s']):.2f}",
                    f"{cpu_s / np.median(ours['cpu_s']):.2f}",
                    f"{GOALS.get((case, name), '')}",
                ]
            )
    load = ", ".join(f"{load[0]:.1f}" for load in record["load"])
    return f"{record['date']}, load before and after each case {load}:\n\n{table(head, rows)}"


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", DEVICES)
    main()
