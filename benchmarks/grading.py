r"""Error rates of the mathematics checker: right answers that it rejects and wrong ones that it accepts.

    ROSD_DATA_DIR=DIR python -m benchmarks.grading [--list]

Gold answers of MATH-500, AIME 24 and 25, AMC 23 and Minerva are rewritten in ways that keep them right, and
changed in ways that make them wrong. Grader("fixed") grades each pair of prediction, as `\boxed{...}`, and
gold answer. One line per way is printed: pairs, mistakes, share; with --list every mistake. A way is used on
every gold answer that it applies to, so the numbers are the same in every run. docs/grading.md has them with
their dates.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

from rosd_jax.rewards import Grader
from rosd_jax.types import Problem

Pair = tuple[str, str]  # prediction, gold
# From a gold answer: a prediction, or prediction and gold both rewritten; None if the way does not apply.
Way = Callable[[str], str | Pair | None]

SETS = ("math500", "aime24", "aime25", "amc23", "minerva_math")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
BOX = re.compile(r"\\boxed\s*")


def golds(directory: Path) -> list[str]:
    """The distinct gold answers of all sets, in order."""
    found: dict[str, None] = {}
    for name in SETS:
        for line in (directory / f"{name}.jsonl").read_text().splitlines():
            row = json.loads(line)
            found[str(row["answer"]) if "answer" in row else _last_box(row["solution"])] = None
    return [gold for gold in found if gold != "np.arcsin(10/13)"]  # code, not mathematics


def _last_box(text: str) -> str:
    r"""The content of the last \boxed{...}. Raises ValueError if there is none."""
    start = text.rindex("\\boxed") + len("\\boxed")
    start = text.index("{", start)
    depth = 0
    for position in range(start, len(text)):
        depth += (text[position] == "{") - (text[position] == "}")
        if depth == 0:
            return text[start + 1 : position].strip()
    raise ValueError(f"no end of the box in {text[-200:]!r}")


# ---- right


def changed(pattern: str, replacement: str | Callable[[re.Match[str]], str]) -> Way:
    """Replaces every match of a pattern; applies to golds that have one."""

    def way(gold: str) -> str | None:
        text = re.sub(pattern, replacement, gold)
        return text if text != gold else None

    return way


def of_number(spell: Callable[[str], str | Pair | None]) -> Way:
    """Applies to golds that are a decimal number, and passes on its text."""
    return lambda gold: spell(gold) if NUMBER.fullmatch(gold) else None


def of_integer(spell: Callable[[int], str | Pair | None]) -> Way:
    """Applies to golds that are an integer of at most 15 digits."""
    return lambda gold: spell(int(gold)) if re.fullmatch(r"-?\d{1,15}", gold) else None


def of_word(spell: Callable[[str], str]) -> Way:
    r"""Applies to golds that are one word in \text{...}."""

    def way(gold: str) -> str | None:
        word = re.fullmatch(r"\\text\{([A-Za-z]{3,})\}", gold)
        return spell(word[1]) if word else None

    return way


def spaced(gap: str) -> Way:
    """Separates the thousands of an integer."""
    return of_integer(lambda n: f"{n:,}".replace(",", gap) if abs(n) >= 1000 else None)


def as_gold(spell: Callable[[str], str]) -> Way:
    """Rewrites the gold; the prediction is the gold as it was."""
    return lambda gold: (gold, spell(gold))


TYPED = {
    r"\pi": "π",
    r"\infty": "∞",
    r"\cup": "∪",
    r"\cdot": "·",
    r"\pm": "±",
    r"\omega": "ω",
    r"\theta": "θ",
    r"^\circ": "°",
    "^2": "²",
    "^3": "³",
    r"\sqrt{2}": "√2",
    r"\sqrt{3}": "√3",
    "-": "−",
    r"\frac{1}{2}": "½",
    r"\frac{1}{4}": "¼",
}


def typed(gold: str) -> str | None:
    """Unicode characters instead of LaTeX commands."""
    text = gold
    for sign, character in TYPED.items():
        text = text.replace(sign, character)
    return text if text != gold else None


def decimal_of_fraction(gold: str) -> str | None:
    """The decimal of a fraction that has a finite one."""
    match = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold)
    if not match:
        return None
    value = Decimal(match[2]) / Decimal(match[3])
    return f"{match[1]}{value}" if value * Decimal(match[3]) == Decimal(match[2]) else None


def recurring_decimal(gold: str) -> str | None:
    """Six decimals, the last one or two overlined, of a fraction whose decimal recurs after at most six."""
    match = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(3|6|9|11|12|18)\}", gold)
    if not match:
        return None
    value = Fraction(int(match[2]), int(match[3]))
    cycle = 2 if value.denominator == 11 else 1
    shown = str(int(value * 10**6)).rjust(7, "0")
    if value.denominator in (1, 2, 4):
        return None
    return f"{match[1]}{shown[:-6]}.{shown[-6 : -6 + 6 - cycle]}\\overline{{{shown[-cycle:]}}}"


def swapped_terms(gold: str) -> str | None:
    """A sum or difference of two terms in the other order."""
    match = re.fullmatch(r"([A-Za-z0-9\\{}^ ]+?) *(?<!e)([+-]) *([A-Za-z0-9\\{}^ ]+)", gold)
    if not match or r"\\" in gold or match[1].count("{") != match[1].count("}"):
        return None
    return f"{match[2].replace('+', '')}{match[3]} + {match[1]}"


def reversed_list(gold: str) -> str | None:
    """A list of small integers backwards."""
    items = gold.split(",")
    plain = all(re.fullmatch(r"\s*-?\d{1,2}\s*", item) for item in items)
    return ", ".join(reversed(items)) if len(items) > 1 and plain else None


def with_lines(gold: str) -> str | None:
    """A list of small integers, one per line of LaTeX."""
    return " \\\\ ".join(gold.split(",")) if reversed_list(gold) else None


RIGHT: dict[str, Way] = {
    "as it is": lambda gold: rf"\displaystyle {gold}",
    "full stop": lambda gold: gold + ".",
    "full stop 。": lambda gold: gold + "。",
    "dollars around it": lambda gold: f"${gold}$",
    r"\left \right": changed(r"(?<![\\a-z])([(\[])(.*)([)\]])$", r"\\left\1\2\\right\3"),
    r"\dfrac": changed(r"\\frac", r"\\dfrac"),
    "unbraced": changed(r"\\frac\{(\d)\}\{(\d)\}", r"\\frac\1\2"),
    "typed Unicode": typed,
    "full width": lambda gold: (
        gold.translate({ord(c): ord(c) + 0xFEE0 for c in "0123456789(),"})
        if re.fullmatch(r"[\d(), -]+", gold)
        else None
    ),
    r"thousands \,": spaced(r"\,"),
    "thousands gap": spaced(" "),
    "thousands ,": spaced(","),
    "thousands {,}": spaced("{,}"),
    "point zero": of_integer(lambda n: f"{n}.0"),
    "e-notation": of_number(lambda text: f"{Decimal(text):.14e}" if len(text) < 14 else None),
    "power of ten": of_number(lambda text: rf"{Decimal(text) * 1000} \times 10^{{-3}}"),
    "decimal of a fraction": decimal_of_fraction,
    "recurring decimal": recurring_decimal,
    "plain unit": of_number(lambda text: f"{text} dollars"),
    "plain speed": of_number(lambda text: f"{text} km/h"),
    r"unit in \text": of_number(lambda text: rf"{text} \text{{ cm}}^2"),
    "currency": of_number(lambda text: f"£{text}" if text[0] != "-" else None),
    "percent": of_number(lambda text: rf"{text}\%"),
    "percent in words": of_number(lambda text: f"{text} percent"),
    "without its unit": changed(r"(\^\\circ|\\text\{ degrees\}|\\text\{ cents\}|\\mbox\{.*)$", ""),
    "degrees in words": changed(r"\^\\circ$", " degrees"),
    "x =": of_number(lambda text: f"x = {text}"),
    "= on the right": of_integer(lambda n: f"{n - 1} + 1 = {n}"),
    "a sum": of_integer(lambda n: f"{n - 7} + 7"),
    "a quotient": of_integer(lambda n: rf"\frac{{{3 * n}}}{{3}}"),
    "a square root": of_integer(lambda n: rf"\sqrt{{{n * n}}}" if n >= 0 else None),
    "terms swapped": swapped_terms,
    "list reversed": reversed_list,
    "list on lines": with_lines,
    "millions in words": of_integer(lambda n: (f"{n} \\text{{ million}}", str(n * 10**6))),
    "word, capital": of_word(str.capitalize),
    "word, plain": of_word(str.lower),
    "gold in **": as_gold(lambda gold: f"**{gold}**"),
    "gold in a sentence": as_gold(lambda gold: f"The answer is ${gold}$."),
    "gold with a full stop": as_gold(lambda gold: gold + "."),
    "gold boxed": as_gold(lambda gold: rf"\boxed{{{gold}}}"),
}


# ---- wrong


def last_digit(gold: str) -> str | None:
    """Another last digit."""
    positions = [match.start() for match in re.finditer(r"\d", gold)]
    if not positions:
        return None
    at = positions[-1]
    return f"{gold[:at]}{(int(gold[at]) + 1) % 10}{gold[at + 1 :]}"


def first_digit(gold: str) -> str | None:
    """Another first nonzero digit."""
    at = re.search(r"[1-9]", gold)
    return f"{gold[: at.start()]}{int(at[0]) % 9 + 1}{gold[at.end() :]}" if at else None


def other_case(gold: str) -> str | None:
    """Every variable in the other case; words and commands are kept."""
    if re.search(r"\\text|\\mbox|\^\{\\prime", gold):
        return None
    pieces = re.split(r"(\\begin\{.*|\\[A-Za-z]+|\d[eE]-?\d)", gold)
    text = "".join(p if p[:1] == "\\" or p[:1].isdigit() else p.swapcase() for p in pieces)
    return text if text != gold else None


def greek_case(gold: str) -> str | None:
    """A capital Greek letter instead of a small one."""
    match = re.search(r"\\(omega|theta|delta|lambda|gamma|pi|sigma)(?![a-z])", gold)
    return gold.replace(match[0], "\\" + match[1].capitalize()) if match else None


def other_sign(gold: str) -> str | None:
    """The negative of a single nonzero value."""
    match = re.fullmatch(r"(-?)(\.?\d.*|\\d?frac.*|\\sqrt.*)", gold)
    if not match or gold == "0":
        return None
    without_commands = re.sub(r"\\[a-z]+|\^\\circ", "", match[2])
    if re.search(r"[-+,=_a-zA-Z ]|\\pm|%", without_commands):
        return None
    return match[2] if match[1] else "-" + gold


def entries(gold: str) -> tuple[str, list[str], str] | None:
    """Opening parenthesis, entries and closing parenthesis of a tuple; None for anything else."""
    match = re.fullmatch(r"(\\left\(|\()(.*[^\\])(\\right\)|\))", gold)
    parts = match[2].split(",") if match and r"\cup" not in gold else []
    return (match[1], parts, match[3]) if match and len(parts) > 1 else None


def swapped_entries(gold: str) -> str | None:
    """A tuple with its first two entries, if they differ, exchanged."""
    found = entries(gold)
    if not found or found[1][0].strip() == found[1][1].strip():
        return None
    opener, (first, second, *rest), closer = found
    return opener + ",".join([second, first, *rest]) + closer


def dropped_entry(gold: str) -> str | None:
    """A tuple or list without its first entry."""
    found = entries(gold)
    if found:
        return found[0] + ",".join(found[1][1:]) + found[2]
    return ",".join(gold.split(",")[1:]) if reversed_list(gold) else None


def other_bracket(gold: str) -> str | None:
    """A tuple, or an open interval, with a square bracket on the left."""
    found = entries(gold)
    return "[" + ",".join(found[1]) + found[2].replace("\\right", "") if found else None


def plus_one(gold: str) -> str | None:
    """One more than a single expression without a unit."""
    plain = re.fullmatch(r"(?:[^,_=()\[\]\\]|\\(?:d?frac|sqrt|pi|omega|theta|cos|sin))*", gold)
    return f"{gold} + 1" if plain and not gold[-1:].isspace() else None


def rounded(gold: str) -> str | None:
    """Three decimals of a fraction that has more."""
    match = re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold)
    value = Fraction(int(match[2]), int(match[3])) if match else Fraction(1)
    return f"{match[1] if match else ''}{float(value):.3f}" if (value * 1000).denominator > 1 else None


def tiny(gold: str) -> Pair | None:
    """Different numbers of the order of 1e-19."""
    if not re.fullmatch(r"[1-9]\d*", gold):
        return None
    return rf"{int(gold) + 1} \times 10^{{-19}}", rf"{gold} \times 10^{{-19}}"


def tiny_entry(gold: str) -> Pair | None:
    """Pairs whose first entries, of the order of 1e-12, differ."""
    if not re.fullmatch(r"[1-9]\d{0,3}", gold):
        return None
    return f"({int(gold) + 1}e-12, 1)", f"({gold}e-12, 1)"


def small_power(gold: str) -> Pair | None:
    """Different high powers of a small fraction."""
    if not re.fullmatch(r"[2-9]\d?", gold):
        return None
    return rf"\left(\frac{{1}}{{{gold}}}\right)^{{25}}", rf"\left(\frac{{1}}{{{gold}}}\right)^{{24}}"


WRONG: dict[str, Way] = {
    "last digit": last_digit,
    "first digit": first_digit,
    "sign": other_sign,
    "letter case": other_case,
    "Greek case": greek_case,
    "genotype case": of_integer(lambda n: (r"\text{AaBb}", r"\text{aabb}") if n == 1 else None),
    "base": changed(r"^(\d+)_\{?(\d+)\}?$", lambda m: f"{m[1]}_{int(m[2]) + 1}"),
    "base stated in decimal": changed(r"^(\d+)_\{?(\d+)\}?$", r"\1_{10}"),
    "exponent": changed(r"\^(?:\{(\d+)\}|(\d))", lambda m: f"^{{{int(m[1] or m[2]) + 1}}}"),
    "e-notation exponent": changed(r"(?<=\d)e(-?\d+)$", lambda m: f"e{int(m[1]) + 1}"),
    "ten times": of_number(lambda text: str(Decimal(text) * 10) if float(text) else None),
    "entries swapped": swapped_entries,
    "entry dropped": dropped_entry,
    "bracket": other_bracket,
    "one more value": of_integer(lambda n: f"{n}, {n + 1}"),
    "or": of_integer(lambda n: rf"{n + 1} \text{{ or }} {n}"),
    r"\land": of_integer(lambda n: rf"x={n + 1} \land x={n}"),
    r"\lor": of_integer(lambda n: rf"{n + 1} \lor {n}"),
    "two lines": of_integer(lambda n: rf"{n + 1} \\ {n}"),
    r"\&": of_integer(lambda n: rf"x={n + 1} \& x={n}"),
    "two in braces": of_integer(lambda n: rf"\{{{n + 1}, {n}\}}"),
    "chain that differs": of_integer(lambda n: f"x = {n + 1} = {n}"),
    "an equation of a power": of_integer(lambda n: f"x^2 = {n}"),
    "plus one": plus_one,
    "times a variable": of_number(lambda text: f"{text}t" if float(text) else None),
    "number word": of_number(lambda text: rf"{text} \text{{ million}}" if float(text) else None),
    "other unit": of_number(lambda text: (rf"{text} \text{{ m}}", rf"{text} \text{{ cm}}")),
    "other power of a unit": of_number(lambda text: (rf"{text} \text{{ cm}}", rf"{text} \text{{ cm}}^2")),
    "three digits of a fraction": rounded,
    "tiny numbers": tiny,
    "tiny in a tuple": tiny_entry,
    "tiny powers": small_power,
    "conjugate": changed(r"^(-?\d+ *)([+-])( *\d*i)$", lambda m: m[1] + {"+": "-", "-": "+"}[m[2]] + m[3]),
    r"without \pi": changed(r"^(\d+) *\\pi$", r"\1"),
    r"without \sqrt": changed(r"\\sqrt *(\{?)", r"\1"),
    "other word": of_word(lambda word: word[::-1]),
}


def main() -> None:
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--list", action="store_true", help="print every mistake")
    show = parser.parse_args().list
    answers = golds(Path(os.environ["ROSD_DATA_DIR"]) / "eval")
    print(f"{len(answers)} distinct gold answers\n")
    with Grader("fixed") as grader:
        grade(grader, [("1.0", "1")])  # starts the worker processes
        start = time.perf_counter()
        total = 0
        for title, ways, want in (
            ("right answers rejected", RIGHT, 1.0),
            ("wrong answers accepted", WRONG, 0.0),
        ):
            print(f"{title:28} pairs mistakes share")
            total += report(grader, answers, ways, want, show)
            print()
        seconds = time.perf_counter() - start
        print(f"{total} pairs in {seconds:.1f} s; {grader.timeouts} exceeded the time limit")


def report(grader: Grader, answers: list[str], ways: dict[str, Way], want: float, show: bool) -> int:
    """Prints one line per way and their sum. Returns the number of pairs."""
    total = 0
    mistakes = 0
    for name, way in ways.items():
        made = [(way(gold), gold) for gold in answers]
        pairs = [pair if isinstance(pair, tuple) else (pair, gold) for pair, gold in made if pair is not None]
        scores = grade(grader, pairs)
        wrong = [pair for pair, score in zip(pairs, scores, strict=True) if score != want]
        print(f"{name:28} {len(pairs):5} {len(wrong):8} {len(wrong) / max(len(pairs), 1):5.1%}")
        if show:
            for prediction, gold in wrong:
                print(f"    {prediction!r}, gold {gold!r}")
        total += len(pairs)
        mistakes += len(wrong)
    print(f"{'all':28} {total:5} {mistakes:8} {mistakes / total:5.1%}")
    return total


def grade(grader: Grader, pairs: list[Pair]) -> list[float]:
    """The score of each pair, 1 for a right answer."""
    problems = [Problem("grading", "grading", "math", (), gold) for _, gold in pairs]
    grades = grader.grade_all(
        [rf"\boxed{{{prediction}}}" for prediction, _ in pairs], problems, thinking_open=False
    )
    return [grade.score for grade in grades]


if __name__ == "__main__":
    main()
