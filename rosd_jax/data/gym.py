"""The gym: chains of arithmetic whose every line is checked, so the first wrong line is known exactly.

A problem is a start value and a list of operations, `12 +4 *3 -4 +2`, worked left to right on a dial of
17 numbers (16 + 2 = 1; 17 is prime, so no later step heals a slip by itself). A solution writes one
lettered line a step and the answer in tags:

    a 12+4=16
    b 16*3=14
    c 14-4=10
    d 10+2=12
    <answer>12</answer>

Families: `chain` (four steps, symbols) is what training sees; `long` (six or seven steps) and `words`
(`12 plus 4 times 3 minus 4 plus 2`) are out of domain for it.

Solvers slip: a line's result is off by one or two, or belongs to another operation or operand, more
often for products than for sums. Slips carry on into the lines below, as they do in people's work.
Here also are the texts from which the tiny base model is trained: solving with slips, reflecting on a
wrong solution beside a right one, naming the key line of a right one, and solving with an idea in hand.

    python -m rosd_jax.data.gym --out=DIR [--steps=N] [--seed=N]     trains that model (see pretrain.py)
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

from rosd_jax.config import UserError
from rosd_jax.text.prompts import Wording
from rosd_jax.types import Problem, Span

DIAL = 17
OPERANDS = range(2, 6)
LETTERS = "abcdefgh"
WORDS = {"+": "plus", "-": "minus", "*": "times"}
SLIP_RATE = {"+": 0.09, "-": 0.13, "*": 0.17}
HELD_OUT = {0: "test", 10: "validation"}  # by a hash of the text modulo 20
STEPS = {"chain": (4, 4), "long": (6, 7), "words": (4, 4)}  # fewest and most steps of each family
SIZES = {"train": 2048, "validation": 128, "test": 256}

WORDING = Wording(
    reflect_wrong_system="",
    reflect_wrong_user="{problem}\nsolution\n{solution}\nattempt\n{attempt}\nfind error",
    reflect_right_system="",
    reflect_right_user="{problem}\nattempt\n{attempt}\nfind key",
    teacher_idea_user="{problem}\nidea {idea}",
    teacher_solution_user="{problem}\nsolution\n{solution}",
)


@dataclass(frozen=True)
class Chain:
    """A start value and the operations on it, each a sign and an operand."""

    start: int
    steps: tuple[tuple[str, int], ...]
    family: str = "chain"

    @property
    def text(self) -> str:
        if self.family == "words":
            return str(self.start) + "".join(f" {WORDS[op]} {n}" for op, n in self.steps)
        return str(self.start) + "".join(f" {op}{n}" for op, n in self.steps)


def apply(value: int, op: str, operand: int) -> int:
    """One step on the dial."""
    result = {"+": value + operand, "-": value - operand, "*": value * operand}[op]
    return result % DIAL


def sample_chain(rng: np.random.Generator, family: str, split: str) -> Chain:
    """A random problem of one split; a problem's text alone decides which split it belongs to."""
    low, high = STEPS[family]
    while True:
        steps = tuple(
            ("+-*"[rng.integers(3)], int(rng.choice(OPERANDS))) for _ in range(rng.integers(low, high + 1))
        )
        chain = Chain(int(rng.integers(DIAL)), steps, family)
        if split_of(chain) == split:
            return chain


def split_of(chain: Chain) -> str:
    """One problem in ten is held out from every training text, half of these for validation."""
    return HELD_OUT.get(zlib.crc32(chain.text.encode()) % 20, "train")


def slip(rng: np.random.Generator, value: int, op: str, operand: int) -> int:
    """A wrong result as people write it; may, rarely, coincide with the right one."""
    right = apply(value, op, operand)
    kind = rng.choice(4, p=(0.4, 0.2, 0.25, 0.15))
    sign = int(rng.choice((-1, 1)))
    if kind == 0:
        return (right + sign) % DIAL
    if kind == 1:
        return (right + 2 * sign) % DIAL
    if kind == 2:
        return apply(value, {"+": "-", "-": "+", "*": "+"}[op], operand)
    return apply(value, op, operand + sign)


def solve(chain: Chain, rng: np.random.Generator | None = None, sure: int | None = None) -> list[str]:
    """The lines of a solution: right without `rng`, with slips otherwise, but never in line `sure`."""
    value, lines = chain.start, []
    for i, (op, operand) in enumerate(chain.steps):
        result = apply(value, op, operand)
        if rng is not None and i != sure and rng.random() < SLIP_RATE[op]:
            result = slip(rng, value, op, operand)
        lines.append(f"{LETTERS[i]} {value}{op}{operand}={result}")
        value = result
    return lines


def respond(lines: list[str]) -> str:
    """A whole response: the lines and the answer, which is the last line's result."""
    return "\n".join([*lines, f"<answer>{lines[-1].split('=')[1]}</answer>"])


def first_error(chain: Chain, response: str) -> Span | None:
    """Characters of the first line that is not the right next line of the solution, or None.

    A response that stops early, or states another answer than its last line's, errs where it ends.
    """
    want, start = respond(solve(chain)).split("\n"), 0
    got = response.split("\n")
    for i, line in enumerate(got):
        if i >= len(want) or line != want[i]:
            return start, start + len(line)
        start += len(line) + 1
    return None if len(got) == len(want) else (len(response), len(response))


def parse(text: str) -> Chain | None:
    """The chain that a problem's text states, in symbols or in words."""
    signs = {word: sign for sign, word in WORDS.items()}
    match = re.fullmatch(r"(\d+)((?: (?:plus |minus |times |[-+*])\d+)+)", text)
    if match is None:
        return None
    steps = re.findall(r" (plus |minus |times |[-+*])(\d+)", match[2])
    chain = tuple((signs[op.strip()] if op.strip() in signs else op, int(n)) for op, n in steps)
    family = "words" if steps[0][0].strip() in signs else "chain" if len(steps) <= 4 else "long"
    return Chain(int(match[1]), chain, family)


def compare(letter: str, right: str, wrong: str) -> str:
    """One line of a comparison: two results and the verdict."""
    return f"{letter} {right} {wrong} {'same' if right == wrong else 'differ'}\n"


def reflect_wrong(right: list[str], wrong: list[str]) -> str:
    """What the reflector writes of a wrong attempt: results side by side until they part, then tags."""
    walk = ""
    for a, b in zip(right, wrong, strict=True):
        walk += compare(a[0], a.split("=")[1], b.split("=")[1])
        if a != b:
            return f"{walk}<error_quote>{b}</error_quote><explanation>{a}</explanation>"
    raise ValueError("the attempt has no wrong line")


def comparisons(rng: np.random.Generator) -> str:
    """A drill: lines of comparisons, half of them of results that differ."""
    pairs = rng.integers(DIAL, size=len(LETTERS)), rng.random(len(LETTERS)) < 0.5
    lines = []
    for letter, value, equal in zip(LETTERS, *pairs, strict=True):
        other = value if equal else (value + rng.integers(1, DIAL)) % DIAL
        lines.append(compare(letter, str(value), str(other)))
    return "".join(lines)


def facts(rng: np.random.Generator) -> str:
    """A drill: single steps, each from a start of its own."""
    lines = []
    for letter in LETTERS:
        value, op, operand = int(rng.integers(DIAL)), "+-*"[rng.integers(3)], int(rng.choice(OPERANDS))
        lines.append(f"{letter} {value}{op}{operand}={apply(value, op, operand)}\n")
    return "".join(lines)


def key_line(lines: list[str]) -> int:
    """The line where slips are likeliest: the first product, or the last line where there is none."""
    return next((i for i, line in enumerate(lines) if "*" in line), len(lines) - 1)


def load(family: str, split: str) -> list[Problem]:
    """The problems of a family's split, the same in every run. Raises UserError for an unknown name."""
    if family not in STEPS or split not in SIZES:
        raise UserError(
            f"data set is gym:{family}/{split}; the gym has {', '.join(STEPS)} with {', '.join(SIZES)}"
        )
    rng = np.random.default_rng(zlib.crc32(f"{family}/{split}".encode()))
    chains: dict[str, Chain] = {}
    while len(chains) < SIZES[split]:
        chain = sample_chain(rng, family, split)
        chains[chain.text] = chain
    return [
        Problem(
            uid=f"gym:{family}/{split}/{i}",
            dataset=f"gym:{family}",
            kind="gym",
            messages=({"role": "user", "content": text},),
            answer=solve(chain)[-1].split("=")[1],
        )
        for i, (text, chain) in enumerate(chains.items())
    ]


if __name__ == "__main__":
    from rosd_jax.data.pretrain import main

    main()
