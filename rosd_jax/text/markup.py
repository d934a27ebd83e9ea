"""Removes what a reader does not see: escapes, marks of Markdown, math delimiters.

Marks are removed only where they can be nothing else. A star between operands multiplies; a hyphen at the
beginning of a line may be a minus sign, unless it is in a list and a word follows; digits are never joined.
"""

from __future__ import annotations

import html.entities
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from rosd_jax.types import Span

CONTEXT = 31  # characters that are inspected before a mark
WIDE = 0xFEE0  # difference between an ASCII character and its full-width form

_INVISIBLE = (
    "\x00-\x08\x0e-\x1b\x7f\u00ad\u034f\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
)
_UNSEEN = re.compile(
    r"(?P<open><!\[CDATA\[)|(?P<close>\]\]>)"
    r"|&(?:amp;)*(?P<entity>#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31});"
    rf"|[{_INVISIBLE}]"
)

_RULE = re.compile(r"^[ \t]*(?:(?:`{3,}|~{3,})[a-z0-9+#-]{0,20}|-{3,}|\*{3,}|_{3,})[ \t\r]*$", re.M)
_HEADING = re.compile(r"#{1,6}[ \t]+(?=\S)")
_BLOCK_QUOTE = re.compile(r">(?:[ \t]*>)*(?!=)[ \t]*")
_BULLET = re.compile(r"(?:[•◦▪‣●○■□]|(?P<sign>[-–—*+]))[ \t]+(?=\S)")
_NUMBER = re.compile(r"\(?(?P<number>\d{1,3})[.)][ \t]+(?=[^\s\d])")
_WORD = re.compile(r"[*_`$\"'“‘(\[\\]*([^\W\d_]+)")
_SENTENCE_ENDS = ".:;!?。：；！？…"
_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp max min lim det gcd lcm sqrt "
    "mod inf sup arg deg dim ker tr sgn abs sum prod int frac dfrac tfrac cdot times pi".split()
)

_INLINE = re.compile(r"\*+|_+|`+|~~|\$\$?|\n[ \t\r]*\n|\n")
_MARKS = "*_`$#>+-~\\"
_SET_COMMAND = re.compile(
    r"(?P<command>\\(?:boxed|fbox|text|text(?:bf|it|rm|sf|tt|normal|up)|emph|underline|math(?:rm|bf|it|sf|tt)"
    r"|boldsymbol|bm)\s{0,9}\{)|\\[\\{}]|[{}]"
)
_MATH = re.compile(r"(?:(?<!\\)\\[()\[\]])+")


@dataclass(frozen=True)
class Folded:
    """A text in the form in which it is compared, with the origin of each character."""

    text: str
    start: list[int]  # per folded character: where its original starts ...
    stop: list[int]  # ... and stops

    @classmethod
    def of(cls, text: str) -> Folded:
        """The unchanged text."""
        return cls(text, list(range(len(text))), list(range(1, len(text) + 1)))


def unescape(text: str) -> Folded:
    """Removes invisible characters and CDATA marks, and decodes XML escapes.

    A decoded character is not markup. One that could be is replaced by its full-width form.
    """
    edits = []
    opened = 0
    for match in _UNSEEN.finditer(text):
        operates = match[0] in "\u2062\u2063\u2064"  # invisible, but the digits around it are two numbers
        new: str | None = " " if operates and _between_digits(text, match) else ""
        if match["open"]:
            opened += 1
        elif match["close"]:
            new = "" if opened else None
            opened = max(0, opened - 1)
        elif match["entity"]:
            new = _entity(match["entity"])
        if new is not None:
            edits.append((match.start(), match.end(), new))
    return edit(Folded.of(text), edits)


def strip_markup(folded: Folded, *, numbers: bool = True, first: bool = True) -> Folded:
    """Removes marks of Markdown and math.

    numbers=False: also the numbers of lists. first=False: not the mark at the very beginning.
    """
    folded = strip_rules(folded)
    marks = line_marks(folded.text, numbers=numbers)
    folded = _drop(folded, (mark for mark in marks if first or mark[0]))
    folded = _drop(folded, _inline_marks(folded.text))
    folded = _drop(folded, _set_commands(folded.text))
    return _drop(folded, (match.span() for match in _MATH.finditer(folded.text)))


def strip_rules(folded: Folded) -> Folded:
    """Removes code fences and rules between paragraphs; their lines stay, empty."""
    return _drop(folded, (match.span() for match in _RULE.finditer(folded.text)))


def line_marks(text: str, *, numbers: bool = True) -> Iterator[Span]:
    """The places of headings, block quotes and bullets; with numbers=False also of list numbers.

    A block quote, or a bullet that could be a sign, counts only at the beginning, or after an empty line, a
    finished sentence or another of its kind; such a bullet must be followed by a word. The numbers of a list
    count up.
    """
    fresh = True
    quoted = False
    listed = False
    last_number = None
    at = 0
    while at < len(text):
        first = at
        stop = _line_stop(text, at)
        at = _skip_spaces(text, at, stop)
        quote = _BLOCK_QUOTE.match(text, at, stop)
        quoted = quote is not None and (fresh or quoted)
        if quote and quoted:
            yield quote.span()
            at = quote.end()
        heading = _HEADING.match(text, at, stop)
        if heading:
            yield heading.span()
            at = heading.end()
        bullet = _BULLET.match(text, at, stop)
        may_list = fresh or listed or quoted
        listed = bullet is not None and (not bullet["sign"] or may_list and _starts_word(text, bullet.end()))
        if bullet and listed:
            yield bullet.span()
            at = bullet.end()
        number = _NUMBER.match(text, at, stop)
        if number and _counts_on(int(number["number"]), last_number, first == 0, may_list):
            last_number = int(number["number"])
            if not numbers:
                yield number.span()
        rest = text[at:stop].rstrip()
        fresh = not rest or rest[-1] in _SENTENCE_ENDS
        at = stop + 1


def has_list_numbers(text: str) -> bool:
    """Whether the text has numbers of lists."""
    return len(list(line_marks(text))) < len(list(line_marks(text, numbers=False)))


def _counts_on(number: int, last: int | None, first_line: bool, may_list: bool) -> bool:
    return first_line or number - 1 == last or (number == 1 and may_list)


def _line_stop(text: str, at: int) -> int:
    stop = text.find("\n", at)
    return len(text) if stop < 0 else stop


def _skip_spaces(text: str, at: int, stop: int) -> int:
    while at < stop and text[at] in " \t":
        at += 1
    return at


def _starts_word(text: str, at: int) -> bool:
    """Whether a word starts here, rather than a variable or a function."""
    word = _WORD.match(text, at)
    if not word or text[word.end() : word.end() + 1] == "(":
        return False
    return unicodedata.category(word[1][0]) == "Lo" or (
        len(word[1]) > 1 and word[1].lower() not in _FUNCTIONS
    )


def _inline_marks(text: str) -> list[Span]:
    """The places of paired marks of emphasis, code and math."""
    pending: dict[str, Span] = {}
    marks = []
    for match in _INLINE.finditer(text):
        mark = match[0]
        span = match.span()
        if mark[0] == "\n":
            pending = {} if len(mark) > 1 else {k: v for k, v in pending.items() if k != "$"}
        elif len(mark) > 3 or _before(text, span[0]) == "\\":
            continue
        elif mark in pending and _may_close(text, span):
            marks += [pending.pop(mark), span]
        elif _may_open(text, span):
            pending[mark] = span
    return sorted(marks)


def _set_commands(text: str) -> list[Span]:
    """The places of typesetting commands with their opening braces, and of the closing braces."""
    opened: list[Span | None] = []
    marks = []
    for match in _SET_COMMAND.finditer(text):
        if match["command"] or match[0] == "{":
            opened.append(match.span() if match["command"] else None)
        elif match[0] == "}" and opened and (command := opened.pop()):
            marks += [command, match.span()]
    return sorted(marks)


def _may_open(text: str, span: Span) -> bool:
    mark = text[slice(*span)]
    before = _before(text, span[0])
    after = text[span[1] : span[1] + 1]
    if mark == "$$":
        return True
    if not after or before.isalnum() or before in tuple(")]}!%'"):
        return False
    operand = text[max(0, span[0] - CONTEXT) : span[0]].rstrip()[-1:].isdigit()
    if mark == "$" and after.isspace():
        return not operand  # 5 $ or 6 $
    if mark == "*" and operand and after.isdigit():
        return False  # 2 *3* 4
    return mark[0] == "`" or not after.isspace()


def _may_close(text: str, span: Span) -> bool:
    mark = text[slice(*span)]
    before = _before(text, span[0])
    after = text[span[1] : span[1] + 1]
    if mark == "$$":
        return True
    if mark == "$":
        return not after.isdigit() and not (before.isspace() and after.isalnum())
    return (mark[0] == "`" or not before.isspace()) and not after.isalnum() and after not in tuple("([{\\")


def _before(text: str, at: int) -> str:
    return text[max(0, at - 1) : at]


def _between_digits(text: str, match: re.Match[str]) -> bool:
    return _before(text, match.start()).isdigit() and text[match.end() : match.end() + 1].isdigit()


def _entity(name: str) -> str | None:
    """The character of an XML or HTML escape, "" for an invisible one; None if it is no escape."""
    if name[0] != "#":
        text = html.entities.html5.get(name + ";")
    else:
        code = int(name[2:], 16) if name[1] in "xX" else int(name[1:])
        text = chr(code) if 0 < code < 0x110000 else None
    if text and text in _MARKS:
        return chr(ord(text) + WIDE)
    return text and ("" if re.fullmatch(f"[{_INVISIBLE}]+", text) else text)


def edit(folded: Folded, edits: Iterable[tuple[int, int, str]]) -> Folded:
    """Replaces text[start:stop] by the new text, for each edit (start, stop, new), in order."""
    pieces = []
    starts = []
    stops = []
    at = 0
    for start, stop, new in edits:
        pieces += [folded.text[at:start], new]
        starts += folded.start[at:start]
        stops += folded.stop[at:start]
        starts += [folded.start[start]] * len(new)
        stops += [folded.stop[stop - 1]] * len(new)
        at = stop
    if not pieces:
        return folded
    pieces.append(folded.text[at:])
    return Folded("".join(pieces), starts + folded.start[at:], stops + folded.stop[at:])


def _drop(folded: Folded, spans: Iterable[Span]) -> Folded:
    """Removes these spans, or replaces them by a space where digits or operators would join."""
    joined: list[Span] = []
    for start, stop in spans:
        if start == stop:
            continue
        if joined and joined[-1][1] == start:
            start = joined.pop()[0]
        joined.append((start, stop))
    text = folded.text
    return edit(folded, ((a, b, " " if _join(_before(text, a), text[b : b + 1]) else "") for a, b in joined))


def _join(left: str, right: str) -> bool:
    """Whether two characters would become one number or one operator."""
    if left.isdigit() and right.isdigit():
        return True
    return bool(left and right) and left in "<>=!-+*/" and right in "<>=!-+*/"
