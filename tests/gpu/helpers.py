"""How the GPU tests run the kernel and judge it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(call).result()


def assert_runs_on_the_current_stream(
    call: Callable[[Sequence[Tensor]], tuple[Tensor, ...]], source: Sequence[Tensor]
) -> None:
    """Inputs written late on a side stream are seen; what is written to them after the call is not."""
    expected = call(source)
    late = [torch.full_like(t, float("nan")) for t in source]
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(SLEEP_CYCLES)
        for t, values in zip(late, source, strict=True):
            t.copy_(values)
        result = call(late)
        for t in late:
            t.fill_(float("nan"))
    stream.synchronize()
    assert same(expected, result)


def assert_does_not_synchronise(call: Callable[[], Any]) -> None:
    call()
    torch.cuda.synchronize()
    asleep = torch.cuda.Event()
    torch.cuda._sleep(SLEEP_CYCLES)
    asleep.record()
    call()
    assert not asleep.query(), "the call returned only after the GPU had caught up"
    torch.cuda.synchronize()


def assert_reads_what_the_last_call_wrote(
    call: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]], start: tuple[Tensor, ...], calls: int = 20
) -> None:
    """Calls in a row, each on what the last one returned, give the bits of calls that wait for each other.

    One by one, and in a graph. What a call has read is memory of the next one but one.
    """

    def chain(waiting: bool) -> tuple[Tensor, ...]:
        result = start
        for _ in range(calls):
            result = call(result)
            if waiting:
                torch.cuda.synchronize()
        return result

    expected = chain(True)
    assert all(t.isfinite().all() for t in expected)
    torch.cuda._sleep(SLEEP_CYCLES)  # all launches are there when the first one begins
    assert same(expected, chain(False)), "one by one"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = chain(False)
    for _ in range(5):
        for t in result:
            t.fill_(float("nan"))
        graph.replay()
        assert same(expected, result), "in a graph"


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
