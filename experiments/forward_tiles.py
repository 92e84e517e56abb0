"""Which tile is fastest: every built row of the tile table for a head dim, checked, then timed interleaved.

    python experiments/forward_tiles.py --head-dims 64 128 --seqlens 1024 4096 16384

Variants other than "default" need a build with -DHOPPER_FA_EXPERIMENTS=ON. A variant that disagrees with
float64 is reported and not timed. Writes one JSON and CSV.
"""

from __future__ import annotations

import argparse

import command_line
import results
import tiles
from shapes import HEAD_DIMS, Shape, standard_grid
from timing import GpuMonitor, Runner, device_facts, interleave, matmul_ceiling


def time_shape(
    shape: Shape, variants: list[str], options: argparse.Namespace, monitor: GpuMonitor, seed: int
) -> list[dict]:
    """A row a variant on one shape."""
    q, k, v = shape.inputs(seed)
    runners = {
        variant: Runner(tiles.variant_call(variant, q, k, v, shape.causal), options.batch_ms)
        for variant in variants
    }
    samples = interleave(runners, options.rounds, monitor)
    return [
        {"variant": variant, **shape.as_row(), "tflops": shape.tflops(s.median_ms), **s.as_row()}
        for variant, s in samples.items()
    ]


def print_matrix(head_dim: int, shapes: list[Shape], built: dict[str, dict], rows: list[dict]) -> None:
    """Variants down, shapes across, TFLOP/s, * at the best of a shape; last the geomean over default's."""
    rate = {(row["variant"], Shape.of_row(row)): row["tflops"] for row in rows}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    best = {s: max(rate[v, s] for v in variants) for s in shapes}
    lines = []
    for variant in variants:
        mine = [rate[variant, s] for s in shapes]
        marks = [f"{r:.1f}{'*' if r == best[s] else ' '}" for r, s in zip(mine, shapes, strict=True)]
        ratio = None
        if "default" in variants:
            defaults = [rate["default", s] for s in shapes]
            ratio = f"{results.geomean(a / b for a, b in zip(mine, defaults, strict=True)):.3f}"
        lines.append([variant, tiles.describe(built[variant]), *marks, ratio])
    header = ["variant", "tile", *(f"{s.seqlen}{'c' if s.causal else 'f'}" for s in shapes), "/default"]
    print(f"head dim {head_dim}, TFLOP/s (f: full mask, c: causal)")
    print(results.table(header, lines), flush=True)


def main() -> None:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--seqlens", type=int, nargs="+", default=[512, 1024, 4096, 16384])
    parser.add_argument("--variants", nargs="+", help="default: every one built")
    command_line.add_timing(parser, rounds=5, batch_ms=12.0)
    options = parser.parse_args()
    command_line.require_gpu()
    seed = command_line.seed_of(options)
    monitor = GpuMonitor()
    result = {
        "experiment": "forward_tiles",
        "made": results.provenance(),
        "device": device_facts(monitor),
        "settings": {"rounds": options.rounds, "batch_ms": options.batch_ms, "seed": seed},
        "matmul_ceiling": {"before": matmul_ceiling(monitor)},
        "wrong": {},
        "tiles": [row for row in tiles.kernels.FORWARD_TILES if row["dtypes"]],
        "rows": [],
    }
    for head_dim in options.head_dims:
        built = tiles.built_tiles(head_dim, options.dtype)
        wanted = [variant for variant in built if not options.variants or variant in options.variants]
        if len(wanted) < 2:
            print(f"head dim {head_dim}: {', '.join(wanted) or 'nothing'} to time; {tiles.BUILD_HINT}")
        wrong = {variant: tiles.check_variant(variant, head_dim, options.dtype, seed) for variant in wanted}
        for variant, why in wrong.items():
            if why:
                print(f"head dim {head_dim}: {variant} is not timed, {why}", flush=True)
                result["wrong"][f"{variant} d{head_dim}"] = why
        right = [variant for variant in wanted if not wrong[variant]]
        if not right:
            continue
        shapes = standard_grid((head_dim,), tuple(options.seqlens), dtype=options.dtype)
        rows = []
        for index, shape in enumerate(shapes):
            print(f"[{index + 1}/{len(shapes)}] {shape}", flush=True)
            rows += time_shape(shape, right, options, monitor, seed + index)
        print_matrix(head_dim, shapes, built, rows)
        result["rows"] += rows
        results.save(result, options.out / "forward_tiles")
    result["matmul_ceiling"]["after"] = matmul_ceiling(monitor)
    results.save(result, options.out / "forward_tiles")
    print(results.ceiling_line(result))
    if result["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
