"""The contestants of the loss kernel's benchmark in PyTorch: the official mathematics, and Liger's kernel.

They have the signature, the inputs and the settings of those in JAX.
"""

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
        row_N, col_D = (torch.arange(n, dtype=torch.int32, device=device) for n in (rows, case.width))
        x_ND, unit = kind(case, row_N[:, None], col_D, of_teacher)
        x_ND = (x_ND.float() * float(np.float32(unit))).to(getattr(torch, case.dtype))
        return x_ND.requires_grad_(not of_teacher)

    return tuple(draw(kind, rows, who) for who in (False, True)
                 for kind, rows in ((hidden, case.tokens), (head, case.vocab)))  # fmt: skip


def torch_contestant(name: str, case: Case) -> Callable[..., Any]:
    """ImportError where liger_kernel is not installed, ValueError on an unknown name."""
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
    k: int | None, hidden_ND: torch.Tensor, head_VD: torch.Tensor, teacher_hidden_ND: torch.Tensor,
    teacher_head_VD: torch.Tensor, weight_N: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
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
    kl = lambda logp_NK: (logp_NK.exp() * (logp_NK - logm_NK)).sum(-1)
    return (weight_N * 0.5 * (kl(logq_NK) + kl(logr_NK))).sum()


def _liger_loss(apply, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, weight_N):
    """The mean over live rows of the JSD of the whole vocabulary: no top k, so another objective."""
    labels_N = torch.where(weight_N != 0, 0, IGNORE)
    return apply(hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, labels_N, 0.5, IGNORE, 1.0)


@torch.no_grad()
def _matmuls(chunk, hidden_ND, head_VD, teacher_hidden_ND, teacher_head_VD, weight_N):
    """The four matmuls of as many rows as are live; the head's gradient is summed in its own dtype."""
    live, head_grad_VD = int((weight_N != 0).sum()), torch.zeros_like(head_VD)
    grad_ND = torch.zeros_like(hidden_ND)
    for at in range(0, live, chunk):
        rows = slice(at, at + chunk)
        student_CV, teacher_CV = hidden_ND[rows] @ head_VD.T, teacher_hidden_ND[rows] @ teacher_head_VD.T
        torch.mm(student_CV, head_VD, out=grad_ND[rows])
        head_grad_VD.addmm_(teacher_CV.T, hidden_ND[rows])
    return torch.zeros(()), grad_ND, head_grad_VD


def torch_library(case: Case) -> tuple[Any, ...]:
    """The fields of a worker's `Library`, on CUDA if there is any, else on the CPU."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    inputs = torch_inputs(case, device)
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def prepare(name):
        run, start = torch_contestant(name, case), time.perf_counter()

        def call(weight_N):
            result = run(*inputs, weight_N)
            wait()
            return result

        if name == "torch-compile":
            call(torch.zeros(case.tokens, device=device))
        return call, {"compile_s": round(time.perf_counter() - start, 1)}

    @lru_cache(1)
    def oracle(k, rows):
        wide = [x.detach().float().requires_grad_(x.requires_grad) for x in inputs]
        wide[0], wide[2] = (x.detach()[:rows].requires_grad_(x.requires_grad) for x in (wide[0], wide[2]))
        weight_N = torch.full((rows,), 1 / rows, device=device)
        return with_grads(partial(official_loss, k))(*wide, weight_N)

    name = torch.cuda.get_device_name() if on_gpu else platform.machine()
    environment = {"device": name, "platform": device, **versions("torch", "triton", "liger-kernel")}
    return (
        environment, inputs, lambda x_N: torch.from_numpy(x_N).to(device), prepare, oracle,
        lambda x: x.float(), lambda: torch.cuda.max_memory_allocated() if on_gpu else None,
        lambda: (torch.ones(8, device=device).sum(), wait()),
    )  # fmt: skip
