"""The commands that install: each resolves on every Python, and the demo takes the accelerator it finds.

Resolving needs the package index; it reads what packages ask for and downloads none of the large ones
(by range requests where the index does not serve that by itself).
"""

import contextlib
import functools
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

LINES = re.findall(r"^    \.venv/bin/pip (install .*?)  +# (.*)$", (ROOT / "README.md").read_text(), re.M)
PLUGINS = {"tpu": "libtpu", "cuda12": "jax-cuda12-plugin", "cuda13": "jax-cuda13-plugin"}
VERSIONS = ("3.11", "3.12", "3.13")
ON_LINUX = (sys.platform, platform.machine()) == ("linux", "x86_64")
ENVS = Path.home() / ".cache" / "rosd_jax" / "test-envs"


def test_the_readme_has_one_line_for_each_machine():
    extras = {tuple(re.findall(r"jax\[(\w+)\]", line)) for line, _ in LINES}
    assert len(LINES) == 4 and extras == {(), *((extra,) for extra in PLUGINS)}
    for line, _ in LINES:
        assert line.endswith("-r requirements.txt -c requirements-lock.txt")


def find_python(version):
    """A Python of this version that runs; skips the test where there is none."""
    places = [shutil.which(f"python{version}"), *Path.home().glob(f".pyenv/versions/{version}.*/bin/python")]
    for place in places:
        if place and subprocess.run([place, "-c", ""], capture_output=True).returncode == 0:
            return str(place)
    pytest.skip(f"no Python {version} is installed")


@functools.cache
def new_pip(version):
    """A current pip for this Python; skips where the index cannot be reached."""
    home = ENVS / f"pip-py{version}"
    command = [home / "bin" / "python", "-m", "pip"]
    if not (home / "whole").exists():
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([find_python(version), "-m", "venv", home], check=True)
        made = subprocess.run([*command, "install", "-q", "--upgrade", "pip"], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"the package index cannot be reached: {made.stderr.strip().splitlines()[-1]}")
        (home / "whole").touch()
    return command


def locked(version):
    """Package -> the version that the lock names for this Python on Linux."""
    named = {}
    for line in (ROOT / "requirements-lock.txt").read_text().splitlines():
        requirement, _, marker = line.partition(";")
        old = version == "3.11"
        applies = ('< "3.12"' not in marker or old) and ('>= "3.12"' not in marker or not old)
        if "==" in requirement and applies:
            name, _, number = requirement.strip().partition("==")
            named[name.lower()] = number
    return named


@pytest.fixture(scope="module")
def resolving():
    """A pip for each installed Python, all at the same time: they wait for the index, not for the CPU."""
    # All lines at once: versions that suit their union suit each of them.
    packages = {word for line, _ in LINES for word in shlex.split(line) if word.startswith("jax[")}
    options = ["--dry-run", "--ignore-installed", "--use-feature=fast-deps"]
    files = ["-r", "requirements.txt", "-c", "requirements-lock.txt"]
    arguments = ["install", *options, *sorted(packages), *files]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = {}
    for version in VERSIONS:
        with contextlib.suppress(pytest.skip.Exception):
            started[version] = subprocess.Popen([*new_pip(version), *arguments], cwd=ROOT, **pipes)
    yield started
    for process in started.values():
        process.kill()
        process.communicate()


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.skipif(not ON_LINUX, reason="the wheels for accelerators are Linux x86-64's")
@pytest.mark.parametrize("version", VERSIONS)
def test_the_readmes_lines_resolve(version, resolving):
    new_pip(version)  # skips, with the reason, where there is none
    printed, errors = resolving[version].communicate()
    assert resolving[version].returncode == 0, errors[-3000:]
    chosen = re.search(r"^Would install (.*)$", printed, re.M)[1].lower().replace("_", "-").split()
    lock = locked(version)
    for name in ("jax", "jaxlib", "transformers"):
        assert f"{name}-{lock[name]}" in chosen
    for name in PLUGINS.values():
        assert any(package.startswith(f"{name}-") for package in chosen), name


@pytest.mark.parametrize(
    ("accelerators", "asked", "platforms"),
    [("", None, "cpu"), ("/dev/nvidia0", None, ""), ("/dev/nvidia0", "cpu", "cpu"), ("", "tpu", "tpu")],
)
def test_the_demo_runs_on_the_accelerator_that_is_there(accelerators, asked, platforms, tmp_path):
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "platforms=$JAX_PLATFORMS"\n')
    python.chmod(0o755)
    (tmp_path / ".installed").touch()
    env = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "MAKEFLAGS")}
    env |= {"JAX_PLATFORMS": asked} if asked else {}
    command = ["make", "-s", "demo", f"BIN={tmp_path}", f"ACCELERATORS={accelerators}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"platforms={platforms}"
