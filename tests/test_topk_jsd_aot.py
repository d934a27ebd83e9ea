"""The loss compiled for TPUs, without one: it fits, it does the least work, its kernel stays fast."""

import jax
import jax.numpy as jnp
import pytest

from benchmarks import topk_jsd_tpu
from rosd_jax.kernels.topk_jsd import pallas_tpu, topk_jsd_from_logits, topk_jsd_loss
from rosd_jax.kernels.topk_jsd.records import Options
from support import NEEDS_LIBTPU, nightly_but

pytestmark = [pytest.mark.optimized, NEEDS_LIBTPU]

# As a share of the matmuls' time at the width of Qwen3-8B. A core of v6e has the vector units of v5p and
# four times its matrix units.
SHARE_OF_MATMULS = {"v5e:2x2": 0.10, "v5p:2x2x1": 0.10, "v6e:2x2": 0.35}


@pytest.mark.slow
@pytest.mark.parametrize("topology", nightly_but(SHARE_OF_MATMULS, keep=[1]))
def test_real_sizes_compile_within_their_memory_and_time(topology):
    found = topk_jsd_tpu.report(topology)
    # Ten bytes for each logit of one chunk, and the head's gradient, for 4,096 tokens as for 65,536.
    assert [(loss["width"], loss["rows"]) for loss in found["losses"]] == [(2560, 4096), (4096, 65536)]
    for loss in found["losses"]:
        assert loss["row_kernel"]
        assert loss["bytes_a_logit"] < 10.5  # two float32, one bfloat16, and little else
        assert loss["matmuls_a_chunk"] < 4.01
    assert all(found["cycles_a_row"].values())
    assert found["share_of_matmuls"]["4096"] < SHARE_OF_MATMULS[topology]


def test_rows_of_the_real_vocabulary_take_less_than_half_of_the_smallest_core():
    sizes = pallas_tpu.make_sizes(Options(k=100), 151936)
    assert pallas_tpu.vmem_bytes(sizes, jnp.bfloat16) + pallas_tpu.VMEM_SLACK < 32 << 20


VARIANTS = [
    {"k": 20},
    {"k": 20, "alpha": 0.0, "tail": "renorm"},
    {"k": 20, "alpha": 1.0, "temperature": 0.7, "num_tokens": 6150},
    {"k": 300, "alpha": 0.3},
    {"k": None},
    {"k": 20, "vocab": 6199},
]


@pytest.mark.parametrize(
    "options", nightly_but(VARIANTS, keep=[1, 2, 4]), ids=lambda o: "-".join(f"{k}{v}" for k, v in o.items())
)
def test_every_form_of_the_row_kernel_compiles(options):
    put = topk_jsd_tpu.on_device("v5e:2x2")
    vocab = options.get("vocab", 6200)
    options = {name: value for name, value in options.items() if name != "vocab"}

    def run(s, t, w):
        return topk_jsd_from_logits(s, t, w, **options)

    logits, weight = put(20, vocab, dtype=jnp.float32), put(20, dtype=jnp.float32)
    for function in (run, jax.grad(run, has_aux=True)):
        compiled = jax.jit(function).lower(logits, logits, weight).compile()
        assert "tpu_custom_call" in compiled.as_text()


def test_a_frozen_head_costs_three_matmuls_and_a_value_two():
    put = topk_jsd_tpu.on_device("v5e:2x2")
    operands = (put(64, 128), put(6400, 128), put(64, 128), put(6400, 128), put(64, dtype=jnp.float32))

    def loss(*args):
        return topk_jsd_loss(*args, k=20, chunk=64)[0]

    for function, matmuls in ((loss, 2), (jax.grad(loss), 3), (jax.grad(loss, argnums=(0, 1)), 4)):
        compiled = jax.jit(function).lower(*operands).compile()
        assert round(compiled.cost_analysis()["flops"] / (2 * 64 * 6400 * 128), 1) == matmuls
