"""CPU time that an eager call adds to the launch; launch and CUDA queries are replaced by constants."""

import time
from collections.abc import Callable

import pytest
import torch

from hopper_fa import backend, flash_attn_func, kernels

MICROSECONDS_ALLOWED = 25.0
# Forward and backward in units of torch.neg with its gradient, 24 us where this takes 80: autograd's own time
# is most of both, on slow machines too.
TRAINING_COST_ALLOWED = 4.5


def microseconds_a_call(call: Callable[[], object], calls: int = 50, repeats: int = 100) -> float:
    """CPU time of this thread, the best of many short means: the machine's other work is not the call's."""
    best = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        for _ in range(calls):
            call()
        best = min(best, (time.thread_time() - start) / calls)
    return best * 1e6


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Lets CPU tensors through to a launch that only notes its arguments."""
    noted: list[tuple] = []

    def launch(*arguments: object) -> int:
        noted[:] = [arguments]
        return 0

    monkeypatch.setattr(kernels._C, "forward", launch)
    monkeypatch.setattr(kernels._C, "backward", launch)
    for row in kernels.BACKWARD_TILES:
        monkeypatch.setitem(row, "dtypes", ["bf16"])
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 7, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)  # the index of a CPU device
    workspace = torch.zeros(2, dtype=torch.int32)
    monkeypatch.setattr(kernels, "_workspace", lambda index, stream: workspace)
    resolve = backend.resolve
    monkeypatch.setattr(backend, "resolve", lambda name, device: resolve("reference", device) and "cuda")
    return noted


def test_eager_call(launches: list[tuple]) -> None:
    q, k, v = (torch.randn(2, 128, heads, 64, dtype=torch.bfloat16) for heads in (4, 2, 2))
    out, lse = flash_attn_func(q, k, v, 0.25, True, return_lse=True)
    (arguments,) = launches
    assert arguments[2:6] == (q.data_ptr(), *q.stride()[:3])
    assert arguments[14:19] == (out.data_ptr(), *out.stride()[:3], lse.data_ptr())
    assert arguments[20:] == (2, 128, 128, 4, 2, 64, 0.25, True, 7)

    cost = microseconds_a_call(lambda: flash_attn_func(q, k, v, causal=True))
    print(f"{cost:.1f} us a call")
    assert cost <= MICROSECONDS_ALLOWED


def test_training_call(launches: list[tuple]) -> None:
    q, k, v = (torch.randn(2, 128, heads, 64, dtype=torch.bfloat16).requires_grad_() for heads in (4, 2, 2))
    dout = torch.randn_like(q)
    dq, dk, dv = torch.autograd.grad(flash_attn_func(q, k, v, 0.25, True), (q, k, v), dout)
    (arguments,) = launches
    assert arguments[2] == (q.data_ptr(), *q.stride()[:3])
    for got, want in zip(arguments[6:10], (dout, dq, dk, dv), strict=True):
        assert got == (want.data_ptr(), *want.stride()[:3])
    assert arguments[11] == 0  # no gradient of LSE
    assert arguments[15:] == (2, 128, 128, 4, 2, 64, 0.25, True, False, 7)

    def train() -> None:
        torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)

    base = microseconds_a_call(lambda: torch.autograd.grad(torch.neg(q), (q,), dout))
    cost = microseconds_a_call(train)
    print(f"{cost:.1f} us forward and backward, of torch.neg {base:.1f} us")
    assert cost <= TRAINING_COST_ALLOWED * base


def test_empty_queries_launch_nothing(launches: list[tuple]) -> None:
    q = torch.randn(2, 0, 4, 64, dtype=torch.bfloat16)
    k = torch.randn(2, 16, 4, 64, dtype=torch.bfloat16)
    out, lse = flash_attn_func(q, k, k, return_lse=True)
    assert launches == [] and out.shape == q.shape and lse.shape == (2, 4, 0)
