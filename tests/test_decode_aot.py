"""Decoding Qwen3-8B over four TPU chips that are not there: it compiles, the KV cache stays in place."""

import math
import re
from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rosd_jax.kernels.paged_attention import write_and_attend
from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.models.sharding import decoder_specs, make_mesh, param_shardings
from rosd_jax.plan.chips import read_topology
from rosd_jax.rollout import decode_loop
from rosd_jax.rollout.batching import Batch
from rosd_jax.rollout.decode_loop import BY_ROW, DecodeSpec, state_specs
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
from support import NEEDS_LIBTPU, nightly_but

pytestmark = [
    pytest.mark.optimized,
    pytest.mark.slow,
    NEEDS_LIBTPU,
]

MODEL = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    dtype="bfloat16",
)
ROWS, PROMPTS, PROMPT, NEW = 64, 8, 512, 4096
STOP = (151645, 151643)
CHIPS = 4
FEWEST = ROWS // 2  # so that the loop shrinks once, not three times: each time is the same program, smaller


@pytest.fixture(autouse=True)
def one_compaction(monkeypatch):
    monkeypatch.setattr(decode_loop, "FEWEST", FEWEST)


def placed(mesh, x, spec):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))


@cache
def lowered(topology, implementation=None, shape=(1, 1, CHIPS)):
    """All of it, and a piece of the loop, ready to be compiled, and the bytes of the KV cache on one chip."""
    devices = read_topology(topology).devices
    mesh = make_mesh(*shape, devices)
    limits = Limits(NEW, PROMPT, slots=ROWS)
    spec = DecodeSpec(
        MODEL,
        mesh,
        limits,
        Sampling(1.0, stop_ids=STOP),
        implementation,
        prompt_pages=PROMPTS * PROMPT // limits.page,
        compact=True,
    )
    put = partial(placed, mesh)

    def ints(*shape):
        return put(jax.ShapeDtypeStruct(shape, jnp.int32), P())

    params = jax.eval_shape(partial(init_params, MODEL), jax.random.key(0))
    params = jax.tree.map(lambda x, s: put(x, s.spec), params, param_shardings(params, mesh))
    key = put(jax.eval_shape(lambda: jax.random.key(0)), P())
    args = params, Batch(ints(PROMPTS, PROMPT), ints(PROMPTS), *[ints(ROWS)] * 3), key
    whole = jax.jit(partial(decode_loop.generate, spec=spec))
    begin = partial(decode_loop.begin, spec=spec)
    piece = partial(decode_loop.advance, fewer=0, steps=256, spec=spec)
    decode = jax.jit(piece, donate_argnums=2)
    specs = decoder_specs(MODEL, mesh), BY_ROW, state_specs()
    handed_on = jax.tree.map(
        lambda spec, tree: jax.tree.map(lambda x: put(x, spec), tree),
        specs,
        jax.eval_shape(begin, *args),
        is_leaf=lambda x: isinstance(x, P),
    )
    cache = handed_on[2].cache_XPWE
    size = math.prod(cache.shape) * cache.dtype.itemsize // CHIPS
    return whole.lower(*args), decode.lower(*handed_on), size


def moved(text, size):
    """Instructions that copy or transpose an array of at least half of the KV cache's bytes."""
    found = []
    for result, name in re.findall(r"= (.*?) (copy|copy-start|transpose)\(", text):
        arrays = re.findall(r"bf16\[([\d,]+)\]", result)
        if any(2 * math.prod(int(n) for n in dims.split(",")) >= size / 2 for dims in arrays):
            found.append((name, result))
    return found


@pytest.mark.parametrize(
    "topology, implementation",
    nightly_but([("v5p:2x2x1", None), ("v6e:2x2", None), ("v6e:2x2", "ragged_tpu")], keep=[0]),
)
def test_the_loop_writes_the_cache_in_place(topology, implementation):
    _, decode, size = lowered(topology, implementation)
    decode = decode.compile()
    memory, text = decode.memory_analysis(), decode.as_text()
    assert ("paged_write_and_attend" if implementation is None else "ragged_paged_attention") in text
    assert moved(text, size) == []
    assert size <= memory.alias_size_in_bytes < 1.001 * size
    assert memory.temp_size_in_bytes < 0.06 * size


@pytest.mark.nightly
def test_engines_side_by_side_write_their_caches_in_place():
    """Two shards of rows, whose loops end when each is done, over two chips each."""
    _, decode, size = lowered("v5p:2x2x1", None, (1, 2, 2))
    decode = decode.compile()
    memory = decode.memory_analysis()
    assert moved(decode.as_text(), size) == []
    assert size <= memory.alias_size_in_bytes < 1.001 * size
    assert memory.temp_size_in_bytes < 0.1 * size  # half of the vocabulary's logits, not a quarter


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    "topology, implementation, rows, kv_heads",
    nightly_but(
        [
            ("v5e:2x2", None, 8, 1),
            ("v5p:2x2x1", None, 512, 2),
            ("v6e:1x1", None, 256, 8),
            ("v5p:2x2x1", "ragged_tpu", 8, 2),
            ("v6e:1x1", "ragged_tpu", 8, 2),
        ],
        keep=[1, 4],
    ),
)
def test_the_kernels_compile_whatever_precision_the_caller_asks_for(
    topology, implementation, rows, kv_heads, dtype
):
    """Up to 512 rows with tables of 256 pages: both are held in on-chip memory."""
    devices = read_topology(topology).devices
    mesh = make_mesh(1, 1, 1, devices[:1])

    def put(dtype, *shape):
        return placed(mesh, jax.ShapeDtypeStruct(shape, dtype), P())

    q, k = put(dtype, rows, 4 * kv_heads, 128), put(dtype, rows, kv_heads, 128)
    where = put("int32", rows, 256), put("int32", rows)
    attend = partial(write_and_attend, page_base=0, implementation=implementation)
    attend = jax.shard_map(attend, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
    with jax.default_matmul_precision("highest"):
        lowered = jax.jit(attend).lower(q, k, k, put(dtype, 1024, 64, 2 * kv_heads, 128), *where)
    assert "paged" in lowered.compile().as_text()


@pytest.mark.nightly
@pytest.mark.parametrize("topology", ["v6e:2x2", "v5p:2x2x1"])
def test_a_whole_rollout_holds_one_cache(topology):
    """Bytes alone: the compiled text cannot be printed."""
    whole, _, size = lowered(topology)
    memory = whole.compile().memory_analysis()
    weights = 4 << 30  # a quarter of 15.3 GiB, cast and joined
    assert memory.output_size_in_bytes < 4 << 20
    assert memory.temp_size_in_bytes < weights + 1.2 * size
