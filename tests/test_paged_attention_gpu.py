"""The GPU kernel of the decoding step's attention: interpreted on CPU, and lowered for CUDA."""

import re
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu import core as mosaic_gpu_core
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams
from jax.interpreters import mlir

from rosd_jax.kernels.paged_attention import Operands, pallas_gpu, write_and_attend, xla
from rosd_jax.kernels.paged_attention.pallas_gpu import TILE
from support import nightly_but

PAGE, WIDTH, LAYER = 32, 7, 20  # positions a page, pages of a table, pages of a layer
LONG = WIDTH * PAGE
LENGTHS = [0, 1, PAGE - 1, PAGE, PAGE + 1, LONG, 0, 4 * PAGE + 19]

if jax.__version_info__ < (0, 11):
    # That interpreter binds layout casts, which have no rule for the CPU: here they are the identity.
    mlir.register_lowering(mosaic_gpu_core.layout_cast_p, lambda ctx, x, **_: [x], platform="cpu")


@pytest.fixture(autouse=True)
def transposed_operands(monkeypatch):
    """That interpreter's matrix product does not know transposed operands: here they are transposed late."""
    product, matmul = gpu_callbacks.wgmma, np.matmul

    def wgmma(*, b_transforms, **given):
        plain = tuple(t for t in b_transforms if type(t).__name__ != "TransposeTransform")

        def late(a, b, **how):
            return matmul(a, b if len(plain) == len(b_transforms) else b.T, **how)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(np, "matmul", late)
            return product(b_transforms=plain, **given)

    monkeypatch.setattr(gpu_callbacks, "wgmma", wgmma)


def operands(lengths, heads, kv_heads, E=64, page=PAGE, dtype=jnp.bfloat16, seed=0):
    """Rows whose newest token is number `length` - 1, in layer 1 of a cache of three; 0: idle.

    Every live row owns its last page and shares the others. Entries behind it point past the cache.
    """
    rng = np.random.default_rng(seed)
    B, shared = len(lengths), LAYER - len(lengths)
    position_B = np.array(lengths, np.int32) - 1
    own_B = position_B // page
    table_BM = rng.integers(0, shared, (B, WIDTH))
    table_BM[np.arange(B), np.maximum(own_B, 0)] = shared + rng.permutation(B)
    table_BM[np.arange(WIDTH) > own_B[:, None]] = 9 * LAYER

    def normal(dtype, *shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    q_BHE = normal(dtype, B, heads, E)
    k_BKE, v_BKE = (normal(dtype, B, kv_heads, E) for _ in "kv")
    cache_XPWE = normal(dtype, 3 * LAYER, page, 2 * kv_heads, E)
    table_BM, position_B = jnp.asarray(table_BM, jnp.int32), jnp.asarray(position_B)
    return Operands(q_BHE, k_BKE, v_BKE, cache_XPWE, table_BM, position_B, LAYER)


def check(args, split=2 * LONG, **params):
    """Our kernel against the definition, which gathers every page and so gets a table inside the cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pallas_gpu, "SPLIT", split)
        run = partial(pallas_gpu.write_and_attend, interpret=InterpretGPUParams(**params))
        got_BHE, got_XPWE = jax.jit(run)(args)
    inside_BM = jnp.where(args.table_BM < LAYER, args.table_BM, 0)
    want_BHE, want_XPWE = xla.reference(args._replace(table_BM=inside_BM))

    def to32(x):
        return np.asarray(x, np.float32)

    np.testing.assert_allclose(to32(got_BHE), to32(want_BHE), atol=1e-2, rtol=1e-2)
    np.testing.assert_array_equal(to32(got_XPWE), to32(want_XPWE))
    assert not to32(got_BHE)[np.asarray(args.position_B) < 0].any()


def test_one_call_writes_and_attends_as_the_definition_does():
    check(operands(LENGTHS, 4, 2))


@pytest.mark.parametrize("split", nightly_but([TILE, 3 * TILE], keep=[1]))
def test_splits_of_any_size_give_the_same(split):
    check(operands([LONG - 5, 0, 17, 2 * TILE, 2 * TILE + 1], 2, 1), split)


@pytest.mark.parametrize("page", nightly_but([8, 16, 64, 128], keep=[2]))
def test_pages_of_any_length_give_the_same(page):
    check(operands([4 * page + 3, 1, page, 0, page + 1], 2, 1, page=page), TILE)


@pytest.mark.parametrize(
    "heads, kv_heads, E", nightly_but([(9, 1, 64), (5, 1, 128), (2, 2, 128), (3, 1, 256)], keep=[3])
)
def test_any_number_of_queries_for_a_head_and_any_width(heads, kv_heads, E):
    check(operands([PAGE + 1, 3 * PAGE], heads, kv_heads, E))


def test_a_call_of_idle_rows_only():
    check(operands([0, 0], 2, 1))


def test_copies_never_meet_what_is_still_being_read():
    from jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks import get_races

    check(operands([0, LONG, 1], 2, 1), detect_races=True)
    assert not get_races().races_found


def test_refuses_what_it_has_no_layout_for():
    good = operands([3], 2, 1)
    narrow = operands([3], 2, 1, E=32)
    single = [x.astype(jnp.float32) for x in good[:4]]
    short = good[3].reshape(-1, 4, *good[3].shape[2:])
    crowd = operands([3], 65, 1)
    for args in (narrow, (*single, *good[4:]), (single[0], *good[1:]), (*good[:3], short, *good[4:]), crowd):
        with pytest.raises(ValueError, match="pallas_gpu takes bfloat16, heads 64, 128, 192 or 256 wide"):
            write_and_attend(*args, implementation="pallas_gpu")


# ---- lowering ------------------------------------------------------------------------------------


def lowered(function, *args):
    traced = jax.jit(function, donate_argnums=3).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def array(dtype, *shape):
    return jax.ShapeDtypeStruct(shape, dtype)


@pytest.mark.parametrize("rows", [32, 256])
def test_lowers_for_cuda_at_the_shapes_of_qwen3_4b(rows):
    dtype = jnp.bfloat16
    cache = array(dtype, 36 * 1000, 64, 16, 128)
    kv = array(dtype, rows, 8, 128)
    where = array(jnp.int32, rows, 36), array(jnp.int32, rows), array(jnp.int32)
    attend = partial(write_and_attend, implementation="pallas_gpu")
    assert_in_place(lowered(attend, array(dtype, rows, 32, 128), kv, kv, cache, *where))


@pytest.mark.parametrize(
    "dtype, capability, ours",
    [
        ("bfloat16", "9.0", True),
        ("bfloat16", "8.0", False),
        ("bfloat16", None, False),
        ("float32", "9.0", False),
    ],
)
def test_is_the_default_on_hopper_gpus_for_bfloat16(dtype, capability, ours, monkeypatch):
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)])
    given = (array(dtype, 2, 4, 128), *[array(dtype, 2, 2, 128)] * 2, array(dtype, 8, 64, 4, 128))
    where = array(jnp.int32, 2, 4), array(jnp.int32, 2), array(jnp.int32)

    def attend(*operands):
        return write_and_attend(*operands)  # a function of its own, which is traced again

    assert ("mosaic_gpu" in lowered(attend, *given, *where)) == ours


def test_a_whole_decoding_step_of_qwen3_4b_lowers_for_cuda():
    from rosd_jax.models.decoder import Decoder, StepInputs, decode_step, fuse
    from rosd_jax.models.qwen3 import Qwen3Config, param_shapes

    sizes = 151936, 2560, 9728, 36, 32, 8, 128
    model = Qwen3Config(*sizes, tie_word_embeddings=True, dtype=jnp.bfloat16)
    weights = jax.eval_shape(partial(fuse, config=model), param_shapes(model))
    decoder = Decoder(model, attention="pallas_gpu")

    def step(weights, token_B, position_B, cache, table_BM):
        return decode_step(decoder, weights, StepInputs(token_B, position_B, table_BM), cache)

    cache, row = array(jnp.bfloat16, 36 * 1000, 64, 16, 128), array(jnp.int32, 128)
    assert_in_place(lowered(step, weights, row, row, cache, array(jnp.int32, 128, 36)))


def test_the_engines_loop_over_eight_gpus_lowers_for_cuda():
    from rosd_jax.models.qwen3 import Qwen3Config, init_params
    from rosd_jax.models.sharding import make_mesh
    from rosd_jax.rollout.batching import Batch
    from rosd_jax.rollout.decode_loop import DecodeSpec, begin, decode
    from rosd_jax.rollout.limits import Limits
    from rosd_jax.rollout.sampler import Sampling

    model = Qwen3Config(512, 256, 512, 2, 8, 4, 64, tie_word_embeddings=True, dtype="bfloat16")
    limits, sampling = Limits(64, 32, page_length=64), Sampling(1.0, stop_ids=(1,))
    spec = DecodeSpec(model, make_mesh(2, 2, 2), limits, sampling, "pallas_gpu")

    def start(key, batch):
        return begin(init_params(model, key), batch, key, spec=spec)

    batch = Batch(*(array(jnp.int32, *shape) for shape in ((4, 32), (4,), (8,), (8,), (8,))))
    given = jax.eval_shape(start, jax.random.key(0), batch)
    traced = jax.jit(partial(decode, spec=spec)).trace(*given)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def assert_in_place(text):
    """The donated cache is aliased to the returned one, and the kernel, which reads it, returns none."""
    cache = r"tensor<36000x64x16x128x\w+>"
    assert re.search(rf"{cache} {{[^}}]*tf.aliasing_output = 1", text)
    calls = [line for line in text.splitlines() if "mosaic_gpu" in line and "custom_call" in line]
    assert len(calls) == 1
    operands, results = calls[0].rsplit("->", 1)
    assert re.search(cache, operands) and not re.search(cache, results)
