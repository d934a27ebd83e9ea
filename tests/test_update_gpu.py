"""The update at the real size lowered for GPUs that are not there, with the kernels that it takes on them."""

from types import SimpleNamespace

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from test_plan import job_of

from configs.qwen3_science import SLICES
from support import nightly_but


@pytest.mark.parametrize(
    "variants", nightly_but(["8b,h100x8", "4b,h100x8", "4b,h200", "8b,h200,lora"], keep=[3])
)
def test_the_presets_for_gpus_lower_with_their_kernels(variants, monkeypatch):
    size, chips, *_ = variants.split(",")
    job = job_of(size, SLICES[chips][0], *variants.split(","))
    like, frozen_like = job.trees.like, job.trees.frozen_like
    # What the kernels ask of the machine; the mesh's devices stand in for as many GPUs.
    monkeypatch.setattr(jax, "devices", lambda: [SimpleNamespace(compute_capability="9.0")])
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(fused_attention_stablehlo, "is_cuda_compute_capability_equal", lambda of: of == "9.0")
    monkeypatch.setattr(fused_attention_stablehlo, "check_compute_capability", lambda of: float(of) <= 9)
    with jax.set_mesh(job.mesh), jax.numpy_dtype_promotion("standard"):  # as runs have it
        traced = job.update.trace(like, frozen_like, *job.update.longest)
        texts = {
            name: function.lower(lowering_platforms=("cuda",)).as_text() for name, function in traced.items()
        }
    assert all("__cudnn$fmha" in texts[name] for name in ("teach", "learn"))
    assert "mosaic_gpu" in texts["learn"]
    assert "10240x10240" not in texts["learn"] and "18432x18432" not in texts["teach"]
