"""From a validated config to what a run needs: first everything on the host, then the devices.

`read_inputs` finds every mistake in model, tokenizer and data before a device is touched.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import jax
from absl import logging
from jax.sharding import Mesh

from rosd_jax.config import Config, UserError
from rosd_jax.data import gym
from rosd_jax.data.builders import load_problems
from rosd_jax.data.pipeline import Encoded, batch_at, encode_problems, problems_crc32
from rosd_jax.data.rows import same_data, set_name
from rosd_jax.evals import health
from rosd_jax.models.families import read_config
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import (
    make_mesh,
    replicated_dims,
    row_devices,
    validate_mesh_for,
)
from rosd_jax.rewards import Grader, Mode
from rosd_jax.rollout.bandwidth import measure_roofline
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import LONGEST_PAGE, Limits, own_pages, page_length
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.rollout.stops import Stops, make_stops
from rosd_jax.text.prompts import ENGLISH, Wording
from rosd_jax.text.tokenizer import Tokenizer, load_tokenizer
from rosd_jax.text.wording import read_wording
from rosd_jax.train import stopping
from rosd_jax.train.compiling import keep_programs
from rosd_jax.train.step import Engines, Tools
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import make_optimizer, make_update
from rosd_jax.types import Problem

Split = Literal["eval", "validation"]  # of what is scored, as lines of metrics.jsonl begin
FILES = {"eval": "test", "validation": "validation"}  # the split of a data set that is read for it
LEAST_ROWS = 8  # of a training batch that are worth a CPU device of their own
HOST_DEVICES = "xla_force_host_platform_device_count"
WORDINGS = {"english": ENGLISH, "gym": gym.WORDING}


@dataclass(frozen=True)
class Inputs:
    """What a run reads from disk, bar the weights."""

    model: Qwen3Config
    tokenizer: Tokenizer
    wording: Wording
    stops: Stops | None
    train: Encoded
    evals: dict[str, Encoded]  # eval.sets, which reports are about
    validation: dict[str, Encoded]  # validation.sets, which choose the best step
    overlong: dict[str, list[str]]  # set/split -> uids of the prompts that do not fit
    found: dict[str, dict[str, int]]  # set/split -> "rows" and "crc32" of the problems as they were read

    def sets(self, split: Split) -> dict[str, Encoded]:
        """The sets that lines of this split are about."""
        return self.evals if split == "eval" else self.validation


def read_inputs(config: Config) -> Inputs:
    """Model config, tokenizer and problems. Raises UserError for the first thing that does not fit."""
    path = model_path(config)
    read_config(path, num_tokens=None, dtype=config.model.dtype, remat="none")  # before the tokenizer
    tokenizer = load_tokenizer(path)
    model = read_config(
        path,
        num_tokens=tokenizer.num_tokens,
        dtype=config.model.dtype,
        remat=config.model.remat,
    )
    lora = config.model.lora
    model = model.replace(lora_scale=lora.alpha / lora.rank if lora.rank else 0.0)
    check_lengths(config, model)
    wording = WORDINGS.get(config.wording) or read_wording(config.wording)
    stop = config.rollout.stop
    stops = make_stops(stop, tokenizer.pieces(stop)) if stop else None
    with Grader(config.rewards, config.reward_timeout) as grader:
        grader.start()  # raises where an own reward function cannot be used
    overlong: dict[str, list[str]] = {}
    found: dict[str, dict[str, int]] = {}

    def encode(name: str, split: str, limit: int) -> Encoded:
        problems = load_problems(name, split, config.data.dir)
        found[f"{set_name(name)}/{split}"] = {"rows": len(problems), "crc32": problems_crc32(problems)}
        check_kinds(config, problems)
        chat_ids = lambda messages: tokenizer.chat_ids(messages, thinking=config.thinking.student)
        kept, dropped = encode_problems(problems, chat_ids, config.data.max_prompt_tokens)
        if dropped:
            overlong[f"{set_name(name)}/{split}"] = dropped
        return kept[:limit] if limit else kept

    train = encode(config.data.train, "train", 0)
    batch_at(train, 0, config.seed, config.batch.prompts)  # raises where there are too few
    check_names(config)
    evals = {
        set_name(name): encode(name, FILES["eval"], config.eval.limit) for name in listed(config.eval.sets)
    }
    validation = {
        set_name(name): encode(name, FILES["validation"], 0) for name in listed(config.validation.sets)
    }
    check_known(tokenizer, train, config.data.train)
    for name, uids in overlong.items():
        logging.warning(
            "%s: %d prompts exceed data.max_prompt_tokens and are left out: %s",
            name, len(uids), ", ".join(uids),
        )  # fmt: skip
    return Inputs(model, tokenizer, wording, stops, train, evals, validation, overlong, found)


def check_known(tokenizer: Tokenizer, train: Encoded, name: str) -> None:
    """Warns where the tokenizer does not know much of the training prompts' text."""
    share = tokenizer.unknown_share(ids for _, ids in train)
    if share > health.UNKNOWN:
        logging.warning("%s: %s", name, health.unknown_sentence(share))


def model_path(config: Config) -> Path:
    """The model's directory. Raises UserError when none is named or it does not exist."""
    if not config.model.path:
        raise UserError(
            "model.path is empty; it must be a Hugging Face directory of a Qwen3, Qwen2 or Llama model, so "
            "pass --config.model.path=DIR"
        )
    path = Path(config.model.path)
    if not path.is_dir():
        raise UserError(
            f"model.path is {str(path)!r}, which is no directory; pass --config.model.path=DIR of a "
            "Hugging Face model"
        )
    return path


def listed(sets: str) -> tuple[str, ...]:
    """The names in a field such as eval.sets."""
    return tuple(name.strip() for name in sets.split(",") if name.strip())


def check_names(config: Config) -> None:
    """Raises UserError where two different sets of one's own have the same name."""
    asked: dict[str, str] = {}
    for name in (config.data.train, *listed(config.eval.sets), *listed(config.validation.sets)):
        other = asked.setdefault(set_name(name), name)
        if not same_data(name, other, config.data.dir):
            raise UserError(
                f"data.train, eval.sets and validation.sets name two sets {set_name(name)!r}, {other!r} and "
                f"{name!r}; a name must stand for one set, so give each its own, or put them as "
                "train.jsonl, validation.jsonl and test.jsonl into one folder"
            )


def trained_on(config: Config) -> tuple[str, ...]:
    """What the set that training draws from is called: in data.train, then in eval.sets."""
    train = config.data.train
    same = [name for name in listed(config.eval.sets) if same_data(name, train, config.data.dir)]
    return tuple(dict.fromkeys(set_name(name) for name in (train, *same)))


def headline(inputs: Inputs, config: Config, directory: Path, start: int) -> str:
    """What runs, where, and from which step."""
    begun = f"resumes after step {start}" if start else f"{config.steps} steps"
    name = trained_on(config)[0]
    return f"{config.name}: {len(inputs.train)} problems of {name}, {begun}, in {directory}"


def check_kinds(config: Config, problems: Sequence[Problem]) -> None:
    """Raises UserError for the first problem that no built-in checker grades, where they are to grade."""
    own = next((problem.uid for problem in problems if problem.kind == "own"), None)
    if own and config.rewards in get_args(Mode):
        raise UserError(
            f"rewards is {config.rewards!r}, and the kind of problem {own} is 'own'; give rewards the "
            "MODULE:FUNCTION that grades it, or change the kind"
        )


def check_lengths(config: Config, model: Qwen3Config) -> None:
    """Raises UserError when the longest possible sequence exceeds the model's positions, or the cache."""
    longest = {
        "rollout.max_new_tokens": config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        "reflect.max_new_tokens": config.reflect.max_prompt_tokens + config.reflect.max_new_tokens,
        "lesson.max_teacher_tokens": config.lesson.max_teacher_tokens + config.rollout.max_new_tokens,
        "eval.max_new_tokens": config.data.max_prompt_tokens + config.eval.max_new_tokens,
    }
    for field, tokens in longest.items():
        if tokens > model.max_position_embeddings:
            raise UserError(
                f"{field} makes sequences of up to {tokens} tokens; the model has "
                f"{model.max_position_embeddings} positions, so lower it or the prompt limit"
            )
    for section in (config.rollout, config.reflect, config.eval):
        cache_pages(config, section.max_new_tokens)
    for field in ("data.max_prompt_tokens", "reflect.max_prompt_tokens"):
        section, name = field.split(".")
        if config[section][name] > config.rollout.prompt_tokens // LONGEST_PAGE * LONGEST_PAGE:
            raise UserError(
                f"rollout.prompt_tokens is {config.rollout.prompt_tokens}; a single prompt may have "
                f"{field} = {config[section][name]}, so raise the one or lower the other"
            )


def build(config: Config, inputs: Inputs, grader: Grader) -> tuple[Tools, Trees]:
    """The tools of a run, and what makes its trees. Loads no weights yet."""
    if config.model.dtype == "float32":  # else an accelerator rounds float32 operands to 10 bits or fewer
        jax.config.update("jax_default_matmul_precision", "highest")
    keep_programs(config.compile_cache)
    deal_cores(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    model = inputs.model
    validate_mesh_for(model, mesh)
    check_rows(config, row_devices(mesh))
    optimizer = make_optimizer(config)
    trees = Trees(config, model, mesh, optimizer)
    for leaf in replicated_dims(trees.base, mesh):
        logging.warning("not sharded, since the mesh does not divide it: %s", leaf)
    ends = Ends(inputs.tokenizer.stop_ids, inputs.stops)
    longest = max(len(ids) for _, ids in inputs.train)
    tools = Tools(
        config=config,
        model=model,
        tokenizer=inputs.tokenizer,
        student_thinking_open=inputs.tokenizer.opens_thinking(config.thinking.student),
        reflector_thinking_open=inputs.tokenizer.opens_thinking(config.thinking.reflector),
        wording=inputs.wording,
        mesh=mesh,
        grader=grader,
        key=jax.random.key(config.seed),
        roofline=measure_roofline(model, mesh.shape["tensor"]),
        engines=make_engines(config, model, mesh, ends, longest),
        update=make_update(config, model, optimizer, mesh, trees.shardings),
    )
    return tools, trees


@dataclass(frozen=True)
class Ends:
    """What ends a response before its limit."""

    stop_ids: tuple[int, ...]
    stops: Stops | None  # stop strings; reflections have none


def make_engines(
    config: Config, model: Qwen3Config, mesh: Mesh, ends: Ends, longest_train: int | None = None
) -> Engines:
    """The decoding engines of a run.

    longest_train: tokens of the longest training prompt; None: data.max_prompt_tokens.
    """
    c, rows = config, config.batch.prompts * config.batch.samples
    prompt, longest = c.data.max_prompt_tokens, longest_train or c.data.max_prompt_tokens

    def engine(section: Config, limits: Limits, top_p: float, stops: Stops | None) -> Engine:
        sampling = Sampling(section.temperature, top_p, ends.stop_ids)
        return Engine(model, mesh, limits, sampling, stops, c.rollout.attention, stopping.check)

    return Engines(
        rollouts=engine(
            c.rollout,
            limits_of(c, c.rollout.max_new_tokens, longest, rows=rows, prompts=c.batch.prompts),
            c.rollout.top_p,
            ends.stops,
        ),
        reflections=engine(
            c.reflect,
            limits_of(c, c.reflect.max_new_tokens, c.reflect.max_prompt_tokens, rows=rows, prompts=rows),
            1.0,
            None,
        ),
        evaluation=engine(
            c.eval,
            replace(limits_of(c, c.eval.max_new_tokens, prompt, rows=c.eval.batch), slots=c.eval.batch),
            c.eval.top_p,
            ends.stops,
        ),
    )


def limits_of(config: Config, max_new: int, max_prompt: int, *, rows: int, prompts: int = 1) -> Limits:
    """The limits of an engine. rows, prompts: what a call's numbers of them are multiples of."""
    return Limits(
        max_new=max_new,
        max_prompt=max_prompt,
        slots=config.rollout.slots,
        response_pages=cache_pages(config, max_new),
        prompt_tokens=config.rollout.prompt_tokens,
        rows=rows,
        prompts=prompts,
    )


def cache_pages(config: Config, max_new: int) -> int:
    """Pages for responses on each row device. Raises UserError where a single one might not fit."""
    page = page_length(max_new)
    pages, least = config.rollout.cache_tokens // page, own_pages(page, max_new)
    if pages < least:
        raise UserError(
            f"rollout.cache_tokens is {config.rollout.cache_tokens}; a response of {max_new} tokens needs "
            f"{least * page}, so raise it or lower the limit of rollout, reflect and eval"
        )
    return pages


def deal_cores(config: Config) -> None:
    """Where the mesh lays rows along all devices, makes several of JAX's CPU, one to a core.

    Their number stays what it is once JAX has started, or where the user chose it; other kinds of devices
    are none of its business.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if config.mesh.data != -1 or "JAX_NUM_CPU_DEVICES" in os.environ or HOST_DEVICES in flags:
        return
    rows = config.batch.prompts * config.batch.samples
    devices = cpu_devices(
        rows // max(LEAST_ROWS, config.batch.device_rows), math.gcd(*batches(config).values())
    )
    with contextlib.suppress(RuntimeError):  # JAX has started
        jax.config.update("jax_num_cpu_devices", devices)


def cpu_devices(most: int, divisor: int) -> int:
    """A power of two, at most `most` and a device for each core, that divides `divisor`.

    XLA for CPU attends to one row after another in one thread, and each device has its own.
    """
    most = max(1, min(cores(), most))
    return min(divisor & -divisor, 1 << most.bit_length() - 1)


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches(config: Config) -> dict[str, int]:
    """Rows of each batch that is laid over the row devices, by field."""
    return {
        "batch.prompts x batch.samples": config.batch.prompts * config.batch.samples,
        "eval.batch": config.eval.batch,
    }


def check_rows(config: Config, devices: int) -> None:
    """Raises UserError where a batch's rows cannot be laid evenly over the row devices."""
    for field, n in batches(config).items():
        if n % devices:
            raise UserError(
                f"{field} is {n}; it must be a multiple of mesh.data x mesh.fsdp = {devices}, so "
                "change the batch or the mesh"
            )
