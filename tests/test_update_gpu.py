"""The update at the real size lowered for GPUs that are not there, with the kernels that it takes on them."""

from types import SimpleNamespace

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from configs import qwen3_science
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import make_mesh
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import make_optimizer, make_update

COMMON = dict(
    vocab_size=151936,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    num_tokens=151669,
    dtype="bfloat16",
)
MODELS = {
    "4b": Qwen3Config(hidden_size=2560, intermediate_size=9728, tie_word_embeddings=True, **COMMON),
    "8b": Qwen3Config(hidden_size=4096, intermediate_size=12288, **COMMON),
}


@pytest.mark.parametrize("variants", ["8b,h100x8", "4b,h100x8", "4b,h200", "8b,h200,lora"])
def test_the_presets_for_gpus_lower_with_their_kernels(variants, monkeypatch):
    config = qwen3_science.get_config(variants)
    lora = config.model.lora
    scale = lora.alpha / lora.rank if lora.rank else 0.0
    model = MODELS[variants[:2]].replace(remat=config.model.remat, lora_scale=scale)
    sizes = config.mesh.data, config.mesh.fsdp, config.mesh.tensor
    mesh = make_mesh(*sizes, devices=jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    trees = Trees(config, model, mesh, make_optimizer(config))
    update = make_update(config, model, trees.optimizer, mesh, trees.shardings)
    like, frozen_like = trees.like, trees.frozen_like
    # What the kernels ask of the machine; the mesh's devices stand in for as many GPUs.
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda of: of == "9.0")
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda of: float(of) <= 9)
    with jax.set_mesh(mesh), jax.numpy_dtype_promotion("standard"):  # as runs have it
        traced = update.trace(like, frozen_like, *update.longest)
        texts = {
            name: function.lower(lowering_platforms=("cuda",)).as_text() for name, function in traced.items()
        }
    assert all("__cudnn$fmha" in texts[name] for name in ("teach", "learn"))
    assert "mosaic_gpu" in texts["learn"]
    assert "10240x10240" not in texts["learn"] and "18432x18432" not in texts["teach"]
