"""A cursor over tokens, the nodes of a tree, and numbers in all their spellings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from rosd_jax.rewards.maths.latex import Token, Unreadable

OPENERS = frozenset(["(", "[", "{", r"\{", r"\langle", r"\begin", r"\lfloor", r"\lceil"])
CLOSERS = frozenset([")", "]", "}", r"\}", r"\rangle", r"\end", r"\rfloor", r"\rceil"])
_MAX_EXPONENT = 5000  # of ten, in the text of a number


@dataclass(frozen=True)
class Node:
    """A part of an answer: its kind, its name or spelling (`text`), and for a number its value."""

    kind: str
    parts: tuple[Node, ...] = ()
    text: str = ""
    value: Fraction = Fraction(0)


class Cursor:
    """A position in a list of tokens."""

    def __init__(self, tokens: list[Token]):
        self.tokens = tokens
        self.at = 0

    def peek(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].text if self.at + ahead < len(self.tokens) else ""

    def kind(self, ahead: int = 0) -> str:
        return self.tokens[self.at + ahead].kind if self.at + ahead < len(self.tokens) else ""

    def take(self, text: str = "") -> Token:
        if self.at >= len(self.tokens) or (text and self.peek() != text):
            raise Unreadable(f"{text or 'more'} was expected")
        self.at += 1
        return self.tokens[self.at - 1]

    def matching(self, start: int) -> int:
        """The index of the token that closes the bracket at `start`. Raises Unreadable if there is none."""
        depth = 0
        for index in range(start, len(self.tokens)):
            text = self.tokens[index].text
            depth += (text in ("(", "{", "[", r"\{")) - (text in (")", "}", "]", r"\}"))
            if depth == 0:
                return index
        raise Unreadable("a bracket has no end")

    def script(self) -> str:
        """The text of a subscript or a prime, which is part of a name."""
        self.take()
        if self.peek() != "{":
            return self.one_letter() if self.kind() == "let" else self.take().text
        stop = self.matching(self.at)
        text = " ".join(token.text for token in self.tokens[self.at + 1 : stop])
        self.at = stop + 1
        return text

    def one_letter(self) -> str:
        """Takes the first of a run of letters and leaves the others."""
        token = self.tokens[self.at]
        if len(token.text) == 1:
            self.at += 1
        else:
            self.tokens[self.at] = token._replace(text=token.text[1:])
        return token.text[0]


def closing(tokens: Sequence[Token], start: int) -> int:
    """The index of the token that closes the bracket at `start`, or -1."""
    depth = 0
    for index in range(start, len(tokens)):
        depth += (tokens[index].text in OPENERS) - (tokens[index].text in CLOSERS)
        if depth == 0:
            return index
    return -1


def number(text: str) -> Node:
    """The exact value of a number's text. Raises Unreadable beyond 10^5000."""
    mantissa, _, exponent = text.lower().partition("e")
    if exponent and (len(exponent) > 6 or abs(int(exponent)) > _MAX_EXPONENT):
        raise Unreadable("an exponent of ten that no answer has")
    return Node("num", text=text, value=Fraction(mantissa.rstrip(".")) * Fraction(10) ** int(exponent or 0))


def recurring(digits: str, repetend: str) -> Node:
    """The value of a recurring decimal: `digits`, then `repetend` forever."""
    _, _, decimals = digits.partition(".")
    nines = 10 ** len(repetend) - 1
    head = Fraction(digits.rstrip(".") or 0)
    return Node("num", value=head + Fraction(int(repetend), nines * 10 ** len(decimals)))


def read_number(cursor: Cursor) -> Node:
    """A number, with the marks that say that its last digits recur."""
    text = cursor.take().text
    point = "." in text and "e" not in text.lower()
    if point and cursor.peek() in (r"\overline", r"\dot"):
        return recurring(text, _repetend(cursor))
    if point and cursor.peek() == "...":
        cursor.take()
        return _continued(text)
    if point and cursor.peek() == "(" and cursor.kind(1) == "num" and cursor.peek(2) == ")":
        repetend = cursor.peek(1)
        last = text[-1] == "." or cursor.at + 3 == len(cursor.tokens)
        if last and repetend.isdigit():
            cursor.at += 3
            return recurring(text, repetend)
    return number(text)


def _repetend(cursor: Cursor) -> str:
    digits = ""
    dotted = 0
    while cursor.peek() in (r"\overline", r"\dot") or (dotted == 1 and cursor.kind() == "num"):
        if cursor.kind() == "num":
            digits += cursor.take().text
            continue
        dotted += cursor.take().text == r"\dot"
        grouped = cursor.peek() == "{"
        cursor.at += grouped
        digits += cursor.take().text
        if grouped:
            cursor.take("}")
    if not digits.isdigit():
        raise Unreadable("an overline over no digits")
    return digits


def _continued(text: str) -> Node:
    """`0.1666...`: the shortest block that the digits end in twice recurs; else the number is cut off."""
    decimals = text.partition(".")[2]
    for length in range(1, len(decimals) // 2 + 1):
        block = decimals[-length:]
        if decimals[-2 * length : -length] == block:
            return recurring(text[:-length], block)
    return Node("num", text=text + "...", value=Fraction(text.rstrip(".") or 0))
