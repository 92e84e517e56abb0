"""Which tile is fastest: every built row of the tile table for a head dim, checked, then timed interleaved.

    python experiments/forward_tiles.py --head-dims 64 128 --seqlens 1024 4096 16384

Variants other than "default" need a build with -DHOPPER_FA_EXPERIMENTS=ON. A variant that disagrees with
float64 is reported and not timed. Writes one JSON and CSV.

A kernel that hangs cannot be stopped from within, so other processes run the kernels: one a variant checks
it, some at a time, and one a head dim times those that passed. When this one falls silent it is ended, the
variant that it ran last is dropped, and another goes on with the shapes that are left.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import command_line
import results
import tiles
from shapes import HEAD_DIMS, Shape, standard_grid
from timing import GpuMonitor, Runner, device_facts, interleave, matmul_ceiling

ROW, RUNNING, DONE = "row ", "running ", "done"  # what a line of a timing process begins with


def run_watched(arguments: list[str], log: Path, total: float, silence: float) -> tuple[int | None, str]:
    """This script with other arguments, in a process group of its own that is killed when its time is up.

    Args:
        log: file for its output.
        total, silence: seconds that it may take, and that may pass without output.
    Returns:
        exit status, None if it was killed; its output.
    """
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-u", __file__, *arguments],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        start = heard = time.monotonic()
        size = 0
        while process.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            if (grown := log.stat().st_size) > size:
                size, heard = grown, now
            if now - start > total or now - heard > silence:
                os.killpg(process.pid, signal.SIGKILL)
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    print(f"process {process.pid} does not die: the driver holds it", flush=True)
                return None, log.read_text(errors="replace")
    return process.returncode, log.read_text(errors="replace")


def check_in_processes(
    wanted: list[tuple[int, str]], options: argparse.Namespace, seed: int, folder: Path
) -> dict[tuple[int, str], str]:
    """{(head dim, variant): what is wrong with it, or an empty string}."""

    def check(case: tuple[int, str]) -> str:
        head_dim, variant = case
        arguments = ["--check", variant, "--head-dims", str(head_dim), "--dtype", options.dtype]
        log = folder / f"check_{head_dim}_{variant}.log"
        limit = options.check_seconds
        status, output = run_watched([*arguments, "--seed", str(seed)], log, limit, limit)
        last = (output.strip().splitlines() or [""])[-1]
        if status is None:
            return f"it hangs, or needs more than {limit:.0f} s"
        return "" if status == 0 else last or f"its process ended with {status}"

    with ThreadPoolExecutor(options.jobs) as pool:
        verdicts = dict(zip(wanted, pool.map(check, wanted), strict=True))
    for (head_dim, variant), why in verdicts.items():
        print(f"d{head_dim} {variant}: {why or 'right'}", flush=True)
    return verdicts


class AnnouncedRunner(Runner):
    """A runner that says what it is about to run."""

    def __init__(self, variant: str, *arguments: object) -> None:
        self.variant = variant
        self.announce()
        super().__init__(*arguments)

    def announce(self) -> None:
        print(RUNNING + self.variant, flush=True)

    def measure(self, *arguments: object) -> None:
        self.announce()
        super().measure(*arguments)


def time_shape(
    shape: Shape, variants: list[str], options: argparse.Namespace, monitor: GpuMonitor, seed: int
) -> list[dict]:
    """A row a variant on one shape."""
    q, k, v = shape.inputs(seed)
    runners = {
        variant: AnnouncedRunner(
            variant, tiles.variant_call(variant, q, k, v, shape.causal), options.batch_ms
        )
        for variant in variants
    }
    samples = interleave(runners, options.rounds, monitor)
    return [
        {"variant": variant, **shape.as_row(), "tflops": shape.tflops(s.median_ms), **s.as_row()}
        for variant, s in samples.items()
    ]


def time_here(options: argparse.Namespace, seed: int) -> None:
    """The timing process: times --variants on the shapes from --skip on and prints a line a row."""
    monitor = GpuMonitor()
    shapes = standard_grid(tuple(options.head_dims), tuple(options.seqlens), dtype=options.dtype)
    for index, shape in list(enumerate(shapes))[options.skip :]:
        rows = time_shape(shape, options.variants, options, monitor, seed + index)
        print("".join(f"{ROW}{json.dumps(row)}\n" for row in rows), end="", flush=True)
    print(DONE, flush=True)


def time_in_processes(
    head_dim: int, right: list[str], options: argparse.Namespace, seed: int, folder: Path
) -> tuple[list[dict], dict[str, str]]:
    """Rows of every shape, and {variant: why it was dropped}."""
    shapes = standard_grid((head_dim,), tuple(options.seqlens), dtype=options.dtype)
    rows: list[dict] = []
    dropped: dict[str, str] = {}
    done = 0
    while right and done < len(shapes):
        arguments = ["--time-here", "--head-dims", str(head_dim), "--dtype", options.dtype]
        arguments += ["--skip", str(done), "--seed", str(seed), "--variants", *right]
        arguments += ["--rounds", str(options.rounds), "--batch-ms", str(options.batch_ms)]
        arguments += ["--seqlens", *map(str, options.seqlens)]
        log = folder / f"time_{head_dim}_{done}_{len(dropped)}.log"
        status, output = run_watched(arguments, log, options.time_seconds, options.silence_seconds)
        lines = output.splitlines()
        rows += [json.loads(line[len(ROW) :]) for line in lines if line.startswith(ROW)]
        done = len({Shape.of_row(row) for row in rows})
        if DONE in lines:
            break
        print("\n".join(line for line in lines[-12:] if not line.startswith(ROW)), flush=True)
        culprit = next((line[len(RUNNING) :] for line in lines[::-1] if line.startswith(RUNNING)), None)
        if culprit is None:
            dropped["(all)"] = "the timing process ended before it ran anything"
            break
        shape = shapes[min(done, len(shapes) - 1)]
        how = "hung" if status is None else f"ended its process with {status}"
        dropped[culprit] = f"it {how} while it was timed on {shape}"
        right = [variant for variant in right if variant != culprit]
    return rows, dropped


def print_matrix(head_dim: int, shapes: list[Shape], built: dict[str, dict], rows: list[dict]) -> None:
    """Variants down, shapes across, TFLOP/s, * at the best of a shape; last the geomean over default's."""
    rate = {(row["variant"], Shape.of_row(row)): row["tflops"] for row in rows}
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    shapes = [s for s in shapes if any((v, s) in rate for v in variants)]
    best = {s: max(rate.get((v, s), 0.0) for v in variants) for s in shapes}
    lines = []
    for variant in variants:
        mine = {s: rate[variant, s] for s in shapes if (variant, s) in rate}
        marks = [f"{mine[s]:.1f}{'*' if mine[s] == best[s] else ' '}" if s in mine else None for s in shapes]
        beside = [mine[s] / rate["default", s] for s in mine if ("default", s) in rate]
        ratio = f"{results.geomean(beside):.3f}" if beside else None
        lines.append([variant, tiles.describe(built[variant]), *marks, ratio])
    header = ["variant", "tile", *(f"{s.seqlen}{'c' if s.causal else 'f'}" for s in shapes), "/default"]
    print(f"head dim {head_dim}, TFLOP/s (f: full mask, c: causal)")
    print(results.table(header, lines), flush=True)


def parse() -> argparse.Namespace:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--seqlens", type=int, nargs="+", default=[512, 1024, 4096, 16384])
    parser.add_argument("--variants", nargs="+", help="default: every one built")
    command_line.add_timing(parser, rounds=5, batch_ms=12.0)
    parser.add_argument("--jobs", type=int, default=6, help="checks at a time")
    parser.add_argument("--check-seconds", type=float, default=90, help="for the check of one variant")
    parser.add_argument("--time-seconds", type=float, default=180, help="for the timing of one head dim")
    parser.add_argument("--silence-seconds", type=float, default=30, help="that count as a hang in timing")
    parser.add_argument("--check", metavar="VARIANT", help=argparse.SUPPRESS)
    parser.add_argument("--time-here", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    command_line.require_gpu()
    seed = command_line.seed_of(options)
    if options.check:
        why = tiles.check_variant(options.check, options.head_dims[0], options.dtype, seed)
        raise SystemExit(why or 0)
    if options.time_here:
        return time_here(options, seed)

    built = {head_dim: tiles.built_tiles(head_dim, options.dtype) for head_dim in options.head_dims}
    wanted = [(d, v) for d in built for v in built[d] if not options.variants or v in options.variants]
    for head_dim in built:
        names = [v for d, v in wanted if d == head_dim]
        if len(names) < 2:
            print(f"head dim {head_dim}: {', '.join(names) or 'nothing'} to time; {tiles.BUILD_HINT}")
    with tempfile.TemporaryDirectory() as folder:
        verdicts = check_in_processes(wanted, options, seed, Path(folder))
        monitor = GpuMonitor()
        result = {
            "experiment": "forward_tiles",
            "made": results.provenance(),
            "device": device_facts(monitor),
            "settings": {"rounds": options.rounds, "batch_ms": options.batch_ms, "seed": seed},
            "matmul_ceiling": {"before": matmul_ceiling(monitor)},
            "wrong": {f"{variant} d{head_dim}": why for (head_dim, variant), why in verdicts.items() if why},
            "tiles": [row for row in tiles.kernels.FORWARD_TILES if row["dtypes"]],
            "rows": [],
        }
        for head_dim in options.head_dims:
            right = [v for d, v in wanted if d == head_dim and not verdicts[d, v]]
            rows, dropped = time_in_processes(head_dim, right, options, seed, Path(folder))
            for variant, why in dropped.items():
                print(f"d{head_dim} {variant} was dropped: {why}", flush=True)
                result["wrong"][f"{variant} d{head_dim}"] = why
            if rows:
                shapes = standard_grid((head_dim,), tuple(options.seqlens), dtype=options.dtype)
                print_matrix(head_dim, shapes, built[head_dim], rows)
            result["rows"] += rows
            results.save(result, options.out / "forward_tiles")
    result["matmul_ceiling"]["after"] = matmul_ceiling(monitor)
    results.save(result, options.out / "forward_tiles")
    print(results.ceiling_line(result))
    for name, why in result["wrong"].items():
        print(f"{name}: {why}")
    if result["wrong"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
