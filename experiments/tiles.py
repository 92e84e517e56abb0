"""Rows of the tile table as things to run: what the tile experiments share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peers import reason
from shapes import DTYPES

from hopper_fa import kernels
from hopper_fa.reference import attention_reference

# Rounding P and O costs a row 3e-3 (bf16) or 4e-4 (fp16) in relative L2; the worst of many rows, more.
MAX_ROW_ERROR = {"bf16": 2e-2, "fp16": 3e-3}

BUILD_HINT = (
    "build the experiment instances with "
    "`pip install . -C cmake.define.HOPPER_FA_EXPERIMENTS=ON` (instances.cmake lists them)"
)


def built_tiles(head_dim: int, dtype: str) -> dict[str, dict]:
    """{variant: tile-table row} of the instances that this binary holds for one head dim and dtype."""
    return {
        row["variant"]: row
        for row in kernels.FORWARD_TILES
        if row["head_dim"] == head_dim and dtype in row["dtypes"]
    }


def describe(tile: dict) -> str:
    """A tile in one line: rows x keys x stages, what is switched on, octets of exp2 on the FP32 pipe."""
    parts = [f"{tile['block_m']}x{tile['block_n']}x{tile['kv_stages']}"]
    parts += ["specialised"] if tile["warp_specialised"] else []
    parts += ["overlap"] if tile["overlap"] else []
    parts += [f"ping-pong {tile['ping_pong']}", f"fma {tile['fma_exp2_octets']}"]
    return ", ".join(parts)


def variant_call(
    variant: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A call that runs one variant into outputs allocated here and returns them, (out, lse)."""
    batch, seqlen_q, heads, head_dim = q.shape
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        kernels.forward(q, k, v, out, lse, head_dim**-0.5, causal, variant)
        return out, lse

    return call


def check_variant(variant: str, head_dim: int, dtype: str, seed: int) -> str:
    """Compare a variant with float64 on lengths that divide no tile, both masks, grouped heads.

    Returns:
        An empty string if every row of the output and every LSE is right, else one line on what is not.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    for seqlen_q, seqlen_k, causal in ((1000, 1500, False), (1000, 1500, True), (1300, 1300, True)):
        sizes = ((2, seqlen_q, 4, head_dim), (2, seqlen_k, 2, head_dim), (2, seqlen_k, 2, head_dim))
        q, k, v = (
            torch.randn(size, generator=generator, device="cuda", dtype=DTYPES[dtype]) for size in sizes
        )
        reference, reference_lse = attention_reference(q, k, v, causal=causal)
        call = variant_call(variant, q, k, v, causal)
        try:
            out, lse = call()
            out.fill_(float("nan"))
            lse.fill_(float("nan"))
            call()
            torch.cuda.synchronize()
        except RuntimeError as error:
            return reason(error)
        worst_row = ((out - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()
        lse_error = (lse - reference_lse).abs().max().item()
        if not (worst_row <= MAX_ROW_ERROR[dtype] and lse_error <= 1e-3):  # written so that NaN fails
            mask = "causal" if causal else "full"
            return (
                f"wrong at {seqlen_q}x{seqlen_k} {mask}: row error {worst_row:.1e}, LSE error {lse_error:.1e}"
            )
    return ""
