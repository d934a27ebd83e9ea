"""Survey, threshold and sums of one row in the GPU row kernel.

`load(i, ragged)` gives a tile of the row. Arrays are [TILE_TOKENS], one number per lane; scalars are float32
or int32. `pallas_gpu.py` describes the passes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial, reduce
from operator import add
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import pallas_gpu_math as calc
from .pallas_gpu_math import TILE_TOKENS, Choice
from .pallas_gpu_tiles import RowSpec, for_tiles, scores_of
from .row_math import TAIL_FLOOR, tail_bucket

DEPTH = 4  # scores kept per lane
PROBES = 3  # a pass of the recount tries 2^PROBES - 1 thresholds
_LOWEST = np.finfo(np.float32).min  # finite, since exp(x - largest) would be NaN for two -inf
_ZERO = np.int32(0)

# f(n, terms): the sums of the n arrays terms(student, teacher, chosen) over the row.
Total = Callable[[int, Callable], list]


class RowTerms(NamedTuple):
    """Scalars of one row."""

    choice: Choice
    shifts: tuple  # of both models: score - shift is a log-probability, renormalised if asked for
    pull: Any  # sum over the buckets of q d(divergence)/dq
    others: Any  # the tail's pull over its probability
    divergence: Any
    masses: tuple  # of both models on the chosen tokens


def row_sums(spec: RowSpec, load: Callable) -> tuple[RowTerms, jax.Array]:
    """The terms of the row, and the student's log of the sum of exponentials."""
    kept, spilled = _survey(spec, load)
    lse = tuple(calc.log_sum_exp([pair[who] for pair in kept], spilled[who]) for who in (0, 1))
    everything = Choice(calc.KEY_OF_MINUS_INF, np.int32(spec.limit))
    if spec.k is None:
        return _terms(spec, everything, partial(_sum_of_row, spec, load, everything), lse, None), lse[0]
    k = np.int32(spec.k)
    bracket = _search_kept(k, kept)
    # A lane drops nothing above the least that it keeps. So the choice is settled where all of those
    # lie below the threshold.
    least_kept, _ = kept[-1]
    settled = (bracket.reach_low == k) & (calc.largest_key(least_kept) < bracket.low)

    def from_kept():
        choice = everything._replace(key=bracket.low)
        return _terms(spec, choice, partial(_sum_of_kept, kept, choice), lse, spilled)

    def from_row():
        largest, _ = kept[0]
        choice = _recount(spec, k, load, bracket.low, calc.largest_key(largest) + 1)
        return _terms(spec, choice, partial(_sum_of_row, spec, load, choice), lse, None)

    return lax.cond(settled, from_kept, from_row), lse[0]


# ---- survey --------------------------------------------------------------------------------------


def _survey(spec: RowSpec, load: Callable) -> tuple:
    """(kept, spilled), by lane.

    kept: DEPTH pairs of student and teacher scores, by falling student score. spilled: for each
    model the largest score not kept, and the sum of exp(score - largest).
    """
    low = spec.full(-jnp.inf)
    none = (spec.full(_LOWEST), spec.full(0.0))
    start = (((low, low),) * (0 if spec.k is None else DEPTH), (none, none))

    def take(i, ragged, tile, state):
        before, spilled = state
        student, teacher, _ = scores_of(spec, i, ragged, tile)
        # A step of insertion sort in every lane: what is larger stays, what is smaller moves on.
        kept = []
        for kept_student, kept_teacher in before:
            up = student > kept_student  # false for NaN, which therefore reaches the spilled sums
            kept.append((jnp.where(up, student, kept_student), jnp.where(up, teacher, kept_teacher)))
            student = jnp.where(up, kept_student, student)
            teacher = jnp.where(up, kept_teacher, teacher)
        return tuple(kept), (calc.add_exp(spilled[0], student), calc.add_exp(spilled[1], teacher))

    return for_tiles(spec, load, spec.limit, take, start)


# ---- threshold -----------------------------------------------------------------------------------


def _search_kept(k: np.int32, kept: tuple) -> calc.Bracket:
    """Bisects over the kept scores only, which lie in registers."""

    def reach(probe):
        return calc.count_true(*(student >= calc.float_of(probe) for student, _ in kept))

    bracket = calc.Bracket(calc.KEY_OF_MINUS_INF, calc.largest_key(kept[0][0]) + 1)
    return calc.search(lambda probes: map(reach, probes), bracket, k, depth=1)


def _recount(spec: RowSpec, k: np.int32, load: Callable, low: Any, high: Any) -> Choice:
    """The exact choice, from the row itself: at least k of its scores reach `low`, none `high`."""

    def count(probes):
        # Several probes a pass, since a pass is bound by memory and not by comparisons.
        def take(i, ragged, tile, counts):
            student, _, _ = scores_of(spec, i, ragged, tile)
            reached = [(student >= calc.float_of(probe)).astype(jnp.int32) for probe in probes]
            return tuple(map(jnp.add, counts, reached))

        none = (spec.full(0, jnp.int32),) * len(probes)
        return [jnp.sum(x) for x in for_tiles(spec, load, spec.limit, take, none)]

    found = calc.search(count, calc.Bracket(low, high), k, PROBES)

    def by_id():
        return _tie_cutoff(spec, load, found.low, k - found.reach_high)

    return Choice(found.low, lax.cond(found.reach_low == k, lambda: jnp.int32(spec.limit), by_id))


def _tie_cutoff(spec: RowSpec, load: Callable, key: Any, wanted: Any) -> Any:
    """The id below which `wanted` scores equal the threshold."""

    def ties(i):
        student, _, ids = scores_of(spec, i, True, load(i, True))
        return (student == calc.float_of(key)) & (ids < spec.limit), ids

    last = np.int32(-(-spec.limit // TILE_TOKENS) - 1)  # bounds a row that has too few, for its NaNs

    def short(state):
        i, before, here = state
        return (before + here < wanted) & (i < last)

    def advance(state):
        i, before, here = state
        return i + 1, before + here, calc.count_true(ties(i + 1)[0])

    # First the tile that holds the last wanted tie, then the place within it.
    i, before, here = lax.while_loop(short, advance, (_ZERO, _ZERO, calc.count_true(ties(_ZERO)[0])))
    tie, ids = ties(i)

    def count(probes):
        return [calc.count_true(tie & (ids >= probe)) for probe in probes]

    bracket = calc.Bracket(i * TILE_TOKENS, (i + 1) * TILE_TOKENS + 1, here)
    return calc.search(count, bracket, before + here - wanted, depth=1).low


# ---- sums ----------------------------------------------------------------------------------------


def _sum_of_kept(kept: tuple, choice: Choice, n: int, terms: Callable) -> list:
    """A `Total` over the kept scores."""
    threshold = calc.float_of(choice.key)
    arrays = [terms(student, teacher, student >= threshold) for student, teacher in kept]
    return [jnp.sum(reduce(add, [of_depth[j] for of_depth in arrays])) for j in range(n)]


def _sum_of_row(spec: RowSpec, load: Callable, choice: Choice, n: int, terms: Callable) -> list:
    """A `Total` over the whole row, in one more pass."""

    def take(i, ragged, tile, sums):
        student, teacher, ids = scores_of(spec, i, ragged, tile)
        return tuple(map(jnp.add, sums, terms(student, teacher, choice.of(student, ids))))

    return [jnp.sum(x) for x in for_tiles(spec, load, spec.limit, take, (spec.full(0.0),) * n)]


def _terms(spec: RowSpec, choice: Choice, total: Total, lse: tuple, spilled: tuple | None) -> RowTerms:
    """The row's terms; `spilled` comes with a `total` over the kept scores, which lacks it."""
    options = spec.options
    shifts = lse
    others = jnp.float32(0)
    mass_q = mass_r = tail_q = tail_r = jnp.float32(1)
    if spec.k is not None:
        mass_q, mass_r, tail_q, tail_r = total(4, partial(_masses, lse))
    if spec.k is not None and options.tail == "renorm":
        shifts = (lse[0] + jnp.log(mass_q), lse[1] + jnp.log(mass_r))
    divergence, pull = total(2, partial(_chosen_terms, options.alpha, shifts))
    if spec.k is not None and options.tail == "bucket":
        if spilled is not None:
            drops = [jnp.sum(x * jnp.exp(top - shift)) for (top, x), shift in zip(spilled, lse, strict=True)]
            tail_q = tail_q + drops[0]
            tail_r = tail_r + drops[1]
        value, tail_pull = tail_bucket(tail_q, tail_r, calc.share(options.alpha))
        divergence = divergence + value
        pull = pull + tail_pull
        others = tail_pull / jnp.maximum(tail_q, TAIL_FLOOR)
    # 0, or NaN where a score is NaN: it may be that no chosen token carries it.
    flaw = (lse[0] - lse[0]) + (lse[1] - lse[1])
    return RowTerms(choice, shifts, pull + flaw, others, divergence + flaw, (mass_q + flaw, mass_r + flaw))


def _masses(lse, student, teacher, chosen):
    q = jnp.exp(student - lse[0])
    r = jnp.exp(teacher - lse[1])
    return jnp.where(chosen, q, 0), jnp.where(chosen, r, 0), jnp.where(chosen, 0, q), jnp.where(chosen, 0, r)


def _chosen_terms(alpha, shifts, student, teacher, chosen):
    value, pull = calc.share(alpha)(student - shifts[0], teacher - shifts[1])
    return jnp.where(chosen, value, 0), jnp.where(chosen, pull, 0)
