"""The terms of one chunk's rows on NVIDIA GPUs from Hopper on: a Pallas (Mosaic GPU) kernel.

A block of 128 threads takes a row, in tiles of `LANES` tokens, and passes over it twice:

    survey    online exponent sums of both models and, per lane (token id modulo `LANES`), the `DEPTH`
              largest student scores with the teacher's of the same tokens. What drops out of those
              goes to sums of its own, so that the tail is summed and never a difference. Threshold,
              masses and divergence then come from registers.
    gradient  elementwise; a tile without a chosen token takes one exponential per token.

16 V bytes read per row (8 V without the gradient) and the gradient written. The rows in flight
outgrow the L2 cache at a vocabulary of 150 000, so each further pass would be paid in HBM traffic.

The survey settles a row unless a lane dropped a token that might be chosen, or tokens tie at the
threshold: for k = 100 spread evenly 0.1 % of rows, plus ties. Those are recounted from the row: at
most 11 passes over the student's scores for the threshold and one for ties, then two over both
models' for the sums. k = None takes one pass for sums besides the survey.

Lanes meet only in reductions of a tile to a scalar, the one kind that the strided layout has: no
sort, scan, gather or scatter. Division is Mosaic GPU's, good to 2 units in the last place: at a
temperature other than 1, ties that rounding makes or breaks may be decided differently than in XLA.
Checked in the interpreter and on an H200.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import Primitive
from jax.interpreters import mlir

from . import pallas_gpu_math as calc
from .divergence import tail_bucket
from .pallas_gpu_math import LANES, Choice
from .reference import TAIL_FLOOR, LossAux, Options, Rows, capped_ratio

DEPTH = 4  # scores kept per lane
PROBES = 3  # a pass of the recount tries 2^PROBES - 1 thresholds
_LOWEST = np.finfo(np.float32).min
_ZERO = np.int32(0)
_LIVE, _WEIGHT, _TOKEN_SCORE, _SAMPLER_LOGP = range(4)  # rows of the [4, C] operand
_DIVERGENCE, _LOGSUMEXP, _RATIO, _STUDENT_MASS, _TEACHER_MASS = range(5)  # and of the [5, C] result


def row_terms(
    options: Options,
    student_CV: jax.Array,
    teacher_CV: jax.Array,
    rows_C: Rows,
    live_C: jax.Array,
    grad_dtype: Any,
    *,
    interpret: Any = None,
) -> tuple[LossAux, jax.Array | None]:
    """Each row's share of aux, and d(weight x ratio x divergence)/d(student logits) [C, V].

    Args:
      student_CV, teacher_CV: float32 logits.
      rows_C: weights and, if any, sampled tokens and their log-probs.
      live_C: bool; both results of another row are 0, whatever its logits.
      grad_dtype: of the gradient; None: it is not computed, and None is returned for it.
      interpret: parameters of the Mosaic GPU interpreter, to run without a GPU.

    Raises ValueError on logits other than two float32 arrays of one shape, and when compiled for
    anything but a CUDA GPU.
    """
    if student_CV.ndim != 2 or student_CV.shape != teacher_CV.shape:
        raise ValueError(f"logits have shapes {student_CV.shape} and {teacher_CV.shape}; both must be [C, V]")
    if student_CV.dtype != jnp.float32 or teacher_CV.dtype != jnp.float32:
        raise ValueError(f"logits are {student_CV.dtype} and {teacher_CV.dtype}; this kernel takes float32")
    grad_dtype = None if grad_dtype is None else jnp.dtype(grad_dtype)
    return _row_terms(options, grad_dtype, interpret, student_CV, teacher_CV, rows_C, live_C)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _row_terms(options, grad_dtype, interpret, student_CV, teacher_CV, rows_C, live_C):
    n_rows, vocab = student_CV.shape
    if interpret is None:
        student_CV = _cuda_only_p.bind(student_CV)
    token_score_C = _token_scores(options, student_CV, rows_C.tokens_N)
    given_FC = _given(live_C, rows_C.weight_N, token_score_C, rows_C.sampler_logp_N)
    widen = lambda x_CV: jnp.pad(x_CV, ((0, 0), (0, max(LANES - vocab, 0))))
    plan = _Plan(options, options.top_k(vocab), max(vocab, LANES), options.num_tokens or vocab)
    out_type = [jax.ShapeDtypeStruct((5, n_rows), jnp.float32)]
    if grad_dtype is not None:
        out_type.append(jax.ShapeDtypeStruct((n_rows, plan.vocab), grad_dtype))
    run = plgpu.kernel(
        partial(_kernel, plan), out_type=out_type, grid=(n_rows,), grid_names=("row",),
        kernel_name="topk_jsd_row", interpret=interpret,
    )  # fmt: skip
    stats_FC, *grads_CV = run(widen(student_CV), widen(teacher_CV), given_FC)
    logp_C = None if token_score_C is None else token_score_C - stats_FC[_LOGSUMEXP]
    masses = stats_FC[_STUDENT_MASS], stats_FC[_TEACHER_MASS]
    stats_C = LossAux(stats_FC[_DIVERGENCE], logp_C, stats_FC[_RATIO], *masses)
    stats_C = jax.tree.map(lambda x_C: jnp.where(live_C, x_C, 0), stats_C)
    return stats_C, grads_CV[0][:, :vocab] if grads_CV else None


def _token_scores(options, student_CV, tokens_C):
    if tokens_C is None:
        return None
    score_C = jnp.take_along_axis(student_CV, tokens_C[:, None], axis=-1)[:, 0] / options.temperature
    return jnp.where(tokens_C < (options.num_tokens or student_CV.shape[1]), score_C, -jnp.inf)


def _given(*columns):
    none_C = jnp.zeros(columns[0].shape, jnp.float32)
    return jnp.stack([none_C if x_C is None else x_C.astype(jnp.float32) for x_C in columns])


def _refuse(ctx, x):
    del x
    target = ", ".join(ctx.module_context.platforms)
    raise ValueError(f"topk_jsd's GPU kernel needs a CUDA GPU, and this program is compiled for {target}")


# The identity, or the error above. Which one only lowering can tell: a program may be lowered for a
# machine other than this one.
_cuda_only_p = Primitive("topk_jsd_cuda_only")
_cuda_only_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(_cuda_only_p, _refuse)
mlir.register_lowering(_cuda_only_p, lambda ctx, x: [x], platform="cuda")


# ---- the kernel: arrays are [LANES] unless called otherwise --------------------------------------


@dataclass(frozen=True)
class _Plan:
    """What is known of a row before it is read."""

    options: Options
    k: int | None  # None: all tokens are chosen
    vocab: int  # tokens of a row in memory, LANES or more
    limit: int  # ids from here on have probability 0

    @property
    def layout(self) -> Any:
        # Vectors of 16 bytes, or fewer where the rows' starts are not aligned to that.
        return plgpu.Layout.WG_STRIDED((LANES,), vec_size=int(np.gcd(4, self.vocab)))

    def full(self, value: Any, dtype: Any = jnp.float32) -> jax.Array:
        return plgpu.layout_cast(jnp.full((LANES,), value, dtype), self.layout)


def _kernel(plan: _Plan, student_ref, teacher_ref, given_ref, stats_ref, *grad_refs):
    row = lax.axis_index("row")
    load = partial(_load, plan, (student_ref, teacher_ref), row)

    def put(grad_ref, values, i, ragged, tile, carry):
        # Where the last tile overlaps the one before, both write the same values.
        at = pl.ds(_start(plan, i, ragged), LANES)
        grad_ref[row, at] = values(*_scores(plan, i, ragged, tile, again=True)).astype(grad_ref.dtype)
        return carry

    @pl.when(given_ref[_LIVE, row] != 0)
    def _():
        terms, lse = _terms(plan, load)
        ratio = _ratio(plan.options, given_ref, row, lse)
        stats = (terms.divergence, lse, ratio, *terms.masses)
        for field, value in enumerate(stats):
            stats_ref[field, row] = value
        scale = given_ref[_WEIGHT, row] * ratio / plan.options.temperature
        for grad_ref in grad_refs:
            slope = lambda *scores: scale * _slope(plan, terms, *scores)
            _for_tiles(plan, load, plan.vocab, partial(put, grad_ref, slope), _ZERO)

    @pl.when(given_ref[_LIVE, row] == 0)
    def _():
        for grad_ref in grad_refs:
            _for_tiles(plan, load, plan.vocab, partial(put, grad_ref, lambda *_: plan.full(0.0)), _ZERO)


def _ratio(options, given_ref, row, lse):
    if options.ratio_cap is None:
        return jnp.float32(1)
    return capped_ratio(given_ref[_TOKEN_SCORE, row] - lse, given_ref[_SAMPLER_LOGP, row], options.ratio_cap)


def _start(plan, i, ragged):
    return jnp.minimum(i * LANES, plan.vocab - LANES) if ragged else i * LANES


def _load(plan, refs, row, i, ragged):
    """Logits of both models; a ragged tile reaches to the row's end at most."""
    at = pl.ds(_start(plan, i, ragged), LANES)
    return tuple(plgpu.layout_cast(ref[row, at], plan.layout) for ref in refs)


def _scores(plan, i, ragged, tile, again=False):
    """Scores of both models, and ids.

    In a ragged tile, tokens past the limit and (unless `again`) those of the tile before get -inf,
    and the limit as id.
    """
    student, teacher = (x / np.float32(plan.options.temperature) for x in tile)
    ids = plgpu.broadcasted_iota(jnp.int32, (LANES,), 0, layout=plan.layout) + _start(plan, i, ragged)
    if not ragged:
        return student, teacher, ids
    fresh = ids < plan.limit
    if not again:
        fresh = fresh & (ids >= i * LANES)
    student, teacher = jnp.where(fresh, student, -jnp.inf), jnp.where(fresh, teacher, -jnp.inf)
    return student, teacher, jnp.where(fresh, ids, plan.limit)


def _for_tiles(plan, load, end, body, carry):
    """Folds body(i, ragged, tile, carry) over the tiles of the tokens before `end`."""
    whole = np.int32(plan.limit // LANES)

    def whole_tile(i, state):
        tile, carry = state
        ahead = load(jnp.minimum(i + 1, whole - 1), False)  # in flight while this tile is worked on
        return ahead, body(i, False, tile, carry)

    if whole:
        _, carry = lax.fori_loop(_ZERO, whole, whole_tile, (load(0, False), carry))
    if whole < -(-end // LANES):
        ragged_tile = lambda i, carry: body(i, True, load(i, True), carry)
        carry = lax.fori_loop(whole, np.int32(-(-end // LANES)), ragged_tile, carry)
    return carry


# ---- survey --------------------------------------------------------------------------------------


def _survey(plan: _Plan, load: Callable) -> tuple:
    """(kept, spilled), by lane.

    kept: DEPTH pairs of student and teacher scores, by falling student score. spilled: for each
    model the largest score not kept, and the sum of exp(score - largest).
    """
    low, none = plan.full(-jnp.inf), (plan.full(_LOWEST), plan.full(0.0))
    start = (((low, low),) * (0 if plan.k is None else DEPTH), (none, none))

    def take(i, ragged, tile, state):
        kept, spilled = [], state[1]
        student, teacher, _ = _scores(plan, i, ragged, tile)
        for held, held_teacher in state[0]:
            up = student > held  # false for NaN, which so gets into the spilled sums
            kept.append((jnp.where(up, student, held), jnp.where(up, teacher, held_teacher)))
            student, teacher = jnp.where(up, held, student), jnp.where(up, held_teacher, teacher)
        return tuple(kept), (calc.add_exp(spilled[0], student), calc.add_exp(spilled[1], teacher))

    return _for_tiles(plan, load, plan.limit, take, start)


# ---- threshold -----------------------------------------------------------------------------------


def _search_kept(plan, kept):
    reach = lambda probe: calc.count_true(*(student >= calc.float_of(probe) for student, _ in kept))
    bracket = calc.Bracket(calc.KEY_OF_MINUS_INF, calc.largest_key(kept[0][0]) + 1)
    return calc.search(lambda probes: map(reach, probes), bracket, np.int32(plan.k), depth=1)


def _recount(plan, load, low, high) -> Choice:
    """The exact choice, from the row itself: at least k of its scores reach `low`, none `high`."""

    def count(probes):
        def take(i, ragged, tile, counts):
            student, _, _ = _scores(plan, i, ragged, tile)
            reached = [(student >= calc.float_of(probe)).astype(jnp.int32) for probe in probes]
            return tuple(map(jnp.add, counts, reached))

        none = (plan.full(0, jnp.int32),) * len(probes)
        return [jnp.sum(x) for x in _for_tiles(plan, load, plan.limit, take, none)]

    k = np.int32(plan.k)
    found = calc.search(count, calc.Bracket(low, high), k, PROBES)
    by_id = lambda: _tie_cutoff(plan, load, found.low, k - found.reach_high)
    return Choice(found.low, lax.cond(found.reach_low == k, lambda: jnp.int32(plan.limit), by_id))


def _tie_cutoff(plan, load, key, wanted):
    """The id below which `wanted` scores equal the threshold."""

    def ties(i):
        student, _, ids = _scores(plan, i, True, load(i, True))
        return (student == calc.float_of(key)) & (ids < plan.limit), ids

    def advance(state):
        i, before, here = state
        return i + 1, before + here, calc.count_true(ties(i + 1)[0])

    last = np.int32(-(-plan.limit // LANES) - 1)  # bounds a row that has too few, for its NaNs
    short = lambda state: (state[1] + state[2] < wanted) & (state[0] < last)
    i, before, here = lax.while_loop(short, advance, (_ZERO, _ZERO, calc.count_true(ties(_ZERO)[0])))
    tie, ids = ties(i)
    count = lambda probes: [calc.count_true(tie & (ids >= probe)) for probe in probes]
    bracket = calc.Bracket(i * LANES, (i + 1) * LANES + 1, here)
    return calc.search(count, bracket, before + here - wanted, depth=1).low


# ---- sums ----------------------------------------------------------------------------------------


class _Terms(NamedTuple):
    """Scalars of one row."""

    choice: Choice
    shifts: tuple  # of both models: score - shift is a log-probability, renormalised if asked for
    pull: Any  # sum over the buckets of q d(divergence)/dq
    others: Any  # the tail's pull over its probability
    divergence: Any
    masses: tuple  # of both models on the chosen tokens


def _terms(plan: _Plan, load: Callable) -> tuple[_Terms, jax.Array]:
    """The terms, and the student's log of the sum of exponentials."""
    kept, spilled = _survey(plan, load)
    lse = tuple(calc.log_sum_exp([pair[who] for pair in kept], spilled[who]) for who in (0, 1))
    everything = Choice(calc.KEY_OF_MINUS_INF, np.int32(plan.limit))
    if plan.k is None:
        return _sums(plan, everything, partial(_sum_of_row, plan, load, everything), lse, None), lse[0]
    bracket = _search_kept(plan, kept)
    # A lane drops nothing above the least that it keeps.
    settled = (bracket.reach_low == plan.k) & (calc.largest_key(kept[-1][0]) < bracket.low)

    def from_kept():
        choice = everything._replace(key=bracket.low)
        return _sums(plan, choice, partial(_sum_of_kept, kept, choice), lse, spilled)

    def from_row():
        choice = _recount(plan, load, bracket.low, calc.largest_key(kept[0][0]) + 1)
        return _sums(plan, choice, partial(_sum_of_row, plan, load, choice), lse, None)

    return lax.cond(settled, from_kept, from_row), lse[0]


def _sum_of_kept(kept, choice, n, terms):
    """Sums of the `n` arrays terms(student, teacher, chosen) over the kept scores."""
    threshold = calc.float_of(choice.key)
    arrays = [terms(student, teacher, student >= threshold) for student, teacher in kept]
    return [jnp.sum(reduce(add, [of_depth[j] for of_depth in arrays])) for j in range(n)]


def _sum_of_row(plan, load, choice, n, terms):
    """The same over the row."""

    def take(i, ragged, tile, sums):
        student, teacher, ids = _scores(plan, i, ragged, tile)
        return tuple(map(jnp.add, sums, terms(student, teacher, choice.of(student, ids))))

    return [jnp.sum(x) for x in _for_tiles(plan, load, plan.limit, take, (plan.full(0.0),) * n)]


def _sums(plan: _Plan, choice: Choice, total: Callable, lse: tuple, spilled: tuple | None) -> _Terms:
    """`total` is one of the two functions above; `spilled` comes with the first."""
    options, shifts, others = plan.options, lse, jnp.float32(0)
    mass_q = mass_r = tail_q = tail_r = jnp.float32(1)
    if plan.k is not None:
        mass_q, mass_r, tail_q, tail_r = total(4, partial(_masses, lse))
    if plan.k is not None and options.tail == "renorm":
        shifts = (lse[0] + jnp.log(mass_q), lse[1] + jnp.log(mass_r))
    divergence, pull = total(2, partial(_chosen_terms, options.alpha, shifts))
    if plan.k is not None and options.tail == "bucket":
        if spilled is not None:
            drops = [jnp.sum(x * jnp.exp(top - shift)) for (top, x), shift in zip(spilled, lse, strict=True)]
            tail_q, tail_r = tail_q + drops[0], tail_r + drops[1]
        value, tail_pull = tail_bucket(tail_q, tail_r, calc.share(options.alpha))
        divergence, pull = divergence + value, pull + tail_pull
        others = tail_pull / jnp.maximum(tail_q, TAIL_FLOOR)
    # 0, or NaN where a score is: no chosen token may be left to carry it.
    flaw = (lse[0] - lse[0]) + (lse[1] - lse[1])
    return _Terms(choice, shifts, pull + flaw, others, divergence + flaw, (mass_q + flaw, mass_r + flaw))


def _masses(lse, student, teacher, chosen):
    q, r = jnp.exp(student - lse[0]), jnp.exp(teacher - lse[1])
    return jnp.where(chosen, q, 0), jnp.where(chosen, r, 0), jnp.where(chosen, 0, q), jnp.where(chosen, 0, r)


def _chosen_terms(alpha, shifts, student, teacher, chosen):
    value, pull = calc.share(alpha)(student - shifts[0], teacher - shifts[1])
    return jnp.where(chosen, value, 0), jnp.where(chosen, pull, 0)


def _slope(plan: _Plan, terms: _Terms, student, teacher, ids):
    """d(divergence)/d(score)."""
    logq, logr = student - terms.shifts[0], teacher - terms.shifts[1]
    chosen_slope = lambda: calc.share(plan.options.alpha)(logq, logr)[1] - jnp.exp(logq) * terms.pull
    if plan.k is None:
        return chosen_slope()
    rest = jnp.exp(logq) * (terms.others - terms.pull)
    if plan.options.tail == "renorm":
        rest = plan.full(0.0) * terms.pull
    mixed = lambda: jnp.where(terms.choice.of(student, ids), chosen_slope(), rest)
    return lax.cond(calc.largest_key(student) >= terms.choice.key, mixed, lambda: rest)
