"""Whether two expressions have the same value: exactly for rationals, else numerically to many digits.

Expressions with variables are compared at a few points that are drawn by the variables' names (real, of both
signs; roots and logarithms on their principal branches). A difference is zero if it shrinks as the precision
grows, so the size of the numbers does not matter, and no difference is too small to count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import mpmath

from rosd_jax.rewards.maths.cursor import Node
from rosd_jax.rewards.maths.latex import Unreadable

_LOW = 40  # digits
_HIGH = 200
_POINTS = 4
_TRIES = 12
_MAX_BITS = 200_000  # of an exact number
_MAX_FACTORIAL = 20_000
_ENOUGH_DIGITS = 6  # for a decimal to stand for a number that has no finite decimal


class _Inexact(Exception):
    """Not a rational, or too large a one."""


def same_value(a: Node, b: Node) -> bool:
    """Whether two expressions are equal. Raises Unreadable if they have no value."""
    exact_a = _exact_or_none(a)
    exact_b = _exact_or_none(b)
    if exact_a is not None and exact_b is not None:
        return exact_a == exact_b or _stands_for(a, exact_b, b) or _stands_for(b, exact_a, a)
    free = _variables(a) | _variables(b)
    if free:
        return _same_at_points(a, b)
    difference = _difference(a, b, 0)
    if difference is None:
        return _same_infinity(a, b)
    return difference or _approximates(a, b) or _approximates(b, a)


def real(node: Node) -> Any:
    """The value of a real constant, infinities included. Raises Unreadable for any other expression."""
    if _variables(node):
        raise Unreadable("no constant")
    with mpmath.workdps(_HIGH):
        value = _numeric(node, 0)
        if isinstance(value, mpmath.mpc):
            raise Unreadable("no real number")
        return value


def proportional(a: Node, b: Node, positive: bool) -> bool:
    """Whether one expression is a constant multiple of the other (a positive one if `positive`)."""
    ratios = []
    with mpmath.workdps(_HIGH):
        for point in range(_TRIES):
            values = _numeric_or_none(a, point), _numeric_or_none(b, point)
            if None in values or not all(values):
                continue
            ratios.append(values[0] / values[1])
            if len(ratios) == _POINTS:
                break
        if len(ratios) < _POINTS or (
            positive and not (mpmath.im(ratios[0]) == 0 and mpmath.re(ratios[0]) > 0)
        ):
            return False
        spread = max(abs(ratio - ratios[0]) for ratio in ratios)
        return spread < abs(ratios[0]) * mpmath.mpf(10) ** -_LOW


def _same_at_points(a: Node, b: Node) -> bool:
    valid = 0
    for point in range(_TRIES):
        same = _difference(a, b, point)
        if same is False:
            return False
        valid += same is True
        if valid == _POINTS:
            return True
    return False


def _difference(a: Node, b: Node, point: int) -> bool | None:
    """Whether the difference at a point is zero; None if one of the two has no value there."""
    high = _subtracted(a, b, point, _HIGH)
    if high is None:
        return None
    if high == 0:
        return True
    for digits in (_LOW, _LOW + 3, _LOW + 7):
        low = _subtracted(a, b, point, digits)
        if low is None:
            return None
        if low != 0:
            return abs(high) <= abs(low) * mpmath.mpf(10) ** (_LOW - _HIGH + 60)
    return True


def _subtracted(a: Node, b: Node, point: int, digits: int) -> Any:
    with mpmath.workdps(digits):
        left = _numeric_or_none(a, point)
        right = _numeric_or_none(b, point)
        return None if left is None or right is None else left - right


def _numeric_or_none(node: Node, point: int) -> Any:
    """The value at a point; None if it is undefined or not finite."""
    try:
        value = _numeric(node, point)
    except Unreadable:
        raise
    except (ZeroDivisionError, ValueError, OverflowError):
        return None
    return value if mpmath.isfinite(value) else None


def _same_infinity(a: Node, b: Node) -> bool:
    try:
        left = _numeric(a, 0)
        right = _numeric(b, 0)
    except (ZeroDivisionError, OverflowError):
        return False
    return bool(mpmath.isinf(left) and left == right)


def _stands_for(decimal: Node, value: Fraction, other: Node) -> bool:
    """Whether a decimal is the rounded or truncated form of a fraction that has no finite decimal."""
    if _written(decimal) is None or _written(other) is not None:
        return False
    reduced = value.denominator
    for prime in (2, 5):
        while reduced % prime == 0:
            reduced //= prime
    return reduced > 1 and _rounds(decimal, value)


def _approximates(decimal: Node, other: Node) -> bool:
    with mpmath.workdps(_HIGH):
        value = _numeric_or_none(other, 0)
        if value is None or mpmath.im(value) != 0 or _written(decimal) is None:
            return False
        sign, mantissa, exponent, _ = mpmath.re(value)._mpf_
        if abs(exponent) > 4 * _MAX_BITS:
            return False
        return _rounds(decimal, (-1) ** sign * int(mantissa) * Fraction(2) ** exponent)


def _rounds(decimal: Node, value: Fraction) -> bool:
    written = _written(decimal)
    if written is None:
        return False
    shown, last, digits = written
    if digits < _ENOUGH_DIGITS or (shown < 0) != (value < 0):
        return False
    units = abs(value) / last
    return abs(shown) / last in (math.floor(units), math.floor(units + Fraction(1, 2)))


def _written(node: Node) -> tuple[Fraction, Fraction, int] | None:
    """Value, last place and significant digits of a number written as a decimal; None for any other."""
    if node.kind == "num" and node.text:
        mantissa, _, exponent = node.text.lower().removesuffix("...").partition("e")
        places = len(mantissa.partition(".")[2])
        last = Fraction(10) ** (int(exponent or 0) - places)
        return node.value, last, len(mantissa.replace(".", "").lstrip("0"))
    if node.kind == "neg" and (written := _written(node.parts[0])):
        return -written[0], written[1], written[2]
    if node.kind == "mul" and len(node.parts) == 2 and (written := _written(node.parts[0])):
        power = node.parts[1]
        if power.kind == "pow" and power.parts[0].text == "10" and (by := _exact_or_none(power)):
            return written[0] * by, written[1] * by, written[2]
    return None


def _variables(node: Node) -> set[str]:
    own = {node.text} if node.kind in ("sym", "apply") else set()
    return own.union(*(_variables(part) for part in node.parts))


# ---- exact


def _exact_or_none(node: Node) -> Fraction | None:
    try:
        return _exact(node)
    except (_Inexact, ZeroDivisionError):
        return None


def _exact(node: Node) -> Fraction:
    if node.kind == "num":
        return node.value
    if node.kind not in _EXACT:
        raise _Inexact
    value = _EXACT[node.kind]([_exact(part) for part in node.parts])
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _MAX_BITS:
        raise _Inexact
    return value


def _exact_power(parts: Sequence[Fraction]) -> Fraction:
    base, exponent = parts
    if exponent.denominator != 1:
        return _exact_root(base, exponent)
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * bits > _MAX_BITS:
        raise _Inexact
    if base == 0 and exponent == 0:
        raise _Inexact
    return base ** int(exponent)


def _exact_root(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent != Fraction(1, 2) or base < 0:
        raise _Inexact
    upper = math.isqrt(base.numerator)
    lower = math.isqrt(base.denominator)
    if upper**2 != base.numerator or lower**2 != base.denominator:
        raise _Inexact
    return Fraction(upper, lower)


def _exact_factorial(parts: Sequence[Fraction]) -> Fraction:
    if parts[0].denominator != 1 or not 0 <= parts[0] <= _MAX_FACTORIAL:
        raise _Inexact
    return Fraction(math.factorial(int(parts[0])))


def _exact_binomial(parts: Sequence[Fraction]) -> Fraction:
    if any(part.denominator != 1 or not 0 <= part <= _MAX_FACTORIAL for part in parts):
        raise _Inexact
    return Fraction(math.comb(int(parts[0]), int(parts[1])))


_EXACT: dict[str, Callable[[Sequence[Fraction]], Fraction]] = {
    "add": lambda parts: sum(parts, Fraction(0)),
    "mul": lambda parts: math.prod(parts, start=Fraction(1)),
    "div": lambda parts: parts[0] / parts[1],
    "neg": lambda parts: -parts[0],
    "abs": lambda parts: abs(parts[0]),
    "floor": lambda parts: Fraction(math.floor(parts[0])),
    "ceil": lambda parts: Fraction(math.ceil(parts[0])),
    "pow": _exact_power,
    "fact": _exact_factorial,
    "binom": _exact_binomial,
}


# ---- numeric


def _numeric(node: Node, point: int) -> Any:
    """The value at a point, at mpmath's precision. Raises Unreadable for what cannot be computed."""
    if node.kind == "num":
        return mpmath.mpf(node.value.numerator) / node.value.denominator
    if node.kind == "const":
        return _CONSTANTS[node.text]()
    if node.kind == "sym":
        return _drawn(node.text, point)
    parts = [_numeric(part, point) for part in node.parts]
    if node.kind == "apply":
        at = ",".join(str(mpmath.nstr(part, 25)) for part in parts)
        return _drawn(f"{node.text}({at})", point)
    if node.kind == "call":
        if node.text not in _CALLS:
            raise Unreadable(f"{node.text} is not computed")
        return _CALLS[node.text](*parts)
    if node.kind not in _NUMERIC:
        raise Unreadable(f"a {node.kind} has no value")
    return _NUMERIC[node.kind](*parts)


def _drawn(name: str, point: int) -> Any:
    draw = random.Random(f"{name}/{point}")
    size = mpmath.mpf(draw.randrange(10**12, 3 * 10**12)) / 10**12
    # All positive, all negative, and mixed in two ways, so an identity for one sign only does not pass.
    mixed = random.Random(name).random() < 0.5
    negative = {0: False, 1: True, 2: mixed, 3: not mixed}.get(point, draw.random() < 0.5)
    return -size if negative else size


def _power(base: Any, exponent: Any) -> Any:
    if not mpmath.isfinite(base) or not mpmath.isfinite(exponent):
        raise ValueError("a power of infinity")
    if base == 0:
        if mpmath.re(exponent) <= 0:
            raise ZeroDivisionError
        return mpmath.mpf(0)
    if abs(exponent) * (abs(mpmath.log(abs(base))) + 4) > 1e12:
        raise OverflowError("a power that no answer has")
    return mpmath.power(base, exponent)


def _factorial(value: Any) -> Any:
    if abs(value) > 1e9:
        raise OverflowError("a factorial that no answer has")
    return mpmath.factorial(value)


def _binomial(n: Any, k: Any) -> Any:
    if abs(n) > 1e9 or abs(k) > 1e9:
        raise OverflowError("a binomial that no answer has")
    return mpmath.binomial(n, k)


def _bounded(function: Callable[[Any], Any], largest: float) -> Callable[[Any], Any]:
    def bounded(value: Any) -> Any:
        if not abs(value) < largest:
            raise OverflowError("an argument that no answer has")
        return function(value)

    return bounded


def _whole(name: str) -> Callable[..., Any]:
    def combined(*parts: Any) -> Any:
        if any(mpmath.im(part) != 0 or mpmath.floor(part) != part or abs(part) > 1e15 for part in parts):
            raise Unreadable(f"{name} of what are no integers")
        return mpmath.mpf(getattr(math, name)(*(int(part) for part in parts)))

    return combined


def _extreme(choose: Callable[..., Any]) -> Callable[..., Any]:
    def chosen(*parts: Any) -> Any:
        if any(mpmath.im(part) != 0 for part in parts):
            raise ValueError("complex numbers have no order")
        return choose(parts)

    return chosen


def _logarithm(value: Any, base: Any = 10) -> Any:
    return mpmath.log(value) / mpmath.log(base)


def _divided(a: Any, b: Any) -> Any:
    if b == 0:
        raise ZeroDivisionError
    return a / b


_CONSTANTS: dict[str, Callable[[], Any]] = {
    r"\pi": lambda: +mpmath.pi,
    "e": lambda: +mpmath.e,
    "i": lambda: mpmath.mpc(0, 1),
    r"\infty": lambda: mpmath.inf,
}
_NUMERIC: dict[str, Callable[..., Any]] = {
    "add": lambda *parts: mpmath.fsum(parts),
    "mul": lambda *parts: mpmath.fprod(parts),
    "div": _divided,
    "neg": lambda a: -a,
    "abs": abs,
    "conj": mpmath.conj,
    "pow": _power,
    "fact": _factorial,
    "binom": _binomial,
    "floor": mpmath.floor,
    "ceil": mpmath.ceil,
    "angle": lambda a: a * mpmath.pi / 180,
}
_CALLS: dict[str, Callable[..., Any]] = {
    r"\log": _logarithm,
    r"\lg": _logarithm,
    r"\ln": mpmath.log,
    r"\exp": _bounded(mpmath.exp, 1e12),
    r"\max": _extreme(max),
    r"\min": _extreme(min),
    r"\gcd": _whole("gcd"),
    r"\lcm": _whole("lcm"),
    r"\Re": mpmath.re,
    r"\Im": mpmath.im,
    r"\arg": mpmath.arg,
    r"\arsinh": mpmath.asinh,
    r"\arcosh": mpmath.acosh,
    r"\artanh": mpmath.atanh,
}
for _name in "sin cos tan cot sec csc sinh cosh tanh coth".split():
    _CALLS[rf"\{_name}"] = _bounded(getattr(mpmath, _name), 1e12)
for _name in "sin cos tan cot sec csc".split():
    _CALLS[rf"\arc{_name}"] = getattr(mpmath, f"a{_name}")
