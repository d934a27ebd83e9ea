"""Where tests find golden vectors and real data, what they share, and the environment of their runs."""

import fcntl
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (wheels for Linux x86-64 only)"
)

# Most programs of the tests take longer to compile than to run, so XLA skips most of its passes.
# The fusion emitters take two thirds of the remaining compile time; later versions have no alternative.
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": QUICK_FLAGS}


def run_environment(**changes: str) -> dict[str, str]:
    """The environment of a run on CPU that compiles quickly."""
    return os.environ | {"JAX_PLATFORMS": "cpu"} | QUICK | changes


def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's temporary directory, shared by all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """The directory that `make` fills. The first worker that needs it calls `make`; others wait."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            try:
                make(path)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
    return path


def nightly_but(cases: Iterable, keep: Iterable[int]) -> list:
    """The cases of a parametrize line: those in `keep`, by number, run always, others nightly.

    As in parametrize, a tuple has a value for each argument. Tuples that are one argument each: zip(cases).
    """
    params = []
    kept = set(keep)
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        params.append(pytest.param(*values, marks=[] if number in kept else pytest.mark.nightly))
    assert kept <= set(range(len(params))), "keep numbers a case that is not there"
    return params


def golden_dir() -> Path:
    """The golden vectors: $ROSD_GOLDEN_DIR, or the set that ships with the tests."""
    return Path(os.environ.get("ROSD_GOLDEN_DIR", ROOT / "tests" / "golden"))


def data_dir(*parts: str) -> Path:
    """A file or folder of the real data under $ROSD_DATA_DIR; skips the test if it is missing."""
    path = Path(os.environ.get("ROSD_DATA_DIR", ROOT.parent / "shared" / "data")).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"no real data at {path} (set ROSD_DATA_DIR)")
    return path
