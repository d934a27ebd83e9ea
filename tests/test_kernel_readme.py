"""The examples of kernels/topk_jsd/README.md run as they stand, one after the other."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp

README = Path(__file__).parent.parent / "kernels" / "topk_jsd" / "README.md"


def test_examples_run():
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(examples) == 4
    names = {}
    with jax.numpy_dtype_promotion("standard"):  # as readers have it
        for example in examples:
            exec(compile(example, str(README), "exec"), names)
    value, losses = names["value"], names["losses"]
    assert value > 0 and names["aux"].chunks_run is None
    assert jnp.allclose(names["grad_NV"].sum(axis=1), 0, atol=1e-6)
    assert losses[-1] < losses[0]


def test_every_file_of_the_folder_is_named():
    text = README.read_text()
    assert all(f"`{path.name}`" in text for path in README.parent.glob("*.py") if path.name != "__init__.py")
