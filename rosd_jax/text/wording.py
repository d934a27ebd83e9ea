"""A user's own wording, read from a TOML file: `wording="PATH.toml"`.

The file gives every field of `prompts.Wording` as a string; docs/own_task.md shows a complete one.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import fields
from pathlib import Path

from rosd_jax.errors import UserError
from rosd_jax.text.prompts import Wording
from rosd_jax.text.spans import IDEA_TAGS, QUOTE_TAG

_WRONG = ("problem", "solution", "attempt", "gold")
_RIGHT = ("problem", "attempt", "gold")
MAY_HOLD = {
    "reflect_wrong_system": _WRONG,
    "reflect_wrong_user": _WRONG,
    "reflect_right_system": _RIGHT,
    "reflect_right_user": _RIGHT,
    "teacher_idea_user": ("problem", "idea"),
    "teacher_solution_user": ("problem", "solution"),
}
MUST_HOLD = {
    "reflect_wrong_user": ("attempt",),
    "reflect_right_user": ("attempt",),
    "teacher_idea_user": ("problem", "idea"),
    "teacher_solution_user": ("problem", "solution"),
}
PLACEHOLDERS = {*_WRONG, "idea"}
# A name in braces, in any spelling. Braces after a command, as in \text{cm}, are LaTeX.
_BRACES = re.compile(r"(\\[A-Za-z]+)?(\{+\s*([^\W\d]\w*)\s*\}+)")


def read_wording(path: str) -> Wording:
    """Reads and checks the file. Raises UserError naming the file and the field that breaks a rule.

    Every field must be present, known and a string. A template must have the placeholders that it needs, and
    no others. The reflector must be told the tags that are read from its answer.
    """
    try:
        found = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"wording is {path!r}, which cannot be read ({error.strerror}); check it") from error
    except (ValueError, RecursionError) as error:  # of TOML or of UTF-8
        raise UserError(f"wording is {path!r}, which is not valid TOML ({error}); correct it") from error
    names = [field.name for field in fields(Wording)]
    for name in [*found, *names]:
        if name not in names:
            raise _wrong(path, name, f"is unknown; the fields are {', '.join(names)}")
        if not isinstance(found.get(name), str):
            raise _wrong(
                path, name, "must be a string" if name in found else "is missing; all six are required"
            )
        _check_template(path, name, found[name])
    _check_tag(path, found, "wrong", QUOTE_TAG, (QUOTE_TAG,))
    for kind in ("wrong", "right"):
        _check_tag(path, found, kind, "explanation", IDEA_TAGS)
    return Wording(**found)


def _check_tag(path: str, found: dict[str, str], kind: str, tag: str, same: tuple[str, ...]) -> None:
    shown = found[f"reflect_{kind}_system"] + found[f"reflect_{kind}_user"]
    if not any(f"<{name}>" in shown.lower() for name in same):
        what = f"must ask for <{tag}>, which is read from the reflector's answer"
        raise _wrong(path, f"reflect_{kind}_user", what)


def _check_template(path: str, name: str, template: str) -> None:
    may = " ".join(f"{{{field}}}" for field in MAY_HOLD[name])
    for command, written, field in _BRACES.findall(template):
        ours = field.lower() in PLACEHOLDERS
        if ours and (written != f"{{{field}}}" or field not in MAY_HOLD[name]):
            raise _wrong(path, name, f"holds {written}; its placeholders are {may}, in this spelling")
        if not ours and not command and " " not in written:
            raise _wrong(
                path, name, f"holds {written}; its placeholders are {may}, and other braces need a space"
            )
    for field in MUST_HOLD.get(name, ()):
        if f"{{{field}}}" not in template:
            raise _wrong(path, name, f"must hold {{{field}}}")
    for line in template.split("\n"):
        if "{gold}" in line and any(f"{{{field}}}" in line for field in PLACEHOLDERS - {"gold"}):
            raise _wrong(
                path,
                name,
                "must have {gold} on a separate line, which is left out if there is no gold answer",
            )


def _wrong(path: str, name: str, what: str) -> UserError:
    return UserError(f"wording {path}: field {name!r} {what}")
