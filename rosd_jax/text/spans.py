"""Finds the reflector's quote in a response: from its answer to characters, and from those to tokens.

text/fold.py defines which texts are equal for a reader. Everything here reads text that a model wrote, so
every search takes linear time in practice: no pattern backtracks over a long text, and no text is sliced
repeatedly.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rosd_jax.text.fold import fold
from rosd_jax.text.markup import Folded, has_list_numbers
from rosd_jax.text.quotes import Needle, needles
from rosd_jax.types import Span

IDEA_TAGS = ("explaination", "explanation", "reflection")  # the first is the spelling of the released code
QUOTE_TAG = "error_quote"
NUMBER_GAPS = ("\u00a0", "\u2007", "\u2009", "\u202f", "\\,")  # inside "12 345"
OPERATORS = "+-*/^·±∓√_\\()[]{}'!%=<>≤≥~→"
_SAYS_NOTHING = re.compile(r"[.…\s]*|[\W_]*(?:and|or|to|then)[\W_]*", re.IGNORECASE)
SUPERSCRIPTS = "⁺⁻⁼⁽⁾₊₋₌₍₎"
_TAG = re.compile(rf"<(/?)({'|'.join((*IDEA_TAGS, QUOTE_TAG))})>", re.IGNORECASE)


@dataclass(frozen=True)
class Located:
    """The place of a quote in a text, in characters [start, stop)."""

    start: int
    stop: int
    ambiguous: bool  # the quote occurs more than once


def parse_reflection(raw: str) -> tuple[str | None, str | None]:
    """The idea and the error quote of a reflector's answer; None for what is missing.

    The quote is the first `error_quote` block with content. The idea is the first such block of
    `explaination`, else of `explanation`, else of `reflection`; untagged text is not an idea (as in the
    released code). Tags match in any case, and blocks are trimmed. White space, dots and a lone "and" between
    two mentioned tags are not content.

    A block ends at the first closing tag and begins at the last opening tag before it, so tags mentioned
    ahead of the blocks do no harm. A tag in quotation marks (`<error_quote>`) is a mention. A quote block
    inside an idea block is not part of the idea, and the reverse.
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
        if not _SAYS_NOTHING.fullmatch(block.text):
            said.setdefault(block.name, block.text)
    idea = next((said[name] for name in IDEA_TAGS if name in said), None)
    return idea, said.get(QUOTE_TAG)


def parse_official(raw: str) -> tuple[str | None, str | None]:
    """The idea and the quote as the released code reads them; None for what is missing or blank.

    The idea is the first of the first `explaination`, `explanation` and `reflection` blocks, in this order,
    that is not blank. The quote is the first `error_quote` block. A block extends from the first opening tag
    to the first closing tag after it.
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
    """The first exact occurrence of the quote, or of the trimmed quote (as in the released code)."""
    for candidate in _exact_candidates(quote):
        start = text.find(candidate)
        if start >= 0:
            return start, start + len(candidate)
    return None


def locate_quote(text: str, quote: str | None) -> Located | None:
    """The place of the quote in the text, or None.

    An exact occurrence is taken if there is one. Otherwise the quote is found as a reader would find it
    (text/fold.py), if necessary without quotation marks or brackets around it, an ellipsis before or after
    it, or punctuation at its end that the text lacks. Such a match never begins or ends inside a word, a
    number, a power or an operator, or after a sign, so every digit and every sign must agree.

    Of several occurrences the first that fills whole lines is taken, else the first that cuts no word or
    number, else the first.
    """
    for candidate in _exact_candidates(quote):
        found = _choose(text, _occurrences(text, candidate))
        if found:
            return found
    places: list[Folded] = []
    for needle in needles((quote or "").strip()):
        places = places or _readings(text)
        for folded in places[:1] if needle.unnumbered else places:
            found = _choose(text, _tolerant_occurrences(text, folded, needle))
            if found:
                return found
    return None


def chars_to_tokens(span: Span, offsets: np.ndarray) -> Span:
    """The tokens [first, last + 1) that share characters with the span.

    offsets: int [tokens, 2], from `Tokenizer.offsets`; tokens of zero width belong to no span. Raises
    ValueError if no token shares a character with it.
    """
    start = offsets[:, 0]
    stop = offsets[:, 1]
    inside = np.flatnonzero((stop > span[0]) & (start < span[1]) & (stop > start))
    if not len(inside):
        raise ValueError(f"no token covers any of the characters {span}")
    return int(inside[0]), int(inside[-1]) + 1


def official_token_start(encode: Callable[[str], Sequence[int]], text: str, start: int) -> int:
    """The mapping of the released code: the number of tokens of the re-encoded prefix.

    After a space it is one token late.
    """
    return len(encode(text[:start]))


@dataclass(frozen=True)
class _Block:
    """A block of a reflector's answer, with its tags at [start, stop)."""

    name: str
    start: int
    stop: int
    text: str  # without blocks of the other kind


def _only_named(raw: str, tag: re.Match[str]) -> bool:
    before = raw[tag.start() - 1 : tag.start()]
    after = raw[tag.end() : tag.end() + 1]
    return before + after in ("``", '""', "''", "“”", "‘’")


def _own_text(raw: str, start: int, stop: int, is_quote: bool, blocks: Sequence[_Block]) -> str:
    """The text at [start, stop) outside blocks of the other kind. blocks: sorted by their ends."""
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
    if written in (*IDEA_TAGS, QUOTE_TAG):
        return written
    # Case-insensitive matching also accepts the dotless i, which lower() would keep.
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
    """Whether the boundary before character `at` is inside a word, a number, a power or an operator."""
    if not 0 < at < len(text):
        return False
    left = text[at - 1]
    right = text[at]
    before = text[max(0, at - 2) : at - 1]
    after = text[at + 1 : at + 2]
    if _in_word(left) and _in_word(right):
        return True
    if right.isdigit() and (left in ".,-−/^" or (left == ":" and before.isdigit())):
        return True
    if left.isdigit() and right in ".,/^:'" and after.isalnum():
        return right != ":" or after.isdigit()
    return _cuts_term(before, left, right, after) or _cuts_operator(left, right)


def _cuts_term(before: str, left: str, right: str, after: str) -> bool:
    """Whether the boundary separates a sign, power, index, apostrophe or backslash from its term."""
    if left in "-−" and right.isalpha():
        return not before.isalnum() and before not in tuple(")]}!%'")  # the hyphen of x-y is not a sign
    if right == "'" and _in_word(left):
        return after.isalnum() or after in tuple("('")
    if left == "'" and _in_word(right):
        return before.isalnum()
    if right in "^_" or left in "^_" or (left == "{" and before in tuple("^_")):
        return not (left.isspace() or right.isspace())
    if right in SUPERSCRIPTS or left in SUPERSCRIPTS:
        return True
    return (left in "±∓√\\" and not right.isspace()) or (left.isdigit() and right in "%‰")


def _cuts_operator(left: str, right: str) -> bool:
    return (left in "=<>!≠≤≥~:" and right in "=<>") or (left == right and left in "*|&+-/")


def _in_word(character: str) -> bool:
    # Scripts without letter case (Lo: Chinese, Thai, ...) may write words without spaces.
    category = unicodedata.category(character)
    return category[0] == "M" or (character.isalnum() and category != "Lo")


def _fills_lines(text: str, span: Span) -> bool:
    left = span[0]
    right = span[1]
    while left > 0 and text[left - 1] in " \t\r":
        left -= 1
    while right < len(text) and text[right] in " \t\r":
        right += 1
    return (left == 0 or text[left - 1] == "\n") and (right == len(text) or text[right] == "\n")


def _readings(text: str) -> list[Folded]:
    """The folded text, and also without the numbers of its lists if it has any."""
    return [fold(text), fold(text, numbers=False)] if has_list_numbers(text) else [fold(text)]


def _tolerant_occurrences(text: str, folded: Folded, needle: Needle) -> Iterator[Span]:
    """Occurrences in the folded text that split nothing and meet the restrictions of the needle."""
    at = folded.text.find(needle.text)
    while at >= 0:
        stop = at + len(needle.text)
        whole = not (_splits(text, folded, at) or _splits(text, folded, stop))
        if whole and _stands_right(text, folded, at, stop, needle):
            yield folded.start[at], folded.stop[stop - 1]
            at = stop
        else:
            at = _next_start(text, folded, at + 1)
        at = folded.text.find(needle.text, at)


def _next_start(text: str, folded: Folded, at: int) -> int:
    """The next place where a match may begin. Skipping the others keeps the search linear."""
    while at < len(folded.text) and _splits(text, folded, at):
        at += 1
    return at


def _splits(text: str, folded: Folded, at: int) -> bool:
    """Whether a boundary in the folded text is inside a character, a word, a number or an operator."""
    if not 0 < at < len(folded.text):
        return False
    if folded.start[at] == folded.start[at - 1] or _cuts(folded.text, at):
        return True
    space = at if folded.text[at] == " " else at - 1
    if text[folded.start[space] : folded.stop[space]] not in NUMBER_GAPS:
        return False
    return folded.text[space - 1 : space].isdigit() and folded.text[space + 1 : space + 2].isdigit()


def _stands_right(text: str, folded: Folded, at: int, stop: int, needle: Needle) -> bool:
    if needle.begins and not _begins(text, folded, at, line=needle.unnumbered):
        return False
    if needle.apart and not needle.begins and _operates(text, folded, at, -1):
        return False
    return not (needle.closed and _operates(text, folded, stop - 1, 1))


def _begins(text: str, folded: Folded, at: int, *, line: bool) -> bool:
    """Whether a line, or with line=False a sentence, begins here."""
    before = at - 2 if folded.text[at - 1 : at] == " " else at - 1
    if before < 0 or "\n" in text[folded.stop[before] : folded.start[at]]:
        return True
    return not line and before < at - 1 and folded.text[before] in ".!?;。"


def _operates(text: str, folded: Folded, at: int, step: int) -> bool:
    """Whether an operand or an operator is next to this place on its line, in this direction."""
    letters = folded.text
    near = at + step
    while 0 <= near < len(letters) and (letters[near] == " " or unicodedata.combining(letters[near])):
        near += step
    if not 0 <= near < len(letters):
        return False
    if "\n" in text[folded.stop[min(near, at)] : folded.start[max(near, at)]]:
        return False
    if letters[near].isalpha():
        beyond = letters[near + step] if 0 <= near + step < len(letters) else ""
        return unicodedata.category(letters[near]) != "Lo" and not beyond.isalpha()
    return letters[near] in OPERATORS or letters[near].isalnum()
