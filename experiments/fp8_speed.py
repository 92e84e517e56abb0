"""FP8 forward attention on quantised tensors beside FlashAttention-3, vLLM's fork, cuDNN and our own BF16.

    python experiments/fp8_speed.py                     # 36 shapes, every peer that is installed
    python experiments/fp8_speed.py --variants fp8_no_ping_pong  # our other tiles

hopper_fa is the default recipe, hopper_fa_e4m3 the same with e4m3 scores, hopper_fa_accurate has int8 scores
and exact exponentials; all accumulate in two levels. fa3 does not, vllm does. hopper_fa_end_to_end is the
default recipe from 16-bit tensors on. Interleaved in one process on the same inputs (timing.py). Writes JSON
and CSV.
"""

from __future__ import annotations

import argparse
import gc

import command_line
import results
import torch
from forward_speed import measure_shape, new_result, rates
from fp8_peers import BUILDERS, find_fp8_peers
from shapes import HEAD_DIMS, SEQLENS, standard_grid
from timing import GpuMonitor, matmul_ceiling

OTHERS = ("hopper_fa_bf16", "fa2", "fa3", "vllm", "cudnn")


def summary(rows: list[dict]) -> dict[str, object]:
    """Geometric mean and minimum of our rate over each other's, for every kernel of ours and head dim."""
    by_shape = rates(rows)
    names = {name for value in by_shape.values() for name in value}
    found: dict[str, object] = {}
    for ours in sorted(name for name in names if name.startswith("hopper_fa") and name not in OTHERS):
        for other in OTHERS:
            ratios = {s: v[ours] / v[other] for s, v in by_shape.items() if ours in v and other in v}
            if not ratios:
                continue
            for d in (*sorted({shape.head_dim for shape in ratios}), None):
                chosen = [ratio for shape, ratio in ratios.items() if d in (shape.head_dim, None)]
                label = f"{ours}_over_{other}" + (f"_d{d}" if d else "")
                found[f"{label}_geomean"] = results.geomean(chosen)
                found[f"{label}_min"] = min(chosen)
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--seqlens", type=int, nargs="+", default=list(SEQLENS))
    parser.add_argument("--peers", nargs="+", default=list(BUILDERS), choices=BUILDERS)
    parser.add_argument("--variants", nargs="+", default=[], help="tile-table variants of ours, besides")
    command_line.add_timing(parser, rounds=7, batch_ms=15.0)
    parser.add_argument("--method", choices=("graph", "events"), default="graph")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        help="cut rounds (never below 3) to end in time; compiling not counted",
    )
    parser.add_argument("--name", default="fp8_speed", help="file name of the results, without suffix")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    command_line.require_gpu()
    peers, missing = find_fp8_peers(options.peers, options.variants)
    for name, why in missing.items():
        print(f"without {name}: {why}")
    shapes = standard_grid(tuple(options.head_dims), tuple(options.seqlens), dtype=options.dtype)
    monitor = GpuMonitor()
    seed = command_line.seed_of(options)
    settings = {name: getattr(options, name) for name in ("rounds", "batch_ms", "method")} | {"seed": seed}
    result = new_result("fp8_speed", monitor, settings, peers, missing)
    spent = 0.0
    for index, shape in enumerate(shapes):
        budget = options.budget_seconds
        share = None if budget is None else (budget - spent) / (len(shapes) - index)
        rows, seconds = measure_shape(shape, peers, options, monitor, share, seed + index)
        spent += seconds
        result["rows"] += rows
        cells = "  ".join(
            f"{row['peer']} {row['tflops']:.0f}" if "tflops" in row else f"{row['peer']} -" for row in rows
        )
        print(f"[{index + 1:>2}/{len(shapes)}] {shape!s:<34} {cells}", flush=True)
        for row in rows:
            if row.get("error"):
                print(f"        {row['peer']}: {row['error']}", flush=True)
        results.save(result, options.out / options.name)
        gc.collect()
        torch.cuda.empty_cache()
    result["matmul_ceiling"]["after"] = matmul_ceiling(monitor)
    result["summary"] = summary(result["rows"])
    results.save(result, options.out / options.name)
    for name, value in result["summary"].items():
        print(f"  {name:<44} {value:.3f}")


if __name__ == "__main__":
    main()
