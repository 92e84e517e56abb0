"""Command line: `hopper-fa info | demo | accuracy | accuracy16`."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hopper_fa import accuracy, accuracy_fp8
from hopper_fa.info import build_info, machine_info

SPEED_SCRIPT = Path("experiments", "forward_speed.py")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `hopper-fa`. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="hopper-fa", description="Attention for NVIDIA Hopper GPUs.")
    commands = parser.add_subparsers(dest="command", required=True)

    info = commands.add_parser("info", help="what this build holds and what machine it runs on")
    info.add_argument("--json", action="store_true", help="print JSON instead of text")
    info.set_defaults(run=_info)

    demo = commands.add_parser(
        "demo",
        help="with a Hopper GPU the forward speed comparison, else the FP8 accuracy study",
        description="With a Hopper GPU: run experiments/forward_speed.py, our forward beside its peers. "
        "Without: the FP8 accuracy study, on the emulator.",
    )
    _add_output(demo)
    _add_study(demo)
    demo.set_defaults(run=_demo)

    study = commands.add_parser("accuracy", help="error of FP8 attention, recipe by recipe, on any machine")
    _add_output(study)
    _add_study(study)
    study.set_defaults(run=_accuracy)

    study16 = commands.add_parser(
        "accuracy16", help="error of BF16 and FP16 attention against float64, on any machine"
    )
    _add_output(study16)
    _add_study16(study16)
    study16.set_defaults(run=_accuracy16)

    options = parser.parse_args(arguments)
    return options.run(options)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("hopper_fa_demo"), help="folder of the results")


def _add_study(parser: argparse.ArgumentParser) -> None:
    study = parser.add_argument_group("FP8 accuracy study")
    study.add_argument("--inputs", nargs="+", choices=accuracy_fp8.SETUPS, default=list(accuracy_fp8.SETUPS))
    study.add_argument("--heads", type=int, default=4, help="the more, the less chance in the outliers")
    study.add_argument("--keys", type=int, help="default: what published values and targets hold for")
    study.add_argument("--queries", type=int, help="rows that are computed; default: some of a whole head's")
    study.add_argument("--seed", type=int, help="of the inputs; default: another one every run")


def _add_study16(parser: argparse.ArgumentParser) -> None:
    study = parser.add_argument_group("accuracy study")
    study.add_argument("--seqlens", type=int, nargs="+", default=[128, 512, 2048])
    study.add_argument(
        "--distributions", nargs="+", choices=accuracy.DISTRIBUTIONS, default=accuracy.DISTRIBUTIONS
    )
    study.add_argument("--heads", type=int, default=1)
    study.add_argument("--head-dim", type=int, default=128)
    study.add_argument("--causal", action="store_true")
    study.add_argument("--seed", type=int, help="of the inputs; default: another one every run")


def _has_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def _info(options: argparse.Namespace) -> int:
    build, machine = build_info(), machine_info()
    if options.json:
        print(json.dumps({"build": build, "machine": machine}, indent=1))
        return 0
    print(f"hopper_fa {build['version']}, CUDA {build['cuda_version']}, CUTLASS {build['cutlass_version']}")
    print(f"python {machine['python']}, torch {machine['torch']} (CUDA {machine['torch_cuda'] or 'none'})")
    print(f"driver {machine['driver'] or 'none'} (NVML: {machine['nvml']})")
    for gpu in machine["gpus"]:
        runs = "runs the kernels" if gpu["runs_kernels"] else "no Hopper GPU: emulator and reference only"
        print(
            f"GPU {gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['memory_gib']} GiB: "
            f"{runs}"
        )
    if not machine["gpus"]:
        print('no GPU: attention runs with backend="emulator" or backend="reference"')
    width = max((len(row["variant"]) for row in build["instances"]), default=0)
    print(
        f"\nfamily    dtype  head_dim <=  {'variant':<{width}}       tile  stages  threads  registers  "
        "shared memory"
    )
    for row in build["instances"]:
        tile = f"{row['block_m']} x {row['block_n']}"
        registers = f"{row['producer_registers']}/{row['consumer_registers']}"
        # Of K and V, or of Q and dO.
        stages = row["kv_stages"] if "kv_stages" in row else f"{row['q_stages']}+{row['do_stages']}"
        print(
            f"{row['family']:<8}  {row['dtype']:<5}  {row['head_dim']:>11}  {row['variant']:<{width}}  "
            f"{tile:>9}  {stages:>6}  {row['threads']:>7}  {registers:>9}  {row['shared_memory']:>7} bytes"
        )
    return 0


def _demo(options: argparse.Namespace) -> int:
    if not _has_hopper():
        print(
            "No Hopper GPU here: the kernels' arithmetic runs in the emulator; this study, of about two "
            "minutes, shows what FP8 attention loses by it.\n"
        )
        return _accuracy(options)
    # The checkout around the current folder, or around an editable install; the wheel holds no experiments.
    places = [Path.cwd() / SPEED_SCRIPT, Path(__file__).resolve().parent.parent / SPEED_SCRIPT]
    script = next((path for path in places if path.is_file()), None)
    if script is None:
        print(
            f"{SPEED_SCRIPT} is not here; it is part of the source checkout and not of the installed "
            "package; run `hopper-fa demo` in the checkout's top folder, or `hopper-fa accuracy` for the "
            "accuracy study.",
            file=sys.stderr,
        )
        return 2
    return subprocess.run([sys.executable, str(script), "--out", str(options.output)], check=False).returncode


def _accuracy(options: argparse.Namespace) -> int:
    problem = {"heads": options.heads, "keys": options.keys, "queries": options.queries}
    device, seed = _device(), _seed(options)
    runs_on = accuracy_fp8.implementation(device)
    print(f"{accuracy_fp8.legend()}\n\nseed {seed}, FP8 run by the {runs_on} on {device}\n")
    rows = accuracy_fp8.fp8_accuracy(options.inputs, **problem, device=device, seed=seed)
    inputs = {"inputs": options.inputs, **problem, "seed": seed}
    total = len(options.inputs) * (1 + len(accuracy_fp8.RECIPES))
    title = f"FP8 attention against float64, head dim 128, by the {runs_on} on {device}"
    facts = {"problem": inputs, "device": device, "runs_on": runs_on}
    with accuracy_fp8.one_thread():
        return _study(options.output / "fp8_accuracy", rows, total, facts, accuracy_fp8, title)


def _accuracy16(options: argparse.Namespace) -> int:
    device = _device()
    problem = {
        "heads": options.heads,
        "head_dim": options.head_dim,
        "causal": options.causal,
        "seed": _seed(options),
    }
    names = accuracy.implementations(torch.device(device))
    print(f"Attention against float64 of the same inputs: {problem} on {device}\n")
    mask = "causal" if options.causal else "full mask"
    return _study(
        options.output / "forward_accuracy",
        accuracy.forward_accuracy(options.seqlens, options.distributions, device=device, **problem),
        len(options.distributions) * len(options.seqlens) * len(accuracy.DTYPES) * len(names),
        {"problem": problem, "device": device},
        accuracy,
        f"Attention forward, head dim {options.head_dim}, {mask}, on {device}",
    )


def _device() -> str:
    return "cuda" if _has_hopper() else "cpu"


def _seed(options: argparse.Namespace) -> int:
    return int(time.time()) if options.seed is None else options.seed


def _study(
    stem: Path,
    rows: Iterable[dict[str, Any]],
    total: int,
    facts: dict[str, Any],
    study: ModuleType,
    title: str,
) -> int:
    """Print the rows of a study as they come, and write them, with `facts`, as JSON and as a plot.

    Args:
        stem: path of both files without suffix. total: number of rows.
        study: the module with table_header, table_line and plot for these rows.
    """
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "matplotlib is not installed and the study draws a plot; install hopper_fa[experiments].",
            file=sys.stderr,
        )
        return 2
    start = time.perf_counter()
    seen: list[dict[str, Any]] = []
    print(study.table_header(), flush=True)
    for row in rows:
        seen.append(row)
        print(study.table_line(row), flush=True)
        if sys.stderr.isatty():
            progress = f"{len(seen)}/{total}, {time.perf_counter() - start:.0f} s"
            print(progress, end="\r", file=sys.stderr, flush=True)
    stem.parent.mkdir(parents=True, exist_ok=True)
    json_path, plot_path = (stem.with_name(stem.name + suffix) for suffix in (".json", ".png"))
    result = {**facts, "build": build_info(), "machine": machine_info(), "rows": seen}
    json_path.write_text(json.dumps(result, indent=1) + "\n")
    study.plot(seen, plot_path, title)
    print(f"\n{len(seen)} rows in {time.perf_counter() - start:.0f} s; written: {json_path}, {plot_path}")
    return 0
