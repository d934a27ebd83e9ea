"""Reads a GGUF file of a Llama model and writes it as a Hugging Face directory, for tests alone.

Of GGML's storage types it knows float32, q4_1 and q8_0. llama.cpp turns neighbouring dimensions of queries
and keys, Hugging Face the two halves of a head, so their rows are put back into that order.
"""

import json
import struct
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
BLOCK = 32  # weights that share a scale
F32, Q4_1, Q8_0 = 0, 3, 8
BYTES = {F32: 4 * BLOCK, Q4_1: 4 + BLOCK // 2, Q8_0: 2 + BLOCK}  # of a block
NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # a token's type


class Reader:
    """Little-endian values of a byte string, one behind the other."""

    def __init__(self, data: bytes):
        self.data, self.at = data, 0

    def scalar(self, code: str):
        value = struct.unpack_from("<" + code, self.data, self.at)[0]
        self.at += struct.calcsize("<" + code)
        return value

    def text(self) -> str:
        size = self.scalar("Q")
        self.at += size
        return self.data[self.at - size : self.at].decode()

    def value(self, kind: int):
        if kind == TEXT:
            return self.text()
        if kind == ARRAY:
            inner, count = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(count)]
        return self.scalar(SCALARS[kind])


def read(path: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The file's fields, and its tensors in float32."""
    reader = Reader(path.read_bytes())
    assert reader.scalar("I") == int.from_bytes(b"GGUF", "little") and reader.scalar("I") == 3
    count, pairs = reader.scalar("Q"), reader.scalar("Q")
    fields = {}
    for _ in range(pairs):
        name = reader.text()
        fields[name] = reader.value(reader.scalar("I"))
    table = []
    for _ in range(count):
        name = reader.text()
        shape = [reader.scalar("Q") for _ in range(reader.scalar("I"))][::-1]
        table.append((name, shape, reader.scalar("I"), reader.scalar("Q")))
    alignment = fields.get("general.alignment", 32)
    first = -(-reader.at // alignment) * alignment
    tensors = {}
    for name, shape, kind, offset in table:
        size = int(np.prod(shape)) // BLOCK * BYTES[kind]
        blocks = np.frombuffer(reader.data, np.uint8, size, first + offset).reshape(-1, BYTES[kind])
        tensors[name] = unpacked(blocks, kind).reshape(shape)
    return fields, tensors


def unpacked(blocks: np.ndarray, kind: int) -> np.ndarray:
    """Blocks of bytes as float32 [blocks, BLOCK]."""
    if kind == F32:
        return np.ascontiguousarray(blocks).view(np.float32)

    def half(columns):
        return np.ascontiguousarray(columns).view(np.float16).astype(np.float32)

    if kind == Q8_0:
        return half(blocks[:, :2]) * np.ascontiguousarray(blocks[:, 2:]).view(np.int8)
    scale, least, packed = half(blocks[:, :2]), half(blocks[:, 2:4]), blocks[:, 4:]
    return scale * np.concatenate([packed & 15, packed >> 4], axis=1) + least


def halves(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys, from neighbouring pairs to the two halves of a head."""
    return rows.reshape(heads, -1, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)


def write_hugging_face(source: Path, folder: Path) -> None:
    """config.json, weights, tokenizer and chat template of a GGUF file of a Llama model with tied head."""
    fields, tensors = read(source)
    llama = {name.removeprefix("llama."): value for name, value in fields.items()}
    heads, groups = llama["attention.head_count"], llama["attention.head_count_kv"]
    stored = {
        "model.embed_tokens.weight": tensors.pop("token_embd.weight"),
        "model.norm.weight": tensors.pop("output_norm.weight"),
    }
    for name, value in tensors.items():
        _, layer, part, _ = name.split(".")
        if part in ("attn_q", "attn_k"):
            value = halves(value, heads if part == "attn_q" else groups)
        stored[f"model.layers.{layer}.{NAMES[part]}.weight"] = np.ascontiguousarray(value)
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_act="silu",
        tie_word_embeddings=True,
        vocab_size=len(stored["model.embed_tokens.weight"]),
        hidden_size=llama["embedding_length"],
        intermediate_size=llama["feed_forward_length"],
        num_hidden_layers=llama["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=groups,
        rope_theta=llama["rope.freq_base"],
        rms_norm_eps=llama["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=llama["context_length"],
        rope_scaling=None,
        attention_bias=False,
        mlp_bias=False,
    )
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(fields, folder)


def write_tokenizer(fields: dict, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json of a byte-level vocabulary that splits numbers into digits."""
    ggml = {name.removeprefix("tokenizer.ggml."): value for name, value in fields.items()}
    assert (ggml["model"], ggml["pre"]) == ("gpt2", "smollm")
    vocabulary = {token: i for i, token in enumerate(ggml["tokens"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [tuple(pair.split(" ")) for pair in ggml["merges"]]))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(ggml["tokens"], ggml["token_type"], strict=True)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t, kind in kinds if kind == CONTROL])
    tokenizer.save(str(folder / "tokenizer.json"))
    fields_of = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    settings = {name: ggml["tokens"][ggml[field]] for name, field in fields_of.items()}
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings["chat_template"] = fields["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
