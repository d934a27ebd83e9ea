"""Model directories and files of rows made as the words of a reported case describe them.

Every reader fails on a description that it does not understand.
"""

import ast
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from support import ROOT, data_dir

FILE_OF = {"weight_map": "model.safetensors.index.json", "eos_token_id": "generation_config.json"}


def copy_of(source: Path, tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(source, path)
    for file in path.rglob("*"):
        file.chmod(0o644)
    return path


def edit(path: Path, **fields) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(content | fields))


def qwen3_directory(tmp_path: Path, template: str = "chat_template.qwen3-0.6B.jinja") -> Path:
    path = copy_of(data_dir("qwen3_tokenizer"), tmp_path)
    shutil.copy(path / template, path / "chat_template.jinja")
    return path


def sharded(path: Path) -> None:
    """Gives a model directory an index, so that it is what is read."""
    names = list(safe_open(path / "model.safetensors", "np").keys())
    part = "model-00001-of-00001.safetensors"
    (path / "model.safetensors").rename(path / part)
    edit(path / "model.safetensors.index.json", weight_map=dict.fromkeys(names, part))


def value_of(words: str) -> Any:
    """JSON, else Python's spelling of it, else the words themselves."""
    for read in (json.loads, ast.literal_eval):
        try:
            return read(words)
        except (ValueError, SyntaxError):
            pass
    return {"a list": [], "a string": "x", "a number": 5, "an object": {}}.get(words, words.strip("\"'"))


def change(path: Path, words: str) -> tuple[str, str]:
    """Changes `FILE JSON`, `FILE field=value`, `field: value` or `FILE without field`; gives both names."""
    named = re.search(r"[\w.]*\.json", words)
    rest = re.sub(r"-like \w+$", "", words[named.end() :] if named else words).strip(" :,;")
    rest = re.sub(r"^(?:with|is|has|holds|holding|=)\s+", "", rest)
    assigned = re.match(r"([\w.]+)\s*(?:[=:]|\bis\b|(?= null\b))\s*(.+)$", rest, re.DOTALL)
    dropped = re.match(r"(?:without |no )([\w.]+)$|([\w.]+) (?:missing|removed|absent)$", rest)
    field = assigned[1] if assigned else (dropped[1] or dropped[2]) if dropped else ""
    file = path / (named[0] if named else FILE_OF.get(field, "config.json"))
    if "index" in file.name:
        sharded(path)
    content = json.loads(file.read_text()) if file.exists() else {}
    if not field:
        new = value_of(rest)
        content = content | new if isinstance(content, dict) and isinstance(new, dict) and new else new
        field = next(iter(new), "") if isinstance(new, dict) else ""
    else:
        *above, last = field.split(".")
        holder = content
        for name in above:
            holder = holder.setdefault(name, {})
        if assigned:
            holder[last] = value_of(assigned[2])
        else:
            assert last in holder, f"no reader for {words!r}"
            holder.pop(last)
    file.write_text(json.dumps(content))
    return file.name, field


def token_of(name: str, words: str) -> str | None:
    """`eos=TOKEN`, `eos=pad=TOKEN`, `eos null`, `no eos_token`: what the tokenizer's config says."""
    said = re.search(rf"\b{name}(?:_token)?\s*=\s*(?:\w+\s*=\s*)?[\"']?(<\|\w+\|>|null)", words)
    none = re.search(rf"\b{name}(?:_token)?\s*(?:=|is)?\s*null|\b(?:no|without) {name}(?:_token)?\b", words)
    if not (said or none) and name == "eos":
        pytest.fail(f"no reader for {words!r}")
    return None if none or not said else said[1]


def written_out(row: str) -> str:
    """`1000...(401 digits)` with all its digits."""
    digits = re.search(r"(\d+)\.\.\.\s?\((\d+) digits\)", row)
    return row.replace(digits[0], digits[1].ljust(int(digits[2]), "0")) if digits else row


def exported_from(words: str, tmp_path: Path) -> Path:
    """`models/gym`, `Qwen3 tokenizer, hybrid template`, `no tokenizer_class, no config.json`, ..."""
    bare = re.findall(r"\b(?:no|without) ([\w.]+)", words)
    if "gym" in words or ("Qwen" not in words and bare):
        path = copy_of(ROOT / "models" / "gym", tmp_path)
    elif "Qwen" in words:
        old = "chat_template.qwen2.5-7B.jinja"
        path = qwen3_directory(tmp_path, *[old] if "2.5" in words else [])
    else:
        pytest.fail(f"no reader for {words!r}")
    if "2507" in words:
        (path / "chat_template.jinja").unlink()
        shutil.copy(path / "tokenizer_config.qwen3-4b-2507.json", path / "tokenizer_config.json")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    for name in bare:
        if (path / name).suffix:
            (path / name).unlink(missing_ok=True)
        else:
            settings.pop(name, None)
    for field, value in re.findall(r"\b(tokenizer_class|extra_special_tokens)\s*[=:]\s*(\[.*?\]|\w+)", words):
        settings[field] = value_of(value)
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


def change_rows(file: Path, words: str) -> bool:
    """Whether the words say how the rows of a file changed; if so, they did."""
    lines = file.read_text().splitlines()
    first = json.loads(lines[0])
    if re.search(r"gold|answer", words):
        lines[0] = json.dumps(first | {"answer": "99"})
    elif re.search(r"prompt|question|problem|edited", words):
        lines[0] = json.dumps(first | {"prompt": "What is 90 + 9?"})
    elif re.search(r"append|added|more rows|longer", words):
        lines.append(lines[0])
    elif re.search(r"remove|delete|dropped|fewer|truncated|shorter", words):
        lines.pop()
    elif re.search(r"order|shuffl|swap|sorted", words):
        lines.reverse()
    elif re.search(r"changed|replaced|another|other", words):
        lines = [json.dumps(json.loads(line) | {"answer": "99"}) for line in lines]
    else:
        return False
    file.write_text("\n".join(lines) + "\n")
    return True


def change_tokenizer(model: Path, words: str) -> bool:
    settings = json.loads((model / "tokenizer_config.json").read_text())
    if "template" in words:
        edit(model / "tokenizer_config.json", chat_template=settings["chat_template"] + " ")
    elif re.search(r"eos|stop|generation_config", words):
        edit(model / "generation_config.json", eos_token_id=[2, 5])
    elif "tokenizer" in words:
        table = json.loads((model / "tokenizer.json").read_text())
        vocabulary = table["model"]["vocab"]
        first, second = list(vocabulary)[-2:]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
        (model / "tokenizer.json").write_text(json.dumps(table))
    else:
        return False
    return True
