"""The decoding loop against full forwards, across batches and meshes, and against transformers."""

import jax
import numpy as np
import pytest

from rosd_jax.models.qwen3 import Qwen3Config, hidden_states, init_params, logits
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.rollout import decode_loop, engine
from rosd_jax.rollout.batching import Request, pack
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
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
NEW, TEMPERATURE = 12, 0.7
ALL_IDS = tuple(range(MODEL.vocab_size))
KEY = jax.random.key(11)
_built = {}


def _params(model=MODEL, gain=4):
    """Weights larger than usual, for uneven distributions; at gain 16 greedy text hardly repeats.

    Float32 rounding grows with the gain: at 16, a full forward is 3e-6 off float64 by itself.
    """
    params = init_params(model, jax.random.key(0))

    def scale(path, x):
        name = jax.tree_util.keystr(path)
        return x if "scale" in name else x * (gain if "blocks" in name else 8)

    return jax.tree_util.tree_map_with_path(scale, params)


PARAMS = _params()
PROMPT_LEN = np.array([1, 5, 9], np.int32)
PROMPT = np.random.default_rng(0).integers(0, 141, (3, 9)).astype(np.int32)
PROMPT_OF = np.array([0, 0, 1, 1, 1, 2, 2, 0], np.int32)
UID = np.array([3, 14, 15, 92, 65, 35, 89, 79], np.int32)
LIMIT = np.full(8, NEW, np.int32)
SAMPLING = Sampling(TEMPERATURE)
ANY_ID_STOPS = Sampling(TEMPERATURE, stop_ids=ALL_IDS)


def _engine(mesh=None, *, model=MODEL, sampling=SAMPLING, max_new=NEW, page=None):
    """An engine, built once."""
    name = model, mesh, sampling, max_new, page
    if name not in _built:
        _built[name] = Engine(model, mesh, Limits(max_new, 9, page_length=page), sampling)
    return _built[name]


def _requests(prompt_of=PROMPT_OF, uid=UID, limit=LIMIT):
    prompts = [PROMPT[n, : PROMPT_LEN[n]].tolist() for n in prompt_of]
    return [Request(*given) for given in zip(prompts, uid.tolist(), limit.tolist(), strict=True)]


def _generate(mesh=None, *, params=PARAMS, prompt_of=PROMPT_OF, uid=UID, limit=LIMIT, **options):
    return _engine(mesh, **options).generate(params, _requests(prompt_of, uid, limit), KEY)


@jax.jit
def _full_logits(params, tokens_BT):
    return logits(params, MODEL, hidden_states(params, MODEL, tokens_BT))


def _sequences(rollout):
    """Prompt and response of each row without a gap, right-padded with a token that is not 0."""
    rows = np.full((8, PROMPT.shape[1] + NEW), 7, np.int32)
    for b, n in enumerate(PROMPT_OF):
        text = [*PROMPT[n, : PROMPT_LEN[n]], *rollout.tokens_BR[b, : rollout.length_B[b]]]
        rows[b, : len(text)] = text
    return rows


def _first_tokens(rollout, ids):
    """How long each row is when it ends with its first token of `ids`."""
    stop = np.isin(rollout.tokens_BR, ids)
    return np.where(stop.any(1), stop.argmax(1) + 1, NEW), stop.any(1)


def test_log_probs_equal_those_of_a_full_forward():
    rollout = _generate()
    z = np.asarray(_full_logits(PARAMS, _sequences(rollout)), np.float64) / TEMPERATURE
    logp = z - np.log(np.exp(z).sum(-1, keepdims=True))
    for b, start in enumerate(PROMPT_LEN[PROMPT_OF]):
        want = logp[b, start - 1 + np.arange(NEW), rollout.tokens_BR[b]]
        np.testing.assert_allclose(rollout.logp_BR[b], want, atol=2e-6, rtol=0)
    assert (rollout.length_B == NEW).all() and not rollout.finished_B.any()


def test_greedy_equals_the_stepwise_argmax_of_full_forwards():
    rollout = _generate(sampling=Sampling(0.0))
    z = np.asarray(_full_logits(PARAMS, _sequences(rollout)))
    for b, start in enumerate(PROMPT_LEN[PROMPT_OF]):
        want = z[b, start - 1 + np.arange(NEW)].argmax(-1)
        np.testing.assert_array_equal(rollout.tokens_BR[b], want)
    np.testing.assert_array_equal(rollout.tokens_BR[0], rollout.tokens_BR[7])


def test_a_row_keeps_its_tokens_in_any_order_and_any_batch():
    want = _generate()
    order = np.random.default_rng(1).permutation(8)
    shuffled = _generate(prompt_of=PROMPT_OF[order], uid=UID[order])
    np.testing.assert_array_equal(shuffled.tokens_BR, want.tokens_BR[order])
    few = _generate(prompt_of=np.array([1, 1], np.int32), uid=UID[[2, 6]], limit=LIMIT[:2])
    np.testing.assert_array_equal(few.tokens_BR[0], want.tokens_BR[2])
    assert (few.tokens_BR[1] != want.tokens_BR[6]).any()


def test_the_same_prompt_gets_different_responses_for_different_uids():
    rollout = _generate()
    assert len({tuple(row) for row in rollout.tokens_BR}) == 8


@pytest.fixture
def traces(monkeypatch):
    """Grows by one for each time that a decoding step is traced."""
    traced, step = [], decode_loop.decode_step
    monkeypatch.setattr(decode_loop, "decode_step", lambda *args: traced.append(1) or step(*args))
    return traced


@pytest.mark.parametrize("shape", nightly_but(zip([(8, 1, 1), (2, 4, 1), (2, 2, 2)]), keep=[2]))
def test_every_mesh_gives_the_tokens_of_one_device(shape, traces):
    """One to four rows a shard, and with them one to three of the prompts."""
    mesh, sampling = make_mesh(*shape), Sampling(TEMPERATURE, stop_ids=(140,))
    params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
    engine = Engine(MODEL, mesh, Limits(NEW, 9, prompts=4), sampling)
    engine.generate(params, _requests(uid=UID + 1, limit=LIMIT - 11), KEY)
    before = len(traces)
    got = engine.generate(params, _requests(), KEY)
    assert len(traces) == before > 0
    want = _generate(sampling=sampling)
    np.testing.assert_array_equal(got.tokens_BR, want.tokens_BR)
    np.testing.assert_array_equal(got.length_B, want.length_B)
    np.testing.assert_allclose(got.logp_BR, want.logp_BR, atol=5e-6, rtol=0)
    ((batch, _),) = pack(_requests(), engine.limits, engine.shards)
    on_devices = engine.call(params, batch, KEY)
    assert all(leaf.sharding.spec[0] == ("data", "fsdp") for leaf in jax.tree.leaves(on_devices))


def test_the_options_for_gpu_are_known_to_this_version_of_xla():
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x, compiler_options={"xla_gpu_no_such_option": True})(1)
    jax.jit(lambda x: x, compiler_options=engine.GPU_OPTIONS)(1)


def test_requests_that_the_shards_do_not_divide_are_filled_up():
    mesh, want = make_mesh(2, 2, 2), _generate()
    params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
    got = _generate(mesh, params=params, prompt_of=PROMPT_OF[:3], uid=UID[:3], limit=LIMIT[:3])
    np.testing.assert_array_equal(got.tokens_BR, want.tokens_BR[:3])


def test_a_row_ends_with_its_first_stop_token():
    free = _generate()
    stop_ids = (int(free.tokens_BR[0, 3]), int(free.tokens_BR[4, 6]))
    rollout = _generate(sampling=Sampling(TEMPERATURE, stop_ids=stop_ids))
    length, finished = _first_tokens(free, stop_ids)
    np.testing.assert_array_equal(rollout.length_B, length)
    np.testing.assert_array_equal(rollout.finished_B, finished)
    inside = np.arange(NEW) < length[:, None]
    np.testing.assert_array_equal(rollout.tokens_BR, np.where(inside, free.tokens_BR, 0))
    np.testing.assert_allclose(rollout.logp_BR, np.where(inside, free.logp_BR, 0), atol=2e-6)
    assert finished.any() and rollout.logp_BR[0, length[0] - 1] < 0


def test_all_rows_may_stop_at_the_first_token():
    rollout = _generate(sampling=ANY_ID_STOPS)
    assert (rollout.length_B == 1).all() and rollout.finished_B.all()
    np.testing.assert_array_equal(rollout.tokens_BR[:, 0], _generate().tokens_BR[:, 0])
    assert not rollout.tokens_BR[:, 1:].any() and not rollout.logp_BR[:, 1:].any()


def test_each_row_has_its_own_limit_and_zero_yields_nothing():
    free, limit = _generate(), np.array([0, 1, 2, 5, 0, NEW, 99, 3], np.int32)
    rollout = _generate(limit=limit)
    np.testing.assert_array_equal(rollout.length_B, np.minimum(limit, NEW))
    assert not rollout.finished_B.any()
    inside = np.arange(NEW) < limit[:, None]
    np.testing.assert_array_equal(rollout.tokens_BR, np.where(inside, free.tokens_BR, 0))
    assert not rollout.logp_BR[~inside].any()
    nothing = _generate(limit=np.zeros(8, np.int32), sampling=ANY_ID_STOPS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))


def test_a_stop_token_on_the_limit_counts_as_finished():
    rollout = _generate(limit=np.ones(8, np.int32), sampling=ANY_ID_STOPS)
    assert (rollout.length_B == 1).all() and rollout.finished_B.all()


def test_padded_ids_are_never_sampled_and_id_zero_is_an_ordinary_token():
    """The padding rows of the head are made the likeliest of all, id 0 the likeliest real one."""
    params = dict(PARAMS, head=PARAMS["head"].at[141:].mul(50.0).at[1:141].mul(0.0))
    for sampling in (SAMPLING, Sampling(0.0), Sampling(TEMPERATURE, 1e-6)):
        rollout = _generate(params=params, sampling=sampling)
        assert rollout.tokens_BR.max() < 141
        assert (rollout.length_B == NEW).all() and (rollout.logp_BR < 0).all()
    assert (_generate(params=params).tokens_BR == 0).any()


def test_top_p_keeps_to_the_likeliest_ids():
    rollout = _generate(sampling=Sampling(TEMPERATURE, 1e-6))
    np.testing.assert_array_equal(rollout.tokens_BR, _generate(sampling=Sampling(0.0)).tokens_BR)


def test_new_values_do_not_compile_again(traces):
    engine = Engine(MODEL, None, Limits(1, 9), Sampling(TEMPERATURE, stop_ids=(140,)))
    want = _generate().tokens_BR[:, :1]

    def call(uid, key):
        return engine.generate(PARAMS, _requests(uid=uid, limit=LIMIT // NEW), key)

    call(UID + 9, KEY)
    first = len(traces)
    for seed in range(2):
        call(UID + seed, jax.random.key(seed))
    np.testing.assert_array_equal(call(UID, KEY).tokens_BR, want)
    assert len(traces) == first > 0


@pytest.mark.parametrize("tied, page", [(False, 4), (True, 5), (False, 10)])
def test_greedy_equals_that_of_transformers(tmp_path, tied, page):
    """64 steps; prompts of 1, 5 and 9 tokens end before, at and behind the end of a page."""
    torch = pytest.importorskip("torch")
    from transformers import Qwen3ForCausalLM

    from rosd_jax.models.weights import save_pretrained

    model = MODEL.replace(tie_word_embeddings=tied, num_tokens=None)
    params = _params(model, gain=16)
    save_pretrained(tmp_path, params, model)
    peer = Qwen3ForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    stop_ids = (3,)
    ours = _generate(
        params=params,
        model=model,
        sampling=Sampling(0.0, stop_ids=stop_ids),
        page=page,
        max_new=64,
        limit=np.full(8, 64, np.int32),
    )
    for b, n in ((0, 0), (2, 1), (5, 2)):
        ids = torch.tensor(PROMPT[n : n + 1, : PROMPT_LEN[n]], dtype=torch.long)
        out = peer.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=64,
            eos_token_id=list(stop_ids),
            pad_token_id=149,
        )
        want = out[0, PROMPT_LEN[n] :].tolist()
        assert ours.tokens_BR[b, : ours.length_B[b]].tolist() == want
    assert ours.finished_B.any() and ours.length_B.max() > 1
