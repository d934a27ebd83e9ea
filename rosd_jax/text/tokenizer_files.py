"""The files of a tokenizer in a Hugging Face directory: checked when read, copied when exported.

Copies are equal byte for byte, with two exceptions. Two fields are rewritten that transformers 4 (and
engines built on it) cannot read as transformers 5 writes them: a list under `extra_special_tokens`, and a
tokenizer class that only version 5 has. And generation_config.json is completed: it names every id that
ends a response here, so that other programs stop there too.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

from rosd_jax import atomic
from rosd_jax.models.files import Fields, read_json, read_text, write_json, wrong

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION = "generation_config.json"
SPECIAL = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
OBJECTS = (TOKENIZER_CONFIG, SPECIAL, "added_tokens.json", GENERATION, "chat_template.json", "vocab.json")
TEXTS = ("tokenizer.json", "merges.txt", TEMPLATE)  # their content is checked when they are loaded
MORE_TEMPLATES = "additional_chat_templates"
Rules: TypeAlias = tuple[tuple[tuple[str, ...], str, Callable[[Any], bool]], ...]
SHARED = ("PreTrainedTokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "GPT2Tokenizer")  # in 4 and 5


def check_files(folder: Path) -> None:
    """Raises UserError for a file that is not UTF-8, and for a field of the wrong type."""
    for name in ("config.json", *OBJECTS):
        if (folder / name).exists():
            fields = read_json(folder / name)
            _check_fields(fields, folder / name, FIELD_RULES.get(name, ()))
    for file in (*(folder / name for name in TEXTS), *folder.glob(f"{MORE_TEMPLATES}/*.jinja")):
        if file.exists():
            read_text(file)


def _check_fields(fields: Fields, file: Path, rules: Rules) -> None:
    for names, rule, fits in rules:
        for name in names:
            if name in fields and not fits(fields[name]):
                raise wrong(file, name, fields[name], rule)


def _is_text(value: object) -> bool:
    return value is None or isinstance(value, str)


def _is_object_token(value: object) -> bool:
    return isinstance(value, dict) and isinstance(value.get("content"), str)


def _is_token(value: object) -> bool:
    marked = isinstance(value, dict) and value.get("__type") == "AddedToken"
    return _is_text(value) or (marked and _is_object_token(value))


def _are_tokens(value: object) -> bool:
    values = list(value.values()) if isinstance(value, dict) else value
    return values is None or (isinstance(values, list) and all(map(_is_token, values)))


def _are_numbered_tokens(value: object) -> bool:
    if not isinstance(value, dict) or not all(map(_is_object_token, value.values())):
        return False
    return all(isinstance(key, str) and key.isdecimal() for key in value)


def _is_template(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(text, str) for text in value.values())
    if isinstance(value, list):
        parts = [part if isinstance(part, dict) else {} for part in value]
        return all(isinstance(part.get(key), str) for part in parts for key in ("name", "template"))
    return _is_text(value)


TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
MORE_TOKENS = ("additional_special_tokens", "extra_special_tokens")
FIELD_RULES: dict[str, Rules] = {  # file -> (fields, what they must be, a check of a value)
    TOKENIZER_CONFIG: (
        (TOKENS, "the text of a token, an AddedToken or null", _is_token),
        (MORE_TOKENS, "a list of tokens", _are_tokens),
        (("added_tokens_decoder",), "an object of ids and their tokens", _are_numbered_tokens),
        (("tokenizer_class",), "the name of a class or null", _is_text),
        (("chat_template",), "a template's text, or a list of objects with name and template", _is_template),
        (("model_max_length",), "a number or null", lambda v: v is None or type(v) in (int, float)),
        (("padding_side", "truncation_side"), "'left' or 'right'", lambda v: v in ("left", "right")),
        (("split_special_tokens",), "true or false", lambda v: isinstance(v, bool)),
    ),
    SPECIAL: (
        (
            TOKENS,
            "the text of a token, or an object with its content",
            lambda v: _is_text(v) or _is_object_token(v),
        ),
        (MORE_TOKENS, "a list of tokens", lambda v: v is None or isinstance(v, (list, dict))),
    ),
}


def eos_ids(file: Path, num_tokens: int) -> list[int]:
    """The ids under eos_token_id: an id, a list of ids, or nothing. Raises UserError for anything else."""
    named = read_json(file).get("eos_token_id") if file.exists() else None
    if named is None:
        return []
    ids = named if isinstance(named, list) else [named]
    if not all(type(i) is int and 0 <= i < num_tokens for i in ids):
        raise wrong(file, "eos_token_id", named, f"a token id from 0 to {num_tokens - 1}, or a list of them")
    return ids


def copy_files(source: Path, target: Path) -> None:
    """Makes the tokenizer's files in `target` equal to those of `source`. Other files are not touched."""
    for name in (*OBJECTS, *TEXTS):
        if (source / name).exists():
            atomic.write_bytes(target / name, [(source / name).read_bytes()])
        else:
            (target / name).unlink(missing_ok=True)
    if (source / MORE_TEMPLATES).is_dir():
        shutil.copytree(source / MORE_TEMPLATES, target / MORE_TEMPLATES, dirs_exist_ok=True)


def repair(folder: Path, loaded_class: str, special_tokens: dict[str, str]) -> None:
    """Rewrites fields that transformers 4 cannot read. Files that it can read are not touched.

    `loaded_class` and `special_tokens` are those of the tokenizer in use. They are written if the directory
    names no class that both versions have, since the class also determines the special tokens.
    """
    for name in (SPECIAL, TOKENIZER_CONFIG):
        fields = read_json(folder / name) if (folder / name).exists() else {}
        fixed = _without_list(fields)
        if name == TOKENIZER_CONFIG and not _is_shared(fixed.get("tokenizer_class")):
            known = loaded_class if _is_shared(loaded_class) else "PreTrainedTokenizerFast"
            fixed = special_tokens | fixed | {"tokenizer_class": known}
        if fixed != fields:
            write_json(folder / name, fixed)


def state_stop_ids(folder: Path, stop_ids: tuple[int, ...]) -> None:
    """Makes generation_config.json name these ids. A file that already does is not touched."""
    file = folder / GENERATION
    fields = read_json(file) if file.exists() else {}
    named = fields.get("eos_token_id")
    if set(named if isinstance(named, list) else [named]) != set(stop_ids):
        write_json(file, fields | {"eos_token_id": list(stop_ids)})


def _without_list(fields: Fields) -> Fields:
    """Moves a list of extra special tokens to the older field, which both versions read."""
    tokens = fields.get("extra_special_tokens", {})
    if isinstance(tokens, dict):
        return fields
    rest = {name: value for name, value in fields.items() if name != "extra_special_tokens"}
    return rest | {"additional_special_tokens": tokens} if tokens else rest


def _is_shared(name: object) -> bool:
    return isinstance(name, str) and name.removesuffix("Fast") in SHARED
