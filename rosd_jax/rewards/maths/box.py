r"""The last box of a response: `\boxed`, `\fbox` or `\framebox`, with braces or before a single value."""

from __future__ import annotations

import re

_BOX = r"\\{1,2}(?:boxed|fbox|framebox)(?![A-Za-z])"
_MARK = re.compile(
    rf"""(?P<box>{_BOX}\s*(?:\[[^\]\{{\}}]{{0,20}}\]\s*){{0,2}}\{{)
    |{_BOX}\s*\$?(?P<bare>[+-]?(?:\.?\d|\\[A-Za-z]|[A-Za-z](?![A-Za-z]))(?:(?!\\[\])])[^\s$]){{0,80}})
    |\\[\\{{}}]
    |[{{}}]""",
    re.VERBOSE,
)
_MATHS_END = re.compile(r"\$|\\\]|\\\)|\n[ \t]*\n")
_SPACING = re.compile(
    r"\\(?:boxed|fbox|framebox|quad|qquad|ldots|dots|cdots|text|underline|[,;:!> _]"
    r"|(?:hspace|phantom)\*?\{[^{}]{0,20}\})"
)
_PLACEHOLDERS = frozenset(" \t\r\n~.?_-${}…\u00a0\u3000")
_LONGEST = 1000  # characters of a box without its closing brace


def last_box(text: str) -> str:
    """The content of the last box that is not empty, "" if there is none.

    Escaped braces do not count. A box without its closing brace ends where its formula ends; one that runs to
    the end of the text is unfinished and does not count.
    """
    opened: list[tuple[bool, int]] = []  # (is a box, where its content starts)
    found: list[tuple[int, int]] = []  # start and end of each box
    for mark in _MARK.finditer(text):
        if mark["box"]:
            opened.append((True, mark.end()))
        elif mark["bare"]:
            start = mark.start("bare")
            found.append((start, start + len(mark["bare"].rstrip(".,;:?*`"))))
        elif mark[0] == "{":
            opened.append((False, mark.end()))
        elif mark[0] == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                found.append((start, mark.start()))
    unclosed = [start for is_box, start in opened if is_box]
    if unclosed and (end := _MATHS_END.search(text, unclosed[-1], unclosed[-1] + _LONGEST)):
        found.append((unclosed[-1], end.start()))
    contents = (_content(text[start:end]) for start, end in sorted(found, reverse=True))
    return next((content for content in contents if content), "")


def _content(inside: str) -> str:
    """The content of a box, "" if that is only space or a placeholder."""
    if len(inside) <= _LONGEST and set(_SPACING.sub("", inside)) <= _PLACEHOLDERS:
        return ""
    return inside.strip()
