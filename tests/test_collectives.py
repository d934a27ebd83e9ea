"""What devices exchange, counted in compiled programs whose exchanges are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from rosd_jax.models.sharding import make_mesh
from rosd_jax.plan.collectives import Collective, count

pytestmark = pytest.mark.optimized
MESH = make_mesh(1, 8, 1)


def compiled(function, *shapes):
    """The text of a function under shard_map, its arguments split along fsdp."""
    spec = P("fsdp")
    local = jax.shard_map(
        function, mesh=MESH, in_specs=(spec,) * len(shapes), out_specs=spec, check_vma=False
    )
    place = NamedSharding(MESH, spec)
    given = [jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place) for shape in shapes]
    return jax.jit(local).lower(*given).compile().as_text()


def test_an_exchange_in_a_loop_counts_once_a_turn():
    def turns(x):
        return jax.lax.fori_loop(0, 5, lambda i, x: jax.lax.psum(x, "fsdp") / 8 + i, x)

    assert count(compiled(turns, (8, 256))) == [Collective("all-reduce", 4 * 256, 5, False)]


def test_loops_within_loops_multiply():
    def turns(x):
        def inner(x):
            return jax.lax.fori_loop(0, 3, lambda i, x: jnp.sin(jax.lax.psum(x, "fsdp")) + i, x)

        return jax.lax.fori_loop(0, 7, lambda i, x: inner(x) * 2 + i, x)

    (found,) = count(compiled(turns, (8, 256)))
    assert found == Collective("all-reduce", 4 * 256, 21, False) and found.total == 21 * 1024


def test_a_loop_that_data_ends_counts_one_turn_and_says_so():
    def turns(x):
        def smaller(x):
            return jax.lax.psum(x, "fsdp") / 16

        return jax.lax.while_loop(lambda x: jnp.sum(x) > 1.0, smaller, x)

    found = count(compiled(turns, (8, 256)))
    assert [(c.kind, c.bytes, c.count, c.data_loop) for c in found if c.bytes > 8] == [
        ("all-reduce", 4 * 256, 1, True)
    ]


def test_every_kind_is_counted_with_what_it_gives_one_device():
    def all_kinds(x):
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)
        scattered = jax.lax.psum_scatter(jnp.tile(x, (8, 1)), "fsdp", tiled=True)
        turned = jax.lax.all_to_all(x.reshape(8, -1), "fsdp", 0, 0, tiled=True).reshape(x.shape)
        passed = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])
        return gathered[:1] + scattered + turned + passed

    found = {c.kind: c.bytes for c in count(compiled(all_kinds, (8, 256)))}
    assert found["all-gather"] == 8 * 1024
    assert {found[kind] for kind in found if kind != "all-gather"} == {1024}
    assert len(found) >= 4  # XLA for CPU may make one kind of another


def test_text_without_a_program_has_no_exchanges():
    assert count("") == [] and count("HloModule nothing\n") == []


# Asynchronous exchanges, as XLA for TPU prints them: their start names operands and results.
ASYNCHRONOUS = """HloModule m

%body (p: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %p = (s32[], bf16[4,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%p), index=1
  %s = (bf16[4,8]{1,0}, bf16[32,8]{1,0}) all-gather-start(%x), dimensions={0}
  %d = bf16[32,8]{1,0} all-gather-done(%s)
  ROOT %t = (s32[], bf16[4,8]{1,0}) tuple(%p, %x)
}

%condition (p.1: (s32[], bf16[4,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(36)
  ROOT %less = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: bf16[4,8]) -> bf16[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %p2 = (bf16[4,8]{1,0}, bf16[4,8]{1,0}, u32[], u32[]) collective-permute-start(%a)
  %w = (s32[], bf16[4,8]{1,0}) while(%init), condition=%condition, body=%body
}
"""


def test_exchanges_that_only_begin_count_once_with_their_result():
    assert count(ASYNCHRONOUS) == [
        Collective("all-gather", 2 * 32 * 8, 36, False),
        Collective("collective-permute", 2 * 4 * 8, 1, False),
    ]
