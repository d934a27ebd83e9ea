"""ROSD in a minute or two on a laptop: the shipped tiny model learns from its own mistakes in the gym.

Paper       arXiv 2605.28014, with the gym (docs/gym.md) instead of its data sets
Data        trained on gym:chain, four arithmetic steps; evaluated on it and, out of domain, on longer
            chains and on chains in words. A validation split of gym:chain, used for nothing else, chooses
            the best step
Method      the `span` preset, except that correct rollouts are not reflected (reflect.correct): the loss
            is on error spans only. Chosen on the validation split (docs/log.md)
Command     python run.py --config=configs/quickstart.py
Variants    rosd: what it is without a variant, under a name for studies
            paper | span | official: that preset, with its own reflect.correct
            sdpo | grpo | dr_grpo | dapo_loss | grpo_strong | rosd_grpo: another method (docs/methods.md)
            debug: two short steps, to check that everything runs
"""

from rosd_jax import shipped
from rosd_jax.config import METHODS, choose_one, default_config, parse_variant, use_preset


def get_config(arg=None):
    variants = parse_variant(arg, (*METHODS, "rosd", "debug"))
    method = choose_one(variants, (*METHODS, "rosd"), default="rosd")
    c = use_preset(default_config(), "span" if method == "rosd" else method)
    c.name = "quickstart"
    c.steps = 8
    c.wording = "gym"
    c.mesh.update(data=-1, fsdp=1)  # the model is replicated; rows are split over all devices, or CPU cores
    c.model.update(path=shipped.find("models/gym"), dtype="float32", remat="none")
    c.data.update(train="gym:chain", max_prompt_tokens=64)
    c.batch.update(prompts=16, samples=8, device_rows=16)
    c.rollout.max_new_tokens = 48
    c.reflect.update(max_prompt_tokens=128, max_new_tokens=64)
    if method == "rosd":
        c.reflect.correct = False
    c.lesson.max_teacher_tokens = 128
    c.loss.chunk = 512
    c.optimizer.update(lr=2.5e-4, warmup_steps=5)
    c.validation.update(sets="gym:chain", every=2)
    c.eval.update(
        sets="gym:chain,gym:long,gym:words",
        samples=4,
        every=0,
        batch=128,
        temperature=1.0,
        top_p=1.0,
        max_new_tokens=72,
    )
    c.checkpoint.update(every=4)
    if "debug" in variants:
        c.steps = 2
        c.batch.update(prompts=4, device_rows=4)
        c.validation.every = 1
        c.eval.update(limit=16, samples=2, batch=32)
        c.checkpoint.every = 1
    return c
