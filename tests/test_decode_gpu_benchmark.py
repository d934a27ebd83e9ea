"""The decoding step's benchmark for a GPU, tiny and on CPU: its bytes, and that all of it runs."""

import json

import pytest

from benchmarks import decode_gpu, decode_gpu_ragged

TINY = dict(vocab=64, hidden=32, inner=48, layers=2, heads=4, kv_heads=2, width=16)
RUN = dict(rows=3, context=20, page=8, copy_mib=1, rounds=2, steps=2)


def flags(**sizes):
    return [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]


@pytest.mark.nightly
def test_reports_times_the_roofline_and_how_far_attention_is_off(tmp_path):
    out = tmp_path / "step.json"
    decode_gpu.main([f"--out={out}", "--implementation=xla", *flags(**TINY, **RUN)])
    record = json.loads(out.read_text())
    assert record["sizes"] == TINY | RUN and record["peak_bytes"] is None
    assert record["step_ms"]["n"] == 2 and record["step_ms"]["median"] > 0 and record["error"] < 2e-2
    assert record["kv_bytes"] == 3 * 20 * 2 * (2 * 2 * 16) * 2
    blocks = 32 * (4 + 2 * 2) * 16 + 4 * 16 * 32 + 3 * 32 * 48
    norms = 4 * (2 * (32 + 32 + 6 * 16) + 32)  # float32, those of heads once for each head
    assert record["weight_bytes"] == 2 * (64 * 32 + 2 * blocks) + norms
    ideal_ms = 1e3 * (record["kv_bytes"] + record["weight_bytes"]) / record["copy_bytes_a_s"]
    assert record["ideal_ms"] == pytest.approx(ideal_ms)
    assert record["roofline"] == pytest.approx(ideal_ms / record["step_ms"]["median"])


def test_knows_these_implementations_only(tmp_path, capsys):
    with pytest.raises(SystemExit):
        decode_gpu.main([f"--out={tmp_path / 'step.json'}", "--implementation=pallas_tpu"])
    assert "invalid choice: 'pallas_tpu'" in capsys.readouterr().err


def test_ragged_rows_get_their_lengths_in_a_cache_that_is_a_share_of_a_dense_one(tmp_path):
    out, rows = tmp_path / "ragged.json", dict(rows=8, samples=4, prompt=9, mean=6, most=16, page=8, rounds=1)
    told = [f"--out={out}", "--contestant=ours", "--share=0.75", *flags(**TINY, **rows)]
    decode_gpu_ragged.main(told)
    record = json.loads(out.read_text())
    position = 2 * (2 * 2 * 16) * 2
    assert record["dense_bytes"] == 8 * (9 + 16) * position
    assert record["cache_bytes"] == 18 * 8 * position  # whole pages
    assert record["steps"] >= record["longest"] and 8 <= record["tokens"] <= 8 * 16
    assert record["seconds"]["median"] > 0 and 0 < record["idle_share"] < 1
