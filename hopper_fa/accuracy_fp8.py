"""The study of FP8 accuracy that runs on any machine: recipes beside published values and targets.

Errors are against float64 attention of the inputs before they are rounded to BF16, because that is what the
published ones are against.
"""

import contextlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hopper_fa.accuracy import random_qkv
from hopper_fa.arguments import as_text
from hopper_fa.attention import flash_attn_func, flash_attn_quantized_func, quantize_qkv
from hopper_fa.emulator_fp8 import attention_fp8_emulated
from hopper_fa.metrics import error_metrics
from hopper_fa.quantization import QuantizedQKV
from hopper_fa.recipe import Fp8Recipe
from hopper_fa.reference import attention_reference

_SCORES_AT_ONCE = 1 << 26  # of the float64 reference, 8 bytes each and a few copies

RECIPES: dict[str, Callable[[], Fp8Recipe]] = {
    "fa3": Fp8Recipe.fa3,
    "fa3_paper": Fp8Recipe.fa3_paper,
    "causal_safe": Fp8Recipe.causal_safe,
    "default": Fp8Recipe.default,
    "accurate": Fp8Recipe.accurate,
}
BF16 = "BF16"  # what the row of the forward without a recipe is called


@dataclass(frozen=True)
class Setup:
    """One kind of inputs of the study. head_dim 128, full mask.

    Attributes:
        text: what the inputs are. metric: the error that is compared and drawn.
        keys, queries: of a head. Fewer queries than keys leave every row's error as it is.
        beside: {recipe: (value of metric, who has it)}; "paper" is FlashAttention-3's Table 3 (arXiv
            2407.08608), "H200" what FlashAttention-3's own kernel gave on one.
        targets: {recipe: the most that metric may be}.
        bias_target: the most that |relative_bias| of the default recipe may be.
    """

    text: str
    metric: str
    keys: int
    queries: int
    beside: dict[str, tuple[float, str]]
    targets: dict[str, float]
    bias_target: float | None = None


SETUPS = {
    "outliers": Setup(
        "Q, K, V ~ N(0, 1) + N(0, 100) * Bernoulli(0.001)",
        "rmse",
        8192,
        512,
        {BF16: (1.6e-3, "H200"), "fa3": (2.45e-2, "H200"), "fa3_paper": (9.1e-3, "paper")},
        {"default": 9.2e-3, "accurate": 7e-3},
    ),
    "k_bias": Setup(
        "N(0, 1), one N(0, 3**2) vector added to every key",
        "relative_l2",
        4096,
        256,
        {BF16: (6.2e-3, "H200"), "fa3": (9.6e-2, "H200")},
        {"default": 5.3e-2, "accurate": 3.5e-2},
    ),
    "long": Setup(
        "N(0, 1), 128k keys, mean of V 1",
        "relative_l2",
        131072,
        64,
        {BF16: (1.9e-3, "H200"), "fa3": (5.73e-1, "H200")},
        {"default": 2.8e-3},
        bias_target=1e-3,
    ),
}
METRIC_NAMES = {"rmse": "RMSE", "relative_l2": "relative L2"}


def study_inputs(
    kind: str,
    queries: int,
    keys: int,
    heads: int = 1,
    *,
    v_mean: float = 0.0,
    head_dim: int = 128,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unrounded float32 q (1, queries, heads, head_dim) and k, v (1, keys, heads, head_dim).

    Args:
        kind: "normal", "outliers" (see `random_qkv`), "k_bias" (N(0, 1), a vector of N(0, 3**2) added to all
            keys of a head), "qk_bias" (to all queries another one too) or "long" (normal, v_mean 1).
        v_mean: added to V.

    Raises:
        TypeError, ValueError: unknown kind; see `random_qkv`.
    """
    as_text("kind", kind, ("normal", "outliers", "k_bias", "qk_bias", "long"))
    q, k, v = random_qkv(
        1, queries, keys, heads, heads, head_dim,
        dtype=torch.float32, device=device, distribution=kind if kind == "outliers" else "normal", seed=seed,
    )  # fmt: skip
    generator = torch.Generator(device).manual_seed(seed + 2**31)
    for t, biased in ((k, kind in ("k_bias", "qk_bias")), (q, kind == "qk_bias")):
        if biased:
            size = (1, 1, heads, head_dim)
            t += 3 * torch.randn(size, generator=generator, dtype=torch.float32, device=device)
    v += 1.0 if kind == "long" else v_mean
    return q, k, v


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`attention_reference` without mask, a bounded number of rows at a time."""
    rows = max(1, _SCORES_AT_ONCE // max(1, k.shape[1] * q.shape[2]))
    k, v = k.double(), v.double()
    outs, lses = zip(*(attention_reference(part, k, v) for part in q.split(rows, 1)), strict=True)
    return torch.cat(outs, 1), torch.cat(lses, 2)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch computes on one thread inside.

    NOTE: the tensor core's model is a long chain of small operations. A second thread hardly helps there (60
    s for the study instead of 76 s), and where the cores are shared its waiting multiplies the time (505 s).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def implementation(device: str | torch.device) -> str:
    """What runs FP8 attention on `device`: "kernel" on a Hopper GPU whose build holds it, else "emulator"."""
    x = torch.zeros(1, 64, 1, 128, dtype=torch.bfloat16, device=device)
    try:
        flash_attn_func(x, x, x, recipe=Fp8Recipe.default(), backend="cuda")
    except RuntimeError:
        return "emulator"
    return "kernel"


def quantize(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recipe: Fp8Recipe, runs_on: str
) -> QuantizedQKV:
    """Quantised tensors for `attend`, by the kernels or by torch operations.

    Args:
        runs_on: from `implementation`.
    """
    return quantize_qkv(q, k, v, recipe, backend="cuda" if runs_on == "kernel" else "emulator")


def attend(qkv: QuantizedQKV, runs_on: str, causal: bool = False) -> tuple[torch.Tensor, torch.Tensor, str]:
    """FP8 attention over quantised tensors: out in BF16, lse, and what ran it.

    Args:
        runs_on: from `implementation`. What the kernel does not run goes to the emulator, with a warning.
    """
    if runs_on == "kernel":
        try:
            out, lse = flash_attn_quantized_func(qkv, causal=causal, return_lse=True, backend="cuda")
            return out, lse, runs_on
        except RuntimeError as error:
            warnings.warn(f"the emulator runs what the kernel did not: {error}", stacklevel=2)
    return *attention_fp8_emulated(qkv, causal=causal), "emulator"


def forward_16bit(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor, str]:
    """The 16-bit forward: out, lse, and what ran it: "kernel" on a GPU, "emulator" elsewhere."""
    on_gpu = q.device.type == "cuda" and torch.cuda.get_device_capability(q.device) == (9, 0)
    backend = "cuda" if on_gpu else "emulator"
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True, backend=backend)
    return out, lse, "kernel" if on_gpu else "emulator"


def fp8_accuracy(
    inputs: Sequence[str] = tuple(SETUPS),
    *,
    heads: int = 4,
    keys: int | None = None,
    queries: int | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """The study: every recipe of RECIPES, and BF16, on every kind of inputs.

    Args:
        inputs: names out of SETUPS. heads: of one tensor; "long" has one.
        keys, queries: in place of the setup's own; published values and targets hold for those.

    Yields:
        One row a (inputs, attention): those, the sizes, `error_metrics` of the output, `lse_max_abs`, what
        stands `beside` it and `by` whom, its `target` and whether it is `met` (None without), `seconds`.
    """
    for name in inputs:
        as_text("inputs", name, tuple(SETUPS))
    runs_on = implementation(device)
    for name in inputs:
        setup = SETUPS[name]
        sizes = {
            "queries": queries or setup.queries,
            "keys": keys or setup.keys,
            "heads": 1 if name == "long" else heads,
        }
        exact = study_inputs(name, **sizes, device=device, seed=seed)
        ref, ref_lse = reference(*exact)
        rounded = [t.bfloat16() for t in exact]
        for attention in (BF16, *RECIPES):
            start = time.perf_counter()
            if attention == BF16:
                out, lse, ran_on = forward_16bit(*rounded)
            else:
                out, lse, ran_on = attend(quantize(*rounded, RECIPES[attention](), runs_on), runs_on)
            errors = error_metrics(out, ref)
            beside, by = setup.beside.get(attention, (None, None))
            yield {
                "inputs": name,
                **sizes,
                "attention": attention,
                "implementation": ran_on,
                **errors,
                "lse_max_abs": (lse.double() - ref_lse).abs().max().item(),
                "metric": setup.metric,
                "beside": beside,
                "by": by,
                "target": setup.targets.get(attention),
                "met": _met(setup, attention, errors),
                "seconds": time.perf_counter() - start,
            }


def _met(setup: Setup, attention: str, errors: dict[str, float]) -> bool | None:
    if attention not in setup.targets:
        return None
    small = errors[setup.metric] <= setup.targets[attention]
    return small and (setup.bias_target is None or abs(errors["relative_bias"]) <= setup.bias_target)


def legend() -> str:
    """What the table's columns mean."""
    lines = [f"  {name:<9} {setup.text}" for name, setup in SETUPS.items()]
    return "\n".join(
        (
            "Output of attention against float64, head dim 128, full mask.",
            "inputs",
            *lines,
            "attention  BF16, and FP8 by recipe: fa3 is what FlashAttention-3 ships, fa3_paper what its",
            "           paper describes, the others are this project's (hopper_fa/recipe.py)",
            "rel. L2    |error| / |output|",
            "bias       mean error in the direction of the output, over its mean magnitude; negative: shrunk",
            "row p99    rel. L2 that 1% of the rows exceed",
            "LSE        largest error of a row's log-sum-exp",
            "beside     the same metric in the FlashAttention-3 paper's Table 3, or by its kernel on an H200",
            "target     what this project asks of itself",
        )
    )


def table_header() -> str:
    """The line above the lines of `table_line`."""
    names = f"{'inputs':<9} {'keys':>6} {'attention':<11} {'run by':<8}"
    errors = f"{'RMSE':>8} {'rel. L2':>8} {'1 - cos':>8} {'bias':>8} {'row p99':>8} {'LSE':>8}"
    return f"{names} {errors}  {'beside':<24} target"


def table_line(row: dict[str, Any]) -> str:
    """One row of `fp8_accuracy` as text."""
    names = f"{row['inputs']:<9} {row['keys']:>6} {row['attention']:<11} {row['implementation']:<8}"
    errors = (
        f"{row['rmse']:>8.1e} {row['relative_l2']:>8.1e} {1 - row['cosine']:>8.0e} "
        f"{row['relative_bias']:>+8.0e} {row['row_p99']:>8.1e} {row['lse_max_abs']:>8.1e}"
    )
    metric = METRIC_NAMES[row["metric"]].replace("relative", "rel.")
    beside = f"{metric} {row['beside']:.1e} {row['by']}" if row["beside"] else ""
    target = f"{metric} {row['target']:.1e} {'met' if row['met'] else 'missed'}" if row["target"] else ""
    return f"{names} {errors}  {beside:<24} {target}".rstrip()


def plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Bars of each setup's metric, one panel a kind of inputs, with published values and targets as marks.

    Args:
        rows: of `fp8_accuracy`.
        path: of the image to write.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    kinds = list(dict.fromkeys(row["inputs"] for row in rows))
    figure = Figure(figsize=(1.0 + 3.6 * len(kinds), 4.2), layout="constrained")
    marks = {
        "beside": {"marker": "D", "color": "#2e6f95", "label": "FlashAttention-3: paper, or on an H200"},
        "target": {"marker": "_", "color": "black", "s": 500, "label": "target"},
    }
    for axis, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        of_kind = [row for row in rows if row["inputs"] == kind]
        values = [row[row["metric"]] for row in of_kind]
        colors = [
            "#9aa5b1" if row["attention"] in (BF16, "fa3", "fa3_paper") else "#d1495b" for row in of_kind
        ]
        bars = axis.bar(range(len(values)), values, color=colors)
        axis.bar_label(bars, fmt="%.1e", fontsize=7, label_type="center", color="white")
        for name, style in marks.items():
            points = [(x, row[name]) for x, row in enumerate(of_kind) if row[name]]
            if points:
                axis.scatter(*zip(*points, strict=True), zorder=3, **style)
        axis.set_xticks(range(len(values)), [row["attention"] for row in of_kind], rotation=35, ha="right")
        axis.set(yscale="log", title=kind, ylabel=f"{METRIC_NAMES[of_kind[0]['metric']]} error")
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
