"""The directory of a run: its config, its lock, its rollouts.

A run that was stopped, even by kill -9, continues when it is started again with the same directory.

    DIR/config.json               the full config; a later run in DIR must agree with it, except in MAY_CHANGE
    DIR/rollouts/step_N.jsonl     what was sampled, graded and reflected in step N
    DIR/unfinished/               what the present step has sampled so far (unfinished.py)
    DIR/.lock                     locked by the process that writes to DIR

    check_path(workdir)                    raises UserError for a path that cannot be
    claim(workdir, config)                 `prepare` as a context: a failed start leaves no new directory
    prepare(workdir, config)               -> whether a run is being resumed
    require_shared(workdir, hosts)         raises unless all hosts read and write the same directory
    lock(workdir)                          for this process, or raises UserError
    record(workdir, config)                writes config.json, once a resumed run has passed its checks
    read_config(path)                      -> the fields of a config.json
    default_workdir(config_name)           -> runs/<config>-<time>
    fingerprint(config)                    -> short hash of the fields that a resumed run must keep
    rollout_rows(reflected, lesson, divergence_BR, tokenizer)   -> the lines of a rollout file
    write_rollouts(workdir, step, rows)    -> path

Dimensions: B rows of a step's batch, R response tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rosd_jax import atomic
from rosd_jax.config import PATH_RULE, default_config, path_fits
from rosd_jax.errors import UserError
from rosd_jax.fields import flat, from_config, shown
from rosd_jax.hosts import Hosts
from rosd_jax.settings import Settings

if TYPE_CHECKING:  # types.py imports JAX, which --mode=report does without
    from rosd_jax.text.tokenizer import Tokenizer
    from rosd_jax.types import Lesson, Reflected

# What a run writes that has begun.
WRITTEN = ("metrics.jsonl", "checkpoints", "rollouts", "evals", "export", "unfinished", "report")
# Fields that may differ when a run is resumed; with a dot at the end, a whole section.
MAY_CHANGE = (
    "checkpoint.keep",
    "compile_cache",
    "eval.",
    "guard.",
    "model.path",
    "steps",
    "trackers",
    "validation.",
)
CONFIG_FILE = "config.json"
LOCK = ".lock"
SHARED = ".shared_"  # and the number of the process that wrote it
LATE_S = 20
ABSENT = object()  # stands for a field that a config does not have


@contextlib.contextmanager
def claim(workdir: Path, config: Settings) -> Iterator[bool]:
    """Calls `prepare` and yields its result. Removes a new workdir if the block fails before a run has begun.

    So a failed start, for example on a full disk, leaves no directory behind, also none above the workdir.
    """
    missing = _missing(workdir)
    resuming = prepare(workdir, config)
    try:
        yield resuming
    except BaseException:
        if missing and not _has_begun(workdir):
            _remove_unused(workdir)
            _remove_empty(missing)
        raise


def prepare(workdir: Path, config: Settings) -> bool:
    """Makes and locks the workdir. Returns whether a run is being resumed; its config.json is not changed.

    The lock lasts as long as the process. Raises UserError, and changes no file, if the path is not a
    directory, cannot be written, contains files but no run, contains a run with another config (in a field
    not in MAY_CHANGE), or is in use by another process. Then no new directory is left either.
    """
    check_path(workdir)
    missing = _missing(workdir)
    locked = False
    try:
        _make_directory(workdir)
        lock(workdir)
        locked = True
        path = workdir / CONFIG_FILE
        resuming = path.exists() and _has_begun(workdir)
        if resuming:
            _require_same(workdir, read_config(path), _as_json(config))
        else:
            record(workdir, config)
    except BaseException:
        if missing and locked:  # without the lock, another run may have made it meanwhile
            _remove_unused(workdir)
        _remove_empty(missing)
        raise
    return resuming


def check_path(workdir: Path) -> None:
    """Raises UserError for a path that no file system can have, or whose ~ the shell has not replaced."""
    if not path_fits(str(workdir)):
        raise UserError(f"--workdir is {shown(str(workdir))}; it must {PATH_RULE}")
    if workdir.parts[:1] and workdir.parts[0].startswith("~"):
        raise UserError(
            f"--workdir is {str(workdir)!r}, where ~ would be a directory of that name; write the home "
            "directory in full, or ./~ if you mean it"
        )


def require_shared(workdir: Path, hosts: Hosts) -> None:
    """Raises UserError, on every host, unless all of them read and write the same directory."""
    if hosts.count == 1:
        return
    token = hosts.once("token", lambda: secrets.token_hex(8))
    own = workdir / f"{SHARED}{hosts.index}"
    problem = None
    try:
        own.write_text(token)
    except OSError as error:
        problem = f"cannot be written ({error.strerror})"
    hosts.exchange("written", None)
    if problem is None and not _appears(workdir / f"{SHARED}0", token):
        problem = "is not that of process 0"
    problems = hosts.exchange("shared", problem)
    with contextlib.suppress(OSError):
        own.unlink()
    for i, found in enumerate(problems):
        if found:
            raise UserError(
                f"workdir {workdir} {found} on the host of process {i}; give --workdir a directory on "
                "storage that all hosts share and can write"
            )


def _appears(path: Path, text: str) -> bool:
    """Whether a file has this text, which another host has written; network storage may show it late."""
    until = time.monotonic() + LATE_S
    while True:
        with contextlib.suppress(OSError):
            if path.read_text(errors="replace") == text:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def record(workdir: Path, config: Settings) -> None:
    """Writes config.json, unless it is the same already."""
    path = workdir / CONFIG_FILE
    here = _as_json(config)
    if not path.exists() or read_config(path) != here:
        atomic.write_text(path, [json.dumps(here, indent=2, sort_keys=True) + "\n"])


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a config.json. Raises UserError if it cannot be read or contains no config."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}); use another --workdir") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} contains no config; use another --workdir")
    return config


def default_workdir(config_name: str) -> Path:
    """runs/<config>-<YYYYmmdd-HHMMSS>. Characters that are awkward in a path become `-`."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", config_name).strip("-.") or "run"
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def fingerprint(config: Settings) -> str:
    """Sixteen hex digits, equal for two configs if `prepare` would resume a run of one with the other."""
    kept = {field: value for field, value in flat(_as_json(config)) if not _may_change(field)}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def rollout_rows(
    reflected: Reflected, lesson: Lesson, divergence_BR: np.ndarray, tokenizer: Tokenizer
) -> list[dict]:
    """The lines of rollouts/step_N.jsonl, one per rollout.

    divergence_BR: as the update of the lesson returns it.
    """
    graded = reflected.graded
    tokens_BR = graded.rollout.tokens_BR
    length_B = graded.rollout.length_B
    active_B = lesson.active_BR.sum(axis=1)
    rows = []
    for row, (text, r) in enumerate(zip(graded.texts, reflected.reflections, strict=True)):
        problem = graded.problem(row)
        ids = np.asarray(tokens_BR[row, : length_B[row]])
        rows.append(
            dict(
                uid=problem.uid,
                sample=row % graded.group_size,
                prompt=list(problem.messages),
                answer=problem.answer,
                response=text,
                token_ids=ids.tolist(),
                reward=float(graded.rewards_B[row]),
                reflection=r.raw,
                idea=r.idea,
                idea_source=r.idea_source,
                quote=r.quote,
                ambiguous=r.ambiguous,
                error_span_chars=r.char_span,
                error_span_tokens=r.token_span,
                span_source=r.span_source,
                active_tokens=int(active_B[row]),
                note=r.note,
                **active_tokens(ids, lesson.weight_BR[row], divergence_BR[row], tokenizer),
            )
        )
    return rows


def active_tokens(
    ids: np.ndarray, weight_R: np.ndarray, divergence_R: np.ndarray, tokenizer: Tokenizer
) -> dict[str, Any]:
    """Which tokens of a response are taught, their text, and how far student and teacher are apart.

        active_span_tokens   [start, stop) from the first taught token to the last
        active_span_chars    the same in characters of the response
        active_widths        of each of these tokens, the characters that it adds to the response
        divergence           of each of them, in nats, rounded to four digits; None if it is not finite, or if
                             the token is not taught (lesson.region=inverted only)

    All are None if no token is taught. A character whose bytes are split over several tokens is counted
    for the first of them. The others, and control tokens such as the stop token, have a width of 0.
    """
    active = np.flatnonzero(weight_R)
    if not len(active):
        return dict.fromkeys(("active_span_tokens", "active_span_chars", "active_widths", "divergence"))
    start = int(active[0])
    stop = int(active[-1]) + 1
    # A token that begins inside a character has its own start before the end of the token to its left.
    ends = np.maximum.accumulate(tokenizer.offsets(ids)[:, 1])
    bounds = [0, *ends.tolist()][start : stop + 1]
    return dict(
        active_span_tokens=(start, stop),
        active_span_chars=(bounds[0], bounds[-1]),
        active_widths=np.diff(bounds).tolist(),
        divergence=[rounded(x) for x in np.where(weight_R, divergence_R, np.nan)[start:stop].tolist()],
    )


def rounded(x: float) -> float | None:
    """The number with four significant digits; None if it is not finite, since JSON has no such number."""
    return float(f"{x:.4g}") if math.isfinite(x) else None


def write_rollouts(workdir: Path, step: int, rows: Iterable[dict[str, Any]]) -> Path:
    """Writes rollouts/step_N.jsonl, one object per line. Arrays become lists.

    Text is escaped to ASCII, so that invalid Unicode (a lone surrogate) reads back unchanged.
    """
    path = workdir / "rollouts" / f"step_{step}.jsonl"
    path.parent.mkdir(exist_ok=True)
    lines = (json.dumps(row, ensure_ascii=True, default=_plain) for row in rows)
    atomic.write_text(path, (line + "\n" for line in lines))
    return path


def _plain(value: np.ndarray | np.generic) -> Any:
    """A NumPy array or scalar as Python's own types, for JSON."""
    return value.tolist()


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
    if CONFIG_FILE not in names and names - {LOCK, CONFIG_FILE + atomic.TEMPORARY}:
        raise UserError(
            f"workdir {workdir} contains files but no {CONFIG_FILE}, so there is no run to resume; "
            "give --workdir a new or empty directory"
        )


def _missing(workdir: Path) -> list[Path]:
    """The workdir and the directories above it that do not exist, the innermost first."""
    missing = []
    for path in (workdir, *workdir.parents):
        if path.exists():
            break
        missing.append(path)
    return missing


def _remove_empty(directories: Sequence[Path]) -> None:
    """Removes directories, the innermost first, up to the first that is not empty."""
    with contextlib.suppress(OSError):
        for path in directories:
            if path.exists():
                path.rmdir()


def _has_begun(workdir: Path) -> bool:
    """Whether a run wrote anything except its config. An empty directory does not count."""
    for name in WRITTEN:
        path = workdir / name
        is_empty_directory = path.is_dir() and not any(path.iterdir())
        if path.exists() and not is_empty_directory:
            return True
    return False


def _remove_unused(workdir: Path) -> None:
    """Removes a workdir in which no run has begun, unless it contains other files."""
    names = {path.name for path in workdir.iterdir() if not path.name.startswith(SHARED)}
    if names <= {CONFIG_FILE, LOCK, *WRITTEN}:
        shutil.rmtree(workdir)


def lock(workdir: Path) -> None:
    """Locks the workdir until this process ends. The system releases the lock even after kill -9.

    Raises UserError if it cannot be written or is in use by another process.

    A record lock (fcntl) belongs to the process: no child inherits it, and the same process may take it
    again. Closing any descriptor of the file would release it, so this one stays open.
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
    """The config as it reads back from its file, with tuples as lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def _require_same(workdir: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Raises UserError naming all fields that differ. A field that `there` lacks has its default."""
    default = dict(flat(_as_json(from_config(default_config()))))
    old = dict(flat(there))
    new = dict(flat(here))
    differences = []
    for field in sorted(old.keys() | new.keys()):
        before = old.get(field, default.get(field, ABSENT))
        now = new.get(field, ABSENT)
        if before != now and not _may_change(field):
            differences.append(f"{field} is {_show(before)} there and {_show(now)} here")
    if differences:
        raise UserError(
            f"workdir {workdir} contains a run with another config: {', '.join(differences)}; "
            "use another --workdir or the same config"
        )


def _may_change(field: str) -> bool:
    sections = tuple(name for name in MAY_CHANGE if name.endswith("."))
    return field in MAY_CHANGE or field.startswith(sections)


def _show(value: Any) -> str:
    return "absent" if value is ABSENT else repr(value)
