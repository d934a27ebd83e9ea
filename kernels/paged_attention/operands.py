"""What one decoding step's attention works on, in one layer.

Dimensions: B rows, H query heads, K key-value heads, E head width, X pages of all layers, P positions of a
page, W = 2 K, M pages of a table.
"""

from __future__ import annotations

from typing import NamedTuple

import jax


class Operands(NamedTuple):
    """The operands of `api.write_and_attend`, which explains each. Every implementation takes them."""

    q_BHE: jax.Array
    k_BKE: jax.Array
    v_BKE: jax.Array
    cache_XPWE: jax.Array
    table_BM: jax.Array
    position_B: jax.Array
    page_base: jax.Array | int
