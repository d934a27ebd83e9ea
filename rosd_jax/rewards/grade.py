"""A checker's verdict on one response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["fixed", "official"]
SUCCESS = 0.5  # a response with at least this score is correct


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    `prediction` is the answer read from the text, "" if none was. Equal predictions are equal answers; in
    mathematics, answers may also be equal as values, which `Grader.votes` finds. `well_formed` is true if the
    response has the required format, whatever its score.
    """

    score: float  # 0 or 1; from a user's function, in [0, 1]
    prediction: str
    well_formed: bool
