"""The roofline of a step: FLOPs and bytes by formula, and the lower bound on the time that follows from them.

A multiplication and an addition are two FLOPs. Of causal attention, half of the T x T products are counted.
What the backward pass recomputes is counted, since the chip computes it; norms, RoPE and softmax are not.
The bound is the largest of three times: matmuls at the chip's bfloat16 peak, memory traffic at its bandwidth,
communication at the bandwidth of its links. A real step takes longer.

    at_limits(config), realistic(config)              -> Lengths
    decode_work, teach_work, learn_work, apply_work   -> Work of one chip

Dimensions: B rows; D model width, E head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.plan.chips import Chip
from rosd_jax.settings import Settings

# What lengths to expect of a run, in tokens: lengths of prompts, means of responses and reflections.
PROMPT = 512
RESPONSE = 1536
TEACHER = 1024
REFLECTOR = 4096
REFLECTION = 512
SIGMA = 0.8  # standard deviation of the logarithm of the lengths of responses and reflections (lognormal)


@dataclass(frozen=True)
class Lengths:
    """Tokens of each kind of text; for responses and reflections, one number per row."""

    name: str
    prompt: int
    response_B: tuple[int, ...]
    teacher: int  # the teacher's prompt; 0 without a teacher
    reflector: int  # the reflector's prompt; 0 without reflections
    reflection_B: tuple[int, ...]  # empty without reflections
    evaluated_B: tuple[int, ...]  # responses of eval.batch rows, or of a whole set

    def __str__(self) -> str:
        mean = sum(self.response_B) / len(self.response_B)
        said = f"prompts {self.prompt:,}, responses {mean:,.0f} (longest {max(self.response_B):,})"
        if self.teacher:
            said += f", teacher prompts {self.teacher:,}"
        if not self.reflection_B:
            return said
        reflection = sum(self.reflection_B) / len(self.reflection_B)
        return (
            f"{said}, reflector prompts {self.reflector:,}, reflections {reflection:,.0f} "
            f"(longest {max(self.reflection_B):,})"
        )


def at_limits(config: Settings, evaluated: int | None = None) -> Lengths:
    """Every text as long as the config allows; `evaluated` responses of an evaluation (None: eval.batch)."""
    rows = config.batch.prompts * config.batch.samples
    return Lengths(
        name="limits",
        prompt=config.data.max_prompt_tokens,
        response_B=(config.rollout.max_new_tokens,) * rows,
        teacher=config.lesson.max_teacher_tokens if config.distills else 0,
        reflector=config.reflect.max_prompt_tokens if config.reflects else 0,
        reflection_B=(config.reflect.max_new_tokens,) * rows if config.reflects else (),
        evaluated_B=(config.eval.max_new_tokens,) * (evaluated or config.eval.batch),
    )


def realistic(config: Settings, evaluated: int | None = None) -> Lengths:
    """Texts of the lengths to expect: the constants above, cut at the config's limits."""
    rows = config.batch.prompts * config.batch.samples
    return Lengths(
        name="realistic",
        prompt=min(PROMPT, config.data.max_prompt_tokens),
        response_B=_lognormal(RESPONSE, rows, config.rollout.max_new_tokens),
        teacher=min(TEACHER, config.lesson.max_teacher_tokens) if config.distills else 0,
        reflector=min(REFLECTOR, config.reflect.max_prompt_tokens) if config.reflects else 0,
        reflection_B=_lognormal(REFLECTION, rows, config.reflect.max_new_tokens) if config.reflects else (),
        evaluated_B=_lognormal(RESPONSE, evaluated or config.eval.batch, config.eval.max_new_tokens),
    )


def _lognormal(mean: int, rows: int, longest: int) -> tuple[int, ...]:
    """Evenly spaced quantiles of a lognormal distribution, cut at `longest`."""
    normal = NormalDist(math.log(mean) - SIGMA**2 / 2, SIGMA)
    quantiles = (normal.inv_cdf((row + 0.5) / rows) for row in range(rows))
    return tuple(min(longest, max(1, round(math.exp(q)))) for q in quantiles)


@dataclass(frozen=True)
class Work:
    """What one chip computes, reads and writes in its memory, and sends to other chips."""

    flops: float = 0.0
    bytes: float = 0.0  # memory traffic
    sent: float = 0.0  # bytes

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.sent + other.sent)

    def seconds(self, chip: Chip) -> float:
        """The lower bound on the time that the chip needs."""
        return max(self.flops / chip.flops, self.bytes / chip.bandwidth, self.sent / chip.links)


def layer_weights(model: Qwen3Config) -> int:
    """Number of weights in the matrices of one layer."""
    D = model.hidden_size
    E = model.head_dim
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    return D * heads * E + 3 * D * model.intermediate_size


def attention_flops(model: Qwen3Config, tokens: float, context: float) -> float:
    """FLOPs of attention in all layers, for `tokens` tokens that each attend to `context` positions."""
    return 4.0 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * tokens * context


def matrix_flops(model: Qwen3Config, tokens: float) -> float:
    """FLOPs of the matrices of all layers for `tokens` tokens."""
    return 2.0 * model.num_hidden_layers * layer_weights(model) * tokens


def head_flops(model: Qwen3Config, tokens: float) -> float:
    """FLOPs of the logits of `tokens` tokens."""
    return 2.0 * model.vocab_size * model.hidden_size * tokens


def forward_flops(model: Qwen3Config, length: int) -> float:
    """FLOPs of the forward pass of one row of `length` tokens, without the head."""
    return matrix_flops(model, length) + attention_flops(model, length, length / 2)


def backward_flops(model: Qwen3Config, length: int) -> float:
    """FLOPs of the backward pass of one row, without the head and without recomputation.

    Twice the forward pass for the matrices, and 2.5 times for attention: five matmuls instead of two.
    """
    return 2 * matrix_flops(model, length) + 2.5 * attention_flops(model, length, length / 2)


@dataclass(frozen=True)
class MeshSplit:
    """How a mesh divides the work."""

    shards: int  # row devices
    tensor: int
    fsdp: int
    item: int  # bytes per number of the compute type

    def weights(self, model: Qwen3Config) -> float:
        """Bytes per chip of all layers' matrices and the head, gathered along fsdp."""
        numbers = model.num_hidden_layers * layer_weights(model) + model.vocab_size * model.hidden_size
        return numbers * self.item / self.tensor

    def gathered(self, model: Qwen3Config) -> float:
        """Bytes that a chip sends when the weights are gathered along fsdp once."""
        return self.weights(model) * (self.fsdp - 1) / self.fsdp

    def reduced(self, model: Qwen3Config, tokens: float) -> float:
        """Bytes that a chip sends in one pass for the all-reduces over tensor: two per layer, in a ring."""
        sums = 2 * model.num_hidden_layers * tokens * model.hidden_size * self.item
        return 2 * sums * (self.tensor - 1) / self.tensor


def decode_work(
    model: Qwen3Config, split: MeshSplit, prompts: int, prompt: int, length_B: Sequence[int], at_once: int
) -> Work:
    """Prefilling a shard's prompts and decoding its share of the rows `length_B`.

    A shard has `prompts` prompts of `prompt` tokens, and `at_once` of its rows decode concurrently. There
    are as many steps as the longest row has tokens, or more if not all rows fit at once. Each step reads
    the weights and the keys and values of all live rows.
    """
    shard = sorted(length_B)[:: split.shards]  # an even sample of the lengths
    shard = [*shard[:-1], max(length_B)]  # the slowest shard has the longest row
    tokens = sum(shard)
    steps = max(max(shard), math.ceil(tokens / at_once))
    attended = sum(n * (prompt + n / 2) for n in shard)
    position = 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * split.item
    flops = matrix_flops(model, tokens) + head_flops(model, tokens) + attention_flops(model, 1, attended)
    read = steps * split.weights(model) + attended * position / split.tensor
    decoded = Work(flops / split.tensor, read, split.reduced(model, tokens))
    return decoded + prefill_work(model, split, prompts, prompt)


def prefill_work(model: Qwen3Config, split: MeshSplit, prompts: int, prompt: int) -> Work:
    """Prefilling a shard's prompts, after gathering and joining the weights."""
    tokens = prompts * prompt
    weights = split.weights(model)
    return Work(
        prompts * forward_flops(model, prompt) / split.tensor,
        # Read and written to cast and join them, then read once per pass of 2048 tokens.
        3 * weights + max(1, tokens // 2048) * weights,
        split.gathered(model) + split.reduced(model, tokens),
    )


def teach_work(model: Qwen3Config, split: MeshSplit, rows: int, width: int) -> Work:
    """One micro-batch of the teacher: a forward pass over `rows` rows per row device, `width` tokens wide."""
    flops = rows * forward_flops(model, width) / split.tensor
    sent = split.gathered(model) + split.reduced(model, rows * width)
    return Work(flops, split.weights(model) + _activation_bytes(model, split, rows * width), sent)


def learn_work(
    model: Qwen3Config,
    split: MeshSplit,
    rows: int,
    width: int,
    active: int,
    remat: str,
    grad_bytes: float,
    adapters: bool = False,
) -> Work:
    """One micro-batch of the student: forward pass, loss and backward pass over `rows` rows per row device.

    `active` is the number of tokens with loss, `grad_bytes` the chip's share of the accumulated gradient.
    With rematerialisation every layer's forward pass runs twice, except for attention if that is saved.
    With `adapters` no gradients of weights and head are computed; the adapters' own work is not counted.
    A policy gradient costs what a distillation does: it makes the student's logits twice.
    """
    tokens = rows * width
    recomputed = {"none": 0.0, "attention": rows * matrix_flops(model, width)}
    forward = rows * forward_flops(model, width)
    flops = forward + recomputed.get(remat, forward) + rows * backward_flops(model, width)
    flops += 4 * head_flops(
        model, active
    )  # the logits of both models, and the gradients of hidden state and head
    if adapters:
        flops -= rows * matrix_flops(model, width) + head_flops(model, active)
    passes = 2 if remat == "none" else 3
    traffic = (
        passes * split.weights(model) + passes * _activation_bytes(model, split, tokens) + 2 * grad_bytes
    )
    # Weights are gathered for each direction, and gradients reduce-scattered, in the compute type.
    sent = (2 if adapters else 3) * split.gathered(model) + passes * split.reduced(model, tokens)
    return Work(flops / split.tensor, traffic, sent)


def _activation_bytes(model: Qwen3Config, split: MeshSplit, tokens: int) -> float:
    """Activations that the matmuls of one pass read and write, in bytes per chip."""
    D = model.hidden_size
    heads = model.num_attention_heads + 2 * model.num_key_value_heads
    inner = (heads + model.num_attention_heads) * model.head_dim + 3 * model.intermediate_size
    return model.num_hidden_layers * tokens * split.item * (6 * D + 2 * inner / split.tensor)


def apply_work(state_bytes: float, grad_bytes: float) -> Work:
    """The optimizer step: reads and writes the state, and reads the gradients twice, first for their norm."""
    return Work(0.0, 2 * state_bytes + 2 * grad_bytes, 0.0)
