"""The trees of a run: the state that learns and the frozen tree, as shapes and as what makes them.

    trees = Trees(config, model, mesh, optimizer)
    trees.like            the state as shapes with shardings; trees.frozen_like: the frozen tree
    trees.base            the whole model as float32 shapes
    trees.first()         -> the state before the first step, its weights read from config.model.path
    trees.frozen(state)   -> the frozen tree: cast from such a state, or read where none is given

The weights are read once: a new run casts its frozen tree from the state, and a run that goes on reads
the frozen tree alone. Where adapters learn, the state holds nothing else, and every run reads the frozen
tree, at the compute type. Each device's shard is read by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from rosd_jax.models.qwen3 import Qwen3Config, init_params
from rosd_jax.models.sharding import param_shardings
from rosd_jax.models.weights import load_params
from rosd_jax.settings import Settings
from rosd_jax.train.update import init_state, learning_params
from rosd_jax.types import Params, Stream, TrainState


@dataclass(frozen=True)
class Trees:
    """Shapes, places and makers of the state and the frozen tree."""

    config: Settings
    model: Qwen3Config
    mesh: Mesh
    optimizer: optax.GradientTransformation

    @cached_property
    def base(self) -> Params:
        """The whole model's shapes."""
        return jax.eval_shape(lambda: init_params(self.model, jax.random.key(0)))

    @cached_property
    def state(self) -> TrainState:
        """The state's shapes."""
        params = jax.eval_shape(lambda: learning_params(self.config, self.model, jax.random.key(0)))
        return jax.eval_shape(lambda p: init_state(p, self.optimizer), params)

    @cached_property
    def shardings(self) -> TrainState:
        """The state's shardings."""
        return param_shardings(self.state, self.mesh)

    @cached_property
    def like(self) -> TrainState:
        """The state's shapes with their shardings."""

        def place(x, sharding):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        return jax.tree.map(place, self.state, self.shardings)

    @property
    def frozen_shardings(self) -> Params:
        """The frozen tree lies as the parameters do, on the devices or in the host's memory."""
        kind = "pinned_host" if self.config.model.frozen == "host" else "device"
        places = param_shardings(self.base, self.mesh)
        return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), places)

    @property
    def frozen_like(self) -> Params:
        """The frozen tree's shapes with their shardings."""

        def place(x, at):
            return jax.ShapeDtypeStruct(x.shape, self.model.dtype, sharding=at)

        return jax.tree.map(place, self.base, self.frozen_shardings)

    def first(self) -> TrainState:
        """The state before the first step."""
        if self.config.model.lora.rank:
            key = Stream.ADAPTERS.key(jax.random.key(self.config.seed))

            def begin(key):
                return init_state(learning_params(self.config, self.model, key), self.optimizer)

            return jax.jit(begin, out_shardings=self.shardings)(key)
        start = jax.jit(
            lambda p: init_state(p, self.optimizer), out_shardings=self.shardings, donate_argnums=0
        )
        return start(load_params(Path(self.config.model.path), self.model, self.shardings.params))

    def frozen(self, first: TrainState | None) -> Params:
        """The model as it came, at the compute type: it is never updated, so it needs no master copy."""
        dtype, places = self.model.dtype, self.frozen_shardings
        if first is None or self.config.model.lora.rank:
            return load_params(Path(self.config.model.path), self.model, places, dtype=dtype)
        cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))
        return jax.device_put(cast(first.params), places)
