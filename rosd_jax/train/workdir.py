"""The directory of a run: its config, its lock, its rollouts.

A run that was stopped, even by kill -9, goes on when it is started again on its directory.

    DIR/config.json               the resolved config; a later run on DIR must agree with it
    DIR/rollouts/step_N.jsonl     what was sampled, graded and reflected in step N
    DIR/.lock                     held by the process that writes to DIR

    prepare(workdir, config)               -> True where a run is being resumed
    default_workdir(config_name)           -> runs/<config>-<time>
    fingerprint(config)                    -> short hash of what a resumed run must keep
    write_rollouts(workdir, step, rows)    -> path
    drop_rollouts_after(workdir, step)
    write_atomic(path, chunks)             a reader sees the old file or the new one, never a part
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rosd_jax.config import Config, UserError

WRITTEN = ("metrics.jsonl", "checkpoints", "rollouts", "evals")  # what a run leaves once it has begun
MAY_CHANGE = ("checkpoint.keep", "steps")  # between two runs on one workdir
CONFIG, LOCK, TEMPORARY = "config.json", ".lock", ".tmp"
ROLLOUT_NAME = re.compile(r"step_(\d+)\.jsonl")
ABSENT = object()


def prepare(workdir: Path, config: Config) -> bool:
    """Makes and locks the workdir and settles its config.json; True where a run is being resumed.

    The lock lasts as long as the process. Raises UserError where the path is no directory, cannot
    be written, holds files but no run, belongs to a run of another config that has begun (any field
    but MAY_CHANGE), or is in use by another process. Nothing that lies there is changed in these cases.
    """
    _make_directory(workdir)
    _lock(workdir)
    path, here = workdir / CONFIG, _as_json(config)
    there = _read_config(path) if path.exists() else None
    resuming = there is not None and any((workdir / name).exists() for name in WRITTEN)
    if there is not None and resuming:
        _require_same(workdir, there, here)
    if there != here:
        write_atomic(path, [json.dumps(here, indent=2, sort_keys=True) + "\n"])
    return resuming


def default_workdir(config_name: str) -> Path:
    """runs/<config>-<YYYYmmdd-HHMMSS>; characters that are awkward in a path become `-`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config_name).strip("-.") or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def fingerprint(config: Config) -> str:
    """Sixteen hex digits that are equal where `prepare` would resume one config with the other."""
    kept = {field: value for field, value in _flat(_as_json(config)) if field not in MAY_CHANGE}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def write_rollouts(workdir: Path, step: int, rows: Iterable[dict[str, Any]]) -> Path:
    """Writes rollouts/step_N.jsonl, one object a row; arrays become lists.

    Text is escaped to ASCII, so that broken Unicode (a lone surrogate) comes back as it was.
    """
    path = workdir / "rollouts" / f"step_{step}.jsonl"
    path.parent.mkdir(exist_ok=True)
    to_list = lambda value: value.tolist()
    write_atomic(path, (json.dumps(row, ensure_ascii=True, default=to_list) + "\n" for row in rows))
    return path


def drop_rollouts_after(workdir: Path, step: int) -> None:
    """Removes the files of steps above `step`, which a resumed run will write again."""
    for path in list((workdir / "rollouts").glob("*")):
        name = ROLLOUT_NAME.fullmatch(path.name)
        if path.suffix == TEMPORARY or (name and int(name[1]) > step):
            path.unlink()


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


def _as_json(config: Config) -> dict[str, Any]:
    """The config as it comes back from its file: references resolved, tuples as lists."""
    return json.loads(json.dumps(config.to_dict()))


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); use another --workdir") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no config; use another --workdir")
    return config


def _require_same(workdir: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    old, new = dict(_flat(there)), dict(_flat(here))
    for field in sorted(old.keys() | new.keys()):
        a, b = old.get(field, ABSENT), new.get(field, ABSENT)
        if a != b and field not in MAY_CHANGE:
            raise UserError(
                f"workdir {workdir} holds a run of another config: field {field} is {_show(a)} "
                f"there and {_show(b)} here; use another --workdir or the same config"
            )


def _show(value: Any) -> str:
    return "absent" if value is ABSENT else repr(value)


def _flat(tree: dict[str, Any], above: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, (*above, name))
        else:
            yield ".".join((*above, name)), value
