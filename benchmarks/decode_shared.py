"""Shared by the decoding benchmarks: Qwen3-4B's shapes, random weights, and lengths of responses."""

from typing import Any

import numpy as np

QWEN3_4B = dict(vocab=151936, hidden=2560, inner=9728, layers=36, heads=32, kv_heads=8, width=128)
SIGMA = 0.8  # standard deviation of the logarithm of a length


def lengths(rows: int, mean: float, most: int, seed: int) -> np.ndarray:
    """Lognormal lengths with that mean before they are cut to 1..most, int32 [rows]."""
    draw = np.random.default_rng(seed).lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, rows)
    return np.clip(np.rint(draw), 1, most).astype(np.int32)


def random_weights(shapes: Any) -> Any:
    """Random bfloat16 arrays of these shapes; norms are 1 in their own dtype."""
    import jax  # the transformers peer's environment does not have it
    import jax.numpy as jnp

    def fill(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(like.shape, like.dtype)
        key = jax.random.key(sum(name.encode()))
        # Under jit, so that no unscaled copy of a large matrix exists.
        return jax.jit(lambda key: jax.random.normal(key, like.shape, jnp.bfloat16) * 0.02)(key)

    return jax.tree_util.tree_map_with_path(fill, shapes)
