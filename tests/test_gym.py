"""The gym: problems, slips whose place is known, and the texts of the tiny model's tokenizer."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from rosd_jax.errors import UserError
from rosd_jax.gym import pretrain, texts
from rosd_jax.gym import problems as gym
from rosd_jax.gym.metric import quote_exact
from rosd_jax.rewards import Grader
from rosd_jax.text import spans
from rosd_jax.text.tokenizer import load_tokenizer
from rosd_jax.types import Graded, Problem, Prompts, Reflected, Reflection

FAMILIES = tuple(gym.STEPS)
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed, family="chain", split="train"):
    """A problem and a solver's slippery lines."""
    rng = np.random.default_rng(seed)
    chain = gym.sample_chain(rng, family, split)
    return chain, gym.solve(chain, rng), rng


def is_right(line):
    """Whether a line's arithmetic holds, worked out from the line alone."""
    value, op, operand, result = re.fullmatch(r"[a-h] (\d+)([-+*])(\d+)=(\d+)", line).groups()
    whole = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[op](int(value), int(operand))
    return whole % gym.MODULUS == int(result)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_solver_without_slips_makes_no_error(family):
    for seed in range(50):
        chain = draw(seed, family)[0]
        lines = gym.solve(chain)
        assert all(map(is_right, lines)) and len(lines) == len(chain.steps)
        assert gym.first_error(chain, gym.respond(lines)) is None


@settings(max_examples=200, deadline=None)
@given(seed=SEEDS, family=st.sampled_from(FAMILIES))
def test_the_first_error_is_the_first_line_whose_arithmetic_fails(seed, family):
    chain, lines, _ = draw(seed, family)
    response = gym.respond(lines)
    wrong = [line for line in lines if not is_right(line)]
    found = gym.first_error(chain, response)
    assert (found and response[slice(*found)]) == (wrong[0] if wrong else None)
    assert found is None or response[: found[0]].split("\n")[:-1] == lines[: lines.index(wrong[0])]


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS)
def test_slips_carry_on_and_change_the_answer(seed):
    chain, lines, _ = draw(seed, "long")
    for line, after in zip(lines, lines[1:], strict=False):
        assert after[2:].startswith(line.split("=")[1])
    slips = sum(not is_right(line) for line in lines)
    assert slips != 1 or lines[-1].split("=")[1] != gym.solve(chain)[-1].split("=")[1]


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, sure=st.integers(0, 3))
def test_the_line_that_the_idea_gives_is_never_slipped(seed, sure):
    chain, _, rng = draw(seed)
    assert is_right(gym.solve(chain, rng, sure)[sure])


def test_slips_happen_as_often_as_the_table_says():
    rng = np.random.default_rng(0)
    chain = gym.Chain(3, (("+", 4), ("-", 5), ("*", 6)))
    slipped = np.mean([[not is_right(x) for x in gym.solve(chain, rng)] for _ in range(4000)], axis=0)
    rates = np.array([gym.SLIP_RATE[op] for op in "+-*"])
    assert (slipped < rates + 0.02).all() and (slipped > 0.8 * rates - 0.02).all()


def test_stopping_early_or_another_answer_is_an_error_where_it_stands():
    chain = gym.Chain(12, (("+", 7), ("*", 3)))
    right = gym.respond(gym.solve(chain))
    early = right.rpartition("\n")[0]
    assert gym.first_error(chain, early) == (len(early), len(early))
    other = right.replace("<answer>", "<answer>1")
    start, stop = gym.first_error(chain, other)
    assert other[start:stop].startswith("<answer>1")
    more = right + "\nand so on"
    assert more[slice(*gym.first_error(chain, more))] == "and so on"


@settings(max_examples=100, deadline=None)
@given(response=st.text() | st.text(alphabet="abcd 0123=+-*\n<answer>/"))
def test_any_response_has_its_error_inside_itself(response):
    start, stop = gym.first_error(gym.Chain(12, (("+", 7), ("*", 3))), response)
    assert 0 <= start <= stop <= len(response)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS, family=st.sampled_from(FAMILIES))
def test_the_text_of_a_problem_reads_back(seed, family):
    chain = draw(seed, family)[0]
    assert gym.parse(chain.text) == chain


@pytest.mark.parametrize("text", ["", "12", "12 + 7", "12 +7 x", " 12 +7", "12 over 7", "12 +7\n"])
def test_other_text_is_no_problem(text):
    with pytest.raises(ValueError, match="not a problem of the gym"):
        gym.parse(text)


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_are_disjoint_and_always_the_same(family):
    train, test = gym.load(family, "train"), gym.load(family, "test")
    asked = [{problem.question for problem in split} for split in (train, test)]
    assert not asked[0] & asked[1]
    assert [len(split) for split in (train, test)] == [len(found) for found in asked] == [2048, 256]
    assert gym.load(family, "test") == test
    assert len({problem.uid for problem in (*train, *test)}) == 2304
    assert {gym.parse(text).family for text in asked[1]} == {family}
    with Grader("fixed") as grader:
        right = [gym.respond(gym.solve(gym.parse(problem.question))) for problem in test]
        assert all(grade.score == 1 for grade in grader.grade_all(right, test, thinking_open=False))


def test_unknown_names_are_refused_with_the_known_ones():
    for family, split in (("chains", "train"), ("chain", "dev")):
        with pytest.raises(UserError, match="the gym has chain, long, words with train, validation, test"):
            gym.load(family, split)


@settings(max_examples=100, deadline=None)
@given(seed=SEEDS)
def test_a_reflection_reads_back_and_points_at_the_wrong_line(seed):
    chain, _, rng = draw(seed)
    wrong = texts.wrong_solution(chain, rng)
    attempt = gym.respond(wrong)
    prompt, reflection = texts.reflection_text(chain, wrong)
    assert attempt in prompt and gym.respond(gym.solve(chain)) in prompt and chain.text in prompt
    idea, quote = spans.parse_reflection(reflection)
    located = spans.locate_quote(attempt, quote)
    assert (located.start, located.stop) == gym.first_error(chain, attempt)
    assert not located.ambiguous
    assert idea == gym.solve(chain)[wrong.index(quote)]


def test_a_right_attempt_has_no_error_to_reflect_on():
    lines = gym.solve(gym.Chain(1, (("+", 2),)))
    with pytest.raises(ValueError, match="no wrong line"):
        texts.reflect_wrong(lines, lines)


def test_the_drills_are_true():
    assert all(map(is_right, texts.facts(np.random.default_rng(0)).splitlines()))
    for line in texts.comparisons(np.random.default_rng(0)).splitlines():
        _, a, b, verdict = line.split(" ")
        assert verdict == ("same" if a == b else "differ")


# --- the metric --------------------------------------------------------------------------------------

TEXT = "12 +7 *3 -5 +9"
SLIPPED = gym.respond(["a 12+7=2", "b 2*3=7", "c 7-5=2", "d 2+9=11"])
RIGHT = gym.respond(gym.solve(gym.parse(TEXT)))
LINE = gym.first_error(gym.parse(TEXT), SLIPPED)


def share(texts, rewards, reflections):
    """`quote_exact` of rollouts of one problem."""
    problem = Problem("u", "gym:chain", "gym", ({"role": "user", "content": TEXT},), "10")
    prompts = Prompts((problem,), ([1],))
    graded = Graded(prompts, None, tuple(texts), np.array(rewards, np.float32), thinking_open=False)
    return quote_exact(Reflected(graded, tuple(reflections)))["quote_exact"]


def test_a_quote_is_exact_where_it_is_the_first_wrong_line():
    spans = [LINE, (LINE[0], LINE[1] - 1), (0, 9)]
    reflections = [Reflection(raw="", char_span=span) for span in spans]
    assert share([SLIPPED, SLIPPED, RIGHT], [0, 0, 0], reflections) == pytest.approx(1 / 3)


def test_a_quote_that_is_not_found_is_not_exact():
    found, lost = Reflection(raw="", char_span=LINE), Reflection(raw="")
    assert share([SLIPPED] * 2, [0, 0], [found, lost]) == 1 / 2
    assert share([SLIPPED] * 2, [0, 0], [lost, lost]) == 0


def test_without_an_asked_quote_there_is_no_share():
    right, unasked = Reflection(raw=""), Reflection()
    assert np.isnan(share([RIGHT, SLIPPED], [1, 0], [right, unasked]))


# --- the texts of pretraining, and the tokenizer that they are written in ----------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return load_tokenizer(tiny.model_dir(tmp_path_factory))


def pairs(count=20):
    """Pairs of every task and family of the mixture."""
    rng = np.random.default_rng(5)
    tasks = [(task, family) for task in pretrain.MIXTURE for family in FAMILIES]
    return [(task, *texts.sample_text(rng, task, family)) for task, family in tasks for _ in range(count)]


def test_every_text_is_in_the_vocabulary_and_reads_back(tokenizer):
    inner = pretrain.build_tokenizer()
    for _, prompt, response in pairs():
        text = pretrain.chat(prompt) + response + "<|im_end|>"
        ids = inner.encode(text).ids
        assert inner.token_to_id("<unk>") not in ids, text
        assert inner.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.decode(tokenizer.encode(response)) == response


def test_the_written_chat_template_is_the_pretraining_format(tokenizer):
    inner = pretrain.build_tokenizer()
    for _, prompt, _ in pairs(2):
        messages = [{"role": "user", "content": prompt}]
        assert tokenizer.render(messages, thinking=False) == pretrain.chat(prompt)
        assert (
            tokenizer.encode_chats([messages], thinking=False)[0] == inner.encode(pretrain.chat(prompt)).ids
        )


def test_no_pretraining_text_holds_a_test_problem():
    held_out = {problem.question for family in FAMILIES for problem in gym.load(family, "test")}
    first = [(task, prompt.split("\n")[0]) for task, prompt, _ in pairs()]
    seen = [(task, gym.parse(text)) for task, text in first if task not in texts.DRILLS]
    assert {"solve", "idea", "reflect_wrong", "reflect_right"} <= {task for task, _ in seen}
    assert all(gym.split_of(chain) == "train" and chain.text not in held_out for _, chain in seen)


def test_the_first_wrong_line_is_a_whole_number_of_tokens(tokenizer):
    for seed in range(30):
        chain, _, rng = draw(seed)
        attempt = gym.respond(texts.wrong_solution(chain, rng))
        offsets = tokenizer.offsets(tokenizer.encode(attempt))
        span = gym.first_error(chain, attempt)
        first, last = spans.chars_to_tokens(span, offsets)
        assert (offsets[first, 0], offsets[last - 1, 1]) == span
