"""A user's own reward function, `rewards="MODULE:FUNCTION"`, called in worker processes.

    FUNCTION(prompt, response, row)       -> a score, or a dict with `score`, `prediction`, `well_formed`
    FUNCTION(prompts, responses, rows)    -> a list of these, if FUNCTION.batched is true

docs/own_task.md describes the arguments. An exception in the function, and a return value that is not a score
in [0, 1], end the run with a UserError. A response beyond the time limit scores 0 and is counted.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import sys
import traceback
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rosd_jax.errors import UserError
from rosd_jax.rewards.grade import Grade
from rosd_jax.rewards.workers import Pool, Unanswered

if TYPE_CHECKING:
    from rosd_jax.types import Problem

Item = tuple[str, list[dict[str, str]], str, dict[str, str], str]  # uid, prompt, response, row, its extra

RETURNS = ("score", "prediction", "well_formed")
ROUNDING = 1e-6  # by which a score may be outside [0, 1]


class Greeting(NamedTuple):
    """What a worker says of the function."""

    batched: bool
    crc32: int  # of its source file; 0 if it has none


class OwnReward:
    """Grades by the function that `name` gives. `timeouts` counts the responses beyond the time limit."""

    def __init__(
        self, name: str, timeout_s: float, size: int, progress: Callable[[int, int], None] | None = None
    ):
        self.timeouts = 0
        self._name = name
        self._pool = Pool(timeout_s, size, __name__, (name,), progress)

    def start(self) -> Greeting:
        """Imports the function in a worker, and returns what it says of the function.

        Raises UserError if it cannot be used.
        """
        try:
            return self._pool.greeting()
        except RuntimeError as error:
            raise UserError(
                f"rewards is {self._name!r}; importing its module ended the process, or took too long, "
                "so make it import by itself"
            ) from error

    def grade_all(self, responses: Sequence[str], problems: Sequence[Problem]) -> list[Grade]:
        """Grades response i against problem i. A batched function is called once, for all of them.

        Raises UserError naming function and problem if the function raises, or returns something else than
        a grade.
        """
        items = [
            (problem.uid, list(problem.messages), response, _fields(problem), problem.extra)
            for response, problem in zip(responses, problems, strict=True)
        ]
        if not items:
            return []
        calls = [items] if self.start().batched else [[item] for item in items]
        try:
            replies = self._pool.answer_all(calls, times=len(calls[0]))
        except UserError as error:
            print(*getattr(error, "__notes__", []), sep="\n", end="", file=sys.stderr)
            raise
        grades: list[Grade] = []
        for call, reply in zip(calls, replies, strict=True):
            grades += self._take(call, reply)
        return grades

    def _take(self, call: list[Item], reply: list[Grade] | Unanswered) -> list[Grade]:
        if not isinstance(reply, Unanswered):
            return reply
        if not reply.late:
            raise _refusal(self._name, call, f"ended its process (exit status {reply.status})")
        self.timeouts += len(call)
        return [Grade(0.0, "", False)] * len(call)

    def close(self) -> None:
        """Ends the workers."""
        self._pool.close()


def _fields(problem: Problem) -> dict[str, str]:
    return {name: getattr(problem, name) for name in ("uid", "dataset", "kind", "answer")}


def answerer(name: str) -> Callable[[list[Item]], list[Grade]]:
    """The function that a worker answers with (workers.py). Raises UserError if it cannot be called."""
    # Standard output belongs to the run, so what the function prints goes to standard error.
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    os.environ["JAX_PLATFORMS"] = "cpu"  # the accelerators belong to the run, too
    sys.path.insert(0, os.getcwd())
    return _Caller(name, _load(name))


class _Caller:
    """Calls the function and checks what it returns."""

    def __init__(self, name: str, function: Callable[..., Any]):
        self.name = name
        self.function = function
        self.greeting = Greeting(bool(getattr(function, "batched", False)), _source_crc32(function))
        arguments = "(prompts, responses, rows)" if self.greeting.batched else "(prompt, response, row)"
        try:
            inspect.signature(function).bind(None, None, None)
        except TypeError:
            raise UserError(f"rewards is {name!r}; it must take three arguments, {arguments}") from None
        except ValueError:  # Python cannot read its signature
            pass

    def __call__(self, call: list[Item]) -> list[Grade]:
        _, prompts, responses, fields, extras = map(list, zip(*call, strict=True))
        # A row's own fields take precedence over ours.
        rows = [{**f, **json.loads(extra or "{}")} for f, extra in zip(fields, extras, strict=True)]
        given = (prompts, responses, rows) if self.greeting.batched else (prompts[0], responses[0], rows[0])
        try:
            returned = self.function(*given)
        except BaseException as error:
            refusal = _refusal(self.name, call, f"raised {_describe(error)}")
            refusal.add_note(traceback.format_exc())
            raise refusal from None
        if not self.greeting.batched:
            return [self._read(returned, call)]
        if not isinstance(returned, list | tuple) or len(returned) != len(call):
            found = f"{len(returned)} entries" if isinstance(returned, list | tuple) else _name(returned)
            raise _refusal(self.name, call, f"returned {found}; it must return a list of {len(call)}")
        return [self._read(value, [item]) for value, item in zip(returned, call, strict=True)]

    def _read(self, value: Any, call: list[Item]) -> Grade:
        try:
            return read_grade(value)
        except UserError as error:
            raise _refusal(self.name, call, f"returned {error}") from None


def _source_crc32(function: Callable[..., Any]) -> int:
    try:
        return zlib.crc32(Path(inspect.getfile(function)).read_bytes())
    except (TypeError, OSError):  # built in, say
        return 0


def read_grade(value: Any) -> Grade:
    """The grade that a reward function returned. Raises UserError saying what is wrong with it."""
    fields = value if isinstance(value, dict) else {"score": value}
    if "score" not in fields or not fields.keys() <= set(RETURNS):
        keys = ", ".join(map(str, fields)) or "none"
        may = " and ".join(RETURNS[1:])
        raise UserError(f"a dict with the keys {keys}; it must have score, and may have {may}")
    score = _plain(fields["score"])
    well_formed = _plain(fields.get("well_formed", True))
    prediction = fields.get("prediction")
    if not isinstance(score, int | float):
        raise UserError(f"{_name(score)} as the score; it must be a number")
    if not -ROUNDING <= score <= 1 + ROUNDING:
        raise UserError(f"the score {score}; it must lie in [0, 1]")
    if not isinstance(prediction, str | None):
        raise UserError(f"{_name(prediction)} as prediction; it must be a string")
    if not isinstance(well_formed, bool):
        raise UserError(f"{_name(well_formed)} as well_formed; it must be True or False")
    return Grade(min(max(float(score), 0.0), 1.0), str(prediction or ""), well_formed)


def _load(name: str) -> Callable[..., Any]:
    module, _, attribute = name.partition(":")
    try:
        found = importlib.import_module(module)
    except BaseException as error:
        if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
            raise UserError(
                f"rewards is {name!r}; there is no module {error.name!r} in the current directory or on "
                "PYTHONPATH, so check its name"
            ) from None
        raise UserError(f"rewards is {name!r}; its import raised {_describe(error)}, so repair it") from None
    function = getattr(found, attribute, None)
    if not callable(function):
        where = getattr(found, "__file__", None) or "is built in"
        raise UserError(f"rewards is {name!r}; {module} ({where}) has no function {attribute!r}")
    return function


def _refusal(name: str, call: list[Item], what: str) -> UserError:
    problem = f"problem {call[0][0]}" if len(call) == 1 else f"the batch of {len(call)} from {call[0][0]} on"
    return UserError(f"rewards is {name!r}; on {problem} it {what}, so repair it")


def _describe(error: BaseException) -> str:
    """The error on one line, with the place in the user's file where it was raised."""
    text = " ".join(str(error).split())[:300]
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    named = f"{type(error).__name__}: {text}" if text else type(error).__name__
    inside = len(frames) > 1 and not isinstance(error, SyntaxError)  # the first frame is in this file
    return f"{named} ({frames[-1].filename} line {frames[-1].lineno})" if inside else named


def _plain(value: Any) -> Any:
    """A NumPy or PyTorch scalar as a Python number or truth value."""
    scalar = hasattr(value, "item") and getattr(value, "ndim", None) == 0
    return value.item() if scalar else value


def _name(value: Any) -> str:
    return "nothing (None)" if value is None else f"a {type(value).__name__}"
