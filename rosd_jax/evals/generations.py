"""The files of raw generations, one per evaluation of a set."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rosd_jax import atomic
from rosd_jax.errors import UserError


def write_generations(
    workdir: str | Path, step: int, set_name: str, rows: Iterable[dict[str, Any]], split: str = "eval"
) -> Path:
    """Writes one ASCII JSON object per line to `generations_path`. The file appears complete or not at all.

    Raises UserError if it cannot be written.
    """
    path = generations_path(workdir, step, set_name, split)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, (json.dumps(row, ensure_ascii=True) + "\n" for row in rows))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}); free space there or choose another --workdir"
        ) from error
    return path


def generations_path(workdir: str | Path, step: int, set_name: str, split: str = "eval") -> Path:
    """evals/step_N/<set>.jsonl (or validations/...), a different file for each name of a set."""
    safe = quote(os.fsencode(set_name), safe="")
    if len(safe) > 150:  # file systems allow 255 bytes
        safe = f"{safe[:100]}%{hashlib.sha256(os.fsencode(set_name)).hexdigest()[:24]}"
    return Path(workdir, f"{split}s", f"step_{step}", f"{safe}.jsonl")
