"""The data sets as TFDS builders (array_record only, no TensorFlow).

The user's files are under `data.dir` (sources.py says what a row must have):

    sciknoweval-{biology,chemistry,material,physics}/{train,test}.json
    tooluse/{train,test}.json
    eval/{aime24,aime25,amc23,math500,gsm8k_train,gsm8k_test}.jsonl

Prepared copies are under $XDG_CACHE_HOME (or ~/.cache), keyed by the content of the files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import tensorflow_datasets as tfds
from absl import logging

from rosd_jax.data import sources
from rosd_jax.errors import UserError
from rosd_jax.rewards import tooluse


@dataclasses.dataclass(eq=False)
class SetConfig(tfds.core.BuilderConfig):
    """A TFDS config with the name by which `load_problems` knows the set."""

    set_name: str = ""


class _TextBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Common to all builders: one schema with text fields only, and rows in file order."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Give the folder that `data.dir` names as manual_dir."
    # TFDS 4.9.10 looks for it with importlib_resources, which it installs only below Python 3.9.
    code_path = None

    def _info(self) -> tfds.core.DatasetInfo:
        features = {field: tfds.features.Text() for field in sources.FIELDS}
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        assert isinstance(self.builder_config, SetConfig)
        name = self.builder_config.set_name
        files = sources.present(name, os.fspath(dl_manager.manual_dir))
        # Everything is read before TFDS writes, so a malformed row leaves no file behind.
        read = {split: sources.read_examples(name, split, path) for split, path in files.items()}
        return {split: self._generate_examples(examples) for split, examples in read.items()}

    def _generate_examples(self, examples: list[sources.Example]) -> Iterator[tuple[int, dict]]:
        yield from enumerate(examples)


class SciKnowEval(_TextBuilder):
    """SciKnowEval, level 3, multiple choice in four domains (arXiv 2406.09098)."""

    BUILDER_CONFIGS = [SetConfig(name=name, set_name=name) for name in sources.SCIENCE]


class ToolUse(_TextBuilder):
    """Tool calls from ToolAlpaca (arXiv 2306.05301)."""

    BUILDER_CONFIGS = [SetConfig(name="tooluse", set_name="tooluse")]


class MathEval(_TextBuilder):
    """AIME 2024 and 2025, AMC 2023, MATH-500 and GSM8K, each problem followed by sources.MATH_REQUEST."""

    BUILDER_CONFIGS = [SetConfig(name=name, set_name=name) for name in (*sources.CONTESTS, "gsm8k")]


class Jsonl(_TextBuilder):
    """A user's own file or folder: config=SetConfig(name="file", set_name="jsonl:PATH")."""


def _builder(name: str, directory: Path) -> tfds.core.GeneratorBasedBuilder:
    where = {"data_dir": os.fspath(directory), "file_format": "array_record"}
    if sources.own_path(name):
        return Jsonl(config=SetConfig(name="file", set_name=name), **where)
    classes = (SciKnowEval, ToolUse, MathEval)
    owner = next(c for c in classes if name in {config.name for config in c.BUILDER_CONFIGS})
    return owner(config=name, **where)


def read_prepared(name: str, split: str, folder: str) -> list[sources.Example]:
    """The rows of a set from its prepared copy, which is made if there is none.

    Raises UserError for a malformed row and for a copy that is damaged or cannot be written.
    """
    final = _cache() / _content_key(name, folder)
    with _quiet():
        if not final.is_dir():
            _fill_cache(name, folder, final)
        try:
            return _read(_builder(name, final), split)
        except Exception as error:  # TFDS and array_record raise errors of any type on damaged files
            raise UserError(
                f"the prepared copy {final} is damaged ({type(error).__name__}); "
                "delete that folder, and the next run prepares it again"
            ) from error


def _read(builder: tfds.core.GeneratorBasedBuilder, split: str) -> list[sources.Example]:
    source = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    return [{field: row[field].decode("utf-8") for field in sources.FIELDS} for row in source]


def _fill_cache(name: str, folder: str, final: Path) -> None:
    # All rows are read first, so a malformed one is found before the cache is touched.
    files = sources.present(name, folder).items()
    expected = {split: sources.read_examples(name, split, path) for split, path in files}
    try:
        _prepare(name, folder, final, expected)
    except OSError as error:
        raise UserError(
            f"the data cache {final.parent} cannot be written ({error.strerror or error}); "
            "set XDG_CACHE_HOME to a folder that can"
        ) from error


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "rosd_jax", "tfds")


def _content_key(name: str, folder: str) -> str:
    """A hash of the data files and of the code that reads them, so a change of either changes the key."""
    digest = hashlib.sha256(name.encode("utf-8"))
    code = {"reader": Path(sources.__file__), "calls": Path(tooluse.__file__), "builder": Path(__file__)}
    for label, path in (code | sources.present(name, folder)).items():
        content = sources.file_bytes(path)
        digest.update(f"\0{label}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:24]


def _prepare(name: str, folder: str, final: Path, expected: dict[str, list[sources.Example]]) -> None:
    """Prepares a copy in a temporary folder, compares it with `expected`, and renames it into place.

    So a killed or concurrent run never leaves half a copy.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    config = tfds.download.DownloadConfig(manual_dir=folder, try_download_gcs=False)
    with tempfile.TemporaryDirectory(dir=final.parent, prefix="unfinished-") as aside:
        made = Path(aside, "data")
        builder = _builder(name, made)
        builder.download_and_prepare(download_config=config)
        # TFDS takes the length from its own metadata, and some of its writers lose rows.
        for split, examples in expected.items():
            if _read(builder, split) != examples:
                raise RuntimeError(f"TFDS did not keep the {split} rows of {name}")
        try:
            made.rename(final)
        except OSError as error:
            # Another run finished first, and its copy is the same.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses what TFDS prints, its progress bars, and warnings that do not matter here."""
    verbosity = logging.get_verbosity()
    tfds.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
