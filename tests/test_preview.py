"""--mode=data: what it says of lengths, duplicates and hostile text."""

import json

import pytest

import tiny
from rosd_jax.config import default_config, validate
from rosd_jax.errors import UserError
from rosd_jax.train.preview import preview


@pytest.fixture
def shown(tmp_path, tmp_path_factory):
    """shown(train=prompts, test=prompts): the lines that are printed."""

    def of(limit=40, **prompts):
        folder = tmp_path / "sums"
        folder.mkdir(exist_ok=True)
        for split, texts in prompts.items():
            rows = [{"prompt": text, "answer": "4", "kind": "math"} for text in texts]
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = default_config()
        config.model.path = str(tiny.model_dir(tmp_path_factory))
        config.data.train = config.eval.sets = f"sums=jsonl:{folder}"
        config.data.max_prompt_tokens = limit
        config.batch.update(prompts=1, samples=2)
        for section in (config.rollout, config.reflect, config.eval):
            section.max_new_tokens = 16
        config.reflect.max_prompt_tokens = config.lesson.max_teacher_tokens = 64
        return preview(validate(config)).splitlines()

    return of


def test_lengths_and_what_is_left_out(shown):
    lines = shown(limit=12, train=["1", "1 +2", "1 +2 +3 +4 +5 +6 +7"], test=["9"])
    assert lines[0].split() == "set problems left out least median 95 % most kind".split()
    name, problems, left_out, least, _, _, most, kind = lines[1].split()
    assert (name, problems, left_out, kind) == ("sums/train", "2", "1", "math")
    assert 0 < int(least) < int(most) <= 12
    assert lines[2].split()[:3] == ["sums/test", "1", "0"]
    assert "above data.max_prompt_tokens (12)" in lines[4]


def test_problems_that_are_trained_on_and_evaluated_are_warned_of(shown, caplog):
    shown(train=["1 +2", "1 +3"], test=["1  +2", "5"])
    assert [r.getMessage() for r in caplog.records if "1 of its 2 problems are also in" in r.getMessage()]
    caplog.clear()
    shown(train=["1 +2", "1 +3"], test=["1 +4", "5"])
    assert not caplog.records


def test_duplicates_within_a_set_and_between_sets_are_named(shown):
    lines = shown(train=["1 +2", "1 +3", "1  +2 "], test=["1 +2", "5"])
    assert "sums/train: 1 repeated: sums/train/0 = sums/train/2" in lines
    assert "sums/test: 1 also in sums/train: sums/train/0 = sums/test/0" in lines
    assert "No problem is in two sets, or in one set twice." in shown(train=["1"], test=["2"])


def test_no_text_can_change_what_the_terminal_shows(shown):
    text = "\n".join(shown(limit=200, train=["1 \x1b[2J\x07 \u202e +2\r"], test=["3"]))
    assert "\\x1b[2J\\x07 \\u202e +2" in text and "gold answer: 4" in text
    assert not set("\x1b\x07\r\u202e") & set(text)


def test_a_set_without_a_prompt_that_fits_is_a_mistake(shown):
    with pytest.raises(UserError, match="data.max_prompt_tokens is 3, and all of the 1 prompts are longer"):
        shown(limit=3, train=["1"], test=["2"])
