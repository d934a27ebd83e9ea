"""Settings: what a config file may hold, and the page that documents it."""

import dataclasses

import pytest

from rosd_jax.config import default_config, fields_page, validate
from rosd_jax.errors import UserError
from rosd_jax.fields import describe, replace, value
from support import ROOT


def test_the_page_of_fields_is_up_to_date():
    """Written by `python -m rosd_jax.config > docs/fields.md`."""
    assert (ROOT / "docs" / "fields.md").read_text() == fields_page()


def test_every_field_is_explained():
    assert all(field.text.endswith(".") for field in describe())


def test_settings_hold_what_the_config_file_set():
    config = default_config()
    config.rollout.slots = 7
    config.rollout.stop = ("###",)
    config.optimizer.weight_decay = 0  # an int where a float is meant
    settings = validate(config)
    assert (settings.rollout.slots, settings.rollout.stop) == (7, ("###",))
    assert isinstance(settings.optimizer.weight_decay, float)
    assert dataclasses.asdict(settings) == config.to_dict()
    hash(settings)  # so that compiled functions may take it as a static argument


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda c: c.loss.update(beta=1.0), "the config has no field 'loss.beta'; docs/fields.md lists"),
        (lambda c: c.loss.__delattr__("alpha"), "loss.alpha is not set; start from"),
        (lambda c: c.__setattr__("lesson", 3), "lesson is 3; it must be a section"),
        (lambda c: c.model.update(remat="all"), "model.remat is 'all'; it must be one of none, block"),
        (
            lambda c: c.rollout.update(attention="cudnn"),
            "rollout.attention is 'cudnn'; it must be one of null",
        ),
        (lambda c: c.update(seed=True), "seed is True; it must be of type int"),
    ],
)
def test_a_config_file_that_sets_something_else_is_told_what(change, words):
    config = default_config()
    with config.unlocked(), config.ignore_type():
        change(config)
    with pytest.raises(UserError, match=words):
        validate(config)


@pytest.mark.parametrize(
    "field, number, words",
    [
        ("optimizer.lr", 1e39, "above 0 and finite, also in float32"),
        ("optimizer.eps", 1e-50, "above 0 and finite, also in float32"),
        ("optimizer.clip_norm", 1e-40, "above 0 and finite, also in float32"),
        ("optimizer.b1", 1 - 1e-9, "[0, 1), also in float32"),
        ("optimizer.b2", -1e-50, "[0, 1), also in float32"),
        ("optimizer.weight_decay", 1e39, "0 or more and finite, also in float32"),
        ("optimizer.weight_decay", -1e-50, "0 or more and finite, also in float32"),
        ("loss.ratio_cap", 1e-50, "above 0, also in float32"),
        ("loss.alpha", -1e-50, "[0, 1]"),
        ("guard.entropy", 1.0, "[0, 1)"),
        ("guard.length", -1e-50, "[0, 1)"),
        ("eval.top_p", 1e-50, "(0, 1], also in float32"),
        ("model.lora.alpha", 1e39, "above 0 and finite, also divided by model.lora.rank"),
        ("model.lora.alpha", 1e-50, "above 0 and finite, also divided by model.lora.rank"),
        ("reward_timeout", 1e300, "above 0 and at most 3600"),
        ("optimizer.warmup_steps", 2**31, "below 2**31, because devices count in 32 bits"),
        ("rollout.slots", 2**31, "below 2**31, because devices count in 32 bits"),
        ("seed", 2**32, "below 2**32"),
        ("mesh.data", -(2**40), "below 2**31, because devices count in 32 bits"),
        ("model.path", "x" * 256, "each name in it of at most 255"),
        ("model.path", "x\0", "each name in it of at most 255"),
        ("data.dir", "x/" * 2048, "a path of at most 3584 bytes"),
        ("wording", "x" * 256 + ".toml", "each name in it of at most 255"),
        ("compile_cache", "~/" + "x" * 256, "each name in it of at most 255"),
    ],
)
def test_what_devices_or_file_systems_cannot_hold_is_refused(field, number, words):
    config = default_config()
    config.update_from_flattened_dict({field: number})
    with pytest.raises(UserError) as caught:
        validate(config)
    assert str(caught.value).startswith(f"{field} is ") and words in str(caught.value)


def test_every_whole_number_is_bounded():
    for field in describe():
        if field.type in ("int", "int, null"):
            config = default_config()
            config.update_from_flattened_dict({field.name: 2**32})
            with pytest.raises(UserError, match=f"^{field.name} is 4294967296; it must be below"):
                validate(config)


def test_a_run_has_no_more_rollouts_than_there_are_streams_of_random_numbers():
    config = default_config()
    config.steps = 2**31 // (config.batch.prompts * config.batch.samples)
    validate(config)
    config.steps += 1
    with pytest.raises(UserError, match="steps x batch.prompts x batch.samples is 2147483904; it must be at"):
        validate(config)


def test_replace_changes_one_field_and_leaves_the_original():
    settings = validate(default_config())
    changed = replace(settings, "model.lora.rank", 8)
    assert (value(changed, "model.lora.rank"), value(settings, "model.lora.rank")) == (8, 0)
    assert replace(changed, "model.lora.rank", 0) == settings
