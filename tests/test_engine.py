"""The engine's bookkeeping: no slot, queue, page, batch or device changes what a sequence says."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosd_jax.models import decoder
from rosd_jax.models.qwen3 import Qwen3Config, hidden_states, init_params, logits
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.rollout import loop, pages, prompts
from rosd_jax.rollout.loop import Decoding, make_generate, settings

MODEL = Qwen3Config(
    vocab_size=150,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    num_tokens=141,
)
NEW, PAGE, N = 20, 4, 24
KEY = jax.random.key(5)
PARAMS = jax.tree.map(lambda x: x * 4 if x.ndim > 2 else x, init_params(MODEL, jax.random.key(0)))
PARAMS = PARAMS | {name: PARAMS[name] * 8 for name in ("embed", "head")}
RNG = np.random.default_rng(0)
PROMPT_LEN = np.array([1, 4, 5, 7, 8, 9], np.int32)  # around the ends of pages
PROMPT = RNG.integers(0, 141, (6, 9)).astype(np.int32)
PROMPT_OF = np.repeat(np.arange(6, dtype=np.int32), 4)
UID = RNG.permutation(1000)[:N].astype(np.int32)
LIMIT = RNG.integers(1, NEW + 1, N).astype(np.int32)
LIMIT[[3, 9, 11, 13, 17]] = 0, NEW, NEW, NEW, NEW
STOP = (77,)
OPTIONS = dict(max_new=NEW, temperature=0.8, top_p=1.0, stop_ids=STOP, page=PAGE)


def generate(mesh=None, *, rows=slice(None), params=PARAMS, limit=LIMIT, **options):
    fn = make_generate(settings(MODEL, mesh, **OPTIONS | options))
    rollout = fn(params, PROMPT, PROMPT_LEN, PROMPT_OF[rows], UID[rows], limit[rows], KEY)
    return jax.tree.map(np.asarray, rollout)


@pytest.fixture(scope="module")
def alone():
    """Every sequence decoded beside all others, with pages for all."""
    return generate()


def assert_same(got, want, rows=slice(None)):
    np.testing.assert_array_equal(got.tokens_BR, want.tokens_BR[rows])
    np.testing.assert_array_equal(got.length_B, want.length_B[rows])
    np.testing.assert_array_equal(got.finished_B, want.finished_B[rows])
    np.testing.assert_allclose(got.logp_BR, want.logp_BR[rows], atol=5e-6, rtol=0)


def test_the_sequences_are_of_every_kind(alone):
    assert alone.length_B.min() == 0 and alone.length_B.max() == NEW
    assert alone.finished_B.any() and not alone.finished_B.all()
    assert len({tuple(row) for row in alone.tokens_BR}) > N - 4


@pytest.mark.parametrize("slots", [4, 8, 12])
def test_slots_do_not_change_tokens(alone, slots):
    got = generate(slots=slots)
    assert_same(got, alone)
    assert got.stats.steps > alone.stats.steps and got.stats.busy == alone.stats.busy
    assert got.stats.idle_share < alone.stats.idle_share


def test_the_order_of_the_queue_does_not_change_tokens(alone):
    order = np.random.default_rng(1).permutation(N)
    assert_same(generate(rows=order, slots=4), alone, order)


@pytest.mark.parametrize("slots", [8, None])
def test_scarce_pages_put_sequences_back_and_they_say_the_same_again(alone, slots):
    pool = pages.most_own(PAGE, NEW) + 3
    got = generate(slots=slots, pool=pool)
    assert got.stats.preempted > 0 and got.stats.busy > alone.stats.busy
    assert_same(got, alone)
    with pytest.raises(ValueError, match=f"pool is 5 pages; one sequence alone may need {pool - 3}"):
        generate(pool=5)


@pytest.mark.parametrize("page", [3, 64])
def test_the_page_length_does_not_change_tokens(alone, page):
    assert_same(generate(page=page, slots=8), alone)


def test_passes_of_several_widths_change_nothing(alone, monkeypatch):
    """Six prompts of 1 to 9 tokens, in passes that hold 9 or 10: three of one prompt, one, one of two."""
    monkeypatch.setattr(prompts, "NARROWEST", 2)
    monkeypatch.setattr(prompts, "PASS_TOKENS", 9)
    widths, prefill = set(), decoder.prefill
    spy = lambda *args: widths.add(args[2].shape) or prefill(*args)
    monkeypatch.setattr(decoder, "prefill", spy)
    assert_same(generate(slots=9), alone)  # a number that no other test has traced
    assert widths == {(1, 10), (1, 6), (2, 4), (4, 2)}


@pytest.mark.parametrize("seed", range(4))
def test_wanted_prompts_fill_whole_pages_of_their_own_and_no_more(seed):
    rng = np.random.default_rng(seed)
    length_N = rng.integers(1, 40, 12).astype(np.int32)
    prompt_of_B, limit_B = rng.integers(0, 12, 16), rng.integers(0, 2, 16) * (seed > 0)
    wanted_N = np.isin(np.arange(12), prompt_of_B[limit_B > 0])
    layout = jax.device_get(prompts.lay_out(jnp.asarray(length_N), jnp.asarray(wanted_N), PAGE))
    some = slice(0, wanted_N.sum())
    assert sorted(layout.order_N) == list(range(12)) and (np.diff(layout.length_N) <= 0).all()
    assert sorted(layout.order_N[some]) == np.flatnonzero(wanted_N).tolist()
    np.testing.assert_array_equal(layout.length_N[some], length_N[layout.order_N[some]])
    assert not layout.length_N[some.stop :].any()
    ends_N = layout.first_N + -(-layout.length_N // PAGE)
    np.testing.assert_array_equal(layout.first_N, [0, *ends_N[:-1]])
    room = prompts.room(length_N, prompt_of_B, limit_B, PAGE, shards=1)
    least = prompts.LEAST_TOKENS // PAGE
    assert room == least >= ends_N[-1]
    many = np.full(12, PAGE * least - 1), np.arange(12), np.ones(12)
    assert prompts.room(*many, PAGE, shards=3) == 4 * least  # four on each shard


@pytest.mark.parametrize("shape, slots", [((8, 1, 1), 8), ((2, 2, 2), None), ((1, 4, 2), 8)])
def test_devices_do_not_change_tokens(alone, shape, slots):
    """150 ids: halves of 75 on two tensor devices."""
    kinds = ({}, {"temperature": 0.0}, {"top_p": 0.7}) if shape == (2, 2, 2) else ({},)
    mesh = make_mesh(*shape)
    params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
    for options in kinds:
        want = generate(**options) if options else alone
        assert_same(generate(mesh, params=params, slots=slots, **options), want)


@pytest.mark.parametrize("shape, rows, long", [(None, N, 4), ((2, 2, 2), N // 4, 2)])
def test_compaction_changes_nothing_but_the_slots(monkeypatch, shape, rows, long):
    """Every sixth row goes on after the third step: four of 24, or one on each of four shards."""
    monkeypatch.setattr(loop, "FEWEST", 2)
    monkeypatch.setattr(loop, "LONG", NEW)
    mesh, limit = shape and make_mesh(*shape), np.where(np.arange(N) % 6, 3, NEW).astype(np.int32)
    options = dict(limit=limit, stop_ids=())
    got, whole = generate(mesh, **options), generate(mesh, **options, compact=False)
    assert_same(got, whole)
    assert (whole.stats.slots == rows * NEW).all()
    assert (got.stats.slots == rows * 3 + long * (NEW - 3)).all()


def test_compaction_waits_for_the_queue_and_for_whom_pages_put_back(alone, monkeypatch):
    """Eight slots for 24 rows, and fewer pages than the eight come to need."""
    monkeypatch.setattr(loop, "FEWEST", 1)
    monkeypatch.setattr(loop, "LONG", NEW)
    got = generate(slots=8, pool=pages.most_own(PAGE, NEW) + 1)
    assert_same(got, alone)
    assert got.stats.preempted.sum() > 0 and got.stats.slots < 8 * got.stats.steps


def test_numbers_of_slots_halve():
    assert [loop._counts(n) for n in (64, 24, 9, 8, 3)] == [[32, 16, 8], [16, 8], [8], [], []]
    assert [loop.enough(n) for n in (0, 1, 8, 9, 16, 17)] == [8, 8, 8, 16, 16, 32]


def test_a_short_run_takes_slots_for_those_that_wait(alone, monkeypatch):
    """Of 24 rows the first 10, 5 and 3 are asked for."""
    counts, compact = [], pages.compact
    spy = lambda slots_SC, sequences, count: counts.append(count) or compact(slots_SC, sequences, count)
    monkeypatch.setattr(pages, "compact", spy)
    fn = make_generate(settings(MODEL, None, **OPTIONS))
    for asked in (10, 5, 3):
        limit = np.where(np.arange(N) < asked, LIMIT, 0).astype(np.int32)
        got = jax.device_get(fn(PARAMS, PROMPT, PROMPT_LEN, PROMPT_OF, UID, limit, KEY))
        assert got.stats.slots == loop.enough(asked) * got.stats.steps
        np.testing.assert_array_equal(got.tokens_BR, np.where(limit[:, None] > 0, alone.tokens_BR, 0))
    assert counts == [16, 8]


def teacher_forced(rollout):
    tokens = np.zeros((N, PROMPT.shape[1] + NEW), np.int32)
    start = PROMPT_LEN[PROMPT_OF]
    for b, n in enumerate(PROMPT_OF):
        text = [*PROMPT[n, : start[b]], *rollout.tokens_BR[b, : rollout.length_B[b]]]
        tokens[b, : len(text)] = text
    z = jax.jit(lambda t: logits(PARAMS, MODEL, hidden_states(PARAMS, MODEL, t)))(tokens)
    at = np.minimum(start[:, None] - 1 + np.arange(NEW), tokens.shape[1] - 1)
    return np.take_along_axis(np.asarray(z, np.float64), at[..., None], axis=1)


def test_log_probs_equal_those_of_a_full_forward(alone):
    z = teacher_forced(alone) / OPTIONS["temperature"]
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    want = np.take_along_axis(logp, alone.tokens_BR[..., None], axis=-1)[..., 0]
    inside = np.arange(NEW) < alone.length_B[:, None]
    for rollout in (alone, generate(slots=4, pool=9)):
        np.testing.assert_allclose(rollout.logp_BR, np.where(inside, want, 0), atol=2e-6, rtol=0)


def test_greedy_at_the_ends_of_pages_equals_the_argmax_of_full_forwards():
    rollout = generate(temperature=0.0, slots=8, stop_ids=(), limit=np.full(N, NEW, np.int32))
    np.testing.assert_array_equal(rollout.tokens_BR, teacher_forced(rollout).argmax(-1))


def test_where_no_row_may_have_a_token_nothing_is_decoded():
    got = generate(limit=np.zeros(N, np.int32))
    assert not got.length_B.any() and not got.finished_B.any() and got.stats.steps == 0


def test_a_sampled_padding_id_is_a_token_like_others(alone):
    """Id 0, with which rows are filled up, is sampled too: it neither ends a row nor drops out of it."""
    inside = np.arange(NEW) < alone.length_B[:, None] - 1
    padded = (alone.tokens_BR == 0) & inside
    assert padded.any() and (alone.logp_BR[padded] < 0).all()


def machine(limit, slots, pool):
    """The bookkeeping without a model: states of every step, with token = row and no stop."""
    prompt = RNG.integers(1, 10, len(limit)).astype(np.int32)
    first = np.arange(len(limit), dtype=np.int32) * 3
    rows = pages.Rows(np.stack([first, prompt, first, limit], 1), np.zeros((len(limit), NEW), np.float32))
    rows = jax.tree.map(jnp.asarray, rows)
    pinned = 3 * len(limit)
    store = jnp.zeros((pinned + pool, PAGE, 2, 1))
    state = pages.empty(store, rows, slots, pinned, pool, pages.table_width(PAGE, 9, NEW))
    begin = jax.jit(lambda s: pages.reserve(pages.refill(s, rows, 1)))
    row = lambda s: s.slots_SC[:, pages.ROW]
    end = jax.jit(lambda s: pages.leave(*pages.record(s, row(s), row(s).astype(jnp.float32), ())))
    while state.head < state.tail or pages.live(state).any():
        state = begin(state)
        yield "decoding", state
        state = end(state)
        yield "recorded", state


def check_pages(state, pinned, pool):
    """Every page behind the prompts' is free or owned once."""
    slots_SC = np.asarray(state.slots_SC)[np.asarray(pages.live(state))]
    owned = [slot[pages.TABLE :][slot[pages.SHARED] :][: slot[pages.OWN]] for slot in slots_SC]
    held = np.concatenate([np.asarray(state.free_F)[: state.top], *owned])
    np.testing.assert_array_equal(np.sort(held), np.arange(pinned, pinned + pool))


@pytest.mark.parametrize("seed", range(6))
def test_pages_are_neither_lost_nor_shared_and_every_sequence_ends_once(seed):
    rng = np.random.default_rng(seed)
    n, slots = int(rng.integers(1, 14)), int(rng.integers(1, 7))
    kinds = [rng.integers(0, NEW + 1, n), np.ones(n), np.full(n, NEW), np.full(n, 5)]
    limit = kinds[seed % 4].astype(np.int32)
    pool = pages.most_own(PAGE, NEW) + int(rng.integers(0, 6))
    ended, before = [], set()
    for stage, state in machine(limit, slots, pool):
        check_pages(state, 3 * n, pool)
        held = {int(row) for row in state.slots_SC[:, pages.ROW] if row < n}
        if stage == "recorded":
            ended += before - held
        before = held
        if stage == "decoding":
            at, slots_SC = np.asarray(pages.position(state)), np.asarray(state.slots_SC)
            own = slots_SC[:, pages.SHARED] + slots_SC[:, pages.OWN]
            assert (at[at >= 0] // PAGE < own[at >= 0]).all()
    np.testing.assert_array_equal(state.out.length_B, limit)
    written = np.arange(NEW) < limit[:, None]
    np.testing.assert_array_equal(state.out.tokens_BR, np.where(written, np.arange(n)[:, None], 0))
    assert sorted(ended) == np.flatnonzero(limit).tolist()
    assert state.top == pool and state.stats.busy >= limit.sum()
    assert state.stats.preempted > 0 or state.stats.busy == limit.sum()


def test_seated_sequences_have_all_their_pages_and_no_page_is_two_peoples():
    limit = np.array([NEW, 0, 3, NEW], np.int32)
    start, first = jnp.array([1, 4, 5, 9]), jnp.array([0, 1, 2, 4])
    most, width, pinned = pages.most_own(PAGE, NEW), pages.table_width(PAGE, 9, NEW), 7
    rows = pages.Rows(jnp.stack([start, start, first, limit], 1), jnp.zeros((4, NEW)))
    X = pinned + 4 * most
    store = jnp.broadcast_to(jnp.arange(2.0 * X)[:, None, None, None], (2 * X, PAGE, 2, 1))
    state = pages.empty(store, rows, 4, pinned, 4 * most, width)
    state = jax.jit(lambda s: pages.seat(s, tuple(rows.given_N4.T), 2))(state)
    np.testing.assert_array_equal(pages.live(state), limit > 0)
    owned, start, first, store = set(), np.asarray(start), np.asarray(first), np.asarray(state.store)
    for s, slot in enumerate(np.asarray(state.slots_SC)):
        shared = (start[s] - 1) // PAGE
        last = (start[s] + max(limit[s], 1) - 2) // PAGE  # of its newest token's positions
        table = slot[pages.TABLE :]
        np.testing.assert_array_equal(table[:shared], first[s] + np.arange(shared))
        own = set(table[shared : last + 1].tolist())
        assert len(own) == last + 1 - shared and min(own) >= pinned and not own & owned
        assert table.max() < X
        owned |= own
        for layer in (0, X):  # what prompt and response share was copied
            assert store[layer + table[shared], 0, 0, 0] == layer + first[s] + shared


def compiled_loop(slots, stop_ids=STOP, max_new=2000):
    options = {name: OPTIONS[name] for name in ("temperature", "top_p", "page")} | {"max_new": max_new}
    how = Decoding(MODEL, None, stop_ids=stop_ids, slots=slots, prompt_pages=18, compact=True, **options)
    args = PARAMS, PROMPT, PROMPT_LEN, PROMPT_OF, UID, LIMIT, KEY
    state = jax.eval_shape(partial(loop.begin, how=how), *args)
    decode = jax.jit(partial(loop.decode, how=how), donate_argnums=2)
    return state[2], decode.lower(*state).compile()


@pytest.mark.optimized
@pytest.mark.parametrize(
    "slots, max_new, share",
    [(8, 2000, 0.15), (None, 2000, 0.15), (8, 200, 0.75), (None, 200, 0.75)],  # short: all of a layer is read
)
@pytest.mark.filterwarnings("ignore:Some donated buffers")  # the slots, of which fewer come back
def test_the_store_is_written_in_place(slots, max_new, share):
    state, compiled = compiled_loop(slots, max_new=max_new)
    X, page, W, E = state.store.shape[1:]
    big = [m for m in re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
           if np.prod([int(n) for n in m.split(",")]) >= X * page * W * E]  # fmt: skip
    assert big == []
    memory, size = compiled.memory_analysis(), X * page * W * E * 4
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes <= share * size


def test_weights_are_cast_and_joined_once_a_call_not_once_a_step():
    """In bfloat16 the loop's weights are arguments of the compute type, and it makes no others of them."""
    how = Decoding(MODEL.replace(dtype="bfloat16"), None, NEW, 1.0, 1.0, STOP, None, PAGE, prompt_pages=18)
    args = PARAMS, PROMPT, PROMPT_LEN, PROMPT_OF, UID, LIMIT, KEY
    with jax.numpy_dtype_promotion("standard"):
        weights, rows, state = jax.eval_shape(partial(loop.begin, how=how), *args)
        text = str(jax.make_jaxpr(partial(loop.decode, how=how))(weights, rows, state))
    assert {x.dtype for x in jax.tree.leaves(weights) if x.ndim > 2 and x.shape[1] > 8} == {
        jnp.dtype("bfloat16")
    }
    assert state.store.dtype == jnp.bfloat16
    shapes = {x.shape[i:] for x in jax.tree.leaves(weights) if x.dtype == jnp.bfloat16 for i in (0, 1)}
    made = re.findall(r":\w+\[([\d,]+)\] = (?:convert_element_type|concatenate)", text)
    assert made and not {tuple(map(int, dims.split(","))) for dims in made} & shapes


def test_generate_is_pure_and_runs_inside_another_jit(alone):
    fixed = partial(loop.generate, how=settings(MODEL, None, **OPTIONS, compact=False))
    twice = jax.jit(lambda *args: (fixed(*args), fixed(*args)))
    first, second = twice(PARAMS, PROMPT, PROMPT_LEN, PROMPT_OF, UID, LIMIT, KEY)
    assert_same(jax.device_get(first), alone)
    assert_same(jax.device_get(second), alone)
