"""A few tiny problems for compute-sanitizer, each kernel once with and once without a mask:

    compute-sanitizer --tool memcheck --kernel-name kns=hopper_fa python tests/gpu/sanitizer_cases.py

and the same with racecheck and synccheck. torch's caching allocator is switched off, so that memcheck sees a
step past a tensor's end. Every output is compared with float64 as well, quantised tensors with the reference.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from torch import Tensor

from hopper_fa import Fp8Recipe, flash_attn_func, kernels, quantization, quantize_kernels
from hopper_fa.emulator_backward import gradients_dequantized
from hopper_fa.metrics import error_metrics
from hopper_fa.reference import attention_reference, gradients_reference
from hopper_fa.token_stats import sampled_tokens

# Input dtype, recipe of 8-bit kernels, largest relative L2 error.
DTYPES = {
    "bf16": (torch.bfloat16, None, 1.5e-2),
    "fp16": (torch.float16, None, 2e-3),
    "e4m3": (torch.bfloat16, replace(Fp8Recipe.default(), qk_dtype="e4m3"), 0.1),
    "int8": (torch.bfloat16, Fp8Recipe.default(), 0.1),
}

# (batch, heads_q, heads_kv, seqlen_q, seqlen_k): odd tails, several key blocks, one key, no key, many tiles.
PROBLEMS = [(1, 2, 1, 113, 239), (2, 2, 2, 200, 520), (1, 1, 1, 1, 1), (1, 2, 2, 70, 0), (10, 16, 8, 130, 90)]


def check_forward(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, problem: str) -> None:
    _, recipe, allowed = DTYPES[name]
    if recipe is not None and q.shape[-1] > 128:  # sums move to global memory within the problem's few blocks
        recipe = replace(recipe, accumulation=2)
    out, lse = flash_attn_func(q, k, v, causal=causal, recipe=recipe, return_lse=True)
    truth, true_lse = attention_reference(q.cpu(), k.cpu(), v.cpu(), causal=causal)
    error = error_metrics(out.cpu(), truth)["relative_l2"]
    if not error <= allowed:
        raise SystemExit(f"{problem}: relative L2 error {error:.2e} exceeds {allowed}")
    atol = 1e-3 if recipe is None else 0.25  # a row of few keys has few errors to average
    torch.testing.assert_close(lse.cpu().double(), true_lse, atol=atol, rtol=1e-6)


def check_backward(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool, problem: str) -> None:
    """Both modes, with a gradient of LSE and without."""
    allowed = DTYPES[name][2]
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    for deterministic in (False, True):
        out, lse = flash_attn_func(
            *leaves, causal=causal, deterministic=deterministic, return_lse=True, backend="cuda"
        )
        dout, dlse = torch.randn_like(out), torch.randn_like(lse) if deterministic else None
        results = (out, lse) if deterministic else (out,)
        got = torch.autograd.grad(results, leaves, (dout, dlse)[: len(results)])
        tensors = (None if t is None else t.detach().cpu() for t in (dout, dlse, q, k, v, out, lse))
        want = gradients_reference(*tensors, q.shape[-1] ** -0.5, causal)
        for which, gradient, truth in zip(("dq", "dk", "dv"), got, want, strict=True):
            error = (gradient.cpu() - truth).norm().item()
            # Gradients that cancel, of a row with one key, are compared with nothing smaller than 1e-3.
            if not error <= allowed * truth.norm().item() + 1e-3 * truth.numel() ** 0.5:
                raise SystemExit(f"{problem}: {which} is off by {error:.2e} of {truth.norm().item():.2e}")


def run_attention(
    family: str,
    tiles: list[dict],
    check: Callable[..., None],
    options: argparse.Namespace,
    generator: torch.Generator,
) -> int:
    """Every instance of `tiles` that is asked for, on PROBLEMS; how many ran."""
    runs = 0
    built = {(row["head_dim"], dtype) for row in tiles for dtype in row["dtypes"]}
    for head_dim, name in sorted(built | {(40, dtype) for d, dtype in built if d == 64}):
        if head_dim not in (options.head_dim or [head_dim]) or name not in (options.dtype or [name]):
            continue
        for batch, heads_q, heads_kv, seqlen_q, seqlen_k in PROBLEMS:
            sizes = [
                (batch, s, h, head_dim)
                for s, h in ((seqlen_q, heads_q), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
            ]
            q, k, v = (
                torch.randn(size, generator=generator, device="cuda").to(DTYPES[name][0]) for size in sizes
            )
            for causal in (False, True):
                mask = "causal" if causal else "full"
                problem = f"{family} d{head_dim} {name} {tuple(q.shape)} on {seqlen_k} keys {mask}"
                check(name, q, k, v, causal, problem)
                runs += 1
    return runs


def run_quantization(options: argparse.Namespace, generator: torch.Generator) -> int:
    """BF16 tensors of several tiles a CTA, V that outgrows its sample; three presets and all smoothing."""
    if "bf16" not in quantize_kernels.DTYPES:
        return 0
    default = Fp8Recipe.default()
    recipes = (default, Fp8Recipe.causal_safe(), Fp8Recipe.fa3())
    recipes += (replace(default, smooth_q=True, q_granularity="token"),)
    names = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "v_mean")
    runs = 0
    for head_dim in options.head_dim or [40, 64, 128, 256]:
        for heads_kv, seqlen_k in ((32, 260), (64, 260), (2, 1100)):
            sizes = [(6, s, h, head_dim) for s, h in ((130, 64), (seqlen_k, heads_kv), (seqlen_k, heads_kv))]
            q, k, v = (torch.randn(size, generator=generator, device="cuda").bfloat16() for size in sizes)
            sampled = sampled_tokens(seqlen_k, default.v_stats_shift(seqlen_k)).tolist()
            other = next(token for token in reversed(range(seqlen_k)) if token not in sampled)
            v[0, other, 0, -1], v[1, other, 1, 0] = 3000.0, -3000.0
            v[1, 0, 1, 1] = float("nan")
            for recipe in recipes:
                got = quantize_kernels.quantize_qkv(q, k, v, recipe)
                want = quantization.quantize_qkv(q, k, v, recipe)
                for name in names:
                    a, b = (getattr(x, name) for x in (got, want))
                    if (a is None) != (b is None):
                        raise SystemExit(f"quantisation d{head_dim}, {recipe}: {name} is None in one of two")
                    if a is not None and not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
                        raise SystemExit(f"quantisation d{head_dim}, {recipe}: {name} is not the reference's")
                runs += 1
    return runs


def run_recipe_backward(options: argparse.Namespace, generator: torch.Generator) -> int:
    """The backward of two recipes, with a factor a block of queries and a factor a row, in both modes."""
    runs = 0
    recipes = {"int8": Fp8Recipe.default(), "e4m3": Fp8Recipe.causal_safe()}
    for head_dim in options.head_dim or [40, 64, 128, 256]:
        for name, recipe in recipes.items():
            if name not in (options.dtype or [name]):
                continue
            for batch, heads_q, heads_kv, seqlen_q, seqlen_k in PROBLEMS:
                sizes = [(seqlen_q, heads_q), (seqlen_k, heads_kv), (seqlen_k, heads_kv)]
                q, k, v = (
                    torch.randn((batch, s, h, head_dim), generator=generator, device="cuda").bfloat16()
                    for s, h in sizes
                )
                for causal in (False, True):
                    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
                    results = flash_attn_func(
                        *leaves, causal=causal, deterministic=causal, return_lse=True, recipe=recipe
                    )
                    given = tuple(torch.randn_like(t) for t in results)
                    got = torch.autograd.grad(results, leaves, given)
                    qkv = quantize_kernels.quantize_qkv(q, k, v, recipe)
                    want = gradients_dequantized(*given, qkv, head_dim**-0.5, causal)
                    for which, gradient, truth in zip(("dq", "dk", "dv"), got, want, strict=True):
                        error = (gradient - truth).norm().item()
                        if not error <= 0.05 * truth.norm().item() + 1e-3 * truth.numel() ** 0.5:
                            raise SystemExit(
                                f"{which} of {name} {tuple(q.shape)} on {seqlen_k} keys is off by "
                                f"{error:.2e} of {truth.norm().item():.2e}"
                            )
                    runs += 1
    return runs


FAMILIES: dict[str, Callable[[argparse.Namespace, torch.Generator], int]] = {
    "forward": partial(run_attention, "forward", kernels.FORWARD_TILES, check_forward),
    "backward": partial(run_attention, "backward", kernels.BACKWARD_TILES, check_backward),
    "quantize": run_quantization,
    "recipe_backward": run_recipe_backward,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, action="append", help="default: every one built, and 40")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: every one built")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="default: all")
    options = parser.parse_args()
    generator = torch.Generator("cuda").manual_seed(0)
    runs = sum(FAMILIES[family](options, generator) for family in options.family or FAMILIES)
    if runs == 0:
        raise SystemExit("nothing ran: this build holds no instance of the head dim and dtype asked for")
    print(f"{runs} problems agree with float64 or with the reference")


if __name__ == "__main__":
    main()
