"""The public functions; `checks.py` reads their arguments.

Operands are bfloat16 or float32, or float64 for both models. The teacher's may also be float16. The
student's may be float16 only with implementation="reference": elsewhere its gradient would underflow before
a loss scale reaches it. Options are Python or NumPy numbers, fixed when a program is compiled.

Only first derivatives in reverse mode: forward mode raises TypeError and a second derivative
NotImplementedError, except with implementation="reference", which has both. Under `jax.vmap` a trip takes
`chunk` rows of every set.

Dimensions: N rows, D model width (the teacher's may differ), V vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import jax
import jax.numpy as jnp

from . import checks, chunked, reference, sharded
from .checks import Implementation, Tail, constant, plain
from .records import LossAux, Options
from .sharded import Sharding


def topk_jsd_loss(
    student_hidden_ND: jax.Array,
    student_head_VD: jax.Array,
    teacher_hidden_ND: jax.Array,
    teacher_head_VD: jax.Array,
    weight_N: jax.Array,
    *,
    k: int | None = 100,
    alpha: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    num_tokens: int | None = None,
    tokens_N: jax.Array | None = None,
    sampler_logp_N: jax.Array | None = None,
    ratio_cap: float | None = None,
    chunk: int = 1024,
    implementation: Implementation | None = None,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, LossAux]:
    """Weighted sum over rows of the divergence between two language models' next-token distributions.

    `reference.py` defines the divergence. Differentiable in the student's hidden states and head, with
    each gradient in its operand's dtype; everything else is constant. A row of weight 0 costs nothing
    and contributes exactly nothing, NaN or not. The gradient is computed in the forward pass, so take
    `jax.value_and_grad(..., has_aux=True)` of this function directly: not under `jax.checkpoint`, where
    it would run twice, and inside the body of a scan rather than around the scan.

    Args:
      student_hidden_ND, teacher_hidden_ND: final hidden states; widths may differ.
      student_head_VD, teacher_head_VD: output heads, laid out like embeddings, each in the dtype of
        its hidden states. Logits are accumulated in float32 (float64 for float64 operands).
      weight_N: mask x importance weight / denominator, of either sign. A boolean mask counts as 1 and 0.
      k: size of the student's top-k set; None, or k >= vocabulary: the whole vocabulary.
      alpha: weight of the teacher in the mixture. 0 is KL(teacher || student), 1 the reverse.
      tail: "bucket" gathers the other tokens in one bucket, "renorm" leaves them out.
      temperature: divides the logits of both models.
      num_tokens: ids from here on are padding rows of the heads, with probability 0.
      tokens_N: the sampled tokens, in [0, V), unchecked. Their log-probs are returned in aux.
      sampler_logp_N: the tokens' log-probs at sampling time.
      ratio_cap: multiplies each row by min(exp(clip(student_logp - sampler_logp, +-20)), cap),
        without gradient; needs tokens_N and sampler_logp_N.
      chunk: rows of one [chunk, V] block of logits.
      implementation: what turns logits into divergence and gradient: "xla", "pallas_tpu" or
        "pallas_gpu", which raise where they cannot run, or "reference", which holds all logits. None
        takes pallas_tpu on a TPU, pallas_gpu on a Hopper GPU (H100, H200) and xla elsewhere.
      sharding: splits the work over a mesh. None leaves it on one device, or to the compiler, which
        cannot split the pallas implementations.

    Returns:
      (scalar loss, LossAux). Raises ValueError for arguments that do not fit together.
    """
    options = plain(Options(k, alpha, tail, temperature, num_tokens, ratio_cap, chunk, implementation))
    student = (jnp.asarray(student_hidden_ND), jnp.asarray(student_head_VD))
    teacher = (constant(teacher_hidden_ND), constant(teacher_head_VD))
    rows = checks.read_rows(student[0], weight_N, tokens_N, sampler_logp_N)
    checks.check_hidden(options, student, teacher, rows, sharding)
    if sharding is not None:
        return sharded.loss_from_hidden(sharding, options, *student, *teacher, rows)
    module = reference if implementation == "reference" else chunked
    return module.loss_from_hidden(options, *student, *teacher, rows)


def topk_jsd_from_logits(
    student_logits_NV: jax.Array,
    teacher_logits_NV: jax.Array,
    weight_N: jax.Array,
    *,
    k: int | None = 100,
    alpha: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    num_tokens: int | None = None,
    tokens_N: jax.Array | None = None,
    sampler_logp_N: jax.Array | None = None,
    ratio_cap: float | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, LossAux]:
    """`topk_jsd_loss` for logits [N, V] that already exist; differentiable in the student's.

    Needs memory for the logits' gradient, in the student's dtype. The pallas implementations also hold
    float32 copies of narrower logits.
    """
    options = plain(
        Options(k, alpha, tail, temperature, num_tokens, ratio_cap, implementation=implementation)
    )
    student_NV = jnp.asarray(student_logits_NV)
    teacher_NV = constant(teacher_logits_NV)
    rows = checks.read_rows(student_NV, weight_N, tokens_N, sampler_logp_N)
    checks.check_logits(options, student_NV, teacher_NV, rows)
    if implementation == "reference":
        return reference.loss_from_logits(options, student_NV, teacher_NV, rows)
    checks.check_gradient("student_logits_NV", student_NV.dtype)
    return chunked.loss_from_logits(options, student_NV, teacher_NV, rows)


def topk_jsd_rows(
    student_logits_NV: jax.Array,
    teacher_logits_NV: jax.Array,
    weight_N: jax.Array,
    *,
    k: int | None = 100,
    alpha: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    num_tokens: int | None = None,
    tokens_N: jax.Array | None = None,
    sampler_logp_N: jax.Array | None = None,
    ratio_cap: float | None = None,
    grad_dtype: Any = None,
    implementation: Literal["xla", "pallas_tpu", "pallas_gpu"] | None = None,
) -> tuple[tuple[jax.Array, LossAux], jax.Array]:
    """The bare row kernel: `((loss, aux), gradient [N, V])` of logits, one pass, no autodiff.

    The result of `jax.value_and_grad(topk_jsd_from_logits, has_aux=True)`, for people who write their own
    backward pass. The gradient is in grad_dtype (bfloat16, float32, or float64 for float64 logits), by
    default the dtype of the student's logits. float16 is refused: what underflows cannot be scaled back.
    """
    options = plain(
        Options(k, alpha, tail, temperature, num_tokens, ratio_cap, implementation=implementation)
    )
    student_NV = constant(student_logits_NV)
    teacher_NV = constant(teacher_logits_NV)
    rows = checks.read_rows(student_NV, weight_N, tokens_N, sampler_logp_N)
    checks.check_logits(options, student_NV, teacher_NV, rows)
    if implementation == "reference":
        raise ValueError(
            "implementation is 'reference'; the row kernel is 'xla', 'pallas_tpu' or 'pallas_gpu'"
        )
    grad_dtype = checks.read_grad_dtype(grad_dtype, student_NV)
    loss_and_aux, grad_NV = chunked.loss_and_grad(options, student_NV, teacher_NV, rows, grad_dtype)
    assert grad_NV is not None
    return loss_and_aux, grad_NV


def sampled_token_loss_from_logits(
    student_logits_NV: jax.Array,
    teacher_logits_NV: jax.Array,
    tokens_N: jax.Array,
    weight_N: jax.Array,
    *,
    temperature: float = 1.0,
    num_tokens: int | None = None,
    sampler_logp_N: jax.Array | None = None,
    ratio_cap: float | None = None,
) -> tuple[jax.Array, LossAux]:
    """Weighted sum of stopgrad(logp_s - logp_t) logp_s of the sampled tokens: sampled reverse KL.

    Arguments as in `topk_jsd_from_logits`, without k, tail and alpha. aux.divergence_N holds each row's
    summand; the masses are None.
    """
    options = plain(Options(None, 1.0, "bucket", temperature, num_tokens, ratio_cap))
    student_NV = jnp.asarray(student_logits_NV)
    teacher_NV = constant(teacher_logits_NV)
    rows = checks.read_rows(student_NV, weight_N, tokens_N, sampler_logp_N)
    checks.check_logits(options, student_NV, teacher_NV, rows)
    return reference.sampled_token_loss(options, student_NV, teacher_NV, rows)
