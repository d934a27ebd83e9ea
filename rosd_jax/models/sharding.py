"""The mesh (data, fsdp, tensor) and the layout of every array on it.

Rows of a batch are split over "data" and "fsdp"; matrices over "fsdp" and, as in Megatron
(arXiv 1909.08053), over "tensor". PARAM_SPECS is the whole layout: the last names of a leaf's path select its
rule, so one function places params, optimizer moments and a whole train state alike.

    make_mesh(data, fsdp, tensor)     -> Mesh
    validate_mesh_for(config, mesh)
    param_shardings(tree, mesh)       -> tree of NamedSharding
    replicated_dims(tree, mesh)       -> lines to log: dimensions that their axis does not divide
    row_devices(mesh)                 -> number of shards that rows are split into
    row_sharding(mesh)                -> NamedSharding of arrays whose first axis is rows
    place_rows(tree, mesh)            -> arrays of the host with this sharding
    fetch(x)                          -> a whole array on the host
    on_device(tree)                   -> the tree in device memory
    tensor_specs(params, mesh)        -> specs of params split along "tensor" alone, for decoding
    decoder_specs(config, mesh)       -> specs of the decoder's weights
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from rosd_jax.errors import UserError
from rosd_jax.models.qwen3 import ROW_AXES, Qwen3Config
from rosd_jax.types import Array

AXES = ("data", "fsdp", "tensor")

# Path suffix -> spec. The leading layer axis of stacked leaves is never split, since every device runs
# every layer. Column-parallel kernels split their output over tensor, row-parallel ones their input.
# A and B of an adapter are split like their kernel along the dimension that they share with it; the rank is
# split over fsdp if no other dimension is.
COLUMN_SPEC = P(None, "fsdp", "tensor")
ROW_SPEC = P(None, "tensor", "fsdp")
COLUMN_PARALLEL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
ROW_PARALLEL = ("o_proj", "down_proj")
PARAM_SPECS = {
    "embed": P("tensor", "fsdp"),
    "head": P("tensor", "fsdp"),
    **{f"{name}/kernel": COLUMN_SPEC for name in COLUMN_PARALLEL},
    **{f"{name}/lora_a": P(None, "fsdp", None) for name in COLUMN_PARALLEL},
    **{f"{name}/lora_b": COLUMN_SPEC for name in COLUMN_PARALLEL},
    **{f"{name}/kernel": ROW_SPEC for name in ROW_PARALLEL},
    **{f"{name}/lora_a": ROW_SPEC for name in ROW_PARALLEL},
    **{f"{name}/lora_b": P(None, None, "fsdp") for name in ROW_PARALLEL},
    "q_proj/bias": P(None, "tensor"),
    "k_proj/bias": P(None, "tensor"),
    "v_proj/bias": P(None, "tensor"),
    "o_proj/bias": P(),
    "scale": P(),
}


def make_mesh(data: int, fsdp: int, tensor: int, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh over all devices; a size of -1 (at most one) is inferred from the others.

    Axis types are Auto: the compiler places what no rule names. Raises UserError if the product of the
    sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    sizes = [data, fsdp, tensor]
    text = ", ".join(f"mesh.{axis}={n}" for axis, n in zip(AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(n < 1 and n != -1 for n in sizes):
        raise UserError(f"{text}: each must be at least 1, or -1 (inferred) for one of them")
    given = math.prod(n for n in sizes if n != -1)
    sizes = [count // given if n == -1 else n for n in sizes]
    if math.prod(sizes) != count:
        raise UserError(
            f"{text}: the product must be the number of devices, {count}; "
            "set one of them to -1 and let the others divide that number"
        )
    # An axis may cover only part of a side of the slice, as with fsdp=8, tensor=2 on 4 x 4 chips.
    placed = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * 3)


def validate_mesh_for(config: Qwen3Config, mesh: Mesh) -> None:
    """Raises UserError unless "tensor" divides both numbers of heads, so that no head is split."""
    tensor = mesh.shape["tensor"]
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name)
        if heads % tensor:
            raise UserError(
                f"mesh.tensor is {tensor}; it must divide the model's {name}, {heads}, so choose a divisor"
            )


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for every leaf of params, optimizer state or train state (arrays or shapes).

    Scalars are replicated. Raises KeyError for a leaf that no rule names.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _fit(_spec(path, leaf), leaf.shape, mesh)[0])

    return jax.tree_util.tree_map_with_path(place, tree)


def replicated_dims(tree: Any, mesh: Mesh) -> list[str]:
    """One line for each dimension that is not split because its axis does not divide it."""
    lines = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        for size, axis in _fit(_spec(path, leaf), leaf.shape, mesh)[1]:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            lines.append(f"{name}: {size} is not divisible by mesh.{axis}={mesh.shape[axis]}")
    return lines


def row_devices(mesh: Mesh) -> int:
    """The number of shards of rows: the devices along "data" and "fsdp"."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def row_sharding(mesh: Mesh) -> NamedSharding:
    """Splits arrays [rows, ...] over "data" and "fsdp"; no other axis is split."""
    return NamedSharding(mesh, P(ROW_AXES))


def place_rows(tree: Any, mesh: Mesh) -> Any:
    """Arrays [rows, ...] of the host on the devices. Every process has them whole, and sends its own rows."""
    sharding = row_sharding(mesh)

    def put(x: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def fetch(x: Array) -> np.ndarray:
    """The whole array on the host. All processes must call it if its shards are on several."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))


def on_device(tree: Any) -> Any:
    """The tree in the memory of the devices of its shardings. Arrays that are there are not copied."""
    return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device), tree)


def tensor_specs(params: Any, mesh: Mesh) -> Any:
    """Specs of params split along "tensor" alone, as decoding reads them."""

    def place(path: Any, leaf: Any) -> P:
        spec, _ = _fit(_spec(path, leaf), leaf.shape, mesh)
        return P(*[axis if axis == "tensor" else None for axis in spec])

    return jax.tree_util.tree_map_with_path(place, params)


def decoder_specs(config: Qwen3Config, mesh: Mesh) -> dict[str, Any]:
    """Specs of the weights that `decoder.fuse` makes on each device of params placed by `tensor_specs`."""

    def tensor_if_divisible(size: int) -> str | None:
        return "tensor" if size % mesh.shape["tensor"] == 0 else None

    vocabulary = P(tensor_if_divisible(config.vocab_size), None)
    inner = tensor_if_divisible(config.intermediate_size)
    blocks = dict(
        qkv=P(None, None, "tensor"),
        out=P(None, "tensor", None),
        gate_up=P(None, None, inner),
        down=P(None, inner, None),
        input_norm=P(),
        post_norm=P(),
    )
    if config.qk_norm:
        blocks["head_norm"] = P(None, "tensor", None)
    if config.attention_bias:
        blocks["qkv_bias"] = P(None, "tensor")
    if config.output_bias:
        blocks["out_bias"] = P()
    tables = dict(embed=vocabulary) if config.tie_word_embeddings else dict(embed=vocabulary, head=vocabulary)
    return dict(tables, final_norm=P(), blocks=blocks)


def _spec(key_path: Any, leaf: Any) -> P:
    """The rule of a leaf. Raises KeyError if there is none."""
    if leaf.ndim == 0:
        return P()
    parts = jax.tree_util.keystr(key_path, simple=True, separator="/").split("/")
    for suffix in ("/".join(parts[-2:]), parts[-1]):
        if suffix in PARAM_SPECS:
            return PARAM_SPECS[suffix]
    raise KeyError(f"no sharding rule for {'/'.join(parts)}")


def _fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> tuple[P, list[tuple[int, str]]]:
    """The spec without axes that do not divide their dimension, and a (size, axis) of each one dropped."""
    odd = [(n, axis) for n, axis in zip(shape, spec, strict=False) if axis and n % mesh.shape[axis]]
    kept = [a if a and not n % mesh.shape[a] else None for n, a in zip(shape, spec, strict=False)]
    return P(*kept), odd
