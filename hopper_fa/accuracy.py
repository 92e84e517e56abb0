"""Inputs that tell numerics apart, and the study of forward accuracy that runs on any machine."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hopper_fa.arguments import as_flag, as_float, as_int, as_sizes, as_text, check_attention, check_instance
from hopper_fa.attention import flash_attn_func
from hopper_fa.metrics import error_metrics
from hopper_fa.reference import attention_reference

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
DISTRIBUTIONS = ("normal", "outliers", "v_ones", "k_offset", "one_hot")


def random_qkv(
    batch: int,
    seqlen_q: int,
    seqlen_k: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    distribution: str = "normal",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random q (batch, seqlen_q, heads_q, head_dim) and k, v (batch, seqlen_k, heads_kv, head_dim).

    Args:
        distribution: one of DISTRIBUTIONS.
            normal: N(0, 1).
            outliers: N(0, 1) + N(0, 100) * Bernoulli(0.001), as in the FlashAttention-3 paper.
            v_ones: V = 1, so that the exact output is 1 and any error is that of the normalisation.
            k_offset: N(0, 1), with one vector of N(0, 8**2) added to every key: softmax must cancel it.
            one_hot: row i is aligned with key i mod seqlen_k so strongly that its softmax is nearly one-hot.
        seed: of the generator; the same seed gives the same tensors on a given kind of device.

    Raises:
        TypeError: an argument is of another type.
        ValueError: unknown distribution, a negative size, or heads that do not fit.
    """
    batch, seqlen_q, seqlen_k = as_sizes(batch=batch, seqlen_q=seqlen_q, seqlen_k=seqlen_k)
    heads_q, heads_kv, head_dim = as_sizes(heads_q=heads_q, heads_kv=heads_kv, head_dim=head_dim)
    if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv:
        raise ValueError(
            f"heads_q is {heads_q} and heads_kv {heads_kv}; heads_q must be a positive multiple of heads_kv; "
            "pass others."
        )
    check_instance("dtype", dtype, torch.dtype, "pass torch.bfloat16, say")
    check_instance("device", device, (str, torch.device), 'pass "cpu" or "cuda", say')
    as_text("distribution", distribution, DISTRIBUTIONS)
    generator = torch.Generator(device).manual_seed(as_int("seed", seed))

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=device)

    def draw(*shape: int) -> torch.Tensor:
        x = normal(*shape)
        if distribution == "outliers":
            chance = torch.rand(shape, generator=generator, dtype=torch.float32, device=device)
            x += 10 * normal(*shape) * (chance < 0.001)
        return x

    q = draw(batch, seqlen_q, heads_q, head_dim)
    k = draw(batch, seqlen_k, heads_kv, head_dim)
    v = draw(batch, seqlen_k, heads_kv, head_dim)
    if distribution == "v_ones":
        v.fill_(1.0)
    elif distribution == "k_offset":
        k += 8 * normal(1, 1, heads_kv, head_dim)
    elif distribution == "one_hot" and seqlen_k > 0:
        key = torch.arange(seqlen_q, dtype=torch.int64, device=device) % seqlen_k
        aligned = k[:, key].repeat_interleave(heads_q // heads_kv, 2)
        q = 16 * aligned * (head_dim**-0.5)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def unfused_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> torch.Tensor:
    """Standard attention of torch operations, every intermediate rounded to the inputs' own dtype.

    The yardstick of FlashAttention's rule: a fused kernel passes if its error against float64 is at most
    twice this one's. Arguments as in `flash_attn_func`, of any floating-point dtype; heads_q must be a
    multiple of heads_kv.

    Raises:
        TypeError, ValueError: as `attention_reference`.
    """
    check_attention(q, k, v)
    softmax_scale, causal = as_float("softmax_scale", softmax_scale, optional=True), as_flag("causal", causal)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    group = q.shape[2] // k.shape[2]
    q, k, v = (t.transpose(1, 2) for t in (q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)))
    scores = (q @ k.transpose(-1, -2)) * scale  # (batch, heads_q, seqlen_q, seqlen_k)
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        hidden = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=q.device).triu(
            seqlen_k - seqlen_q + 1
        )
        scores = scores.masked_fill(hidden, float("-inf"))
    # A row without keys is all NaN after softmax; attention defines it as 0.
    probs = scores.softmax(-1).nan_to_num(0.0)
    return (probs @ v).transpose(1, 2)


def _sdpa_math(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        return scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def implementations(device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """What the study compares on `device`: name -> function of (q, k, v, causal)."""
    table: dict[str, Callable[..., torch.Tensor]] = {
        "hopper_fa emulator": lambda q, k, v, causal: flash_attn_func(
            q, k, v, causal=causal, backend="emulator"
        ),
        "torch SDPA math": _sdpa_math,
        "torch unfused": lambda q, k, v, causal: unfused_attention(q, k, v, causal=causal),
    }
    if device.type == "cuda":
        kernel = {
            "hopper_fa kernel": lambda q, k, v, causal: flash_attn_func(
                q, k, v, causal=causal, backend="cuda"
            )
        }
        table = kernel | table
    return table


def forward_accuracy(
    seqlens: Sequence[int] = (128, 512, 2048),
    distributions: Sequence[str] = DISTRIBUTIONS,
    *,
    heads: int = 1,
    head_dim: int = 128,
    causal: bool = False,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """Errors of BF16 and FP16 attention against float64 of the same rounded inputs.

    Args:
        seqlens: of queries and of keys. distributions: names out of DISTRIBUTIONS.
        device: where everything is computed; on a Hopper GPU the kernel itself is compared too.

    Yields:
        One row a (distribution, seqlen, dtype, implementation): those four, `seconds`, and `error_metrics`.
    """
    device = torch.device(device)
    for distribution in distributions:
        for seqlen in seqlens:
            for name, dtype in DTYPES.items():
                q, k, v = random_qkv(
                    1, seqlen, seqlen, heads, heads, head_dim,
                    dtype=dtype, device=device, distribution=distribution, seed=seed,
                )  # fmt: skip
                ref, _ = attention_reference(q, k, v, causal=causal)
                for implementation, attention in implementations(device).items():
                    start = time.perf_counter()
                    errors = error_metrics(attention(q, k, v, causal), ref)
                    yield {
                        "distribution": distribution,
                        "seqlen": seqlen,
                        "dtype": name,
                        "implementation": implementation,
                        "seconds": time.perf_counter() - start,
                        **errors,
                    }


def table_header() -> str:
    """The line above the lines of `table_line`."""
    names = f"{'inputs':<9} {'S':>6} {'dtype':<5} {'implementation':<19}"
    return f"{names} {'max abs':>9} {'RMSE':>9} {'rel. L2':>9} {'1 - cosine':>10}"


def table_line(row: dict[str, Any]) -> str:
    """One row of `forward_accuracy` as text."""
    names = f"{row['distribution']:<9} {row['seqlen']:>6} {row['dtype']:<5} {row['implementation']:<19}"
    errors = (
        f"{row['max_abs']:>9.2e} {row['rmse']:>9.2e} {row['relative_l2']:>9.2e} {1 - row['cosine']:>10.1e}"
    )
    return f"{names} {errors}"


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Relative L2 error over sequence length, one panel a distribution.

    Args:
        rows: of `forward_accuracy`.
        path: of the image to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    distributions = list(dict.fromkeys(row["distribution"] for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    floor = 1e-7  # where an error of exactly 0 is drawn
    figure = Figure(figsize=(3.2 * len(distributions), 3.8), layout="constrained")
    axes = figure.subplots(1, len(distributions), sharey=True, squeeze=False)[0]
    for axis, distribution in zip(axes, distributions, strict=True):
        for index, name in enumerate(names):
            for dtype, style in zip(DTYPES, ("o-", "s--"), strict=True):
                points = [
                    (row["seqlen"], max(row["relative_l2"], floor))
                    for row in rows
                    if (row["distribution"], row["implementation"], row["dtype"])
                    == (distribution, name, dtype)
                ]
                axis.plot(
                    *zip(*points, strict=True),
                    style,
                    color=f"C{index}",
                    label=f"{name}, {dtype}",
                    markersize=4,
                )
        axis.set(title=distribution, xlabel="sequence length", yscale="log")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"relative L2 error (at least {floor:g})")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(names), fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
