"""The documentation: links lead somewhere, the site builds, and pages name what there is and nothing else."""

import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from rosd_jax.distill.ablation import count
from rosd_jax.evals.evaluate import score_set
from rosd_jax.evals.outcome import CONDITIONS, PROBLEMS
from rosd_jax.fields import describe
from rosd_jax.gym.metric import quote_exact
from rosd_jax.rewards import Grade
from rosd_jax.rollout.bandwidth import MemoryRoofline
from rosd_jax.settings import AblationSettings
from rosd_jax.train.numbers import of_advantages, of_decoding, of_reflections, of_rollouts
from rosd_jax.train.update import SUMS, summarise
from rosd_jax.types import Graded, Problem, Prompts, Reflected, Reflection, Rollout
from support import ROOT, run_environment

DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *(ROOT / "kernels").glob("*/README.md")])
HISTORY = {"CHANGELOG.md", "log.md"}  # name what is no more
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.M | re.S)
INDENTED = re.compile(r"^ {4}.*$", re.M)
LINK = re.compile(r"\[[^\]]*\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.M)
CODE = re.compile(r"`([^`\n]+)`")
FIELDS = {field.name for field in describe()}
SECTIONS = {name.rpartition(".")[0] for name in FIELDS} - {""}
KNOWN = FIELDS | SECTIONS | {"model.safetensors", "validation.jsonl"}  # these two are files
ANY_SECTION = "|".join(map(re.escape, SECTIONS))
NAMED = re.compile(rf"(?:--config\.)?((?:{ANY_SECTION})(?:\.[a-z]\w*)+)(?=[= ]|$)")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """The text of a page without its blocks of code."""
    return INDENTED.sub("", FENCE.sub("", page.read_text()))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings by GitHub's rule: the second of two equal ones ends in -1."""
    found: dict[str, int] = {}
    for heading in HEADING.findall(prose(page)):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found[slug] = found.get(slug, 0) + 1
    return {f"{slug}-{n}" if n else slug for slug, count in found.items() for n in range(count)}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_site_builds(tmp_path):
    """Strictly: a page that the navigation lacks, a link to no page, or to no heading, is an error."""
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"]
    done = subprocess.run(build, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loss = (tmp_path / "site" / "api" / "loss.html").read_text()
    assert "ids from here on are padding rows of the heads" in loss  # from a docstring
    records = (tmp_path / "site" / "api" / "records.html").read_text()
    assert "ended with a stop token or string" in records  # from a comment


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in HISTORY], ids=page_id)
def test_fields_of_the_config_exist(page):
    for code in CODE.findall(prose(page)):
        named = NAMED.match(code)
        assert named is None or named[1] in KNOWN, code


# ---- metrics.md

PROBLEM = Problem("toy/0", "toy", "mcq", ({"role": "user", "content": "A?"},), "A")
ROLLOUT = Rollout(np.ones((1, 2), np.int32), np.array([2]), np.zeros((1, 2), np.float32), np.array([True]))


def train_metrics() -> set[str]:
    """The names in a train line, from the functions that make them."""
    graded = Graded(Prompts((PROBLEM,), ([1],)), ROLLOUT, ("A",), np.ones(1, np.float32), thinking_open=False)
    reflected = Reflected(graded, (Reflection(note="all_right"),))
    one = jnp.ones(())
    found = of_rollouts(graded) | of_reflections(reflected, np.zeros((1, 2))) | quote_exact(reflected)
    found |= of_advantages(np.zeros(1)) | count((), AblationSettings(moved_spans=1.0, swapped_ideas=1.0))
    found |= summarise(dict.fromkeys(SUMS, one), one, one, one, jnp.array(True), jnp.array(False))
    for stage in ("rollout", "reflect"):
        found |= of_decoding(None, MemoryRoofline(1.0, 1.0, 1.0), 1.0, stage)
    source = "".join((ROOT / "rosd_jax" / "train" / name).read_text() for name in ("step.py", "loop.py"))
    stages = {f"seconds_{stage}" for stage in re.findall(r'with clock\("(\w+)"\)', source)}
    return {*found, *stages, *re.findall(r'\bnumbers\["(\w+)"\](?=.* = )', source)}


def evaluation_metrics() -> set[str]:
    """The names in an evaluation line."""
    found, _ = score_set([PROBLEM], ROLLOUT, ["A"], [Grade(1.0, "A", True)], ["A"])
    return {*found, *CONDITIONS, PROBLEMS}


@pytest.mark.parametrize(
    ("begin", "end", "made"),
    [
        ("## Train lines", "## Evaluation lines", train_metrics),
        ("## Evaluation lines", "## What a collapse", evaluation_metrics),
    ],
    ids=["train", "evaluation"],
)
def test_every_metric_is_explained(begin, end, made):
    part = (DOCS / "metrics.md").read_text().partition(begin)[2].partition(end)[0]
    explained = [name for cell in re.findall(r"^\| (`.*?`) \|", part, re.M) for name in CODE.findall(cell)]
    assert len(explained) == len(set(explained))
    assert set(explained) == made()


# ---- first_hour.md


def test_your_own_problems_in_the_first_hour(tmp_path):
    """The files of that section, and what --mode=data prints of them."""
    page = (DOCS / "first_hour.md").read_text().partition("## Your own problems")[2]
    (tmp_path / "mine").mkdir()
    for name in ("make_data.py", "reward.py"):
        code = FENCE.search(page.partition(f"`mine/{name}`:")[2])
        (tmp_path / "mine" / name).write_text(code[1])
    printed = re.search(r"^```text\n(.*?)^```$", page, re.M | re.S)[1]
    environment = run_environment(PYTHONPATH="mine")
    subprocess.run([sys.executable, "mine/make_data.py"], cwd=tmp_path, env=environment, check=True)
    flags = re.findall(
        r"(--config\.(?:data|eval|validation|rewards)[^ \n]*)", page.partition("--mode=data")[0]
    )
    command = [
        ROOT / "run.py",
        f"--config={ROOT}/configs/quickstart.py",
        f"--config.model.path={ROOT}/models/gym",
    ]
    done = subprocess.run(
        [sys.executable, *command, *flags, "--mode=data"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert len(flags) == 4 and done.stdout == printed
