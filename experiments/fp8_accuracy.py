"""What FP8 attention loses, recipe by recipe: nine experiments, beside published values and targets.

    python experiments/fp8_accuracy.py --quick    # all, small: about 2 minutes on 2 cores
    python experiments/fp8_accuracy.py --experiments e1 e4 --heads 16 --queries 8192
    python experiments/fp8_accuracy.py --report experiments/results/fp8_accuracy

Runs on the FP8 kernel where there is a Hopper GPU and the build holds it, else on the emulator (which on a
GPU is fast too). Writes a JSON file an experiment into the folder --out. --report draws report.md and the
plots from such a folder, and needs nothing else. What each experiment is, and after whom: fp8_studies.py and
fp8_stability.py.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import command_line
import fp8_report
import fp8_stability
import fp8_studies
import results
import torch
from fp8_studies import Row, Sizes

from hopper_fa.accuracy_fp8 import implementation, one_thread
from hopper_fa.info import machine_info

EXPERIMENTS: dict[str, Callable[[Sizes], Iterator[Row]]] = {
    "e1": fp8_studies.e1,
    "kb": fp8_studies.kb,
    "e2": fp8_studies.e2,
    "e3": fp8_studies.e3,
    "e4": fp8_studies.e4,
    "e5": fp8_studies.e5,
    "e8": fp8_stability.e8,
    "e9": fp8_stability.e9,
    "e11": fp8_stability.e11,
}
QUICK = Sizes(heads=1, queries=128, short=2048, long=(4096, 16384))
ON_CPU = Sizes()
ON_GPU = Sizes(heads=16, queries=8192, long=(4096, 16384, 32768, 131072, 524288, 1048576))


def sizes_of(options: argparse.Namespace) -> Sizes:
    """What the machine allows, then what --quick and the single options say."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    sizes = QUICK if options.quick else ON_GPU if device == "cuda" else ON_CPU
    given = {name: getattr(options, name) for name in ("heads", "keys", "queries", "short")}
    if options.long:
        given["long"] = tuple(options.long)
    given = {name: value for name, value in given.items() if value is not None}
    return replace(sizes, device=device, seed=options.seed, **given)


def facts(device: str) -> dict[str, object]:
    """The machine, as the figures' subtitle and the report name it."""
    machine = machine_info()
    if device == "cuda":
        name = machine["gpus"][0]["name"] if machine["gpus"] else torch.cuda.get_device_name()
        return {"gpu": name, "driver": machine["driver"], "torch": machine["torch"]}
    return {"gpu": f"CPU ({platform.machine()}, {os.cpu_count()} cores)", "torch": machine["torch"]}


def run(name: str, sizes: Sizes, out: Path, seconds: float) -> dict:
    """One experiment into out/name.json. No row begins after `seconds`; "complete" says if any is missing."""
    result = {
        "experiment": f"fp8_accuracy {name}",
        "made": results.provenance(),
        "device": facts(sizes.device),
        "runs_on": implementation(sizes.device),
        "sizes": asdict(sizes),
        "complete": False,
        "rows": [],
    }
    rows = EXPERIMENTS[name](sizes)
    start = saved = time.monotonic()
    while not result["complete"] and time.monotonic() - start < seconds:
        row = next(rows, None)
        if row is None:
            result["complete"] = True
        else:
            result["rows"].append(row)
            now = time.monotonic()
            error = f"relative L2 {row['relative_l2']:.2e}"
            print(
                f"{name} {len(result['rows']):>4} {now - start:>5.0f} s  {describe(row)}: {error}", flush=True
            )
            if now - saved > 10:
                results.save(result, out / name, with_csv=False)
                saved = now
    result["seconds"] = round(time.monotonic() - start, 1)
    results.save(result, out / name, with_csv=False)
    return result


def describe(row: Row) -> str:
    """What a row varies, as text."""
    names = (
        "inputs", "keys", "v_mean", "ties", "excess", "seen", "precision", "grid", "qk", "variant", "block",
        "place",
    )  # fmt: skip
    return ", ".join(f"{name} {row[name]}" for name in names if row.get(name) not in (None, ""))


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.new_parser(__doc__)
    parser.set_defaults(out=results.RESULTS / "fp8_accuracy")
    parser.add_argument("--experiments", nargs="+", choices=EXPERIMENTS, default=list(EXPERIMENTS))
    parser.add_argument("--quick", action="store_true", help="everything small")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where torch sees a GPU")
    parser.add_argument("--heads", type=int, help="seeds, each a head of its own")
    parser.add_argument("--keys", type=int, help="of e1, and the longest of e8")
    parser.add_argument("--queries", type=int, help="rows that are computed in e1, kb, e2 and e3")
    parser.add_argument("--short", type=int, help="keys of kb, e2, e3 and e5")
    parser.add_argument("--long", type=int, nargs="+", help="lengths of e4")
    parser.add_argument("--seed", type=int, default=0, help="of the first head")
    parser.add_argument(
        "--budget-seconds", type=float, default=float("inf"), help="begin nothing new after it"
    )
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="draw the report of earlier results")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    if options.report:
        print(f"written: {fp8_report.write(options.report)}")
        return
    sizes = sizes_of(options)
    print(f"{sizes} on {facts(sizes.device)['gpu']}, run by the {implementation(sizes.device)}", flush=True)
    start = time.monotonic()
    for index, name in enumerate(options.experiments):
        # What an experiment leaves of its share goes to those after it.
        left = options.budget_seconds - (time.monotonic() - start)
        with one_thread():
            result = run(name, sizes, options.out, left / (len(options.experiments) - index))
        end = "done" if result["complete"] else "cut short by --budget-seconds"
        print(f"{name} {end} after {result['seconds']} s, {len(result['rows'])} rows", flush=True)
    print(f"written: {fp8_report.write(options.out)}")


if __name__ == "__main__":
    main()
