"""The report page of a run: report.html for a browser, with one file of rollouts per step in report/.

    write_step_file(workdir, step, rows)   report/step_N.js, from the lines of rollouts/step_N.jsonl
    write_page(workdir, trained_on)        report.html, and the step files that are missing
    remake(workdir, others)                everything again, from what is in the directory

The page is page.html with the numbers of the run inside. A page that is opened from disk may not read other
files, but it may run scripts. So the rollouts of a step are a script that calls one function with a JSON
literal, and the page loads it when a reader looks at that step.

Texts of models and data files are hostile. Here they only become JSON in ASCII without <, > and &; the page
puts them into the document as text alone.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from rosd_jax import atomic
from rosd_jax.data.sources import names_of_same
from rosd_jax.distill.notes import NOTES
from rosd_jax.errors import UserError
from rosd_jax.evals.health import findings, spikes
from rosd_jax.evals.outcome import MetricsRow, Outcome, compare, mean, number, read_metrics
from rosd_jax.evals.report import (
    Z,
    ends,
    first_and_last,
    notes_of,
    outcomes_at_best,
    percent,
    show,
    shown_change,
    steps_of,
)
from rosd_jax.fields import flat
from rosd_jax.rewards.grade import SUCCESS
from rosd_jax.step_files import drop_after, steps_in

Json = dict[str, Any]

PAGE = "report.html"
FOLDER = "report"
SUFFIX = ".js"  # of the files there
NATS = 1e-5  # the unit of divergences there, which makes them short
PLACE = "@DATA@"  # of the data in the template
# What a reader of one rollout is told about its note, in addition to the words of NOTES.
WHY = {
    "all_right": "Every rollout of this problem is right, so there is no error to learn from.",
    "all_wrong": "Every rollout of this problem is wrong, so there is no correct one to show.",
    "correct_left_out": "Right rollouts are not taught in this run.",
    "overlong": "It was not reflected, since the prompt would be longer than reflect.max_prompt_tokens.",
    "no_solution": "The teacher needs another rollout that solves the problem, and there is none.",
    "no_idea": "The reflector's answer contains no idea that the teacher could be shown.",
    "quote_missing": "What the reflector quoted is not in the response, so the error has no place.",
    "teacher_overlong": "The teacher's prompt would be longer than lesson.max_teacher_tokens.",
    "no_advantage": "Its reward is the mean of its problem's rollouts, so there is nothing to reinforce.",
}
# The learning curves: title, how numbers are shown, and the fields of metrics.jsonl.
CURVES = (
    ("Reward", "number", ("reward",)),
    ("Loss", "number", ("loss",)),
    ("Entropy", "number", ("entropy",)),
    ("Response length, tokens", "number", ("response_length",)),
    ("Responses cut at the limit", "share", ("truncated",)),
    ("Rollouts reflected", "share", ("reflected",)),
    ("Quotes found, and found exactly", "share", ("quote_found", "quote_exact")),
    ("Tokens in the loss", "number", ("active_tokens",)),
    ("Gradient norm", "number", ("grad_norm",)),
    (
        "Seconds by stage",
        "number",
        ("seconds_rollout", "seconds_grade", "seconds_reflect", "seconds_lesson", "seconds_update"),
    ),
)


def write_step_file(workdir: Path, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes report/step_N.js. rows: those of rollouts/step_N.jsonl."""
    problems: dict[str, int] = {}
    shared = []
    lines = []
    for row in rows:
        uid = _text(row.get("uid"))
        if uid not in problems:
            problems[uid] = len(shared)
            shared.append(_problem(uid, row))
        lines.append(_rollout(problems[uid], row))
    content = {"step": step, "problems": shared, "rollouts": lines}
    path = workdir / FOLDER / f"step_{step}{SUFFIX}"
    path.parent.mkdir(exist_ok=True)
    atomic.write_text(path, ["rosdStep(", script_json(content), ");\n"])


def write_page(workdir: Path, trained_on: Sequence[str], others: Sequence[Path] = ()) -> None:
    """Writes report.html, and the files of those steps that have rollouts and no file yet.

    trained_on: the names of the training set. others: run directories whose curves and evaluations are shown
    next to these. Raises UserError for a malformed line of metrics.jsonl or of a rollout file.
    """
    rows = read_metrics(workdir / "metrics.jsonl")
    made = steps_in(workdir / FOLDER, SUFFIX)
    for step in steps_in(workdir / "rollouts", ".jsonl") - made:
        write_step_file(workdir, step, read_rollouts(workdir / "rollouts" / f"step_{step}.jsonl"))
        made.add(step)
    template = files("rosd_jax.evals").joinpath("page.html").read_text(encoding="utf-8")
    before, _, after = template.partition(PLACE)
    data = page_data(workdir, trained_on, rows, sorted(made), others)
    atomic.write_text(workdir / PAGE, [before, script_json(data), after])


def remake(workdir: Path, others: Sequence[Path] = ()) -> tuple[str, ...]:
    """Makes the page again for a finished or foreign run. Returns the names of the training set.

    Raises UserError if there is no such directory or no metrics.jsonl, here or in one of `others`, and for a
    malformed line in them.
    """
    for path in (workdir, *others):
        require_run(path)
    drop_after(workdir / FOLDER, SUFFIX, -1)
    trained_on = training_sets(read_config(workdir))
    write_page(workdir, trained_on, others)
    return trained_on


def require_run(workdir: Path) -> None:
    """Raises UserError unless there is a metrics.jsonl."""
    if not workdir.is_dir():
        raise UserError(f"{workdir} is not a directory; name the directory of a run")
    if not (workdir / "metrics.jsonl").is_file():
        raise UserError(
            f"{workdir} has no metrics.jsonl, so there is nothing to report; name a run's directory"
        )


def script_json(content: Any) -> str:
    """JSON that is safe inside a script of an HTML page: ASCII, without <, > and &."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def read_rollouts(path: Path) -> Iterator[Json]:
    """The lines of a rollout file. Raises UserError for one that is no JSON object."""
    with open(path, encoding="utf-8", errors="replace") as lines:
        for count, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{path} line {count} must be a JSON object; correct or delete the line")
            yield row


def read_config(workdir: Path) -> Json:
    """The run's config.json; {} if there is none. Nothing but the page's captions depends on it."""
    try:
        config = json.loads((workdir / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def training_sets(config: Json) -> tuple[str, ...]:
    """The names of the training set by a config.json; ("training set",) if it does not say."""
    section = config.get("data")
    data = section if isinstance(section, dict) else {}
    section = config.get("eval")
    sets = section.get("sets") if isinstance(section, dict) else ""
    train = data.get("train")
    if not isinstance(train, str) or not isinstance(sets, str):
        return ("training set",)
    return names_of_same(train, sets, _text(data.get("dir")))


def page_data(
    workdir: Path,
    trained_on: Sequence[str],
    rows: Sequence[MetricsRow],
    steps: Sequence[int],
    others: Sequence[Path],
) -> Json:
    """All that the page shows, except the rollouts. steps: those that have a file of rollouts."""
    train = [row for row in rows if row["split"] == "train"]
    config = read_config(workdir)
    runs = [_run(workdir, trained_on, rows)]
    for other in others:
        runs.append(_run(other, training_sets(read_config(other)), read_metrics(other / "metrics.jsonl")))
    return {
        "name": workdir.resolve().name,
        "unfinished": _is_unfinished(train, config),
        "headline": _headline(train, runs[0], config),
        "findings": [*findings(train).values(), *spikes(train)],
        "notes": [[note, words, WHY[note]] for note, words in NOTES.items()],
        "fates": {
            "steps": [row["step"] for row in train],
            "counts": [_column(train, field) for field in ("taught", *(f"out_{note}" for note in NOTES))],
        },
        "curves": [curve for curve in CURVES if _reflects(runs) or curve[2] != ("reflected",)],
        "reflects": _reflects(runs[:1]),
        "runs": runs,
        "rollouts": steps,
        "config": [[field, json.dumps(value)] for field, value in flat(config)],
    }


def _is_unfinished(train: Sequence[MetricsRow], config: Json) -> bool:
    """Whether steps are missing that the config asks for."""
    steps = config.get("steps")
    return type(steps) is int and (train[-1]["step"] if train else 0) < steps


def _headline(train: Sequence[MetricsRow], run: Json, config: Json) -> list[list[str]]:
    """Label, number and remark of what a reader wants to know first."""
    steps = config.get("steps")
    last = train[-1]["step"] if train else 0
    tiles = [["Step", f"{last}" if type(steps) is not int else f"{last} of {steps}", ""]]
    for outcome in run["outcomes"][:1]:
        where = "in domain" if outcome["in_domain"] else "out of domain"
        score = f"{outcome['before']} → {outcome['after']}" if outcome["after"] else outcome["before"]
        tiles.append(
            [
                f"avg@{outcome['k']} in %, {outcome['name']}",
                score,
                ", ".join(filter(None, (where, outcome["change"]))),
            ]
        )
    if not train:
        return tiles
    reward = first_and_last(train, "reward", ".3f").replace("->", "→")
    tiles.append(["Reward", reward, f"first {ends(train)} and last {ends(train)} of {len(train)} steps"])
    taught = sum(row.get("taught") or 0 for row in train)
    rollouts = taught + sum(row.get(f"out_{note}") or 0 for row in train for note in NOTES)
    if rollouts:
        tiles.append(["Rollouts taught", f"{taught / rollouts:.0%}", f"{taught:,} of {rollouts:,}"])
    found = mean(train, "quote_found")
    if math.isfinite(found):
        tiles.append(["Quotes found", f"{found:.0%}", f"{show(mean(train, 'quote_exact'), '.0%')} exactly"])
    seconds = sum(number(row, "seconds") for row in train[1:]) / max(len(train) - 1, 1)
    if math.isfinite(seconds) and len(train) > 1:
        tiles.append(["Seconds a step", f"{seconds:,.3g}", "mean, without the first"])
    return tiles


def _run(workdir: Path, trained_on: Sequence[str], rows: Sequence[MetricsRow]) -> Json:
    """The learning curves and evaluations of one run."""
    train = [row for row in rows if row["split"] == "train"]
    fields = [field for _, _, names in CURVES for field in names]
    outcomes = compare(rows, workdir, trained_on)
    best = outcomes_at_best(rows, workdir, trained_on, outcomes)
    return {
        "name": workdir.resolve().name,
        "steps": [row["step"] for row in train],
        "columns": [[field, _column(train, field)] for field in fields],
        "scores": _scores(rows, trained_on),
        "outcomes": [*map(_outcome, outcomes), *map(_at_best, best)],
    }


def _reflects(runs: Sequence[Json]) -> bool:
    """Whether a reflector was asked in one of these runs; some methods have none."""
    return any(share for run in runs for share in dict(run["columns"])["reflected"])


def _scores(rows: Sequence[MetricsRow], trained_on: Sequence[str]) -> list[Json]:
    """avg@k in % of each scored set by step, with half the width of its 95% interval."""
    sets: dict[str, list[list[float | None]]] = {}
    for row in rows:
        kind, _, name = row["split"].partition("/")
        if kind in ("eval", "validation"):
            half = 100 * Z * number(row, "avg_se")
            point = [row["step"], _finite(100 * number(row, "avg")), _finite(half)]
            sets.setdefault(row["split"], []).append(point)
    scores = []
    for split, points in sets.items():
        kind, _, name = split.partition("/")
        scores.append({"kind": kind, "name": name, "in_domain": name in trained_on, "points": points})
    return sorted(scores, key=lambda score: (score["kind"] != "eval", not score["in_domain"]))


def _outcome(outcome: Outcome) -> Json:
    before = outcome.before
    after = outcome.after
    passed = percent(number(before, "pass"))
    if after:
        passed += f" → {percent(number(after, 'pass'))}"
    return {
        "name": outcome.name,
        "in_domain": outcome.in_domain,
        "k": show(number(before, "k"), ".0f"),
        "before": percent(number(before, "avg")),
        "after": percent(number(after, "avg")) if after else "",
        "change": "not comparable" if outcome.differences else shown_change(outcome) if after else "",
        "pass": passed,
        "steps": steps_of(outcome).replace("->", "→"),
        "notes": notes_of(outcome, steps_of(outcome)),
    }


def _at_best(outcome: Outcome) -> Json:
    shown = _outcome(outcome)
    return {**shown, "notes": ["at the step that validation chose", *shown["notes"]]}


def _problem(uid: str, row: Mapping[str, Any]) -> Json:
    """What all rollouts of a problem share. The last two parts of a uid are its split and number."""
    prompt = row.get("prompt")
    messages = prompt if isinstance(prompt, list) else []
    return {
        "uid": uid,
        "set": uid.rsplit("/", 2)[0] if uid.count("/") > 1 else "",
        "prompt": [[_text(m.get("role")), _text(m.get("content"))] for m in messages if isinstance(m, dict)],
        "answer": _text(row.get("answer")),
    }


def _rollout(problem: int, row: Mapping[str, Any]) -> Json:
    """One rollout. `response` has one part, or three: before the error, the error, after it."""
    response = _text(row.get("response"))
    reward = number(dict(row), "reward")
    tokens = row.get("token_ids")
    return {
        "problem": problem,
        "sample": row.get("sample") if type(row.get("sample")) is int else None,
        "response": _parts(response, row.get("error_span_chars")),
        "reward": _finite(reward),
        "right": reward >= SUCCESS,
        "tokens": len(tokens) if isinstance(tokens, list) else None,
        "active": _finite(number(dict(row), "active_tokens")),
        "note": _text(row.get("note")),
        "quote": _maybe(row.get("quote")),
        "idea": _maybe(row.get("idea")),
        "sources": [_text(row.get("span_source")), _text(row.get("idea_source"))],
        "reflection": _maybe(row.get("reflection")),
        "ambiguous": bool(row.get("ambiguous")),
        "heat": _heat(row, response),
    }


def _heat(row: Mapping[str, Any], response: str) -> Json | None:
    """The tokens in the loss: where they start, their widths, and their divergences in units of NATS.

    Places and widths are in UTF-16 code units, in which JavaScript counts. None if the row does not have
    them, as in runs of earlier versions, or if they do not fit the response.
    """
    widths = row.get("active_widths")
    divergence = row.get("divergence")
    span = _span(row.get("active_span_chars"), response)
    if span is None or not isinstance(widths, list) or not isinstance(divergence, list):
        return None
    if len(widths) != len(divergence) or not all(type(width) is int and width >= 0 for width in widths):
        return None
    ends = list(itertools.accumulate(widths, initial=span[0]))
    if ends[-1] != span[1]:
        return None
    if _utf16(response) != len(response):
        widths = [_utf16(response[start:stop]) for start, stop in itertools.pairwise(ends)]
    start = _utf16(response[: span[0]])
    return {"start": start, "widths": widths, "nats": [_nats(value) for value in divergence]}


def _nats(value: Any) -> int | None:
    """A divergence in units of NATS; None for one that was not finite, or that no loss gives."""
    return round(value / NATS) if type(value) in (int, float) and abs(value) < 1e6 else None


def _utf16(text: str) -> int:
    """Code units of UTF-16: two for a character outside the basic plane."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


def _parts(text: str, place: Any) -> list[str]:
    """The text, cut at both ends of a place [start, stop) if it is one.

    It is cut here, because a place in characters of Python is another one in JavaScript, where a character
    outside the basic plane counts as two.
    """
    span = _span(place, text)
    if span is None:
        return [text]
    return [text[: span[0]], text[span[0] : span[1]], text[span[1] :]]


def _span(place: Any, text: str) -> tuple[int, int] | None:
    """A field of a row as a place [start, stop) in the text; None if it is not one."""
    if not isinstance(place, list | tuple) or len(place) != 2 or not all(type(at) is int for at in place):
        return None
    start, stop = place
    return (start, stop) if 0 <= start <= stop <= len(text) else None


def _column(rows: Sequence[MetricsRow], field: str) -> list[float | None]:
    return [_finite(number(row, field)) for row in rows]


def _finite(value: float) -> float | None:
    """The number with seven digits, or None for one that JSON lacks."""
    return float(f"{value:.7g}") if math.isfinite(value) else None


def _text(value: Any) -> str:
    """A field of a row as text. What is neither text nor absent is shown as JSON."""
    if isinstance(value, str):
        return value
    return "" if value is None else json.dumps(value, default=repr)


def _maybe(value: Any) -> str | None:
    return None if value is None else _text(value)
