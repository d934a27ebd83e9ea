"""ROSD on SciKnowEval with Qwen3-4B or 8B: the paper's main run.

Paper       arXiv 2605.28014, main table. Train on one science domain, evaluate on all four, tool use
            and AIME24 with 16 samples each at temperature 0.6, top-p 0.95, before, every 10 steps, after.
            The paper's scores are the highest of these during training; report.md shows the last and all.
Data        the released split files under data.dir (rosd_jax/data/builders.py lists them)
Cost        ten epochs of 32 prompts x 8 rollouts: biology 140, chemistry 590, material 260, physics 220
            steps. Not yet run at full size with this code: no time or score is claimed here.
Command     python run.py --config=configs/qwen3_science.py:physics \\
                --config.model.path=DIR --config.data.dir=DIR
Variants    biology | chemistry | material | physics (default: biology)
            paper | span | official (default: paper; rosd_jax/config.py: METHOD has each, field by field)
            debug: small batch, short texts, two steps
"""

from rosd_jax.config import PRESETS, choose_one, default_config, parse_variant, use_preset

EPOCH_STEPS = {"biology": 14, "chemistry": 59, "material": 26, "physics": 22}


def get_config(arg=None):
    variants = parse_variant(arg, (*EPOCH_STEPS, *PRESETS, "debug"))
    domain = choose_one(variants, EPOCH_STEPS, default="biology")
    preset = choose_one(variants, PRESETS, default="paper")
    c = use_preset(default_config(), preset)
    c.name = f"qwen3_science-{domain}-{preset}"
    c.steps = 10 * EPOCH_STEPS[domain]
    c.data.train = domain
    c.eval.sets = ",".join([*EPOCH_STEPS, "tooluse", "aime24"])
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
