"""The loss and its weights against numbers from the released code.

Runs every case eagerly: XLA then compiles each operation once for all the cases of one shape,
instead of a program for each of the 351.
"""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oracles.token_weights import aggregate_weights, importance_weights
from rosd_jax.kernels.topk_jsd import rows_xla, sampled_token_loss_from_logits, topk_jsd_from_logits
from support import golden_dir, nightly_but

# Shared by the files, so that they share compilations: rows of weight 0 and ids >= num_tokens fill.
ROWS = 64
VOCABS = (128, 4096)
FILES = sorted(path.name for path in golden_dir().glob("loss_*.npz"))
SMALL = [number for number, name in enumerate(FILES) if "v128" in name or "v64" in name]


@pytest.fixture(autouse=True)
def one_block(monkeypatch):
    """All rows in one block: the loop over blocks, which other tests run, compiles for every case."""
    monkeypatch.setattr(rows_xla, "MIN_BLOCK", ROWS)


@cache
def arrays(name):
    with np.load(golden_dir() / name) as file:
        return dict(file)


def cases(name):
    index = json.loads((golden_dir() / "loss_index.json").read_text())
    return [case for case in index if case["file"] == name]


def flat(x, dtype=None):
    """[B, T, ...] as rows, filled up to ROWS."""
    x = x.reshape(-1, *x.shape[2:])
    return jnp.asarray(np.pad(x, [(0, ROWS - len(x))] + [(0, 0)] * (x.ndim - 1)), dtype)


def flat_logits(logits, dtype):
    """The same, columns filled up to one of VOCABS; what fills must not be read, so it is large."""
    vocab = next(v for v in VOCABS if v >= logits.shape[-1])
    logits = np.pad(logits, [(0, 0), (0, 0), (0, vocab - logits.shape[-1])], constant_values=100.0)
    return flat(logits, dtype)


def unflat(x_N, like):
    size = like.shape[0] * like.shape[1]
    return np.asarray(x_N)[:size].reshape(*like.shape[:2], *x_N.shape[1:])


def mask_of(file, config):
    mask = file["response_mask"]
    if config["use_sample_mask"]:
        mask = mask * file["sample_mask"][:, None]
    return mask * file["token_mask"] if config["use_token_mask"] else mask


def weight_of(file, config, dtype):
    weight = np.asarray(aggregate_weights(mask_of(file, config).astype(dtype), config["agg"]))
    return weight * file["rollout_is_weights"] if config["rollout_is"] else weight


def our_loss(file, config, dtype, implementation):
    """Loss, and per token the loss before its weight [B, T] and the gradient [B, T, V]."""
    student_NV, teacher_NV = (flat_logits(file[f"{who}_logits"], dtype) for who in ("student", "teacher"))
    vocab = file["student_logits"].shape[-1]
    tokens_N, weight_N = flat(file["token_ids"]), flat(weight_of(file, config, dtype), dtype)
    shared = {
        "sampler_logp_N": flat(file["old_log_probs"], dtype),
        "ratio_cap": config["is_clip"],
        "num_tokens": None if vocab == student_NV.shape[-1] else vocab,
    }
    top_k = {
        "k": config["topk"],
        "alpha": config["alpha"],
        "tail": "bucket" if config["add_tail"] else "renorm",
        "tokens_N": tokens_N,
        "implementation": implementation,
    }

    def loss(z_NV):
        if config["sampled"]:
            return sampled_token_loss_from_logits(z_NV, teacher_NV, tokens_N, weight_N, **shared)
        return topk_jsd_from_logits(z_NV, teacher_NV, weight_N, **top_k, **shared)

    (value, aux), grad_NV = jax.value_and_grad(loss, has_aux=True)(student_NV)
    assert not np.asarray(grad_NV)[np.asarray(weight_N) == 0].any()
    assert not np.asarray(grad_NV)[:, vocab:].any()
    like = file["response_mask"]
    grad = unflat(np.asarray(grad_NV)[:, :vocab], like)
    return value, unflat(aux.divergence_N, like), unflat(aux.ratio_N, like), grad


def tolerance(dtype, kind):
    if dtype == np.float64:
        return {"rtol": 1e-10, "atol": 1e-14}
    return {"rtol": 1e-4 if kind == "peaked" else 1e-6, "atol": 5e-6}


def check_case(file, case, dtype, implementation):
    config, at = case["config"], f"c{case['case']:03d}_"
    value, divergence, ratio, grad = our_loss(file, config, dtype, implementation)
    assert value.dtype == dtype
    mask = file[at + "loss_mask"] > 0
    np.testing.assert_array_equal(mask_of(file, config) > 0, mask)
    if not mask.any():
        # The released seq-mean modes divide by no sequences and give NaN.
        assert value == 0 and not grad.any()
        return
    bound = tolerance(dtype, case["kind"])
    # The sampled-token cases have no ideal: they are always finite.
    ideal = file.get(at + "ideal_div_f64", np.zeros(mask.shape))[mask]
    if np.isfinite(ideal).all():
        assert np.isfinite(value) and np.isfinite(grad).all()
    if case["loss_finite"]:
        np.testing.assert_allclose(value, file[at + "loss_f64"], **bound)
        weights = file["rollout_is_weights"] if config["rollout_is"] else np.ones(mask.shape)
        per_token = (divergence * ratio * weights)[mask]
        np.testing.assert_allclose(per_token, file[at + "per_token_f64"][mask], **bound)
    elif np.isfinite(ideal).all():
        np.testing.assert_allclose(divergence[mask], ideal, rtol=1e-5, atol=5e-6)
    if case["grad_finite"]:
        wanted = file[at + "grad_f64"]
        if wanted.dtype == np.float32:
            bound = bound | {"rtol": max(bound["rtol"], 1e-7)}
        np.testing.assert_allclose(grad, wanted, **bound)


@pytest.mark.parametrize("name", nightly_but(FILES, keep=SMALL))
def test_float32_xla_agrees_with_the_released_loss(name):
    for case in cases(name):
        check_case(arrays(name), case, np.float32, "xla")


# The cross of all options is left to float64; the other files are what strains float32.
@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in FILES if "full" not in name])
def test_float32_reference_agrees_with_the_released_loss(name):
    for case in cases(name):
        check_case(arrays(name), case, np.float32, "reference")


@pytest.mark.parametrize("name", nightly_but(FILES, keep=SMALL))
def test_float64_reference_agrees_with_the_released_loss(name):
    with jax.enable_x64(True):
        for case in cases(name):
            check_case(arrays(name), case, np.float64, "reference")


def test_every_case_of_the_index_is_run():
    index = json.loads((golden_dir() / "loss_index.json").read_text())
    assert index and {case["file"] for case in index} == set(FILES)


def test_importance_weights_agree_with_the_released_correction():
    file = arrays("rollout_is.npz")
    outputs = [name.split("_") for name in file if "_thr" in name]
    assert outputs
    run = jax.jit(importance_weights, static_argnames=("level", "batch_normalize"))
    with jax.enable_x64(True):
        for row, level, normalize, cap in outputs:
            wanted = file[f"{row}_{level}_{normalize}_{cap}"]
            # One shape for all, with padding off the mask.
            padding = [(0, 8 - wanted.shape[0]), (0, 64 - wanted.shape[1])]
            inputs = (file[f"{row}_{part}"] for part in ("old", "rollout", "mask"))
            ours = run(
                *(np.pad(np.float64(x), padding) for x in inputs),
                level=level,
                cap=float(cap[3:]),
                batch_normalize=normalize == "bn1",
            )
            ours = ours[: wanted.shape[0], : wanted.shape[1]]
            np.testing.assert_allclose(ours, wanted, rtol=1e-10, atol=1e-14)
