"""The notebooks: their code runs from top to bottom, and prints what is saved in them."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

from support import ROOT

NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]\d+)?")
LARGEST_FILE = 100_000
# Rounding differs between machines, and compilers need more or less memory.
CLOSE = 0.25
TINY = 1e-5
MARK = "--- end of a cell ---"
# What rosd_colab.ipynb needs of the project.
PARTS = ("configs", "docs/step.svg", "kernels", "models", "requirements*.txt", "rosd_jax", "run.py")
# Run after the last cell of rosd_colab.ipynb: plans its last run, with the tiny model in place of Qwen3.
PLAN = """
model = HERE / "model"
data = HERE / "data"
run(*qwen_flags(model, take_slice(HERE / "rows.jsonl", data)), "--mode=plan", "--topology=h100:1")
"""


class Cell(NamedTuple):
    """A code cell as it is saved."""

    source: str
    printed: str  # what it prints in a plain Python
    tags: list[str]  # "varies": other digits on another machine; "run": also other lines


def code_cells(name: str) -> list[Cell]:
    cells = json.loads((ROOT / "notebooks" / name).read_text())["cells"]
    return [
        Cell("".join(c["source"]), "".join(map(printed, c["outputs"])), c["metadata"].get("tags", []))
        for c in cells
        if c["cell_type"] == "code"
    ]


def printed(output: dict) -> str:
    """The text of a saved output that a plain Python prints too. It shows no figures."""
    if output["output_type"] == "stream":
        return "".join(output["text"])
    data = output["data"]
    return "" if "image/png" in data else "".join(data["text/plain"]) + "\n"


def run_cells(cells: list[Cell], folder: Path, after: str = "", **environment: str) -> list[str]:
    """Runs the cells as one script in a folder; what each of them prints, and then what `after` does."""
    code = "".join(f"{cell.source}\nprint({MARK!r})\n" for cell in cells) + after
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"} | environment
    environment.pop("XLA_FLAGS", None)
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout.split(f"{MARK}\n")


def assert_alike(now: str, saved: str, close: float = CLOSE) -> None:
    assert NUMBER.sub("#", now) == NUMBER.sub("#", saved)
    for here, there in zip(NUMBER.findall(now), NUMBER.findall(saved), strict=True):
        near = abs(float(here) - float(there)) <= close * abs(float(there))
        assert near or max(float(here), float(there)) < TINY, (now, saved)


def zip_project(path: Path) -> None:
    """The project as GitHub's zip files have it: in one folder, with symbolic links."""
    with zipfile.ZipFile(path, "w") as archive:
        found = [file for part in PARTS for file in ROOT.glob(part)]
        found += [file for folder in found if folder.is_dir() for file in sorted(folder.rglob("*"))]
        for file in found:
            name = str("rosd_jax-main" / file.relative_to(ROOT))
            if file.is_symlink():
                link = zipfile.ZipInfo(name)
                link.create_system = 3  # Unix
                link.external_attr = 0o120777 << 16
                archive.writestr(link, os.readlink(file))
            elif file.is_file() and file.suffix != ".pyc":
                archive.write(file, name)


def write_stand_in(folder: Path) -> None:
    """A model directory and a file of problems, for the last run of rosd_colab.ipynb."""
    gym = ROOT / "models" / "gym"
    (folder / "model").mkdir()
    for file in gym.iterdir():
        (folder / "model" / file.name).write_bytes(file.read_bytes())
    config = json.loads((gym / "config.json").read_text()) | {"max_position_embeddings": 8192}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    rows = [{"prompt": f"{n % 17} +5", "answer": str((n + 5) % 17)} for n in range(60)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_notebooks_are_small():
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert path.stat().st_size < LARGEST_FILE, path


def test_what_a_model_wrote_is_shown_as_text(tmp_path):
    """The cell of rosd_colab.ipynb that shows a rollout as HTML."""
    hostile = "<script>alert('&')</script>"
    texts = dict.fromkeys(("response", "answer", "quote", "idea"), hostile)
    prompt = [{"role": "user", "content": hostile}]
    row = texts | dict(prompt=prompt, active_tokens=1, error_span_chars=[8, 13])
    (tmp_path / "rollouts").mkdir()
    (tmp_path / "rollouts" / "step_1.jsonl").write_text(50 * (json.dumps(row) + "\n"))
    [source] = [c.source for c in code_cells("rosd_colab.ipynb") if "EXAMPLE =" in c.source]
    shown = []
    exec(source, {"RUN": tmp_path, "show": lambda *content: shown.append(content)})
    [(kind, page, plain)] = shown
    assert kind == "text/html" and plain.count(hostile) == 4
    assert "<script" not in page and "alert" in page
    assert page.count("&lt;script&gt;") == 5


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss_in_your_project.ipynb"])
def test_a_notebook_prints_what_it_says(name, tmp_path):
    cells = code_cells(name)
    for now, cell in zip(run_cells(cells, tmp_path, PYTHONPATH=str(ROOT)), cells, strict=False):
        assert_alike(now, cell.printed)


@pytest.mark.nightly
@pytest.mark.slow
def test_the_colab_notebook_runs_from_an_uploaded_zip_file(tmp_path):
    """Its demo trains for all steps; the flags of its Qwen3 run parse, and the plan of that run fits."""
    zip_project(tmp_path / "rosd_jax-main.zip")
    write_stand_in(tmp_path)
    cells = code_cells("rosd_colab.ipynb")
    *texts, plan = run_cells(cells, tmp_path, PLAN)
    for now, cell in zip(texts, cells, strict=True):
        if "run" in cell.tags:
            assert run_lines(now) == run_lines(cell.printed)
        else:
            assert_alike(now, cell.printed, close=float("inf") if "varies" in cell.tags else CLOSE)
    assert "verdict     fits" in plan


def run_lines(text: str) -> list[str]:
    """The lines that a run prints on every machine, without their digits."""
    lines = [" ".join(line.split()) for line in text.splitlines()]
    lines = [line for line in lines if re.match(r"python run.py|step \d+/\d+ reward|eval|gym:", line)]
    return [re.sub(r"[\d.+-]+", "#", line) for line in lines]
