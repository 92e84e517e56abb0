"""Forward attention beside FlashAttention-2, 3, 4 and cuDNN: TFLOP/s over FlashAttention's benchmark grid.

    python experiments/forward_speed.py                  # 36 shapes, every peer that is installed
    python experiments/forward_speed.py --quick          # 6 shapes, 3 rounds
    python experiments/forward_speed.py --redraw experiments/results/forward_speed.json

All peers run interleaved in this process on the same tensors (see timing.py). Writes JSON, CSV and PNG.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

import command_line
import results
import torch
from peers import OURS, PEER_NAMES, Peer, find_peers, prepare_checked, reason
from shapes import HEAD_DIMS, SEQLENS, TOKENS, Shape, extra_shapes, standard_grid
from timing import GpuMonitor, Runner, device_facts, interleave, matmul_ceiling


def measure_shape(
    shape: Shape,
    peers: list[Peer],
    options: argparse.Namespace,
    monitor: GpuMonitor,
    share: float | None,
    seed: int,
) -> tuple[list[dict], float]:
    """Time every peer on one shape.

    Args:
        share: seconds for warming up and timing; None for as long as the rounds asked for take.
    Returns:
        (one row a peer, with "error" in place of a time if it failed; seconds spent after compiling).
    """
    q, k, v = shape.inputs(seed)
    calls, failed = prepare_checked(peers, shape, q, k, v)
    start = time.monotonic()
    runners = {}
    for name, call in calls.items():
        try:
            runners[name] = Runner(call, options.batch_ms, options.method)
        except Exception as error:
            failed[name] = reason(error)
    samples = interleave(runners, options.rounds, monitor, None if share is None else start + share)
    spent = time.monotonic() - start
    rows = []
    for peer in peers:
        row = {**shape.as_row(), "peer": peer.name}
        if peer.name in samples:
            measured = samples[peer.name]
            row.update(tflops=shape.tflops(measured.median_ms), **measured.as_row())
            if runners[peer.name].note:
                row["note"] = runners[peer.name].note
        else:
            row["error"] = failed[peer.name]
        rows.append(row)
    return rows, spent


def rates(rows: list[dict]) -> dict[Shape, dict[str, float]]:
    """{shape: {peer: TFLOP/s}} of the rows that hold a measurement, in their order."""
    found: dict[Shape, dict[str, float]] = {}
    for row in rows:
        by_peer = found.setdefault(Shape.of_row(row), {})
        if row.get("tflops"):
            by_peer[row["peer"]] = row["tflops"]
    return found


def ratio_to_best(by_peer: dict[str, float]) -> float | None:
    """Our rate over the best peer's; None if either is missing."""
    others = [value for name, value in by_peer.items() if name != OURS]
    return by_peer[OURS] / max(others) if OURS in by_peer and others else None


def line_of(shape: Shape, by_peer: dict[str, float], names: list[str]) -> str:
    """TFLOP/s of each peer on one shape, and our ratio to the best."""
    cells = "  ".join(
        f"{name} {by_peer[name]:6.1f}" if name in by_peer else f"{name}      -" for name in names
    )
    ratio = ratio_to_best(by_peer)
    return f"{shape!s:<34} {cells}" + (f"  | ours/best {ratio:.3f}" if ratio else "")


def summary(rows: list[dict]) -> dict[str, object]:
    """Geometric means and minima of our ratios: to the best peer, and to each peer by itself."""
    by_shape = rates(rows)
    best = {shape: ratio for shape, value in by_shape.items() if (ratio := ratio_to_best(value))}
    if not best:
        return {}
    worst = min(best, key=best.__getitem__)
    found: dict[str, object] = {
        "shapes": len(best),
        "ours_over_best_geomean": results.geomean(best.values()),
        "ours_over_best_min": best[worst],
        "ours_over_best_min_shape": str(worst),
        "shapes_where_fastest": sum(ratio >= 1 for ratio in best.values()),
    }
    for d in sorted({shape.head_dim for shape in best}):
        found[f"ours_over_best_geomean_d{d}"] = results.geomean(
            r for shape, r in best.items() if shape.head_dim == d
        )
    for name in PEER_NAMES[1:]:
        ratios = {shape: v[OURS] / v[name] for shape, v in by_shape.items() if OURS in v and name in v}
        if ratios:
            found[f"ours_over_{name}_geomean"] = results.geomean(ratios.values())
        long = [ratio for shape, ratio in ratios.items() if shape.seqlen >= 2048]
        if long:
            found[f"ours_over_{name}_min_from_2048"] = min(long)
    return found


def plot(result: dict, path: Path) -> None:
    """Bars of TFLOP/s over sequence length: a row of panels a head dim, a column a mask; the grid alone."""
    by_shape = {shape: v for shape, v in rates([r for r in result["rows"] if on_grid(r)]).items() if v}
    if not by_shape:
        return
    names = [name for name in PEER_NAMES if any(name in value for value in by_shape.values())]
    dims = sorted({shape.head_dim for shape in by_shape})
    masks = sorted({shape.causal for shape in by_shape})
    figure, axes = results.new_figure(len(dims), len(masks), 7.5 * len(masks), 3.1 * len(dims) + 0.8)
    width = 0.84 / len(names)
    for axis, (d, causal) in zip(axes.flat, [(d, causal) for d in dims for causal in masks], strict=True):
        panel = {s.seqlen: v for s, v in by_shape.items() if (s.head_dim, s.causal) == (d, causal)}
        lengths = sorted(panel)
        for i, name in enumerate(names):
            bars = [(x, panel[s][name]) for x, s in enumerate(lengths) if name in panel[s]]
            at = [x + (i - (len(names) - 1) / 2) * width for x, _ in bars]
            drawn = axis.bar(at, [y for _, y in bars], width * 0.94, color=results.COLORS[name], label=name)
            axis.bar_label(drawn, fmt="%.0f", fontsize=5.5, padding=1, rotation=90 if len(names) > 4 else 0)
        axis.set_title(f"head dim {d}, {'causal' if causal else 'full'} mask", fontsize=10)
        axis.set_xticks(range(len(lengths)), [f"{s // 1024}k" if s >= 1024 else str(s) for s in lengths])
        axis.margins(y=0.12)
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length (16k tokens, hidden 2048)")
    handles, labels = max(
        (axis.get_legend_handles_labels() for axis in axes.flat), key=lambda found: len(found[0])
    )
    figure.legend(handles, labels, loc="outside upper right", ncols=len(names), frameon=False)
    dtype = next(iter(by_shape)).dtype
    figure.suptitle(f"Forward attention, {dtype}\n{results.subtitle(result)}", fontsize=11, x=0.01, ha="left")
    results.save_figure(figure, path)


def on_grid(row: dict) -> bool:
    """Whether a row is of the standard grid, not of the extra shapes."""
    return row["batch"] * row["seqlen"] == TOKENS and row["heads"] == row["heads_kv"]


def print_summary(result: dict) -> None:
    for title, values in result["summary"].items():
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name:<34} {value:.3f}" if isinstance(value, float) else f"  {name:<34} {value}")
    print(f"  {results.ceiling_line(result)}")


def new_result(
    experiment: str, monitor: GpuMonitor, settings: dict, peers: list[Peer], missing: dict[str, str]
) -> dict:
    """A result without rows: where, when and with what it was made, and the matmul rate before."""
    return {
        "experiment": experiment,
        "made": results.provenance(),
        "device": device_facts(monitor),
        "settings": settings,
        "peers": {peer.name: peer.version for peer in peers},
        "missing": missing,
        "matmul_ceiling": {"before": matmul_ceiling(monitor)},
        "rows": [],
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--seqlens", type=int, nargs="+", default=list(SEQLENS))
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--causal", action="store_true", help="only the causal mask")
    masks.add_argument("--full", action="store_true", help="only the full mask")
    parser.add_argument("--extra", action="store_true", help="also grouped queries and batch 1")
    parser.add_argument("--peers", nargs="+", default=list(PEER_NAMES), choices=PEER_NAMES)
    command_line.add_timing(parser, rounds=7, batch_ms=15.0)
    parser.add_argument(
        "--method", choices=("graph", "events"), default="graph", help="how a batch is launched"
    )
    parser.add_argument(
        "--quick", action="store_true", help="S 1024 and 8192 of the mask(s) asked for, 3 rounds"
    )
    parser.add_argument(
        "--budget-seconds",
        type=float,
        help="cut rounds (never below 3) to end in time; compiling not counted",
    )
    parser.add_argument("--name", default="forward_speed", help="file name of the results, without suffix")
    command_line.add_redraw(parser)
    options = parser.parse_args(arguments)
    if options.quick:
        options.seqlens, options.rounds = (
            [s for s in options.seqlens if s in (1024, 8192)] or options.seqlens[:2],
            3,
        )
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; pass 1 or more")
    return options


def main() -> None:
    options = parse()
    if command_line.redrawn(options, plot):
        return
    command_line.require_gpu()
    peers, missing = find_peers(options.peers)
    for name, why in missing.items():
        print(f"without {name}: {why}")
    names = [peer.name for peer in peers]
    masks = tuple(
        causal
        for causal in (False, True)
        if not (causal and options.full) and not (not causal and options.causal)
    )
    shapes = standard_grid(tuple(options.head_dims), tuple(options.seqlens), masks, dtype=options.dtype)
    if options.extra:
        shapes += [s for s in extra_shapes(tuple(options.head_dims), options.dtype) if s.causal in masks]
    monitor = GpuMonitor()
    if monitor.problem:
        print(f"clocks and power are not recorded: {monitor.problem}")
    seed = command_line.seed_of(options)
    settings = {name: getattr(options, name) for name in ("rounds", "batch_ms", "method")} | {"seed": seed}
    result = new_result("forward_speed", monitor, settings, peers, missing)
    spent = 0.0
    for index, shape in enumerate(shapes):
        budget = options.budget_seconds
        share = None if budget is None else (budget - spent) / (len(shapes) - index)
        rows, seconds = measure_shape(shape, peers, options, monitor, share, seed + index)
        spent += seconds
        result["rows"] += rows
        print(f"[{index + 1:>2}/{len(shapes)}] {line_of(shape, rates(rows)[shape], names)}", flush=True)
        for row in rows:
            if row.get("error") or row.get("note"):
                print(f"        {row['peer']}: {row.get('error') or row['note']}", flush=True)
        results.save(result, options.out / options.name)
        gc.collect()
        torch.cuda.empty_cache()
    result["matmul_ceiling"]["after"] = matmul_ceiling(monitor)
    parts = {"standard grid": filter(on_grid, result["rows"])}
    parts["extra shapes"] = [row for row in result["rows"] if not on_grid(row)]
    result["summary"] = {title: found for title, rows in parts.items() if (found := summary(list(rows)))}
    results.save(result, options.out / options.name)
    plot(result, options.out / f"{options.name}.png")
    print_summary(result)


if __name__ == "__main__":
    main()
