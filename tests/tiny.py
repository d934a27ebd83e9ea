"""A hand-made Qwen3 directory that answers in the gym's form without any training.

It is a bigram model: every token has its own dimension, so the head alone determines which token follows
which. Small random blocks add a little of the rest of the context, so student and teacher differ. Sampling
sometimes gives a right answer; greedy decoding gives a complete reflection that quotes "=".
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from tokenizers import Tokenizer

from rosd_jax.gym import pretrain
from rosd_jax.gym import problems as gym
from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.types import Params
from support import made_once, shared_dir

NUMBERS = {str(n): 1 / gym.MODULUS for n in range(gym.MODULUS)}
FOLLOWS = {
    "\n": {"<error_quote>": 0.5, "<answer>": 0.45, "a ": 0.05},
    "a ": NUMBERS,
    "=": {"</error_quote>": 0.6, "\n": 0.4},
    "<error_quote>": {"=": 1.0},
    "</error_quote>": {"<explanation>": 1.0},
    "<explanation>": {"+": 1.0},
    "+": {"</explanation>": 0.6} | {name: 0.4 * p for name, p in NUMBERS.items()},
    "</explanation>": {"<|im_end|>": 0.55, "\n": 0.45},
    "<answer>": NUMBERS,
    "</answer>": {"<|im_end|>": 1.0},
} | {name: {"</answer>": 0.65, "=": 0.35} for name in NUMBERS}
RARE = 1e-4  # probability of every other next token, before normalisation


def model_config(tokenizer: Tokenizer) -> Qwen3Config:
    """A model with one dimension per token, and a few padding rows in the embedding."""
    return Qwen3Config(
        vocab_size=96,
        hidden_size=96,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        rope_theta=1e4,
        tie_word_embeddings=False,
        max_position_embeddings=256,
        num_tokens=tokenizer.get_vocab_size(),
    )


def make_params(config: Qwen3Config, tokenizer: Tokenizer) -> Params:
    """Random blocks between an identity as the embedding and a table of log-probabilities as the head."""
    params = jax.device_get(init_params(config, jax.random.key(0)))
    chance = np.full((96, 96), RARE)
    for word, following in FOLLOWS.items():
        for other, p in following.items():
            chance[tokenizer.token_to_id(word), tokenizer.token_to_id(other)] = p
    length = np.sqrt(96)  # of every hidden state, because of the norms
    blocks = params["blocks"]
    for layer in (blocks["attention"]["o_proj"], blocks["down_proj"]):
        layer["kernel"] = 4 * layer["kernel"]
    params["embed"] = (length * np.eye(96)).astype(np.float32)
    params["head"] = (np.log(chance).T / length).astype(np.float32)
    return params


def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model's directory, written once per session."""
    return made_once(shared_dir(tmp_path_factory) / "tiny-model", write)


def write(path: Path) -> None:
    """Writes config, weights and tokenizer to `path`."""
    tokenizer = pretrain.build_tokenizer()
    config = model_config(tokenizer)
    pretrain.write(path, make_params(config, tokenizer), config, tokenizer)
