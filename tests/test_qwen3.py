"""What the model promises: decoding equals the full forward, depth is free, padding is out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosd_jax.kernels.flash_attention import xla
from rosd_jax.models import decoder, qwen3
from rosd_jax.models.qwen3 import Qwen3Config
from support import nightly_but

SMALL = Qwen3Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,  # not hidden_size / heads, as in the released models
)
TOKENS = np.random.default_rng(0).integers(0, 61, (3, 11)).astype(np.int32)
FIRST = np.array([0, 3, 6], np.int32)  # page of each row's prompt


def params_of(config: Qwen3Config):
    """Random parameters far from initialisation: scales off 1, biases off 0."""
    shapes = qwen3.param_shapes(config)
    rng = np.random.default_rng(1)

    def draw(path, x):
        return rng.normal(path[-1].key == "scale", 0.2, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def full_logits(params, config, tokens_BT):
    hidden = jax.jit(qwen3.hidden_states, static_argnums=1)(params, config, tokens_BT)
    return np.asarray(qwen3.logits(params, config, hidden))


def decoding(params, config):
    """The decoder's weights, an empty cache with pages of 3, and tables: three pages a prompt, one a row."""
    width = 2 * config.num_key_value_heads, config.head_dim
    cache = jnp.zeros((config.num_hidden_layers * 12, 3, *width), config.dtype)
    table = np.concatenate([np.arange(9).reshape(3, 3), np.arange(9, 12)[:, None]], axis=1)
    return decoder.fuse(params, config), cache, jnp.asarray(table, jnp.int32)


@pytest.mark.parametrize("kv_heads,bias,tied", [(4, False, False), (2, True, False), (1, False, True)])
def test_prefill_and_decode_equal_the_full_forward_on_rows_of_unequal_length(kv_heads, bias, tied):
    config = SMALL.replace(num_key_value_heads=kv_heads, attention_bias=bias, tie_word_embeddings=tied)
    params = params_of(config)
    length_B = np.array([2, 5, 7], np.int32)  # of the prompts; what lies beyond is padding
    prompt = np.where(np.arange(7) < length_B[:, None], TOKENS[:, :7], 0)
    want = full_logits(params, config, TOKENS)

    weights, cache, table = decoding(params, config)
    how = decoder.Decoder(config)
    prompts = decoder.PromptInputs(prompt, length_B, FIRST)
    cache = jax.jit(decoder.prefill_step, static_argnums=0)(how, weights, prompts, cache)
    step = jax.jit(decoder.decode_step, static_argnums=0)
    for i in range(-1, 4):  # from the prompts' last tokens on
        position = length_B + i
        token = np.take_along_axis(TOKENS, position[:, None], 1)[:, 0]
        hidden, cache = step(how, weights, decoder.StepInputs(token, position, table), cache)
        got = np.asarray(decoder.local_logits(how, weights, hidden)[0])
        np.testing.assert_allclose(got, want[np.arange(3), position], atol=1e-5)


def test_padding_and_later_tokens_do_not_change_earlier_positions():
    params = params_of(SMALL)
    other = TOKENS.copy()
    other[:, 6:] = 7
    a, b = (full_logits(params, SMALL, t) for t in (TOKENS, other))
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert np.abs(a[:, 6:] - b[:, 6:]).max() > 0.1


def count_equations(jaxpr) -> int:
    return sum(1 + sum(map(count_equations, inner_jaxprs(e.params))) for e in jaxpr.eqns)


def inner_jaxprs(params):
    def held(x):
        return hasattr(x, "eqns") or hasattr(x, "jaxpr")

    for leaf in filter(held, jax.tree.leaves(params, is_leaf=held)):
        yield leaf if hasattr(leaf, "eqns") else leaf.jaxpr


def programs(config: Qwen3Config):
    """The jaxprs of a training pass, a prefill and a decoding step."""
    params = qwen3.param_shapes(config)

    def loss(p):
        return qwen3.hidden_states(p, config, TOKENS).sum()

    yield jax.make_jaxpr(jax.grad(loss))(params)
    _, cache, table = jax.eval_shape(lambda p: decoding(p, config), params)

    how = decoder.Decoder(config)

    def prefill(p, cache):
        prompts = decoder.PromptInputs(TOKENS, FIRST, FIRST)
        return decoder.prefill_step(how, decoder.fuse(p, config), prompts, cache)

    yield jax.make_jaxpr(prefill)(params, cache)

    def step(p, cache, table):
        inputs = decoder.StepInputs(TOKENS[:, 0], TOKENS[:, 0], table)
        return decoder.decode_step(how, decoder.fuse(p, config), inputs, cache)

    yield jax.make_jaxpr(step)(params, cache, table)


@pytest.mark.parametrize("remat", ["none", "block", "attention", "offload"])
def test_program_size_does_not_grow_with_depth(remat):
    shallow, deep = (
        [count_equations(p.jaxpr) for p in programs(SMALL.replace(num_hidden_layers=n, remat=remat))]
        for n in (2, 6)
    )
    assert shallow == deep
    assert min(shallow) > 50  # the scanned block itself was counted


def test_padded_vocabulary_rows_are_never_likely():
    config = SMALL.replace(num_tokens=50)
    z = full_logits(params_of(config), config, TOKENS)
    assert z.dtype == np.float32 and z.shape == (3, 11, 61)
    assert np.all(z[..., 50:] == -np.inf) and np.all(np.isfinite(z[..., :50]))
    whole = full_logits(params_of(config), SMALL, TOKENS)
    np.testing.assert_array_equal(z[..., :50], whole[..., :50])


@pytest.mark.parametrize("remat", nightly_but(["block", "attention", "offload"], keep=[0]))
def test_every_parameter_gets_a_gradient_and_remat_gives_the_same(remat):
    config = SMALL.replace(attention_bias=True)
    params = params_of(config)

    def grads(config):
        def loss(p):
            z = qwen3.logits(p, config, qwen3.hidden_states(p, config, TOKENS))
            return jax.nn.logsumexp(z, axis=-1).sum() - z[..., 3].sum()

        return jax.jit(jax.grad(loss))(params)

    plain, again = grads(config), grads(config.replace(remat=remat))
    for path, g in jax.tree_util.tree_leaves_with_path(plain):
        assert np.abs(g).max() > 1e-4, path
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), plain, again)


def test_long_prompts_are_prefilled_as_short_ones(monkeypatch):
    params = params_of(SMALL)
    weights, cache, _ = decoding(params, SMALL)
    prompts = decoder.PromptInputs(TOKENS[:, :6], np.full(3, 6), FIRST)
    at_once = decoder.prefill_step(decoder.Decoder(SMALL), weights, prompts, cache)
    monkeypatch.setattr(xla, "QUERY_BLOCK", 2)
    in_pieces = decoder.prefill_step(decoder.Decoder(SMALL), weights, prompts, cache)
    np.testing.assert_allclose(in_pieces, at_once, atol=5e-6, rtol=0)  # processors round differently
    assert np.abs(np.asarray(at_once)).max() > 0.1


@jax.numpy_dtype_promotion("standard")  # JAX's own attention promotes bfloat16 to float32
def test_bfloat16_activations_stay_near_float32_and_parameters_stay_float32():
    config = SMALL.replace(dtype="bfloat16", remat="block")
    params = params_of(config)
    z, exact = full_logits(params, config, TOKENS), full_logits(params, SMALL, TOKENS)
    assert z.dtype == np.float32
    assert np.abs(z - exact).max() < 0.1 * np.abs(exact).max()
    weights, cache, table = decoding(params, config)
    how = decoder.Decoder(config)
    prompts = decoder.PromptInputs(TOKENS[:, :7], np.full(3, 7), FIRST)
    cache = jax.jit(decoder.prefill_step, static_argnums=0)(how, weights, prompts, cache)
    inputs = decoder.StepInputs(TOKENS[:, 5], jnp.full(3, 5, jnp.int32), table)
    hidden, cache = jax.jit(decoder.decode_step, static_argnums=0)(how, weights, inputs, cache)
    assert hidden.dtype == cache.dtype == jnp.bfloat16
    assert np.abs(np.asarray(decoder.local_logits(how, weights, hidden)[0]) - z[:, 5]).max() < 0.2
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}


def test_rotation_depends_on_distance_only_and_keeps_norms():
    q, k = np.random.default_rng(1).normal(size=(2, 1, 1, 1, 16)).astype(np.float32)

    def turn(x, n):
        return np.asarray(qwen3.rotate(jnp.asarray(x), jnp.full((1, 1), n), 1e4))

    dots = [float((turn(q, n + 3) * turn(k, n)).sum()) for n in (0, 1, 50, 1000)]
    np.testing.assert_allclose(dots, dots[0], atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(turn(q, 77)), np.linalg.norm(q), rtol=1e-6)
    assert abs(dots[0] - float((q * k).sum())) > 1e-2
