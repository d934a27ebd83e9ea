"""Ends a run that collapses, if its config asks for that."""

from __future__ import annotations

from rosd_jax.evals.health import GUARDED, guard_sentence
from rosd_jax.evals.outcome import read_metrics
from rosd_jax.train import stopping
from rosd_jax.train.run import Run


def require_health(run: Run, done: int, best: int | None) -> None:
    """Raises Stopped if config.guard asks the run to end after step `done`. best: step by validation."""
    guard = run.config.guard
    if not any(vars(guard).values()):
        return

    def check() -> str:
        train = [row for row in read_metrics(run.log.path) if row["split"] == "train"]
        return guard_sentence(train, guard)

    fell = run.hosts.once("guard", check)
    if fell:
        chosen = "" if best is None else f"; validation chose step {best}"
        raise stopping.Stopped(
            f"{fell}: stopped after step {done}{chosen}; the same command with --workdir={run.directory} "
            f"goes on with another guard, and with --config.steps={done} it exports the model",
            GUARDED,
        )
