"""The model that the quickstart starts from: its reflector is exact, its solver leaves room."""

import pytest

from benchmarks.gym_reflector import measure
from support import ROOT


@pytest.mark.optimized
@pytest.mark.slow
def test_the_reflector_is_exact_and_the_solver_is_not():
    shares = measure(str(ROOT / "models" / "gym"), count=64)
    assert shares["exact"] >= 0.9
    assert 0.3 < shares["chain"] < 0.8
    assert shares["idea"] > 0.4
