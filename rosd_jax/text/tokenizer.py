"""A model's tokenizer: from messages to ids, and from ids to text and exact character offsets.

Two rules hold everywhere. Text inside a message never becomes a control token, whatever it contains. Offsets
come from the sampled ids themselves: text is never tokenised again to find the place of a token, because a
sampled tokenisation may differ from the canonical one.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers.decoders import ByteLevel, Fuse

# It would advise to install PyTorch, which is not needed.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
from transformers import AutoConfig, AutoTokenizer  # noqa: E402

from rosd_jax.errors import UserError  # noqa: E402
from rosd_jax.models.files import REMEDY, wrong  # noqa: E402
from rosd_jax.text.thinking import CLOSE, OPEN  # noqa: E402
from rosd_jax.text.tokenizer_files import (  # noqa: E402
    GENERATION,
    TEMPLATE,
    TOKENIZER_CONFIG,
    check_files,
    copy_files,
    eos_ids,
    repair,
    state_stop_ids,
)
from rosd_jax.types import Message  # noqa: E402

# Words, numbers, marks, white space and other scripts, to identify how a tokenizer splits text.
PROBE = "The 3 foxes' 1,024 naps:\n\n\tx_1 = -(a + b)^2 / 7.5e-3  # na\u00efve \u4e2d\u6587 \U0001f600"
TODAY = "26 Jul 2024"  # given to every template, so that a run resumed on another day has the same prompts
SURROGATE = re.compile("[\ud800-\udfff]")
LEFT_CONTEXT = 4  # tokens before a token, with which a decoder is asked for its text


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Reads tokenizer and chat template of a Hugging Face directory, without network or remote code.

    Raises UserError if the directory, tokenizer, chat template or end token is missing, and for a malformed
    file or field.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"model.path is {str(path)!r}; it must be a directory, so check the path")
    if not (path / "tokenizer.json").is_file() and not (path / "vocab.json").is_file():
        raise UserError(
            f"model.path is {str(path)!r}, which holds no tokenizer; add tokenizer.json and "
            "tokenizer_config.json"
        )
    check_files(path)
    try:
        inner = _load(path)
    except Exception as error:
        raise _explain(path, error) from error
    if getattr(inner, "backend_tokenizer", None) is None:
        raise UserError(
            f"model.path is {str(path)!r}; its tokenizer must be a fast one, so add tokenizer.json"
        )
    _check_template(inner.chat_template, path)
    return Tokenizer(inner, _stop_ids(inner, path), path)


def _load(path: Path) -> Any:
    inner = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    inner.encode("")  # some settings are read here only
    return inner


def _explain(path: Path, error: Exception) -> UserError:
    """The error for a tokenizer that does not load, naming the file at fault."""
    table = path / "tokenizer.json"
    try:
        if table.is_file():
            Backend.from_file(str(table))
    except Exception as cause:
        return UserError(f"{table} is not a tokenizer file ({_one_line(cause)}); {REMEDY}")
    try:
        AutoConfig.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError):
        pass  # a tokenizer loads without it
    except Exception as cause:
        return UserError(f"{path / 'config.json'} is not a model config ({_one_line(cause)}); {REMEDY}")
    return UserError(
        f"{path / TOKENIZER_CONFIG} gives no tokenizer with {table.name} ({_one_line(error)}); {REMEDY}"
    )


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_template(template: Any, path: Path) -> None:
    """Raises UserError if there is no template. Of several named ones, transformers renders the default."""
    text = template.get("default") if isinstance(template, dict) else template
    if not text:
        raise UserError(f"{path} holds no chat template; add {TEMPLATE}")


@dataclass(frozen=True)
class Tokenizer:
    """A loaded tokenizer. `inner` is the transformers object, which only this module uses."""

    inner: Any
    stop_ids: tuple[int, ...]  # each of them ends a response
    source: Path  # the directory that it was read from

    @property
    def num_tokens(self) -> int:
        """The number of ids in use. Further rows of the embedding are padding and never sampled."""
        return len(self.inner)

    def unknown_share(self, ids: Iterable[Sequence[int]]) -> float:
        """The share of unknown tokens, which stand for text outside the vocabulary; 0 if there are none."""
        unknown = self.inner.unk_token_id
        tokens = [token for row in ids for token in row]
        return tokens.count(unknown) / len(tokens) if tokens else 0.0

    def render(self, messages: Iterable[Message], thinking: bool) -> str:
        """The chat template's text, up to where the assistant begins to write.

        Templates of Llama 3 state a date; the newer ones state today's unless they are given one. They are
        given TODAY, which the older ones state. Raises UserError if the template fails.
        """
        try:
            return self.inner.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=thinking,
                date_string=TODAY,
            )
        except Exception as error:  # a template is a program that comes with the model
            raise UserError(
                f"the chat template of {self.source} fails on a prompt ({_one_line(error)}); {REMEDY}"
            ) from error

    def opens_thinking(self, thinking: bool) -> bool:
        """Whether the template opens a `<think>` for the assistant and leaves it open."""
        probe = "probe"
        begun = self.render([{"role": "user", "content": probe}], thinking).rpartition(probe)[2]
        _, opened, inside = begun.rpartition(OPEN)
        return bool(opened) and CLOSE not in inside

    def encode_chats(self, chats: Iterable[Iterable[Message]], *, thinking: bool) -> list[list[int]]:
        """Ids of `render` for each chat, with control tokens from the template only. Uses all cores.

        Equal to `apply_chat_template(tokenize=True)` unless a message contains the string of a control
        token, which is encoded as plain text.
        """
        control = self._control()
        pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        encoded: list[list[int] | None] = []
        texts = []
        for chat in chats:
            messages = [{**m, "content": _well_formed(m["content"])} for m in chat]
            if any(pattern.search(m["content"]) for m in messages):
                encoded.append(self._with_hidden_control(messages, thinking, control, pattern))
            else:
                encoded.append(None)
                texts.append(self.render(messages, thinking))
        # transformers' own call for many texts takes twice the time, since it also computes offsets.
        backend = self.inner.backend_tokenizer
        backend.encode_special_tokens = self.inner.split_special_tokens  # `encode` changes it
        plain = iter(backend.encode_batch_fast(texts, add_special_tokens=False))
        return [next(plain).ids if ids is None else ids for ids in encoded]

    def _with_hidden_control(
        self, messages: list[Message], thinking: bool, control: dict[str, int], pattern: re.Pattern[str]
    ) -> list[int]:
        """Ids of a chat whose messages contain strings of control tokens: strings that match `pattern`."""
        mark = _unused_character("".join(m["content"] for m in messages))
        names = {token: string for string, token in control.items()}

        def hide(text: str) -> str:
            return pattern.sub(lambda match: f"{mark}{control[match[0]]}{mark}", text)

        def show(text: str) -> str:
            return re.sub(f"{mark}(\\d+){mark}", lambda match: names[int(match[1])], text)

        hidden = [{**m, "content": hide(m["content"])} for m in messages]
        ids: list[int] = []
        for piece in re.split(f"({pattern.pattern})", self.render(hidden, thinking)):
            ids += [control[piece]] if piece in control else self.encode(show(piece))
        return ids

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. No string in it becomes a control token, and none are added around it."""
        return self.inner.encode(_well_formed(text), add_special_tokens=False, split_special_tokens=True)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids without control tokens; `<think>` stays. Invalid bytes become U+FFFD."""
        return self.decode_all([ids])[0]

    def decode_all(self, rows: Iterable[Sequence[int] | np.ndarray]) -> list[str]:
        """`decode` of each row. Uses all cores."""
        ids = [np.asarray(row, np.int64).tolist() for row in rows]
        return self.inner.backend_tokenizer.decode_batch(ids, skip_special_tokens=True)

    def offsets(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Characters [start, stop) of each token in `decode(ids)`: int64 [len(ids), 2].

        A character whose bytes are split over several tokens belongs to each of them. Control tokens have
        empty spans. Takes time linear in the text for byte-level tokenizers, and for others whose decoder
        needs at most `LEFT_CONTEXT` tokens to the left; quadratic for the rest.
        """
        ids = [int(i) for i in ids]
        control = set(self._control().values())
        if isinstance(self.inner.backend_tokenizer.decoder, ByteLevel):
            name = self.inner.backend_tokenizer.id_to_token
            data = {i: b"" if i in control else _token_bytes(name(i) or "") for i in set(ids)}
            return _byte_spans([data[i] for i in ids])
        kept = [k for k, i in enumerate(ids) if i not in control]
        ends = np.zeros(len(ids) + 1, np.int64)
        ends[np.array(kept, np.int64) + 1] = _text_ends(self.decode, [ids[k] for k in kept])
        ends = np.maximum.accumulate(ends)
        return np.stack([ends[:-1], ends[1:]], axis=1)

    def fingerprint(self) -> str:
        """Eight hex digits that identify vocabulary, chat template, stop ids and how text is split.

        Computed from the loaded tokenizer, so a copy of it elsewhere has the same digits.
        """
        vocabulary = sorted(self.inner.get_vocab().items())
        parts = [vocabulary, self.inner.chat_template, self.stop_ids, self.encode(PROBE)]
        return f"{zlib.crc32(json.dumps(parts, sort_keys=True).encode()):08x}"

    def pieces(self, shown: Sequence[str] = ()) -> list[bytes]:
        """The bytes that each id adds to the text of `decode`: none for control tokens, except those `shown`.

        Raises UserError if they depend on the tokens around it, as with SentencePiece.
        """
        decoder = self.inner.backend_tokenizer.decoder
        if not isinstance(decoder, ByteLevel | Fuse):
            raise UserError(
                "rollout.stop needs a tokenizer whose decoder is ByteLevel or Fuse, and that of model.path "
                f"is {type(decoder).__name__}; leave rollout.stop empty"
            )
        to_bytes = _token_bytes if isinstance(decoder, ByteLevel) else str.encode
        hidden = {i for string, i in self._control().items() if string not in shown}
        names = map(self.inner.backend_tokenizer.id_to_token, range(self.num_tokens))
        return [b"" if i in hidden else to_bytes(name or "") for i, name in enumerate(names)]

    def save(self, path: str | Path) -> None:
        """Copies the tokenizer's files into a directory that transformers 4 and 5 can read.

        The generation_config.json there names all of `stop_ids`. Raises UserError if a file cannot be read or
        written.
        """
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            copy_files(self.source, folder)
            repair(folder, type(self.inner).__name__, self.inner.special_tokens_map)
            state_stop_ids(folder, self.stop_ids)
            if not (folder / "tokenizer.json").exists():
                self.inner.backend_tokenizer.save(str(folder / "tokenizer.json"))
        except OSError as error:
            raise UserError(
                f"the tokenizer of {self.source} cannot be copied to {folder} ({error}); free disk space "
                "or choose another directory"
            ) from error

    def _control(self) -> dict[str, int]:
        """String -> id of the tokens that `decode` removes."""
        added = self.inner.added_tokens_decoder
        return {token.content: int(i) for i, token in added.items() if token.special}


def _stop_ids(inner: Any, path: Path) -> tuple[int, ...]:
    """Every id that one of the model's files calls an end.

    These are the end token, the ids in generation_config.json and config.json, and the padding token.
    """
    if inner.eos_token_id is None:
        raise wrong(path / TOKENIZER_CONFIG, "eos_token", None, "the token that ends a message")
    listed = [inner.eos_token_id]
    for name in (GENERATION, "config.json"):
        listed += eos_ids(path / name, len(inner))
    if inner.pad_token_id is not None:
        listed.append(inner.pad_token_id)
    return tuple(dict.fromkeys(listed))


def _well_formed(text: str) -> str:
    """Joins surrogate pairs, and replaces unpaired ones, which no encoder accepts, by U+FFFD."""
    if not SURROGATE.search(text):
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _unused_character(text: str) -> str:
    used = set(text)
    return next(chr(c) for c in range(0xE000, 0x110000) if chr(c) not in used)


def _byte_alphabet() -> dict[str, int]:
    """Character -> byte in byte-level vocabularies (GPT-2), where printable bytes stand for themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + n): b for n, b in enumerate(others)}


ALPHABET = _byte_alphabet()


@cache
def _token_bytes(token: str) -> bytes:
    # An added token may have characters outside the alphabet; then it is itself.
    if all(c in ALPHABET for c in token):
        return bytes(ALPHABET[c] for c in token)
    return token.encode()


def _byte_spans(pieces: list[bytes]) -> np.ndarray:
    data = b"".join(pieces)
    widths = _char_widths(data)
    char_of_byte = np.append(np.repeat(np.arange(len(widths)), widths), len(widths))
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    stop_byte = np.cumsum(sizes)
    start = char_of_byte[stop_byte - sizes]
    stop = np.where(sizes > 0, char_of_byte[stop_byte - 1] + 1, start)
    return np.stack([start, stop], axis=1).astype(np.int64)


def _char_widths(data: bytes) -> np.ndarray:
    """The number of bytes of each character of `data.decode("utf-8", "replace")`."""
    text = data.decode("utf-8", "replace")
    code = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (code > 0x7F).astype(np.int64) + (code > 0x7FF) + (code > 0xFFFF)
    starts = np.cumsum(widths) - widths
    shift = 0
    for k in np.flatnonzero(code == 0xFFFD):
        at = int(starts[k]) - shift
        width = _replaced_width(data[at : at + 4])
        shift += int(widths[k]) - width
        widths[k] = width
    return widths


def _replaced_width(head: bytes) -> int:
    """The number of bytes of a U+FFFD at `head`: its own three, or a maximal invalid sequence."""
    if head.startswith(b"\xef\xbf\xbd"):
        return 3
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.end
    raise AssertionError("a replacement character stands for invalid bytes")


def _text_ends(decode: Callable[[list[int]], str], ids: list[int]) -> list[int]:
    """The end of each token in `decode(ids)`, for a decoder of any kind."""
    text = decode(ids)
    pieces = []
    for k in range(len(ids)):
        window = ids[max(0, k - LEFT_CONTEXT) : k + 1]
        before = decode(window[:-1])
        after = decode(window)
        pieces.append(after[len(before) :] if after.startswith(before) else "\0")
    if "".join(pieces) == text:
        return np.cumsum([len(piece) for piece in pieces]).tolist()
    ends = [0]
    for k in range(1, len(ids) + 1):
        shared = len(os.path.commonprefix([decode(ids[:k]), text]))
        ends.append(max(ends[-1], shared))
    return ends[1:]
