"""Whether two answers are equal as mathematics.

Structures are compared first: tuples in order, lists and sets in any order, words as words, relations side by
side. Then values are compared (value.py). A unit, base or percent sign that only one of the answers states
does not count; two different ones do. The comparison may never return, so call it in a worker only.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from rosd_jax.rewards.maths.answer import canonical, read_answer
from rosd_jax.rewards.maths.cursor import Node
from rosd_jax.rewards.maths.latex import Unreadable
from rosd_jax.rewards.maths.reals import as_reals, same_reals
from rosd_jax.rewards.maths.value import proportional, same_value

_MAX_ITEMS = 100
_TURNED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq"}
_SCALAR = frozenset(
    "num sym const add mul div neg pow fact call apply abs floor ceil conj binom angle".split()
)


def equal(a: str, b: str) -> bool:
    """Whether two answers are equal. Answers that cannot be read must have the same tokens."""
    try:
        first = canonical(a)
        if first and first == canonical(b):
            return True
        return _equal(read_answer(a), read_answer(b))
    except (ValueError, ZeroDivisionError, OverflowError, RecursionError):
        return False


def _equal(a: Node, b: Node) -> bool:
    kinds = {a.kind, b.kind}
    if "relation" in kinds:
        return _equal_relations(a, b)
    if kinds & {"quantity", "percent", "base"}:
        return _equal_marked(a, b)
    if kinds & {"union", "intersection", "minus", "reals"}:
        return _equal_sets(a, b)
    if "word" in kinds:
        return _equal_words(a, b)
    if kinds & {"list", "set", "tuple", "piece", "matrix"}:
        return _equal_structures(a, b)
    if kinds <= _SCALAR:
        return same_value(a, b)
    return False


def _equal_marked(a: Node, b: Node) -> bool:
    """Values with a unit, a percent sign or a base."""
    if a.kind == b.kind == "base":
        return (a.text, a.value) == (b.text, b.value)
    if "base" in (a.kind, b.kind):
        based, other = (a, b) if a.kind == "base" else (b, a)
        return other.kind in ("num", "neg") and _equal(_digits(based), other)
    if a.kind == b.kind == "quantity" and a.text != b.text:
        return False
    if a.kind == b.kind:
        return (not a.text or not b.text or a.text == b.text) and _equal(a.parts[0], b.parts[0])
    if "percent" not in (a.kind, b.kind):
        marked, other = (a, b) if a.kind == "quantity" else (b, a)
        return _equal(marked.parts[0], other)
    percent, other = (a, b) if a.kind == "percent" else (b, a)
    if other.kind not in _SCALAR:
        return False
    hundredth = Node("mul", (percent.parts[0], Node("num", value=Fraction(1, 100))))
    return same_value(percent.parts[0], other) or same_value(hundredth, other)


def _digits(based: Node) -> Node:
    """The digits in a stated base, read as a decimal."""
    if not based.text.lstrip("-").replace(".", "").isdigit():
        raise Unreadable("digits that no decimal has")
    return Node("num", value=Fraction(based.text))


def _equal_words(a: Node, b: Node) -> bool:
    if a.kind == b.kind == "word" and a.text == b.text:
        return True
    if a.kind == "sym" or b.kind == "sym":
        return a.text == b.text
    products = [node.parts[0] if node.kind == "word" and node.parts else node for node in (a, b)]
    return all(node.kind in _SCALAR for node in products) and same_value(*products)


def _equal_structures(a: Node, b: Node) -> bool:
    if max(len(a.parts), len(b.parts)) > _MAX_ITEMS:
        return False
    kinds = {a.kind, b.kind}
    if kinds == {"matrix", "tuple"}:
        matrix, vector = (a, b) if a.kind == "matrix" else (b, a)
        return vector.text == "()" and _in_order(_as_vector(matrix), vector.parts)
    if kinds == {"tuple"}:
        return a.text == b.text and _in_order(a.parts, b.parts)
    if kinds in ({"matrix"}, {"piece"}):
        return _in_order(a.parts, b.parts)
    if kinds == {"tuple", "list"}:
        vector, values = (a, b) if a.kind == "tuple" else (b, a)
        return vector.text == "()" and _in_order(vector.parts, _coordinates(values.parts))
    if kinds == {"set"}:
        return _contained(a.parts, b.parts) and _contained(b.parts, a.parts)
    if kinds <= {"list", "set"}:
        return _in_any_order(a.parts, b.parts)
    if "set" in kinds:
        only, other = (a, b) if a.kind == "set" else (b, a)
        return len(only.parts) == 1 and other.kind != "tuple" and _equal(only.parts[0], other)
    return False


def _as_vector(matrix: Node) -> tuple[Node, ...]:
    if len(matrix.parts) == 1:
        return matrix.parts[0].parts
    if any(len(row.parts) != 1 for row in matrix.parts):
        raise Unreadable("a matrix is no vector")
    return tuple(row.parts[0] for row in matrix.parts)


def _coordinates(values: Sequence[Node]) -> Sequence[Node]:
    """The values of `x=1, y=2` with names in alphabetical order; other values unchanged."""
    names = [value.parts[0].text for value in values if value.kind == "relation"]
    assigned = [_assigned(value) for value in values if value.kind == "relation"]
    if len(names) == len(values) and names == sorted(set(names)):
        return [value for value in assigned if value is not None]
    return values


def _in_order(a: Sequence[Node], b: Sequence[Node]) -> bool:
    return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))


def _in_any_order(a: Sequence[Node], b: Sequence[Node]) -> bool:
    if len(a) != len(b):
        return False
    left = list(b)
    for value in a:
        found = next((i for i, other in enumerate(left) if _equal(value, other)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _contained(a: Sequence[Node], b: Sequence[Node]) -> bool:
    return all(any(_equal(value, other) for other in b) for value in a)


# ---- relations


def _equal_relations(a: Node, b: Node) -> bool:
    if a.kind == b.kind == "relation":
        return _same_relation(a, b)
    relation, other = (a, b) if a.kind == "relation" else (b, a)
    value = _assigned(relation)
    if value is not None:
        return _equal(value, other)
    bounded = as_reals(relation)
    return bounded is not None and _is_interval(other) and same_reals(bounded, as_reals(other))


def _is_interval(node: Node) -> bool:
    return node.kind in ("tuple", "union", "intersection", "minus", "reals", "list")


def _same_relation(a: Node, b: Node) -> bool:
    first = _assigned(a)
    second = _assigned(b)
    if first is not None and second is not None and _equal(a.parts[0], b.parts[0]):
        return _equal(first, second)
    signs = a.text.split()
    other_signs = b.text.split()
    if {*signs, *other_signs} <= set(_TURNED):
        bounded = as_reals(a)
        other = as_reals(b)
        if bounded is not None and other is not None:
            return _equal(_unknown(a), _unknown(b)) and same_reals(bounded, other)
    for turned in (b, _turned(b)):
        if turned and turned.text == a.text and _same_sides(a, turned):
            return True
    return False


def _unknown(relation: Node) -> Node:
    """The side of an inequality that the others bound."""
    return next((side for side in relation.parts if side.kind == "sym"), relation.parts[0])


def _same_sides(a: Node, b: Node) -> bool:
    if _in_order(a.parts, b.parts):
        return True
    sides = (*a.parts, *b.parts)
    if len(a.parts) != 2 or len(b.parts) != 2 or any(side.kind not in _SCALAR for side in sides):
        return False
    zeros = [Node("add", (node.parts[0], Node("neg", (node.parts[1],)))) for node in (a, b)]
    return proportional(zeros[0], zeros[1], positive=a.text in _TURNED)


def _turned(relation: Node) -> Node | None:
    """The same relation from right to left."""
    signs = [_TURNED.get(sign, sign) for sign in reversed(relation.text.split())]
    if r"\in" in signs:
        return None
    return Node("relation", relation.parts[::-1], text=" ".join(signs))


def _assigned(relation: Node) -> Node | None:
    r"""The value that a chain of equals signs gives: `x = 2+3 = 5`, `x \in \{1,2\}`, `2+3 = 5`.

    None if it gives none, or two that differ.
    """
    signs = relation.text.split()
    if set(signs) == {r"\in"} and len(signs) == 1 and _is_name(relation.parts[0]):
        return relation.parts[1]
    if not set(signs) <= {"=", r"\approx"}:
        return None
    named = _is_name(relation.parts[0])
    values = list(relation.parts[1:] if named else relation.parts)
    if not named and not all(_is_constant(value) for value in values):
        return None
    if r"\approx" in signs:  # what precedes it is exact, unless it is the name
        return values[0] if signs.index(r"\approx") in (0, len(signs) - 1) and len(values) <= 2 else None
    return values[-1] if all(_equal(value, values[-1]) for value in values[:-1]) else None


def _is_name(node: Node) -> bool:
    """Whether a side is only the name of what is asked for: x, f(2), AB, a+b, |z|, (x, y), Area."""
    if node.kind in ("sym", "apply", "word"):
        return True
    if node.kind == "call":
        return all(_is_name(part) for part in node.parts)
    return node.kind in ("mul", "add", "div", "abs", "tuple") and all(map(_is_name, node.parts))


def _is_constant(node: Node) -> bool:
    return node.kind in ("num", "const", "quantity") or (
        node.kind in _SCALAR and bool(node.parts) and all(map(_is_constant, node.parts))
    )


def _equal_sets(a: Node, b: Node) -> bool:
    left = as_reals(a)
    right = as_reals(b)
    if left is not None and right is not None:
        return same_reals(left, right)
    return a.kind == b.kind and (_in_any_order if a.kind == "union" else _in_order)(_flat(a), _flat(b))


def _flat(node: Node) -> list[Node]:
    """The members of a chain of unions."""
    if node.kind != "union":
        return list(node.parts)
    return [leaf for part in node.parts for leaf in (_flat(part) if part.kind == "union" else [part])]
