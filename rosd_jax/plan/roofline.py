"""FLOPs and bytes of a step by formula, and the least seconds that a chip needs for them.

A multiply and an add are two FLOPs. Causal attention counts at half of its T x T products. What the
backward pass computes again is counted, since a chip does it; norms, rotations and softmax are not.
Seconds are those of the slowest of three: products at the chip's bfloat16 peak, memory at its bandwidth,
communication at its links. A real step takes longer.

    at_limits(config), realistic(config)          -> Lengths
    decode_work, teach_work, learn_work, apply_work -> Work of one chip
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.plan.chips import Chip
from rosd_jax.settings import Settings

# The lengths of a run as one sees them before it has run: a mean, and a long tail (lognormal).
PROMPT, RESPONSE, TEACHER, REFLECTOR, REFLECTION = 512, 1536, 1024, 4096, 512
SPREAD = 0.8


@dataclass(frozen=True)
class Lengths:
    """Tokens of each kind of text; responses and reflections one number a row."""

    name: str
    prompt: int
    response_B: tuple[int, ...]
    teacher: int  # of the teacher's prompt
    reflector: int  # of the reflector's prompt
    reflection_B: tuple[int, ...]
    evaluated_B: tuple[int, ...]  # of eval.batch rows

    def __str__(self) -> str:
        mean = sum(self.response_B) / len(self.response_B)
        reflection = sum(self.reflection_B) / len(self.reflection_B)
        return (
            f"{self.name}: prompts {self.prompt:,}, responses {mean:,.0f} (longest "
            f"{max(self.response_B):,}), teacher's prompts {self.teacher:,}, reflector's prompts "
            f"{self.reflector:,}, reflections {reflection:,.0f} (longest {max(self.reflection_B):,})"
        )


def at_limits(config: Settings) -> Lengths:
    """Every text as long as the config lets it be."""
    rows = config.batch.prompts * config.batch.samples
    return Lengths(
        name="limits",
        prompt=config.data.max_prompt_tokens,
        response_B=(config.rollout.max_new_tokens,) * rows,
        teacher=config.lesson.max_teacher_tokens,
        reflector=config.reflect.max_prompt_tokens,
        reflection_B=(config.reflect.max_new_tokens,) * rows,
        evaluated_B=(config.eval.max_new_tokens,) * config.eval.batch,
    )


def realistic(config: Settings) -> Lengths:
    """Texts as they are expected to be: a guess, cut at the config's limits."""
    rows = config.batch.prompts * config.batch.samples
    return Lengths(
        name="realistic",
        prompt=min(PROMPT, config.data.max_prompt_tokens),
        response_B=_lognormal(RESPONSE, rows, config.rollout.max_new_tokens),
        teacher=min(TEACHER, config.lesson.max_teacher_tokens),
        reflector=min(REFLECTOR, config.reflect.max_prompt_tokens),
        reflection_B=_lognormal(REFLECTION, rows, config.reflect.max_new_tokens),
        evaluated_B=_lognormal(RESPONSE, config.eval.batch, config.eval.max_new_tokens),
    )


def _lognormal(mean: int, rows: int, longest: int) -> tuple[int, ...]:
    """Evenly spaced quantiles of a lognormal distribution, cut at `longest`."""
    normal = NormalDist(math.log(mean) - SPREAD**2 / 2, SPREAD)
    quantiles = (normal.inv_cdf((row + 0.5) / rows) for row in range(rows))
    return tuple(min(longest, max(1, round(math.exp(q)))) for q in quantiles)


@dataclass(frozen=True)
class Work:
    """What one chip computes, moves in its memory and sends to others."""

    flops: float = 0.0
    bytes: float = 0.0
    sent: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.sent + other.sent)

    def seconds(self, chip: Chip) -> float:
        """The least that the chip needs."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth, self.sent / chip.links)


def layer_weights(model: Qwen3Config) -> int:
    """Numbers in one layer's matrices."""
    D, E = model.hidden_size, model.head_dim
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    return D * heads * E + 3 * D * model.intermediate_size


def attention_flops(model: Qwen3Config, tokens: float, context: float) -> float:
    """Of tokens that each attend to `context` positions, in all layers."""
    return 4.0 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * tokens * context


def matrix_flops(model: Qwen3Config, tokens: float) -> float:
    """Of tokens through all layers' matrices."""
    return 2.0 * model.num_hidden_layers * layer_weights(model) * tokens


def head_flops(model: Qwen3Config, tokens: float) -> float:
    """Of tokens' logits."""
    return 2.0 * model.vocab_size * model.hidden_size * tokens


def forward_flops(model: Qwen3Config, length: int) -> float:
    """Of one row of that length, without the head."""
    return matrix_flops(model, length) + attention_flops(model, length, length / 2)


def backward_flops(model: Qwen3Config, length: int) -> float:
    """Twice the matrices' products, and five of attention for the forward's two."""
    return 2 * matrix_flops(model, length) + 2.5 * attention_flops(model, length, length / 2)


@dataclass(frozen=True)
class Split:
    """How a mesh divides the work, and what the config lets run at once on a row device."""

    shards: int  # row devices
    tensor: int
    fsdp: int
    item: int  # bytes of a number of the compute type

    def weights(self, model: Qwen3Config) -> float:
        """Bytes of all layers' matrices and the head as one row device's chip reads them."""
        numbers = model.num_hidden_layers * layer_weights(model) + model.vocab_size * model.hidden_size
        return numbers * self.item / self.tensor

    def gathered(self, model: Qwen3Config) -> float:
        """Bytes that a chip sends where the weights are gathered once from the others along fsdp."""
        return self.weights(model) * (self.fsdp - 1) / self.fsdp

    def reduced(self, model: Qwen3Config, tokens: float) -> float:
        """Bytes that a chip sends for the sums over tensor of one pass: two a layer, as a ring does them."""
        sums = 2 * model.num_hidden_layers * tokens * model.hidden_size * self.item
        return 2 * sums * (self.tensor - 1) / self.tensor


def decode_work(
    model: Qwen3Config, split: Split, prompts: int, prompt: int, length_B: Sequence[int], at_once: int
) -> Work:
    """Prefilling a shard's prompts and decoding its rows, of which every shard gets an equal share.

    at_once: rows of a shard that decode together. Steps are as many as the longest row has tokens, or
    more where the rows do not all fit at once; each reads the weights, and every live row's positions.
    """
    mine = sorted(length_B)[:: split.shards]  # every shards-th, from the shortest on
    mine = [*mine[:-1], max(length_B)]  # the slowest shard has the longest row
    tokens = sum(mine)
    steps = max(max(mine), math.ceil(tokens / at_once))
    attended = sum(n * (prompt + n / 2) for n in mine)
    position = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * split.item
    flops = matrix_flops(model, tokens) + head_flops(model, tokens) + attention_flops(model, 1, attended)
    read = steps * split.weights(model) + attended * position / split.tensor
    decoded = Work(flops / split.tensor, read, split.reduced(model, tokens))
    return decoded + prefill_work(model, split, prompts, prompt)


def prefill_work(model: Qwen3Config, split: Split, prompts: int, prompt: int) -> Work:
    """Prompts of a shard, and the gathering and joining of the weights before them."""
    tokens = prompts * prompt
    weights = split.weights(model)
    return Work(
        prompts * forward_flops(model, prompt) / split.tensor,
        3 * weights + max(1, tokens // 2048) * weights,  # cast, joined, and read once a pass of 2048 tokens
        split.gathered(model) + split.reduced(model, tokens),
    )


def teach_work(model: Qwen3Config, split: Split, rows: int, width: int) -> Work:
    """One micro-batch of the teacher: rows of a row device, forward."""
    flops = rows * forward_flops(model, width) / split.tensor
    sent = split.gathered(model) + split.reduced(model, rows * width)
    return Work(flops, split.weights(model) + _activation_bytes(model, split, rows * width), sent)


def learn_work(
    model: Qwen3Config,
    split: Split,
    rows: int,
    width: int,
    active: int,
    remat: str,
    grad_bytes: float,
    adapters: bool = False,
) -> Work:
    """One micro-batch of the student: forward, loss, backward.

    active: tokens of the loss; grad_bytes: of the chip's share of the sum of gradients. Under
    rematerialisation every layer goes forward once more, but for its attention where that is kept.
    adapters: no gradients of the weights and the head are taken, and the adapters' own work is left out.
    """
    tokens = rows * width
    again = {"none": 0.0, "attention": rows * matrix_flops(model, width)}
    forward = rows * forward_flops(model, width)
    flops = forward + again.get(remat, forward) + rows * backward_flops(model, width)
    flops += 4 * head_flops(model, active)  # both logits, and both gradients
    if adapters:
        flops -= rows * matrix_flops(model, width) + head_flops(model, active)
    passes = 2 if remat == "none" else 3
    moved = passes * split.weights(model) + passes * _activation_bytes(model, split, tokens) + 2 * grad_bytes
    # Weights are gathered forward and backward, and gradients scattered, in the compute type.
    sent = (2 if adapters else 3) * split.gathered(model) + passes * split.reduced(model, tokens)
    return Work(flops / split.tensor, moved, sent)


def _activation_bytes(model: Qwen3Config, split: Split, tokens: int) -> float:
    """Read and written by the matrix products of one pass."""
    D, heads = model.hidden_size, model.num_attention_heads + 2 * model.num_key_value_heads
    inner = (heads + model.num_attention_heads) * model.head_dim + 3 * model.intermediate_size
    return model.num_hidden_layers * tokens * split.item * (6 * D + 2 * inner / split.tensor)


def apply_work(state_bytes: float, grad_bytes: float) -> Work:
    """The optimizer's step: the state read and written, the gradients read twice, for their norm first."""
    return Work(0.0, 2 * state_bytes + 2 * grad_bytes, 0.0)
