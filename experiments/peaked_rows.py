"""Rounding where rows are peaked: our 16-bit forward beside FlashAttention-2's kernel, both against float64.

    python experiments/peaked_rows.py

Q, K and V are normal with deviations 1, 3 and 10, so scores have deviations of 1, 9 and 100 and rows see many
keys, a few, and one. Over `elements` outputs, by fixed seeds: `rmse_of_fa2` and `max_of_fa2` are our root
mean square and our largest error over those of torch's kernel (SDPBackend.FLASH_ATTENTION).
"""

from __future__ import annotations

import time

import command_line
import results
import torch
from shapes import HEAD_DIMS
from timing import GpuMonitor, device_facts
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hopper_fa import flash_attn_func

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def fa2(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def float64(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Head by head, as the score matrices of all take too much memory."""
    out = torch.empty(q.shape, dtype=torch.float64, device=q.device)
    for head in range(q.shape[2]):
        scores = q[:, :, head].double() @ k[:, :, head].double().mT * q.shape[-1] ** -0.5
        out[:, :, head] = scores.softmax(-1) @ v[:, :, head].double()
    return out


def compare(dtype: str, head_dim: int, deviation: float, seqlen: int, elements: int, seed: int) -> dict:
    """Errors over at least `elements` outputs."""
    squares = {"ours": 0.0, "fa2": 0.0}
    largest = dict(squares)
    generator = torch.Generator("cuda").manual_seed(seed)
    shape, seen = (1, seqlen, 16, head_dim), 0
    while seen < elements:
        q, k, v = (
            (deviation * torch.randn(shape, generator=generator, dtype=torch.float32, device="cuda")).to(
                DTYPES[dtype]
            )
            for _ in range(3)
        )
        truth = float64(q, k, v)
        for name, call in (("ours", flash_attn_func), ("fa2", fa2)):
            error = call(q, k, v).double() - truth
            squares[name] += error.square().sum().item()
            largest[name] = max(largest[name], error.abs().max().item())
        seen += truth.numel()
    rmse = {name: (total / seen) ** 0.5 for name, total in squares.items()}
    return {
        "dtype": dtype,
        "head_dim": head_dim,
        "deviation": deviation,
        "seqlen": seqlen,
        "elements": seen,
        "rmse": rmse["ours"],
        "rmse_of_fa2": rmse["ours"] / rmse["fa2"],
        "max": largest["ours"],
        "max_of_fa2": largest["ours"] / largest["fa2"],
    }


def main() -> None:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--deviations", type=float, nargs="+", default=[1.0, 3.0, 10.0])
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--elements", type=int, default=10**8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    command_line.require_gpu()
    start = time.monotonic()
    seed = options.seed
    result = {
        "experiment": "peaked_rows",
        "made": results.provenance(),
        "device": device_facts(GpuMonitor()),
        "settings": {"seed": seed},
        "rows": [],
    }
    for dtype in DTYPES:
        for head_dim in options.head_dims:
            for deviation in options.deviations:
                row = compare(dtype, head_dim, deviation, options.seqlen, options.elements, seed)
                result["rows"].append(row)
                print(
                    f"{dtype} d{head_dim} deviation {deviation:g}: RMSE {row['rmse']:.3e}, "
                    f"{row['rmse_of_fa2']:.3f} of FlashAttention-2's; largest {row['max']:.2e}, "
                    f"{row['max_of_fa2']:.3f}",
                    flush=True,
                )
    result["seconds"] = time.monotonic() - start
    results.save(result, options.out / "peaked_rows")


if __name__ == "__main__":
    main()
