"""The roofline of decoding: which bytes it counts, and how long they take."""

import jax
import numpy as np
import pytest

from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.rollout.bandwidth import MemoryRoofline, copy_bandwidth, measure_roofline
from rosd_jax.types import DecodeStats

D, V, L, E, HEADS = 32, 150, 2, 8, 4 + 2  # width, ids, layers, width of a head, heads of queries and keys


@pytest.mark.parametrize("tied", [False, True])
def test_a_step_reads_all_weights_once_and_rows_of_an_embedding_that_is_no_head(tied):
    model = Qwen3Config(V, D, 48, L, 4, 2, E, tie_word_embeddings=tied, dtype="bfloat16")
    params = init_params(model, jax.random.key(0))
    matrices = sum(x.size for x in jax.tree.leaves(params["blocks"]) if x.ndim == 3) + V * D
    norms = D + L * (2 * D + HEADS * E)  # float32
    roofline = measure_roofline(model, tensor=2)
    assert roofline.weight_bytes == (2 * matrices + 4 * norms) / 2
    assert roofline.position_bytes == L * 2 * 2 * E * 2 / 2  # keys and values of two heads


def test_the_slowest_shard_is_waited_for():
    def numbers(*values):
        return np.array(values)

    stats = DecodeStats(numbers(10, 4), numbers(0, 0), numbers(0, 0), numbers(0, 0), numbers(100.0, 2000.0))
    roofline = MemoryRoofline(weight_bytes=50, position_bytes=2, bandwidth=100)
    assert roofline.seconds(stats) == (4 * 50 + 2000 * 2) / 100


def test_the_bandwidth_is_that_of_memory():
    assert 1e8 < copy_bandwidth(32 << 20) < 1e13  # bytes a second, of any machine
