"""What `--config` takes: an experiment's file, and overrides of its fields. Each mistake is one sentence.

use(flag)         makes a flag of ml_collections load files and read lists as this module does
explain(error)    -> one sentence about an error of absl's or ml_collections'
"""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType

from absl import flags
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import tuple_parser

from rosd_jax import shipped
from rosd_jax.errors import UserError
from rosd_jax.fields import check_name, mistyped, shown

MODULE = "config_config"  # the name under which ml_collections imports the file of a flag --config
OVERRIDE = re.compile(r"-{1,2}(?:no)?config\.([^=]*)")
REFUSED = re.compile(r"flag --config\.([^=]*)=(.*)", re.DOTALL)  # how absl's sentence on a value begins
CLOSING = {"(": ")", "[": "]", "'": "'", '"': '"'}
PASS = (
    "pass a Python file with a get_config that returns a ConfigDict, such as --config=configs/quickstart.py"
)


class ConfigFile(flags.ArgumentParser):
    """Loads PATH.py[:VARIANT,...] and returns the locked config of its get_config.

    ml_collections' own parser hides some exceptions of the file and prints the traceback of others.
    """

    def __init__(self, argv: Sequence[str]) -> None:
        self._argv = argv

    def parse(self, argument: str) -> ConfigDict:
        """Raises UserError, with file and line, if the file cannot be loaded or its code raises.

        Also for an override on the command line that names no field, since ml_collections, which reads the
        overrides next, names no section.
        """
        name, colon, variant = argument.partition(":")
        path = shipped.find(name)
        if not _is_file(path):
            raise UserError(f"--config names {shown(name)}, which is no file; {PASS}")
        arguments = (variant,) if colon else ()
        try:
            config = _load(path).get_config(*arguments)
            if isinstance(config, ConfigDict):
                config.lock()  # raises for a required placeholder
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            raise UserError(_where_it_raised(path, error)) from error
        if not isinstance(config, ConfigDict):
            raise UserError(
                f"{path}: get_config returns {shown(config)}; it must return a ConfigDict, such as "
                "default_config() of rosd_jax.config"
            )
        _check_overrides(flags.FLAGS.read_flags_from_files(self._argv, force_gnu=False))
        return config


class Strings(tuple_parser.TupleParser):
    """A list of strings: `a,b`, or Python such as `('a, b', 'c')` where a string contains a comma."""

    def parse(self, argument: str | Sequence[str] | None) -> tuple[str, ...]:
        """Raises ValueError for a list that opens a bracket or a quote and does not close it."""
        if isinstance(argument, str):
            return _strings(argument)
        # A flag that is given several times lists the strings of all.
        return tuple(text for part in argument or () for text in _strings(part))


def use(flag: flags.FlagHolder, argv: Sequence[str]) -> None:
    """Makes a flag of `config_flags.DEFINE_config_file` parse files and lists of strings as above.

    argv: its sys_argv, the command line.
    """
    flags.FLAGS[flag.name].parser = ConfigFile(argv)
    config_flags.register_flag_parser_for_type(tuple, Strings())


def explain(error: BaseException) -> str:
    """One sentence for an error of absl's or ml_collections', which may wrap a UserError."""
    chain = list(_chain(error))
    user_errors = [e for e in chain if isinstance(e, UserError)]
    if user_errors:
        return str(user_errors[-1])
    if isinstance(error, flags.DuplicateFlagError):
        # A second --config defines the flags of the overrides again.
        return "--config is given more than once; give it once"
    if isinstance(error, KeyError):
        # An override of a field that the file's config lacks.
        return f"the config of --config has no {error.args[0]}; start it from default_config()"
    refused = REFUSED.match(str(error))
    if refused and isinstance(error, flags.IllegalFlagValueError):
        text = refused[2].removesuffix(f": {chain[1]}") if len(chain) > 1 else refused[2]
        return str(mistyped(refused[1], text))
    return f"the command line does not parse: {' '.join(str(error).split())}"


def _check_overrides(argv: Sequence[str]) -> None:
    """Raises UserError for the first --config.FIELD on the command line that names no field."""
    for argument in argv:
        if override := OVERRIDE.match(argument):
            check_name(override[1])


def _is_file(path: str) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a path that is too long
        return False


def _load(path: str) -> ModuleType:
    """The module of a file, whatever its name ends in."""
    loader = SourceFileLoader(MODULE, path)
    spec = importlib.util.spec_from_file_location(MODULE, path, loader=loader)
    assert spec is not None  # which it only is for an unknown suffix without a loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[MODULE] = module  # dataclasses look their module up
    loader.exec_module(module)
    return module


def _where_it_raised(path: str, error: BaseException) -> str:
    """File, line, class and words of an exception that a config file raised."""
    if isinstance(error, AttributeError) and error.name == "get_config" and error.obj is sys.modules[MODULE]:
        return f"{path} has no get_config; {PASS}"
    if isinstance(error, SyntaxError) and error.filename == path:
        line = error.lineno
        words = error.msg
    else:
        line = _last_line(path, error.__traceback__)
        words = _words(error)
    where = path if line is None else f"{path} line {line}"
    words = " ".join([f"{type(error).__name__}:", *words.split()]).removesuffix(":")
    return f"{where} raises {shown(words, quoted=False)}; correct it, or pass another --config"


def _words(error: BaseException) -> str:
    """What an exception says. A KeyError prints its message with quotes, also inside another error."""
    only = error.args[0] if len(error.args) == 1 else None
    if isinstance(only, BaseException):
        return _words(only)
    if isinstance(error, KeyError) and isinstance(only, str) and " " in only:
        return only
    return str(error)


def _last_line(path: str, traceback: TracebackType | None) -> int | None:
    """The line of the file in which an exception was on its way, the innermost one."""
    line = None
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == path:
            line = traceback.tb_lineno
        traceback = traceback.tb_next
    return line


def _strings(text: str) -> tuple[str, ...]:
    if text[:1] in CLOSING:
        try:
            given = ast.literal_eval(text)
        except (SyntaxError, ValueError):
            pass
        else:
            return tuple(given) if isinstance(given, list | tuple) else (given,)
    parts = tuple(text.split(",")) if text else ()
    if len(parts) > 1 and text[0] in CLOSING and CLOSING[text[0]] not in parts[0][1:]:
        raise ValueError(f"{text[0]} is not closed")
    return parts


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or link.__context__
