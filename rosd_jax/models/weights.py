"""Loads and saves the weights of a Hugging Face directory: safetensors, never pickle.

One table, LEAVES, maps the leaves of the params tree to Hugging Face's names; loading and saving both use it.
When loading, a host reads one stacked leaf (all layers of one matrix) after another, and only what its own
devices need. When saving, one whole leaf and the file being filled are in memory. families.py reads and
writes config.json.

    check_weights(path, config)                           raises what load_params would raise
    load_params(path, config, shardings, dtype=)          -> params
    save_pretrained(path, params, config, source=, dtype=)
"""

from __future__ import annotations

import itertools
import math
import os
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rosd_jax import atomic
from rosd_jax.errors import UserError
from rosd_jax.models import files
from rosd_jax.models.families import PASS, config_fields, stated_fields
from rosd_jax.models.files import wrong
from rosd_jax.models.qwen3 import Qwen3Config, param_shapes
from rosd_jax.models.sharding import fetch
from rosd_jax.types import Params, Progress, no_progress

# Leaf path -> (Hugging Face's name, transposed). "{}" is the layer number: those leaves are stacked here.
# Kernels are [in, out] here and [out, in] there.
LEAVES = {
    "embed": ("model.embed_tokens.weight", False),
    "head": ("lm_head.weight", False),
    "final_norm/scale": ("model.norm.weight", False),
    "blocks/input_norm/scale": ("model.layers.{}.input_layernorm.weight", False),
    "blocks/post_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", False),
    "blocks/attention/q_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", False),
    "blocks/attention/k_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", False),
    "blocks/attention/q_proj/kernel": ("model.layers.{}.self_attn.q_proj.weight", True),
    "blocks/attention/k_proj/kernel": ("model.layers.{}.self_attn.k_proj.weight", True),
    "blocks/attention/v_proj/kernel": ("model.layers.{}.self_attn.v_proj.weight", True),
    "blocks/attention/o_proj/kernel": ("model.layers.{}.self_attn.o_proj.weight", True),
    "blocks/attention/q_proj/bias": ("model.layers.{}.self_attn.q_proj.bias", False),
    "blocks/attention/k_proj/bias": ("model.layers.{}.self_attn.k_proj.bias", False),
    "blocks/attention/v_proj/bias": ("model.layers.{}.self_attn.v_proj.bias", False),
    "blocks/attention/o_proj/bias": ("model.layers.{}.self_attn.o_proj.bias", False),
    "blocks/gate_proj/kernel": ("model.layers.{}.mlp.gate_proj.weight", True),
    "blocks/up_proj/kernel": ("model.layers.{}.mlp.up_proj.weight", True),
    "blocks/down_proj/kernel": ("model.layers.{}.mlp.down_proj.weight", True),
}
Ranges = tuple[tuple[int, int], ...]  # [start, stop) of each dimension
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
STORED_TYPES = ("F32", "BF16", "F16")  # the storage types that can be loaded
BUFFERS = ".self_attn.rotary_emb.inv_freq"  # in old Llama files; ignored, since config.json determines them


# --- loading --------------------------------------------------------------------------------------


def check_weights(path: str | Path, config: Qwen3Config) -> None:
    """Raises the UserError that `load_params` would raise. Reads only the headers of the files."""
    shapes = param_shapes(config)
    with ExitStack() as stack:
        _open_tensors(stack, Path(path), config, shapes)


def load_params(
    path: str | Path,
    config: Qwen3Config,
    shardings: Any = None,
    *,
    dtype: str = "float32",
    progress: Progress = no_progress,
) -> Params:
    """The weights in `dtype`, in the structure of `init_params`; `shardings`, a tree like it, places them.

    A host reads each shard that its devices need once, and no other. Files may store float32, bfloat16 or
    float16. Every name and shape is checked before any tensor is read. Raises UserError for a missing,
    extra or mis-shaped tensor, and for pickled weights. progress counts arrays.
    """
    shapes = param_shapes(config)
    arrays = len(jax.tree.leaves(shapes))
    read_before = itertools.count()
    with ExitStack() as stack:
        tensors = _open_tensors(stack, Path(path), config, shapes)

        def leaf(key_path: Any, shape: Any, sharding: Any = None) -> jax.Array:
            name = _path(key_path)
            progress(next(read_before), arrays)
            # Devices with the same shard share one read.
            read = cache(lambda *ranges: _read_shard(tensors, name, shape.shape, ranges, jnp.dtype(dtype)))
            if sharding is None:
                return jnp.asarray(read(*((0, n) for n in shape.shape)))

            def shard(index: Any) -> np.ndarray:
                return read(*(i.indices(n)[:2] for i, n in zip(index, shape.shape, strict=True)))

            return jax.make_array_from_callback(shape.shape, sharding, shard)

        rest = () if shardings is None else (shardings,)
        return jax.tree_util.tree_map_with_path(leaf, shapes, *rest)


def weights_fingerprint(path: str | Path) -> str:
    """A cheap checksum that tells the weights of one model directory from another's.

    It covers the size and the first and last mebibyte of each weight file, so it misses a change of a few
    values in the middle of a large file.
    """
    check = 0
    for file in _weight_files(Path(path)):
        with file.open("rb") as stream:
            head = stream.read(1 << 20)
            stream.seek(max(0, file.stat().st_size - (1 << 20)))
            check = zlib.crc32(head + stream.read() + str(file.stat().st_size).encode(), check)
    return f"{check:08x}"


def _path(key_path: Any) -> str:
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model: the single file, or those that its index lists."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed_files(folder / INDEX)
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
        raise UserError(
            f"model.path is {str(folder)!r}, which contains pickled weights only; unpickling can run "
            "code, so convert them to safetensors"
        )
    raise UserError(f"model.path is {str(folder)!r}, which contains no {SINGLE}; {PASS}")


def _open_tensors(stack: ExitStack, folder: Path, config: Qwen3Config, shapes: Params) -> dict:
    """Tensor name -> (open file, its path), checked against `shapes`; `stack` closes the files."""
    tensors = {}
    for file in _weight_files(folder):
        handle = stack.enter_context(_open(file))
        tensors |= {name: (handle, file) for name in handle.keys() if not name.endswith(BUFFERS)}
    if config.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    _check_tensors(tensors, shapes, folder)
    return tensors


def _indexed_files(index: Path) -> list[Path]:
    """The files in weight_map. Raises UserError if one is not in the directory of the index."""
    places = files.read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise wrong(index, "weight_map", places, "an object that maps each tensor to its file")
    for tensor, name in places.items():
        if not isinstance(name, str) or Path(name).name != name or not os.path.isfile(index.parent / name):
            rule = "the name of a file in the same directory, so download the missing part of the model"
            raise wrong(index, f"weight_map[{tensor!r}]", name, rule)
    return [index.parent / name for name in sorted(set(places.values()))]


def _open(file: Path) -> Any:
    """A safetensors file, to be closed by the caller. Raises UserError if it is not one."""
    try:
        return safe_open(file, framework="np")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a safetensors file ({error}); download it again") from error


def _names(path: str, shape: tuple[int, ...]) -> list[str]:
    """The Hugging Face names of one leaf: one per layer for a stacked leaf."""
    name = LEAVES[path][0]
    return [name.format(layer) for layer in range(shape[0])] if "{}" in name else [name]


def _stored_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    name, transposed = LEAVES[path]
    shape = shape[1:] if "{}" in name else shape
    return shape[::-1] if transposed else shape


def _check_tensors(tensors: dict, shapes: Params, folder: Path) -> None:
    """Raises UserError for the first tensor that is missing, mis-shaped, mistyped or not expected."""
    where = folder / (SINGLE if (folder / SINGLE).is_file() else INDEX)
    expected = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        path = _path(key_path)
        expected |= dict.fromkeys(_names(path, leaf.shape), _stored_shape(path, leaf.shape))
    for name, shape in expected.items():
        if name not in tensors:
            raise UserError(f"{where} lacks tensor {name}, which its config.json requires; {PASS}")
        handle, file = tensors[name]
        stored = handle.get_slice(name)
        if tuple(stored.get_shape()) != shape:
            raise UserError(
                f"tensor {name} in {file} has shape {tuple(stored.get_shape())}; its config.json requires "
                f"{shape}; {PASS}"
            )
        if stored.get_dtype() not in STORED_TYPES:
            raise UserError(
                f"tensor {name} in {file} is stored as {stored.get_dtype()}; it must be one of "
                f"{', '.join(STORED_TYPES)}; {PASS} that is not quantized"
            )
    for name in sorted(tensors.keys() - expected.keys()):
        file = tensors[name][1]
        raise UserError(f"tensor {name} in {file} is not part of the model in its config.json; {PASS}")


def _read_shard(
    tensors: dict, path: str, shape: tuple[int, ...], ranges: Ranges, dtype: np.dtype
) -> np.ndarray:
    """Reads the part [start, stop) of each dimension of a leaf, and no more of any tensor."""
    name, transposed = LEAVES[path]
    stacked = "{}" in name
    inner = [slice(start, stop) for start, stop in ranges[stacked:]]
    index = tuple(inner[::-1] if transposed else inner)
    host = np.empty([stop - start for start, stop in ranges], dtype)
    slots = host if stacked else host[None]
    names = _names(path, shape)[slice(*ranges[0])] if stacked else _names(path, shape)
    for slot, tensor in zip(slots, names, strict=True):
        value = tensors[tensor][0].get_slice(tensor)[index]
        slot[...] = value.T if transposed else value
    return host


# --- saving ---------------------------------------------------------------------------------------


def save_pretrained(
    path: str | Path,
    params: Params,
    config: Qwen3Config,
    *,
    source: str | Path | None = None,
    dtype: str = "float32",
    max_shard_bytes: float = 5e9,
    progress: Progress = no_progress,
) -> None:
    """Writes config.json and safetensors that `transformers` loads; equal params give equal bytes.

    With `source`, its config.json is copied, with the new dtype and with explicit values of what it left to
    defaults. Every file is written to a temporary name and renamed once it is complete; files of an older
    save are removed. Of several processes all must call it; only the first one writes. progress counts
    arrays. Raises UserError if the directory cannot be written (because the disk is full, for example).
    """
    folder = Path(path)
    fields = config_fields(config)
    if source is not None:
        given = files.read_json(Path(source) / "config.json")
        stated = stated_fields(config)
        fields = given | {name: value for name, value in stated.items() if given.get(name) is None}
    fields.pop("torch_dtype", None)  # the older name of the same field
    shards = _plan(params, jnp.dtype(dtype).itemsize, max_shard_bytes)
    tensors = _tensors(params, dtype, progress)
    if jax.process_index() != 0:
        for _ in tensors:  # takes part in fetching the leaves
            pass
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_shards(folder, shards, tensors)
        files.write_json(folder / "config.json", fields | {"dtype": dtype})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written ({error}); free disk space or choose another directory"
        ) from error


def _plan(params: Params, itemsize: int, limit: float) -> dict[str, list[tuple[str, int]]]:
    """File name -> its (tensor, bytes), in leaf order and at most `limit` bytes per file."""
    groups: list[list[tuple[str, int]]] = [[]]
    left = limit
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = _names(_path(key_path), leaf.shape)
        size = math.prod(leaf.shape) // len(names) * itemsize
        for name in names:
            if groups[-1] and size > left:
                groups.append([])
                left = limit
            groups[-1].append((name, size))
            left -= size
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    total = len(groups)
    return {f"model-{i:05}-of-{total:05}.safetensors": g for i, g in enumerate(groups, 1)}


def _tensors(params: Params, dtype: str, progress: Progress) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values in the order of `_plan`, with one leaf on the host at a time."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for written, (key_path, leaf) in enumerate(leaves):
        progress(written, len(leaves))
        path = _path(key_path)
        name, transposed = LEAVES[path]
        host = fetch(leaf).astype(jnp.dtype(dtype))
        for tensor, value in zip(_names(path, host.shape), host if "{}" in name else host[None], strict=True):
            yield tensor, np.ascontiguousarray(value.T if transposed else value)


def _write_shards(folder: Path, shards: dict, tensors: Iterator[tuple[str, np.ndarray]]) -> None:
    for name, group in shards.items():
        part = atomic.temporary(folder / name)
        save_file(dict(itertools.islice(tensors, len(group))), part, metadata={"format": "pt"})
        os.chmod(part, 0o644)  # safetensors makes files that only their owner can read
    # If the process is killed from here on, files are missing, and every loader notices that.
    old = [*folder.glob("model-?????-of-?????.safetensors"), folder / SINGLE, folder / INDEX]
    for file in old:
        file.unlink(missing_ok=True)
    for name in shards:
        os.replace(atomic.temporary(folder / name), folder / name)
    if len(shards) > 1:
        size = sum(size for group in shards.values() for _, size in group)
        places = {tensor: name for name, group in shards.items() for tensor, _ in group}
        files.write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
