"""The public functions: checks, stop-gradients, and the choice of implementation."""

from __future__ import annotations

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from . import chunked, reference, sharded
from .reference import LossAux, Options, Rows
from .sharded import Sharding

Tail = Literal["bucket", "renorm"]
Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]


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
    """Weighted sum over rows of the divergence between two language models' next-token laws.

    `reference.py` states the divergence. Differentiable in the student's hidden states and head,
    each gradient in its operand's dtype; everything else is constant. A row of weight 0 costs
    nothing and contributes exactly nothing, NaN or not. The gradient is computed in the forward
    pass, so take `jax.value_and_grad(..., has_aux=True)` of it directly: not under `jax.checkpoint`
    (it would run twice), and inside the body of a scan rather than around the scan.

    Args:
      student_hidden_ND, teacher_hidden_ND: final hidden states; widths may differ.
      student_head_VD, teacher_head_VD: output heads, laid out as embeddings; each in the dtype of
        its hidden states. Logits are accumulated in float32 (float64 for float64 operands).
      weight_N: mask x importance weight / denominator.
      k: size of the student's top-k set; None, or k >= vocabulary: the whole vocabulary.
      alpha: weight of the teacher in the mixture; 0: KL(teacher || student), 1: the reverse.
      tail: "bucket" gathers the other tokens in one bucket, "renorm" leaves them out.
      temperature: divides the logits of both.
      num_tokens: ids from here on are padding rows of the heads, of probability 0.
      tokens_N: the sampled tokens, int32; their log-probs come back in aux.
      sampler_logp_N: their log-probs at sampling time.
      ratio_cap: multiplies each row by min(exp(clip(student_logp - sampler_logp, +-20)), cap),
        without gradient; needs tokens_N and sampler_logp_N.
      chunk: rows of one [chunk, V] block of logits.
      implementation: who turns logits into divergence and gradient: "xla", "pallas_tpu" or
        "pallas_gpu", which fail where they cannot run, or "reference", which holds all logits. None
        takes pallas_tpu on a TPU, pallas_gpu on a Hopper GPU (H100, H200) and xla elsewhere.
      sharding: splits the work over a mesh; None leaves it on one device, or to the compiler, which
        cannot split the pallas implementations.

    Returns:
      (scalar loss, LossAux). Raises ValueError on arguments that do not fit together.
    """
    options = Options(k, alpha, tail, temperature, num_tokens, ratio_cap, chunk, implementation)
    student = (jnp.asarray(student_hidden_ND), jnp.asarray(student_head_VD))
    teacher = _constants((teacher_hidden_ND, teacher_head_VD))
    rows = _constants(Rows(weight_N, tokens_N, sampler_logp_N))
    _check_from_hidden(options, student, teacher, rows, sharding)
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
    """`topk_jsd_loss` of logits [N, V] that already exist; differentiable in the student's.

    Beside the logits it holds their gradient alone, in the student's dtype; the pallas implementations
    hold float32 copies of narrower logits too.
    """
    options = Options(k, alpha, tail, temperature, num_tokens, ratio_cap, implementation=implementation)
    rows = Rows(weight_N, tokens_N, sampler_logp_N)
    student_NV, teacher_NV, rows = _from_logits(options, student_logits_NV, teacher_logits_NV, rows)
    module = reference if implementation == "reference" else chunked
    return module.loss_from_logits(options, student_NV, teacher_NV, rows)


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

    What `jax.value_and_grad(topk_jsd_from_logits, has_aux=True)` gives, for those who write their own
    backward pass; the gradient is in grad_dtype, or that of the student's logits.
    """
    options = Options(k, alpha, tail, temperature, num_tokens, ratio_cap, implementation=implementation)
    student_NV, rows = _constants(student_logits_NV), Rows(weight_N, tokens_N, sampler_logp_N)
    student_NV, teacher_NV, rows = _from_logits(options, student_NV, teacher_logits_NV, rows)
    if implementation == "reference":
        raise ValueError(
            "implementation is 'reference'; the row kernel is 'xla', 'pallas_tpu' or 'pallas_gpu'"
        )
    return chunked.loss_and_grad(options, student_NV, teacher_NV, rows, grad_dtype or student_NV.dtype)


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

    The arguments are those of `topk_jsd_from_logits` (alpha is 1 by nature). aux.divergence_N holds
    each row's summand; the masses are None.
    """
    options = Options(None, 1.0, "bucket", temperature, num_tokens, ratio_cap)
    rows = Rows(weight_N, tokens_N, sampler_logp_N)
    student_NV, teacher_NV, rows = _from_logits(options, student_logits_NV, teacher_logits_NV, rows)
    return reference.sampled_token_loss(options, student_NV, teacher_NV, rows)


def _constants(tree):
    return lax.stop_gradient(jax.tree.map(jnp.asarray, tree))


def _check_implementation(options: Options, *dtypes: jnp.dtype) -> None:
    name, known = options.implementation, get_args(Implementation)
    if name not in (None, *known):
        raise ValueError(f"implementation is {name!r}; it must be None or one of {', '.join(known)}")
    if str(name).startswith("pallas") and jnp.dtype(jnp.float64) in dtypes:
        raise ValueError(f"implementation is {name!r} and operands are float64; use 'xla' for float64")


def _check_from_hidden(
    options: Options, student: Any, teacher: Any, rows: Rows, sharding: Sharding | None
) -> None:
    _check_models(student, teacher)
    _check_rows(rows, student[0].shape[0])
    _check_options(options, rows, student[1].shape[0])
    _check_implementation(options, student[0].dtype, teacher[0].dtype)
    if sharding is not None:
        sharded.check(sharding, options.implementation, student[1].shape[0])


def _from_logits(options: Options, student_NV: Any, teacher_NV: Any, rows: Rows) -> Any:
    """The operands as arrays, all but the student's logits constant, and checked."""
    student_NV, (teacher_NV, rows) = jnp.asarray(student_NV), _constants((teacher_NV, rows))
    _check_implementation(options, student_NV.dtype, teacher_NV.dtype)
    _check_logits(student_NV, teacher_NV)
    _check_rows(rows, student_NV.shape[0])
    _check_options(options, rows, student_NV.shape[1])
    return student_NV, teacher_NV, rows


def _check_models(student: tuple[jax.Array, jax.Array], teacher: tuple[jax.Array, jax.Array]) -> None:
    _check_operands("student", *student)
    _check_operands("teacher", *teacher)
    (n_rows, vocab), (teacher_rows, teacher_vocab) = (
        (hidden_ND.shape[0], head_VD.shape[0]) for hidden_ND, head_VD in (student, teacher)
    )
    if vocab != teacher_vocab:
        raise ValueError(
            f"teacher_head_VD has {teacher_vocab} rows and student_head_VD {vocab}; "
            "both models must share one vocabulary"
        )
    if n_rows != teacher_rows:
        raise ValueError(
            f"teacher_hidden_ND has {teacher_rows} rows and student_hidden_ND {n_rows}; "
            "row n of both must predict the same token"
        )


def _check_operands(who: str, hidden_ND: jax.Array, head_VD: jax.Array) -> None:
    if hidden_ND.ndim != 2 or head_VD.ndim != 2 or hidden_ND.shape[1] != head_VD.shape[1]:
        raise ValueError(
            f"{who} hidden states and head have shapes {hidden_ND.shape} and {head_VD.shape}; "
            "they must be [N, D] and [V, D]"
        )
    if hidden_ND.dtype != head_VD.dtype:
        raise ValueError(
            f"{who} hidden states are {hidden_ND.dtype} and the head is {head_VD.dtype}; "
            "cast one so that their dtypes agree"
        )


def _check_logits(student_NV: jax.Array, teacher_NV: jax.Array) -> None:
    if student_NV.ndim != 2 or student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"student and teacher logits have shapes {student_NV.shape} and {teacher_NV.shape}; "
            "both must be [N, V]"
        )


def _check_rows(rows: Rows, n_rows: int) -> None:
    if n_rows < 1:
        raise ValueError("there are 0 rows; pass at least 1, of weight 0 if need be")
    for name, x in rows._asdict().items():
        if x is not None and x.shape != (n_rows,):
            raise ValueError(f"{name} has shape {x.shape}; it must be {(n_rows,)}")


def _check_options(options: Options, rows: Rows, vocab: int) -> None:
    def require(holds: bool, field: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"{field} is {getattr(options, field)!r}; it must {rule}")

    require(options.k is None or options.k >= 1, "k", "be at least 1, or None for the vocabulary")
    require(0 <= options.alpha <= 1, "alpha", "lie in [0, 1]")
    require(options.tail in ("bucket", "renorm"), "tail", "be 'bucket' or 'renorm'")
    require(options.temperature > 0, "temperature", "be above 0")
    require(options.chunk >= 1, "chunk", "be at least 1")
    in_heads = options.num_tokens is None or 1 <= options.num_tokens <= vocab
    require(in_heads, "num_tokens", f"lie in [1, {vocab}], the rows of the heads")
    if options.ratio_cap is not None:
        require(options.ratio_cap > 0, "ratio_cap", "be above 0")
        given = rows.tokens_N is not None and rows.sampler_logp_N is not None
        require(given, "ratio_cap", "come with tokens_N and sampler_logp_N")
