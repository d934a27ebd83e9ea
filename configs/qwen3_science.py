"""ROSD on SciKnowEval with Qwen3-4B or 8B: the paper's main run.

Paper       arXiv 2605.28014, main table. Train on one science domain, evaluate on all four, tool use
            and AIME24 with 16 samples each at temperature 0.6, top-p 0.95, before, every 10 steps, after.
Data        the released split files under data.dir (rosd_jax/data/builders.py lists them)
Cost        ten epochs of 32 prompts x 8 rollouts: biology 140, chemistry 590, material 260, physics 220
            steps. Not yet run at full size with this code: no time or score is claimed here.
Command     python run.py --config=configs/qwen3_science.py:physics \\
                --config.model.path=DIR --config.data.dir=DIR
Variants    biology | chemistry | material | physics (default: biology)
            release: the method as the released code has it
            debug: small batch, short texts, two steps
"""

from rosd_jax.config import UserError, default_config, parse_variant, release

EPOCH_STEPS = {"biology": 14, "chemistry": 59, "material": 26, "physics": 22}


def get_config(arg=None):
    variants = parse_variant(arg, (*EPOCH_STEPS, "release", "debug"))
    domains = [name for name in variants if name in EPOCH_STEPS] or ["biology"]
    if len(domains) > 1:
        raise UserError(f"config variant names {' and '.join(domains)}; name one domain")
    c = default_config()
    c.name = f"qwen3_science-{domains[0]}"
    c.steps = 10 * EPOCH_STEPS[domains[0]]
    c.data.train = domains[0]
    c.eval.sets = ",".join([*EPOCH_STEPS, "tooluse", "aime24"])
    if "release" in variants:
        release(c)
    if "debug" in variants:
        c.steps = 2
        c.model.update(dtype="float32", remat=False)
        c.data.max_prompt_tokens = 1280
        c.batch.update(prompts=2, samples=2, micro=2)
        c.rollout.max_new_tokens = 16
        c.reflect.update(max_prompt_tokens=1536, max_new_tokens=16)
        c.lesson.max_teacher_tokens = 1536
        c.loss.chunk = 32
        c.eval.update(limit=2, samples=2, every=0, batch=4, max_new_tokens=16)
        c.checkpoint.every = 1
    return c
