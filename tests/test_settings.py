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


def test_replace_changes_one_field_and_leaves_the_original():
    settings = validate(default_config())
    changed = replace(settings, "model.lora.rank", 8)
    assert (value(changed, "model.lora.rank"), value(settings, "model.lora.rank")) == (8, 0)
    assert replace(changed, "model.lora.rank", 0) == settings
