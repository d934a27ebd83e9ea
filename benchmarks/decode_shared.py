"""What the decoding benchmarks share: a model's shapes, random weights for them, and lengths of responses."""

from typing import Any

import numpy as np

QWEN3_4B = dict(vocab=151936, hidden=2560, inner=9728, layers=36, heads=32, kv_heads=8, width=128)
SIGMA = 0.8  # of the lengths' logarithms


def lengths(rows: int, mean: float, most: int, seed: int) -> np.ndarray:
    """int32 in 1..most: lognormal of that mean, cut."""
    draw = np.random.default_rng(seed).lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, rows)
    return np.clip(np.rint(draw), 1, most).astype(np.int32)


def random_weights(shapes: Any) -> Any:
    """A tree of bfloat16 arrays, but for norms, which are 1 in their own dtype."""
    import jax  # peers do without
    import jax.numpy as jnp

    def fill(path: Any, like: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            return jnp.ones(like.shape, like.dtype)
        key = jax.random.key(sum(name.encode()))
        return jax.jit(lambda key: jax.random.normal(key, like.shape, jnp.bfloat16) * 0.02)(key)

    return jax.tree_util.tree_map_with_path(fill, shapes)
