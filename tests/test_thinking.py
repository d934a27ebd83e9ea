"""Drafts inside a thinking block are never read as an answer."""

import ast
import time
from pathlib import Path

import pytest

from rosd_jax.text import thinking
from rosd_jax.text.thinking import outside_thinking


@pytest.mark.parametrize(
    "text, kept",
    [
        ("", ""),
        ("abc", "abc"),
        ("a<think>b</think>c", "ac"),
        ("<think>\n\n</think>\n\nc", "\n\nc"),
        ("a</think>c", "c"),  # nothing opened it: the prompt did
        ("a</think>b</think>c", "c"),
        ("a<think>b", "a"),  # cut at the token limit
        ("<think>a", ""),
        ("<think>", ""),
        ("</think>", ""),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("a<think>b</think>c<think>d</think>e", "ace"),
        ("a<think>b</think>c<think>d", "ac"),
        ("a</think>b<think>c", "b"),
    ],
)
def test_text_outside_the_blocks(text, kept):
    assert outside_thinking(text, opened=False) == kept


@pytest.mark.parametrize(
    "text, kept",
    [
        ("", ""),
        ("a first guess: <answer>B</answer>", ""),
        ("hm</think>B", "B"),
        ("hm<think>again</think>B", "B"),  # the model opens what the prompt has opened
        ("<think>hm</think>B", "B"),
        ("hm</think>B<think>more</think>C", "BC"),
        ("hm</think>B<think>more", "B"),
        ("hm</think>B</think>C", "C"),
    ],
)
def test_text_that_begins_inside_a_block(text, kept):
    assert outside_thinking(text, opened=True) == kept


@pytest.mark.parametrize("piece", ["<think>", "</think>", "<think></think>", "a"])
def test_huge_texts_take_linear_time(piece):
    start = time.perf_counter()
    outside_thinking(piece * 200_000, opened=False)
    assert time.perf_counter() - start < 2


def test_the_module_imports_nothing():
    tree = ast.parse(Path(thinking.__file__).read_text())
    modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not any(isinstance(node, ast.Import) for node in ast.walk(tree))
    assert modules == {"__future__"}
