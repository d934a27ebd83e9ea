"""The passes of the TPU row kernel over rows that lie in on-chip memory. `pallas_tpu.py` orders them.

A pass sweeps a `PairedLogits`: the rows themselves, or their candidates. R rows of a block; one number a row
has the shape [R, 1], and a sum that is still spread over the lanes [R, LANES].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .selection import KEEP

LANES = 128
MAX_EXPONENT = 80.0  # of e in r / q; above it q is 0 in float32
LOWEST = -1e30  # stands for -inf where q may be 0
NOWHERE = 2**31 - 1
Terms = tuple[jax.Array, ...]


@dataclass(frozen=True)
class PairedLogits:
    """Student and teacher logits [R, lanes] side by side; lanes from `tokens` on do not count."""

    student_ref: Any
    teacher_ref: Any
    tokens: int
    slab: int  # lanes that one trip of a loop handles
    scale: float = 1.0  # 1 / temperature

    @property
    def slabs(self) -> int:
        """Whole slabs."""
        return self.tokens // self.slab

    @property
    def rest(self) -> range:
        """Where the pieces of LANES lanes after them begin; the last piece may be ragged."""
        return range(self.slabs * self.slab, self.tokens, LANES)

    def read(self, at: Any, width: int, ragged: bool = False) -> tuple[jax.Array, jax.Array]:
        """Scores of `width` lanes; -inf from the last token on if the lanes are ragged."""
        both = tuple(ref[:, pl.ds(at, width)] for ref in (self.student_ref, self.teacher_ref))
        if self.scale != 1.0:
            both = tuple(x * jnp.float32(self.scale) for x in both)
        if ragged:
            both = tuple(jnp.where(lane_ids(at, x.shape) < self.tokens, x, -jnp.inf) for x in both)
        student, teacher = both
        return student, teacher


def lane_ids(at: Any, shape: tuple[int, ...]) -> jax.Array:
    """Token ids of a piece of a row that begins at `at`."""
    return at + lax.broadcasted_iota(jnp.int32, shape, 1)


def sweep(
    logits: PairedLogits, term: Callable[..., Terms], combine: Callable = jnp.add, start: float = 0.0
) -> Terms:
    """`combine` over all pieces of LANES lanes of term(at, student, teacher): each [R, LANES]."""
    rows = logits.student_ref.shape[0]

    def add(totals, values):
        return tuple(combine(x, fold(y, combine)) for x, y in zip(totals, values, strict=True))

    def body(j, totals):
        at = pl.multiple_of(j * logits.slab, LANES)
        return add(totals, term(at, *logits.read(at, logits.slab)))

    scores = jax.ShapeDtypeStruct((rows, LANES), jnp.float32)
    count = len(jax.eval_shape(term, 0, scores, scores))
    totals = (jnp.full((rows, LANES), start, jnp.float32),) * count
    totals = lax.fori_loop(0, logits.slabs, body, totals)
    # The rest is unrolled: its pieces are fewer than a slab's, and only there is a ragged one.
    for at in logits.rest:
        totals = add(totals, term(at, *logits.read(at, LANES, at + LANES > logits.tokens)))
    return totals


def sums(logits: PairedLogits, term: Callable[..., Terms]) -> Terms:
    """Sums over all tokens of term(at, student, teacher): each [R, 1]."""
    return tuple(jnp.sum(total, axis=1, keepdims=True) for total in sweep(logits, term))


def fold(x: jax.Array, combine: Callable) -> jax.Array:
    """[R, n LANES] to [R, LANES], as a tree, so that no addition waits for the one before it."""
    pieces = [x[:, i : i + LANES] for i in range(0, x.shape[1], LANES)]
    while len(pieces) > 1:
        odd = pieces[len(pieces) & ~1 :]
        pieces = [combine(a, b) for a, b in zip(pieces[::2], pieces[1::2], strict=False)] + odd
    return pieces[0]


# ---- candidates ----------------------------------------------------------------------------------


def collect(row: PairedLogits, bins: int, candidates: PairedLogits) -> tuple[jax.Array, jax.Array]:
    """Fills the candidates; gives the largest student score dropped and the teacher's largest score.

    Bin b holds the lanes that are b modulo `bins`. Lanes after the last whole round of bins are candidates
    as they are.
    """
    rounds = row.tokens // bins
    nothing = jnp.full((row.student_ref.shape[0], LANES), -jnp.inf, jnp.float32)

    # LANES bins at a time, with all rounds unrolled: their three largest then stay in registers.
    def group(g, peaks):
        at = pl.multiple_of(g * LANES, LANES)
        dropped, teacher_peak = peaks
        kept = [(nothing, nothing)] * KEEP
        for j in range(rounds):
            student, teacher = row.read(at + j * bins, LANES)
            teacher_peak = jnp.maximum(teacher_peak, teacher)
            kept, rest = insert(kept, student, teacher)
            dropped = jnp.maximum(dropped, rest)
        for i, (student, teacher) in enumerate(kept):
            here = pl.ds(at + i * bins, LANES)
            candidates.student_ref[:, here] = student
            candidates.teacher_ref[:, here] = teacher
        return dropped, teacher_peak

    peaks = lax.fori_loop(0, bins // LANES, group, (nothing, nothing))
    dropped, teacher_peak = (fold(x, jnp.maximum) for x in peaks)
    for at in range(rounds * bins, row.tokens, LANES):
        student, teacher = row.read(at, LANES, at + LANES > row.tokens)
        here = pl.ds(at + (KEEP - rounds) * bins, LANES)
        candidates.student_ref[:, here] = student
        candidates.teacher_ref[:, here] = teacher
        teacher_peak = jnp.maximum(teacher_peak, teacher)
    return jnp.max(dropped, axis=1, keepdims=True), jnp.max(teacher_peak, axis=1, keepdims=True)


def insert(
    kept: list[tuple[jax.Array, jax.Array]], student: jax.Array, teacher: jax.Array
) -> tuple[list[tuple[jax.Array, jax.Array]], jax.Array]:
    """Inserts scores into a list that falls by the student's; gives the student's that drops out."""
    longer = []
    for kept_student, kept_teacher in kept:
        wins = student > kept_student
        longer.append((jnp.maximum(student, kept_student), jnp.where(wins, teacher, kept_teacher)))
        student, teacher = jnp.minimum(student, kept_student), jnp.where(wins, kept_teacher, teacher)
    return longer, student


# ---- the threshold -------------------------------------------------------------------------------


def ordered(x: jax.Array) -> jax.Array:
    """Integers in the order of the floats; -0 comes just before 0."""
    return flip(lax.bitcast_convert_type(x, jnp.int32))


def unordered(i: jax.Array) -> jax.Array:
    """The floats that `ordered` made integers of."""
    return lax.bitcast_convert_type(flip(i), jnp.float32)


def flip(i: jax.Array) -> jax.Array:
    return jnp.where(i < 0, i ^ 0x7FFFFFFF, i)


def middle(a: jax.Array, b: jax.Array) -> jax.Array:
    """(a + b) // 2 without overflow."""
    return (a & b) + ((a ^ b) >> 1)


class Found(NamedTuple):
    """What `find_threshold` finds of each row, [R, 1], and the trips it took."""

    threshold: jax.Array  # the k largest scores reach it
    reached: jax.Array  # how many scores reach it, float32; more than k only in a tie
    peak: jax.Array  # the largest score
    trips: jax.Array  # int32 scalar


def find_threshold(logits: PairedLogits, k: int, live: jax.Array) -> Found:
    """Bisects the bits of floats until every live row is settled."""
    (peaks,) = sweep(logits, lambda at, student, teacher: (student,), jnp.maximum, -jnp.inf)
    peak = jnp.max(peaks, axis=1, keepdims=True)
    # Each lane has a score that reaches its own peak, so at least LANES scores reach the lowest peak.
    low = jnp.min(peaks, axis=1, keepdims=True) if k <= LANES else jnp.full_like(peak, -jnp.inf)

    def unsettled(state):
        low, high, count, _ = state
        open_rows = (live > 0) & (count != k) & (low + 1 < high)
        return jnp.max(_as_float(open_rows)) > 0

    def narrow(state):
        low, high, count, trips = state
        half = middle(low, high)
        bound = unordered(half)
        (reached,) = sums(logits, lambda at, student, _: (_as_float(student >= bound),))
        enough = reached >= k
        low = jnp.where(enough, half, low)
        high = jnp.where(enough, high, half)
        return low, high, jnp.where(enough, reached, count), trips + 1

    # Counts are float32, exact up to 2^24 tokens.
    state = (ordered(low), ordered(peak) + 1, jnp.full_like(peak, float(logits.tokens)), jnp.int32(0))
    low, _, count, trips = lax.while_loop(unsettled, narrow, state)
    return Found(unordered(low), count, peak, trips)


def tie_cut(row: PairedLogits, k: int, threshold: jax.Array, reached: jax.Array) -> jax.Array:
    """The id below which scores equal to the threshold are chosen, so that exactly k are."""

    def narrow(_, bounds):
        low, high = bounds  # a cut at `high` chooses k or more, one at `low` fewer
        half = middle(low, high)

        def chosen(at, student, teacher):
            tied = (student == threshold) & (lane_ids(at, student.shape) < half)
            return (_as_float((student > threshold) | tied),)

        enough = sums(row, chosen)[0] >= k
        return jnp.where(enough, low, half), jnp.where(enough, half, high)

    low = jnp.zeros(threshold.shape, jnp.int32)
    high = jnp.full(threshold.shape, row.tokens, jnp.int32)
    _, high = lax.fori_loop(0, row.tokens.bit_length(), narrow, (low, high))
    return jnp.where(reached > k, high, NOWHERE)


def _as_float(holds: jax.Array) -> jax.Array:
    # Conditions are counted and reduced as float32, since Mosaic reduces floats only.
    return jnp.where(holds, 1.0, 0.0)


# ---- the divergence and its gradient ---------------------------------------------------------------

Chosen = Callable[[Any, jax.Array], jax.Array]  # (first id, student scores) -> mask
# For student and teacher, the largest score and the logarithm of the sum of exp(score - largest). They
# are kept apart, since their sum has lost the digits that tell two close models from one another.
Norms = tuple[Terms, ...]


def exp_sums(logits: PairedLogits, peaks: Terms, chosen: Chosen, of_chosen: bool) -> Terms:
    """Sums of exp(score - peak) of both models over the chosen tokens or over the others: [R, 1] each."""

    def term(at, *scores):
        mask = chosen(at, scores[0])
        # A NaN score fails every comparison. So it counts among the others, and the sums show it.
        kept = mask if of_chosen else ~mask
        return tuple(jnp.where(kept, jnp.exp(x - peak), 0.0) for x, peak in zip(scores, peaks, strict=True))

    return sums(logits, term)


def bucket_sums(logits: PairedLogits, norms: Norms, chosen: Chosen, bucket: Callable[..., Terms]) -> Terms:
    """The chosen tokens' shares of the divergence, and their pulls, summed: [R, 1] each."""

    def term(at, student, teacher):
        kept = chosen(at, student)
        logq, logr = (
            (score - peak) - log_sum for score, (peak, log_sum) in zip((student, teacher), norms, strict=True)
        )
        return tuple(jnp.where(kept, x, 0.0) for x in bucket(logq, logr))

    return sums(logits, term)


def gradient_form(
    alpha: float, norms: Norms, scale: jax.Array, pull: jax.Array, others: jax.Array
) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """The gradient of a token as a function f(student, teacher, chosen) of its scores.

    f is scale q (slope - pull) for the chosen tokens and scale q (others - pull) for the rest, with
    slope = d(divergence)/dq. It takes one logarithm a token, with an absolute error of 1e-7. The sums,
    where errors add up, use the exact `bucket` instead.
    """
    # What does not depend on the token is computed once a row.
    rest = scale * (others - pull)
    shift = -scale * pull
    steep = -(1 - alpha) * scale
    (peak_q, log_q), (peak_r, log_r) = norms
    norm_q = peak_q + log_q
    gap = (peak_r - peak_q) + (log_r - log_q)

    def backward_kl(student, teacher, chosen):  # q slope = -r, which may be large where q is nearly 0
        # To the last digit, since q and r nearly cancel.
        q = jnp.exp((student - peak_q) - log_q)
        r = jnp.exp((teacher - peak_r) - log_r)
        return jnp.where(chosen, q * shift - scale * r, q * rest)

    def forward_kl(student, teacher, chosen):  # slope = 1 - log(r / q)
        slope = 1 - jnp.maximum((teacher - student) - gap, LOWEST)
        return jnp.exp(student - norm_q) * jnp.where(chosen, scale * slope + shift, rest)

    def mixed(student, teacher, chosen):  # slope = -(1 - alpha) log(m / q), m / q = alpha (r / q + odds)
        ratio = jnp.exp(jnp.minimum((teacher - student) - gap, MAX_EXPONENT))
        slope = steep * jnp.log(ratio + (1 - alpha) / alpha)
        return jnp.exp(student - norm_q) * jnp.where(chosen, slope + (shift + steep * math.log(alpha)), rest)

    if alpha == 0:
        return backward_kl
    return forward_kl if alpha == 1 else mixed


def write_gradient(
    row: PairedLogits, grad_ref: Any, form: Callable, chosen: Chosen, live: jax.Array | None
) -> None:
    """Writes form(student, teacher, chosen) of every token, and 0 after the last token.

    With `live`, rows where it is 0 get 0, and so do tokens at -inf, whatever the form gives.
    """

    def gradient(at, student, teacher):
        grad = form(student, teacher, chosen(at, student))
        if live is not None:
            grad = jnp.where((live > 0) & (student != -jnp.inf), grad, 0.0)
        return grad.astype(grad_ref.dtype)

    def body(j, _):
        at = pl.multiple_of(j * row.slab, LANES)
        grad_ref[:, pl.ds(at, row.slab)] = gradient(at, *row.read(at, row.slab))

    lax.fori_loop(0, row.slabs, body, None)
    for at in row.rest:
        grad_ref[:, pl.ds(at, LANES)] = gradient(at, *row.read(at, LANES, at + LANES > row.tokens))
    end = -(-row.tokens // LANES) * LANES
    if end < grad_ref.shape[1]:
        grad_ref[:, end:] = jnp.zeros((grad_ref.shape[0], grad_ref.shape[1] - end), grad_ref.dtype)


def write_zeros(ref: Any) -> None:
    """Clears a block in a loop: at once, it would compile to one store instruction for each vector."""
    zeros = jnp.zeros((ref.shape[0], LANES), ref.dtype)

    def body(j, _):
        ref[:, pl.ds(pl.multiple_of(j * LANES, LANES), LANES)] = zeros

    lax.fori_loop(0, ref.shape[1] // LANES, body, None)
