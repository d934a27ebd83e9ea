"""Every field of an experiment with its default, and the rules between fields.

A file in configs/ starts from `default_config()` (the `paper` preset), states what differs, and returns
it; `use_preset(config, name)` sets every field of the method to another column of `METHOD`. `validate`
runs before any device is touched.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias, TypeVar

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

T = TypeVar("T")
Config: TypeAlias = Any  # an ml_collections.ConfigDict, whose fields no type checker can see

CHOICES = {
    "reflect.weights": ("frozen", "student"),
    "reflect.overlong": ("skip", "cut"),
    "reflect.solution": ("shortest", "first"),
    "lesson.region": ("span", "suffix", "full"),
    "lesson.quote_missing": ("skip", "full"),
    "lesson.locate": ("offsets", "reencode"),
    "lesson.teacher_context": ("idea", "idea_or_solution", "solution"),
    "lesson.gold_in_idea": ("keep", "strip"),
    "loss.tail": ("bucket", "renorm"),
    "optimizer.empty_batch": ("skip", "step"),
    "model.dtype": ("float32", "bfloat16"),
    "model.remat": ("none", "block", "attention", "offload"),
    "model.frozen": ("device", "host"),
    "optimizer.mu_dtype": ("float32", "bfloat16"),
    "optimizer.grad_dtype": ("float32", "bfloat16"),
    "method": ("rosd",),
    "rollout.attention": (None, "xla", "ragged_tpu", "pallas_tpu", "pallas_gpu"),
}

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # that may adapt
PRESETS = ("paper", "span", "official")

# The method, field by field: one column a preset, in the order of PRESETS. Sources of the columns:
#
# paper     arXiv 2605.28014v1 as two independent reading notes give it (the PDF was not at hand while
#           this was written): where the loss lies and what it is, equations 7 to 9; settings, table 4;
#           reflecting, appendix B (places assigned by subject, not checked). Where they are silent, the
#           released code's value if it is sound.
# span      v1's abstract to the letter, "the first erroneous span" ("paper" but for the two lines marked *)
# official  the released PyTorch code (ZiqiZhao1/ROSD) as it runs; docs/differences.md has its defects
METHOD: dict[str, tuple[Any, Any, Any]] = {
    # Rollouts (table 4). rewards: the paper names its checkers only; "release" are the released ones.
    "data.max_prompt_tokens": (2048, 2048, 2048),
    "batch.prompts": (32, 32, 32),
    "batch.samples": (8, 8, 8),
    "rollout.temperature": (1.0, 1.0, 1.0),
    "rollout.top_p": (1.0, 1.0, 1.0),
    "rollout.max_new_tokens": (8192, 8192, 8192),
    "thinking.student": (False, False, False),
    "thinking.reflector": (False, False, False),
    "thinking.teacher": (False, False, False),
    "rewards": ("fixed", "fixed", "release"),
    # The reflector (appendix B): the frozen initial model, greedy. It is shown the shortest correct
    # rollout of the group. overlong, uniform_groups: the paper is silent.
    "reflect.weights": ("frozen", "frozen", "student"),
    "reflect.temperature": (0.0, 0.0, 1.0),
    "reflect.max_prompt_tokens": (8192, 8192, 2048),
    "reflect.max_new_tokens": (4096, 4096, 8192),
    "reflect.overlong": ("skip", "skip", "cut"),
    "reflect.solution": ("shortest", "shortest", "first"),
    "reflect.correct": (True, True, True),
    "reflect.uniform_groups": (False, False, True),
    # Where the loss lies (equations 7 to 9): k = Locate(quote, response), the mask is 1 for t >= k; no
    # match: k = 0; correct rollouts: all tokens.
    "lesson.region": ("suffix", "span", "suffix"),  # *
    "lesson.quote_missing": ("full", "skip", "full"),  # *
    "lesson.locate": ("offsets", "offsets", "reencode"),
    # What the teacher sees (equations 7 to 9): the problem and the idea. The paper is silent on a rollout
    # without an idea.
    "lesson.teacher_context": ("idea", "idea", "idea_or_solution"),
    "lesson.gold_in_idea": ("keep", "keep", "keep"),
    "lesson.max_teacher_tokens": (10240, 10240, 10240),
    # The divergence (equations 7 to 9, table 4): JSD, alpha .5, over the student's top 100 and a tail bucket.
    "loss.topk": (100, 100, 100),
    "loss.alpha": (0.5, 0.5, 0.5),
    "loss.tail": ("bucket", "bucket", "bucket"),
    "loss.ratio_cap": (2.0, 2.0, 2.0),
    # The optimizer (table 4): AdamW at 1e-5 after 10 steps of warm-up.
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


class UserError(ValueError):
    """A mistake the user can correct: one sentence naming field, value, rule and remedy."""


def default_config() -> Config:
    """The paper's main run: the `paper` preset, and the fields that are not of the method."""
    config = ConfigDict(
        dict(
            name="",
            method="rosd",
            seed=0,
            steps=100,
            wording="english",  # "gym": in the shipped tiny model's closed vocabulary; or a file, PATH.toml
            reward_timeout=5.0,  # CPU seconds to grade a response; over it the response scores 0
            # -1: all remaining devices. Under data=-1 each core of a CPU is a device, where rows suffice.
            mesh=dict(data=1, fsdp=-1, tensor=1),
            # remat: what the backward pass computes again. none: nothing; block: each layer; attention: each
            # layer but its attention; offload: each layer, whose inputs wait in the host's memory.
            # frozen: where the frozen tree lies; on the host it takes no memory of the device but in use.
            # lora: rank 0: all weights learn; else only adapters of the targets' kernels, times alpha / rank.
            model=dict(
                path="",
                dtype="bfloat16",
                remat="block",
                frozen="device",
                lora=dict(rank=0, alpha=32.0, targets=LAYERS),
            ),
            data=dict(dir="", train=""),
            batch=dict(device_rows=1),  # rows of each row device in one forward and backward pass
            thinking=dict(),
            # slots: rollouts (and reflections) decoded together, those that end make room; null: all
            # cache_tokens: response tokens with room in the cache of each row device, in evaluation too;
            # where they run out, the youngest responses wait and start anew
            rollout=dict(
                stop=(),  # texts that end a response as a stop token does, in evaluation too
                slots=placeholder(int),
                cache_tokens=2**16,  # a quarter of 32 rollouts of 8192
                prompt_tokens=2**16,  # of different prompts with room there besides; more take turns
                attention=placeholder(str),  # a decoding step's; null: by platform
            ),
            reflect=dict(),
            lesson=dict(),
            loss=dict(chunk=1024),
            # of AdamW's first moment, and of the sum of gradients
            optimizer=dict(mu_dtype="float32", grad_dtype="float32"),
            compile_cache="~/.cache/rosd_jax/compiled",  # compiled programs, for later starts; "": none
            # Sets whose mean avg@k chooses the best step, on a split that is neither trained on nor
            # reported; "": no step is chosen. Scored before, every so many steps (0: never) and at the end.
            validation=dict(sets="", every=10),
            eval=dict(
                sets="",  # names, separated by commas
                samples=16,
                limit=0,  # items a set; 0: all
                every=10,
                batch=256,  # rows decoded together, over all devices; those that end make room
                temperature=0.6,
                top_p=0.95,
                max_new_tokens=8192,
            ),
            checkpoint=dict(every=10, keep=2),
        ),
        convert_dict=True,
    )
    return use_preset(config, "paper")


def use_preset(config: Config, name: str) -> Config:
    """Sets every field of the method to the column of METHOD that bears the name, and returns the config."""
    column = PRESETS.index(name)
    for field, values in METHOD.items():
        *above, last = field.split(".")
        section = _get(config, ".".join(above)) if above else config
        section[last] = values[column]
    return config


def parse_variant(arg: str | None, known: Iterable[str]) -> tuple[str, ...]:
    """Splits the `:a,b` behind a config path. Raises UserError for a name not in `known`."""
    names = tuple(name for name in (arg or "").split(",") if name)
    known = tuple(known)
    for name in names:
        if name not in known:
            raise UserError(f"config variant is {name!r}; it must be one of {', '.join(known)}")
    return names


def choose_one(variants: Sequence[str], choices: Iterable[str], default: T) -> str | T:
    """The one of `choices` among the variants. Raises UserError where there are several."""
    named = [name for name in variants if name in tuple(choices)]
    if len(named) > 1:
        raise UserError(f"config variant names {' and '.join(named)}; name one of them")
    return named[0] if named else default


def validate(config: Config) -> None:
    """Raises UserError for the first field that breaks a rule. Touches no device and no file."""
    for field, allowed in CHOICES.items():
        value = _get(config, field)
        if value not in allowed:
            raise UserError(f"{field} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    positive = ("batch.prompts", "batch.samples", "batch.device_rows", "rollout.max_new_tokens",
                "reflect.max_new_tokens", "reflect.max_prompt_tokens", "data.max_prompt_tokens",
                "lesson.max_teacher_tokens", "loss.topk", "loss.chunk", "eval.samples", "eval.batch",
                "eval.max_new_tokens", "rollout.cache_tokens", "rollout.prompt_tokens",
                "checkpoint.every", "checkpoint.keep", "steps")  # fmt: skip
    for field in positive:
        _require(config, field, _get(config, field) >= 1, "be at least 1")
    slots = config.rollout.slots
    _require(config, "rollout.slots", slots is None or slots >= 1, "be at least 1, or null for all rows")
    for field in ("eval.limit", "eval.every", "validation.every", "optimizer.warmup_steps", "seed"):
        _require(config, field, _get(config, field) >= 0, "be 0 or more")
    _validate_own(config)
    _validate_lora(config)
    _validate_ranges(config)
    _validate_batch(config)


def _validate_own(config: Config) -> None:
    """What a user may bring: a reward function, a wording, stop strings."""
    rewards, wording, stop = config.rewards, config.wording, config.rollout.stop
    named = re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", rewards)
    _require(config, "rewards", rewards in ("fixed", "release") or named is not None,
             "be fixed, release or MODULE:FUNCTION, a function of your own")  # fmt: skip
    _require(config, "wording", wording in ("english", "gym") or wording.endswith(".toml"),
             "be english, gym or the path of a .toml file of your own")  # fmt: skip
    _require(config, "rollout.stop", all(map(_is_text, stop)), "hold strings of text that are not empty")
    _require(config, "reward_timeout", 0 < config.reward_timeout < float("inf"), "be above 0 and finite")


def _validate_lora(config: Config) -> None:
    lora = config.model.lora
    _require(config, "model.lora.rank", lora.rank >= 0, "be 0 (all weights learn) or more")
    _require(config, "model.lora.alpha", 0 < lora.alpha < float("inf"), "be above 0 and finite")
    named = all(lora.targets.count(name) == (name in LAYERS) for name in lora.targets) and lora.targets
    _require(config, "model.lora.targets", bool(named), f"name some of {', '.join(LAYERS)}, each once")


def _is_text(value: Any) -> bool:
    """Not empty, and nothing in it that UTF-8 cannot hold."""
    return isinstance(value, str) and value.encode("utf-8", "ignore").decode() == value != ""


def _validate_ranges(config: Config) -> None:
    for field in ("rollout.temperature", "eval.temperature", "reflect.temperature"):
        _require(config, field, _get(config, field) >= 0, "be 0 (greedy) or more")
    _require(config, "rollout.temperature", config.rollout.temperature > 0,
             "be above 0, since rollouts of one prompt must differ")  # fmt: skip
    _require(config, "rollout.top_p", config.rollout.top_p == 1.0,
             "be 1 in training, since the sampler's log-probs are of the whole distribution")  # fmt: skip
    _require(config, "eval.top_p", 0 < config.eval.top_p <= 1, "lie in (0, 1]")
    _require(config, "loss.alpha", 0 <= config.loss.alpha <= 1, "lie in [0, 1]")
    _require(config, "loss.ratio_cap", config.loss.ratio_cap > 0, "be above 0")
    for field in ("optimizer.lr", "optimizer.clip_norm", "optimizer.eps"):
        _require(config, field, 0 < _get(config, field) < float("inf"), "be above 0 and finite")
    for field in ("optimizer.b1", "optimizer.b2"):
        _require(config, field, 0 <= _get(config, field) < 1, "lie in [0, 1)")
    _require(config, "optimizer.weight_decay", config.optimizer.weight_decay >= 0, "be 0 or more")
    _require(config, "seed", config.seed < 2**32, "be below 2**32")
    for field in ("mesh.data", "mesh.fsdp", "mesh.tensor"):
        value = _get(config, field)
        _require(config, field, value >= 1 or value == -1, "be at least 1, or -1 for the rest")


def _validate_batch(config: Config) -> None:
    if config.batch.samples < 2:
        raise UserError(
            f"batch.samples is {config.batch.samples}; the reflector compares siblings, so give at least 2"
        )


def _require(config: Config, field: str, holds: bool, rule: str) -> None:
    if not holds:
        raise UserError(f"{field} is {_get(config, field)!r}; it must {rule}")


def _get(config: Config, field: str) -> Any:
    value = config
    for name in field.split("."):
        value = value[name]
    return value
