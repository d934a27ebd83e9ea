r"""Reads the one letter that a multiple-choice answer chooses.

An answer has marks and a lead ("The answer is", "Option"), the letter, and then nothing, or punctuation and
the option's text, or a remark that or why it is right. The option's text may contain letters (vitamin C, Both
A and B). Such a letter is another choice only if it is written like one: "(A) or (B)", "A: no, B: yes",
"A) is wrong, so B)". An answer with two different choices chooses none.
"""

from __future__ import annotations

import re
import unicodedata

# A lead has only these words: "Compound C" and "Vitamin C" are texts of options, not choices.
_LEAD = frozenset(
    "an the my our this that we so thus therefore hence then okay ok please "
    "final correct right best true likely probable most appropriate accurate chosen only "
    "answer answers ans response choice option letter alternative solution pick selection "
    "is be would should must will it its it's to for "
    "choose select go going with think believe say conclude selected picked "
    "la le el il die der das lautet ist est es "
    "réponse respuesta antwort risposta resposta opción opção opzione "
    "bonne richtige richtig correcta correcte corretta correta ответ вариант правильный".split()
)
_I_CHOOSE = re.compile(
    r"I(?:['’](?:d|ll|m))?\s+(?:choose|select|pick|think|believe|say|go|would|will|conclude|am|going)\b"
)
_LEAD_CHARACTERS = "えは答案正确確的是为為选選项項择擇应應该該最终終故因此所以我정답은는èé•→"
_OPENING = re.compile(rf"[\s:,=*\"'“”‘’«»<>#(\[{{$.–—{_LEAD_CHARACTERS}-]*")
_WORD = re.compile(r"[^\W\d_]{2,}(?:['’][^\W\d_]+)*")

_TAG = re.compile(r"</?(?!(?:s|del|strike)\s?>)[a-z]{1,10}\s?>", re.IGNORECASE)
_SET_APART = re.compile(r"\\(?:boxed|fbox|framebox)\s{0,9}(?=\{)|`+|\*+|(?<![^\W_])_+|_+(?![^\W_])")
_COMMAND = re.compile(
    r"\\(?:boxed|fbox|framebox|[lL]arge|LARGE|[hH]uge|text[a-z]*|math[a-z]+|operatorname|underline|boldsymbol|pmb|bm|bf|rm|it|sf|tt"
    r"|left|right|displaystyle|quad|qquad|[,;:! ()\[\]])"
)
_CHINESE_LABEL = re.compile(r"(?<![^\W_])([A-JＡ-Ｊ])、(?=[^\WA-JＡ-Ｊ]|[A-J][a-z])")  # but not A、B
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u2060\ufeff]")
_MARKS = str.maketrans({"。": ".", "、": ",", "【": "[", "】": "]", "「": "(", "」": ")", "\\": " "})

_LETTER = re.compile(r"([A-Za-z])(?!['’]?\w(?<![\u2e80-\uffef]))")  # Chinese text may follow without a space
_END = re.compile(r"[\s.)\]}*$\"'”’»>!,;:选選项項です번]*$")
_SHUT = r"[)\]}*$\"'”’»>]*"
_LABEL = re.compile(
    rf"{_SHUT}(?:\s*:|\s*\.(?!\d)|\s+[-–—]+\s|\s*—|\s*[\n\t]|\s+[(\[](?=[^()\[\]]{{4}})|\s*[|→]\s)|{_SHUT}[)\]*\"”’»]}}?(?=\s)|[)\]]"
)
_PLAIN_LABEL = re.compile(r"[:.)(\]\[\n\t–—-]")
_BOXED_LABEL = re.compile(r"\}+(?=\s)")
_REASON = re.compile(
    rf"{_SHUT}\s*[,;(–—-]?\s*(?i:(?:because|since|as(?!\s+well)|due to)\b|因为|因為|是?正确|是?正確"
    r"|(?:is|would be|seems)\s+"
    r"(?:(?:clearly|definitely|therefore|thus|the|my|our|final|only|most|likely)\s+)*"
    r"(?:right|correct|best|answer|choice|option)\b)"
)
_NO_TEXT = re.compile(
    r"\s*[A-Z]\.\s*[A-Z]\b|\s*(?:is|was)\s+(?:not|wrong|incorrect|false)\b|\s*(?:isn't|cannot)\b"
)
_FORMULA = re.compile(r"\s*[=^*/≈]")

# Another choice: a letter up to J, since no set has more options. "I" is mostly a pronoun or a numeral.
_X = r"(?<![\w°\\^/+'-])([A-HJ])(?![\w^'])"
_XI = _X.replace("A-HJ", "A-J")
_ASIDE = r"(?i:option|choice|answer|letter)"
_COPULA = r"(?i:is|would be|should be|must be|was)"
_OR = r"(?i:or|and|nor|vs|oder|und|ou|et|y|или|и|或|和|또는)"
_TURN = (
    r"(?i:so|then|therefore|thus|hence|actually|maybe|perhaps|possibly|probably|rather|instead|wait|no"
    r"|choose|pick|select|prefer|also|alternatively|but|correction|corrected)"
)
_ENDS = r"(?=\s*(?:$|[.,;:!?)*\]}]))"
_TO = rf"(?:{_ASIDE}\s+)?[(*]?{_X}"
_OTHERS = re.compile(
    "|".join(
        (
            rf"{_X}\s?[)\]}}*]*:(?=\s|$|[\u2e80-\uffef])",  # A: no, B: yes
            rf"(?<!\w)\*\s?\(?{_X}[.):]?\s?[*}}]",  # A ... **B**
            rf"(?:\n|[,;.!?]|\b{_OR})\s*{_X}\.\s+\S",  # A. no, B. yes
            rf"(?:\n|[,;.)]|\b{_OR})\s*{_X}\s+(?:[-–—]+\s|\()",  # A - no, B - yes; A (10%), B (90%)
            rf"\banswers?\s*(?:(?:{_COPULA}|:|=)\s*)?{_TO}{_ENDS}",  # the answer is B
            rf"{_X}[)\]}}*.]*\s+(?:{_COPULA}|could|might|may)\s+"
            r"(?i:(?:also|be|the|more|most|equally|probably|actually|still)\s+)*"
            r"(?i:right|correct|better|best|answer|possible|plausible)\b",  # B is right
            rf"\b{_TURN}\W{{1,3}}(?i:(?:it is|it's|the answer is)\s+)?{_TO}{_ENDS}",  # so B
            rf"(?<=[a-z]{{2}}),\s+{_TO}\.?$",  # A. On second thought, B
            rf"(?<=[a-z]{{2}})[,.]?\s+(?i:or|oder|ou)\s+{_TO}[)*]?\.?$",  # A: text or B
            rf"\b(?i:it's|it is|is it|(?:could|may|might)\s+(?:also\s+)?be)\s+{_TO}{_ENDS}",  # it may be B
            rf"\(\s?{_OR}\s+{_TO}{_ENDS}",  # text (or B)
            rf"\b(?i:true|false|yes|no|right|wrong|correct|incorrect)\s+{_X}[.):]",  # A. True B. False
            rf"^[\s(*.,;-]*{_X}[)*.:]*\s*$",  # on a separate line
        )
    ),
    re.MULTILINE,
)
_BRACKET = re.compile(rf"(?<![^\s,;.:*])(?:\(\s?{_XI}\s?\)|\[\s?{_XI}\s?\])(?![^\s,;.:!?*])|{_XI}\)|[()]")
_AFTER_MARK = re.compile(rf"(?:^|[,;.:!?/&|\n]|\b(?:{_OR}|{_TURN}|{_ASIDE}))$")
_CHAIN = re.compile(rf"\s*(?:{_OR}\b|[,/&;+|]|和|或|与|と)\s*(?:{_ASIDE}\s+)?[(\[{{*]*{_XI}")
_SMALL_CHAIN = re.compile(rf"\s*(?:{_OR}\b|[,;/&+])\s*(?:{_ASIDE}\s+)?[(\[]\s?[a-j]\s?[)\]]")  # (a) or (b)
_LISTED = r"[A-J](?:\s*(?:,|&|\b(?:and|or|nor)\b)){1,2}\s*[A-J](?![\w^'])"
# "Both A and B", or a text that is a list, is the text of an option, not a choice.
_QUOTED = re.compile(
    rf"(?:^\s*|\b(?i:both|either|neither|only|all|none)\s+(?:(?i:of|the|options?|statements?)\s+)*){_LISTED}"
)


def read_choice(answer: str) -> str:
    """The capital letter that an answer chooses; "" if it chooses none, or several."""
    text = _plain(answer)
    head = _LETTER.match(text, _after_lead(text))
    if head is None:
        return ""
    before = text[: head.start()]
    letter = head[1].upper()
    rest = text[head.end() :]
    if _END.match(rest):
        return letter
    label = _LABEL.match(rest) or ("*" in before and _BOXED_LABEL.match(rest)) or None
    said = rest[label.end() :] if label else rest
    if not (label or _REASON.match(rest)) or _NO_TEXT.match(said):
        return ""
    if label and not _PLAIN_LABEL.search(label[0]) and _FORMULA.match(said):
        return ""
    in_brackets = before.endswith(("(", "["))
    if in_brackets and head[1].islower() and _SMALL_CHAIN.match(said):
        return ""
    others = _other_choices(said, in_brackets)
    return "" if others - {letter} else letter


def _plain(answer: str) -> str:
    """Removes LaTeX commands, Markdown and HTML; what they highlight begins and ends with a star."""
    text = _INVISIBLE.sub("", unicodedata.normalize("NFKC", _CHINESE_LABEL.sub(r"\1: ", answer))).strip()
    if not re.fullmatch(r"<[A-Za-z]>", text):
        text = _TAG.sub("*", re.sub(r"<br\s?/?>", "\n", text))
    return _COMMAND.sub("", _SET_APART.sub("*", text)).translate(_MARKS).strip()


def _after_lead(text: str) -> int:
    """Where the letter should be: after "The answer is", or at the start."""
    at = _OPENING.match(text).end()  # pyright: ignore[reportOptionalMemberAccess]
    while True:
        word = _WORD.match(text, at)
        chosen = _I_CHOOSE.match(text, at)
        if chosen:
            at = chosen.end()
        elif word and word[0].lower().replace("’", "'") in _LEAD:
            at = word.end()
        else:
            return at
        at = _OPENING.match(text, at).end()  # pyright: ignore[reportOptionalMemberAccess]


def _other_choices(said: str, in_brackets: bool) -> set[str]:
    """The letters that the text after the chosen letter presents as choices."""
    chained = _CHAIN.match(said)
    found = {chained[1]} if chained else set()
    said = _QUOTED.sub(" ", said)
    for mark in _OTHERS.finditer(said):
        found |= set(filter(None, mark.groups()))
    return found | _bracketed(said, in_brackets)


def _bracketed(said: str, in_brackets: bool) -> set[str]:
    """Letters in "(B)", if the first letter was written so or no noun precedes it, and in "B)".

    "glutamate (E)" is an acid, and "(vitamin C)" ends a remark.
    """
    found = set()
    depth = 0
    for mark in _BRACKET.finditer(said):
        letter = next(filter(None, mark.groups()), None)
        if letter is None:
            depth = max(0, depth + (1 if mark[0] == "(" else -1))
        elif mark[0][0] in "([":
            before = said[max(0, mark.start() - 20) : mark.start()].rstrip(" *")
            if in_brackets or not before or _AFTER_MARK.search(before):
                found.add(letter)
        elif depth:
            depth -= 1
        else:
            found.add(letter)
    return found
