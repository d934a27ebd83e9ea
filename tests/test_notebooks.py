"""The notebooks: their code runs from top to bottom, and prints what is saved in them."""

import json
import os
import re
import subprocess
import sys

import pytest

from support import ROOT

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")
LARGEST_FILE = 100_000
# Rounding differs between machines, and compilers need more or less memory.
CLOSE = 0.25
TINY = 1e-5


def code_cells(name):
    """The source and the saved text of every code cell."""
    path = ROOT / "notebooks" / name
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    texts = ["".join("".join(out.get("text", "")) for out in cell["outputs"]) for cell in cells]
    return [("".join(cell["source"]), text) for cell, text in zip(cells, texts, strict=True)]


def test_notebooks_are_small():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert path.stat().st_size < LARGEST_FILE, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss_in_your_project.ipynb"])
def test_a_notebook_prints_what_it_says(name, tmp_path):
    cells = code_cells(name)
    mark = "--- end of a cell ---"
    code = "".join(f"{source}\nprint({mark!r})\n" for source, _ in cells)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"}
    environment.pop("XLA_FLAGS", None)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    for printed, (_, saved) in zip(run.stdout.split(f"{mark}\n"), cells, strict=False):
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", saved)
        for now, then in zip(NUMBER.findall(printed), NUMBER.findall(saved), strict=True):
            near = abs(float(now) - float(then)) <= CLOSE * abs(float(then))
            assert near or max(float(now), float(then)) < TINY, (printed, saved)
