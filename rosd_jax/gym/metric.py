"""How often the reflector quotes exactly the first error, which only the gym knows."""

from __future__ import annotations

import math

from rosd_jax.gym.problems import first_error, parse
from rosd_jax.rewards.grade import SUCCESS
from rosd_jax.types import Reflected


def quote_exact(reflected: Reflected) -> dict[str, float]:
    """`quote_exact`: of the error quotes that were asked for, the share that is exactly the first wrong line.

    A quote that was not found in the response is not exact. NaN where no quote was asked for. Raises
    ValueError where a problem is not of the gym.
    """
    graded = reflected.graded
    asked = located = exact = 0
    for row, reflection in enumerate(reflected.reflections):
        asked += reflection.raw is not None and bool(graded.rewards_B[row] < SUCCESS)
        if reflection.char_span is not None:
            located += 1
            chain = parse(graded.problem(row).question)
            exact += reflection.char_span == first_error(chain, graded.texts[row])
    if not asked:
        return {"quote_exact": math.nan}
    if not located:
        return {"quote_exact": 0.0}
    # In this order, so that the float is the same to the last bit as in the lines of older runs.
    return {"quote_exact": exact / located * located / asked}
