"""How many devices a CPU is to JAX: one for each core where a run's rows lie along all devices."""

import os
import subprocess
import sys

import jax
import pytest

from configs.quickstart import get_config
from rosd_jax.config import default_config, validate
from rosd_jax.train import devices


@pytest.fixture
def asked(monkeypatch):
    """What JAX is asked for by a process of its own, whose user has set nothing."""
    for name in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    return found


@pytest.mark.parametrize("cores, count", [(1, 1), (2, 2), (3, 2), (4, 4), (64, 8)])
def test_cores_share_the_rows_while_each_has_eight(asked, monkeypatch, cores, count):
    monkeypatch.setattr(devices, "cores", lambda: cores)
    devices.split_cpu(validate(get_config()))
    assert asked == {"jax_num_cpu_devices": count}


@pytest.mark.parametrize(
    "field, rows, count", [("batch.prompts", 7, 2), ("batch.device_rows", 64, 2), ("eval.batch", 6, 2)]
)
def test_every_batch_can_be_dealt_out(asked, monkeypatch, field, rows, count):
    monkeypatch.setattr(devices, "cores", lambda: 64)
    config = get_config()
    config.update_from_flattened_dict({field: rows})
    config = validate(config)
    devices.split_cpu(config)
    assert asked == {"jax_num_cpu_devices": count}
    devices.check_rows(config, count)


def test_other_meshes_and_other_peoples_choices_stay(asked, monkeypatch):
    devices.split_cpu(validate(default_config()))
    for name, value in (("JAX_NUM_CPU_DEVICES", "1"), ("XLA_FLAGS", f"--{devices.HOST_DEVICES}=3")):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            devices.split_cpu(validate(get_config()))
    assert asked == {}


def test_jax_has_these_devices_and_keeps_them():
    code = (
        "import jax; from configs.quickstart import get_config; from rosd_jax.train import devices\n"
        "from rosd_jax.config import validate\n"
        "for devices.cores in (lambda: 4, lambda: 1):\n"
        "    devices.split_cpu(validate(get_config()))\n"
        "    print(jax.device_count())"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    env["JAX_PLATFORMS"] = "cpu"
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["4", "4"]
