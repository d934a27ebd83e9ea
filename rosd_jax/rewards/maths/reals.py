"""Sets of real numbers with constant bounds: intervals, unions, differences and inequalities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mpmath

from rosd_jax.rewards.maths.cursor import Node
from rosd_jax.rewards.maths.latex import Unreadable
from rosd_jax.rewards.maths.value import real

_MAX_PIECES = 100


@dataclass(frozen=True)
class Piece:
    """The interval from `low` to `high`. The flags say which bounds belong to it."""

    low: Any  # numbers of mpmath
    high: Any
    has_low: bool
    has_high: bool


Reals = tuple[Piece, ...]  # disjoint, from left to right

_ALL: Reals = (Piece(-mpmath.inf, mpmath.inf, False, False),)


def as_reals(node: Node) -> Reals | None:
    """The set that a node describes; None if it describes none or its bounds have variables."""
    try:
        return _reals(node)
    except (Unreadable, ValueError, ZeroDivisionError, OverflowError):
        return None


def same_reals(a: Reals | None, b: Reals | None) -> bool:
    """Whether two sets are the same. None, which is not a set, equals nothing."""
    if a is None or b is None or len(a) != len(b):
        return False
    return all(
        (x.has_low, x.has_high) == (y.has_low, y.has_high) and _near(x.low, y.low) and _near(x.high, y.high)
        for x, y in zip(a, b, strict=True)
    )


def _near(a: Any, b: Any) -> bool:
    with mpmath.workdps(200):
        finite = mpmath.isfinite(a) and mpmath.isfinite(b)
        return a == b or bool(finite and abs(a - b) <= mpmath.mpf(10) ** -100 * max(abs(a), abs(b)))


def _reals(node: Node) -> Reals:
    if node.kind == "reals":
        return _ALL
    if node.kind == "tuple" and len(node.parts) == 2 and node.text in ("()", "[]", "(]", "[)"):
        low, high = (real(part) for part in node.parts)
        return _merged([Piece(low, high, node.text[0] == "[", node.text[1] == "]")])
    if node.kind == "set":
        points = [real(part) for part in node.parts]
        return _merged([Piece(point, point, True, True) for point in points])
    if node.kind == "list" and node.text == "or" and len({_bounded(part) for part in node.parts}) == 1:
        return _merged([piece for part in node.parts for piece in _reals(part)])
    if node.kind == "relation":
        return _inequality(node)
    if node.kind == "union":
        return _merged([piece for part in node.parts for piece in _reals(part)])
    if node.kind in ("minus", "intersection"):
        left, right = (_reals(part) for part in node.parts)
        return _common(left, _outside(right) if node.kind == "minus" else right)
    raise Unreadable(f"a {node.kind} is no set of reals")


def _bounded(node: Node) -> str:
    """The variable that an inequality bounds."""
    names = [part.text for part in node.parts if part.kind == "sym"]
    if node.kind != "relation" or len(names) != 1:
        raise Unreadable("an inequality of one variable was expected")
    return names[0]


def _inequality(node: Node) -> Reals:
    _bounded(node)
    found = _ALL
    signs = node.text.split()
    for left, sign, right in zip(node.parts, signs, node.parts[1:], strict=False):
        if right.kind == "sym":
            left, right = right, left
            sign = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}.get(sign, sign)
        if left.kind != "sym":
            raise Unreadable("the variable stands alone on no side")
        bound = real(right)
        half = {
            "<": Piece(-mpmath.inf, bound, False, False),
            r"\leq": Piece(-mpmath.inf, bound, False, True),
            ">": Piece(bound, mpmath.inf, False, False),
            r"\geq": Piece(bound, mpmath.inf, True, False),
        }
        if sign == r"\neq":
            found = _common(found, _outside((Piece(bound, bound, True, True),)))
        elif sign in half:
            found = _common(found, (half[sign],))
        else:
            raise Unreadable(f"{sign} bounds nothing")
    return found


def _merged(pieces: list[Piece]) -> Reals:
    """The union. Raises Unreadable for too many pieces, or for one with its bounds reversed."""
    if len(pieces) > _MAX_PIECES or any(piece.low > piece.high for piece in pieces):
        raise Unreadable("no set of intervals")
    out: list[Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.low, not piece.has_low)):
        last = out[-1] if out else None
        if piece.low == piece.high and not (piece.has_low and piece.has_high):
            continue
        touches = last and (
            piece.low < last.high or (piece.low == last.high and (piece.has_low or last.has_high))
        )
        if last is None or not touches:
            out.append(piece)
            continue
        high = max(piece.high, last.high)
        closed = any(p.high == high and p.has_high for p in (piece, last))
        out[-1] = Piece(last.low, high, last.has_low, closed)
    return tuple(out)


def _outside(reals: Reals) -> Reals:
    out: list[Piece] = []
    low = -mpmath.inf
    has_low = False
    for piece in reals:
        out.append(Piece(low, piece.low, has_low, not piece.has_low))
        low = piece.high
        has_low = not piece.has_high
    out.append(Piece(low, mpmath.inf, has_low, False))
    return _merged([piece for piece in out if piece.low < piece.high or (piece.has_low and piece.has_high)])


def _common(a: Reals, b: Reals) -> Reals:
    out: list[Piece] = []
    for x in a:
        for y in b:
            low = max(x.low, y.low)
            high = min(x.high, y.high)
            has_low = all(p.has_low or p.low < low for p in (x, y))
            has_high = all(p.has_high or p.high > high for p in (x, y))
            if low < high or (low == high and has_low and has_high):
                out.append(Piece(low, high, has_low, has_high))
    return _merged(out)
