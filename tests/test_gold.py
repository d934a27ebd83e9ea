"""An idea that tells the answer is known as such, and one that only uses its letter is not."""

import time

import pytest

from rosd_jax.distill.gold import repeats_gold, strip_gold

CHOICES = [
    "{}",
    " {}. ",
    "({})",
    "**{}**",
    "**{}** fits, since force is a vector",
    "`{}`",
    "\\boxed{{{}}}",
    "\\boxed{{\\text{{{}}}}}",
    "<answer>{}</answer>",
    "{} is right",
    "{} is right, because energy is conserved",
    "{} is correct",
    "**{}** is correct.",
    "({}) is the right choice",
    "{} must be the answer",
    "{} was the correct option",
    "{} is clearly correct",
    "so pick {}",
    "Choose {}",
    "choosing {} follows",
    "select option {}",
    "we go with {}",
    "Mark {}.",
    "pick **{}**",
    "leaving only {}",
    "the answer is {}",
    "The answer is: {}",
    "answer: {}",
    "Answer = {}",
    "the correct option is ({})",
    "the correct one is {}",
    "the right letter is {}.",
    "option: {}",
    "Correct: {}",
    "the best choice must be {} here",
    "the answer is therefore {}",
    "THE ANSWER IS {}",
    "mass is conserved, so {}.",
    "Hence {}",
    "Therefore, {}.",
    "parity decides → {}",
    "it's {}.",
    "{}) the mass doubles",
]


@pytest.mark.parametrize("letter", "ABDI")
@pytest.mark.parametrize("idea", CHOICES)
def test_a_letter_that_is_said_to_be_the_choice(idea, letter):
    idea = idea.format(letter)
    assert repeats_gold(idea, letter)
    assert not repeats_gold(strip_gold(idea, letter), letter)
    assert not repeats_gold(idea, "C")


@pytest.mark.parametrize("idea", ["option {}", "choice {} follows", "answer {} is left", "Answer {}"])
def test_a_letter_behind_the_word_option(idea):
    assert repeats_gold(idea.format("A"), "A")


@pytest.mark.parametrize(
    "gold, idea",
    [
        ("A", "A force acts on the body"),
        ("A", "So A force acts"),
        ("A", "A right triangle has legs"),
        ("A", "A is right of the origin"),
        ("A", "A correct option needs units"),
        ("A", "choose A such that it is symmetric"),
        ("A", "pick A = 3 first"),
        ("A", "A is right-handed"),
        ("A", "The best A student"),
        ("A", "P(A) and P(A and B)"),
        ("A", "The answer is A-invariant"),
        ("A", "the answer is A + B"),
        ("I", "I think parity helps"),
        ("I", "the answer I found is odd"),
        ("I", "the choice I made is right"),
        ("I", "So I use parity"),
        ("I", "I'd pick the even one"),
        ("B", "vitamin B and point B"),
        ("B", "Both are even"),
        ("B", "B cells make antibodies"),
        ("B", "B. subtilis is a bacterium"),
        ("B", "the field B is perpendicular"),
        ("B", "so B = 3 T"),
        ("B", "options A and B differ in sign"),
        ("B", ""),
        ("C", "20 °C is correct"),
    ],
)
def test_a_letter_that_means_something_else(gold, idea):
    assert not repeats_gold(idea, gold)


@pytest.mark.parametrize(
    "gold, idea, repeated",
    [
        ("4", "so x = 4.", True),
        ("4", "x=4", True),
        ("4", "it is **4**, $4$ or (4)", True),
        ("4", "4", True),
        ("4", "x = 14", False),
        ("4", "x = 4.5", False),
        ("4", "x = 3,4", False),
        ("4", "-4", False),
        ("4", "−4", False),
        ("4", "1/4 and 4/5", False),
        ("4", "x^4", False),
        ("4", "4% or 4 \\% of it", False),
        ("4", "x4 and 4x", False),
        ("-4", "it is −4", True),
        ("-4", "it is -4.", True),
        ("-4", "7-4", False),
        ("1/2", "half is 1/2", True),
        ("1/2", "11/2", False),
        ("\\frac{1}{2}", "it is \\frac{1}{2}", True),
        ("65 kg", "about 65  kg", True),
        ("65 kg", "about 65 kgf", False),
        ("C++", "write it in C++", True),
    ],
)
def test_a_gold_answer_of_several_characters_stands_as_written(gold, idea, repeated):
    assert repeats_gold(idea, gold) == repeated
    assert (strip_gold(idea, gold) != idea.strip()) == repeated


@pytest.mark.parametrize(
    "piece", ["answer ", "B ", "\n", " ", "choose ", "B is ", "**", "so ", "(", "the best right ", "<answer>"]
)
def test_huge_ideas_take_linear_time(piece):
    start = time.process_time()
    repeats_gold(piece * 100_000, "B")
    strip_gold(piece * 100_000, "4")
    assert time.process_time() - start < 5
