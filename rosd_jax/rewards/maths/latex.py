r"""Splits the text of an answer into tokens of mathematics.

People and models write the same answer in many ways: LaTeX with or without braces, typed Unicode, words in
`\text{...}`, thousands with commas and gaps. Here all spellings become one. A token is a number, a command, a
run of letters, a piece of text or a sign; its readers decide what it means. Every pass is linear in the text.
"""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple


class Unreadable(ValueError):
    """The text cannot be read as an answer."""


class Token(NamedTuple):
    """`kind` is num, cmd (a backslash command), let (letters), text (from a text group) or sign.

    `gap` is what precedes it: "" nothing, " " white space, "!" a negative space.
    """

    kind: str
    text: str
    gap: str = ""


_TOKEN = re.compile(
    r"""(?P<row>\\\\\s*\[-?[\d.]+\s*(?:pt|em|ex|mm|cm|in)\])
    |(?P<cmd>\\[A-Za-z]+\*?|\\.)
    |(?P<dots>\.{3,})
    |(?P<num>(?:\d+(?:\.(?!\.)\d*)?|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<let>[^\W\d_]+)
    |(?P<comma>\{\s*,\s*\})
    |(?P<space>\s+|~)
    |(?P<sign>.)""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)
# A command whose backslash was escaped twice, rather than a new row that starts with these letters.
_DOUBLED = re.compile(
    r"""\\(?:[dtc]?frac|sqrt|text|mathrm|mathbf|textbf|left|right|pi|theta|alpha|beta|infty|cdot|times|pm|circ
    |begin|end|boxed|fbox|log|ln|sin|cos|tan|cup|cap|leq?|geq?|in|overline|quad|binom|mathbb)(?![A-Za-z])
    |\\[{}%$,;!]""",
    re.VERBOSE,
)
_LETTERS = re.compile(r"[^\W\d_]+")

_SPACES = frozenset(
    r"\, \; \: \> \  \quad \qquad \thinspace \medspace \thickspace \enspace \nobreakspace \space".split(" ")
) | {"\\ ", "\\\n", "\\\t"}
_NOTHING = frozenset(
    r"""\left \right \middle \big \Big \bigg \Bigg \bigl \bigr \Bigl \Bigr \biggl \biggr \Biggl \Biggr
    \bigm \Bigm \displaystyle \textstyle \scriptstyle \scriptscriptstyle \limits \nolimits \mathstrut
    \strut \hfill \hfil \noindent \centering \hline \rm \bf \it \sf \tt \cal \em \normalsize \small
    \large \Large \LARGE \tiny \/ \allowbreak \nonumber \notag \protect \( \) \[ \]""".split()
)
_BOXES = frozenset(
    r"""\boxed \fbox \framebox \mathord \mathop \mathbin \mathrel \ensuremath \mathopen \mathclose""".split()
)
_UPRIGHT = frozenset(
    r"""\text \textrm \textnormal \textup \textbf \textit \textsf \texttt \textsc \mbox \hbox \mathrm
    \mathsf \mathtt \mathit \operatorname \operatorname* \mathbf \boldsymbol \bm \pmb \emph \unit""".split()
)


def _table(pairs: str) -> dict[str, str]:
    """What is written as `from:to from:to`."""
    return dict([pair.split(":", 1) for pair in pairs.split()])


_BOLD = frozenset(r"\mathbf \boldsymbol \bm \pmb".split())  # a bold i is a vector, not the imaginary unit
_ALIASES = _table(
    r"""\dfrac:\frac \tfrac:\frac \cfrac:\frac \sfrac:\frac \le:\leq \ge:\geq \ne:\neq
    \leqslant:\leq \geqslant:\geq \leqq:\leq \geqq:\geq \lt:< \gt:> \cdot:* \times:* \ast:* \bullet:*
    \div:/ \lbrace:\{ \rbrace:\} \lbrack:[ \rbrack:] \lparen:( \rparen:) \dots:... \ldots:... \cdots:...
    \dotsc:... \dotsb:... \dotso:... \degree:° \degrees:° \textdegree:° \infin:\infty \varnothing:\emptyset
    \varepsilon:\epsilon \vartheta:\theta \varphi:\phi \varrho:\rho \varsigma:\sigma \lvert:| \rvert:|
    \vert:| \mid:| \lVert:\| \rVert:\| \Vert:\| \prime:' \wedge:\land \vee:\lor \backslash:\setminus
    \smallsetminus:\setminus \lang:\langle \rang:\rangle \imath:i \iota:\iota \tg:\tan \ctg:\cot
    \arctg:\arctan \dbinom:\binom \tbinom:\binom \R:\RR \reals:\RR \Reals:\RR \isin:\in \newline:\\
    \cr:\\ \tabularnewline:\\ \infinity:\infty \thickapprox:\approx \simeq:\approx \doteq:\approx
    \bar:\overline \overbar:\overline \lnot:\neg \percent:% \euro:€ \pounds:£ \textsterling:£
    \texteuro:€ \yen:¥ \textyen:¥ \textdollar:$ \rupee:₹ \$:$ \%:% \#:# \_:_ \mathdollar:$"""
)
_PLAIN = frozenset(
    """alpha beta gamma delta theta lambda mu sigma omega phi pi rho tau infty sqrt sin cos tan cot sec csc
    arcsin arccos arctan sinh cosh tanh log ln exp""".split()
)
_PLAIN_ALIASES = _table(r"infinity:\infty inf:\infty asin:\arcsin acos:\arccos atan:\arctan")
_UNICODE = _table(
    r"""×:\times ·:* ⋅:* ∙:* •:* ∗:* ÷:/ ∕:/ ⁄:/ √:\sqrt ∛:\sqrt[3] ∜:\sqrt[4] ∞:\infty ∪:\cup
    ∩:\cap ∖:\setminus ∈:\in ∉:\notin ∅:\emptyset ⌀:\emptyset ≤:\leq ≥:\geq ⩽:\leq ⩾:\geq ≦:\leq ≧:\geq
    ≠:\neq ≈:\approx ≃:\approx ≅:\cong ≡:\equiv ±:\pm ∓:\mp ℝ:\RR ℤ:\ZZ ℕ:\NN ℚ:\QQ ℂ:\CC ∠:\angle
    ∑:\sum ∏:\prod ∫:\int ∂:\partial ∇:\nabla →:\to ⇒:\Rightarrow ∧:\land ∨:\lor ⟨:\langle ⟩:\rangle
    〈:\langle 〉:\rangle ⌊:\lfloor ⌋:\rfloor ⌈:\lceil ⌉:\rceil ‖:\| ∥:\| ∣:| ′:' ’:' ‘:' º:° ˚:° 。:. ｡:.
    ､:, 、:, ،:, ٫:. ।:. ⊂:\subset ⊆:\subseteq ∆:\Delta ｜:| ⅈ:i ⅇ:e ∘:° －:- ﹣:-"""
)
_DROPPED = '\u201c\u201d\u201e\u00ab\u00bb"`'


def spelled_in_ascii(text: str) -> str:
    """Typed mathematics as LaTeX: signs, Greek, raised and lowered digits, vulgar fractions, full width."""
    if text.isascii():
        return text
    out: list[str] = []
    script = ""
    for character in text:
        kind, letters = _spelled(character)
        if script and kind != script:
            out.append("}")
        if kind and kind != script:
            out.append(f"{kind}{{")
        script = kind
        if letters in (r"\overline", r"\dot") and out:
            letters = f"{letters}{{{out.pop()}}}"
        out.append(letters)
    return "".join(out) + ("}" if script else "")


def _spelled(character: str) -> tuple[str, str]:
    """The position ("^" raised, "_" lowered, "" on the line) and the spelling of a character."""
    if character.isascii():
        return "", character
    if character in "\u0305\u0304":
        return "", r"\overline"
    if character == "\u0307":
        return "", r"\dot"
    if character in _UNICODE:
        return "", _word(_UNICODE[character])
    kind = unicodedata.decomposition(character).partition(" ")[0]
    plain = "".join(_folded(c) for c in unicodedata.normalize("NFKC", character))
    if kind == "<fraction>":
        upper, _, lower = plain.partition("/")
        return "", rf"\frac{{{upper}}}{{{lower}}}"
    return {"<super>": "^", "<sub>": "_"}.get(kind, ""), plain


def _folded(character: str) -> str:
    if character.isascii():
        return character
    if character in _UNICODE:
        return _word(_UNICODE[character])
    category = unicodedata.category(character)
    if category == "Cf" or character in _DROPPED:
        return ""
    if category == "Zs":
        return " "
    if category == "Pd" or character == "\u2212":
        return "-"
    if category == "Nd":
        return str(unicodedata.digit(character))
    name = unicodedata.name(character, "").split()
    if len(name) == 4 and name[0] == "GREEK" and name[2] == "LETTER" and name[1] in ("SMALL", "CAPITAL"):
        letter = name[3].lower().replace("lamda", "lambda")
        return _word("\\" + (letter if name[1] == "SMALL" else letter.capitalize()))
    return character


def _word(spelling: str) -> str:
    """The spelling, with a space after a command so that no letter joins it."""
    return spelling + " " if spelling.startswith("\\") and spelling[-1].isalpha() else spelling


# Numbers with more than digits: 1.6\text{e}{-19}, 1{\,}234, 1'234, 1_000, .\overline{3}.
_SET_EXPONENT = re.compile(
    r"(?<=\d)(?:\\(?:text|textrm|mathrm)\{\s?[eE](?:\}\s?\{([+-]?\d{1,4})|([+-]?\d{1,4}))|[eE]\{([+-]\d{1,4}))\}"
)
_SET_GAP = re.compile(r"(?<=\d)\{(\\[,;:! ]|~|\s)\}(?=\d)")
_MARKED_THOUSANDS = re.compile(r"(?<![\d.'_])\d{1,3}(?:(?:'\d{3})+|(?:_\d{3})+)(?![\d'_])")
_BARE_POINT = re.compile(r"(?<![\d.}])\.(?=\\(?:overline|bar|dot)(?![A-Za-z]))")


def tokenize(text: str) -> list[Token]:
    """The tokens of an answer, with thousands joined. Raises Unreadable if a text group has no end."""
    return _join_numbers(
        _typed_signs(_tokens(_plain_numbers(spelled_in_ascii(text)), depth=0, upright=False))
    )


def _plain_numbers(text: str) -> str:
    text = _SET_GAP.sub(r"\1", _BARE_POINT.sub("0.", text))
    text = _MARKED_THOUSANDS.sub(lambda number: re.sub("['_]", "", number[0]), text)
    return _SET_EXPONENT.sub(lambda found: f"e{found[found.lastindex or 0]}", text)


def _tokens(text: str, depth: int, upright: bool) -> list[Token]:
    if depth > 8:
        raise Unreadable("text groups nested too deep")
    out: list[Token] = []
    position = 0
    gap = ""
    while match := _TOKEN.match(text, position) if position < len(text) else None:
        position = match.end()
        kind = match.lastgroup or ""
        piece = match[0]
        if kind == "row":
            piece = "\\\\"
        elif piece == "\\\\" and (doubled := _DOUBLED.match(text, position - 1)):
            position = doubled.end()
            piece = doubled[0]
        if kind == "let" or (kind == "sign" and piece.isalpha()):
            letters = _LETTERS.match(text, match.start())
            assert letters
            position = letters.end()
            out.append(_letters(letters[0], upright, gap))
        elif kind == "space" or piece in _SPACES or piece == r"\!":
            gap = "!" if gap == "!" or piece == r"\!" else " "
            continue
        elif piece in _UPRIGHT and text[position : position + 2].lstrip()[:1] == "{":
            start = text.index("{", position) + 1
            position = _closing(text, start)
            inner = _tokens(text[start : position - 1], depth + 1, upright=True)
            if piece in _BOLD and len(inner) == 1 and inner[0].text in ("i", "e"):
                out.append(Token("cmd", f"\\bold-{inner[0].text}", gap))
            else:
                out += _text_group(inner, gap)
        elif piece in _NOTHING:
            position = _null_delimiter(text, position) if piece in (r"\left", r"\right") else position
            continue
        elif piece in _BOXES or piece in _DROPPED:
            continue
        elif kind in ("num", "dots", "comma"):
            spelling = {"dots": "...", "comma": "{,}"}.get(kind, piece)
            out.append(Token("num" if kind == "num" else "sign", spelling, gap))
        else:
            out.append(_sign(_ALIASES.get(piece, piece), gap))
        gap = ""
    return out


def _sign(piece: str, gap: str) -> Token:
    if piece[0] == "\\":
        return Token("cmd", piece, gap)
    return Token("let" if piece.isalpha() else "sign", piece, gap)


def _letters(run: str, upright: bool, gap: str) -> Token:
    if upright:
        return Token("text", run, gap)
    if run in _PLAIN or run.lower() in _PLAIN_ALIASES:
        return Token("cmd", _PLAIN_ALIASES.get(run.lower(), "\\" + run), gap)
    return Token("let", run, gap)


def _text_group(inner: list[Token], gap: str) -> list[Token]:
    """Joins words with hyphens or apostrophes; the name of a function or a set becomes a command."""
    if len(inner) == 1 and inner[0].text in _PLAIN:
        return [Token("cmd", "\\" + inner[0].text, gap)]
    out: list[Token] = []
    for token in inner:
        joins = out and token.gap == "" and token.kind in ("text", "sign")
        if joins and token.text in "-'" and out[-1].kind == "text":
            out[-1] = out[-1]._replace(text=out[-1].text + token.text)
        elif joins and token.kind == "text" and out[-1].kind == "text" and out[-1].text[-1] in "-'":
            out[-1] = out[-1]._replace(text=out[-1].text + token.text)
        else:
            out.append(token)
    if out and gap:
        out[0] = out[0]._replace(gap=gap)
    return out


def _closing(text: str, start: int) -> int:
    """The end of the group that was opened just before `start`."""
    depth = 1
    for mark in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, start):
        depth += (mark[0] == "{") - (mark[0] == "}")
        if depth == 0:
            return mark.end()
    raise Unreadable("a text group has no end")


def _null_delimiter(text: str, position: int) -> int:
    rest = text[position : position + 8].lstrip()
    if rest.startswith(".") and not rest[1:2].isdigit():
        return text.index(".", position) + 1
    return position


def _typed_signs(tokens: list[Token]) -> list[Token]:
    r"""One sign for a degree, `^\circ`, `^{\circ}`, `^°`, `^{\circ C}`; and `3 x 10`, a product."""
    out: list[Token] = []
    position = 0
    while position < len(tokens):
        texts = [token.text for token in tokens[position : position + 5]]
        position += 1
        if texts[0] == "^" and texts[1:2] in ([r"\circ"], ["°"]):
            out.append(Token("sign", "°"))
            position += 1
        elif texts[0] == "^" and texts[1:3] in (["{", r"\circ"], ["{", "°"]) and "}" in texts:
            out.append(Token("sign", "°"))
            out += tokens[position + 2 : position - 1 + texts.index("}")]
            position += texts.index("}")
        elif (
            texts[0] in ("x", "X")
            and [t.kind for t in (*out[-1:], *tokens[position : position + 1])] == ["num"] * 2
        ):
            out.append(Token("sign", "*"))
        elif texts[0].lower() in ("degree", "degrees") and out and out[-1].kind == "num":
            out.append(Token("sign", "°"))
        else:
            out.append(tokens[position - 1])
    return out


# Inside these a comma separates values, whatever digits surround it. Braces do not count.
_OPEN = frozenset(["(", "[", r"\{", r"\langle"])
_CLOSE = frozenset([")", "]", r"\}", r"\rangle"])


def _join_numbers(tokens: list[Token]) -> list[Token]:
    """Joins numbers with commas or gaps between thousands, or with `{,}` as the decimal point."""
    out: list[Token] = []
    depth = position = 0
    while position < len(tokens):
        token = tokens[position]
        depth += (token.text in _OPEN) - (token.text in _CLOSE)
        position += 1
        if token.kind == "num":
            joined, position = _joined(tokens, position - 1, commas=depth == 0)
            token = token._replace(text=joined)
        out.append(token)
    return out


def _joined(tokens: list[Token], start: int, commas: bool) -> tuple[str, int]:
    """The number that starts at `start`, and the index of the next token."""
    text = tokens[start].text
    position = start + 1
    style = ""
    whole = text.isdigit()
    while whole and len(text) <= 3 and text[0] != "0" or style:
        found = _separator(tokens, position, commas)
        if not found or (style and found != style):
            break
        group = tokens[position + (found != "gap")]
        digits, point, _ = group.text.partition(".")
        if len(digits) != 3 or not digits.isdigit():
            break
        text += group.text
        position += 1 + (found != "gap")
        style = found
        if point:
            break
    if not style and whole and _separator(tokens, position, commas=False) == "{,}":
        decimals = tokens[position + 1].text
        if decimals.isdigit():
            return f"{text}.{decimals}", position + 2
    return text, position


def _separator(tokens: list[Token], position: int, commas: bool) -> str:
    """What separates the next number from the one before: "gap", ",", "{,}", or "" for nothing."""
    here, after = ([*tokens[position : position + 2], Token("", ""), Token("", "")])[:2]
    if here.kind == "num":
        return "gap" if here.gap else ""
    if after.kind != "num" or here.text not in (",", "{,}"):
        return ""
    if here.text == "{,}":
        return "{,}"
    glued = after.gap == "!" or here.gap == "!"
    return "," if glued or (commas and not here.gap and not after.gap) else ""
