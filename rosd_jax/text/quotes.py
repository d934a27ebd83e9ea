"""The forms in which a quote is searched for: as written, then without what was added around it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from rosd_jax.text.fold import finish
from rosd_jax.text.markup import Folded, has_list_numbers, line_marks, strip_markup, strip_rules, unescape

QUOTATION_MARKS = tuple(
    """"" '' “” ‘’ „“ „” ”“ ‚‘ «» »« 「」 『』 〝〞 ｢｣ ❝❞ ❮❯ ´´ ＇＇ ＂＂ 《》 【】""".split()
)
BRACKETS = tuple("() [] {} （） ［］ 〔〕 〈〉 <> ‹› ⟨⟩ ⟦⟧ 〖〗 〘〙 ｛｝ ＜＞".split())
DOUBLE_MARKS = '"“”„«»'  # each may open or close, since people mix straight and curly ones
END_MARKS = ".,;:?。、।．，；：？"
LONE_MARKS = tuple('"“”„«»')
_DOT_BRACKETS = {pair[0]: pair[1] for pair in BRACKETS}
MAX_LAYERS = 8  # of marks around a quote that are removed


_TAG = re.compile(r"<([A-Za-z][\w-]{0,20})>")


@dataclass(frozen=True)
class Needle:
    """A folded quote, and restrictions on where it may be found."""

    text: str
    begins: bool = False  # a bullet or a heading was removed, so it must begin a line or a sentence
    apart: bool = False  # a mark that could be an operator was removed, so no term may precede it ...
    closed: bool = False  # ... and, since it was a bracket, none may follow
    unnumbered: bool = False  # numbers of a list were removed, so those of the text must stay


def needles(quote: str) -> Iterator[Needle]:
    """The folded quote, then the same with one layer after another removed, while a letter or digit is left.

    Layers are quotation marks (a pair or a single one), brackets, tags, an ellipsis at the beginning or end,
    and punctuation at the end. Next come the same forms without the numbers of a list, and last those of the
    quote read as JSON text.
    """
    plain = strip_rules(unescape(quote)).text.replace('\\"', '"').strip()
    yield from _layers(plain, numbers=True)
    if has_list_numbers(plain):
        yield from _layers(plain, numbers=False)
    if (inside := _from_json(plain)) != plain:
        yield from _layers(inside, numbers=True)


def _from_json(text: str) -> str:
    """The text decoded as the inside of a JSON string: `\\\\frac`, `\\n`, `\\u00e9`."""
    try:
        inside = json.loads('"' + text.replace('"', '\\"') + '"', strict=False).strip()
    except ValueError:
        return text
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", inside)


def _layers(plain: str, *, numbers: bool) -> Iterator[Needle]:
    rule = Needle("", unnumbered=not numbers)
    for _ in range(MAX_LAYERS):
        start, stop = next(line_marks(plain, numbers=numbers), (1, 1))
        if start == 0:
            if numbers:
                yield from _needle(strip_markup(Folded.of(plain), first=False).text, rule)
            quoted = plain[:stop].startswith(">")
            rule = replace(rule, begins=rule.begins or not quoted, apart=True)
        plain = strip_markup(Folded.of(plain), numbers=numbers).text.strip()
        yield from _needle(plain, rule)
        if plain[:1] + plain[-1:] in BRACKETS:
            rule = replace(rule, apart=True, closed=True)
        peeled = _peel(plain)
        if peeled == plain:
            return
        plain = peeled


def _needle(plain: str, rule: Needle) -> Iterator[Needle]:
    text = finish(Folded.of(plain)).text.strip()
    if any(character.isalnum() for character in text):
        yield replace(rule, text=text)


def _peel(text: str) -> str:
    """Removes one layer of what was added around a quote."""
    inner = _without_leading_dots(text)
    if inner == text:
        inner = _without_trailing_dots(text)
    if inner == text and len(text) > 2 and text[0] + text[-1] in QUOTATION_MARKS + BRACKETS:
        inner = _without_tags(text) or text[1:-1]
    if inner == text and len(text) > 2 and text[0] in DOUBLE_MARKS and text[-1] in DOUBLE_MARKS:
        inner = text[1:-1]
    if inner == text and text.startswith("``") and text.endswith("''"):  # quotation marks of LaTeX
        inner = text[2:-2]
    if inner == text:
        inner = _without_lone_mark(text)
    if inner == text:
        inner = text.rstrip(END_MARKS)
    if inner == text and text.endswith("！"):
        inner = text[:-1]
    if inner == text and text.endswith("!") and text[-3:-1].isalpha():  # not a factorial
        inner = text[:-1]
    return inner.strip()


def _without_tags(text: str) -> str | None:
    tag = _TAG.match(text)
    return text[tag.end() : -len(tag[0]) - 1] if tag and text.endswith(f"</{tag[1]}>") else None


def _without_lone_mark(text: str) -> str:
    if sum(map(text.count, LONE_MARKS)) != 1:
        return text
    if text[0] in LONE_MARKS:
        return text[1:]
    return text[:-1] if text[-1] in LONE_MARKS else text


def _without_leading_dots(text: str) -> str:
    """Removes "...", "…", "[...]", "(...)" and the like at the beginning."""
    closes = _DOT_BRACKETS.get(text[:1])
    bracket = text.find(closes) if closes else 0
    if bracket > 0 and _is_ellipsis(text[1:bracket]):
        return text[bracket + 1 :]
    rest = text.lstrip(".… ")
    dots = text[: len(text) - len(rest)]
    if rest[:1].isdigit() and dots.endswith(".") and not dots.endswith("...") or dots.endswith("...."):
        return text  # the point of a decimal fraction
    return rest if _is_ellipsis(dots) else text


def _without_trailing_dots(text: str) -> str:
    """Removes the same at the end."""
    opens = next((left for left, right in _DOT_BRACKETS.items() if text.endswith(right)), None)
    bracket = text.rfind(opens) if opens else 0
    if bracket > 0 and _is_ellipsis(text[bracket + 1 : -1]):
        return text[:bracket]
    rest = text.rstrip(".… ")
    return rest if _is_ellipsis(text[len(rest) :]) else text


def _is_ellipsis(text: str) -> bool:
    dots = text.replace(" ", "")
    return bool(dots) and not dots.strip(".…") and ("…" in dots or len(dots) > 2)
