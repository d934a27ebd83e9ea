"""Trains the gym's tiny base model from scratch and writes it as a Hugging Face directory.

    python -m rosd_jax.data.gym --out=models/gym --steps=2400 --seed=0

The texts (gym.py) are prompt and response pairs; the loss is the cross-entropy of the response. What the
model learns of slips is their distribution: sampled at temperature 1 it slips as often as its texts do.
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

from rosd_jax.data import gym
from rosd_jax.models import qwen3
from rosd_jax.models.weights import save_pretrained
from rosd_jax.text.prompts import idea_text, right_messages, solution_text, wrong_messages

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")
TAGS = ("answer", "error_quote", "explanation")
WORD_LIST = ("system", "user", "assistant", "solution", "attempt", "idea", "find", "error", "key")
VERDICTS = (" same", " differ")
TEMPLATE = (
    "{%- for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MIXTURE = {
    "solve": 0.31, "idea": 0.19, "shown": 0.02, "reflect_wrong": 0.3, "reflect_right": 0.03,
    "compare": 0.1, "facts": 0.05,
}  # fmt: skip
DRILLS = ("compare", "facts")
DRILL_STEPS = 400
FAMILY_SHARE = {"chain": 0.5, "long": 0.25, "words": 0.25}


def build_tokenizer() -> Tokenizer:
    """A closed word-level vocabulary: numbers, signs, line letters and tags are one token each."""
    words = [*(str(n) for n in range(gym.DIAL)), *(f"{c} " for c in gym.LETTERS), *gym.LETTERS]
    words += [*"+-*=\n .,:;?!()", *(f" {op}" for op in "+-*")]
    words += [f" {word} " for word in gym.WORDS.values()] + [*WORD_LIST, *gym.WORDS.values()]
    words += VERDICTS
    words += [f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/")]
    vocab = {word: i for i, word in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    pieces = r"</?[a-z_]+>| (?:plus|minus|times) | (?:same|differ)|[a-h] | [-+*]|[a-z]+|\d+|\n|."
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def sample_text(rng: np.random.Generator, task: str, family: str) -> tuple[str, str]:
    """One (prompt, response) pair of a task; prompts are user messages."""
    if task in DRILLS:
        return ("find error", gym.comparisons(rng)) if task == "compare" else ("find key", gym.facts(rng))
    chain = gym.sample_chain(rng, family, "train")
    right = gym.solve(chain)
    if task == "solve":
        return chain.text, gym.respond(gym.solve(chain, rng))
    if task == "shown":
        return solution_text(chain.text, gym.respond(right), gym.WORDING), gym.respond(right)
    if task == "idea":
        sure = int(rng.integers(len(right)))
        prompt = idea_text(chain.text, right[sure], gym.WORDING)
        return prompt, gym.respond(gym.solve(chain, rng, sure))
    if task == "reflect_right":
        messages = right_messages(chain.text, gym.respond(right), None, gym.WORDING)
        return messages[-1]["content"], f"<explanation>{right[gym.key_line(right)]}</explanation>"
    return reflection_text(chain, wrong_solution(chain, rng))


def wrong_solution(chain: gym.Chain, rng: np.random.Generator) -> list[str]:
    """An attempt with a wrong answer."""
    while True:
        lines = gym.solve(chain, rng)
        if lines[-1].split("=")[1] != gym.solve(chain)[-1].split("=")[1]:
            return lines


def reflection_text(chain: gym.Chain, wrong: list[str]) -> tuple[str, str]:
    """The reflector's prompt for a wrong attempt, and what it should write."""
    right = gym.solve(chain)
    shown, attempt = gym.respond(right), gym.respond(wrong)
    messages = wrong_messages(chain.text, shown, attempt, None, gym.WORDING)
    return messages[-1]["content"], gym.reflect_wrong(right, wrong)


def chat(prompt: str) -> str:
    """The shipped chat template, applied to one user message."""
    return f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"


def batch(rng: np.random.Generator, tokenizer: Tokenizer, step: int) -> tuple[str, np.ndarray, np.ndarray]:
    """One task's name, its tokens [B, T] and mask [B, T] (1 on response tokens).

    A batch holds one task, so that short texts are not padded to the length of reflections. The first
    batches are drills: telling equal numbers from others, and the table of single steps, are learned in
    some hundred steps by themselves, and much later among tasks that can do without them at first.
    """
    drawn = str(rng.choice(list(MIXTURE), p=list(MIXTURE.values())))
    task = DRILLS[step % 2] if step <= DRILL_STEPS else drawn
    families = FAMILY_SHARE if task in ("solve", "idea") else {"chain": 1.0}
    family = str(rng.choice(list(families), p=list(families.values())))
    rows = 24 if "reflect" in task else 32 if family == "long" else 48  # alike in tokens
    pairs = [sample_text(rng, task, family) for _ in range(rows)]
    prompts = [tokenizer.encode(chat(p)).ids for p, _ in pairs]
    responses = [tokenizer.encode(r + "<|im_end|>").ids for _, r in pairs]
    length = max(len(p) + len(r) for p, r in zip(prompts, responses, strict=True))
    tokens, mask = np.zeros((2, len(pairs), -(-length // 32) * 32), np.int32)
    for row, (p, r) in enumerate(zip(prompts, responses, strict=True)):
        tokens[row, : len(p) + len(r)] = p + r
        mask[row, len(p) : len(p) + len(r)] = 1
    if task == "compare":  # its numbers are random: only the verdicts can be learned
        mask &= np.isin(tokens, np.array([tokenizer.token_to_id(word) for word in VERDICTS]))
    if task == "facts":
        mask[:, 1:] &= tokens[:, :-1] == tokenizer.token_to_id("=")
    return task, tokens, mask


def loss(params, config: qwen3.Qwen3Config, tokens_BT, mask_BT) -> jax.Array:
    """Mean cross-entropy of the response tokens."""
    hidden_BTD = qwen3.hidden_states(params, config, tokens_BT[:, :-1])
    z = qwen3.logits(params, config, hidden_BTD)
    nll = optax.softmax_cross_entropy_with_integer_labels(z, tokens_BT[:, 1:])
    mask = mask_BT[:, 1:].astype(jnp.float32)
    return (nll * mask).sum() / mask.sum()


def train(config: qwen3.Qwen3Config, tokenizer: Tokenizer, steps: int, lr: float, seed: int):
    """Trains from random weights; prints each task's loss every hundred steps. Returns the params."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, lr, min(200, steps // 2), steps, lr / 50)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, tokens, mask):
        value, grads = jax.value_and_grad(loss)(params, config, tokens, mask)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    params = qwen3.init_params(config, jax.random.key(seed))
    opt_state = optimizer.init(params)
    rng, started, losses = np.random.default_rng(seed), time.time(), defaultdict(list)
    for i in range(1, steps + 1):
        task, tokens, mask = batch(rng, tokenizer, i)
        params, opt_state, value = step(params, opt_state, tokens, mask)
        losses[task].append(value)
        if i % 100 == 0 or i == steps:
            means = "  ".join(f"{k} {np.mean(v):.4f}" for k, v in sorted(losses.items()))
            print(f"step {i}/{steps}  {time.time() - started:.0f} s  {means}", flush=True)
            losses.clear()
    return params


def write(path: Path, params, config: qwen3.Qwen3Config, tokenizer: Tokenizer) -> None:
    """An ordinary Hugging Face directory: config.json, model.safetensors, tokenizer, template."""
    path.mkdir(parents=True, exist_ok=True)
    save_pretrained(path, params, config, source=None, dtype="float32")
    tokenizer.save(str(path / "tokenizer.json"))
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE,
    )
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")
    stop = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}) + "\n")


def main() -> None:
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
