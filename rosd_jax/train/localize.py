"""--mode=localize: how exactly a model, as the reflector, finds first errors that are known.

    localize(config, labels, directory, console)    -> the scores, as text; also writes DIR/localize.jsonl

A file of labels has one JSON object per line, as ProcessBench (arXiv 2412.06559) joined with solutions:

    id, problem, response     text
    reference_solution        a right solution, which the reflector sees as it would see a correct sibling
    step_char_spans           [start, stop] of each step in the response, in characters
    label                     index of the first wrong step; -1: every step is right
    subset                    optional: rows are scored by subset too
    reflection                optional: a reflector's answer; then this row is only scored

The reflector is always told that the response is wrong, as it is in training, so a quote in a right response
is a false alarm. It sees no gold answer. localize.jsonl has the rows with the reflections, so it can be
scored again without a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from rosd_jax import atomic
from rosd_jax.data.sources import read_rows
from rosd_jax.distill import reflect
from rosd_jax.errors import UserError
from rosd_jax.evals.localize import Finding, localization_scores, processbench_truth
from rosd_jax.evals.report import percent
from rosd_jax.models.qwen3 import param_shapes
from rosd_jax.models.sharding import param_shardings
from rosd_jax.models.weights import check_weights, load_params
from rosd_jax.rollout.batching import Request
from rosd_jax.settings import Settings
from rosd_jax.text.prompts import wrong_messages
from rosd_jax.text.thinking import outside_thinking
from rosd_jax.train.build import start_devices
from rosd_jax.train.console import Console
from rosd_jax.train.engines import Ends, make_engines
from rosd_jax.train.inputs import check_lengths, find_wording, read_model
from rosd_jax.train.step import responses
from rosd_jax.types import Stream

TEXTS = ("id", "problem", "response", "reference_solution")
SCORES = ("quote_found", "exact", "within_one", "early", "right_kept", "f1")
ROW = "{:<24} {:>6} {:>6}  {:>11} {:>7} {:>10} {:>7} {:>10} {:>7}"
HEAD = ("", "wrong", "right", "quote found", "exact", "within one", "early", "right kept", "F1")
Row = dict[str, Any]  # of the file


def localize(config: Settings, labels: Path, directory: Path, console: Console) -> str:
    """Asks the reflector about every row without a reflection, then scores all rows.

    Raises UserError for a mistake in the file, the model or the config.
    """
    console.stage("reading the labels")
    rows = read_labels(labels)
    if any("reflection" not in row for row in rows):
        ask(config, rows, console)
    text = as_text(rows, config)
    directory.mkdir(parents=True, exist_ok=True)
    atomic.write_text(directory / "localize.jsonl", (json.dumps(row) + "\n" for row in rows))
    return f"{text}\n\nAll reflections are in {directory / 'localize.jsonl'}"


def read_labels(path: Path) -> list[Row]:
    """The rows of a file of labels. Raises UserError for the first field that breaks a rule."""
    rows = []
    for row in read_rows(path):
        for field in TEXTS:
            if not isinstance(row.fields.get(field), str):
                raise UserError(f"{row.where}: field {field!r} must be a string; correct or drop the row")
        processbench_truth(row.fields)  # raises for the other fields
        rows.append(row.fields)
    return rows


def ask(config: Settings, rows: Sequence[Row], console: Console) -> None:
    """Adds its `reflection` to every row without one; null if the prompt is too long for the reflector."""
    console.stage("reading the model's files")
    model, tokenizer = read_model(config)
    check_lengths(config, model)
    check_weights(config.model.path, model)
    wording = find_wording(config)
    rows = [row for row in rows if "reflection" not in row]
    chats = [
        wrong_messages(row["problem"], row["reference_solution"], row["response"], None, wording)
        for row in rows
    ]
    prompts = tokenizer.encode_chats(chats, thinking=config.thinking.reflector)
    fits = [i for i, ids in enumerate(prompts) if len(ids) <= config.reflect.max_prompt_tokens]
    console.stage("starting the devices")
    mesh = start_devices(config, model, alone=True)
    console.stage("reading the weights")
    places = param_shardings(param_shapes(model), mesh)
    path = Path(config.model.path)
    params = load_params(path, model, places, dtype=model.dtype, progress=console.progress)
    engines = make_engines(config, model, mesh, Ends(tokenizer.stop_ids, None), progress=console.progress)
    key = Stream.REFLECT.key(jax.random.key(config.seed))
    console.stage("reflect")
    with jax.set_mesh(mesh):
        answers = engines.reflections.generate(params, [Request(prompts[i], i) for i in fits], key)
    official = config.lesson.locate == "reencode"
    opened = tokenizer.opens_thinking(config.thinking.reflector)
    for row in rows:
        row["reflection"] = None
    for i, raw in zip(fits, tokenizer.decode_all(responses(answers)), strict=True):
        rows[i]["reflection"] = raw if official else outside_thinking(raw, opened=opened)


def find(row: Row, config: Settings) -> Finding:
    """What the reflection of a row points to, and the truth."""
    official = config.lesson.locate == "reencode"
    truth = processbench_truth(row)
    _, quote = reflect.parse(row["reflection"] or "", official=official, thinking_open=False)
    located = reflect.locate(row["response"], quote, official=official)
    span = None if located is None else (located.start, located.stop)
    return Finding(truth, quoted=quote is not None, span=span)


def as_text(rows: Sequence[Row], config: Settings) -> str:
    """A line of scores for each subset and for all, in %."""
    subsets: dict[str, list[Finding]] = {}
    for row in rows:
        subsets.setdefault(str(row.get("subset", "all")), []).append(find(row, config))
    everything = [finding for findings in subsets.values() for finding in findings]
    lines = [
        ROW.format("", "wrong", "right", "quote found", "exact", "within one", "early", "right kept", "F1")
    ]
    for name, findings in {**subsets, "all": everything}.items():
        scores = localization_scores(findings)
        counts = (f"{scores['n_wrong']:.0f}", f"{scores['n_right']:.0f}")
        lines.append(ROW.format(name[:24], *counts, *(percent(scores[field]) for field in SCORES)))
    overlong = sum(row["reflection"] is None for row in rows)
    if overlong:
        lines.append(f"{overlong} prompts exceed reflect.max_prompt_tokens; they count as without a quote.")
    return "\n".join(lines)
