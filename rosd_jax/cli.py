"""Trains, evaluates, plans or reports one experiment.

    rosd --config=configs/NAME.py[:VARIANT,...] [--workdir=DIR] [--mode=train|eval|localize|plan|data|report]
         [--profile] [--config.FIELD=VALUE ...]
    rosd --mode=plan --topology=v5p:2x2x2 [--compile=all|STAGE,...] [--json] --config=...
    rosd --mode=localize --labels=FILE --config=... [--workdir=DIR]
    rosd --mode=report --workdir=DIR [--compare=DIR,...]

In a checkout, `python run.py` does the same as `rosd`. docs/running.md says more.

The same command on the same DIR resumes the run there. Without --config it uses the config stored in DIR.
The shipped configs (quickstart, ablations and qwen3_science in configs/) can be named in any directory.

On several hosts, start the same command on each (docs/pods.md). A TPU slice, SLURM and Open MPI are
recognised; elsewhere add --coordinator=HOST:PORT --processes=N --process=I.

Exit status
0        done
1        a fault of the program, with a traceback; or another host of the run failed, which is named
2        a mistake in config, model or data, named in one sentence
3        the run has ended by itself, because a number fell as far as `guard` allows
128 + N  stopped by signal N: 130 by Ctrl-C, 143 by SIGTERM. The first signal lets the current device call
         return and saves the last complete step; a second one ends the run at once. Neither loses what is
         written
141      nobody reads stdout any more, as after `rosd ... | head`
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

# Silence start-up messages of XLA, transformers and gRPC. They read these variables when they are imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")

from absl import flags, logging  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

import rosd_jax  # noqa: E402
from rosd_jax import config_file  # noqa: E402
from rosd_jax.config import validate  # noqa: E402
from rosd_jax.errors import UserError  # noqa: E402
from rosd_jax.fields import describe  # noqa: E402
from rosd_jax.hosts import place, supervisor  # noqa: E402
from rosd_jax.settings import Settings  # noqa: E402
from rosd_jax.train import stopping  # noqa: E402
from rosd_jax.train.console import Console  # noqa: E402

# The command line, from which the flag --config takes the overrides; read_flags fills it.
_ARGV: list[str] = []
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Experiment, e.g. configs/quickstart.py", sys_argv=_ARGV
)
config_file.use(_CONFIG, _ARGV)
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run (default: runs/NAME-TIME)")
_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "localize", "plan", "data", "report"], "What to do"
)
_TOPOLOGY = flags.DEFINE_string(
    "topology", "local", "Chips to plan for: local, a TPU slice such as v5p:2x2x2, or GPUs such as h100:8"
)
_COMPILE = flags.DEFINE_list("compile", [], "Stages that the plan compiles, separated by commas, or all")
_JSON = flags.DEFINE_bool("json", False, "Print the plan as one JSON object")
_LABELS = flags.DEFINE_string(
    "labels", None, "File of responses with known first errors, for --mode=localize"
)
_PROFILE = flags.DEFINE_bool("profile", False, "Write a trace of one training step to DIR/profile")
flags.DEFINE_list("compare", [], "Directories of other runs to report next to this one")
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, on several hosts without a known launcher")
flags.DEFINE_integer("processes", None, "How many processes, one per host, take part")
flags.DEFINE_integer("process", None, "Which of them this is, from 0")

HELP = ("-h", "-help", "--help", "--helpfull")
STORED_CONFIG = Path(__file__).resolve().parent / "train" / "stored.py"
MISSING = (
    "--config is missing; pass a file, such as --config=configs/quickstart.py, or the --workdir of an "
    "earlier run"
)


def main(argv: list[str]) -> int:
    """Runs the command and returns its exit status."""
    logging.set_verbosity(logging.WARNING)
    try:
        here = supervisor.given()
        if here is None and (here := place_of(argv)):
            return supervisor.supervise(here)
        obey(argv, here)
    except stopping.Stopped as stopped:
        stopping.tell(str(stopped))
        return stopped.status
    except BrokenPipeError:
        stopping.reader_left()
        return 128 + signal.SIGPIPE
    except UserError as error:
        return fail(str(error))
    except OSError as error:
        name = error.filename or "the workdir"
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return fail(f"{name} cannot be written ({error.strerror}); use another --workdir")
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            return crash(error)
        return fail(f"the disk of {name} is full; free some space and run the same command to resume")
    except Exception as error:
        return crash(error)
    return 0


def place_of(argv: list[str]) -> place.Place | None:
    """This process's place among those of several hosts; None for a run, or a mode, of one process."""
    given = peek(argv, "coordinator", "mode", numbers=("processes", "process"))
    if given["mode"].value in ("localize", "plan", "data", "report"):
        return None
    return place.find(given["coordinator"].value, given["processes"].value, given["process"].value)


def peek(argv: list[str], *names: str, numbers: Sequence[str] = ()) -> flags.FlagValues:
    """These flags alone, whatever the others are. Raises UserError for a number that is none."""
    given = flags.FlagValues()
    for name in names:
        flags.DEFINE_string(name, None, "", flag_values=given)
    for name in numbers:
        flags.DEFINE_integer(name, None, "", flag_values=given)
    try:
        given(argv, known_only=True)
    except flags.Error as error:
        raise UserError(config_file.explain(error)) from error
    return given


def obey(argv: list[str], here: place.Place | None) -> None:
    """Does what the command line asks for. Raises BrokenPipeError if nobody reads stdout any more."""
    try:
        if "--version" in argv[1:]:
            print(f"rosd_jax {rosd_jax.__version__}")
            return
        if set(argv[1:]) & set(HELP):
            print(__doc__, flags.FLAGS.module_help(__name__).partition(":\n")[2], sep="\n")
            return
        if peek(argv, "mode")["mode"].value == "report":
            report(argv)
            return
        config = validate(read_flags(argv))
        with open_console(here) as console:
            if _MODE.value != "plan":
                console.say(f"{config.name}: reads the model and the data")
            console.stage("loading JAX")
            run(config, here, console)
    finally:
        # A closed pipe must raise here, not as Python shuts down.
        sys.stdout.flush()


def open_console(here: place.Place | None) -> Console:
    """The console. Only the first process of a run prints its progress; a plan does so on stderr."""
    if _MODE.value == "plan":
        return Console(sys.stderr if _COMPILE.value or sys.stderr.isatty() else None)
    first = here is None or here.process == 0
    return Console(sys.stdout if first and _MODE.value in ("train", "eval", "localize") else None)


def report(argv: list[str]) -> None:
    """Makes the reports of a run again and prints them. It needs neither a config nor devices, nor JAX."""
    given = flags.FlagValues()
    for name in ("mode", "workdir"):
        flags.DEFINE_string(name, None, "", flag_values=given)
    flags.DEFINE_list("compare", [], "", flag_values=given)
    try:
        rest = given(argv)
    except flags.Error as error:
        raise UserError(
            f"{config_file.explain(error)}; --mode=report takes --workdir and --compare only"
        ) from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; flags are written --name=value")
    if not given["workdir"].value:
        raise UserError("--mode=report needs --workdir=DIR, the directory of the run to report")
    from rosd_jax.evals import page
    from rosd_jax.evals.report import write_report
    from rosd_jax.train import workdir

    directory = Path(given["workdir"].value)
    others = [Path(other) for other in given["compare"].value or ()]
    page.require_run(directory)
    workdir.lock(directory)
    trained_on = page.remake(directory, others)
    print(write_report(directory, trained_on))


def read_flags(argv: list[str]) -> ConfigDict:
    """The config that the command line asks for. Raises UserError if something does not parse."""
    try:
        _ARGV[:] = with_stored_config(argv)
        rest = flags.FLAGS(_ARGV)
    except (flags.Error, KeyError, ValueError, OSError) as error:
        if isinstance(error, flags.UnrecognizedFlagError):
            raise UserError(unknown_flag(error)) from error
        raise UserError(config_file.explain(error)) from error
    if len(rest) > 1:
        raise UserError(f"{rest[1]!r} is not a flag; flags are written --name=value")
    if _CONFIG.value is None:
        raise UserError(MISSING)
    return _CONFIG.value


def unknown_flag(error: flags.UnrecognizedFlagError) -> str:
    """A sentence on a flag that does not exist."""
    name = error.flagname
    if name.startswith("config."):
        return MISSING  # the config's fields are flags once there is a config
    if any(field.name.split(".")[0] == name.split(".")[0] for field in describe()):
        return f"--{name} is not a flag; fields of the config are given as --config.{name}=VALUE"
    return config_file.explain(error)


def with_stored_config(argv: list[str]) -> list[str]:
    """argv, with the stored config of the run in --workdir as --config if none is given."""
    given = peek(argv, "config", "workdir")
    if given["workdir"].value == "":
        raise UserError("--workdir is empty; give it a directory, or leave it out for runs/NAME-TIME")
    if given["config"].value is not None or given["workdir"].value is None:
        return argv
    from rosd_jax.train import workdir

    directory = Path(given["workdir"].value)
    workdir.check_path(directory)
    if not (directory / workdir.CONFIG_FILE).is_file():
        raise UserError(f"there is no run in {directory}; to start one there, pass --config=FILE")
    return [argv[0], f"--config={STORED_CONFIG}:{directory / workdir.CONFIG_FILE}", *argv[1:]]


def run(config: Settings, here: place.Place | None, console: Console) -> None:
    """Trains, evaluates, plans or shows the data."""
    # Imported here, after the flags are parsed, so that --help and mistakes in flags are answered quickly.
    if _LABELS.value is not None and _MODE.value != "localize":
        raise UserError("--labels is for --mode=localize; leave it out, or use that mode")
    if _PROFILE.value and _MODE.value != "train":
        raise UserError("--profile is for --mode=train; leave it out, or use that mode")
    if _MODE.value == "data":
        from rosd_jax.train.preview import preview

        print(preview(config))
        return
    from rosd_jax.plan import command
    from rosd_jax.train import loop, workdir

    if here:
        console.stage("waiting for the other hosts")
    hosts = place.join(here)
    directory = Path(_WORKDIR.value or hosts.once("workdir", lambda: workdir.default_workdir(config.name)))
    workdir.check_path(directory)
    hosts.require_same("the command", {"--workdir": str(directory.absolute())})
    asked = command.Asked(_TOPOLOGY.value, tuple(_COMPILE.value), _JSON.value)
    if _MODE.value == "plan":
        command.plan(config, asked, console.stage)
        return
    if asked != command.Asked():
        raise UserError(
            "--topology, --compile and --json are for --mode=plan; leave them out, or add that mode"
        )
    if flags.FLAGS["compare"].value:
        raise UserError("--compare is for --mode=report; leave it out, or add that mode")
    if _MODE.value == "localize":
        from rosd_jax.train.localize import localize

        if not _LABELS.value:
            raise UserError("--mode=localize needs --labels=FILE, responses with known first errors")
        console.say(localize(config, Path(_LABELS.value), directory, console))
    elif _MODE.value == "train":
        loop.train(config, directory, hosts, console, profile=_PROFILE.value)
    else:
        loop.evaluate_only(config, directory, hosts, console)


def crash(error: Exception) -> int:
    """Prints a traceback and returns the exit status of a fault of the program."""
    traceback.print_exception(error)
    supervisor.report_failure(f"failed, with a traceback in its output: {error!r}", 1)
    return 1


def fail(sentence: str) -> int:
    """Prints an error to stderr and returns the exit status of a user's mistake."""
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    supervisor.report_failure(sentence, 2)
    return 2


def end(status: int) -> NoReturn:
    """Ends the process in good order."""
    stopping.done()
    supervisor.report_end(status)
    sys.exit(status)
