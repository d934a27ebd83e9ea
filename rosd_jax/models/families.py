"""Reads and writes config.json: which model families are supported, and which of their fields matter.

read_config(path, num_tokens=, dtype=, remat=)    -> Qwen3Config
config_fields(config)                             -> all fields of a config.json
stated_fields(config)                             -> those that every exported config.json states
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rosd_jax.errors import UserError
from rosd_jax.models import files
from rosd_jax.models.files import Fields, wrong
from rosd_jax.models.qwen3 import Llama3Scaling, Qwen3Config

SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)
OPTIONAL = {
    "rms_norm_eps": files.positive,
    "tie_word_embeddings": files.flag,
    "max_position_embeddings": files.whole_number,
}
MOST_LAYERS = 10_000
ROPES = ("rope_scaling", "rope_parameters")  # transformers 4 reads the first, transformers 5 the second
PASS = "pass --config.model.path=DIR, a Hugging Face directory of a Qwen3, Qwen2 or Llama model"


@dataclass(frozen=True)
class Family:
    """What a Hugging Face model_type implies beyond the fields of its config.json."""

    architecture: str
    qk_norm: bool = False
    qkv_bias: bool | None = None  # None: the field attention_bias decides, for q, k, v and output alike
    defaults: Fields = field(default_factory=dict)  # values of fields that its files may leave out


FAMILIES = {
    "qwen3": Family("Qwen3ForCausalLM", qk_norm=True),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
    "llama": Family("LlamaForCausalLM", defaults={"max_position_embeddings": 2048, "rope_theta": 1e4}),
}


# --- reading --------------------------------------------------------------------------------------


def read_config(path: str | Path, *, num_tokens: int | None, dtype: str, remat: str) -> Qwen3Config:
    """The architecture in DIR/config.json; `num_tokens` is the size of the tokenizer's vocabulary.

    Raises UserError if there is no such file, a field is missing or has the wrong type, the model belongs
    to no supported family or has a part that is not implemented here, or the tokenizer has more tokens than
    the embedding has rows.
    """
    if not str(path) or not (Path(path) / "config.json").is_file():
        raise UserError(f"model.path is {str(path)!r}, which contains no config.json; {PASS}")
    file = Path(path) / "config.json"
    fields = files.read_json(file)
    family = _check_architecture(fields, file)
    fields = _completed(fields, family)
    sizes = {name: files.whole_number(fields, name, file) for name in SIZES}
    _check_heads(fields, file)
    if sizes["num_hidden_layers"] > MOST_LAYERS:  # the names of their tensors are listed
        raise wrong(file, "num_hidden_layers", sizes["num_hidden_layers"], f"at most {MOST_LAYERS}")
    if num_tokens is not None and num_tokens > sizes["vocab_size"]:
        raise UserError(
            f"model.path is {str(path)!r}, a model whose vocabulary is too small for its tokenizer "
            f"({sizes['vocab_size']} embedding rows, {num_tokens} tokens); {PASS} with its own tokenizer"
        )
    biased = "attention_bias" in fields and files.flag(fields, "attention_bias", file)
    return Qwen3Config(
        **sizes,
        **{name: read(fields, name, file) for name, read in OPTIONAL.items() if name in fields},
        head_dim=_head_dim(fields, file),
        rope_scaling=_rope_scaling(fields, file),
        rope_theta=_rope_theta(fields, file),
        qk_norm=family.qk_norm,
        attention_bias=biased if family.qkv_bias is None else family.qkv_bias,
        output_bias=biased if family.qkv_bias is None else False,
        num_tokens=num_tokens,
        dtype=dtype,
        remat=remat,
    )


def _check_architecture(fields: Fields, file: Path) -> Family:
    """The family. Raises UserError for a field that asks for a forward pass not implemented here."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise wrong(file, "model_type", kind, "one of " + ", ".join(map(repr, FAMILIES)))
    if fields.get("hidden_act", "silu") != "silu":
        raise wrong(file, "hidden_act", fields["hidden_act"], "'silu'")
    if fields.get("mlp_bias") not in (None, False):
        raise wrong(file, "mlp_bias", fields["mlp_bias"], "False")
    if kind != "llama":  # Llama implementations ignore the fields of sliding windows
        _check_window(fields, file)
    kinds = fields.get("layer_types")
    full = isinstance(kinds, list) and all(kind == "full_attention" for kind in kinds)
    if kinds is not None and not full:
        raise wrong(file, "layer_types", kinds, "null, or 'full_attention' for every layer")
    for name in ("", *ROPES):
        part = (files.section(fields, name, file) if name else fields).get("partial_rotary_factor")
        if part is not None and part != 1:
            where = f"{name}.partial_rotary_factor".lstrip(".")
            raise wrong(file, where, part, "1: RoPE rotates all dimensions of a head")
    return FAMILIES[kind]


def _check_window(fields: Fields, file: Path) -> None:
    """Raises UserError if a sliding window limits any layer's attention. layer_types is checked elsewhere."""
    used = fields.get("use_sliding_window", False)
    if used is False:
        return
    first = fields.get("max_window_layers")  # the first layer with a window
    layers = fields.get("num_hidden_layers")
    no_layer = type(first) is int and type(layers) is int and first >= layers
    no_window = no_layer or ("sliding_window" in fields and fields["sliding_window"] is None)
    if used is not True or not no_window:
        raise wrong(file, "use_sliding_window", used, "False, or max_window_layers the number of layers")


def _completed(fields: Fields, family: Family) -> Fields:
    """The fields, with the defaults that implementations of the family assume for missing or null ones."""
    if not family.defaults:
        return fields
    heads = fields.get("num_attention_heads")
    width = fields.get("hidden_size")
    rope = any(isinstance(fields.get(name), dict) and "rope_theta" in fields[name] for name in ROPES)
    implied = family.defaults | {"num_key_value_heads": heads}
    if type(heads) is int and type(width) is int and heads > 0:
        implied["head_dim"] = width // heads
    missing = {name: value for name, value in implied.items() if fields.get(name) is None}
    if rope:
        missing.pop("rope_theta", None)
    return fields | missing


def _check_heads(fields: Fields, file: Path) -> None:
    groups = fields["num_key_value_heads"]
    if fields["num_attention_heads"] % groups:
        rule = f"a multiple of num_key_value_heads = {groups}"
        raise wrong(file, "num_attention_heads", fields["num_attention_heads"], rule)


def _head_dim(fields: Fields, file: Path) -> int:
    implied = fields["hidden_size"] // fields["num_attention_heads"]
    head_dim = files.whole_number({"head_dim": implied} | fields, "head_dim", file)
    if head_dim % 2:
        raise wrong(file, "head_dim", head_dim, "even, because RoPE rotates pairs of dimensions")
    return head_dim


def _rope_theta(fields: Fields, file: Path) -> float:
    """RoPE's base, from the older top-level field or inside the sections of transformers 4 and 5."""
    named = {}
    if fields.get("rope_theta") is not None:
        named["rope_theta"] = files.positive(fields, "rope_theta", file)
    for name in ROPES:
        rope = files.section(fields, name, file)
        nested = [key for key, value in rope.items() if isinstance(value, dict)]
        if nested:
            rule = "absent: all layers must have the same RoPE"
            raise wrong(file, f"{name}.{nested[0]}", rope[nested[0]], rule)
        if "rope_theta" in rope:
            inner = f"{name}.rope_theta"
            named[inner] = files.positive({inner: rope["rope_theta"]}, inner, file)
    if not named:
        raise wrong(file, "rope_theta", None, "a number above 0")
    return _agreed(named, file)


def _rope_scaling(fields: Fields, file: Path) -> Llama3Scaling | None:
    """RoPE scaling; None if there is none. Raises UserError if the two sections differ."""
    named = {}
    for name in ROPES:
        rope = files.section(fields, name, file)
        if rope:
            named[name] = _one_scaling(rope, name, file)
    return _agreed(named, file) if named else None


def _one_scaling(rope: Fields, name: str, file: Path) -> Llama3Scaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "llama3"):
        raise wrong(file, f"{name}.rope_type", kind, "'default' or 'llama3'")
    if kind == "default":
        return None
    inner = {f"{name}.{key}": value for key, value in rope.items()}
    length = files.whole_number(inner, f"{name}.original_max_position_embeddings", file)
    scaling = Llama3Scaling(
        factor=files.positive(inner, f"{name}.factor", file),
        low_freq_factor=files.positive(inner, f"{name}.low_freq_factor", file),
        high_freq_factor=files.positive(inner, f"{name}.high_freq_factor", file),
        original_max_position_embeddings=length,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        rule = f"above low_freq_factor = {scaling.low_freq_factor}"
        raise wrong(file, f"{name}.high_freq_factor", scaling.high_freq_factor, rule)
    return scaling


def _agreed(named: dict[str, Any], file: Path) -> Any:
    """The value on which several fields agree. Raises UserError if they differ."""
    first, *others = named
    for other in others:
        if named[other] != named[first]:
            rule = f"{first} = {named[first]}, because some programs read the one and some the other"
            raise wrong(file, other, named[other], rule)
    return named[first]


# --- writing --------------------------------------------------------------------------------------


def config_fields(config: Qwen3Config) -> Fields:
    """The fields of a config.json that both transformers 4 and 5 read as this architecture."""
    return stated_fields(config) | {
        "model_type": _family_of(config),
        "rope_parameters": _rope(config) | {"rope_theta": config.rope_theta},  # for transformers 5
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "attention_dropout": 0.0,
        "use_cache": True,
        **({} if _family_of(config) == "llama" else _no_window(config)),
    }


def stated_fields(config: Qwen3Config) -> Fields:
    """What every exported config.json states, because programs differ in their defaults."""
    family = FAMILIES[_family_of(config)]
    fields = {name: getattr(config, name) for name in (*SIZES, "head_dim", *OPTIONAL)}
    fields |= {"architectures": [family.architecture], "rope_theta": config.rope_theta}
    if family.qkv_bias is None:
        fields["attention_bias"] = config.attention_bias
    if config.rope_scaling is not None:
        fields["rope_scaling"] = _rope(config)  # for transformers 4
    return fields


def _family_of(config: Qwen3Config) -> str:
    """The model_type whose implementations compute what the config describes; ValueError if none does."""
    biases = config.attention_bias, config.output_bias
    for name, family in FAMILIES.items():
        biased = biases[0] == biases[1] if family.qkv_bias is None else biases == (family.qkv_bias, False)
        if biased and config.qk_norm == family.qk_norm:
            return name
    raise ValueError(f"no supported family has qk_norm={config.qk_norm} and biases on (qkv, output)={biases}")


def _rope(config: Qwen3Config) -> Fields:
    if config.rope_scaling is None:
        return {"rope_type": "default"}
    return {"rope_type": "llama3"} | dataclasses.asdict(config.rope_scaling)


def _no_window(config: Qwen3Config) -> Fields:
    return {
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": config.num_hidden_layers,
    }
