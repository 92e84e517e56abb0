"""What reaches the FP8 kernel from where: the public quantiser, tensors that are e4m3 already, any layout.

Launches and memory are counted too: nothing but our kernels works on Q, K and V.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import Case
from helpers import assert_does_not_synchronise, assert_runs_on_the_current_stream, same

from hopper_fa import (
    Fp8Recipe,
    QuantizedQKV,
    constants,
    flash_attn_func,
    flash_attn_quantized_func,
    kernels,
    quantization,
    quantize_kernels,
    quantize_qkv,
)

pytestmark = pytest.mark.skipif(
    not (kernels.HAS_FP8 and {"bf16", "fp16", "e4m3"} <= set(quantize_kernels.DTYPES)),
    reason="this build holds no FP8 kernel, or not all quantisation kernels (HOPPER_FA_DTYPES)",
)

E4M3 = torch.float8_e4m3fn
E4M3_NAN = 0x7F
PRESETS = {
    name: getattr(Fp8Recipe, name)() for name in ("default", "accurate", "causal_safe", "fa3", "fa3_paper")
}
every_preset = pytest.mark.parametrize("recipe", PRESETS.values(), ids=PRESETS)
HEAD_DIMS = (64, 72, 128, 192, 256)
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
LARGE = Case(1, 16, 16, 4096, 4096, 128)
Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOPPER_FA_BACKEND", raising=False)


def e4m3_qkv(case: Case, seed: int) -> Tensors:
    return tuple(t.to(E4M3) for t in case.qkv(torch.bfloat16, seed, "cuda"))


def descales_of(case: Case, seed: int) -> Tensors:
    """q_descale, k_descale and v_descale, each with its own value a head."""
    generator = torch.Generator("cuda").manual_seed(seed)
    size = (3, case.batch, case.heads_kv)
    return tuple(torch.rand(size, generator=generator, device="cuda", dtype=torch.float32) + 0.5)


def attend(qkv: Tensors, descales: Tensors | None = None, causal: bool = False, **options: Any) -> Tensors:
    q_descale, k_descale, v_descale = descales or (None, None, None)
    return flash_attn_func(
        *qkv, causal=causal, return_lse=True,
        q_descale=q_descale, k_descale=k_descale, v_descale=v_descale, **options,
    )  # fmt: skip


def attend_quantized(qkv: QuantizedQKV, causal: bool = False) -> Tensors:
    return flash_attn_quantized_func(qkv, causal=causal, return_lse=True)


def same_bits(a: QuantizedQKV, b: QuantizedQKV) -> bool:
    tensors = [(t, getattr(b, name)) for name, t in vars(a).items() if isinstance(t, torch.Tensor)]
    return all(torch.equal(s.view(torch.uint8), t.view(torch.uint8)) for s, t in tensors)


@every_preset
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_public_quantiser(dtype: torch.dtype, recipe: Fp8Recipe, seed: int) -> None:
    """It is the kernels', or torch's where that is asked for."""
    qkv = Case(2, 4, 2, 113, 239, 72).qkv(dtype, seed, "cuda")
    by_kernels = quantize_kernels.quantize_qkv(*qkv, recipe)
    by_torch = quantization.quantize_qkv(*qkv, recipe)
    for backend in (None, "auto", "cuda"):
        assert same_bits(quantize_qkv(*qkv, recipe, backend=backend), by_kernels)
    for backend in ("emulator", "reference"):
        assert same_bits(quantize_qkv(*qkv, recipe, backend=backend), by_torch)


def test_float32_is_refused(seed: int) -> None:
    qkv = Case(1, 2, 2, 113, 239, 64).qkv(torch.float32, seed, "cuda")
    for backend in (None, "auto", "cuda"):
        with pytest.raises(ValueError, match=r'\.to\(torch\.bfloat16\).*backend="emulator"'):
            quantize_qkv(*qkv, backend=backend)
    assert same_bits(quantize_qkv(*qkv, backend="emulator"), quantization.quantize_qkv(*qkv))


@both_masks
@every_head_dim
@every_preset
def test_kernels_and_torch_quantise_alike(recipe: Fp8Recipe, head_dim: int, causal: bool, seed: int) -> None:
    """LSE is off by what the order of a float32 sum makes in lse_shift; the output is not."""
    qkv = Case(2, 6, 2, 239, 799, head_dim).qkv(torch.bfloat16, seed, "cuda")
    out, lse = attend_quantized(quantize_qkv(*qkv, recipe), causal)
    want, want_lse = attend_quantized(quantize_qkv(*qkv, recipe, backend="emulator"), causal)
    assert torch.equal(out, want)
    torch.testing.assert_close(lse, want_lse, rtol=1e-5, atol=1e-4)
    in_one, lse_in_one = attend(qkv, None, causal, recipe=recipe)
    assert torch.equal(in_one, out) and torch.equal(lse_in_one, lse)


@both_masks
@every_head_dim
def test_three_ways_to_the_same_codes(head_dim: int, causal: bool, seed: int) -> None:
    """Kernels, torch, and their codes given back as e4m3 tensors with descales."""
    group = 3
    qkv = Case(2, 2 * group, 2, 239, 799, head_dim).qkv(torch.bfloat16, seed, "cuda")
    recipe = Fp8Recipe.fa3()
    x = quantize_qkv(*qkv, recipe)
    expected = attend_quantized(x, causal)
    assert same(attend_quantized(quantize_qkv(*qkv, recipe, backend="emulator"), causal), expected)
    codes = (x.q[..., :head_dim], x.k[..., :head_dim], x.v_codes())
    descales = (x.q_scale[:, ::group, 0], x.k_scale[..., 0], x.v_scale[..., 0])
    assert same(attend(codes, descales, causal), expected)
    assert same(attend_quantized(quantization.from_fp8(*codes, *descales), causal), expected)


def in_e4m3_nan(t: torch.Tensor) -> torch.Tensor:
    """A strided copy of e4m3 codes that TMA can load, with NaN around it: also past head_dim in its rows."""
    batch, rows, heads, dim = t.shape
    size = (batch + 2, rows + 2, heads + 2, -(-dim // 16) * 16 + 16)
    whole = torch.full(size, E4M3_NAN, dtype=torch.uint8, device=t.device)
    whole[1:-1, 1:-1, 1:-1, :dim] = t.view(torch.uint8)
    return whole.view(E4M3)[1:-1, 1:-1, 1:-1, :dim]


def packed_alike(t: torch.Tensor) -> torch.Tensor:
    """The middle one of three tensors in one, the others NaN."""
    batch, rows, heads, dim = t.shape
    whole = torch.full((batch, rows, 3, heads, dim), E4M3_NAN, dtype=torch.uint8, device=t.device)
    whole[:, :, 1] = t.view(torch.uint8)
    return whole.view(E4M3)[:, :, 1]


def unaligned(t: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(t.numel() + 1, dtype=torch.uint8, device=t.device)[1:]
    return flat.copy_(t.view(torch.uint8).flatten()).view(t.shape).view(E4M3)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda t: t,
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "packed": packed_alike,
    "in NaN": in_e4m3_nan,
    "last dimension strided": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "unaligned": unaligned,
}


@both_masks
@every_head_dim
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_e4m3(layout: str, head_dim: int, causal: bool, seed: int) -> None:
    """The bits of contiguous tensors that torch brought into the kernel's layout."""
    case = Case(2, 6, 2, 113, 799, head_dim)
    qkv, descales = e4m3_qkv(case, seed), descales_of(case, seed)
    expected = attend_quantized(quantization.from_fp8(*qkv, *descales), causal)
    assert all(t.isfinite().all() for t in expected)
    assert same(attend(tuple(map(LAYOUTS[layout], qkv)), descales, causal), expected)


@pytest.mark.parametrize("single", range(3), ids=["batch entry", "token", "head"])
def test_odd_stride_of_a_single(single: int, seed: int) -> None:
    """A stride that means nothing need not be a multiple of 16 bytes."""
    sizes, strides = [2, 300, 3, 64], [300 * 3 * 64, 3 * 64, 64, 1]
    sizes[single], strides[single] = 1, 5
    generator = torch.Generator("cuda").manual_seed(seed)
    memory = torch.randn(3, 2 * 300 * 3 * 64, device="cuda", generator=generator).to(E4M3)
    qkv = tuple(t.as_strided(sizes, strides) for t in memory.view(torch.uint8))
    qkv = tuple(t.view(E4M3) for t in qkv)
    copies = (t.clone(memory_format=torch.contiguous_format) for t in qkv)
    expected = attend_quantized(quantization.from_fp8(*copies))
    assert same(attend(qkv), expected)


@pytest.mark.parametrize("head_dim", [64, 72, 128])
def test_expanded_tensors(head_dim: int, seed: int) -> None:
    """One batch entry, or one head, for all."""
    q, k, v = e4m3_qkv(Case(2, 4, 4, 113, 239, head_dim), seed)
    for qkv in (tuple(t[:1].expand_as(t) for t in (q, k, v)), (q, k[:, :, :1].expand_as(k), v)):
        assert same(attend(qkv), attend(tuple(t.contiguous() for t in qkv)))


@pytest.mark.parametrize(("heads_q", "heads_kv"), [(4, 4), (6, 2), (5, 1)])
def test_descales_of_any_strides(heads_q: int, heads_kv: int, seed: int) -> None:
    case = Case(3, heads_q, heads_kv, 113, 239, 64)
    qkv, descales = e4m3_qkv(case, seed), descales_of(case, seed)
    expected = attend(qkv, descales)
    turned = tuple(t.T.contiguous().T for t in descales)
    assert same(attend(qkv, turned), expected)
    columns = tuple(torch.stack((torch.full_like(t, float("nan")), t), -1)[..., 1] for t in descales)
    assert same(attend(qkv, columns), expected)
    for rest in (lambda t: t[:1], lambda t: t[:, :1]):
        shared = tuple(rest(t).expand(3, heads_kv) for t in descales)
        assert same(attend(qkv, shared), attend(qkv, tuple(t.contiguous() for t in shared)))
    ones = tuple(torch.ones_like(t) for t in descales)
    assert same(attend(qkv), attend(qkv, ones))


def launches_of(call: Callable[[], object]) -> list[str]:
    """What one call has the GPU do, sorted: names of kernels, copies and fills."""
    call()  # may make what stays: workspaces, constants
    for _ in range(2):  # the profiler's own first time may miss some
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            call()
            torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sorted(event.name for event in profile.events() if event.device_type == device)


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
def test_launches_of_an_e4m3_call(head_dim: int, group: int, seed: int) -> None:
    """The kernel, V's transposition, and copies of descales, which are small."""
    case = Case(2, 2 * group, 2, 300, 500, head_dim)
    qkv, descales = e4m3_qkv(case, seed), descales_of(case, seed)
    names = launches_of(lambda: attend(qkv, descales))
    assert sum("forward_kernel" in name for name in names) == 1, names
    assert sum("transpose_v_kernel" in name for name in names) == 1, names
    assert len(names) <= 6, names
    # Without descales nothing else is launched, nor with tensors that lie in another way.
    for layout in ("contiguous", "heads first", "packed", "in NaN"):
        changed = tuple(map(LAYOUTS[layout], qkv))
        names = launches_of(lambda changed=changed: attend(changed))
        assert len(names) == 2, names


@every_preset
def test_launches_of_the_public_quantiser(recipe: Fp8Recipe, seed: int) -> None:
    """It and attention launch what a call with a recipe launches, and torch nothing."""
    qkv = Case(2, 8, 2, 1000, 1100, 128).qkv(torch.bfloat16, seed, "cuda")
    together = launches_of(lambda: flash_attn_func(*qkv, recipe=recipe))
    quantized = quantize_qkv(*qkv, recipe)
    quantiser = launches_of(lambda: quantize_qkv(*qkv, recipe))
    attention = launches_of(lambda: flash_attn_quantized_func(quantized))
    assert sorted(quantiser + attention) == together
    assert len(attention) == 1 and quantiser
    assert not [name for name in together if "at::native" in name]


def growth(call: Callable[[], object]) -> int:
    """Most bytes that one call holds at a time beyond those held before it."""
    call()  # may make what stays
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@every_preset
def test_memory_of_the_public_quantiser(recipe: Fp8Recipe, seed: int) -> None:
    """Little more than what it returns."""
    qkv = LARGE.qkv(torch.bfloat16, seed, "cuda")
    x = quantize_qkv(*qkv, recipe)
    returned = sum(t.nbytes for t in vars(x).values() if isinstance(t, torch.Tensor))
    del x
    assert growth(lambda: quantize_qkv(*qkv, recipe)) <= 1.3 * returned


@pytest.mark.parametrize("layout", ["contiguous", "heads first", "packed"])
def test_memory_of_an_e4m3_call(layout: str, seed: int) -> None:
    """Little more than the output, LSE, and V transposed: 129 rows of 4096 keys a head."""
    qkv = tuple(map(LAYOUTS[layout], e4m3_qkv(LARGE, seed)))
    descales = descales_of(LARGE, seed)
    rows = LARGE.batch * LARGE.heads_q * LARGE.seqlen_q
    needed = rows * LARGE.head_dim * 2 + rows * 4 + LARGE.heads_kv * 129 * LARGE.seqlen_k
    assert growth(lambda: attend(qkv, descales)) <= 1.3 * needed


@pytest.mark.parametrize("with_descales", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "packed", "last dimension strided"])
@pytest.mark.parametrize("head_dim", [64, 72])
def test_operator_gives_the_same_bits(head_dim: int, layout: str, with_descales: bool, seed: int) -> None:
    case = Case(2, 4, 2, 113, 239, head_dim)
    qkv = tuple(map(LAYOUTS[layout], e4m3_qkv(case, seed)))
    descales = descales_of(case, seed) if with_descales else (None, None, None)
    eager = attend(qkv, descales, True)
    assert same(torch.ops.hopper_fa.forward_e4m3(qkv, *descales, None, True, None, None), eager)

    def layer(qkv: Tensors, descales: Tensors) -> Tensors:
        return attend(qkv, descales, True)

    torch.compiler.reset()  # this test's other parameters are no reason to recompile
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert same(compiled(qkv, descales), eager)


def test_e4m3_call_runs_on_the_current_stream(seed: int) -> None:
    source = Case(1, 4, 4, 512, 512, 128).qkv(torch.bfloat16, seed, "cuda")
    assert_runs_on_the_current_stream(lambda qkv: attend(tuple(t.to(E4M3) for t in qkv)), source)


def test_neither_call_synchronises(seed: int) -> None:
    case = Case(1, 4, 4, 512, 512, 128)
    qkv, descales = case.qkv(torch.bfloat16, seed, "cuda"), descales_of(case, seed)
    codes = tuple(t.to(E4M3) for t in qkv)
    assert_does_not_synchronise(lambda: attend(codes, descales))
    assert_does_not_synchronise(lambda: attend(codes))
    assert_does_not_synchronise(lambda: quantize_qkv(*qkv))


@pytest.mark.parametrize("known", [False, True], ids=["constants of the graph", "constants from before"])
def test_cuda_graph_of_e4m3(known: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A constant that a capture makes is not kept: the graph's memory is used for other things as well."""
    case = Case(2, 8, 2, 1000, 1100, 128, True)
    static = e4m3_qkv(case, seed)
    attend(static)  # loads the kernels
    if not known:
        monkeypatch.setattr(constants, "_KEPT", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            result = attend(static, None, True)
    if not known:
        assert not any(constants._KEPT.values())
    for i in range(1, 4):
        fresh = e4m3_qkv(case, seed + i)
        for t, values in zip(static, fresh, strict=True):
            t.copy_(values)
        for t in result:
            t.fill_(float("nan"))
        graph.replay()
        assert same(result, attend(fresh, None, True))


def test_constants_are_kept_outside_of_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when torch has a graph's pool take what this thread allocates."""
    monkeypatch.setattr(constants, "_KEPT", {})
    device = torch.device("cuda", torch.cuda.current_device())
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        ordinary = torch.empty(1 << 22, dtype=torch.uint8, device=device)
        ones = constants.constant(1.0, 100, device)
    segments = [(s["address"], s["address"] + s["total_size"]) for s in pool.snapshot()]

    def is_in_the_pool(t: torch.Tensor) -> bool:
        return any(first <= t.data_ptr() < end for first, end in segments)

    assert is_in_the_pool(ordinary) and not is_in_the_pool(ones)
    assert (ones == 1).all() and ones.data_ptr() % 16 == 0
    assert constants.constant(1.0, 60, device) is ones
    larger = constants.constant(1.0, ones.numel() + 1, device)
    assert larger.numel() > ones.numel() and (larger == 1).all()
    assert constants.constant(1.0, 60, device) is larger
    assert (constants.constant(0.0, 60, device) == 0).all()


def test_recipes_of_e4m3_calls(seed: int) -> None:
    """What from_fp8 leaves free reaches the kernel."""
    case = Case(2, 4, 2, 239, 799, 128)
    qkv, descales = e4m3_qkv(case, seed), descales_of(case, seed)
    recipe = replace(Fp8Recipe.fa3(), accumulation=1, row_sum="product")
    expected = attend_quantized(quantization.from_fp8(*qkv, *descales, recipe))
    got = attend(qkv, descales, recipe=recipe)
    assert same(got, expected) and not torch.equal(got[0], attend(qkv, descales)[0])
