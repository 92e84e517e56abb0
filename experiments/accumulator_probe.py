"""Which model of the FP8 tensor core's accumulator a GPU agrees with (experiment E0 of docs/fp8.md).

    python experiments/accumulator_probe.py --out results

Runs the WGMMA probe on inputs that tell the models apart and prints, for every combination of fraction bits,
products a step, and whether the accumulator joins the alignment, the share of sums that differ in any bit.
Writes accumulator_probe.json: the shares, and the relative error of long one-signed sums.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch

from hopper_fa import kernels
from hopper_fa.info import machine_info
from hopper_fa.tensor_core import PROBE_INPUTS, Accumulator, probe_operands

LENGTHS = (32, 128, 1024)
FRACTION_BITS = (11, 12, 13, 14, 15, 23)
GROUPS = (8, 16, 32)


def long_sums() -> list[dict[str, float]]:
    """Relative error, towards zero, of sums of k products that are all positive."""
    rows = []
    generator = torch.Generator("cuda").manual_seed(1)
    for k in (512, 4096, 32768, 131072):
        a, b, c = probe_operands("positive", 1, k, generator)
        exact = a.double() @ b.double().transpose(1, 2)
        measured = kernels.accumulator_probe(a, b, c)
        rows.append({"k": k, "relative_error": ((measured - exact) / exact).mean().item()})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of accumulator_probe.json")
    options = parser.parse_args()
    generator = torch.Generator("cuda").manual_seed(0)
    problems = {(name, k): probe_operands(name, 1, k, generator) for name in PROBE_INPUTS for k in LENGTHS}
    measured = {key: kernels.accumulator_probe(a, b, c) for key, (a, b, c) in problems.items()}
    rows = []
    for bits, group, joins in itertools.product(FRACTION_BITS, GROUPS, (True, False)):
        model = Accumulator(bits, group, joins)
        differ = {
            f"{name} {k}": (model.matmul_add(a.float(), b.float().transpose(1, 2), c) != measured[name, k])
            .float()
            .mean()
            .item()
            for (name, k), (a, b, c) in problems.items()
        }
        rows.append({"fraction_bits": bits, "group": group, "joins_alignment": joins, "differ": differ})
    rows.sort(key=lambda row: sum(row["differ"].values()))
    print("share of sums that differ; best model first")
    for row in rows[:8]:
        shares = "  ".join(f"{name}: {share:.3f}" for name, share in row["differ"].items())
        joins = "joins" if row["joins_alignment"] else "is apart"
        print(f"{row['fraction_bits']} bits, groups of {row['group']}, accumulator {joins}: {shares}")
    sums = long_sums()
    for row in sums:
        print(f"{row['k']} positive products: relative error {row['relative_error']:+.3e}")
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine_info(), "models": rows, "long_sums": sums}
    (options.out / "accumulator_probe.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
