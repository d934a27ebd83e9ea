"""What is exported loads in transformers 4 as well as 5, and is there what its source was here.

transformers 4 gets an environment of its own under ~/.cache/rosd_jax/test-envs, made on first use.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import quickstart
from rosd_jax.config import validate
from rosd_jax.errors import UserError
from rosd_jax.hosts import Hosts
from rosd_jax.models import families, weights
from rosd_jax.text.tokenizer import load_tokenizer
from rosd_jax.train.console import Console
from rosd_jax.train.export import export as export_run
from support import ROOT, data_dir, nightly_but

OLD = "4.57.6"
STOPS = "generation_config.json"
GYM = ROOT / "models" / "gym"
TEXTS = [
    "What is 12 + 7, größer α≈0.5 → β 漢字 🙂?",
    "  two  spaces\n\n\n\tand 123456789 e\u0301 don't",
    "<|im_start|>user\n1 +2<|im_end|>\n<think>\nhm\n</think><|endoftext|>",
    "",
]
CHATS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 +2"},
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n3"},
        {"role": "user", "content": "And now? {{ 1 }}"},
    ],
]
# Run by either version: what a directory means there.
PROBE = """
import json, os, sys, warnings
warnings.simplefilter("ignore")
import transformers
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

def probe(path, texts, chats):
    t = AutoTokenizer.from_pretrained(path)
    template = lambda chat, thinking: t.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
    ids = lambda chat: list(t.apply_chat_template(
        chat, tokenize=True, add_generation_prompt=True, return_dict=False))
    return dict(
        ids=[t.encode(text, add_special_tokens=False) for text in texts],
        decoded=[t.decode(t.encode(text), skip_special_tokens=True) for text in texts],
        chats=[template(chat, thinking) for chat in chats for thinking in (True, False)],
        chat_ids=[ids(chat) for chat in chats],
        size=len(t), special=sorted(t.all_special_tokens), eos=t.eos_token_id, pad=t.pad_token_id,
    )

def stops(path):
    if not os.path.exists(path + "/generation_config.json"):
        return None
    named = GenerationConfig.from_pretrained(path).eos_token_id
    return sorted(named if isinstance(named, list) else [named])

def model(path, torch):
    c = AutoConfig.from_pretrained(path)
    theta = getattr(c, "rope_theta", None) or c.rope_parameters["rope_theta"]
    return dict(type=type(c).__name__, theta=theta, head_dim=c.head_dim, eps=c.rms_norm_eps,
                tied=c.tie_word_embeddings, bias=c.attention_bias, rows=c.vocab_size,
                logits=logits(path) if torch else None)

def logits(path):
    import torch
    from transformers import AutoModelForCausalLM
    model, report = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        return model.float()(torch.tensor([[1, 5, 9, 30, 2]])).logits[0, -1, :40].tolist()

asked = json.load(sys.stdin)
answers = {}
for path in asked["paths"]:
    try:
        answers[path] = probe(path, asked["texts"], asked["chats"]) | {"stops": stops(path)}
        if path in asked["models"]:
            answers[path]["model"] = model(path, asked["torch"])
    except Exception as error:
        answers[path] = {"error": f"{type(error).__name__}: {error}"}
answers["version"] = transformers.__version__
print(json.dumps(answers))
"""


def has_torch():
    return importlib.util.find_spec("torch") is not None


@pytest.fixture(scope="session")
def old_python():
    """Python of an environment with transformers 4; skips where it cannot be made."""
    torch = has_torch()
    name = f"transformers-{OLD}-py{sys.version_info.major}.{sys.version_info.minor}" + "-torch" * torch
    home = Path.home() / ".cache" / "rosd_jax" / "test-envs" / name
    python = home / "bin" / "python"
    if not (home / "whole").exists():
        shutil.rmtree(home, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", home], check=True)
        packages = [f"transformers=={OLD}", "numpy", "jinja2", *(["torch"] if torch else [])]
        command = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *packages]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"transformers {OLD} cannot be installed: {made.stderr.strip().splitlines()[-1]}")
        (home / "whole").touch()
    return python


def ask(python, paths, models=()):
    """The probe's answers for each directory, by the given Python."""
    question = {"paths": [str(p) for p in paths], "models": [str(p) for p in models], "torch": has_torch()}
    hidden = {"PYTHONPATH", "JAX_PLATFORMS"}
    done = subprocess.run(
        [python, "-c", PROBE],
        input=json.dumps(question | {"texts": TEXTS, "chats": CHATS}),
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k not in hidden} | {"HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def qwen3(path, **changes):
    """A copy of the real Qwen3 tokenizer with changed settings."""
    path.mkdir()
    for name in ("tokenizer.json", "config.json"):
        shutil.copy(data_dir("qwen3_tokenizer") / name, path)
    settings = json.loads((data_dir("qwen3_tokenizer") / "tokenizer_config.json").read_text()) | changes
    settings = {key: value for key, value in settings.items() if value != "absent"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def thinking_template():
    name = "tokenizer_config.qwen3-4b-2507.json"
    return json.loads((data_dir("qwen3_tokenizer") / name).read_text())["chat_template"]


def as_shipped(path):
    return qwen3(path)


def thinking_2507(path):
    return qwen3(path, chat_template=thinking_template())


def instruct_2507(path):
    opened = "<|im_start|>assistant\\n<think>\\n"
    assert opened in thinking_template()
    return qwen3(path, chat_template=thinking_template().replace(opened, "<|im_start|>assistant\\n"))


def qwen25(path):
    qwen3(path, chat_template="absent")
    shutil.copy(data_dir("qwen3_tokenizer") / "chat_template.qwen2.5-7B.jinja", path / "chat_template.jinja")
    return path


def without_a_class_or_config(path):
    qwen3(path, tokenizer_class=None)
    (path / "config.json").unlink()
    return path


def without_settings(path):
    qwen3(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").unlink()
    (path / "chat_template.jinja").write_text(settings["chat_template"])
    named = {"eos_token": {"content": "<|im_end|>", "lstrip": False}, "pad_token": "<|endoftext|>"}
    (path / "special_tokens_map.json").write_text(json.dumps(named))
    return path


def written_by_5(path):
    load_tokenizer(qwen3(path)).inner.save_pretrained(path)
    assert isinstance(json.loads((path / "tokenizer_config.json").read_text())["extra_special_tokens"], list)
    return path


def gym(path):
    return Path(shutil.copytree(GYM, path))


def gym_written_by_5(path):
    gym(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings["additional_special_tokens"] = ["<|im_start|>"]
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer(path).inner.save_pretrained(path)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "TokenizersBackend"
    assert settings["extra_special_tokens"] == ["<|im_start|>"]
    return path


def vocabulary_only(path):
    """Two files instead of tokenizer.json, and settings for the rest."""
    qwen3(path)
    load_tokenizer(path).inner.backend_tokenizer.model.save(str(path))
    (path / "tokenizer.json").unlink()
    return path


# What transformers 4 cannot read, and what the real model's directories come as.
NEW = [written_by_5, gym_written_by_5]
SOURCES = [
    as_shipped,
    thinking_2507,
    instruct_2507,
    qwen25,
    without_a_class_or_config,
    without_settings,
    vocabulary_only,
    gym,
    *NEW,
]


def export(source, path):
    load_tokenizer(source).save(path)
    return path


@pytest.mark.nightly
@pytest.mark.slow
def test_what_is_exported_is_in_transformers_4_what_its_source_is_in_5(old_python, tmp_path):
    sources = [make(tmp_path / make.__name__) for make in SOURCES]
    tokenizers = [load_tokenizer(source) for source in sources]
    copies = [tmp_path / f"out_{source.name}" for source in sources]
    for tokenizer, copy in zip(tokenizers, copies, strict=True):
        tokenizer.save(copy)
    old = ask(old_python, [*copies, *(tmp_path / make.__name__ for make in NEW)])
    new = ask(sys.executable, [*sources, *copies])
    assert old["version"] == OLD and new["version"].startswith("5.")
    assert all("error" in old[str(tmp_path / make.__name__)] for make in NEW)
    for source, tokenizer, copy in zip(sources, tokenizers, copies, strict=True):
        want = new[str(source)]
        assert "error" not in want, (source.name, want)
        for answers in (old, new):
            got = answers[str(copy)]
            assert "error" not in got, (source.name, got)
            assert got.pop("stops") == sorted(tokenizer.stop_ids), source.name
            assert got == {k: v for k, v in want.items() if k != "stops"}, source.name


def trained(source, path, dtype):
    """What a run on `source` leaves in its export/, the weights moved a little."""
    tokenizer = load_tokenizer(source)
    model = families.read_config(source, num_tokens=tokenizer.num_tokens, dtype=dtype, remat="none")
    params = jax.tree.map(lambda x: x * 1.01, weights.load_params(source, model))
    config = quickstart.get_config()
    config.model.update(path=str(source), dtype=dtype)
    run = types.SimpleNamespace(
        hosts=Hosts(),
        config=validate(config),
        inputs=types.SimpleNamespace(model=model, tokenizer=tokenizer),
        directory=path,
        console=Console(None),
    )
    export_run(run, params, path / "export", 1)
    return path / "export"


def without_defaults(path):
    """The gym as transformers 5 writes a config: no rope_theta at the top, and no generation_config.json."""
    shutil.copytree(GYM, path)
    fields = json.loads((path / "config.json").read_text()) | {"eos_token_id": 7}
    kept = {k: v for k, v in fields.items() if k not in ("rope_theta", "rms_norm_eps", "architectures")}
    kept["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    (path / "config.json").write_text(json.dumps(kept))
    (path / "generation_config.json").unlink()
    return path


@pytest.mark.slow
@pytest.mark.parametrize("dtype", nightly_but(["float32", "bfloat16"], keep=[1]))
@pytest.mark.parametrize("make", [gym, without_defaults])
def test_an_exported_model_is_the_same_in_both(make, dtype, old_python, tmp_path):
    source = make(tmp_path / "source")
    copy = trained(source, tmp_path, dtype)
    old, new = (ask(python, [copy], models=[copy])[str(copy)] for python in (old_python, sys.executable))
    assert "error" not in old, old
    model, same = old["model"], new["model"]
    np.testing.assert_allclose(model.pop("logits") or 0, same.pop("logits") or 0, atol=1e-5)
    assert model == same
    assert (
        model["theta"] == families.read_config(source, num_tokens=None, dtype=dtype, remat="none").rope_theta
    )
    assert old["stops"] == new["stops"] == sorted(load_tokenizer(source).stop_ids)


def test_files_that_both_read_are_copied_byte_for_byte(tmp_path):
    for make in (as_shipped, thinking_2507, gym):
        source = make(tmp_path / make.__name__)
        copy = export(source, tmp_path / f"out_{make.__name__}")
        names = {file.name for file in copy.iterdir()}
        assert names == {file.name for file in source.iterdir() if "token" in file.name} | {STOPS}
        for name in names - {STOPS}:
            assert (copy / name).read_bytes() == (source / name).read_bytes()
    assert (copy / STOPS).read_bytes() == (source / STOPS).read_bytes()  # the gym's names all


def test_files_of_an_older_export_are_replaced(tmp_path):
    old = gym(tmp_path / "out")
    for name in ("chat_template.jinja", "added_tokens.json", "special_tokens_map.json", "merges.txt"):
        (old / name).write_text("{}")
    tokenizer = load_tokenizer(gym(tmp_path / "source"))
    tokenizer.save(old)
    assert {file.name for file in old.iterdir()} == {file.name for file in GYM.iterdir()}
    message = [{"role": "user", "content": "1"}]
    assert load_tokenizer(old).render(message, False) == tokenizer.render(message, False)


def test_what_transformers_4_cannot_read_is_repaired(tmp_path):
    source = gym_written_by_5(tmp_path / "source")
    copy = export(source, tmp_path / "out")
    before, after = (json.loads((d / "tokenizer_config.json").read_text()) for d in (source, copy))
    assert after["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert after["additional_special_tokens"] == before.pop("extra_special_tokens")
    assert before.pop("tokenizer_class") == "TokenizersBackend" and before.items() <= after.items()
    again, first = load_tokenizer(copy), load_tokenizer(source)
    assert sorted(again.inner.all_special_tokens) == sorted(first.inner.all_special_tokens)
    assert again.stop_ids == first.stop_ids and again.num_tokens == first.num_tokens


def test_a_class_that_is_not_named_is_stated_with_its_own_special_tokens(tmp_path):
    source = gym(tmp_path / "source")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    del settings["tokenizer_class"], settings["unk_token"]
    tokens = {name: settings.pop(name) for name in ("eos_token", "pad_token")}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    (source / "special_tokens_map.json").write_text(json.dumps(tokens))
    (source / "config.json").unlink()
    copy = export(source, tmp_path / "out")
    after = json.loads((copy / "tokenizer_config.json").read_text())
    assert after == settings | tokens | {"tokenizer_class": "PreTrainedTokenizerFast"}


def test_a_copy_that_cannot_be_made_is_one_sentence(tmp_path):
    source = gym(tmp_path / "source")
    tokenizer = load_tokenizer(source)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be copied to .*file .*choose another directory"):
        tokenizer.save(tmp_path / "file")
