"""The backward of calls by a recipe: against float64 of the dequantised tensors, and the emulator."""

import pytest
import torch
from backward_helpers import poisoned_scratch
from cases import FP8_PRESETS, Case, assert_surroundings_nan, in_nan, random_gradients, recipe_row_sums
from helpers import assert_does_not_synchronise, same

from hopper_fa import (
    Fp8Recipe,
    error_metrics,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    kernels,
    quantize_kernels,
)
from hopper_fa.backend import run_quantized
from hopper_fa.emulator_backward import gradients_dequantized, gradients_quantized_emulated
from hopper_fa.quantization import QuantizedQKV, sign_bits

pytestmark = pytest.mark.skipif(not kernels.HAS_FP8, reason="this build holds no FP8 kernel")

Tensors = tuple[torch.Tensor, ...]
HEAD_DIMS = [64, 128, 256, 8, 40, 72, 96, 192, 248]


def built(head_dim: int, recipe: Fp8Recipe, dtype: torch.dtype = torch.bfloat16) -> None:
    variant = kernels.quantized_backward_variant(recipe, head_dim)
    if kernels.DTYPE_NAMES[dtype] not in kernels.backward_tile(head_dim, variant)["dtypes"]:
        pytest.skip(f"this build holds no {variant} backward for {dtype} with head_dim {head_dim}")


def quantised(
    tensors: Tensors, recipe: Fp8Recipe, scale: float, causal: bool
) -> tuple[QuantizedQKV, Tensors]:
    qkv = quantize_kernels.quantize_qkv(*tensors, recipe)
    return qkv, run_quantized(qkv, scale, causal, tensors[0].dtype, "cuda")


def run(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    qkv: QuantizedQKV,
    results: Tensors,
    case: Case,
    deterministic: bool = False,
) -> Tensors:
    """The kernels, on scratch of NaN, into gradients that are NaN and lie in NaN."""
    q = (case.batch, case.seqlen_q, case.heads_q, case.head_dim)
    k = (case.batch, case.seqlen_k, case.heads_kv, case.head_dim)
    nan = torch.full((), float("nan"), dtype=dout.dtype, device="cuda")
    gradients = tuple(in_nan(nan.expand(shape).contiguous()) for shape in (q, k, k))
    signs = sign_bits(case.head_dim, qkv.recipe.rotation_seed)
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    with poisoned_scratch():
        kernels.backward_quantized(
            in_nan(dout), qkv, *results, dlse, *gradients, scale, case.causal, deterministic, signs
        )
    for t in gradients:
        assert_surroundings_nan(t)
    return gradients


def assert_right(case: Case, recipe: Fp8Recipe, tensors: Tensors, allowed: float, with_dlse: bool) -> None:
    dout, dlse = random_gradients(tensors[0])
    dlse = dlse if with_dlse else None
    scale = case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale
    qkv, results = quantised(tensors, recipe, scale, case.causal)
    got = run(dout, dlse, qkv, results, case)
    truth = gradients_dequantized(dout, dlse, qkv, scale, case.causal)
    emulated = gradients_quantized_emulated(dout, dlse, qkv, *results, scale, case.causal)
    for gradient, want, same_numerics in zip(got, truth, emulated, strict=True):
        assert error_metrics(gradient, want)["relative_l2"] < allowed
        assert error_metrics(gradient, same_numerics.double())["relative_l2"] < 2e-3
    ordered = run(dout, dlse, qkv, results, case, deterministic=True)
    assert same(ordered, run(dout, dlse, qkv, results, case, deterministic=True))


@pytest.mark.parametrize("deviation", [1, 16, 36, 64])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("recipe", FP8_PRESETS)
def test_peaked_scores(recipe: str, head_dim: int, deviation: int, seed: int) -> None:
    """Scores of that standard deviation; the wider, the more rows see one key only.

    NOTE: the FP8 tensor core cuts the sums of e4m3 products off, so the forward's scores, and with them its
    LSE, are not those of the codes: by up to 0.2 at scores of 250 and head dim 256. int8's sums are exact.
    """
    preset = FP8_PRESETS[recipe]
    built(head_dim, preset)
    case = Case(heads_q=4, heads_kv=2, seqlen_q=512, seqlen_k=700, head_dim=head_dim, causal=deviation == 16)
    q, k, v = case.qkv(torch.float32, seed, "cuda")
    tensors = tuple(t.bfloat16() for t in (q * deviation**0.5, k * deviation**0.5, v))
    exact = preset.qk_dtype == "int8"
    assert_right(case, preset, tensors, 5e-2 if exact or deviation < 64 or head_dim < 256 else 8e-2, False)
    qkv, (_, lse) = quantised(tensors, preset, head_dim**-0.5, case.causal)
    rows = recipe_row_sums(qkv, lse, head_dim**-0.5, case.causal)
    cut = 0.0 if exact else deviation / 64 * head_dim / 256
    assert (rows - 1).abs().max() < 0.06 + 0.45 * cut
    assert abs(rows.mean().item() - 1) < 5e-3 + 0.02 * cut


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("recipe", FP8_PRESETS)
def test_shapes(recipe: str, head_dim: int, causal: bool, dtype: torch.dtype, seed: int) -> None:
    """Grouped heads, lengths that divide nothing, an offset of all keys, a gradient of LSE."""
    preset = FP8_PRESETS[recipe]
    built(head_dim, preset, dtype)
    lengths = [(113, 239), (239, 113), (1, 300), (300, 1), (65, 64), (400, 513)][seed % 6]
    case = Case(2, 6, 2, *lengths, head_dim, causal)
    q, k, v = case.qkv(dtype, seed, "cuda")
    if preset.smooth_k:  # what it takes out
        k = k + 2 * torch.randn_like(k[:, :1])
    assert_right(case, preset, (q, k, v), 5e-2, True)


@pytest.mark.parametrize("scale", [0.0, -0.125, 1.0])
def test_scales(scale: float, seed: int) -> None:
    built(128, Fp8Recipe.default())
    case = Case(1, 2, 2, 200, 200, 128, True, scale)
    tensors = case.qkv(torch.bfloat16, seed, "cuda")
    dout, dlse = random_gradients(tensors[0])
    qkv, results = quantised(tensors, Fp8Recipe.default(), scale, True)
    got = run(dout, dlse, qkv, results, case)
    for gradient, want in zip(got, gradients_dequantized(dout, dlse, qkv, scale, True), strict=True):
        assert (gradient - want).norm() <= 5e-2 * want.norm()


@pytest.mark.parametrize("recipe", FP8_PRESETS)
def test_public_calls(recipe: str, seed: int) -> None:
    """Packed tensors, a gradient of out alone, without waiting for the GPU."""
    preset = FP8_PRESETS[recipe]
    built(128, preset)
    tensors = Case(2, 4, 4, 300, 300, 128, True).qkv(torch.bfloat16, seed, "cuda")
    dout, _ = random_gradients(tensors[0])
    q, k, v = tensors
    forms = [
        (flash_attn_func, [q, k, v]),
        (flash_attn_kvpacked_func, [q, torch.stack((k, v), 2)]),
        (flash_attn_qkvpacked_func, [torch.stack((q, k, v), 2)]),
    ]
    found = []
    for function, inputs in forms:
        leaves = [t.detach().requires_grad_() for t in inputs]

        def gradients(function=function, leaves=leaves) -> Tensors:
            out = function(*leaves, causal=True, recipe=preset, deterministic=True)
            return torch.autograd.grad(out, leaves, dout)

        found.append([part for t in gradients() for part in (t.unbind(2) if t.ndim == 5 else (t,))])
        assert_does_not_synchronise(gradients)
    assert same(tuple(found[0]), tuple(found[1])) and same(tuple(found[0]), tuple(found[2]))


@pytest.mark.parametrize("recipe", ["default", "causal_safe"])
def test_compiled(recipe: str, seed: int) -> None:
    """The operator quantises again, to the same bits."""
    preset = FP8_PRESETS[recipe]
    built(64, preset)
    tensors = Case(1, 2, 2, 200, 200, 64, True).qkv(torch.bfloat16, seed, "cuda")
    dout, _ = random_gradients(tensors[0])
    leaves = [t.detach().requires_grad_() for t in tensors]

    def call(*leaves: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(*leaves, causal=True, recipe=preset, deterministic=True)

    want = torch.autograd.grad(call(*leaves), leaves, dout)
    compiled = torch.compile(call, fullgraph=True)
    assert same(torch.autograd.grad(compiled(*leaves), leaves, dout), want)


def test_graph(seed: int) -> None:
    built(128, Fp8Recipe.default())
    tensors = Case(1, 2, 2, 300, 300, 128).qkv(torch.bfloat16, seed, "cuda")
    dout, _ = random_gradients(tensors[0])
    leaves = [t.detach().requires_grad_() for t in tensors]

    def step() -> Tensors:
        out = flash_attn_func(*leaves, recipe=Fp8Recipe.default(), deterministic=True)
        return torch.autograd.grad(out, leaves, dout)

    want = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step()
    for t in got:
        t.fill_(float("nan"))
    graph.replay()
    assert same(got, want)
