"""Both TPU implementations of the decoding step's attention, interpreted on CPU, against the definition."""

import importlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rosd_jax.kernels.paged_attention import Operands, pallas_tpu, tpu, write_and_attend, xla
from support import nightly_but

PAGE, E, WIDTH, LAYER = 4, 128, 9, 70  # positions a page, head width, pages of a table, pages of a layer
LENGTHS = [0, 1, PAGE - 1, PAGE, 0, PAGE + 1, 3 * PAGE, 0, 6 * PAGE + 2, WIDTH * PAGE, 2]


def operands(lengths, heads, kv_heads, dtype, seed=0):
    """Rows whose newest token is number `length` - 1, in layer 1 of a cache of three; 0: idle.

    Every live row owns its last page and shares the others; entries behind it name pages of others.
    """
    rng = np.random.default_rng(seed)
    B, shared = len(lengths), LAYER - len(lengths)
    position_B = np.array(lengths, np.int32) - 1
    table_BM = rng.integers(0, shared, (B, WIDTH))
    own_B = shared + rng.permutation(B)
    table_BM[np.arange(B), np.maximum(position_B, 0) // PAGE] = own_B

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q_BHE, k_BKE, v_BKE = (normal(B, n, E) for n in (heads, kv_heads, kv_heads))
    cache_XPWE = normal(3 * LAYER, PAGE, 2 * kv_heads, E)
    table_BM, position_B = jnp.asarray(table_BM, jnp.int32), jnp.asarray(position_B)
    return Operands(q_BHE, k_BKE, v_BKE, cache_XPWE, table_BM, position_B, LAYER)


def ours(args, waves=2, pages=2, **params):
    """Our kernel in a simulator of the chip that starts with NaN in its memory."""
    bytes_a_page = args.cache_XPWE[0].nbytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_tpu, "WAVES", waves)
        patch.setattr(pallas_tpu, "WAVE_BYTES", pages * bytes_a_page)
        return jax.jit(partial(pallas_tpu.write_and_attend, interpret=pltpu.InterpretParams(**params)))(args)


def stock(args):
    """Around the stock kernel's own definition, since no interpreter runs the kernel itself."""
    kernel = importlib.import_module(tpu.ragged_paged_attention.__module__)

    def definition(q_BHE, cache_XPWE, *where, sm_scale, **sizes):
        where = [np.asarray(x) for x in where]
        kernel.dynamic_validate_inputs(q_BHE, cache_XPWE, *where, sm_scale=sm_scale, **sizes)

        def attend(q, cache):
            return kernel.ref_ragged_paged_attention(q, cache, *where, sm_scale=sm_scale)

        out_NHE = jax.jit(attend)(q_BHE, cache_XPWE)
        return jnp.full_like(q_BHE, jnp.nan).at[: len(out_NHE)].set(out_NHE)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu, "ragged_paged_attention", definition)
        return tpu.write_and_attend(args)


def check(got, args):
    out_BHE, cache_XPWE = got
    want_BHE, want_cache_XPWE = xla.reference(args)
    tolerance = 1e-5 if out_BHE.dtype == jnp.float32 else 2e-2

    def to32(x):
        return np.asarray(x, np.float32)

    np.testing.assert_allclose(to32(out_BHE), to32(want_BHE), atol=tolerance, rtol=tolerance)
    np.testing.assert_array_equal(to32(cache_XPWE), to32(want_cache_XPWE))
    assert not to32(out_BHE)[np.asarray(args.position_B) < 0].any()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("heads, kv_heads", nightly_but([(4, 2), (2, 1)], keep=[0]))
def test_one_call_writes_and_attends_as_the_definition_does(heads, kv_heads, dtype):
    args = operands(LENGTHS, heads, kv_heads, dtype)
    check(ours(args), args)


@pytest.mark.parametrize("waves, pages", nightly_but([(2, 1), (4, 4), (3, 99)], keep=[2]))
def test_waves_of_any_size_and_number_give_the_same(waves, pages):
    lengths = np.random.default_rng(waves).integers(0, WIDTH * PAGE + 1, 6)
    args = operands(lengths, 3, 3, "float32", waves)
    check(ours(args, waves, pages), args)


@pytest.mark.parametrize("lengths", [[0, 0, 0], [0, 0, 7]])
def test_groups_may_be_empty(lengths):
    args = operands(lengths, 4, 2, "float32")
    check(ours(args), args)


def test_the_stock_kernel_is_asked_for_what_the_definition_says():
    args = operands([0, 6 * PAGE + 2, 0, PAGE], 4, 2, "float32")
    check(stock(args), args)


def test_the_stock_kernel_bears_rows_that_are_all_idle():
    args = operands([0, 0], 4, 2, "float32")
    check(stock(args), args)


def test_two_cores_never_meet():
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

    args = operands([0, 9, 1, 5], 4, 2, "float32")
    check(ours(args, detect_races=True, num_cores_or_threads=2), args)
    assert not simulator.races.races_found


@pytest.mark.optimized
def test_elsewhere_than_on_a_tpu_the_choice_is_xla():
    args = operands(LENGTHS, 4, 2, "float32")

    def compiled(**how):
        return jax.jit(partial(write_and_attend, **how), donate_argnums=3).lower(*args).compile()

    chosen, xla = (compiled(**how).as_text() for how in ({}, {"implementation": "xla"}))
    # Nothing is left to be chosen while it runs.
    assert "callback" not in chosen and chosen.count("conditional(") == xla.count("conditional(")
    with pytest.raises(ValueError, match="implementation is 'tpu', not one of xla, ragged_tpu, pallas_tpu"):
        write_and_attend(*args, implementation="tpu")
