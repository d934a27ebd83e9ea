"""Array names end in letters of dimensions, which modules of model, step, engine and kernels explain."""

import ast
import re

import pytest

from support import ROOT

WHERE = (
    "rosd_jax/types.py",
    "rosd_jax/models/qwen3.py",
    "rosd_jax/models/decoder.py",
    "rosd_jax/train/step.py",
    "rosd_jax/train/update.py",
    "rosd_jax/train/microbatches.py",
    "rosd_jax/rollout/*.py",
    "kernels/paged_attention/*.py",
    "kernels/topk_jsd/*.py",
    "kernels/flash_attention/*.py",
)
MODULES = sorted(path for where in WHERE for path in ROOT.glob(where) if path.name != "__init__.py")
NAME = re.compile(r"[a-z][a-z0-9_]*_([A-Za-z0-9]*[A-Z][A-Za-z0-9]*)")


def suffixes(tree):
    """The letters that names of arguments, variables and fields end in."""
    for node in ast.walk(tree):
        name = getattr(node, "arg", None) or getattr(node, "id", None) or getattr(node, "attr", None)
        found = isinstance(name, str) and NAME.fullmatch(name)
        if found:
            yield name, re.sub(r"\d", "", found.group(1))


def key(docstring):
    """The letters that the paragraph "Dimensions: B rows, ..." explains, each once."""
    found = re.search(r"^Dimensions: (.*?)(?:\n\n|\Z)", docstring, re.DOTALL | re.MULTILINE)
    if not found:
        return []
    parts = re.split(r"[,;] (?:of the cache |and )?", " ".join(found.group(1).split()))
    return [part[0] for part in parts if re.match(r"[A-Za-z] ", part)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_letter_is_explained_once(path):
    tree = ast.parse(path.read_text())
    letters = key(ast.get_docstring(tree) or "")
    assert len(letters) == len(set(letters)), letters
    unknown = sorted({name for name, suffix in suffixes(tree) if set(suffix) - set(letters)})
    assert not unknown
    used = set().union(*(suffix for _, suffix in suffixes(tree)))
    assert set(letters) <= used, sorted(set(letters) - used)
