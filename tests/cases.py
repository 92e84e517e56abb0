"""What the CPU and the GPU tests share: shapes, FlashAttention's acceptance rule, NaN poison."""

from dataclasses import dataclass, replace

import torch

from hopper_fa.accuracy import DTYPES as DTYPES
from hopper_fa.accuracy import random_qkv, unfused_attention
from hopper_fa.metrics import error_metrics
from hopper_fa.quantization import QuantizedQKV
from hopper_fa.recipe import Fp8Recipe
from hopper_fa.reference import attention_reference

# Lengths that divide no tile, next to one key, and one more than many tiles.
ODD_SEQLENS = (1, 113, 239, 799, 1023)
LONG_SEQLENS = (4224,)

# Instances are built for 64, 128 and 256; every other multiple of 8 is zero-padded by the loads.
INSTANCE_HEAD_DIMS = (64, 128, 256)
PADDED_HEAD_DIMS = (8, 40, 72, 96, 112, 160, 192, 248)
HEAD_DIMS = tuple(sorted(INSTANCE_HEAD_DIMS + PADDED_HEAD_DIMS))

FP8_PRESETS = {
    "default": Fp8Recipe.default(),
    "accurate": Fp8Recipe.accurate(),
    "causal_safe": Fp8Recipe.causal_safe(),
    "fa3": Fp8Recipe.fa3(),
    "fa3_paper": Fp8Recipe.fa3_paper(),
}


@dataclass(frozen=True)
class Case:
    """One attention problem; `str(case)` is its pytest id."""

    batch: int = 1
    heads_q: int = 2
    heads_kv: int = 2
    seqlen_q: int = 113
    seqlen_k: int = 113
    head_dim: int = 64
    causal: bool = False
    softmax_scale: float | None = None

    def __str__(self) -> str:
        mask = "causal" if self.causal else "full"
        scale = "" if self.softmax_scale is None else f"-scale{self.softmax_scale:g}"
        return (
            f"b{self.batch}-h{self.heads_q}:{self.heads_kv}-s{self.seqlen_q}:{self.seqlen_k}"
            f"-d{self.head_dim}-{mask}{scale}"
        )

    def qkv(
        self, dtype: torch.dtype, seed: int, device: str | torch.device = "cpu", distribution: str = "normal"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Contiguous random q, k, v of the case; see `hopper_fa.accuracy.random_qkv`."""
        return random_qkv(
            self.batch,
            self.seqlen_q,
            self.seqlen_k,
            self.heads_q,
            self.heads_kv,
            self.head_dim,
            dtype=dtype,
            device=device,
            distribution=distribution,
            seed=seed,
        )


def _both_masks(cases: list[Case]) -> list[Case]:
    return [replace(case, causal=causal) for case in cases for causal in (False, True)]


# Every head dim at one odd shape.
HEAD_DIM_CASES = _both_masks([Case(seqlen_q=113, seqlen_k=239, head_dim=d) for d in HEAD_DIMS])
# Every odd length, square, and against a shorter and a longer key sequence; causal rows with no key among
# them.
SEQLEN_CASES = _both_masks(
    [Case(seqlen_q=s, seqlen_k=s) for s in ODD_SEQLENS]
    + [Case(seqlen_q=1, seqlen_k=799), Case(seqlen_q=113, seqlen_k=1023), Case(seqlen_q=239, seqlen_k=128)]
    + [Case(seqlen_q=799, seqlen_k=113), Case(seqlen_q=1023, seqlen_k=1), Case(seqlen_q=64, seqlen_k=64)]
    + [Case(seqlen_q=113, seqlen_k=0), Case(seqlen_q=192, seqlen_k=256, head_dim=128)]
)
# Several batch entries; one, several and all query heads to a key/value head.
GQA_CASES = _both_masks(
    [
        Case(batch=2, heads_q=6, heads_kv=6, seqlen_q=113, seqlen_k=239),
        Case(batch=2, heads_q=6, heads_kv=2, seqlen_q=113, seqlen_k=239, head_dim=128),
        Case(batch=3, heads_q=5, heads_kv=1, seqlen_q=239, seqlen_k=113),
    ]
)
SCALE_CASES = _both_masks(
    [Case(seqlen_q=239, seqlen_k=239, softmax_scale=s) for s in (1.0, -0.125, 0.0, 1e-30)]
)
ALL_CASES = HEAD_DIM_CASES + SEQLEN_CASES + GQA_CASES + SCALE_CASES


def assert_accurate(
    out: torch.Tensor,
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> None:
    """FlashAttention's rule: against float64, at most twice the error of `unfused_attention`.

    Applied to the largest and to the root-mean-square error, where one unit in the last place of the largest
    output is granted besides, for the final rounding; and to the relative L2 error, where that rounding costs
    0.2 eps if everything before it is exact. LSE must agree to 1e-3, and be -inf exactly where no key is
    visible.
    """
    ref_out, ref_lse = attention_reference(q, k, v, softmax_scale, causal)
    yardstick = error_metrics(unfused_attention(q, k, v, softmax_scale, causal), ref_out)
    ours = error_metrics(out, ref_out)
    eps = torch.finfo(q.dtype).eps
    last_place = eps * (ref_out.abs().max().item() if ref_out.numel() else 0.0)
    assert out.dtype == q.dtype and out.shape == q.shape
    assert out.isfinite().all(), "out holds NaN or inf"
    for metric, rounding in (("max_abs", last_place), ("rmse", last_place), ("relative_l2", 0.3 * eps)):
        allowed = 2 * yardstick[metric] + rounding
        assert ours[metric] <= allowed, f"{metric} {ours[metric]:.3e} exceeds {allowed:.3e} ({yardstick=})"
    assert lse.dtype == torch.float32 and lse.shape == ref_lse.shape
    torch.testing.assert_close(lse.double(), ref_lse, atol=1e-3, rtol=1e-6)


def recipe_row_sums(
    qkv: QuantizedQKV, lse: torch.Tensor, softmax_scale: float, causal: bool = False
) -> torch.Tensor:
    """What P of the backward sums to in every row: exact scores of the codes with the forward's LSE.

    (batch, heads_q, seqlen_q) float64.
    """
    q, k, _ = (t.double() for t in qkv.dequantize())
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = softmax_scale * torch.einsum("bshd,bthd->bhst", q, k)
    if qkv.key_bias is not None:
        scores = scores + softmax_scale * qkv.key_bias[:, :, None]
    if causal:
        rows, keys = scores.shape[-2:]
        row = torch.arange(rows, device=q.device)[:, None]
        hidden = torch.arange(keys, device=q.device) > row + keys - rows
        scores = scores.masked_fill(hidden, float("-inf"))
    shift = 0.0 if qkv.lse_shift is None else softmax_scale * qkv.lse_shift.double()
    return (scores - (lse.double() - shift)[..., None]).exp().sum(-1)


def random_gradients(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal gradients of out, as q, and of lse, from torch's own generator of q's device."""
    batch, seqlen_q, heads_q, _ = q.shape
    dlse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.randn_like(q), torch.randn((batch, heads_q, seqlen_q), dtype=dlse_dtype, device=q.device)


def gradients_float64(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv by autograd through `attention_reference`."""
    leaves = [t.detach().double().requires_grad_() for t in (q, k, v)]
    out, lse = attention_reference(*leaves, softmax_scale, causal)
    dlse = torch.zeros_like(lse) if dlse is None else dlse.double()
    return torch.autograd.grad((out, lse), leaves, (dout.double(), dlse))


def unfused_gradients(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, ...]:
    """dq, dk, dv of `unfused_attention`: torch's autograd with every intermediate in the inputs' own dtype.

    That of dlse is added in float64: unfused attention has no LSE, and the yardstick only gets better.
    """
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out = unfused_attention(*leaves, softmax_scale, causal)
    gradients = torch.autograd.grad(out, leaves, dout)
    if dlse is None:
        return gradients
    extra = gradients_float64(torch.zeros_like(dout), dlse, q, k, v, softmax_scale, causal)
    return tuple((a + b).to(a.dtype) for a, b in zip(gradients, extra, strict=True))


def assert_gradients_accurate(
    gradients: tuple[torch.Tensor, ...], problem: tuple, distribution: str = "normal"
) -> None:
    """FlashAttention's rule on dq, dk and dv: at most twice the error of `unfused_gradients` against float64.

    Applied to the largest and to the root-mean-square error. Granted besides: the final rounding; and, for
    gradients that cancel to nothing, as a row's with one key do, a hundredth of that of the largest dout, and
    FP32's noise in a sum of as many terms.

    Args:
        gradients: dq, dk, dv. problem: (dout, dlse, q, k, v, softmax_scale, causal).
        distribution: of the inputs.
    """
    # NOTE: where P is nearly one-hot, dP - rowsum(dO * O) cancels but for the rounding of O, which the
    # yardstick does not use: the largest of a million errors came to 1.1 times the rule's in 1 of 14 runs. An
    # offset of all keys multiplies what is left of it in dQ: 1.4 times in 1 of 6 runs.
    of_largest = 4 if distribution in ("one_hot", "k_offset") else 2
    dout, _, *tensors = problem
    eps = torch.finfo(dout.dtype).eps
    terms = max(dout.shape[1], tensors[1].shape[1])
    cancelled = (0.01 * eps + 2**-21 * terms**0.5) * dout.abs().max().item() if dout.numel() else 0.0
    wanted = gradients_float64(*problem)
    yardsticks = unfused_gradients(*problem)
    for name, t, got, yardstick, want in zip("qkv", tensors, gradients, yardsticks, wanted, strict=False):
        assert got.dtype == t.dtype and got.shape == t.shape
        assert got.isfinite().all(), f"d{name} holds NaN or inf"
        if want.numel() == 0:
            continue
        ours, theirs = error_metrics(got, want), error_metrics(yardstick, want)
        for metric, factor, rounding in (
            ("max_abs", of_largest, eps * want.abs().max().item()),
            ("rmse", 2, 0.3 * eps * want.square().mean().sqrt().item()),
        ):
            allowed = factor * theirs[metric] + rounding + cancelled
            assert ours[metric] <= allowed, (
                f"d{name}: {metric} {ours[metric]:.3e} exceeds {allowed:.3e} ({theirs=})"
            )


def in_nan(t: torch.Tensor) -> torch.Tensor:
    """A strided copy of `t` (4 dimensions, last one contiguous) whose neighbours in memory are all NaN.

    One extra batch entry, row and head on either side, and 8 elements after the last dimension: strides stay
    multiples of 8 elements and the pointer stays 16-byte aligned.
    """
    batch, rows, heads, dim = t.shape
    whole = torch.full(
        (batch + 2, rows + 2, heads + 2, dim + 8), float("nan"), dtype=t.dtype, device=t.device
    )
    view = whole[1:-1, 1:-1, 1:-1, :dim]
    view.copy_(t)
    return view


def nan_outputs(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """NaN-filled out, surrounded by NaN as in `in_nan`, and lse for a kernel called directly."""
    batch, seqlen_q, heads_q, _ = q.shape
    out = in_nan(torch.full_like(q, float("nan")))
    lse = torch.full((batch, heads_q, seqlen_q), float("nan"), dtype=torch.float32, device=q.device)
    return out, lse


def assert_surroundings_nan(view: torch.Tensor) -> None:
    """Nothing was written outside `view`, a tensor that `in_nan` made."""
    batch, rows, heads, dim = view.shape
    shape = (batch + 2, rows + 2, heads + 2, dim + 8)
    whole = view.as_strided(shape, torch.empty(shape, device="meta").stride(), 0).clone()
    whole[1:-1, 1:-1, 1:-1, :dim] = float("nan")
    assert whole.isnan().all(), "the kernel wrote outside its output"
