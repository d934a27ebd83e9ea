"""The update compiled for TPU slices that are not there: on every mesh, and without T x T scores."""

import importlib.util
import os
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from rosd_jax.config import default_config
from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.models.sharding import make_mesh, param_shardings, row_sharding
from rosd_jax.train.update import init_state, make_optimizer, make_update
from rosd_jax.types import Lesson

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="libtpu compiles for TPUs; its wheel is Linux x86-64's",
    ),
]

COMPILE_ONLY = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
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
    remat=True,
)
ROWS, MICRO, PROMPT, TEACHER, RESPONSE = 32, 8, 256, 1024, 2048
LONGEST = TEACHER + RESPONSE


def abstract(tree, shardings):
    put = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    return jax.tree.map(put, tree, shardings)


def lesson_shapes():
    ints = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    floats = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    return Lesson(
        prompt_BP=ints(ROWS, PROMPT),
        prompt_len_B=ints(ROWS),
        teacher_prompt_BQ=ints(ROWS, TEACHER),
        teacher_prompt_len_B=ints(ROWS),
        response_BR=ints(ROWS, RESPONSE),
        response_len_B=ints(ROWS),
        weight_BR=floats(ROWS, RESPONSE),
        sampler_logp_BR=floats(ROWS, RESPONSE),
    )


def lowered(topology: str, shape: tuple[int, int, int]):
    os.environ.update(COMPILE_ONLY)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(*shape, devices)
    config = default_config()
    config.batch.micro = MICRO
    config.loss.chunk = 256
    params = jax.eval_shape(partial(init_params, NANO), jax.random.key(0))
    optimizer = make_optimizer(config)
    state = jax.eval_shape(lambda p: init_state(p, optimizer), params)
    places = param_shardings(state, mesh)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), params)
    lesson = lesson_shapes()
    rows = jax.tree.map(lambda _: row_sharding(mesh), lesson)
    update = make_update(config, NANO, optimizer, mesh, places)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):  # as runs have it
        return update.lower(abstract(state, places), abstract(frozen, places.params), abstract(lesson, rows))


@pytest.mark.parametrize("shape", [(1, 8, 1), (8, 1, 1), (1, 4, 2), (2, 2, 2)])
def test_the_update_compiles_on_every_mesh_of_eight_chips(shape):
    program = lowered("v5p:2x2x2", shape)
    assert "splash" in program.as_text()
    memory = program.compile().memory_analysis()
    rows = MICRO // (shape[0] * shape[1])  # a micro-batch's, on one chip
    heads = NANO.num_attention_heads // shape[2]
    scores = 4 * rows * heads * LONGEST**2  # bytes that float32 scores of one layer would take
    assert memory.temp_size_in_bytes < scores
