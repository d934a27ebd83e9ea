"""The package as other projects install it: built, unpacked and used from another directory."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest

from support import ROOT

USE = """
import jax.numpy as jnp, rosd_jax
from rosd_jax.kernels.topk_jsd import topk_jsd_loss
h, w = jnp.ones((3, 4)), jnp.eye(6, 4)
loss, aux = topk_jsd_loss(h, w, h, w, jnp.ones(3), k=2)
assert abs(float(loss)) < 1e-6, loss
print(rosd_jax.__file__)
"""


@pytest.mark.slow
def test_the_wheel_works_from_another_directory(tmp_path):
    source = tmp_path / "source"  # a copy: building writes next to the code
    kept = shutil.ignore_patterns(".*", "build", "*.egg-info", "golden", "runs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=kept)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", tmp_path, source], check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("rosd_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    assert "rosd_jax/evals/page.html" in names
    assert not [name for name in names if name.startswith(("kernels/", "tests/", "configs/"))]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    used = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert used.stdout.strip().startswith(str(tmp_path))
