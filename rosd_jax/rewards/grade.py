"""What a checker says of one response, and the cut that every checker makes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["fixed", "release"]


@dataclass(frozen=True)
class Grade:
    """The verdict on one response.

    `prediction` is the answer that was read from the text ("" where none was); equal predictions
    are equal answers for a majority vote. `well_formed` is true when the response kept the format
    that was asked for, whatever its score.
    """

    score: float  # 0 or 1; from a function of the user's, in [0, 1]
    prediction: str
    well_formed: bool


def strip_thinking(text: str) -> str:
    """The text outside `<think>...</think>`.

    A `</think>` that nothing opened (the prompt opened it) also takes all text before it, and a
    `<think>` that never closes takes all text after it: what stands there is no answer.
    """
    *closed, rest = text.split("</think>")
    kept: list[str] = []
    for piece in closed:
        before, opened, _ = piece.partition("<think>")
        if opened:
            kept.append(before)
        else:
            kept.clear()
    return "".join(kept) + rest.partition("<think>")[0]
