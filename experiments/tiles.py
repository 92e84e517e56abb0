"""Rows of the tile table as things to run: what the tile experiments share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
    parts += ["TMA store"] if tile["tma_store"] else []
    parts += [f"ping-pong {tile['ping_pong']}", f"fma {tile['fma_exp2_octets']}"]
    return ", ".join(parts)


def variant_call(
    variant: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    causal: bool,
    out: torch.Tensor | None = None,
) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    """A call that runs one variant into `out`, or an output allocated here, and returns (out, lse)."""
    batch, seqlen_q, heads, head_dim = q.shape
    out = torch.empty_like(q) if out is None else out
    lse = torch.empty(batch, heads, seqlen_q, dtype=torch.float32, device=q.device)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        kernels.forward(q, k, v, out, lse, head_dim**-0.5, causal, variant)
        return out, lse

    return call


@dataclass(frozen=True)
class Problem:
    """What a variant must compute correctly."""

    batch: int
    heads: int
    heads_kv: int
    seqlen_q: int
    seqlen_k: int
    causal: bool
    narrower: int = 0  # columns that the head dim lacks to the tile's

    def inputs(self, head_dim: int, dtype: str, generator: torch.Generator) -> list[torch.Tensor]:
        """Normal random q, k, v."""
        sides = ((self.seqlen_q, self.heads), (self.seqlen_k, self.heads_kv), (self.seqlen_k, self.heads_kv))
        sizes = [(self.batch, seqlen, heads, head_dim - self.narrower) for seqlen, heads in sides]
        return [torch.randn(s, generator=generator, device="cuda", dtype=DTYPES[dtype]) for s in sizes]


# Lengths that divide no tile, both masks, grouped heads, both lengths the longer, one tile a head and odd
# numbers of them, rows without a key, and more tiles than any launch has CTAs.
PROBLEMS = [
    Problem(batch, heads, heads_kv, seqlen_q, seqlen_k, causal, narrower)
    for causal in (False, True)
    for batch, heads, heads_kv, seqlen_q, seqlen_k, narrower in (
        (2, 4, 2, 1000, 1500, 0),
        (1, 3, 1, 1300, 1300, 0),
        (3, 2, 2, 700, 113, 0),
        (1, 1, 1, 1, 1, 0),
        (1, 2, 1, 63, 4224, 0),
        (2, 2, 1, 257, 129, 24),
        (5, 16, 4, 641, 799, 0),
        (1, 40, 40, 2049, 127, 0),
        (1, 2, 2, 130, 0, 0),
    )
]
REPEATS = 20  # launches that must give the same bits
CHAIN = 8  # launches in a row, each with the output of the last one as its queries


def check_variant(variant: str, head_dim: int, dtype: str, seed: int) -> str:
    """Compare a variant with float64 on PROBLEMS, and its launches with each other.

    Returns:
        An empty string if every row of the output and every LSE is right, nothing else was written, and
        launches in a row give the same bits as lone ones; else one line on what is not so.
    """
    generator = torch.Generator("cuda").manual_seed(seed)
    for problem in PROBLEMS:
        try:
            why = _check_problem(variant, problem, head_dim, dtype, generator)
        except RuntimeError as error:
            why = reason(error)
        if why:
            return f"{problem}: {why}"
    return ""


def _check_problem(
    variant: str, problem: Problem, head_dim: int, dtype: str, generator: torch.Generator
) -> str:
    q, k, v = problem.inputs(head_dim, dtype, generator)
    batch, seqlen_q, heads, columns = q.shape
    reference, reference_lse = attention_reference(q, k, v, causal=problem.causal)
    # A strided output amid NaN: what lies around it must stay NaN.
    whole = torch.empty(batch, seqlen_q + 2, heads + 1, columns + 8, device="cuda", dtype=q.dtype)
    out = whole[:, 1:-1, :heads, :columns]
    call = variant_call(variant, q, k, v, problem.causal, out)
    results = []
    for _ in range(REPEATS):
        whole.fill_(float("nan"))
        _, lse = call()
        results.append((out.clone(), lse.clone()))
        lse.fill_(float("nan"))
    torch.cuda.synchronize()
    out, lse = results[0]
    worst_row = ((out - reference).norm(dim=-1) / reference.norm(dim=-1).clamp_min(1e-30)).max().item()
    no_key = reference_lse.isneginf() & lse.isneginf()
    lse_error = (lse - reference_lse).masked_fill(no_key, 0).abs().max().item()
    if not (worst_row <= MAX_ROW_ERROR[dtype] and lse_error <= 1e-3):  # written so that NaN fails
        return f"row error {worst_row:.1e}, LSE error {lse_error:.1e}"
    whole[:, 1:-1, :heads, :columns] = float("nan")
    if not whole.isnan().all():
        return "wrote outside its output"
    if not all(torch.equal(out, o) and torch.equal(lse, s) for o, s in results):
        return "launches gave different bits"
    return _check_chain(variant, problem.causal, q, k, v)


def _check_chain(variant: str, causal: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str:
    """Launches that each need the last one's output, in a row and in a graph, against synchronised ones."""
    buffers = [q] + [torch.empty_like(q) for _ in range(CHAIN)]
    calls = [variant_call(variant, a, k, v, causal, b) for a, b in zip(buffers, buffers[1:], strict=False)]

    def chain(synchronise: bool = False) -> None:
        for buffer in buffers[1:]:
            buffer.fill_(float("nan"))
        torch.cuda.synchronize()
        for call in calls:
            call()
            if synchronise:
                torch.cuda.synchronize()

    chain(synchronise=True)
    expected = [buffer.clone() for buffer in buffers[1:]]
    chain()
    torch.cuda.synchronize()
    if not all(map(torch.equal, expected, buffers[1:])):
        return "launches in a row gave other bits than synchronised ones"
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        for buffer in buffers[1:]:
            buffer.fill_(float("nan"))
        graph.replay()
        graph.replay()
        torch.cuda.synchronize()
        if not all(map(torch.equal, expected, buffers[1:])):
            return "launches of a graph gave other bits than synchronised ones"
    return ""
