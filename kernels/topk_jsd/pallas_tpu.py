"""The row kernel in Pallas for TPU: from two blocks of logits to divergences and their gradient.

    takes  student and teacher logits [C, V] float32, one weight a row
    gives  the divergence and its by-products of each row, and its gradient in the student's logits
    right  when it agrees with `reference.py` in values and gradients, ties and infinities included

A few whole rows lie in on-chip memory at a time, and four passes sweep each of them:

    candidates   the vocabulary is dealt into bins; each keeps its three largest student logits with
                 their teacher logits, and all bins together the largest logit that one dropped
    threshold    the k-th largest candidate, by bisection on the bits of floats
    sums         sums of exponentials over the tokens below the threshold; candidates give the rest
    gradient     elementwise: q_j (g_j - A) for the chosen, q_j (g_tail - A) for the others

This is the short way. Where a bin held more than three of the k largest, where ties cross the threshold,
or where a block mixes rows with and without a weight, the same passes run over the whole row instead:
the long way, slower and as exact. Nothing is sorted, gathered or scattered.

Inside the kernel, numbers of a row are [R, 1], with R rows of one block.

Dimensions: C rows of the call, V vocabulary, F fields of a row (its scalar inputs or results in one vector
of LANES), N rows in the fields of a record.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import tpu_passes as passes
from .records import LossAux, Options, Rows
from .row_math import TAIL_FLOOR, bucket, capped_ratio, small_expm1, tail_bucket
from .selection import KEEP, bin_count
from .tpu_passes import LANES, Chosen, Norms, PairedLogits, Terms

ROWS = 8  # of a block; sixteen would keep twice as many values alive as there are registers
SLAB = 2048  # lanes; fewer leave the pipeline idle between trips, more spill
VMEM_BUDGET = 56 << 20  # of the 64 MiB of the smallest core that this is compiled for
VMEM_SLACK = 2 << 20  # for what the compiler spills
STATS = ("divergence", "logp", "ratio", "student_mass", "teacher_mass", "long", "trips")


@dataclass(frozen=True)
class Sizes:
    """Sizes of one compiled kernel."""

    vocab: int  # a multiple of LANES
    tokens: int  # ids from here on have probability 0
    k: int | None
    bins: int  # 0: the row itself is the candidates

    @property
    def left(self) -> int:
        """Tokens after the last whole round of bins."""
        return self.tokens % self.bins if self.bins else 0

    @property
    def candidates(self) -> int:
        """Lanes in use of the candidate buffers."""
        return KEEP * self.bins + self.left


def make_sizes(options: Options, vocab: int) -> Sizes:
    """Sizes for a vocabulary, whether they fit or not."""
    k = options.top_k(vocab)
    tokens = vocab if options.num_tokens is None else options.num_tokens
    bins = 0 if k is None else bin_count(k, tokens)
    return Sizes(_round_up(vocab, LANES), tokens, k, bins)


def fits(options: Options, vocab: int, grad_dtype: Any) -> bool:
    """Whether eight rows of the vocabulary fit into the memory of the smallest core."""
    return vmem_bytes(make_sizes(options, vocab), grad_dtype) <= VMEM_BUDGET


def vmem_bytes(sizes: Sizes, grad_dtype: Any) -> int:
    """On-chip memory of the kernel, without what the compiler spills."""
    grad_bytes = 0 if grad_dtype is None else jnp.dtype(grad_dtype).itemsize
    # Two of each block: while one is worked on, the next is loaded and the gradient before it stored.
    blocks = 2 * sizes.vocab * (4 + 4 + grad_bytes)
    buffers = 2 * 4 * _round_up(sizes.candidates + 1, LANES)
    return ROWS * (blocks + buffers)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit


def row_terms(
    options: Options,
    student_CV: jax.Array,
    teacher_CV: jax.Array,
    rows_C: Rows,
    live_C: jax.Array,
    grad_dtype: Any,
    interpret: Any = False,
) -> tuple[LossAux, jax.Array | None]:
    """What `rows_xla.row_terms` gives, computed in float32.

    interpret: True, or parameters of the TPU interpreter, to run without a TPU. Raises ValueError where
    the vocabulary does not fit.
    """
    n_rows, vocab = student_CV.shape
    if not fits(options, vocab, grad_dtype):
        raise ValueError(
            f"eight rows of a vocabulary of {vocab} exceed the on-chip memory that implementation "
            "'pallas_tpu' plans with; use 'xla'"
        )
    sizes = make_sizes(options, vocab)

    def pad(x_CV):
        return jnp.pad(x_CV, ((0, 0), (0, sizes.vocab - vocab))) if sizes.vocab > vocab else x_CV

    student_CV = student_CV.astype(jnp.float32)
    teacher_CV = teacher_CV.astype(jnp.float32)
    stats_CF, *grads_CV = call(
        options, sizes, pad(student_CV), pad(teacher_CV), rows_C, live_C, grad_dtype, interpret
    )
    divergence_C, logp_C, ratio_C, *masses = (stats_CF[:n_rows, i] for i in range(5))
    stats_C = LossAux(divergence_C, None if rows_C.tokens_N is None else logp_C, ratio_C, *masses)
    return stats_C, grads_CV[0][:, :vocab] if grads_CV else None


def call(options, sizes, student_CV, teacher_CV, rows_C, live_C, grad_dtype, interpret):
    """The kernel over blocks of ROWS rows: [stats_CF] or [stats_CF, grad_CV], C padded to whole blocks."""
    n_rows = student_CV.shape[0]
    blocks = pl.cdiv(n_rows, ROWS)
    spare = blocks * ROWS - n_rows
    fields = [rows_C.weight_N, live_C]
    if rows_C.sampler_logp_N is not None:
        fields.append(rows_C.sampler_logp_N)
    # A block of a TPU kernel is at least one vector wide, so each row's numbers are padded to LANES.
    given_CF = jnp.stack([jnp.pad(x_C.astype(jnp.float32), (0, spare)) for x_C in fields], axis=1)
    given_CF = jnp.pad(given_CF, ((0, 0), (0, LANES - len(fields))))
    # Token ids are addresses, so they go to scalar memory; clipped, since a load is not checked.
    tokens_C = jnp.zeros(n_rows, jnp.int32) if rows_C.tokens_N is None else rows_C.tokens_N
    tokens_C = jnp.pad(jnp.clip(tokens_C, 0, sizes.vocab - 1), (0, spare))

    def block(width):
        return pl.BlockSpec((ROWS, width), lambda i, _: (i, 0))

    out_shape = [jax.ShapeDtypeStruct((blocks * ROWS, LANES), jnp.float32)]
    if grad_dtype is not None:
        out_shape.append(jax.ShapeDtypeStruct((n_rows, sizes.vocab), grad_dtype))
    buffer = pltpu.VMEM((ROWS, _round_up(max(sizes.candidates, LANES), LANES)), jnp.float32)
    spec = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(blocks,),
        in_specs=[block(LANES), block(sizes.vocab), block(sizes.vocab)],
        out_specs=[block(x.shape[1]) for x in out_shape],
        scratch_shapes=[buffer, buffer],
    )
    with_tokens = rows_C.tokens_N is not None
    return pl.pallas_call(
        partial(_kernel, options, sizes, with_tokens, grad_dtype is not None),
        grid_spec=spec,
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=vmem_bytes(sizes, grad_dtype) + VMEM_SLACK
        ),
        interpret=interpret,
        name="topk_jsd_rows",
    )(tokens_C, given_CF, student_CV, teacher_CV)


class RowBlock(NamedTuple):
    """The operands of one block of R rows; numbers of a row are [R, 1]."""

    row: PairedLogits
    candidates: PairedLogits
    weight: jax.Array
    live: jax.Array  # 1 or 0
    sampler_logp: jax.Array
    score: jax.Array | None  # of the sampled token
    stats_ref: Any
    grad_ref: Any  # or None


def _kernel(options, sizes, with_tokens, with_grad, tokens_ref, given_ref, *refs):
    student_ref, teacher_ref, stats_ref, *rest = refs
    grad_ref = rest.pop(0) if with_grad else None
    student_buffer, teacher_buffer = rest
    row = PairedLogits(
        student_ref, teacher_ref, sizes.tokens, min(SLAB, sizes.vocab), 1.0 / options.temperature
    )
    weight, live, sampler_logp = (given_ref[:, i : i + 1] for i in range(3))
    # Read outside of the branches, since the branch of an interpreted kernel has no grid.
    first = pl.program_id(0) * ROWS
    some = jnp.max(live) > 0

    @pl.when(some)
    def _():
        score = _token_scores(row, tokens_ref, first) if with_tokens else None
        candidates = PairedLogits(student_buffer, teacher_buffer, sizes.candidates, SLAB)
        block = RowBlock(row, candidates, weight, live, sampler_logp, score, stats_ref, grad_ref)
        _block_terms(options, sizes, block)

    @pl.when(~some)
    def _():
        stats_ref[...] = jnp.zeros(stats_ref.shape, jnp.float32)
        if with_grad:
            passes.write_zeros(grad_ref)


def _token_scores(row: PairedLogits, tokens_ref: Any, first: jax.Array) -> jax.Array:
    """The student's scores of the sampled tokens, [R, 1]."""
    rows = row.student_ref.shape[0]
    picked = jnp.full((rows, LANES), -jnp.inf, jnp.float32)
    # A gather by hand: for each row, load the aligned vector that holds its token and mask the rest.
    for r in range(rows):
        token = tokens_ref[first + r]
        at = pl.multiple_of(token - (token & (LANES - 1)), LANES)
        scores, _ = row.read(at, LANES)
        here = (passes.lane_ids(at, scores.shape) == token) & (token < row.tokens)
        here &= lax.broadcasted_iota(jnp.int32, scores.shape, 0) == r
        picked = jnp.where(here, scores, picked)
    return jnp.max(picked, axis=1, keepdims=True)


def _block_terms(options: Options, sizes: Sizes, block: RowBlock) -> None:
    """Finds the threshold, then takes the short way or the long one."""
    row = block.row
    live = block.live
    k = sizes.k
    finish = partial(_finish, options, sizes, block)
    if k is None:
        finish(row, _peaks(row), _everything, long=True, trips=jnp.int32(0))
        return
    search = partial(passes.find_threshold, k=k, live=live)
    overflow = None  # whether a bin dropped one of the chosen tokens; None without bins
    if sizes.bins:
        dropped, teacher_peak = passes.collect(row, sizes.bins, block.candidates)
        found = search(block.candidates)
        overflow = jnp.max(jnp.where((live > 0) & (dropped >= found.threshold), 1.0, 0.0)) > 0
        found = lax.cond(overflow, lambda: search(row), lambda: found)
        peaks = (found.peak, teacher_peak)
    else:
        found = search(row)
        peaks = _peaks(row)

    def short():
        def chosen(at, scores):
            return scores >= found.threshold

        finish(block.candidates, peaks, chosen, long=False, trips=found.trips)

    def long():
        cut = passes.tie_cut(row, k, found.threshold, found.reached)

        def chosen(at, scores):
            tied = (scores == found.threshold) & (passes.lane_ids(at, scores.shape) < cut)
            return (scores > found.threshold) | tied

        finish(row, peaks, chosen, long=True, trips=found.trips)

    if overflow is None:
        long()
        return
    # A block with a dead row takes the long way too: only there is the gradient of a dead row cleared.
    exact = jnp.min(jnp.where((live > 0) & (found.reached == k), 1.0, 0.0)) > 0
    lax.cond(exact & ~overflow, short, long)


def _everything(at, scores):
    return jnp.full(scores.shape, True)


def _peaks(row: PairedLogits) -> Terms:
    both = passes.sweep(row, lambda at, *scores: scores, jnp.maximum, -jnp.inf)
    return tuple(jnp.max(peaks, axis=1, keepdims=True) for peaks in both)


def _finish(
    options: Options,
    sizes: Sizes,
    block: RowBlock,
    near: PairedLogits,
    peaks: Terms,
    chosen: Chosen,
    *,
    long: bool,
    trips: jax.Array,
) -> None:
    """Sums, divergence and gradient; `near` holds all the chosen tokens."""
    top = passes.exp_sums(near, peaks, chosen, of_chosen=True)
    tail = (jnp.zeros_like(top[0]),) * 2
    if sizes.k is not None:
        tail = passes.exp_sums(block.row, peaks, chosen, of_chosen=False)
    total = tuple(a + b for a, b in zip(top, tail, strict=True))
    renorm = sizes.k is not None and options.tail == "renorm"
    compared = top if renorm else total  # the probability that the divergence is normalised to
    norms = tuple((peak, jnp.log(x)) for peak, x in zip(peaks, compared, strict=True))
    divergence, pull, others = _divergence(options, sizes, near, chosen, norms, tail, total)
    logp = jnp.zeros_like(pull)
    ratio = jnp.ones_like(pull)
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
        # On the short way all rows are live.
        passes.write_gradient(block.row, block.grad_ref, form, chosen, block.live if long else None)


def _divergence(
    options: Options,
    sizes: Sizes,
    near: PairedLogits,
    chosen: Chosen,
    norms: Norms,
    tail: Terms,
    total: Terms,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The divergence, the sum of the pulls, and d(divergence)/dq of the tokens that are not chosen."""
    share: Callable[..., tuple[jax.Array, jax.Array]] = partial(
        bucket, alpha=options.alpha, expm1=small_expm1
    )
    divergence, pull = passes.bucket_sums(near, norms, chosen, share)
    if sizes.k is None:
        return divergence, pull, pull
    if options.tail == "renorm":
        # A NaN outside of the chosen tokens shows in the totals only.
        return divergence + 0 * (total[0] + total[1]), pull, pull
    tail_q, tail_r = (x / y for x, y in zip(tail, total, strict=True))
    value, tail_pull = tail_bucket(tail_q, tail_r, share)
    return divergence + value, pull + tail_pull, tail_pull / jnp.maximum(tail_q, TAIL_FLOOR)


def _write_stats(stats_ref, stats, live):
    # One vector store: selects put each number into its lane.
    lane = lax.broadcasted_iota(jnp.int32, stats_ref.shape, 1)
    out = jnp.zeros(stats_ref.shape, jnp.float32)
    for i, x in enumerate(stats):
        out = jnp.where(lane == i, x, out)
    stats_ref[...] = jnp.where(live > 0, out, 0.0)
