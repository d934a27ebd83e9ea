"""The decoding benchmark: its lengths are everybody's, and our side of every case yields its files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import decode
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.rollout.sampler import sample
from support import nightly_but

TINY = decode.Sizes(
    Qwen3Config(256, 32, 48, 2, 2, 1, 16, tie_word_embeddings=True),
    prompt=8,
    fixed=(4, 6),
    ragged_rows=6,
    ragged_mean=4,
    ragged_most=12,
    questions=3,
    samples=4,
    slots=4,
    short_mean=3,
    short_most=8,
    prompt_rows=4,
    prompt_mean=9,
    prompt_most=24,
    top_p=(2, 1000),
    devices=2,
)


def test_lengths_are_lognormal_cut_and_always_the_same():
    drawn = decode.lengths(20000, 96.0, 512, seed=3)
    np.testing.assert_array_equal(drawn, decode.lengths(20000, 96.0, 512, seed=3))
    assert drawn.min() >= 1 and drawn.max() == 512
    assert abs(drawn.mean() / 96 - 1) < 0.05 and abs(np.median(drawn) / 96 - np.exp(-0.32)) < 0.03


def test_sorting_finds_the_ids_that_bisection_finds():
    z_BV, u_B = 3 * jax.random.normal(jax.random.key(0), (40, 1000)), jnp.linspace(0.01, 0.99, 40)
    bisected, _ = sample(z_BV, u_B, temperature=1.0, top_p=decode.TOP_P)
    np.testing.assert_array_equal(decode.by_sorting(z_BV, u_B), bisected)


ALL = ["fixed", "ragged", "evaluation", "prompts", "top_p"]


@pytest.mark.parametrize("cases", nightly_but([["fixed"], ALL], keep=[0]), ids=len)
def test_every_case_runs_and_reports_ours(cases, tmp_path):
    decode.main(["--out", str(tmp_path), "--rounds=1", f"--cases={','.join(cases)}"], TINY)
    record = json.loads((tmp_path / "decode.json").read_text())
    assert list(record["cases"]) == cases
    for case in record["cases"].values():
        assert len(case["results"]["ours"]["s"]) == 1 and case["wanted"] > 0
    assert record["cases"]["fixed"]["wanted"] == 24
    text = (tmp_path / "decode.md").read_text()
    assert len([line for line in text.splitlines() if line.startswith("|")]) == 2 + 2 * len(cases)
