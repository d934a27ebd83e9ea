"""Sets up JAX and its devices, and builds what every step uses: mesh, engines, update. Loads no weights."""

from __future__ import annotations

import jax
from absl import logging
from jax.sharding import Mesh

from rosd_jax.gym.metric import quote_exact
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import make_mesh, replicated_dims, row_devices, validate_mesh_for
from rosd_jax.rewards import Grader
from rosd_jax.rollout.bandwidth import measure_roofline
from rosd_jax.settings import Settings
from rosd_jax.train import stopping
from rosd_jax.train.compiling import keep_programs
from rosd_jax.train.console import Console
from rosd_jax.train.devices import check_rows, split_cpu
from rosd_jax.train.engines import Ends, capability, check_attention, make_engines
from rosd_jax.train.inputs import Inputs
from rosd_jax.train.step import Runtime
from rosd_jax.train.trees import Trees
from rosd_jax.train.unfinished import Unfinished
from rosd_jax.train.update import make_optimizer, make_update

TASK_METRICS = {"gym": quote_exact}  # by the kind of the training problems


def start_devices(config: Settings, model: Qwen3Config, *, alone: bool) -> Mesh:
    """Starts JAX as the config says. alone: this is the run's only process.

    Raises UserError if the mesh or rollout.attention does not suit the devices, the model or the batch.
    """
    if config.model.dtype == "float32":
        # By default, accelerators round the operands of float32 matmuls to 10 bits of mantissa or fewer.
        jax.config.update("jax_default_matmul_precision", "highest")
    keep_programs(config.compile_cache)
    if alone:
        split_cpu(config)  # before make_mesh, which starts JAX
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    validate_mesh_for(model, mesh)
    check_rows(config, row_devices(mesh))
    device = mesh.devices.flat[0]
    check_attention(config, model, device.platform, capability(device))
    return mesh


def build(
    config: Settings, inputs: Inputs, grader: Grader, unfinished: Unfinished, console: Console
) -> tuple[Runtime, Trees]:
    """The runtime of a run, and the `Trees` that load or initialise its weights.

    Raises UserError if the mesh does not suit the devices, the model or the batch, or rollout.attention
    does not suit the devices or the model.
    """
    hosts = unfinished.hosts
    model = inputs.model
    console.stage("starting the devices")
    mesh = start_devices(config, model, alone=hosts.count == 1)
    optimizer = make_optimizer(config)
    trees = Trees(config, model, mesh, optimizer, console.progress)
    for leaf in replicated_dims(trees.base, mesh):
        logging.warning("not sharded, because the mesh does not divide it: %s", leaf)
    ends = Ends(inputs.tokenizer.stop_ids, inputs.stops)
    longest = max(len(ids) for _, ids in inputs.train)
    kinds = {problem.kind for problem, _ in inputs.train}
    console.stage("measuring the memory bandwidth")
    runtime = Runtime(
        config=config,
        model=model,
        tokenizer=inputs.tokenizer,
        student_thinking_open=inputs.tokenizer.opens_thinking(config.thinking.student),
        reflector_thinking_open=inputs.tokenizer.opens_thinking(config.thinking.reflector),
        wording=inputs.wording,
        mesh=mesh,
        grader=grader,
        hosts=hosts,
        unfinished=unfinished,
        key=jax.random.key(config.seed),
        roofline=measure_roofline(model, mesh.shape["tensor"]),
        engines=make_engines(config, model, mesh, ends, longest, console.progress),
        task_metrics=TASK_METRICS.get(kinds.pop()) if len(kinds) == 1 else None,
        update=make_update(config, model, optimizer, mesh, trees.shardings, stopping.check, console.progress),
    )
    return runtime, trees
