"""The fields of `Settings`, read from its classes: defaults, conversion, access by name, documentation.

from_config(config)          -> Settings; raises UserError for an unknown, missing or mistyped field
replace(settings, field, x)  -> Settings with one field changed; `field` is a name such as "rollout.slots"
value(settings, field)       -> the value of a field
flat(tree)                   -> (name, value) of every field of nested dicts
defaults()                   -> the defaults as nested dicts
describe()                   -> name, type, default and text of every field
check_name(name)             raises UserError, with the nearest names, if there is no such field
mistyped(name, given)        -> the error about a value of another type
shown(value)                 -> a value as sentences show it, shortened
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import sys
import types
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from ml_collections import ConfigDict

from rosd_jax.errors import UserError
from rosd_jax.settings import Settings

Section = TypeVar("Section")
LONGEST_SHOWN = 200  # characters of a value in a sentence


class Field(NamedTuple):
    """One line of docs/fields.md."""

    name: str  # "rollout.slots"
    type: str
    default: Any  # None also for fields of the method, whose values are in the presets
    text: str


def defaults(of: Any = Settings) -> dict[str, Any]:
    """The defaults as nested dicts, without the fields of the method, whose values a preset gives."""
    found: dict[str, Any] = {}
    for name, hint in get_type_hints(of).items():
        if dataclasses.is_dataclass(hint):
            found[name] = defaults(hint)
        elif (default := _default(of, name)) is not dataclasses.MISSING:
            found[name] = default
    return found


def from_config(config: ConfigDict) -> Settings:
    """Converts a config. Raises UserError for the first field that is unknown, missing or mistyped."""
    return _section(Settings, config.to_dict(), "")


def replace(settings: Settings, name: str, new: Any) -> Settings:
    """The settings with one field changed. `name` is like "rollout.slots"."""
    return _replaced(settings, name.split("."), new)


def value(settings: Settings, name: str) -> Any:
    """The value of a field. `name` is like "rollout.slots"."""
    found: Any = settings
    for part in name.split("."):
        found = getattr(found, part)
    return found


def describe(of: Any = Settings, above: str = "") -> Iterator[Field]:
    """Every field in the order of settings.py, but each class's own fields before its sections."""
    texts = _texts(of)
    hints = get_type_hints(of)
    for name, hint in hints.items():
        if not dataclasses.is_dataclass(hint):
            default = _default(of, name)
            shown = None if default is dataclasses.MISSING else default
            yield Field(above + name, _type_name(hint), shown, texts[name])
    for name, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            yield from describe(hint, f"{above}{name}.")


def check_name(name: str) -> None:
    """Raises UserError unless `name` is the full name of a field, such as "rollout.slots"."""
    names = _all_names()
    if name in names:
        return
    inner = [other for other in names if other.startswith(f"{name}.")]
    if inner:
        raise UserError(f"{name} is a section; set one of its fields, such as --config.{inner[0]}=VALUE")
    nearest = _nearest(name, names)
    hint = f"; similar names: {', '.join(nearest)}" if nearest else ""
    raise UserError(f"the config has no field {name!r}; docs/fields.md lists the fields{hint}")


@cache
def _all_names() -> tuple[str, ...]:
    return tuple(field.name for field in describe())


def flat(tree: dict[str, Any], above: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Every field of nested dicts with its value, named like "section.name"."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, (*above, name))
        else:
            yield ".".join((*above, name)), value


def mistyped(name: str, given: Any) -> UserError:
    """The error about a value that is not of the field's type. `name` is like "rollout.slots"."""
    kind = next((field.type for field in describe() if field.name == name), "another type")
    if kind == "list of strings":
        rule = "be a list of strings, as a flag a,b or ('a, b', 'c')"
    else:
        rule = f"be of type {kind}"
    if "null" in kind.split(", "):
        rule += " (null is None, which only a config file can set)"
    return UserError(f"{name} is {shown(given)}; it must {rule}")


def shown(given: Any, *, quoted: bool = True) -> str:
    """A value as sentences show it, on one line and shortened. quoted: with the quotes of a string."""
    if isinstance(given, int) and given.bit_length() > LONGEST_SHOWN:
        return f"a whole number of {given.bit_length()} bits"  # Python refuses to print the longest
    text = repr(given) if quoted else str(given)
    if len(text) > LONGEST_SHOWN:
        text = f"{text[: LONGEST_SHOWN // 2]}...{text[-LONGEST_SHOWN // 2 :]}"
    return " ".join(text.splitlines())


def _nearest(name: str, names: Sequence[str]) -> list[str]:
    """Up to three names that are spelled like `name`, or whose last part is spelled like its last part."""
    last = name.rpartition(".")[2]

    def likeness(other: str) -> tuple[float, float]:
        whole = difflib.SequenceMatcher(None, name, other).ratio()
        part = difflib.SequenceMatcher(None, last, other.rpartition(".")[2]).ratio()
        return max(whole, part), whole + part  # the sum decides between equals

    close = [other for other in names if likeness(other)[0] > 0.75]
    return sorted(close, key=likeness, reverse=True)[:3]


def _section(of: type[Section], given: dict[str, Any], above: str) -> Section:
    hints = get_type_hints(of)
    for name in given:
        if name not in hints:
            check_name(above + name)
    made: dict[str, Any] = {}
    for name, hint in hints.items():
        if name not in given:
            raise UserError(f"{above}{name} is not set; start from rosd_jax.config.default_config()")
        made[name] = _converted(hint, given[name], above + name)
    return of(**made)


def _converted(hint: Any, given: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(given, dict):
            raise UserError(f"{name} is {shown(given)}; it must be a section with fields of its own")
        return _section(hint, given, f"{name}.")
    if allowed := _choices(hint):
        if given not in allowed:
            note = " (null is None, which only a config file can set)" if None in allowed else ""
            raise UserError(f"{name} is {shown(given)}; it must be one of {_type_name(hint)}{note}")
        return given
    if get_origin(hint) is tuple:
        if not isinstance(given, list | tuple):
            raise mistyped(name, given)
        return tuple(given)
    if hint is float and type(given) is int and abs(given) <= sys.float_info.max:
        return float(given)
    allowed = get_args(hint) if get_origin(hint) is types.UnionType else (hint,)
    if type(given) not in allowed:  # not isinstance: True is no int here
        raise mistyped(name, given)
    return given


def _choices(hint: Any) -> tuple[Any, ...]:
    """The members of a Literal, and None if the hint is a Literal or None. Empty for any other hint."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            if get_origin(part) is Literal:
                return (None, *get_args(part))
    return ()


def _replaced(section: Any, path: list[str], new: Any) -> Any:
    name, *rest = path
    if rest:
        new = _replaced(getattr(section, name), rest, new)
    return dataclasses.replace(section, **{name: new})


def _default(of: type, name: str) -> Any:
    """The default of a field; dataclasses.MISSING if it has none."""
    return next(f.default for f in dataclasses.fields(of) if f.name == name)  # type: ignore[arg-type]


def _texts(of: type) -> dict[str, str]:
    """The string below each field of a class, by the field's name. Python itself does not keep it."""
    tree = ast.parse(inspect.getsource(of)).body[0]
    assert isinstance(tree, ast.ClassDef)
    found: dict[str, str] = {}
    for node, following in zip(tree.body, tree.body[1:], strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[node.target.id] = " ".join(str(following.value.value).split())
    return found


def _type_name(hint: Any) -> str:
    if allowed := _choices(hint):
        return ", ".join("null" if name is None else str(name) for name in allowed)
    if get_origin(hint) is tuple:
        return "list of strings"
    if get_origin(hint) is types.UnionType:
        return ", ".join("null" if part is types.NoneType else part.__name__ for part in get_args(hint))
    return "string" if hint is str else hint.__name__
