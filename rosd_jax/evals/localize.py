"""How precisely a reflector finds errors, measured on responses whose first error is known.

    truth = processbench_truth(row)                        # or gym_truth(problem_text, response)
    finding = Finding(truth, quoted=True, span=(219, 260))   # where the reflector's quote is
    localization_scores([finding, ...])

The method teaches at the place that its reflector points to, so a wrong place spoils everything after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rosd_jax.errors import UserError
from rosd_jax.gym.problems import first_error, parse
from rosd_jax.types import Span


@dataclass(frozen=True)
class Truth:
    """Where a response first goes wrong. Spans are characters of the response."""

    error: Span | None  # the first wrong step, one of `steps`; None: every step is right
    steps: tuple[Span, ...]  # in order, without overlap


@dataclass(frozen=True)
class Finding:
    """What a reflector said about one response, and the truth."""

    truth: Truth
    quoted: bool  # whether it quoted an error
    span: Span | None  # where the quote is; None: no quote, or not found in the response


def localization_scores(findings: Sequence[Finding]) -> dict[str, float]:
    """Shares in [0, 1] (NaN over nothing), and the numbers of responses `n_wrong` and `n_right`.

    A quote points to the first step with which it shares a character.

    quote_found: of the quotes given, those found in the response
    exact:       of the responses with an error, those where the quote points to the first wrong step
    within_one:  the same, or to a neighbouring step
    early:       of the responses with an error, those where the quote points to a step before it
    right_kept:  of the responses without an error, those without a quote, found or not
    f1:          harmonic mean of exact and right_kept (ProcessBench, arXiv 2412.06559, section 3)
    """
    wrong = [finding for finding in findings if finding.truth.error is not None]
    right = [finding for finding in findings if finding.truth.error is None]
    offsets = [_step_offset(finding) for finding in wrong]
    exact = _share(offset == 0 for offset in offsets)
    kept = _share(not finding.quoted for finding in right)
    return {
        "n_wrong": len(wrong),
        "n_right": len(right),
        "quote_found": _share(finding.span is not None for finding in findings if finding.quoted),
        "exact": exact,
        "within_one": _share(offset is not None and abs(offset) <= 1 for offset in offsets),
        "early": _share(offset is not None and offset < 0 for offset in offsets),
        "right_kept": kept,
        "f1": 0.0 if exact + kept == 0 else 2 * exact * kept / (exact + kept),
    }


def gym_truth(problem_text: str, response: str) -> Truth:
    """The truth about a gym response. Its steps are its lines.

    The error of a response that stops early is an empty step at its end. Raises ValueError if the text is
    not a gym problem.
    """
    error = first_error(parse(problem_text), response)
    steps = []
    start = 0
    for line in response.split("\n"):
        steps.append((start, start + len(line)))
        start += len(line) + 1
    if error is not None and error not in steps:
        steps.append(error)
    return Truth(error, tuple(steps))


def processbench_truth(row: Mapping[str, Any]) -> Truth:
    """The human label of a ProcessBench row with step spans.

    Fields: `response`, `step_char_spans` ([start, stop] per step), `label` (index of the first wrong step;
    -1: none). Raises UserError naming the row and the field that breaks a rule.
    """
    spans = row.get("step_char_spans")
    label = row.get("label")
    where = f"ProcessBench row {row.get('id')!r}"
    length = len(row.get("response") or "")
    if not isinstance(spans, list) or not all(_is_span(span, length) for span in spans):
        raise UserError(
            f"{where}: step_char_spans must list [start, stop] pairs inside the response; correct it"
        )
    if type(label) is not int or not -1 <= label < len(spans):
        raise UserError(f"{where}: label is {label!r}; it must be -1 or a step's index, so correct it")
    steps = tuple((start, stop) for start, stop in spans)
    return Truth(None if label < 0 else steps[label], steps)


def _step_offset(finding: Finding) -> int | None:
    """Index of the step pointed to minus that of the first wrong one; None if the quote points to no step."""
    steps = finding.truth.steps
    error = finding.truth.error
    span = finding.span
    if error is None or span is None:
        return None
    shares = (i for i, (start, stop) in enumerate(steps) if start < span[1] and span[0] < stop)
    pointed = next(shares, None)
    return None if pointed is None else pointed - steps.index(error)


def _is_span(span: Any, length: int) -> bool:
    if not isinstance(span, list) or [type(at) for at in span] != [int, int]:
        return False
    return 0 <= span[0] < span[1] <= length


def _share(hits: Iterable[bool]) -> float:
    hits = list(hits)
    return sum(hits) / len(hits) if hits else float("nan")
