"""Writes adapters as a directory that Hugging Face's PEFT loads: adapter_config.json and safetensors.

save_adapters(path, params, rank=, alpha=, targets=, base=)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save

from rosd_jax import atomic
from rosd_jax.errors import UserError
from rosd_jax.models import files
from rosd_jax.models.sharding import fetch
from rosd_jax.models.weights import LEAVES
from rosd_jax.types import Params

WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
SUFFIX = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}


def save_adapters(
    path: str | Path, params: Params, *, rank: int, alpha: float, targets: tuple[str, ...], base: str
) -> None:
    """Writes the adapters among the params; `base` tells PEFT the path of the model that they belong to.

    Of several processes all must call it; only the first one writes. Raises UserError if the directory cannot
    be written (because the disk is full, for example).
    """
    folder = Path(path)
    tensors: dict[str, np.ndarray] = {}
    for key_path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *above, name = jax.tree_util.keystr(key_path, simple=True, separator="/").split("/")
        if name in SUFFIX:
            module = LEAVES["/".join([*above, "kernel"])][0].removesuffix("weight")
            for layer, value in enumerate(fetch(leaf)):
                stored = np.ascontiguousarray(value.T)  # torch keeps weights as [out, in]
                tensors[f"base_model.model.{module.format(layer)}{SUFFIX[name]}"] = stored
    if jax.process_index() != 0:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_bytes(folder / WEIGHTS, [save(tensors, metadata={"format": "pt"})])
        files.write_json(folder / ADAPTER_CONFIG, _config(rank, alpha, targets, base))
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} cannot be written ({error}); free disk space or choose another directory"
        ) from error


def _config(rank: int, alpha: float, targets: tuple[str, ...], base: str) -> dict[str, Any]:
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": sorted(targets),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
        "inference_mode": True,
    }
