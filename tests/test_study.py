"""Studies: which runs they make, when they stop, and the table of several seeds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_run import load_run

from rosd_jax.evals import study
from rosd_jax.evals.outcome import read_metrics
from rosd_jax.evals.report import with_interval
from rosd_jax.evals.study import Asked, Cell, as_markdown, make_cells, over_seeds, read_result
from support import ROOT, run_environment

QUICKSTART = str(ROOT / "configs" / "quickstart.py")


def scored(step, name, avg, split="eval"):
    row = {"step": step, "split": f"{split}/{name}", "avg": avg, "avg_se": 0.02, "pass": 0.9, "maj": 0.5}
    return {**row, "k": 4, "n": 50, "length": 30.0}


def leave_run(directory, before, validated, after):
    """What a run of four steps leaves, whose best step by validation is 2 unless `validated` says else."""
    directory.mkdir(parents=True)
    sets = {"sets": "gym:chain,gym:long"}
    config = {"steps": 4, "data": {"train": "gym:chain", "dir": ""}, "eval": sets}
    (directory / "config.json").write_text(json.dumps(config))
    rows = [scored(0, "gym:chain", before), scored(0, "gym:long", 0.2)]
    rows += [{"step": step, "split": "train", "reward": step / 10} for step in range(1, 5)]
    rows += [scored(step, "gym:chain", score, "validation") for step, score in validated.items()]
    rows += [scored(2, "gym:chain", after + 0.1), scored(4, "gym:chain", after), scored(4, "gym:long", 0.1)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def results(tmp_path, runs):
    """Results of runs given as (method, seed, before, validated, after)."""
    found = []
    for method, seed, *scores in runs:
        directory = tmp_path / f"{method}-{seed}"
        leave_run(directory, *scores)
        found.append(read_result(Cell(method, seed, directory, (f"--config=x:{method}",))))
    return found


def table(text, name):
    """The rows of a set by method, as lists of cells."""
    part = text.split(f"## {name}, ")[1].split("\n\n")[1].splitlines()[2:]
    return {
        line.split(" | ")[0].strip("| "): [cell.strip("| ") for cell in line.split(" | ")] for line in part
    }


CHOSEN = {0: 0.4, 2: 0.7, 4: 0.6}


def test_the_table_has_means_over_seeds_with_their_intervals(tmp_path):
    runs = [("a", 0, 0.5, CHOSEN, 0.6), ("b", 0, 0.5, CHOSEN, 0.5), ("a", 1, 0.5, CHOSEN, 0.7)]
    text = as_markdown(results(tmp_path, runs))
    rows = table(text, "gym:chain")
    # Changes of 10 and 20 points: mean 15, standard error 5, times 12.706, the quantile of one degree.
    change = "+15.0 [-48.5, +78.5]"
    assert rows["a"] == [
        "a",
        "2",
        "50.0",
        "65.0",
        change,
        "75.0",
        "+25.0 [-38.5, +88.5]",
        "90.0",
        "50.0",
        "30",
    ]
    # One seed: the standard errors of the two evaluations, 2 points each, times 1.96.
    last = "+0.0 [-5.5, +5.5]"
    best = "+10.0 [+4.5, +15.5]"
    assert rows["b"] == ["b", "1", "50.0", "50.0", last, "60.0", best, "90.0", "50.0", "30"]
    # No evaluation of this set at the best step: the last one's.
    fell = "-10.0 [-15.5, -4.5]"
    assert table(text, "gym:long")["b"][2:7] == ["20.0", "10.0", fell, "10.0", fell]
    assert text.index("## gym:chain, in domain") < text.index("## gym:long, out of domain")
    assert "    rosd --config=x:a\n    rosd --config=x:b\n" in text


def test_if_no_step_is_better_than_none_the_best_is_the_model_before(tmp_path):
    text = as_markdown(results(tmp_path, [("a", 0, 0.5, {0: 0.9, 2: 0.1, 4: 0.2}, 0.3)]))
    assert table(text, "gym:chain")["a"][2:7] == [
        "50.0",
        "30.0",
        "-20.0 [-25.5, -14.5]",
        "50.0",
        "+0.0 [-5.5, +5.5]",
    ]


def test_the_figure_shows_every_method(tmp_path):
    found = results(tmp_path, [("a", 0, 0.5, CHOSEN, 0.6), ("b", 0, 0.5, {}, 0.5)])
    study.draw(found, tmp_path / "study.png")
    assert (tmp_path / "study.png").read_bytes().startswith(b"\x89PNG")


def test_an_interval_needs_two_seeds_and_finite_numbers():
    assert with_interval(*over_seeds([0.1])) == "+10.0"
    assert with_interval(*over_seeds([0.1, float("nan")])) == "n/a"
    assert with_interval(*over_seeds([])) == "n/a"


def test_the_commands_are_those_of_ordinary_runs(tmp_path):
    asked = Asked(f"{QUICKSTART}:debug", ["span", "paper"], [3, 4], [], tmp_path, ["--config.steps=1"])
    cells = make_cells(asked, asked.seeds, {})
    assert [(cell.seed, cell.method) for cell in cells] == [
        (3, "span"),
        (3, "paper"),
        (4, "span"),
        (4, "paper"),
    ]
    assert len({cell.directory for cell in cells}) == 4
    (plain,) = make_cells(Asked("x.py:debug", ["default"], [0], [], tmp_path, []), [0], {})
    assert plain.flags[0] == "--config=x.py:debug" and plain.directory == tmp_path / "default-0"
    for cell in cells:
        config = load_run().read_flags(["rosd", *cell.flags])
        assert (config.seed, config.steps) == (cell.seed, 1)
        assert config.lesson.region == ("span" if cell.method == "span" else "suffix")


def test_a_run_that_fails_ends_the_study_with_its_status(tmp_path, monkeypatch, capsys):
    made = []

    def status_of(command):
        made.append(command)
        return 0 if len(made) == 1 else 130

    monkeypatch.setattr(study, "status_of", status_of)
    asked = [f"--config={QUICKSTART}", "--methods=span,paper", "--seeds=0,1", f"--out={tmp_path}"]
    assert study.main(asked) == 130
    assert len(made) == 2 and made[1][1:3] == ["-m", "rosd_jax"]
    assert "the same command goes on" in capsys.readouterr().err
    assert not (tmp_path / "study.md").exists()


SAVES = """#!{python}
import pathlib, signal, sys, time

def save(number, frame):
    time.sleep(1)
    pathlib.Path("saved").touch()
    sys.exit(128 + number)

signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
pathlib.Path("started").touch()
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_run_save_its_step(number, tmp_path):
    run = tmp_path / "run"
    run.write_text(SAVES.format(python=sys.executable))
    run.chmod(0o755)
    asked = ["--config=x.py", "--methods=a", "--seeds=0", "--out=study"]
    code = f"import sys; from rosd_jax.evals import study; sys.executable = {str(run)!r}\n"
    code += f"sys.exit(study.main({asked}))"
    environment = run_environment(PYTHONPATH=str(ROOT))
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    began = time.monotonic()
    while not (tmp_path / "started").exists():
        assert process.poll() is None and time.monotonic() - began < 120
        time.sleep(0.05)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # as a terminal does
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 128 + number and (tmp_path / "saved").exists()
    assert said == f"--- ended with status {128 + number}; the same command goes on from here\n"


def test_a_run_that_its_guard_ended_is_a_result_and_named(tmp_path, monkeypatch):
    def status_of(command):
        directory = next(flag.removeprefix("--workdir=") for flag in command if flag.startswith("--workdir="))
        if not Path(directory).exists():
            leave_run(Path(directory), 0.5, CHOSEN, 0.6)
        if "bad" not in directory:
            return 0
        config = json.loads((Path(directory) / "config.json").read_text())
        (Path(directory) / "config.json").write_text(json.dumps({**config, "steps": 9}))
        return 3

    monkeypatch.setattr(study, "status_of", status_of)
    assert study.main(["--config=x.py", "--methods=bad,good", "--seeds=0", f"--out={tmp_path}"]) == 0
    text = (tmp_path / "study.md").read_text()
    assert "The guard of bad-0 ended it after step 4 of 9.\n" in text and "guard of good" not in text


# Validation scores of a fake study by method, rate and step.
SWEPT = {
    ("a", "1e-4"): {0: 0.4, 2: 0.5, 4: 0.6},
    ("a", "2e-4"): {0: 0.4, 2: 0.7, 4: 0.1},
    ("a", "5e-4"): {0: 0.4, 2: 0.6, 4: 0.6},
    ("b", "1e-4"): {0: 0.4, 2: 0.3, 4: 0.5},
    ("b", "2e-4"): {0: 0.4, 2: 0.5, 4: 0.5},
    ("b", "5e-4"): {0: 0.4, 2: 0.2, 4: 0.1},
}


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that leave the scores of SWEPT; returns their (method, rate, seed), in the order they are made."""
    made = []

    def status_of(command):
        flags = dict(flag.split("=", 1) for flag in command[3:])
        method = flags["--config"].partition(":")[2]
        rate = flags["--config.optimizer.lr"]
        directory = Path(flags["--workdir"])
        made.append((method, rate, int(flags["--config.seed"])))
        if not directory.exists():
            leave_run(directory, 0.5, SWEPT[method, rate], 0.6)
        return 0

    monkeypatch.setattr(study, "status_of", status_of)
    return made


def test_every_method_gets_the_rate_that_validation_chooses_from_the_same_trials(tmp_path, fake_runs, capsys):
    asked = ["--config=x.py", "--methods=a,b", "--seeds=3,4", f"--out={tmp_path}", "--rates=1e-4,2e-4,5e-4"]
    assert study.main(asked) == 0
    trials = [(method, rate, 3) for rate in ("1e-4", "2e-4", "5e-4") for method in ("a", "b")]
    # a: the highest score of any step; b: of two rates with equal scores the first.
    assert fake_runs == [*trials, ("a", "2e-4", 4), ("b", "1e-4", 4)]
    text = (tmp_path / "study.md").read_text()
    lines = text.partition("## Learning rates")[2].partition("##")[0].splitlines()
    assert "| a | 60.0 (4) | 70.0 (2) | 60.0 (2) | 2e-4 |" in lines
    assert "| b | 50.0 (4) | 50.0 (2) | 40.0 (0) | 1e-4* |" in lines
    assert {name: cells[1] for name, cells in table(text, "gym:chain").items()} == {"a": "2", "b": "2"}
    # The best step of a's chosen rate is 2, where the score is 70.
    assert table(text, "gym:chain")["a"][5] == "70.0"
    commands = [line for line in text.splitlines() if line.startswith("    rosd ")]
    assert len(commands) == len(set(commands)) == 8
    flags = f"--workdir={tmp_path}/b-lr1e-4-4 --config.seed=4 --config.optimizer.lr=1e-4"
    assert commands[-1] == f"    rosd --config=x.py:b {flags}"
    said = capsys.readouterr().out
    assert "--- a, seed 3, learning rate 1e-4: run 1 of 8\n" in said and "run 8 of 8" in said
    assert study.main(asked) == 0 and (tmp_path / "study.md").read_text() == text, "it goes on"


def test_a_rate_is_not_chosen_without_validation(tmp_path, fake_runs, monkeypatch, capsys):
    monkeypatch.setitem(SWEPT, ("a", "1e-4"), {})
    asked = ["--config=x.py", "--methods=a", "--seeds=0", f"--out={tmp_path}", "--rates=1e-4,2e-4"]
    assert study.main(asked) == 2
    assert fake_runs == [("a", "1e-4", 0)], "it is said after the first run"
    said = capsys.readouterr().err
    assert "a-lr1e-4-0 has no validation score, by which --rates chooses; set validation.sets" in said


@pytest.mark.parametrize("rates", ["0", "-1e-4", "nan", "inf", "1e-4,", "fast"])
def test_what_is_no_rate_is_refused(rates, tmp_path, capsys):
    with pytest.raises(SystemExit):
        study.main(["--config=x.py", "--methods=a", "--seeds=0", f"--out={tmp_path}", f"--rates={rates}"])
    assert f"argument --rates: {rates!r}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--methods=a", "--seeds=0", "--rates=1e-4,0.0001"], "--rates=1e-4,0.0001 repeats a rate"),
        (
            ["--methods=a", "--seeds=0", "--rates=1e-4", "--config.optimizer.lr=1e-3"],
            "--rates and --config.optimizer.lr are both given",
        ),
        (["--methods=a,a", "--seeds=0"], "a,a repeats a name"),
        (["--methods=a", "--seeds=0,0"], "0,0 repeats a name"),
        (["--methods=a", "--seeds=0", "--mode=eval"], "'--mode=eval' is no flag of a study"),
        (["--methods=a", "--seeds=0", "--config.seed=1"], "--seeds and --config.seed are both given"),
    ],
)
def test_a_mistake_is_one_sentence(arguments, words, tmp_path, capsys):
    assert study.main([f"--config={QUICKSTART}", f"--out={tmp_path}", *arguments]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1


@pytest.mark.nightly
@pytest.mark.slow
def test_a_study_of_three_methods_and_two_seeds(tmp_path, cache):
    fields = ["--config.steps=1", "--config.eval.sets=gym:chain", "--config.batch.prompts=2"]
    asked = ["--methods=span,paper,official", "--seeds=0,1", f"--config={QUICKSTART}:debug", "--out=study"]
    command = [sys.executable, "-m", "rosd_jax.evals.study", *asked, *fields]
    environment = run_environment(PYTHONPATH=str(ROOT), **cache)
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = table((tmp_path / "study" / "study.md").read_text(), "gym:chain")
    assert [cells[:2] for cells in rows.values()] == [["span", "2"], ["paper", "2"], ["official", "2"]]


@pytest.mark.slow
@pytest.mark.nightly
def test_a_study_of_ablations_with_a_sweep_of_rates(tmp_path, cache):
    fields = ["--config.steps=1", "--config.eval.sets=gym:chain", "--config.batch.prompts=2"]
    asked = ["--methods=span,spans_100", "--seeds=0,1", "--rates=1e-5,1e-4", "--out=study"]
    config = f"--config={ROOT / 'configs' / 'ablations.py'}:debug"
    command = [sys.executable, "-m", "rosd_jax.evals.study", config, *asked, *fields]
    environment = run_environment(PYTHONPATH=str(ROOT), **cache)
    made = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    text = (tmp_path / "study" / "study.md").read_text()
    assert [cells[:2] for cells in table(text, "gym:chain").values()] == [["span", "2"], ["spans_100", "2"]]
    assert "| method | 1e-5 | 1e-4 | chosen |" in text.splitlines()
    for directory in (tmp_path / "study").glob("spans_100-*"):
        (row,) = (row for row in read_metrics(directory / "metrics.jsonl") if row["split"] == "train")
        assert row["spans_moved"] == row["taught"] > 0
        records = map(json.loads, (directory / "rollouts" / "step_1.jsonl").read_text().splitlines())
        for record in records:
            if record["active_tokens"]:
                assert record["span_source"] == "moved"
                assert record["active_span_tokens"] == record["error_span_tokens"]
                assert record["active_span_chars"] == record["error_span_chars"]
