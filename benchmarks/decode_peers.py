"""The peers of the decoding benchmark as worker processes, each with its own interpreter, and their handle.

    PYTHON -m benchmarks.decode_peers {tunix,transformers} MODEL_DIR

loads the weights and then answers each JSON line on stdin with one on stdout, which starts with a mark to
tell it from other output. Every answer contains the CPU seconds that it took, "cpu_s".

    {"task": "generate", "prompts": [[id, ...], ...], "new": 128, "cache": 192, "greedy": false}
        -> {"tokens": the new ids, if greedy}; all prompts have one length, and no row ends early
    {"task": "top_p", "logits": FILE.npy, "top_p": 0.95}    -> {} once every row has a token

A worker needs NumPy and the peer's packages, not this project's.
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
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import seconds

ROOT = Path(__file__).resolve().parents[1]
MARK = "@@"
Call = Callable[[], dict[str, Any]]  # returns {"cpu_s": CPU seconds} once its work is done


class Peer:
    """A worker process that runs `module`, and the versions of its packages."""

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
        """Sends a request and waits for the answer. Raises RuntimeError if the worker has ended."""
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
        raise RuntimeError(f"the worker ended with status {self.process.wait()}; its output is above")

    def generate(self, ids: np.ndarray, new: int, cache: int, greedy: bool = False) -> dict[str, Any]:
        """Generates `new` tokens for each prompt of [rows, length]; `cache` is its positions per row."""
        return self.ask("generate", prompts=ids.tolist(), new=int(new), cache=cache, greedy=greedy)

    def in_batches(self, ids: np.ndarray, new_B: np.ndarray, cache: int, size: int) -> dict[str, Any]:
        """Generates in batches of `size` rows, each until its longest row is done."""
        cpu = 0.0
        for at in range(0, len(ids), size):
            here = slice(at, at + size)
            cpu += self.generate(ids[here], new_B[here].max(), cache)["cpu_s"]
        return {"cpu_s": cpu}

    def best_batch(
        self, ids: np.ndarray, new_B: np.ndarray, cache: int, sizes: list[int]
    ) -> tuple[int, dict[int, float]]:
        """The fastest of these batch sizes, and the seconds of each one's second call."""
        if len(sizes) == 1:
            return sizes[0], {}
        took: dict[int, float] = {}
        for size in sizes:
            call = partial(self.in_batches, ids, new_B, cache, size)
            call()  # compiles
            took[size] = seconds(call)
        return min(sizes, key=lambda size: took[size]), took


def here(call: Callable[..., object], *args: Any) -> Call:
    """A call in this process, in the form of a peer's."""

    def run() -> dict[str, Any]:
        start = time.process_time()
        call(*args)
        return {"cpu_s": time.process_time() - start}

    return run


class Ids:
    """A tokenizer for tunix whose texts are decimal ids."""

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def encode(self, text: str, **_) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any, **_) -> str:
        return ""

    def bos_id(self) -> int:
        return 0  # falsy, so that tunix adds none

    def eos_id(self) -> int:
        return self.vocab + 7  # outside the vocabulary, like padding: Sampler masks ids that equal it

    def pad_id(self) -> int:
        return self.vocab + 8


def tunix_config(path: str | Path) -> Any:
    """A Hugging Face directory's config.json as tunix's config, in float32."""
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


def tunix(path: str) -> tuple[Callable[..., np.ndarray], Callable[..., None], list[str]]:
    """tunix's functions generate and top_p, and the packages that they use."""
    import jax
    import jax.numpy as jnp
    from tunix.generate import sampler
    from tunix.models.qwen3 import params

    config = tunix_config(path)
    net = params.create_model_from_safe_tensors(path, config, dtype=jnp.float32)

    @cache
    def sampler_of(size: int) -> Any:
        shape = sampler.CacheConfig(size, config.num_layers, config.num_kv_heads, config.head_dim)
        return sampler.Sampler(net, Ids(config.vocab_size), shape)

    def generate(prompts: list[list[int]], new: int, cache: int, greedy: bool) -> np.ndarray:
        text = [" ".join(map(str, row)) for row in prompts]
        sampling = {} if greedy else dict(temperature=1.0, top_p=1.0)
        out = sampler_of(cache)(
            text, max_generation_steps=new, max_prompt_length=len(prompts[0]), seed=0, **sampling
        )
        return np.asarray(out.tokens)

    @partial(jax.jit, static_argnums=2)
    def nucleus(logits: jax.Array, key: jax.Array, p: float) -> jax.Array:
        return sampler.sample_top_p(logits[:, None], key, 1.0, p, None)[0]

    @cache
    def load(file: str) -> jax.Array:
        return jnp.asarray(np.load(file))

    def top_p(logits: str, top_p: float) -> None:
        nucleus(load(logits), jax.random.key(0), top_p).block_until_ready()

    return generate, top_p, ["google-tunix", "jax"]


def transformers(path: str) -> tuple[Callable[..., np.ndarray], Callable[..., None], list[str]]:
    """The functions generate and top_p of transformers, and the packages that they use."""
    import torch
    from transformers import AutoModelForCausalLM, TopPLogitsWarper

    net = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    no_ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=0)

    @torch.inference_mode()
    def generate(prompts: list[list[int]], new: int, cache: int, greedy: bool) -> np.ndarray:
        ids = torch.tensor(prompts)  # `cache` is not needed: its KV cache grows with the text
        random = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
        out = net.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            **no_ids,
            **(dict(do_sample=False) if greedy else random),
        )
        return out[:, ids.shape[1] :].numpy()

    @cache
    def load(file: str) -> torch.Tensor:
        return torch.from_numpy(np.load(file))

    @torch.inference_mode()
    def top_p(logits: str, top_p: float) -> None:
        warped = TopPLogitsWarper(top_p)(None, load(logits))
        torch.multinomial(torch.softmax(warped, -1), 1)

    return generate, top_p, ["transformers", "torch"]


def main() -> None:
    """The worker."""
    generate, top_p, packages = {"tunix": tunix, "transformers": transformers}[sys.argv[1]](sys.argv[2])

    def emit(answer: dict[str, Any]) -> None:
        print(MARK + json.dumps(answer), flush=True)

    emit({name: importlib.metadata.version(name) for name in packages})
    for line in sys.stdin:
        request = json.loads(line)
        start = time.process_time()
        answer = {}
        if request.pop("task") == "top_p":
            top_p(**request)
        else:
            tokens = generate(**request)
            assert tokens.shape == (len(request["prompts"]), request["new"]), tokens.shape
            if request["greedy"]:
                answer["tokens"] = tokens.tolist()
        emit(answer | {"cpu_s": time.process_time() - start})


if __name__ == "__main__":
    main()
