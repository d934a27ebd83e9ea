"""The form in which a quote and a text are compared: what a reader sees, whatever the typesetting.

These differences do not count: white space; case; canonically equal and full-width forms; ligatures; kinds of
quotation marks, dashes, minus signs and multiplication signs; `<=` and `≤` and similar signs as characters,
in ASCII or as LaTeX commands; `x²`, `x^2` and `x^{2}`. Markup, escapes and characters without width are
removed (text/markup.py).
"""

from __future__ import annotations

import functools
import re
import unicodedata

from rosd_jax.text.markup import WIDE, Folded, edit, strip_markup, unescape

SEGMENT_LIMIT = 31  # characters; Unicode's stream-safe limit, which keeps the reordering of marks linear
_WIDE_ASCII = re.compile("[！-～]")
_PLAIN = re.compile(
    r"[!-~]+(?: [!-~]+)*(?=[\x00-\x7f]|\Z)"
)  # only case to fold, and no combining marks after it


def _table(pairs: str) -> dict[str, str]:
    """What is written as `from:to from:to`."""
    return dict([pair.rsplit(":", 1) for pair in pairs.split()])


_GREEK = """alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma tau upsilon
    phi chi psi omega""".split()
_CAPITALS = "Gamma Delta Theta Lambda Xi Pi Sigma Upsilon Phi Psi Omega".split()
_COMMANDS = _table(
    r"""le:≤ leq:≤ leqslant:≤ ge:≥ geq:≥ geqslant:≥ ne:≠ neq:≠ lt:< gt:> times:* ast:* cdot:* div:/ pm:± mp:∓
    to:→ rightarrow:→ longrightarrow:→ Rightarrow:⇒ Longrightarrow:⇒ implies:⇒ iff:⇔ Leftrightarrow:⇔
    leftrightarrow:↔ approx:≈ sim:~ equiv:≡ infty:∞ dots:... ldots:... cdots:... in:∈ partial:∂ sum:∑ int:∫
    nabla:∇ cup:∪ cap:∩ dfrac:\frac tfrac:\frac"""
)
_COMMANDS |= {"quad": " ", "qquad": " ", "left": "", "right": ""}
for _name in _GREEK:
    _letter = _name.replace("lambda", "lamda")  # as Unicode spells it
    _COMMANDS[_name] = unicodedata.lookup(f"GREEK SMALL LETTER {_letter}")
for _name in _CAPITALS:
    _letter = _name.replace("Lambda", "Lamda")
    _COMMANDS[_name] = unicodedata.lookup(f"GREEK CAPITAL LETTER {_letter}")
_SIGNS = _table(
    """<=>:⇔ <==>:⇔ <->:↔ <-->:↔ ->:→ -->:→ =>:⇒ ==>:⇒ <=:≤ >=:≥ !=:≠ --:- ---:- {,}:, ″:'' ‴:'''"""
)
_SIGNS |= {r"\,": " ", r"\;": " ", r"\:": " ", r"\!": ""}
_ALIKE = {  # a sign, and the characters that are read as it
    "-": "‐‑‒–—―−﹣﹘⁃",
    "'": "’‘‚‛′´ʼʹ`",
    '"': "“”„‟«»「」『』〝〞",
    "≤": "≦⩽",
    "≥": "≧⩾",
    "*": "×✕✖∗⨯·⋅∙",
    "/": "÷∕⁄",
    ":": "∶",
    "~": "∼",
    "→": "⟶➔➜",
    "⇒": "⟹",
    "⇔": "⟺",
    "↔": "⟷",
}
_SIGNS |= {character: sign for sign, characters in _ALIKE.items() for character in characters}
_SIGN = re.compile(
    r"(?<!\\)\\(?P<command>[A-Za-z]+)|(?<!\\)\\(?P<escaped>[*_#$%&{}\"'])|(?<!\\)\\[,;:!]"
    r"|<==?>|<--?>|--?>|==?>|<=|>=|(?<!\S)!="  # not "5!=120", which may be a factorial
    r"|(?<=[^\W\d_]{2}[ ])---?(?=[ ])|(?<=[^\W\d_]{2})---?(?=[^\W\d_]{2})"  # not "x--3"
    r"|(?<=\d)\{,\}(?=\d)"
    r"|(?P<raised>[⁰¹²³⁴⁵⁶⁷⁸⁹]+)(?!\d)|\^\{(?P<power>\d{1,4})\}(?!\d)"
    rf"|[″‴{''.join(_ALIKE.values())}]"
)


def fold(text: str, *, numbers: bool = True) -> Folded:
    """The text in the form in which it is compared. numbers=False also removes the numbers of lists."""
    return finish(strip_markup(unescape(text), numbers=numbers))


def finish(folded: Folded) -> Folded:
    """Replaces signs of equal meaning by one character, and equal letters by one form."""
    wide = _WIDE_ASCII.finditer(folded.text)
    folded = edit(folded, ((match.start(), match.end(), chr(ord(match[0]) - WIDE)) for match in wide))
    edits = []
    for match in _SIGN.finditer(folded.text):
        if match["command"]:
            new = _COMMANDS.get(match["command"])
        elif match["raised"] or match["power"]:
            new = "^" + unicodedata.normalize("NFKC", match["raised"] or match["power"])
        else:
            new = match["escaped"] or _SIGNS[match[0]]
        if new is not None:
            edits.append((match.start(), match.end(), new))
    return _fold_letters(edit(folded, edits))


def _fold_letters(folded: Folded) -> Folded:
    text = folded.text
    pieces = []
    starts = []
    stops = []
    at = 0
    while at < len(text):
        plain = _PLAIN.match(text, at)
        if plain:
            stop = plain.end()
            pieces.append(plain[0].lower())
            starts += folded.start[at:stop]
            stops += folded.stop[at:stop]
        else:
            stop = _segment_stop(text, at)
            pieces.append(_fold_segment(text[at:stop]))
            starts += [folded.start[at]] * len(pieces[-1])
            stops += [folded.stop[stop - 1]] * len(pieces[-1])
        at = stop
    return Folded("".join(pieces), starts, stops)


def _segment_stop(text: str, at: int) -> int:
    """The end of the run of white space, or the character with its combining marks, that starts at `at`."""
    stop = at + 1
    if text[at].isspace():
        while stop < len(text) and text[stop].isspace():
            stop += 1
        return stop
    limit = min(len(text), at + SEGMENT_LIMIT)
    while stop < limit and unicodedata.combining(text[stop]):
        stop += 1
    return stop


@functools.lru_cache(maxsize=4096)
def _fold_segment(segment: str) -> str:
    if segment.isspace():
        return " "
    if segment.isascii():
        return segment.lower()
    plain = "".join(_same_character(c) for c in segment)
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", plain).casefold())


def _same_character(character: str) -> str:
    # Compatibility forms only if a reader sees the same text: "x²" must not become "x2".
    wide = unicodedata.decomposition(character).startswith(("<wide>", "<narrow>"))
    if wide or character in "…µﬀﬁﬂﬃﬄﬅﬆ":
        return unicodedata.normalize("NFKC", character)
    return character
