"""Adapters: gradients of the merged model by the chain rule, a constant base, decoding and exports merged."""

import dataclasses
import json
import re
from functools import cache

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_update import MODEL as PLAIN
from test_update import QUICK, B, assert_near, gradient, make_config, make_lesson, with_gradient

from rosd_jax.config import default_config, validate
from rosd_jax.errors import UserError
from rosd_jax.fields import replace
from rosd_jax.models import lora, qwen3, weights
from rosd_jax.models.peft_files import save_adapters
from rosd_jax.models.sharding import make_mesh, param_shardings
from rosd_jax.rollout.batching import Request
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.settings import LAYERS, LoraSettings
from rosd_jax.train.microbatches import plan_microbatches
from rosd_jax.train.trees import Trees
from rosd_jax.train.update import init_state, make_optimizer, make_update
from rosd_jax.types import TrainState
from support import nightly_but

RANK, ALPHA = 3, 4.5
SCALE = ALPHA / RANK
MODEL = PLAIN.replace(lora_scale=SCALE, attention_bias=True, output_bias=True)
SOME = ("q_proj", "o_proj", "down_proj", "up_proj")
KERNELS = {f"{'attention/' * (name in LAYERS[:4])}{name}": name for name in LAYERS}


def config_of(rank=RANK, targets=LAYERS):
    config = make_config()
    lora = LoraSettings(rank=rank, alpha=ALPHA, targets=tuple(targets))
    return replace(config, "model.lora", lora)


@cache
def base():
    shapes = qwen3.param_shapes(MODEL)
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32), shapes)


def adapters_of(targets=LAYERS, model=MODEL):
    """Adapters in the middle of training: B is no longer zero."""
    shapes = jax.eval_shape(lambda: lora.init_adapters(model, RANK, targets, jax.random.key(0)))
    rng = np.random.default_rng(2)
    return jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(np.float32), shapes)


def merged(params, adapters):
    """The plain model of both, in NumPy."""
    params = jax.tree.map(np.copy, params)
    for path in KERNELS:
        layer, adapter = params["blocks"], adapters["blocks"]
        for name in path.split("/"):
            layer, adapter = layer[name], adapter.get(name, {})
        if adapter:
            change = np.einsum("lir,lro->lio", *(np.float64(adapter[x]) for x in ("lora_a", "lora_b")))
            layer["kernel"] = (layer["kernel"] + SCALE * change).astype(np.float32)
    return params


# --- the model


@pytest.mark.parametrize("targets", nightly_but(zip([LAYERS, SOME]), keep=[1]), ids=len)
def test_adapters_and_the_merged_kernels_are_one_model(targets):
    tokens = np.random.default_rng(0).integers(0, 60, (3, 11)).astype(np.int32)
    adapters = adapters_of(targets)
    params = lora.combine(base(), adapters)
    assert params["blocks"]["up_proj"]["kernel"] is base()["blocks"]["up_proj"]["kernel"]  # not copied
    forward = jax.jit(lambda p: qwen3.hidden_states(p, MODEL, tokens))
    want = np.asarray(forward(merged(base(), adapters)))
    np.testing.assert_allclose(forward(params), want, atol=2e-5 * np.abs(want).max())
    assert np.abs(np.asarray(forward(base())) - want).max() > 0.1
    joined = jax.jit(lambda p: lora.merge(p, MODEL))(params)
    assert jax.tree.structure(joined) == jax.tree.structure(base())
    assert_near(jax.device_get(joined), merged(base(), adapters), 1e-6)


def test_new_adapters_change_nothing_and_are_drawn_as_peft_draws_them():
    adapters = lora.init_adapters(MODEL, 64, LAYERS, jax.random.key(3))
    leaves = {}
    for path, x in jax.tree_util.tree_leaves_with_path(adapters):
        leaves[jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(x)
    assert leaves.keys() == {f"blocks/{path}/lora_{x}" for path in KERNELS for x in "ab"}
    for name, x in leaves.items():
        if name.endswith("a"):
            bound = 1 / np.sqrt(x.shape[1])
            assert np.abs(x).max() <= bound and np.std(x) == pytest.approx(bound / np.sqrt(3), rel=0.1)
        else:
            assert not x.any()
    firsts = {x.flat[0] for name, x in leaves.items() if name.endswith("a")}
    assert len(firsts) == len(LAYERS)
    tokens = np.ones((1, 5), np.int32)
    forward = jax.jit(lambda p: qwen3.hidden_states(p, MODEL, tokens))
    np.testing.assert_allclose(forward(lora.combine(base(), adapters)), forward(base()), atol=1e-6)


@pytest.mark.parametrize("shape", nightly_but(zip([None, (2, 2, 2)]), keep=[1]), ids=str)
def test_decoding_with_adapters_is_decoding_of_the_merged_model(shape):
    mesh = None if shape is None else make_mesh(*shape)
    prompt = np.random.default_rng(0).integers(0, 60, (2, 6)).astype(np.int32)
    engine = Engine(MODEL, mesh, Limits(10, 6), Sampling(0.0))
    requests = [Request(prompt[uid % 2, : (4, 6)[uid % 2]].tolist(), uid) for uid in range(8)]

    def decode(params):
        if mesh is not None:
            params = jax.device_put(params, param_shardings(params, mesh))
        return engine.generate(params, requests, jax.random.key(0))

    got, want = decode(lora.combine(base(), adapters_of())), decode(merged(base(), adapters_of()))
    np.testing.assert_array_equal(got.tokens_BR, want.tokens_BR)
    np.testing.assert_allclose(got.logp_BR, want.logp_BR, atol=1e-5)
    assert (decode(base()).tokens_BR != want.tokens_BR).any()


def test_adapters_are_added_in_float32_whatever_the_compute_type():
    model = MODEL.replace(dtype="bfloat16")
    engine = Engine(model, None, Limits(10, 6), Sampling(0.0))
    requests = [Request([3, 1, 4, 1], uid) for uid in range(2)]
    frozen = jax.tree.map(lambda x: x.astype("bfloat16").astype("float32"), base())  # as a run holds it
    adapters = engine.generate(lora.combine(frozen, adapters_of()), requests, jax.random.key(0))
    whole = engine.generate(merged(frozen, adapters_of()), requests, jax.random.key(0))
    np.testing.assert_array_equal(adapters.tokens_BR, whole.tokens_BR)
    np.testing.assert_array_equal(adapters.logp_BR, whole.logp_BR)


# --- the update


@cache
def prepared(shape, rank, targets=LAYERS):
    mesh = make_mesh(*shape, devices=jax.devices()[: int(np.prod(shape))])
    config = config_of(rank, targets)
    trees = Trees(config, MODEL, mesh, with_gradient(config))
    return make_update(config, MODEL, trees.optimizer, mesh, trees.shardings), trees, mesh


def updated(params, shape=(1, 1, 1), rank=RANK, targets=LAYERS):
    """(state, metrics) after one step from these params, whose frozen tree is the base."""
    update, trees, mesh = prepared(shape, rank, targets)
    with jax.set_mesh(mesh):
        state = jax.device_put(init_state(params, trees.optimizer), trees.shardings)
        frozen = jax.device_put(base(), trees.frozen_shardings)
        out = jax.device_get(update(state, frozen, make_lesson())[:2])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), base())
    return out


@cache
def full_gradient():
    """Of all weights of the merged model, which test_update checks against the loss."""
    return updated(merged(base(), adapters_of()), rank=0)


@pytest.mark.parametrize(
    "shape",
    nightly_but(zip([(1, 1, 1), (2, 4, 1), (2, 2, 2)]), keep=[2]),
    ids=str,
)
def test_gradients_are_the_merged_models_by_the_chain_rule(shape):
    state, metrics = updated(adapters_of(), shape)
    whole, plain = full_gradient()
    found = gradient(state)["blocks"]
    for path in KERNELS:
        got, full, adapter = found, gradient(whole)["blocks"], adapters_of()["blocks"]
        for name in path.split("/"):
            got, full, adapter = got[name], full[name], adapter[name]
        g = np.float64(full["kernel"])
        want = {
            "lora_a": SCALE * np.einsum("lio,lro->lir", g, adapter["lora_b"]),
            "lora_b": SCALE * np.einsum("lir,lio->lro", adapter["lora_a"], g),
        }
        assert_near(got, want, 3e-5)
    for name in ("loss", "ratio", "divergence", "student_topk_mass", "active_tokens"):
        assert metrics[name] == pytest.approx(plain[name], rel=3e-5), name


def test_only_chosen_layers_have_adapters_and_all_of_them_learn():
    state, _ = updated(adapters_of(SOME), targets=SOME)
    before = adapters_of(SOME)
    assert jax.tree.structure(state.params) == jax.tree.structure(before)
    assert set(state.params["blocks"]) == {"attention", "down_proj", "up_proj"}
    assert set(state.params["blocks"]["attention"]) == {"q_proj", "o_proj"}
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(before), strict=True):
        assert np.abs(a - b).max() > 1e-5


def programs(model, rank):
    """The gradient's equations and its compiled text, for all weights (rank 0) or adapters."""
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    config = replace(config_of(rank), "loss.chunk", 24)
    trees = Trees(config, model, mesh, make_optimizer(config))
    update = make_update(config, model, trees.optimizer, mesh, trees.shardings)
    microbatch = plan_microbatches(make_lesson(), B, (64, 64))[0]
    hidden = jax.ShapeDtypeStruct((B, microbatch.student_BS.shape[1], model.hidden_size), np.float32)
    arguments = trees.like.params, trees.frozen_like, *jax.eval_shape(update.zeros), hidden, microbatch
    with jax.set_mesh(mesh):
        text = update.learn.lower(*arguments).compile(compiler_options=QUICK).as_text()
        return jax.make_jaxpr(update.learn)(*arguments), text


def products(jaxpr):
    """Shapes that matrix products give, in inner programs too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "jaxpr") or hasattr(x, "eqns")
        ):
            if hasattr(value, "jaxpr") or hasattr(value, "eqns"):
                yield from products(getattr(value, "jaxpr", value))


def test_no_gradient_of_a_base_weight_is_computed_and_the_loss_takes_three_products():
    model = MODEL.replace(vocab_size=120, num_tokens=113, intermediate_size=44)
    kernels = {(16, 32), (32, 16), (16, 44), (44, 16)}
    of_loss = {}
    for rank in (0, RANK):
        jaxpr, text = programs(model, rank)
        assert kernels & set(products(jaxpr.jaxpr)) == (set() if rank else kernels)
        shapes = [
            tuple(map(int, shape.split(","))) for shape in re.findall(r"f32\[([\d,]+)\]\S* dot\(", text)
        ]
        of_loss[rank] = sorted(shape for shape in shapes if 120 in shape or 24 in shape)
    logits, of_hidden, of_head = [(24, 120)] * 2, [(24, 16)], [(120, 16)]  # of a chunk of 24 rows
    assert of_loss[0] == sorted(logits + of_hidden + of_head)
    assert of_loss[RANK] == sorted(logits + of_hidden)
    assert not re.search(r"f32\[120,16\]\S* (add|dot|broadcast)\(", text)  # nor a place to add it up


def test_the_state_is_the_adapters_alone_and_begins_as_the_base(tmp_path):
    path = tmp_path / "model"
    weights.save_pretrained(path, base(), MODEL)
    _, trees, mesh = prepared((2, 2, 2), RANK)
    trees = dataclasses.replace(trees, config=replace(trees.config, "model.path", str(path)))
    first = trees.first()
    assert isinstance(first, TrainState)
    count = sum(x.size for x in jax.tree.leaves(first.params))
    assert count == sum(RANK * sum(shape) for shape in ((16, 32),) * 4 + ((16, 32),) * 3) * 2
    assert jax.tree.map(lambda x: x.sharding, first.params) == trees.shardings.params
    again = trees.first()
    jax.tree.map(np.testing.assert_array_equal, first.params, again.params)
    frozen = trees.frozen(first)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(frozen), base())
    assert {x.dtype for x in jax.tree.leaves(first.params)} == {np.dtype("float32")}


# --- the exported adapters


def numpy_merge(adapter, source, out):
    """Merges a PEFT directory into a Hugging Face one, from the files alone."""
    settings = json.loads((adapter / "adapter_config.json").read_text())
    pairs, tensors = load_file(adapter / "adapter_model.safetensors"), load_file(source / "model.safetensors")
    names = [name for name in pairs if name.endswith("lora_A.weight")]
    for name in names:
        module = name.removeprefix("base_model.model.").removesuffix("lora_A.weight")
        assert module.split(".")[-2] in settings["target_modules"]
        a, b = np.float64(pairs.pop(name)), np.float64(pairs.pop(name.replace("lora_A", "lora_B")))
        assert a.shape[0] == b.shape[1] == settings["r"]
        tensors[module + "weight"] = tensors[module + "weight"] + settings["lora_alpha"] / settings["r"] * (
            b @ a
        )
    assert not pairs and len(names) == 2 * len(settings["target_modules"])
    out.mkdir()
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, out / "model.safetensors")


@pytest.fixture(params=["qwen3", "llama"])
def exported(request, tmp_path):
    """A base's directory, its adapters' as PEFT has them, the model's config and both trees in one."""
    plain = {"qk_norm": False, "attention_bias": False, "output_bias": False}
    model = MODEL.replace(num_tokens=None, **(plain if request.param == "llama" else {}))
    shapes = qwen3.param_shapes(model)
    rng = np.random.default_rng(4)
    params = jax.tree.map(lambda x: rng.normal(0.1, 0.3, x.shape).astype(np.float32), shapes)
    weights.save_pretrained(tmp_path / "base", params, model)
    both = lora.combine(params, adapters_of(SOME, model))
    save_adapters(
        tmp_path / "adapter", both, rank=RANK, alpha=ALPHA, targets=SOME, base=str(tmp_path / "base")
    )
    return tmp_path, model, both


TOKENS = np.random.default_rng(0).integers(0, 60, (2, 13)).astype(np.int32)


def logits(params, model):
    return np.asarray(
        jax.jit(lambda p: qwen3.logits(p, model, qwen3.hidden_states(p, model, TOKENS)))(params)
    )


def test_exported_adapters_merge_into_the_model_by_their_files_alone(exported):
    path, model, both = exported
    assert {file.name for file in (path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    numpy_merge(path / "adapter", path / "base", path / "merged")
    loaded = weights.load_params(path / "merged", model)
    assert_near(jax.device_get(loaded), jax.device_get(lora.merge(both, model)), 1e-6)
    want = logits(both, model)
    np.testing.assert_allclose(logits(loaded, model), want, atol=1e-5 * np.abs(want).max())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers is about to rename
def test_peft_loads_the_adapters_with_equal_logits(exported):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    path, model, both = exported
    plain = AutoModelForCausalLM.from_pretrained(path / "base", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, path / "adapter").eval()
    with torch.no_grad():
        got = theirs(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()
    want = logits(both, model)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


def test_adapters_that_cannot_be_written_are_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*free disk space or choose another"):
        save_adapters(tmp_path / "file", adapters_of(), rank=RANK, alpha=ALPHA, targets=LAYERS, base="x")


# --- the fields

WRONG = [
    ("rank", -1, "model.lora.rank is -1; it must be 0"),
    ("alpha", 0.0, "model.lora.alpha is 0.0; it must be above 0"),
    ("alpha", float("inf"), "model.lora.alpha is inf"),
    ("targets", (), r"model.lora.targets is \(\); it must name some of q_proj"),
    ("targets", ("q_proj", "lm_head"), "model.lora.targets is .*'lm_head'.*each once"),
    ("targets", ("q_proj", "q_proj"), "model.lora.targets is .*each once"),
    ("targets", (["q_proj"],), "model.lora.targets is"),
]


@pytest.mark.parametrize("field, value, sentence", WRONG)
def test_a_field_that_breaks_its_rule_is_named(field, value, sentence):
    config = default_config()
    validate(config)
    config.model.lora[field] = value
    with pytest.raises(UserError, match=sentence):
        validate(config)
