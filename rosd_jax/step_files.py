"""Files named step_N, one for each step, such as rollouts/step_3.jsonl.

steps_in(folder, suffix)          -> the steps that have a file
drop_after(folder, suffix, step)  removes those of later steps, and what a killed process left
"""

from __future__ import annotations

import re
from pathlib import Path

from rosd_jax import atomic


def steps_in(folder: Path, suffix: str) -> set[int]:
    """The steps that have a file with this suffix in the folder."""
    name = re.compile(rf"step_(\d+){re.escape(suffix)}")
    found = [name.fullmatch(path.name) for path in folder.glob("step_*")]
    return {int(match[1]) for match in found if match}


def drop_after(folder: Path, suffix: str, step: int) -> None:
    """Removes the files of steps after `step`, which a resumed run writes again."""
    for path in list(folder.glob("*" + atomic.TEMPORARY)):
        path.unlink()
    for later in steps_in(folder, suffix):
        if later > step:
            (folder / f"step_{later}{suffix}").unlink()
