"""The row kernel in Pallas for TPU: from two blocks of logits to divergences and their gradient.

    takes  student and teacher logits [C, V] float32, one weight a row
    gives  the divergence and its by-products of each row, and its gradient in the student's logits
    right  when it agrees with `reference.py` in values and gradients, ties and infinities included

A few whole rows lie in on-chip memory at a time, and each is swept by four passes:

    candidates   the vocabulary is dealt into bins; each keeps its three largest student logits with
                 their teacher logits, and the largest fourth of all bins
    threshold    the k-th largest candidate, by bisection on the bits of floats
    sums         sums of exponentials over the tokens below the threshold; candidates give the rest
    gradient     elementwise: q_j (g_j - A) for the chosen, q_j (g_tail - A) for the others

Where a bin held more than three of the k largest, ties cross the threshold, or a row of weight 0 lies
beside others, the same passes run over the whole row instead: slower, and as exact. Nothing is
sorted, gathered or scattered.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tpu_passes as passes
from .divergence import bucket, small_expm1, tail_bucket
from .reference import TAIL_FLOOR, LossAux, Options, Rows, capped_ratio
from .selection import KEEP, bin_count
from .tpu_passes import LANES, Source, Terms

ROWS = 8  # of a block: sixteen keep twice as many values alive as there are registers
SLAB = 2048  # lanes; fewer leave the pipeline idle between trips, more spill
VMEM_BUDGET = 56 << 20  # of the 64 MiB of the smallest core that this is compiled for
VMEM_SLACK = 2 << 20  # for what the compiler spills
STATS = ("divergence", "logp", "ratio", "student_mass", "teacher_mass", "long", "trips")


@dataclass(frozen=True)
class Plan:
    """Sizes of one compiled kernel."""

    vocab: int  # a multiple of LANES
    tokens: int  # ids from here on have probability 0
    k: int | None
    bins: int  # 0: the row itself is the candidates

    @property
    def left(self) -> int:
        """Tokens behind the last whole round of bins."""
        return self.tokens % self.bins if self.bins else 0

    @property
    def candidates(self) -> int:
        """Lanes of the candidate buffers that count."""
        return KEEP * self.bins + self.left


def make_plan(options: Options, vocab: int) -> Plan:
    """Sizes for a vocabulary, whether they fit or not."""
    k = options.top_k(vocab)
    tokens = vocab if options.num_tokens is None else options.num_tokens
    return Plan(_round_up(vocab, LANES), tokens, k, 0 if k is None else bin_count(k, tokens))


def fits(options: Options, vocab: int, grad_dtype: Any) -> bool:
    """Whether eight rows of the vocabulary have room on the smallest core."""
    return vmem_bytes(make_plan(options, vocab), grad_dtype) <= VMEM_BUDGET


def vmem_bytes(plan: Plan, grad_dtype: Any) -> int:
    """On-chip memory of the kernel, but for what the compiler spills."""
    grad_bytes = 0 if grad_dtype is None else jnp.dtype(grad_dtype).itemsize
    buffered = 2 * plan.vocab * (4 + 4 + grad_bytes)  # a block and, on its way, the next one
    return ROWS * (buffered + 2 * 4 * _round_up(plan.candidates + 1, LANES))


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def row_terms(
    options: Options, student_CV: jax.Array, teacher_CV: jax.Array, rows_C: Rows, live_C: jax.Array,
    grad_dtype: Any, interpret: Any = False,
) -> tuple[LossAux, jax.Array | None]:  # fmt: skip
    """What `rows_xla.row_terms` gives, of float32 logits."""
    C, V = student_CV.shape
    if not fits(options, V, grad_dtype):
        raise ValueError(
            f"eight rows of a vocabulary of {V} exceed the on-chip memory that implementation "
            "'pallas_tpu' plans with; use 'xla'"
        )
    plan = make_plan(options, V)
    student_CV, teacher_CV = (x_CV.astype(jnp.float32) for x_CV in (student_CV, teacher_CV))
    pad = lambda x_CV: jnp.pad(x_CV, ((0, 0), (0, plan.vocab - V))) if plan.vocab > V else x_CV
    stats_CS, *grad = call(
        options, plan, pad(student_CV), pad(teacher_CV), rows_C, live_C, grad_dtype, interpret
    )
    divergence_C, logp_C, ratio_C, *masses = (stats_CS[:C, i] for i in range(5))
    stats_C = LossAux(divergence_C, None if rows_C.tokens_N is None else logp_C, ratio_C, *masses)
    return stats_C, grad[0][:, :V] if grad else None


def call(options, plan, student_CV, teacher_CV, rows_C, live_C, grad_dtype, interpret):
    C, R = student_CV.shape[0], ROWS
    blocks = pl.cdiv(C, R)
    to_lanes = lambda x_C: jnp.pad(x_C.astype(jnp.float32), (0, blocks * R - C))
    per_row = [rows_C.weight_N, live_C] + ([] if rows_C.sampler_logp_N is None else [rows_C.sampler_logp_N])
    per_row_CS = jnp.stack([to_lanes(x_C) for x_C in per_row], axis=1)
    per_row_CS = jnp.pad(per_row_CS, ((0, 0), (0, LANES - per_row_CS.shape[1])))
    tokens_C = jnp.zeros(C, jnp.int32) if rows_C.tokens_N is None else rows_C.tokens_N
    tokens_C = jnp.pad(jnp.clip(tokens_C, 0, plan.vocab - 1), (0, blocks * R - C))

    block = lambda width: pl.BlockSpec((R, width), lambda i, _: (i, 0))
    out_shape = [jax.ShapeDtypeStruct((blocks * R, LANES), jnp.float32)]
    if grad_dtype is not None:
        out_shape.append(jax.ShapeDtypeStruct((C, plan.vocab), grad_dtype))
    buffer = pltpu.VMEM((R, _round_up(max(plan.candidates, LANES), LANES)), jnp.float32)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(blocks,),
        in_specs=[block(LANES), block(plan.vocab), block(plan.vocab)],
        out_specs=[block(x.shape[1]) for x in out_shape],
        scratch_shapes=[buffer, buffer],
    )
    with_tokens = rows_C.tokens_N is not None
    return pl.pallas_call(
        partial(_kernel, options, plan, with_tokens, grad_dtype is not None),
        grid_spec=spec,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes(plan, grad_dtype) + VMEM_SLACK
        ),
        interpret=interpret,
        name="topk_jsd_rows",
    )(tokens_C, per_row_CS, student_CV, teacher_CV)


class Block(NamedTuple):
    """What the kernel has of one block of R rows; numbers of a row are [R, 1]."""

    row: Source
    candidates: Source
    weight: jax.Array
    live: jax.Array  # 1 or 0
    sampler_logp: jax.Array
    score: jax.Array | None  # of the sampled token
    stats_ref: Any
    grad_ref: Any  # or None


def _kernel(options, plan, with_tokens, with_grad, tokens_ref, per_row_ref, *refs):
    student_ref, teacher_ref, stats_ref, *rest = refs
    grad_ref = rest.pop(0) if with_grad else None
    row = Source(student_ref, teacher_ref, plan.tokens, min(SLAB, plan.vocab), 1.0 / options.temperature)
    weight, live, sampler_logp = (per_row_ref[:, i : i + 1] for i in range(3))
    first = pl.program_id(0) * ROWS  # here, since a branch of an interpreted kernel has no grid
    some = jnp.max(live) > 0

    @pl.when(some)
    def _():
        score = _token_scores(row, tokens_ref, first) if with_tokens else None
        candidates = Source(*rest, plan.candidates, SLAB)
        _rows(options, plan, Block(row, candidates, weight, live, sampler_logp, score, stats_ref, grad_ref))

    @pl.when(~some)
    def _():
        stats_ref[...] = jnp.zeros(stats_ref.shape, jnp.float32)
        if with_grad:
            passes.write_zeros(grad_ref)


def _token_scores(row: Source, tokens_ref: Any, first: jax.Array) -> jax.Array:
    """The student's scores of the sampled tokens, [R, 1]."""
    rows = row.student_ref.shape[0]
    picked = jnp.full((rows, LANES), -jnp.inf, jnp.float32)
    for r in range(rows):
        token = tokens_ref[first + r]
        at = pl.multiple_of(token - (token & (LANES - 1)), LANES)
        scores, _ = row.read(at, LANES)
        here = (passes.lane_ids(at, scores.shape) == token) & (token < row.tokens)
        here &= lax.broadcasted_iota(jnp.int32, scores.shape, 0) == r
        picked = jnp.where(here, scores, picked)
    return jnp.max(picked, axis=1, keepdims=True)


def _rows(options: Options, plan: Plan, block: Block) -> None:
    """Finds the threshold, then takes the short way or the long one."""
    row, live = block.row, block.live
    finish = partial(_finish, options, plan, block)
    if plan.k is None:
        return finish(row, _peaks(row), lambda at, scores: jnp.full(scores.shape, True), True, jnp.int32(0))
    search = partial(passes.threshold, k=plan.k, live=live)
    overflow = True
    if plan.bins:
        left_out, teacher_peak = passes.collect(row, plan.bins, block.candidates)
        found = search(block.candidates)
        overflow = jnp.max(jnp.where((live > 0) & (left_out >= found.floor), 1.0, 0.0)) > 0
        found = lax.cond(overflow, lambda: search(row), lambda: found)
        peaks = (found.peak, teacher_peak)
    else:
        found, peaks = search(row), _peaks(row)

    def short():
        finish(block.candidates, peaks, lambda at, scores: scores >= found.floor, False, found.trips)

    def long():
        cut = passes.tie_cut(row, plan.k, found.floor, found.count)

        def chosen(at, scores):
            tied = (scores == found.floor) & (passes.lane_ids(at, scores.shape) < cut)
            return (scores > found.floor) | tied

        finish(row, peaks, chosen, True, found.trips)

    if overflow is True:
        return long()
    exact = jnp.min(jnp.where((live > 0) & (found.count == plan.k), 1.0, 0.0)) > 0
    return lax.cond(exact & ~overflow, short, long)


def _peaks(row: Source) -> Terms:
    both = passes.sweep(row, lambda at, *scores: scores, jnp.maximum, -jnp.inf)
    return tuple(jnp.max(peaks, axis=1, keepdims=True) for peaks in both)


def _finish(options, plan, block, near, peaks, chosen, long, trips):
    """Sums, divergence and gradient; `near` holds all the chosen tokens."""
    top = passes.exp_sums(near, peaks, chosen, of_chosen=True)
    tail = (jnp.zeros_like(top[0]),) * 2
    if plan.k is not None:
        tail = passes.exp_sums(block.row, peaks, chosen, of_chosen=False)
    total = tuple(a + b for a, b in zip(top, tail, strict=True))
    renorm = plan.k is not None and options.tail == "renorm"
    norms = tuple((peak, jnp.log(x)) for peak, x in zip(peaks, top if renorm else total, strict=True))
    divergence, pull, others = _divergence(options, plan, near, chosen, norms, tail, total)
    logp, ratio = jnp.zeros_like(pull), jnp.ones_like(pull)
    if block.score is not None:
        logp = (block.score - peaks[0]) - jnp.log(total[0])
        if options.ratio_cap is not None:
            ratio = capped_ratio(logp, block.sampler_logp, options.ratio_cap)
    masses = tuple(x / y for x, y in zip(top, total, strict=True))
    notes = (jnp.full_like(pull, float(long)), jnp.full_like(pull, trips.astype(jnp.float32)))
    _write_stats(block.stats_ref, (divergence, logp, ratio, *masses, *notes), block.live)
    if block.grad_ref is not None:
        scale = block.weight * ratio / options.temperature
        form = passes.gradient_form(options.alpha, norms, scale, pull, others)
        passes.write_gradient(block.row, block.grad_ref, form, chosen, block.live if long else None)


def _divergence(options, plan, near, chosen, norms, tail, total):
    """The divergence, the sum of the pulls, and d(divergence)/dq of the tokens that are not chosen."""
    share = partial(bucket, alpha=options.alpha, expm1=small_expm1)
    divergence, pull = passes.bucket_sums(near, norms, chosen, share)
    if plan.k is None:
        return divergence, pull, pull
    if options.tail == "renorm":  # a NaN outside of the chosen shows in the totals alone
        return divergence + 0 * (total[0] + total[1]), pull, pull
    tail_q, tail_r = (x / y for x, y in zip(tail, total, strict=True))
    value, tail_pull = tail_bucket(tail_q, tail_r, share)
    return divergence + value, pull + tail_pull, tail_pull / jnp.maximum(tail_q, TAIL_FLOOR)


def _write_stats(stats_ref, stats, live):
    lane = lax.broadcasted_iota(jnp.int32, stats_ref.shape, 1)
    out = jnp.zeros(stats_ref.shape, jnp.float32)
    for i, x in enumerate(stats):
        out = jnp.where(lane == i, x, out)
    stats_ref[...] = jnp.where(live > 0, out, 0.0)
