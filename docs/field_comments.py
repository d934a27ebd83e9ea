"""An extension of mkdocstrings: the comments at the fields of a record describe them, in one table."""

from __future__ import annotations

import html
import re
from typing import Any

from griffe import Attribute, Class, Extension

TRAILING = re.compile(r"\s#\s(.*)")


class FieldComments(Extension):
    """Reads `length_B: A  # int32; includes the stop token`, or comment lines above a field."""

    def on_class_members(self, *, cls: Class, **_: Any) -> None:
        fields = [field for field in cls.attributes.values() if "property" not in field.labels]
        if cls.docstring is None or not fields:
            return
        rows = "".join(f"\n    {field.name}: {described(field, cls) or '-'}" for field in fields)
        cls.docstring.value += f"\n\nAttributes:{rows}"


def described(field: Attribute, cls: Class) -> str:
    """The comment of a field as HTML."""
    last = (field.lineno or 0) - (cls.lineno or 0)
    if trailing := TRAILING.search(cls.lines[last]):
        return html.escape(trailing[1], quote=False)
    first = last
    while cls.lines[first - 1].strip().startswith("#"):
        first -= 1
    return html.escape(" ".join(line.strip(" #") for line in cls.lines[first:last]), quote=False)
