"""What a checker says of one response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["fixed", "official"]
SUCCESS = 0.5  # a response with at least this score is correct


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    `prediction` is the answer that was read from the text ("" where none was). Equal predictions are
    equal answers; mathematics has other equal answers, which `Grader.votes` finds. `well_formed` is true
    when the response kept the format that was asked for, whatever its score.
    """

    score: float  # 0 or 1; from a function of the user's, in [0, 1]
    prediction: str
    well_formed: bool
