"""The experiments of fp8_accuracy.py about stability: E8 (flash against standard), E9 (bias), E11 (tiles)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from fp8_studies import DEFAULT, Problem, Row, Sizes

from hopper_fa import Fp8Recipe, error_metrics, merge_attention
from hopper_fa.accuracy import unfused_attention
from hopper_fa.accuracy_fp8 import (
    attend,
    forward_16bit,
    implementation,
    quantize,
    reference,
    study_inputs,
)
from hopper_fa.recipe import E4M3_MAX

Round = Callable[[torch.Tensor], torch.Tensor]


def to_dtype(dtype: torch.dtype) -> Round:
    """Rounding of float32 to dtype and back."""
    return lambda x: x.to(dtype).float()


def to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Rounding of float32 to e4m3 and back, saturating."""
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float()


# name -> rounding of Q, K, V and P, rounding of everything else, what P is multiplied by before its rounding.
PRECISIONS: dict[str, tuple[Round, Round, float]] = {
    "fp32": (to_dtype(torch.float32), to_dtype(torch.float32), 1.0),
    "fp16": (to_dtype(torch.float16), to_dtype(torch.float16), 1.0),
    "bf16": (to_dtype(torch.bfloat16), to_dtype(torch.bfloat16), 1.0),
    "bf16, fp32 sums": (to_dtype(torch.bfloat16), to_dtype(torch.float32), 1.0),
    "e4m3, fp32 sums": (to_e4m3, to_dtype(torch.float32), 256.0),
}


def standard_in(precision: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Standard attention with every intermediate rounded; q, k, v (1, seqlen, heads, d) float32, out too."""
    operand, other, p_scale = PRECISIONS[precision]
    q, k, v = (_scaled(operand, t).transpose(1, 2) for t in (q, k, v))
    s = other(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5)
    e = other((s - s.amax(-1, keepdim=True)).exp())
    p = operand(other(e / other(e.sum(-1, keepdim=True))) * p_scale) / p_scale
    return other(p @ v).transpose(1, 2)


def flash_in(
    precision: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, spread_maxima: bool = False
) -> torch.Tensor:
    """Flash attention over blocks of keys with every intermediate, the running sums too, rounded.

    Args:
        q, k, v: (1, seqlen, heads, d) float32.
        spread_maxima: where several scores of a block's row are at its maximum, subtract twice that, or 0
            if it is negative, so that no P is exactly 1. Source: arXiv 2510.04212.
    """
    operand, other, p_scale = PRECISIONS[precision]
    q, k, v = (_scaled(operand, t).transpose(1, 2) for t in (q, k, v))
    maximum = q.new_full((*q.shape[:-1], 1), float("-inf"))
    total, out = torch.zeros_like(maximum), torch.zeros_like(q)
    for start in range(0, k.shape[2], block):
        keys = slice(start, start + block)
        s = other(q @ k[:, :, keys].transpose(-1, -2) * q.shape[-1] ** -0.5)
        largest = s.amax(-1, keepdim=True)
        if spread_maxima:
            tied = (s >= largest - 1e-3).sum(-1, keepdim=True) > 1
            largest = torch.where(tied, (2 * largest).clamp_min(0.0), largest)
        new = torch.maximum(maximum, largest)
        alpha, p = other((maximum - new).exp()), other((s - new).exp())
        maximum = new
        total = other(other(total * alpha) + other(p.sum(-1, keepdim=True)))
        p = operand(p * p_scale) / p_scale
        out = other(other(out * alpha) + other(p @ v[:, :, keys]))
    return other(out / total).transpose(1, 2)


def _scaled(operand: Round, x: torch.Tensor) -> torch.Tensor:
    """Rounding with one scale for the tensor in e4m3, without in the others."""
    if operand is not to_e4m3:
        return operand(x)
    scale = x.abs().amax() / E4M3_MAX
    return operand(x / scale) * scale


def e8(sizes: Sizes) -> Iterator[Row]:
    """Flash against standard attention by precision, over the length at blocks of 128 keys, and by block.

    After Golden et al., "Is Flash Attention Stable?", arXiv 2405.02803: the largest deviation of an element.
    The inputs are BF16 numbers, so that BF16, FP16 and FP32 see the same.
    """
    lengths = [n for n in (256, 512, 1024, 2048, 4096, 8192) if n <= sizes.keys]
    problems = [(n, (128,)) for n in lengths[:-1]]
    problems.append((lengths[-1], (16, 32, 64, 128, 256, 512, lengths[-1])))
    for head in range(sizes.heads):
        for keys, blocks in problems:
            seed = sizes.seed + head
            exact = study_inputs("normal", 256, keys, device=sizes.device, seed=seed)
            exact = tuple(t.bfloat16().float() for t in exact)
            problem = Problem(sizes, *exact, inputs="normal", seed=seed)
            for precision in PRECISIONS:
                standard = standard_in(precision, *exact)
                yield problem.row("standard", "torch", standard, precision=precision, block=None)
                for block in blocks:
                    flash = flash_in(precision, *exact, block)
                    row = problem.row("flash", "torch", flash, precision=precision, block=block)
                    row["from_standard"] = (flash - standard).abs().max().item()
                    row["from_standard_mean"] = (flash - standard).abs().mean().item()
                    yield row
            recipes = {"hopper_fa fa3": Fp8Recipe.fa3(), "hopper_fa default": DEFAULT}
            yield problem.of_bf16("flash", precision="hopper_fa BF16", block=128)
            for name, recipe in recipes.items():
                yield problem.of_recipe("flash", recipe, precision=name, block=128)


def e9(sizes: Sizes) -> Iterator[Row]:
    """Tied maxima and a V of one sign, where rounding P V is biased: signed errors of O and of delta.

    delta = sum over channels of dO * O, with dO of one sign too. After arXiv 2510.04212.
    """
    fa3 = Fp8Recipe.fa3()
    recipes = {
        "fa3": fa3,
        "fa3, two-level": replace(fa3, accumulation=1),
        "fa3, two-level, product": replace(fa3, accumulation=1, row_sum="product"),
        "default": DEFAULT,
        "default, raw": replace(DEFAULT, accumulation=0),
    }
    for head in range(sizes.heads):
        for ties in (1, 2, 4, 8, 16, 32, 64):
            seed = sizes.seed + head
            q, k, v = study_inputs("normal", 64, 1024, device=sizes.device, seed=seed)
            # The first keys are one vector, along which every query lies: their scores are 8 above the rest.
            k[:, :ties] = k[:, :1]
            along = k[:, :1] / k[:, :1].norm(dim=-1, keepdim=True)
            q += along * (8.0 * q.shape[-1] ** 0.5 / k[:, :1].norm(dim=-1, keepdim=True))
            v = -v.abs()
            problem = Problem(sizes, q, k, v, inputs="ties", seed=seed, ties=ties)
            generator = torch.Generator(sizes.device).manual_seed(seed)
            d_out = torch.randn(q.shape, generator=generator, dtype=torch.float32, device=sizes.device)
            d_out = d_out.abs().double()

            def with_delta(row: Row, out: torch.Tensor, problem=problem, d_out=d_out) -> Row:
                errors = error_metrics((d_out * out.double()).sum(-1), (d_out * problem.ref).sum(-1))
                return row | {f"delta_{name}": errors[name] for name in ("relative_bias", "relative_l2")}

            rounded = [t.float() for t in (problem.q, problem.k, problem.v)]
            outs = {
                "standard, all BF16": unfused_attention(problem.q, problem.k, problem.v),
                "flash, all BF16": flash_in("bf16", *rounded, 128),
                "flash, all BF16, maxima spread": flash_in("bf16", *rounded, 128, spread_maxima=True),
            }
            for name, out in outs.items():
                yield with_delta(problem.row(name, "torch", out), out)
            out, lse, ran_on = forward_16bit(problem.q, problem.k, problem.v)
            yield with_delta(problem.row("BF16", ran_on, out, lse), out)
            for name, recipe in recipes.items():
                out, lse, ran_on = attend(problem.quantize(recipe), problem.runs_on)
                yield with_delta(problem.row(name, ran_on, out, lse), out)


def e11(sizes: Sizes) -> Iterator[Row]:
    """The same rows at another place: how many elements of the BF16 output differ, and by how much."""
    recipes: dict[str, Fp8Recipe | None] = {"BF16": None}
    recipes |= {n: getattr(Fp8Recipe, n)() for n in ("fa3", "default", "accurate", "causal_safe")}
    runs_on = implementation(sizes.device)
    rows = slice(512, 640)
    for head in range(sizes.heads):
        exact = study_inputs("normal", 1024, 1024, device=sizes.device, seed=sizes.seed + head)
        q, k, v = (t.bfloat16() for t in exact)
        part = q[:, rows]
        for name, recipe in recipes.items():

            def run(q, k, v, causal=False, recipe=recipe):
                if recipe is None:
                    return forward_16bit(q, k, v, causal)
                return attend(quantize(q, k, v, recipe, runs_on), runs_on, causal)

            alone, _, ran_on = run(part, k, v)
            ref, _ = reference(part, k, v)
            halves = [run(part, k[:, keys], v[:, keys])[:2] for keys in (slice(0, 384), slice(384, None))]
            upto = slice(0, rows.stop)
            places = {
                "among 1024 rows": (run(q, k, v)[0][:, rows], alone),
                "17 rows further down": (run(q[:, rows.start - 17 : rows.stop], k, v)[0][:, 17:], alone),
                "in a batch of two": (run(*(torch.cat((t, t.flip(1))) for t in (part, k, v)))[0][:1], alone),
                "keys turned by 96": (run(part, *(torch.roll(t, 96, 1) for t in (k, v)))[0], alone),
                "keys in two splits, merged": (merge_attention(*zip(*halves, strict=True))[0], alone),
                "causal: later keys absent": (
                    run(*(t[:, upto] for t in (q, k, v)), causal=True)[0][:, rows],
                    run(q, k, v, causal=True)[0][:, rows],
                ),
            }
            for place, (out, other) in places.items():
                diff = error_metrics(out, other)
                yield {
                    "variant": name,
                    "place": place,
                    "keys": k.shape[1],
                    "queries": part.shape[1],
                    "seed": sizes.seed + head,
                    "implementation": ran_on,
                    "differing": (out != other).double().mean().item(),
                    "max_abs": diff["max_abs"],
                    "relative_l2": diff["relative_l2"],
                    "error_relative_l2": error_metrics(alone, ref)["relative_l2"],
                }
