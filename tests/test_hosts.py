"""How the processes of several hosts agree and share work, and how a host that fails ends all."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pod import free_port

from rosd_jax.config import UserError
from rosd_jax.hosts import Hosts, hosts, place, supervisor
from support import ROOT, nightly_but


class Memory:
    """The store of JAX's coordination service, in one process."""

    def __init__(self):
        self.values = {}
        self.changed = threading.Condition()

    def key_value_set_bytes(self, key, value):
        with self.changed:
            assert key not in self.values  # as the service demands
            self.values[key] = value
            self.changed.notify_all()

    def blocking_key_value_get_bytes(self, key, timeout_ms):
        with self.changed:
            if not self.changed.wait_for(lambda: key in self.values, timeout_ms / 1000):
                raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
            return self.values[key]

    def key_value_delete(self, key):
        with self.changed:
            for name in [name for name in self.values if name.startswith(key)]:
                del self.values[name]


def on_each(count, program, store=None):
    """program(hosts) on every process, each a thread: the results, or what the first one raised."""
    store = store or Memory()
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(program, Hosts(i, count, store)) for i in range(count)]
    return [future.result() for future in futures]


@pytest.mark.parametrize("count", [1, 2, 5])
def test_values_are_exchanged_in_the_order_of_the_processes(count):
    def program(hosts):
        late = 0.02 * (count - hosts.index)
        time.sleep(late)
        return [hosts.exchange("a", hosts.index), hosts.exchange("b", {"from": [hosts.index]})]

    expected = [list(range(count)), [{"from": [i]} for i in range(count)]]
    assert on_each(count, program) == [expected] * count


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("items", [0, 1, 2, 3, 10])
def test_shared_work_is_done_once_and_known_to_all(count, items):
    done = []

    def program(hosts):
        def work(some):
            done.extend(some)
            return [item * item for item in some]

        return hosts.share("squares", work, range(items))

    assert on_each(count, program) == [[i * i for i in range(items)]] * count
    assert sorted(done) == list(range(items))


def test_only_the_first_process_works_for_all():
    callers = []

    def program(hosts):
        def work():
            callers.append(hosts.index)
            return "result"

        return hosts.once("work", work)

    assert on_each(3, program) == ["result"] * 3 and callers == [0]


def test_processes_at_different_places_end_with_an_error_that_names_them():
    def program(hosts):
        hosts.exchange("same", None)
        hosts.exchange("decode (16, 64)" if hosts.index < 2 else "decode (32, 64)", None)

    with pytest.raises(
        RuntimeError, match=r"process 0 is at 'decode \(16, 64\)' and process 2 at 'decode \(32, 64\)'"
    ):
        on_each(3, program)


def test_inputs_that_differ_are_named():
    def program(hosts):
        hosts.require_same("the problems", {"rows": 5 + (hosts.index == 1)})

    words = "the problems of process 1 differs from that of process 0: rows is 6 and 5"
    with pytest.raises(UserError, match=words):
        on_each(2, program)


def test_the_first_process_says_for_whom_it_waits(monkeypatch):
    said = []
    monkeypatch.setattr(hosts, "WAIT_MS", 50)
    monkeypatch.setattr(hosts.stopping, "tell", said.append)

    def program(hosts):
        time.sleep(0.3 * hosts.index)
        return hosts.exchange("grade", hosts.index)

    assert on_each(2, program) == [[0, 1]] * 2
    assert set(said) == {"waits for process 1, which has not finished 'grade'"}


def test_the_store_does_not_grow():
    store = Memory()

    def program(hosts):
        for number in range(20):
            hosts.exchange("turn", number)

    on_each(3, program, store)
    assert len(store.values) <= 8


# --- the place of a process ------------------------------------------------------------------------------


def test_a_single_process_needs_no_flags(monkeypatch):
    for name in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert place.find(None, None, None) is None
    assert place.find("localhost:1234", 1, 0) is None
    assert place.join(None).count == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("h:1", 2, None), "go together"),
        ((None, 2, 0), "go together"),
        (("h", 2, 0), "HOST:PORT"),
        (("h:x", 2, 0), "HOST:PORT"),
        (("h:61440", 2, 0), "HOST:PORT"),
        (("h:80", 2, 2), "from 0 to N - 1"),
        (("h:80", 2, -1), "from 0 to N - 1"),
        (("h:80", 0, 0), "from 0 to N - 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        place.find(*flags)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        (
            dict(
                SLURM_JOB_ID="77",
                SLURM_STEP_NODELIST="node[01-03]",
                SLURM_NTASKS="3",
                SLURM_PROCID="2",
                SLURM_LOCALID="0",
            ),
            (3, 2, "node01"),
        ),
        (
            dict(
                OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
                OMPI_COMM_WORLD_SIZE="4",
                OMPI_COMM_WORLD_RANK="1",
                OMPI_COMM_WORLD_LOCAL_RANK="0",
            ),
            (4, 1, "10.96.0.1"),
        ),
    ],
    ids=["slurm", "openmpi"],
)
def test_launchers_are_recognised(environment, expected, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    found = place.find(None, None, None)
    assert found is not None
    assert (found.processes, found.process, found.address[0]) == expected


def test_no_two_jobs_of_a_launcher_use_the_same_port(monkeypatch):
    environment = dict(SLURM_STEP_NODELIST="n", SLURM_NTASKS="2", SLURM_PROCID="0", SLURM_LOCALID="0")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    ports = []
    for job in (1000, 1001, 4094, 4095, 4096):
        monkeypatch.setenv("SLURM_JOB_ID", str(job))
        found = place.find(None, None, None)
        ports += [found.address[1], found.supervisor_port]
    assert len(set(ports)) == len(ports) and all(0 < port < 65536 for port in ports)


def test_a_shell_within_a_job_of_slurm_is_a_single_process(monkeypatch):
    environment = dict(SLURM_NTASKS="4", SLURM_STEP_NUM_TASKS="1", SLURM_PROCID="0", JAX_PLATFORMS="cpu")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert place.find(None, None, None) is None


def test_a_tpu_without_metadata_is_a_single_process_and_says_so(monkeypatch, caplog):
    """As in a hosted notebook."""
    from jax._src import clusters

    def detect(*_):
        raise AttributeError("'NoneType' object has no attribute 'split'")

    monkeypatch.setattr(place, "_launched", lambda: True)
    monkeypatch.setattr(clusters.ClusterEnv, "auto_detect_unset_distributed_params", detect)
    assert place.find(None, None, None) is None
    assert "so this run has one process" in caplog.text


def test_one_task_of_slurm_is_a_single_process(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert place.find(None, None, None) is None


# --- supervisors -----------------------------------------------------------------------------------------

SCRIPT = """
import os, signal, sys, time
from rosd_jax.hosts import supervisor
from rosd_jax.hosts.place import Place
here = supervisor.given()
if here is None:
    sys.exit(supervisor.supervise(Place("127.0.0.1:PORT", COUNT, int(sys.argv[1]))))
print("child", os.getpid(), flush=True)
process = here.process
"""
WAITS = "time.sleep(60)\n"


@pytest.fixture
def start(tmp_path):
    """start(code, count): that many supervised processes that run the code."""
    started = []

    def begin(code, count=2, which=None, before=""):
        path = tmp_path / "script.py"
        script = SCRIPT.replace("PORT", str(free_port())).replace("COUNT", str(count))
        path.write_text(script.replace("here =", f"{before}here =", 1) + code)
        for i in range(count) if which is None else which:
            command = [sys.executable, str(path), str(i)]
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            pipe = subprocess.PIPE
            run = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment)
            started.append(run)
        return started

    yield begin
    for run in started:
        run.kill()
        run.communicate()


def child_of(run):
    return int(run.stdout.readline().split()[1])


def ends(run, seconds=20):
    """Exit status and stderr."""
    _, printed = run.communicate(timeout=seconds)
    return run.returncode, printed


def test_a_good_end_is_everyones(start):
    first, second = start("time.sleep(0.2 * process)\nsupervisor.report_end(0)\n")
    assert ends(first) == ends(second) == (0, "")


def test_an_agreed_stop_keeps_its_status(start):
    runs = start("supervisor.report_end(143)\nsys.exit(143)\n", count=3)
    assert [ends(run) for run in runs] == [(143, "")] * 3


@pytest.mark.parametrize("failing", nightly_but([0, 1], keep=[1]))
def test_a_mistake_on_one_host_is_told_on_all(start, failing):
    code = f"if process == {failing}:\n    supervisor.report_failure('no file x.jsonl; copy it', 2)\n{WAITS}"
    runs = start(code, count=3)
    name = socket.gethostname()
    for i, run in enumerate(runs):
        sentence = f"error: process {failing} of 3, on host {name}: no file x.jsonl; copy it\n"
        assert ends(run) == (2, "" if i == failing else sentence)


@pytest.mark.parametrize("dying", [0, 1])
def test_a_process_that_dies_ends_all(start, dying):
    code = f"time.sleep(0.5)\nif process == {dying}:\n    os.kill(os.getpid(), signal.SIGKILL)\n{WAITS}"
    runs = start(code)
    status, printed = ends(runs[1 - dying])
    assert status == 1
    assert printed.startswith(f"error: process {dying} of 2, on host ") and "SIGKILL" in printed
    status, printed = ends(runs[dying])
    assert status == 128 + signal.SIGKILL and printed.startswith("error: the run was killed by SIGKILL")


def test_a_process_that_exits_without_a_word_ends_all(start):
    runs = start(f"if process == 1:\n    sys.exit(7)\n{WAITS}")
    status, printed = ends(runs[0])
    assert (status, "exit status 7" in printed) == (1, True)
    assert ends(runs[1])[0] == 7


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_supervisor_ends_its_own_child_and_all_others(start, killed):
    runs = start(WAITS)
    children = [child_of(run) for run in runs]
    time.sleep(0.5)  # for the connection
    runs[killed].kill()
    status, printed = ends(runs[1 - killed])
    assert status == 1 and f"process {killed} of 2" in printed and "connection was lost" in printed
    deadline = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") and not is_zombie(pid) for pid in children):
        assert time.monotonic() < deadline


def is_zombie(pid):
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_strangers_at_the_port_do_no_harm(start):
    first, second = start("time.sleep(1)\nsupervisor.report_end(0)\n")
    port = int(Path(first.args[1]).read_text().split('"127.0.0.1:')[1].split('"')[0]) + 1
    child_of(first)  # the supervisor listens before it starts the child
    for hello in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b"1\n", b"\xff\n", b""):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as stranger:
            stranger.sendall(hello)
    assert ends(first) == ends(second) == (0, "")


def test_a_process_that_is_there_twice_is_refused_and_the_run_goes_on(start, tmp_path):
    end = tmp_path / "end"
    code = f"while not os.path.exists({str(end)!r}):\n    time.sleep(0.05)\nsupervisor.report_end(0)\n"
    first, second = start(code)
    child_of(first)
    child_of(second)
    time.sleep(1)  # for the connection
    again, unknown = (
        subprocess.run([*second.args[:2], number], capture_output=True, text=True, env=second_environment())
        for number in ("1", "2")
    )
    assert (again.returncode, unknown.returncode) == (2, 2)
    assert "a process 1 is there already, on host" in again.stderr
    assert "it has 2 processes, and no process 2" in unknown.stderr
    end.touch()
    assert ends(first) == ends(second) == (0, "")


def second_environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def test_a_child_whose_supervisor_died_before_it_ends(tmp_path):
    code = "from rosd_jax.hosts import supervisor\nsupervisor.given()\nprint('goes on')"
    passed = '{"place": {"devices": null}, "pipe": 1, "parent": 1}'
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=second_environment() | {supervisor.PLACE: passed},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout) == (1, "")


def test_a_failure_elsewhere_leaves_time_to_clean_up(start, tmp_path):
    code = (
        "if process == 1:\n    supervisor.report_failure('no such mesh', 2)\n"
        f"time.sleep(1.5)\nopen({str(tmp_path / 'cleaned')!r}, 'w').close()\n{WAITS}"
    )
    assert [ends(run)[0] for run in start(code)] == [2, 2]
    assert (tmp_path / "cleaned").exists()


def test_a_signal_before_the_run_began_stops_all(start):
    first, second = start(f"if process == 1:\n    sys.exit(143)\n{WAITS}")
    status, printed = ends(first)
    assert status == 143 and printed.endswith(": was stopped by SIGTERM\n")
    assert ends(second) == (143, "")


@pytest.mark.parametrize("which", [0, 1])
def test_a_port_that_is_taken_is_named(which):
    with socket.socket() as taken:
        port = free_port()
        taken.bind(("", port + which))
        taken.listen()
        with pytest.raises(UserError, match=f"port {port + which} cannot be opened"):
            supervisor.supervise(place.Place(f"127.0.0.1:{port}", 2, 0))


def test_signals_reach_the_child_once(start):
    code = (
        "got = []\nsignal.signal(signal.SIGTERM, lambda *_: got.append(1))\nprint('ready', flush=True)\n"
        "while not got:\n    time.sleep(0.01)\ntime.sleep(0.3)\nsupervisor.report_end(100 + len(got))\n"
        "sys.exit(100 + len(got))\n"
    )
    runs = start(code)
    for run in runs:
        child_of(run)
        assert run.stdout.readline() == "ready\n"
        run.terminate()
    assert [ends(run) for run in runs] == [(101, "")] * 2


@pytest.mark.parametrize(
    ("process", "words"), [(0, "no sign of process 1 after"), (1, "process 0 does not answer at 127.0.0.1")]
)
def test_a_process_that_never_comes_is_named(start, process, words):
    (run,) = start(WAITS, which=[process], before="supervisor.PATIENCE_S = 1\n")
    status, printed = ends(run)
    assert status == 1 and words in printed


@pytest.mark.parametrize("stopped", nightly_but(["child", "supervisor"], keep=[0]))
@pytest.mark.parametrize("process", nightly_but([0, 1], keep=[1]))
def test_a_process_that_is_stopped_ends_all(start, process, stopped):
    runs = start(WAITS, before="supervisor.BEAT_S = 0.1\nsupervisor.SILENCE_S = 2\n")
    children = [child_of(run) for run in runs]
    time.sleep(1)  # beats have been sent
    os.kill(children[process] if stopped == "child" else runs[process].pid, signal.SIGSTOP)
    status, printed = ends(runs[1 - process])
    assert status == 1
    assert f"error: process {process} of 2, on host " in printed
    assert "has sent no sign of life for 2 s; it is stopped, or its host is overloaded" in printed
    if stopped == "supervisor":
        runs[process].send_signal(signal.SIGCONT)
    assert ends(runs[process])[0] == 1


@pytest.mark.nightly
def test_a_process_that_is_busy_for_long_goes_on(start):
    code = "time.sleep(3)\nsupervisor.report_end(0)\ntime.sleep(3)\n"
    runs = start(code, before="supervisor.BEAT_S = 0.1\nsupervisor.SILENCE_S = 2\n")
    assert [ends(run) for run in runs] == [(0, "")] * 2


def test_a_place_survives_the_way_to_the_child(start):
    code = "print(here, flush=True)\nsupervisor.report_end(0)\n"
    for i, run in enumerate(start(code)):
        child_of(run)
        printed = run.stdout.readline()
        assert printed.startswith("Place(coordinator='127.0.0.1:")
        assert printed.endswith(f"processes=2, process={i}, devices=None)\n")
