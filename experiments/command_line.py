"""What the experiments' command lines share."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import results
import torch


def new_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with --out; `description` keeps its line breaks."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the results")
    return parser


def add_timing(parser: argparse.ArgumentParser, rounds: int, batch_ms: float) -> None:
    """--dtype, --rounds, --batch-ms and --seed, with these defaults."""
    parser.add_argument("--dtype", choices=("bf16", "fp16"), default="bf16")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument(
        "--batch-ms", type=float, default=batch_ms, help="length of one measurement in milliseconds"
    )
    parser.add_argument("--seed", type=int, help="of the inputs; default: new ones every run")


def add_redraw(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--redraw", type=Path, metavar="JSON", help="draw the plot of an earlier result and leave"
    )


def redrawn(options: argparse.Namespace, plot: Callable[[dict, Path], None]) -> bool:
    """Does what --redraw asks for; False if it was not given."""
    if not options.redraw:
        return False
    plot(results.load(options.redraw), options.redraw.with_suffix(".png"))
    return True


def require_gpu() -> None:
    """Ends the script, with the reason, where torch sees no GPU."""
    if not torch.cuda.is_available():
        script = Path(sys.argv[0]).name
        raise SystemExit(f"{script} measures a GPU and torch sees none; run it on a Hopper machine.")


def seed_of(options: argparse.Namespace) -> int:
    """--seed, or one from the clock."""
    return options.seed if options.seed is not None else int(time.time())
