"""The model card of an exported model: what it is, how it was trained, and its scores."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import rosd_jax
from rosd_jax.data.sources import own_path
from rosd_jax.evals.outcome import Outcome, compare, number, read_metrics
from rosd_jax.evals.report import percent, shown_change
from rosd_jax.fields import value
from rosd_jax.settings import Settings

DISTILLATION = """\
ROSD ([arXiv 2605.28014](https://arxiv.org/abs/2605.28014)) trains a model on its own mistakes. The model
answers each problem several times. A frozen copy of it reads a wrong answer, quotes the first error and
explains the idea that corrects it. Given that idea, {teacher} is the teacher: the model learns its
next-token distribution on the tokens that `lesson.region` names."""
SOLUTIONS = """\
Self-distillation as in SDPO ([arXiv 2601.20802](https://arxiv.org/abs/2601.20802)) trains a model on its own
answers. The model answers each problem several times. Given another answer to the problem that is right,
{teacher} is the teacher: the model learns its next-token distribution on all tokens of its own answer."""
FROZEN = "the frozen copy"
FROZEN_COPY = "a frozen copy of the model"
AVERAGE = "a copy of the model whose weights are a moving average over the steps"
POLICY_GRADIENT = """\
A policy gradient trains a model on the rewards of its own answers. It answers each problem several times.
Answers with a higher reward than the mean of their problem's become more likely, and the others less."""

# What a reader asks for first. The run's config.json has every field.
SHOWN = ("steps", "batch.prompts", "batch.samples", "rollout.max_new_tokens")
SHOWN_OF_DISTILLATION = (
    "reflect.correct",
    "lesson.region",
    "lesson.quote_missing",
    "loss.topk",
    "loss.alpha",
)
SHOWN_OF_SOLUTIONS = (
    "method",
    "reflect.correct",
    "lesson.teacher_context",
    "lesson.teacher_weights",
    "loss.topk",
    "loss.alpha",
)
SHOWN_OF_POLICY = ("method", "policy.advantage", "policy.normalise", "policy.weight", "policy.rows")
SHOWN_LAST = ("optimizer.lr", "model.lora.rank", "seed")
HUB = re.compile(r"models--([\w.-]+?)--([\w.-]+)")  # a directory of the Hugging Face cache


def model_card(settings: Settings, directory: Path, trained_on: Sequence[str], step: int) -> str:
    """README.md of the model after `step` steps, as the Hugging Face Hub shows it. It names no local path.

    directory: of the run. trained_on: the names of the set that training drew from.
    """
    base = Path(settings.model.path).resolve()
    hub = HUB.search(str(base))
    front: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    front["tags"] = ["rosd" if settings.reflects else settings.method]
    if settings.distills:
        front["tags"].append("self-distillation")
    if hub:
        front["base_model"] = f"{hub[1]}/{hub[2]}"
    rows = read_metrics(directory / "metrics.jsonl")
    outcomes = compare(rows, directory, trained_on, until=step)
    paragraphs = []
    names = SHOWN
    if settings.distills:
        paragraphs += [_distillation(settings), ""]
        names += SHOWN_OF_DISTILLATION if settings.reflects else SHOWN_OF_SOLUTIONS
    if settings.reinforces:
        paragraphs += [POLICY_GRADIENT, ""]
        names += SHOWN_OF_POLICY
    names += tuple(f"ablation.{name}" for name, given in vars(settings.ablation).items() if given)
    fields = (f"| `{name}` | `{value(settings, name)}` |" for name in (*names, *SHOWN_LAST))
    lines = [
        "---",
        *(f"{name}: {json.dumps(given)}" for name, given in front.items()),
        "---",
        f"# {settings.name or base.name}",
        "",
        f"{front.get('base_model', base.name)} after {step} steps of training on {_plain(trained_on[0])} "
        f"with rosd_jax {rosd_jax.__version__}.",
        "",
        *paragraphs,
        "| field | value |",
        "|---|---|",
        *fields,
        "",
        "## Scores",
        "",
        *_scores(outcomes, settings),
    ]
    return "\n".join(lines) + "\n"


def _distillation(settings: Settings) -> str:
    """How the method teaches, in words."""
    if settings.reflects:
        return DISTILLATION.format(teacher=AVERAGE if settings.averages else FROZEN)
    return SOLUTIONS.format(teacher=AVERAGE if settings.averages else FROZEN_COPY)


def _scores(outcomes: Sequence[Outcome], settings: Settings) -> list[str]:
    """A table of the sets that were evaluated."""
    if not outcomes:
        return ["The model was not evaluated."]
    e = settings.eval
    sampled = f"temperature {e.temperature:g}, top-p {e.top_p:g}, at most {e.max_new_tokens} tokens"
    lines = [
        f"avg@k in %, {sampled}; the change with its 95 % interval.",
        "",
        "| set | | problems | k | before | after | change |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for outcome in outcomes:
        before = outcome.before
        after = outcome.after or {}
        cells = [
            _plain(outcome.name),
            "in domain" if outcome.in_domain else "out of domain",
            f"{number(before, 'n'):g}",
            f"{number(before, 'k'):g}",
            percent(number(before, "avg")),
            percent(number(after, "avg")),
            "not comparable" if outcome.differences else shown_change(outcome),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _plain(name: str) -> str:
    """The name of a set without the folders of its path, for a table."""
    own = own_path(name)
    return (own.name if own else name).replace("|", "\\|")
