"""Peak GPU memory of forward attention over sequence length: standard attention, FlashAttention-2 and ours.

    python experiments/memory.py

Counts what a call allocates beyond its inputs (torch.cuda.max_memory_allocated), outputs included: batch 1,
16 heads, head dim 128, bf16, full mask. Standard attention is S = QK^T, P = softmax(S), O = PV with S and P
in memory.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import command_line
import results
import torch
from peers import OURS, find_peers, reason
from shapes import Shape
from timing import GpuMonitor, device_facts

LABELS = {"standard": "standard attention (torch)", "fa2": "FlashAttention-2 (torch)", OURS: "hopper_fa"}


def standard_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """softmax(QK^T / sqrt(d)) V as three torch operations, (batch, seqlen, heads, head_dim)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)  # (batch, heads, seqlen, seqlen)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def peak_bytes(call: Callable[[], object]) -> int:
    """Most bytes of torch's allocator that one call held at a time, beyond those held before it."""
    call()  # the first call may allocate what stays: handles, workspaces
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def measure(shape: Shape, prepare: Callable) -> dict[str, object]:
    """{"peak_bytes"}, or {"error"} where the GPU's memory does not hold it."""
    q, k, v = shape.inputs(seed=shape.seqlen)
    try:
        return {"peak_bytes": peak_bytes(prepare(shape, q, k, v))}
    except torch.OutOfMemoryError as error:
        return {"error": reason(error)}
    finally:
        del q, k, v
        gc.collect()
        torch.cuda.empty_cache()


def plot(result: dict, path: Path) -> None:
    """Peak memory over sequence length, both axes logarithmic."""
    figure, axes = results.new_figure(1, 1, 6.5, 4.2)
    axis = axes[0, 0]
    styles = {"standard": ("o", "-"), "fa2": ("s", "-"), OURS: ("x", "--")}
    for name, label in LABELS.items():
        points = [
            (row["seqlen"], row["peak_bytes"] / 2**20)
            for row in result["rows"]
            if row["peer"] == name and row.get("peak_bytes")
        ]
        if not points:
            continue
        marker, line = styles[name]
        axis.plot(
            *zip(*points, strict=True), color=results.COLORS[name], marker=marker, linestyle=line, label=label
        )
        failed = [row["seqlen"] for row in result["rows"] if row["peer"] == name and row.get("error")]
        if failed:
            axis.annotate(
                f"out of memory at {min(failed) // 1024}k",
                points[-1],
                xytext=(8, -3),
                textcoords="offset points",
                fontsize=8,
            )
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=10)
    lengths = sorted({row["seqlen"] for row in result["rows"]})
    axis.set_xticks(lengths, [f"{s // 1024}k" if s >= 1024 else str(s) for s in lengths])
    axis.set_xlim(lengths[0] * 0.8, lengths[-1] * 1.6)
    axis.set_xlabel("sequence length (batch 1, 16 heads, head dim 128, bf16)")
    axis.set_ylabel("peak memory beyond inputs (MiB)")
    axis.legend(frameon=False)
    figure.suptitle(f"Memory of a forward call\n{results.subtitle(result)}", fontsize=10)
    results.save_figure(figure, path)


def main() -> None:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[2**n for n in range(9, 17)])
    command_line.add_redraw(parser)
    options = parser.parse_args()
    if command_line.redrawn(options, plot):
        return
    command_line.require_gpu()
    peers, missing = find_peers((OURS, "fa2"))
    for name, why in missing.items():
        print(f"without {name}: {why}")
    subjects = {"standard": lambda shape, q, k, v: lambda: standard_attention(q, k, v)}
    subjects |= {peer.name: peer.prepare for peer in sorted(peers, key=lambda peer: peer.name == OURS)}
    result = {
        "experiment": "memory",
        "made": results.provenance(),
        "device": device_facts(GpuMonitor()),
        "missing": missing,
        "rows": [],
    }
    for seqlen in options.seqlens:
        shape = Shape(1, seqlen, 16, 16, 128, False)
        for name, prepare in subjects.items():
            result["rows"].append({**shape.as_row(), "peer": name, **measure(shape, prepare)})
        print(
            f"S {seqlen:>6}  " + "  ".join(_cell(row) for row in result["rows"][-len(subjects) :]), flush=True
        )
    results.save(result, options.out / "memory")
    plot(result, options.out / "memory.png")


def _cell(row: dict) -> str:
    size = f"{row['peak_bytes'] / 2**20:10.1f} MiB" if "peak_bytes" in row else f"{'out of memory':>14}"
    return f"{row['peer']} {size}"


if __name__ == "__main__":
    main()
