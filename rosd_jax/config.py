"""From a config file to validated settings: presets of the method, variants, and rules for fields.

A file in configs/ starts from `default_config()` (the `paper` preset), changes what differs, and returns it.
`use_preset(config, name)` sets every field of the method to another column of `METHOD`, or to one of
`OTHERS`. `validate` runs before any device is touched and returns the `Settings` that all other code reads;
settings.py has the fields.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

import numpy as np
from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from rosd_jax.errors import UserError
from rosd_jax.fields import defaults, describe, from_config, shown, value
from rosd_jax.settings import LAYERS, TEMPERATURE_RULE, TRACKERS, LoraSettings, Settings, is_temperature

T = TypeVar("T")
Draft: TypeAlias = Any  # a ConfigDict that config files and flags may still change, until `validate`

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
    "method": ("rosd", "rosd", "rosd"),
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
    # The frozen initial model teaches. Groups with equal rewards are left out, as in the released code.
    "lesson.teacher_weights": ("frozen", "frozen", "frozen"),
    "lesson.ema_rate": (0.05, 0.05, 0.05),
    "lesson.uniform_groups": (False, False, False),
    # The divergence (equations 7 to 9, table 4): JSD, alpha .5, over the student's top 100 and a tail bucket.
    "loss.topk": (100, 100, 100),
    "loss.alpha": (0.5, 0.5, 0.5),
    "loss.tail": ("bucket", "bucket", "bucket"),
    "loss.ratio_cap": (2.0, 2.0, 2.0),
    # No policy gradient: rewards only choose which rollouts are reflected.
    "policy.advantage": ("none", "none", "none"),
    "policy.normalise": ("token", "token", "token"),
    "policy.weight": (1.0, 1.0, 1.0),
    "policy.rows": ("all", "all", "all"),
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

# Methods to compare ROSD with: the `span` column, except these fields. Data, batch and optimizer are the same
# for all, so that only the loss differs. A clipped ratio to the policy that sampled is missing on purpose: a
# batch gets one optimizer step, so that ratio is 1. docs/methods.md says more.
#
# sdpo         SDPO (arXiv 2601.20802), without environment feedback, as its released code (lasgroup/SDPO,
#              commit 0e6d510) trains on the same data sets: run_sdpo_all.sh, sdpo.yaml and actor.yaml. The
#              teacher sees the first other right rollout, for right rollouts too (ray_trainer.py:
#              _get_solution, dont_reprompt_on_self_success). No group is left out for equal rewards. The
#              teacher's weights are an EMA, teacher_update_rate .05 (dp_actor.py: _update_teacher). As in
#              `span`: distillation_topk 100 and a tail, alpha .5, is_clip and rollout_is_threshold 2,
#              max_reprompt_len 10240. The paper's formula is KL(student || teacher), which is alpha 1
# grpo         DeepSeekMath (arXiv 2402.03300), without its KL term
# dr_grpo      Dr. GRPO (arXiv 2503.20783)
# dapo_loss    DAPO (arXiv 2503.14476): its loss, without dynamic sampling and overlong shaping
# grpo_strong  the GRPO baseline of the released PyTorch code (baseline_grpo.yaml): advantages without the
#              standard deviation, as in Dr. GRPO; the token mean of DAPO
# rosd_grpo    ours: ROSD on the wrong rollouts that it can teach, grpo_strong on all others
OTHERS: dict[str, dict[str, Any]] = {
    "sdpo": {
        "reflect.solution": "first",
        "lesson.region": "full",
        "lesson.teacher_context": "solution",
        "lesson.teacher_weights": "ema",
        "lesson.uniform_groups": True,
    },
    "grpo": {
        "lesson.teacher_context": "none",
        "policy.advantage": "std",
        "policy.normalise": "sequence",
    },
    "dr_grpo": {
        "lesson.teacher_context": "none",
        "policy.advantage": "mean",
        "policy.normalise": "constant",
    },
    "dapo_loss": {
        "lesson.teacher_context": "none",
        "policy.advantage": "std",
        "policy.normalise": "token",
    },
    "grpo_strong": {
        "lesson.teacher_context": "none",
        "policy.advantage": "mean",
        "policy.normalise": "token",
    },
    "rosd_grpo": {
        "reflect.correct": False,
        "policy.advantage": "mean",
        "policy.normalise": "token",
        "policy.rows": "untaught",
    },
}
METHODS = (*PRESETS, *OTHERS)  # the names that a config file accepts


def default_config() -> Draft:
    """The paper's main run: the `paper` preset, and the defaults of all other fields."""
    tree = defaults()
    for field, given in preset("paper").items():
        *sections, last = field.split(".")
        section = tree
        for part in sections:
            section = section[part]
        section[last] = given
    # A field whose default is null needs its other type here, so that flags can be parsed and checked.
    tree["rollout"] |= {"slots": placeholder(int), "attention": placeholder(str)}
    return ConfigDict(tree, convert_dict=True)


def preset(name: str) -> dict[str, Any]:
    """Every field of the method by name, in the preset or the other method `name`, one of METHODS."""
    column = PRESETS.index("span" if name in OTHERS else name)
    fields = {field: values[column] for field, values in METHOD.items()}
    if name in OTHERS:
        fields |= {"method": name, **OTHERS[name]}
    return fields


def use_preset(config: Draft, name: str) -> Draft:
    """Sets every field of the method to its value in `preset(name)`, and returns the config."""
    config.update_from_flattened_dict(preset(name))
    return config


def parse_variant(arg: str | None, known: Iterable[str]) -> tuple[str, ...]:
    """Splits `a,b`, the part after the colon of --config. Raises UserError for a name not in `known`."""
    names = tuple(name for name in (arg or "").split(",") if name)
    known = tuple(known)
    for name in names:
        if name not in known:
            raise UserError(f"config variant is {name!r}; it must be one of {', '.join(known)}")
    return names


def choose_one(variants: Sequence[str], choices: Iterable[str], default: T) -> str | T:
    """The one variant that is among `choices`, else `default`. Raises UserError if there are several."""
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
PATHS = ("model.path", "data.dir", "wording", "compile_cache")
LONGEST_NAME = 255  # bytes of one part of a path, on all common file systems
LONGEST_PATH = 3584  # bytes of a path: Linux allows 4095, of which a run's own files take some
PATH_RULE = f"be a path of at most {LONGEST_PATH} bytes, and each name in it of at most {LONGEST_NAME}"
TINY = float(np.finfo(np.float32).tiny)  # the smallest normal number
HUGE = float(np.finfo(np.float32).max)


def validate(config: ConfigDict) -> Settings:
    """Converts a config to settings. Raises UserError for the first field that breaks a rule.

    Reads no file and touches no device.
    """
    settings = from_config(config)
    _validate_counts(settings)
    _validate_paths(settings)
    _validate_task(settings)
    _validate_lora(settings.model.lora)
    _validate_sampling(settings)
    _validate_training(settings)
    _validate_method(settings)
    _validate_ablation(settings)
    _validate_guard(settings)
    return settings


def _validate_counts(settings: Settings) -> None:
    for field in describe():
        count = value(settings, field.name)
        if type(count) is int and field.name != "seed":
            small = abs(count) < 2**31
            _require(field.name, count, small, "be below 2**31, because devices count in 32 bits")
    for field in AT_LEAST_ONE:
        count = value(settings, field)
        _require(field, count, count >= 1, "be at least 1")
    for field in AT_LEAST_ZERO:
        count = value(settings, field)
        _require(field, count, count >= 0, "be 0 or more")
    slots = settings.rollout.slots
    samples = settings.batch.samples
    seed = settings.seed
    _require("rollout.slots", slots, slots is None or slots >= 1, "be at least 1, or null for all rows")
    _require("batch.samples", samples, samples >= 2, "be at least 2, since the reflector compares siblings")
    _require("seed", seed, seed < 2**32, "be below 2**32")
    rollouts = settings.steps * settings.rows
    rule = "be at most 2**31, because each rollout has its own random numbers, which 31 bits tell apart"
    _require("steps x batch.prompts x batch.samples", rollouts, rollouts <= 2**31, rule)


def _validate_paths(settings: Settings) -> None:
    for field in PATHS:
        path = value(settings, field)
        _require(field, path, path_fits(path), PATH_RULE)


def path_fits(path: str) -> bool:
    """Whether a file system can hold this path, and a run's files below it. Looks at no file."""
    try:
        absolute = os.path.abspath(os.fsencode(os.path.expanduser(path)))
    except UnicodeEncodeError:
        return False
    parts = absolute.split(b"/")
    return b"\0" not in absolute and len(absolute) <= LONGEST_PATH and max(map(len, parts)) <= LONGEST_NAME


def _validate_task(settings: Settings) -> None:
    """What users may bring for their own task: a reward function, a wording, stop strings."""
    rewards = settings.rewards
    function = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", rewards)
    known = rewards in ("fixed", "official") or function is not None
    _require("rewards", rewards, known, "be fixed, official or MODULE:FUNCTION, a function of your own")
    wording = settings.wording
    known = wording in ("english", "gym") or wording.endswith(".toml")
    _require("wording", wording, known, "be english, gym or the path of a .toml file of your own")
    stop = settings.rollout.stop
    _require("rollout.stop", stop, all(map(_is_text, stop)), "contain only strings that are not empty")
    trackers = settings.trackers
    known = all(name in TRACKERS and trackers.count(name) == 1 for name in trackers)
    _require("trackers", trackers, known, f"name some of {', '.join(TRACKERS)}, each once")
    timeout = settings.reward_timeout
    _require("reward_timeout", timeout, 0 < timeout <= 3600, "be above 0 and at most 3600")


def _is_text(x: Any) -> bool:
    """Whether x is a string that is not empty and can be encoded in UTF-8 (a lone surrogate cannot)."""
    return isinstance(x, str) and x != "" and x.encode("utf-8", "ignore").decode() == x


def _validate_lora(lora: LoraSettings) -> None:
    _require("model.lora.rank", lora.rank, lora.rank >= 0, "be 0 (all weights are trained) or more")
    scale = _single(lora.alpha / max(1, lora.rank))
    rule = "be above 0 and finite, also divided by model.lora.rank, in float32"
    _require("model.lora.alpha", lora.alpha, 0 < scale and _single(lora.alpha) < float("inf"), rule)
    targets = lora.targets
    known = all(name in LAYERS and targets.count(name) == 1 for name in targets)
    rule = f"name some of {', '.join(LAYERS)}, each once"
    _require("model.lora.targets", targets, known and len(targets) > 0, rule)


def _validate_sampling(settings: Settings) -> None:
    for field in ("rollout.temperature", "eval.temperature", "reflect.temperature"):
        temperature = value(settings, field)
        _require(field, temperature, is_temperature(temperature), TEMPERATURE_RULE)
    temperature = settings.rollout.temperature
    rule = "be above 0, since rollouts of one prompt must differ"
    _require("rollout.temperature", temperature, temperature > 0, rule)
    top_p = settings.rollout.top_p
    rule = "be 1 in training, since the sampler's log-probs are those of the whole distribution"
    _require("rollout.top_p", top_p, top_p == 1.0, rule)
    top_p = settings.eval.top_p
    _require("eval.top_p", top_p, 0 < _single(top_p) and top_p <= 1, "lie in (0, 1], also in float32")


def _validate_training(settings: Settings) -> None:
    loss = settings.loss
    _require("loss.alpha", loss.alpha, 0 <= loss.alpha <= 1, "lie in [0, 1]")
    _require("loss.ratio_cap", loss.ratio_cap, _single(loss.ratio_cap) > 0, "be above 0, also in float32")
    for field in ("optimizer.lr", "optimizer.clip_norm", "optimizer.eps"):
        number = value(settings, field)
        _require(field, number, 0 < _single(number) < float("inf"), "be above 0 and finite, also in float32")
    for field in ("optimizer.b1", "optimizer.b2"):
        decay = value(settings, field)
        _require(field, decay, 0 <= decay and _single(decay) < 1, "lie in [0, 1), also in float32")
    decay = settings.optimizer.weight_decay
    rule = "be 0 or more and finite, also in float32"
    _require("optimizer.weight_decay", decay, decay >= 0 and _single(decay) < float("inf"), rule)
    for field in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        devices = value(settings, field)
        _require(
            field, devices, devices >= 1 or devices == -1, "be at least 1, or -1 for all remaining devices"
        )


def _validate_method(settings: Settings) -> None:
    """What the two parts of a method, the distillation and the policy gradient, need of each other."""
    policy = settings.policy
    weighs = 0 < _single(policy.weight) < math.inf
    _require("policy.weight", policy.weight, weighs, "be above 0 and finite, also in float32")
    learns = settings.distills or settings.reinforces
    rule = "be std or mean if lesson.teacher_context is none, since there is nothing else to learn from"
    _require("policy.advantage", policy.advantage, learns, rule)
    both = settings.distills and settings.reinforces
    rule = (
        "be all if lesson.teacher_context or policy.advantage is none, since it divides rollouts between both"
    )
    _require("policy.rows", policy.rows, both or policy.rows == "all", rule)
    lesson = settings.lesson
    rate = lesson.ema_rate
    _require("lesson.ema_rate", rate, 0 < _single(rate) <= 1, "lie in (0, 1], also in float32")
    teaches = settings.distills or not settings.averages
    rule = "be frozen if lesson.teacher_context is none, since there is no teacher"
    _require("lesson.teacher_weights", lesson.teacher_weights, teaches, rule)
    name = settings.method
    usual = preset("span" if name == "rosd" else name)
    for field in ("lesson.teacher_context", "policy.advantage"):
        given = value(settings, field)
        if (given == "none") != (usual[field] == "none"):
            raise UserError(
                f"method is {name!r}, whose {field} is {usual[field]}, and {field} is {given}; choose a "
                "method by its preset, such as --config=configs/quickstart.py:grpo, which sets all its fields"
            )


def _validate_ablation(settings: Settings) -> None:
    """Shares lie in [0, 1], and what an ablation replaces is used."""
    region = settings.lesson.region
    context = settings.lesson.teacher_context
    for field in ("ablation.moved_spans", "ablation.swapped_ideas"):
        share = value(settings, field)
        _require(field, share, 0 <= share <= 1, "lie in [0, 1]")
    spans = settings.distills and region != "full"
    ideas = context in ("idea", "idea_or_solution")
    used = {"moved_spans": spans, "oracle_spans": spans, "swapped_ideas": ideas, "oracle_ideas": ideas}
    for name, is_used in used.items():
        given = getattr(settings.ablation, name)
        unused = "span" if name.endswith("spans") else "idea"
        rule = (
            f"be {type(given)()} with lesson.region={region} and lesson.teacher_context={context}, which use "
            f"no {unused}"
        )
        _require(f"ablation.{name}", given, is_used or not given, rule)


def _validate_guard(settings: Settings) -> None:
    for field in ("guard.reward", "guard.entropy", "guard.length"):
        share = value(settings, field)
        _require(field, share, 0 <= share < 1, "lie in [0, 1)")


def _single(number: float) -> float:
    """The number as devices compute with it, in float32.

    What is beyond the normal numbers of float32 becomes 0 or infinite, as XLA's compilers may have it.
    """
    if abs(number) < TINY:
        return 0.0
    return math.copysign(math.inf, number) if abs(number) > HUGE else float(np.float32(number))


def _require(field: str, given: Any, is_met: bool, rule: str) -> None:
    if not is_met:
        raise UserError(f"{field} is {shown(given)}; it must {rule}")


PAGE = """# Fields of a config

Each field is also a flag: `--config.FIELD=VALUE`. (`null` is None, which a config file may set and a flag
may not.) A field of the method has a value in each preset (paper /
span / official), or a single one if all three are equal. `python -m rosd_jax.config` writes this page from
rosd_jax/settings.py.

| field | type | default | meaning |
|---|---|---|---|
"""


def fields_page() -> str:
    """The text of docs/fields.md: every field with its type, default or presets' values, and meaning."""
    lines = []
    for field in describe():
        values = METHOD.get(field.name, (field.default,))
        if len(set(values)) == 1:
            values = values[:1]
        shown = " / ".join(f"`{_as_flag(x)}`" for x in values)
        lines.append(f"| `{field.name}` | {field.type} | {shown} | {field.text} |\n")
    return PAGE + "".join(lines)


def _as_flag(x: Any) -> str:
    """A value as a flag takes it; `null` is None, which no flag gives."""
    if isinstance(x, tuple):
        return repr(x)
    if isinstance(x, str):
        return x or '""'
    return json.dumps(x)


if __name__ == "__main__":
    print(fields_page(), end="")
