"""The run: set up or resume, step, evaluate, checkpoint, export, report.

A step writes, in this order: rollouts/step_N.jsonl and the same for the report page, its train line, its
validation and evaluation lines if due, a checkpoint if due or if validation finds this step the best so far,
and the report page. Resuming relies on this order: a step that has a checkpoint has all its lines. A resumed
run drops the lines of later steps and writes them again. history.py decides whether a run may resume. A
signal stops the run between two device calls, and the last step whose lines are all written is then saved.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import shutil
import signal
import textwrap
import time
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import logging

import rosd_jax
from rosd_jax.data.pipeline import Encoded, batch_at
from rosd_jax.errors import UserError
from rosd_jax.evals import page
from rosd_jax.evals.evaluate import requests_of, score_set
from rosd_jax.evals.generations import write_generations
from rosd_jax.evals.health import new_findings
from rosd_jax.evals.outcome import best_step, read_metrics
from rosd_jax.evals.page import write_page, write_step_file
from rosd_jax.evals.report import Z, write_report
from rosd_jax.evals.report import show as shown
from rosd_jax.fields import flat, replace
from rosd_jax.hosts import Hosts
from rosd_jax.models.weights import check_weights
from rosd_jax.rewards import Grader
from rosd_jax.settings import Settings
from rosd_jax.step_files import drop_after
from rosd_jax.train import checkpoint, history, stopping, workdir
from rosd_jax.train.build import build
from rosd_jax.train.compiling import Compiled
from rosd_jax.train.console import STEP, Console
from rosd_jax.train.export import export
from rosd_jax.train.guard import require_health
from rosd_jax.train.inputs import Inputs, ScoredSplit, headline, read_inputs, trained_on
from rosd_jax.train.metrics import COLUMNS, MetricsLog, step_lines
from rosd_jax.train.numbers import Numbers
from rosd_jax.train.run import Run
from rosd_jax.train.schedule import is_due, scored_every, work_after
from rosd_jax.train.step import Runtime, read_and_grade, train_step
from rosd_jax.train.trackers import Trackers, require_trackers
from rosd_jax.train.trees import Trees
from rosd_jax.train.unfinished import Unfinished
from rosd_jax.train.update import learner
from rosd_jax.types import HostRollout, Params, Stream, TrainState


def train(config: Settings, directory: Path, hosts: Hosts, console: Console, *, profile: bool) -> None:
    """Trains for config.steps steps in `directory`, or resumes the run there; then exports and reports.

    profile: traces one step, see `traced`.

    Raises UserError for a mistake of the user's, Stopped after a signal.
    """
    # Mistakes should show early, so what needs no device is checked first. `resume` drops lines of earlier
    # starts, so it comes after everything that can fail.
    require_trackers(config.trackers)
    console.stage("reading the model's files and the data")
    inputs = read_inputs(config)
    check_weights(config.model.path, inputs.model)
    origins = history.origins(config, inputs)
    require_same_inputs(hosts, config, inputs, origins)
    meta = checkpoint.run_meta(config, origins) | {"reward": inputs.reward_crc32}
    unfinished = Unfinished(directory, hosts, json.dumps(meta, sort_keys=True))
    compiled = Compiled(console.compiling)  # counts from here, so before anything is compiled
    with (
        claim(hosts, directory, config, to_train=True),
        Grader(config.rewards, config.reward_timeout, console.progress) as grader,
        track(config, directory, hosts) as trackers,
    ):
        runtime, trees = build(config, inputs, grader, unfinished, console)
        manager = checkpoint.open_manager(directory)
        # Before minutes are spent on reading weights.
        hosts.once("disk", lambda: check_disk(directory, manager, trees, config))
        restored = begin(hosts, manager, trees, origins, console)
        state = restored.state
        start = restored.step
        if hosts.first and restored.meta.get("reward", inputs.reward_crc32) != inputs.reward_crc32:
            logging.warning(
                "the file of rewards=%s has changed since step %d; rewards before and after may mean "
                "different things",
                config.rewards,
                start,
            )
        console.stage("preparing the frozen weights")
        frozen_params = trees.frozen(None if start else state)
        console.begin(start, config.steps)
        log = hosts.once("resume", lambda: resume(directory, config, inputs, start, console))
        checkpoint.set_aside(manager, restored.damaged, hosts)
        del restored  # it refers to the state, whose memory is needed later
        if hosts.first:
            unfinished.drop_unless(start)
        run = Run(runtime, inputs, directory, log, trackers, console, manager, compiled, meta, profile)
        # The model reads the mesh from the context, to shard its activations.
        with jax.set_mesh(runtime.mesh), stopping.deferred(directory, agreed(hosts)):
            state = take_steps(run, state, frozen_params, start)
            stopping.check("export")
            console.stage("export")
            export(run, learner(state.params, frozen_params, config), directory / "export", config.steps)
            del state  # frees device memory for the parameters of the best step
            export_best(run, trees.like, frozen_params)
            manager.close()
            if hosts.first:
                unfinished.drop()
                report(run)


def report(run: Run) -> None:
    """Writes the reports and prints what they say."""
    run.console.stage("report")
    show(run)
    run.console.say(write_report(run.directory, trained_on(run.config)))


def show(run: Run) -> None:
    """Updates the report page and the trackers. The first process does so; the others go on."""
    if run.hosts.first:
        write_page(run.directory, trained_on(run.config))
        run.trackers.send()


def track(config: Settings, directory: Path, hosts: Hosts) -> contextlib.closing[Trackers]:
    """The trackers of a run, until the end of a block. Only the first process sends anything."""
    return contextlib.closing(Trackers(config.trackers if hosts.first else (), directory, config))


def require_same_inputs(hosts: Hosts, config: Settings, inputs: Inputs, origins: dict[str, Any]) -> None:
    """Raises UserError if the hosts got different commands, read different files or run different code."""
    versions = {"Python": platform.python_version(), "JAX": jax.__version__, "rosd_jax": rosd_jax.__version__}
    hosts.require_same("the installation", versions)
    hosts.require_same("the config", dict(flat(dataclasses.asdict(config))))
    hosts.require_same("the model directory or data", origins | inputs.found)
    hosts.require_same("the reward function", {"the CRC-32 of its file": inputs.reward_crc32})


@contextlib.contextmanager
def claim(hosts: Hosts, directory: Path, config: Settings, *, to_train: bool) -> Iterator[None]:
    """`workdir.claim` by the first process, for all. Raises UserError also if training would start over."""
    with workdir.claim(directory, config) if hosts.first else contextlib.nullcontext():
        workdir.require_shared(directory, hosts)
        if to_train:
            history.require_checkpoint(directory, config)
        yield


def agreed(hosts: Hosts) -> stopping.Agree:
    """How the processes agree to stop: all do so if one of them was asked to."""

    def agree(what: str, asked: signal.Signals | None) -> signal.Signals | None:
        return next((some for some in hosts.exchange(f"check: {what}", asked) if some is not None), None)

    return agree


def resume(directory: Path, config: Settings, inputs: Inputs, start: int, console: Console) -> MetricsLog:
    """The log of a run that continues after step `start`. What later steps wrote is dropped.

    Raises UserError, before it changes anything, if the run cannot continue with this config.
    """
    history.require_steps(directory, config, start)
    if start:  # otherwise every evaluation is made again
        history.require_same_evals(directory, inputs, start)
    last = history.last_step(directory)
    workdir.record(directory, config)
    log = MetricsLog.resume(directory / "metrics.jsonl", lambda step, split: step <= start)
    drop_after(directory / "rollouts", ".jsonl", start)
    drop_after(directory / page.FOLDER, page.SUFFIX, start)
    console.say(headline(inputs, config, directory, start))
    if last > start:
        console.say(f"steps after {start}, up to {last}, have no checkpoint and are dropped")
    return log


def take_steps(run: Run, state: TrainState, frozen_params: Params, start: int) -> TrainState:
    """The state after config.steps steps. Raises Stopped after saving the last complete step."""
    config = run.config
    done = start
    best = None
    saving = None
    try:
        score_if_due(run, state.params, frozen_params, start)
        best = best_so_far(run)
        run.console.expect(work_after(config, run.inputs, start))
        show(run)
        for step in range(start, config.steps):
            require_health(run, done, best)
            run.console.at(step + 1)
            with run.console.work(STEP), traced(run, step, start):
                state = one_step(run, state, frozen_params, step)
            done = step + 1
            if score_if_due(run, state.params, frozen_params, done):
                best = best_so_far(run)
            # A whole step was made meanwhile, so this hardly waits.
            saving = finish_saving(run, saving, best)
            if is_due(done, config.checkpoint.every, config.steps) or done == best:
                run.console.stage("checkpoint")
                with run.console.work("checkpoint"):
                    saving = checkpoint.save(run.manager, state, done, run.meta)
            show(run)
        run.console.stage("checkpoint")
        finish_saving(run, saving, best)
    except stopping.Stopped:  # raised before the update of step done + 1, or after that of step `done`
        finish_saving(run, saving, best)
        save_unsaved(run, state, done)
        show(run)
        raise
    return state


def traced(run: Run, step: int, start: int) -> contextlib.AbstractContextManager[None]:
    """Writes what happens in the block to profile/, if it is the step to trace.

    That is the second step of this start, in which little is compiled, or the only one.
    """
    if not run.profile or step != min(start + 1, run.config.steps - 1):
        return contextlib.nullcontext()
    return jax.profiler.trace(run.directory / "profile", create_perfetto_trace=True)


def best_so_far(run: Run) -> int | None:
    """The best step by validation until now."""
    return run.hosts.once("best step", lambda: best_step(read_metrics(run.log.path)))


def finish_saving(run: Run, saving: checkpoint.Saving | None, best: int | None) -> None:
    """Waits for the checkpoint that is being written, if there is one, and removes those it replaces."""
    if saving:
        checkpoint.finish(run.manager, saving)
        checkpoint.prune(run.manager, run.config.checkpoint.keep, best)


def score_if_due(run: Run, params: Params, frozen_params: Params, step: int) -> bool:
    """Scores the validation and evaluation sets that are due at a step and have not been scored.

    Returns whether there were any.
    """
    config = run.config
    scored = False
    for split, every in scored_every(config).items():
        due = step == 0 or is_due(step, every, config.steps)
        names = run.hosts.once("unscored", partial(unscored, run, split, step)) if due else []
        if names:
            model = learner(params, frozen_params, config)  # only here, since it may copy from the host
            score(run, split, names, model, step)
            scored = True
    return scored


def one_step(run: Run, state: TrainState, frozen_params: Params, step: int) -> TrainState:
    """Makes step number `step` (from 0) and writes its lines, under the number step + 1."""
    began = time.perf_counter()
    timeouts = run.runtime.grader.timeouts
    prompts = batch_at(run.inputs.train, step, run.config.seed, run.config.batch.prompts)
    state, numbers, reflected, lesson, divergence_BR = train_step(
        run.runtime, state, frozen_params, prompts, step, run.console.stage
    )
    timeouts = run.runtime.grader.timeouts - timeouts
    numbers["grader_timeouts"] = sum(run.hosts.exchange("timeouts", timeouts))
    numbers["seconds"] = time.perf_counter() - began
    numbers["programs_compiled"], numbers["seconds_compiling"] = run.compiled.since()
    if run.hosts.first:
        write_step(
            run,
            step + 1,
            numbers,
            workdir.rollout_rows(reflected, lesson, divergence_BR, run.runtime.tokenizer),
        )
    return state


def write_step(run: Run, step: int, numbers: Numbers, rollouts: list[dict]) -> None:
    """Writes what a step leaves."""
    workdir.write_rollouts(run.directory, step, rollouts)
    write_step_file(run.directory, step, rollouts)
    run.log.write(step, "train", numbers)
    for line in step_lines(step, run.config.steps, numbers):
        run.console.say(line)
    train_rows = [row for row in read_metrics(run.log.path) if row["split"] == "train"]
    for sentence in new_findings(train_rows):
        run.console.say(textwrap.fill(f"warning: {sentence}", COLUMNS, subsequent_indent="  "))


def score(run: Run, split: ScoredSplit, names: Sequence[str], params: Params, step: int) -> None:
    """Evaluates each named set: one line in metrics.jsonl, and its generations in a file."""
    c = run.config.eval
    for number, name in enumerate(names, start=1):
        stopping.check(f"{split} {name}")
        label = f"{split} {name}" + (f" (set {number}/{len(names)})" if len(names) > 1 else "")
        run.console.stage(label)
        # The key depends on step and set, so the answers do not depend on which other sets are scored.
        key = jax.random.fold_in(Stream.EVAL.key(run.runtime.key), step)
        key = jax.random.fold_in(key, zlib.crc32(f"{split}/{name}".encode()))
        encoded = run.inputs.sets(split)[name]
        with run.console.work(f"{split} {name}"):
            rollout = sample_set(run.runtime, params, name, encoded, key)
            stopping.check("before grading")  # so that a signal does not wait for it
            run.console.stage(f"{label}: grading")
            numbers, generations = grade_set(run.runtime, encoded, rollout)
        if not run.hosts.first:
            continue
        # The line comes last: a set that has one is not scored again when the run is resumed.
        write_generations(run.directory, step, name, generations, split)
        conditions = history.conditions(run.config, run.inputs, split, name)
        run.log.replace(step, f"{split}/{name}", numbers | conditions)
        run.console.say(
            f"{split} {name}: avg@{c.samples} {numbers['avg']:.3f} +- {Z * numbers['avg_se']:.3f}"
            f"  pass {numbers['pass']:.3f}  maj {shown(numbers['maj'], '.3f')}"
        )


def sample_set(runtime: Runtime, params: Params, name: str, encoded: Encoded, key: jax.Array) -> HostRollout:
    """The responses to one set, eval.samples for each problem.

    Raises UserError for a set without problems, Stopped after a signal.
    """
    requests = requests_of(name, encoded, runtime.config.eval.samples)
    return runtime.engines.evaluation.generate(params, requests, key)


def grade_set(
    runtime: Runtime, encoded: Encoded, rollout: HostRollout
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Grades and scores the responses to one set; returns what `score_set` does."""
    problems = [problem for problem, _ in encoded]
    repeated = [problem for problem in problems for _ in range(runtime.config.eval.samples)]
    texts, grades = read_and_grade(runtime, rollout, repeated)
    predictions = [grade.prediction for grade in grades]
    # Answers are compared with each other, so one host does it for all.
    votes = runtime.hosts.once("votes", lambda: runtime.grader.votes(predictions, repeated))
    return score_set(problems, rollout, texts, grades, votes)


def unscored(run: Run, split: ScoredSplit, step: int) -> list[str]:
    """The sets of this split that have no valid scores at `step` from an earlier start.

    At step 0 these are all sets: lines found there may come from other weights.
    """
    if step == 0:
        return list(run.inputs.sets(split))
    return history.unevaluated(run.directory, run.config, run.inputs, split, step)


def save_unsaved(run: Run, state: TrainState, step: int) -> None:
    """Saves the state after step `step`, unless it is saved already or no step was made."""
    if step and run.hosts.once("newest", run.manager.latest_step) != step:
        stopping.tell(f"saving step {step}")
        checkpoint.finish(run.manager, checkpoint.save(run.manager, state, step, run.meta))


def export_best(run: Run, like: TrainState, frozen_params: Params) -> None:
    """Scores and exports the model of the best step by validation, unless that is step 0 or the last.

    Only steps that have a checkpoint can be chosen.
    """
    best = run.hosts.once("best saved step", lambda: best_saved_step(run))
    path = run.directory / "export_best"
    if best in (None, 0, run.config.steps):
        if run.hosts.first:
            shutil.rmtree(path, ignore_errors=True)  # left by a shorter run in this directory
        return
    params = checkpoint.restore_params(run.manager, best, like.params, run.hosts)
    params = learner(params, frozen_params, run.config)
    names = run.hosts.once("unscored", partial(unscored, run, "eval", best))
    if names:
        run.console.say(f"the best step by validation, step {best}:")
    score(run, "eval", names, params, best)
    run.console.stage("export of the best step")
    export(run, params, path, best)


def best_saved_step(run: Run) -> int | None:
    """The best step by validation of those that have a checkpoint, and step 0, which needs none."""
    saved = {0, *run.manager.all_steps()}
    return best_step([row for row in read_metrics(run.log.path) if row["step"] in saved])


def evaluate_only(config: Settings, directory: Path, hosts: Hosts, console: Console) -> None:
    """Evaluates the newest checkpoint in `directory`, or the original model if nothing was trained there.

    If the checkpoints of a run were removed, its exported model is evaluated. Lines of an earlier evaluation
    of the same step and sets are replaced; everything else stays. Raises UserError for a mistake of the
    user's, such as an empty eval.sets.
    """
    exported = history.export_to_evaluate(directory, config)
    if exported:
        config = replace(config, "model.path", str(directory / "export"))
    require_trackers(config.trackers)
    console.stage("reading the model's files and the data")
    inputs = read_inputs(config)
    if not inputs.evals:
        raise UserError(
            "eval.sets is empty, so --mode=eval has nothing to score; pass --config.eval.sets=SET,SET"
        )
    check_weights(config.model.path, inputs.model)
    origins = history.origins(config, inputs)
    require_same_inputs(hosts, config, inputs, origins)
    unfinished = Unfinished(directory, hosts, "evaluation")  # which makes no step
    with (
        claim(hosts, directory, config, to_train=False),
        Grader(config.rewards, config.reward_timeout, console.progress) as grader,
        track(config, directory, hosts) as trackers,
    ):
        compiled = Compiled(console.compiling)
        runtime, trees = build(config, inputs, grader, unfinished, console)
        manager = checkpoint.open_manager(directory)
        if exported:
            console.stage("reading the weights")
            state = trees.first()
            step = history.exported_step(directory) or 0
            what = f"{config.model.path}, the model of step {step}, since the checkpoints are gone"
        else:
            # An evaluation does not need the wording and problems of the training, nor the weights that it
            # began from, unless the checkpoint has only adapters of them.
            names = ["model", "tokenizer"]
            if config.model.lora.rank:
                names.append("weights")
            restored = begin(hosts, manager, trees, {name: origins[name] for name in names}, console)
            state = restored.state
            step = restored.step
            what = f"the checkpoint of step {step}" if step else f"the original model in {config.model.path}"
        params = state.params
        if config.model.lora.rank:
            params = learner(params, trees.frozen(None), config)
        console.begin(step, config.steps)
        console.say(f"{config.name}: evaluates {what}, in {directory}")
        path = directory / "metrics.jsonl"
        log = hosts.once("log", lambda: MetricsLog.resume(path, lambda step, split: True))
        run = Run(runtime, inputs, directory, log, trackers, console, manager, compiled, {})
        hosts.once("evals", lambda: history.require_no_less(directory, config, inputs, step))
        with jax.set_mesh(runtime.mesh), stopping.deferred(directory, agreed(hosts)):
            score(run, "eval", list(inputs.evals), params, step)
            if hosts.first:
                report(run)


def begin(
    hosts: Hosts,
    manager: ocp.CheckpointManager,
    trees: Trees,
    origins: dict[str, Any],
    console: Console,
) -> checkpoint.Restored:
    """The newest checkpoint that can be read; without one, the initial state at step 0.

    Raises UserError if the checkpoint's run began with other `origins`.
    """
    console.stage("reading the checkpoint")
    restored = checkpoint.restore_latest(manager, trees.like, hosts)
    if restored is None:
        console.stage("reading the weights")
        return checkpoint.Restored(trees.first(), {"step": 0}, {})
    history.require_same_origins(restored.meta, origins, trees.config)
    if hosts.first:
        for step, reason in restored.damaged.items():
            logging.warning(
                "%s; the one of step %d is used", checkpoint.unreadable(manager, step, reason), restored.step
            )
    return restored


def check_disk(directory: Path, manager: ocp.CheckpointManager, trees: Trees, config: Settings) -> None:
    """Raises UserError if the disk lacks space for the checkpoints still to be written and the export.

    A new checkpoint is written before the oldest is removed, so there can be one more than checkpoint.keep,
    and another one if validation keeps the best step.
    """
    saved = manager.all_steps()
    most = config.checkpoint.keep + 1 + bool(config.validation.sets)
    more = 0 if config.steps in saved else max(1, most - len(saved))
    needed = more * checkpoint.state_bytes(trees.like) + checkpoint.state_bytes(trees.base)
    checkpoint.check_space(directory, needed, f"{more} checkpoints and the exported model")
