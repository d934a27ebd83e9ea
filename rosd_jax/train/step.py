"""One training step, as a line of stages.

    prompts -> rollout -> grade -> reflect -> lesson -> update

Sampling, reflecting and updating are jitted functions of explicit trees; reading text (grading, parsing
a reflection, locating a quote) is host work between them. So a step is three stages on the devices with
two host hops, not one jitted function: what is pure is each function, and the state is threaded through
by hand.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from rosd_jax.data.pipeline import pad_rows
from rosd_jax.distill import reflect, teacher
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import on_device
from rosd_jax.rewards import Grader
from rosd_jax.rollout.bandwidth import MemoryRoofline
from rosd_jax.rollout.batching import Request
from rosd_jax.settings import Settings
from rosd_jax.text.prompts import Wording
from rosd_jax.text.tokenizer import Tokenizer
from rosd_jax.train import stopping
from rosd_jax.train.engines import Engines
from rosd_jax.train.update import Update, learner
from rosd_jax.types import (
    Graded,
    HostRollout,
    Lesson,
    Params,
    Prompts,
    Reflected,
    Stream,
    TrainState,
)

Numbers = dict[str, float]


@dataclass(frozen=True)
class Tools:
    """What every step uses and none changes: built once (train/build.py)."""

    config: Settings
    model: Qwen3Config
    tokenizer: Tokenizer
    wording: Wording
    mesh: Mesh
    grader: Grader
    key: jax.Array
    roofline: MemoryRoofline  # of decoding
    engines: Engines
    student_thinking_open: bool  # the student's prompts end inside <think>
    reflector_thinking_open: bool  # the reflector's prompts do
    task_metrics: Callable[[Reflected], Numbers] | None  # numbers that only this task has
    update: Update


def train_step(
    tools: Tools,
    state: TrainState,
    frozen_params: Params,
    prompts: Prompts,
    step: int,
    stage: Callable[[str], None] = lambda name: None,
) -> tuple[TrainState, Numbers, Reflected, np.ndarray]:
    """The next state, the step's numbers, its reflected rollouts and their weights [B, R].

    `stage` is told the name of each stage as it begins. Raises Stopped where a signal has asked the run to
    stop; `state` is still whole then.
    """
    clock = Clock(stage)
    with clock("rollout"):
        student = learner(state.params, frozen_params, tools.config)
        rollout = sample_rollouts(tools, student, prompts, step)
    with clock("grade"):
        graded = grade(tools, prompts, rollout)
    with clock("reflect"):
        reflector = student if tools.config.reflect.weights == "student" else on_device(frozen_params)
        reflected = reflect_rollouts(tools, reflector, graded, step)
        del student, reflector  # copies on the device, where the frozen tree lies on the host
    with clock("lesson"):
        reflected, lesson = make_lesson(tools, reflected)
    with clock("update"):
        state, metrics = tools.update(state, frozen_params, lesson)
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
    numbers = {**describe(graded), **describe_reflections(reflected, lesson.weight_BR)}
    if tools.task_metrics:
        numbers |= tools.task_metrics(reflected)
    numbers |= metrics
    numbers["unknown_tokens"] = tools.tokenizer.unknown_share(prompts.ids)
    numbers |= describe_decoding(rollout, tools.roofline, clock.spent["rollout"], "rollout")
    numbers |= describe_decoding(reflected.answers, tools.roofline, clock.spent["reflect"], "reflect")
    return state, {**numbers, **clock.seconds()}, reflected, lesson.weight_BR


def sample_rollouts(tools: Tools, params: Params, prompts: Prompts, step: int) -> HostRollout:
    """G rollouts a prompt. The uid of a rollout is its number in the whole run."""
    rows = [ids for ids in prompts.ids for _ in range(tools.config.batch.samples)]
    requests = [Request(ids, step * len(rows) + row) for row, ids in enumerate(rows)]
    return tools.engines.rollouts.generate(params, requests, Stream.ROLLOUT.key(tools.key))


def grade(tools: Tools, prompts: Prompts, rollout: HostRollout) -> Graded:
    """Decodes every response and has its problem's checker grade it."""
    texts = decode(tools.tokenizer, rollout)
    problems = [problem for problem in prompts.problems for _ in range(tools.config.batch.samples)]
    grades = tools.grader.grade_all(texts, problems, thinking_open=tools.student_thinking_open)
    rewards_B = np.array([g.score for g in grades], np.float32)
    return Graded(prompts, rollout, tuple(texts), rewards_B, tools.student_thinking_open)


def reflect_rollouts(tools: Tools, params: Params, graded: Graded, step: int) -> Reflected:
    """Asks the reflector about the rollouts of mixed groups and reads its answers."""
    config = tools.config
    plans = reflect.plan_rollouts(graded, config.reflect)
    ids = reflect.build_prompts(
        graded, plans, tools.tokenizer, config.reflect,
        thinking=config.thinking.reflector, wording=tools.wording,
    )  # fmt: skip
    rows = [row for row, prompt in enumerate(ids) if prompt is not None]
    raws: list[str | None] = [None] * len(ids)
    answers = None
    if rows:
        requests = [Request(ids[row] or [], step * len(ids) + row) for row in rows]
        answers = tools.engines.reflections.generate(params, requests, Stream.REFLECT.key(tools.key))
        for row, text in zip(rows, decode(tools.tokenizer, answers), strict=True):
            raws[row] = text
    reflected = reflect.read_reflections(
        graded, plans, raws, tools.tokenizer, config.lesson,
        thinking_open=tools.reflector_thinking_open,
    )  # fmt: skip
    return replace(reflected, answers=answers)


def make_lesson(tools: Tools, reflected: Reflected) -> tuple[Reflected, Lesson]:
    """The teacher's prompts and the weights; rollouts that do not fit leave the loss, with a note."""
    config, graded = tools.config, reflected.graded
    reflected, ids = teacher.teacher_prompts(
        reflected, tools.tokenizer, config.lesson,
        thinking=config.thinking.teacher, wording=tools.wording,
    )  # fmt: skip
    R = graded.rollout.tokens_BR.shape[1]
    prompts = [prompt for prompt in graded.prompts.ids for _ in range(graded.group_size)]
    prompt_BP, prompt_len_B = pad_rows(prompts, config.data.max_prompt_tokens)
    rows = [row or [0] for row in ids]  # rows without a teacher weigh 0
    teacher_prompt_BQ, teacher_prompt_len_B = pad_rows(rows, config.lesson.max_teacher_tokens)
    lesson = Lesson(
        prompt_BP=prompt_BP,
        prompt_len_B=prompt_len_B,
        teacher_prompt_BQ=teacher_prompt_BQ,
        teacher_prompt_len_B=teacher_prompt_len_B,
        response_BR=graded.rollout.tokens_BR,
        response_len_B=graded.rollout.length_B,
        weight_BR=teacher.region_weights(reflected, config.lesson, R),
        sampler_logp_BR=graded.rollout.logp_BR,
    )
    return reflected, lesson


def decode(tokenizer: Tokenizer, rollout: HostRollout) -> list[str]:
    """The text of every row, special tokens removed."""
    pairs = zip(rollout.tokens_BR, rollout.length_B, strict=True)
    return [tokenizer.decode(tokens[:length]) for tokens, length in pairs]


def describe(graded: Graded) -> Numbers:
    """Numbers of the rollouts."""
    rollout = graded.rollout
    return dict(
        reward=float(graded.rewards_B.mean()),
        response_length=float(np.mean(rollout.length_B)),
        truncated=float(np.mean(~rollout.finished_B)),
    )


def describe_decoding(
    rollout: HostRollout | None, roofline: MemoryRoofline, seconds: float, stage: str
) -> Numbers:
    """Tokens a second, the share of slots that were idle, the roofline fraction (the memory-bound ideal over
    the measured time), and how often a sequence was preempted.

    The stage's seconds hold everything, so compilation where it happened. NaN where nothing was decoded.
    """
    stats = rollout and rollout.stats
    tokens = float(np.sum(rollout.length_B)) if rollout else float("nan")
    return {
        f"tokens_per_second_{stage}": tokens / seconds,
        f"idle_share_{stage}": stats.idle_share if stats else float("nan"),
        f"roofline_{stage}": roofline.seconds(stats) / seconds if stats else float("nan"),
        f"preempted_{stage}": float(np.sum(stats.preempted)) if stats else float("nan"),
    }


def describe_reflections(reflected: Reflected, weight_BR: np.ndarray) -> Numbers:
    """Shares of the reflection stage, with the counts behind them."""
    counts = teacher.count(reflected, weight_BR)
    rows, tokens = len(reflected.reflections), int(np.sum(reflected.graded.rollout.length_B))
    asked, found = counts["quotes_asked"], counts.pop("quotes_found")
    return dict(
        reflected=counts.pop("reflected") / rows,
        quote_found=found / asked if asked else float("nan"),
        active_tokens_share=counts.pop("active_tokens") / max(tokens, 1),
        **counts,
    )


class Clock:
    """Seconds spent in each stage. A run may be stopped before a stage, and never after the last one."""

    def __init__(self, stage: Callable[[str], None]):
        self._stage, self.spent = stage, {}

    @contextmanager
    def __call__(self, name: str) -> Any:
        stopping.check()
        self._stage(name)
        began = time.perf_counter()
        yield
        self.spent[name] = time.perf_counter() - began

    def seconds(self) -> Numbers:
        """The stages' seconds, as numbers of the step."""
        return {f"seconds_{name}": s for name, s in self.spent.items()}
