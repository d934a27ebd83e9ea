"""The parts of a quantity: the currency before it, the unit after it, and digits in a stated base."""

from __future__ import annotations

from fractions import Fraction

from rosd_jax.rewards.maths import words
from rosd_jax.rewards.maths.cursor import CLOSERS, OPENERS, Node, closing
from rosd_jax.rewards.maths.expression import ANGLED
from rosd_jax.rewards.maths.latex import Token

_BASES: dict[str, int] = dict(
    zip("two three four five six seven eight nine ten".split(), range(2, 11), strict=True)
)
_BASES |= {"eleven": 11, "twelve": 12, "sixteen": 16}


def split_currency(tokens: list[Token]) -> tuple[str, list[Token]]:
    """The currency before a value, and the other tokens; ("", tokens) without one."""
    signed = tokens[0].text == "-" and len(tokens) > 2
    sign = tokens[:1] if signed else []
    rest = tokens[1:] if signed else tokens
    if rest[0].text in ("US", "A", "C", "HK", "NZ", "S") and rest[1:2] and rest[1].text == "$":
        rest = rest[1:]  # US$40
    name = words.currency(rest[0].text)
    if len(rest) < 2 or not name:
        return "", tokens
    rest = rest[2:] if rest[1].text == "." else rest[1:]
    return name, sign + rest


def unit_start(tokens: list[Token]) -> int:
    """The index where the final unit begins; the number of tokens if there is no unit."""
    depth = 0
    for index, token in enumerate(tokens):
        depth += (token.text in OPENERS) - (token.text in CLOSERS)
        before = tokens[index - 1].text if index else "^"
        if depth == 0 and before not in ("^", "_", "+", "-", "*", "/", "(") and _begins_unit(tokens, index):
            return index
    return len(tokens)


def _begins_unit(tokens: list[Token], index: int) -> bool:
    token = tokens[index]
    before = tokens[index - 1]
    if token.kind == "text":
        return len(token.text) > 1 or words.is_known_unit(token.text)
    if token.kind == "let":
        rest = "".join(t.text for t in tokens[index:] if t.text not in "{}")
        speed = bool(token.gap) and rest in ("m/s", "m/s^2")
        return words.is_typed_unit(token.text) and (before.kind == "num" or before.text == "}") or speed
    if token.text == "°":
        return not any(t.text in ANGLED for t in tokens[:index])
    return token.text in words.CURRENCIES or token.text == "%"


def read_based(tokens: list[Token]) -> Node | None:
    """Digits in a stated base: `52_8`, `52_{\\text{eight}}`, `52 (base 8)`; None for anything else."""
    if tokens[0].text == "(" and (end := closing(tokens, 0)) > 0:
        tokens = tokens[1:end] + tokens[end + 1 :]
    texts = [token.text for token in tokens]
    lower = [text.lower() for text in texts]
    if "_" in texts:
        cut = texts.index("_")
    else:
        cut = lower.index("base") if "base" in lower else -1
    cut -= cut > 1 and texts[cut - 1] == "("
    if cut < 1:
        return None
    stated = [text for text in lower[cut:] if text not in ("_", "base", "{", "}", "(", ")")]
    written = [text for text in texts[:cut] if text.lower() != "in"]
    if len(stated) != 1 or not (stated[0] in _BASES or (stated[0].isdigit() and len(stated[0]) <= 2)):
        return None
    base = _BASES.get(stated[0]) or int(stated[0])
    sign = "-" if written[0] == "-" else ""
    digits = "".join(written[bool(sign) :]).lstrip("0").upper() or "0"
    numeral = digits.replace(".", "", 1)
    if not (2 <= base <= 36 and numeral.isascii() and numeral.isalnum()):
        return None
    if not any(c.isdigit() for c in numeral) and (base != 16 or len(numeral) < 2):
        return None  # a variable with a subscript
    return Node("base", text=sign + digits, value=Fraction(base))
