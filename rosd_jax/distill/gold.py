"""Whether an idea gives away the gold answer (host).

An idea repeats the gold answer if it contains the answer as written, as a separate word or number and not
as part of another (4 in 14, 4.5, -4, 1/4 or 4%).

A gold answer that is one capital letter is an option, but a letter may also be the article "A", the pronoun
"I", a point, a vitamin or a variable. So a letter counts only where the text marks it as the choice: in
parentheses, in a box or alone; after "answer", "option", "pick" and the like; before "is right"; or at the
end of "so B".
"""

from __future__ import annotations

import functools
import re

_LEFT = r"[*_`\"'“‘(\[{$]{0,4}(?:\\boxed\{)?"  # marks that may surround the letter
_RIGHT = r"[*_`\"'”’)\]}$]{0,4}"
_IS = r"(?:is|was|be|are|must be|should be|would be|will be|has to be|is clearly|is therefore|is thus)"
_OPTION = r"(?:answers?|options?|choices?|alternatives?)"
_RIGHT_ONE = (
    rf"(?:{_OPTION}|letter|(?:only |best |right |correct )+(?:{_OPTION}|letter|one)"
    r"|response|solution|right|correct|best)"
)
_PICK = (
    r"(?:choos(?:es?|ing)|chosen?|pick(?:s|ed|ing)?|select(?:s|ed|ing)?|mark(?:s|ed|ing)?"
    r"|(?:go(?:es)?|going|went) (?:with|for)|settle[sd]? (?:on|for)|opt(?:s|ed)? for"
    r"|answer(?:s|ed)? with|leav(?:es?|ing) only|points? to)"
)
_SENTENCE_GOES_ON = r"(?=\s*(?:[.,;:!?)]|$|(?:because|since|as|here|and|but|for)\b))"
_RIGHTLY = (
    rf"(?:right{_SENTENCE_GOES_ON}|correct"
    rf"|(?:the )?(?:only |best |right |correct )*{_OPTION}|the (?:only |best |right |correct )+one)"
)
_THEN = r"(?:so|hence|thus|therefore|namely|i\.e\.,?|it(?: i|['’])s|it must be|∴|⇒|=>|->|→)"
_NO_TERM = r"(?![\w'’-]|\s*[=+*/^<>≤≥×·−]|\s+-\s|\s+(?:such that|so that|to be|and)\b)"


def repeats_gold(idea: str, gold: str) -> bool:
    """Whether the idea gives away the gold answer; False if there is none."""
    return bool(gold.strip()) and _gold(gold.strip()).search(idea) is not None


def strip_gold(idea: str, gold: str) -> str:
    """The idea without the phrases that give away the gold answer; it may be blank."""
    return _gold(gold.strip()).sub("", idea).strip() if gold.strip() else idea


@functools.lru_cache(maxsize=1024)
def _gold(gold: str) -> re.Pattern[str]:
    if re.fullmatch("[A-Z]", gold):
        return re.compile("|".join(_option_forms(gold)), re.MULTILINE)
    name = r"\s+".join(map(re.escape, gold.split())).replace(r"\-", "[-−]")
    return re.compile(rf"(?<![\w.,/^−–-]){name}(?!\w|[.,/^]\d|\s?\\?%)")


def _option_forms(letter: str) -> list[str]:
    said = rf"{_LEFT}{letter}\b{_RIGHT}"
    # "the answer I found", "the choice I made": here I is a pronoun, so a verb or a colon must precede it.
    behind_option = rf"\s*[:=]\s*|\s+{_IS}:?\s+" + ("" if letter == "I" else r"|\s+")
    return [
        rf"(?<!\w)\({letter}\)",
        rf"\\(?:boxed|fbox)\{{(?:\\text\{{)?{letter}\}}+|<answer>\s*{letter}\s*</answer>",
        rf"(?<![\w*])\*\*{letter}\*\*(?![\w*])|\A\W*{letter}\W*\Z|^[ \t]*{letter}[):](?=\s)",
        rf"\b(?i:{_OPTION}(?:{behind_option})){said}{_NO_TERM}",
        rf"\b(?i:{_RIGHT_ONE}(?:\s*:\s*|\s+{_IS}:?\s+)){said}{_NO_TERM}",
        rf"\b(?i:{_PICK}\s+(?:{_OPTION}\s+)?){said}{_NO_TERM}",
        rf"(?<![\w'’°-])(?<![°\d]\s){said}\s+(?i:(?:alone\s+|clearly\s+)?{_IS}\s+(?:\w+ly\s+)?{_RIGHTLY})(?![\w'’-])",
        rf"(?:\b|(?=[∴⇒=→-]))(?i:{_THEN})[,:]?\s+(?i:{_PICK}\s+)?{said}(?=\s*(?:[.!;,]|\Z))",
    ]
