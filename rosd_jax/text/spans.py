"""From a reflector's answer to characters, from characters to tokens.

Everything here reads text that a model wrote, so every search is linear in practice: no pattern
that can backtrack over a long text, no repeated slicing.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rosd_jax.types import Span

IDEA_TAGS = ("explaination", "explanation", "reflection")  # the first is a released spelling
QUOTE_TAG = "error_quote"
WRAPPERS = ('""', "''", "``", "“”", "‘’", "„“", "”“", "«»", "「」")
SEGMENT_LIMIT = 31  # characters; Unicode's stream-safe bound, keeps reordering of marks linear
_PLAIN = re.compile(r"[!-~]+(?=[\x00-\x7f]|\Z)")  # nothing to fold but case, no marks behind it
_TAG = re.compile(rf"<(/?)({'|'.join((*IDEA_TAGS, QUOTE_TAG))})>", re.IGNORECASE)


@dataclass(frozen=True)
class Located:
    """Where a quote stands in a text, in characters [start, stop)."""

    start: int
    stop: int
    ambiguous: bool  # the quote stands there more than once


def parse_reflection(raw: str) -> tuple[str | None, str | None]:
    """The idea and the error quote of a reflector's answer; None for what is missing.

    Quote: the first `error_quote` block that says something; idea: such a block of `explaination`, else
    of `explanation`, else of `reflection`. Untagged text is no idea (as released). Tags in any case,
    outer white space trimmed; white space and dots say nothing.

    A block ends at the first close of its tag and begins at the last opening before that, so tags that
    are named ahead of the blocks do no harm; a tag in marks (`<error_quote>`) is only named. A quote
    block inside an idea block is no part of the idea, and the other way round.
    """
    blocks: list[_Block] = []
    opened: dict[str, re.Match[str]] = {}
    for tag in _TAG.finditer(raw):
        name = _tag_name(tag[2])
        if _only_named(raw, tag):
            continue
        if not tag[1]:
            opened[name] = tag
        elif name in opened:
            first = opened.pop(name)
            text = _own_text(raw, first.end(), tag.start(), name == QUOTE_TAG, blocks)
            blocks.append(_Block(name, first.start(), tag.end(), text.strip()))
    said: dict[str, str] = {}
    for block in blocks:
        if block.text.strip(".… \t\r\n"):
            said.setdefault(block.name, block.text)
    idea = next((said[name] for name in IDEA_TAGS if name in said), None)
    return idea, said.get(QUOTE_TAG)


def parse_released(raw: str) -> tuple[str | None, str | None]:
    """The idea and the quote as the release reads them; None for what is missing or blank.

    Idea: the first non-blank of the first `explaination`, `explanation` and `reflection` blocks, in
    this order; quote: the first `error_quote` block. A block goes from the first opening of its tag to
    the first close after it.
    """
    blocks: dict[str, str] = {}
    opened: dict[str, int] = {}
    for tag in _TAG.finditer(raw):
        name = _tag_name(tag[2])
        if not tag[1]:
            opened.setdefault(name, tag.end())
        elif name in opened and name not in blocks:
            blocks[name] = raw[opened[name] : tag.start()].strip()
    idea = next((blocks[name] for name in IDEA_TAGS if blocks.get(name)), None)
    return idea, blocks.get(QUOTE_TAG) or None


def find_exact(text: str, quote: str | None) -> Span | None:
    """The first place where the quote, or the quote trimmed, stands exactly (as released)."""
    for candidate in _exact_candidates(quote):
        start = text.find(candidate)
        if start >= 0:
            return start, start + len(candidate)
    return None


def locate_quote(text: str, quote: str | None) -> Located | None:
    """Where the quote stands in the text, or None.

    Letter by letter if it does; else tolerant to runs of white space, case, canonically equal or
    full-width Unicode forms, quotation marks around it, and an ellipsis before or behind it. A
    tolerant match never begins or ends inside a word or a number, so every digit must agree.

    Ambiguity: of several occurrences the first that fills whole lines wins; without one, the first
    that cuts no word or number; without one, the first.
    """
    for candidate in _exact_candidates(quote):
        found = _choose(text, _occurrences(text, candidate))
        if found:
            return found
    folded = None
    for candidate in _variants(quote or ""):
        needle = _fold(candidate).text
        if any(c.isalnum() for c in needle):
            folded = folded or _fold(text)
            found = _choose(text, _tolerant_occurrences(text, folded, needle))
            if found:
                return found
    return None


def chars_to_tokens(span: Span, offsets: np.ndarray) -> Span:
    """The tokens [first, last + 1) that share characters with the span.

    offsets: int [tokens, 2], from `Tokenizer.offsets`; zero-width tokens belong to no span. Raises
    ValueError when no token shares a character with it.
    """
    start, stop = offsets[:, 0], offsets[:, 1]
    inside = np.flatnonzero((stop > span[0]) & (start < span[1]) & (stop > start))
    if not len(inside):
        raise ValueError(f"no token covers any of the characters {span}")
    return int(inside[0]), int(inside[-1]) + 1


def release_token_start(encode: Callable[[str], Sequence[int]], text: str, start: int) -> int:
    """The released mapping: tokens of the re-encoded prefix. One token late after a space."""
    return len(encode(text[:start]))


@dataclass(frozen=True)
class _Block:
    """A block of a reflector's answer: its tags and what they hold stand at [start, stop)."""

    name: str
    start: int
    stop: int
    text: str  # without blocks of the other kind


def _only_named(raw: str, tag: re.Match[str]) -> bool:
    before, after = raw[tag.start() - 1 : tag.start()], raw[tag.end() : tag.end() + 1]
    return before + after in ("``", '""', "''", "“”", "‘’")


def _own_text(raw: str, start: int, stop: int, is_quote: bool, blocks: Sequence[_Block]) -> str:
    """What stands at [start, stop) outside the blocks of the other kind. blocks: by where they end."""
    kept: list[str] = []
    for block in reversed(blocks):
        if block.stop <= start:
            break
        inside = block.start >= start and block.stop <= stop
        if inside and (block.name == QUOTE_TAG) != is_quote:
            kept.append(raw[block.stop : stop])
            stop = block.start
    kept.append(raw[start:stop])
    return "".join(reversed(kept))


def _tag_name(written: str) -> str:
    # Case-insensitive matching also takes the dotless i, which lower() would keep.
    return next(n for n in (*IDEA_TAGS, QUOTE_TAG) if re.fullmatch(n, written, re.IGNORECASE))


def _exact_candidates(quote: str | None) -> tuple[str, ...]:
    trimmed = (quote or "").strip()
    return (quote or "", trimmed) if trimmed else ()


def _occurrences(text: str, needle: str) -> Iterator[Span]:
    at = text.find(needle)
    while at >= 0:
        yield at, at + len(needle)
        at = text.find(needle, at + len(needle))


def _choose(text: str, spans: Iterable[Span]) -> Located | None:
    """Applies the ambiguity rule of `locate_quote`."""
    first = whole = line = None
    count = 0
    for span in spans:
        count += 1
        first = first or span
        if not whole and not (_cuts(text, span[0]) or _cuts(text, span[1])):
            whole = span
        if _fills_lines(text, span):
            line = line or span
        if line and count > 1:
            break
    best = line or whole or first
    return Located(*best, ambiguous=count > 1) if best else None


def _cuts(text: str, at: int) -> bool:
    """Whether the place between two characters lies inside a word or a number."""
    if not 0 < at < len(text):
        return False
    left, right = text[at - 1], text[at]
    if _in_word(left) and _in_word(right):
        return True
    if right.isdigit() and left in ".,-−/^":
        return True
    return left.isdigit() and right in ".,/^" and text[at + 1 : at + 2].isalnum()


def _in_word(character: str) -> bool:
    # Scripts without letter case (Lo: Chinese, Thai, ...) may run words together.
    return character.isalnum() and unicodedata.category(character) != "Lo"


def _fills_lines(text: str, span: Span) -> bool:
    left, right = span[0], span[1]
    while left > 0 and text[left - 1] in " \t\r":
        left -= 1
    while right < len(text) and text[right] in " \t\r":
        right += 1
    return (left == 0 or text[left - 1] == "\n") and (right == len(text) or text[right] == "\n")


def _variants(quote: str) -> Iterator[str]:
    """The quote trimmed, then with one layer of added marks after another taken off."""
    text, peeled = "", quote.strip()
    while peeled and peeled != text:
        text = peeled
        yield text
        peeled = _peel(text)


def _peel(text: str) -> str:
    if len(text) > 2 and text[0] + text[-1] in WRAPPERS:
        return text[1:-1].strip()
    if text.startswith(("...", "…")):
        return text.lstrip(".…").strip()
    if text.endswith(("...", "…")):
        return text.rstrip(".…").strip()
    return text


@dataclass(frozen=True)
class _Folded:
    """A text in the form in which quotes are compared, and where each character came from."""

    text: str
    start: list[int]  # per folded character: the original segment's start ...
    stop: list[int]  # ... and stop


def _fold(text: str) -> _Folded:
    pieces, starts, stops, at = [], [], [], 0
    while at < len(text):
        plain = _PLAIN.match(text, at)
        if plain:
            stop = plain.end()
            pieces.append(plain[0].lower())
            starts += range(at, stop)
            stops += range(at + 1, stop + 1)
        else:
            stop = _segment_stop(text, at)
            pieces.append(_fold_segment(text[at:stop]))
            starts += [at] * len(pieces[-1])
            stops += [stop] * len(pieces[-1])
        at = stop
    return _Folded("".join(pieces), starts, stops)


def _segment_stop(text: str, at: int) -> int:
    """Where the run of white space, or the character with its combining marks, at `at` ends."""
    stop = at + 1
    if text[at].isspace():
        while stop < len(text) and text[stop].isspace():
            stop += 1
        return stop
    limit = min(len(text), at + SEGMENT_LIMIT)
    while stop < limit and unicodedata.combining(text[stop]):
        stop += 1
    return stop


def _fold_segment(segment: str) -> str:
    if segment.isspace():
        return " "
    if segment.isascii():
        return segment.lower()
    plain = "".join(_same_character(c) for c in segment)
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", plain).casefold())


def _same_character(character: str) -> str:
    # Compatibility forms only where the reader sees the same text: "x²" must not become "x2".
    wide = unicodedata.decomposition(character).startswith(("<wide>", "<narrow>"))
    if wide or character in "…µﬀﬁﬂﬃﬄﬅﬆ":
        return unicodedata.normalize("NFKC", character)
    return character


def _tolerant_occurrences(text: str, folded: _Folded, needle: str) -> Iterator[Span]:
    """Occurrences in the folded text that split no segment, word or number of the original."""
    at = folded.text.find(needle)
    while at >= 0:
        last = at + len(needle) - 1
        span = folded.start[at], folded.stop[last]
        split = _inside_segment(folded, at) or _inside_segment(folded, last + 1)
        if split or _cuts(text, span[0]) or _cuts(text, span[1]):
            at = _next_start(text, folded, at + 1)
        else:
            yield span
            at = last + 1
        at = folded.text.find(needle, at)


def _inside_segment(folded: _Folded, at: int) -> bool:
    return 0 < at < len(folded.text) and folded.start[at] == folded.start[at - 1]


def _next_start(text: str, folded: _Folded, at: int) -> int:
    """The next place where a match may begin; skipping the others keeps the search linear."""
    while at < len(folded.text) and (_inside_segment(folded, at) or _cuts(text, folded.start[at])):
        at += 1
    return at
