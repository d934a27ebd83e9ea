"""A quote is found wherever it truly stands, and nowhere else."""

import time
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rosd_jax.text.spans import (
    chars_to_tokens,
    find_exact,
    locate_quote,
    official_token_start,
    parse_official,
    parse_reflection,
)

TEXT = "First, x = 15.\nThen the naïve ﬁt gives y = 3.5 kg;\nSo  the\tresult is “large”. Done."


def found(text: str, quote: str) -> str | None:
    located = locate_quote(text, quote)
    return text[located.start : located.stop] if located else None


@pytest.mark.parametrize(
    "quote, part",
    [
        ("Then the naïve ﬁt", "Then the naïve ﬁt"),
        ("So the result is", "So  the\tresult is"),
        ("y = 3.5 kg; So the result", "y = 3.5 kg;\nSo  the\tresult"),
        ("first, X = 15.", "First, x = 15."),
        (unicodedata.normalize("NFD", "the naïve"), "the naïve"),
        ("naïve fit gives", "naïve ﬁt gives"),
        ("Ｔｈｅｎ the naïve", "Then the naïve"),
        ('"First, x = 15."', "First, x = 15."),
        ("“First, x = 15.”", "First, x = 15."),
        ("`First, x = 15.`", "First, x = 15."),
        ("First, x = 15...", "First, x = 15"),
        ("...Then the naïve…", "Then the naïve"),
        ('"...the result is “large”..."', "the\tresult is “large”"),
        ("  Done.\n", "Done."),
    ],
)
def test_tolerant_matches(quote, part):
    assert found(TEXT, quote) == part


@pytest.mark.parametrize(
    "text, quote",
    [
        ("x = 15", "X = 1..."),  # another number
        ("so x = 3.5 kg", "So x = 3..."),
        ("so x = 1/2", "So x = 1..."),
        ("the value is -5 kg", "...5 KG"),
        ("y is 0.25 mol", "…25 MOL"),
        ("x² + 1", "X2 + 1"),  # a power is no digit
        ("½ kg", "1⁄2 KG"),
        ("the café is open", "The cafe is open"),  # an accent is a letter
        ("café", "CAFE"),
        (unicodedata.normalize("NFD", "the café"), "THE CAFE"),
        ("12 34", "1234"),
        ("concatenate", "CAT"),  # a piece of another word
        ("a + b", "a - b"),
        ("The mass is 65 kg.", "The mass is 66 kg."),
        ("anything.", '"."'),
        ("anything", '""'),
        ("anything", "..."),
        ("anything", " \n"),
        ("", "x"),
        ("", ""),
    ],
)
def test_never_a_different_text(text, quote):
    assert locate_quote(text, quote) is None


def test_crlf_and_nbsp_are_white_space():
    assert found("x\r\ny 2", "x\ny 2") == "x\r\ny 2"
    assert found("So\xa0it is", "So it is") == "So\xa0it is"


def test_ambiguity_rule():
    lines = "as x = 1 here\nx = 1\nx = 1 again"
    assert locate_quote(lines, "x = 1").start == lines.index("\nx") + 1
    words = "x = 12, then x = 1 and x = 1"
    assert locate_quote(words, "x = 1").start == words.index("x = 1 ")
    assert locate_quote("aaaac", "aa").start == 0
    assert all(locate_quote(t, "x = 1").ambiguous for t in (lines, words))
    assert not locate_quote("x = 1", "x = 1").ambiguous
    assert locate_quote("X  = 1, x  = 1", "x = 1").ambiguous


@given(st.text(alphabet='ab1 .\n"é\u0301ﬁß漢🙂', max_size=40), st.data())
@settings(max_examples=300, deadline=None)
def test_every_substring_is_found_as_it_stands(text, data):
    start = data.draw(st.integers(0, len(text)))
    quote = text[start : data.draw(st.integers(start, len(text)))]
    if quote.strip():
        assert found(text, quote) == quote
        assert found(text, f"  {quote}\n").strip() == quote.strip()


@given(st.text(max_size=40), st.text(max_size=10))
@settings(max_examples=300, deadline=None)
def test_digits_of_a_match_are_those_of_the_quote(text, quote):
    part = found(text, quote)

    def digits(s):
        return [unicodedata.digit(c) for c in s if c.isdecimal()]

    assert part is None or digits(part) == digits(quote)


@pytest.mark.parametrize(
    "text, quote",
    [
        ("a" * 1_000_000, "A" * 10_000),
        ("1 " * 200_000, "1 " * 5_000 + "2"),
        ("x = 1 " * 60_000, "X = 1"),
        (" " * 500_000 + "end" + " " * 500_000, "END"),
        ("e" + "\u0301\u0323" * 200_000, "E\u0323"),
        ("." * 1_000_000, "..." * 1000),
        ('"' * 500_000, '"' * 20_000),
    ],
)
def test_huge_texts_take_linear_time(text, quote):
    start = time.perf_counter()
    locate_quote(text, quote)
    assert time.perf_counter() - start < 15


@pytest.mark.parametrize("parse", [parse_reflection, parse_official])
@pytest.mark.parametrize(
    "piece",
    [
        "<explanation>",
        "</explanation>",
        "<error_quote> ",
        "<think>",
        "<reflection></reflection>",
        "<error_quote></error_quote>",
        "<error_quote><reflection>.</reflection></error_quote>",
    ],
)
def test_huge_answers_are_parsed_in_linear_time(parse, piece):
    raw = "<explanation>" + piece * 80_000 + "</explanation>"
    start = time.perf_counter()
    parse(raw)
    assert time.perf_counter() - start < 5


def test_parse_takes_the_first_blocks_in_any_case():
    raw = "<Error_Quote> a\nb </error_quote><REFLECTION>r</reflection><explanation> e </Explanation>"
    assert parse_reflection(raw) == ("e", "a\nb")
    assert parse_reflection("<explanation> </explanation><reflection>r</reflection>") == ("r", None)
    assert parse_reflection("</explanation>x<explanation>y</explanation>") == ("y", None)
    assert parse_reflection("no tags at all") == (None, None)
    assert parse_reflection("<explanatıon>dotless</explanation>")[0] == "dotless"


@pytest.mark.parametrize(
    "raw, idea, quote",
    [
        # named in a sentence before they are written
        (
            "Here are <error_quote> and <explanation>:\n<error_quote>q</error_quote>"
            "<explanation>i</explanation>",
            "i",
            "q",
        ),
        ("The <ERROR_QUOTE> comes first.\n<error_quote>q</error_quote>", None, "q"),
        ("<explanation><explanation>\n<explanation>i</explanation>", "i", None),
        (
            "I fill <error_quote>...</error_quote> and <reflection> … </reflection>.\n"
            "<error_quote>q</error_quote><reflection>i</reflection>",
            "i",
            "q",
        ),
        ("The <error_quote></error_quote> tags:\n<error_quote>q</error_quote>", None, "q"),
        ("Between `<error_quote>` and `</error_quote>`:\n<error_quote>q</error_quote>", None, "q"),
        ('The "<explanation>" block. <explanation>i</explanation>', "i", None),
        (
            "Between <error_quote> and </error_quote>, and <explanation>, then </explanation>:\n"
            "<error_quote>q</error_quote><explanation>i</explanation>",
            "i",
            "q",
        ),
        # named behind the block, or inside another one
        ("<error_quote>q</error_quote> That was the <error_quote>.", None, "q"),
        ("<error_quote>q</error_quote></error_quote><error_quote>r</error_quote>", None, "q"),
        (
            "<explanation>In <error_quote> the sign is off</explanation><error_quote>q</error_quote>",
            "In <error_quote> the sign is off",
            "q",
        ),
        # blocks inside blocks
        ("<explanation><error_quote>q</error_quote>i</explanation>", "i", "q"),
        ("<error_quote>q<explanation>i</explanation></error_quote>", "i", "q"),
        ("<reflection><explanation>i</explanation></reflection>", "i", None),
        ("<reflection>a<error_quote>q</error_quote>b<error_quote>r</error_quote>c</reflection>", "abc", "q"),
        # blank, then real; unclosed; never opened
        ("<error_quote> \n </error_quote><error_quote>q</error_quote>", None, "q"),
        ("<explanation>i</explanation><error_quote>cut of", "i", None),
        ("<explanation>cut <error_quote>q</error_quote>", None, "q"),
        ("</error_quote>q</error_quote>", None, None),
        ("<explanation>i</reflection>", None, None),
        ("<explanation>...</explanation>", None, None),
    ],
)
def test_parse_finds_the_block_that_was_meant(raw, idea, quote):
    assert parse_reflection(raw) == (idea, quote)


def test_the_released_parser_begins_at_the_first_opening():
    raw = "The <error_quote>:\n<error_quote>q</error_quote><explanation> </explanation><reflection>r"
    assert parse_official(raw) == (None, ":\n<error_quote>q")
    raw = "<error_quote> </error_quote><error_quote>q</error_quote><Reflection> r </reflection>"
    assert parse_official(raw) == ("r", None)


def test_chars_to_tokens_leaves_out_empty_tokens_and_shares_split_characters():
    offsets = np.array([[0, 2], [2, 2], [2, 3], [2, 3], [3, 6], [6, 6]])
    assert chars_to_tokens((2, 3), offsets) == (2, 4)
    assert chars_to_tokens((1, 4), offsets) == (0, 5)
    assert chars_to_tokens((5, 6), offsets) == (4, 5)
    with pytest.raises(ValueError, match="no token"):
        chars_to_tokens((6, 7), offsets)


def test_official_start_is_the_length_of_the_encoded_prefix():
    assert official_token_start(lambda s: s.split(" "), "one two three", 4) == 2


def test_find_exact_takes_the_first_place():
    assert find_exact("a b a b", "b") == (2, 3)
    assert find_exact("a b", " b\n") == (2, 3)
    assert find_exact("a b", None) is None
    assert find_exact("a  b", "  ") is None
