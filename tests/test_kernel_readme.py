"""The examples of the kernels' README files run as they stand, one after the other."""

import re

import jax
import jax.numpy as jnp
import pytest

from support import ROOT

FOLDERS = sorted(path.parent for path in (ROOT / "kernels").glob("*/README.md"))


def run_examples(name: str) -> dict:
    """The names that the examples of a folder's README leave."""
    readme = ROOT / "kernels" / name / "README.md"
    names: dict = {}
    with jax.numpy_dtype_promotion("standard"):  # as readers have it
        for example in re.findall(r"```python\n(.*?)```", readme.read_text(), re.DOTALL):
            exec(compile(example, str(readme), "exec"), names)
    return names


def test_examples_of_the_loss_run():
    names = run_examples("topk_jsd")
    value, losses = names["value"], names["losses"]
    assert value > 0 and names["aux"].chunks_run is None
    assert jnp.allclose(names["grad_NV"].sum(axis=1), 0, atol=1e-6)
    assert losses[-1] < losses[0]


def test_example_of_attention_runs():
    assert jnp.allclose(run_examples("flash_attention")["out_BTHE"], 1.0)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_file_of_a_folder_is_named(folder):
    text = (folder / "README.md").read_text()
    assert all(f"`{path.name}`" in text for path in folder.glob("*.py") if path.name != "__init__.py")
