"""The inputs of the loss kernel's benchmarks, and the contestants in JAX.

A contestant is a function of (student hidden [N, D], student head [V, D], teacher hidden, teacher head,
weight [N]) that returns the loss and its gradients in the student's hidden states and head. Only the
matmuls and ours skip rows of weight 0; the others compute every row, as the released code of the method
does. All run at alpha 0.5 and temperature 1, with the tail bucket.

Dimensions: N rows, C rows of a chunk, D width, V vocabulary, K buckets (the top k and the tail).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from rosd_jax.kernels.topk_jsd import topk_jsd_loss

IN_JAX = ("matmuls", "ours", "ours-xla", "ours-pallas_gpu", "checkpoint", "naive")
IN_TORCH = ("torch-matmuls", "torch-eager", "liger", "torch-compile")  # in topk_jsd_torch.py
SPAN_PERIOD = 256  # one span of live rows in each period
_HEAD, _TEACHER_HEAD, _HIDDEN, _TEACHER_HIDDEN, _TARGET, _STRENGTH = range(1, 7)


@dataclass(frozen=True)
class Case:
    """The sizes and dtype that one program is compiled for."""

    width: int
    tokens: int
    vocab: int
    k: int
    chunk: int
    dtype: str = "bfloat16"

    def flops(self, live: int) -> int:
        """FLOPs of the four matmuls of `live` rows."""
        return 8 * self.width * self.vocab * live


def span_weights(case: Case, share: float) -> np.ndarray:
    """1 / (live rows) on spans that hold `share` of the rows, 0 between them."""
    row_N = np.arange(case.tokens)
    place_N = (row_N + 37 * (row_N // SPAN_PERIOD)) % SPAN_PERIOD  # spans start at different places
    live_N = place_N < round(share * SPAN_PERIOD)
    return (live_N / live_N.sum()).astype(np.float32)


def first_rows(case: Case, rows: int) -> np.ndarray:
    """1 / rows on the first of them."""
    return np.where(np.arange(case.tokens) < rows, np.float32(1 / rows), np.float32(0))


# ---- inputs, bit for bit the same in every library: int32 arithmetic, then one product ----------


def _hash(i: Any, seed: int) -> Any:
    """A well mixed int32 for each int32."""
    # The masks after the shifts make them logical ones: torch shifts int32 arithmetically.
    x = i + ((seed * 0x9E3779B9 + 2**31) % 2**32 - 2**31)
    x = (x ^ ((x >> 16) & 0xFFFF)) * 0x7FEB352D
    x = (x ^ ((x >> 15) & 0x1FFFF)) * -0x7B935975
    return x ^ ((x >> 16) & 0xFFFF)


def _normal(i: Any, seed: int) -> Any:
    """Close to normal integers of standard deviation 148: the sum of four bytes, centred."""
    x = _hash(i, seed)
    return (x & 255) + ((x >> 8) & 255) + ((x >> 16) & 255) + ((x >> 24) & 255) - 510


def head(case: Case, row_V1: Any, col_1D: Any, of_teacher: bool) -> tuple[Any, float]:
    """Integers [V, D] and their unit. The teacher's differ by 3 %."""
    i_VD = row_V1 * case.width + col_1D
    x_VD = 32 * _normal(i_VD, _HEAD)
    if of_teacher:
        x_VD = x_VD + _normal(i_VD, _TEACHER_HEAD)
    return x_VD, 2 / (32 * 148 * math.sqrt(case.width))


def hidden(case: Case, row_N1: Any, col_1D: Any, of_teacher: bool) -> tuple[Any, float]:
    """Integers [N, D] and their unit. The teacher's differ by 10 %.

    Logits scatter by 2 around 0, but for one token of each row that stands out by 4 to 27: some rows
    are certain and some are not, as a language model's are.
    """
    i_ND = row_N1 * case.width + col_1D
    target_N1 = (_hash(row_N1, _TARGET) & 0x7FFFFFFF) % case.vocab
    strength_N1 = 8 + (_hash(row_N1, _STRENGTH) & 0x7FFFFFFF) % 48
    # Scaled from a width of 4096: a narrower model has to lean further towards its target.
    strength_N1 = strength_N1 * round(16 * math.sqrt(4096 / case.width))
    lean_ND = strength_N1 * _normal(target_N1 * case.width + col_1D, _HEAD)
    x_ND = 256 * 16 * _normal(i_ND, _HIDDEN) + lean_ND
    if of_teacher:
        x_ND = x_ND + 26 * 16 * _normal(i_ND, _TEACHER_HIDDEN)
    return x_ND, 1 / (256 * 16 * 148)


def jax_inputs(case: Case) -> tuple[jax.Array, ...]:
    """Student hidden states and head, teacher hidden states and head."""

    @partial(jax.jit, static_argnums=(0, 1, 2))
    def draw(kind, rows, of_teacher):
        row_N1 = jnp.arange(rows, dtype=jnp.int32)[:, None]
        col_1D = jnp.arange(case.width, dtype=jnp.int32)
        x_ND, unit = kind(case, row_N1, col_1D, of_teacher)
        return (x_ND.astype(jnp.float32) * np.float32(unit)).astype(case.dtype)

    return (
        draw(hidden, case.tokens, False),
        draw(head, case.vocab, False),
        draw(hidden, case.tokens, True),
        draw(head, case.vocab, True),
    )


# ---- JAX ----------------------------------------------------------------------------------------


def jax_contestant(name: str, case: Case) -> Callable[..., Any]:
    """One of `IN_JAX`, in chunks of another size if `@size` follows the name. Raises ValueError on others."""
    name, _, size = name.partition("@")
    chunk = int(size or case.chunk)
    loss = partial(topk_jsd_loss, k=case.k, chunk=chunk)
    match name:
        case "matmuls":
            return partial(_matmuls, chunk)
        case "ours":
            return _with_grads(lambda *args: loss(*args)[0])
        case "ours-xla":
            return _with_grads(lambda *args: loss(*args, implementation="xla")[0])
        case "ours-pallas_gpu":
            return _with_grads(lambda *args: loss(*args, implementation="pallas_gpu")[0])
        case "checkpoint":
            return _with_grads(partial(_checkpointed_loss, case.k, chunk))
        case "naive":
            return _with_grads(partial(_naive_loss, case.k))
    raise ValueError(f"no contestant {name!r}; there are {', '.join(IN_JAX)}")


def _with_grads(loss):
    def run(hidden_ND, head_VD, *rest):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1))(hidden_ND, head_VD, *rest)
        return value, *grads

    return run


def _matmuls(chunk, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, weight_N):
    """The four matmuls of as many rows as are live, chunk by chunk, and nothing else."""
    dtype = hidden_ND.dtype
    size = min(chunk, hidden_ND.shape[0])

    def dot(a, b, contract, out):
        return lax.dot_general(a, b, ((contract[:1], contract[1:]), ((), ())), preferred_element_type=out)

    def trip(i, grads):
        grad_ND, head_grad_VD = grads
        hidden_CD = lax.dynamic_slice_in_dim(hidden_ND, i * size, size)
        teacher_CD = lax.dynamic_slice_in_dim(teacher_hidden_ND, i * size, size)
        student_CV = dot(hidden_CD, head_VD, (1, 1), dtype)
        teacher_CV = dot(teacher_CD, teacher_head_VD, (1, 1), dtype)
        # The logits stand for their own gradient: what is multiplied does not matter to the time.
        grad_CD = dot(student_CV, head_VD, (1, 0), dtype)
        head_grad_VD = head_grad_VD + dot(teacher_CV, hidden_CD, (0, 0), jnp.float32)
        return lax.dynamic_update_slice_in_dim(grad_ND, grad_CD, i * size, 0), head_grad_VD

    trips = (jnp.count_nonzero(weight_N) + size - 1) // size
    start = (jnp.zeros_like(hidden_ND), jnp.zeros(head_VD.shape, jnp.float32))
    grad_ND, head_grad_VD = lax.fori_loop(0, trips, trip, start)
    return jnp.float32(0), grad_ND, head_grad_VD.astype(dtype)


def _naive_loss(k, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, weight_N):
    """All logits at once. They are in the dtype of the operands, so that all four matmuls are."""
    student_NV = (hidden_ND @ head_VD.T).astype(jnp.float32)
    teacher_NV = lax.stop_gradient(teacher_hidden_ND @ teacher_head_VD.T).astype(jnp.float32)
    ids_NK = lax.top_k(lax.stop_gradient(student_NV), k)[1]

    def buckets(logits_NV):
        total_N1 = jax.nn.logsumexp(logits_NV, axis=-1, keepdims=True)
        logp_NK = jnp.take_along_axis(logits_NV, ids_NK, axis=-1) - total_N1
        inside_N1 = jnp.minimum(jax.nn.logsumexp(logp_NK, axis=-1, keepdims=True), -1e-7)
        return jnp.concatenate([logp_NK, jnp.log(-jnp.expm1(inside_N1))], axis=-1)

    logq_NK = buckets(student_NV)
    logr_NK = buckets(teacher_NV)
    logm_NK = jnp.logaddexp(logq_NK, logr_NK) - math.log(2)

    def kl_to_mixture(logp_NK):
        return jnp.sum(jnp.exp(logp_NK) * (logp_NK - logm_NK), axis=-1)

    return jnp.sum(weight_N * 0.5 * (kl_to_mixture(logq_NK) + kl_to_mixture(logr_NK)))


def _checkpointed_loss(k, chunk, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, weight_N):
    """A scan over chunks that keeps only its inputs and recomputes the logits for the gradient."""
    size = min(chunk, hidden_ND.shape[0])

    def split(x):
        return x.reshape(-1, size, *x.shape[1:])

    @jax.checkpoint
    def add(total, rows):
        hidden_CD, teacher_CD, weight_C = rows
        return total + _naive_loss(k, hidden_CD, head_VD, teacher_CD, teacher_head_VD, weight_C), None

    rows = tuple(map(split, (hidden_ND, teacher_hidden_ND, weight_N)))
    return lax.scan(add, jnp.float32(0), rows)[0]
