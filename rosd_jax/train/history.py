"""What earlier starts left in a workdir, and whether another one may go on from it.

Steps without a checkpoint are made again only where a kill explains them: all that a run made before its
first checkpoint, and what it made after its newest one. A history whose checkpoints were removed stays.

    last_step(workdir)                                -> the last step of which anything is left
    exported_step(workdir)                            -> the step of the model in export/
    require_checkpoint(workdir, config)               raises where training would start over
    require_steps(workdir, config, start)             raises where fewer steps are asked for than were made
    require_same_origins(kept, now, config)           raises where weights, tokenizer or problems changed
    require_same_evals(workdir, inputs, start)        raises where an evaluation set changed
    export_to_evaluate(workdir, config)               -> True where export/ is all that is left of the model
    origins(config, inputs)                           -> what a run is made from, for a checkpoint's meta
    conditions(config, inputs, split, name)           -> what an evaluation is made under
    unevaluated(workdir, config, inputs, split, step) -> the sets without an evaluation of that step
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from pathlib import Path
from typing import Any

from rosd_jax.config import UserError
from rosd_jax.data.sources import set_name
from rosd_jax.evals.outcome import PROBLEMS, Row, read_metrics
from rosd_jax.models.weights import weights_fingerprint
from rosd_jax.settings import Settings
from rosd_jax.train import checkpoint
from rosd_jax.train.inputs import FILES, Inputs, Split
from rosd_jax.train.workdir import rollout_steps

EXPORTED = "trained_steps.txt"  # in export/


def last_step(workdir: Path) -> int:
    """The last step of which lines, rollouts or an export are left; 0 where there is none."""
    lines = [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]
    return max([0, _noted_step(workdir) or 0, *lines, *rollout_steps(workdir)])


def exported_step(workdir: Path) -> int | None:
    """The step of the model in export/, None where there is no export.

    An export without a note of it, by an older version, is that of the last step in the history.
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
            f"{path} holds {text[:40]!r}; it must be the step of the exported model, so correct it"
        )
    return int(text)


def require_checkpoint(workdir: Path, config: Settings) -> None:
    """Raises UserError where training would start over and erase a history that no kill explains."""
    if not _checkpoints_are_gone(workdir, config):
        return
    instead = "" if exported_step(workdir) is None else ", evaluate the exported model with --mode=eval"
    raise UserError(
        f"workdir {workdir} holds a history up to step {last_step(workdir)} and no checkpoint to resume "
        f"from; bring {workdir / 'checkpoints'} back{instead}, or use another --workdir"
    )


def export_to_evaluate(workdir: Path, config: Settings) -> bool:
    """Whether export/ is all that is left of the model that the history tells of.

    Raises UserError where not even that is.
    """
    if not _checkpoints_are_gone(workdir, config):
        return False
    if exported_step(workdir) is None:
        raise UserError(
            f"workdir {workdir} holds a history up to step {last_step(workdir)}, but neither a checkpoint "
            f"nor an export of its model; bring {workdir / 'checkpoints'} back or use another --workdir"
        )
    return True


def _checkpoints_are_gone(workdir: Path, config: Settings) -> bool:
    """A run makes checkpoints/ before its first line, and a kill leaves it empty until the first is due."""
    last = last_step(workdir)
    if last == 0 or checkpoint.any_saved(workdir):
        return False
    killed_early = last <= config.checkpoint.every and exported_step(workdir) is None
    return not (killed_early and (workdir / "checkpoints").is_dir())


def require_steps(workdir: Path, config: Settings, start: int) -> None:
    """Raises UserError where config.steps is below the newest checkpoint's step or the exported model's."""
    made = max(start, exported_step(workdir) or 0)
    if made > config.steps:
        raise UserError(
            f"steps is {config.steps}; this run has made {made} already, so ask for at least that "
            "or use another --workdir"
        )


def origins(config: Settings, inputs: Inputs) -> dict[str, Any]:
    """What a run is made from and its config does not say; JSON, for a checkpoint's meta."""
    model = dataclasses.asdict(inputs.model)
    return {
        "weights": weights_fingerprint(config.model.path),
        "model": {name: value for name, value in model.items() if name not in ("dtype", "remat")},
        "tokenizer": inputs.tokenizer.fingerprint(),
        "wording": f"{zlib.crc32(repr(inputs.wording).encode()):08x}",
        "train": inputs.found[f"{set_name(config.data.train)}/train"],
    }


def require_same_origins(kept: dict[str, Any], now: dict[str, Any], config: Settings) -> None:
    """Raises UserError naming all of `now` that is not what the checkpoint's meta `kept` has.

    The frozen tree is read from model.path again, and other weights would be another teacher.
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
        then, rows = kept["train"]["rows"], now["train"]["rows"]
        words["train"] = f"the training problems of {config.data.train} ({then} rows then, {rows} now)"
    if changed:
        raise UserError(
            f"{' and '.join(words[name] for name in changed)} changed since this run began; bring the old "
            "ones back or use another --workdir"
        )


def _differs(kept: Any, now: Any) -> bool:
    """What a checkpoint of an older version does not say is not compared."""
    if isinstance(kept, dict):
        return any(kept[name] != value for name, value in now.items() if name in kept)
    return kept is not None and kept != now


def conditions(config: Settings, inputs: Inputs, split: Split, name: str) -> dict[str, float]:
    """What the evaluation of one set is made under, as metrics: equal ones can be compared."""
    return {
        "k": config.eval.samples,
        "n": len(inputs.sets(split)[name]),
        "temperature": config.eval.temperature,
        "top_p": config.eval.top_p,
        "max_new_tokens": config.eval.max_new_tokens,
        PROBLEMS: inputs.found[f"{name}/{FILES[split]}"]["crc32"],
    }


def unevaluated(workdir: Path, config: Settings, inputs: Inputs, split: Split, step: int) -> list[str]:
    """The sets that have no line of `step` made under the present conditions."""
    rows = {row["split"]: row for row in read_metrics(workdir / "metrics.jsonl") if row["step"] == step}
    return [
        name
        for name in inputs.sets(split)
        if not _agrees(rows.get(f"{split}/{name}"), conditions(config, inputs, split, name))
    ]


def _agrees(row: Row | None, wanted: dict[str, float]) -> bool:
    """A field that a line of an older version lacks agrees."""
    return row is not None and all(row.get(field, value) == value for field, value in wanted.items())


def require_same_evals(workdir: Path, inputs: Inputs, start: int) -> None:
    """Raises UserError where a set is not what it was at an earlier evaluation, up to step `start`.

    The scores could not be compared, which is what a run's report does.
    """
    for row in read_metrics(workdir / "metrics.jsonl"):
        split, _, name = row["split"].partition("/")
        if row["step"] > start or split not in FILES or name not in inputs.sets(split):
            continue
        now = inputs.found[f"{name}/{FILES[split]}"]["crc32"]
        if row.get(PROBLEMS, now) != now:
            raise UserError(
                f"problems or golds of {name} in {split}.sets changed since this run was evaluated on it at "
                f"step {row['step']}; bring the old ones back, give the new ones another name, or use "
                "another --workdir"
            )
