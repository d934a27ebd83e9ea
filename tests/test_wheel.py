"""The package as other projects install it: built, unpacked and used from another directory."""

import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest

from support import ROOT, run_environment

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

COMMAND = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
from rosd_jax.__main__ import main
main()
"""

CORE = ["jax", "numpy"]
IMPORTED_AS = {"absl-py": "absl", "orbax-checkpoint": "orbax", "math-verify": "math_verify"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A directory into which the wheel is unpacked."""
    directory = tmp_path_factory.mktemp("wheel")
    source = directory / "source"  # a copy: building writes next to the code
    kept = shutil.ignore_patterns(".*", "build", "*.egg-info", "golden", "runs")
    shutil.copytree(ROOT, source, symlinks=True, ignore=kept)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    subprocess.run([*build, "-w", directory, source], check=True, capture_output=True, text=True)
    (wheel,) = directory.glob("rosd_jax-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(directory / "site")
    return directory / "site"


def python(site, directory, *arguments):
    """Runs Python in another directory, with the package from `site`."""
    environment = run_environment(PYTHONPATH=str(site))
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def required():
    return re.findall(r"^[\w-]+", (ROOT / "requirements.txt").read_text(), re.M)


def imported_names():
    """The names under which what only training needs is imported."""
    return [IMPORTED_AS.get(name, name.replace("-", "_")) for name in required() if name not in CORE]


def test_the_wheel_holds_the_package_alone_and_names_what_it_needs(site):
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"rosd_jax"}
    assert (site / "rosd_jax" / "evals" / "page.html").is_file()
    (metadata,) = site.glob("rosd_jax-*.dist-info/METADATA")
    needed = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata.read_text(), re.M)
    assert needed == CORE
    extra = re.findall(r"^Requires-Dist: ([\w-]+).*extra == .train.$", metadata.read_text(), re.M)
    assert sorted(extra) == sorted(required())
    (commands,) = site.glob("rosd_jax-*.dist-info/entry_points.txt")
    assert "rosd = rosd_jax.__main__:main" in commands.read_text()


def test_the_loss_of_the_wheel_needs_jax_alone(site, tmp_path):
    used = python(site, tmp_path, "-c", USE, *imported_names())
    assert used.returncode == 0, used.stderr
    assert used.stdout.strip().startswith(str(site))


def test_the_command_of_the_wheel_names_the_extra_that_it_lacks(site, tmp_path):
    used = python(site, tmp_path, "-c", COMMAND, *imported_names())
    assert used.returncode == 2
    assert used.stderr == (
        "error: training needs absl; install the checkout or the wheel with its extra `train`, as in "
        "pip install 'PATH[train]'\n"
    )


SHIPPED = [
    "--config=configs/quickstart.py:debug",
    "--config.eval.sets=gym:chain",
    "--config.validation.sets=",
]


def test_the_command_of_the_wheel_plans_the_shipped_config_in_any_directory(site, tmp_path):
    used = python(site, tmp_path, "-m", "rosd_jax", *SHIPPED, "--mode=plan")
    assert used.returncode == 0, used.stderr
    assert "2048 problems of gym:chain" in used.stdout and "weights     can be loaded" in used.stdout


@pytest.mark.nightly
@pytest.mark.slow
def test_the_command_of_the_wheel_runs_the_shipped_config_in_any_directory(site, tmp_path):
    used = python(site, tmp_path, "-m", "rosd_jax", *SHIPPED, "--mode=eval", "--workdir=run")
    assert used.returncode == 0, used.stderr
    assert "gym:chain" in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["model"]["path"].startswith(str(site))
