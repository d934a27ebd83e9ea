"""Where tests find golden vectors and real data, what they share, and how they start the command."""

import fcntl
import importlib.util
import os
import shutil
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs; its wheel is Linux x86-64's"
)

# Most programs take longer to compile than to run here, so XLA leaves most of its passes out.
# Its generator of code for fusions takes two thirds of the time that is left; later versions have no other.
QUICK_FLAGS = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib").startswith("0.10.") else ""
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": QUICK_FLAGS}


def run_environment(**changes: str) -> dict[str, str]:
    """Environment of a run on one CPU device that compiles quickly."""
    return os.environ | {"JAX_PLATFORMS": "cpu"} | QUICK | changes


def shared_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The session's temporary directory that all workers of pytest-xdist have in common."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def made_once(path: Path, make: Callable[[Path], object]) -> Path:
    """The directory that `make` fills, called by the first worker that needs it; others wait for it."""
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            try:
                make(path)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
    return path


def golden_dir() -> Path:
    """The golden vectors: $ROSD_GOLDEN_DIR, or the set that ships with the tests."""
    return Path(os.environ.get("ROSD_GOLDEN_DIR", ROOT / "tests" / "golden"))


def data_dir(*parts: str) -> Path:
    """A file or folder of the real data under $ROSD_DATA_DIR; skips the test where it is absent."""
    path = Path(os.environ.get("ROSD_DATA_DIR", ROOT.parent / "shared" / "data")).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data not at hand: {path} (set ROSD_DATA_DIR)")
    return path
