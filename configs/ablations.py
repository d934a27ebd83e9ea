"""What each part of ROSD is worth in the gym: the demo with one thing changed at a time.

Paper       arXiv 2605.28014 has three ablations; these are more, and some of them need the gym's exact truth
Base        configs/quickstart.py, the demo: its data and length; span and idea of a frozen reflector, for
            wrong rollouts only
Command     python -m rosd_jax.evals.study --config=configs/ablations.py --methods=span,suffix,full \\
                --seeds=0,1,2 --out=runs/ablations
            or a single run: python run.py --config=configs/ablations.py:spans_50
Variants    the names below, one at a time; debug: two short steps, to check that everything runs
"""

from rosd_jax.config import choose_one, parse_variant
from rosd_jax.shipped.configs import quickstart

VARIANTS = {
    "span": {},  # the demo, with which all others are compared
    # Which tokens should be in the loss? The quoted error, from there to the end, all, or all but the error.
    "suffix": {"lesson.region": "suffix"},
    "full": {"lesson.region": "full"},
    "inverted": {"lesson.region": "inverted"},
    # Does the place matter, or only that few tokens are in the loss? As many tokens, anywhere.
    "random_region": {"ablation.moved_spans": 1.0},
    # Is the idea better for the teacher than a whole solution? With it, on all tokens and on the error.
    "solution_full": {"lesson.teacher_context": "solution", "lesson.region": "full"},
    "solution_span": {"lesson.teacher_context": "solution"},
    # How exact must the reflector's spans be? This share of them is moved (all: as random_region).
    "spans_25": {"ablation.moved_spans": 0.25},
    "spans_50": {"ablation.moved_spans": 0.5},
    "spans_100": {"ablation.moved_spans": 1.0},
    # How right must its ideas be? This share of them is another problem's.
    "ideas_25": {"ablation.swapped_ideas": 0.25},
    "ideas_50": {"ablation.swapped_ideas": 0.5},
    "ideas_100": {"ablation.swapped_ideas": 1.0},
    # How much would a perfect reflector add? The true first error, the true right line, and both.
    "oracle_spans": {"ablation.oracle_spans": True},
    "oracle_ideas": {"ablation.oracle_ideas": True},
    "oracle": {"ablation.oracle_spans": True, "ablation.oracle_ideas": True},
    # Does the teacher learn the answer from the idea instead of the step? The answer is removed from it.
    "strip_gold": {"lesson.gold_in_idea": "strip"},
    # Must the reflector be frozen? The model that is trained reflects on itself.
    "student_reflector": {"reflect.weights": "student"},
    # Do correct rollouts help, as an anchor? They are reflected and taught too, on all their tokens.
    "correct": {"reflect.correct": True},
    # How many tokens must be compared one by one? The demo's 100 are all of the gym's vocabulary, as k_vocab.
    "k_1": {"loss.topk": 1},
    "k_20": {"loss.topk": 20},
    "k_vocab": {"loss.topk": 2**15},
    # Is a bucket for the rest of the vocabulary needed? To compare with k_20, since a rest is needed first.
    "no_tail": {"loss.topk": 20, "loss.tail": "renorm"},
    # Which divergence? forward: KL(teacher || student), which covers what the teacher may say.
    # reverse: KL(student || teacher), which keeps to what it says most. The demo: JSD, halfway.
    "forward_kl": {"loss.alpha": 0.0},
    "reverse_kl": {"loss.alpha": 1.0},
}


def get_config(arg=None):
    variants = parse_variant(arg, (*VARIANTS, "debug"))
    name = choose_one(variants, VARIANTS, default="span")
    c = quickstart.get_config("debug" if "debug" in variants else None)
    c.name = f"ablations-{name}"
    c.update_from_flattened_dict(VARIANTS[name])
    return c
