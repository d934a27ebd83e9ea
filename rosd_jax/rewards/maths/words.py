"""Words in answers: units, number words, words in any case, and words that change the meaning."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction

from rosd_jax.rewards.maths.latex import Token, Unreadable


def _numbers(pairs: str) -> dict[str, int]:
    """What is written as `name:number name:number`."""
    return {name: int(number) for name, number in (pair.split(":") for pair in pairs.split())}


_NAMES = """m meter metre|cm centimeter centimetre|mm millimeter millimetre|km kilometer kilometre
nm nanometer nanometre|um micrometer micrometre micron|in inch inche|ft foot feet|yd yard|mi mile
g gram gramme|kg kilogram kilogramme kilo|mg milligram|lb lbs pound|oz ounce|t ton tonne
s sec secs second|ms millisecond|min mins minute|h hr hrs hour|day|week|month|yr yrs year|l L liter litre
ml mL milliliter millilitre
gal gallon|pt pint|qt quart|N newton|J joule|kJ kilojoule|W watt|kW kilowatt|MW megawatt|V volt|A amp ampere
C coulomb|Pa pascal|kPa kilopascal|Hz hertz|kHz kilohertz|MHz megahertz|K kelvin|mol mole
eV electronvolt|degree deg|rad radian|usd USD dollar buck|eur EUR euro|gbp GBP|cent|rs Rs rupee INR
yuan RMB CNY|yen JPY|acre|ha hectare|cal calorie|kcal"""
_UNITS = {
    name: group.split()[0]
    for line in _NAMES.split("\n")
    for group in line.split("|")
    for name in group.split()
}
CURRENCIES = {"$": "usd", "£": "gbp", "€": "eur", "¥": "yen", "₹": "rs", "₩": "won", "₽": "rub", "¢": "cent"}
_CURRENCY_UNITS = frozenset([*CURRENCIES.values(), "yuan"])

# Adjacent letters are a product, except these directly after a number: nobody multiplies k and g.
_TYPED_UNITS = frozenset(
    """cm mm km kg ft yd lb lbs oz hr hrs sec min deg rad gal kW MW kJ Hz kHz MHz kPa USD EUR GBP Rs mph kmph
    kph cup day ton cal men per pct sq ml mL kWh KB MB GB TB""".split()
) | {name for name in _UNITS if len(name) > 3}

_FRACTIONS = _numbers(
    """halve:2 third:3 fifth:5 sixth:6 seventh:7 eighth:8 ninth:9 tenth:10 hundredth:100 thousandth:1000
    ten-thousandth:10000 hundred-thousandth:100000 millionth:1000000 billionth:1000000000"""
)
_POWERS = _numbers(  # of ten
    """hundred:2 thousand:3 tausend:3 lakh:5 million:6 millionen:6 millones:6 crore:7 billion:9 milliard:9
    milliarde:9 milliarden:9 trillion:12 quadrillion:15 百:2 千:3 万:4 萬:4 만:4 亿:8 億:8 억:8"""
)
_SCALES: dict[str, int | Fraction] = {name: 10**power for name, power in _POWERS.items()}
_SCALES |= {"dozen": 12}
_SCALES |= {name: Fraction(1, part) for name, part in _FRACTIONS.items()}
_SCALE_CHARACTERS = (
    "万萬만亿億억"  # no unit begins with these, unlike the Chinese kilometre, which begins with "thousand"
)
_PERCENT = frozenset(["%", "percent", "percentage", "pct", "per-cent"])
_PERCENT_PAIRS = frozenset([("per", "cent"), ("percentage", "point"), ("percentage", "points")])
_FILLERS = frozenset(
    "old long wide tall high deep away the a an each total in altogether of all exactly".split()
)
_SPEEDS = {"mph": "mi", "kmph": "km", "kph": "km"}
_LENDING = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_GENERIC = frozenset("unit units".split())
# After a number these give another answer, or say that there is more than one.
_CHANGING = frozenset(
    """or and if when unless not no but to than more less fewer most least over under above below between
    from through minus plus times divided mod modulo is are maybe perhaps nor either neither except without
    half quarter third where with negative squared cubed factorial root possibly remainder points up down
    loss short otherwise only can cannot never since because let base bn mn tn mil mill mio
    mrd double twice""".split()
)

_ANSWER_WORDS = frozenset(
    """yes no true false even odd east west north south none zero one two three four five six seven eight
    nine ten all any both left right up down red mon tue wed thu fri sat sun jan feb mar apr may jun jul
    aug sep oct nov dec rock sine cosine line cube cone none real""".split()
)


def is_typed_word(run: str) -> bool:
    """Whether adjacent letters outside a text group are read as a word rather than a product."""
    return len(run) > 3 or run.lower() in _ANSWER_WORDS or run in ("and", "or") or not run.isascii()


def is_typed_unit(run: str) -> bool:
    """Whether adjacent letters after a number, outside a text group, are a unit."""
    return (
        run in _TYPED_UNITS
        or (len(run) > 3 and run.islower())
        or run.lower() in _SCALES
        or run.lower() in _PERCENT
        or not run.isascii()
    )


def word_key(word: str) -> str:
    """Equal for spellings of the same word: East, east. Symbols keep their case: Aa, AABB, pH, ABC."""
    lower = word.lower()
    if lower in _ANSWER_WORDS:
        return lower
    letters = [c for c in lower if c.isalpha()]
    natural = word[1:] in (word[1:].lower(), word[1:].upper()) and (word[1:].islower() or word[:1].isupper())
    pairs = len(letters) % 2 == 0 and letters[::2] == letters[1::2]
    labels = all(a < b for a, b in zip(letters, letters[1:], strict=False))
    enough = 4 if word[1:].islower() else 5
    return lower if natural and len(letters) >= enough and not pairs and not labels else word


def phrase_key(words: Iterable[str]) -> str:
    """Equal for phrases that differ in case and articles only."""
    return " ".join(word_key(word) for word in words if word.lower() not in ("the", "a", "an"))


def scale(words: Sequence[str]) -> tuple[Fraction, int]:
    """The product of the leading number words, and how many there are."""
    factor = Fraction(1)
    count = 0
    while count < len(words) and words[count].lower().removesuffix("s") in _SCALES:
        factor *= _SCALES[words[count].lower().removesuffix("s")]
        count += 1
    return factor, count


def percent(words: Sequence[str]) -> int:
    """How many of the first words mean percent."""
    first = tuple(word.lower() for word in words[:2])
    return 2 if first in _PERCENT_PAIRS else int(first[:1] != () and first[0] in _PERCENT)


def unit(tokens: Sequence[Token]) -> str:
    """The unit after a number, in one spelling; "" if no word there has weight.

    Raises Unreadable for anything but a unit or a noun with its adjectives.
    """
    powers: dict[str, int] = {}
    name = ""  # the unit before
    sign = 1  # -1 after a slash
    lent = 1  # the power that `square` or `cubic` gives to the next unit
    position = 0
    while position < len(tokens):
        token = tokens[position]
        position += 1
        if token.text in ("/", "per"):
            sign = -1
        elif token.text == "^" and position > 1 and (found := _power(tokens, position)):
            if name:
                powers[name] *= found[0]
            position = found[1]
        elif token.text == "°":
            powers["degree"] = sign
        elif token.kind in ("text", "let") or token.text in CURRENCIES:
            if lent == 1 and token.text.lower() in _LENDING:
                lent = _LENDING[token.text.lower()]
                continue
            name = _unit_name(token.text)
            if name in _SPEEDS:
                name = _SPEEDS[name]
                powers["h"] = -1
            if name:
                powers[name] = powers.get(name, 0) + sign * lent
            lent = 1
        elif token.text not in ("^", "{", "}", "*", "(", ")"):
            raise Unreadable(f"{token.text} in a unit")
    if len(powers) > 6:
        raise Unreadable("too much text after a number")
    return " ".join(unit if power == 1 else f"{unit}^{power}" for unit, power in sorted(powers.items()))


def _power(tokens: Sequence[Token], position: int) -> tuple[int, int] | None:
    """The integer exponent at `position`, and the index of the next token."""
    texts = [token.text for token in tokens[position : position + 4]]
    for shape, at in ((["{", "-", None, "}"], 2), (["{", None, "}"], 1), (["-", None], 1), ([None], 0)):
        here = texts[: len(shape)]
        fits = len(here) == len(shape) and all(
            want in (None, text) for want, text in zip(shape, here, strict=True)
        )
        if fits and here[at] in tuple("123456789"):
            return (-1 if "-" in shape else 1) * int(here[at]), position + len(shape)
    return None


def _unit_name(word: str) -> str:
    """The name of a unit or a noun in one spelling, "" for words without weight."""
    lower = word.lower()
    if lower in _CHANGING or lower in _SCALES or percent([word]) or word[0] in _SCALE_CHARACTERS:
        raise Unreadable(f"{word} after a number")
    if lower in _FILLERS or lower in _GENERIC:
        return ""
    if len(word) <= 3:  # the case of an abbreviation counts: Mg, mg
        return CURRENCIES.get(word) or _UNITS.get(word) or word
    singular = lower.removesuffix("s")
    return _UNITS.get(word) or _UNITS.get(singular) or singular


def is_known_unit(name: str) -> bool:
    """Whether a unit is in the table, or is composed of such units (cm ^2, km / h)."""
    parts = [part.partition("^")[0] for part in name.split()]
    return all(part in _UNITS or part in _CURRENCY_UNITS for part in parts)


def currency(text: str) -> str:
    """The currency that a sign or a name before a number states; "" if none."""
    if text in CURRENCIES:
        return CURRENCIES[text]
    name = _UNITS.get(text, "")
    return name if len(text) > 1 and name in _CURRENCY_UNITS else ""
