"""The loss of one set of rows: `kernels/topk_jsd` with the method's defaults.

Dimensions: N rows, D model width, V vocabulary.
"""

from __future__ import annotations

from typing import Literal

import jax

from rosd_jax.kernels.topk_jsd import LossAux, Sharding, topk_jsd_loss


def span_loss(
    student_hidden_ND: jax.Array,
    student_head_VD: jax.Array,
    teacher_hidden_ND: jax.Array,
    teacher_head_VD: jax.Array,
    weight_N: jax.Array,
    tokens_N: jax.Array,
    sampler_logp_N: jax.Array,
    *,
    k: int | None = 100,
    alpha: float = 0.5,
    tail: Literal["bucket", "renorm"] = "bucket",
    temperature: float = 1.0,
    num_tokens: int | None = None,
    ratio_cap: float | None = 2.0,
    chunk: int = 1024,
    sharding: Sharding | None = None,
) -> tuple[jax.Array, LossAux]:
    """Sum over rows of weight x capped importance ratio x top-k JSD (arXiv 2605.28014).

    Row n holds the hidden states from which both models predict tokens_N[n], int32. weight_N is 0
    outside the distilled region and includes the global denominator. ratio_cap None: no ratio.
    sharding splits rows, and if asked the vocabulary, over a mesh; None: one device.
    Differentiable in the student's hidden states and head; raises what the kernel raises.
    """
    return topk_jsd_loss(
        student_hidden_ND,
        student_head_VD,
        teacher_hidden_ND,
        teacher_head_VD,
        weight_N,
        k=k,
        alpha=alpha,
        tail=tail,
        temperature=temperature,
        num_tokens=num_tokens,
        tokens_N=tokens_N,
        sampler_logp_N=sampler_logp_N,
        ratio_cap=ratio_cap,
        chunk=chunk,
        sharding=sharding,
    )
