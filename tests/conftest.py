"""JAX's configuration for all tests: strict dtype promotion, eight simulated CPU devices, few XLA passes."""

import gc
import os
import signal
from collections import Counter

from support import QUICK_FLAGS, shared_dir

os.environ.setdefault("JAX_PLATFORMS", "cpu")
FLAGS = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["XLA_FLAGS"] = f"{FLAGS} {QUICK_FLAGS}"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax  # noqa: E402
import pytest  # noqa: E402

from rosd_jax.train.compiling import processor  # noqa: E402

# This reads XLA_FLAGS. The TPU compiler reads them later, and may not know QUICK_FLAGS.
jax.devices()
os.environ["XLA_FLAGS"] = FLAGS

jax.config.update("jax_numpy_dtype_promotion", "strict")
# In runs, QUICK of support.py sets this.
jax.config.update("jax_disable_most_optimizations", True)

# A background job of a shell ignores Ctrl-C, and the runs that tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(trylast=True)  # when -m has chosen
def pytest_collection_modifyitems(items):
    """Runs files with slow tests first, so that the workers of pytest-xdist end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: slow[item.path], reverse=True)


@pytest.fixture(autouse=True)
def optimized_programs(request):
    """Enables all XLA passes for tests marked `optimized`."""
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("optimized") is None)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def own_programs():
    """Frees a file's compiled programs after its tests.

    Each of them has three memory maps or more, and the programs of some files have thousands. Linux allows a
    process 65,530; one that needs another is aborted.
    """
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(autouse=True)
def own_matmul_precision():
    """Restores the matmul precision, which a run of a float32 model raises for the whole process."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Environment that lets runs share compiled programs, for tests that are not about compiling."""
    return dict(
        JAX_COMPILATION_CACHE_DIR=str(shared_dir(tmp_path_factory) / "compiled" / processor()),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
    )
