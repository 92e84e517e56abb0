"""The FP8 emulator: its accumulator against exact fractions, its results against float64, known traps."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from cases import FP8_PRESETS, Case

from hopper_fa import Fp8Recipe, attention_reference, error_metrics, kernels
from hopper_fa.accuracy import random_qkv
from hopper_fa.emulator_fp8 import _e4m3_of_code, attention_dequantized, attention_fp8_emulated
from hopper_fa.quantization import QuantizedQKV, quantize_qkv
from hopper_fa.tensor_core import HOPPER, Accumulator

pytestmark = pytest.mark.usefixtures("one_thread")

# Every field at a value that no preset has.
UNUSUAL = Fp8Recipe(
    q_granularity="tensor", k_granularity="token", v_granularity="tensor", smooth_q=True, smooth_k=True,
    p_offset=4.0, rescale_threshold=4.0, accumulation=2,
)  # fmt: skip
SMOOTH_Q = replace(UNUSUAL, k_granularity="block", qk_dtype="int8")
RECIPES = FP8_PRESETS | {"unusual": UNUSUAL, "smooth_q": SMOOTH_Q}
RECIPES["exact_p"] = replace(Fp8Recipe.default(), linear_exp2=False)
CASES = [
    Case(seqlen_q=70, seqlen_k=300, head_dim=8),
    Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=130, seqlen_k=150, head_dim=40, causal=True),
    Case(heads_q=3, heads_kv=1, seqlen_q=200, seqlen_k=70, head_dim=72, causal=True),  # rows without keys
    Case(seqlen_q=1, seqlen_k=257, head_dim=96, softmax_scale=-0.2),
    Case(seqlen_q=65, seqlen_k=128, head_dim=248, softmax_scale=0.0),
    Case(seqlen_q=129, seqlen_k=1, head_dim=128, softmax_scale=1e-30, causal=True),
    Case(seqlen_q=20, seqlen_k=0, head_dim=64),
]


def floor_log2(x: Fraction) -> int:
    """The exponent e with 2**e <= x < 2**(e + 1), for x > 0."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1


def cut(x: Fraction, unit: Fraction) -> Fraction:
    """The multiple of `unit` next to x toward zero."""
    return math.trunc(x / unit) * unit


def sum_by_fractions(a: list[float], b: list[float], start: float, joins: bool = True) -> Fraction:
    """start + a . b as the hardware adds it, in steps of 32 products."""

    def exponent(x: float) -> int:  # of an e4m3 number
        return max(-6, floor_log2(abs(Fraction(x))))

    acc = Fraction(start)
    for j in range(0, len(a), 32):
        pairs = [(x, y) for x, y in zip(a[j : j + 32], b[j : j + 32], strict=True) if x and y]
        products = [Fraction(x) * Fraction(y) for x, y in pairs]
        exponents = [exponent(x) + exponent(y) for x, y in pairs]
        terms = [*products, acc] if joins else products
        if joins and acc:
            exponents.append(floor_log2(abs(acc)))
        if not exponents:
            continue
        unit = Fraction(2) ** (max(exponents) - 13)
        acc = sum(cut(t, unit) for t in terms) + (0 if joins else acc)
        if acc:
            acc = cut(acc, Fraction(2) ** (floor_log2(abs(acc)) - 13))
    return acc


@pytest.mark.parametrize("joins", [True, False])
def test_accumulator_is_that_of_exact_fractions(joins: bool, seed: int) -> None:
    def random_e4m3(*shape: int) -> torch.Tensor:
        codes = torch.randint(0, 127, shape) + 128 * torch.randint(0, 2, shape)
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float()

    m, k, n = 3, 100, 5
    a, b = random_e4m3(m, k), random_e4m3(k, n)
    a[:, 32:64] /= a.abs().max() * 256  # so that the accumulator dominates this step; e4m3 or not is the same
    a, b = a.to(torch.float8_e4m3fn).float(), b.abs() if seed % 2 else b
    start = HOPPER._cut(torch.randn(m, n) * 1000)
    got = Accumulator(joins_alignment=joins).matmul_add(a, b, start)
    for i in range(m):
        for j in range(n):
            want = sum_by_fractions(a[i].tolist(), b[:, j].tolist(), start[i, j].item(), joins)
            assert Fraction(got[i, j].item()) == want


@pytest.mark.parametrize("rows", [0, 1, 37, 600])
def test_accumulator_takes_matrices_one_by_one_or_together(rows: int, seed: int) -> None:
    a = torch.randn(3, 2, rows, 70).to(torch.float8_e4m3fn).float()
    b = torch.randn(3, 1, 70, 40).to(torch.float8_e4m3fn).float()  # broadcast
    start = HOPPER._cut(torch.randn(3, 2, rows, 40))
    got = HOPPER.matmul_add(a, b, start)
    for i, j in itertools.product(range(3), range(2)):
        assert torch.equal(got[i, j], HOPPER.matmul_add(a[i, j], b[i, 0], start[i, j]))


def test_accumulator_by_hand() -> None:
    def total(start: float, *products: float) -> float:
        a = torch.tensor([products])
        return HOPPER.matmul_add(a, torch.ones(len(products), 1), torch.tensor([[start]])).item()

    assert total(8192.0, *[0.9375] * 32) == 8192.0  # each is below the last bit kept
    assert total(8192.0, *[1.9375] * 32) == 8224.0
    assert total(-8192.0, *[-1.9375] * 32) == -8224.0  # toward zero, not down
    assert total(0.0, *[0.9375] * 32) == 30.0
    assert total(0.0, 448.0, *[2.0**-6] * 31) == 448.0 + 0  # 448 keeps 2**-5
    assert total(0.0, 448.0, *[2.0**-5] * 31) == 448.0 + 31 / 32
    assert total(16383.0, 1.0, 1.0) == 16384.0  # the sum, 16385, needs a bit too many
    assert total(0.0, *[0.0] * 40) == 0.0
    assert math.isnan(total(0.0, 1.0, float("nan")))


def assert_kernel_error_only(
    out: torch.Tensor, lse: torch.Tensor, qkv: QuantizedQKV, softmax_scale: float | None, causal: bool
) -> None:
    """Against float64 of the dequantised tensors, within what rounding P to e4m3 can do at worst.

    That is 2**-4 of each P or, at the bottom of the format, 2**-10 of P * 2**offset; in numerator and
    denominator. By its code a P is off by 4% more, and at the bottom by 2**-7. As much as 1% is granted to
    the tensor core's sums.
    """
    want, want_lse = attention_dequantized(qkv, softmax_scale, causal)
    spread = replace(qkv, v=qkv.v.float().abs().to(qkv.v.dtype), v_mean=None)
    size, _ = attention_dequantized(spread, softmax_scale, causal)  # sum of P |V|
    largest = (qkv.v_codes().float() * qkv.v_scale[:, None]).abs().amax() if qkv.seqlen_k else 0.0
    linear, (p_offset, _) = qkv.recipe.has_linear_exp2(qkv.head_dim), qkv.recipe.p_range(qkv.head_dim)
    underflow = qkv.seqlen_k * 2.0 ** ((-7 if linear else -10) - p_offset)
    of_p = 2**-4 + (0.04 if linear else 0.0)
    allowed = (2 * of_p + 0.01) * size + 2 * underflow * largest + want.abs() * 2**-8 + 1e-6
    assert out.isfinite().all()
    assert ((out.double() - want).abs() <= allowed).all()
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert (out.transpose(1, 2)[empty] == 0).all()
    error = (lse.double() - want_lse)[~empty].abs()
    assert (error <= of_p + 0.01 + underflow).all()


def test_p_by_its_code() -> None:
    """Codes of all exponents: within 3.9% of exp2 less, 2% more, and their rounding; mean 1; ends."""
    x = torch.linspace(-6, 8.8, 100001)
    code = 8 * (x + 7) - kernels.EXP2_LINEAR_MEAN
    ratio = _e4m3_of_code(code).double() / x.double().exp2()
    assert abs(ratio.mean() - 1) < 1e-3
    assert 0.961 * (1 - 2**-4) < ratio.min() and ratio.max() < 1.0201 * (1 + 2**-4)
    values = _e4m3_of_code(torch.arange(127.0))
    assert torch.equal(values, torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float())
    assert (_e4m3_of_code(torch.tensor([0.5, -0.0, -3.0, -1e30, float("-inf")])) == 0).all()
    assert _e4m3_of_code(torch.tensor([float("nan")])).isnan().all()
    powers = torch.arange(-6, 9)
    assert torch.equal(_e4m3_of_code(8.0 * (powers + 7) - kernels.EXP2_LINEAR_MEAN), powers.float().exp2())


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_recipe_on_every_shape(case: Case, name: str, seed: int) -> None:
    q, k, v = case.qkv(torch.bfloat16, seed)
    qkv = quantize_qkv(q, k, v, RECIPES[name])
    out, lse = attention_fp8_emulated(qkv, case.softmax_scale, case.causal)
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and out.is_contiguous()
    assert lse.shape == (case.batch, case.heads_q, case.seqlen_q) and lse.dtype == torch.float32
    assert_kernel_error_only(out, lse, qkv, case.softmax_scale, case.causal)


@pytest.mark.parametrize("name", RECIPES)
def test_error_and_lse_against_float64(name: str, seed: int) -> None:
    q, k, v = Case(heads_q=1, heads_kv=1, seqlen_q=128, seqlen_k=1024, head_dim=128).qkv(torch.bfloat16, seed)
    qkv = quantize_qkv(q, k, v, RECIPES[name])
    out, lse = attention_fp8_emulated(qkv)
    want, want_lse = attention_reference(q, k, v)
    kernel, kernel_lse = attention_dequantized(qkv)
    assert error_metrics(out, want)["relative_l2"] < 0.075  # 0.035 to 0.055 is usual
    assert error_metrics(out, kernel)["relative_l2"] < 0.04  # of P: 0.0245
    assert (lse - want_lse).abs().max() < 0.05
    assert (lse - kernel_lse).abs().max() < (1e-4 if RECIPES[name].row_sum == "fp32" else 0.02)


@pytest.mark.parametrize("name", FP8_PRESETS)
def test_tensor_core_sums_are_near_float32(name: str, seed: int) -> None:
    q, k, v = Case(heads_q=2, heads_kv=1, seqlen_q=70, seqlen_k=300, head_dim=72).qkv(torch.bfloat16, seed)
    qkv = quantize_qkv(q, k, v, FP8_PRESETS[name])
    results = [
        attention_fp8_emulated(qkv, 0.1, True, torch.float32, accumulator=sums)
        for sums in ("tensor_core", "auto", "fp32", HOPPER)
    ]
    for out, lse in results[1:3]:
        # A score that is cut differently can round P to the other neighbour.
        assert error_metrics(out, results[0][0])["relative_l2"] < 0.01
        assert (lse - results[0][1]).abs().nan_to_num(0.0).max() < 0.01
    assert torch.equal(results[0][0], results[3][0])
    assert torch.equal(results[1][0], results[2][0]) == (FP8_PRESETS[name].interval(72) == 1)
    with pytest.raises(ValueError, match="accumulator is 'fp22'"):
        attention_fp8_emulated(qkv, accumulator="fp22")


@pytest.mark.parametrize("seqlen_k", [1, 2, 3, 129, 1000])
@pytest.mark.parametrize("causal", [False, True])
def test_ones_average_to_one(seqlen_k: int, causal: bool, seed: int) -> None:
    q, k, _ = Case(seqlen_q=70, seqlen_k=seqlen_k, causal=causal).qkv(torch.bfloat16, seed)
    for recipe in (*RECIPES.values(), replace(FP8_PRESETS["default"], smooth_v=False, compensate_v=False)):
        if recipe.row_sum == "product":
            out, lse = attention_fp8_emulated(quantize_qkv(q, k, torch.ones_like(k), recipe), causal=causal)
            seen = (lse != float("-inf")).transpose(1, 2)
            assert (out[seen] - 1).abs().max() <= 2**-8 and (out[~seen] == 0).all()


def test_ones_show_the_rounding_of_p_in_a_float32_sum(seed: int) -> None:
    q, k, _ = Case(seqlen_q=64, seqlen_k=3).qkv(torch.bfloat16, seed)
    qkv = quantize_qkv(q, k, torch.ones_like(k), Fp8Recipe.fa3())
    out, _ = attention_fp8_emulated(qkv, out_dtype=torch.float32)
    assert 2**-8 < (out - 1).abs().max() < 2**-4


@pytest.mark.parametrize("name", FP8_PRESETS)
def test_one_hot_rows_return_their_value(name: str, seed: int) -> None:
    _, k, v = Case(seqlen_q=1, seqlen_k=200).qkv(torch.bfloat16, seed)
    qkv = quantize_qkv(k, k, v, FP8_PRESETS[name])
    out, lse = attention_fp8_emulated(qkv, 20.0)  # q_i . k_i is 64 above the others, give or take 30
    torch.testing.assert_close(out, qkv.dequantize()[2].bfloat16(), rtol=2**-7, atol=1e-6)
    assert (lse - attention_reference(k, k, v, 20.0)[1]).abs().max() < 0.05 * lse.abs().max()


def test_smoothing_removes_a_common_offset_of_keys(seed: int) -> None:
    q, k, v = (t.float() for t in Case(seqlen_q=100, seqlen_k=512).qkv(torch.float32, seed))
    moved = k + 4 * torch.randn(1, 1, 2, 64).bfloat16()
    want, _ = attention_reference(q, k, v)
    error = {}
    for smooth in (True, False):
        recipe = replace(FP8_PRESETS["default"], smooth_k=smooth)
        for name, keys in (("plain", k), ("moved", moved)):
            out, _ = attention_fp8_emulated(quantize_qkv(q, keys, v, recipe))
            error[smooth, name] = error_metrics(out, want)["relative_l2"]
    assert error[True, "moved"] < 1.1 * error[True, "plain"]
    assert error[False, "moved"] > 1.15 * error[False, "plain"]


def test_rotation_tames_outliers(seed: int) -> None:
    q, k, v = random_qkv(1, 256, 1024, 2, 2, 128, dtype=torch.float32, distribution="outliers", seed=seed)
    want, _ = attention_reference(q, k, v)
    rmse = {
        name: error_metrics(attention_fp8_emulated(quantize_qkv(q, k, v, recipe))[0], want)["rmse"]
        for name, recipe in FP8_PRESETS.items()
    }
    assert rmse["accurate"] < 0.8 * rmse["fa3"] and rmse["default"] < 0.8 * rmse["fa3"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_head_of_zeros(name: str, seed: int) -> None:
    q, k, v = Case(seqlen_q=40, seqlen_k=200).qkv(torch.bfloat16, seed)
    q[:, :, 1] = k[:, :, 1] = v[:, :, 1] = 0
    out, lse = attention_fp8_emulated(quantize_qkv(q, k, v, RECIPES[name]))
    assert (out[:, :, 1] == 0).all()
    torch.testing.assert_close(lse[:, 1], torch.full((1, 40), math.log(200)), atol=1e-5, rtol=1e-6)
    assert out[:, :, 0].isfinite().all()


@pytest.mark.parametrize("name", ["accurate", "causal_safe", "fa3", "fa3_paper", "unusual"])
def test_nan_in_q_stays_in_its_row(name: str, seed: int) -> None:
    q, k, v = Case(seqlen_q=20, seqlen_k=300).qkv(torch.bfloat16, seed)
    q[0, 7, 1, 5] = float("nan")
    out, lse = attention_fp8_emulated(quantize_qkv(q, k, v, RECIPES[name]))
    broken = torch.zeros(20, 2, dtype=torch.bool)
    broken[7, 1] = True
    assert torch.equal(out[0].isnan(), broken[..., None].expand(-1, -1, 64))
    assert torch.equal(lse[0].isnan(), broken.T)


@pytest.mark.parametrize("name", ["default", "smooth_q"])
def test_nan_in_q_in_int8_breaks_its_group(name: str, seed: int) -> None:
    q, k, v = Case(seqlen_q=200, seqlen_k=70).qkv(torch.bfloat16, seed)
    q[0, 70, 1, 5] = float("nan")
    out, _ = attention_fp8_emulated(quantize_qkv(q, k, v, RECIPES[name]))
    rows = slice(64, 128) if name == "default" else slice(None)
    broken = torch.zeros(200, 2, dtype=torch.bool)
    broken[rows, slice(1, 2) if name == "default" else slice(None)] = True
    assert torch.equal(out[0].isnan().any(-1), broken)


@pytest.mark.parametrize("name", RECIPES)
def test_nan_in_v_stays_in_its_channel(name: str, seed: int) -> None:
    q, k, v = Case(seqlen_q=300, seqlen_k=300).qkv(torch.bfloat16, seed)
    v[0, 290, 1, 5] = float("nan")
    out, lse = attention_fp8_emulated(quantize_qkv(q, k, v, RECIPES[name]), causal=True)
    broken = torch.zeros(300, 2, 64, dtype=torch.bool)
    broken[256:, 1, 5] = True  # the rows of the warpgroups that visit keys 256 to 299
    assert torch.equal(out[0].isnan(), broken) and lse.isfinite().all()


@pytest.mark.parametrize("name", RECIPES)
def test_what_leaks_from_later_tokens(name: str, seed: int) -> None:
    q, k, v = Case(heads_q=4, seqlen_q=239, seqlen_k=239).qkv(torch.bfloat16, seed)
    position = 130
    recipes = [RECIPES[name]]
    if not recipes[0].leaks_future:  # nothing that may be changed about it makes it leak
        recipes += [
            replace(recipes[0], k_granularity="token"),
            replace(recipes[0], k_granularity="token", qk_dtype="int8"),
            replace(recipes[0], accumulation=0, p_offset=4.0, rescale_threshold=4.0),
            replace(recipes[0], row_sum="fp32", rotation="none"),
        ]
    for recipe in recipes:
        changed = []
        for t in (q, k, v):
            t = t.clone()
            t[:, position:] = 40 * torch.randn_like(t[:, position:])
            changed.append(t)
        before = attention_fp8_emulated(quantize_qkv(q, k, v, recipe), causal=True)
        after = attention_fp8_emulated(quantize_qkv(*changed, recipe), causal=True)
        same = torch.equal(before[0][:, :position], after[0][:, :position])
        same &= torch.equal(before[1][..., :position], after[1][..., :position])
        assert same != recipe.leaks_future
        assert not torch.equal(before[0][:, position:], after[0][:, position:])


def test_two_levels_make_the_error_independent_of_length(seed: int) -> None:
    def sum_error(seqlen_k: int, accumulation: int) -> float:
        q, k, v = Case(heads_q=1, heads_kv=1, seqlen_q=32, seqlen_k=seqlen_k, head_dim=32).qkv(
            torch.float32, seed
        )
        recipe = replace(Fp8Recipe.fa3(), accumulation=accumulation, v_granularity="channel")
        qkv = quantize_qkv(q, k, v + 1, recipe)
        outs = [
            attention_fp8_emulated(qkv, out_dtype=torch.float32, accumulator=sums)[0]
            for sums in (HOPPER, "fp32")
        ]
        return error_metrics(*outs)["relative_l2"]

    short, long = sum_error(256, 1), sum_error(8192, 1)
    assert short < 2e-3 and long < 2e-3 and long < 2 * short
    assert sum_error(8192, 0) > 0.03
    # Every 16 blocks: more, and no more at twice the length.
    assert all(0.015 < sum_error(seqlen_k, 16) < 0.03 for seqlen_k in (4096, 8192))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_later_blocks_flush_alike_for_all_rows(accumulation: int, seed: int) -> None:
    # A causal row's result does not depend on how many rows, and so key blocks, follow it.
    q, k, v = Case(seqlen_q=400, seqlen_k=400, head_dim=40).qkv(torch.bfloat16, seed)
    recipe = replace(Fp8Recipe.causal_safe(), accumulation=accumulation)
    out, lse = attention_fp8_emulated(quantize_qkv(q, k, v, recipe), causal=True)
    part = attention_fp8_emulated(quantize_qkv(q[:, :192], k[:, :192], v[:, :192], recipe), causal=True)
    assert torch.equal(out[:, :192], part[0]) and torch.equal(lse[..., :192], part[1])


def test_lazy_rescaling_changes_roundings_only(seed: int) -> None:
    q, k, v = Case(seqlen_q=64, seqlen_k=700).qkv(torch.bfloat16, seed)
    k *= torch.linspace(4, 0, 700, dtype=k.dtype)[:, None, None]  # the maximum keeps moving
    eager, lazy = (
        attention_fp8_emulated(
            quantize_qkv(q, k, v, replace(Fp8Recipe.accurate(), p_offset=4.0, rescale_threshold=threshold)),
            out_dtype=torch.float32,
        )[0]
        for threshold in (0.0, 4.0)
    )
    assert not torch.equal(eager, lazy)
    assert error_metrics(lazy, eager)["relative_l2"] < 0.05


def test_negative_scale_is_the_scale_of_negated_queries(seed: int) -> None:
    q, k, v = Case(seqlen_q=70, seqlen_k=300).qkv(torch.bfloat16, seed)
    for recipe in RECIPES.values():
        negated = attention_fp8_emulated(quantize_qkv(-q, k, v, recipe), 0.2, True)
        got = attention_fp8_emulated(quantize_qkv(q, k, v, recipe), -0.2, True)
        assert all(torch.equal(a, b) for a, b in zip(got, negated, strict=True))
