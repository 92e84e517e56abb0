"""Backward attention beside FlashAttention-2, 3, 4 and cuDNN: TFLOP/s over FlashAttention's benchmark grid.

    python experiments/backward_speed.py                      # 36 shapes and grouped queries, all peers
    python experiments/backward_speed.py --seqlens 2048 8192 --fa4-seqlens 8192 --budget-seconds 120
    python experiments/backward_speed.py --redraw experiments/results/backward_speed.json
    python experiments/backward_speed.py --readme experiments/results/backward_speed.json

Three modes: the backward alone, the same deterministic, forward and backward combined. --peers takes groups,
"fa2,fa3,fa4 fa2,cudnn" by default: the libraries of FlashAttention-3 and cuDNN do not share a process. Each
group runs in a process of its own with hopper_fa in it, all interleaved (timing.py), and a ratio never
crosses processes. Writes JSON, CSV and PNG; --readme writes README.md's table from the JSON.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from pathlib import Path

import command_line
import results
import torch
from backward_peers import (
    BUILDERS,
    FLOPS_OF_FORWARD,
    MODES,
    BackwardPeer,
    Problem,
    find_backward_peers,
    prepare_checked,
)
from forward_speed import new_result, on_grid
from peers import OURS, reason
from shapes import HEAD_DIMS, SEQLENS, Shape, extra_shapes, standard_grid
from timing import GpuMonitor, Runner, interleave, matmul_ceiling

GROUPS = ("fa2,fa3,fa4", "fa2,cudnn")
README = results.ROOT / "README.md"
Ratios = dict[Shape, dict[str, float]]


def measure_shape(
    shape: Shape, peers: list[BackwardPeer], options: argparse.Namespace, monitor: GpuMonitor, seed: int
) -> list[dict]:
    """One row a peer and mode, "error" in place of a time if it failed; at most `options.share` seconds."""
    problem = Problem.random(shape, seed)
    if shape.seqlen not in options.fa4_seqlens:
        peers = [peer for peer in peers if peer.name != "fa4"]
    calls, failed = prepare_checked(peers, problem, options.modes)
    start = time.monotonic()
    runners = {}
    for subject, call in calls.items():
        try:
            runners[subject] = Runner(call, options.batch_ms, options.method)
        except Exception as error:
            failed[subject] = reason(error)
    deadline = None if options.share is None else start + options.share
    samples = interleave(runners, options.rounds, monitor, deadline)
    options.spent += time.monotonic() - start
    rows = []
    for peer in peers:
        for mode in options.modes:
            subject = (peer.name, mode)
            row = {**shape.as_row(), "peer": peer.name, "mode": mode}
            if subject in samples:
                measured = samples[subject]
                rate = FLOPS_OF_FORWARD[mode] * shape.tflops(measured.median_ms)
                row.update(tflops=rate, **measured.as_row())
                if runners[subject].note:
                    row["note"] = runners[subject].note
            else:
                row["error"] = failed[subject]
            rows.append(row)
    return rows


def rates(rows: list[dict], mode: str) -> dict[Shape, dict[int, dict[str, float]]]:
    """{shape: {process: {peer: TFLOP/s}}} of a mode's rows that hold a measurement."""
    found: dict[Shape, dict[int, dict[str, float]]] = {}
    for row in rows:
        if row["mode"] == mode and row.get("tflops"):
            by_process = found.setdefault(Shape.of_row(row), {})
            by_process.setdefault(row.get("process", 0), {})[row["peer"]] = row["tflops"]
    return found


def ratios(rows: list[dict], mode: str) -> Ratios:
    """{shape: {peer: our rate over its}}, each of one process; geometric mean where a peer ran in several.

    Our own variants are no peers.
    """
    found: Ratios = {}
    for shape, by_process in rates(rows, mode).items():
        of_peer: dict[str, list[float]] = {}
        for by_peer in by_process.values():
            for name, value in by_peer.items():
                if name.partition(":")[0] != OURS and OURS in by_peer:
                    of_peer.setdefault(name, []).append(by_peer[OURS] / value)
        if of_peer:
            found[shape] = {name: results.geomean(values) for name, values in of_peer.items()}
    return found


def summary(rows: list[dict]) -> dict[str, object]:
    """For every mode: geometric mean and minimum of our ratio to the best peer, and to each by itself."""
    found: dict[str, object] = {}
    for mode in MODES:
        by_shape = ratios(rows, mode)
        if not by_shape:
            continue
        best = {shape: min(by_peer.values()) for shape, by_peer in by_shape.items()}
        worst = min(best, key=best.__getitem__)
        found |= {
            f"{mode}_shapes": len(best),
            f"{mode}_ours_over_best_geomean": results.geomean(best.values()),
            f"{mode}_ours_over_best_min": best[worst],
            f"{mode}_ours_over_best_min_shape": str(worst),
        }
        for d in sorted({shape.head_dim for shape in best}):
            chosen = [ratio for shape, ratio in best.items() if shape.head_dim == d]
            found[f"{mode}_ours_over_best_geomean_d{d}"] = results.geomean(chosen)
        for name in BUILDERS:
            if chosen := [by_peer[name] for by_peer in by_shape.values() if name in by_peer]:
                found[f"{mode}_ours_over_{name}_geomean"] = results.geomean(chosen)
                found[f"{mode}_ours_over_{name}_min"] = min(chosen)
    return found


def shown_rates(rows: list[dict], mode: str) -> dict[Shape, dict[str, float]]:
    """{shape: {peer: TFLOP/s}}: where a peer ran in several processes, of the first."""
    return {
        shape: {
            name: rate
            for index in sorted(by_process, reverse=True)
            for name, rate in by_process[index].items()
        }
        for shape, by_process in rates(rows, mode).items()
    }


def plot(result: dict, path: Path) -> None:
    """TFLOP/s over sequence length: a row of panels a head dim, a column a mask; hatched: deterministic."""
    grid = [row for row in result["rows"] if on_grid(row)]
    modes = {mode: found for mode in MODES[:2] if (found := shown_rates(grid, mode))}
    if not modes:
        return
    shapes = {shape for by_shape in modes.values() for shape in by_shape}
    dims = sorted({shape.head_dim for shape in shapes})
    masks = sorted({shape.causal for shape in shapes})
    figure, axes = results.new_figure(len(dims), len(masks), 7.5 * len(masks), 3.1 * len(dims) + 0.8)
    series = [
        (mode, name) for mode in modes for name in BUILDERS if any(name in v for v in modes[mode].values())
    ]
    width = 0.84 / len(series)
    panels = [(d, causal) for d in dims for causal in masks]
    for axis, (d, causal) in zip(axes.flat, panels, strict=True):
        lengths = sorted({s.seqlen for s in shapes if (s.head_dim, s.causal) == (d, causal)})
        for i, (mode, name) in enumerate(series):
            bars = {
                lengths.index(shape.seqlen): by_peer[name]
                for shape, by_peer in modes[mode].items()
                if (shape.head_dim, shape.causal) == (d, causal) and name in by_peer
            }
            at = [x + (i - (len(series) - 1) / 2) * width for x in bars]
            style = {"hatch": "////", "edgecolor": "white", "linewidth": 0} if mode == MODES[1] else {}
            label = name if mode == MODES[0] else f"{name}, {mode}"
            axis.bar(at, bars.values(), width * 0.94, color=results.COLORS[name], label=label, **style)
        axis.set_title(f"head dim {d}, {'causal' if causal else 'full'} mask", fontsize=10)
        axis.set_xticks(range(len(lengths)), [f"{s // 1024}k" if s >= 1024 else str(s) for s in lengths])
    for axis in axes[:, 0]:
        axis.set_ylabel("TFLOP/s")
    for axis in axes[-1]:
        axis.set_xlabel("sequence length (16k tokens, hidden 2048)")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    dtype = next(iter(shapes)).dtype
    title = f"Backward attention, {dtype}\n{results.subtitle(result)}"
    figure.suptitle(title, fontsize=11, x=0.01, ha="left")
    results.save_figure(figure, path)


def readme_section(result: dict) -> str:
    """README.md's sentence, table and figure of a result."""
    grid = [row for row in result["rows"] if on_grid(row)]
    ours = {mode: shown_rates(grid, mode) for mode in MODES}
    over = {mode: ratios(grid, mode) for mode in MODES}
    facts = result["summary"]["standard grid"]
    parts = []
    for mode in MODES:
        if f"{mode}_shapes" in facts:
            mean, low = (facts[f"{mode}_ours_over_best_{what}"] for what in ("geomean", "min"))
            parts.append(f"{mode} {mean:.2f} (lowest {low:.2f}, {facts[f'{mode}_shapes']} shapes)")
    lines = [
        f"{result['device'].get('gpu')}, commit {result['made']['commit'][:10]}. Ours over the fastest peer",
        f"of the same process, geometric mean: {'; '.join(parts)}. TFLOP/s of the backward, in brackets that",
        "ratio and the peer, then the same deterministic:",
        "",
    ]
    lengths = sorted({shape.seqlen for shape in ours[MODES[0]]})
    header = ["head dim, mask", *(f"{s // 1024}k" if s >= 1024 else str(s) for s in lengths)]
    lines += [f"| {' | '.join(header)} |", "|" + "---|" * len(header)]

    def cell(shape: Shape, mode: str) -> str:
        rate = ours[mode].get(shape, {}).get(OURS)
        if rate is None:
            return "-"
        by_peer = over[mode].get(shape)
        if not by_peer:
            return f"{rate:.0f}"
        best = min(by_peer, key=by_peer.__getitem__)
        return f"{rate:.0f} ({by_peer[best]:.2f} {best})"

    panels = sorted({(shape.head_dim, shape.causal) for shape in ours[MODES[0]]})
    for d, causal in panels:
        of_row = {s.seqlen: s for s in ours[MODES[0]] if (s.head_dim, s.causal) == (d, causal)}
        cells = [
            ", ".join(cell(of_row[s], mode) for mode in MODES[:2]) if s in of_row else "-" for s in lengths
        ]
        lines.append(f"| {d} {'causal' if causal else 'full'} | {' | '.join(cells)} |")
    lines += ["", "![Backward speed beside the peers](experiments/results/backward_speed.png)"]
    return "\n".join(lines)


def print_rows(title: str, rows: list[dict]) -> None:
    """TFLOP/s of each peer and mode of one shape, then what failed."""
    for mode in dict.fromkeys(row["mode"] for row in rows):
        measured = [row for row in rows if row["mode"] == mode and "tflops" in row]
        cells = "  ".join(f"{row['peer']} {row['tflops']:6.1f}" for row in measured)
        best = min(
            (ratio for by_peer in ratios(rows, mode).values() for ratio in by_peer.values()), default=0
        )
        print(f"{title:<44} {mode:<13} {cells}" + (f"  | ours/best {best:.3f}" if best else ""), flush=True)
    for row in rows:
        if problem := row.get("error") or row.get("note"):
            print(f"        {row['peer']} {row['mode']}: {problem}", flush=True)


def chosen_shapes(options: argparse.Namespace) -> list[Shape]:
    """The standard grid, then grouped queries at 8k if d128 is among the head dims."""
    masks = (True,) if options.causal else (False,) if options.full else (False, True)
    dims = tuple(options.head_dims)
    shapes = standard_grid(dims, tuple(options.seqlens), masks, dtype=options.dtype)
    if not options.grid_only:
        grouped = [s for s in extra_shapes(dims, options.dtype) if s.heads != s.heads_kv]
        shapes += [s for s in grouped if s.causal in masks]
    return shapes


def run_group(options: argparse.Namespace, names: list[str]) -> dict:
    """Measure hopper_fa beside these peers, in this process; the result has no summary yet."""
    others = [name for name in names if name != OURS]
    peers, missing = find_backward_peers([OURS, *others], options.variants)
    for name, why in missing.items():
        print(f"without {name}: {why}")
    shapes = chosen_shapes(options)
    monitor = GpuMonitor()
    if monitor.problem:
        print(f"clocks and power are not recorded: {monitor.problem}")
    seed = command_line.seed_of(options)
    settings = {name: getattr(options, name) for name in ("rounds", "batch_ms", "method", "modes")}
    result = new_result("backward_speed", monitor, settings | {"seed": seed}, peers, missing)
    options.spent = 0.0
    for index, shape in enumerate(shapes):
        budget = options.budget_seconds
        options.share = None if budget is None else (budget - options.spent) / (len(shapes) - index)
        rows = measure_shape(shape, peers, options, monitor, seed + index)
        result["rows"] += rows
        print_rows(f"[{index + 1:>2}/{len(shapes)}] {shape}", rows)
        results.save(result, options.out / options.name)
        gc.collect()
        torch.cuda.empty_cache()
    result["matmul_ceiling"]["after"] = matmul_ceiling(monitor)
    return result


def merge(parts: list[dict]) -> dict:
    """One result of the groups' results; each row says which process it is of."""
    result = {**parts[0], "made": results.provenance(), "rows": []}
    result["peers"] = {name: version for part in parts for name, version in part["peers"].items()}
    missing = {name: why for part in parts for name, why in part["missing"].items()}
    result["missing"] = {name: why for name, why in missing.items() if name not in result["peers"]}
    result["matmul_ceiling"] = {
        "before": parts[0]["matmul_ceiling"]["before"],
        "after": parts[-1]["matmul_ceiling"]["after"],
    }
    for index, part in enumerate(parts):
        result["rows"] += [{**row, "process": index} for row in part["rows"]]
    return result


def run_groups(options: argparse.Namespace, arguments: list[str]) -> dict:
    """Every group in a process of its own, one after the other, on the same inputs."""
    seed = command_line.seed_of(options)
    parts = []
    for index, group in enumerate(options.peers):
        name = f"{options.name}.part{index}"
        # The last of two equal options holds.
        command = [sys.executable, __file__, *arguments, "--peers", group, "--name", name]
        command += ["--seed", str(seed)]
        if options.budget_seconds is not None:
            command += ["--budget-seconds", str(options.budget_seconds / len(options.peers))]
        print(f"== hopper_fa beside {group}", flush=True)
        status = subprocess.run(command).returncode
        stem = options.out / name
        if status == 0:
            parts.append(results.load(stem.with_name(f"{name}.json")))
        else:
            print(f"the process of {group} ended with status {status}; its peers are left out")
        for suffix in ("json", "csv", "png"):
            stem.with_name(f"{name}.{suffix}").unlink(missing_ok=True)
    if not parts:
        raise SystemExit("no group of peers could be measured")
    return merge(parts)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--seqlens", type=int, nargs="+", default=list(SEQLENS))
    parser.add_argument(
        "--fa4-seqlens", type=int, nargs="+", help="where FlashAttention-4 runs: it compiles every shape"
    )
    masks = parser.add_mutually_exclusive_group()
    masks.add_argument("--causal", action="store_true", help="only the causal mask")
    masks.add_argument("--full", action="store_true", help="only the full mask")
    parser.add_argument("--grid-only", action="store_true", help="without the grouped queries")
    parser.add_argument("--peers", nargs="+", default=list(GROUPS), metavar="A,B", help="one group a process")
    parser.add_argument("--variants", nargs="+", default=[], help="tile-table variants of ours, besides")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    command_line.add_timing(parser, rounds=7, batch_ms=15.0)
    parser.add_argument("--method", choices=("graph", "events"), default="graph")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        help="of all groups: cut rounds (never below 3) to end in time; compiling and checks not counted",
    )
    parser.add_argument("--name", default="backward_speed", help="file name of the results, without suffix")
    command_line.add_redraw(parser)
    parser.add_argument(
        "--readme", type=Path, metavar="JSON", help="write README.md's table from a result and leave"
    )
    options = parser.parse_args(arguments)
    options.fa4_seqlens = options.fa4_seqlens or options.seqlens + [8192]
    for name in ",".join(options.peers).split(","):
        if name not in BUILDERS:
            parser.error(f"--peers has {name!r}; choose from {', '.join(BUILDERS)}")
    return options


def main() -> None:
    options = parse()
    if options.readme:
        results.write_section(README, "backward_speed", readme_section(results.load(options.readme)))
        return
    if command_line.redrawn(options, plot):
        return
    command_line.require_gpu()
    if len(options.peers) > 1:
        result = run_groups(options, sys.argv[1:])
    else:
        result = run_group(options, options.peers[0].split(","))
    parts = {"standard grid": [row for row in result["rows"] if on_grid(row)]}
    parts["grouped queries"] = [row for row in result["rows"] if not on_grid(row)]
    result["summary"] = {title: found for title, rows in parts.items() if (found := summary(rows))}
    results.save(result, options.out / options.name)
    plot(result, options.out / f"{options.name}.png")
    for title, values in result["summary"].items():
        print(f"{title}:")
        for name, value in values.items():
            print(f"  {name:<42} {value:.3f}" if isinstance(value, float) else f"  {name:<42} {value}")
    print(f"  {results.ceiling_line(result)}")


if __name__ == "__main__":
    main()
