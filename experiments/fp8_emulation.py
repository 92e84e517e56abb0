"""What FP8 attention loses, by the emulator, on any machine: recipe by recipe against float64.

    python experiments/fp8_emulation.py --experiment outliers --heads 3

Experiments: outliers (N(0, 1) + N(0, 100) * Bernoulli(0.001), the inputs of FlashAttention-3's Table 3),
k_bias (one vector of N(0, 3**2) added to every key), long (64 queries over --seqlen keys, V of mean 1) and
sink (4 keys whose scores lie above the others by 0 to 14). Head dim 128, full mask. Prints a line a recipe,
and with --out writes them as JSON lines. Errors are against the inputs before they are rounded to BF16.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from hopper_fa import Fp8Recipe, attention_reference, error_metrics, quantize_qkv
from hopper_fa.emulator_fp8 import ACCUMULATORS, attention_fp8_emulated

HEAD_DIM = 128
SEQLENS = {"outliers": 8192, "k_bias": 4096, "long": 131072, "sink": 4096}
_DEFAULT = Fp8Recipe.default()
PRESETS = {
    "default": _DEFAULT,
    "accurate": Fp8Recipe.accurate(),
    "causal_safe": Fp8Recipe.causal_safe(),
    "fa3": Fp8Recipe.fa3(),
    "fa3_paper": Fp8Recipe.fa3_paper(),
    "default, e4m3": replace(_DEFAULT, qk_dtype="e4m3"),
    "default, e4m3, token Q": replace(_DEFAULT, qk_dtype="e4m3", q_granularity="token"),
    "default, V not compensated": replace(_DEFAULT, compensate_v=False),
    "default, smooth Q": replace(_DEFAULT, smooth_q=True),
    "default, no rotation": replace(_DEFAULT, rotation="none"),
    "default, no smoothing": replace(_DEFAULT, smooth_k=False, smooth_v=False, compensate_v=False),
    "default, row sum fp32": replace(_DEFAULT, row_sum="fp32"),
    "default, head V": replace(_DEFAULT, v_granularity="head"),
}
SUMS = {
    f"{name}, {row_sum}, smooth V {'on' if smooth else 'off'}": replace(
        _DEFAULT, accumulation=accumulation, row_sum=row_sum, smooth_v=smooth, compensate_v=smooth
    )
    for name, accumulation in (("two-level", 1), ("every 4", 4), ("raw", 0))
    for row_sum in ("product", "fp32")
    for smooth in (True, False)
}
P_RANGE = {
    f"offset {offset}, threshold {threshold}": replace(
        _DEFAULT, p_offset=float(offset), rescale_threshold=float(threshold)
    )
    for offset, threshold in ((0, 0), (4, 0), (4, 4), (6, 2), (8, 0))
}
RECIPES = {"outliers": PRESETS, "k_bias": PRESETS, "long": SUMS, "sink": P_RANGE}
SINKS = (0, 4, 6, 8, 10, 12, 14)  # of the sink experiment, in natural log


def inputs(experiment: str, seqlen: int, sink: float, seed: int) -> tuple[torch.Tensor, ...]:
    """float64 q, k, v of one head, (1, seqlen, 1, HEAD_DIM)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(1, rows, 1, HEAD_DIM, generator=generator, dtype=torch.float64)

    q, k, v = normal(64 if experiment == "long" else seqlen), normal(seqlen), normal(seqlen)
    if experiment == "outliers":
        for t in (q, k, v):
            hit = torch.rand(t.shape, generator=generator, dtype=torch.float64) < 0.001
            t += 10 * normal(t.shape[1]) * hit
    elif experiment == "k_bias":
        k += 3 * normal(1)
    elif experiment == "long":
        v += 1
    elif experiment == "sink":
        # One direction that all queries share, at which only the sinks point.
        q[..., 0], k[..., 0] = 4.0, 0.0
        k[:, :4, :, 0] = sink * HEAD_DIM**0.5 / 4
        v[:, :4] *= 0.1
    return q, k, v


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_reference` without mask, a thousand rows at a time."""
    outs, lses = zip(*(attention_reference(rows, k, v) for rows in q.split(1024, 1)), strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def measure(arguments: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One row a (recipe, head, sink)."""
    experiment = arguments.experiment
    seqlen = arguments.seqlen or SEQLENS[experiment]
    recipes = RECIPES[experiment]
    chosen = {name: recipes[name] for name in arguments.recipe or recipes}
    dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[arguments.dtype]
    for sink in SINKS if experiment == "sink" else (0,):
        for head in range(arguments.heads):
            q, k, v = inputs(experiment, seqlen, sink, arguments.seed + head)
            ref, ref_lse = reference(q, k, v)
            for name, recipe in chosen.items():
                start = time.perf_counter()
                qkv = quantize_qkv(q.to(dtype), k.to(dtype), v.to(dtype), recipe)
                out, lse = attention_fp8_emulated(qkv, out_dtype=dtype, accumulator=arguments.accumulator)
                errors = error_metrics(out, ref)
                errors["signed_bias"] /= ref.abs().mean().item()  # relative from here on
                yield {
                    "experiment": experiment,
                    "seqlen": seqlen,
                    "sink": sink,
                    "seed": arguments.seed + head,
                    "dtype": arguments.dtype,
                    "accumulator": arguments.accumulator,
                    "recipe": name,
                    **errors,
                    "lse_max_abs": (lse.double() - ref_lse).abs().max().item(),
                    "seconds": time.perf_counter() - start,
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experiment", choices=SEQLENS, required=True)
    parser.add_argument("--recipe", action="append", help="of the experiment's; may be repeated; all")
    parser.add_argument("--heads", type=int, default=1, help="seeds, each a head of its own")
    parser.add_argument("--seqlen", type=int, help="keys; the experiment's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="of inputs and output")
    parser.add_argument("--accumulator", choices=ACCUMULATORS, default="auto")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    rows = []
    for row in measure(arguments):
        rows.append(row)
        print(
            f"{row['recipe']:<34} sink {row['sink']:>2} seed {row['seed']} RMSE {row['rmse']:.2e} rel. L2 "
            f"{row['relative_l2']:.2e} bias {row['signed_bias']:+.1e} row p99 {row['row_p99']:.2e} LSE "
            f"{row['lse_max_abs']:.1e} ({row['seconds']:.0f} s)",
            flush=True,
        )
        if arguments.out:
            arguments.out.write_text("".join(json.dumps(r) + "\n" for r in rows))


if __name__ == "__main__":
    main()
