"""Ablations: what is put in place of the reflector's spans and ideas, and that nothing else changes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from ml_collections import ConfigDict
from test_reflect import Letters, answer, graded_rows, read, span_config

import tiny
from configs import ablations, quickstart
from rosd_jax.config import use_preset, validate
from rosd_jax.distill import ablation, reflect
from rosd_jax.errors import UserError
from rosd_jax.gym import problems as gym
from rosd_jax.gym.oracle import oracle
from rosd_jax.text.tokenizer import load_tokenizer
from rosd_jax.train import workdir
from rosd_jax.train.inputs import read_inputs
from rosd_jax.types import Problem, Prompts

QUESTIONS = [f"{start} +4 *3 -4 +2" for start in range(8)]
SAMPLES = 4


def settings(**fields):
    config = span_config()
    config.seed = 3
    config.ablation.update(fields)
    return validate(config)


def slips(seed):
    """A batch of the gym in which every rollout has slipped and its reflection is as it should be."""
    rng = np.random.default_rng(seed)
    chains = [gym.parse(text) for text in QUESTIONS for _ in range(SAMPLES)]
    texts = []
    for chain in chains:
        lines = gym.solve(chain)
        while lines == gym.solve(chain):
            lines = gym.solve(chain, rng)
        texts.append(gym.respond(lines))
    graded = asked(graded_rows(texts, [0] * len(texts), samples=SAMPLES), QUESTIONS)
    said = {}
    for row, text in enumerate(texts):
        span, line = oracle(graded.problem(row).question, text)
        raw = answer(text[slice(*span)], line)
        said[row] = reflect.read_answer(
            graded, row, raw, Letters(), span_config().lesson, thinking_open=False
        )
    return graded, said


def asked(graded, questions):
    """The same rollouts as answers to other problems."""
    problems = [
        Problem(f"gym:chain/train/{i}", "gym:chain", "gym", ({"role": "user", "content": text},), "0")
        for i, text in enumerate(questions)
    ]
    return replace(graded, prompts=Prompts(tuple(problems), ([0],) * len(problems)))


def ablated(fields, seed=0, first=0):
    graded, said = slips(seed)
    return graded, said, ablation.replaced(said, graded, settings(**fields), Letters(), first)


def test_the_defaults_replace_nothing():
    graded, said, found = ablated({})
    assert found == said and all(r.idea and r.token_span for r in said.values())
    assert ablation.count(tuple(found.values()), settings().ablation) == {}


@pytest.mark.parametrize("seed", range(5))
def test_moved_spans_keep_their_length_and_stay_in_the_response_at_another_place(seed):
    graded, said, found = ablated({"moved_spans": 1.0}, seed)
    starts = set()
    for row, after in found.items():
        before = said[row]
        assert after.span_source == "moved" and after.token_span != before.token_span
        start, stop = after.token_span
        assert stop - start == before.token_span[1] - before.token_span[0]
        assert 0 <= start < stop <= graded.rollout.length_B[row]
        ids = graded.rollout.tokens_BR[row, start:stop]
        assert graded.texts[row][slice(*after.char_span)] == Letters().decode(ids)
        assert replace(after, char_span=None, token_span=None, span_source="reflector") == replace(
            before, char_span=None, token_span=None
        )
        starts.add(start)
    assert len(starts) > 8, "they are all over the response"


def test_every_other_place_is_equally_likely():
    graded = asked(graded_rows(["abcd"], [0], samples=1), ["1 +2"])  # with the stop token, five tokens
    said = {0: reflect.Reflection(raw="", quote="b", char_span=(1, 2), token_span=(1, 2))}
    config = settings(moved_spans=1.0)
    starts = [
        ablation.replaced(said, graded, config, Letters(), first)[0].token_span[0] for first in range(2000)
    ]
    share = np.bincount(starts, minlength=5) / 2000
    assert share[1] == 0 and np.abs(share[[0, 2, 3, 4]] - 0.25).max() < 0.04


def test_a_span_that_fills_the_response_stays_and_is_not_counted():
    graded = asked(graded_rows(["ab"], [0], samples=1), ["1 +2"])
    said = {0: reflect.Reflection(raw="", quote="ab", char_span=(0, 2), token_span=(0, 3))}
    found = ablation.replaced(said, graded, settings(moved_spans=1.0), Letters(), 0)
    assert found == said
    assert ablation.count(tuple(found.values()), settings(moved_spans=1.0).ablation) == {"spans_moved": 0}


@pytest.mark.parametrize("field, mark", [("moved_spans", "span_source"), ("swapped_ideas", "idea_source")])
def test_a_larger_share_replaces_the_same_rows_and_more(field, mark):
    replaced = []
    for share in (0.25, 0.5, 1.0):
        rows = set()
        for first in range(0, 320, 32):
            _, said, found = ablated({field: share}, seed=first, first=first)
            rows |= {first + row for row, r in found.items() if getattr(r, mark) != "reflector"}
        assert abs(len(rows) / 320 - share) < 0.08
        replaced.append(rows)
    assert replaced[0] < replaced[1] < replaced[2] and len(replaced[2]) == 320


def test_draws_depend_on_the_seed_and_the_number_of_the_rollout_alone():
    fields = {"moved_spans": 0.5, "swapped_ideas": 0.5}
    graded, said, found = ablated(fields, first=64)
    again = ablation.replaced(dict(reversed(said.items())), graded, settings(**fields), Letters(), 64)
    assert {row: r.token_span for row, r in again.items()} == {row: r.token_span for row, r in found.items()}
    assert found != ablation.replaced(said, graded, settings(**fields), Letters(), 96)
    other = replace(settings(**fields), seed=4)
    assert found != ablation.replaced(said, graded, other, Letters(), 64)
    fewer = {row: said[row] for row in list(said)[::2]}
    spans = ablation.replaced(fewer, graded, settings(moved_spans=0.5), Letters(), 64)
    assert all(spans[row].token_span == found[row].token_span for row in fewer)


def test_a_swapped_idea_is_that_of_another_problem():
    graded, said, found = ablated({"swapped_ideas": 1.0})
    for row, after in found.items():
        question = graded.problem(row).question
        others = {said[place].idea for place in said if graded.problem(place).question != question}
        assert after.idea in others and after.idea_source == "swapped"
        assert replace(after, idea=said[row].idea, idea_source="reflector") == said[row]
    counts = ablation.count(tuple(found.values()), settings(swapped_ideas=1.0).ablation)
    assert counts == {"ideas_swapped": 32, "ideas_without_other": 0}


def test_without_another_problems_idea_the_rollout_leaves_the_loss():
    lesson = span_config().lesson
    graded = asked(graded_rows(["is 5", "is 4", "so 5", "is 4"], [0, 1, 0, 1]), ["1 +2", "1 +2"])
    plans = reflect.plan_rollouts(graded, span_config().reflect)
    raws = {0: answer("5"), 2: answer("5")}
    said = {
        row: reflect.read_answer(graded, row, raw, Letters(), lesson, thinking_open=False)
        for row, raw in raws.items()
    }
    found = ablation.replaced(said, graded, settings(swapped_ideas=1.0), Letters(), 0)
    reflected = reflect.gather(graded, plans, raws, found, lesson)
    assert [reflected.reflections[row].note for row in (0, 2)] == ["no_idea"] * 2
    counts = ablation.count(reflected.reflections, settings(swapped_ideas=1.0).ablation)
    assert counts == {"ideas_swapped": 0, "ideas_without_other": 2}


def test_the_oracle_says_what_a_perfect_reflector_would():
    graded, said = slips(1)
    blank = {row: replace(r, idea=None, char_span=None, token_span=None) for row, r in said.items()}
    found = ablation.replaced(blank, graded, settings(oracle_spans=True, oracle_ideas=True), Letters(), 0)
    for row, after in found.items():
        assert (after.span_source, after.idea_source) == ("oracle", "oracle")
        assert replace(after, span_source="reflector", idea_source="reflector") == said[row]
    for field, kept in (("oracle_spans", "idea"), ("oracle_ideas", "token_span")):
        half = ablation.replaced(blank, graded, settings(**{field: True}), Letters(), 0)
        assert all(getattr(r, kept) is None for r in half.values())


QUESTION = "12 +7 *3 -5 +9"
RIGHT = ["a 12+7=2", "b 2*3=6", "c 6-5=1", "d 1+9=10"]
ANSWER = "<answer>10</answer>"


@pytest.mark.parametrize(
    "lines, finished, error, idea",
    [
        ([*RIGHT[:1], "b 2*3=5", "c 5-5=0", "d 0+9=9", "<answer>9</answer>"], True, "b 2*3=5", RIGHT[1]),
        ([*RIGHT, "<answer>9</answer>"], True, "<answer>9</answer>", RIGHT[3]),
        ([*RIGHT, ANSWER, "more"], True, "more", RIGHT[3]),
        ([*RIGHT[:2]], True, "\0", RIGHT[2]),  # it stops early: the stop token is the error
        ([*RIGHT[:2]], False, None, RIGHT[2]),  # it was cut off: no token is wrong
        ([RIGHT[0], "", *RIGHT[1:], ANSWER], True, "\n", RIGHT[1]),
    ],
)
def test_the_oracle_of_unusual_responses(lines, finished, error, idea):
    text = "\n".join(lines)
    graded = asked(graded_rows([text], [0], samples=1), [QUESTION])
    if not finished:
        rollout = replace(graded.rollout, length_B=graded.rollout.length_B - 1)
        graded = replace(graded, rollout=rollout)
    config = settings(oracle_spans=True, oracle_ideas=True)
    found = ablation.replaced({0: reflect.Reflection(raw="")}, graded, config, Letters(), 0)[0]
    assert found.idea == idea
    if error is None:
        assert found.token_span is found.char_span is None
        return
    tokens = graded.rollout.tokens_BR[0, slice(*found.token_span)]
    assert "".join(map(chr, tokens)) == error


def test_correct_rollouts_keep_what_the_reflector_said():
    graded = asked(graded_rows(["\n".join([*RIGHT, ANSWER])], [1], samples=1), [QUESTION])
    said = {0: reflect.Reflection(raw="", idea="key")}
    config = settings(oracle_spans=True, oracle_ideas=True)
    assert ablation.replaced(said, graded, config, Letters(), 0) == said


def test_the_inverted_region_is_the_rest_of_the_response():
    texts = ["so it is 5 then", "it is 4"]
    raws = [answer("is 5"), "<explanation>x</explanation>"]
    weights = {}
    for region in ("span", "inverted"):
        lesson = span_config().lesson
        lesson.region = region
        reflected, weights[region] = read(texts, [0, 1], raws, lesson)
        assert [r.note for r in reflected.reflections] == ["", ""]
    length = len(texts[0]) + 1  # with the stop token
    assert weights["span"][0].sum() == 4
    np.testing.assert_array_equal(weights["inverted"][0, :length], 1 - weights["span"][0, :length])
    assert weights["inverted"][0, length:].sum() == 0
    np.testing.assert_array_equal(weights["inverted"][1], weights["span"][1])  # a correct one: all its tokens
    lesson.region = "inverted"
    reflected, weight_BR = read(texts, [0, 1], [answer("absent"), None], lesson)
    assert reflected.reflections[0].note == "quote_missing" and weight_BR[0].sum() == 0


def test_tokens_between_those_in_the_loss_have_no_divergence():
    tokens = SimpleNamespace(offsets=lambda ids: np.stack([np.arange(5), np.arange(1, 6)], axis=1))
    found = workdir.active_tokens(
        np.arange(5), np.float32([0, 1, 0, 1, 1]), np.float32([9, 1, 9, 2, 3]), tokens
    )
    assert found["active_span_tokens"] == (1, 5) and found["divergence"] == [1.0, None, 2.0, 3.0]


# --- the fields --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "preset, fields, words",
    [
        ("span", {"ablation.moved_spans": 1.1}, r"ablation.moved_spans is 1.1; it must lie in \[0, 1\]"),
        ("span", {"ablation.swapped_ideas": float("nan")}, r"swapped_ideas is nan; it must lie in \[0, 1\]"),
        (
            "span",
            {"ablation.moved_spans": 0.5, "lesson.region": "full"},
            "ablation.moved_spans is 0.5; it must be 0.0 with lesson.region=full and lesson.teacher_context="
            "idea, which use no span",
        ),
        ("grpo", {"ablation.oracle_spans": True}, "ablation.oracle_spans is True; it must be False with"),
        (
            "span",
            {"ablation.swapped_ideas": 0.5, "lesson.teacher_context": "solution"},
            "ablation.swapped_ideas is 0.5; it must be 0.0 with lesson.region=span and lesson.teacher_"
            "context=solution, which use no idea",
        ),
        ("grpo", {"ablation.oracle_ideas": True}, "which use no idea"),
    ],
)
def test_an_ablation_of_what_is_not_used_is_refused(preset, fields, words):
    config = use_preset(span_config(), preset)
    config.update_from_flattened_dict(fields)
    with pytest.raises(UserError, match=words):
        validate(config)


def test_an_oracle_needs_a_task_whose_errors_are_known(tmp_path, tmp_path_factory):
    rows = [{"prompt": f"{i} + 1?", "answer": str(i + 1), "kind": "math"} for i in range(8)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = quickstart.get_config("debug")
    config.model.path = str(tiny.model_dir(tmp_path_factory))
    config.validation.sets = ""
    config.ablation.oracle_ideas = True
    read_inputs(validate(config))
    config.data.train = f"sums=jsonl:{tmp_path / 'train.jsonl'}"
    with pytest.raises(UserError, match="ablation.oracle_ideas is True, and the first errors in sums=jsonl"):
        read_inputs(validate(config))


# --- the config file ---------------------------------------------------------------------------------


def fields_of(config: ConfigDict):
    flat = {}

    def walk(section, above):
        for name, given in section.items():
            if isinstance(given, ConfigDict):
                walk(given, f"{above}{name}.")
            else:
                flat[f"{above}{name}"] = given

    walk(config, "")
    return flat


@pytest.mark.parametrize("name", ablations.VARIANTS)
def test_a_variant_is_the_demo_except_for_its_fields(name):
    demo = fields_of(quickstart.get_config())
    config = ablations.get_config(name)
    differ = {field: given for field, given in fields_of(config).items() if given != demo[field]}
    assert differ.pop("name") == f"ablations-{name}"
    assert differ == ablations.VARIANTS[name]
    validate(config)


def test_without_a_variant_it_is_the_demo_and_unknown_ones_are_named():
    assert fields_of(ablations.get_config()) == fields_of(ablations.get_config("span"))
    assert ablations.get_config("k_1,debug").steps == quickstart.get_config("debug").steps == 2
    with pytest.raises(UserError, match="names suffix and full; name one of them"):
        ablations.get_config("suffix,full")
    with pytest.raises(UserError, match="config variant is 'grpo'; it must be one of span, suffix"):
        ablations.get_config("grpo")


def test_the_demos_top_tokens_are_the_whole_vocabulary():
    """ablations.py says so of k_vocab."""
    config = quickstart.get_config()
    assert load_tokenizer(config.model.path).num_tokens <= config.loss.topk
