"""The gym's wording, and the texts that its tiny model is trained on: pairs of prompt and response.

There are five kinds of text and two drills (docs/design.md says what each teaches): solving with slips,
solving with a right line given as the idea, solving with a solution shown, reflecting on a wrong solution
next to a right one, and naming the key line of a right one; comparing numbers, and single steps.
"""

from __future__ import annotations

import numpy as np

from rosd_jax.gym.problems import (
    LETTERS,
    MODULUS,
    OPERANDS,
    Chain,
    apply,
    respond,
    result_of,
    sample_chain,
    solve,
)
from rosd_jax.text.prompts import Wording, idea_text, right_messages, solution_text, wrong_messages

WORDING = Wording(
    reflect_wrong_system="",
    reflect_wrong_user="{problem}\nsolution\n{solution}\nattempt\n{attempt}\nfind error",
    reflect_right_system="",
    reflect_right_user="{problem}\nattempt\n{attempt}\nfind key",
    teacher_idea_user="{problem}\nidea {idea}",
    teacher_solution_user="{problem}\nsolution\n{solution}",
)
DRILLS = ("compare", "facts")


def sample_text(rng: np.random.Generator, task: str, family: str) -> tuple[str, str]:
    """One (prompt, response) pair of a task. The prompt is a user message."""
    if task == "compare":
        return "find error", comparisons(rng)
    if task == "facts":
        return "find key", facts(rng)
    chain = sample_chain(rng, family, "train")
    right = solve(chain)
    if task == "solve":
        return chain.text, respond(solve(chain, rng))
    if task == "shown":
        return solution_text(chain.text, respond(right), WORDING), respond(right)
    if task == "idea":
        sure = int(rng.integers(len(right)))
        return idea_text(chain.text, right[sure], WORDING), respond(solve(chain, rng, sure))
    if task == "reflect_right":
        messages = right_messages(chain.text, respond(right), None, WORDING)
        return messages[-1]["content"], f"<explanation>{right[key_line(right)]}</explanation>"
    return reflection_text(chain, wrong_solution(chain, rng))


def wrong_solution(chain: Chain, rng: np.random.Generator) -> list[str]:
    """The lines of an attempt whose answer is wrong."""
    while True:
        lines = solve(chain, rng)
        if result_of(lines[-1]) != result_of(solve(chain)[-1]):
            return lines


def reflection_text(chain: Chain, wrong: list[str]) -> tuple[str, str]:
    """The reflector's prompt about a wrong attempt, and what it should write."""
    right = solve(chain)
    messages = wrong_messages(chain.text, respond(right), respond(wrong), None, WORDING)
    return messages[-1]["content"], reflect_wrong(right, wrong)


def reflect_wrong(right: list[str], wrong: list[str]) -> str:
    """What the reflector writes about a wrong attempt.

    It lists the results of both solutions side by side until they differ, then gives the quote and the right
    line in tags. Raises ValueError where no line is wrong.
    """
    walk = ""
    for right_line, wrong_line in zip(right, wrong, strict=True):
        walk += compare(right_line[0], result_of(right_line), result_of(wrong_line))
        if right_line != wrong_line:
            return f"{walk}<error_quote>{wrong_line}</error_quote><explanation>{right_line}</explanation>"
    raise ValueError("the attempt has no wrong line")


def compare(letter: str, right: str, wrong: str) -> str:
    """One line of a comparison: two results and the verdict."""
    return f"{letter} {right} {wrong} {'same' if right == wrong else 'differ'}\n"


def key_line(lines: list[str]) -> int:
    """The line where a slip is most likely: the first product, or the last line where there is none."""
    return next((i for i, line in enumerate(lines) if "*" in line), len(lines) - 1)


def comparisons(rng: np.random.Generator) -> str:
    """A drill: lines of comparisons, half of them of different results."""
    values = rng.integers(MODULUS, size=len(LETTERS))
    equals = rng.random(len(LETTERS)) < 0.5
    lines = []
    for letter, value, equal in zip(LETTERS, values, equals, strict=True):
        other = value if equal else (value + rng.integers(1, MODULUS)) % MODULUS
        lines.append(compare(letter, str(value), str(other)))
    return "".join(lines)


def facts(rng: np.random.Generator) -> str:
    """A drill: single steps, each from its own start value."""
    lines = []
    for letter in LETTERS:
        value = int(rng.integers(MODULUS))
        op = "+-*"[rng.integers(3)]
        operand = int(rng.choice(OPERANDS))
        lines.append(f"{letter} {value}{op}{operand}={apply(value, op, operand)}\n")
    return "".join(lines)
