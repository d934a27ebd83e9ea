"""What a perfect reflector would say, which only the gym knows."""

from __future__ import annotations

from rosd_jax.gym.problems import first_error, parse, respond, solve
from rosd_jax.types import Span


def oracle(question: str, response: str) -> tuple[Span | None, str]:
    """The first error of a response in characters (None without one), and the right line in its place.

    The line is one of the solution's, as in the texts that the gym's model was trained on: if the error is
    behind them, as in the answer, it is the last one. Raises ValueError for a problem that is not of the gym.
    """
    chain = parse(question)
    right = solve(chain)
    lines = response.split("\n")
    expected = respond(right).split("\n")
    agree = 0
    while agree < min(len(lines), len(expected)) and lines[agree] == expected[agree]:
        agree += 1
    return first_error(chain, response), right[min(agree, len(right) - 1)]
