"""ROSD on SciKnowEval with Qwen3-4B or 8B: the paper's main run.

Paper       arXiv 2605.28014, main table. Trains on one science domain and evaluates on all four, tool use
            and AIME24, with 16 samples each at temperature 0.6, top-p 0.95: before, every 10 steps, after.
            The paper reports the highest score during training; report.md shows the last one and all others
Data        the released split files under data.dir (docs/running.md lists them)
Cost        ten epochs of 32 prompts x 8 rollouts: biology 140, chemistry 590, material 260, physics 220
            steps. Not yet run at full size with this code, so no time or score is claimed
Command     python run.py --config=configs/qwen3_science.py:physics \\
                --config.model.path=DIR --config.data.dir=DIR
Variants    biology | chemistry | material | physics (default: biology)
            paper | span | official (default: paper; METHOD in rosd_jax/config.py lists their fields)
            sdpo | grpo | dr_grpo | dapo_loss | grpo_strong | rosd_grpo: another method (docs/methods.md)
            4b | 8b: the size of the model in model.path, with which it is not compared, so that a slice too
            small for it is refused
            v5p-8 | v5p-64 | v6e-16 | v6e-64 | v5e-64 | h100x8 | h200: the mesh for that slice (SLICES), which
            fits according to `--mode=plan --topology=v5p-8`, for example (h200: h200:1). Cloud TPU counts v5p
            in TensorCores: v5p-8 is 2x2x1 = 4 chips, v5p-64 is 2x4x4 = 32; v6e-16 is 4x4 chips, v6e-64 and
            v5e-64 are 8x8
            lora: trains adapters of rank 64 instead of all weights; 8B then fits on one H100 (h100:1)
            debug: small batch, short texts, two steps
Smallest    slices that fit at these lengths, according to the plan. 8B: v5p-8, v6e-8 with mesh.tensor=4,
            v5e-16 with mesh.tensor=8, or four H100 (not one H200, where training all weights needs 148
            GB). 4B: v6e-4 with mesh.tensor=2, v5e-8 with mesh.tensor=4, two H100, or one H200. None of
            them has been used yet. More than 4 chips of v5p, or 8 of v5e and v6e, are several hosts:
            start the same command on each (docs/pods.md)
"""

from rosd_jax.config import METHODS, choose_one, default_config, parse_variant, use_preset
from rosd_jax.errors import UserError

EPOCH_STEPS = {"biology": 14, "chemistry": 59, "material": 26, "physics": 22}
SIZES = ("4b", "8b")
# The slice by its sides, as --topology also names it, and (mesh.data, mesh.fsdp, mesh.tensor). At most 16 row
# devices: with more of them, the last micro-batches of an update are mostly empty rows. The remaining factor
# goes to tensor, so that the weights for decoding fit.
SLICES = {
    "v5p-8": ("v5p:2x2x1", (1, 4, 1)),
    "v5p-64": ("v5p:2x4x4", (1, 16, 2)),
    "v6e-16": ("v6e:4x4", (1, 8, 2)),
    "v6e-64": ("v6e:8x8", (1, 16, 4)),
    "v5e-64": ("v5e:8x8", (1, 16, 4)),
    "h100x8": ("h100:8", (1, 8, 1)),
    "h200": ("h200:1", (1, 1, 1)),
}
TOO_LARGE = {("8b", "h200")}


def get_config(arg=None):
    variants = parse_variant(arg, (*EPOCH_STEPS, *METHODS, *SIZES, *SLICES, "lora", "debug"))
    domain = choose_one(variants, EPOCH_STEPS, default="biology")
    preset = choose_one(variants, METHODS, default="paper")
    size = choose_one(variants, SIZES, default="")
    chips = choose_one(variants, SLICES, default="")
    if (size, chips) in TOO_LARGE and "lora" not in variants:
        raise UserError(
            f"config variants are {size} and {chips}, which is too small for {size}; add lora, or use 4b or "
            "a larger slice"
        )
    c = use_preset(default_config(), preset)
    c.name = "-".join(name for name in ("qwen3_science", size, domain, preset) if name)
    c.steps = 10 * EPOCH_STEPS[domain]
    c.data.train = domain
    c.eval.sets = ",".join([*EPOCH_STEPS, "tooluse", "aime24"])
    if "lora" in variants:
        c.model.lora.update(rank=64, alpha=128.0)
    if chips:
        _, (data, fsdp, tensor) = SLICES[chips]
        c.mesh.update(data=data, fsdp=fsdp, tensor=tensor)
    if "debug" in variants:
        c.steps = 2
        c.model.update(dtype="float32", remat="none")
        c.data.max_prompt_tokens = 1280
        c.batch.update(prompts=2, samples=2, device_rows=2)
        c.rollout.max_new_tokens = 16
        c.reflect.update(max_prompt_tokens=1536, max_new_tokens=16)
        c.lesson.max_teacher_tokens = 1536
        c.loss.chunk = 32
        c.eval.update(limit=2, samples=2, every=0, batch=4, max_new_tokens=16)
        c.checkpoint.every = 1
    return c
