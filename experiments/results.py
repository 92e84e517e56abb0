"""Results on disk: JSON with the commit, machine and command that made it, CSV beside it; shared plot style.

A result is {"experiment", "made", "device", "rows", ...}: flat rows, one per implementation and problem.
Plots read the JSON and nothing else, so that every committed figure can be drawn again from the committed
numbers.
"""

from __future__ import annotations

import csv
import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"

COLORS = {
    "hopper_fa": "#d1495b",
    "fa2": "#9aa5b1",
    "fa3": "#2e6f95",
    "fa4": "#66a182",
    "cudnn": "#edae49",
    "standard": "#5c4d7d",
}


def _git(*arguments: str) -> str | None:
    try:
        run = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


def commit() -> dict[str, object]:
    """{"commit", "dirty"}: from HOPPER_FA_COMMIT, which names what a copied tree is a copy of, or from git.

    `dirty` is True if files outside experiments/results differ from the commit, None if that is unknown.
    """
    if named := os.environ.get("HOPPER_FA_COMMIT"):
        return {"commit": named.removesuffix("-dirty"), "dirty": named.endswith("-dirty")}
    head = _git("rev-parse", "HEAD")
    if head is None:
        return {"commit": "unknown", "dirty": None}
    status = _git("status", "--porcelain", "--", ".", ":(exclude)experiments/results")
    return {"commit": head, "dirty": bool(status) if status is not None else None}


def command() -> str:
    """The command line of this process without --out: where a result went is no part of how it was made."""
    words = list(sys.argv[1:])
    kept = []
    while words:
        word = words.pop(0)
        if word == "--out":
            words = words[1:]
        elif not word.startswith("--out="):
            kept.append(word)
    return shlex.join(["python", f"experiments/{Path(sys.argv[0]).name}", *kept])


def provenance() -> dict[str, object]:
    """Who made a result: commit, command, UTC date, Python."""
    now = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {**commit(), "command": command(), "date": now, "python": sys.version.split()[0]}


def save(result: dict, stem: Path, with_csv: bool = True) -> None:
    """Write `stem`.json, and `stem`.csv with the rows.

    Args:
        result: JSON-able, with a list of flat dicts under "rows".
        stem: path without suffix; its folder is made.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    partial = stem.with_name(stem.name + ".json.partial")
    partial.write_text(json.dumps(_finite(result), indent=1) + "\n")
    partial.replace(stem.with_name(stem.name + ".json"))  # a killed run leaves the previous file whole
    if not with_csv:
        return
    columns = list(dict.fromkeys(key for row in result["rows"] for key in row))
    with open(stem.with_name(stem.name + ".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(result["rows"])


def _finite(value: object) -> object:
    """`value` with NaN and infinities as None, which JSON lacks; floats keep 6 significant digits."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def load(path: Path) -> dict:
    """Read a result that `save` wrote.

    Raises:
        ValueError: the file is no result.
    """
    result = json.loads(Path(path).read_text())
    if not isinstance(result, dict) or not isinstance(result.get("rows"), list):
        raise ValueError(f"{path} holds no rows; pass a JSON file that an experiment of this folder wrote")
    return result


def geomean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of nothing."""
    values = list(values)
    return math.exp(math.fsum(map(math.log, values)) / len(values)) if values else math.nan


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Text table: first column left-aligned, others right-aligned, floats with one digit, None as a dash."""

    def text(value: object) -> str:
        if value is None:
            return "-"
        return f"{value:.1f}" if isinstance(value, float) else str(value)

    lines = [[text(cell) for cell in line] for line in [header, *rows]]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    )


def ceiling_line(result: dict) -> str:
    """The matmul ceiling of a result, before and after its measurements, as text."""
    before, after = (result["matmul_ceiling"][when]["tflops"] for when in ("before", "after"))
    return f"bf16 8192 matmul: {before:.0f} TFLOP/s before, {after:.0f} after"


def write_section(path: Path, name: str, text: str) -> None:
    """Put `text` between the lines <!-- NAME --> and <!-- /NAME --> of a Markdown file.

    Raises:
        ValueError: the file does not hold both lines.
    """
    opening, closing = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = path.read_text().partition(opening)
    _, ended, after = rest.partition(closing)
    if not found or not ended:
        raise ValueError(f"{path} has no lines {opening.strip()} and {closing}; add them around the section")
    path.write_text(f"{before}{opening}{text}\n{closing}{after}")


def subtitle(result: dict) -> str:
    """One line under a figure's title: GPU, driver, torch, commit."""
    device, made = result.get("device", {}), result.get("made", {})
    version = made.get("commit", "unknown")[:10] + (" + changes" if made.get("dirty") else "")
    parts = [device.get("gpu"), device.get("driver") and f"driver {device['driver']}"]
    parts += [device.get("torch") and f"torch {device['torch']}", f"commit {version}"]
    return ", ".join(part for part in parts if part)


def new_figure(rows: int, columns: int, width: float, height: float):
    """(figure, 2D array of axes) in the style of all plots of this project."""
    figure, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", color="#e3e3e3", linewidth=0.7)
        axis.set_axisbelow(True)
    return figure, axes


def save_figure(figure, path: Path) -> None:
    """Write a PNG and close the figure."""
    figure.savefig(path, dpi=150)
    plt.close(figure)
