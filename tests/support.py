"""Where the tests find golden vectors and real data, and what needs the TPU compiler."""

import importlib.util
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu compiles for TPUs; its wheel is Linux x86-64's"
)


def golden_dir() -> Path:
    """The golden vectors: $ROSD_GOLDEN_DIR, or the set that ships with the tests."""
    return Path(os.environ.get("ROSD_GOLDEN_DIR", ROOT / "tests" / "golden"))


def data_dir(*parts: str) -> Path:
    """A file or folder of the real data under $ROSD_DATA_DIR; skips the test where it is absent."""
    path = Path(os.environ.get("ROSD_DATA_DIR", ROOT.parent / "shared" / "data")).joinpath(*parts)
    if not path.exists():
        pytest.skip(f"real data not at hand: {path} (set ROSD_DATA_DIR)")
    return path
