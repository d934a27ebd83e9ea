"""Hugging Face directories in and out: parity with transformers, exact bytes, errors named."""

import json
import types

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rosd_jax.errors import UserError
from rosd_jax.models import families, qwen3, sharding, weights
from rosd_jax.models.qwen3 import Qwen3Config

CONFIG = Qwen3Config(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    rope_theta=5e5,
)
TOKENS = np.random.default_rng(0).integers(0, 61, (2, 40)).astype(np.int32)
EXACT = {"num_tokens": None, "dtype": "float32", "remat": "none"}


def shapes_of(config):
    return qwen3.param_shapes(config)


def params_of(config):
    rng = np.random.default_rng(1)

    def draw(path, x):
        return rng.normal(path[-1].key == "scale", 0.2, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes_of(config))


def our_logits(params, config):
    run = jax.jit(lambda p: qwen3.logits(p, config, qwen3.hidden_states(p, config, TOKENS)))
    return np.asarray(run(params))


def assert_equal_trees(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.fixture
def saved(tmp_path):
    """A saved model's directory, its tensors, and ways to spoil it."""
    weights.save_pretrained(tmp_path, params_of(CONFIG), CONFIG)
    file = tmp_path / "model.safetensors"

    def fields(**changes):
        config = json.loads((tmp_path / "config.json").read_text()) | changes
        config = {name: value for name, value in config.items() if value != "absent"}
        (tmp_path / "config.json").write_text(json.dumps(config))

    def tensors(change):
        values = load_file(file)
        change(values)
        save_file(values, file)

    return types.SimpleNamespace(path=tmp_path, fields=fields, tensors=tensors)


# --- parity with transformers

CASES = {
    "grouped": {},
    "tied": {"tie_word_embeddings": True},
    "biased": {"attention_bias": True, "output_bias": True, "num_key_value_heads": 1},
    "ungrouped": {"num_key_value_heads": 4, "head_dim": 8, "rms_norm_eps": 1e-3},
}


def their_logits(model):
    import torch

    with torch.no_grad():
        return model(torch.tensor(TOKENS, dtype=torch.long)).logits.numpy()


@pytest.mark.parametrize("case", CASES)
def test_a_transformers_model_gives_the_same_logits_here(case, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = CONFIG.replace(**CASES[case])
    theirs = transformers.Qwen3Config(
        **{name: getattr(config, name) for name in (*families.SIZES, "head_dim", *families.OPTIONAL)},
        attention_bias=config.attention_bias,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        initializer_range=0.2,
    )
    model = transformers.Qwen3ForCausalLM(theirs).eval()
    for name, p in model.named_parameters():
        if "norm" in name or "bias" in name:
            torch.nn.init.normal_(p, float("norm" in name), 0.2)
    for size in ("1GB", "20KB"):  # one file, then several with an index
        model.save_pretrained(tmp_path / size, max_shard_size=size)
        assert (tmp_path / size / "model.safetensors.index.json").exists() == (size == "20KB")
        read = families.read_config(tmp_path / size, **EXACT)
        assert read == config
        params = weights.load_params(tmp_path / size, read)
        np.testing.assert_allclose(our_logits(params, read), their_logits(model), atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_our_export_gives_the_same_logits_in_transformers(case, tmp_path):
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = CONFIG.replace(**CASES[case])
    params = params_of(config)
    weights.save_pretrained(tmp_path, params, config, max_shard_bytes=20_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    model, report = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    np.testing.assert_allclose(their_logits(model), our_logits(params, config), atol=1e-5)


# --- round trips


@pytest.mark.parametrize("limit", [5e9, 20_000, 1])
@pytest.mark.parametrize("case", CASES)
def test_save_then_load_gives_equal_bits(case, limit, tmp_path):
    config = CONFIG.replace(**CASES[case])
    params = params_of(config)
    weights.save_pretrained(tmp_path, params, config, max_shard_bytes=limit)
    assert families.read_config(tmp_path, **EXACT) == config
    assert_equal_trees(weights.load_params(tmp_path, config), params)


def test_equal_parameters_give_equal_bytes_and_no_leftovers(tmp_path):
    params = params_of(CONFIG)
    for name, values in (("a", params), ("b", jax.tree.map(jax.numpy.asarray, params))):
        weights.save_pretrained(tmp_path / name, values, CONFIG)
    files = [{f.name: f.read_bytes() for f in (tmp_path / d).iterdir()} for d in "ab"]
    assert files[0] == files[1] and files[0].keys() == {"config.json", "model.safetensors"}
    head = files[0]["model.safetensors"][:200]
    assert b'"__metadata__":{"format":"pt"}' in head


def test_the_index_names_every_tensor_and_files_keep_to_the_limit(tmp_path):
    weights.save_pretrained(tmp_path, params_of(CONFIG), CONFIG, max_shard_bytes=30_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    sizes = {}
    for file in tmp_path.glob("*.safetensors"):
        values = load_file(file)
        assert {index["weight_map"][name] for name in values} == {file.name}
        sizes[file.name] = sum(v.nbytes for v in values.values())
    assert max(sizes.values()) <= 30_000 and len(sizes) > 2
    assert sum(sizes.values()) == index["metadata"]["total_size"]


@pytest.mark.parametrize("first,second", [(20_000, 5e9), (5e9, 20_000), (20_000, 60_000)])
def test_saving_over_an_older_save_leaves_only_the_new_one(first, second, tmp_path):
    old, new = params_of(CONFIG), jax.tree.map(lambda x: x + 1, params_of(CONFIG))
    weights.save_pretrained(tmp_path, old, CONFIG, max_shard_bytes=first)
    weights.save_pretrained(tmp_path, new, CONFIG, max_shard_bytes=second)
    weights.save_pretrained(tmp_path / "fresh", new, CONFIG, max_shard_bytes=second)
    assert_equal_trees(weights.load_params(tmp_path, CONFIG), new)

    def files(folder):
        return {f.name for f in folder.iterdir() if f.is_file()}

    assert files(tmp_path) == files(tmp_path / "fresh")


def test_reading_and_saving_tell_how_many_arrays_are_done(tmp_path):
    told = []
    params = params_of(CONFIG)
    weights.save_pretrained(tmp_path, params, CONFIG, progress=lambda *counts: told.append(counts))
    arrays = len(jax.tree.leaves(params))
    assert told == [(done, arrays) for done in range(arrays)]
    told.clear()
    weights.load_params(tmp_path, CONFIG, progress=lambda *counts: told.append(counts))
    assert told == [(done, arrays) for done in range(arrays)]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_storage_loads_as_float32(dtype, tmp_path):
    params = params_of(CONFIG)
    weights.save_pretrained(tmp_path, params, CONFIG, dtype=dtype)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == dtype
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16
    rounded = jax.tree.map(lambda x: x.astype(kind).astype(np.float32), params)
    assert_equal_trees(weights.load_params(tmp_path, CONFIG), rounded)


def test_loading_straight_onto_a_mesh_and_saving_from_it(tmp_path):
    params = params_of(CONFIG)
    weights.save_pretrained(tmp_path / "a", params, CONFIG)
    mesh = sharding.make_mesh(1, 4, 2)
    places = sharding.param_shardings(shapes_of(CONFIG), mesh)
    placed = weights.load_params(tmp_path / "a", CONFIG, places)
    assert_equal_trees(jax.device_get(placed), params)
    assert jax.tree.map(lambda x: x.sharding, placed) == places
    weights.save_pretrained(tmp_path / "b", placed, CONFIG)
    a, b = ((tmp_path / d / "model.safetensors").read_bytes() for d in "ab")
    assert a == b


class Counted:
    """An open file that can be read by slices alone, and notes how much each took."""

    def __init__(self, file, reads):
        self.file, self.reads = file, reads

    def keys(self):
        return self.file.keys()

    def get_slice(self, name):
        whole, reads = self.file.get_slice(name), self.reads

        class Slice:
            get_shape, get_dtype = whole.get_shape, whole.get_dtype

            def __getitem__(self, index):
                reads.append((name, whole[index].size))
                return whole[index]

        return Slice()

    def __enter__(self):
        self.file.__enter__()
        return self

    def __exit__(self, *error):
        return self.file.__exit__(*error)


@pytest.mark.parametrize("mesh", [(1, 4, 2), (2, 2, 2), (8, 1, 1)], ids=str)
def test_each_shard_is_read_by_itself_and_once(mesh, tmp_path, monkeypatch):
    params = params_of(CONFIG.replace(vocab_size=64))
    config = CONFIG.replace(vocab_size=64)
    weights.save_pretrained(tmp_path, params, config)
    reads, opened = [], weights._open
    monkeypatch.setattr(weights, "_open", lambda file: Counted(opened(file), reads))
    mesh = sharding.make_mesh(*mesh)
    places = sharding.param_shardings(params, mesh)
    assert_equal_trees(jax.device_get(weights.load_params(tmp_path, config, places)), params)
    shards = {}  # of each tensor
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        place = places
        for key in path:
            place = place[key.key]
        count = leaf.size // np.prod(place.shard_shape(leaf.shape), dtype=int)
        shards |= dict.fromkeys(weights._names(weights._path(path), leaf.shape), count)
    stored = {name: value.size for name, value in load_file(tmp_path / "model.safetensors").items()}
    for name, size in reads:
        assert size == stored[name] // shards[name], name
    assert sum(size for _, size in reads) == sum(stored.values())
    assert max(shards.values()) == mesh.shape["fsdp"] * mesh.shape["tensor"]


def test_a_host_reads_nothing_of_a_shard_that_its_devices_do_not_have(tmp_path):
    """The shard of one device of eight, as each host of several asks for its own."""
    params = params_of(CONFIG)
    weights.save_pretrained(tmp_path, params, CONFIG, max_shard_bytes=20_000)
    reads = []
    with weights.ExitStack() as stack:
        tensors = weights._open_tensors(stack, tmp_path, CONFIG, shapes_of(CONFIG))
        tensors = {name: (Counted(file, reads), where) for name, (file, where) in tensors.items()}
        for path, ranges in (
            ("blocks/attention/q_proj/kernel", ((0, 3), (8, 16), (32, 64))),
            ("blocks/down_proj/kernel", ((1, 2), (0, 24), (0, 8))),
            ("blocks/attention/k_norm/scale", ((2, 3), (0, 16))),
            ("head", ((10, 20), (8, 16))),
        ):
            leaf = params
            for key in path.split("/"):
                leaf = leaf[key]
            part = leaf[tuple(slice(*r) for r in ranges)]
            got = weights._read_shard(tensors, path, leaf.shape, ranges, np.dtype("float32"))
            np.testing.assert_array_equal(got, part)
            assert sum(size for _, size in reads) == part.size
            reads.clear()


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_loading_at_the_compute_type_equals_a_cast_of_the_master_weights(stored, tmp_path):
    weights.save_pretrained(tmp_path, params_of(CONFIG), CONFIG, dtype=stored)
    places = sharding.param_shardings(shapes_of(CONFIG), sharding.make_mesh(2, 2, 2))
    master = weights.load_params(tmp_path, CONFIG, places)
    frozen = weights.load_params(tmp_path, CONFIG, places, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(frozen)} == {jax.numpy.dtype("bfloat16")}
    cast = jax.tree.map(lambda x: x.astype("bfloat16"), master)
    assert jax.tree.map(lambda x: x.sharding, frozen) == places == jax.tree.map(lambda x: x.sharding, cast)
    assert_equal_trees(jax.device_get(frozen), jax.device_get(cast))


def test_the_sources_config_is_kept_but_for_the_dtype(saved, tmp_path):
    saved.fields(eos_token_id=7, torch_dtype="float16", dtype="absent", note={"a": [1]})
    weights.save_pretrained(tmp_path / "out", params_of(CONFIG), CONFIG, source=saved.path, dtype="bfloat16")
    before, after = (json.loads((d / "config.json").read_text()) for d in (saved.path, tmp_path / "out"))
    assert before.pop("torch_dtype") == "float16" and after.pop("dtype") == "bfloat16"
    assert before == after


def test_the_copied_config_states_what_its_source_left_to_defaults(saved, tmp_path):
    saved.fields(rope_theta="absent", head_dim="absent", rms_norm_eps="absent", architectures="absent")
    read = families.read_config(saved.path, **EXACT)
    weights.save_pretrained(tmp_path / "out", params_of(read), read, source=saved.path)
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (after["rope_theta"], after["head_dim"], after["rms_norm_eps"]) == (5e5, 8, 1e-6)
    assert after["architectures"] == ["Qwen3ForCausalLM"]
    assert families.read_config(tmp_path / "out", **EXACT) == read


def test_a_tied_models_stray_head_is_ignored(saved):
    config = CONFIG.replace(tie_word_embeddings=True)
    params = weights.load_params(saved.path, config)
    assert "head" not in params


# --- config.json

ROPES = [
    {"rope_theta": 1e4, "rope_parameters": "absent"},
    {"rope_theta": "absent", "rope_parameters": {"rope_theta": 10000, "rope_type": "default"}},
    {"rope_theta": 10000, "rope_parameters": None, "rope_scaling": None},
]


@pytest.mark.parametrize("fields", ROPES)
def test_rope_theta_is_read_from_either_field(fields, saved):
    saved.fields(**fields)
    assert families.read_config(saved.path, **EXACT).rope_theta == 1e4


def test_defaults_and_arguments_of_the_config(saved):
    saved.fields(head_dim="absent")
    config = families.read_config(saved.path, num_tokens=60, dtype="bfloat16", remat="block")
    assert config == CONFIG.replace(head_dim=8, num_tokens=60, dtype="bfloat16", remat="block")


WRONG_FIELDS = [
    ({"model_type": "gemma3"}, "model_type in .*config.json is 'gemma3'; .* 'qwen3', 'qwen2', 'llama'; "),
    ({"model_type": "absent"}, "model_type in .* is None; it must be one of 'qwen3'"),
    (
        {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2},
        "use_sliding_window in .* is True; it must be False",
    ),
    ({"use_sliding_window": True, "sliding_window": "absent", "max_window_layers": "absent"}, "window"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types in .* is .*'full_attention'"),
    ({"head_dim": 15}, "head_dim in .* is 15; it must be even"),
    ({"num_attention_heads": 3}, "num_attention_heads in .* is 3; it must be a multiple"),
    ({"rope_theta": 1e4}, r"rope_parameters.rope_theta in .* is 500000.0; .* rope_theta = 10000.0"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5e5}}}, "rope_parameters.full_attention in"),
    ({"rope_scaling": "none"}, "rope_scaling in .* is 'none'; it must be an object or null"),
    ({"rope_parameters": []}, r"rope_parameters in .* is \[\]; it must be an object or null"),
    ({"max_position_embeddings": "512"}, "max_position_embeddings in .* is '512'; it must be a whole"),
    ({"attention_bias": "false"}, "attention_bias in .* is 'false'; it must be true or false"),
    ({"use_sliding_window": "false"}, "use_sliding_window in .* is 'false'"),
    ({"rms_norm_eps": None}, "rms_norm_eps in .* is None; it must be a number above 0"),
    ({"hidden_act": "gelu"}, "hidden_act in .* is 'gelu'; it must be 'silu'"),
    ({"hidden_size": "absent"}, "hidden_size in .* is None; it must be a whole number above 0"),
    ({"num_hidden_layers": 0}, "num_hidden_layers in .* is 0"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type in .* is 'yarn'"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, "rope_type in .* 'linear'"),
    ({"rope_theta": "absent", "rope_parameters": None}, "rope_theta in .* is None"),
    ({"mlp_bias": True}, "mlp_bias in .* is True; it must be False"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor in .* is 0.5; it must be 1"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor in"),
]


@pytest.mark.parametrize("fields,sentence", WRONG_FIELDS)
def test_a_config_that_is_not_supported_is_named(fields, sentence, saved):
    saved.fields(**fields)
    with pytest.raises(UserError, match=sentence) as error:
        families.read_config(saved.path, **EXACT)
    assert "--config.model.path=DIR" in str(error.value)


def test_a_tokenizer_larger_than_the_model_is_refused(saved):
    with pytest.raises(UserError, match="a model whose vocabulary is too small for its tokenizer.*61.*62"):
        families.read_config(saved.path, num_tokens=62, dtype="float32", remat="none")


@pytest.mark.parametrize("path", ["", "missing"])
def test_a_missing_model_says_what_to_pass(path, tmp_path):
    with pytest.raises(UserError, match="contains no config.json; pass --config.model.path=DIR"):
        families.read_config(path and tmp_path / path, **EXACT)


READ = (
    *families.SIZES,
    *families.OPTIONAL,
    "attention_bias",
    "head_dim",
    "rope_theta",
    "rope_parameters",
    "rope_scaling",
    "model_type",
    "hidden_act",
    "use_sliding_window",
    "layer_types",
)
ANYTHING = [
    None,
    "",
    "x",
    "32",
    0,
    -1,
    1,
    1.5,
    10**400,
    float("inf"),
    float("nan"),
    True,
    False,
    [],
    [1],
    [[1]],
    {},
    {"a": 1},
    {"rope_type": 5},
    {"rope_theta": "x"},
    {"rope_theta": None},
    {"type": None},
]


@pytest.mark.parametrize("field", READ)
def test_a_field_of_any_kind_is_read_or_named_with_its_file(field, saved):
    refused = 0
    for value in ANYTHING:
        saved.fields(**{field: value})
        try:
            config = families.read_config(saved.path, **EXACT)
            shapes_of(config)
        except UserError as error:
            refused += 1
            assert f" in {saved.path}/config.json is " in str(error) and "\n" not in str(error)
            related = {"num_key_value_heads": "num_attention_heads", "num_attention_heads": "head_dim"}
            assert str(error).startswith((field, related.get(field, field), "rope_parameters.rope_theta"))
    assert refused > 8


@pytest.mark.parametrize("text", [b"{", b"[1]", b"\x00", b"\xff\xfe{}", b"null", b"[" * 100_000])
def test_a_broken_config_is_named(text, saved):
    (saved.path / "config.json").write_bytes(text)
    with pytest.raises(UserError, match="config.json is not"):
        families.read_config(saved.path, **EXACT)


# --- wrong tensors

NORM = "model.layers.1.input_layernorm.weight"
WRONG_TENSORS = [
    (lambda t: t.pop(NORM), f"model.safetensors lacks tensor {NORM}"),
    (
        lambda t: t.update({NORM: np.ones(31, np.float32)}),
        rf"tensor {NORM} in .* has shape \(31,\).*\(32,\)",
    ),
    (lambda t: t.update({NORM: np.ones(32, np.int8)}), f"tensor {NORM} in .* is stored as I8"),
    (lambda t: t.update({"stray": np.ones(1)}), "tensor stray in .*model.safetensors is not part of"),
]


@pytest.mark.parametrize("change,sentence", WRONG_TENSORS)
def test_a_wrong_tensor_is_named_with_its_file(change, sentence, saved):
    saved.tensors(change)
    for read in (weights.check_weights, weights.load_params):
        with pytest.raises(UserError, match=sentence):
            read(saved.path, CONFIG)


def test_more_layers_or_biases_than_the_config_asks_for_are_refused(saved):
    with pytest.raises(UserError, match="model.layers.2.* is not part of"):
        weights.load_params(saved.path, CONFIG.replace(num_hidden_layers=2))
    with pytest.raises(UserError, match="lacks tensor model.layers.0.self_attn.k_proj.bias"):
        weights.load_params(saved.path, CONFIG.replace(attention_bias=True, output_bias=True))


def test_pickled_weights_are_refused(saved):
    (saved.path / "model.safetensors").rename(saved.path / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled weights only.*convert them to safetensors"):
        weights.load_params(saved.path, CONFIG)


def test_no_weights_and_broken_files_are_named(saved):
    file = saved.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="model.safetensors is not a safetensors file.*download it again"):
        weights.load_params(saved.path, CONFIG)
    file.unlink()
    for read in (weights.check_weights, weights.load_params):
        with pytest.raises(UserError, match="contains no model.safetensors; pass --config.model.path"):
            read(saved.path, CONFIG)


def test_checking_weights_passes_what_loads_and_reads_no_tensor(saved, monkeypatch):
    monkeypatch.setattr(weights, "_read_shard", None)
    weights.check_weights(saved.path, CONFIG)


NOT_NEXT_TO_IT = [
    "model-00009-of-00009.safetensors",
    "../model.safetensors",
    "..",
    "",
    "a\0b",
    "n" * 300,
    5,
    None,
    ["model.safetensors"],
]


@pytest.mark.parametrize("name", NOT_NEXT_TO_IT)
def test_an_index_that_names_no_file_next_to_it_is_refused(name, saved):
    folder = saved.path / "sub"
    folder.mkdir()
    index = {"weight_map": {NORM: name}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(
        UserError, match="weight_map.*index.json is .*the name of a file in the same directory"
    ):
        weights.load_params(folder, CONFIG)


@pytest.mark.parametrize("places", [None, [], "x", 5, {}])
def test_an_index_without_a_map_is_refused(places, saved):
    (saved.path / "model.safetensors").unlink()
    (saved.path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(UserError, match="weight_map in .*model.safetensors.index.json is"):
        weights.load_params(saved.path, CONFIG)


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written.*free disk space or choose another"):
        weights.save_pretrained(tmp_path / "file", params_of(CONFIG), CONFIG)
