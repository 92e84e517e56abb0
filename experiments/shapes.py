"""Attention problems that the experiments run: sizes, FLOP counts, inputs and the standard grid."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = (64, 128, 256)
TOKENS = 16384  # batch * seqlen
HIDDEN = 2048  # heads * head_dim
SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)


@dataclass(frozen=True)
class Shape:
    """Self-attention with q (batch, seqlen, heads, head_dim) and k, v (batch, seqlen, heads_kv, head_dim)."""

    batch: int
    seqlen: int
    heads: int
    heads_kv: int
    head_dim: int
    causal: bool
    dtype: str = "bf16"

    @property
    def flops(self) -> float:
        """4 * S * S * D * H * B floating-point operations, half of them if causal."""
        full = 4.0 * self.seqlen * self.seqlen * self.head_dim * self.heads * self.batch
        return full / 2 if self.causal else full

    def tflops(self, milliseconds: float) -> float:
        """Rate in TFLOP/s of a run that took `milliseconds`."""
        return self.flops / (milliseconds * 1e9)

    @property
    def mask(self) -> str:
        return "causal" if self.causal else "full"

    def __str__(self) -> str:
        heads = f"{self.heads}" if self.heads == self.heads_kv else f"{self.heads}/{self.heads_kv}"
        return f"{self.dtype} d{self.head_dim} S{self.seqlen} B{self.batch} H{heads} {self.mask}"

    def as_row(self) -> dict:
        """The sizes as the leading columns of a result row."""
        return asdict(self)

    @classmethod
    def of_row(cls, row: dict) -> Shape:
        """The shape that a result row was measured on: the inverse of `as_row`."""
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})

    def inputs(self, seed: int, device: str = "cuda") -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normal random q, k, v, contiguous."""
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(heads: int) -> torch.Tensor:
            size = (self.batch, self.seqlen, heads, self.head_dim)
            return torch.randn(size, generator=generator, device=device, dtype=DTYPES[self.dtype])

        return normal(self.heads), normal(self.heads_kv), normal(self.heads_kv)


def standard_grid(
    head_dims: tuple[int, ...] = HEAD_DIMS,
    seqlens: tuple[int, ...] = SEQLENS,
    masks: tuple[bool, ...] = (False, True),
    dtype: str = "bf16",
) -> list[Shape]:
    """FlashAttention's benchmark grid: batch * seqlen = TOKENS, heads * head_dim = HIDDEN."""
    return [
        Shape(max(TOKENS // s, 1), s, HIDDEN // d, HIDDEN // d, d, causal, dtype)
        for d in head_dims
        for causal in masks
        for s in seqlens
    ]


def extra_shapes(head_dims: tuple[int, ...] = HEAD_DIMS, dtype: str = "bf16") -> list[Shape]:
    """Grouped queries (64 heads on 8) at 8k, and batch 1 at short lengths, where filling the GPU is hard."""
    shapes = [Shape(2, 8192, 64, 8, 128, False, dtype)] if 128 in head_dims else []
    shapes += [
        Shape(1, s, HIDDEN // d, HIDDEN // d, d, False, dtype) for d in head_dims for s in (512, 1024, 2048)
    ]
    return [replace(shape, causal=causal) for causal in (False, True) for shape in shapes]
