"""The quantisation kernels against hopper_fa.quantization on the same GPU, bit for bit."""

from dataclasses import replace

import pytest
import torch
from cases import Case, in_nan

from hopper_fa import quantization, quantize_kernels
from hopper_fa.kernels import DTYPE_NAMES
from hopper_fa.quantization import QuantizedQKV
from hopper_fa.recipe import Fp8Recipe
from hopper_fa.token_stats import sampled_tokens

EXACT = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "v_mean")
SUMS = ("lse_shift", "key_bias")  # float32 sums over head_dim, whose order is free
PRESETS = {
    name: getattr(Fp8Recipe, name)() for name in ("default", "accurate", "causal_safe", "fa3", "fa3_paper")
}
EVERYTHING = replace(Fp8Recipe.default(), smooth_q=True)
CASES = [
    *(Case(2, 4, 2, 113, 239, head_dim) for head_dim in (8, 40, 64, 72, 96, 112, 128, 160, 192, 248, 256)),
    *(Case(1, 2, 1, length, length, 128) for length in (1, 16, 17, 63, 65, 127, 129, 799, 1023)),
    Case(3, 6, 3, 1, 4224, 64),
    Case(1, 1, 1, 300, 140_000, 64),  # more than 1024 chunks of tokens
]

pytestmark = [
    pytest.mark.skipif(
        not {"bf16", "fp16", "e4m3"} <= set(quantize_kernels.DTYPES),
        reason="this build does not hold all quantisation kernels (HOPPER_FA_DTYPES)",
    ),
    pytest.mark.parametrize("dtype", DTYPE_NAMES, ids=DTYPE_NAMES.values()),
]


def bits(t: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, all NaN of float32 made the same."""
    if t.dtype == torch.float32:
        t = t.masked_fill(t.isnan(), float("nan"))
    return t.contiguous().view(torch.uint8)


def assert_same(ours: QuantizedQKV, expected: QuantizedQKV) -> None:
    for name in EXACT:
        a, b = getattr(ours, name), getattr(expected, name)
        if b is None:
            assert a is None, name
            continue
        assert a.shape == b.shape and a.dtype == b.dtype and a.is_contiguous(), name
        wrong = (bits(a) != bits(b)).sum().item()
        assert wrong == 0, f"{wrong} of {a.nbytes} bytes of {name} differ"
    for name in SUMS:
        a, b = getattr(ours, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        if b is not None and b.numel():
            # What is not finite may be so in another way: the kernels' sums are over rotated elements.
            a, b = (torch.where(t.isfinite(), t, float("nan")) for t in (a, b))
            largest = b[b.isfinite()].abs().max().item() if b.isfinite().any() else 0.0
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * largest + 1e-4, equal_nan=True)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recipe: Fp8Recipe) -> None:
    """Twice on copies that lie in NaN; both times the reference's bits."""
    expected = quantization.quantize_qkv(q, k, v, recipe)
    poisoned = [in_nan(t) for t in (q, k, v)]
    for _ in range(2):
        assert_same(quantize_kernels.quantize_qkv(*poisoned, recipe), expected)


@pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_presets(case: Case, recipe: Fp8Recipe, dtype: torch.dtype, seed: int) -> None:
    check(*case.qkv(dtype, seed, "cuda"), recipe)


@pytest.mark.parametrize("q_granularity", ["tensor", "group", "head", "block", "token"])
@pytest.mark.parametrize("k_granularity", ["none", "tensor", "head", "block", "token"])
@pytest.mark.parametrize("qk_dtype", ["e4m3", "int8"])
def test_granularities_of_q_and_k(
    qk_dtype: str, k_granularity: str, q_granularity: str, dtype: torch.dtype, seed: int
) -> None:
    if k_granularity == "none" and qk_dtype == "int8":
        pytest.skip("int8 needs a scale (tests/cpu/test_quantization.py)")
    recipe = replace(EVERYTHING, qk_dtype=qk_dtype, q_granularity=q_granularity, k_granularity=k_granularity)
    check(*Case(2, 6, 3, 200, 300, 72).qkv(dtype, seed, "cuda"), recipe)


@pytest.mark.parametrize("granularity", ["none", "tensor", "head", "channel"])
@pytest.mark.parametrize("smooth", [False, True], ids=["raw", "smooth"])
@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
@pytest.mark.parametrize("sample_stats", [False, True], ids=["all tokens", "sample"])
def test_granularities_of_v(
    sample_stats: bool, compensate: bool, smooth: bool, granularity: str, dtype: torch.dtype, seed: int
) -> None:
    q, k, v = Case(2, 2, 2, 20, 1100, 96).qkv(dtype, seed, "cuda")
    recipe = Fp8Recipe(
        v_granularity=granularity, smooth_v=smooth, compensate_v=compensate, sample_stats=sample_stats
    )
    check(q, k, 3 * v + 1, recipe)


@pytest.mark.parametrize("distribution", ["outliers", "zeros", "negative zeros", "constant", "tiny"])
def test_distributions(distribution: str, dtype: torch.dtype, seed: int) -> None:
    q, k, v = Case(1, 2, 2, 150, 270, 112).qkv(dtype, seed, "cuda")
    generator = torch.Generator(device="cuda").manual_seed(seed)

    def change(t: torch.Tensor) -> torch.Tensor:
        if distribution == "outliers":
            rare = torch.rand(t.shape, generator=generator, device="cuda") < 0.001
            return torch.where(rare, 50 * t, t)
        value = {"zeros": 0.0, "negative zeros": -0.0, "constant": 3.25, "tiny": 2.0**-24}[distribution]
        t[:, :70] = value
        return t

    for recipe in (EVERYTHING, replace(EVERYTHING, qk_dtype="e4m3"), PRESETS["fa3"]):
        values = change(v)
        if distribution != "outliers":
            values[:, :, 0] = values[:, :1, :1, :1]  # a whole head of it
        check(change(q), change(k), values, recipe)


@pytest.mark.parametrize("sample_stats", [False, True], ids=["all tokens", "sample"])
@pytest.mark.parametrize("length", [127, 255, 256, 257, 511, 1031, 2100, 9000, 40_001])
def test_sampled_statistics(length: int, sample_stats: bool, dtype: torch.dtype, seed: int) -> None:
    q, k, v = Case(2, 2, 2, length, length, 72).qkv(dtype, seed, "cuda")
    check(q, k + 1, 3 * v - 1, replace(EVERYTHING, sample_stats=sample_stats))


@pytest.mark.parametrize("head_dim", [64, 72, 128, 256])
@pytest.mark.parametrize("smooth", [False, True], ids=["raw", "smooth"])
@pytest.mark.parametrize("compensate", [False, True], ids=["plain", "compensated"])
def test_what_outgrows_a_sample(
    compensate: bool, smooth: bool, head_dim: int, dtype: torch.dtype, seed: int
) -> None:
    """Channels whose largest element is not in the sample, some by less than the scale leaves room for."""
    recipe = replace(EVERYTHING, smooth_v=smooth, compensate_v=compensate)
    q, k, v = Case(2, 2, 2, 20, 2100, head_dim).qkv(dtype, seed, "cuda")
    sampled = sampled_tokens(2100, recipe.v_stats_shift(2100))
    others = torch.ones(2100, dtype=torch.bool).index_fill_(0, sampled, False).nonzero()[:, 0]
    v[0, others[5], 0, :16] = 100.0 * 2.0 ** torch.arange(16, device="cuda") / 2**7
    v[0, others[-1], 1, -1] = -2000.0
    v[1, sampled.cuda(), 0, 40:50] = 0.0  # the sample says nothing of these channels
    v[1, :, 1, 3:12] = 0.0  # and these are zeros
    v[1, others[7], 1, 4] = 2.0**-14
    v[1, others[8], 1, 5] = float("nan")
    v[1, others[9], 1, 6] = float("inf")
    v[1, others[9], 1, 41] = 3000.0
    v[1, others[10], 1, 41] = float("nan")
    check(q, k, v, recipe)
    scales = quantization.quantize_qkv(q, k, v, recipe).v_scale
    outgrown = (scales[0, 0, :16] > 1.5 * scales[0, 0, 20:36].max()).sum()
    assert outgrown in range(1, 16)  # some, not all


@pytest.mark.parametrize("recipe", [*PRESETS.values(), EVERYTHING], ids=[*PRESETS, "everything"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite(value: float, recipe: Fp8Recipe, dtype: torch.dtype, seed: int) -> None:
    """One element each of Q, K and V; and a head of V without a finite element."""
    q, k, v = Case(2, 4, 2, 150, 270, 128).qkv(dtype, seed, "cuda")
    q[0, 70, 1, 5] = k[1, 140, 0, 9] = v[0, 33, 1, 77] = value
    v[1, :, 0] = value
    for qk_dtype in ("e4m3",) if recipe.k_granularity == "none" else ("e4m3", "int8"):
        check(q, k, v, replace(recipe, qk_dtype=qk_dtype))


@pytest.mark.parametrize("recipe", [*PRESETS.values(), EVERYTHING], ids=[*PRESETS, "everything"])
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(0, 130), (70, 0), (0, 0)])
def test_empty_sequences(
    seqlen_q: int, seqlen_k: int, recipe: Fp8Recipe, dtype: torch.dtype, seed: int
) -> None:
    check(*Case(2, 4, 2, seqlen_q, seqlen_k, 64).qkv(dtype, seed, "cuda"), recipe)


@pytest.mark.parametrize("recipe", [*PRESETS.values(), EVERYTHING], ids=[*PRESETS, "everything"])
def test_launches_beside_each_other(recipe: Fp8Recipe, dtype: torch.dtype, seed: int) -> None:
    """Inputs that change in the stream just before and after each call: no launch reads early or late."""
    inputs = [Case(2, 8, 8, 2048, 2048, 128).qkv(dtype, seed + i, "cuda") for i in range(3)]
    inputs[1][2][0, 77, 3, 5] = 5000.0  # outgrows its sample
    expected = []
    for tensors in inputs:
        torch.cuda.synchronize()
        expected.append(quantize_kernels.quantize_qkv(*tensors, recipe))
    held = [torch.empty_like(t) for t in inputs[0]]
    results = []
    for _ in range(4):
        for tensors in inputs:
            for to, t in zip(held, tensors, strict=True):
                to.copy_(t)
            results.append(quantize_kernels.quantize_qkv(*held, recipe))
            for to in held:
                to.fill_(float("nan"))
    for i, result in enumerate(results):
        assert_same(result, expected[i % len(expected)])


@pytest.mark.parametrize("layout", ["heads first", "expanded batch", "last dimension strided", "unaligned"])
def test_layouts(layout: str, dtype: torch.dtype, seed: int) -> None:
    tensors = Case(2, 4, 4, 150, 270, 64).qkv(dtype, seed, "cuda")
    change = {
        "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
        "expanded batch": lambda t: t[:1].expand_as(t),
        "last dimension strided": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        "unaligned": lambda t: torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape),
    }[layout]
    q, k, v = (change(t) for t in tensors)
    expected = quantization.quantize_qkv(q, k, v, EVERYTHING)
    assert_same(quantize_kernels.quantize_qkv(q, k, v, EVERYTHING), expected)


@pytest.mark.parametrize("single", range(3), ids=["batch entry", "token", "head"])
def test_odd_stride_of_a_single(single: int, dtype: torch.dtype, seed: int) -> None:
    """A stride that means nothing need not be a multiple of 16 bytes."""
    sizes, strides = [2, 300, 3, 72], [300 * 3 * 72, 3 * 72, 72, 1]
    sizes[single], strides[single] = 1, 5
    generator = torch.Generator("cuda").manual_seed(seed)
    memory = torch.randn(3, 2 * 300 * 3 * 72, device="cuda", generator=generator).to(dtype)
    q, k, v = (t.as_strided(sizes, strides) for t in memory)
    expected = quantization.quantize_qkv(q, k, v, EVERYTHING)
    assert_same(quantize_kernels.quantize_qkv(q, k, v, EVERYTHING), expected)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 256])
@pytest.mark.parametrize("seqlen", [0, 1, 16, 113, 1040])
def test_transposition_of_e4m3(seqlen: int, head_dim: int, dtype: torch.dtype, seed: int) -> None:
    """Every byte of V arrives, in the layout of from_fp8."""
    shape = (2, seqlen, 3, head_dim)
    v = torch.randint(0, 256, shape, device="cuda", dtype=torch.uint8).view(torch.float8_e4m3fn)
    q = torch.zeros(2, 8, 3, head_dim, device="cuda").to(torch.float8_e4m3fn)
    expected = quantization.from_fp8(q, v, v).v
    assert torch.equal(bits(quantize_kernels.transpose_v(v)), bits(expected))


def test_more_than_2_to_31_elements(dtype: torch.dtype, seed: int) -> None:
    """The last rows of tensors whose offsets do not fit int32, each tensor as Q, K and V."""
    if torch.cuda.mem_get_info()[0] < 40 << 30:
        pytest.skip("needs 40 GiB of GPU memory")
    whole = torch.zeros(1, 2**17 + 200, 128, 128, dtype=dtype, device="cuda")
    whole[:, -200:].normal_()
    recipe = PRESETS["causal_safe"]
    ours, scale, _ = quantize_kernels.quantize_rows(whole, recipe, None, None, 1, queries=True)
    tail = whole[:, -200:].contiguous()
    expected = quantization.quantize_qkv(tail, tail, tail, recipe)
    assert torch.equal(bits(ours[:, -200:]), bits(expected.q))
    assert torch.equal(scale[..., -200:], expected.q_scale)
    del ours, scale
    codes, _, _ = quantize_kernels.quantize_v(whole, recipe, quantize_kernels.TokenStats())
    assert torch.equal(bits(codes[:, -1, :128, -208:]), bits(expected.v[:, -1, :128]))
