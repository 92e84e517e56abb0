"""Tensors that are made once a device, only read from then on, and never freed."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_FEWEST, _MOST = 1 << 16, 1 << 22  # elements of a tensor that is kept
_KEPT: dict[tuple[torch.device, float], list[torch.Tensor]] = {}


def constant(value: float, count: int, device: torch.device) -> torch.Tensor:
    """At least `count` elements of one value: (more,) float32, 16-byte aligned, not to be written to.

    On a CUDA device it is kept for later calls in any stream, so that they launch nothing for it. The first
    calls of a device wait for a copy to it.
    """
    kept = _KEPT.setdefault((device, value), [])
    largest = kept[-1] if kept else None
    if largest is not None and largest.numel() >= count:
        return largest
    # NOTE: memory that a capture allocates is its graph's, which reuses it: such a tensor is for one call.
    if device.type != "cuda" or count > _MOST or torch.cuda.is_current_stream_capturing():
        return torch.full((count,), value, dtype=torch.float32, device=device)
    size = max(_FEWEST, 1 << (count - 1).bit_length())
    made = lasting(lambda: torch.full((size,), value, dtype=torch.float32, device="cpu").to(device))
    # Launches may still read the smaller ones, which together are no larger than this one.
    kept.append(made)
    return made


def lasting(make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `make` returns, a copy to a CUDA device, in memory of no graph; any stream may read it.

    NOTE: while torch warms a graph up (torch.compile with mode="reduce-overhead"), the graph's pool gets all
    that the thread allocates, and reuses it; so another thread makes the copy. A copy from pageable memory
    ends before it returns.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()
