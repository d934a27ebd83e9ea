"""A hand-made Qwen3 directory that answers in the gym's form without any training.

It is a bigram model: one dimension a token, so that the head alone says which token follows which.
Small random blocks make it look a little at the rest of the context, so student and teacher differ.
Sampled, it now and then answers right; greedy, it writes a whole reflection whose quote is "=".
"""

from pathlib import Path

import jax
import numpy as np

from rosd_jax.gym import pretrain
from rosd_jax.gym import problems as gym
from rosd_jax.models.qwen3 import Qwen3Config, init_params
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
RARE = 1e-4  # of everything else


def model_config(tokenizer) -> Qwen3Config:
    """One dimension a token, and a few padding rows."""
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


def make_params(config: Qwen3Config, tokenizer):
    """Random blocks between an identity and a table of log-probabilities."""
    params = jax.device_get(init_params(config, jax.random.key(0)))
    chance = np.full((96, 96), RARE)
    for word, following in FOLLOWS.items():
        for other, p in following.items():
            chance[tokenizer.token_to_id(word), tokenizer.token_to_id(other)] = p
    width = np.sqrt(96)  # the norms give every hidden state this length
    for name, scale in (("attention", "o_proj"), ("down_proj", None)):
        leaf = params["blocks"][name][scale] if scale else params["blocks"][name]
        leaf["kernel"] = 4 * leaf["kernel"]
    params["embed"] = (width * np.eye(96)).astype(np.float32)
    params["head"] = (np.log(chance).T / width).astype(np.float32)
    return params


def model_dir(tmp_path_factory) -> Path:
    """The directory, written once a session."""
    return made_once(shared_dir(tmp_path_factory) / "tiny-model", write)


def write(path: Path) -> None:
    tokenizer = pretrain.build_tokenizer()
    config = model_config(tokenizer)
    pretrain.write(path, make_params(config, tokenizer), config, tokenizer)
