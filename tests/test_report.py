"""A report that tells the truth about a run, and survives any run."""

import json

import numpy as np
import pytest
import yaml

from rosd_jax.config import default_config, use_preset, validate
from rosd_jax.errors import UserError
from rosd_jax.evals.card import model_card
from rosd_jax.evals.generations import write_generations
from rosd_jax.evals.outcome import best_step, compare, read_metrics
from rosd_jax.evals.report import write_report

NAN = float("nan")


def metrics(workdir, rows, tail=""):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text + tail)


def scored(step, name, avg, se=0.02, **more):
    row = {"step": step, "split": f"eval/{name}", "avg": avg, "avg_se": se, "pass": 0.8}
    return {**row, "maj": avg, "k": 8, "n": 50, **more}


def trained(step, reward=0.5, loss=0.01):
    return {"step": step, "split": "train", "reward": reward, "loss": loss}


def generations(workdir, step, name, rewards_NK):
    rows = [
        {"uid": f"{name}/test/{i}", "sample": k, "reward": float(reward)}
        for i, row in enumerate(rewards_NK)
        for k, reward in enumerate(row)
    ]
    write_generations(workdir, step, name, rows)


def widest(text, workdir):
    """Characters of the longest line, but for the one that names the directory."""
    return max(len(line) for line in text.split("\n") if str(workdir) not in line)


def line_of(text, name):
    return next(line for line in text.split("\n") if line.strip().startswith(name))


def test_a_whole_run(tmp_path):
    baseline = {"majority_letter": 0.413}
    rows = [scored(0, "physics", 0.40, **baseline), scored(0, "gym:chain", 0.445)]
    rows += [trained(step, reward=step / 10, loss=0.1 / step) for step in range(1, 11)]
    rows += [scored(10, "physics", 0.38, **baseline), scored(10, "gym:chain", 0.582)]
    metrics(tmp_path, rows)
    (tmp_path / "export").mkdir()
    text = write_report(tmp_path, ["gym:chain"])
    assert text.isascii() and widest(text, tmp_path) <= 80
    assert "reward  0.300 -> 0.800" in text and "step 0 -> step 10" in text
    # Unpaired: 1.96 * hypot(2, 2) = 5.54 points.
    assert "44.5    58.2  +13.7 [+8.2, +19.2]    80.0 -> 80.0" in line_of(text, "gym:chain")
    assert "-2.0 [-7.5, +3.5]" in line_of(text, "physics")
    assert text.count("interval unpaired") == 2 and "most frequent letter: 41.3" in text
    order = [text.index(word) for word in ("in domain", "gym:chain  ", "out of domain", "physics ")]
    assert order == sorted(order)
    assert "export" in text and "checkpoints" not in text
    assert "| 10 | `gym:chain` | 8 | 50 | 0.582 |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_change_is_paired_by_item(tmp_path):
    rng = np.random.default_rng(0)
    hard_N1 = rng.random((40, 1))
    old, new = (rng.random((40, 8)) < hard_N1 + d for d in (0.0, 0.2))

    def se_of(rewards):
        return rewards.mean(1).std(ddof=1) / np.sqrt(40)

    rows = [scored(0, "a", old.mean(), se_of(old)), scored(9, "a", new.mean(), se_of(new))]
    generations(tmp_path, 0, "a", old)
    generations(tmp_path, 9, "a", new)
    (outcome,) = compare(rows, tmp_path, ["b"])
    assert outcome.paired and not outcome.in_domain
    assert outcome.change_se == pytest.approx(se_of(new.astype(float) - old))
    assert outcome.change_se < 0.6 * np.hypot(se_of(old), se_of(new))
    metrics(tmp_path, rows)
    assert "unpaired" not in write_report(tmp_path, ["b"])


@pytest.mark.parametrize("spoil", ["other items", "gone", "torn"])
def test_without_both_files_the_interval_is_unpaired(tmp_path, spoil):
    generations(tmp_path, 0, "a", np.ones((5, 2)))
    generations(tmp_path, 9, "a", np.ones((4 if spoil == "other items" else 5, 2)))
    path = tmp_path / "evals" / "step_9" / "a.jsonl"
    if spoil == "gone":
        path.unlink()
    if spoil == "torn":
        path.write_text(path.read_text()[:-7])
    (outcome,) = compare([scored(0, "a", 1.0), scored(9, "a", 1.0)], tmp_path, ["a"])
    assert not outcome.paired and outcome.change_se == pytest.approx(np.hypot(0.02, 0.02))


def test_the_first_and_the_last_evaluation_are_compared(tmp_path):
    rows = [scored(step, "a", 0.1 * step) for step in (0, 2, 4)] + [scored(0, "b", 0.3)]
    metrics(tmp_path, rows + [scored(2, "b", 0.4)])
    text = write_report(tmp_path, ["a"])
    assert "0.0    40.0  +40.0" in line_of(text, "a ")
    assert "here step 0 -> step 2" in text


def test_a_resumed_run_counts_each_step_once(tmp_path):
    rows = [scored(0, "a", 0.2), trained(1, 0.1), trained(2, 0.9), trained(2, 0.3), trained(3, 0.4)]
    metrics(tmp_path, rows, tail='{"step": 4, "split": "tra')
    read = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row.get("reward")) for row in read][1:] == [(1, 0.1), (2, 0.3), (3, 0.4)]
    assert "Training: 3 steps" in write_report(tmp_path, ["a"])


UNDER = dict(n=50, temperature=0.6, top_p=0.95, max_new_tokens=64, problems_crc32=7)


@pytest.mark.parametrize(
    "field, value, words",
    [
        ("n", 40, "items 50 -> 40"),
        ("temperature", 1.0, "temperature 0.6 -> 1"),
        ("top_p", 1.0, "top_p 0.95 -> 1"),
        ("max_new_tokens", 128, "max_new_tokens 64 -> 128"),
        ("problems_crc32", 8, "other problems or gold answers"),
    ],
)
def test_no_change_is_shown_between_evaluations_under_different_conditions(tmp_path, field, value, words):
    generations(tmp_path, 0, "a", np.zeros((5, 2)))
    generations(tmp_path, 9, "a", np.ones((5, 2)))  # the same items, so they could be paired
    metrics(tmp_path, [scored(0, "a", 0.3, **UNDER), scored(9, "a", 0.5, **UNDER | {field: value})])
    text = write_report(tmp_path, ["a"])
    assert "30.0    50.0  not comparable" in line_of(text, "a ") and "+20" not in text
    assert f"not comparable: {words}\n" in text
    assert "before: interval [26.1, 33.9]" in text and "after: interval [46.1, 53.9]" in text
    assert widest(text, tmp_path) <= 80


def test_more_samples_an_item_leave_the_change_and_are_told(tmp_path):
    metrics(tmp_path, [scored(0, "a", 0.3, **UNDER), scored(9, "a", 0.5, **UNDER | {"k": 16})])
    text = write_report(tmp_path, ["a"])
    assert "+20.0 [" in line_of(text, "a ") and "k 8 -> 16: pass@k is not comparable" in text


def test_lines_of_an_older_version_are_compared_as_before(tmp_path):
    metrics(tmp_path, [scored(0, "a", 0.3), scored(9, "a", 0.5, **UNDER)])
    text = write_report(tmp_path, ["a"])
    assert "+20.0 [" in line_of(text, "a ") and "comparable" not in text


def test_only_a_before_line(tmp_path):
    metrics(tmp_path, [scored(0, "a", 0.445)])
    text = write_report(tmp_path, ["a"])
    assert "step 0 alone" in text and "before: interval [40.6, 48.4]" in text
    assert "No training step" in text


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [trained(1)],
        [trained(1, NAN, NAN), trained(2, None, 0.1), {"step": 3, "split": "train"}],
        [scored(0, "a", NAN, NAN), scored(5, "a", 0.5, NAN)],
        [scored(0, "a", 0.5, None), scored(5, "a", 0.5, None)],
        [{"step": 0, "split": "eval/a"}, {"step": 1, "split": "eval/a"}],
        [scored(0, "a", 1.0, 0.0), scored(5, "a", 0.0, 0.0), trained(3, float("inf"), 1e300)],
    ],
)
def test_it_survives(tmp_path, rows):
    metrics(tmp_path, rows)
    text = write_report(tmp_path, ["a"])
    assert "nan" not in text and "Files in" in text
    assert (tmp_path / "report.png").exists()


def test_it_survives_without_metrics(tmp_path):
    assert "There was no evaluation." in write_report(tmp_path, ["a"])


def test_hostile_set_names(tmp_path):
    names = [
        "jsonl:/data/" + "deep/" * 30 + "$x_{$.jsonl",
        "jsonl:/d\u00e9j\u00e0/\u4e2d\u6587|`.jsonl",
    ]
    metrics(tmp_path, [scored(step, name, 0.5) for step in (0, 1) for name in names])
    text = write_report(tmp_path, names[:1])
    lines = text.split("\n")
    assert text.isascii() and all(len(line) <= 80 for line in lines if str(tmp_path) not in line)
    assert "$x_{$.jsonl" in text and "in domain" in text


def test_a_line_that_is_no_row_is_named(tmp_path):
    metrics(tmp_path, [trained(1)], tail='{"split": "train"}\n')
    with pytest.raises(UserError, match="metrics.jsonl line 2"):
        write_report(tmp_path, ["a"])


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "report.md").mkdir()
    with pytest.raises(UserError, match="report cannot be written"):
        write_report(tmp_path, ["a"])


def test_what_became_of_the_rollouts_and_what_went_wrong_is_said(tmp_path):
    counts = {
        "taught": 30,
        "out_all_right": 60,
        "out_quote_missing": 10,
        "quote_found": 0.8,
        "quote_exact": 0.5,
    }
    metrics(tmp_path, [{**trained(step), "active_tokens": 0, **counts} for step in range(1, 7)])
    text = write_report(tmp_path, ["gym:chain"])
    assert "rollouts 600: 30% taught, 60% group all right, 10% quote not found" in text
    assert "80% of the quotes were found, 50% were exact (mean over steps)" in text
    said = " ".join(text.split())
    assert "Warning: 6 of 6 steps (the last: step 6) did not change the weights" in said
    assert widest(text, tmp_path) <= 80


def validated(step, avg):
    return {**scored(step, "a", avg), "split": "validation/a"}


def test_the_step_that_validation_chose_is_shown_next_to_the_last(tmp_path):
    rows = [validated(step, avg) for step, avg in ((0, 0.5), (5, 0.7), (10, 0.7), (15, 0.6))]
    assert best_step(rows) == 5, "of equals the earliest"
    rows += [scored(0, "a", 0.4), scored(15, "a", 0.45), scored(5, "a", 0.6)]
    metrics(tmp_path, rows)
    text = write_report(tmp_path, ["a"])
    assert "50.0 at step 0 (before), 70.0 at step 5 (best), 60.0 at step 15 (last)" in text
    best, last = text.split("Evaluation: ")[1:]
    assert "step 0 -> step 5" in best and "40.0    60.0  +20.0" in line_of(best, "a ")
    assert "step 0 -> step 15" in last and "40.0    45.0  +5.0" in line_of(last, "a ")
    assert "| 5 | `a` (validation) | 8 | 50 | 0.7 |" in (tmp_path / "report.md").read_text()


def test_steps_validated_under_other_conditions_are_not_compared():
    rows = [validated(0, 0.5), {**validated(5, 0.9), **UNDER}, {**validated(10, 0.6), **UNDER, "n": 40}]
    assert best_step(rows) == 10
    assert best_step(rows[:2]) == 5


@pytest.mark.parametrize("best", [0, 15])
def test_one_table_where_the_best_step_is_the_first_or_the_last(tmp_path, best):
    rows = [validated(0, 0.5), validated(15, 0.7 if best else 0.3), scored(0, "a", 0.4), scored(15, "a", 0.3)]
    metrics(tmp_path, rows)
    text = write_report(tmp_path, ["a"])
    assert text.count("Evaluation: ") == 1
    assert f"at step {best} ({'best, last' if best else 'before, best'})" in text


def test_the_model_card_has_the_scores_of_its_step_and_no_local_path(tmp_path):
    rows = [scored(0, "gym:chain", 0.4), scored(0, "jsonl:/home/me/secret/a|b.jsonl", 0.3)]
    rows += [scored(5, "gym:chain", 0.6), scored(9, "gym:chain", 0.5)]
    metrics(tmp_path, rows)
    config = use_preset(default_config(), "span")
    config.model.path = "/home/me/.cache/huggingface/hub/models--Qwen--Qwen3-0.6B/snapshots/0123"
    config.data.train = "gym:chain"
    card = model_card(validate(config), tmp_path, ["gym:chain"], 5)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == "Qwen/Qwen3-0.6B"
    assert "Qwen/Qwen3-0.6B after 5 steps of training on gym:chain" in text
    assert "| gym:chain | in domain | 50 | 8 | 40.0 | 60.0 | +20.0 [+14.5, +25.5] |" in text
    assert "| a\\|b.jsonl | out of domain | 50 | 8 | 30.0 | n/a |" in text
    assert "/home" not in card and "| `lesson.region` | `span` |" in text


def test_the_model_card_of_an_ablation_says_what_was_replaced(tmp_path):
    config = default_config()
    plain = model_card(validate(config), tmp_path, ["gym:chain"], 1)
    config.ablation.swapped_ideas = 0.5
    card = model_card(validate(config), tmp_path, ["gym:chain"], 1)
    assert "ablation." not in plain and "| `ablation.swapped_ideas` | `0.5` |" in card.splitlines()


def test_the_model_card_of_a_run_without_evaluation_says_so(tmp_path):
    config = use_preset(default_config(), "span")
    config.model.path = "models/gym"
    card = model_card(validate(config), tmp_path, ["gym:chain"], 1)
    assert "The model was not evaluated." in card and "base_model" not in card
