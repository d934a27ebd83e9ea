"""Trains the gym's tiny base model from scratch and writes it as a Hugging Face directory.

    python -m rosd_jax.gym --out=models/gym --steps=2400 --seed=0

The texts (texts.py) are pairs of prompt and response; the loss is the cross-entropy of the response. The
model learns the distribution of slips: sampled at temperature 1, it slips as often as its texts do.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import defaultdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from rosd_jax.gym import problems
from rosd_jax.gym.texts import DRILLS, sample_text
from rosd_jax.models import qwen3
from rosd_jax.models.weights import save_pretrained
from rosd_jax.types import Params

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
TAG_NAMES = ("answer", "error_quote", "explanation")
PROMPT_WORDS = ("system", "user", "assistant", "solution", "attempt", "idea", "find", "error", "key")
VERDICTS = (" same", " differ")
CHAT_TEMPLATE = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIXTURE = {  # the share of each task in the batches after the drills
    "solve": 0.31,
    "idea": 0.19,
    "shown": 0.02,
    "reflect_wrong": 0.3,
    "reflect_right": 0.03,
    "compare": 0.1,
    "facts": 0.05,
}
DRILL_STEPS = 400  # the first batches are drills alone
FAMILY_SHARE = {"chain": 0.5, "long": 0.25, "words": 0.25}


def build_tokenizer() -> Tokenizer:
    """A closed word-level vocabulary: numbers, signs, line letters and tags are one token each."""
    words = [str(n) for n in range(problems.MODULUS)]
    words += [*(f"{letter} " for letter in problems.LETTERS), *problems.LETTERS]
    words += [*"+-*=\n .,:;?!()", *(f" {op}" for op in "+-*")]
    words += [f" {word} " for word in problems.WORDS.values()] + [*PROMPT_WORDS, *problems.WORDS.values()]
    words += VERDICTS
    words += [f"<{slash}{tag}>" for tag in TAG_NAMES for slash in ("", "/")]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL_TOKENS, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pieces = r"</?[a-z_]+>| (?:plus|minus|times) | (?:same|differ)|[a-h] | [-+*]|[a-z]+|\d+|\n|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def chat(prompt: str) -> str:
    """The shipped chat template, applied to one user message."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def batch(rng: np.random.Generator, tokenizer: Tokenizer, step: int) -> tuple[str, np.ndarray, np.ndarray]:
    """The name of one task, its tokens [B, T] and mask [B, T] (int32; 1 on the tokens that are learned).

    A batch holds one task, so that short texts are not padded to the length of reflections. The first
    DRILL_STEPS batches are drills: alone, comparing numbers and single steps are learned within some hundred
    steps; among other tasks it takes far longer, since those can at first do without.
    """
    drawn = str(rng.choice(list(MIXTURE), p=list(MIXTURE.values())))
    task = DRILLS[step % 2] if step <= DRILL_STEPS else drawn
    families = FAMILY_SHARE if task in ("solve", "idea") else {"chain": 1.0}
    family = str(rng.choice(list(families), p=list(families.values())))
    pairs = [sample_text(rng, task, family) for _ in range(_rows(task, family))]
    prompts = [tokenizer.encode(chat(prompt)).ids for prompt, _ in pairs]
    responses = [tokenizer.encode(f"{response}<|im_end|>").ids for _, response in pairs]
    longest = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens_BT, mask_BT = np.zeros((2, len(pairs), -(-longest // 32) * 32), np.int32)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        stop = len(prompt) + len(response)
        tokens_BT[row, :stop] = prompt + response
        mask_BT[row, len(prompt) : stop] = 1
    # The numbers of the drills are random: only the verdicts and the results can be learned.
    if task == "compare":
        mask_BT &= np.isin(tokens_BT, np.array([tokenizer.token_to_id(word) for word in VERDICTS]))
    if task == "facts":
        mask_BT[:, 1:] &= tokens_BT[:, :-1] == tokenizer.token_to_id("=")
    return task, tokens_BT, mask_BT


def _rows(task: str, family: str) -> int:
    """Rows of a batch, so that batches of all tasks have about as many tokens."""
    if "reflect" in task:
        return 24
    return 32 if family == "long" else 48


def loss(params: Params, config: qwen3.Qwen3Config, tokens_BT: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy of the tokens under the mask, a scalar."""
    hidden_BTD = qwen3.hidden_states(params, config, tokens_BT[:, :-1])
    logits_BTV = qwen3.logits(params, config, hidden_BTD)
    nll_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, tokens_BT[:, 1:])
    weight_BT = mask_BT[:, 1:].astype(jnp.float32)
    return (nll_BT * weight_BT).sum() / weight_BT.sum()


def train(config: qwen3.Qwen3Config, tokenizer: Tokenizer, steps: int, lr: float, seed: int) -> Params:
    """Trains from random weights and returns the params; prints each task's loss every hundred steps."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(200, steps // 2), steps, lr / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(params, opt_state, tokens_BT, mask_BT):
        value, grads = jax.value_and_grad(loss)(params, config, tokens_BT, mask_BT)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = qwen3.init_params(config, jax.random.key(seed))
    opt_state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    started = time.time()
    losses = defaultdict(list)
    for step in range(1, steps + 1):
        task, tokens_BT, mask_BT = batch(rng, tokenizer, step)
        params, opt_state, value = update(params, opt_state, tokens_BT, mask_BT)
        losses[task].append(value)
        if step % 100 == 0 or step == steps:
            means = "  ".join(f"{name} {np.mean(found):.4f}" for name, found in sorted(losses.items()))
            print(f"step {step}/{steps}  {time.time() - started:.0f} s  {means}", flush=True)
            losses.clear()
    return params


def write(path: Path, params: Params, config: qwen3.Qwen3Config, tokenizer: Tokenizer) -> None:
    """Writes a Hugging Face directory: config.json, model.safetensors, tokenizer and chat template."""
    path.mkdir(parents=True, exist_ok=True)
    save_pretrained(path, params, config, source=None, dtype="float32")
    tokenizer.save(str(path / "tokenizer.json"))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}) + "\n")


def main() -> None:
    """The command `python -m rosd_jax.gym`."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    tokenizer = build_tokenizer()
    config = qwen3.Qwen3Config(
        vocab_size=-(-tokenizer.get_vocab_size() // 128) * 128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1e4,
        tie_word_embeddings=True,
        max_position_embeddings=512,
        num_tokens=tokenizer.get_vocab_size(),
    )
    params = train(config, tokenizer, args.steps, args.lr, args.seed)
    write(args.out, params, config, tokenizer)
    print(f"wrote {args.out}")
