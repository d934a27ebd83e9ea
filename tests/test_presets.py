"""The three presets: complete, in one table, and their losses on a batch that can be worked out on paper."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_reflect import Letters, graded_rows, read_all

from configs import quickstart, qwen3_science
from oracles.token_weights import aggregate_weights
from rosd_jax.config import METHOD, METHODS, OTHERS, PRESETS, default_config, preset, use_preset, validate
from rosd_jax.distill import reflect, teacher
from rosd_jax.errors import UserError
from rosd_jax.kernels.topk_jsd import topk_jsd_from_logits
from rosd_jax.text.prompts import ENGLISH

# Fields of these sections that say how a run is carried out, not what it computes.
NOT_METHOD = {
    "optimizer.mu_dtype",
    "optimizer.grad_dtype",
    "loss.chunk",
    "rollout.slots",
    "rollout.cache_tokens",
    "rollout.prompt_tokens",
    "rollout.attention",
    "rollout.stop",
}


def value(config, field):
    for name in field.split("."):
        config = config[name]
    return config


def test_every_field_of_the_method_is_in_the_table():
    config = default_config()
    sections = ("rollout", "reflect", "lesson", "loss", "policy", "optimizer", "thinking")
    fields = {f"{section}.{name}" for section in sections for name in config[section]}
    others = {"method", "rewards", "batch.prompts", "batch.samples", "data.max_prompt_tokens"}
    assert set(METHOD) == fields - NOT_METHOD | others


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_its_column_whatever_was_set_before(preset):
    for before in PRESETS:
        config = use_preset(use_preset(default_config(), before), preset)
        column = PRESETS.index(preset)
        assert {field: value(config, field) for field in METHOD} == {
            field: values[column] for field, values in METHOD.items()
        }
        config.model.path = "x"
        validate(config)


@pytest.mark.parametrize("name", OTHERS)
def test_another_method_is_span_except_for_its_own_fields_whatever_was_set_before(name):
    for before in METHODS:
        config = use_preset(use_preset(default_config(), before), name)
        assert {field: value(config, field) for field in METHOD} == preset(name)
        differ = {field for field in METHOD if preset(name)[field] != preset("span")[field]}
        assert "method" in differ and differ <= {"method", *OTHERS[name]} and config.method == name
        validate(config)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("get_config", [quickstart.get_config, qwen3_science.get_config])
def test_configs_offer_the_other_methods(get_config, name):
    config = get_config(name)
    for field in ("method", *OTHERS[name]):
        assert value(config, field) == preset(name)[field], field
    assert validate(config).method == name


@pytest.mark.parametrize(
    "variant, fields, words",
    [
        ("grpo", {"policy.advantage": "none"}, "policy.advantage is 'none'; it must be std or mean if"),
        ("grpo", {"policy.rows": "untaught"}, "policy.rows is 'untaught'; it must be all if lesson.teacher_"),
        ("span", {"policy.rows": "untaught"}, "policy.rows is 'untaught'; it must be all if lesson.teacher_"),
        ("rosd_grpo", {"policy.weight": 0.0}, "policy.weight is 0.0; it must be above 0 and finite"),
        ("span", {"method": "grpo"}, "method is 'grpo', whose lesson.teacher_context is none, and lesson"),
        ("grpo", {"method": "rosd"}, "method is 'rosd', whose lesson.teacher_context is idea, and lesson"),
        (
            "span",
            {"policy.advantage": "mean"},
            "method is 'rosd', whose policy.advantage is none, and policy",
        ),
    ],
)
def test_what_a_method_cannot_use_is_refused(variant, fields, words):
    config = use_preset(default_config(), variant)
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=words):
        validate(config)


def test_the_default_is_the_paper_and_span_differs_from_it_in_two_fields():
    config = default_config()
    assert all(value(config, field) == values[0] for field, values in METHOD.items())
    differ = {field for field, values in METHOD.items() if values[0] != values[1]}
    assert differ == {"lesson.region", "lesson.quote_missing"}


@pytest.mark.parametrize("preset", PRESETS)
def test_configs_offer_the_presets(preset):
    config = qwen3_science.get_config(f"physics,{preset}")
    for field, values in METHOD.items():
        assert value(config, field) == values[PRESETS.index(preset)], field
    assert qwen3_science.get_config().lesson.region == "suffix"
    assert quickstart.get_config(preset).lesson.region == METHOD["lesson.region"][PRESETS.index(preset)]
    for get_config in (qwen3_science.get_config, quickstart.get_config):
        with pytest.raises(UserError, match="names paper and span; name one"):
            get_config("paper,span")


# One group of five rollouts, a token a character and a stop token. In each wrong one the error is "5".
TEXTS = ["is 5 ok", "5", "it is 4", "is 4", "so 5"]
REWARDS = [0, 0, 1, 1, 0]
IDEA = "<explanation>add</explanation>"
RAWS = [
    f"<error_quote>5</error_quote>{IDEA}",
    f"<error_quote>absent</error_quote>{IDEA}",
    IDEA,
    IDEA,
    "<error_quote>5</error_quote>",
]

# Student and teacher over two words. On the erroneous "5": (3/4, 1/4) against (1/4, 3/4); elsewhere
# (1/2, 1/2) against (1/4, 3/4). The mixtures are (1/2, 1/2) and (3/8, 5/8), so by hand:
ERROR = 3 / 4 * np.log(3 / 2) + 1 / 4 * np.log(1 / 2)  # .1308 = KL(student | mixture) = KL(teacher | mixture)
OTHER = (1 / 2 * np.log(4 / 3) + 1 / 2 * np.log(4 / 5)) / 2 + (
    1 / 4 * np.log(2 / 3) + 3 / 4 * np.log(6 / 5)
) / 2  # .0338

# Active tokens a rollout, and how many of them are the erroneous "5":
#   paper     from "5" to the stop token; the absent quote: all of "5" + stop; right ones whole; no idea: out
#   span      "5" alone; the absent quote: out
#   official  as paper, but the rollout without an idea is taught with the solution, from its "5" on
EXPECTED = {
    "paper": ([5, 2, 8, 5, 0], 2),
    "span": ([1, 0, 8, 5, 0], 1),
    "official": ([5, 2, 8, 5, 2], 3),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_loss_of_a_batch_worked_out_on_paper(preset):
    config = use_preset(default_config(), preset)
    graded = graded_rows(TEXTS, REWARDS, samples=5)
    plans = reflect.plan_rollouts(graded, config.reflect)
    reflected = read_all(graded, plans, RAWS, config.lesson)
    reflected, _ = teacher.teacher_prompts(
        reflected, Letters(), config.lesson, thinking=False, wording=ENGLISH
    )
    tokens_BR = graded.rollout.tokens_BR
    weight_BR = teacher.region_weights(reflected, config.lesson, tokens_BR.shape[1])

    active_B, errors = EXPECTED[preset]
    np.testing.assert_array_equal(weight_BR.sum(axis=1), active_B)
    is_error_BR = tokens_BR == ord("5")
    student_BRV = np.where(is_error_BR[..., None], np.log([3 / 4, 1 / 4]), np.log([1 / 2, 1 / 2]))
    teacher_BRV = np.broadcast_to(np.log([1 / 4, 3 / 4]), student_BRV.shape)
    loss, _ = topk_jsd_from_logits(
        jnp.asarray(student_BRV.reshape(-1, 2), jnp.float32),
        jnp.asarray(teacher_BRV.reshape(-1, 2), jnp.float32),
        aggregate_weights(jnp.asarray(weight_BR)).reshape(-1),
        k=config.loss.topk,
        alpha=config.loss.alpha,
        tail=config.loss.tail,
    )
    total = sum(active_B)
    by_hand = (errors * ERROR + (total - errors) * OTHER) / total
    np.testing.assert_allclose(loss, by_hand, rtol=1e-5)
