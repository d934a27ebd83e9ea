"""The house rules that a reader relies on: imports point down, files stay small, kernels stand alone."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest

from support import ROOT

FLOORS = [
    {"types", "errors", "atomic", "step_files", "shipped"},
    {"config", "config_file", "settings", "fields", "kernels"},
    {"models"},
    {"text"},
    {"data", "gym", "rollout", "rewards"},
    {"distill"},
    {"evals"},
    {"train", "hosts"},
    {"plan"},
    {"cli", "__main__"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PACKAGE = sorted(path for path in (ROOT / "rosd_jax").rglob("*.py") if "kernels" not in path.parts)
KERNELS = sorted((ROOT / "kernels").glob("*/*.py"))


def imports(path: Path) -> set[str]:
    """Every module that a file imports, with dots for relative ones."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def room(path: Path) -> str:
    return path.relative_to(ROOT / "rosd_jax").parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", PACKAGE, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    for name in imports(path):
        if name.startswith("rosd_jax."):
            target = name.split(".")[1]
            assert FLOOR[target] <= FLOOR[room(path)], f"{path} imports {name}"


def test_kernels_import_jax_and_themselves_only():
    for path in KERNELS:
        for name in imports(path):
            own = name.startswith(".") and not name.startswith("..")
            assert own or name.split(".")[0] in {"jax", "numpy", *sys.stdlib_module_names}, (path, name)


def test_kernels_are_reached_by_one_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "rosd_jax" / "kernels").resolve() == ROOT / "kernels"
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None  # a namespace at most: it cannot shadow another package
    for path in [*PACKAGE, *sorted((ROOT / "tests").glob("*.py"))]:
        assert not any(n == "kernels" or n.startswith("kernels.") for n in imports(path)), path


def test_transformers_has_one_importer():
    importers = [p.name for p in PACKAGE if any(n.startswith("transformers") for n in imports(p))]
    assert importers == ["tokenizer.py"]


def statements(node: ast.AST) -> int:
    """Statements below a module or a function, docstrings left out."""
    found = [child for child in ast.walk(node) if isinstance(child, ast.stmt) and child is not node]
    return sum(not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in found)


def nesting(node: ast.AST) -> int:
    """How deep blocks lie in each other; an elif counts as its if, and an inner function counts from zero."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef):
            continue
        is_elif = isinstance(node, ast.If) and [child] == node.orelse and isinstance(child, ast.If)
        block = isinstance(child, ast.If | ast.For | ast.While | ast.With | ast.Try) and not is_elif
        deepest = max(deepest, nesting(child) + block)
    return deepest


@pytest.mark.parametrize("path", [*PACKAGE, *KERNELS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path):
    tree = ast.parse(path.read_text())
    assert statements(tree) <= 320
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert statements(node) <= 60, f"{path.name}:{node.name}"
            assert nesting(node) <= 4, f"{path.name}:{node.name}"
