"""FLOPs of one update as planned, relative to an ideal that computes nothing unnecessary.

    JAX_PLATFORMS=cpu python -m benchmarks.step_flops [--model=8b] [--draws=20] [--devices=1,4,8,16,64]

The ideal cuts each row at its last token with loss, pads nothing, computes half of the T x T products of
attention, and computes logits only for tokens with loss. It costs one forward pass of the teacher and three
of the student (the backward pass counts as two), four if the backward pass recomputes activations. Nothing is
compiled: the script counts the microbatches that the update would make on rows drawn at the paper's lengths
(benchmarks/step_rows.py says how).
"""

import argparse
from dataclasses import dataclass

import numpy as np

from benchmarks.step_rows import PRESETS, Lengths, Preset, Sizes, draw, lesson, needs
from benchmarks.timing import table
from rosd_jax.config import default_config, validate
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.train.microbatches import MicroBatch, plan_microbatches
from rosd_jax.train.update import longest_rows

QWEN3 = {
    "0.6b": Qwen3Config(151936, 1024, 3072, 28, 16, 8, 128, tie_word_embeddings=True),
    "1.7b": Qwen3Config(151936, 2048, 6144, 28, 16, 8, 128, tie_word_embeddings=True),
    "4b": Qwen3Config(151936, 2560, 9728, 36, 32, 8, 128, tie_word_embeddings=True),
    "8b": Qwen3Config(151936, 4096, 12288, 36, 32, 8, 128),
}


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass of each model, and of the four matmuls with the heads and their gradients."""

    student: float
    teacher: float
    heads: float

    def total(self, remat: bool, lora: bool = False) -> float:
        """FLOPs of an update, backward pass included. With `lora` no gradients of matrices are computed."""
        passes = (2 if lora else 3) + remat
        return passes * self.student + self.teacher + (0.75 if lora else 1.0) * self.heads


def forward(model: Qwen3Config, tokens: np.ndarray | int) -> np.ndarray:
    """FLOPs of all layers for rows of `tokens` tokens."""
    T = np.asarray(tokens, np.float64)
    q_width = model.num_attention_heads * model.head_dim
    kv_width = 2 * model.num_key_value_heads * model.head_dim
    weights = model.hidden_size * (2 * q_width + kv_width + 3 * model.intermediate_size)
    causal = 2 * q_width * T  # half of q @ k and of scores @ v, two FLOPs each
    return model.num_hidden_layers * T * (2 * weights + causal)


def heads(model: Qwen3Config, tokens: float) -> float:
    """FLOPs of the loss's matmuls: the logits of both models, and the student's two gradients."""
    return 8.0 * model.hidden_size * model.vocab_size * tokens


def ideal(model: Qwen3Config, lengths: Lengths) -> Flops:
    """The FLOPs that no update can do without."""
    student_B, teacher_B = needs(lengths)
    student = float(forward(model, student_B).sum())
    teacher = float(forward(model, teacher_B).sum())
    return Flops(student, teacher, heads(model, int(lengths.active_B.sum())))


def planned(model: Qwen3Config, microbatches: list[MicroBatch], rows: int, lengths: Lengths) -> Flops:
    """The FLOPs of these micro-batches, `rows` rows each."""
    widths = np.array([(batch.student_BS.shape[1], batch.teacher_BT.shape[1]) for batch in microbatches])
    student, teacher = rows * forward(model, widths).sum(axis=0)
    return Flops(float(student), float(teacher), heads(model, int(lengths.active_B.sum())))


def waste(
    model: Qwen3Config, preset: Preset, devices: int, draws: int, device_rows: int = 1
) -> tuple[float, float, float]:
    """Planned FLOPs over the ideal's, without and with remat, and micro-batches: means over `draws` steps."""
    found = []
    longest = longest_rows(validate(default_config()))
    for seed in range(draws):
        lengths = draw(Sizes(), preset, seed)
        microbatches = plan_microbatches(lesson(lengths, model.vocab_size), devices * device_rows, longest)
        best = ideal(model, lengths)
        plan = planned(model, microbatches, devices * device_rows, lengths)
        ratios = [plan.total(remat) / best.total(remat) for remat in (False, True)]
        found.append((*ratios, len(microbatches)))
    plain, remat, count = np.mean(found, axis=0)
    return float(plain), float(remat), float(count)


def main(argv: list[str] | None = None) -> None:
    """Prints a table with one row per number of devices."""
    parser = argparse.ArgumentParser(description="Planned FLOPs of the update over the ideal's")
    parser.add_argument("--model", choices=QWEN3, default="8b")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--devices", default="1,4,8,16,64", help="row devices")
    args = parser.parse_args(argv)
    rows = []
    for devices in map(int, args.devices.split(",")):
        cells = [str(devices)]
        for preset in PRESETS:
            plain, remat, microbatches = waste(QWEN3[args.model], preset, devices, args.draws)
            cells += [f"{plain:.2f}", f"{remat:.2f}", f"{microbatches:.0f}"]
        rows.append(cells)
    head = [text for preset in PRESETS for text in (preset, f"{preset}, remat", "micro-batches")]
    print(table(["row devices", *head], rows))


if __name__ == "__main__":
    main()
