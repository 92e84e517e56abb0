"""Gradients of calls by a recipe: of attention over the dequantised tensors, from the forward's codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from cases import FP8_PRESETS, Case, random_gradients, recipe_row_sums
from torch.utils._python_dispatch import TorchDispatchMode

from hopper_fa import (
    Fp8Recipe,
    attention_reference,
    error_metrics,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    kernels,
)
from hopper_fa import backend as backends
from hopper_fa.emulator_backward import gradients_dequantized, gradients_quantized_emulated
from hopper_fa.emulator_fp8 import attention_dequantized, attention_fp8_emulated
from hopper_fa.quantization import (
    QuantizedQKV,
    quantize_qkv,
    rotate_back,
    rotation_signs,
    sign_bits,
    smooth_and_rotate,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Recipes that no kernel has a backward for.
KEY_VECTORS = {
    "smooth_q": replace(Fp8Recipe.default(), smooth_q=True, linear_exp2=False),
    "token": replace(Fp8Recipe.default(), k_granularity="token", linear_exp2=False),
}
EVERY_RECIPE = FP8_PRESETS | KEY_VECTORS


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPPER_FA_BACKEND", "emulator")


def relative_l2(x: torch.Tensor, truth: torch.Tensor) -> float:
    return error_metrics(x, truth)["relative_l2"]


def leaves_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


@pytest.mark.parametrize("deviation", [1, 16, 36, 64])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_peaked_scores(recipe: str, deviation: int, seed: int) -> None:
    """Scores of that standard deviation; the wider, the more rows see one key only."""
    case = Case(heads_q=4, heads_kv=2, seqlen_q=384, seqlen_k=300, head_dim=(64, 128)[seed % 2])
    q, k, v = case.qkv(torch.float32, seed)
    q, k, v = (t.bfloat16() for t in (q * deviation**0.5, k * deviation**0.5, v))
    dout, _ = random_gradients(q)
    scale = case.head_dim**-0.5
    qkv = quantize_qkv(q, k, v, EVERY_RECIPE[recipe])
    out, lse = attention_fp8_emulated(qkv, scale)
    got = gradients_quantized_emulated(dout, None, qkv, out, lse, scale)
    for gradient, truth in zip(got, gradients_dequantized(dout, None, qkv, scale), strict=True):
        # The few rows that see two keys alike are nearly all of the norm, so this scatters.
        assert relative_l2(gradient, truth) < (5e-2 if recipe in FP8_PRESETS else 8e-2)
    rows = recipe_row_sums(qkv, lse, scale)
    assert (rows - 1).abs().max() < 0.06 and abs(rows.mean().item() - 1) < 5e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 128, 192, 256])
@pytest.mark.parametrize("recipe", EVERY_RECIPE)
def test_accuracy_with_a_gradient_of_lse(recipe: str, head_dim: int, dtype: torch.dtype, seed: int) -> None:
    case = Case(2, 4, 2, 70, 90 - 50 * (seed % 2), head_dim, causal=True)  # rows without keys, or none
    q, k, v = case.qkv(dtype, seed)
    k = k + 2 * torch.randn_like(k[:, :1])  # what smoothing takes out
    dout, dlse = random_gradients(q)
    qkv = quantize_qkv(q, k, v, EVERY_RECIPE[recipe])
    out, lse = attention_fp8_emulated(qkv, None, True, dtype)
    scale = head_dim**-0.5
    got = gradients_quantized_emulated(dout, dlse, qkv, out, lse, scale, True)
    truth = gradients_dequantized(dout, dlse, qkv, scale, True)
    for gradient, want in zip(got, truth, strict=True):
        assert gradient.dtype == dtype and relative_l2(gradient, want) < 5e-2


def test_gradients_dequantized_are_the_derivative(seed: int) -> None:
    """Through q_mean and k_mean too, as autograd has it of the dequantised tensors."""
    q, k, v = Case(heads_q=4, heads_kv=2, seqlen_q=20, seqlen_k=30, head_dim=72).qkv(torch.float32, seed)
    recipe = replace(Fp8Recipe.accurate(), smooth_q=True)
    qkv = quantize_qkv(q, k, v, recipe)
    signs = rotation_signs(72, recipe.rotation_seed)
    q32, k32, v32 = (t.double() for t in qkv.dequantize())
    leaves = leaves_of(
        rotate_back(q32, signs) + qkv.q_mean[:, None], rotate_back(k32, signs) + qkv.k_mean[:, None], v32
    )
    out, lse = attention_reference(*leaves, 0.1)
    same_out, same_lse = attention_dequantized(qkv, 0.1)
    # What smoothing took out was computed from tensors that had not been rounded.
    torch.testing.assert_close(out, same_out, atol=5e-3, rtol=0)
    torch.testing.assert_close(lse, same_lse, atol=5e-2, rtol=0)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    want = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    for a, b in zip(gradients_dequantized(dout, dlse, qkv, 0.1), want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("head_dim", [8, 64, 72, 96, 248, 256])
def test_rotate_back(head_dim: int, seed: int) -> None:
    x = torch.randn(3, head_dim)
    signs = rotation_signs(head_dim, seed)
    rotated, factor = smooth_and_rotate(x, None, signs)
    torch.testing.assert_close(rotate_back(rotated * factor, signs), x, atol=1e-5, rtol=1e-5)
    bits = sign_bits(head_dim, seed)
    assert [bits[c // 8] >> c % 8 & 1 for c in range(head_dim)] == [int(s < 0) for s in signs]


def every_call(recipe: Fp8Recipe) -> list:
    def plain(q, k, v):
        return flash_attn_func(q, k, v, causal=True, return_lse=True, recipe=recipe)

    return [
        (3, plain),
        (2, lambda q, kv: flash_attn_kvpacked_func(q, kv, causal=True, return_lse=True, recipe=recipe)),
        (1, lambda qkv: flash_attn_qkvpacked_func(qkv, causal=True, return_lse=True, recipe=recipe)),
    ]


def packed(tensors: tuple[torch.Tensor, ...], count: int) -> list[torch.Tensor]:
    q, k, v = tensors
    return {3: [q, k, v], 2: [q, torch.stack((k, v), 2)], 1: [torch.stack((q, k, v), 2)]}[count]


@pytest.mark.parametrize("recipe", ["default", "causal_safe", "fa3"])
def test_all_ways_to_the_gradient_have_the_same_bits(recipe: str, seed: int) -> None:
    """Saved codes, codes made again by the operator, packed tensors, torch.func, batched cotangents."""
    tensors = Case(batch=2, seqlen_q=40, seqlen_k=40, causal=True).qkv(torch.bfloat16, seed)
    dout, dlse = random_gradients(tensors[0])
    want = None
    for count, call in every_call(FP8_PRESETS[recipe]):
        inputs = packed(tensors, count)
        leaves = leaves_of(*inputs)
        results = call(*leaves)
        batched = torch.autograd.grad(
            results,
            leaves,
            (torch.stack((dout, -dout)), torch.stack((dlse, dlse))),
            True,
            is_grads_batched=True,
        )
        eager = torch.autograd.grad(results, leaves, (dout, dlse))
        with no_way_around():
            leaves = leaves_of(*inputs)
            by_operator = torch.autograd.grad(call(*leaves), leaves, (dout, dlse))
        _, pull = torch.func.vjp(call, *inputs)
        for a, b, c, d in zip(eager, by_operator, pull((dout, dlse)), batched, strict=True):
            assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(a, d[0])
        flat = [part for t in eager for part in (t.unbind(2) if t.ndim == 5 else (t,))]
        want = flat if want is None else want
        assert all(torch.equal(a, b) for a, b in zip(flat, want, strict=True))


@contextmanager
def no_way_around() -> Iterator[None]:
    """Calls meet the operators, as under torch.compile."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    with Seen():
        yield


@pytest.mark.parametrize("recipe", ["default", "causal_safe"])
def test_opcheck(recipe: str, seed: int) -> None:
    q, k, v = Case(seqlen_q=20, seqlen_k=30, heads_q=4).qkv(torch.bfloat16, seed)
    dout, dlse = random_gradients(q)
    qkv = quantize_qkv(q, k, v, FP8_PRESETS[recipe])
    out, lse = attention_fp8_emulated(qkv)
    codes, form = qkv.to_tensors()
    options = (None, False, False, "emulator")
    text = FP8_PRESETS[recipe].to_text()
    for packing in (3, 2):
        arguments = (dout, dlse, out, lse, codes, list(form), text, packing, *options)
        torch.library.opcheck(torch.ops.hopper_fa.backward_quantized.default, arguments)
    arguments = (dout, None, [q, k, v], out, lse, *options, text)
    torch.library.opcheck(torch.ops.hopper_fa.backward_by_recipe.default, arguments)


def test_codes_and_output_that_do_not_fit_are_refused(seed: int) -> None:
    q, k, v = Case(seqlen_q=20, seqlen_k=20).qkv(torch.bfloat16, seed)
    qkv = quantize_qkv(q, k, v)
    out, lse = attention_fp8_emulated(qkv)
    codes, form = qkv.to_tensors()
    others = (list(form), qkv.recipe.to_text(), 3, None, False, False, "emulator")
    backward = torch.ops.hopper_fa.backward_quantized
    with pytest.raises(ValueError, match=r"^out has shape \(1, 10, 2, 64\)"):
        backward(q[:, :10], None, out[:, :10], lse[..., :10].contiguous(), codes, *others)
    wide = torch.nn.functional.pad(codes[0], (0, 16))
    with pytest.raises(ValueError, match="the codes of q and k 80 and 64 columns"):
        backward(q, None, out, lse, [wide, *codes[1:]], *others)


def test_codes_come_back_from_tensors(seed: int) -> None:
    q, k, v = Case().qkv(torch.bfloat16, seed)
    for recipe in EVERY_RECIPE.values():
        qkv = quantize_qkv(q, k, v, recipe)
        again = QuantizedQKV.from_tensors(*qkv.to_tensors(), recipe)
        for name, value in vars(again).items():
            want = getattr(qkv, name)
            if isinstance(value, torch.Tensor):
                assert value.dtype == want.dtype and value.data_ptr() == want.data_ptr()
                assert value.shape == want.shape and value.stride() == want.stride()
            else:
                assert value == want


def test_the_forward_saves_codes_and_not_the_tensors(seed: int) -> None:
    q, k, v = leaves_of(*Case(seqlen_q=200, seqlen_k=200).qkv(torch.bfloat16, seed))
    saved: list[torch.Tensor] = []

    def pack(t: torch.Tensor) -> torch.Tensor:
        saved.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = flash_attn_func(q, k, v, recipe=Fp8Recipe.default())
    of_16_bits = [t for t in saved if t.dtype == torch.bfloat16]
    assert len(of_16_bits) == 1 and of_16_bits[0].shape == out.shape
    assert sum(t.dtype == torch.int8 for t in saved) == 2


def test_codes_that_come_back_in_another_layout(seed: int) -> None:
    tensors = Case(seqlen_q=50, seqlen_k=70, head_dim=72).qkv(torch.bfloat16, seed)
    dout, _ = random_gradients(tensors[0])

    def odd(t: torch.Tensor) -> torch.Tensor:
        moved = torch.empty(*t.shape, 3, dtype=t.dtype)[..., 1]
        return moved.copy_(t)

    leaves = leaves_of(*tensors)
    want = torch.autograd.grad(flash_attn_func(*leaves, recipe=Fp8Recipe.default()), leaves, dout)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, odd):
        out = flash_attn_func(*leaves, recipe=Fp8Recipe.default())
    got = torch.autograd.grad(out, leaves, dout)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t.float()):
        out = flash_attn_func(*leaves, recipe=Fp8Recipe.default())
    with pytest.raises(ValueError, match="a tensor saved for attention's backward came back as"):
        torch.autograd.grad(out, leaves, dout)


def test_second_derivatives_are_refused(seed: int) -> None:
    leaves = leaves_of(*Case().qkv(torch.bfloat16, seed))
    out = flash_attn_func(*leaves, recipe=Fp8Recipe.default())
    (dq,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="a second derivative of hopper_fa attention"):
        dq.sum().backward()


@pytest.mark.parametrize("recipe", KEY_VECTORS)
def test_recipes_without_a_backward_kernel_are_refused_before_anything_runs(recipe: str, seed: int) -> None:
    for name in ("cuda", "auto"):
        with pytest.raises(
            NotImplementedError, match="the backward kernels take no smooth_q, and k_granularity"
        ):
            backends.check_differentiable(KEY_VECTORS[recipe], name)
    backends.check_differentiable(KEY_VECTORS[recipe], "emulator")
    leaves = leaves_of(*Case().qkv(torch.bfloat16, seed))
    with pytest.raises(NotImplementedError, match="a gradient by a recipe with smooth_q"):
        flash_attn_func(*leaves, recipe=KEY_VECTORS[recipe], backend="cuda")
    with torch.no_grad(), pytest.raises(RuntimeError, match="the kernels run on Hopper GPUs"):
        flash_attn_func(*leaves, recipe=KEY_VECTORS[recipe], backend="cuda")


def test_variants_of_the_backward() -> None:
    for name, recipe in FP8_PRESETS.items():
        for head_dim in (64, 128, 256):
            variant = kernels.quantized_backward_variant(recipe, head_dim)
            rows = name in ("accurate", "causal_safe") and head_dim <= 128
            assert variant == ("quantized_rows" if rows else "quantized")
            assert kernels.backward_tile(head_dim, variant)["quantized"]
