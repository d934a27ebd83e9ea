"""The train state on disk, through Orbax: three items a step, each restorable alone.

    params       the weights
    opt_state    the optimizer
    meta         JSON: step, config fingerprint, seed, versions

The position in the data is the step itself: step s of a seed is always the same batch.

    open_manager(workdir, keep)                  -> CheckpointManager on workdir/checkpoints
    save(manager, state, step, meta)             on disk when it returns
    restore_latest(manager, like)                -> (state, meta), or None where nothing was saved
    check_space(directory, needed_bytes, what)
    run_meta(config)                             -> what `save` takes as meta
    state_bytes(tree)
"""

from __future__ import annotations

import errno
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

import rosd_jax
from rosd_jax.config import UserError
from rosd_jax.train.workdir import fingerprint
from rosd_jax.types import TrainState

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# How TensorStore words these two errors inside the ValueError that Orbax passes on.
FULL_DISK_TEXTS = tuple(f"os_error_code='{int(code)}'" for code in FULL_DISK)


def open_manager(workdir: Path, keep: int) -> ocp.CheckpointManager:
    """The manager of workdir/checkpoints, which keeps the last `keep` of them.

    Removes what a killed save left behind, so only the process that holds the workdir's lock may
    call it. Orbax's log lines are dropped from here on; its errors arrive as exceptions.
    """
    _silence_orbax()
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: TrainState, step: int, meta: dict) -> None:
    """Writes the state under a temporary name, renames it, then removes the oldest beyond `keep`.

    So a kill at any moment leaves the previous checkpoint whole. Raises UserError where the disk is
    full (earlier checkpoints stay), ValueError where the step was saved before or is not the state's.
    """
    if int(state.step) != step:
        raise ValueError(f"step {step} is not the state's, {int(state.step)}")
    items = ocp.args.Composite(
        params=ocp.args.StandardSave(state.params),
        opt_state=ocp.args.StandardSave(state.opt_state),
        meta=ocp.args.JsonSave({**meta, "step": step}),
    )
    try:
        manager.save(step, args=items, force=True)
    except Exception as error:
        if not _is_full_disk(error):
            raise
        directory = Path(manager.directory)
        for left in directory.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(left, ignore_errors=True)
        raise _no_space(directory, state_bytes(state), "a checkpoint") from error


def restore_latest(
    manager: ocp.CheckpointManager, like: TrainState
) -> tuple[TrainState, dict[str, Any]] | None:
    """The newest checkpoint and its meta; None where nothing was saved.

    `like` holds jax.ShapeDtypeStruct leaves with the shardings to restore to, on whatever mesh.
    Raises UserError naming the directory of a checkpoint that cannot be read or does not fit.
    """
    step = manager.latest_step()
    if step is None:
        return None
    items = ocp.args.Composite(
        params=ocp.args.StandardRestore(like.params),
        opt_state=ocp.args.StandardRestore(like.opt_state),
        meta=ocp.args.JsonRestore(),
    )
    try:
        found = manager.restore(step, args=items)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(Path(manager.directory) / str(step), error) from error
    state = TrainState(
        step=jax.device_put(np.int32(step), like.step.sharding),
        params=found["params"],
        opt_state=found["opt_state"],
    )
    return state, found["meta"]


def check_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Raises UserError where the disk of `directory`, made or not yet, lacks that much space."""
    if _free_bytes(directory) < needed_bytes:
        raise _no_space(directory, needed_bytes, what)


def run_meta(config: ConfigDict) -> dict[str, Any]:
    """What a checkpoint says of its run, beside the step."""
    return {
        "config": fingerprint(config),
        "seed": config.seed,
        "rosd_jax": rosd_jax.__version__,
        "jax": jax.__version__,
    }


def state_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree; a checkpoint, being compressed, takes less."""
    return sum(
        math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )


def _silence_orbax() -> None:
    logger = logging.getLogger("absl")
    if _not_from_orbax not in logger.filters:
        logger.addFilter(_not_from_orbax)


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(text in str(error) for text in FULL_DISK_TEXTS)


def _no_space(directory: Path, needed_bytes: int, what: str) -> UserError:
    return UserError(
        f"no disk space for {what}: it needs about {_readable(needed_bytes)} and {directory} has "
        f"{_readable(_free_bytes(directory))} free; make room, or use a --workdir on another disk"
    )


def _unreadable(directory: Path, error: Exception) -> UserError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
    return UserError(
        f"checkpoint {directory} cannot be read ({reason}); move that directory away to resume "
        "from the one before it, or use another --workdir"
    )


def _free_bytes(directory: Path) -> int:
    path = directory.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _readable(count: int) -> str:
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1024 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.1f} {units[0]}" if units[0] != "B" else f"{count} B"
