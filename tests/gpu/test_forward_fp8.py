"""The FP8 kernel against its emulator, closely, and against float64, by what the recipe allows itself."""

from dataclasses import replace

import pytest
import torch
from cases import (
    DTYPES,
    GQA_CASES,
    HEAD_DIM_CASES,
    INSTANCE_HEAD_DIMS,
    SCALE_CASES,
    SEQLEN_CASES,
    Case,
    assert_surroundings_nan,
    in_nan,
)

from hopper_fa import Fp8Recipe, kernels
from hopper_fa.accuracy import DISTRIBUTIONS
from hopper_fa.emulator_fp8 import attention_fp8_emulated
from hopper_fa.metrics import error_metrics
from hopper_fa.quantization import QuantizedQKV, quantize_qkv
from hopper_fa.reference import attention_reference

pytestmark = pytest.mark.skipif(
    not kernels.HAS_FP8, reason="this build holds no FP8 kernel (HOPPER_FA_DTYPES)"
)

RECIPES = {
    "default": Fp8Recipe.default(),
    "accurate": Fp8Recipe.accurate(),
    "e4m3": replace(Fp8Recipe.default(), qk_dtype="e4m3"),
    "exact_p": replace(Fp8Recipe.default(), linear_exp2=False),
    # FlashAttention-3's scales, with two-level accumulation.
    "per_head": replace(Fp8Recipe.fa3(), accumulation=None, row_sum="product"),
    # Above head dim 128 the others flush less often.
    "every_block": replace(Fp8Recipe.default(), accumulation=1),
    # Raw sums, kernels of their own.
    "fa3": Fp8Recipe.fa3(),
    "fa3_paper": Fp8Recipe.fa3_paper(),
    "plain": Fp8Recipe(q_granularity="token", k_granularity="head", v_granularity="none"),
    "causal_safe": Fp8Recipe.causal_safe(),
    # A scale or a bias a key, kernels of their own.
    "scaled_keys": replace(Fp8Recipe.causal_safe(), k_granularity="token"),
    "scaled_keys_int8": replace(Fp8Recipe.causal_safe(), k_granularity="token", qk_dtype="int8"),
    "smooth_q": replace(Fp8Recipe.default(), smooth_q=True),
}
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_instance = pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def run_poisoned(
    qkv: QuantizedQKV,
    softmax_scale: float | None,
    causal: bool,
    out_dtype: torch.dtype = torch.bfloat16,
    variant: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel into outputs that are NaN and lie in NaN."""
    batch, seqlen_q, heads_q, _ = qkv.q.shape
    nan = torch.full(
        (batch, seqlen_q, heads_q, qkv.head_dim), float("nan"), dtype=out_dtype, device=qkv.q.device
    )
    out = in_nan(nan)
    lse = torch.full((batch, heads_q, seqlen_q), float("nan"), device=qkv.q.device)
    scale = qkv.head_dim**-0.5 if softmax_scale is None else softmax_scale
    kernels.forward_fp8(qkv, out, lse, scale, causal, variant)
    assert_surroundings_nan(out)
    return out, lse


def assert_agrees(
    qkv: QuantizedQKV,
    truth: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    variant: str | None = None,
) -> None:
    """Kernel and emulator differ by at most a twentieth of the kernel's error, and its output's rounding.

    truth: float64 attention of the unquantised tensors.
    """
    out, lse = run_poisoned(qkv, softmax_scale, causal, torch.float16, variant)
    # The tensor core's own sums: small differences flip roundings of P.
    emulated, emulated_lse = attention_fp8_emulated(
        qkv, softmax_scale, causal, torch.float16, accumulator="tensor_core"
    )
    assert out.isfinite().all()
    # LSE has the sum of the rounded P, so one flip of a large p moves it; by at most log(9 / 8), in few rows.
    off = torch.where(lse == emulated_lse, 0.0, (lse - emulated_lse).abs())  # rows without keys: -inf
    flipped = off > 2e-3 + 1e-5 * emulated_lse.abs()
    assert flipped.sum() <= 1 + lse.numel() // 10000 and off.max() < 0.12
    apart = error_metrics(out, emulated.double())["relative_l2"]
    own = error_metrics(out, truth)["relative_l2"]
    rounding = 0.5 * torch.finfo(torch.float16).eps
    assert apart <= own / 20 + rounding, f"{apart:.2e} from the emulator; the error is {own:.2e}"


def check(case: Case, recipe: str, seed: int, distribution: str = "normal") -> None:
    q, k, v = case.qkv(torch.bfloat16, seed, "cuda", distribution)
    truth, _ = attention_reference(q, k, v, case.softmax_scale, case.causal)
    assert_agrees(quantize_qkv(q, k, v, RECIPES[recipe]), truth, case.softmax_scale, case.causal)


@every_instance
def test_one_block(head_dim: int, seed: int) -> None:
    """The smallest problem first: one warpgroup, one key block, no mask, exact sums of scores."""
    q, k, v = Case(1, 1, 1, 64, 128, head_dim).qkv(torch.bfloat16, seed, "cuda")
    truth, _ = attention_reference(q, k, v)
    assert_agrees(quantize_qkv(q, k, v, replace(RECIPES["plain"], qk_dtype="int8")), truth)


@pytest.mark.parametrize("recipe", ["default", "e4m3", "every_block", "causal_safe", "scaled_keys"])
@pytest.mark.parametrize("case", HEAD_DIM_CASES + SEQLEN_CASES + GQA_CASES + SCALE_CASES, ids=str)
def test_shared_cases(case: Case, recipe: str, seed: int) -> None:
    check(case, recipe, seed)


@every_recipe
@both_masks
@every_instance
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_hard_inputs(distribution: str, head_dim: int, causal: bool, recipe: str, seed: int) -> None:
    check(Case(2, 4, 2, 799, 1023, head_dim, causal), recipe, seed, distribution)


USED_VARIANTS = {"fp8", "fp8_linear", "fp8_raw", "fp8_flush", "fp8_keys"}

# (batch, heads_q, heads_kv, seqlen_q, seqlen_k): the usual; one row; rows that see no key; a scale or none;
# more tiles than multiprocessors.
EXPERIMENT_CASES = [(2, 4, 2, 799, 1023, None), (1, 2, 1, 1, 130, None), (2, 4, 1, 700, 239, None)]
EXPERIMENT_CASES += [(1, 2, 2, 300, 300, -0.3), (1, 2, 2, 300, 300, 0.0), (5, 12, 4, 1000, 1000, None)]


@both_masks
@pytest.mark.parametrize("sizes", EXPERIMENT_CASES, ids=str)
@pytest.mark.parametrize(
    ("variant", "head_dim", "dtype"),
    [
        (row["variant"], row["head_dim"], dtype)
        for row in kernels.FORWARD_TILES
        for dtype in row["dtypes"]
        if dtype in ("e4m3", "int8") and row["variant"] not in USED_VARIANTS
    ],
)
def test_experiment_variants(
    variant: str, head_dim: int, dtype: str, sizes: tuple, causal: bool, seed: int
) -> None:
    case = Case(*sizes[:5], head_dim, causal, sizes[5])
    q, k, v = case.qkv(torch.bfloat16, seed, "cuda")
    truth, _ = attention_reference(q, k, v, case.softmax_scale, causal)
    for recipe in ("default", "accurate", "per_head"):  # a scale of Q for 64 rows, for one, for all
        qkv = quantize_qkv(q, k, v, replace(RECIPES[recipe], qk_dtype=dtype, linear_exp2=False))
        assert_agrees(qkv, truth, case.softmax_scale, causal, variant)
        for out_dtype in (torch.bfloat16, torch.float16):
            first = run_poisoned(qkv, case.softmax_scale, causal, out_dtype, variant)
            again = run_poisoned(qkv, case.softmax_scale, causal, out_dtype, variant)
            assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


# (batch, heads_q, heads_kv, seqlen_q, seqlen_k, softmax_scale): more tiles than multiprocessors; rows that
# see no key; maxima that grow by more than 2**64.
FLUSH_CASES = [(2, 24, 4, 700, 1700, None), (1, 4, 2, 1200, 600, None), (1, 4, 1, 300, 2100, 1.0)]


@both_masks
@pytest.mark.parametrize("sizes", FLUSH_CASES, ids=str)
@pytest.mark.parametrize("interval", [2, 3, 8, 16, 40])
@pytest.mark.parametrize("recipe", ["default", "e4m3", "per_head"])
def test_flushes(recipe: str, interval: int, sizes: tuple, causal: bool, seed: int) -> None:
    """Above head dim 128: sums that move to global memory every few blocks, while maxima grow."""
    case = Case(*sizes[:5], 256, causal, sizes[5])
    q, k, v = case.qkv(torch.bfloat16, seed, "cuda")
    # Keys are walked from the last to the first.
    k *= torch.linspace(4, 1, case.seqlen_k, device="cuda")[:, None, None]
    truth, _ = attention_reference(q, k, v, case.softmax_scale, causal)
    qkv = quantize_qkv(q, k, v, replace(RECIPES[recipe], accumulation=interval))
    assert_agrees(qkv, truth, case.softmax_scale, causal)
    first = run_poisoned(qkv, case.softmax_scale, causal)
    again = run_poisoned(qkv, case.softmax_scale, causal)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


# (p_offset, rescale_threshold): at every growth; in what room offset 8 leaves; as the presets; hardly ever.
RANGES = [(8.0, 0.0), (8.0, 0.8), (6.0, 2.8), (0.0, 8.8)]


@both_masks
@every_instance
@pytest.mark.parametrize("growth", [0.05, 2.0, 40.0], ids=str)
@pytest.mark.parametrize("p_range", RANGES, ids=str)
@pytest.mark.parametrize(
    "recipe", ["default", "e4m3", "exact_p", "every_block", "fa3", "scaled_keys", "smooth_q"]
)
def test_maxima_that_outgrow_a_threshold(
    recipe: str, p_range: tuple[float, float], growth: float, head_dim: int, causal: bool, seed: int
) -> None:
    """Maxima that grow from block to block, by less and by more than the threshold."""
    case = Case(1, 4, 2, 300, 1100, head_dim, causal)
    q, k, v = case.qkv(torch.bfloat16, seed, "cuda")
    # Keys are walked from the last to the first. The row that grows most does so by 2 to 3 times `growth`.
    k *= torch.linspace(1 + growth, 1, case.seqlen_k, device="cuda")[:, None, None]
    truth, _ = attention_reference(q, k, v, None, causal)
    offset, threshold = p_range
    ranged = replace(RECIPES[recipe], p_offset=offset, rescale_threshold=threshold)
    assert_agrees(quantize_qkv(q, k, v, ranged), truth, None, causal)


@every_instance
@pytest.mark.parametrize("dtype", ["e4m3", "int8"])
@pytest.mark.parametrize("linear", [False, None])
def test_a_row_rescales_by_itself(linear: bool | None, dtype: str, head_dim: int, seed: int) -> None:
    """A warp votes on whether to look at maxima, and what the other rows are changes no bit of a row."""
    q, k, v = Case(1, 2, 2, 64, 1500, head_dim).qkv(torch.bfloat16, seed, "cuda")
    recipe = replace(
        RECIPES["plain"], qk_dtype=dtype, linear_exp2=linear, p_offset=6.0, rescale_threshold=2.8
    )
    other = torch.randn_like(q) * 4
    other[:, ::7] = q[:, ::7]
    outs = [run_poisoned(quantize_qkv(x, k, v, recipe), None, False) for x in (q, other)]
    assert torch.equal(outs[0][0][:, ::7], outs[1][0][:, ::7])
    assert torch.equal(outs[0][1][..., ::7], outs[1][1][..., ::7])


@every_instance
@pytest.mark.parametrize("position", [1, 77, 384])
@pytest.mark.parametrize("recipe", ["causal_safe", "scaled_keys", "scaled_keys_int8"])
def test_safe_recipes_hide_every_later_token(recipe: str, position: int, head_dim: int, seed: int) -> None:
    q, k, v = Case(1, 2, 1, 700, 700, head_dim, True).qkv(torch.bfloat16, seed, "cuda")
    changed = [t.clone() for t in (q, k, v)]
    for t in changed:
        t[:, position:] = 5 * torch.randn_like(t[:, position:])
    out, _ = run_poisoned(quantize_qkv(q, k, v, RECIPES[recipe]), None, True)
    other, _ = run_poisoned(quantize_qkv(*changed, RECIPES[recipe]), None, True)
    assert torch.equal(out[:, :position], other[:, :position])


@both_masks
@every_instance
def test_more_tiles_than_multiprocessors(head_dim: int, causal: bool, seed: int) -> None:
    check(Case(5, 12, 4, 1000, 1000, head_dim, causal), "default", seed)


@both_masks
@every_instance
@pytest.mark.parametrize("seqlen_k", [1, 2, 3, 130, 4096])
def test_ones_stay_ones(seqlen_k: int, head_dim: int, causal: bool, seed: int) -> None:
    q, k, v = Case(1, 4, 4, 300, seqlen_k, head_dim, causal).qkv(torch.bfloat16, seed, "cuda", "v_ones")
    out, lse = run_poisoned(quantize_qkv(q, k, v, RECIPES["e4m3"]), None, causal)
    seen = (lse > float("-inf")).transpose(1, 2)
    assert (out[seen].float() - 1).abs().max() <= 2**-8
    assert (out[~seen] == 0).all()


@every_instance
@pytest.mark.parametrize("dtype", DTYPES)
def test_output_dtypes(dtype: str, head_dim: int, seed: int) -> None:
    q, k, v = Case(1, 2, 2, 200, 300, head_dim).qkv(torch.bfloat16, seed, "cuda")
    qkv = quantize_qkv(q, k, v)
    out, _ = run_poisoned(qkv, None, False, DTYPES[dtype])
    emulated, _ = attention_fp8_emulated(qkv, None, False, DTYPES[dtype])
    assert error_metrics(out, emulated.double())["relative_l2"] <= 4e-3


@both_masks
@every_instance
def test_hidden_keys_leave_no_trace(head_dim: int, causal: bool, seed: int) -> None:
    """Under a recipe without statistics over tokens, later keys do not change a bit of earlier rows."""
    recipe = RECIPES["plain"] if not causal else replace(RECIPES["plain"], k_granularity="block")
    q, k, v = Case(1, 2, 1, 700, 700, head_dim, True).qkv(torch.bfloat16, seed, "cuda")
    position = 384  # at the start of a key block, so that no scale is shared across it
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, position:] *= 2 if causal else 1
    changed_v[:, position:] = 5 * torch.randn_like(v[:, position:])
    out, _ = run_poisoned(quantize_qkv(q, k, v, recipe), None, True)
    changed, _ = run_poisoned(quantize_qkv(q, changed_k, changed_v, recipe), None, True)
    assert torch.equal(out[:, :position], changed[:, :position])


@every_instance
def test_repeats_are_bit_equal(head_dim: int, seed: int) -> None:
    q, k, v = Case(3, 8, 2, 1000, 1500, head_dim, True).qkv(torch.bfloat16, seed, "cuda")
    qkv = quantize_qkv(q, k, v)
    first = run_poisoned(qkv, None, True)
    for _ in range(100):
        again = run_poisoned(qkv, None, True)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@every_instance
def test_nan_row_stays_alone(head_dim: int, seed: int) -> None:
    q, k, v = Case(1, 2, 2, 200, 300, head_dim).qkv(torch.bfloat16, seed, "cuda")
    q[0, 77, 1, 3] = float("nan")
    out, lse = run_poisoned(quantize_qkv(q, k, v, RECIPES["e4m3"]), None, False)
    broken = torch.zeros(200, 2, dtype=torch.bool, device="cuda")
    broken[77, 1] = True
    assert torch.equal(out[0].isnan().all(-1), broken) and torch.equal(out[0].isnan().any(-1), broken)
    assert torch.equal(lse[0].isnan().T, broken)


@every_instance
def test_long_sums_keep_their_bits(head_dim: int, seed: int) -> None:
    """128k keys, V of mean 1: where an unflushed accumulator loses half of the output."""
    generator = torch.Generator("cuda").manual_seed(seed)
    q = torch.randn((1, 64, 1, head_dim), generator=generator, device="cuda").bfloat16()
    k = torch.randn((1, 131072, 1, head_dim), generator=generator, device="cuda").bfloat16()
    v = (torch.randn((1, 131072, 1, head_dim), generator=generator, device="cuda") + 1).bfloat16()
    truth, _ = attention_reference(q, k, v)
    out, _ = run_poisoned(quantize_qkv(q, k, v), None, False, torch.float16)
    errors = error_metrics(out, truth)
    assert errors["relative_l2"] <= 2.8e-3 and abs(errors["signed_bias"]) <= 1e-3


@pytest.mark.parametrize(("interval", "allowed"), [(1, 3.5e-3), (16, 3e-2)])
def test_unsmoothed_sums_lose_no_more_than_their_interval(interval: int, allowed: float, seed: int) -> None:
    """Head dim 256, 32k keys, V of mean 1 as it is: raw sums lose 30%."""
    q, k, v = Case(1, 4, 4, 64, 32768, 256).qkv(torch.bfloat16, seed, "cuda")
    v = v + 1
    recipe = replace(RECIPES["e4m3"], smooth_v=False, compensate_v=False, accumulation=interval)
    truth, _ = attention_reference(q, k, v)
    out, _ = run_poisoned(quantize_qkv(q, k, v, recipe), None, False, torch.float16)
    assert error_metrics(out, truth)["relative_l2"] <= allowed
