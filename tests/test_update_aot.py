"""The update compiled for TPU slices that are not there: on every mesh, and without T x T scores."""

from functools import cache

import jax
import pytest

from rosd_jax.config import default_config, validate
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import make_mesh
from rosd_jax.plan.chips import read_topology
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import make_optimizer, make_update
from support import NEEDS_LIBTPU, nightly_but

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.slow,
    NEEDS_LIBTPU,
]

NANO = Qwen3Config(
    vocab_size=2048,
    hidden_size=256,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=128,
    num_tokens=2000,
    dtype="bfloat16",
)
S, T = 1536, 3072
MESHES = [(1, 8, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2)]


@cache
def chips(topology: str):
    """One list for each topology: devices of two descriptions of it are not equal."""
    return read_topology(topology).devices


@cache
def lowered(shape: tuple[int, int, int], **fields):
    """The update's functions, lowered for eight chips."""
    config = default_config()
    config.loss.chunk = 256
    config.update_from_flattened_dict(fields)
    config = validate(config)
    model = NANO.replace(remat=config.model.remat)
    mesh = make_mesh(*shape, chips("v5p:2x2x2"))
    trees = Trees(config, model, mesh, make_optimizer(config))
    update = make_update(config, model, trees.optimizer, mesh, trees.shardings)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):  # as runs have it
        traced = update.trace(trees.like, trees.frozen_like, S, T)
        return {name: function.lower() for name, function in traced.items()}


@cache
def compiled(name: str, shape: tuple[int, int, int], **fields):
    """One of them, compiled once for all tests."""
    return lowered(shape, **fields)[name].compile()


def used(name: str, shape: tuple[int, int, int], **fields):
    """The memory that one of them takes on a chip."""
    return compiled(name, shape, **fields).memory_analysis()


@pytest.mark.parametrize("shape", nightly_but(zip(MESHES), keep=[3]))
def test_the_update_compiles_on_every_mesh_of_eight_chips(shape):
    programs = lowered(shape)
    heads = NANO.num_attention_heads // shape[2]
    for name, length in (("teach", T), ("learn", S)):
        assert "splash" in programs[name].as_text()
        temporaries = used(name, shape).temp_size_in_bytes
        assert temporaries < 4 * heads * length**2  # bytes that float32 scores of one layer would take
    for name in ("align", "apply"):
        compiled(name, shape)


def test_what_is_kept_off_the_chips_is_off_them():
    shape = (2, 2, 2)
    whole = used("teach", shape).argument_size_in_bytes
    host = used("teach", shape, **{"model.frozen": "host"})
    assert host.argument_size_in_bytes < whole / 4
    assert host.host_argument_size_in_bytes > whole / 2


@pytest.mark.nightly
@pytest.mark.parametrize("shape", nightly_but(zip([(1, 8, 1), (2, 2, 2)]), keep=[1]))
def test_adapters_take_no_memory_for_what_does_not_learn(shape):
    """No gradient, no moment and no float32 copy of a weight of the frozen model."""
    for name in ("learn", "apply"):
        whole, own = used(name, shape), used(name, shape, **{"model.lora.rank": 8})
        assert own.output_size_in_bytes < whole.output_size_in_bytes / 5
        assert own.argument_size_in_bytes < whole.argument_size_in_bytes * {"learn": 0.5, "apply": 0.2}[name]
        assert own.temp_size_in_bytes < 1.25 * whole.temp_size_in_bytes + 2**20
