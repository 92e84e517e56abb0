"""Quantised tensors against plain loops, exact small examples and float64."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from cases import FP8_PRESETS, Case

from hopper_fa import Fp8Recipe, attention_reference
from hopper_fa.emulator_fp8 import attention_dequantized
from hopper_fa.quantization import (
    QuantizedQKV,
    from_fp8,
    quantize_qkv,
    rotation_signs,
    smooth_and_rotate,
)
from hopper_fa.recipe import K_BLOCK, Q_BLOCK
from hopper_fa.token_stats import sampled_tokens

pytestmark = pytest.mark.usefixtures("one_thread")

E4M3 = torch.float8_e4m3fn
PLAIN = Fp8Recipe()  # no rotation, no smoothing
GQA = Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=150, seqlen_k=270, head_dim=72)


def e4m3_values() -> list[float]:
    """Every finite value that is not negative, by its code, from the format's definition."""
    values = []
    for code in range(0x7F):
        exponent, fraction = code >> 3, code & 7
        values.append(math.ldexp(fraction, -9) if exponent == 0 else math.ldexp(8 + fraction, exponent - 10))
    return values


def rotate(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """x rotated, with the whole of the blocks' factors."""
    rows, factor = smooth_and_rotate(x, None, signs)
    return rows * factor


@pytest.mark.parametrize("name", FP8_PRESETS)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 248])
def test_layout(name: str, head_dim: int, seed: int) -> None:
    recipe = FP8_PRESETS[name]
    case = replace(GQA, head_dim=head_dim)
    q, k, v = case.qkv(torch.bfloat16, seed)
    x = quantize_qkv(q, k, v, recipe)
    pitch = (head_dim + 15) // 16 * 16
    tile_d = next(d for d in (64, 128, 256) if d >= head_dim)
    qk_dtype = torch.int8 if recipe.qk_dtype == "int8" else E4M3
    q_groups = {"block": 3, "token": 150}.get(recipe.q_granularity, 1)
    k_groups = {"block": 3, "token": 270}.get(recipe.k_granularity, 1)
    want = {
        "q": ((2, 150, 4, pitch), qk_dtype),
        "k": ((2, 270, 2, pitch), qk_dtype),
        "v": ((2, 2, tile_d + 1, 272), E4M3),
        "q_scale": ((2, 4, q_groups), torch.float32),
        "k_scale": ((2, 2, k_groups), torch.float32),
        "v_scale": ((2, 2, head_dim), torch.float32),
        "v_mean": ((2, 2, head_dim), torch.float32) if recipe.smooth_v else None,
        "lse_shift": ((2, 4, 150), torch.float32) if recipe.smooth_k else None,
        "key_bias": None,
    }
    for field, shape_and_dtype in want.items():
        t = getattr(x, field)
        assert shape_and_dtype == (None if t is None else (tuple(t.shape), t.dtype)), field
        assert t is None or t.is_contiguous(), field
    assert (x.head_dim, x.seqlen_q, x.seqlen_k, x.recipe) == (head_dim, 150, 270, recipe)
    q8, k8, v8 = x.q.float(), x.k.float(), x.v.float()
    assert (q8[..., head_dim:] == 0).all() and (k8[..., head_dim:] == 0).all()
    ones = torch.zeros(tile_d + 1 - head_dim, 272)
    ones[tile_d - head_dim] = 1
    ones[tile_d - head_dim, 270:] = 0  # keys 14 and 15 of a group stay where they are
    assert torch.equal(v8[..., head_dim:, :], ones.expand(2, 2, -1, -1))
    scattered = quantize_qkv(*(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)), recipe)
    assert all(torch.equal(a.float(), b.float()) for a, b in ((x.q, scattered.q), (x.v, scattered.v)))


def test_keys_of_v_are_permuted_among_sixteen() -> None:
    v = torch.arange(1.0, 33.0)[None, :, None, None].repeat(1, 1, 1, 8)  # key j holds j + 1 (on 16: exact)
    v[:, 16:] -= 16
    x = quantize_qkv(v, v, v, replace(PLAIN, v_granularity="none"))
    want = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    for group in (0, 16):
        assert (x.v[0, 0, 3, group : group + 16].float() - 1).tolist() == want
    for t in range(4):
        for h in range(2):
            for i in range(2):
                assert want[4 * t + 2 * h + i] == 8 * h + 2 * t + i
    assert torch.equal(x.v_codes().float(), v)


def test_e4m3_rounds_to_nearest_even_and_saturates(seed: int) -> None:
    table = np.array(e4m3_values())
    bounds = (table[:-1] + table[1:]) / 2
    x = np.concatenate([table, bounds, np.nextafter(bounds.astype(np.float32), 0), [448.1, 470, 1e9]])
    x = np.concatenate([x, np.abs(np.random.default_rng(seed).normal(size=500) * 100)]).astype(np.float32)
    codes = np.searchsorted(bounds, x.astype(np.float64), side="left")
    tie = np.isin(x.astype(np.float64), bounds)
    codes += tie & (codes % 2 == 1)  # a tie at bounds[i] lies between codes i and i + 1
    v = torch.from_numpy(np.resize(x, (8, -(-len(x) // 8))).T.copy())[None, :, None]
    both = torch.cat((v, -v), 1)
    x8 = quantize_qkv(both, both, both, replace(PLAIN, v_granularity="none"))
    got = x8.v_codes().view(torch.uint8)[0, :, 0]
    want = torch.from_numpy(np.resize(codes, (8, v.shape[1])).T.copy()).to(torch.uint8)
    assert torch.equal(got[: v.shape[1]], want)
    assert torch.equal(got[v.shape[1] :] & 0x7F, want)


@pytest.mark.parametrize("qk_dtype", ["e4m3", "int8"])
@pytest.mark.parametrize("granularity", ["tensor", "group", "head", "block", "token"])
def test_scales_of_q_and_k(granularity: str, qk_dtype: str, seed: int) -> None:
    k_granularity = "head" if granularity == "group" else granularity
    recipe = replace(PLAIN, qk_dtype=qk_dtype, q_granularity=granularity, k_granularity=k_granularity)
    q, k, v = GQA.qkv(torch.float16, seed)
    x = quantize_qkv(q, k, v, recipe)
    limit = np.float32(448 if qk_dtype == "e4m3" else 127)
    q_scale, k_scale = x.q_scale_of_rows(), x.k_scale_of_keys()
    for t, scale, block, group in ((q, q_scale, Q_BLOCK, 2), (k, k_scale, K_BLOCK, 1)):
        for b, row, h in ((0, 0, 0), (1, 149, 1), (0, 130, t.shape[2] - 1), (1, 63, 0)):
            first = h // group * group
            members = {
                "tensor": t,
                "group": t[b, :, first : first + group],
                "head": t[b, :, h],
                "block": t[b, row // block * block : (row // block + 1) * block, h],
                "token": t[b, row, h],
            }[granularity if group == 2 else k_granularity]
            amax = np.float32(members.abs().max().item())
            assert scale[b, h, row].item() == amax / limit
            codes = (x.q if t is q else x.k)[b, row, h, :72].float().numpy()
            elements = t[b, row, h].float().numpy()
            scaled = elements * (limit / amax)
            if qk_dtype == "int8":  # the exact product is rounded, once
                assert (codes == np.rint(elements.astype(np.float64) * (limit / amax))).all()
            else:
                assert (np.abs(codes - scaled) <= np.maximum(np.abs(scaled) / 16, 2.0**-10)).all()


@pytest.mark.parametrize("granularity", ["none", "tensor", "head", "channel"])
def test_scales_of_v(granularity: str, seed: int) -> None:
    q, k, v = GQA.qkv(torch.bfloat16, seed)
    x = quantize_qkv(q, k, v, replace(PLAIN, v_granularity=granularity))
    dims = {"tensor": (0, 1, 2, 3), "head": (1, 3), "channel": (1,)}.get(granularity)
    amax = torch.tensor(448.0) if dims is None else v.float().abs().amax(dims, keepdim=True)
    want = (amax / torch.full_like(amax, 448)).expand(2, 1, 2, 72) if dims else torch.ones(2, 1, 2, 72)
    assert torch.equal(x.v_scale[:, None], want)
    assert ((x.dequantize()[2] - v).abs() <= v.abs() / 15.9 + x.v_scale[:, None] * 2.0**-10).all()


@pytest.mark.parametrize("head_dim", [64, 72])
def test_k_without_a_scale(head_dim: int, seed: int) -> None:
    """What rounding to e4m3 leaves of rotated K: 1/16 of an element, 2**-10 near 0, and 448 at most."""
    q, k, v = Case(1, 1, 1, 8, 130, head_dim).qkv(torch.float32, seed)
    k[0, 5] = 300.0
    recipe = replace(PLAIN, k_granularity="none", rotation="hadamard")
    x = quantize_qkv(q, k, v, recipe)
    rotated = rotate(k[0, :, 0], rotation_signs(head_dim, recipe.rotation_seed))
    assert (x.k_scale == 1).all() and x.k_scale.shape == (1, 1, 1)
    codes = x.k[0, :, 0, :head_dim].float()
    clamped = rotated.clamp(-448, 448)
    assert ((codes - clamped).abs() <= clamped.abs() / 15.9 + 2.0**-10).all()
    assert rotated.abs().max() > 448 and (codes.abs() == 448).any()
    empty = quantize_qkv(q, k[:, :0], v[:, :0], recipe)
    assert torch.equal(empty.k_scale, x.k_scale)


def test_means_add_in_the_documented_order(seed: int) -> None:
    # 1324 keys: eleven chunks, the last of 44, so that three of the eight sums are of two.
    v = (torch.randn(1, 1324, 1, 8) + 3).float()
    v[0, 7, 0, 0], v[0, 1323, 0, 1] = float("inf"), float("nan")  # count as 0
    x = quantize_qkv(v, v, v, replace(PLAIN, smooth_v=True))
    padded = np.zeros((1408, 8), np.float32)
    padded[:1324] = np.where(np.isfinite(v[0, :, 0].numpy()), v[0, :, 0].numpy(), 0)

    def halve(parts: list[np.ndarray]) -> np.ndarray:
        while len(parts) > 1:
            half = len(parts) // 2
            parts = [parts[i] + parts[i + half] for i in range(half)]
        return parts[0]

    chunks = []
    for chunk in padded.reshape(11, 128, 8):
        lanes = [chunk[r] for r in range(16)]
        for i in range(1, 8):
            lanes = [lanes[r] + chunk[16 * i + r] for r in range(16)]
        chunks.append(halve(lanes))
    ctas = [chunks[r] + chunks[r + 8] if r < 3 else chunks[r] for r in range(8)]
    assert x.v_mean[0, 0].numpy().tolist() == (halve(ctas) / np.float32(1324)).tolist()


def test_sampled_means_are_of_the_sample(seed: int) -> None:
    q, k, v = Case(2, 2, 1, 1500, 2100, 24).qkv(torch.float32, seed)
    recipe = replace(PLAIN, smooth_q=True, smooth_k=True, smooth_v=True, sample_stats=True)
    x = quantize_qkv(q, k, v, recipe)
    q_mean, k_mean, v_mean = (
        t[:, sampled_tokens(t.shape[1], shift)].double().mean(1).repeat_interleave(2 // t.shape[2], 1)
        for t, shift in ((q, 3), (k, 4), (v, 3))
    )
    lse_shift = torch.einsum("bihd,bhd->bhi", q.double(), k_mean)
    key_bias = torch.einsum("bhd,bjhd->bhj", q_mean, k.double().repeat_interleave(2, 2) - k_mean[:, None])
    for got, want in ((x.lse_shift, lse_shift), (x.key_bias, key_bias), (x.v_mean, v_mean[:, :1])):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("smooth_v", [False, True])
def test_what_outgrows_a_sample(smooth_v: bool, seed: int) -> None:
    """A sample's maximum leaves room for 32 times as much (30.9: 432 rounds to 448), then the true one."""
    q, k, v = Case(1, 1, 1, 8, 1024, 24).qkv(torch.float32, seed)
    tokens = sampled_tokens(1024, 3)
    other = next(t for t in range(1024) if t not in tokens.tolist())
    recipe = replace(PLAIN, smooth_v=smooth_v, sample_stats=True)
    v = v.clamp(-3, 3)
    v[0, tokens[0]], v[0, tokens[1]] = 4.0, -4.0
    centre = quantize_qkv(q, k, v, recipe).v_mean[0, 0] if smooth_v else torch.zeros(24)
    sampled = 4.0 + centre.abs()
    v[0, other, 0, 0], v[0, other, 0, 1], v[0, other, 0, 2] = 30.5 * sampled[0], -31.2 * sampled[1], 1e6
    v[0, tokens, 0, 3] = centre[3] = 0.0
    x = quantize_qkv(q, k, v, recipe)
    scale = x.v_scale[0, 0]
    torch.testing.assert_close(scale[4:], sampled[4:] / 14)
    torch.testing.assert_close(scale[0], sampled[0] / 14)
    for c in (1, 2, 3):
        torch.testing.assert_close(scale[c], (v[0, :, 0, c] - centre[c]).abs().max() / 448)
    assert ((x.dequantize()[2] - v).abs() <= (v - centre).abs() / 15.9 + scale * 2.0**-10).all()
    every = quantize_qkv(q, k, v, replace(recipe, sample_stats=False))
    torch.testing.assert_close(scale[1:3], every.v_scale[0, 0, 1:3], rtol=0.5, atol=0)


def test_dot_products_add_in_the_documented_order(seed: int) -> None:
    q, k, v = Case(heads_q=1, heads_kv=1, head_dim=24).qkv(torch.float32, seed)
    x = quantize_qkv(q, k, v, replace(PLAIN, smooth_k=True, smooth_v=True))
    mean = quantize_qkv(q, v, k, replace(PLAIN, smooth_v=True)).v_mean[0, 0].numpy()
    parts = np.zeros((32, 113), np.float32)
    parts[:24] = (q[0, :, 0].numpy() * mean).T
    while len(parts) > 1:
        parts = parts[: len(parts) // 2] + parts[len(parts) // 2 :]
    assert x.lse_shift[0, 0].numpy().tolist() == parts[0].tolist()


@pytest.mark.parametrize("head_dim", [8, 40, 72, 96, 128, 248, 256])
def test_rotation_is_orthogonal(head_dim: int, seed: int) -> None:
    signs = rotation_signs(head_dim, seed)
    assert torch.equal(signs.abs(), torch.ones(head_dim)) and torch.equal(
        signs, rotation_signs(head_dim, seed)
    )
    matrix = rotate(torch.eye(head_dim), signs)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(head_dim), atol=1e-6, rtol=0)
    q, k = torch.randn(50, head_dim), torch.randn(60, head_dim)
    want = q.double() @ k.double().T
    got = rotate(q, signs).double() @ rotate(k, signs).double().T
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    if head_dim == 72:
        assert (matrix[:64, 64:] == 0).all() and (matrix[64:, :64] == 0).all()
        assert torch.equal(matrix[:64, :64].abs(), torch.full((64, 64), 0.125))


def test_rotation_adds_as_a_tensor_core_does() -> None:
    """Sums of 16 bf16 elements that mma.sync gave on an H200.

    One bit kept more or less, rounding to nearest or groups of 8 change some of each eight.
    """
    measured = {
        "3752be2d3525b6e1b7823d17ba94bb9f3fb4bca83f81bd553d4cbb15bbc23b3c": (
            "400fde99402a9a523eb576693f0e60534006399b40294e543e2b9cf23f04005b"
        ),
        "bc823367360c3d92b602b806b55bbfd33c44baee3728b9ebb5273f8136ab3e54": (
            "bebcab1e3eb8aec04017d8c2c01859613eff5cccbf01ad0bc021a5f8402125cb"
        ),
        "370f3e2cbeb0352d3c82b7a3b71835dbbc5eb94135e239adb91fbf103a25b791": (
            "bf3c414e3d5b0154bd4bc1f43f3d87d43eb6cbb5bf8d58fa3f85c4c7bed466f3"
        ),
    }
    for elements, sums in measured.items():
        high_halves = np.frombuffer(bytes.fromhex(elements), ">u2").astype(np.uint32) << 16
        x = torch.from_numpy(high_halves.view(np.float32))
        got = 4 * rotate(x, torch.ones(16))[:8]  # rows 0 to 7 of the Hadamard matrix of 16
        assert got.tolist() == np.frombuffer(bytes.fromhex(sums), ">f4").tolist()


def test_what_the_rotation_mixes_with_a_nan_is_nan() -> None:
    x = torch.randn(3, 72)
    x[1, 5], x[2, 70] = float("inf"), float("nan")
    finite = rotate(x, rotation_signs(72, 0)).isfinite()
    assert finite[0].all() and not finite[1, :64].any() and finite[1, 64:].all()
    assert finite[2, :64].all() and not finite[2, 64:].any()


def test_rotation_spreads_an_outlier(seed: int) -> None:
    q, k, v = Case(head_dim=128).qkv(torch.bfloat16, seed)
    q[:, 5, :, 17] = 200.0
    plain = quantize_qkv(q, k, v, PLAIN)
    rotated = quantize_qkv(q, k, v, replace(PLAIN, rotation="hadamard"))
    assert (rotated.q_scale[..., 0] < plain.q_scale[..., 0] / 5).all()


@pytest.mark.parametrize("smooth_q", [False, True])
def test_smoothing_keeps_scores_and_lse(smooth_q: bool, seed: int) -> None:
    q, k, v = GQA.qkv(torch.float32, seed)
    q, k = q + 2 * torch.randn(1, 1, 1, 72), k + 2 * torch.randn(1, 1, 1, 72)
    # int8 a token, to bring the rounding down to where a missing term would show.
    recipe = replace(
        PLAIN, qk_dtype="int8", q_granularity="token", k_granularity="token", rotation="hadamard",
        smooth_k=True, smooth_q=smooth_q, smooth_v=True, compensate_v=True,
    )  # fmt: skip
    x = quantize_qkv(q, k, v, recipe)
    _, lse = attention_dequantized(x, 0.1)
    _, want = attention_reference(q, k, v, 0.1)
    assert (lse - want).abs().max() < 0.1  # of a spread of several units
    q_deq, k_deq, v_deq = x.dequantize()
    scores = torch.einsum("bihd,bjhd->bhij", q_deq, k_deq.repeat_interleave(2, 2)) + x.lse_shift[..., None]
    if smooth_q:
        scores += x.key_bias[:, :, None]
    exact = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2))
    assert (scores - exact).norm() < 0.02 * exact.norm()


def test_a_common_offset_of_keys_disappears_in_smoothing(seed: int) -> None:
    # Whole numbers and a power of two of them, so that the means are exact.
    k = torch.randint(-8, 9, (1, 256, 2, 64)).float()
    q = torch.randint(-8, 9, (1, 64, 2, 64)).float()
    offset = 64.0 * torch.randint(-8, 9, (1, 1, 2, 64)).float()
    recipe = replace(PLAIN, smooth_k=True, rotation="hadamard")
    x, moved = quantize_qkv(q, k, k, recipe), quantize_qkv(q, k + offset, k, recipe)
    assert torch.equal(x.k.float(), moved.k.float()) and torch.equal(x.k_scale, moved.k_scale)
    shift = torch.einsum("bihd,bjhd->bhi", q, offset)
    assert torch.equal(moved.lse_shift - x.lse_shift, shift)
    bare = replace(recipe, smooth_k=False)
    assert quantize_qkv(q, k + offset, k, bare).k_scale.min() > 4 * x.k_scale.max()


@pytest.mark.parametrize("sample_stats", [False, True])
def test_compensation_leaves_no_mean_error_in_v(sample_stats: bool, seed: int) -> None:
    q, k, v = Case(1, 1, 1, 8, 1100, 72).qkv(torch.float32, seed)
    for smooth_v in (False, True):
        recipe = replace(PLAIN, smooth_v=smooth_v, sample_stats=sample_stats)
        left = [
            (quantize_qkv(q, k, v + 1, replace(recipe, compensate_v=on)).dequantize()[2] - (v + 1)).mean(1)
            for on in (False, True)
        ]
        assert left[0].abs().max() > 1e-4 and left[1].abs().max() < 2e-6


def test_rounding_errors_add_in_the_documented_order(seed: int) -> None:
    # 300 keys: three chunks, the last of 44, filled up to four.
    v = (torch.randn(1, 300, 1, 8) + 3).float()
    v[0, 7, 0, 0], v[0, 299, 0, 1] = float("inf"), float("nan")  # count as 0
    x = quantize_qkv(v, v, v, replace(PLAIN, compensate_v=True))
    scale = x.v_scale[0, 0].numpy()
    amax = np.where(np.isfinite(v[0, :, 0].numpy()), np.abs(v[0, :, 0].numpy()), 0).max(0)
    scaled = np.zeros((512, 8), np.float32)
    scaled[:300] = v[0, :, 0].numpy() * (np.float32(448) / amax)
    codes = np.zeros((512, 8), np.float32)
    codes[:300] = x.v_codes()[0, :, 0].float().numpy()
    finite = np.isfinite(scaled)
    scaled, codes = np.where(finite, scaled, np.float32(0)), np.where(finite, codes, np.float32(0))
    errors = []
    for chunk in range(4):
        threads = [np.zeros(8, np.float32) for _ in range(4)]
        for group in range(8):
            for t in range(4):
                for token in (2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9):
                    threads[t] = threads[t] + scaled[128 * chunk + 16 * group + token]
        total = (threads[0] + threads[1]) + (threads[2] + threads[3])
        errors.append(
            total - codes[128 * chunk : 128 * chunk + 128].sum(0, dtype=np.float64).astype(np.float32)
        )
    mean = ((errors[0] + errors[2]) + (errors[1] + errors[3])) / np.float32(300)
    assert x.v_mean[0, 0].numpy().tolist() == (scale * mean).tolist()


def test_saturation_and_non_finite_values() -> None:
    v = torch.zeros(1, 4, 1, 8)
    v[0, :, 0, 0] = torch.tensor([1e4, -1e4, 449.0, -448.0])
    v[0, :3, 0, 1] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    x = quantize_qkv(v, v, v, replace(PLAIN, v_granularity="none"))
    assert x.v_codes()[0, :, 0, 0].float().tolist() == [448.0, -448.0, 448.0, -448.0]
    assert x.v_codes().view(torch.uint8)[0, :3, 0, 1].tolist() == [0x7F] * 3
    assert x.q.view(torch.uint8)[0, :3, 0, 1].tolist() == [0x7F] * 3
    assert x.q_scale.item() == np.float32(1e4) / np.float32(448)  # NaN and infinity stay out of it


def test_int8_says_nan_in_the_scale() -> None:
    q = torch.ones(1, 200, 2, 8)
    q[0, 70, 1, 3] = float("nan")
    x = quantize_qkv(q, q, q, replace(PLAIN, qk_dtype="int8"))
    assert x.q_scale.isnan().tolist() == [[[False] * 4, [False, True, False, False]]]
    assert x.k_scale.isnan().tolist() == [[[False] * 2, [True, False]]]
    assert x.q[0, 70, 1].tolist() == [127, 127, 127, 0] + [127] * 4 + [0] * 8
    x = quantize_qkv(q, q, q, replace(PLAIN, qk_dtype="int8", q_granularity="token", k_granularity="head"))
    assert x.q_scale.isnan().nonzero().tolist() == [[0, 1, 70]]
    assert x.k_scale.isnan().tolist() == [[[False], [True]]]


@pytest.mark.parametrize("tiny", [0.0, 1e-38, 1e-31])
@pytest.mark.parametrize("name", FP8_PRESETS)
def test_a_head_of_zeros(name: str, tiny: float, seed: int) -> None:
    q, k, v = GQA.qkv(torch.float32, seed)
    q[:, :, 1], k[:, :, 1], v[:, :, 1] = tiny, tiny, tiny
    x = quantize_qkv(q, k, v, FP8_PRESETS[name])
    for scale in (x.q_scale, x.k_scale, x.v_scale):
        assert scale.isfinite().all() and (scale > 0).all()
    assert (x.v_codes()[:, :, 1].float() == 0).all()
    if FP8_PRESETS[name].q_granularity != "group":  # else the scale is the other head's
        assert (x.q[:, :, 1].float() == 0).all() and (x.q_scale[:, 1] == 1).all()


def test_empty_sequences(seed: int) -> None:
    for recipe in (*FP8_PRESETS.values(), replace(PLAIN, smooth_q=True, v_granularity="tensor")):
        q, k, v = replace(GQA, seqlen_k=0).qkv(torch.bfloat16, seed)
        x = quantize_qkv(q, k, v, recipe)
        assert x.k.shape == (2, 0, 2, 80) and x.v.shape == (2, 2, 129, 0)
        assert x.k_scale_of_keys().shape == (2, 2, 0) and x.dequantize()[2].shape == v.shape
        assert quantize_qkv(q[:, :0], k, v, recipe).q_scale_of_rows().shape == (2, 4, 0)
        assert quantize_qkv(q[:0], k[:0], v[:0], recipe).q.shape == (0, 150, 4, 80)


def test_quantize_checks_its_inputs(seed: int) -> None:
    q, k, v = GQA.qkv(torch.bfloat16, seed)
    with pytest.raises(ValueError, match="have dtypes"):
        quantize_qkv(q, k.half(), v)
    with pytest.raises(ValueError, match="have dtypes"):
        quantize_qkv(*(t.double() for t in (q, k, v)))
    with pytest.raises(ValueError, match="4 heads and k, v have 3"):
        quantize_qkv(q, torch.cat((k, k[:, :, :1]), 2), torch.cat((v, v[:, :, :1]), 2))
    with pytest.raises(ValueError, match="head_dim is 60"):
        quantize_qkv(q[..., :60], k[..., :60], v[..., :60])
    assert quantize_qkv(q, k, v).recipe == Fp8Recipe.default()


def fp8_inputs(case: Case, seed: int) -> list[torch.Tensor]:
    """q, k, v in e4m3 and three descales, each with its own value a head."""
    tensors = [t.to(E4M3) for t in case.qkv(torch.float32, seed)]
    return tensors + [torch.rand(case.batch, case.heads_kv) + 0.5 for _ in range(3)]


def test_from_fp8_keeps_every_code(seed: int) -> None:
    q, k, v, q_descale, k_descale, v_descale = fp8_inputs(GQA, seed)
    k_strided = k_descale.T.contiguous().T
    x = from_fp8(q, k, v, q_descale, k_strided, v_descale)
    assert isinstance(x, QuantizedQKV) and x.recipe == Fp8Recipe.fa3()
    for codes, want in ((x.q[..., :72], q), (x.k[..., :72], k), (x.v_codes(), v)):
        assert torch.equal(codes.contiguous().view(torch.uint8), want.view(torch.uint8))
    assert x.k_scale.data_ptr() == k_strided.data_ptr() and x.v_scale.is_contiguous()
    assert torch.equal(x.q_scale, q_descale[:, [0, 0, 1, 1], None])
    assert torch.equal(x.k_scale, k_descale[..., None])
    assert torch.equal(x.v_scale, v_descale[..., None].expand(2, 2, 72))
    ones = from_fp8(q, k, v)
    assert (ones.q_scale == 1).all() and (ones.k_scale == 1).all() and (ones.v_scale == 1).all()
    assert ones.q_scale.shape == (2, 4, 1) and ones.k_scale.shape == (2, 2, 1)
    assert ones.v_scale.shape == (2, 2, 72) and ones.v_scale.is_contiguous()


def codes_in(layout: str, seed: int) -> torch.Tensor:
    """(2, 33, 3, 64 or 72) e4m3 codes, or a single batch entry and head of them, in a layout."""
    generator = torch.Generator().manual_seed(seed)

    def random(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(E4M3)

    return {
        "contiguous": lambda: random(2, 33, 3, 64),
        "heads first": lambda: random(2, 3, 33, 64).transpose(1, 2),
        "packed": lambda: random(2, 33, 3, 3, 64)[:, :, 1],
        "one batch entry for all": lambda: random(1, 33, 3, 64).expand(2, -1, -1, -1),
        "rows of 72 in 80": lambda: random(2, 33, 3, 80)[..., :72],
        "odd stride of a single": lambda: random(33 * 64).as_strided((1, 33, 1, 64), (5, 64, 7, 1)),
        "rows of 72": lambda: random(2, 33, 3, 72),
        "dimensions turned": lambda: random(2, 64, 3, 33).transpose(1, 3),
        "odd strides": lambda: random(2, 33, 3, 72)[..., :64],
        "odd start": lambda: random(1 + 2 * 33 * 3 * 64)[1:].view(2, 33, 3, 64),
    }[layout]()


@pytest.mark.parametrize(
    ("layout", "is_view"),
    [
        ("contiguous", True),
        ("heads first", True),
        ("packed", True),
        ("one batch entry for all", True),
        ("rows of 72 in 80", True),
        ("odd stride of a single", True),
        ("rows of 72", False),
        ("dimensions turned", False),
        ("odd strides", False),
        ("odd start", False),
    ],
)
def test_from_fp8_copies_only_what_tma_cannot_load(layout: str, is_view: bool, seed: int) -> None:
    codes = codes_in(layout, seed)
    x = from_fp8(codes, codes, codes)
    for t in (x.q, x.k):
        assert (t.data_ptr() == codes.data_ptr()) == is_view
        assert t.shape == codes.shape and t.stride(-1) == 1 and t.data_ptr() % 16 == 0
        assert all(stride % 16 == 0 for stride in t.stride()[:3])
        assert torch.equal(t.contiguous().view(torch.uint8), codes.contiguous().view(torch.uint8))


def test_from_fp8_keeps_views_of_scales(seed: int) -> None:
    """A scale that all heads share, or that each head has alone, is not copied."""
    q, k, v, *_ = fp8_inputs(GQA, seed)
    one = torch.rand(2, 1) + 0.5
    shared = one.expand(2, 2)
    x = from_fp8(q, k, v, shared, shared, shared)
    assert x.q_scale.data_ptr() == x.k_scale.data_ptr() == one.data_ptr()
    assert torch.equal(x.q_scale, one[..., None].expand(2, 4, 1))
    assert torch.equal(x.v_scale, one[..., None].expand(2, 2, 72)) and x.v_scale.is_contiguous()
    alone = from_fp8(q[:, :, :2], k, v, shared.T.contiguous().T)
    assert alone.q_scale.shape == (2, 2, 1) and torch.equal(alone.q_scale[..., 0], shared)


def test_from_fp8_brings_far_scales_together(seed: int) -> None:
    """The kernel's offsets are int32; a stride that is never used counts as well."""
    q, k, v, descale, _, _ = fp8_inputs(Case(heads_q=2, heads_kv=1, seqlen_q=20, seqlen_k=30), seed)
    far = descale.as_strided((1, 1), (2**31, 2**31))
    x = from_fp8(q, k, v, far, far)
    for scale in (x.q_scale, x.k_scale):
        assert all(stride < 2**31 for stride in scale.stride()) and (scale == descale[0, 0]).all()


def test_from_fp8_checks_its_inputs(seed: int) -> None:
    q, k, v, descale, _, _ = fp8_inputs(GQA, seed)
    with pytest.raises(ValueError, match="if one is torch.float8_e4m3fn all must be"):
        from_fp8(q, k, v.float())
    with pytest.raises(ValueError, match=r"k_descale is torch.float32 of shape \(2, 4\)"):
        from_fp8(q, k, v, descale, torch.ones(2, 4))
    with pytest.raises(ValueError, match="v_descale is torch.float64"):
        from_fp8(q, k, v, v_descale=descale.double())
    free = ("linear_exp2", "p_offset", "rescale_threshold", "accumulation", "row_sum", "rotation_seed")
    other = replace(Fp8Recipe.default(), q_granularity="tensor", k_granularity="tensor", smooth_q=True)
    for field in (f.name for f in fields(Fp8Recipe) if f.name not in free):
        recipe = replace(Fp8Recipe.fa3(), **{field: getattr(other, field)})
        with pytest.raises(ValueError, match=f"has {field} "):
            from_fp8(q, k, v, recipe=recipe)
    assert from_fp8(q, k, v, recipe=replace(Fp8Recipe.fa3(), accumulation=1)).recipe.accumulation == 1
