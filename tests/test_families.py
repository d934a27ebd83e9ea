"""Qwen3, Qwen2 and Llama by one model file: equal to an independent float64 forward and to transformers.

The directories are written here by Hugging Face's names, not by our table of them. Logits that transformers
5 gave for them are recorded in tests/cases/families.json; with torch at hand they are compared again, and
`python tests/test_families.py` writes them.
"""

import json
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rosd_jax.errors import UserError
from rosd_jax.models import families, qwen3, weights
from rosd_jax.models.qwen3 import Llama3Scaling
from rosd_jax.models.sharding import make_mesh, param_shardings, validate_mesh_for
from rosd_jax.rollout.batching import Request
from rosd_jax.rollout.engine import Engine
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
from support import nightly_but

EXACT = {"num_tokens": None, "dtype": "float32", "remat": "none"}
SIZES = dict(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    hidden_act="silu",
    max_position_embeddings=256,
)
LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
LLAMA = SIZES | dict(model_type="llama", rms_norm_eps=1e-5)
QWEN2 = SIZES | dict(
    model_type="qwen2",
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    use_sliding_window=False,
    sliding_window=32768,
    max_window_layers=2,
)
MODELS = {
    "qwen3": SIZES | dict(model_type="qwen3", head_dim=16, rms_norm_eps=1e-6, rope_theta=1e6),
    "qwen3-biased": SIZES | dict(model_type="qwen3", head_dim=16, rope_theta=1e4, attention_bias=True),
    "qwen2": QWEN2,
    "qwen2-tied": QWEN2 | dict(tie_word_embeddings=True, num_key_value_heads=1),
    "llama": LLAMA | dict(rope_theta=1e4, attention_bias=False, mlp_bias=False, pretraining_tp=1),
    "llama-biased": LLAMA | dict(rope_theta=1e4, attention_bias=True, head_dim=16),
    "llama3": LLAMA | dict(rope_theta=5e5, rope_scaling=LLAMA3, head_dim=16),
    "llama3-by-5": LLAMA | dict(rope_parameters=LLAMA3 | {"rope_theta": 5e5}, tie_word_embeddings=True),
    "smollm2": LLAMA
    | dict(
        hidden_size=36,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_theta=1e5,
        tie_word_embeddings=True,
        head_dim=4,
    ),
}
KEPT = [list(MODELS).index(name) for name in ("qwen3", "smollm2")]
TENSOR = {"smollm2": 3, "qwen2-tied": 1}  # of the mesh; else 2
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40)).astype(np.int32)
RECORDED = Path(__file__).parent / "cases" / "families.json"
AT = [0, 1, 20, 39]  # positions of the first row whose logits are recorded


def head_dim_of(fields):
    return fields.get("head_dim", fields["hidden_size"] // fields["num_attention_heads"])


def shapes_of(fields) -> dict[str, tuple[int, ...]]:
    """Tensor name -> shape, as Hugging Face stores the model."""
    D, F, E = fields["hidden_size"], fields["intermediate_size"], head_dim_of(fields)
    H, K = fields["num_attention_heads"] * E, fields["num_key_value_heads"] * E
    kind, biased = fields["model_type"], fields.get("attention_bias", False)
    shapes = {"model.embed_tokens.weight": (fields["vocab_size"], D), "model.norm.weight": (D,)}
    if not fields.get("tie_word_embeddings"):
        shapes["lm_head.weight"] = (fields["vocab_size"], D)
    for i in range(fields["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (D,), "post_attention_layernorm.weight": (D,)}
        for name, shape in {"q": (H, D), "k": (K, D), "v": (K, D), "o": (D, H)}.items():
            layer[f"self_attn.{name}_proj.weight"] = shape
            if biased or (kind == "qwen2" and name != "o"):
                layer[f"self_attn.{name}_proj.bias"] = shape[:1]
        if kind == "qwen3":
            layer |= {"self_attn.q_norm.weight": (E,), "self_attn.k_norm.weight": (E,)}
        layer |= {f"mlp.{name}_proj.weight": (F, D) for name in ("gate", "up")}
        layer |= {"mlp.down_proj.weight": (D, F)}
        shapes |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    return shapes


def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights off their usual centres, a function of the name."""
    values = np.random.default_rng(zlib.crc32(name.encode())).random(shape) - 0.5
    return (values + (1 if "norm" in name else 0)).astype(np.float32)


def written(folder: Path, fields) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {name: draw(name, shape) for name, shape in shapes_of(fields).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(params=MODELS)
def model(request, tmp_path):
    """Its name, its directory, what is read of it."""
    path = written(tmp_path / request.param, MODELS[request.param])
    config = families.read_config(path, **EXACT)
    return request.param, path, config, weights.load_params(path, config)


def our_logits(params, config, tokens=TOKENS):
    run = jax.jit(lambda p: qwen3.logits(p, config, qwen3.hidden_states(p, config, tokens)))
    return np.asarray(run(params))


# --- an independent forward in float64


def turned(x_THE, base, scaling):
    """RoPE by complex numbers: dimension i is the real part, i + E / 2 the imaginary one."""
    T, _, E = x_THE.shape
    rates = base ** -(np.arange(E // 2) * 2 / E)
    if scaling:
        rates = np.array([stretched(rate, scaling) for rate in rates])
    z = x_THE[..., : E // 2] + 1j * x_THE[..., E // 2 :]
    z = z * np.exp(1j * np.arange(T)[:, None] * rates)[:, None]
    return np.concatenate([z.real, z.imag], axis=-1)


def stretched(rate, scaling):
    """One frequency under llama3's rule, case by case."""
    length = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelength = 2 * np.pi / rate
    if wavelength < length / high:
        return rate
    if wavelength > length / low:
        return rate / scaling["factor"]
    share = (length / wavelength - low) / (high - low)
    return share * rate + (1 - share) * rate / scaling["factor"]


def reference(path: Path, tokens_T) -> np.ndarray:
    """Logits [T, V] of one row, in float64, from the files alone."""
    fields = json.loads((path / "config.json").read_text())
    w = {name: value.astype(np.float64) for name, value in load_file(path / "model.safetensors").items()}
    rope = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    base = fields.get("rope_theta", rope.get("rope_theta"))
    scaling = rope if rope.get("rope_type") == "llama3" else None
    E, H, K = head_dim_of(fields), fields["num_attention_heads"], fields["num_key_value_heads"]

    def norm(x, name):
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + fields.get("rms_norm_eps", 1e-6))
        return y * w[name]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    x = w["model.embed_tokens.weight"][tokens_T]
    T = len(x)
    for i in range(fields["num_hidden_layers"]):
        at = f"model.layers.{i}."
        h = norm(x, at + "input_layernorm.weight")
        q, k, v = (linear(h, f"{at}self_attn.{name}_proj").reshape(T, -1, E) for name in "qkv")
        if at + "self_attn.q_norm.weight" in w:
            q, k = norm(q, at + "self_attn.q_norm.weight"), norm(k, at + "self_attn.k_norm.weight")
        q, k = turned(q, base, scaling), turned(k, base, scaling)
        out = np.zeros((T, H, E))
        for head in range(H):
            scores = q[:, head] @ k[:, head // (H // K)].T / np.sqrt(E)
            scores = np.where(np.tri(T, dtype=bool), scores, -np.inf)
            chance = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, head] = chance / chance.sum(-1, keepdims=True) @ v[:, head // (H // K)]
        x = x + linear(out.reshape(T, -1), at + "self_attn.o_proj")
        h = norm(x, at + "post_attention_layernorm.weight")
        gate = linear(h, at + "mlp.gate_proj")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(h, at + "mlp.up_proj"), at + "mlp.down_proj")
    return norm(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def test_logits_equal_an_independent_float64_forward(model):
    _, path, config, params = model
    for row, got in zip(TOKENS, our_logits(params, config), strict=True):
        want = reference(path, row)
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=0)


def test_logits_equal_those_recorded_from_transformers(model):
    name, _, config, params = model
    recorded = np.array(json.loads(RECORDED.read_text())[name])
    got = our_logits(params, config)[0, AT]
    np.testing.assert_allclose(got, recorded, atol=2e-5 * np.abs(recorded).max(), rtol=0)


def their_logits(path: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    model, report = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


def test_transformers_gives_the_same_logits_for_source_and_export(model, tmp_path):
    pytest.importorskip("torch")
    _, path, config, params = model
    ours = our_logits(params, config)
    for source in (None, path):
        weights.save_pretrained(tmp_path / "out", params, config, source=source)
        np.testing.assert_allclose(their_logits(tmp_path / "out"), ours, atol=2e-5 * np.abs(ours).max())
    np.testing.assert_allclose(their_logits(path), ours, atol=2e-5 * np.abs(ours).max())


def test_frequencies_are_those_of_transformers(model):
    torch = pytest.importorskip("torch")
    from transformers import AutoConfig, AutoModelForCausalLM

    _, path, config, _ = model
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path)).model.rotary_emb.inv_freq
    assert theirs.dtype == torch.float32
    np.testing.assert_allclose(qwen3.frequencies(config), theirs.numpy(), rtol=2e-7)  # the last bit or two


def test_llama3_keeps_short_wavelengths_and_stretches_long_ones():
    config = qwen3.Qwen3Config(61, 32, 48, 2, 4, 2, 128, rope_theta=5e5)
    scaled = config.replace(rope_scaling=Llama3Scaling(8.0, 1.0, 4.0, 8192))
    plain, changed = qwen3.frequencies(config), qwen3.frequencies(scaled)
    assert plain.dtype == changed.dtype == np.float32
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 8192 / 4, wavelength > 8192
    np.testing.assert_array_equal(changed[short], plain[short])
    np.testing.assert_array_equal(changed[long], plain[long] / np.float32(8))
    between = ~short & ~long
    assert short.sum() == long.sum() == 29
    assert (changed[between] < plain[between]).all() and (changed[between] > plain[between] / 8).all()
    assert hash(scaled) != hash(config) and scaled != config


# --- decoding


@pytest.mark.parametrize("split", [False, True], ids=["one device", "mesh"])
@pytest.mark.parametrize("model", nightly_but(MODELS, keep=KEPT), indirect=True)
def test_greedy_decoding_equals_the_full_forward(model, split):
    name, _, config, params = model
    tensor = TENSOR.get(name, 2) if split else 1
    if split and tensor == 1:
        pytest.skip("one key-value head is never split")
    mesh = make_mesh(2, 1, tensor, devices=jax.devices()[: 2 * tensor]) if split else None
    if split:
        validate_mesh_for(config, mesh)
        params = jax.device_put(params, param_shardings(params, mesh))
    prompt, length, new = TOKENS[:, :7], np.array([3, 7], np.int32), 8
    engine = Engine(config, mesh, Limits(new, 7, page_length=4), Sampling(0.0))
    requests = [Request(prompt[n, : length[n]].tolist(), uid) for uid, n in enumerate((0, 1, 1, 0))]
    tokens = engine.generate(params, requests, jax.random.key(0)).tokens_BR
    for n, responses in ((0, tokens[[0, 3]]), (1, tokens[[1, 2]])):
        row = np.concatenate([prompt[n, : length[n]], responses[0]])[None]
        best = our_logits(params, config, row)[0, length[n] - 1 : -1].argmax(-1)
        np.testing.assert_array_equal(responses, np.stack([best, best]))


# --- in and out


def test_a_round_trip_keeps_every_bit_and_says_the_family(model, tmp_path):
    name, path, config, params = model
    for source in (None, path):
        weights.save_pretrained(tmp_path / "out", params, config, source=source)
        again = families.read_config(tmp_path / "out", **EXACT)
        assert again == config
        got, want = (load_file(d / "model.safetensors") for d in (tmp_path / "out", path))
        assert got.keys() == want.keys()
        for tensor in want:
            np.testing.assert_array_equal(got[tensor], want[tensor])
        loaded = weights.load_params(tmp_path / "out", again)
        jax.tree.map(np.testing.assert_array_equal, loaded, params)
        said = json.loads((tmp_path / "out" / "config.json").read_text())
        kind = MODELS[name]["model_type"]
        assert said["model_type"] == kind
        assert said["architectures"] == [
            {"q": "Qwen", "l": "Llama"}[kind[0]] + kind[4:] * (kind[0] == "q") + "ForCausalLM"
        ]
        # transformers 4 reads the one, transformers 5 the other
        scaled = name.startswith("llama3")
        assert bool(said.get("rope_scaling")) == scaled and said["rope_theta"] == config.rope_theta
        if scaled:
            assert said["rope_scaling"].items() >= LLAMA3.items()
        assert ("attention_bias" in said) == (kind != "qwen2")


def test_what_old_llama_files_leave_out_is_what_transformers_takes_it_for(tmp_path):
    fields = {k: v for k, v in LLAMA.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    path = written(tmp_path / "old", LLAMA | {"num_key_value_heads": 4})
    tensors = load_file(path / "model.safetensors")
    for i in range(2):
        tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(fields | {"head_dim": None, "rope_scaling": None}))
    config = families.read_config(path, **EXACT)
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    assert (config.rope_theta, config.max_position_embeddings) == (1e4, 2048)
    weights.check_weights(path, config)
    assert our_logits(weights.load_params(path, config), config).shape == (2, 40, 61)


def test_windows_that_cut_nothing_are_taken(tmp_path):
    for change in ({"max_window_layers": 2}, {"sliding_window": None}):
        path = written(tmp_path, QWEN2 | {"use_sliding_window": True} | change)
        assert families.read_config(path, **EXACT).attention_bias


WRONG = [
    (
        "qwen2",
        {"num_hidden_layers": 2**30},
        "num_hidden_layers in .* is 1073741824; it must be at most 10000",
    ),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window in .* is True"),
    ("qwen2", {"rope_theta": None}, "rope_theta in .* is None; it must be a number above 0"),
    ("qwen2", {"num_key_value_heads": None}, "num_key_value_heads in .* is None"),
    ("llama", {"mlp_bias": True}, "mlp_bias in .* is True; it must be False"),
    ("llama", {"attention_bias": 1}, "attention_bias in .* is 1; it must be true or false"),
    ("llama", {"hidden_act": "relu"}, "hidden_act in .* is 'relu'; it must be 'silu'"),
    ("llama", {"model_type": "llama4"}, "is 'llama4'; it must be one of 'qwen3', 'qwen2', 'llama'"),
    ("llama", {"model_type": ["llama"]}, r"model_type in .* is \['llama'\]; it must be one of"),
    ("llama", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type in .* is 'dynamic'"),
    ("llama", {"rope_scaling": {"rope_type": []}}, r"rope_scaling.rope_type in .* is \[\]"),
    ("llama3", {"rope_scaling": LLAMA3 | {"factor": 0}}, "rope_scaling.factor in .* is 0; it must be"),
    ("llama3", {"rope_scaling": LLAMA3 | {"factor": None}}, "rope_scaling.factor in .* is None"),
    ("llama3", {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, "high_freq_factor in .* is 1.0.* above"),
    (
        "llama3",
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192.5}},
        "rope_scaling.original_max_position_embeddings in .* is 8192.5; it must be a whole number",
    ),
    (
        "llama3",
        {"rope_parameters": LLAMA3 | {"factor": 9.0}},
        "rope_parameters in .*factor=9.0.*some programs read",
    ),
    ("llama3", {"rope_parameters": {"rope_type": "default"}}, "rope_parameters in .* is None; .*factor=8.0"),
]


@pytest.mark.parametrize("name, change, sentence", WRONG)
def test_what_is_not_built_is_refused_in_one_sentence(name, change, sentence, tmp_path):
    path = written(tmp_path, MODELS[name])
    (path / "config.json").write_text(json.dumps(MODELS[name] | change))
    with pytest.raises(UserError, match=sentence) as error:
        families.read_config(path, **EXACT)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, other", [("qwen2", "llama"), ("llama", "qwen3"), ("qwen3", "qwen2")])
def test_one_familys_weights_are_not_taken_for_anothers(name, other, tmp_path):
    path = written(tmp_path, MODELS[name] | {"head_dim": 16})
    fields = MODELS[name] | {"head_dim": 16, "model_type": other, "rope_theta": 1e4}
    (path / "config.json").write_text(json.dumps(fields))
    config = families.read_config(path, **EXACT)
    with pytest.raises(UserError, match="lacks tensor|is not part of the model in its config.json"):
        weights.check_weights(path, config)


def test_an_architecture_of_no_family_is_not_written(tmp_path):
    config = qwen3.Qwen3Config(61, 32, 48, 2, 4, 2, 16, attention_bias=True)  # the output has none
    params = qwen3.init_params(config, jax.random.key(0))
    with pytest.raises(ValueError, match="no supported family"):
        weights.save_pretrained(tmp_path, params, config)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        logits = {}
        for name, fields in MODELS.items():
            rows = their_logits(written(Path(scratch) / name, fields))[0, AT]
            logits[name] = [[float(f"{x:.7g}") for x in row] for row in rows]
    lines = [f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in logits.items()]
    RECORDED.write_text("{\n" + ",\n".join(lines) + "\n}\n")
