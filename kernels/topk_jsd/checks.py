"""Reads the arguments of the public functions: arrays, plain numbers, and one sentence for each mistake.

Dimensions: N rows, D model width, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import replace
from numbers import Integral, Real
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax

from . import sharded
from .chunked import Model
from .records import Options, Rows, working_dtype
from .sharded import Sharding

Tail = Literal["bucket", "renorm"]
Implementation = Literal["reference", "xla", "pallas_tpu", "pallas_gpu"]

# ---- options -------------------------------------------------------------------------------------


def plain(options: Options) -> Options:
    """The options as int and float. They are keys of compiled programs, where 3.0 would equal 3."""
    whole = {name: _number(options, name, Integral, int) for name in ("k", "num_tokens", "chunk")}
    real = {name: _number(options, name, Real, float) for name in ("alpha", "temperature", "ratio_cap")}
    return replace(options, **whole, **real)


def _number(options, name, kind, to):
    value = getattr(options, name)
    if value is None and name in ("k", "num_tokens", "ratio_cap"):
        return None
    if isinstance(value, bool) or not isinstance(value, kind):
        a_number = "an integer" if kind is Integral else "a number"
        raise ValueError(f"{name} is {value!r}; it must be {a_number} known when the program is compiled")
    return to(value)


def _check_options(options: Options, rows: Rows, vocab: int) -> None:
    def require(holds: bool, field: str, rule: str) -> None:
        if not holds:
            raise ValueError(f"{field} is {getattr(options, field)!r}; it must {rule}")

    if vocab < 1:
        raise ValueError("the vocabulary has 0 tokens; it must have at least 1")
    require(options.k is None or options.k >= 1, "k", "be at least 1, or None for the vocabulary")
    require(0 <= options.alpha <= 1, "alpha", "lie in [0, 1]")
    require(options.tail in get_args(Tail), "tail", "be 'bucket' or 'renorm'")
    require(0 < options.temperature < math.inf, "temperature", "be above 0 and finite")
    require(options.chunk >= 1, "chunk", "be at least 1")
    in_heads = options.num_tokens is None or 1 <= options.num_tokens <= vocab
    require(in_heads, "num_tokens", f"lie in [1, {vocab}], the rows of the heads")
    if options.ratio_cap is not None:
        require(options.ratio_cap > 0, "ratio_cap", "be above 0")
        given = rows.tokens_N is not None and rows.sampler_logp_N is not None
        require(given, "ratio_cap", "come with tokens_N and sampler_logp_N")


def _check_implementation(options: Options, student: jnp.dtype, teacher: jnp.dtype) -> None:
    name = options.implementation
    known = get_args(Implementation)
    if name not in (None, *known):
        raise ValueError(f"implementation is {name!r}; it must be None or one of {', '.join(known)}")
    if str(name).startswith("pallas") and jnp.dtype(jnp.float64) in (student, teacher):
        raise ValueError(f"implementation is {name!r} and operands are float64; use 'xla' for float64")
    if (student == jnp.float64) != (teacher == jnp.float64):
        raise ValueError(
            f"the student's operands are {student} and the teacher's {teacher}; float64 must be that of both"
        )


# ---- operands ------------------------------------------------------------------------------------


def constant(x: Any) -> jax.Array:
    """An operand that takes no gradient."""
    return lax.stop_gradient(jnp.asarray(x))


def read_rows(student: jax.Array, weight_N: Any, tokens_N: Any, sampler_logp_N: Any) -> Rows:
    """The rows' arrays, constant: numbers in the dtype of the student's logits, tokens in int32."""
    wide = working_dtype(student)
    weight_kinds = {"boolean": "bool", "integer": "integral", "real": "real floating"}
    weight_N = _read("weight_N", weight_N, weight_kinds)
    if tokens_N is not None:
        tokens_N = _read("tokens_N", tokens_N, {"integer": "integral"}).astype(jnp.int32)
    if sampler_logp_N is not None:
        sampler_logp_N = _read("sampler_logp_N", sampler_logp_N, {"real": "real floating"}).astype(wide)
    return Rows(weight_N.astype(wide), tokens_N, sampler_logp_N)


def _read(name, x, kinds):
    x_N = constant(x)
    if not jnp.isdtype(x_N.dtype, tuple(kinds.values())):
        raise ValueError(f"{name} is {x_N.dtype}; it must be {' or '.join(kinds)}")
    return x_N


def check_hidden(
    options: Options, student: Model, teacher: Model, rows: Rows, sharding: Sharding | None
) -> None:
    """Raises ValueError where hidden states, heads, rows, options and sharding do not fit together."""
    n_rows = student[0].shape[0]
    vocab = student[1].shape[0]
    _check_model("student", *student)
    _check_model("teacher", *teacher)
    _check_pair(student, teacher)
    _check_rows(rows, n_rows)
    _check_options(options, rows, vocab)
    _check_implementation(options, student[0].dtype, teacher[0].dtype)
    if options.implementation != "reference":
        check_gradient("student_hidden_ND", student[0].dtype)
    if sharding is not None:
        sharded.check(sharding, options.implementation, vocab)


def check_logits(options: Options, student_NV: jax.Array, teacher_NV: jax.Array, rows: Rows) -> None:
    """Raises ValueError where logits, rows and options do not fit together."""
    _check_float("student_logits_NV", student_NV)
    _check_float("teacher_logits_NV", teacher_NV)
    _check_implementation(options, student_NV.dtype, teacher_NV.dtype)
    if student_NV.ndim != 2 or student_NV.shape != teacher_NV.shape:
        raise ValueError(
            f"student and teacher logits have shapes {student_NV.shape} and {teacher_NV.shape}; "
            "both must be [N, V]"
        )
    _check_rows(rows, student_NV.shape[0])
    _check_options(options, rows, student_NV.shape[1])


def check_gradient(name: str, dtype: jnp.dtype) -> None:
    """Raises ValueError where the gradient would be float16.

    The gradient is rounded in the forward pass, before the cotangent multiplies it, so loss scaling comes
    too late for what underflows. The other dtypes have at least the exponents of float32.
    """
    if dtype == jnp.float16:
        raise ValueError(
            f"{name} is float16, in which gradients underflow before a loss scale can reach them; "
            "use bfloat16 or float32"
        )


def read_grad_dtype(grad_dtype: Any, student_NV: jax.Array) -> jnp.dtype:
    """The dtype of `topk_jsd_rows`'s gradient; for None, that of the student's logits."""
    if grad_dtype is None:
        check_gradient("student_logits_NV", student_NV.dtype)
        return student_NV.dtype
    dtype = jnp.dtype(grad_dtype)
    wide = working_dtype(student_NV)
    check_gradient("grad_dtype", dtype)
    if dtype not in (jnp.bfloat16, jnp.float32, wide):
        raise ValueError(
            f"grad_dtype is {dtype} and logits are {student_NV.dtype}; it must be bfloat16 or {wide}"
        )
    return dtype


def _check_float(name, x):
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64):
        raise ValueError(f"{name} is {x.dtype}; it must be bfloat16, float32 or float64")


def _check_model(who: str, hidden_ND: jax.Array, head_VD: jax.Array) -> None:
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
    _check_float(f"{who}_hidden_ND", hidden_ND)


def _check_pair(student: Model, teacher: Model) -> None:
    n_rows, teacher_rows = (hidden_ND.shape[0] for hidden_ND, _ in (student, teacher))
    vocab, teacher_vocab = (head_VD.shape[0] for _, head_VD in (student, teacher))
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


def _check_rows(rows: Rows, n_rows: int) -> None:
    if n_rows < 1:
        raise ValueError("there are 0 rows; pass at least 1, of weight 0 if need be")
    for name, x in rows._asdict().items():
        if x is not None and x.shape != (n_rows,):
            raise ValueError(f"{name} has shape {x.shape}; it must be {(n_rows,)}")
