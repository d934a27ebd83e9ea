"""Strict numerics for every test: no silent dtype promotion, eight simulated CPU devices."""

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

jax.devices()  # reads the flags, of which the TPU compiler, which reads them later, may not know all
os.environ["XLA_FLAGS"] = FLAGS

jax.config.update("jax_numpy_dtype_promotion", "strict")
# As QUICK does for runs.
jax.config.update("jax_disable_most_optimizations", True)

# A shell's background job starts with Ctrl-C ignored, and so would the runs that tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items):
    """Files with slow tests come first, so that the workers of pytest-xdist end at about the same time."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: slow[item.path], reverse=True)


@pytest.fixture(autouse=True)
def optimized_programs(request):
    """All of XLA's passes for the tests that are marked `optimized`."""
    jax.config.update("jax_disable_most_optimizations", request.node.get_closest_marker("optimized") is None)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True)
def own_matmul_precision():
    """A run of a float32 model raises it for its process, which the tests share."""
    before = jax.config.jax_default_matmul_precision
    yield
    jax.config.update("jax_default_matmul_precision", before)


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Environment under which runs keep their compiled programs, where a test is not about compiling."""
    return dict(
        JAX_COMPILATION_CACHE_DIR=str(shared_dir(tmp_path_factory) / "compiled" / processor()),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
        JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="0",
    )
