"""Command line: `hopper-fa info | demo | accuracy`."""

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hopper_fa import accuracy
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
        help="with a Hopper GPU the forward speed comparison, else the accuracy study",
        description="With a Hopper GPU: run experiments/forward_speed.py, our forward beside its peers. "
        "Without: the accuracy study, on the emulator.",
    )
    _add_output(demo)
    _add_study(demo)
    demo.set_defaults(run=_demo)

    study = commands.add_parser(
        "accuracy", help="error of BF16 and FP16 attention against float64, on any machine"
    )
    _add_output(study)
    _add_study(study)
    study.set_defaults(run=_accuracy)

    options = parser.parse_args(arguments)
    return options.run(options)


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, default=Path("hopper_fa_demo"), help="folder of the results")


def _add_study(parser: argparse.ArgumentParser) -> None:
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
    print(f"\ndtype  head_dim <=  {'variant':<{width}}       tile  stages  threads  registers  shared memory")
    for row in build["instances"]:
        tile = f"{row['block_m']} x {row['block_n']}"
        registers = f"{row['producer_registers']}/{row['consumer_registers']}"
        print(
            f"{row['dtype']:<5}  {row['head_dim']:>11}  {row['variant']:<{width}}  {tile:>9}  "
            f"{row['kv_stages']:>6}  {row['threads']:>7}  {registers:>9}  {row['shared_memory']:>7} bytes"
        )
    return 0


def _demo(options: argparse.Namespace) -> int:
    if not _has_hopper():
        print(
            "No Hopper GPU here: the kernels' arithmetic runs in the emulator; this study shows its "
            "accuracy.\n"
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
    if importlib.util.find_spec("matplotlib") is None:
        print(
            "matplotlib is not installed and the study draws a plot; install hopper_fa[experiments].",
            file=sys.stderr,
        )
        return 2
    device = "cuda" if _has_hopper() else "cpu"
    seed = int(time.time()) if options.seed is None else options.seed
    problem = {"heads": options.heads, "head_dim": options.head_dim, "causal": options.causal, "seed": seed}
    names = accuracy.implementations(torch.device(device))
    total = len(options.distributions) * len(options.seqlens) * len(accuracy.DTYPES) * len(names)
    print(f"Attention against float64 of the same inputs: {problem} on {device}\n\n{accuracy.table_header()}")

    start = time.perf_counter()
    rows: list[dict[str, Any]] = []
    for row in accuracy.forward_accuracy(options.seqlens, options.distributions, device=device, **problem):
        rows.append(row)
        print(accuracy.table_line(row), flush=True)
        if sys.stderr.isatty():
            print(
                f"{len(rows)}/{total}, {time.perf_counter() - start:.0f} s",
                end="\r",
                file=sys.stderr,
                flush=True,
            )

    options.output.mkdir(parents=True, exist_ok=True)
    json_path, plot_path = options.output / "forward_accuracy.json", options.output / "forward_accuracy.png"
    result = {
        "problem": problem,
        "device": device,
        "build": build_info(),
        "machine": machine_info(),
        "rows": rows,
    }
    json_path.write_text(json.dumps(result, indent=1) + "\n")
    mask = "causal" if options.causal else "full mask"
    accuracy.plot(rows, plot_path, f"Attention forward, head dim {options.head_dim}, {mask}, on {device}")
    print(f"\n{len(rows)} rows in {time.perf_counter() - start:.0f} s; written: {json_path}, {plot_path}")
    return 0
