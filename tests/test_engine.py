"""The engine's bookkeeping: no slot, queue, page, batch or device changes what a sequence says."""

import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rosd_jax.models.qwen3 import Qwen3Config, hidden_states, init_params, logits
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.rollout import decode_loop, prefill, scheduler
from rosd_jax.rollout import engine as engines
from rosd_jax.rollout.batching import LEAST_TOKENS, Batch, Request, pack, prompt_pages
from rosd_jax.rollout.decode_loop import DecodeSpec
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits, own_pages, table_pages
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.rollout.scheduler import Sequences, Start
from rosd_jax.rollout.slots import Slots
from support import nightly_but

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
SAMPLING = Sampling(temperature=0.8, stop_ids=(77,))
LIMITS = Limits(max_new=NEW, max_prompt=9, page_length=PAGE)


def requests(limit=LIMIT):
    prompts = [PROMPT[n, : PROMPT_LEN[n]].tolist() for n in PROMPT_OF]
    return [Request(*given) for given in zip(prompts, UID.tolist(), limit.tolist(), strict=True)]


def generate(mesh=None, *, rows=range(N), params=PARAMS, limit=LIMIT, sampling=SAMPLING, **limits):
    engine = Engine(MODEL, mesh, replace(LIMITS, **limits), sampling)
    asked = requests(limit)
    return engine.generate(params, [asked[row] for row in rows], KEY)


def batch():
    """All requests as one call."""
    return pack(requests(), LIMITS, 1)[0].batch


@pytest.fixture(scope="module")
def alone():
    """Every sequence decoded together with all others, with pages for all."""
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


@pytest.mark.parametrize("slots", nightly_but([4, 8, 12], keep=[0]))
def test_slots_do_not_change_tokens(alone, slots):
    got = generate(slots=slots)
    assert_same(got, alone)
    assert got.stats.steps > alone.stats.steps and got.stats.busy == alone.stats.busy
    assert got.stats.idle_share < alone.stats.idle_share


def test_the_order_of_the_queue_does_not_change_tokens(alone):
    order = np.random.default_rng(1).permutation(N)
    assert_same(generate(rows=order, slots=4), alone, order)


@pytest.mark.parametrize("slots", nightly_but([8, None], keep=[0]))
def test_where_pages_are_scarce_sequences_are_preempted_and_say_the_same_again(alone, slots):
    pages = own_pages(PAGE, NEW) + 3
    got = generate(slots=slots, response_pages=pages)
    assert got.stats.preempted > 0 and got.stats.busy > alone.stats.busy
    assert_same(got, alone)
    with pytest.raises(ValueError, match=f"response_pages is 5; one sequence alone may need {pages - 3}"):
        generate(response_pages=5)


def test_attention_of_another_platform_is_refused_before_anything_is_compiled():
    engine = Engine(MODEL, None, LIMITS, SAMPLING, attention="pallas_tpu")
    words = "attention is 'pallas_tpu', a kernel for tpu, and the devices are cpu; pass None"
    with pytest.raises(ValueError, match=words):
        engine.generate(PARAMS, requests(), KEY)


@pytest.mark.parametrize("page", nightly_but([3, 64], keep=[0]))
def test_the_page_length_does_not_change_tokens(alone, page):
    assert_same(generate(page_length=page, slots=8), alone)


def test_passes_of_several_widths_change_nothing(alone, monkeypatch):
    """Six prompts of 1 to 9 tokens, in passes that hold 9 or 10: three of one prompt, one, one of two."""
    monkeypatch.setattr(prefill, "NARROWEST", 2)
    monkeypatch.setattr(prefill, "PASS_TOKENS", 9)
    widths, step = set(), prefill.prefill_step

    def spy(*args):
        return widths.add(args[2].tokens_NT.shape) or step(*args)

    monkeypatch.setattr(prefill, "prefill_step", spy)
    assert_same(generate(slots=9), alone)  # a number that no other test has traced
    assert widths == {(1, 10), (1, 6), (2, 4), (4, 2)}


@pytest.mark.parametrize("seed", range(4))
def test_wanted_prompts_fill_whole_pages_of_their_own_and_no_more(seed):
    rng = np.random.default_rng(seed)
    length_N = rng.integers(1, 40, 12).astype(np.int32)
    prompt_of_B, limit_B = rng.integers(0, 12, 16), rng.integers(0, 2, 16) * (seed > 0)
    wanted_N = np.isin(np.arange(12), prompt_of_B[limit_B > 0])
    layout = jax.device_get(prefill.lay_out(jnp.asarray(length_N), jnp.asarray(wanted_N), PAGE))
    some = slice(0, wanted_N.sum())
    assert sorted(layout.order_N) == list(range(12)) and (np.diff(layout.length_N) <= 0).all()
    assert sorted(layout.order_N[some]) == np.flatnonzero(wanted_N).tolist()
    np.testing.assert_array_equal(layout.length_N[some], length_N[layout.order_N[some]])
    assert not layout.length_N[some.stop :].any()
    ends_N = layout.first_N + -(-layout.length_N // PAGE)
    np.testing.assert_array_equal(layout.first_N, [0, *ends_N[:-1]])

    def call(length_N, prompt_of_B, limit_B):
        return Batch(PROMPT, length_N, prompt_of_B, limit_B, limit_B)

    least = LEAST_TOKENS // PAGE
    assert prompt_pages(call(length_N, prompt_of_B, limit_B), PAGE, shards=1) == least >= ends_N[-1]
    many = call(np.full(12, PAGE * least - 1), np.arange(12), np.ones(12))
    assert prompt_pages(many, PAGE, shards=3) == 4 * least  # four on each shard


@pytest.mark.parametrize(
    "shape, slots", nightly_but([((8, 1, 1), 8), ((2, 2, 2), None), ((1, 4, 2), 8)], keep=[1])
)
def test_devices_do_not_change_tokens(alone, shape, slots):
    """150 ids: halves of 75 on two tensor devices."""
    others = replace(SAMPLING, temperature=0.0), replace(SAMPLING, top_p=0.7)
    mesh = make_mesh(*shape)
    params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
    assert_same(generate(mesh, params=params, slots=slots), alone)
    for sampling in others if shape == (2, 2, 2) else ():
        got = generate(mesh, params=params, slots=slots, sampling=sampling)
        assert_same(got, generate(sampling=sampling))


@pytest.mark.parametrize("shape, rows, long", nightly_but([(None, N, 4), ((2, 2, 2), N // 4, 2)], keep=[1]))
def test_compaction_changes_nothing_but_the_slots(monkeypatch, shape, rows, long):
    """Every sixth row goes on after the third step: four of 24, or one on each of four shards."""
    monkeypatch.setattr(decode_loop, "FEWEST", 2)
    mesh, limit = shape and make_mesh(*shape), np.where(np.arange(N) % 6, 3, NEW).astype(np.int32)
    options = dict(limit=limit, sampling=replace(SAMPLING, stop_ids=()))
    whole = generate(mesh, **options)
    monkeypatch.setattr(engines, "LONG", NEW)
    got = generate(mesh, **options)
    assert_same(got, whole)
    assert (whole.stats.slots == rows * NEW).all()
    assert (got.stats.slots == rows * 3 + long * (NEW - 3)).all()


@pytest.mark.nightly
def test_compaction_waits_for_the_queue_and_for_the_preempted(alone, monkeypatch):
    """Eight slots for 24 rows, and fewer pages than the eight come to need."""
    monkeypatch.setattr(decode_loop, "FEWEST", 1)
    monkeypatch.setattr(engines, "LONG", NEW)
    got = generate(slots=8, response_pages=own_pages(PAGE, NEW) + 1)
    assert_same(got, alone)
    assert got.stats.preempted.sum() > 0 and got.stats.slots < 8 * got.stats.steps


def test_numbers_of_slots_halve():
    assert [decode_loop.halvings(n) for n in (64, 24, 9, 8, 3)] == [[32, 16, 8], [16, 8], [8], [], []]
    assert [decode_loop.slots_for(n) for n in (0, 1, 8, 9, 16, 17)] == [8, 8, 8, 16, 16, 32]


def test_a_short_run_takes_slots_for_those_that_wait(alone, monkeypatch):
    """Of 24 rows the first 10, 5 and 3 are asked for."""
    counts, compact = [], Slots.compact

    def spy(slots, count, sequences):
        return counts.append(count) or compact(slots, count, sequences)

    monkeypatch.setattr(Slots, "compact", spy)
    engine = Engine(MODEL, None, LIMITS, SAMPLING)
    for asked in (10, 5, 3):
        limit = np.where(np.arange(N) < asked, LIMIT, 0).astype(np.int32)
        got = engine.generate(PARAMS, requests(limit), KEY)
        assert got.stats.slots == decode_loop.slots_for(asked) * got.stats.steps
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
    z = teacher_forced(alone) / SAMPLING.temperature
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    want = np.take_along_axis(logp, alone.tokens_BR[..., None], axis=-1)[..., 0]
    inside = np.arange(NEW) < alone.length_B[:, None]
    for rollout in (alone, generate(slots=4, response_pages=9)):
        np.testing.assert_allclose(rollout.logp_BR, np.where(inside, want, 0), atol=2e-6, rtol=0)


def test_greedy_at_the_ends_of_pages_equals_the_argmax_of_full_forwards():
    rollout = generate(sampling=Sampling(0.0), slots=8, limit=np.full(N, NEW, np.int32))
    np.testing.assert_array_equal(rollout.tokens_BR, teacher_forced(rollout).argmax(-1))


def test_where_no_row_may_have_a_token_nothing_is_decoded():
    got = generate(limit=np.zeros(N, np.int32))
    assert not got.length_B.any() and not got.finished_B.any() and got.stats.steps == 0


def test_a_sampled_padding_id_is_a_token_like_others(alone):
    """Id 0, with which rows are filled up, is sampled too: it neither ends a row nor drops out of it."""
    inside = np.arange(NEW) < alone.length_B[:, None] - 1
    padded = (alone.tokens_BR == 0) & inside
    assert padded.any() and (alone.logp_BR[padded] < 0).all()


def machine(limit, slots, pages):
    """The bookkeeping without a model: states of every step, with token = row and no stop."""
    prompt = RNG.integers(1, 10, len(limit)).astype(np.int32)
    first = np.arange(len(limit), dtype=np.int32) * 3
    start = np.stack(Start(first, prompt, first, limit), axis=1)
    sequences = Sequences(jnp.asarray(start), jnp.zeros((len(limit), NEW), jnp.float32))
    prompt_pages = 3 * len(limit)
    cache = jnp.zeros((prompt_pages + pages, PAGE, 2, 1))
    empty = Slots.empty(slots, table_pages(PAGE, 9, NEW), len(limit))
    free = prompt_pages + jnp.arange(pages, dtype=jnp.int32)
    state = scheduler.initial(cache, sequences, empty, free)
    begin = jax.jit(lambda s: scheduler.reserve(scheduler.admit(s, sequences, 1)))

    def row(s):
        return s.slots.columns.sequence

    end = jax.jit(lambda s: scheduler.release(*scheduler.record(s, row(s), row(s).astype(jnp.float32), ())))
    while state.head < state.tail or scheduler.live(state).any():
        state = begin(state)
        yield "decoding", state
        state = end(state)
        yield "recorded", state


def check_pages(state, prompt_pages, pages):
    """Every page behind the prompts' is free or owned once."""
    live, slot = np.asarray(scheduler.live(state)), jax.device_get(state.slots.columns)
    tables = np.asarray(state.slots.table_SM)
    owned = [tables[s][slot.shared[s] :][: slot.own[s]] for s in np.flatnonzero(live)]
    found = np.concatenate([np.asarray(state.free_F)[: state.free], *owned])
    np.testing.assert_array_equal(np.sort(found), np.arange(prompt_pages, prompt_pages + pages))


@pytest.mark.parametrize("seed", nightly_but(range(6), keep=[0, 2]))
def test_pages_are_neither_lost_nor_shared_and_every_sequence_ends_once(seed):
    rng = np.random.default_rng(seed)
    n, slots = int(rng.integers(1, 14)), int(rng.integers(1, 7))
    kinds = [rng.integers(0, NEW + 1, n), np.ones(n), np.full(n, NEW), np.full(n, 5)]
    limit = kinds[seed % 4].astype(np.int32)
    pages = own_pages(PAGE, NEW) + int(rng.integers(0, 6))
    ended, before = [], set()
    for stage, state in machine(limit, slots, pages):
        check_pages(state, 3 * n, pages)
        running = {int(row) for row in state.slots.columns.sequence if row < n}
        if stage == "recorded":
            ended += before - running
        before = running
        if stage == "decoding":
            at, count = np.asarray(scheduler.position(state)), np.asarray(state.slots.columns.pages)
            assert (at[at >= 0] // PAGE < count[at >= 0]).all()
    np.testing.assert_array_equal(state.out.length_B, limit)
    written = np.arange(NEW) < limit[:, None]
    np.testing.assert_array_equal(state.out.tokens_BR, np.where(written, np.arange(n)[:, None], 0))
    assert sorted(ended) == np.flatnonzero(limit).tolist()
    assert state.free == pages and state.stats.busy >= limit.sum()
    assert state.stats.preempted > 0 or state.stats.busy == limit.sum()


def test_where_all_are_admitted_each_has_all_its_pages_and_shares_none():
    limit = np.array([NEW, 0, 3, NEW], np.int32)
    prompt_len, first = jnp.array([1, 4, 5, 9]), jnp.array([0, 1, 2, 4])
    most, width, prompt_pages = own_pages(PAGE, NEW), table_pages(PAGE, 9, NEW), 7
    start = Start(prompt_len, prompt_len, first, jnp.asarray(limit))
    sequences = Sequences(jnp.stack(start, axis=1), jnp.zeros((4, NEW)))
    X = prompt_pages + 4 * most
    cache = jnp.broadcast_to(jnp.arange(2.0 * X)[:, None, None, None], (2 * X, PAGE, 2, 1))
    free = jnp.arange(prompt_pages, X, dtype=jnp.int32)
    state = scheduler.initial(cache, sequences, Slots.empty(4, width, 4), free)
    state = jax.jit(lambda s: scheduler.admit_all(s, start, 2))(state)
    np.testing.assert_array_equal(scheduler.live(state), limit > 0)
    owned, prompt_len, first = set(), np.asarray(prompt_len), np.asarray(first)
    cache = np.asarray(state.cache_XPWE)
    for s, table in enumerate(np.asarray(state.slots.table_SM)):
        shared = (prompt_len[s] - 1) // PAGE
        last = (prompt_len[s] + max(limit[s], 1) - 2) // PAGE  # of its newest token's positions
        np.testing.assert_array_equal(table[:shared], first[s] + np.arange(shared))
        own = set(table[shared : last + 1].tolist())
        assert len(own) == last + 1 - shared and min(own) >= prompt_pages and not own & owned
        assert table.max() < X
        owned |= own
        for layer in (0, X):  # what prompt and response share was copied
            assert cache[layer + table[shared], 0, 0, 0] == layer + first[s] + shared


def compiled_loop(slots, max_new=2000):
    limits = replace(LIMITS, max_new=max_new, slots=slots)
    spec = DecodeSpec(MODEL, None, limits, SAMPLING, prompt_pages=18, compact=True)
    begin = partial(decode_loop.begin, spec=spec)
    given = jax.eval_shape(begin, PARAMS, batch(), KEY)
    decode = jax.jit(partial(decode_loop.decode, spec=spec), donate_argnums=2)
    return given[2], decode.lower(*given).compile()


@pytest.mark.optimized
@pytest.mark.parametrize(
    "slots, max_new, share",
    # Short: all of a layer is read.
    nightly_but([(8, 2000, 0.15), (None, 2000, 0.15), (8, 200, 0.75), (None, 200, 0.75)], keep=[0]),
)
@pytest.mark.filterwarnings("ignore:Some donated buffers")  # the slots, of which fewer come back
def test_the_cache_is_written_in_place(slots, max_new, share):
    state, compiled = compiled_loop(slots, max_new=max_new)
    X, page, W, E = state.cache_XPWE.shape[1:]
    big = [
        m
        for m in re.findall(r"= f32\[([\d,]+)\]\S* copy\(", compiled.as_text())
        if np.prod([int(n) for n in m.split(",")]) >= X * page * W * E
    ]
    assert big == []
    memory, size = compiled.memory_analysis(), X * page * W * E * 4
    assert memory.alias_size_in_bytes >= size
    assert memory.temp_size_in_bytes <= share * size


def test_weights_are_cast_and_joined_once_a_call_not_once_a_step():
    """In bfloat16 the loop's weights are arguments of the compute type, and it makes no others of them."""
    spec = DecodeSpec(MODEL.replace(dtype="bfloat16"), None, LIMITS, SAMPLING, prompt_pages=18)
    with jax.numpy_dtype_promotion("standard"):
        begin = partial(decode_loop.begin, spec=spec)
        weights, sequences, state = jax.eval_shape(begin, PARAMS, batch(), KEY)
        decode = partial(decode_loop.decode, spec=spec)
        text = str(jax.make_jaxpr(decode)(weights, sequences, state))
    assert {x.dtype for x in jax.tree.leaves(weights) if x.ndim > 2 and x.shape[1] > 8} == {
        jnp.dtype("bfloat16")
    }
    assert state.cache_XPWE.dtype == jnp.bfloat16
    shapes = {x.shape[i:] for x in jax.tree.leaves(weights) if x.dtype == jnp.bfloat16 for i in (0, 1)}
    made = re.findall(r":\w+\[([\d,]+)\] = (?:convert_element_type|concatenate)", text)
    assert made and not {tuple(map(int, dims.split(","))) for dims in made} & shapes


def test_generate_is_pure_and_runs_inside_another_jit(alone):
    fixed = partial(decode_loop.generate, spec=DecodeSpec(MODEL, None, LIMITS, SAMPLING))
    twice = jax.jit(lambda *args: (fixed(*args), fixed(*args)))
    first, second = twice(PARAMS, batch(), KEY)
    assert_same(jax.device_get(first), alone)
    assert_same(jax.device_get(second), alone)
