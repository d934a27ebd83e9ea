"""The run: set up or resume, step, evaluate, checkpoint, export, report.

What a step writes, in this order, is what resuming relies on: rollouts/step_N.jsonl, the train line,
the validation and evaluation lines (if due), the checkpoint (if due, or if validation finds this step the
best). A line later than the newest checkpoint is dropped when the run is resumed, and written again; no
other one is. history.py says when a run may resume. A run that a signal stops between two calls saves the
last step whose lines are all written.
"""

from __future__ import annotations

import shutil
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from rosd_jax.data.pipeline import batch_at
from rosd_jax.evals.evaluate import evaluate_set, write_generations
from rosd_jax.evals.health import new_findings
from rosd_jax.evals.outcome import best_step, read_metrics
from rosd_jax.evals.report import write_report
from rosd_jax.fields import replace
from rosd_jax.models.lora import merge
from rosd_jax.models.peft_files import save_adapters
from rosd_jax.models.weights import check_weights, save_pretrained
from rosd_jax.rewards import Grader
from rosd_jax.rollout.batching import Request
from rosd_jax.settings import Settings
from rosd_jax.train import checkpoint, history, stopping, workdir
from rosd_jax.train.build import build
from rosd_jax.train.compiling import Compiled
from rosd_jax.train.inputs import Inputs, Split, headline, read_inputs, trained_on
from rosd_jax.train.metrics import Console, MetricsLog
from rosd_jax.train.step import Runtime, train_step
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import learner
from rosd_jax.types import HostRollout, Params, Reflected, Stream, TrainState


@dataclass(frozen=True)
class Run:
    """What all parts of a run need and none changes."""

    runtime: Runtime
    inputs: Inputs
    directory: Path
    log: MetricsLog
    console: Console
    manager: Any  # Orbax's, of the checkpoints
    compiled: Compiled
    meta: dict[str, Any]  # what a checkpoint says of the run

    @property
    def config(self) -> Settings:
        return self.runtime.config


def train(config: Settings, directory: Path) -> None:
    """Trains for config.steps steps in `directory`, or goes on where a run there stopped."""
    inputs = read_inputs(config)
    check_weights(config.model.path, inputs.model)
    origins = history.origins(config, inputs)
    compiled = Compiled()
    with workdir.claim(directory, config), Grader(config.rewards, config.reward_timeout) as grader:
        history.require_checkpoint(directory, config)
        runtime, trees = build(config, inputs, grader)
        manager = checkpoint.open_manager(directory)
        check_disk(directory, manager, trees, config)
        state, start = begin(config, manager, trees, origins)
        frozen_params = trees.frozen(None if start else state)
        console = Console(config.steps, start)
        log = resume(directory, config, inputs, start, console)
        meta = checkpoint.run_meta(config, origins)
        run = Run(runtime, inputs, directory, log, console, manager, compiled, meta)
        with jax.set_mesh(runtime.mesh), stopping.deferred(directory):  # the model lays activations along it
            state = take_steps(run, state, frozen_params, start)
            stopping.check()
            export(run, learner(state.params, frozen_params, config), directory / "export", config.steps)
            del state  # the best step's parameters take its place
            export_best(run, trees.like, frozen_params)
            manager.close()
            console.close()
            print(write_report(directory, trained_on(config)))


def resume(directory: Path, config: Settings, inputs: Inputs, start: int, console: Console) -> MetricsLog:
    """The log of a run that goes on after step `start`; what later steps left without a checkpoint goes.

    Raises UserError, and changes nothing, where the run cannot go on as config asks.
    """
    history.require_steps(directory, config, start)
    if start:  # else all is made again
        history.require_same_evals(directory, inputs, start)
    last = history.last_step(directory)
    workdir.record(directory, config)
    log = MetricsLog.resume(directory / "metrics.jsonl", lambda step, split: step <= start)
    workdir.drop_rollouts_after(directory, start)
    console.say(headline(inputs, config, directory, start))
    if last > start:
        console.say(f"steps after {start}, up to {last}, have no checkpoint and are dropped")
    return log


def take_steps(run: Run, state: TrainState, frozen_params: Params, start: int) -> TrainState:
    """The state after config.steps steps."""
    config = run.config
    done = start
    try:
        score_if_due(run, state.params, frozen_params, start)
        for step in range(start, config.steps):
            state = one_step(run, state, frozen_params, step)
            done = step + 1
            score_if_due(run, state.params, frozen_params, done)
            best = best_step(read_metrics(run.log.path))
            if is_due(done, config.checkpoint.every, config.steps) or done == best:
                run.console.stage("checkpoint")
                checkpoint.save(run.manager, state, done, run.meta)
                checkpoint.prune(run.manager, config.checkpoint.keep, best)
    except stopping.Stopped:  # before the next step's update, or in the scoring of this one
        save_unsaved(run, state, done)
        raise
    return state


def score_if_due(run: Run, params: Params, frozen_params: Params, step: int) -> None:
    """What is to be scored at a step and is not yet: all of it, or what an earlier start left undone."""
    config = run.config
    every_of: dict[Split, int] = {"validation": config.validation.every, "eval": config.eval.every}
    for split, every in every_of.items():
        if step == 0 or is_due(step, every, config.steps):
            model = learner(params, frozen_params, config)  # not before: it may be brought from the host
            score(run, split, unscored(run, split, step), model, step)


def one_step(run: Run, state: TrainState, frozen_params: Params, step: int) -> TrainState:
    """Step number `step` (from 0), with its lines written under number step + 1."""
    began, timeouts = time.perf_counter(), run.runtime.grader.timeouts
    prompts = batch_at(run.inputs.train, step, run.config.seed, run.config.batch.prompts)
    state, numbers, reflected, weight_BR = train_step(
        run.runtime, state, frozen_params, prompts, step, run.console.stage
    )
    workdir.write_rollouts(run.directory, step + 1, rollout_rows(reflected, weight_BR))
    numbers["grader_timeouts"] = run.runtime.grader.timeouts - timeouts
    numbers["seconds"] = time.perf_counter() - began
    numbers["programs_compiled"], numbers["seconds_compiling"] = run.compiled.since()
    run.log.write(step + 1, "train", numbers)
    run.console.line(step + 1, numbers)
    train_rows = [row for row in read_metrics(run.log.path) if row["split"] == "train"]
    for sentence in new_findings(train_rows):
        run.console.say(f"warning: {sentence}")
    return state


def rollout_rows(reflected: Reflected, weight_BR: np.ndarray) -> list[dict]:
    """One readable record a rollout: what was said, what it earned, and where the loss lay."""
    graded = reflected.graded
    tokens_BR, length_B = graded.rollout.tokens_BR, graded.rollout.length_B
    rows = []
    for row, (text, r) in enumerate(zip(graded.texts, reflected.reflections, strict=True)):
        problem = graded.problem(row)
        rows.append(
            dict(
                uid=problem.uid,
                sample=row % graded.group_size,
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


def score(run: Run, split: Split, names: Iterable[str], params: Params, step: int) -> None:
    """Every set named by itself: one line in the metrics, and the raw generations in a file."""
    c = run.config.eval
    for name in names:
        stopping.check()
        encoded = run.inputs.sets(split)[name]
        run.console.stage(f"{split} {name}")
        key = jax.random.fold_in(Stream.EVAL.key(run.runtime.key), step)
        key = jax.random.fold_in(key, zlib.crc32(f"{split}/{name}".encode()))

        def sample(requests: Sequence[Request], key: jax.Array = key) -> HostRollout:
            rollout = run.runtime.engines.evaluation.generate(params, requests, key)
            stopping.check()  # before the grading
            return rollout

        numbers, generations = evaluate_set(
            name,
            [problem for problem, _ in encoded],
            [ids for _, ids in encoded],
            sample,
            partial(run.runtime.grader.grade_all, thinking_open=run.runtime.student_thinking_open),
            run.runtime.tokenizer.decode,
            votes=run.runtime.grader.votes,
            samples=c.samples,
        )
        write_generations(run.directory, step, name, generations, split)
        conditions = history.conditions(run.config, run.inputs, split, name)
        run.log.replace(step, f"{split}/{name}", numbers | conditions)
        run.console.say(
            f"{split} {name}: avg@{c.samples} {numbers['avg']:.3f} +- {1.96 * numbers['avg_se']:.3f}"
            f"  pass {numbers['pass']:.3f}  maj {numbers['maj']:.3f}"
        )


def unscored(run: Run, split: Split, step: int) -> list[str]:
    """The sets that are to be scored at a step that an earlier start may have scored.

    Before the first step that is all of them: other weights may have made what is there.
    """
    if step == 0:
        return list(run.inputs.sets(split))
    return history.unevaluated(run.directory, run.config, run.inputs, split, step)


def save_unsaved(run: Run, state: TrainState, step: int) -> None:
    """Saves the state after step `step` before the run ends, unless no step was made or it is saved."""
    if step and run.manager.latest_step() != step:
        stopping.tell(f"saving step {step}")
        checkpoint.save(run.manager, state, step, run.meta)


def export_best(run: Run, like: TrainState, frozen_params: Params) -> None:
    """The model of the step that validation chose, scored and exported, unless it is the first or the last.

    Only steps whose checkpoint is there can be chosen.
    """
    saved = {0, *run.manager.all_steps()}
    best = best_step([row for row in read_metrics(run.log.path) if row["step"] in saved])
    path = run.directory / "export_best"
    if best in (None, 0, run.config.steps):
        shutil.rmtree(path, ignore_errors=True)  # of a shorter run in this directory
        return
    params = checkpoint.restore_params(run.manager, best, like.params)
    params = learner(params, frozen_params, run.config)
    score(run, "eval", unscored(run, "eval", best), params, best)
    export(run, params, path, best)


def is_due(step: int, every: int, last: int) -> bool:
    """Every so many steps (0: never), and at the last one."""
    return step == last or (every > 0 and step % every == 0)


def evaluate_only(config: Settings, directory: Path) -> None:
    """Evaluates the newest checkpoint in `directory`, or the model as it came where nothing was trained.

    Where the checkpoints of a run were removed, its exported model is evaluated. Lines of an earlier
    evaluation of that step are replaced by the new ones; all else stays.
    """
    exported = history.export_to_evaluate(directory, config)
    if exported:
        config = replace(config, "model.path", str(directory / "export"))
    inputs = read_inputs(config)
    check_weights(config.model.path, inputs.model)
    with workdir.claim(directory, config), Grader(config.rewards, config.reward_timeout) as grader:
        runtime, trees = build(config, inputs, grader)
        manager = checkpoint.open_manager(directory)
        if exported:
            state, at = trees.first(), history.exported_step(directory) or 0
        else:
            origins = history.origins(config, inputs)
            asked = {name: origins[name] for name in ("model", "tokenizer")}  # what an evaluation depends on
            state, at = begin(config, manager, trees, asked)
        params = state.params
        if config.model.lora.rank:
            params = learner(params, trees.frozen(None), config)
        console = Console(config.steps, at)
        what = f"the checkpoint of step {at}" if at else f"the model of {config.model.path} as it came"
        if exported:
            what = f"{config.model.path}, the model of step {at}, since the checkpoints are gone"
        console.say(f"{config.name}: evaluates {what}, in {directory}")
        log = MetricsLog.resume(directory / "metrics.jsonl", lambda step, split: True)
        run = Run(runtime, inputs, directory, log, console, manager, Compiled(), {})
        with jax.set_mesh(runtime.mesh), stopping.deferred(directory):
            score(run, "eval", inputs.evals, params, at)
            console.close()
            print(write_report(directory, trained_on(config)))


def begin(config: Settings, manager: Any, trees: Trees, origins: dict[str, Any]) -> tuple[TrainState, int]:
    """The newest checkpoint's state and step, or the first state and 0.

    Raises UserError when the checkpoint was made from anything else than `origins`.
    """
    restored = checkpoint.restore_latest(manager, trees.like)
    if restored is None:
        return trees.first(), 0
    state, kept = restored
    history.require_same_origins(kept, origins, config)
    return state, int(kept["step"])


def check_disk(directory: Path, manager: Any, trees: Trees, config: Settings) -> None:
    """Raises UserError when the checkpoints still to be written and the export would not fit.

    A new checkpoint is written before the oldest goes, so there is one more than checkpoint.keep, and
    another where validation keeps the best one.
    """
    there = manager.all_steps()
    most = config.checkpoint.keep + 1 + bool(config.validation.sets)
    more = 0 if config.steps in there else max(1, most - len(there))
    needed = more * checkpoint.state_bytes(trees.like) + checkpoint.state_bytes(trees.base)
    checkpoint.check_space(directory, needed, f"{more} checkpoints and the exported model")


def export(run: Run, params: Params, path: Path, step: int) -> None:
    """The model of a step as a Hugging Face directory, with a note of the step.

    Adapters are merged into it, and lie by themselves in its folder adapter/, as PEFT loads them.
    """
    source, lora = Path(run.config.model.path), run.config.model.lora
    if lora.rank:
        save_adapters(
            path / "adapter",
            params,
            rank=lora.rank,
            alpha=lora.alpha,
            targets=tuple(lora.targets),
            base=str(source),
        )
        params = jax.jit(partial(merge, config=run.inputs.model))(params)
    save_pretrained(path, params, run.inputs.model, source=source, dtype=run.config.model.dtype)
    run.inputs.tokenizer.save(path)
    workdir.write_atomic(path / history.EXPORTED, [f"{step}\n"])
