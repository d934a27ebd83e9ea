"""The contestants of the loss kernel's benchmark in PyTorch: the official mathematics, and Liger's kernel.

They have the same signature, inputs, settings and dimensions as the contestants in JAX.
"""

# pyright: reportMissingImports=false
# Peers are installed in environments of their own.

import math
import platform
import time
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from benchmarks.timing import versions
from benchmarks.topk_jsd_contestants import Case, head, hidden

IGNORE = -100  # Liger's label of a row that does not count


def torch_inputs(case: Case, device: str) -> tuple[torch.Tensor, ...]:
    """Student hidden states and head, which require gradients, teacher hidden states and head."""

    def draw(kind, rows, of_teacher):
        row_N1 = torch.arange(rows, dtype=torch.int32, device=device)[:, None]
        col_1D = torch.arange(case.width, dtype=torch.int32, device=device)
        x_ND, unit = kind(case, row_N1, col_1D, of_teacher)
        x_ND = (x_ND.float() * float(np.float32(unit))).to(getattr(torch, case.dtype))
        return x_ND.requires_grad_(not of_teacher)

    return (
        draw(hidden, case.tokens, False),
        draw(head, case.vocab, False),
        draw(hidden, case.tokens, True),
        draw(head, case.vocab, True),
    )


def torch_contestant(name: str, case: Case) -> Callable[..., Any]:
    """One of `IN_TORCH`. Raises ImportError where Liger is not installed, ValueError on other names."""
    official = partial(official_loss, case.k)
    name, _, size = name.partition("@")
    match name:
        case "torch-matmuls":
            return partial(_matmuls, int(size or case.chunk))
        case "torch-eager":
            return with_grads(official)
        case "torch-compile":
            return with_grads(torch.compile(official, dynamic=False))
        case "liger":
            from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction

            return with_grads(partial(_liger_loss, LigerFusedLinearJSDFunction.apply))
    raise ValueError(f"no contestant {name!r} in PyTorch")


def with_grads(loss: Callable[..., torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The loss and its gradients in the first two arguments."""

    def run(hidden_ND, head_VD, *rest):
        value = loss(hidden_ND, head_VD, *rest)
        return value.detach(), *torch.autograd.grad(value, (hidden_ND, head_VD))

    return run


def official_loss(
    k: int | None,
    hidden_ND: torch.Tensor,
    head_VD: torch.Tensor,
    teacher_hidden_ND: torch.Tensor,
    teacher_head_VD: torch.Tensor,
    weight_N: torch.Tensor,
) -> torch.Tensor:
    """What the released code computes: logits in the operands' dtype, then float32. k None: no top k."""
    student_NV = hidden_ND @ head_VD.T
    with torch.no_grad():
        teacher_NV = teacher_hidden_ND @ teacher_head_VD.T
    ids_NK = None if k is None else torch.topk(student_NV.detach(), k, dim=-1).indices

    def buckets(logits_NV):
        total_N1 = torch.logsumexp(logits_NV.float(), dim=-1, keepdim=True)
        if ids_NK is None:
            return logits_NV.float() - total_N1
        logp_NK = torch.gather(logits_NV, -1, ids_NK).float() - total_N1
        inside_N1 = torch.logsumexp(logp_NK, dim=-1, keepdim=True).clamp(max=-1e-7)
        return torch.cat([logp_NK, torch.log(-torch.expm1(inside_N1))], dim=-1)

    logq_NK = buckets(student_NV)
    with torch.no_grad():
        logr_NK = buckets(teacher_NV)
    logm_NK = torch.logaddexp(logq_NK, logr_NK) - math.log(2)

    def kl_to_mixture(logp_NK):
        return (logp_NK.exp() * (logp_NK - logm_NK)).sum(-1)

    return (weight_N * 0.5 * (kl_to_mixture(logq_NK) + kl_to_mixture(logr_NK))).sum()


def _liger_loss(apply, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, weight_N):
    """The mean over live rows of the JSD of the whole vocabulary: no top k, so another objective."""
    labels_N = torch.where(weight_N != 0, 0, IGNORE)
    return apply(hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, labels_N, 0.5, IGNORE, 1.0)


@torch.no_grad()
def _matmuls(chunk, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, weight_N):
    """The four matmuls of as many rows as are live; the head's gradient is summed in its own dtype."""
    live = int((weight_N != 0).sum())
    grad_ND = torch.zeros_like(hidden_ND)
    head_grad_VD = torch.zeros_like(head_VD)
    for at in range(0, live, chunk):
        rows = slice(at, at + chunk)
        student_CV = hidden_ND[rows] @ head_VD.T
        teacher_CV = teacher_hidden_ND[rows] @ teacher_head_VD.T
        torch.mm(student_CV, head_VD, out=grad_ND[rows])
        head_grad_VD.addmm_(teacher_CV.T, hidden_ND[rows])
    return torch.zeros(()), grad_ND, head_grad_VD


def torch_library(case: Case) -> dict[str, Any]:
    """The fields of a worker's `Library`, on CUDA if there is any, else on the CPU."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    inputs = torch_inputs(case, device)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def wait():
        if on_gpu:
            torch.cuda.synchronize()

    def prepare(name):
        run = torch_contestant(name, case)
        start = time.perf_counter()

        def call(weight_N):
            result = run(*inputs, weight_N)
            wait()
            return result

        if name == "torch-compile":  # compiles on its first call
            call(torch.zeros(case.tokens, device=device))
        return call, {"compile_s": round(time.perf_counter() - start, 1)}

    @lru_cache(1)
    def oracle(k, rows):
        hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD = (x.detach().float() for x in inputs)
        student = (hidden_ND[:rows].requires_grad_(), head_VD.requires_grad_())
        teacher = (teacher_hidden_ND[:rows], teacher_head_VD)
        weight_N = torch.full((rows,), 1 / rows, device=device)
        return with_grads(partial(official_loss, k))(*student, *teacher, weight_N)

    def answers():
        torch.ones(8, device=device).sum()
        wait()

    name = torch.cuda.get_device_name() if on_gpu else platform.machine()
    return {
        "environment": {"device": name, "platform": device, **versions("torch", "triton", "liger-kernel")},
        "inputs": inputs,
        "to_device": lambda x_N: torch.from_numpy(x_N).to(device),
        "prepare": prepare,
        "oracle": oracle,
        "to_float32": lambda x: x.float(),
        "peak": lambda: torch.cuda.max_memory_allocated() if on_gpu else None,
        "answers": answers,
    }
