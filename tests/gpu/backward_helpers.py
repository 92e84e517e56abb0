"""How the GPU tests run the backward and judge it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from cases import Case, assert_gradients_accurate, assert_surroundings_nan, in_nan, random_gradients
from torch import Tensor

from hopper_fa import flash_attn_func, kernels

# dout, dlse, q, k, v, softmax_scale, causal
Problem = tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, float, bool]


def problem_of(
    case: Case, dtype: torch.dtype, seed: int, distribution: str = "normal", with_dlse: bool = False
) -> Problem:
    q, k, v = case.qkv(dtype, seed, "cuda", distribution)
    dout, dlse = random_gradients(q)
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    return dout, dlse if with_dlse else None, q, k, v, scale, case.causal


def rows_in_nan(t: Tensor) -> Tensor:
    """A contiguous copy of t with NaN before and after it in memory."""
    whole = torch.full((t.numel() + 512,), float("nan"), dtype=t.dtype, device=t.device)
    return whole[256 : 256 + t.numel()].view(t.shape).copy_(t)


@contextmanager
def poisoned_scratch() -> Iterator[None]:
    """torch.empty gives NaN, and the largest integers."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def run_backward_poisoned(
    problem: Problem, deterministic: bool = False, variant: str = "default"
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel on inputs that lie in NaN, with scratch of NaN, into gradients that are NaN and lie in NaN.

    Raises AssertionError if anything outside the gradients was written.
    """
    dout, dlse, q, k, v, scale, causal = problem
    out, lse = flash_attn_func(q, k, v, scale, causal, return_lse=True)
    gradients = tuple(in_nan(torch.full_like(t, float("nan"))) for t in (q, k, v))
    inputs = [in_nan(t) for t in (dout, q, k, v, out)]
    rows = [rows_in_nan(lse), None if dlse is None else rows_in_nan(dlse)]
    with poisoned_scratch():
        kernels.backward(*inputs, *rows, *gradients, scale, causal, deterministic, variant)
    for t in gradients:
        assert_surroundings_nan(t)
    return gradients


def assert_backward_accurate(
    problem: Problem, deterministic: bool = False, variant: str = "default"
) -> tuple[Tensor, Tensor, Tensor]:
    """`run_backward_poisoned` against float64 by `assert_gradients_accurate`."""
    gradients = run_backward_poisoned(problem, deterministic, variant)
    assert_gradients_accurate(gradients, problem)
    return gradients


def run_plain(problem: Problem, deterministic: bool = False) -> tuple[Tensor, ...]:
    """The public call and its gradients."""
    dout, dlse, q, k, v, scale, causal = problem
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse = flash_attn_func(*leaves, scale, causal, deterministic=deterministic, return_lse=True)
    if dlse is None:
        return torch.autograd.grad(out, leaves, dout)
    return torch.autograd.grad((out, lse), leaves, (dout, dlse))


def off_by_order(a: Tensor, b: Tensor) -> Tensor:
    """Whether a and b, of one 16-bit dtype, differ by more than another order of FP32 additions explains."""
    eps = torch.finfo(a.dtype).eps
    a, b = a.float(), b.float()
    return ((a - b).abs() > 1.01 * eps * b.abs() + 1e-5 * b.abs().max()).any()
