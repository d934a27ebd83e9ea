"""What a run reads from disk, apart from the weights: model config, tokenizer, wording, problems.

`read_inputs` reports any mistake in them before a device is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from absl import logging

from rosd_jax.data.pipeline import Encoded, batch_at, encode_problems, problems_crc32
from rosd_jax.data.sets import load_problems
from rosd_jax.data.sources import listed, names_of_same, same_data, set_name
from rosd_jax.errors import UserError
from rosd_jax.evals import health
from rosd_jax.fields import value
from rosd_jax.gym.texts import WORDING as GYM
from rosd_jax.models.families import read_config
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.rewards import Grader, Mode
from rosd_jax.rollout.limits import LONGEST_PAGE
from rosd_jax.rollout.stops import Stops, make_stops
from rosd_jax.settings import Settings
from rosd_jax.text.prompts import ENGLISH, Wording
from rosd_jax.text.tokenizer import Tokenizer, load_tokenizer
from rosd_jax.text.wording import read_wording
from rosd_jax.train.engines import cache_pages
from rosd_jax.types import Problem

ScoredSplit = Literal["eval", "validation"]  # which sets are scored; `split` in metrics.jsonl begins with it
FILES = {"eval": "test", "validation": "validation"}  # the split of a data set that each one reads
WORDINGS = {"english": ENGLISH, "gym": GYM}


@dataclass(frozen=True)
class Inputs:
    """What a run reads from disk, apart from the weights."""

    model: Qwen3Config
    tokenizer: Tokenizer
    wording: Wording
    stops: Stops | None
    train: Encoded
    evals: dict[str, Encoded]  # eval.sets, by name: for the report
    validation: dict[str, Encoded]  # validation.sets, by name: to choose the best step
    overlong: dict[str, list[str]]  # "set/split" -> uids of prompts above data.max_prompt_tokens, left out
    reward_crc32: int  # of the source file of the user's reward function; 0 if there is none
    found: dict[str, dict[str, int]]  # "set/split" -> "rows" and "crc32" of the problems as read

    def sets(self, split: ScoredSplit) -> dict[str, Encoded]:
        """The sets of a split, by name."""
        return self.evals if split == "eval" else self.validation


def read_inputs(config: Settings) -> Inputs:
    """Reads and checks them all. Raises UserError for the first mistake."""
    model, tokenizer = read_model(config)
    check_lengths(config, model)
    wording = find_wording(config)
    stop = config.rollout.stop
    stops = make_stops(stop, tokenizer.pieces(stop)) if stop else None
    with Grader(config.rewards, config.reward_timeout) as grader:
        reward_crc32 = grader.start()  # raises if the user's reward function cannot be used
    encode_chats = partial(tokenizer.encode_chats, thinking=config.thinking.student)
    overlong: dict[str, list[str]] = {}
    found: dict[str, dict[str, int]] = {}

    def encode(name: str, split: str, limit: int) -> Encoded:
        problems = load_problems(name, split, config.data.dir)
        found[f"{set_name(name)}/{split}"] = {"rows": len(problems), "crc32": problems_crc32(problems)}
        check_kinds(config, problems)
        kept, dropped = encode_problems(problems, encode_chats, config.data.max_prompt_tokens)
        if dropped:
            overlong[f"{set_name(name)}/{split}"] = dropped
        return kept[:limit] if limit else kept

    train = encode(config.data.train, "train", 0)
    batch_at(train, 0, config.seed, config.batch.prompts)  # raises if there are too few problems
    check_names(config)
    evals: dict[str, Encoded] = {}
    for name in listed(config.eval.sets):
        evals[set_name(name)] = encode(name, FILES["eval"], config.eval.limit)
    validation: dict[str, Encoded] = {}
    for name in listed(config.validation.sets):
        validation[set_name(name)] = encode(name, FILES["validation"], 0)
    trained = {question(problem) for problem, _ in train}
    for name, items in (evals | validation).items():
        check_samples(config, name, len(items))
        warn_of_shared(name, items, trained)
    check_known(tokenizer, train, config.data.train)
    check_oracle(config, train)
    for name, uids in overlong.items():
        logging.warning(
            "%s: %d prompts exceed data.max_prompt_tokens and are left out: %s",
            name,
            len(uids),
            ", ".join(uids),
        )
    return Inputs(model, tokenizer, wording, stops, train, evals, validation, overlong, reward_crc32, found)


def read_model(config: Settings) -> tuple[Qwen3Config, Tokenizer]:
    """The model's config.json and its tokenizer. Raises UserError for a mistake in them."""
    path = model_path(config)
    # Only checks config.json, so that a wrong model directory is reported as one, not by its tokenizer.
    read_config(path, num_tokens=None, dtype=config.model.dtype, remat="none")
    tokenizer = load_tokenizer(path)
    model = read_config(
        path,
        num_tokens=tokenizer.num_tokens,
        dtype=config.model.dtype,
        remat=config.model.remat,
    )
    lora = config.model.lora
    return model.replace(lora_scale=lora.alpha / lora.rank if lora.rank else 0.0), tokenizer


def find_wording(config: Settings) -> Wording:
    """The texts of the prompts. Raises UserError for a file that cannot be used."""
    return WORDINGS.get(config.wording) or read_wording(config.wording)


def check_samples(config: Settings, name: str, items: int) -> None:
    """Raises UserError if a set has more responses than random numbers can be told apart for."""
    responses = items * config.eval.samples
    if responses > 2**31:
        raise UserError(
            f"eval.samples is {config.eval.samples}, which makes {responses} responses to the {items} "
            f"problems of {name}; it must make at most 2**31, so lower it or eval.limit"
        )


def question(problem: Problem) -> str:
    """The question in a form that is equal for equal questions, but for case and white space."""
    return " ".join(problem.question.casefold().split())


def warn_of_shared(name: str, items: Encoded, trained: set[str]) -> None:
    """Warns if problems of an evaluation are also trained on. trained: their questions."""
    shared = sum(question(problem) in trained for problem, _ in items)
    if shared:
        logging.warning(
            "%s: %d of its %d problems are also in the training set, so its scores do not tell how well the "
            "model does on new ones",
            name,
            shared,
            len(items),
        )


def check_known(tokenizer: Tokenizer, train: Encoded, name: str) -> None:
    """Warns if many tokens of the training prompts are the tokenizer's unknown token."""
    share = tokenizer.unknown_share(ids for _, ids in train)
    if share > health.UNKNOWN:
        logging.warning("%s: %s", name, health.unknown_sentence(share))


def check_oracle(config: Settings, train: Encoded) -> None:
    """Raises UserError if an oracle is asked about problems other than those of the gym."""
    for name in ("oracle_spans", "oracle_ideas"):
        if getattr(config.ablation, name) and any(problem.kind != "gym" for problem, _ in train):
            raise UserError(
                f"ablation.{name} is True, and the first errors in {config.data.train} are not known; set it "
                "to False, or data.train to a set of the gym"
            )


def model_path(config: Settings) -> Path:
    """The model's directory. Raises UserError if none is named or it does not exist."""
    if not config.model.path:
        raise UserError(
            "model.path is empty; it must be a Hugging Face directory of a Qwen3, Qwen2 or Llama model, so "
            "pass --config.model.path=DIR"
        )
    path = Path(config.model.path)
    if not path.is_dir():
        home = ", with the home directory in full instead of ~" if config.model.path.startswith("~") else ""
        raise UserError(
            f"model.path is {str(path)!r}, which is not a directory; pass --config.model.path=DIR of a "
            f"Hugging Face model{home}"
        )
    return path


def check_names(config: Settings) -> None:
    """Raises UserError if two different sets of the user's have the same name."""
    known: dict[str, str] = {}
    for name in (config.data.train, *listed(config.eval.sets), *listed(config.validation.sets)):
        other = known.setdefault(set_name(name), name)
        if not same_data(name, other, config.data.dir):
            raise UserError(
                f"data.train, eval.sets and validation.sets name two sets {set_name(name)!r}, {other!r} and "
                f"{name!r}; a name must mean one set, so give each its own, or put them into one "
                "folder as train.jsonl, validation.jsonl and test.jsonl"
            )


def trained_on(config: Settings) -> tuple[str, ...]:
    """The names of the training set: that in data.train, then those of the same data in eval.sets."""
    return names_of_same(config.data.train, config.eval.sets, config.data.dir)


def headline(inputs: Inputs, config: Settings, directory: Path, start: int) -> str:
    """The first line on the console: what is trained, from which step, and where."""
    what = f"resumes after step {start}" if start else f"{config.steps} steps"
    name = trained_on(config)[0]
    return f"{config.name}: {len(inputs.train)} problems of {name}, {what}, in {directory}"


def check_kinds(config: Settings, problems: Sequence[Problem]) -> None:
    """Raises UserError for the first problem that needs the user's reward function, if there is none."""
    own = next((problem.uid for problem in problems if problem.kind == "own"), None)
    if own and config.rewards in get_args(Mode):
        raise UserError(
            f"rewards is {config.rewards!r}, and the kind of problem {own} is 'own'; set rewards to the "
            "MODULE:FUNCTION that grades it, or change the kind"
        )


def check_lengths(config: Settings, model: Qwen3Config) -> None:
    """Raises UserError if the longest possible sequence exceeds the model's positions or the KV cache.

    Also if a step has more tokens than devices can count.
    """
    longest = {
        "rollout.max_new_tokens": config.data.max_prompt_tokens + config.rollout.max_new_tokens,
        "eval.max_new_tokens": config.data.max_prompt_tokens + config.eval.max_new_tokens,
    }
    if config.reflects:
        reflections = config.reflect.max_prompt_tokens + config.reflect.max_new_tokens
        longest["reflect.max_new_tokens"] = reflections
    if config.distills:
        taught = config.lesson.max_teacher_tokens + config.rollout.max_new_tokens
        longest["lesson.max_teacher_tokens"] = taught
    for field, tokens in longest.items():
        if tokens > model.max_position_embeddings:
            raise UserError(
                f"{field} makes sequences of up to {tokens} tokens; the model has "
                f"{model.max_position_embeddings} positions, so lower it or the prompt limit"
            )
    sizes = {
        "batch.prompts x batch.samples x rollout.max_new_tokens": config.rows * config.rollout.max_new_tokens,
        "eval.batch x eval.max_new_tokens": config.eval.batch * config.eval.max_new_tokens,
        "batch.device_rows x the longest sequence": config.batch.device_rows * max(longest.values()),
    }
    for field, tokens in sizes.items():
        if tokens >= 2**31:
            raise UserError(f"{field} is {tokens}; it must be below 2**31, because devices count in 32 bits")
    for section in (config.rollout, config.reflect, config.eval):
        cache_pages(config, section.max_new_tokens)
    for field in ("data.max_prompt_tokens", "reflect.max_prompt_tokens"):
        longest_prompt = value(config, field)
        if longest_prompt > config.rollout.prompt_tokens // LONGEST_PAGE * LONGEST_PAGE:
            raise UserError(
                f"rollout.prompt_tokens is {config.rollout.prompt_tokens}; a single prompt may have "
                f"{field} = {longest_prompt}, so raise rollout.prompt_tokens or lower {field}"
            )
