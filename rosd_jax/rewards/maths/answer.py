r"""Reads the structure of an answer around its expressions from its tokens.

Kinds of nodes, in addition to those of an expression:

    list       several values (separated by commas, lines, `and`, `or`); text is "or" if all separators are
    set        values in braces
    tuple      values in parentheses or brackets, a tuple or an interval; text is the pair of brackets
    matrix     rows of tuples
    piece      a line of cases: a value and its condition
    relation   a chain of sides; text has the signs between them
    union, intersection, minus    operations on sets
    reals      the real line
    quantity   a value with a unit
    percent    a value in hundredths
    base       digits in a stated base
    word       an answer in words; parts may have the product that the letters could also be
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rosd_jax.rewards.maths import words
from rosd_jax.rewards.maths.box import last_box
from rosd_jax.rewards.maths.cursor import CLOSERS, OPENERS, Node, closing, number
from rosd_jax.rewards.maths.expression import read_expression
from rosd_jax.rewards.maths.latex import Token, Unreadable, tokenize
from rosd_jax.rewards.maths.quantity import read_based, split_currency, unit_start

_MAX_DEPTH = 20
_PREFIX = re.compile(
    r"""(?:\#{2,}|答案(?:是|为)?\s*[:：]?|(?:so|thus|hence|therefore)?,?\s*(?:the|my|our)?\s*(?:final|correct)?\s*
    (?:answer|ans|result|solution)(?:\s+is|\s*[:=：.])\s*:?)\s*""",
    re.IGNORECASE | re.VERBOSE,
)
_GAPS = re.compile(r"\n+|\\q?quad(?![A-Za-z])")
_EQUATION = re.compile(r"[A-Za-z][^=\s]{0,9}\s{0,3}=[^=]{1,99}")
_DOLLAR = re.compile(r"(?<!\\)\$")
_PAIRS = {"(": "(", "[": "[", r"\langle": "(", ")": ")", "]": "]", r"\rangle": ")"}
_RELATIONS = frozenset(["=", "<", ">", r"\leq", r"\geq", r"\neq", r"\in", r"\approx"])
_SEPARATORS = frozenset([",", ";", "\\\\", r"\land", r"\lor", r"\&", "and", "or"])
_SETS = {r"\cup": "union", r"\cap": "intersection", r"\setminus": "minus"}
_MATRICES = frozenset(["pmatrix", "bmatrix", "matrix", "array", "smallmatrix", "Bmatrix"])
_LINES = frozenset("aligned align gathered gather split eqnarray alignat alignedat multline equation".split())
_CASES = frozenset("cases dcases rcases array".split())
_CONDITIONS = frozenset("if for when where otherwise".split())


def read_answer(text: str) -> Node:
    """The structure of an answer. Raises Unreadable (a ValueError) if there is none."""
    return _answer(_trimmed(read_tokens(text)), 0)


def read_tokens(text: str) -> list[Token]:
    """The tokens of an answer without its wrapping: emphasis, dollars, `The answer is`, a full stop."""
    boxes = text.count(r"\boxed") + text.count(r"\fbox")
    text = (last_box(text) if boxes == 1 else text).strip() or text
    for mark in ("**", "__", "*", "`", "'"):
        if text.startswith(mark) and text.endswith(mark) and len(text) > 2 * len(mark):
            text = text[len(mark) : -len(mark)].strip()
    text = text.replace("**", "") if text.count("**") == 2 else text
    text = text.rpartition("####")[2].strip() or text
    if len(_DOLLAR.findall(text)) % 2 == 0:
        text = _DOLLAR.sub(" ", text).strip()
    for _ in range(2):  # "Final answer: the answer is"
        text = text[prefix.end() :] if (prefix := _PREFIX.match(text)) else text
    lines = [line.strip() for line in _GAPS.split(text)]
    if len(lines) > 1 and all(_EQUATION.fullmatch(line) for line in lines):
        text = r"\\".join(lines)
    tokens = tokenize(text)
    said = next((i for i, token in enumerate(tokens) if token.kind != "text"), 0)
    introduced = said and _PREFIX.fullmatch(" ".join(token.text for token in tokens[:said]))
    return tokens[said:] if introduced else tokens


def canonical(text: str) -> str:
    """The tokens as text. Answers that cannot be read are equal if these texts are."""
    out: list[str] = []
    for token in _trimmed(read_tokens(text)):
        out.append(words.word_key(token.text) if token.kind in ("text", "let") else token.text)
        if len(out) > 2 and out[-3] == "{" and out[-1] == "}":
            out[-3:] = out[-2:-1]  # braces around one token
    return " ".join(out)


def _trimmed(tokens: Sequence[Token]) -> list[Token]:
    """The tokens without surrounding punctuation and braces."""
    tokens = list(tokens)
    while tokens and tokens[-1].kind == "sign" and tokens[-1].text in (".", ",", ";", ":", "?"):
        tokens.pop()
    start = 0
    while start < len(tokens) and tokens[start].text in ("=", ":", r"\approx", r"\therefore", r"\Rightarrow"):
        start += 1
    tokens = tokens[start:]
    if tokens and tokens[-1].kind == "num":
        tokens[-1] = tokens[-1]._replace(text=tokens[-1].text.removesuffix("."))
    if len(tokens) > 1 and tokens[0].text == "{" and closing(tokens, 0) == len(tokens) - 1:
        return _trimmed(tokens[1:-1])
    return tokens


def _split(tokens: Sequence[Token], at: frozenset[str]) -> tuple[list[list[Token]], list[str]]:
    """The pieces between the separators outside all brackets, and those separators."""
    pieces: list[list[Token]] = [[]]
    found: list[str] = []
    depth = 0
    for token in tokens:
        depth += (token.text in OPENERS) - (token.text in CLOSERS)
        if depth == 0 and token.text in at and token.text not in CLOSERS:
            pieces.append([])
            found.append(token.text)
        else:
            pieces[-1].append(token)
    return pieces, found


def _answer(tokens: Sequence[Token], depth: int) -> Node:
    tokens = _trimmed(tokens)
    if depth > _MAX_DEPTH or not tokens:
        raise Unreadable("nested too deep" if tokens else "nothing where a value should be")
    if (environment := _environment(tokens, depth)) is not None:
        return environment
    pieces, found = _split(tokens, _SEPARATORS)
    pieces = [piece for piece in map(_trimmed, pieces) if piece]
    if not pieces:
        raise Unreadable("only separators")
    items = [node for piece in pieces for node in _item(piece, depth)]
    if len(items) == 1:
        return items[0]
    either = bool(found) and all(sign in ("or", r"\lor") for sign in found)
    return Node("list", tuple(items), text="or" if either else "")


def _environment(tokens: list[Token], depth: int) -> Node | None:
    """A matrix, or the lines of cases or of an alignment; None if the tokens are not an environment."""
    bracketed = tokens[0].text in ("(", "[") and tokens[-1].text in (")", "]")
    if tokens[0].text == r"\{" and closing(tokens, 0) == -1:
        tokens = tokens[1:]
    elif bracketed and len(tokens) > 4 and tokens[1].text == r"\begin":
        tokens = tokens[1:-1]
    end = closing(tokens, 0) if tokens[0].text == r"\begin" else -1
    if end < 0 or closing(tokens, end + 1) != len(tokens) - 1:
        return None
    name = "".join(token.text for token in tokens[2 : closing(tokens, 1)]).rstrip("*")
    body = tokens[closing(tokens, 1) + 1 : end]
    if body and body[0].text == "{" and name in ("array", "alignat", "alignedat"):
        body = body[closing(body, 0) + 1 :]
    lines = [line for line in _split(body, frozenset(["\\\\"]))[0] if line]
    if name in _LINES or (name == "matrix" and all(_is_equation(line) for line in lines)):
        flat = [[token for token in line if token.text != "&"] for line in lines]
        return _as_list([_answer(line, depth + 1) for line in flat])
    cells = [_split(line, frozenset("&"))[0] for line in lines]
    if name in _CASES and not (name == "array" and bracketed):
        return _as_list([_piece(row, depth + 1) for row in cells])
    if name not in _MATRICES or not cells:
        raise Unreadable(f"the environment {name}")
    return Node(
        "matrix", tuple(Node("tuple", tuple(_answer(c, depth + 1) for c in row), text="()") for row in cells)
    )


def _is_equation(line: list[Token]) -> bool:
    return any(token.text in _RELATIONS for token in line)


def _as_list(items: list[Node]) -> Node:
    flat = [part for item in items for part in (item.parts if item.kind == "list" else (item,))]
    return flat[0] if len(flat) == 1 else Node("list", tuple(flat))


def _piece(cells: list[list[Token]], depth: int) -> Node:
    cells = [cell for cell in cells if cell]
    if len(cells) == 2 and cells[1][0].text in _RELATIONS:
        cells = [cells[0] + cells[1]]
    if len(cells) == 1:
        return _answer(cells[0], depth)
    parts = []
    for cell in cells:
        start = 1 if cell[0].text.lower() in _CONDITIONS and len(cell) > 1 else 0
        parts.append(_answer(cell[start:], depth))
    return Node("piece", tuple(parts))


def _item(tokens: list[Token], depth: int) -> list[Node]:
    r"""One value, or the two values of a `\pm`. A `\pm` inside braces belongs to its set."""
    braces = 0
    outside = False
    for token in tokens:
        braces += (token.text == r"\{") - (token.text == r"\}")
        outside |= braces == 0 and token.text in (r"\pm", r"\mp")
    if not outside:
        return [_relation(tokens, depth)]
    upper = [_signed(token, {r"\pm": "+", r"\mp": "-"}) for token in tokens]
    lower = [_signed(token, {r"\pm": "-", r"\mp": "+"}) for token in tokens]
    return [_relation(upper, depth), _relation(lower, depth)]


def _signed(token: Token, signs: dict[str, str]) -> Token:
    return token._replace(kind="sign", text=signs[token.text]) if token.text in signs else token


def _relation(tokens: list[Token], depth: int) -> Node:
    joined: list[Token] = []
    for token in tokens:
        if token.text == "=" and joined and joined[-1].text in ("<", ">", "="):
            joined[-1] = token._replace(text={"<": r"\leq", ">": r"\geq", "=": "="}[joined[-1].text])
        else:
            joined.append(token)
    sides, signs = _split(joined, _RELATIONS)
    if not signs:
        return _set(tokens, depth)
    return Node("relation", tuple(_answer(side, depth + 1) for side in sides), text=" ".join(signs))


def _set(tokens: list[Token], depth: int) -> Node:
    r"""Unions, intersections and differences of sets, from left to right."""
    pieces, signs = _split(tokens, frozenset(_SETS))
    node = _bracketed(pieces[0], depth)
    for sign, piece in zip(signs, pieces[1:], strict=True):
        node = Node(_SETS[sign], (node, _bracketed(piece, depth)))
    return node


def _bracketed(tokens: list[Token], depth: int) -> Node:
    tokens = _trimmed(tokens)
    if not tokens:
        raise Unreadable("nothing where a set should be")
    first = tokens[0].text
    last = tokens[-1].text
    if len(tokens) == 1 and first == r"\RR":
        return Node("reals")
    if len(tokens) == 1 and first == r"\emptyset":
        return Node("set")
    if len(tokens) == 4 and first == r"\mathbb" and tokens[2].text == "R":
        return Node("reals")
    if first not in OPENERS or closing(tokens, 0) != len(tokens) - 1 or first == r"\begin":
        return _words(tokens) or _quantity(tokens, depth)
    inside = tokens[1:-1]
    if first == r"\{":
        return _braced(inside, depth + 1)
    if first not in _PAIRS or last not in _PAIRS:
        return _quantity(tokens, depth)
    if len(_split(inside, _SEPARATORS)[0]) == 1:
        return _answer(inside, depth + 1) if first == "(" else _quantity(tokens, depth)
    node = _answer(inside, depth + 1)
    parts = node.parts if node.kind == "list" else (node,)
    return Node("tuple", parts, text=_PAIRS[first] + _PAIRS[last])


def _braced(inside: list[Token], depth: int) -> Node:
    if not inside:
        return Node("set")
    (before, *condition), _ = _split(inside, frozenset(["|", ":"]))
    if condition:
        if len(condition) > 1 or len(before) != 1 or before[0].kind != "let":
            raise Unreadable("a set by its property")
        return _answer(condition[0], depth)
    node = _answer(inside, depth)
    return Node("set", node.parts if node.kind == "list" else (node,))


def _words(tokens: list[Token]) -> Node | None:
    """An answer in words; None if it contains anything else."""
    if not all(token.kind in ("let", "text") for token in tokens):
        return None
    if all(len(token.text) == 1 for token in tokens):
        return None
    plain = all(token.kind == "let" for token in tokens)
    if plain and not any(words.is_typed_word(token.text) or len(tokens) == 1 for token in tokens):
        return None
    key = words.phrase_key(token.text for token in tokens)
    product = plain and len(tokens) == 1 and not words.is_typed_word(tokens[0].text)
    return Node("word", (read_expression(tokens),) if product else (), text=key)


def _quantity(tokens: list[Token], depth: int) -> Node:
    """An expression with a currency before it or a unit after it."""
    currency, tokens = split_currency(tokens)
    if not currency and (based := read_based(tokens)):
        return based
    start = unit_start(tokens)
    node = _value(tokens[:start], depth)
    rest = tokens[start:]
    names = [token.text for token in rest]
    factor, count = words.scale(names)
    if count:
        node = Node("mul", (node, Node("num", value=factor)))
    if percent := words.percent(names[count:]):
        return Node("percent", (node,), text=words.unit(rest[count + percent :]))
    unit = words.unit(rest[count:]) or currency
    if currency and unit != currency:
        raise Unreadable("two currencies")
    if unit and not words.is_known_unit(unit) and not _has_number(node):
        raise Unreadable(f"{unit} after what is no number")
    return Node("quantity", (node,), text=unit) if unit else node


def _value(tokens: list[Token], depth: int) -> Node:
    """An expression. The factor of a matrix is multiplied into its entries."""
    for index, token in enumerate(tokens):
        if token.text == r"\begin" and index and tokens[index - 1].text not in ("+", "^", "_"):
            matrix = _environment(tokens[index:], depth + 1)
            if matrix is None or matrix.kind != "matrix":
                break
            before = tokens[: index - (tokens[index - 1].text == "*")]
            factor = number("-1") if [t.text for t in before] == ["-"] else read_expression(before)
            rows = [[Node("mul", (factor, cell)) for cell in row.parts] for row in matrix.parts]
            return Node("matrix", tuple(Node("tuple", tuple(row), text="()") for row in rows))
    return read_expression(tokens)


def _has_number(node: Node) -> bool:
    return node.kind == "num" or any(map(_has_number, node.parts))
