"""Ctrl-C and SIGTERM at any moment: an answer at once, an end in good order, and nothing lost."""

import os
import random
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import Run, arguments, assert_same_run, finish, finished_run, read_lines

import tiny
from rosd_jax.rewards import Grader
from rosd_jax.types import Problem
from support import ROOT, nightly_but, run_environment

NAMES = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}
ANSWER_S = 2  # for the answer to a signal, on a busy machine
HEADLINE = 2  # printed lines: that the run starts, the headline, two of evaluation, then a step's
FIRST_LINE = 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.model_dir(tmp_path_factory)


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """The directory of a run that nothing disturbed."""
    return finished_run(cache, tmp_path_factory)[0]


def wait_until(holds, seconds):
    """Waits for `holds()`; fails where it takes longer."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.002)


def wait_for_watch(run):
    """Returns once the run has a handler for SIGTERM, which Python alone has not."""
    status = Path(f"/proc/{run.process.pid}/status")
    if not status.exists():
        pytest.skip("handlers of other processes are looked up in /proc")

    def caught():
        return int(status.read_text().split("SigCgt:")[1].split()[0], 16)

    wait_until(lambda: caught() >> signal.SIGTERM - 1 & 1, 60)


def wait_for_lines(run, count):
    """Returns once the run has printed that many lines; for 0, once it handles signals."""
    if count == 0:
        return wait_for_watch(run)
    wait_until(lambda: run.process.poll() is not None or run.out.read_text().count("\n") >= count, 300)
    assert run.process.poll() is None, run.err.read_text()


def send(run, number):
    """Signals the run; its answer must come soon, or its good end, where it had nothing left to do."""
    before = run.err.read_text()
    run.signal(number)
    answer = f"{NAMES[number]}: "
    wait_until(
        lambda: run.process.poll() == 0 or answer in run.err.read_text().removeprefix(before), ANSWER_S
    )


def assert_stopped(run, number):
    """The run ends with the signal's status, in words, and tells how to go on. Returns what it said."""
    status, printed = run.end()
    assert status == 128 + number, printed
    assert "Traceback" not in printed and "fault" not in printed and "\x1b" not in printed
    for line in printed.splitlines():
        assert line.startswith((f"{NAMES[number]}: ", "saving step ")), printed
    assert "resumes" in printed or "ended before the run began" in printed
    return printed


# --- one signal, two signals ---------------------------------------------------------------------------


@pytest.mark.parametrize("number", NAMES)
def test_a_signal_while_modules_load_ends_the_run_at_once(number, model, tmp_path):
    run = Run(arguments(model, tmp_path / "run"), tmp_path)
    wait_for_watch(run)
    send(run, number)
    run.process.wait(ANSWER_S)
    assert assert_stopped(run, number) == f"{NAMES[number]}: ended before the run began\n"


def test_the_first_signal_stops_the_run_and_a_second_ends_it_at_once(model, tmp_path):
    slow = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
    run = Run(arguments(model, tmp_path / "run"), tmp_path, **slow)  # nothing is compiled yet
    wait_for_lines(run, HEADLINE)
    time.sleep(0.5)
    send(run, signal.SIGINT)
    assert run.process.poll() is None  # compiling, which no exception can interrupt
    send(run, signal.SIGTERM)
    run.process.wait(ANSWER_S)
    first, second = run.err.read_text().splitlines()
    assert "a second signal ends it at once" in first
    assert second == f"SIGTERM: ended at once; the same command with --workdir={tmp_path / 'run'} resumes"
    assert run.end()[0] == 128 + signal.SIGTERM


def test_the_first_signal_ends_the_run_when_the_call_under_way_returns(model, cache, tmp_path):
    run = Run(arguments(model, tmp_path / "run"), tmp_path, **cache)
    wait_for_lines(run, HEADLINE)
    time.sleep(0.2)
    send(run, signal.SIGINT)
    first, last = assert_stopped(run, signal.SIGINT).splitlines()
    assert "stops when the current device call returns" in first
    assert last == f"Ctrl-C: stopped; the same command with --workdir={tmp_path / 'run'} resumes"
    assert run.out.read_text().count("\n") == HEADLINE and not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_signal_that_a_launcher_sends_twice_is_one(model, cache, tmp_path):
    run = Run(arguments(model, tmp_path / "run"), tmp_path, **cache)
    wait_for_lines(run, HEADLINE)
    run.signal(signal.SIGTERM)
    time.sleep(0.005)
    run.signal(signal.SIGTERM)
    assert "stopped" in assert_stopped(run, signal.SIGTERM)


def test_an_ignored_signal_stays_ignored(tmp_path):
    script = "trap '' INT; exec \"$@\""
    code = (
        "import os, signal\nfrom rosd_jax.train import stopping\nstopping.watch()\n"
        "os.kill(os.getpid(), signal.SIGINT)\nos.kill(os.getpid(), signal.SIGTERM)\nsignal.pause()"
    )
    command = ["sh", "-c", script, "sh", sys.executable, "-c", code]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (143, "SIGTERM: ended before the run began\n")


def test_a_run_in_the_terminal_obeys_its_keys_and_keeps_the_lines_whole(model, cache, tmp_path):
    code = "import os, pty, sys; sys.exit(os.waitstatus_to_exitcode(pty.spawn(sys.argv[1:])))"
    command = [sys.executable, "-c", code, sys.executable, ROOT / "run.py"]
    environment = run_environment(TERM="xterm", **cache)
    run = subprocess.Popen(
        [*command, *arguments(model, tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=tmp_path,
        env=environment,
    )
    assert run.stdin is not None and run.stdout is not None
    printed = read_until(run.stdout, b"eval gym:chain")  # on the bar
    run.stdin.write(b"\x03")
    run.stdin.flush()
    printed += read_until(run.stdout, b"resumes")
    assert b"\r\x1b[KCtrl-C: the run stops when" in printed and b"\r\x1b[KCtrl-C: stopped;" in printed
    assert run.wait(60) == 130
    run.stdin.close()
    run.stdout.close()


def read_until(stream, wanted):
    """All bytes of a stream up to some that must come."""
    read = b""
    while wanted not in read:
        assert select.select([stream], [], [], 60)[0]
        piece = os.read(stream.fileno(), 4096)
        assert piece, read
        read += piece
    return read


# --- output that nobody reads --------------------------------------------------------------------------


def pipe_closed_after(lines, command, cwd, **environment):
    """Runs the command with a reader of stdout that goes away: exit status and stderr."""
    environment = run_environment(**environment)
    command = [sys.executable, ROOT / "run.py", *command]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
    ) as run:
        assert run.stdout is not None and run.stderr is not None
        for _ in range(lines):
            assert run.stdout.readline()
        run.stdout.close()
        return run.stderr.read(), run.wait(300)


@pytest.mark.parametrize("mode", ["--help", "--mode=plan"])
def test_short_output_that_nobody_reads_ends_quietly(mode, model, tmp_path):
    printed, status = pipe_closed_after(0, [*arguments(model, tmp_path / "run"), mode], tmp_path)
    assert (printed, status) == ("", 128 + signal.SIGPIPE)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_whose_output_nobody_reads_saves_its_step_and_ends(finished, model, cache, tmp_path):
    command = arguments(model, tmp_path / "run")
    printed, status = pipe_closed_after(FIRST_LINE, command, tmp_path, **cache)
    assert status == 128 + signal.SIGPIPE
    assert printed.splitlines() == [
        "saving step 1",
        f"nobody reads the output: stopped; the same command with --workdir={tmp_path / 'run'} resumes",
    ]
    assert "resumes after step 1" in finish(command, tmp_path, **cache)
    assert_same_run(tmp_path / "run", finished)


# --- the grader's workers ------------------------------------------------------------------------------

IDLE = """
grader = Grader("official", timeout_s=1)  # whose comparison may never end
problem = Problem("set/0", "set", "math", ({"role": "user", "content": "?"},), "5")
grader.grade_all(["\\\\boxed{5.0}"], [problem], thinking_open=False)
(worker,) = [worker for worker in grader._pool._idle.queue if worker]
"""
STARTING = "worker = workers._Worker('rosd_jax.rewards.maths.checker', ['fixed'])\n"
BUSY = f"{IDLE}worker.pipe.send((1.0, ('9^{{9^{{9^{{9}}}}}}', '5', 'official')))\n"
BEGINS = "import os\nfrom rosd_jax.rewards import Grader, workers\nfrom rosd_jax.types import Problem\n"
SLEEPING = """
worker = workers._Worker("sleeper", [])
worker.start()
worker.pipe.send((1.0, None))
"""
SLEEPER = "import time\ndef answerer():\n    return lambda question: time.sleep(1e6)\n"
DIES = "print(worker.process.pid, flush=True)\nos._exit(130)\n"


def exists(pid):
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are looked up in /proc")
@pytest.mark.parametrize(
    "works", [IDLE, STARTING, BUSY, SLEEPING], ids=["idle", "starting", "busy", "sleeping"]
)
def test_a_run_that_ends_at_once_leaves_no_worker(works, tmp_path):
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    command = [sys.executable, "-c", BEGINS + works + DIES]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    # It returns when the worker, too, has ended.
    dead = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=60)
    assert (dead.returncode, dead.stderr) == (130, "")
    wait_until(lambda: not exists(int(dead.stdout)), 5)


@pytest.mark.parametrize("number", NAMES)
def test_workers_leave_the_signals_to_the_run(number):
    problem = Problem("set/0", "set", "math", ({"role": "user", "content": "?"},), "5")
    with Grader() as grader:
        assert grader.grade_all(["\\boxed{5.0}"], [problem], thinking_open=False)[0].score == 1
        (worker,) = [worker for worker in grader._pool._idle.queue if worker]
        assert os.getpgid(worker.process.pid) != os.getpgid(0)  # a terminal's Ctrl-C does not reach it
        worker.process.send_signal(number)
        time.sleep(0.1)
        assert grader.grade_all(["\\boxed{5.00}"], [problem], thinking_open=False)[0].score == 1
        assert worker.alive() and grader.timeouts == 0


# --- any moment ----------------------------------------------------------------------------------------


def moments(seed, count):
    """`count` signals, each some time after a number of printed lines; two in three are Ctrl-C."""
    chance = random.Random(seed)
    for number in range(count):
        lines = number % 5  # modules load; inputs are read; set-up is done; evaluated or resumed; one step on
        yield chance.choice([*NAMES, signal.SIGINT]), lines, chance.uniform(0, 0.6 if lines else 4)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_a_run_stopped_at_random_moments_equals_one_that_was_not(seed, finished, model, cache, tmp_path):
    command = arguments(model, tmp_path / "run")
    for number, lines, delay in moments(seed, 9):
        run = Run(command, tmp_path, **cache)
        wait_for_lines(run, lines)
        time.sleep(delay)
        send(run, number)
        assert_stopped(run, number)
    finish(command, tmp_path, **cache)
    assert_same_run(tmp_path / "run", finished)


@pytest.mark.slow
@pytest.mark.parametrize("delay", nightly_but([0, 0.3], keep=[0]))
def test_a_run_stopped_while_it_exports_or_reports_is_made_whole(delay, finished, model, cache, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(finished, directory)
    shutil.rmtree(directory / "export")
    command = arguments(model, directory)
    run = Run(command, tmp_path, **cache)
    wait_for_lines(run, HEADLINE)
    time.sleep(delay)
    if "all settings of the run" in run.out.read_text():  # the report's last line: the next test's moment
        run.end()
        return
    send(run, signal.SIGINT)
    if run.end() != (0, ""):
        assert_stopped(run, signal.SIGINT)
    finish(command, tmp_path, **cache)
    assert_same_run(directory, finished)


@pytest.mark.slow
def test_a_signal_while_python_ends_leaves_a_good_run_a_good_one(finished, model, cache, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    run = Run(arguments(model, tmp_path / "run"), tmp_path, **cache)
    wait_until(lambda: "all settings of the run" in run.out.read_text(), 300)
    time.sleep(0.05)  # for main to return
    run.signal(signal.SIGINT)
    assert run.end()[0] == 0


@pytest.mark.nightly
@pytest.mark.slow
def test_the_step_that_was_made_last_is_not_made_again(model, cache, tmp_path):
    command = arguments(model, tmp_path / "run", eval__sets="", checkpoint__every=6)
    run = Run(command, tmp_path, **cache)
    run.wait_for(tmp_path / "run", 2)
    send(run, signal.SIGINT)
    printed = assert_stopped(run, signal.SIGINT)
    last = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert f"saving step {last}\n" in printed
    assert f"resumes after step {last}, " in finish(command, tmp_path, **cache)


@pytest.mark.nightly
@pytest.mark.slow
def test_a_guard_ends_the_run_with_its_step_saved_and_again_when_it_is_resumed(model, cache, tmp_path):
    fields = dict(steps=40, batch__samples=8, eval__sets="", checkpoint__every=30, guard__length=0.999)
    command = arguments(model, tmp_path / "run", **fields)
    for _ in range(2):
        run = Run(command, tmp_path, **cache)
        status, said = run.end()
        lines = read_lines(tmp_path / "run" / "metrics.jsonl")
        done = lines[-1]["step"]
        assert status == 3 and 10 <= done == len(lines) < 40
        sentence = said.splitlines()[-1]
        assert sentence.startswith("response_length fell from ") and f"stopped after step {done};" in sentence
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [str(done)]
        assert not (tmp_path / "run" / "export").exists()
    assert "exports the model" in sentence
    printed = finish([*command, f"--config.steps={done}"], tmp_path, **cache)
    assert f"resumes after step {done}, " in printed
    assert (tmp_path / "run" / "export" / "trained_steps.txt").read_text().strip() == str(done)
    more = [*command, f"--config.steps={done + 1}", "--config.guard.length=0.0"]
    assert f"step {done + 1}/{done + 1} " in finish(more, tmp_path, **cache), "another guard may go on"


@pytest.mark.nightly
@pytest.mark.slow
def test_a_run_stopped_in_an_evaluation_keeps_the_step_and_makes_up_for_it(finished, model, cache, tmp_path):
    command = arguments(model, tmp_path / "run", checkpoint__every=6)
    run = Run(command, tmp_path, **cache)
    run.wait_for(tmp_path / "run", 2)  # an evaluation is due
    send(run, signal.SIGINT)
    printed = assert_stopped(run, signal.SIGINT)
    made = read_lines(tmp_path / "run" / "metrics.jsonl")[-1]["step"]  # 2, unless this machine is very busy
    assert f"saving step {made}\n" in printed
    assert f"resumes after step {made}, " in finish(command, tmp_path, **cache)
    assert_same_run(tmp_path / "run", finished)
