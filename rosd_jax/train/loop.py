"""The run: set up or resume, step, evaluate, checkpoint, export, report.

What a step writes, in this order, is what resuming relies on: rollouts/step_N.jsonl, the train line,
the evaluation lines (if due), the checkpoint (if due). A line later than the newest checkpoint is
dropped when the run is resumed, and written again.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rosd_jax.config import Config, UserError
from rosd_jax.data.pipeline import batch_at
from rosd_jax.evals.evaluate import evaluate_set, write_generations
from rosd_jax.evals.report import write_report
from rosd_jax.models.qwen3 import init_params
from rosd_jax.models.sharding import row_devices
from rosd_jax.models.weights import save_pretrained, weights_fingerprint
from rosd_jax.rewards import Grader
from rosd_jax.rollout.floor import position_bytes
from rosd_jax.rollout.rows import decode_rows
from rosd_jax.train import checkpoint, workdir
from rosd_jax.train.metrics import Console, MetricsLog
from rosd_jax.train.setup import Inputs, build, read_inputs
from rosd_jax.train.step import Tools, train_step
from rosd_jax.types import Params, Reflected, TrainState


def train(config: Config, directory: Path) -> None:
    """Trains for config.steps steps in `directory`, or goes on where a run there stopped."""
    inputs = read_inputs(config)
    workdir.prepare(directory, config)
    with Grader(config.rewards) as grader:
        tools, frozen_params, like, fresh = build(config, inputs, grader)
        manager = checkpoint.open_manager(directory, config.checkpoint.keep)
        check_disk(directory, manager, like, config)
        state, start = begin(config, manager, like, fresh)
        meta = checkpoint.run_meta(config, weights_fingerprint(config.model.path))
        log = MetricsLog.resume(directory / "metrics.jsonl", keeps(config, start))
        workdir.drop_rollouts_after(directory, start)
        console = Console(config.steps, start)
        console.say(headline(inputs, config, directory, start))
        with jax.set_mesh(tools.mesh):  # the model lays its activations along it
            if start == 0:
                evaluate(tools, inputs, state.params, 0, directory, log, console)
            for step in range(start, config.steps):
                state = one_step(tools, inputs, state, frozen_params, step, directory, log, console)
                if is_due(step + 1, config.eval.every, config.steps):
                    evaluate(tools, inputs, state.params, step + 1, directory, log, console)
                if is_due(step + 1, config.checkpoint.every, config.steps):
                    console.stage("checkpoint")
                    checkpoint.save(manager, state, step + 1, meta)
        export(config, inputs, state.params, directory)
        manager.close()
        console.close()
    print(write_report(directory, config.data.train))


def evaluate_only(config: Config, directory: Path) -> None:
    """Evaluates the newest checkpoint in `directory`, or the model as it came where there is none.

    Lines of an earlier evaluation of that step give way to the new ones.
    """
    inputs = read_inputs(config)
    workdir.prepare(directory, config)
    with Grader(config.rewards) as grader:
        tools, _, like, fresh = build(config, inputs, grader)
        manager = checkpoint.open_manager(directory, config.checkpoint.keep)
        state, at = begin(config, manager, like, fresh)
        console = Console(config.steps, at)
        stays = lambda step, split: step < at or (step == at and split == "train")
        log = MetricsLog.resume(directory / "metrics.jsonl", stays)
        with jax.set_mesh(tools.mesh):
            evaluate(tools, inputs, state.params, at, directory, log, console)
        console.close()
    print(write_report(directory, config.data.train))


def keeps(config: Config, start: int) -> Callable[[int, str], bool]:
    """Which lines of metrics.jsonl a run that resumes after step `start` keeps.

    An evaluation made only because an earlier run ended there is dropped when this one goes further.
    """

    def keep(step: int, split: str) -> bool:
        due = step == 0 or is_due(step, config.eval.every, config.steps)
        return start > 0 and step <= start and (split == "train" or due)

    return keep


def plan(config: Config, directory: Path) -> None:
    """Prints what a run would do and hold in memory; writes nothing and touches no device."""
    inputs = read_inputs(config)
    shapes = jax.eval_shape(lambda: init_params(inputs.model, jax.random.key(0)))
    count = sum(x.size for x in jax.tree.leaves(shapes))
    rows = config.batch.prompts * config.batch.samples
    frozen = count * (2 if config.model.dtype == "bfloat16" else 4)
    cache = (config.rollout.cache_tokens + config.rollout.prompt_tokens) * position_bytes(inputs.model)
    print(f"{headline(inputs, config, directory, 0)}\n"
          f"parameters        {count / 1e6:,.1f} M; master weights and AdamW {count * 12 / 1e9:.2f} GB, "
          f"frozen tree {frozen / 1e9:.2f} GB, over all devices\n"
          f"decoding          weights {frozen / 1e9:.2f} GB and up to {cache / 1e9:.2f} GB of keys and "
          f"values on each row device, shared by its tensor devices\n"
          f"a step            {config.batch.prompts} prompts x {config.batch.samples} samples = {rows} "
          f"rollouts of up to {config.rollout.max_new_tokens} tokens\n"
          f"evaluation        {', '.join(f'{k} {len(v)}' for k, v in inputs.evals.items()) or 'none'}; "
          f"{config.eval.samples} samples an item\n"
          f"left out          {sum(map(len, inputs.overlong.values()))} prompts above "
          f"data.max_prompt_tokens")  # fmt: skip


def headline(inputs: Inputs, config: Config, directory: Path, start: int) -> str:
    """What runs, where, and from which step."""
    begun = f"resumes after step {start}" if start else f"{config.steps} steps"
    return f"{config.name}: {len(inputs.train)} problems of {config.data.train}, {begun}, in {directory}"


def one_step(
    tools: Tools,
    inputs: Inputs,
    state: TrainState,
    frozen_params: Params,
    step: int,
    directory: Path,
    log: MetricsLog,
    console: Console,
) -> TrainState:
    """Step number `step` (from 0), with its lines written under number step + 1."""
    began, timeouts = time.perf_counter(), tools.grader.timeouts
    prompts = batch_at(inputs.train, step, tools.config.seed, tools.config.batch.prompts)
    state, numbers, reflected, weight_BR = train_step(
        tools, state, frozen_params, prompts, step, console.stage
    )
    workdir.write_rollouts(directory, step + 1, rollout_rows(reflected, weight_BR))
    numbers["grader_timeouts"] = tools.grader.timeouts - timeouts
    numbers["seconds"] = time.perf_counter() - began
    log.write(step + 1, "train", numbers)
    console.line(step + 1, numbers)
    return state


def rollout_rows(reflected: Reflected, weight_BR: np.ndarray) -> list[dict]:
    """One readable record a rollout: what was said, what it earned, and where the loss lay."""
    graded = reflected.graded
    G = len(graded.texts) // len(graded.prompts.problems)
    tokens_BR, length_B = graded.rollout.tokens_BR, graded.rollout.length_B
    rows = []
    for row, (text, r) in enumerate(zip(graded.texts, reflected.reflections, strict=True)):
        problem = graded.prompts.problems[row // G]
        rows.append(
            dict(
                uid=problem.uid,
                sample=row % G,
                prompt=list(problem.messages),
                answer=problem.answer,
                response=text,
                token_ids=np.asarray(tokens_BR[row, : length_B[row]]).tolist(),
                reward=float(graded.rewards_B[row]),
                reflection=r.raw,
                idea=r.idea,
                quote=r.quote,
                ambiguous=r.ambiguous,
                error_span_chars=r.char_span,
                error_span_tokens=r.token_span,
                active_tokens=int(weight_BR[row].sum()),
                note=r.note,
            )
        )
    return rows


def evaluate(
    tools: Tools,
    inputs: Inputs,
    params: Params,
    step: int,
    directory: Path,
    log: MetricsLog,
    console: Console,
) -> None:
    """Every set by itself: one line in the metrics, and the raw generations in a file."""
    c = tools.config.eval
    for name, encoded in inputs.evals.items():
        console.stage(f"eval {name}")
        key = jax.random.fold_in(jax.random.fold_in(tools.key, 2), step)
        key = jax.random.fold_in(key, zlib.crc32(name.encode()))

        def sample(ids, uid_B, limit_B, key=key, encoded=encoded):
            return decode_rows(
                tools.evaluate, params, ids, uid_B, limit_B, key,
                rows=len(ids), shards=row_devices(tools.mesh), prompts=len(encoded),
                longest=tools.config.data.max_prompt_tokens, room=tools.config.rollout.prompt_tokens,
            )  # fmt: skip

        numbers, generations = evaluate_set(
            name,
            [problem for problem, _ in encoded],
            [ids for _, ids in encoded],
            sample,
            tools.grader.grade_all,
            tools.tokenizer.decode,
            samples=c.samples,
            rows=c.batch,
        )
        write_generations(directory, step, name, generations)
        log.write(step, f"eval/{name}", numbers)
        console.say(
            f"eval {name}: avg@{c.samples} {numbers['avg']:.3f} +- {1.96 * numbers['avg_se']:.3f}"
            f"  pass {numbers['pass']:.3f}  maj {numbers['maj']:.3f}"
        )


def is_due(step: int, every: int, last: int) -> bool:
    """Every so many steps (0: never), and at the last one."""
    return step == last or (every > 0 and step % every == 0)


def begin(
    config: Config, manager: Any, like: TrainState, fresh: Callable[[], TrainState]
) -> tuple[TrainState, int]:
    """The newest checkpoint's state and step, or the first state and 0.

    Raises UserError when the checkpoint is past config.steps, or was trained from other weights: the
    frozen tree is read from model.path again, and would be another teacher.
    """
    restored = checkpoint.restore_latest(manager, like)
    if restored is None:
        return fresh(), 0
    state, kept = restored
    if kept["step"] > config.steps:
        raise UserError(
            f"steps is {config.steps}; this run has made {kept['step']} already, so ask for at least that "
            "or use another --workdir"
        )
    if kept["weights"] != weights_fingerprint(config.model.path):
        raise UserError(
            f"model.path is {config.model.path!r}, whose weights changed since this run began; bring the "
            "old ones back or use another --workdir"
        )
    return state, int(kept["step"])


def check_disk(directory: Path, manager: Any, like: TrainState, config: Config) -> None:
    """Raises UserError when the checkpoints still to be written and the export would not fit.

    A new checkpoint is written before the oldest goes, so there is one more than checkpoint.keep.
    """
    there = manager.all_steps()
    more = 0 if config.steps in there else max(1, config.checkpoint.keep + 1 - len(there))
    needed = more * checkpoint.state_bytes(like) + checkpoint.state_bytes(like.params)
    checkpoint.check_space(directory, needed, f"{more} checkpoints and the exported model")


def export(config: Config, inputs: Inputs, params: Params, directory: Path) -> None:
    """The trained model as a Hugging Face directory."""
    path = directory / "export"
    save_pretrained(path, params, inputs.model, source=Path(config.model.path), dtype=config.model.dtype)
    inputs.tokenizer.save(path)
