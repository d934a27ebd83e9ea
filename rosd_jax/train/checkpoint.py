"""The train state on disk, through Orbax. A checkpoint has these items, each restorable alone:

    params       the weights
    opt_state    the optimizer state
    ema_params   the moving average of the weights; only if the state has one
    meta         JSON: step, layout of the trees, and `run_meta`

The position in the data is the step itself: step s of a seed always has the same batch. checksums.json in
each checkpoint detects damaged files, because Orbax silently restores an array with a flipped byte.

A save copies the state to the host and returns; files and checksums are written while the run goes on.
`finish` waits for them. A damaged or missing file makes `restore_latest` fall back to the checkpoint before.

    open_manager(workdir)                        -> CheckpointManager on workdir/checkpoints
    save(manager, state, step, meta)             -> Saving, once the state is copied
    finish(manager, saving)                      returns once that checkpoint is on disk
    prune(manager, keep, best)                   removes all but the newest ones and the best
    restore_latest(manager, like, hosts)         -> Restored, or None without a checkpoint
    set_aside(manager, damaged, hosts)           renames damaged checkpoints, so that their steps can be saved
    restore_params(manager, step, like, hosts)   -> the weights of one step
    check_space(directory, needed_bytes, what)   raises if the disk is too full
    any_saved(workdir)                           -> whether there is a checkpoint; changes nothing
    run_meta(config, origins)                    -> the meta that `save` takes
    state_bytes(tree)                            -> bytes of all arrays
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

import rosd_jax
from rosd_jax import atomic
from rosd_jax.errors import UserError
from rosd_jax.hosts import Hosts
from rosd_jax.settings import Settings
from rosd_jax.train.workdir import fingerprint
from rosd_jax.types import Params, TrainState

T = TypeVar("T")
CHECKSUMS = "checksums.json"
READ_BYTES = 1 << 20
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
# Orbax passes these two errors on as a ValueError with TensorStore's text, which contains the code.
FULL_DISK_TEXTS = tuple(f"os_error_code='{code:d}'" for code in FULL_DISK)


def open_manager(workdir: Path) -> ocp.CheckpointManager:
    """The manager of workdir/checkpoints.

    Removes what a killed save left behind, so only the process that has locked the workdir may call it.
    Also silences Orbax's log lines; its errors arrive as exceptions.
    """
    logging.getLogger("absl").addFilter(_not_from_orbax)
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=True, cleanup_tmp_directories=True)
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


@dataclass(frozen=True)
class Saving:
    """A checkpoint that is being written."""

    step: int
    needed_bytes: int
    done: Future[None]  # once files and checksums are on disk


@dataclass(frozen=True)
class Restored:
    """The newest checkpoint that is whole."""

    state: TrainState
    meta: dict[str, Any]
    damaged: dict[int, str]  # the newer ones that cannot be read, by step, and why

    @property
    def step(self) -> int:
        """Updates so far."""
        return self.meta["step"]


def save(manager: ocp.CheckpointManager, state: TrainState, step: int, meta: dict[str, Any]) -> Saving:
    """Begins to write the state, under a temporary name that is renamed at the end.

    So a kill never damages a checkpoint. The state may be donated as soon as this returns. Call `finish`
    before the next `save`. Raises UserError if the disk is full (earlier checkpoints stay), ValueError for a
    step that is saved already or is not the state's.
    """
    if int(state.step) != step:
        raise ValueError(f"step {step} is not the state's, {int(state.step)}")
    trees = {name: ocp.args.StandardSave(tree) for name, tree in _trees(state).items()}
    items = ocp.args.Composite(
        **trees, meta=ocp.args.JsonSave({**meta, "step": step, "layout": _layout(state)})
    )
    needed_bytes = state_bytes(state)
    with _full_disk_in_words(manager, needed_bytes):
        manager.save(step, args=items, force=True)
    writer = ThreadPoolExecutor(1)
    done = writer.submit(_complete, manager, step)
    writer.shutdown(wait=False)
    return Saving(step, needed_bytes, done)


def finish(manager: ocp.CheckpointManager, saving: Saving) -> None:
    """Waits until the checkpoint is on disk. Raises UserError if the disk is full (earlier ones stay)."""
    with _full_disk_in_words(manager, saving.needed_bytes):
        manager.wait_until_finished()  # Orbax raises a failure once per thread: here, not in the next save
        saving.done.result()


def _complete(manager: ocp.CheckpointManager, step: int) -> None:
    """Waits for Orbax, then reads all files again for their checksums: too long for the main thread."""
    manager.wait_until_finished()
    # After Orbax's rename: a kill in between leaves a valid checkpoint without checksums (see _damage).
    if jax.process_index() == 0:
        directory = Path(manager.directory) / str(step)
        names = list(_files(directory))
        sums = dict(zip(names, _each(_crc32, directory, names), strict=True))
        atomic.write_text(directory / CHECKSUMS, [json.dumps(sums, indent=1)])


@contextlib.contextmanager
def _full_disk_in_words(manager: ocp.CheckpointManager, needed_bytes: int) -> Iterator[None]:
    directory = Path(manager.directory)
    try:
        yield
    except Exception as error:
        if not _is_full_disk(error):
            raise
        for left in directory.glob("*.orbax-checkpoint-tmp"):
            shutil.rmtree(left, ignore_errors=True)
        raise _no_space(directory, needed_bytes, "a checkpoint") from error


def prune(manager: ocp.CheckpointManager, keep: int, best: int | None) -> None:
    """Removes all checkpoints except the newest `keep` and that of step `best`."""
    for step in sorted(manager.all_steps())[:-keep]:
        if step != best:
            manager.delete(step)


def restore_latest(manager: ocp.CheckpointManager, like: TrainState, hosts: Hosts) -> Restored | None:
    """The newest checkpoint that can be read; None if none was ever saved.

    `like` has jax.ShapeDtypeStruct leaves with the shardings to restore to, on any mesh. Raises UserError if
    none can be read, or if the one that can belongs to another model or optimizer.
    """
    damaged: dict[int, str] = {}
    for step in hosts.once("steps", lambda: sorted(manager.all_steps(), reverse=True)):
        reason = _damage(Path(manager.directory) / str(step), hosts)
        if reason is None:
            try:
                return Restored(*_restore(manager, step, like), damaged)
            except Unreadable as error:
                if hosts.count > 1:  # the others may wait for this one inside Orbax
                    raise UserError(
                        f"{unreadable(manager, step, str(error))} here; move that directory away to resume "
                        "from the one before"
                    ) from error
                reason = str(error)
        damaged[step] = reason
    if damaged:
        step, reason = next(iter(damaged.items()))
        raise UserError(f"{unreadable(manager, step, reason)}, nor any before it; use another --workdir")
    return None


def unreadable(manager: ocp.CheckpointManager, step: int, reason: str) -> str:
    """What is said of a damaged checkpoint."""
    return f"checkpoint {Path(manager.directory) / str(step)} cannot be read ({reason})"


def set_aside(manager: ocp.CheckpointManager, damaged: dict[int, str], hosts: Hosts) -> None:
    """Renames damaged checkpoints to STEP.damaged, so that the run can save these steps again."""

    def rename() -> None:
        for step in damaged:
            directory = Path(manager.directory) / str(step)
            aside = directory.with_name(f"{step}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            directory.rename(aside)

    if damaged:
        hosts.once("set aside", rename)
        manager.reload()


def restore_params(manager: ocp.CheckpointManager, step: int, like: Params, hosts: Hosts) -> Params:
    """Only the weights of one step's checkpoint. `like`: as for `restore_latest`.

    Raises UserError if they are damaged.
    """
    try:
        if reason := _damage(Path(manager.directory) / str(step), hosts):
            raise Unreadable(reason)
        return _read(manager, step, params=ocp.args.StandardRestore(like))["params"]
    except Unreadable as error:
        raise UserError(
            f"{unreadable(manager, step, str(error))}, and it has the best step by validation; move that "
            "directory away to export the best of the others"
        ) from error


def check_space(directory: Path, needed_bytes: int, what: str) -> None:
    """Raises UserError if the disk has less free space. `directory` need not exist yet."""
    if _free_bytes(directory) < needed_bytes:
        raise _no_space(directory, needed_bytes, what)


def any_saved(workdir: Path) -> bool:
    """Whether workdir/checkpoints has a checkpoint that was saved completely, damaged since or not."""
    return any(path.name.isdigit() for path in (workdir / "checkpoints").glob("*"))


def run_meta(config: Settings, origins: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint records about its run. `origins`: as history.py returns them."""
    return {
        "config": fingerprint(config),
        "seed": config.seed,
        **origins,
        "rosd_jax": rosd_jax.__version__,
        "jax": jax.__version__,
    }


def state_bytes(tree: Any) -> int:
    """Bytes of all arrays (or shapes) of a tree. A checkpoint is compressed, so it takes less."""
    return sum(math.prod(x.shape) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _trees(state: TrainState) -> dict[str, Any]:
    """The trees of a state by the names of their items."""
    trees = {"params": state.params, "opt_state": state.opt_state}
    return trees if state.ema_params is None else trees | {"ema_params": state.ema_params}


def _layout(state: TrainState) -> str:
    """A hash of the paths, shapes and dtypes of all trees."""
    leaves = jax.tree_util.tree_leaves_with_path(tuple(_trees(state).values()))
    lines = [f"{jax.tree_util.keystr(path)} {x.shape} {x.dtype}" for path, x in leaves]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


class Unreadable(Exception):
    """Why a checkpoint cannot be read."""


def _restore(
    manager: ocp.CheckpointManager, step: int, like: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """State and meta of one step. Raises Unreadable; UserError if it belongs to another model."""
    meta = _read(manager, step, meta=ocp.args.JsonRestore())["meta"]
    if meta["layout"] != _layout(like):
        raise UserError(
            f"checkpoint {Path(manager.directory) / str(step)} contains arrays of another model or optimizer "
            "than this run's; set model.path to the model that the run began with, or use another --workdir"
        )
    wanted = {name: ocp.args.StandardRestore(tree) for name, tree in _trees(like).items()}
    found = _read(manager, step, **wanted)
    step_array = jax.device_put(np.int32(step), like.step.sharding)
    return TrainState(step_array, **{name: found[name] for name in wanted}), meta


def _read(manager: ocp.CheckpointManager, step: int, **items: Any) -> Any:
    try:
        return manager.restore(step, args=ocp.args.Composite(**items))
    except jax.errors.JaxRuntimeError:  # out of device memory, say: the checkpoint is not to blame
        raise
    except Exception as error:  # Orbax raises many types, even plain Exception
        raise Unreadable((str(error).strip() or type(error).__name__).splitlines()[0][:200]) from error


def _damage(directory: Path, hosts: Hosts) -> str | None:
    """Why a checkpoint is not what was saved: a file that is missing or differs; None if it is whole.

    All hosts get the same answer. Each reads a part of the files, and looks whether it has them all. Files
    that were added are ignored. A checkpoint without checksums passes: a kill right after Orbax's rename
    leaves one that is valid.
    """

    def saved() -> dict[str, int] | None | Unreadable:
        try:
            content = json.loads((directory / CHECKSUMS).read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return Unreadable(str(error))
        return content if isinstance(content, dict) else Unreadable(f"{CHECKSUMS} contains no checksums")

    sums = hosts.once("checksums", saved)
    if isinstance(sums, Unreadable):
        return str(sums)
    sizes = hosts.once("files", lambda: _files(directory))
    here = _files(directory)
    found: dict[str, int | None] = dict.fromkeys(sums or sizes)
    if sums:
        names = list(sums)
        read = hosts.share("read", lambda some: _each(_crc32_if_readable, directory, some), names)
        found = dict(zip(names, read, strict=True))
    wrong = [
        name for name in found if here.get(name) != sizes.get(name) or (sums and found[name] != sums[name])
    ]
    reasons = hosts.exchange("damage", f"{wrong[0]} differs from what was saved" if wrong else None)
    return next((reason for reason in reasons if reason), None)


def _files(directory: Path) -> dict[str, int]:
    """The size of every file of a checkpoint except the list of checksums itself."""
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != CHECKSUMS]
    return {str(path.relative_to(directory)): path.stat().st_size for path in paths}


def _each(read: Callable[[Path], T], directory: Path, names: Sequence[str]) -> list[T]:
    """What `read` says of each of these files, several of which are read at the same time."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(read, [directory / name for name in names]))


def _crc32(path: Path) -> int:
    crc = 0
    with open(path, "rb") as file:
        while chunk := file.read(READ_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc


def _crc32_if_readable(path: Path) -> int | None:
    try:
        return _crc32(path)
    except OSError:
        return None


def _is_full_disk(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in FULL_DISK
    return any(text in str(error) for text in FULL_DISK_TEXTS)


def _no_space(directory: Path, needed_bytes: int, what: str) -> UserError:
    return UserError(
        f"no disk space for {what}: it needs about {_readable(needed_bytes)} and {directory} has "
        f"{_readable(_free_bytes(directory))} free; free some space, or use a --workdir on another disk"
    )


def _free_bytes(directory: Path) -> int:
    path = directory.absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _readable(count: float) -> str:
    if count < 1024:
        return f"{count:.0f} bytes"
    power = min(int(math.log(count, 1024)), 4)
    return f"{count / 1024**power:.1f} {('KiB', 'MiB', 'GiB', 'TiB')[power - 1]}"
