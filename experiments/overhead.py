"""CPU time of one eager call, in microseconds: what the Python face costs on top of the launch.

    python experiments/overhead.py

Calls go out in bursts short enough that the launch queue never fills, on a problem so small that the GPU
keeps up; a burst is timed on the host without waiting for the GPU. "launch" is the compiled module called
with ready pointers and outputs: tensor maps and kernel launch, no Python. The face's cost is the difference.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import command_line
import results
import torch
from peers import reason
from shapes import Shape
from timing import GpuMonitor, device_facts

BURST = 200


def microseconds(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Host time of a call by name, one entry a round; bursts interleaved in rotating order."""
    names = list(calls)
    taken: dict[str, list[float]] = {name: [] for name in names}
    for index in range(rounds):
        shift = index % len(names)
        for name in names[shift:] + names[:shift]:
            call = calls[name]
            torch.cuda.synchronize()
            start = time.perf_counter_ns()
            for _ in range(BURST):
                call()
            taken[name].append((time.perf_counter_ns() - start) / 1e3 / BURST)
    torch.cuda.synchronize()
    return taken


def launch_call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], None]:
    """The compiled module's forward with every argument but the stream prepared."""
    from hopper_fa import _C, kernels

    tile = kernels.forward_tile(q.shape[-1])["tile"]
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    workspace = torch.zeros(_C.FORWARD_WORKSPACE_INTS, dtype=torch.int32, device=q.device)
    tensors = [value for t in (q, k, v, out) for value in (t.data_ptr(), *t.stride()[:3])]
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3])
    dtype = _C.DTYPES[kernels.DTYPE_NAMES[q.dtype]]
    stream = torch.cuda.current_stream().cuda_stream
    pointers = (lse.data_ptr(), workspace.data_ptr())
    arguments = (dtype, tile, *tensors, *pointers, *sizes, q.shape[3] ** -0.5, False, stream)
    keep = (q, k, v, out, lse, workspace)  # raw pointers do not keep their tensors alive

    def call(forward=_C.forward, arguments=arguments, keep=keep) -> None:
        forward(*arguments)

    if (status := _C.forward(*arguments)) != _C.STATUS_OK:
        raise RuntimeError(f"_C.forward returned status {status}")
    return call


def subjects(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, Callable[[], object]]:
    """What is timed, by the name that the table shows."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    from hopper_fa import flash_attn_func

    operator = torch.ops.hopper_fa.forward
    scale = q.shape[-1] ** -0.5
    transposed = [t.transpose(1, 2) for t in (q, k, v)]

    def sdpa() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(*transposed)

    return {
        "launch": launch_call(q, k, v),
        "flash_attn_func": lambda: flash_attn_func(q, k, v),
        "flash_attn_func, LSE": lambda: flash_attn_func(q, k, v, return_lse=True),
        "torch.ops.hopper_fa.forward": lambda: operator([q, k, v], scale, False, False, None, None),
        "torch SDPA": lambda: scaled_dot_product_attention(*transposed),
        "torch SDPA, flash backend chosen": sdpa,
        "two torch.empty": lambda: (torch.empty_like(q), q.new_empty((1, 1, 64), dtype=torch.float32)),
    }


def main() -> None:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=25)
    options = parser.parse_args()
    command_line.require_gpu()
    shape = Shape(1, 64, 1, 1, 64, False)
    calls = {}
    for name, call in subjects(*shape.inputs(seed=0)).items():
        try:
            for _ in range(20):
                call()
            torch.cuda.synchronize()
            calls[name] = call
        except Exception as error:  # a build without this instance, a torch without this backend
            print(f"without {name}: {reason(error)}")
    taken = microseconds(calls, options.rounds)
    launch = statistics.median(taken["launch"]) if "launch" in taken else None
    rows = []
    for name, values in taken.items():
        median = statistics.median(values)
        above = median - launch if launch is not None else None
        rows.append({"call": name, "us": median, "us_fastest": min(values), "us_above_launch": above})
    result = {
        "experiment": "overhead",
        "made": results.provenance(),
        "device": device_facts(GpuMonitor()),
        "settings": {"shape": str(shape), "burst": BURST, "rounds": options.rounds},
        "rows": rows,
    }
    results.save(result, options.out / "overhead")
    header = ("call", "us", "fastest", "above launch")
    print(results.table(header, [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
