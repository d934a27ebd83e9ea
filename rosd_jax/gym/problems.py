"""Chains of arithmetic in which every line can be checked, so the first wrong line is known exactly.

A problem is a start value and a list of operations, `12 +4 *3 -4 +2`. It is worked from left to right,
modulo 17 (16 + 2 = 1). Since 17 is prime, a later step does not cancel a slip by accident. A solution
writes one lettered line per step, and the answer in tags:

    a 12+4=16
    b 16*3=14
    c 14-4=10
    d 10+2=12
    <answer>12</answer>

Training draws from the family `chain` (four steps, symbols). The families `long` (six or seven steps) and
`words` (`12 plus 4 times 3 minus 4 plus 2`) are out of domain.

Simulated solvers slip: a line's result is off by one or two, or is that of another operation or operand.
Products slip more often than sums. As in people's work, the lines below go on from the wrong value.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

import numpy as np

from rosd_jax.errors import UserError
from rosd_jax.types import Problem, Span

MODULUS = 17
OPERANDS = range(2, 6)
LETTERS = "abcdefgh"  # of the lines
WORDS = {"+": "plus", "-": "minus", "*": "times"}
SLIP_RATE = {"+": 0.09, "-": 0.13, "*": 0.17}
HELD_OUT = {0: "test", 10: "validation"}  # by a hash of the text modulo 20
STEPS = {"chain": (4, 4), "long": (6, 7), "words": (4, 4)}  # fewest and most steps of each family
SPLITS = {"train": 2048, "validation": 128, "test": 256}  # problems in each


@dataclass(frozen=True)
class Chain:
    """A start value and the operations on it, each a sign and an operand."""

    start: int
    steps: tuple[tuple[str, int], ...]
    family: str = "chain"

    @property
    def text(self) -> str:
        """The problem as it is asked."""
        if self.family == "words":
            return str(self.start) + "".join(f" {WORDS[op]} {n}" for op, n in self.steps)
        return str(self.start) + "".join(f" {op}{n}" for op, n in self.steps)


def apply(value: int, op: str, operand: int) -> int:
    """The right result of one step."""
    result = {"+": value + operand, "-": value - operand, "*": value * operand}[op]
    return result % MODULUS


def sample_chain(rng: np.random.Generator, family: str, split: str) -> Chain:
    """A random problem of one split."""
    low, high = STEPS[family]
    while True:
        steps = tuple(
            ("+-*"[rng.integers(3)], int(rng.choice(OPERANDS))) for _ in range(rng.integers(low, high + 1))
        )
        chain = Chain(int(rng.integers(MODULUS)), steps, family)
        if split_of(chain) == split:
            return chain


def split_of(chain: Chain) -> str:
    """The split that a problem's text belongs to: one in ten is held out, half of these for validation."""
    return HELD_OUT.get(zlib.crc32(chain.text.encode()) % 20, "train")


def slip(rng: np.random.Generator, value: int, op: str, operand: int) -> int:
    """A wrong result of the kinds that people write. In rare cases it equals the right one."""
    right = apply(value, op, operand)
    kind = rng.choice(4, p=(0.4, 0.2, 0.25, 0.15))
    sign = int(rng.choice((-1, 1)))
    if kind == 0:
        return (right + sign) % MODULUS
    if kind == 1:
        return (right + 2 * sign) % MODULUS
    if kind == 2:
        return apply(value, {"+": "-", "-": "+", "*": "+"}[op], operand)
    return apply(value, op, operand + sign)


def solve(chain: Chain, rng: np.random.Generator | None = None, sure: int | None = None) -> list[str]:
    """The lines of a solution. Without `rng` all are right; with it some slip, but never line `sure`."""
    value = chain.start
    lines = []
    for i, (op, operand) in enumerate(chain.steps):
        result = apply(value, op, operand)
        if rng is not None and i != sure and rng.random() < SLIP_RATE[op]:
            result = slip(rng, value, op, operand)
        lines.append(f"{LETTERS[i]} {value}{op}{operand}={result}")
        value = result
    return lines


def result_of(line: str) -> str:
    """The number after the equals sign."""
    return line.split("=")[1]


def respond(lines: list[str]) -> str:
    """A whole response: the lines, then the answer, which is the last line's result."""
    return "\n".join([*lines, f"<answer>{result_of(lines[-1])}</answer>"])


def first_error(chain: Chain, response: str) -> Span | None:
    """Characters of the first line that is not the right next line of the solution; None without an error.

    In a response that stops early, or whose answer is not its last line's result, the error is at the end.
    """
    expected = respond(solve(chain)).split("\n")
    lines = response.split("\n")
    start = 0
    for i, line in enumerate(lines):
        if i >= len(expected) or line != expected[i]:
            return start, start + len(line)
        start += len(line) + 1
    return None if len(lines) == len(expected) else (len(response), len(response))


def parse(text: str) -> Chain:
    """The chain that a problem's text states, in symbols or in words. Raises ValueError for other text."""
    match = re.fullmatch(r"(\d+)((?: (?:plus |minus |times |[-+*])\d+)+)", text)
    if match is None:
        raise ValueError(f"not a problem of the gym: {text[:60]!r}")
    signs = {word: sign for sign, word in WORDS.items()}
    operations = re.findall(r" (plus |minus |times |[-+*])(\d+)", match[2])
    names = [name.strip() for name, _ in operations]
    operands = [int(operand) for _, operand in operations]
    steps = tuple((signs.get(name) or name, n) for name, n in zip(names, operands, strict=True))
    if names[0] in signs:
        family = "words"
    else:
        family = "chain" if len(steps) <= 4 else "long"
    return Chain(int(match[1]), steps, family)


def load(family: str, split: str) -> list[Problem]:
    """The problems of a family's split, the same in every run. Raises UserError for an unknown name."""
    if family not in STEPS or split not in SPLITS:
        raise UserError(
            f"data set is gym:{family}/{split}; the gym has {', '.join(STEPS)} with {', '.join(SPLITS)}"
        )
    rng = np.random.default_rng(zlib.crc32(f"{family}/{split}".encode()))
    chains: dict[str, Chain] = {}
    while len(chains) < SPLITS[split]:
        chain = sample_chain(rng, family, split)
        chains[chain.text] = chain
    return [
        Problem(
            uid=f"gym:{family}/{split}/{i}",
            dataset=f"gym:{family}",
            kind="gym",
            messages=({"role": "user", "content": text},),
            answer=result_of(solve(chain)[-1]),
        )
        for i, (text, chain) in enumerate(chains.items())
    ]
