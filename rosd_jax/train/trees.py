"""The train state and the frozen tree of a run: shapes, shardings and initialisation.

    trees = Trees(config, model, mesh, optimizer)
    trees.like            shapes of the state, with shardings
    trees.frozen_like     shapes of the frozen tree, with shardings
    trees.base            float32 shapes of the whole model
    trees.first()         -> the initial state; its weights are read from config.model.path
    trees.frozen(state)   -> the frozen tree, cast from the initial state
    trees.frozen(None)    -> the frozen tree, read from config.model.path

Weights are read once: a new run casts its frozen tree from the state, a resumed one reads only the frozen
tree. With LoRA the state has only the adapters, and every run reads the frozen tree. Each device reads only
its own shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import jax
import optax
from jax.sharding import Mesh

from rosd_jax.models.qwen3 import Qwen3Config, param_shapes
from rosd_jax.models.sharding import param_shardings
from rosd_jax.models.weights import load_params
from rosd_jax.settings import Settings
from rosd_jax.train.update import init_state, learning_params, learning_shapes
from rosd_jax.types import Params, Progress, Stream, TrainState, no_progress


@dataclass(frozen=True)
class Trees:
    """Shapes, shardings and initial values of the state and the frozen tree."""

    config: Settings
    model: Qwen3Config
    mesh: Mesh
    optimizer: optax.GradientTransformation
    progress: Progress = no_progress  # of reading weights

    @cached_property
    def base(self) -> Params:
        """Shapes of the whole model, in float32."""
        return param_shapes(self.model)

    @cached_property
    def state(self) -> TrainState:
        """Shapes of the state, without shardings."""
        params = learning_shapes(self.config, self.model)
        return jax.eval_shape(self._start, params)

    @cached_property
    def shardings(self) -> TrainState:
        """Shardings of the state."""
        return param_shardings(self.state, self.mesh)

    @cached_property
    def like(self) -> TrainState:
        """Shapes of the state, with shardings."""
        return shapes_at(self.state, self.shardings)

    @property
    def frozen_shardings(self) -> Params:
        """The frozen tree is sharded like the parameters, in device memory or pinned host memory."""
        kind = "pinned_host" if self.config.model.frozen == "host" else "device"
        places = param_shardings(self.base, self.mesh)
        return jax.tree.map(lambda sharding: sharding.with_memory_kind(kind), places)

    @property
    def frozen_like(self) -> Params:
        """Shapes of the frozen tree in the compute type, with shardings."""
        return shapes_at(self.base, self.frozen_shardings, self.model.dtype)

    def first(self) -> TrainState:
        """The state before the first step."""

        def from_key(key: jax.Array) -> TrainState:
            return self._start(learning_params(self.config, self.model, key))

        if self.config.model.lora.rank:
            key = Stream.ADAPTERS.key(jax.random.key(self.config.seed))
            return jax.jit(from_key, out_shardings=self.shardings)(key)
        params = self._load(self.shardings.params, "float32")
        # params is donated: the state takes over its buffers instead of a copy.
        return jax.jit(self._start, out_shardings=self.shardings, donate_argnums=0)(params)

    def frozen(self, first: TrainState | None) -> Params:
        """The initial weights in the compute type. They are never updated, so they need no float32 copy.

        first: the initial state of a new run; None: they are read from config.model.path.
        """
        dtype = self.model.dtype
        places = self.frozen_shardings
        if first is None or self.config.model.lora.rank:
            return self._load(places, dtype)
        cast = jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree))
        return jax.device_put(cast(first.params), places)

    def _start(self, params: Params) -> TrainState:
        return init_state(params, self.optimizer, average=self.config.averages)

    def _load(self, places: Params, dtype: str) -> Params:
        path = Path(self.config.model.path)
        return load_params(path, self.model, places, dtype=dtype, progress=self.progress)


def shapes_at(tree: Params, shardings: Params, dtype: str | None = None) -> Params:
    """The tree's shapes with these shardings, in its own types or in one type."""

    def place(x, sharding):
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings)
