"""What each part of the schedule is worth: FlashAttention-3's Table 2, measured with our kernel.

    python experiments/forward_ablation.py [--dtype fp16]

Runs every built variant of the head dim 128 tile, but those that forward_tiles.py has to measure first,
interleaved with a bf16 8192 matmul, at batch 4, seqlen 8448, 16 heads, full mask. Beside ours stand the
paper's TFLOP/s, measured on an H100 in FP16 (Shah et al. 2024, Table 2). Needs a build with
-DHOPPER_FA_EXPERIMENTS=ON.
"""

from __future__ import annotations

from pathlib import Path

import command_line
import results
from shapes import Shape
from timing import GpuMonitor, Runner, device_facts, interleave, matmul_runner, matmul_tflops

PAPER_TFLOPS = {"default": 661, "no_overlap": 582, "no_warp_specialisation": 570}
MATMUL = "matmul"


def plot(result: dict, path: Path) -> None:
    """Horizontal bars: ours, and the paper's number as a mark."""
    rows = [row for row in result["rows"] if row.get("tflops") and row["variant"] != MATMUL]
    figure, axes = results.new_figure(1, 1, 7.5, 1.4 + 0.45 * len(rows))
    axis = axes[0, 0]
    axis.grid(axis="x", color="#e3e3e3", linewidth=0.7)
    axis.grid(visible=False, axis="y")
    places = range(len(rows))
    bars = axis.barh(
        places, [row["tflops"] for row in rows], 0.62, color=results.COLORS["hopper_fa"], label="hopper_fa"
    )
    axis.bar_label(bars, fmt="%.0f", fontsize=9, label_type="center", color="white")
    marked = [
        (place, row["paper_tflops"])
        for place, row in zip(places, rows, strict=True)
        if row.get("paper_tflops")
    ]
    if marked:
        axis.plot(
            [x for _, x in marked], [y for y, _ in marked], "k|", markersize=16, label="FA3 paper, H100, FP16"
        )
    ceiling = next((row["tflops"] for row in result["rows"] if row["variant"] == MATMUL), None)
    if ceiling:
        axis.axvline(
            ceiling, color="#555555", linestyle="--", linewidth=1, label="bf16 8192 matmul, same run"
        )
    axis.set_yticks(places, [row["variant"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("TFLOP/s")
    axis.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    figure.suptitle(
        f"Forward ablation: {result['settings']['shape']}\n{results.subtitle(result)}", fontsize=9
    )
    results.save_figure(figure, path)


def ablation_rows(shape: Shape, tiles: dict[str, dict], samples: dict, failed: dict[str, str]) -> list[dict]:
    """A row a variant, fastest first, then the matmul; `percent_of_matmul` is of the same rounds."""
    ceiling = matmul_tflops(samples[MATMUL].median_ms)
    rows = []
    for variant, tile in tiles.items():
        row = {"variant": variant, **shape.as_row(), "paper_tflops": PAPER_TFLOPS.get(variant)}
        if variant in samples:
            rate = shape.tflops(samples[variant].median_ms)
            row.update(tflops=rate, percent_of_matmul=100 * rate / ceiling, **samples[variant].as_row())
        else:
            row["error"] = failed[variant]
        switches = ("block_m", "block_n", "kv_stages", "warp_specialised", "ping_pong", "overlap")
        row.update({name: tile[name] for name in switches})
        rows.append(row)
    rows.sort(key=lambda row: -row.get("tflops", 0.0))
    return [*rows, {"variant": MATMUL, "tflops": ceiling, **samples[MATMUL].as_row()}]


def print_rows(rows: list[dict]) -> None:
    header = [
        "variant",
        "tile",
        "specialised",
        "overlap",
        "ping-pong",
        "TFLOP/s",
        "% matmul",
        "paper",
        "MHz",
        "W",
    ]

    def cells(row: dict) -> list[object]:
        if "block_m" not in row:
            tile = [None, None, None, None]
        else:
            yes_no = ["yes" if row[key] else "no" for key in ("warp_specialised", "overlap")]
            tile = [f"{row['block_m']}x{row['block_n']}", *yes_no, row["ping_pong"]]
        measured = [row.get("tflops"), row.get("percent_of_matmul"), row.get("paper_tflops")]
        return [row["variant"], *tile, *measured, row.get("sm_clock_mhz"), row.get("power_w")]

    print(results.table(header, map(cells, rows)))
    for row in rows:
        if "error" in row:
            print(f"{row['variant']}: {row['error']}")


def main() -> None:
    parser = command_line.new_parser(__doc__)
    command_line.add_timing(parser, rounds=9, batch_ms=20.0)
    command_line.add_redraw(parser)
    options = parser.parse_args()
    if command_line.redrawn(options, plot):
        return
    command_line.require_gpu()
    import tiles  # needs the compiled module, which --redraw does not

    shape = Shape(4, 8448, 16, 16, 128, False, options.dtype)
    built = tiles.built_tiles(shape.head_dim, options.dtype)
    absent = [variant for variant in PAPER_TFLOPS if variant not in built]
    if absent:
        print(f"not in this build: {', '.join(absent)}; {tiles.BUILD_HINT}")
    if not built:
        raise SystemExit(1)
    seed = command_line.seed_of(options)
    monitor = GpuMonitor()
    q, k, v = shape.inputs(seed)
    runners, failed = {}, {}
    for variant in built:
        failed[variant] = tiles.check_variant(variant, shape.head_dim, options.dtype, seed)
        if not failed[variant]:
            runners[variant] = Runner(tiles.variant_call(variant, q, k, v, shape.causal), options.batch_ms)
    runners[MATMUL] = matmul_runner(target_ms=options.batch_ms)
    result = {
        "experiment": "forward_ablation",
        "made": results.provenance(),
        "device": device_facts(monitor),
        "settings": {
            "shape": str(shape),
            "rounds": options.rounds,
            "batch_ms": options.batch_ms,
            "seed": seed,
        },
        "rows": ablation_rows(shape, built, interleave(runners, options.rounds, monitor), failed),
    }
    stem = options.out / (
        "forward_ablation" if options.dtype == "bf16" else f"forward_ablation_{options.dtype}"
    )
    results.save(result, stem)
    plot(result, stem.with_suffix(".png"))
    print(f"{shape}; paper: FlashAttention-3 Table 2, H100, FP16")
    print_rows(result["rows"])


if __name__ == "__main__":
    main()
