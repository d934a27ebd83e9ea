"""The decoding loop against full forwards, across batches and meshes, and against transformers."""

import jax
import numpy as np
import pytest

from rosd_jax.config import UserError
from rosd_jax.models.qwen3 import Qwen3Config, hidden_states, init_params, logits
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.rollout import loop
from rosd_jax.rollout.loop import make_generate, settings

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


def _generate(mesh=None, *, params=PARAMS, model=MODEL, prompt_of=PROMPT_OF, uid=UID, limit=LIMIT,
              prompt=PROMPT, prompt_len=PROMPT_LEN, **options):  # fmt: skip
    options = {"max_new": NEW, "temperature": TEMPERATURE, "top_p": 1.0, "stop_ids": ()} | options
    name = (model, mesh, *options.items())
    if name not in _built:
        _built[name] = make_generate(settings(model, mesh, **options))
    rollout = _built[name](params, prompt, prompt_len, prompt_of, uid, limit, KEY)
    return jax.tree.map(np.asarray, rollout)


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
    rollout = _generate(temperature=0.0)
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
    few = _generate(prompt_of=np.array([0, 0], np.int32), uid=UID[[2, 6]], limit=LIMIT[:2],
                    prompt=PROMPT[1:2], prompt_len=PROMPT_LEN[1:2])  # fmt: skip
    np.testing.assert_array_equal(few.tokens_BR[0], want.tokens_BR[2])
    assert (few.tokens_BR[1] != want.tokens_BR[6]).any()


def test_the_same_prompt_gets_different_responses_for_different_uids():
    rollout = _generate()
    assert len({tuple(row) for row in rollout.tokens_BR}) == 8


@pytest.fixture
def traces(monkeypatch):
    """Grows by one for each time that a decoding step is traced."""
    traced, step = [], loop.decode_step
    monkeypatch.setattr(loop, "decode_step", lambda *args: traced.append(1) or step(*args))
    return traced


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 4, 1), (2, 2, 2)])
def test_every_mesh_gives_the_tokens_of_one_device(shape, traces):
    """One to four rows a shard, and with them one to three of the four prompts."""
    mesh, four = make_mesh(*shape), [0, 1, 2, 0]
    params = jax.device_put(PARAMS, param_shardings(PARAMS, mesh))
    fn = make_generate(
        settings(MODEL, mesh, max_new=NEW, temperature=TEMPERATURE, top_p=1.0, stop_ids=(140,))
    )
    fn(params, PROMPT[four], PROMPT_LEN[four], PROMPT_OF, UID + 1, LIMIT - 11, KEY)
    before = len(traces)
    got = fn(params, PROMPT[four], PROMPT_LEN[four], PROMPT_OF, UID, LIMIT, KEY)
    assert len(traces) == before > 0
    want = _generate(stop_ids=(140,))
    np.testing.assert_array_equal(got.tokens_BR, want.tokens_BR)
    np.testing.assert_array_equal(got.length_B, want.length_B)
    np.testing.assert_allclose(got.logp_BR, want.logp_BR, atol=5e-6, rtol=0)
    assert all(leaf.sharding.spec[0] == ("data", "fsdp") for leaf in jax.tree.leaves(got))


def test_the_options_for_gpu_are_known_to_this_version_of_xla():
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x, compiler_options={"xla_gpu_no_such_option": True})(1)
    jax.jit(lambda x: x, compiler_options=loop.GPU_OPTIONS)(1)


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="batch rows are 3.*mesh.data x mesh.fsdp = 4"):
        _generate(make_mesh(2, 2, 2), prompt_of=PROMPT_OF[:3], uid=UID[:3], limit=LIMIT[:3])


def test_a_row_ends_with_its_first_stop_token():
    free = _generate()
    stop_ids = (int(free.tokens_BR[0, 3]), int(free.tokens_BR[4, 6]))
    rollout = _generate(stop_ids=stop_ids)
    length, finished = _first_tokens(free, stop_ids)
    np.testing.assert_array_equal(rollout.length_B, length)
    np.testing.assert_array_equal(rollout.finished_B, finished)
    inside = np.arange(NEW) < length[:, None]
    np.testing.assert_array_equal(rollout.tokens_BR, np.where(inside, free.tokens_BR, 0))
    np.testing.assert_allclose(rollout.logp_BR, np.where(inside, free.logp_BR, 0), atol=2e-6)
    assert finished.any() and rollout.logp_BR[0, length[0] - 1] < 0


def test_all_rows_may_stop_at_the_first_token():
    rollout = _generate(stop_ids=ALL_IDS)
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
    nothing = _generate(limit=np.zeros(8, np.int32), stop_ids=ALL_IDS)
    assert not any(leaf.any() for leaf in jax.tree.leaves(nothing))


def test_a_stop_token_on_the_limit_counts_as_finished():
    rollout = _generate(limit=np.ones(8, np.int32), stop_ids=ALL_IDS)
    assert (rollout.length_B == 1).all() and rollout.finished_B.all()


def test_padded_ids_are_never_sampled_and_id_zero_is_an_ordinary_token():
    """The padding rows of the head are made the likeliest of all, id 0 the likeliest real one."""
    params = dict(PARAMS, head=PARAMS["head"].at[141:].mul(50.0).at[1:141].mul(0.0))
    for options in ({}, {"temperature": 0.0}, {"top_p": 1e-6}):
        rollout = _generate(params=params, **options)
        assert rollout.tokens_BR.max() < 141
        assert (rollout.length_B == NEW).all() and (rollout.logp_BR < 0).all()
    assert (_generate(params=params).tokens_BR == 0).any()


def test_top_p_keeps_to_the_likeliest_ids():
    rollout = _generate(top_p=1e-6)
    np.testing.assert_array_equal(rollout.tokens_BR, _generate(temperature=0.0).tokens_BR)


def test_new_values_do_not_compile_again(traces):
    fn = make_generate(settings(MODEL, None, max_new=1, temperature=TEMPERATURE, top_p=1.0, stop_ids=(140,)))
    want = _generate().tokens_BR[:, :1]
    call = lambda uid, key: fn(PARAMS, PROMPT, PROMPT_LEN, PROMPT_OF, uid, LIMIT, key)
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
        params=params, model=model, temperature=0.0, stop_ids=stop_ids, page=page, max_new=64,
        limit=np.full(8, 64, np.int32),
    )  # fmt: skip
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
