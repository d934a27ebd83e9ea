"""Whether a start may go on from what lies in a workdir: what a kill explains, and what has changed."""

import json
from types import SimpleNamespace

import pytest

from rosd_jax.config import default_config, validate
from rosd_jax.errors import UserError
from rosd_jax.fields import replace
from rosd_jax.train import history, workdir
from rosd_jax.train.inputs import FILES

EVERY = 5


@pytest.fixture
def config():
    config = default_config()
    config.checkpoint.every = EVERY
    config.eval.update(samples=4, temperature=0.5, top_p=0.75, max_new_tokens=8)
    return validate(config)


def line(step, split="train", **numbers):
    return {"step": step, "split": split, **numbers}


def left(tmp_path, steps, *, checkpoints="removed", exported=None):
    """A workdir with the lines and rollouts of that many steps."""
    rows = [line(0, "eval/a"), *(line(step) for step in range(1, steps + 1))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for step in range(1, steps + 1):
        workdir.write_rollouts(tmp_path, step, [])
    if checkpoints != "removed":
        (tmp_path / "checkpoints").mkdir()
    if checkpoints == "saved":
        (tmp_path / "checkpoints" / "5").mkdir()
    if exported is not None:
        (tmp_path / "export").mkdir()
        (tmp_path / "export" / "config.json").write_text("{}")
        (tmp_path / "export" / history.EXPORTED).write_text(f"{exported}\n")
    return tmp_path


KILLED = {
    "new": dict(steps=0),
    "before the first step": dict(steps=0, checkpoints="empty"),
    "before the first checkpoint": dict(steps=3, checkpoints="empty"),
    "saving the first checkpoint": dict(steps=EVERY, checkpoints="empty"),
    "saving it while the next step is made": dict(steps=EVERY + 1, checkpoints="empty"),
    "later": dict(steps=9, checkpoints="saved"),
    "finished": dict(steps=9, checkpoints="saved", exported=9),
}
ERASED = {
    "removed": dict(steps=12),
    "removed early": dict(steps=3),
    "emptied": dict(steps=EVERY + 2, checkpoints="empty"),
    "emptied behind the export": dict(steps=3, checkpoints="empty", exported=3),
    "removed behind the export": dict(steps=12, exported=10),
}


@pytest.mark.parametrize("name", KILLED)
def test_what_a_kill_leaves_is_gone_on_from(name, tmp_path, config):
    left(tmp_path, **KILLED[name])
    history.require_checkpoint(tmp_path, config)
    assert history.export_to_evaluate(tmp_path, config) is False


@pytest.mark.parametrize("name", ERASED)
def test_a_history_whose_checkpoints_were_removed_is_not_trained_over(name, tmp_path, config):
    left(tmp_path, **ERASED[name])
    steps, exported = ERASED[name]["steps"], "exported" in ERASED[name]
    words = rf"contains a run up to step {steps}, but no checkpoint to resume it from; restore .*checkpoints"
    with pytest.raises(UserError, match=words) as caught:
        history.require_checkpoint(tmp_path, config)
    assert ("--mode=eval" in str(caught.value)) is exported
    if exported:
        assert history.export_to_evaluate(tmp_path, config)
    else:
        with pytest.raises(UserError, match="neither a checkpoint nor an export"):
            history.export_to_evaluate(tmp_path, config)


@pytest.mark.parametrize("gone", ["metrics.jsonl", "rollouts"])
def test_what_is_left_of_a_history_is_still_one(gone, tmp_path, config):
    left(tmp_path, 12)
    (tmp_path / gone).rename(tmp_path / "away")
    with pytest.raises(UserError, match="up to step 12"):
        history.require_checkpoint(tmp_path, config)


def test_the_step_of_the_export_is_the_noted_one_or_the_last(tmp_path):
    assert history.exported_step(tmp_path) is None
    left(tmp_path, 12, exported=10)  # the run went on, and was killed at 12
    assert history.exported_step(tmp_path) == 10
    note = tmp_path / "export" / history.EXPORTED
    note.write_text("ten")
    with pytest.raises(UserError, match="trained_steps.txt contains 'ten'"):
        history.exported_step(tmp_path)
    note.unlink()
    assert history.exported_step(tmp_path) == 12


def test_fewer_steps_than_the_export_has_are_refused(tmp_path, config):
    left(tmp_path, 12, checkpoints="saved", exported=10)
    for steps, start, made in ((9, 5, 10), (11, 12, 12)):
        with pytest.raises(UserError, match=f"steps is {steps}; this run has made {made} already"):
            history.require_steps(tmp_path, replace(config, "steps", steps), start)
    history.require_steps(tmp_path, replace(config, "steps", 10), 5)


MADE = {
    "weights": "c0ffee",
    "model": {"rope_theta": 1e6, "num_tokens": 9},
    "tokenizer": "beef",
    "train": {"rows": 3, "crc32": 1},
}


@pytest.mark.parametrize(
    "now, words",
    [
        ({"weights": "other"}, "the weights of model.path ('there') changed"),
        ({"model": {"rope_theta": 1e4, "num_tokens": 9}}, "config.json of model.path ('there') changed"),
        (
            {"tokenizer": "other"},
            "the tokenizer, chat template or stop tokens of model.path ('there') changed",
        ),
        ({"train": {"rows": 4, "crc32": 2}}, "training problems of jsonl:f (3 rows then, 4 now) changed"),
        (
            {"weights": "a", "tokenizer": "b", "train": {"rows": 3, "crc32": 2}},
            "of jsonl:f (3 rows then, 3 now)",
        ),
    ],
)
def test_all_that_changed_since_the_run_began_is_named(now, words, config):
    config = replace(replace(config, "model.path", "there"), "data.train", "jsonl:f")
    history.require_same_origins(MADE | {"step": 3}, MADE, config)
    with pytest.raises(UserError) as caught:
        history.require_same_origins(MADE | {"step": 3}, MADE | now, config)
    assert words in str(caught.value) and str(caught.value).count(" and ") == len(now) - 1
    assert "restore the old ones or use another --workdir" in str(caught.value)


def test_what_an_older_checkpoint_does_not_say_is_not_asked(config):
    history.require_same_origins({"weights": "c0ffee", "model": {"rope_theta": 1e6}}, MADE, config)
    with pytest.raises(UserError, match="the weights"):
        history.require_same_origins({"weights": "other"}, MADE, config)


def inputs_of(crc32=7, names=("a", "b")):
    found = {f"{name}/{file}": {"rows": 3, "crc32": crc32} for name in names for file in FILES.values()}
    sets = {name: [None] * 3 for name in names}
    return SimpleNamespace(sets=lambda split: sets, found=found, evals=sets)


def write_lines(tmp_path, *rows):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_set_that_changed_since_it_was_scored_is_refused_by_name(tmp_path):
    write_lines(tmp_path, line(0, "eval/a", problems_crc32=7), line(2), line(4, "eval/b", problems_crc32=7))
    history.require_same_evals(tmp_path, inputs_of(), 4)
    with pytest.raises(UserError, match="gold answers of a in eval.sets changed .* at step 0; restore"):
        history.require_same_evals(tmp_path, inputs_of(crc32=8), 4)
    history.require_same_evals(tmp_path, inputs_of(crc32=8, names=("c",)), 4)  # asked no more
    with pytest.raises(UserError, match="gold answers of b"):
        history.require_same_evals(tmp_path, inputs_of(crc32=8, names=("b",)), 4)
    history.require_same_evals(tmp_path, inputs_of(crc32=8, names=("b",)), 3)  # that line will be dropped
    write_lines(tmp_path, line(0, "eval/a"))  # an older version's
    history.require_same_evals(tmp_path, inputs_of(), 4)


def test_a_set_is_evaluated_where_no_line_of_the_step_was_made_under_the_same_conditions(tmp_path, config):
    inputs = inputs_of()
    wanted = history.conditions(config, inputs, "eval", "a")
    assert wanted == dict(k=4, n=3, temperature=0.5, top_p=0.75, max_new_tokens=8, problems_crc32=7)
    write_lines(tmp_path, line(4, "eval/a", **wanted), line(3, "eval/b", **wanted))
    assert history.unevaluated(tmp_path, config, inputs, "eval", 4) == ["b"]
    assert history.unevaluated(tmp_path, config, inputs, "eval", 3) == ["a"]
    assert history.unevaluated(tmp_path, config, inputs, "validation", 4) == ["a", "b"]
    config = replace(config, "eval.samples", 8)
    assert history.unevaluated(tmp_path, config, inputs, "eval", 4) == ["a", "b"]
    write_lines(tmp_path, line(4, "eval/a", k=8, n=3))  # an older version's
    assert history.unevaluated(tmp_path, config, inputs, "eval", 4) == ["b"]


def test_an_evaluation_of_more_problems_is_not_replaced(tmp_path, config):
    """The new one has 3."""
    write_lines(tmp_path, line(3, "eval/a", n=3, k=9), line(4, "eval/a", n=4, k=4), line(4, "eval/b", n=2))
    history.require_no_less(tmp_path, config, inputs_of(), 3)
    with pytest.raises(UserError, match="of a at step 4 has 4 problems; one of 3 would replace it"):
        history.require_no_less(tmp_path, config, inputs_of(), 4)
    history.require_no_less(tmp_path, config, inputs_of(names=("b", "c")), 4)
