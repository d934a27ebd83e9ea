"""Grades responses: one checker per kind of problem, in the modes `fixed` and `official`.

`official` gives the verdicts of the released code with its defects; `fixed` corrects them (each module says
which). A user's own function may replace the checkers (custom.py). This package imports no JAX, so that
worker processes load quickly.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, cast, get_args

from rosd_jax.errors import UserError
from rosd_jax.rewards import custom, mcq, tooluse
from rosd_jax.rewards.grade import Grade, Mode
from rosd_jax.rewards.maths import checker
from rosd_jax.rewards.workers import Pool

if TYPE_CHECKING:
    from rosd_jax.types import Problem

__all__ = ["Grade", "Grader", "Mode", "check"]

_KINDS = ("mcq", "math", "tooluse", "gym")
_MAX_WORKERS = 8


class Grader:
    """Grades batches of responses, and owns the processes that compare mathematics or run a user's function.

    A context manager: workers start when first needed and end on exit. mode: "fixed", "official" or
    "MODULE:FUNCTION". timeout_s: the limit for one comparison, or for one response in a user's function, in
    seconds of CPU time. Beyond it the worker is ended and replaced, and the response scores 0. `timeouts`
    counts these responses and those whose worker died. progress: called with how many of the comparisons, or
    of the calls of a user's function, are done. Raises UserError for an unknown mode.
    """

    def __init__(
        self,
        mode: str = "fixed",
        timeout_s: float = 5.0,
        progress: Callable[[int, int], None] | None = None,
    ):
        if ":" not in mode and mode not in get_args(Mode):
            raise UserError(f"rewards is {mode!r}; it must be one of {', '.join(get_args(Mode))}")
        workers = min(_MAX_WORKERS, os.cpu_count() or 1)
        self._own = custom.OwnReward(mode, timeout_s, workers, progress) if ":" in mode else None
        self.mode: Mode = cast(Mode, mode)
        self._pool = Pool(timeout_s, workers, checker.__name__, [mode], progress)

    def __enter__(self) -> Grader:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.close()
        if self._own:
            self._own.close()

    def start(self) -> int:
        """Imports a user's function now, so that its mistakes are reported before the first response.

        Returns the CRC-32 of its source file; 0 if there is none.
        """
        return self._own.start().crc32 if self._own else 0

    @property
    def timeouts(self) -> int:
        """The number of responses so far that scored 0 because their worker was ended or died."""
        return (self._own or self._pool).timeouts

    def grade_all(
        self, responses: Sequence[str], problems: Sequence[Problem], *, thinking_open: bool
    ) -> list[Grade]:
        """Grades response i against problem i.

        thinking_open: the prompts ended inside `<think>`, so the responses begin there, and one without
        `</think>` has no answer. The mode "official" ignores it.

        Raises UserError naming the problem for an unknown kind or a gold answer that its checker cannot
        read, and ValueError if the lengths differ.
        """
        if self._own:
            return self._own.grade_all(responses, problems)
        pairs = list(zip(responses, problems, strict=True))
        for _, problem in pairs:
            if problem.kind not in _KINDS:
                raise UserError(
                    f"kind of problem {problem.uid} is {problem.kind!r}; it must be one of "
                    f"{', '.join(_KINDS)}, so correct the row"
                )
        compared = iter(self._grade_math([pair for pair in pairs if pair[1].kind == "math"], thinking_open))
        return [
            next(compared) if problem.kind == "math" else self._grade_text(response, problem, thinking_open)
            for response, problem in pairs
        ]

    def _grade_text(self, response: str, problem: Problem, thinking_open: bool) -> Grade:
        try:
            return check(response, problem.answer, problem.kind, self.mode, thinking_open=thinking_open)
        except UserError as error:
            raise UserError(f"problem {problem.uid}: {error}") from error

    def _grade_math(self, pairs: Sequence[tuple[str, Problem]], thinking_open: bool) -> list[Grade]:
        predictions = [
            checker.predict(response, mode=self.mode, thinking_open=thinking_open) for response, _ in pairs
        ]
        answers = [problem.answer for _, problem in pairs]
        found = zip(predictions, answers, strict=True)
        # Samples of one prompt often agree, so each different pair is compared once.
        asked = list(dict.fromkeys((p, a) for p, a in found if p and p != a))
        agreed = self._pool.answer_all([(p, a, self.mode) for p, a in asked]) if asked else []
        right = {pair for pair, agrees in zip(asked, agreed, strict=True) if agrees}
        return [
            Grade(float(bool(p) and (p == a or (p, a) in right)), p, bool(p))
            for p, a in zip(predictions, answers, strict=True)
        ]

    def votes(self, predictions: Sequence[str], problems: Sequence[Problem]) -> list[str]:
        """The answer that each prediction votes for: the first prediction of its problem that equals it.

        Predictions that are equal but differ as text exist only in mathematics, and only in the mode "fixed".
        Each prediction is compared with one of each group of equal ones found so far. Raises ValueError if
        the lengths differ.
        """
        waiting: dict[str, dict[str, None]] = {}  # the different predictions of each problem, in order
        for prediction, problem in zip(predictions, problems, strict=True):
            if prediction and problem.kind == "math" and self.mode == "fixed":
                waiting.setdefault(problem.uid, {})[prediction] = None
        voted: dict[tuple[str, str], str] = {}
        while waiting:
            asked: list[checker.Question] = [
                (other, first, self.mode) for first, *others in waiting.values() for other in others
            ]
            agreed = iter(self._pool.answer_all(asked))
            apart: dict[str, dict[str, None]] = {}
            for uid, (first, *others) in waiting.items():
                equal = [other for other in others if next(agreed)]
                voted |= {(uid, prediction): first for prediction in (first, *equal)}
                if len(equal) < len(others):
                    apart[uid] = {other: None for other in others if other not in equal}
            waiting = apart
        return [voted.get((problem.uid, p), p) for p, problem in zip(predictions, problems, strict=True)]


def check(
    response: str, answer: str, kind: str, mode: Mode = "fixed", *, thinking_open: bool = False
) -> Grade:
    """The verdict of one built-in checker, for use in a user's reward function.

    thinking_open: the prompt ended inside `<think>`, as in `Grader.grade_all`. Mathematics is compared in
    this process, under its time limit. Raises UserError for an unknown kind or a gold answer that its
    checker cannot read.
    """
    if kind not in _KINDS:
        raise UserError(f"kind is {kind!r}; it must be one of {', '.join(_KINDS)}, so correct the row")
    if kind == "gym":
        return mcq.grade_gym(response, answer, thinking_open=thinking_open)
    if kind == "math":
        found = checker.predict(response, mode=mode, thinking_open=thinking_open)
        right = bool(found) and (found == answer or checker.answerer(mode)((found, answer, mode)))
        return Grade(float(right), found, bool(found))
    grade = mcq.grade if kind == "mcq" else tooluse.grade
    return grade(response, answer, mode=mode, thinking_open=thinking_open)
