"""A whole training step with random weights, stage by stage: rollouts, reflections, update.

    measure(workload, config, model, rounds)   -> a record
    render(record)                             -> a table

The stages are those of train/step.py without its text. Prompts are random ids, and rows end at lengths that
are drawn (benchmarks/step_rows.py). The prompt of a reflection consists of the problem, the response and
another response. The update uses the rollouts' own tokens and log-probs.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.decode_shared import lengths as lognormal
from benchmarks.step_flops import ideal
from benchmarks.step_rows import Lengths, Preset, Sizes, draw, needs
from benchmarks.timing import seconds, table
from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.models.sharding import make_mesh
from rosd_jax.rollout.bandwidth import MemoryRoofline, measure_roofline
from rosd_jax.rollout.batching import Request
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.settings import Settings
from rosd_jax.train.compiling import Compiled
from rosd_jax.train.engines import limits_of
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import init_state, learner, learning_params, make_optimizer, make_update
from rosd_jax.types import HostRollout, Lesson, Params, TrainState

STAGES = ("rollouts", "reflections", "update")
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16 FLOP/s, by part of the name


@dataclass(frozen=True)
class Workload:
    """The rows of a step, and the lengths of its reflections."""

    sizes: Sizes
    preset: Preset = "span"
    answer: float = 200.0  # mean tokens of a reflection
    most_answer: int = 1024

    def lengths(self) -> Lengths:
        """The lengths of all rows, the same in every step."""
        return draw(self.sizes, self.preset, seed=0)


class Step:
    """The compiled stages of one step, and the trees that they work on."""

    def __init__(self, workload: Workload, config: Settings, model: Qwen3Config) -> None:
        self.workload = workload
        self.config = config
        self.model = model
        self.lengths = workload.lengths()
        self.mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        optimizer = make_optimizer(config)
        self.state, self.frozen, trees = random_trees(config, model, self.mesh, optimizer)
        sizes = workload.sizes
        rows = sizes.rows
        self.sample = Engine(
            model,
            self.mesh,
            limits_of(config, sizes.most, sizes.prompt_limits[1], rows=rows, prompts=sizes.prompts),
            Sampling(1.0),
        )
        longest = longest_question(sizes, self.lengths)
        self.reflect = Engine(
            model,
            self.mesh,
            limits_of(config, workload.most_answer, longest, rows=rows, prompts=rows),
            Sampling(0.0),
        )
        self.update = make_update(config, model, optimizer, self.mesh, trees.shardings)
        rng = np.random.default_rng(0)

        def ids(count: int) -> list[int]:
            return rng.integers(2, model.vocab_size, count).tolist()

        G = sizes.samples
        self.prompts = [prompt for n in self.lengths.prompt_B[::G] for prompt in [ids(n)] * G]
        self.teacher_prompts = [ids(n) for n in self.lengths.teacher_prompt_B]

    def rollouts(self) -> HostRollout:
        """One response per row."""
        student = learner(self.state.params, self.frozen, self.config)
        limits = self.lengths.response_B.tolist()
        rows = enumerate(zip(self.prompts, limits, strict=True))
        requests = [Request(ids, row, limit) for row, (ids, limit) in rows]
        return self.sample.generate(student, requests, jax.random.key(0))

    def reflections(self, rollout: HostRollout) -> HostRollout:
        """The frozen model's reflections on the taught rows."""
        rows = np.flatnonzero(self.lengths.active_B).tolist()
        texts = [tokens[:n].tolist() for tokens, n in zip(rollout.tokens_BR, rollout.length_B, strict=True)]
        frame = [1] * self.workload.sizes.frame
        limits = lognormal(len(rows), self.workload.answer, self.workload.most_answer, seed=1).tolist()
        requests = [
            Request(self.prompts[row] + frame + texts[row] + texts[row - 1], row, limit)
            for row, limit in zip(rows, limits, strict=True)
        ]
        return self.reflect.generate(self.frozen, requests, jax.random.key(1))

    def learn(self, rollout: HostRollout) -> float:
        """Makes one update and returns its loss."""
        first_B1 = self.lengths.first_B[:, None]
        last_B1 = self.lengths.last_B[:, None]
        at_R = np.arange(rollout.tokens_BR.shape[1])
        taught_BR = (first_B1 <= at_R) & (at_R < last_B1)
        lesson = Lesson(
            self.prompts,
            self.teacher_prompts,
            rollout.tokens_BR,
            taught_BR.astype(np.float32),
            rollout.logp_BR,
        )
        with jax.set_mesh(self.mesh):
            self.state, metrics, _ = self.update(self.state, self.frozen, lesson)
        jax.block_until_ready(self.state)
        return float(metrics["loss"])


def longest_question(sizes: Sizes, lengths: Lengths) -> int:
    """Tokens of the longest prompt of a reflection on a taught row."""
    other_B = np.roll(lengths.response_B, 1)
    asked_B = lengths.prompt_B + sizes.frame + lengths.response_B + other_B
    return int(asked_B[lengths.active_B > 0].max())


def random_trees(
    config: Settings, model: Qwen3Config, mesh: Mesh, optimizer: optax.GradientTransformation
) -> tuple[TrainState, Params, Trees]:
    """A train state and a frozen tree of random weights, created in their shardings."""
    trees = Trees(config, model, mesh, optimizer)

    def start(key: jax.Array) -> TrainState:
        return init_state(learning_params(config, model, key), optimizer)

    def base(key: jax.Array) -> Params:
        return jax.tree.map(lambda x: x.astype(model.dtype), init_params(model, key))

    state = jax.jit(start, out_shardings=trees.shardings)(jax.random.key(0))
    frozen = jax.jit(base, out_shardings=trees.frozen_shardings)(jax.random.key(0))
    return state, frozen, trees


def measure(workload: Workload, config: Settings, model: Qwen3Config, rounds: int = 1) -> dict[str, Any]:
    """Seconds of each stage in a first step, which compiles, and in `rounds` more, and rates from them."""
    step = Step(workload, config, model)
    device = jax.devices()[0]
    spent: dict[str, list[float]] = {stage: [] for stage in STAGES}
    compiled = Compiled()
    compiles = {}
    peaks = {}

    def timed(stage: str, call: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = call()
        spent[stage].append(time.perf_counter() - start)
        peaks[stage] = peak_bytes()
        compiles.setdefault(stage, compiled.since())
        return result

    def whole_step() -> tuple[HostRollout, HostRollout, float]:
        rollout = timed("rollouts", step.rollouts)
        answers = timed("reflections", partial(step.reflections, rollout))
        return rollout, answers, timed("update", partial(step.learn, rollout))

    steps = [whole_step() for _ in range(rounds + 1)]
    rollout, answers, loss = steps[-1]
    if not np.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    times = {stage: float(np.median(some[1:])) for stage, some in spent.items()}
    roofline = measure_roofline(model, step.mesh.shape["tensor"])
    whole = sum(times.values())
    found = {
        stage: {
            "s": times[stage],
            "share": times[stage] / whole,
            "all_s": spent[stage][1:],
            "first_s": spent[stage][0],
            "compiles": compiles[stage],
            "peak_bytes": peaks[stage],
        }
        for stage in STAGES
    }
    for stage, decoded in (("rollouts", rollout), ("reflections", answers)):
        found[stage] |= describe_decoding(decoded, roofline, times[stage])
    found["update"] |= describe_update(step, times["update"])
    return {"device": device.device_kind, "rows": workload.sizes.rows, "step_s": whole, "stages": found}


def describe_decoding(rollout: HostRollout, roofline: MemoryRoofline, took: float) -> dict[str, float]:
    """Tokens, and the roofline fraction: the memory-bound ideal divided by the measured time."""
    assert rollout.stats is not None
    tokens = int(np.sum(rollout.length_B))
    fraction = roofline.seconds(rollout.stats) / took
    return {"tokens": tokens, "tokens_s": tokens / took, "roofline": fraction}


def describe_update(step: Step, took: float) -> dict[str, float]:
    """Tokens that the student must read, and model FLOPs utilization."""
    tokens = int(needs(step.lengths)[0].sum())
    return {"tokens": tokens, "tokens_s": tokens / took} | mfu(step.model, step.lengths, took, step.mesh)


def mfu(model: Qwen3Config, lengths: Lengths, took: float, mesh: Mesh) -> dict[str, float]:
    """Model FLOPs utilization, over the measured rate of a large matmul and over the vendor's peak.

    The FLOPs are those of the ideal in benchmarks/step_flops.py, without recomputation.
    """
    rate = ideal(model, lengths).total(remat=False, lora=model.lora_scale > 0) / took
    found = {"flops_s": rate, "mfu_of_measured": rate / matmul_rate(model.dtype, mesh)}
    kind = mesh.devices.flat[0].device_kind
    stated = [peak for name, peak in PEAKS.items() if name in kind]
    return found | ({"mfu": rate / stated[0] / mesh.size} if stated else {})


def matmul_rate(dtype: str, mesh: Mesh, rounds: int = 5) -> float:
    """FLOP/s of a large matmul on all devices together; the best of `rounds`."""
    size = 8192 if mesh.devices.flat[0].platform == "gpu" else 1024
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    x = jax.device_put(jnp.ones((mesh.size * size, size), dtype), rows)
    y = jax.device_put(jnp.ones((size, size), dtype), NamedSharding(mesh, PartitionSpec()))
    product = jax.jit(lambda x, y: x @ y, out_shardings=rows)
    times = [seconds(lambda: jax.block_until_ready(product(x, y))) for _ in range(rounds + 1)]
    return 2 * mesh.size * size**3 / min(times[1:])


def peak_bytes() -> int:
    """Peak memory of the first device so far; of the process if the device does not report it."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def render(record: dict[str, Any]) -> str:
    """A table with one row per stage."""
    head = [
        "stage",
        "s",
        "share",
        "first s",
        "programs compiled, s",
        "tokens",
        "tokens/s",
        "roofline fraction",
        "MFU",
        "peak GB",
    ]
    rows = []
    for stage, found in record["stages"].items():
        used = found.get("mfu", found.get("mfu_of_measured"))
        rows.append(
            [
                stage,
                f"{found['s']:.2f}",
                f"{found['share']:.0%}",
                f"{found['first_s']:.1f}",
                "{} in {:.1f}".format(*found["compiles"]),
                f"{found['tokens']:,}",
                f"{found['tokens_s']:,.0f}",
                f"{found['roofline']:.0%}" if "roofline" in found else "",
                f"{used:.0%}" if used else "",
                f"{found['peak_bytes'] / 1e9:.2f}",
            ]
        )
    text = f"{record['device']}, {record['rows']} rows, a step of {record['step_s']:.2f} s"
    return f"{text}\n\n{table(head, rows)}"
