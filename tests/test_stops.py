"""Stop strings end a response at the token that completes them, in whatever slot, batch or mesh it is."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import Metaspace

from rosd_jax.errors import UserError
from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.rollout.batching import Request
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits, own_pages
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.rollout.stops import make_stops
from rosd_jax.text.tokenizer import load_tokenizer
from support import ROOT, data_dir, nightly_but

V, NEW, PAGE, N = 12, 20, 4, 16
TOKENS = [
    b"",
    *(piece.encode() for piece in ("a", "b", "ab", "ba", "bab", "é", "c", " ")),
    b"\xc3",
    b"\xa9",
    b"x",
]
STOPS = ("abba", "\u00e9c")  # the second's first letter is one token, or two
MODEL = Qwen3Config(
    vocab_size=16,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=8,
    num_tokens=V,
)
PARAMS = init_params(MODEL, jax.random.key(0))


def end(stops, tokens, ids):
    """By the text so far: the index of the first token with which a stop string stands in it."""
    text = b""
    for n, i in enumerate(ids):
        text += tokens[i]
        if any(stop.encode() in text for stop in stops):
            return n
    return None


def walk(stops, tokens, ids):
    """The same by the table."""
    table, state = make_stops(stops, tokens), 0
    for n, i in enumerate(ids):
        state = table.next_SC[state, table.class_V[i]]
        if state == len(table.next_SC):
            return n
    return None


TEXT = st.text("ab\u00e9", min_size=1, max_size=5)


@settings(deadline=None, max_examples=300)
@given(
    st.lists(TEXT, min_size=1, max_size=3), st.lists(st.text("ab\u00e9", max_size=4), min_size=3), st.data()
)
def test_the_table_finds_what_the_text_holds(stops, tokens, data):
    pieces = [token.encode()[i % 2 :] for i, token in enumerate(tokens)]  # some begin inside a letter
    ids = data.draw(st.lists(st.integers(0, len(pieces) - 1), max_size=12))
    assert walk(stops, pieces, ids) == end(stops, pieces, ids)


def generate(mesh=None, stops=STOPS, params=PARAMS, **limits):
    table = make_stops(stops, TOKENS) if stops else None
    limits = Limits(NEW, 3, page_length=PAGE, **limits)
    engine = Engine(MODEL, mesh, limits, Sampling(1.0, stop_ids=(11,)), table)
    requests = [Request([1, 2, 4] if uid < N // 2 else [3, 1], uid) for uid in range(N)]
    return engine.generate(params, requests, jax.random.key(3))


@pytest.fixture(scope="module")
def free():
    return generate(stops=())


@pytest.mark.parametrize(
    "options",
    nightly_but(
        [{}, {"slots": 4}, {"slots": 8, "response_pages": own_pages(PAGE, NEW) + 2}, {"mesh": (2, 2, 2)}],
        keep=[2, 3],
    ),
)
def test_responses_end_with_the_token_that_completes_a_stop_string(free, options):
    options = dict(options)
    if "mesh" in options:
        options["mesh"] = make_mesh(*options["mesh"])
        options["params"] = jax.device_put(PARAMS, param_shardings(PARAMS, options["mesh"]))
    got = generate(**options)
    ends = []
    for row, length in enumerate(free.length_B):
        at = end(STOPS, TOKENS, free.tokens_BR[row, :length])
        ends.append(at)
        want = length if at is None else at + 1
        assert got.length_B[row] == want
        assert got.finished_B[row] == (at is not None or free.finished_B[row])
        np.testing.assert_array_equal(got.tokens_BR[row, :want], free.tokens_BR[row, :want])
        assert not got.tokens_BR[row, want:].any()
    assert 3 < sum(at is not None for at in ends) < N
    if "response_pages" in options:
        assert got.stats.preempted > 0


def test_the_tokens_of_the_gym_are_its_words():
    tokenizer = load_tokenizer(ROOT / "models" / "gym")
    pieces = tokenizer.pieces()
    ids = tokenizer.encode("a 12+4=16\n<answer>16</answer>")
    assert b"".join(pieces[i] for i in ids).decode() == tokenizer.decode(ids)
    assert [pieces[i] for i in tokenizer.stop_ids] == [b""] * len(tokenizer.stop_ids)
    (shown,) = (i for i, piece in enumerate(tokenizer.pieces(["<|im_end|>"])) if piece == b"<|im_end|>")
    assert shown in tokenizer.stop_ids


def test_stop_strings_are_found_in_qwen3s_tokens():
    tokenizer = load_tokenizer(data_dir("qwen3_tokenizer"))
    stops = ("</answer>", "\n\nQuestion:", "\u7b54\u6848")
    pieces = tokenizer.pieces(stops)
    table = make_stops(stops, pieces)
    for text in (
        "x</answer>\n\n",
        "so\n\n\nQuestion: why",
        "\u6240\u4ee5\u7b54\u6848\u662f",
        "</answer >",
        "x",
    ):
        ids = tokenizer.encode(text)
        assert b"".join(pieces[i] for i in ids).decode() == text
        state, found = 0, None
        for n, i in enumerate(ids):
            state = table.next_SC[min(state, len(table.next_SC) - 1), table.class_V[i]]
            found = n if found is None and state == len(table.next_SC) else found
        assert found == end(stops, pieces, ids)


def test_a_tokenizer_whose_tokens_depend_on_each_other_is_refused():
    tokenizer = load_tokenizer(ROOT / "models" / "gym")
    tokenizer.inner.backend_tokenizer.decoder = Metaspace()
    with pytest.raises(UserError, match="rollout.stop needs a tokenizer whose decoder .* is Metaspace"):
        tokenizer.pieces()
