"""The package as other projects install it: built, unpacked and used from another directory."""

import os
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from support import ROOT

# `sys.modules[name] = None` makes an import of that package fail.
USE = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
import jax.numpy as jnp, rosd_jax
from rosd_jax.kernels.topk_jsd import topk_jsd_loss
h, w = jnp.ones((3, 4)), jnp.eye(6, 4)
loss, aux = topk_jsd_loss(h, w, h, w, jnp.ones(3), k=2)
assert abs(float(loss)) < 1e-6, loss
print(rosd_jax.__file__)
"""

IMPORTED_AS = {"absl-py": "absl", "orbax-checkpoint": "orbax", "math-verify": "math_verify"}


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
    (metadata,) = (tmp_path / "site").glob("rosd_jax-*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata.read_text(), re.M)
    assert needed == ["jax", "numpy"]
    extra = re.findall(r"^Requires-Dist: ([\w-]+).*extra == .train.$", metadata.read_text(), re.M)
    asked = re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M)
    assert sorted(extra) == sorted(asked)
    others = [IMPORTED_AS.get(name, name.replace("-", "_")) for name in asked if name not in needed]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    used = subprocess.run(
        [sys.executable, "-c", USE, *others],
        cwd=tmp_path,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    assert used.stdout.strip().startswith(str(tmp_path))
