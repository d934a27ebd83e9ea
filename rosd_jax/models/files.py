"""The JSON files of a Hugging Face directory. An error names the file, the field and its value."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rosd_jax import atomic
from rosd_jax.errors import UserError

REMEDY = "correct that file, or pass --config.model.path=DIR of another model"
Fields = dict[str, Any]


def read_json(file: Path) -> Fields:
    """The object in a JSON file. Raises UserError if the file cannot be read or contains something else."""
    text = read_text(file)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); {REMEDY}") from error
    if not isinstance(fields, dict):
        raise UserError(f"{file} is not a JSON object; {REMEDY}")
    return fields


def read_text(file: Path) -> str:
    """The text of a file. Raises UserError if it cannot be read or is not UTF-8."""
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 ({error}); {REMEDY}") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); {REMEDY}") from error


def write_json(file: Path, fields: Fields) -> None:
    """Writes an object. The file appears complete or not at all."""
    atomic.write_text(file, [json.dumps(fields, indent=2) + "\n"])


def wrong(file: Path, name: str, value: Any, rule: str) -> UserError:
    """The error about a field whose value breaks its rule."""
    return UserError(f"{name} in {file} is {value!r}; it must be {rule}; {REMEDY}")


def whole_number(fields: Fields, name: str, file: Path) -> int:
    """A size. Raises UserError if it is missing or not a whole number above 0."""
    return _field(fields, name, file, "a whole number above 0", _is_whole)


def positive(fields: Fields, name: str, file: Path) -> float:
    """A quantity. Raises UserError if it is missing or not a number above 0."""
    return float(_field(fields, name, file, "a number above 0", _is_positive))


def flag(fields: Fields, name: str, file: Path) -> bool:
    """A switch. Raises UserError if it is missing or neither true nor false."""
    return _field(fields, name, file, "true or false", lambda value: isinstance(value, bool))


def section(fields: Fields, name: str, file: Path) -> Fields:
    """An object inside the file, empty if it is missing or null. Raises UserError for anything else."""
    return _field(fields, name, file, "an object or null", _is_object_or_null) or {}


def _field(fields: Fields, name: str, file: Path, rule: str, fits: Callable[[Any], bool]) -> Any:
    value = fields.get(name)
    if not fits(value):
        raise wrong(file, name, value, rule)
    return value


def _is_whole(value: Any) -> bool:
    return type(value) is int and 0 < value < 2**31


def _is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < 1e300  # neither NaN nor infinite


def _is_object_or_null(value: Any) -> bool:
    return value is None or isinstance(value, dict)
