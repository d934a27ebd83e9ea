"""Trackers: TensorBoard's files and an offline W&B run have the lines of metrics.jsonl, each once."""

import json
import struct
import time

import pytest

from rosd_jax.config import default_config, use_preset, validate
from rosd_jax.errors import UserError
from rosd_jax.train import trackers
from rosd_jax.train.metrics import MetricsLog
from rosd_jax.train.trackers import Trackers, require_trackers

SETTINGS = validate(use_preset(default_config(), "span"))


def start(name, directory, lines):
    """One start of a run: it writes these lines, each of which is sent at once."""
    log = MetricsLog(directory / "metrics.jsonl")
    sent = Trackers([name], directory, SETTINGS)
    sent.send()
    for step, split, numbers in lines:
        log.write(step, split, numbers)
        sent.send()
    sent.close()


FIRST = [
    (0, "eval/gym:chain", {"avg": 0.5}),
    (1, "train", {"reward": 0.25, "loss": float("nan")}),
    (2, "train", {"reward": 0.5}),
]
SECOND = [(3, "train", {"reward": 0.75})]
POINTS = [
    ("eval/gym:chain/avg", 0, 0.5),
    ("train/reward", 1, 0.25),
    ("train/reward", 2, 0.5),
    ("train/reward", 3, 0.75),
]


def records(data):
    """The payloads of a file of TensorFlow records: length, its checksum, payload, its checksum."""
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield data[12 : 12 + length]
        data = data[16 + length :]


def tensorboard_points(directory):
    from tensorboardX.proto.event_pb2 import Event

    (path,) = (directory / "tensorboard").iterdir()
    events = [Event.FromString(payload) for payload in records(path.read_bytes())]
    values = [(value, event.step) for event in events for value in event.summary.value]
    return [(v.tag, step, v.simple_value) for v, step in values if v.HasField("simple_value")]


def wandb_records(data):
    """The payloads of a W&B file of one block: 7 bytes, then checksum, length, kind and payload."""
    assert len(data) < 2**15
    data = data[7:]
    while data:
        _, length, kind = struct.unpack("<IHB", data[:7])
        assert kind == 1  # a whole record
        yield data[7 : 7 + length]
        data = data[7 + length :]


def wandb_points(directory):
    """The points of all offline parts of the run, and the ids that they belong to."""
    from wandb.proto.wandb_internal_pb2 import Record

    points = []
    ids = set()
    for path in sorted((directory / "wandb").glob("offline-run-*/*.wandb")):
        for data in wandb_records(path.read_bytes()):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            row = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item
            }
            step = row.get("step")
            points += [(key, step, value) for key, value in row.items() if key[0] != "_" and key != "step"]
    return points, ids


def test_tensorboard_has_every_line_once_after_a_second_start(tmp_path):
    start("tensorboard", tmp_path, FIRST)
    start("tensorboard", tmp_path, SECOND)
    name, *rest = zip(*tensorboard_points(tmp_path), strict=True)
    want_names, *want = zip(*POINTS, strict=True)
    assert rest == want
    assert name == tuple(text.replace(":", "_") for text in want_names)  # TensorBoard's tags have no colon


def test_wandb_goes_on_in_the_same_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    start("wandb", tmp_path, FIRST)
    start("wandb", tmp_path, SECOND)
    # W&B's own process writes the file, and may do so shortly after the run has finished.
    began = time.monotonic()
    while len(wandb_points(tmp_path)[0]) < len(POINTS) and time.monotonic() - began < 60:
        time.sleep(0.1)
    points, ids = wandb_points(tmp_path)
    assert points == POINTS
    assert len(ids) == 1


def test_a_tracker_whose_package_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trackers has 'wandb', which needs .* pip install wandb"):
        require_trackers(["wandb"])


def test_a_tracker_that_does_not_start_is_named(tmp_path):
    (tmp_path / "tensorboard").write_text("a file where the directory should be")
    with pytest.raises(UserError, match="trackers has 'tensorboard', which does not start"):
        Trackers(["tensorboard"], tmp_path, SETTINGS)


def test_a_tracker_that_fails_later_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    sent = Trackers(["tensorboard"], tmp_path, SETTINGS)

    def fails(self, row):
        raise OSError("no space left")

    monkeypatch.setattr(trackers.TensorBoard, "send", fails)
    MetricsLog(tmp_path / "metrics.jsonl").write(1, "train", {"reward": 0.5})
    MetricsLog(tmp_path / "metrics.jsonl").write(2, "train", {"reward": 0.5})
    sent.close()
    warnings = [record.getMessage() for record in caplog.records if "tensorboard" in record.getMessage()]
    assert len(warnings) == 1 and "no space left" in warnings[0]
