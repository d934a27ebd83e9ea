"""Sends the lines of metrics.jsonl to the trackers of the config: TensorBoard files, Weights & Biases.

metrics.jsonl stays the record of a run; a tracker shows it, and reads nothing else. Every number becomes a
series SPLIT/NAME, such as train/reward or eval/physics/avg, over the step.

    require_trackers(names)                 raises UserError for a tracker whose package is not installed
    Trackers(names, directory, config)    opens them; a run that is resumed goes on in the same tracker run
        send()                            sends the lines that are new since the last call
        close()
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Protocol

from absl import logging

from rosd_jax import atomic
from rosd_jax.errors import UserError
from rosd_jax.evals.outcome import MetricsRow, number, read_metrics
from rosd_jax.settings import Settings

EVENTS = "tensorboard"  # directory of TensorBoard's files
WANDB = "wandb.json"  # the id of the W&B run, and which lines it has
PROJECT = "rosd_jax"  # on W&B, unless WANDB_PROJECT names another


class Adapter(Protocol):
    """One tracker, opened."""

    package: ClassVar[str]  # that it needs

    def send(self, row: MetricsRow) -> None:
        """Sends the numbers of one line, unless the tracker has it from an earlier start."""
        ...

    def close(self) -> None:
        """Waits until all is sent or written."""
        ...


def require_trackers(names: Sequence[str]) -> None:
    """Raises UserError for a tracker whose package is not installed."""
    for name in names:
        package = ADAPTERS[name].package
        if importlib.util.find_spec(package) is None:
            raise UserError(
                f"trackers has {name!r}, which needs the package {package}; install it with "
                f"pip install {package}, or leave {name!r} out"
            )


class Trackers:
    """The trackers of a run. One that fails later is left out from then on, with a warning."""

    def __init__(self, names: Sequence[str], directory: Path, config: Settings):
        """Raises UserError for a tracker that does not start."""
        self._path = directory / "metrics.jsonl"
        self._sent: set[tuple[int, str]] = set()
        self._open: dict[str, Adapter] = {}
        for name in names:
            try:
                self._open[name] = ADAPTERS[name](directory, config)
            except Exception as error:
                raise UserError(
                    f"trackers has {name!r}, which does not start ({_words(error)}); correct that, or leave "
                    f"{name!r} out"
                ) from error

    def send(self) -> None:
        """Sends the lines that are new since the last call."""
        rows = read_metrics(self._path) if self._open else []
        for row in rows:
            place = (row["step"], row["split"])
            if place not in self._sent:
                self._sent.add(place)
                self._try("send", row)

    def close(self) -> None:
        """Sends what is new, and waits until the trackers have it."""
        self.send()
        self._try("close")

    def _try(self, what: str, *arguments: MetricsRow) -> None:
        for name, adapter in list(self._open.items()):
            try:
                getattr(adapter, what)(*arguments)
            except Exception as error:
                del self._open[name]
                logging.warning("the tracker %s failed (%s); it gets nothing more", name, _words(error))


class TensorBoard:
    """Event files in tensorboard/, written again from metrics.jsonl by every start of a run."""

    package: ClassVar[str] = "tensorboardX"

    def __init__(self, directory: Path, config: Settings):
        from tensorboardX import SummaryWriter

        shutil.rmtree(directory / EVENTS, ignore_errors=True)
        self._writer = SummaryWriter(str(directory / EVENTS))
        self._writer.add_text("config", f"```json\n{_as_json(config)}\n```")

    def send(self, row: MetricsRow) -> None:
        for name, height in _series(row).items():
            self._writer.add_scalar(name, height, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run on Weights & Biases, or offline if WANDB_MODE says so. wandb.json has its id."""

    package: ClassVar[str] = "wandb"

    def __init__(self, directory: Path, config: Settings):
        import wandb

        self._path = directory / WANDB
        kept = json.loads(self._path.read_text()) if self._path.exists() else {}
        self._sent = [tuple(place) for place in kept.get("sent", ())]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=kept.get("id"),
            resume="allow",
            name=directory.resolve().name,
            dir=directory,
            config=json.loads(_as_json(config)),
            # The console's output is not W&B's, and nothing but the metrics is sent.
            settings=wandb.Settings(console="off", silent=True, save_code=False, x_disable_stats=True),
        )
        self._run.define_metric("*", step_metric="step")

    def send(self, row: MetricsRow) -> None:
        place = (row["step"], row["split"])
        if place in self._sent:
            return
        self._run.log(_series(row) | {"step": row["step"]})
        self._sent.append(place)
        atomic.write_text(self._path, [json.dumps({"id": self._run.id, "sent": self._sent})])

    def close(self) -> None:
        self._run.finish()


ADAPTERS = {"tensorboard": TensorBoard, "wandb": WandB}


def _series(row: MetricsRow) -> dict[str, float]:
    """The numbers of a line by the names of their series. What is not finite is left out."""
    names = [name for name in row if name != "step" and math.isfinite(number(row, name))]
    return {f"{row['split']}/{name}": row[name] for name in names}


def _as_json(config: Settings) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2)


def _words(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
