"""How the GPU tests run the kernel and judge it."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from cases import assert_accurate, assert_surroundings_nan, in_nan, nan_outputs
from torch import Tensor

from hopper_fa import kernels

SLEEP_CYCLES = 200_000_000  # about 0.1 s on the GPU


def in_a_new_thread(call: Callable[[], Any]) -> Any:
    """What `call` returns or raises in a thread that has done nothing with CUDA yet, so has no context.

    It has been called before, so that memory is there: to allocate some would make a context.
    """
    call()
    torch.cuda.synchronize()
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(results[0], Exception):
        raise results[0]
    return results[0]


def same(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def run_poisoned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    variant: str = "default",
) -> tuple[Tensor, Tensor]:
    """The kernel on copies of q, k, v that lie in NaN, into outputs that are NaN and lie in NaN.

    Raises AssertionError if anything outside the outputs was written.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    out, lse = nan_outputs(q)
    kernels.forward(in_nan(q), in_nan(k), in_nan(v), out, lse, scale, causal, variant)
    assert_surroundings_nan(out)
    return out, lse


def assert_kernel_accurate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    variant: str = "default",
) -> None:
    """`run_poisoned` against float64 by `assert_accurate`."""
    out, lse = run_poisoned(q, k, v, softmax_scale, causal, variant)
    assert_accurate(out, lse, q, k, v, softmax_scale, causal)
