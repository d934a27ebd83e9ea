"""What earlier starts left in a workdir, and whether a run may continue there.

Steps without a checkpoint are repeated only if a kill explains them: those before the first checkpoint, and
those after the newest one. A run whose checkpoints were removed is never overwritten.

    last_step(workdir)                                -> the last step that left anything
    exported_step(workdir)                            -> the step of the model in export/
    require_checkpoint(workdir, config)               raises if training would start over
    require_steps(workdir, config, start)             raises if more steps were made than config asks for
    require_same_origins(kept, now, config)           raises if weights, tokenizer or problems changed
    require_same_evals(workdir, inputs, start)        raises if an evaluation set changed
    require_no_less(workdir, config, inputs, step)    raises if a larger evaluation would be replaced
    export_to_evaluate(workdir, config)               -> True if export/ is all that is left of the model
    origins(config, inputs)                           -> what a run starts from, for a checkpoint's meta
    conditions(config, inputs, split, name)           -> the conditions of an evaluation
    unevaluated(workdir, config, inputs, split, step) -> the sets that were not evaluated at that step
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from pathlib import Path
from typing import Any

from rosd_jax.data.sources import set_name
from rosd_jax.errors import UserError
from rosd_jax.evals.outcome import PROBLEMS, MetricsRow, number, read_metrics
from rosd_jax.models.weights import weights_fingerprint
from rosd_jax.settings import Settings
from rosd_jax.step_files import steps_in
from rosd_jax.train import checkpoint
from rosd_jax.train.inputs import FILES, Inputs, ScoredSplit

EXPORTED = "trained_steps.txt"  # in export/


def last_step(workdir: Path) -> int:
    """The last step that left metrics, rollouts or an export; 0 if there is none."""
    lines = [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]
    return max([0, _noted_step(workdir) or 0, *lines, *steps_in(workdir / "rollouts", ".jsonl")])


def exported_step(workdir: Path) -> int | None:
    """The step of the model in export/; None without an export.

    An older version wrote no trained_steps.txt; its export is that of the last step.
    """
    if not (workdir / "export" / "config.json").is_file():
        return None
    noted = _noted_step(workdir)
    return last_step(workdir) if noted is None else noted


def _noted_step(workdir: Path) -> int | None:
    path = workdir / "export" / EXPORTED
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise UserError(
            f"{path} contains {text[:40]!r}; it must be the step of the exported model, so correct it"
        )
    return int(text)


def require_checkpoint(workdir: Path, config: Settings) -> None:
    """Raises UserError if training would start over and erase steps whose checkpoints were removed."""
    if not _checkpoints_are_gone(workdir, config):
        return
    has_export = exported_step(workdir) is not None
    evaluate = ", evaluate the exported model with --mode=eval" if has_export else ""
    raise UserError(
        f"workdir {workdir} contains a run up to step {last_step(workdir)}, but no checkpoint to resume it "
        f"from; restore {workdir / 'checkpoints'}{evaluate}, or use another --workdir"
    )


def export_to_evaluate(workdir: Path, config: Settings) -> bool:
    """Whether the checkpoints were removed, so that export/ is all that is left of the model.

    Raises UserError if there is no export either.
    """
    if not _checkpoints_are_gone(workdir, config):
        return False
    if exported_step(workdir) is None:
        raise UserError(
            f"workdir {workdir} contains a run up to step {last_step(workdir)}, but neither a checkpoint "
            f"nor an export of its model; restore {workdir / 'checkpoints'} or use another --workdir"
        )
    return True


def _checkpoints_are_gone(workdir: Path, config: Settings) -> bool:
    """Whether checkpoints that a run must have made were removed.

    A run makes checkpoints/ before its first line, and a kill before the first checkpoint leaves it empty.
    The step after that checkpoint's is made, and its lines are written, while the checkpoint is.
    """
    last = last_step(workdir)
    if last == 0 or checkpoint.any_saved(workdir):
        return False
    killed_early = last <= config.checkpoint.every + 1 and exported_step(workdir) is None
    return not (killed_early and (workdir / "checkpoints").is_dir())


def require_steps(workdir: Path, config: Settings, start: int) -> None:
    """Raises UserError if config.steps is less than the newest checkpoint's step or the exported model's."""
    made = max(start, exported_step(workdir) or 0)
    if made > config.steps:
        raise UserError(
            f"steps is {config.steps}; this run has made {made} already, so set at least {made} or use "
            "another --workdir"
        )


def origins(config: Settings, inputs: Inputs) -> dict[str, Any]:
    """What a run starts from and its config does not record: checksums as JSON, for a checkpoint's meta."""
    model = dataclasses.asdict(inputs.model)
    return {
        "weights": weights_fingerprint(config.model.path),
        "model": {name: value for name, value in model.items() if name not in ("dtype", "remat")},
        "tokenizer": inputs.tokenizer.fingerprint(),
        "wording": f"{zlib.crc32(repr(inputs.wording).encode()):08x}",
        "train": inputs.found[f"{set_name(config.data.train)}/train"],
    }


def require_same_origins(kept: dict[str, Any], now: dict[str, Any], config: Settings) -> None:
    """Raises UserError naming everything in `now` that differs from the checkpoint's meta, `kept`.

    For example, the frozen tree is read from model.path again, and other weights would be another teacher.
    """
    path = f"model.path ({config.model.path!r})"
    words = {
        "weights": f"the weights of {path}",
        "model": f"config.json of {path}",
        "wording": f"the texts of wording ({config.wording!r})",
        "tokenizer": f"the tokenizer, chat template or stop tokens of {path}",
    }
    changed = [name for name in now if _differs(kept.get(name), now[name])]
    if "train" in changed:
        rows = f"{kept['train']['rows']} rows then, {now['train']['rows']} now"
        words["train"] = f"the training problems of {config.data.train} ({rows})"
    if changed:
        raise UserError(
            f"{' and '.join(words[name] for name in changed)} changed since this run began; restore the "
            "old ones or use another --workdir"
        )


def _differs(kept: Any, now: Any) -> bool:
    """Whether two origins differ. What a checkpoint of an older version lacks is not compared."""
    if isinstance(kept, dict):
        return any(kept[name] != value for name, value in now.items() if name in kept)
    return kept is not None and kept != now


def conditions(config: Settings, inputs: Inputs, split: ScoredSplit, name: str) -> dict[str, float]:
    """The conditions of one set's evaluation, as metrics. Scores are comparable if all are equal."""
    return {
        "k": config.eval.samples,
        "n": len(inputs.sets(split)[name]),
        "temperature": config.eval.temperature,
        "top_p": config.eval.top_p,
        "max_new_tokens": config.eval.max_new_tokens,
        PROBLEMS: inputs.found[f"{name}/{FILES[split]}"]["crc32"],
    }


def unevaluated(workdir: Path, config: Settings, inputs: Inputs, split: ScoredSplit, step: int) -> list[str]:
    """The sets that have no line of `step` under the present conditions."""
    rows = {row["split"]: row for row in read_metrics(workdir / "metrics.jsonl") if row["step"] == step}
    return [
        name
        for name in inputs.sets(split)
        if not _agrees(rows.get(f"{split}/{name}"), conditions(config, inputs, split, name))
    ]


def _agrees(row: MetricsRow | None, wanted: dict[str, float]) -> bool:
    """Whether a line has these conditions. One that a line of an older version lacks counts as equal."""
    return row is not None and all(row.get(field, value) == value for field, value in wanted.items())


def require_no_less(workdir: Path, config: Settings, inputs: Inputs, step: int) -> None:
    """Raises UserError if an evaluation would replace one of the same step that has more problems.

    The report compares evaluations of the same problems, and could then compare nothing.
    """
    for row in read_metrics(workdir / "metrics.jsonl"):
        split, _, name = row["split"].partition("/")
        if row["step"] != step or split != "eval" or name not in inputs.evals:
            continue
        now = conditions(config, inputs, "eval", name)["n"]
        if number(row, "n") > now:
            raise UserError(
                f"the evaluation of {name} at step {step} has {row['n']} problems; one of {now} would "
                "replace it, so raise eval.limit, or evaluate a copy of the directory"
            )


def require_same_evals(workdir: Path, inputs: Inputs, start: int) -> None:
    """Raises UserError if a set differs from what it was at an evaluation up to step `start`.

    The report could not compare such scores.
    """
    for row in read_metrics(workdir / "metrics.jsonl"):
        split, _, name = row["split"].partition("/")
        if row["step"] > start or split not in FILES or name not in inputs.sets(split):
            continue
        now = inputs.found[f"{name}/{FILES[split]}"]["crc32"]
        if row.get(PROBLEMS, now) != now:
            raise UserError(
                f"problems or gold answers of {name} in {split}.sets changed since this run was evaluated on "
                f"it at step {row['step']}; restore the old ones, give the new ones another name, or use "
                "another --workdir"
            )
