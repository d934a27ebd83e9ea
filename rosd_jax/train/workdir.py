"""The directory of a run: its config, its lock, its rollouts.

A run that was stopped, even by kill -9, goes on when it is started again on its directory.

    DIR/config.json               the resolved config; a later run on DIR must agree with it but in the
                                  steps, what is kept, the evaluation and where the model lies
    DIR/rollouts/step_N.jsonl     what was sampled, graded and reflected in step N
    DIR/.lock                     held by the process that writes to DIR

    claim(workdir, config)                 `prepare` for a `with`: a start that fails leaves nothing new
    prepare(workdir, config)               -> True where a run is being resumed
    record(workdir, config)                settles config.json once a run is being resumed
    read_config(path)                      -> what a config.json holds
    flat(tree)                             -> (field, value) of nested dicts
    default_workdir(config_name)           -> runs/<config>-<time>
    fingerprint(config)                    -> short hash of what a resumed run must keep
    write_rollouts(workdir, step, rows)    -> path
    rollout_steps(workdir)                 -> the steps whose rollouts are there
    drop_rollouts_after(workdir, step)
    write_atomic(path, chunks)             a reader sees the old file or the new one, never a part
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rosd_jax.config import UserError, default_config
from rosd_jax.fields import from_config
from rosd_jax.settings import Settings

WRITTEN = (
    "metrics.jsonl",
    "checkpoints",
    "rollouts",
    "evals",
    "export",
)  # what a run leaves once it has begun
# Between two runs; with a dot: all below.
MAY_CHANGE = ("checkpoint.keep", "compile_cache", "eval.", "model.path", "steps", "validation.")
CONFIG, LOCK, TEMPORARY = "config.json", ".lock", ".tmp"
ROLLOUT_NAME = re.compile(r"step_(\d+)\.jsonl")
ABSENT = object()


@contextlib.contextmanager
def claim(workdir: Path, config: Settings) -> Iterator[bool]:
    """`prepare`, whose answer it yields; takes a new workdir away again if nothing was written there.

    So a start that fails, for want of disk space say, leaves no directory behind.
    """
    new = not workdir.exists()
    resuming = prepare(workdir, config)
    try:
        yield resuming
    except BaseException:
        if new and not _has_begun(workdir):
            _remove_unused(workdir)
        raise


def prepare(workdir: Path, config: Settings) -> bool:
    """Makes and locks the workdir; True where a run is being resumed, whose config.json stays as it is.

    The lock lasts as long as the process. Raises UserError where the path is no directory, cannot
    be written, holds files but no run, belongs to a run of another config that has begun (any field
    but MAY_CHANGE), or is in use by another process. Nothing that lies there is changed in these cases.
    """
    _make_directory(workdir)
    _lock(workdir)
    path = workdir / CONFIG
    resuming = path.exists() and _has_begun(workdir)
    if resuming:
        _require_same(workdir, read_config(path), _as_json(config))
    else:
        record(workdir, config)
    return resuming


def record(workdir: Path, config: Settings) -> None:
    """Writes config.json, where it holds anything else."""
    path, here = workdir / CONFIG, _as_json(config)
    if not path.exists() or read_config(path) != here:
        write_atomic(path, [json.dumps(here, indent=2, sort_keys=True) + "\n"])


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a config.json. Raises UserError where it cannot be read or holds none."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); use another --workdir") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no config; use another --workdir")
    return config


def flat(tree: dict[str, Any], above: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Every field as section.name with its value."""
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flat(value, (*above, name))
        else:
            yield ".".join((*above, name)), value


def default_workdir(config_name: str) -> Path:
    """runs/<config>-<YYYYmmdd-HHMMSS>; characters that are awkward in a path become `-`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config_name).strip("-.") or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def fingerprint(config: Settings) -> str:
    """Sixteen hex digits that are equal where `prepare` would resume one config with the other."""
    kept = {field: value for field, value in flat(_as_json(config)) if not _may_change(field)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def write_rollouts(workdir: Path, step: int, rows: Iterable[dict[str, Any]]) -> Path:
    """Writes rollouts/step_N.jsonl, one object a row; arrays become lists.

    Text is escaped to ASCII, so that broken Unicode (a lone surrogate) comes back as it was.
    """
    path = workdir / "rollouts" / f"step_{step}.jsonl"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, (json.dumps(row, ensure_ascii=True, default=np.ndarray.tolist) + "\n" for row in rows))
    return path


def rollout_steps(workdir: Path) -> list[int]:
    """The steps whose rollouts are there, in no order."""
    names = [ROLLOUT_NAME.fullmatch(path.name) for path in (workdir / "rollouts").glob("*")]
    return [int(name[1]) for name in names if name]


def drop_rollouts_after(workdir: Path, step: int) -> None:
    """Removes the files of steps above `step`, which a resumed run will write again."""
    for path in list((workdir / "rollouts").glob("*" + TEMPORARY)):
        path.unlink()
    for later in rollout_steps(workdir):
        if later > step:
            (workdir / "rollouts" / f"step_{later}.jsonl").unlink()


def write_atomic(path: Path, chunks: Iterable[str]) -> None:
    """Writes text to a temporary name beside `path` and renames it once it is on the disk."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(chunks)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _make_directory(workdir: Path) -> None:
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"workdir {workdir} is a file; give --workdir a directory")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        names = {path.name for path in workdir.iterdir()}
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be made or read ({error.strerror}); use another --workdir"
        ) from error
    if CONFIG not in names and names - {LOCK, CONFIG + TEMPORARY}:
        raise UserError(
            f"workdir {workdir} holds files but no {CONFIG}, so it is no run to resume; "
            "give --workdir a new or empty directory"
        )


def _has_begun(workdir: Path) -> bool:
    """Whether a run wrote anything but its config; an empty directory is nothing."""
    paths = [workdir / name for name in WRITTEN]
    return any(any(path.iterdir()) if path.is_dir() else path.exists() for path in paths)


def _remove_unused(workdir: Path) -> None:
    """Removes a workdir in which no run has begun, unless somebody else's file is there."""
    names = {path.name for path in workdir.iterdir()}
    if names <= {CONFIG, LOCK, *WRITTEN}:
        shutil.rmtree(workdir)


def _lock(workdir: Path) -> None:
    """Takes the lock for the life of this process; the system frees it even after kill -9.

    A record lock (fcntl) belongs to the process alone: no child inherits it, and the same process
    may take it again. Closing any descriptor of the file would free it, so this one stays open.
    """
    try:
        descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written ({error.strerror}); use another --workdir"
        ) from error
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        owner = os.read(descriptor, 20).decode("ascii", "replace").strip() or "unknown"
        os.close(descriptor)
        raise UserError(
            f"workdir {workdir} is in use by another run (process {owner}); "
            "wait for it or use another --workdir"
        ) from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _as_json(config: Settings) -> dict[str, Any]:
    """The config as it comes back from its file, with tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _require_same(workdir: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises UserError naming all fields that differ; one that is not there has its default there."""
    old, new = dict(flat(there)), dict(flat(here))
    default = dict(flat(_as_json(from_config(default_config()))))
    differences = []
    for field in sorted(old.keys() | new.keys()):
        a, b = old.get(field, default.get(field, ABSENT)), new.get(field, ABSENT)
        if a != b and not _may_change(field):
            differences.append(f"{field} is {_show(a)} there and {_show(b)} here")
    if differences:
        raise UserError(
            f"workdir {workdir} holds a run of another config: {', '.join(differences)}; "
            "use another --workdir or the same config"
        )


def _may_change(field: str) -> bool:
    return any(field == name or (name.endswith(".") and field.startswith(name)) for name in MAY_CHANGE)


def _show(value: Any) -> str:
    return "absent" if value is ABSENT else repr(value)
