"""One training step as a sequence of stages.

    prompts -> rollout -> grade -> reflect -> lesson -> update

Rollout, reflection and update run on the devices, as jitted functions of explicit trees. Between them the
host reads text: it grades responses, parses reflections and locates quotes. So a step is not one jitted
function, and the state is passed from stage to stage explicitly.

Dimensions: B rows of a step's batch, R response tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import jax
import numpy as np
from jax.sharding import Mesh

from rosd_jax.distill import ablation, policy, reflect, teacher
from rosd_jax.hosts import Hosts
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import on_device
from rosd_jax.rewards import Grade, Grader
from rosd_jax.rollout.bandwidth import MemoryRoofline
from rosd_jax.rollout.batching import Request
from rosd_jax.settings import Settings
from rosd_jax.text.prompts import Wording
from rosd_jax.text.tokenizer import Tokenizer
from rosd_jax.train import stopping
from rosd_jax.train.engines import Engines
from rosd_jax.train.numbers import Numbers, of_advantages, of_decoding, of_reflections, of_rollouts
from rosd_jax.train.unfinished import Unfinished
from rosd_jax.train.update import Update, learner
from rosd_jax.types import (
    Graded,
    HostRollout,
    Lesson,
    Params,
    Problem,
    Prompts,
    Reflected,
    Reflection,
    Stream,
    TrainState,
)


@dataclass(frozen=True)
class Runtime:
    """What every step uses and none changes. Built once, by train/build.py."""

    config: Settings
    model: Qwen3Config
    tokenizer: Tokenizer
    wording: Wording
    mesh: Mesh
    grader: Grader
    hosts: Hosts
    unfinished: Unfinished
    key: jax.Array
    roofline: MemoryRoofline  # of decoding
    engines: Engines
    student_thinking_open: bool  # the student's prompts end inside <think>
    reflector_thinking_open: bool  # the reflector's prompts do
    task_metrics: Callable[[Reflected], Numbers] | None  # additional metrics of this task
    update: Update


def train_step(
    runtime: Runtime,
    state: TrainState,
    frozen_params: Params,
    prompts: Prompts,
    step: int,
    stage: Callable[[str], None] = lambda name: None,
) -> tuple[TrainState, Numbers, Reflected, Lesson, np.ndarray]:
    """Makes one step: the next state, its metrics, the reflected rollouts, the lesson and its divergences.

    Divergences are [B, R]; train/update.py says what they are of.

    `stage` is called with the name of each stage as it begins. Raises Stopped if a signal has asked the run
    to stop; `state` is then still valid, because only the update's last function donates it.
    """
    clock = Clock(stage)
    with clock("rollout"):
        student = learner(state.params, frozen_params, runtime.config)
        rollout, earlier = sample_rollouts(runtime, student, prompts, step)
    clock.add("rollout", earlier)
    with clock("grade"):
        graded = grade(runtime, prompts, rollout)
    with clock("reflect"):
        # With model.frozen=host, the reflector is a copy on the devices, and with adapters so is the student.
        # There is room for one of them, and for none in the update.
        reflector = student if runtime.config.reflect.weights == "student" else None
        del student
        if reflector is None and runtime.config.reflects:
            reflector = on_device(frozen_params)
        reflected, earlier = reflect_rollouts(runtime, reflector, graded, step)
        del reflector
    clock.add("reflect", earlier)
    with clock("lesson"):
        reflected, lesson = make_lesson(runtime, reflected)
    with clock("update"):
        state, metrics, divergence_BR = runtime.update(state, frozen_params, lesson)
        # Waits for the devices, so that the stage's time includes the update itself.
        metrics = {name: float(x) for name, x in jax.device_get(metrics).items()}
    numbers = of_rollouts(graded) | of_reflections(reflected, lesson.active_BR)
    numbers |= ablation.count(reflected.reflections, runtime.config.ablation)
    if runtime.config.reinforces:
        numbers |= of_advantages(policy.advantages(graded, runtime.config.policy))
    if runtime.task_metrics:
        numbers |= runtime.task_metrics(reflected)
    numbers |= metrics
    numbers["unknown_tokens"] = runtime.tokenizer.unknown_share(prompts.ids)
    numbers |= of_decoding(rollout, runtime.roofline, clock.spent["rollout"], "rollout")
    numbers |= of_decoding(reflected.answers, runtime.roofline, clock.spent["reflect"], "reflect")
    return state, numbers | clock.seconds(), reflected, lesson, divergence_BR


def sample_rollouts(
    runtime: Runtime, params: Params, prompts: Prompts, step: int
) -> tuple[HostRollout, float]:
    """G rollouts per prompt, and the seconds that an earlier start spent on them.

    The uid of a rollout is its number in the run: no two share random numbers.
    """
    rows = [ids for ids in prompts.ids for _ in range(runtime.config.batch.samples)]
    requests = [Request(ids, step * len(rows) + row) for row, ids in enumerate(rows)]
    key = Stream.ROLLOUT.key(runtime.key)
    generate = runtime.engines.rollouts.generate
    return runtime.unfinished.rollout(step, "rollout", lambda: generate(params, requests, key))


def grade(runtime: Runtime, prompts: Prompts, rollout: HostRollout) -> Graded:
    """Decodes every response to text and grades it."""
    problems = [problem for problem in prompts.problems for _ in range(runtime.config.batch.samples)]
    texts, grades = read_and_grade(runtime, rollout, problems)
    rewards_B = np.array([g.score for g in grades], np.float32)
    return Graded(prompts, rollout, texts, rewards_B, runtime.student_thinking_open)


def read_and_grade(
    runtime: Runtime, rollout: HostRollout, problems: Sequence[Problem]
) -> tuple[tuple[str, ...], tuple[Grade, ...]]:
    """The text of every response and its grade. Each host grades a part of the rows."""
    texts = tuple(runtime.tokenizer.decode_all(responses(rollout)))

    def grade_rows(rows: Sequence[tuple[str, Problem]]) -> Sequence[Grade]:
        answers, asked = zip(*rows, strict=True)
        return runtime.grader.grade_all(answers, asked, thinking_open=runtime.student_thinking_open)

    rows = list(zip(texts, problems, strict=True))
    return texts, tuple(runtime.hosts.share("grade", grade_rows, rows))


def reflect_rollouts(runtime: Runtime, params: Params, graded: Graded, step: int) -> tuple[Reflected, float]:
    """Asks the reflector about the rollouts that distill/reflect.py selects, and reads its answers.

    Each host reads a part of them. Also returns the seconds that an earlier start spent on the answers.
    Methods that do not reflect ask nothing, and `params` is not used.
    """
    config = runtime.config
    if not config.distills:
        return Reflected(graded, (Reflection(),) * len(graded.texts)), 0.0
    plans = reflect.plan_rollouts(graded, config.reflect, uniform_taught=config.lesson.uniform_groups)
    if not config.reflects:
        return reflect.gather(graded, plans, {}, {}, config.lesson), 0.0
    ids = reflect.build_prompts(
        graded,
        plans,
        runtime.tokenizer,
        config.reflect,
        thinking=config.thinking.reflector,
        wording=runtime.wording,
    )
    # A reflection has the uid of its rollout, but another stream of random numbers.
    first = step * len(ids)
    asked = {row: Request(prompt, first + row) for row, prompt in enumerate(ids) if prompt is not None}
    raws: dict[int, str] = {}
    answers = None
    earlier = 0.0
    if asked:
        key = Stream.REFLECT.key(runtime.key)
        generate = runtime.engines.reflections.generate
        requests = list(asked.values())
        answers, earlier = runtime.unfinished.rollout(
            step, "reflect", lambda: generate(params, requests, key)
        )
        raws = dict(zip(asked, runtime.tokenizer.decode_all(responses(answers)), strict=True))

    def read(rows: Sequence[int]) -> list[Reflection]:
        thinking_open = runtime.reflector_thinking_open
        return [
            reflect.read_answer(
                graded, row, raws[row], runtime.tokenizer, config.lesson, thinking_open=thinking_open
            )
            for row in rows
        ]

    said = dict(zip(raws, runtime.hosts.share("reflections", read, list(raws)), strict=True))
    said = ablation.replaced(said, graded, config, runtime.tokenizer, first)
    reflected = reflect.gather(graded, plans, raws, said, config.lesson)
    return replace(reflected, answers=answers), earlier


def make_lesson(runtime: Runtime, reflected: Reflected) -> tuple[Reflected, Lesson]:
    """The lesson of a step. A rollout that is not in the loss has weight 0, and a note that says why."""
    config = runtime.config
    graded = reflected.graded
    B, R = graded.rollout.tokens_BR.shape  # R: the token limit, whatever the responses' lengths
    ids: list[list[int] | None] = [None] * B
    weight_BR = np.zeros((B, R), np.float32)
    if config.distills:
        reflected, ids = teacher.teacher_prompts(
            reflected,
            runtime.tokenizer,
            config.lesson,
            thinking=config.thinking.teacher,
            wording=runtime.wording,
        )
        weight_BR = teacher.region_weights(reflected, config.lesson, R)
    lesson = Lesson(
        prompts=[prompt for prompt in graded.prompts.ids for _ in range(graded.group_size)],
        # A row without a teacher prompt has no weight, and the teacher does not read it.
        teacher_prompts=[prompt or [] for prompt in ids],
        response_BR=graded.rollout.tokens_BR,
        weight_BR=weight_BR,
        sampler_logp_BR=graded.rollout.logp_BR,
    )
    if config.reinforces:
        advantage_B = policy.advantages(graded, config.policy)
        policy_BR = policy.policy_weights(advantage_B, graded.rollout.length_B, weight_BR, config.policy)
        lesson = replace(lesson, policy_BR=policy_BR)
        reflected = policy.with_notes(reflected, lesson)
    return reflected, lesson


def responses(rollout: HostRollout) -> list[np.ndarray]:
    """The tokens of every response."""
    return [tokens[:length] for tokens, length in zip(rollout.tokens_BR, rollout.length_B, strict=True)]


class Clock:
    """Seconds spent in each stage. Entering a stage raises Stopped if a signal has asked the run to stop.

    Nothing is checked after the last stage: the step is then complete, and is written before the run stops.
    """

    def __init__(self, stage: Callable[[str], None]):
        self._stage = stage
        self.spent: Numbers = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        stopping.check(name)
        self._stage(name)
        began = time.perf_counter()
        yield
        self.spent[name] = time.perf_counter() - began

    def add(self, name: str, seconds: float) -> None:
        """Adds what an earlier start of the run spent in a stage."""
        self.spent[name] += seconds

    def seconds(self) -> Numbers:
        """The metrics seconds_STAGE."""
        return {f"seconds_{name}": s for name, s in self.spent.items()}
