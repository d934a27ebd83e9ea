"""A run whose adapters learn: it resumes exactly, is evaluated again, and exports one model in two ways."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_lora import numpy_merge
from test_run import (  # noqa: F401  (model: a fixture)
    Run,
    arguments,
    assert_same_run,
    finish,
    model,
    numbers,
)

STEPS = 2
FIELDS = dict(
    model__lora__rank=4,
    model__lora__alpha=8.0,
    model__lora__targets="('q_proj', 'v_proj', 'down_proj')",
    optimizer__lr=0.01,
    reflect__weights="student",
    eval__every=1,
    checkpoint__every=1,
    eval__limit=4,
)


@pytest.fixture(scope="module")
def whole(model, cache, tmp_path_factory):  # noqa: F811
    """The directory of a run that nothing disturbed."""
    path = tmp_path_factory.mktemp("lora")
    finish(arguments(model, path / "run", **FIELDS, steps=STEPS), path, **cache)
    return path / "run"


@pytest.mark.slow
def test_adapters_are_trained_and_exported(whole, model, tmp_path):  # noqa: F811
    trained = [row for row in numbers(whole) if row["split"] == "train"]
    assert [row["skipped_empty"] + row["skipped_nonfinite"] for row in trained] == [0, 0]
    assert all(row["active_tokens"] > 0 and row["grad_norm"] > 0 for row in trained)
    assert abs(trained[1]["ratio"] - 1) < 1e-3  # rollouts come from the adapters that learn

    before, after = (load_file(path / "model.safetensors") for path in (model, whole / "export"))
    moved = {name for name in before if (before[name] != after[name]).any()}
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "v_proj", "down_proj"}
    adapter = whole / "export" / "adapter"
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert (said["r"], said["lora_alpha"], said["base_model_name_or_path"]) == (4, 8.0, str(model))
    numpy_merge(adapter, model, tmp_path / "merged")
    for name, value in load_file(tmp_path / "merged" / "model.safetensors").items():
        np.testing.assert_allclose(after[name], value, atol=1e-6)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_of_adapters_resumes_exactly(whole, model, cache, tmp_path):  # noqa: F811
    for steps in range(1, STEPS + 1):
        finish(arguments(model, tmp_path / "cut", **FIELDS, steps=steps), tmp_path, **cache)
    assert_same_run(tmp_path / "cut", whole)


@pytest.mark.nightly
@pytest.mark.slow
def test_adapters_are_evaluated_again_on_their_own_base_alone(whole, model, cache, tmp_path):  # noqa: F811
    scored = numbers(whole)
    finish(arguments(model, whole, mode="eval", **FIELDS, steps=STEPS), tmp_path, **cache)
    assert numbers(whole) == scored

    other = tmp_path / "other"  # of the same shapes
    shutil.copytree(model, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: 1.5 * x for name, x in weights.items()}, other / "model.safetensors")
    refused = Run(arguments(other, whole, mode="eval", **FIELDS, steps=STEPS), tmp_path, **cache)
    status, said = refused.end()
    assert status == 2 and "the weights of" in said
