"""Masked reductions: what lies off the mask is never read, an empty mask has an answer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosd_jax import masked

X = jnp.array([[1.0, jnp.nan, 4.0], [jnp.inf, jnp.nan, 9.0]])
MASK = jnp.array([[1, 0, 1], [0, 0, 0]])


@pytest.mark.parametrize(
    ("reduce", "whole", "by_row"),
    [
        (masked.sum, 5.0, [5.0, 0.0]),
        (masked.mean, 2.5, [2.5, 0.0]),
        (masked.max, 4.0, [4.0, -np.inf]),
    ],
)
@pytest.mark.parametrize("dtype", [bool, jnp.int32, jnp.float32])
def test_reads_only_where_the_mask_holds(reduce, whole, by_row, dtype):
    mask = MASK.astype(dtype)
    assert reduce(X, mask) == whole
    np.testing.assert_array_equal(reduce(X, mask, axis=1), by_row)
    np.testing.assert_array_equal(jax.jit(reduce, static_argnums=2)(X, mask, 1), by_row)


def test_a_mask_of_sequences_broadcasts():
    x = jnp.array([[1.0, 3.0], [5.0, 7.0]])
    assert masked.mean(x, jnp.array([[True], [False]])) == 2.0
    assert masked.sum(x, jnp.array([[False], [True]])) == 12.0


def test_gradient_is_zero_off_the_mask_and_finite_on_an_empty_one():
    grad = jax.grad(lambda x, m: masked.mean(x, m))
    np.testing.assert_array_equal(grad(X, MASK), [[0.5, 0, 0.5], [0, 0, 0]])
    np.testing.assert_array_equal(grad(X, jnp.zeros_like(MASK)), jnp.zeros_like(X))
