"""A GPT whose attention is a parameter: pre-norm blocks, learned positions, output tied to the input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

# (batch, seqlen, heads, head_dim) q, k, v -> causal attention, in the same layout.
Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class GptConfig:
    """Sizes of a model."""

    layers: int
    width: int
    heads: int
    context: int
    vocabulary: int = 320  # bytes and the end of a file, padded to a multiple of 64

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    def flops_of_token(self) -> float:
        """Of a training step: 6 a weight of the matrices, and 3.5 times attention's causal forward."""
        weights = 12 * self.layers * self.width**2 + self.vocabulary * self.width
        return 6.0 * weights + 3.5 * self.layers * 2.0 * self.context * self.width


# The blocks of GPT-2's smallest model, 85 M weights; its vocabulary of 50257 would make 124 M of them.
MODELS = {
    "gpt-124m": GptConfig(layers=12, width=768, heads=12, context=1024),
    "gpt-d128": GptConfig(layers=12, width=768, heads=6, context=8192),
    "tiny": GptConfig(layers=2, width=128, heads=2, context=64),
}


def attention_of(variant: str, device: torch.device) -> Attention:
    """The attention of a variant: "sdpa", "hopper_fa" or "hopper_fa_fp8"; on a CPU ours is the emulator."""
    if variant == "sdpa":
        return _sdpa
    from hopper_fa import Fp8Recipe, flash_attn_func

    recipe = Fp8Recipe.default() if variant == "hopper_fa_fp8" else None
    backend = None if device.type == "cuda" else "emulator"
    return lambda q, k, v: flash_attn_func(q, k, v, causal=True, recipe=recipe, backend=backend)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GptConfig, attention: Attention) -> None:
        super().__init__()
        self.heads = config.heads
        self.attention = attention
        self.norm_attention = nn.LayerNorm(config.width, bias=False)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.project = nn.Linear(config.width, config.width, bias=False)
        self.norm_mlp = nn.LayerNorm(config.width, bias=False)
        self.widen = nn.Linear(config.width, 4 * config.width, bias=False)
        self.narrow = nn.Linear(4 * config.width, config.width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1))  # (B, S, 3, H, D)
        x = x + self.project(self.attention(*qkv.unbind(2)).flatten(2))
        return x + self.narrow(functional.gelu(self.widen(self.norm_mlp(x))))


class Gpt(nn.Module):
    """Tokens (batch, seqlen) and the tokens that follow -> mean cross-entropy in nats."""

    def __init__(self, config: GptConfig, attention: Attention) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(Block(config, attention) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                # The layers that end in the residual stream are narrower, so that its variance stays near 1.
                ends = name.endswith(("project.weight", "narrow.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * config.layers) ** 0.5 if ends else 0.02)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        places = torch.arange(tokens.shape[1], dtype=torch.int64, device=tokens.device)
        x = self.tokens(tokens) + self.positions(places)  # (B, S, width)
        for block in self.blocks:
            x = block(x)
        logits = functional.linear(self.norm(x), self.tokens.weight)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
