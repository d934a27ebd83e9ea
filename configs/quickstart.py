"""ROSD in five minutes on a laptop: the tiny shipped model learns from its own slips on the gym.

Paper       arXiv 2605.28014; the gym (rosd_jax/data/gym.py) stands in for its data sets.
Trains on   gym:chain, four arithmetic steps; evaluated there and, out of domain, on longer chains
            and on chains in words.
Differs     from the paper's preset in one field of the method: correct rollouts are not reflected
            (reflect.correct), so that the loss lies on error spans alone; a step costs less than half and,
            here, gains more (docs/performance.md has both).
Command     python run.py --config=configs/quickstart.py
Variants    debug: two short steps, to see that everything runs
            release: the method as the released code has it
"""

from rosd_jax.config import default_config, parse_variant, release


def get_config(arg=None):
    variants = parse_variant(arg, ("debug", "release"))
    c = default_config()
    c.name = "quickstart"
    c.steps = 25
    c.wording = "gym"
    c.mesh.update(data=-1, fsdp=1)  # a model so small is whole on every device; a CPU's cores share the rows
    c.model.update(path="models/gym", dtype="float32", remat=False)
    c.data.update(train="gym:chain", max_prompt_tokens=64)
    c.batch.update(prompts=16, samples=8, micro=32)
    c.rollout.max_new_tokens = 48
    c.reflect.update(max_prompt_tokens=128, max_new_tokens=64, correct=False)
    c.lesson.max_teacher_tokens = 128
    c.loss.chunk = 512
    c.optimizer.update(lr=2.5e-4, warmup_steps=5)
    c.eval.update(
        sets="gym:chain,gym:long,gym:words",
        samples=4, every=0, batch=128, temperature=1.0, top_p=1.0, max_new_tokens=72,
    )  # fmt: skip
    c.checkpoint.update(every=5)
    if "release" in variants:
        release(c)
        c.reflect.update(max_prompt_tokens=128, max_new_tokens=64, correct=True)
    if "debug" in variants:
        c.steps = 2
        c.batch.update(prompts=4, micro=8)
        c.eval.update(limit=16, samples=2, batch=32)
        c.checkpoint.every = 1
    return c
