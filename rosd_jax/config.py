"""From a config file to validated settings: presets of the method, variants, and the rules between fields.

A file in configs/ starts from `default_config()` (the `paper` preset), states what differs, and returns
it; `use_preset(config, name)` sets every field of the method to another column of `METHOD`. `validate`
runs before any device is touched and gives the `Settings` that all other code reads (settings.py has the
fields).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rosd_jax.fields import defaults, describe, from_config, value
from rosd_jax.settings import LAYERS, LoraSettings, Settings, UserError

T = TypeVar("T")
Draft: TypeAlias = Any  # a ConfigDict as config files and flags change it; `validate` makes Settings of it

PRESETS = ("paper", "span", "official")

# The method, field by field: one column per preset, in the order of PRESETS. Sources of the columns:
#
# paper     arXiv 2605.28014v1 according to two independent reading notes (the PDF was not available):
#           the loss and the tokens it applies to, equations 7 to 9; settings, table 4; reflecting,
#           appendix B (places assigned by subject, not checked). If they are silent, the released code's
#           value, provided that it is sound.
# span      v1's abstract to the letter, "the first erroneous span" (`paper`, except the two lines marked *)
# official  the released PyTorch code (ZiqiZhao1/ROSD) as it runs; docs/differences.md lists its defects
METHOD: dict[str, tuple[Any, Any, Any]] = {
    # Rollouts (table 4). rewards: the paper names its checkers only; "official" are the released ones.
    "data.max_prompt_tokens": (2048, 2048, 2048),
    "batch.prompts": (32, 32, 32),
    "batch.samples": (8, 8, 8),
    "rollout.temperature": (1.0, 1.0, 1.0),
    "rollout.top_p": (1.0, 1.0, 1.0),
    "rollout.max_new_tokens": (8192, 8192, 8192),
    "thinking.student": (False, False, False),
    "thinking.reflector": (False, False, False),
    "thinking.teacher": (False, False, False),
    "rewards": ("fixed", "fixed", "official"),
    # The reflector (appendix B): the frozen initial model, greedy, which sees the shortest correct rollout
    # of the group. On overlong and uniform_groups the paper is silent.
    "reflect.weights": ("frozen", "frozen", "student"),
    "reflect.temperature": (0.0, 0.0, 1.0),
    "reflect.max_prompt_tokens": (8192, 8192, 2048),
    "reflect.max_new_tokens": (4096, 4096, 8192),
    "reflect.overlong": ("skip", "skip", "cut"),
    "reflect.solution": ("shortest", "shortest", "first"),
    "reflect.correct": (True, True, True),
    "reflect.uniform_groups": (False, False, True),
    # The tokens in the loss (equations 7 to 9): k = Locate(quote, response), and the mask is 1 for t >= k.
    # Without a match k = 0. Correct rollouts: all tokens.
    "lesson.region": ("suffix", "span", "suffix"),  # *
    "lesson.quote_missing": ("full", "skip", "full"),  # *
    "lesson.locate": ("offsets", "offsets", "reencode"),
    # What the teacher sees (equations 7 to 9): the problem and the idea. On a rollout without an idea the
    # paper is silent.
    "lesson.teacher_context": ("idea", "idea", "idea_or_solution"),
    "lesson.gold_in_idea": ("keep", "keep", "keep"),
    "lesson.max_teacher_tokens": (10240, 10240, 10240),
    # The divergence (equations 7 to 9, table 4): JSD, alpha .5, over the student's top 100 and a tail bucket.
    "loss.topk": (100, 100, 100),
    "loss.alpha": (0.5, 0.5, 0.5),
    "loss.tail": ("bucket", "bucket", "bucket"),
    "loss.ratio_cap": (2.0, 2.0, 2.0),
    # The optimizer (table 4): AdamW at 1e-5 after 10 warm-up steps.
    "optimizer.lr": (1e-5, 1e-5, 1e-5),
    "optimizer.warmup_steps": (10, 10, 10),
    "optimizer.warmup_from_zero": (False, False, True),
    "optimizer.b1": (0.9, 0.9, 0.9),
    "optimizer.b2": (0.999, 0.999, 0.999),
    "optimizer.eps": (1e-8, 1e-8, 1e-8),
    "optimizer.weight_decay": (0.01, 0.01, 0.01),
    "optimizer.clip_norm": (1.0, 1.0, 1.0),
    "optimizer.empty_batch": ("skip", "skip", "step"),
}


def default_config() -> Draft:
    """The paper's main run: the `paper` preset, and the defaults of all other fields."""
    tree = defaults()
    for field, values in METHOD.items():
        *sections, last = field.split(".")
        section = tree
        for part in sections:
            section = section[part]
        section[last] = values[0]
    # A field that may be null needs its other type here, which flags are checked against.
    tree["rollout"] |= {"slots": placeholder(int), "attention": placeholder(str)}
    return ConfigDict(tree, convert_dict=True)


def use_preset(config: Draft, name: str) -> Draft:
    """Sets every field of the method to the column `name` of METHOD, and returns the config."""
    column = PRESETS.index(name)
    config.update_from_flattened_dict({field: values[column] for field, values in METHOD.items()})
    return config


def parse_variant(arg: str | None, known: Iterable[str]) -> tuple[str, ...]:
    """Splits the `:a,b` after a config path. Raises UserError for a name not in `known`."""
    names = tuple(name for name in (arg or "").split(",") if name)
    known = tuple(known)
    for name in names:
        if name not in known:
            raise UserError(f"config variant is {name!r}; it must be one of {', '.join(known)}")
    return names


def choose_one(variants: Sequence[str], choices: Iterable[str], default: T) -> str | T:
    """The one of `choices` among the variants. Raises UserError if there are several."""
    named = [name for name in variants if name in tuple(choices)]
    if len(named) > 1:
        raise UserError(f"config variant names {' and '.join(named)}; name one of them")
    return named[0] if named else default


AT_LEAST_ONE = (
    "batch.prompts",
    "batch.device_rows",
    "rollout.max_new_tokens",
    "reflect.max_new_tokens",
    "reflect.max_prompt_tokens",
    "data.max_prompt_tokens",
    "lesson.max_teacher_tokens",
    "loss.topk",
    "loss.chunk",
    "eval.samples",
    "eval.batch",
    "eval.max_new_tokens",
    "rollout.cache_tokens",
    "rollout.prompt_tokens",
    "checkpoint.every",
    "checkpoint.keep",
    "steps",
)
AT_LEAST_ZERO = ("eval.limit", "eval.every", "validation.every", "optimizer.warmup_steps", "seed")


def validate(config: ConfigDict) -> Settings:
    """The config as settings. Raises UserError for the first field that breaks a rule.

    Touches no device and no file.
    """
    settings = from_config(config)
    _validate_counts(settings)
    _validate_own(settings)
    _validate_lora(settings.model.lora)
    _validate_sampling(settings)
    _validate_training(settings)
    return settings


def _validate_counts(settings: Settings) -> None:
    for field in AT_LEAST_ONE:
        _require(field, value(settings, field), value(settings, field) >= 1, "be at least 1")
    for field in AT_LEAST_ZERO:
        _require(field, value(settings, field), value(settings, field) >= 0, "be 0 or more")
    slots, samples, seed = settings.rollout.slots, settings.batch.samples, settings.seed
    _require("rollout.slots", slots, slots is None or slots >= 1, "be at least 1, or null for all rows")
    _require("batch.samples", samples, samples >= 2, "be at least 2, since the reflector compares siblings")
    _require("seed", seed, seed < 2**32, "be below 2**32")


def _validate_own(settings: Settings) -> None:
    """What users may bring themselves: a reward function, a wording, stop strings."""
    rewards, wording, stop = settings.rewards, settings.wording, settings.rollout.stop
    function = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", rewards)
    known = rewards in ("fixed", "official") or function is not None
    _require("rewards", rewards, known, "be fixed, official or MODULE:FUNCTION, a function of your own")
    known = wording in ("english", "gym") or wording.endswith(".toml")
    _require("wording", wording, known, "be english, gym or the path of a .toml file of your own")
    _require("rollout.stop", stop, all(map(_is_text, stop)), "hold strings of text that are not empty")
    timeout = settings.reward_timeout
    _require("reward_timeout", timeout, 0 < timeout < float("inf"), "be above 0 and finite")


def _is_text(x: Any) -> bool:
    """Not empty, and nothing in it that UTF-8 cannot hold."""
    return isinstance(x, str) and x.encode("utf-8", "ignore").decode() == x != ""


def _validate_lora(lora: LoraSettings) -> None:
    _require("model.lora.rank", lora.rank, lora.rank >= 0, "be 0 (all weights are trained) or more")
    _require("model.lora.alpha", lora.alpha, 0 < lora.alpha < float("inf"), "be above 0 and finite")
    once = len(set(lora.targets)) == len(lora.targets) > 0
    known = once and set(lora.targets) <= set(LAYERS)
    _require("model.lora.targets", lora.targets, known, f"name some of {', '.join(LAYERS)}, each once")


def _validate_sampling(settings: Settings) -> None:
    rollout, evaluation = settings.rollout, settings.eval
    for field in ("rollout.temperature", "eval.temperature", "reflect.temperature"):
        _require(field, value(settings, field), value(settings, field) >= 0, "be 0 (greedy) or more")
    above = rollout.temperature > 0
    rule = "be above 0, since rollouts of one prompt must differ"
    _require("rollout.temperature", rollout.temperature, above, rule)
    rule = "be 1 in training, since the sampler's log-probs are those of the whole distribution"
    _require("rollout.top_p", rollout.top_p, rollout.top_p == 1.0, rule)
    _require("eval.top_p", evaluation.top_p, 0 < evaluation.top_p <= 1, "lie in (0, 1]")


def _validate_training(settings: Settings) -> None:
    loss, optimizer = settings.loss, settings.optimizer
    _require("loss.alpha", loss.alpha, 0 <= loss.alpha <= 1, "lie in [0, 1]")
    _require("loss.ratio_cap", loss.ratio_cap, loss.ratio_cap > 0, "be above 0")
    for field in ("optimizer.lr", "optimizer.clip_norm", "optimizer.eps"):
        finite = 0 < value(settings, field) < float("inf")
        _require(field, value(settings, field), finite, "be above 0 and finite")
    for field in ("optimizer.b1", "optimizer.b2"):
        _require(field, value(settings, field), 0 <= value(settings, field) < 1, "lie in [0, 1)")
    decay = optimizer.weight_decay
    _require("optimizer.weight_decay", decay, decay >= 0, "be 0 or more")
    for field in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        devices = value(settings, field)
        _require(field, devices, devices >= 1 or devices == -1, "be at least 1, or -1 for the rest")


def _require(field: str, given: Any, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{field} is {given!r}; it must {rule}")


PAGE = """# Fields of a config

Each field is a flag too: `--config.FIELD=VALUE`. `python -m rosd_jax.config` writes this page from
rosd_jax/settings.py. A field of the method has a value in each preset: paper / span / official, or one
value where all three agree.

| field | type | default | meaning |
|---|---|---|---|
"""


def fields_page() -> str:
    """docs/fields.md: every field with its type, its default or its value in each preset, and its text."""
    lines = []
    for field in describe():
        values = METHOD.get(field.name, (field.default,))
        values = values[:1] if len(set(values)) == 1 else values
        shown = " / ".join(f"`{_as_flag(x)}`" for x in values)
        lines.append(f"| `{field.name}` | {field.type} | {shown} | {field.text} |\n")
    return PAGE + "".join(lines)


def _as_flag(x: Any) -> str:
    """As it is written on the command line."""
    if isinstance(x, tuple):
        return ",".join(x) or "()"
    return x or '""' if isinstance(x, str) else json.dumps(x)


if __name__ == "__main__":
    print(fields_page(), end="")
