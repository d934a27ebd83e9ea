"""A long call in pieces: the tokens of one program, on any mesh, and a host that may stop in between."""

import jax
import numpy as np
import pytest

from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.rollout import engine as module
from rosd_jax.rollout.batching import Request, pack
from rosd_jax.rollout.decode_loop import generate
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.types import no_progress
from support import nightly_but

MODEL = Qwen3Config(150, 32, 48, 2, 4, 2, 8, tie_word_embeddings=True)
NEW, KEY = 40, jax.random.key(3)
LENGTHS = [40, 3, 17, 0, 40, 9, 25, 1, 12, 40, 30, 2, 8, 5, 40, 21, 7, 33, 16, 11, 4, 28, 19, 6]


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(module, "LONG", 8)
    monkeypatch.setattr(module, "PIECE", 7)


def requests():
    return [Request([1 + n // 4, 5, 9], n, length) for n, length in enumerate(LENGTHS)]


def make(shape=None, pages=None, check=module.no_check, progress=no_progress):
    mesh = None if shape is None else make_mesh(*shape)
    limits = Limits(NEW, 64, slots=16, response_pages=pages, rows=24, prompts=6)
    params = init_params(MODEL, jax.random.key(0))
    if mesh is not None:
        params = jax.device_put(params, param_shardings(params, mesh))
    sampling = Sampling(1.0, stop_ids=(140,))
    return Engine(MODEL, mesh, limits, sampling, before_call=check, progress=progress), params


@pytest.mark.parametrize("pages", nightly_but([None, 14], keep=[1]))
@pytest.mark.parametrize("shape", nightly_but(zip([None, (2, 2, 2), (1, 4, 2)]), keep=[0, 1]))
def test_pieces_have_the_tokens_of_one_program(shape, pages):
    engine, params = make(shape, pages)
    ((batch, _),) = pack(requests(), engine.limits, engine.shards)
    whole = jax.jit(generate, static_argnames="spec")
    want = jax.device_get(whole(params, batch, KEY, None, spec=engine.spec(batch)))
    got = jax.device_get(engine.call(params, batch, KEY))
    np.testing.assert_array_equal(got.tokens_BR, want.tokens_BR)
    np.testing.assert_array_equal(got.length_B, want.length_B)
    np.testing.assert_array_equal(got.finished_B, want.finished_B)
    np.testing.assert_allclose(got.logp_BR, want.logp_BR, atol=5e-6, rtol=0)
    assert got.length_B.sum() > 200
    if shape is None:  # on several shards, one may wait for another before it goes on in fewer slots
        for name in ("steps", "busy", "slots", "preempted", "read"):
            np.testing.assert_array_equal(getattr(got.stats, name), getattr(want.stats, name))


@pytest.mark.parametrize("shape", nightly_but(zip([None, (2, 2, 2)]), keep=[1]))
def test_the_host_is_asked_between_the_pieces_and_may_stop(shape):
    class Stop(Exception):
        pass

    asked = []

    def check(what):
        asked.append(what)
        if len(asked) == 4:
            raise Stop

    engine, params = make(shape, check=check)
    with pytest.raises(Stop):
        engine.generate(params, requests(), KEY)
    assert len(asked) == 4 and all(what.startswith("decode") for what in asked)
    again, params = make(shape)
    assert again.generate(params, requests(), KEY).length_B.sum() > 200


@pytest.mark.parametrize("shape", nightly_but(zip([None, (2, 2, 2)]), keep=[1]))
def test_the_host_is_told_how_many_responses_have_ended(shape):
    told = []
    engine, params = make(shape, progress=lambda done, total: told.append((done, total)))
    engine.generate(params, [*requests(), *requests()], KEY)
    done = [count for count, _ in told]
    assert {total for _, total in told} == {48} and done == sorted(done)
    assert done.count(24) >= 1 and done[0] == 0 and 8 <= len(set(done)) and done[-1] == 48


def test_a_second_call_compiles_nothing():
    engine, params = make()
    engine.generate(params, requests(), KEY)
    advance = engine.pieces.advance._cache_size()
    engine.generate(params, requests(), jax.random.key(4))
    assert engine.pieces.advance._cache_size() == advance > 0
