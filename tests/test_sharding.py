"""Every mesh of eight devices computes what one device computes, and wrong meshes are named."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rosd_jax.errors import UserError
from rosd_jax.models import qwen3, sharding
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.types import TrainState
from support import nightly_but

CONFIG = Qwen3Config(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=4,
    attention_bias=True,
)
TOKENS = np.random.default_rng(0).integers(0, 64, (8, 6)).astype(np.int32)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == 8]


def hidden_and_grads(params, tokens_BT):
    def loss(p):
        hidden = qwen3.hidden_states(p, CONFIG, tokens_BT)
        z = qwen3.logits(p, CONFIG, hidden)
        return -jax.nn.log_softmax(z)[..., 5].mean(), hidden

    grads, hidden = jax.grad(loss, has_aux=True)(params)
    return hidden, grads


@pytest.fixture(scope="module")
def params():
    shapes = qwen3.param_shapes(CONFIG)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0.1, 0.2, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def alone(params):
    return jax.device_get(jax.jit(hidden_and_grads)(params, TOKENS))


@pytest.mark.parametrize("shape", nightly_but(zip(SHAPES), keep=[0, 5]), ids=str)
def test_every_mesh_gives_the_hidden_states_and_gradients_of_one_device(shape, params, alone):
    mesh = sharding.make_mesh(*shape)
    sharding.validate_mesh_for(CONFIG, mesh)
    places, rows = sharding.param_shardings(params, mesh), sharding.row_sharding(mesh)
    assert sharding.replicated_dims(params, mesh) == []
    run = jax.jit(
        hidden_and_grads,
        in_shardings=(places, rows),
        out_shardings=(rows, places),
        compiler_options=QUICK,
    )
    with jax.set_mesh(mesh):
        hidden, grads = run(jax.device_put(params, places), jax.device_put(TOKENS, rows))
    np.testing.assert_allclose(hidden, alone[0], rtol=1e-4, atol=1e-5)

    def near(path, got, want):
        scale = np.abs(want).max()
        np.testing.assert_allclose(got, want, atol=3e-5 * scale, rtol=1e-4, err_msg=str(path))

    jax.tree_util.tree_map_with_path(near, grads, alone[1])


def test_matrices_are_really_split(params):
    mesh = sharding.make_mesh(1, 4, 2)
    placed = jax.device_put(params, sharding.param_shardings(params, mesh))

    def local(x):
        return x.addressable_shards[0].data.shape

    block = placed["blocks"]
    assert local(placed["embed"]) == local(placed["head"]) == (32, 4)
    assert local(block["attention"]["q_proj"]["kernel"]) == (2, 4, 32)
    assert local(block["attention"]["o_proj"]["kernel"]) == (2, 32, 4)
    assert local(block["down_proj"]["kernel"]) == (2, 16, 4)
    assert local(block["attention"]["q_proj"]["bias"]) == (2, 32)
    assert local(block["input_norm"]["scale"]) == (2, 16)


def test_optimizer_and_train_state_lie_where_their_parameters_lie(params):
    mesh = sharding.make_mesh(2, 2, 2)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(lambda: TrainState(jnp.int32(0), params, tx.init(params)))
    places = sharding.param_shardings(state, mesh)
    adam = places.opt_state[1][0]
    assert adam.mu == adam.nu == places.params == sharding.param_shardings(params, mesh)
    assert adam.count.spec == places.step.spec == P()


def test_a_dimension_that_does_not_divide_stays_whole_and_is_reported():
    config = CONFIG.replace(vocab_size=61, intermediate_size=33)
    shapes = qwen3.param_shapes(config)
    mesh = sharding.make_mesh(1, 4, 2)
    lines = sharding.replicated_dims(shapes, mesh)
    assert "embed: 61 is not divisible by mesh.tensor=2" in lines
    assert "blocks/down_proj/kernel: 33 is not divisible by mesh.tensor=2" in lines
    assert len(lines) == 5  # embed, head, gate, up, down
    assert sharding.param_shardings(shapes, mesh)["embed"].spec == P(None, "fsdp")


def test_a_leaf_without_a_rule_is_refused():
    with pytest.raises(KeyError, match="blocks/lora"):
        sharding.param_shardings({"blocks": {"lora": jnp.zeros((2, 3))}}, sharding.make_mesh(1, -1, 1))


@pytest.mark.parametrize("given", [(1, -1, 1), (-1, 2, 2), (2, 2, -1), (8, 1, 1)])
def test_minus_one_takes_the_remaining_devices(given):
    mesh = sharding.make_mesh(*given)
    assert mesh.size == 8 and mesh.axis_names == ("data", "fsdp", "tensor")
    assert all(n in (-1, got) for n, got in zip(given, mesh.shape.values(), strict=True))


@pytest.mark.parametrize("given", [(1, 1, 1), (3, -1, 1), (16, -1, 1), (2, 2, 4), (-1, -1, 1), (0, -1, 1)])
def test_a_mesh_that_does_not_fit_is_named(given):
    with pytest.raises(UserError, match=f"mesh.data={given[0]}, mesh.fsdp={given[1]}") as error:
        sharding.make_mesh(*given)
    assert "8" in str(error.value) or "at least 1" in str(error.value)


def test_a_subset_of_the_devices_may_be_named():
    assert sharding.make_mesh(1, -1, 1, devices=jax.devices()[:1]).size == 1


def test_heads_are_never_cut():
    mesh = sharding.make_mesh(1, 1, 8)
    with pytest.raises(UserError, match="mesh.tensor is 8.*num_key_value_heads, 4"):
        sharding.validate_mesh_for(CONFIG.replace(num_key_value_heads=4), mesh)


def test_training_splits_activations_by_rows():
    config = CONFIG.replace(hidden_size=48, num_hidden_layers=4)
    shapes = qwen3.param_shapes(config)
    tokens = jax.ShapeDtypeStruct((8, 48), np.int32)

    def loss(p, t):
        return qwen3.hidden_states(p, config, t).sum()

    def memory(count):
        mesh = sharding.make_mesh(1, -1, 1, devices=jax.devices()[:count])
        places = sharding.param_shardings(shapes, mesh), sharding.row_sharding(mesh)
        grad = jax.jit(jax.grad(loss), in_shardings=places, out_shardings=places[0], compiler_options=QUICK)
        with jax.set_mesh(mesh):
            return grad.lower(shapes, tokens).compile().memory_analysis().temp_size_in_bytes

    assert memory(8) < memory(1) / 4
