"""The public calls in FP8: recipes, FlashAttention-3's call, backends, what is refused."""

from dataclasses import replace

import pytest
import torch
from cases import Case

from hopper_fa import (
    Fp8Recipe,
    attention_reference,
    error_metrics,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_quantized_func,
    kernels,
    quantization,
    quantize_kernels,
    quantize_qkv,
)
from hopper_fa import backend as backends
from hopper_fa.emulator_fp8 import attention_fp8_emulated
from hopper_fa.quantization import QuantizedQKV, from_fp8

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=40, seqlen_k=170)
E4M3 = torch.float8_e4m3fn
# What a recipe of tensors that are e4m3 already must have.
RAW = dict(q_granularity="group", k_granularity="head", v_granularity="head")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOPPER_FA_BACKEND", raising=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_recipe_quantises_inside_the_call(dtype: torch.dtype, seed: int) -> None:
    q, k, v = CASE.qkv(dtype, seed)
    recipe = Fp8Recipe.accurate()
    qkv = quantize_qkv(q, k, v, recipe)
    want = attention_fp8_emulated(qkv, 0.2, True, dtype)
    got = flash_attn_func(q, k, v, 0.2, True, recipe=recipe, return_lse=True, backend="emulator")
    assert got[0].dtype == dtype and all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    out = flash_attn_kvpacked_func(q, torch.stack((k, v), 2), 0.2, True, recipe=recipe, backend="emulator")
    assert torch.equal(out, want[0])
    got = flash_attn_quantized_func(qkv, 0.2, True, out_dtype=dtype, return_lse=True, backend="emulator")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert flash_attn_quantized_func(qkv, backend="emulator").dtype == torch.bfloat16


def test_reference_backend(seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    exact = flash_attn_func(q, k, v, backend="reference")
    recipe = replace(Fp8Recipe.default(), smooth_q=True)
    assert torch.equal(flash_attn_func(q, k, v, recipe=recipe, backend="reference"), exact)
    out, lse = flash_attn_quantized_func(quantize_qkv(q, k, v, recipe), return_lse=True, backend="reference")
    assert 1e-3 < error_metrics(out, exact)["relative_l2"] < 0.05
    assert (lse - attention_reference(q, k, v)[1]).abs().max() < 0.05
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32


@pytest.mark.parametrize("smooth_q", [False, True])
@pytest.mark.parametrize("k_granularity", ["token", "block", "head"])
def test_key_vectors(k_granularity: str, smooth_q: bool, seed: int) -> None:
    """A scale and an addend a key, in whole blocks, of every granularity."""
    recipe = replace(Fp8Recipe.default(), k_granularity=k_granularity, smooth_q=smooth_q)
    qkv = quantize_qkv(*CASE.qkv(torch.bfloat16, seed), recipe)
    k_scale, key_bias = qkv.key_vectors
    assert k_scale.shape == (2, 2, 2, 128) and k_scale.is_contiguous()
    assert key_bias.shape == (2, 4, 2, 128) and key_bias.is_contiguous() == smooth_q
    assert torch.equal(k_scale.flatten(2)[..., :170], qkv.k_scale_of_keys())
    assert (k_scale.flatten(2)[..., 170:] == 0).all() and (key_bias.flatten(2)[..., 170:] == 0).all()
    if smooth_q:
        assert torch.equal(key_bias.flatten(2)[..., :170], qkv.key_bias)
    else:
        assert (key_bias == 0).all()


def test_recipes_without_a_kernel_say_why() -> None:
    default = Fp8Recipe.default()
    for recipe in (replace(default, k_granularity="token"), replace(default, smooth_q=True)):
        for head_dim in (64, 256):
            assert kernels.fp8_variant(recipe, head_dim) == "fp8_keys"
            assert kernels.fp8_problem(recipe, head_dim) is None
    raw = replace(Fp8Recipe.fa3(), k_granularity="token")
    assert kernels.fp8_variant(raw, 64) is None and kernels.fp8_problem(raw, 64)
    assert kernels.fp8_problem(Fp8Recipe(p_offset=4.0, rescale_threshold=4.0), 64) is None
    assert "row_sum" in kernels.fp8_problem(replace(Fp8Recipe.default(), accumulation=4), 128)


def test_variants_by_head_dim() -> None:
    """What the default recipe's interval and kernel are, and that an explicit one is kept."""
    recipe = Fp8Recipe.default()
    for head_dim, interval, variant in ((64, 1, "fp8"), (128, 1, "fp8"), (136, 32, "fp8_flush")):
        assert recipe.interval(head_dim) == interval
        fastest = "fp8_linear" if head_dim <= 128 else variant
        assert kernels.fp8_variant(recipe, head_dim) == fastest
        assert kernels.fp8_problem(recipe, head_dim) is None
        assert recipe.has_linear_exp2(head_dim) == (head_dim <= 128)
        assert recipe.p_range(head_dim) == ((8.0, 0.8) if head_dim <= 128 else (6.0, 2.8))
        exact = replace(recipe, linear_exp2=False)
        assert kernels.fp8_variant(exact, head_dim) == variant and exact.p_range(head_dim) == (6.0, 2.8)
        linear = replace(recipe, linear_exp2=True)
        assert kernels.fp8_variant(linear, head_dim) == ("fp8_linear" if head_dim <= 128 else None)
        assert head_dim <= 128 or "linear_exp2" in kernels.fp8_problem(linear, head_dim)
    for row in kernels.FORWARD_TILES:
        if row["element_bytes"] == 1:
            assert row["fma_exp2_octets"] == (8 if row["variant"] == "fp8_linear" else 0)
    assert replace(recipe, smooth_v=False).interval(136) == 16
    assert kernels.fp8_variant(replace(recipe, accumulation=1), 256) == "fp8"
    assert kernels.fp8_variant(replace(recipe, accumulation=5), 256) == "fp8_flush"
    assert kernels.fp8_variant(Fp8Recipe.accurate(), 256) == "fp8_flush"
    assert kernels.fp8_variant(Fp8Recipe.fa3(), 256) == "fp8_raw"
    assert replace(recipe, k_granularity="token").interval(256) == 1
    for head_dim, variant in ((64, "fp8_linear"), (128, "fp8_linear"), (256, "fp8_flush")):
        assert kernels.fp8_variant(Fp8Recipe.causal_safe(), head_dim) == variant
    tile = kernels.forward_tile(256, "fp8_flush")
    assert tile["flush_floats"] == 64 * 256 * tile["consumer_warpgroups"]


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_3s_call(causal: bool, seed: int) -> None:
    q, k, v = (t.to(E4M3) for t in CASE.qkv(torch.float32, seed))
    descales = [torch.rand(2, 2) + 0.5 for _ in range(3)]
    out, lse = flash_attn_func(q, k, v, None, causal, None, *descales, return_lse=True, backend="emulator")
    heads = torch.tensor([0, 0, 1, 1])  # the key/value head of each query head
    q_real = q.double() * descales[0][:, None, heads, None]
    k_real, v_real = (t.double() * d[:, None, :, None] for t, d in ((k, descales[1]), (v, descales[2])))
    want, want_lse = attention_reference(q_real, k_real, v_real, causal=causal)
    assert out.dtype == torch.bfloat16
    assert error_metrics(out, want)["relative_l2"] < 0.05  # of P's rounding 0.025
    assert (lse - want_lse).abs().max() < 1e-3  # a float32 sum of the unrounded P
    exact = flash_attn_func(q, k, v, None, causal, None, *descales, backend="reference")
    torch.testing.assert_close(exact.double(), want, rtol=2**-7, atol=1e-6)

    recipe = replace(Fp8Recipe.fa3(), accumulation=1, row_sum="product")
    chosen = flash_attn_func(
        q, k, v, None, causal, q_descale=descales[0], k_descale=descales[1], v_descale=descales[2],
        recipe=recipe, backend="emulator",
    )  # fmt: skip
    assert torch.equal(chosen, attention_fp8_emulated(from_fp8(q, k, v, *descales, recipe), None, causal)[0])
    bare = flash_attn_func(q, k, v, backend="emulator")
    ones = torch.ones(2, 2)
    assert torch.equal(
        bare, flash_attn_func(q, k, v, None, False, None, ones, ones, ones, backend="emulator")
    )


def assert_same(a: QuantizedQKV, b: QuantizedQKV) -> None:
    for name, t in vars(b).items():
        same = torch.equal(getattr(a, name).float(), t.float()) if isinstance(t, torch.Tensor) else None
        assert getattr(a, name) == t if same is None else same, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cpu_quantises_by_torch(dtype: torch.dtype, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = CASE.qkv(dtype, seed)
    recipe = Fp8Recipe.accurate()
    expected = quantization.quantize_qkv(*qkv, recipe)
    for name in (None, "auto", "emulator", "reference"):
        assert_same(quantize_qkv(*qkv, recipe, backend=name), expected)
    assert quantize_qkv(*qkv).recipe == Fp8Recipe.default()
    with pytest.raises(RuntimeError, match=r'on cpu; the kernels run on Hopper.*backend="emulator"'):
        quantize_qkv(*qkv, backend="cuda")
    with pytest.raises(ValueError, match="backend is 'triton'"):
        quantize_qkv(*qkv, backend="triton")
    with pytest.raises(ValueError, match="all torch.float16 or all torch.float32"):
        quantize_qkv(*(t.double() for t in qkv), backend="cuda")
    monkeypatch.setenv("HOPPER_FA_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="on cpu; the kernels run on Hopper"):
        quantize_qkv(*qkv)
    assert_same(quantize_qkv(*qkv, recipe, backend="emulator"), expected)
    monkeypatch.setenv("HOPPER_FA_BACKEND", "emulator")
    assert_same(quantize_qkv(*qkv, recipe), expected)


def test_a_hopper_quantises_by_the_kernels(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is chosen for a device that this machine lacks."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(backends, "_is_hopper", lambda index: True)
    monkeypatch.setattr(quantize_kernels, "DTYPES", ("bf16",))
    for name in (None, "auto", "cuda"):
        assert backends.resolve_quantize(name, device, torch.bfloat16) == "cuda"
        with pytest.raises(ValueError, match=r'float32 on cuda.*\.to\(torch.bfloat16\).*backend="emulator"'):
            backends.resolve_quantize(name, device, torch.float32)
        missing = (
            r'holds quantisation kernels for torch.bfloat16 .*\.to\(torch.bfloat16\).*backend="emulator"'
        )
        with pytest.raises(RuntimeError, match=missing):
            backends.resolve_quantize(name, device, torch.float16)
    for name in ("emulator", "reference"):
        assert backends.resolve_quantize(name, device, torch.float32) == "emulator"
    monkeypatch.setattr(quantize_kernels, "DTYPES", ())
    with pytest.raises(RuntimeError, match='for no dtype .*; rebuild it, .*backend="emulator"'):
        backends.resolve_quantize(None, device, torch.bfloat16)

    monkeypatch.setattr(backends, "resolve_quantize", lambda name, device, dtype: "cuda")
    monkeypatch.setattr(quantize_kernels, "quantize_qkv", lambda *arguments: arguments)
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    recipe = Fp8Recipe.accurate()
    assert all(a is b for a, b in zip(quantize_qkv(q, k, v, recipe), (q, k, v, recipe), strict=True))
    with pytest.raises(ValueError, match="have shapes"):  # before a kernel runs
        quantize_qkv(q, k, v[..., :8])


@pytest.mark.skipif(kernels.HAS_FP8, reason="this build holds FP8 kernels")
def test_no_fp8_kernel_is_built(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    recipe = Fp8Recipe.default()
    calls = (
        lambda backend: flash_attn_func(q, k, v, recipe=recipe, backend=backend),
        lambda backend: flash_attn_func(*(t.to(E4M3) for t in (q, k, v)), backend=backend),
        lambda backend: flash_attn_quantized_func(quantize_qkv(q, k, v), backend=backend),
    )
    for call in calls:
        for backend in (None, "auto", "cuda"):
            with pytest.raises(RuntimeError, match=r'holds no FP8 kernel.*backend="emulator"'):
                call(backend)
        with pytest.raises(ValueError, match="backend is 'triton'"):
            call("triton")
    monkeypatch.setenv("HOPPER_FA_BACKEND", "emulator")
    assert all(call(None).shape == q.shape for call in calls)


def test_what_is_refused(seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    q8, k8, v8 = (t.to(E4M3) for t in (q, k, v))
    recipe = Fp8Recipe.default()
    for name in ("q_descale", "k_descale", "v_descale"):
        with pytest.raises(ValueError, match=f"^{name} is given beside .*bfloat16.*multiply {name[0]} by it"):
            flash_attn_func(q, k, v, recipe=recipe, backend="emulator", **{name: torch.ones(2, 2)})
    with pytest.raises(NotImplementedError, match="^softcap is "):
        flash_attn_func(q8, k8, v8, softcap=30.0, backend="emulator")
    with pytest.raises(ValueError, match="it must be 'e4m3'"):
        flash_attn_func(q8, k8, v8, recipe=recipe, backend="emulator")
    with pytest.raises(ValueError, match="all must be"):
        flash_attn_func(q8, k, v, backend="emulator")
    with pytest.raises(ValueError, match="have shapes"):  # rather than that a CPU has no kernels
        flash_attn_func(q8, k8, v8[..., :8])
    with pytest.raises(ValueError, match="all must be torch.bfloat16, all torch.float16 or"):
        flash_attn_func(q.float(), k.float(), v.float(), recipe=recipe, backend="emulator")
    with pytest.raises(ValueError, match="out_dtype is torch.float32"):
        flash_attn_quantized_func(quantize_qkv(q, k, v), out_dtype=torch.float32, backend="emulator")
    with pytest.raises(ValueError, match="softmax_scale is nan"):
        flash_attn_quantized_func(quantize_qkv(q, k, v), float("nan"), backend="emulator")
    with pytest.raises(TypeError, match="causal is 1"):
        flash_attn_func(q, k, v, causal=1, recipe=recipe, backend="emulator")


def test_float8_tensors_have_no_gradient(seed: int) -> None:
    q, k, v = (t.to(E4M3) for t in CASE.qkv(torch.bfloat16, seed))
    k.requires_grad_()
    out, lse = flash_attn_func(q, k, v, return_lse=True, backend="emulator")
    for t in (out, lse):
        with pytest.raises(NotImplementedError, match="float8 tensors.*straight-through"):
            t.sum().backward()
    with torch.no_grad():
        assert not flash_attn_func(q, k, v, backend="emulator").requires_grad
    assert not flash_attn_quantized_func(
        quantize_qkv(*CASE.qkv(torch.bfloat16, seed)), backend="emulator"
    ).requires_grad


DESCALES = ("q_descale", "k_descale", "v_descale")


@pytest.mark.parametrize("causal", [False, True])
def test_signs_of_descales(causal: bool, seed: int) -> None:
    """v_descale has any sign; a negative one of Q or K is refused, also beside a right one."""
    q, k, v = (t.to(E4M3) for t in CASE.qkv(torch.float32, seed))
    v_descale = torch.randn(2, 2)
    v_descale[0, 0], v_descale[1, 1] = -1.5, 0.0
    heads = torch.tensor([0, 0, 1, 1])
    for backend in ("emulator", "reference"):
        bare = flash_attn_func(q, k, v, None, causal, backend="reference").double()
        got = flash_attn_func(q, k, v, None, causal, v_descale=v_descale, backend=backend)
        want = bare * v_descale.double()[:, None, heads, None]
        assert error_metrics(got, want)["relative_l2"] < 0.05
    for name in DESCALES[:2]:
        for other in (torch.tensor([[1.0, -0.5], [1.0, 1.0]]), -torch.ones(2, 2), torch.full((2, 2), -1e-40)):
            with pytest.raises(
                ValueError, match=f"^{name} has the negative element -.*at least 0; move the sign"
            ):
                flash_attn_func(q, k, v, None, causal, backend="emulator", **{name: other})
            with pytest.raises(ValueError, match=f"^{name} has the negative element"):
                from_fp8(q, k, v, **{name: other})
        zeros = flash_attn_func(q, k, v, None, causal, backend="emulator", **{name: torch.zeros(2, 2)})
        minus = flash_attn_func(q, k, v, None, causal, backend="emulator", **{name: -torch.zeros(2, 2)})
        assert torch.equal(zeros, minus) and zeros.isfinite().all()


@pytest.mark.parametrize("recipe", [None, Fp8Recipe(**RAW, linear_exp2=True), Fp8Recipe(**RAW)])
@pytest.mark.parametrize("name", DESCALES)
def test_descales_that_are_nan(name: str, recipe: Fp8Recipe | None, seed: int) -> None:
    """NaN in what the head computes, and no other bit changed."""
    q, k, v = (t.to(E4M3) for t in CASE.qkv(torch.float32, seed))
    broken = torch.ones(2, 2)
    broken[1, 0] = float("nan")
    for backend in ("emulator", "reference"):
        options = dict(return_lse=True, recipe=recipe, backend=backend)
        out, lse = flash_attn_func(q, k, v, **options, **{name: broken})
        want_out, want_lse = flash_attn_func(q, k, v, **options)
        assert out[1, :, :2].isnan().all()
        assert name == "v_descale" or lse[1, :2].isnan().all()
        for got, want in ((out.transpose(1, 2), want_out.transpose(1, 2)), (lse, want_lse)):
            assert torch.equal(got[0], want[0]) and torch.equal(got[1, 2:], want[1, 2:])
