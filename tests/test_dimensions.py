"""Array names end in letters of dimensions; modules of model, engine and kernels explain them at the head."""

import ast
import re

import pytest

from support import ROOT

MODULES = sorted(
    path
    for folder in (
        "rosd_jax/rollout",
        "kernels/paged_attention",
        "kernels/topk_jsd",
        "kernels/flash_attention",
    )
    for path in (ROOT / folder).glob("*.py")
    if path.name != "__init__.py"
)
MODULES += [ROOT / "rosd_jax" / "models" / name for name in ("qwen3.py", "decoder.py")]
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
