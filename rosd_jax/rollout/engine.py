"""The engine: requests in, a rollout on the host out.

    engine = Engine(model, mesh, limits, sampling)
    rollout = engine.generate(params, requests, key)

Build it once and keep it. What happens inside: requests are packed into calls of fixed shapes (batching.py).
A call (decode_loop.py) prefills the distinct prompts (prefill.py) and decodes with slots, a queue and pages
(scheduler.py, slots.py), drawing tokens by sampler.py. Short responses are one compiled program; long ones
come in pieces, between which the host may stop.

Dimensions: B rows of a call, M requests, S slots of a shard, C packed columns of a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from rosd_jax.kernels.paged_attention import Implementation, platform_of
from rosd_jax.models.qwen3 import Qwen3Config
from rosd_jax.models.sharding import fetch, row_devices, row_sharding
from rosd_jax.rollout import decode_loop
from rosd_jax.rollout.batching import Batch, Request, call_rows, check, pack, prompt_pages, rounded_pages
from rosd_jax.rollout.decode_loop import WHOLE, DecodeSpec, slots_for
from rosd_jax.rollout.limits import Limits
from rosd_jax.rollout.sampler import Sampling
from rosd_jax.rollout.stops import Stops
from rosd_jax.types import DeviceRollout, HostRollout, Params, Progress, Rollout, no_progress

LONG = 256  # tokens from which a smaller number of slots repays its compilation, and a call is in pieces
PIECE = 256  # decoding steps between which a long call may be stopped
# XLA for GPU copies a layer's weights out of their stack before it multiplies by them, three bytes moved for
# one, unless it may start the product at their place, which it can for cuBLAS's products alone.
GPU_OPTIONS = {"xla_gpu_enable_dynamic_slice_fusion": True, "xla_gpu_enable_triton_gemm": False}


class Pieces(NamedTuple):
    """The functions of decode_loop.py under jit, for calls in pieces."""

    decoding_weights: Any
    fill_cache: Any
    compact: Any
    advance: Any
    finish: Any


class CallShape(NamedTuple):
    """The sizes of a call's arrays."""

    rows: int
    prompts: int
    longest: int


def no_check(what: str) -> None:
    """Goes on."""


def no_count(rows: int) -> None:
    """Tells nobody."""


@dataclass(frozen=True, eq=False)
class Engine:
    """Samples responses to prompts.

    Without a mesh it runs on one device. With one, whose "tensor" axis must divide the key-value heads, rows
    lie along "data" and "fsdp", and each of these shards has slots, pages and a queue of its own. Its first
    call raises ValueError if `attention` is for another platform than that of the devices.
    """

    model: Qwen3Config
    mesh: Mesh | None
    limits: Limits
    sampling: Sampling
    stops: Stops | None = None  # stop strings
    attention: Implementation | None = None  # of a decoding step; None: the best for the device
    # Called before each call of the devices, with its shapes in words; may raise.
    before_call: Callable[[str], None] = no_check
    # Called as responses end, as far as the host knows, with how many of the requests' have.
    progress: Progress = no_progress

    @property
    def shards(self) -> int:
        """Parts that rows are split into."""
        return 1 if self.mesh is None else row_devices(self.mesh)

    def generate(self, params: Params, requests: Sequence[Request], key: jax.Array) -> HostRollout:
        """One response a request, in their order.

        Its tokens depend on params, its prompt, its uid and the key alone, beyond rounding. Params keep the
        sharding that they come with. Raises ValueError if there is no request, or if a prompt is empty, too
        long, or has ids outside the vocabulary.
        """
        check(requests, self.model.num_tokens or self.model.vocab_size)
        parts = []
        done = 0
        self.progress(done, len(requests))
        # All calls have one shape. What may differ are pages and slots, in few sizes (`call`).
        for batch, row_M in pack(requests, self.limits, self.shards):
            self.before_call(f"decode {[x.shape for x in batch]} in {self.spec(batch).first_slots} slots")
            ended = partial(self._ended, done, len(requests))
            rollout: HostRollout = jax.tree.map(fetch, self.call(params, batch, key, ended))
            parts.append(pick(rollout, row_M))
            done += len(row_M)
            self.progress(done, len(requests))
        return join(parts)

    def _ended(self, before: int, total: int, rows: int) -> None:
        """Tells of the rows of a call that have ended, `before` of earlier calls."""
        self.progress(before + rows, total)

    def call(
        self,
        params: Params,
        batch: Batch[np.ndarray],
        key: jax.Array,
        ended: Callable[[int], None] = no_count,
    ) -> DeviceRollout:
        """One call of the devices, whose B rows lie along the mesh's "data" and "fsdp" axes.

        It is traced once for each combination of shapes, of pages for its prompts (powers of two) and of the
        number of slots that suffice for the rows with a limit above 0. Long responses may take minutes, so
        `before_call` is called every PIECE steps of theirs, and may raise; and then `ended`, with the number
        of rows that have ended.
        """
        spec = self.spec(batch)
        waiting = int(np.sum(batch.limit_B > 0))
        if self.limits.max_new < LONG:
            return self.compiled(params, batch, key, self.stops, spec=spec)
        weights = self.pieces.decoding_weights(params, model=self.model, mesh=self.mesh)
        sequences, state = self.pieces.fill_cache(weights, batch, key, self.stops, spec=spec)
        counts = spec.slot_counts(_slots(state))
        for slots, fewer in zip(counts, [*counts[1:], 0], strict=True):
            if slots < _slots(state):
                fewer_slots = self.pieces.compact(state.slots, count=slots, sequences=state.queue_B.shape[1])
                state = state._replace(slots=fewer_slots)
            left = fewer + 1
            while left > fewer:
                self.before_call(f"decode on, in {slots} slots")
                state, left_by_shard = self.pieces.advance(
                    weights, sequences, state, fewer=fewer, steps=PIECE, spec=spec
                )
                left_by_shard = fetch(left_by_shard)
                ended(waiting - int(left_by_shard.sum()))
                left = int(left_by_shard.max())
        return self.pieces.finish(state)

    @cached_property
    def compiled(self) -> Any:
        """`decode_loop.generate` under jit."""
        return self._jit(decode_loop.generate, out_shardings=self._by_row)

    @cached_property
    def pieces(self) -> Pieces:
        """The parts of a long call under jit."""
        return Pieces(
            # Two programs: in one, the copies that weights are made of would take memory next to the cache.
            decoding_weights=self._jit(decode_loop.decoding_weights, static_argnames=("model", "mesh")),
            fill_cache=self._jit(decode_loop.fill_cache),
            compact=self._jit(decode_loop.compact, static_argnames=("count", "sequences")),
            # The state is donated, so that the cache is in memory once.
            advance=self._jit(
                decode_loop.advance, static_argnames=("fewer", "steps", "spec"), donate_argnums=2
            ),
            finish=self._jit(decode_loop.finish, static_argnames=(), out_shardings=self._by_row),
        )

    @property
    def _by_row(self) -> NamedSharding | None:
        return None if self.mesh is None else row_sharding(self.mesh)

    def _jit(self, function: Callable[..., Any], **options: Any) -> Any:
        mesh = self.mesh
        on = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
        wanted = platform_of(self.attention)
        if wanted not in (None, on):
            raise ValueError(
                f"attention is {self.attention!r}, a kernel for {wanted}, and the devices are {on}; pass "
                "None, which takes the best for the platform"
            )
        options = {"static_argnames": "spec"} | options
        return jax.jit(function, compiler_options=GPU_OPTIONS if on == "gpu" else None, **options)

    def spec(self, batch: Batch[np.ndarray]) -> DecodeSpec:
        """What is fixed in a call of this batch."""
        waiting_B = np.reshape(batch.limit_B > 0, (self.shards, -1))
        pages = prompt_pages(batch, self.limits.page, self.shards)
        return self._sized(len(batch.limit_B), pages, int(waiting_B.sum(axis=1).max()))

    def largest(self, requests: int, samples: int) -> tuple[CallShape, DecodeSpec]:
        """The largest call for that many requests, of which `samples` share a prompt."""
        limits, rows = self.limits, call_rows(requests, self.limits, self.shards)
        distinct = -(-requests // samples)
        prompts = -(-distinct // limits.prompts) * limits.prompts
        mine = rows // self.shards
        pages = -(-mine // samples) * -(-limits.max_prompt // limits.page)
        if limits.prompt_tokens is not None:
            pages = min(pages, limits.prompt_tokens // limits.page)
        shape = CallShape(rows, prompts, limits.max_prompt)
        return shape, self._sized(rows, rounded_pages(pages, limits.page), mine)

    def lower(self, params: Params, shape: CallShape, spec: DecodeSpec) -> jax.stages.Lowered:
        """jax.stages.Lowered of a whole call in one program; no device need be there.

        params: shapes with shardings. A call in pieces takes a little more memory (docs/performance.md).
        """
        place = None if self.mesh is None else NamedSharding(self.mesh, WHOLE)

        def ints(*sizes):
            return jax.ShapeDtypeStruct(sizes, jnp.int32, sharding=place)

        rows = ints(shape.rows)
        prompts = ints(shape.prompts, shape.longest), ints(shape.prompts)
        batch = cast(Any, Batch)(*prompts, rows, rows, rows)
        key = jax.eval_shape(lambda: jax.random.key(0))
        key = jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=place)
        return self.compiled.lower(params, batch, key, self.stops, spec=spec)

    def _sized(self, rows: int, pages: int, waiting: int) -> DecodeSpec:
        """The spec of a call. waiting: the most rows that any shard has to decode."""
        spec = DecodeSpec(self.model, self.mesh, self.limits, self.sampling, self.attention, pages)
        slots = min(spec.slots(rows // self.shards), slots_for(waiting))
        return replace(spec, first_slots=slots, compact=self.limits.max_new >= LONG)


def _slots(state: Any) -> int:
    """Slots of a shard; leaves of a state have a leading axis of shards."""
    return state.slots.packed_SC.shape[1]


def pick(rollout: HostRollout, row_M: np.ndarray) -> HostRollout:
    """Some rows of a rollout."""
    return Rollout(*(x[row_M] for x in _columns(rollout)), stats=rollout.stats)


def join(rollouts: Sequence[HostRollout]) -> HostRollout:
    """Their rows concatenated, their statistics added up."""
    columns = [np.concatenate(some) for some in zip(*map(_columns, rollouts), strict=True)]
    stats = jax.tree.map(lambda *some: sum(some), *(r.stats for r in rollouts))
    return Rollout(*columns, stats=stats)


def _columns(rollout: HostRollout) -> list[np.ndarray]:
    """The arrays with a row for each response."""
    return [getattr(rollout, field.name) for field in fields(rollout) if field.name != "stats"]
