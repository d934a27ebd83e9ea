"""The plan: slices that exist, what fits on them, bytes and FLOPs that can be checked, and what it prints."""

import contextlib
import json
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache, partial

import jax
import numpy as np
import pytest
from test_run import run  # noqa: F401  (a fixture)

import tiny
from benchmarks.step_flops import QWEN3
from configs import quickstart, qwen3_science
from rosd_jax.config import validate
from rosd_jax.errors import UserError
from rosd_jax.models.families import read_config
from rosd_jax.models.qwen3 import Qwen3Config, hidden_states, init_params
from rosd_jax.models.sharding import row_devices
from rosd_jax.plan import command as plans
from rosd_jax.plan import printed, roofline
from rosd_jax.plan.budget import frozen_bytes, gradients, resident
from rosd_jax.plan.chips import CHIPS, COUNTED, SIDES, Slice, read_topology
from rosd_jax.plan.command import Asked, compiled_stages, make_plan
from rosd_jax.plan.roofline import at_limits, realistic
from rosd_jax.plan.stages import STAGES, make_job, microbatch_widths, stage_names, stages
from rosd_jax.plan.whole_run import scored_sets
from rosd_jax.train.engines import check_attention
from rosd_jax.train.inputs import read_inputs
from rosd_jax.train.microbatches import plan_microbatches
from rosd_jax.train.schedule import is_due
from rosd_jax.types import Lesson
from support import NEEDS_LIBTPU, ROOT, nightly_but, run_environment

MODELS = {
    size: QWEN3[size].replace(num_tokens=151669, dtype="bfloat16", remat="block") for size in ("4b", "8b")
}
PARAMETERS = {"4b": 4.022e9, "8b": 8.191e9}  # as their model cards round them: 4.0 and 8.2 billion
STOP, ITEMS = (151645, 151643), 100


@cache
def chips(topology: str) -> Slice:
    return read_topology(topology)


def job_of(size: str, topology: str, *variants: str, **fields):
    config = qwen3_science.get_config(",".join(variants))
    config.update_from_flattened_dict(fields)
    config = validate(config)
    return make_job(config, MODELS[size].replace(remat=config.model.remat), chips(topology))


def planned_of(job, topology: str, sets=None):
    """By arithmetic alone."""
    return make_plan(job, replace(chips(topology), compiles=False), STOP, None, ITEMS, sets=sets)


def plan(config, topology: str, *compiled: str, as_json: bool = False):
    """Prints the plan."""
    plans.plan(validate(config), Asked(topology, compiled, as_json), lambda what: None)


# --- slices -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, count", [("v5p:2x2x2", 8), ("v5e:8x8", 64), ("v6e:4x4", 16)])
@NEEDS_LIBTPU
def test_a_tpu_slice_has_its_chips(name, count):
    found = chips(name)
    assert len(found.devices) == count and found.chip is CHIPS[name[:3]]
    assert found.devices[0].device_kind in found.chip.kinds


@pytest.mark.parametrize("kind", SIDES)
@NEEDS_LIBTPU
def test_every_named_tpu_slice_exists(kind):
    for count, sides in SIDES[kind].items():
        name = f"{kind}-{count * COUNTED[kind]}"
        found = read_topology(name)
        assert len(found.devices) == count and found.name == f"{kind}:{sides}", name


@pytest.mark.parametrize("variant", qwen3_science.SLICES)
@NEEDS_LIBTPU
def test_the_slices_of_the_preset_are_named_as_topologies(variant):
    """h200, which is one GPU, is the only variant whose name is not also a topology."""
    topology, mesh = qwen3_science.SLICES[variant]
    found = read_topology(topology if variant == "h200" else variant)
    assert found.name == topology and len(found.devices) == np.prod(mesh)


def hide_libtpu(monkeypatch):
    """As if it were not installed."""
    monkeypatch.setitem(sys.modules, "libtpu", None)
    monkeypatch.delenv("TPU_LIBRARY_PATH", raising=False)  # which libtpu sets once it is imported


COMPARED = [("v6e:4x4", "v6e-16"), ("v5p:2x2x2", "mesh")]


def arithmetic_of(topology: str, variant: str):
    """What a plan says without the compiler, and the devices that it was made for."""
    slice_ = read_topology(topology)
    config = qwen3_science.get_config("8b" if variant == "mesh" else f"8b,{variant}")
    job = make_job(validate(config), MODELS["8b"], slice_)
    planned = [stages(job, STOP, None, ITEMS), (at_limits(job.config), realistic(job.config))]
    numbers = [(s.name, s.bytes, [asdict(s.work(n)) for n in planned[1]]) for s in planned[0]]
    return slice_.devices[0].platform, slice_.platform, numbers


def compare_without_libtpu():
    """Called by the test below in a process that has not started JAX, so that it can have 16 CPU devices."""
    described = [arithmetic_of(*compared) for compared in COMPARED]
    hide_libtpu(pytest.MonkeyPatch())
    represented = [arithmetic_of(*compared) for compared in COMPARED]
    for (topology, _), with_it, without in zip(COMPARED, described, represented, strict=True):
        assert with_it[:2] == ("tpu", "tpu") and without[:2] == ("cpu", "tpu")
        assert with_it[2] == without[2] and len(with_it[2]) == len(STAGES)
        print(topology, "is the same")


@NEEDS_LIBTPU
def test_a_tpu_slice_is_planned_without_libtpu_as_with_it():
    """Bytes, FLOPs, memory traffic and GB sent of every stage."""
    done = subprocess.run(
        [sys.executable, "-c", "import test_plan; test_plan.compare_without_libtpu()"],
        env=run_environment(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [f"{topology} is the same" for topology, _ in COMPARED]


@pytest.fixture
def without_libtpu(monkeypatch):
    hide_libtpu(monkeypatch)


@pytest.mark.nightly
@pytest.mark.usefixtures("without_libtpu")
def test_without_libtpu_only_compiling_is_refused(tmp_path_factory, capsys):
    config = quickstart.get_config("debug")
    config.model.path = str(tiny.model_dir(tmp_path_factory))
    plan(config, "v5p-16")
    told = capsys.readouterr().out
    assert "8 (v5p:2x2x2: v5p, 102.8 GB each)" in told and "verdict     fits" in told
    assert "not lowered or compiled, since libtpu is not installed" in told
    with pytest.raises(UserError, match=r"--compile needs libtpu: pip install libtpu \(no TPU is needed\)"):
        plan(config, "v5p-16", "all")


@pytest.mark.usefixtures("without_libtpu")
def test_without_libtpu_a_slice_must_still_be_one_that_exists():
    with pytest.raises(UserError, match="the first two sides must be even, since a host has 2x2 chips"):
        read_topology("v5p:3x5")


def test_gpus_are_planned_without_any():
    assert len(chips("h100:8").devices) == 8 and not chips("h100:8").compiles


@pytest.mark.parametrize(
    "name, words",
    [
        ("v9x:2x2", "it must be local, a TPU slice"),
        ("v5p", "it must be local, a TPU slice"),
        ("h100", "it must be local, a TPU slice"),
        ("", "it must be local, a TPU slice"),
        ("h100:0", "it must give the number of GPUs"),
        ("h100:2x2", "it must give the number of GPUs"),
        ("h100:2000", "plan in a new process"),
        pytest.param("v5p:3x5", "which the TPU compiler does not accept", marks=NEEDS_LIBTPU),
        ("v6e:x", "it must give the sides of a slice"),
        ("v5p-9", "Cloud TPU has v5p-8, v5p-16"),
        ("v6e-", "Cloud TPU has v6e-1, v6e-4"),
        ("h100x0", "it must give the number of GPUs"),
        ("v5p:0x0x0", "it must give the sides of a slice"),  # libtpu divides by it
        ("v5p:999x999x999", "it must give the sides of a slice of at most 16384 chips"),
    ],
)
def test_a_slice_that_does_not_exist_is_named(name, words):
    with pytest.raises(UserError, match=words):
        read_topology(name)


def test_a_mesh_that_does_not_fit_the_slice_or_the_model_is_named():
    with pytest.raises(UserError, match="the product must be the number of devices, 8"):
        job_of("8b", "h100:8", **{"mesh.fsdp": 16})
    with pytest.raises(UserError, match="must be a multiple of mesh.data x mesh.fsdp = 8"):
        job_of("8b", "h100:8", **{"batch.prompts": 3, "batch.samples": 3})
    config = qwen3_science.get_config()
    config.mesh.tensor = 8
    with pytest.raises(UserError, match="mesh.tensor is 8; it must divide"):
        make_job(validate(config), MODELS["8b"].replace(num_key_value_heads=4), chips("h100:8"))


@pytest.mark.parametrize(
    "mesh, topology, words",
    [
        ((1, 4, 1), "h100x8", "is a mesh of 4 chips, and h100:8 has 8; .* such as h100:4, with --topology"),
        ((1, 8, 1), "h100:4", "such as h100:8, with --topology"),
        ((1, -1, 3), "h100:4", "a mesh of a multiple of 3 chips, and h100:4 has 4; .* such as h100:3,"),
        ((1, 16, 1), "local", "such as v5e:4x4, v5p:2x2x4, v6e:4x4, h100:16, h200:16, with --topology"),
        ((1, 7, 1), "h200:2", "such as h200:7, with --topology"),
        ((1, -1, 1), "h100:4", ""),
        ((-1, 2, 2), "h100:4", ""),
        ((1, 2, 2), "h100:4", ""),
    ],
)
def test_a_mesh_of_another_size_is_told_which_slice_it_needs(mesh, topology, words):
    config = qwen3_science.get_config()
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    found = chips(topology)
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        plans.check_mesh(validate(config).mesh, found)


def test_a_plan_names_the_slice_that_its_mesh_needs(tmp_path_factory):
    config = quickstart.get_config("debug")
    config.model.path = str(tiny.model_dir(tmp_path_factory))
    config.mesh.data = 4
    with pytest.raises(UserError, match="such as h100:4, with --topology"):
        plan(config, "h100:8")


# --- what fits ----------------------------------------------------------------------------------------

ON_TPU = [name for name, (topology, _) in qwen3_science.SLICES.items() if topology.startswith("v")]


@pytest.mark.parametrize("size", MODELS)
@pytest.mark.parametrize(
    "chips_name",
    [pytest.param(name, marks=NEEDS_LIBTPU) if name in ON_TPU else name for name in qwen3_science.SLICES],
)
def test_every_preset_fits_its_slice_at_the_paper_s_lengths(size, chips_name):
    if (size, chips_name) in qwen3_science.TOO_LARGE:
        with pytest.raises(UserError, match=f"too small for {size}"):
            qwen3_science.get_config(f"{size},{chips_name}")
        return
    topology, mesh = qwen3_science.SLICES[chips_name]
    job = job_of(size, topology, size, chips_name)
    c = job.config
    lengths = c.data.max_prompt_tokens, c.lesson.max_teacher_tokens, c.rollout.max_new_tokens
    assert (*lengths, c.batch.prompts, c.batch.samples) == (2048, 10240, 8192, 32, 8)
    assert tuple(job.mesh.shape.values()) == mesh and row_devices(job.mesh) <= 16
    found = planned_of(job, topology)
    assert found.fits and not found.changes
    assert found.parameters == pytest.approx(PARAMETERS[size], rel=1e-3)


def test_adapters_of_8b_fit_one_gpu_of_80_gb():
    job = job_of("8b", "h100:1", "lora")
    found = planned_of(job, "h100:1")
    assert found.fits and found.parameters == pytest.approx(PARAMETERS["8b"], rel=1e-3)
    held = {stage.name: stage.bytes for stage in found.stages}
    assert held["student"]["frozen"] == pytest.approx(2 * PARAMETERS["8b"], rel=1e-3)
    assert held["student"]["gradients"] == pytest.approx(4 * 174.6e6, rel=1e-2)  # adapters of rank 64
    assert planned_of(job_of("8b", "h200:1", "8b", "h200", "lora"), "h200:1").fits


def test_a_method_without_a_teacher_is_planned_without_one():
    found = planned_of(job_of("8b", "h100:8", "8b", "h100x8", "grpo_strong"), "h100:8")
    names = ("rollouts", "evaluation", "student", "optimizer")
    assert tuple(stage.name for stage in found.stages) == names
    text = printed.as_text(found)
    assert "teacher" not in text and "reflect" not in text
    with pytest.raises(UserError, match=f"'teacher'; it must be all, or some of {', '.join(names)}"):
        compiled_stages(["teacher"], stage_names(found.job.config))
    both = planned_of(job_of("8b", "h100:8", "8b", "h100x8", "rosd_grpo"), "h100:8")
    assert tuple(stage.name for stage in both.stages) == STAGES


def test_with_adapters_a_frozen_tree_on_the_host_is_brought_to_every_stage_but_the_optimizer():
    job = job_of("8b", "h100:1", "lora", **{"model.frozen": "host"})
    held = {stage.name: stage.bytes.get("frozen", 0) for stage in stages(job, STOP, None, ITEMS)}
    whole = frozen_bytes(job)
    assert held == dict.fromkeys(STAGES, whole) | {"optimizer": 0}


def test_adapters_take_no_gradients_of_the_weights():
    model, one = MODELS["8b"], roofline.MeshSplit(shards=1, tensor=1, fsdp=1, item=2)
    learn = partial(
        roofline.learn_work, model, one, rows=1, width=4096, active=1000, remat="block", grad_bytes=0
    )
    saved = learn().flops - learn(adapters=True).flops
    matrices = PARAMETERS["8b"] - 2 * 151936 * 4096
    assert saved == pytest.approx(2 * matrices * 4096 + 2 * 1000 * 151936 * 4096, rel=1e-3)


def test_what_does_not_fit_is_said_with_fields_that_help():
    """8B trained whole on one H200, which the presets refuse, and which no single field makes fit."""
    job = job_of("8b", "h200:1")
    found = planned_of(job, "h200:1")
    assert found.fits is False and found.verdict == "does not fit"
    largest = max(found.stages, key=lambda stage: stage.total)
    assert found.changes and all(largest.name in change for change in found.changes)
    fields = {change.split(" to ")[0] for change in found.changes}
    assert "optimizer.mu_dtype" in fields and "batch.device_rows" not in fields
    text = printed.as_text(found)
    assert "verdict     does not fit" in text and f"change {found.changes[0]}" in text
    assert "XLA_CLIENT_MEM_FRACTION" in text


def test_changes_that_suffice_only_together_are_named():
    """4B trained whole on one H100."""
    found = planned_of(job_of("4b", "h100:1"), "h100:1")
    assert found.fits is False
    (line,) = found.remedies
    assert line.startswith("it fits with ")
    changed = dict(word.rstrip(":").split("=") for word in line.split() if "=" in word)
    typed = {name: int(new) if new.isdigit() else new for name, new in changed.items()}
    assert len(typed) > 1
    assert planned_of(job_of("4b", "h100:1", **typed), "h100:1").fits
    for name, new in typed.items():
        assert not planned_of(job_of("4b", "h100:1", **{name: new}), "h100:1").fits


def test_where_no_changes_suffice_adapters_and_a_larger_slice_are_named():
    found = planned_of(job_of("8b", "h100:1"), "h100:1")
    together, adapters, larger = found.remedies
    assert together.startswith("all changes together do not suffice") and "of 81.2 GB" in together
    assert adapters.startswith("with model.lora.rank=64 it fits, but then adapters are trained")
    assert "smallest slice that suffices, with 5 % to spare, is --topology=h100:4 with mesh.data=1" in larger
    assert "mesh.fsdp=4 mesh.tensor=1: evaluation takes 66.2 of 81.2 GB" in larger
    assert planned_of(job_of("8b", "h100:4", **{"mesh.fsdp": 4}), "h100:4").fits
    assert not planned_of(job_of("8b", "h100:2", **{"mesh.fsdp": 1, "mesh.tensor": 2}), "h100:2").fits
    assert all(remedy in printed.as_text(found) for remedy in found.remedies)
    assert json.loads(printed.as_json(found))["remedy"] == list(found.remedies)


@pytest.mark.parametrize(
    "size, small, found, mesh",
    [
        ("8b", "v6e-1", "v6e:2x4", "mesh.fsdp=2 mesh.tensor=4"),
        ("8b", "h100:2", "h100:4", "mesh.fsdp=4 mesh.tensor=1"),
        ("4b", "v6e-1", "v6e:2x2", "mesh.fsdp=2 mesh.tensor=2"),
        ("4b", "v5e-1", "v5e:2x4", "mesh.fsdp=2 mesh.tensor=4"),
    ],
)
@pytest.mark.usefixtures("without_libtpu")
def test_the_smallest_slices_are_those_that_the_config_names(size, small, found, mesh):
    """In the docstring of configs/qwen3_science.py."""
    job = make_job(validate(qwen3_science.get_config(size)), MODELS[size], read_topology(small))
    line = make_plan(job, read_topology(small), STOP, None, ITEMS).remedies[-1]
    assert f"--topology={found} with mesh.data=1 {mesh}: " in line


@pytest.mark.usefixtures("without_libtpu")
def test_where_nothing_suffices_that_is_said():
    """8B with adapters and a very large cache, on one v5e: the eight that the tests have do not suffice."""
    chips_of_v5e = read_topology("v5e:1x1")
    config = qwen3_science.get_config("8b,lora")
    config.rollout.cache_tokens = 2**21
    job = make_job(validate(config), MODELS["8b"], chips_of_v5e)
    *_, last = make_plan(job, chips_of_v5e, STOP, None, ITEMS).remedies
    assert last == "no change that was tried makes it fit"


def test_a_named_change_does_what_it_says():
    before = job_of("8b", "h200:1")
    after = job_of("8b", "h200:1", **{"optimizer.mu_dtype": "bfloat16"})
    saved = resident(before)["optimizer"] - resident(after)["optimizer"]
    assert saved == pytest.approx(2 * PARAMETERS["8b"], rel=1e-3)


# --- bytes --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """The demo's job on a hand-made model, over two CPU devices."""
    path = tiny.model_dir(tmp_path_factory)
    config = quickstart.get_config("debug")
    config.model.path = str(path)
    config = validate(config)
    model = read_config(path, num_tokens=None, dtype="float32", remat="none")
    return make_job(config, model, Slice("local", None, jax.devices()[:2], "cpu", compiles=True))


def on_first_device(tree) -> int:
    """Bytes of a tree's arrays on the first device."""
    shards = (shard for x in jax.tree.leaves(tree) for shard in x.addressable_shards)
    return sum(shard.data.nbytes for shard in shards if shard.device == jax.devices()[0])


def test_what_is_resident_is_what_a_run_holds(small):
    state = small.trees.first()
    frozen = small.trees.frozen(state)
    grads, _ = small.update.zeros()
    planned_bytes = resident(small) | gradients(small)
    used = {
        "parameters": on_first_device(state.params),
        "optimizer": on_first_device(state.opt_state),
        "frozen": on_first_device(frozen),
        "gradients": on_first_device(grads),
    }
    assert planned_bytes == used


@pytest.mark.optimized
@pytest.mark.slow
@pytest.mark.parametrize("method", nightly_but(["rosd", "sdpo"], keep=[0]))
def test_every_stage_of_the_demo_takes_what_is_planned_within_a_fifth(method):
    """The shipped model over two CPU devices, each stage against what its compiled program takes.

    sdpo has no reflections, and a moving average of the weights.
    """
    stages = [name for name in STAGES if method == "rosd" or name != "reflections"]
    config = validate(quickstart.get_config(method))
    model = read_config(ROOT / config.model.path, num_tokens=None, dtype="float32", remat="none")
    local = Slice("local", None, jax.devices()[:2], "cpu", compiles=True)
    job = make_job(config, model, local)
    told = []
    found = make_plan(job, local, (5,), None, 256, compiled=stages, announce=told.append)
    count = len(stages)
    assert told[::2] == [f"lowering {name} (stage {i}/{count})" for i, name in enumerate(stages, 1)]
    assert told[1::2] == [f"compiling {name} (stage {i}/{count})" for i, name in enumerate(stages, 1)]
    assert found.fits is None
    for stage in found.stages:
        assert sum(stage.bytes.values()) == pytest.approx(stage.total, rel=0.2), stage.name
    assert "unknown: a CPU's memory is not checked" in printed.as_text(found)


@pytest.mark.nightly
@pytest.mark.optimized
@pytest.mark.slow
@NEEDS_LIBTPU
def test_the_student_of_8b_takes_what_is_planned_within_a_fifth():
    """85 s of a CPU. docs/performance.md has all stages, on two slices."""
    job = job_of("8b", "v5p:2x2x2")
    found = make_plan(job, chips("v5p:2x2x2"), STOP, None, ITEMS, compiled=["student"])
    student = next(stage for stage in found.stages if stage.name == "student")
    assert student.compiled is not None and not student.compiled.refused
    assert sum(student.bytes.values()) == pytest.approx(student.total, rel=0.2)
    assert student.fits
    kinds = {c.kind for c in student.compiled.collectives or ()}
    assert {"all-gather", "all-reduce"} & kinds


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.optimized
@pytest.mark.parametrize("chips_name", ON_TPU)
@pytest.mark.parametrize("size", MODELS)
@NEEDS_LIBTPU
def test_the_student_of_every_preset_fits_by_the_compiler(size, chips_name):
    """One to three minutes each on two idle cores; docs/performance.md has what they gave."""
    topology, _ = qwen3_science.SLICES[chips_name]
    job = job_of(size, topology, size, chips_name)
    found = make_plan(job, chips(topology), STOP, None, ITEMS, compiled=["student"])
    student = next(stage for stage in found.stages if stage.name == "student")
    assert student.compiled is not None and student.fits and found.fits


# --- FLOPs and lengths --------------------------------------------------------------------------------


@pytest.mark.optimized
def test_flops_are_those_of_a_compiled_forward_pass():
    """One layer, since the compiler counts a scan's body once; it makes all T x T products on a CPU."""
    T = 128
    model = Qwen3Config(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
    )
    shapes = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    tokens = jax.ShapeDtypeStruct((1, T), np.int32)
    program = jax.jit(lambda p, t: hidden_states(p, model, t)).lower(shapes, tokens).compile()
    half = roofline.attention_flops(model, T, T / 2)
    counted = roofline.forward_flops(model, T) + half
    assert counted == pytest.approx(program.cost_analysis()["flops"], rel=0.05)
    assert half / counted > 0.05  # else the test would not see attention


def test_flops_of_8b_by_hand():
    """Six FLOPs a parameter and token of the usual estimate, two of them again; heads for active tokens."""
    model, T = MODELS["8b"], 10240
    one = roofline.MeshSplit(shards=1, tensor=1, fsdp=1, item=2)
    matrices = PARAMETERS["8b"] - 2 * 151936 * 4096
    attention = 2 * 36 * 32 * 128 * T**2  # half of 4 x layers x heads x width x T x T
    work = roofline.learn_work(model, one, rows=1, width=T, active=0, remat="block", grad_bytes=0)
    assert work.flops == pytest.approx(8 * matrices * T + 4.5 * attention, rel=1e-3)
    kept = roofline.learn_work(model, one, rows=1, width=T, active=0, remat="none", grad_bytes=0)
    assert kept.flops == pytest.approx(6 * matrices * T + 3.5 * attention, rel=1e-3)
    heads = roofline.learn_work(model, one, rows=1, width=T, active=1000, remat="none", grad_bytes=0)
    assert heads.flops - kept.flops == pytest.approx(4 * 2 * 1000 * 151936 * 4096)
    half = roofline.learn_work(
        model, replace(one, tensor=2), rows=1, width=T, active=1000, remat="none", grad_bytes=0
    )
    assert half.flops == heads.flops / 2 and half.sent > 0 == heads.sent


def test_decoding_reads_the_weights_every_step_and_each_live_position():
    model, one = MODELS["8b"], roofline.MeshSplit(shards=1, tensor=1, fsdp=1, item=2)
    prefill = roofline.prefill_work(model, one, prompts=1, prompt=100)
    work = roofline.decode_work(model, one, 1, 100, [50, 10], at_once=2)
    positions = 50 * (100 + 25) + 10 * (100 + 5)
    weights = 2 * (PARAMETERS["8b"] - 151936 * 4096)  # the embedding is looked up
    assert work.bytes - prefill.bytes == pytest.approx(50 * weights + positions * 147456, rel=1e-3)
    one_by_one = roofline.decode_work(model, one, 1, 100, [50, 10], at_once=1)
    assert one_by_one.bytes - work.bytes == pytest.approx(10 * weights, rel=1e-3)


def test_realistic_lengths_are_within_the_limits():
    config = validate(qwen3_science.get_config())
    found, limits = realistic(config), at_limits(config)
    assert np.mean(found.response_B) == pytest.approx(1536, rel=0.02) and len(found.response_B) == 256
    assert max(found.response_B) <= 8192 and min(found.response_B) >= 1
    assert set(limits.response_B) == {8192}
    small = validate(quickstart.get_config())
    assert max(realistic(small).response_B) <= small.rollout.max_new_tokens
    assert realistic(small).teacher <= small.lesson.max_teacher_tokens


def test_microbatches_are_those_of_the_update(small):
    """The same widths as train/microbatches.py chooses for rows of these lengths that are taught in full."""
    lengths = realistic(small.config)
    B, R = len(lengths.response_B), small.config.rollout.max_new_tokens
    held = np.arange(R) < np.array(lengths.response_B)[:, None]
    lesson = Lesson(
        prompts=[[1] * lengths.prompt] * B,
        teacher_prompts=[[1] * lengths.teacher] * B,
        response_BR=np.ones((B, R), np.int32),
        weight_BR=held.astype(np.float32),
        sampler_logp_BR=np.zeros((B, R), np.float32),
    )
    update = small.update
    microbatches = plan_microbatches(lesson, update.rows, update.longest)
    widths = [(batch.student_BS.shape[1], batch.teacher_BT.shape[1]) for batch in microbatches]
    assert widths == [(S, T) for S, T, _ in microbatch_widths(small, lengths)]
    active = sum(n for *_, n in microbatch_widths(small, lengths)) * row_devices(small.mesh)
    assert active >= held.sum()


# --- the whole run ------------------------------------------------------------------------------------


def test_a_run_takes_its_steps_and_its_evaluations():
    config = validate(qwen3_science.get_config("8b,h100x8"))
    job = job_of("8b", "h100:8", "8b", "h100x8")
    found = planned_of(job, "h100:8", sets={210: 15, 30: 2})
    for lengths in found.lengths:
        took = found.run_seconds(lengths)
        assert took["steps"] == config.steps * found.seconds(lengths)["step"]
        assert took["run"] == took["steps"] + took["evaluations"]
    assert [(s.problems, s.times) for s in found.scorings] == [(210, 15), (30, 2)]
    full = at_limits(config, 210 * 16)
    assert set(full.evaluated_B) == {8192} and len(full.evaluated_B) == 210 * 16
    evaluation = next(s for s in stages(job, STOP, None, ITEMS) if s.name == "evaluation")
    assert found.scorings[0].work["limits"] == evaluation.work(full)
    # eval.batch responses are decoded at a time: 13 times 8192 steps, and each reads the weights.
    weights = 2 * (PARAMETERS["8b"] - 151936 * 4096)
    assert found.scorings[0].work["limits"].bytes > 210 * 16 / 256 * 8192 * weights
    text = printed.as_text(found)
    hours = {name: s / 3600 for name, s in found.run_seconds(found.lengths[1]).items()}
    assert f"at least {hours['run']:.3g} h at realistic lengths: 140 steps {hours['steps']:.3g} h" in text
    assert f"17 evaluations of one set {hours['evaluations']:.3g} h" in text
    assert "They leave out norms, softmax" in text
    told = json.loads(printed.as_json(found))
    assert told["run_seconds"]["realistic"] == found.run_seconds(found.lengths[1])


def test_every_evaluation_of_a_run_is_counted(tmp_path_factory):
    """Before the first step, then whenever it is due, for evaluation and validation sets."""
    config = quickstart.get_config("debug")
    config.model.path = str(tiny.model_dir(tmp_path_factory))
    config.steps = 7
    config.eval.every = 3
    config.validation.every = 2
    config = validate(config)
    inputs = read_inputs(config)
    expected: dict[int, int] = {}
    for every, sets in ((3, inputs.evals), (2, inputs.validation)):
        times = 1 + sum(is_due(step, every, 7) for step in range(1, 8))
        for items in sets.values():
            expected[len(items)] = expected.get(len(items), 0) + times
    assert inputs.evals and scored_sets(config, inputs) == expected


# --- what is printed ----------------------------------------------------------------------------------


@NEEDS_LIBTPU
def test_a_plan_is_one_json_object_that_holds_what_the_text_does():
    job = job_of("8b", "v6e:4x4", "v6e-16")
    found = planned_of(job, "v6e:4x4")
    told = json.loads(printed.as_json(found))
    assert told["verdict"] == "fits" and told["chips"] == 16 and told["mesh"]["tensor"] == 2
    assert [stage["name"] for stage in told["stages"]] == list(STAGES)
    for stage in told["stages"]:
        assert stage["held"] == sum(stage["bytes"].values()) < told["chip"]["memory"]
        assert stage["counted_by"] == "arithmetic" and stage["compiled"] is stage["lowering_seconds"] is None
        at_least = told["seconds"]["limits"][stage["name"]]
        assert at_least >= stage["work"]["limits"]["flops"] / told["chip"]["flops"]
    step = told["seconds"]["realistic"]
    assert step["step"] == pytest.approx(sum(s for n, s in step.items() if n not in ("step", "evaluation")))
    assert step["step"] < told["seconds"]["limits"]["step"]
    text = printed.as_text(found)
    assert "mesh.fsdp=8 mesh.tensor=2" in text and "not lowered" in text and "fits" in text
    assert "communication is not counted" not in text


def test_a_plan_reads_no_weights(tmp_path_factory, tmp_path, capsys):
    source = tiny.model_dir(tmp_path_factory)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = quickstart.get_config("debug")
    config.model.path = str(tmp_path)
    plan(config, "h100:8")
    told = capsys.readouterr().out
    assert "not needed for a plan" in told and "cannot be loaded" not in told and "verdict     fits" in told
    assert "runs/" not in told  # no run directory, since none is made
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    plan(config, "h100:8")
    told = capsys.readouterr().out
    assert "cannot be loaded" in told and "is not a safetensors file" in told and "verdict     fits" in told


@pytest.mark.parametrize(
    "asked, words",
    [
        (Asked(compile=("everything",)), "--compile names 'everything'; it must be all"),
        (Asked("h100:8", compile=("all",)), "--compile needs the compiler of h100:8"),
    ],
)
def test_what_cannot_be_compiled_is_named(asked, words, tmp_path_factory):
    config = quickstart.get_config("debug")
    config.model.path = str(tiny.model_dir(tmp_path_factory))
    with pytest.raises(UserError, match=words):
        plan(config, asked.topology, *asked.compile)


@pytest.mark.parametrize(
    "attention, dtype, platform, capability, words",
    [
        ("xla", "float32", "cpu", "9.0", ""),
        (None, "float32", "tpu", "9.0", ""),
        ("pallas_gpu", "bfloat16", "gpu", "9.0", ""),
        ("pallas_gpu", "bfloat16", "gpu", "8.0", "these GPUs have 8.0"),
        ("pallas_gpu", "float32", "gpu", "9.0", "the model has float32 heads 128 wide; it takes bfloat16"),
        ("pallas_gpu", "bfloat16", "tpu", "9.0", "a kernel for gpu, and the devices are tpu"),
        ("ragged_tpu", "bfloat16", "gpu", "9.0", "a kernel for tpu, and the devices are gpu"),
        ("pallas_tpu", "bfloat16", "tpu", "9.0", ""),
    ],
)
def test_attention_that_does_not_suit_the_chips_is_named(attention, dtype, platform, capability, words):
    config = qwen3_science.get_config("8b")
    config.rollout.attention = attention
    model = MODELS["8b"].replace(dtype=dtype)
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        check_attention(validate(config), model, platform, capability)


def test_a_plan_for_other_chips_refuses_their_attention_too(tmp_path_factory):
    config = quickstart.get_config("debug")
    config.model.path = str(tiny.model_dir(tmp_path_factory))
    config.rollout.attention = "pallas_tpu"
    with pytest.raises(UserError, match="'pallas_tpu', a kernel for tpu, and the devices are gpu"):
        plan(config, "h100:8")


def test_the_flags_are_refused_without_a_plan(run):  # noqa: F811
    status, printed = run(f"--config={ROOT / 'configs' / 'quickstart.py'}:debug", "--json")
    assert status == 2 and "are for --mode=plan" in printed.err
