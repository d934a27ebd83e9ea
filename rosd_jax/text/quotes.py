"""A quote as it may be searched for: as written, then without what was added around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rosd_jax.text.fold import finish
from rosd_jax.text.markup import Folded, has_list_numbers, line_marks, strip_markup, strip_rules, unescape

QUOTATION_MARKS = (
    '""', "''", "“”", "‘’", "„“", "„”", "”“", "‚‘", "«»", "»«", "「」", "『』", "〝〞", "《》", "【】"
)  # fmt: skip
BRACKETS = ("()", "[]", "{}", "〔〕", "〈〉")
END_MARKS = ".,;:?。、।"
LAYERS = 8  # of marks around a quote that are taken off


@dataclass(frozen=True)
class Needle:
    """A folded quote, and where alone it may be found."""

    text: str
    begins: bool = False  # it lost marks of a line, so it must begin a line or a sentence
    alone: bool = False  # it lost its brackets, so no operand or operator may stand next to it
    unnumbered: bool = False  # it lost numbers of a list, so those of the text must stay


def needles(quote: str) -> Iterator[Needle]:
    """The quote folded, then with one layer after another taken off; those with a letter or digit.

    Layers are quotation marks, brackets, an ellipsis before or behind, and marks at the end. Last comes the
    same without the numbers of a list.
    """
    plain = strip_rules(unescape(quote)).text.strip()
    yield from _layers(plain, numbers=True)
    if has_list_numbers(plain):
        yield from _layers(plain, numbers=False)


def _layers(plain: str, *, numbers: bool) -> Iterator[Needle]:
    begins = alone = False
    for _ in range(LAYERS):
        begins = begins or next(line_marks(plain, numbers=numbers), (1, 1))[0] == 0
        plain = strip_markup(Folded.of(plain), numbers=numbers).text.strip()
        text = finish(Folded.of(plain)).text.strip()
        if any(character.isalnum() for character in text):
            yield Needle(text, begins, alone, unnumbered=not numbers)
        alone = alone or plain[:1] + plain[-1:] in BRACKETS
        peeled = _peel(plain)
        if peeled == plain:
            return
        plain = peeled


def _peel(text: str) -> str:
    """Without one layer of what was added around a quote."""
    if len(text) > 2 and text[0] + text[-1] in QUOTATION_MARKS + BRACKETS:
        return text[1:-1].strip()
    inner = _without_leading_dots(text)
    if inner == text:
        inner = _without_trailing_dots(text)
    if inner == text:
        inner = text.rstrip(END_MARKS)
    if inner == text and text.endswith("!") and text[-3:-1].isalpha():  # no factorial
        inner = text[:-1]
    return inner.strip()


def _without_leading_dots(text: str) -> str:
    """Without "...", "…", "[...]" or "(...)" at the beginning."""
    bracket = text[:1] in ("(", "[") and text.find(")" if text[0] == "(" else "]")
    if bracket and _is_ellipsis(text[1:bracket]):
        return text[bracket + 1 :]
    rest = text.lstrip(".… ")
    dots = text[: len(text) - len(rest)]
    if rest[:1].isdigit() and dots.endswith(".") and not dots.endswith("...") or dots.endswith("...."):
        return text  # the point of a decimal fraction
    return rest if _is_ellipsis(dots) else text


def _without_trailing_dots(text: str) -> str:
    """The same at the end."""
    bracket = text[-1:] in (")", "]") and text.rfind("(" if text[-1] == ")" else "[")
    if bracket and _is_ellipsis(text[bracket + 1 : -1]):
        return text[:bracket]
    rest = text.rstrip(".… ")
    return rest if _is_ellipsis(text[len(rest) :]) else text


def _is_ellipsis(text: str) -> bool:
    dots = text.replace(" ", "")
    return bool(dots) and not dots.strip(".…") and ("…" in dots or len(dots) > 2)
