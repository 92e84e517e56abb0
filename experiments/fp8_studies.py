"""The experiments of fp8_accuracy.py, each a generator of rows. Sizes: `Sizes`; head dim 128, full mask.

A row has the inputs' sizes and seed, a `variant` (what was varied), what ran it, and the errors of the output
against float64 attention of the unrounded inputs. The generators go through all variants of a seed before the
next seed, so that a run that is cut short has whole comparisons.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from fp8_published import FA3, p_cast_share

from hopper_fa import Fp8Recipe, error_metrics
from hopper_fa.accuracy import unfused_attention
from hopper_fa.accuracy_fp8 import (
    attend,
    forward_16bit,
    implementation,
    quantize,
    reference,
    study_inputs,
)
from hopper_fa.kernels import EXP2_LINEAR_MEAN
from hopper_fa.quantization import QuantizedQKV
from hopper_fa.recipe import E4M3_MAX, K_BLOCK

DEFAULT = Fp8Recipe.default()
# What the grids vary: not every field goes with P by its code.
EXACT = replace(DEFAULT, linear_exp2=False)
Row = dict[str, object]


@dataclass(frozen=True)
class Sizes:
    """How much is computed.

    Attributes:
        heads: seeds, each a head of its own. keys: of E1; queries: rows of it that are computed.
        short: keys of the experiments that compare recipes on biased inputs.
        long: lengths of E4.
    """

    device: str = "cpu"
    seed: int = 0
    heads: int = 3
    keys: int = 8192
    queries: int = 1024
    short: int = 4096
    long: tuple[int, ...] = (4096, 32768, 131072)


class Problem:
    """Inputs of one head with their float64 attention."""

    def __init__(
        self, sizes: Sizes, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **facts: object
    ) -> None:
        self.q, self.k, self.v = (t.bfloat16() for t in (q, k, v))
        self.exact = (q, k, v)
        self.ref, self.ref_lse = reference(q, k, v)
        self.facts = {"keys": k.shape[1], "queries": q.shape[1], **facts}
        self.runs_on = implementation(sizes.device)

    @classmethod
    def of(cls, sizes: Sizes, kind: str, keys: int, queries: int, head: int, v_mean: float = 0.0) -> Problem:
        seed = sizes.seed + head
        exact = study_inputs(kind, min(queries, keys), keys, v_mean=v_mean, device=sizes.device, seed=seed)
        return cls(sizes, *exact, inputs=kind, seed=seed)

    def quantize(self, recipe: Fp8Recipe) -> QuantizedQKV:
        return quantize(self.q, self.k, self.v, recipe, self.runs_on)

    def row(
        self, variant: str, ran_on: str, out: torch.Tensor, lse: torch.Tensor | None = None, **more
    ) -> Row:
        errors = error_metrics(out, self.ref)
        if lse is not None:
            errors["lse_max_abs"] = (lse.double() - self.ref_lse).abs().max().item()
        return {**self.facts, **more, "variant": variant, "implementation": ran_on, **errors}

    def of_recipe(self, variant: str, recipe: Fp8Recipe, qkv: QuantizedQKV | None = None, **more) -> Row:
        """A row of FP8 attention; qkv: the tensors, where they are quantised already."""
        start = time.perf_counter()
        out, lse, ran_on = attend(self.quantize(recipe) if qkv is None else qkv, self.runs_on)
        return self.row(variant, ran_on, out, lse, **more) | {"seconds": time.perf_counter() - start}

    def of_bf16(self, variant: str = "BF16", **more) -> Row:
        out, lse, ran_on = forward_16bit(self.q, self.k, self.v)
        return self.row(variant, ran_on, out, lse, **more)


def e1(sizes: Sizes) -> Iterator[Row]:
    """FlashAttention-3's Table 3: outliers in Q, K and V."""
    paper = Fp8Recipe.fa3_paper()
    recipes = {
        "FP8 FA3 (fa3_paper)": paper,
        "FP8 FA3, no block scales": replace(paper, q_granularity="head", k_granularity="head"),
        "FP8 FA3, no rotation": replace(paper, rotation="none"),
        "fa3": Fp8Recipe.fa3(),
        "default": DEFAULT,
        "accurate": Fp8Recipe.accurate(),
        "causal_safe": Fp8Recipe.causal_safe(),
        "default, e4m3 Q and K": replace(DEFAULT, qk_dtype="e4m3"),
        "default, no rotation": replace(DEFAULT, rotation="none"),
        "default, V not compensated": replace(DEFAULT, compensate_v=False),
        "default, statistics of every token": replace(DEFAULT, sample_stats=False),
        "default, exact exponentials": EXACT,
    }
    for head in range(sizes.heads):
        problem = Problem.of(sizes, "outliers", sizes.keys, sizes.queries, head)
        half = [t.half() for t in problem.exact]
        parts = [unfused_attention(part, *half[1:]) for part in half[0].split(1024, 1)]
        rows = [problem.row("FP16 standard", "torch", torch.cat(parts, 1))]
        out, lse, ran_on = forward_16bit(*half)
        rows += [problem.row(name, ran_on, out, lse) for name in ("FP16 FA2", "FP16 FA3")]
        rows.append(problem.of_bf16())
        out = fp8_standard_attention(problem.q, problem.k, problem.v)
        rows.append(problem.row("FP8 standard, per tensor", "torch", out))
        yield from ({**row, "published_rmse": FA3.get(str(row["variant"]))} for row in rows)
        for variant, recipe in recipes.items():
            yield {**problem.of_recipe(variant, recipe), "published_rmse": FA3.get(variant)}


def fp8_standard_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Unfused FP8 attention: a scale a tensor, float32 sums, scores and softmax in float16, float16 out."""

    def e4m3(x: torch.Tensor) -> torch.Tensor:
        scale = x.float().abs().amax() / E4M3_MAX
        return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale

    q, k, v = (e4m3(t).transpose(1, 2) for t in (q, k, v))
    outs = []
    for rows in q.split(1024, 2):
        scores = (rows @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).half()
        outs.append((e4m3(scores.softmax(-1)) @ v).half())
    return torch.cat(outs, 2).transpose(1, 2)


def kb(sizes: Sizes) -> Iterator[Row]:
    """The presets where all keys of a head share a bias of standard deviation 3 a channel."""
    for head in range(sizes.heads):
        problem = Problem.of(sizes, "k_bias", sizes.short, sizes.queries, head)
        yield problem.of_bf16()
        for name in ("fa3", "fa3_paper", "causal_safe", "default", "accurate"):
            yield problem.of_recipe(name, getattr(Fp8Recipe, name)())
        yield problem.of_recipe("default, e4m3 Q and K", replace(DEFAULT, qk_dtype="e4m3"))
        yield problem.of_recipe("default, exact exponentials", EXACT)
        finer = replace(Fp8Recipe.accurate(), k_granularity="token")
        yield problem.of_recipe("accurate, a scale a key", finer)


def e2(sizes: Sizes) -> Iterator[Row]:
    """Element types of Q and K, on three kinds of inputs (V and P are always e4m3)."""
    for head in range(sizes.heads):
        for kind in ("normal", "outliers", "qk_bias"):
            problem = Problem.of(sizes, kind, sizes.short, sizes.queries, head)
            yield problem.of_bf16(qk="bf16", pv="bf16")
            for rotation in ("none", "hadamard"):
                for qk in ("int8", "e4m3"):
                    recipe = replace(EXACT, qk_dtype=qk, rotation=rotation)
                    name = f"{qk}, {'rotated' if rotation == 'hadamard' else 'not rotated'}"
                    yield problem.of_recipe(name, recipe, qk=qk, pv="e4m3", rotation=rotation)


def e3(sizes: Sizes) -> Iterator[Row]:
    """Granularity of scales, smoothing and rotation, and which tokens statistics take."""
    plain = replace(EXACT, rotation="none", smooth_k=False, smooth_v=False, compensate_v=False)
    smoothing = {
        "none": plain,
        "rotation": replace(plain, rotation="hadamard"),
        "smooth K": replace(plain, smooth_k=True),
        "smooth Q": replace(plain, smooth_q=True),
        "smooth Q and K": replace(plain, smooth_q=True, smooth_k=True),
        "rotation, smooth K": replace(plain, rotation="hadamard", smooth_k=True),
        "rotation, smooth Q and K": replace(plain, rotation="hadamard", smooth_q=True, smooth_k=True),
    }
    for head in range(sizes.heads):
        for kind in ("k_bias", "qk_bias", "outliers"):
            problem = Problem.of(sizes, kind, sizes.short, sizes.queries, head)
            for qk in ("int8", "e4m3"):
                for name, recipe in smoothing.items():
                    yield problem.of_recipe(name, replace(recipe, qk_dtype=qk), grid="smoothing", qk=qk)
                for name in ("tensor", "head", "block", "token"):
                    recipe = replace(EXACT, qk_dtype=qk, q_granularity=name, k_granularity=name)
                    yield problem.of_recipe(name, recipe, grid="granularity of Q and K", qk=qk)
            for name in ("none", "tensor", "head", "channel"):
                yield problem.of_recipe(
                    name, replace(EXACT, v_granularity=name), grid="granularity of V", qk="int8"
                )
            for name, sample in (("all", False), ("a sample", True)):
                recipe = replace(EXACT, sample_stats=sample)
                yield problem.of_recipe(name, recipe, grid="tokens that statistics take", qk="int8")
        for v_mean in (0.0, 1.0):
            problem = Problem.of(sizes, "normal", sizes.short, sizes.queries, head, v_mean)
            for smooth, compensate in ((False, False), (True, False), (False, True), (True, True)):
                name = f"smooth {'on' if smooth else 'off'}, compensate {'on' if compensate else 'off'}"
                recipe = replace(EXACT, smooth_v=smooth, compensate_v=compensate)
                yield problem.of_recipe(name, recipe, grid=f"V of mean {v_mean:g}", qk="int8")


ACCUMULATIONS = {"every block": 1, "every 4": 4, "every 64": 64, "raw": 0}
_ALL_VARIANTS = 2**18  # keys, above which e4 leaves out most of what only the emulator runs


def e4(sizes: Sizes) -> Iterator[Row]:
    """Long contexts: 64 rows of queries, the mean of V, how often the accumulator is flushed."""
    for keys in sizes.long:
        for v_mean in (0.0, 0.1, 1.0):
            for head in range(sizes.heads if keys <= 8192 else 1):
                problem = Problem.of(sizes, "normal", keys, 64, head, v_mean)
                more = {"v_mean": v_mean, "smooth_v": "", "row_sum": "", "accumulation": ""}
                yield problem.of_bf16(**more)
                yield problem.of_recipe("default", DEFAULT, **more)
                yield problem.of_recipe("fa3", Fp8Recipe.fa3(), **more)
                if keys > _ALL_VARIANTS and v_mean < 1:
                    continue
                for smooth in (False, True):
                    recipe = replace(EXACT, smooth_v=smooth, compensate_v=smooth)
                    qkv = problem.quantize(recipe)
                    for name, accumulation in ACCUMULATIONS.items():
                        for row_sum in ("product", "fp32") if keys <= _ALL_VARIANTS else ("product",):
                            # NOTE: what is quantised does not depend on these two.
                            summed = replace(recipe, accumulation=accumulation, row_sum=row_sum)
                            more = {"v_mean": v_mean, "smooth_v": smooth, "row_sum": row_sum}
                            variant = f"{name}, {row_sum}, smooth V {'on' if smooth else 'off'}"
                            yield problem.of_recipe(
                                variant, summed, replace(qkv, recipe=summed), **more, accumulation=name
                            )


# (p_offset, rescale_threshold, linear_exp2)
P_RANGES = [
    (x, y, False) for x, y in ((0, 0), (4, 0), (4, 4), (6, 0), (6, 2.8), (8, 0), (8, 0.8), (8.807, 0))
]
P_RANGES += [(6, 2.8, True), (8, 0.8, True)]


def e5(sizes: Sizes) -> Iterator[Row]:
    """Attention sinks: four keys whose scores exceed the others by `excess`, seen first or last."""
    for head in range(sizes.heads):
        for excess in (0, 4, 6, 8, 10, 12, 14):
            for seen in ("first", "last"):
                q, k, v = study_inputs(
                    "normal", 128, sizes.short, device=sizes.device, seed=sizes.seed + head
                )
                # One direction that all queries share, at which only the sinks point. Key blocks go from the
                # last to the first.
                at = slice(-4, None) if seen == "first" else slice(0, 4)
                q[..., 0], k[..., 0] = 4.0, 0.0
                k[:, at, :, 0] = excess * math.sqrt(q.shape[-1]) / 4
                v[:, at] *= 0.1
                facts = {"inputs": "sinks", "seed": sizes.seed + head, "excess": excess, "seen": seen}
                problem = Problem(sizes, q, k, v, **facts)
                qkv = problem.quantize(EXACT)
                for offset, threshold, linear in P_RANGES:
                    recipe = replace(
                        EXACT,
                        p_offset=float(offset),
                        rescale_threshold=float(threshold),
                        linear_exp2=linear,
                    )
                    variant = f"offset {offset:g}, threshold {threshold}"
                    variant += ", by code" if linear else ""
                    row = problem.of_recipe(variant, recipe, replace(qkv, recipe=recipe))
                    row |= {"p_offset": float(offset), "rescale_threshold": float(threshold)}
                    row["zero_share"] = zero_share(qkv, recipe, at)
                    predictable = excess and threshold == 0 and not linear
                    predicted = p_cast_share(excess, offset) if predictable else None
                    yield row | {"predicted_zero_share": predicted if seen == "first" else None}


def zero_share(qkv: QuantizedQKV, recipe: Fp8Recipe, sinks: slice) -> float:
    """Share of P, the sinks' aside, that e4m3 rounds to 0. One head; key blocks last to first."""
    q, k, _ = (t[0, :, 0] for t in qkv.dequantize())
    scores = q @ k.T * (qkv.head_dim**-0.5 * math.log2(math.e))  # (rows, keys), log2
    counted = torch.ones(k.shape[0], dtype=torch.bool, device=k.device)
    counted[sinks] = False
    maximum = scores.new_full(scores.shape[:1], float("-inf"))
    # Half of the smallest number, or of the smallest code.
    offset, threshold = recipe.p_range(qkv.head_dim)
    smallest = (0.5 + EXP2_LINEAR_MEAN) / 8 - 7 if recipe.has_linear_exp2(qkv.head_dim) else -10
    zeros = 0
    for start in reversed(range(0, k.shape[0], K_BLOCK)):
        block = scores[:, start : start + K_BLOCK]
        largest = torch.maximum(maximum, block.amax(1))
        maximum = torch.where(largest - maximum > threshold, largest, maximum)
        log2_p = block - maximum[:, None] + offset
        zeros += (log2_p <= smallest)[:, counted[start : start + K_BLOCK]].sum().item()
    return zeros / (scores.shape[0] * int(counted.sum()))
