"""The peers of the decoding benchmark, each in an interpreter of its own, and the handle to them.

    PYTHON -m benchmarks.decode_peers {tunix,transformers} MODEL_DIR

loads the weights, then answers each JSON line on stdin by one on stdout, marked so that nothing else
there is taken for it; every answer holds the processor seconds that it took.

    {"task": "generate", "prompts": [[id, ...], ...], "new": 128, "cache": 192, "greedy": false}
        -> {"tokens": the new ids, greedy only}; prompts have one length, and no row ends early
    {"task": "top_p", "logits": FILE.npy, "top_p": 0.95}    -> {} once every row has a token

A worker needs NumPy and its peer; this project may be absent there.
"""

# pyright: reportMissingImports=false
# Peers are installed in environments of their own.

import importlib.metadata
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import seconds

ROOT = Path(__file__).resolve().parents[1]
MARK = "@@"
Call = Callable[[], dict[str, Any]]  # returns when its work is done, with the processor seconds "cpu_s"


class Peer:
    """A worker process, which runs `module`, and the versions of what it uses."""

    def __init__(self, name: str, python: str, folder: str, module: str = "benchmarks.decode_peers") -> None:
        self.process = subprocess.Popen(
            [os.path.abspath(python), "-m", module, name, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=os.environ
            | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"},
        )
        self.versions = self._answer()

    def ask(self, task: str, **request: Any) -> dict[str, Any]:
        """Sends a request and waits for its answer; raises RuntimeError where the worker ended."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps({"task": task} | request) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """Ends the worker."""
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout
        for line in self.process.stdout:
            if line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise RuntimeError(f"the worker ended with {self.process.wait()}; its last words are above")

    def generate(self, ids: np.ndarray, new: int, cache: int, greedy: bool = False) -> dict[str, Any]:
        """`new` tokens for every prompt [rows, length], with a cache of that many positions a row."""
        return self.ask("generate", prompts=ids.tolist(), new=int(new), cache=cache, greedy=greedy)

    def in_batches(self, ids: np.ndarray, new_B: np.ndarray, cache: int, size: int) -> dict[str, Any]:
        """Each row's own number of tokens, or more: a batch goes on until its longest row has them."""
        cpu = 0.0
        for at in range(0, len(ids), size):
            here = slice(at, at + size)
            cpu += self.generate(ids[here], new_B[here].max(), cache)["cpu_s"]
        return {"cpu_s": cpu}

    def best_batch(self, ids: np.ndarray, new_B: np.ndarray, cache: int, sizes: list[int]):
        """The fastest of these batch sizes, and the wall time in seconds of each after its first call."""
        if len(sizes) == 1:
            return sizes[0], {}

        def call(size):
            return self.in_batches(ids, new_B, cache, size)

        took = {size: [seconds(lambda size=size: call(size)) for _ in range(2)][1] for size in sizes}
        return min(sizes, key=lambda size: took[size]), took


def here(call: Callable[..., object], *args: Any) -> Call:
    """A call in this process, in a peer's form."""

    def run():
        start = time.process_time()
        call(*args)
        return {"cpu_s": time.process_time() - start}

    return run


class Ids:
    """What tunix asks of a tokenizer, where a text is ids in decimal."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids, **_) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # false, so that none is added

    def eos_id(self) -> int:
        return self.vocab + 7  # out of reach, as is padding: Sampler masks ids that look like it

    def pad_id(self) -> int:
        return self.vocab + 8


def tunix_config(path: str | Path) -> Any:
    """tunix's form of a Hugging Face directory's config.json, in float32."""
    import jax.numpy as jnp
    from tunix.models.qwen3 import model

    hf = json.loads((Path(path) / "config.json").read_text())
    return model.ModelConfig(
        num_layers=hf["num_hidden_layers"],
        vocab_size=hf["vocab_size"],
        embed_dim=hf["hidden_size"],
        hidden_dim=hf["intermediate_size"],
        num_heads=hf["num_attention_heads"],
        head_dim=hf["head_dim"],
        num_kv_heads=hf["num_key_value_heads"],
        rope_theta=int(hf["rope_theta"]),
        norm_eps=hf["rms_norm_eps"],
        use_tied_embedding=hf["tie_word_embeddings"],
        dtype=jnp.float32,
        param_dtype=jnp.float32,
    )


def tunix(path: str):
    """(generate, top_p, versions) of tunix."""
    import jax
    import jax.numpy as jnp
    from tunix.generate import sampler
    from tunix.models.qwen3 import params

    config = tunix_config(path)
    net = params.create_model_from_safe_tensors(path, config, dtype=jnp.float32)

    @cache
    def sampler_of(size: int):
        shape = sampler.CacheConfig(size, config.num_layers, config.num_kv_heads, config.head_dim)
        return sampler.Sampler(net, Ids(config.vocab_size), shape)

    def generate(prompts, new, cache, greedy):
        text = [" ".join(map(str, row)) for row in prompts]
        how = {} if greedy else dict(temperature=1.0, top_p=1.0)
        out = sampler_of(cache)(
            text, max_generation_steps=new, max_prompt_length=len(prompts[0]), seed=0, **how
        )
        return np.asarray(out.tokens)

    def draw(z, key, p):
        return sampler.sample_top_p(z[:, None], key, 1.0, p, None)[0]

    nucleus = jax.jit(draw, static_argnums=2)
    load = cache(lambda file: jnp.asarray(np.load(file)))

    def top_p(logits, top_p):
        nucleus(load(logits), jax.random.key(0), top_p).block_until_ready()

    return generate, top_p, ["google-tunix", "jax"]


def transformers(path: str):
    """(generate, top_p, versions) of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, TopPLogitsWarper

    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    no_ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)

    @torch.inference_mode()
    def generate(prompts, new, cache, greedy):  # its cache grows with the text
        ids = torch.tensor(prompts)
        how = dict(do_sample=False) if greedy else dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
        out = net.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, **no_ids, **how
        )
        return out[:, ids.shape[1] :].numpy()

    load = cache(lambda file: torch.from_numpy(np.load(file)))

    @torch.inference_mode()
    def top_p(logits, top_p):
        z = TopPLogitsWarper(top_p)(None, load(logits))
        torch.multinomial(torch.softmax(z, -1), 1)

    return generate, top_p, ["transformers", "torch"]


def main() -> None:
    """The worker."""
    generate, top_p, packages = {"tunix": tunix, "transformers": transformers}[sys.argv[1]](sys.argv[2])

    def emit(answer):
        return print(MARK + json.dumps(answer), flush=True)

    emit({name: importlib.metadata.version(name) for name in packages})
    for line in sys.stdin:
        request = json.loads(line)
        start, answer = time.process_time(), {}
        if request.pop("task") == "top_p":
            top_p(**request)
        else:
            tokens = generate(**request)
            assert tokens.shape == (len(request["prompts"]), request["new"]), tokens.shape
            answer = {"tokens": tokens.tolist()} if request["greedy"] else {}
        emit(answer | {"cpu_s": time.process_time() - start})


if __name__ == "__main__":
    main()
