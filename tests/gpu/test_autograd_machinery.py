"""What torch's machinery does to calls that run the kernels: derivatives, hooks, counts, meta tensors."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from hopper_fa import (
    Fp8Recipe,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    kernels,
)

CASE = Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=239, seqlen_k=323, head_dim=128)
PACKED = Case(batch=2, heads_q=2, heads_kv=2, seqlen_q=239, seqlen_k=239, head_dim=64)
needs_fp8 = pytest.mark.skipif(not kernels.HAS_FP8, reason="this build holds no FP8 kernels")
every_recipe = pytest.mark.parametrize(
    "recipe", [None, pytest.param(Fp8Recipe.default(), marks=needs_fp8)], ids=["exact", "FP8"]
)

pytestmark = pytest.mark.skipif(
    "bf16" not in kernels.backward_tile(128)["dtypes"] or "bf16" not in kernels.backward_tile(64)["dtypes"],
    reason="this build holds no bf16 backward for head dims 64 and 128",
)


def inputs(case: Case, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return case.qkv(torch.bfloat16, seed, "cuda")


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    return flash_attn_func(q, k, v, causal=True, return_lse=True, **options)


def loss(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out, lse = attend(q, k, v, **options)
    return out.float().square().sum() + lse.square().sum()


def gradients(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(loss(*leaves, **options), leaves)


def assert_close(got: Any, expected: Any) -> None:
    """All but equal: dQ is added up in any order, and the batch decides how tiles are worked on."""
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.isfinite().all()
        assert (a.float() - b.float()).norm() <= 0.01 * b.float().norm()


@pytest.fixture
def no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launch of attention fails the test."""

    def refuse(*_: Any) -> int:
        raise AssertionError("a kernel was launched")

    quantisation = ("token_stats", "quantize_rows", "quantize_v")
    for name in ("forward", "forward_fp8", "backward", "backward_quantized", *quantisation):
        monkeypatch.setattr(kernels._C, name, refuse)


@every_recipe
def test_forward_mode_is_refused(recipe: Fp8Recipe | None, seed: int, no_launch: None) -> None:
    q, k, v = inputs(CASE, seed)
    refused = partial(pytest.raises, NotImplementedError, match="carries a tangent .* only reverse mode")
    for transform in (
        lambda: torch.func.jvp(lambda q: attend(q, k, v, recipe=recipe), (q,), (q,)),
        lambda: torch.func.jvp(lambda v: attend(q, k, v, recipe=recipe)[0], (v,), (v,)),
    ):
        with refused():
            transform()
    for wants_gradient in (False, True):
        leaf = q.detach().requires_grad_(wants_gradient)
        with forward_ad.dual_level(), refused():
            attend(forward_ad.make_dual(leaf, torch.ones_like(leaf)), k, v, recipe=recipe)


def test_learned_softmax_scale_is_refused(seed: int, no_launch: None) -> None:
    scale = torch.tensor(0.1, device="cuda", requires_grad=True)
    with pytest.raises(TypeError, match="^softmax_scale is of type Tensor"):
        attend(*inputs(CASE, seed), softmax_scale=scale)


@every_recipe
def test_function_transforms(recipe: Fp8Recipe | None, seed: int) -> None:
    q, k, v = inputs(CASE, seed)
    call = partial(loss, recipe=recipe)
    expected = gradients(q, k, v, recipe=recipe)
    assert_close(torch.func.grad(call, (0, 1, 2))(q, k, v), expected)
    value, vjp = torch.func.vjp(call, q, k, v)
    assert_close(vjp(torch.ones_like(value)), expected)

    queries = torch.stack([q, q.flip(0)], 1)
    out, lse = torch.vmap(partial(attend, recipe=recipe), (1, None, None))(queries, k, v)
    each = torch.vmap(torch.func.grad(call, (0, 1, 2)), (1, None, None))(queries, k, v)
    for i in range(2):
        query = queries[:, i].contiguous()
        assert_close((out[i], lse[i]), attend(query, k, v, recipe=recipe))
        assert_close([t[i] for t in each], gradients(query, k, v, recipe=recipe))


@every_recipe
def test_batched_cotangents(recipe: Fp8Recipe | None, seed: int) -> None:
    leaves = [t.requires_grad_() for t in inputs(CASE, seed)]
    out, lse = attend(*leaves, recipe=recipe)
    douts = torch.randn(3, *out.shape, device="cuda", dtype=out.dtype)
    dlses = torch.randn(3, *lse.shape, device="cuda")
    run = partial(torch.autograd.grad, (out, lse), leaves, retain_graph=True)
    got = run((douts, dlses), is_grads_batched=True)
    for i in range(3):
        assert_close([t[i] for t in got], run((douts[i], dlses[i])))


class Ignore(torch.autograd.Function):
    """Zero, whose gradient is None and not zeros."""

    @staticmethod
    def forward(ctx: Any, *tensors: Tensor) -> Tensor:
        return tensors[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


def in_form(form: str, seed: int) -> tuple[Callable[..., Any], list[Tensor]]:
    """A call that returns out and lse, and leaves for it."""
    q, k, v = inputs(PACKED, seed)
    function, tensors = {
        "q, k, v": (flash_attn_func, [q, k, v]),
        "q, kv": (flash_attn_kvpacked_func, [q, torch.stack([k, v], 2)]),
        "qkv": (flash_attn_qkvpacked_func, [torch.stack([q, k, v], 2)]),
    }[form]
    return partial(function, return_lse=True), [t.requires_grad_() for t in tensors]


every_form = pytest.mark.parametrize("form", ["q, k, v", "q, kv", "qkv"])


@every_recipe
@every_form
def test_consumers_without_gradients(
    form: str, recipe: Fp8Recipe | None, seed: int, monkeypatch: Any
) -> None:
    call, leaves = in_form(form, seed)
    out, lse = call(*leaves, recipe=recipe)
    monkeypatch.setattr(kernels._C, "backward", None)  # nothing is left to run
    (Ignore.apply(out, lse) + sum(t.float().sum() for t in leaves)).backward()
    for t in leaves:
        assert torch.equal(t.grad, torch.ones_like(t))


LAYOUTS = {
    "unaligned": lambda t: t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t),
    "last dimension apart": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "odd rows": lambda t: t.new_empty(*t.shape[:-1], t.shape[-1] + 3)[..., : t.shape[-1]].copy_(t),
}


@every_recipe
@every_form
@pytest.mark.parametrize("layout", LAYOUTS)
def test_saved_tensors_in_another_layout(layout: str, form: str, recipe: Fp8Recipe | None, seed: int) -> None:
    call, leaves = in_form(form, seed)

    def run() -> tuple[Tensor, ...]:
        out, lse = call(*leaves, recipe=recipe, deterministic=True)
        return torch.autograd.grad(out.float().square().sum() + lse.square().sum(), leaves)

    expected = run()
    with saved_tensors_hooks(lambda t: t, lambda t: LAYOUTS[layout](t.detach())):
        got = run()
    for a, b in zip(got, expected, strict=True):
        assert a.is_contiguous() and torch.equal(a, b)


def test_saved_on_the_cpu(seed: int) -> None:
    call, leaves = in_form("q, k, v", seed)
    out, _ = call(*leaves, deterministic=True)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, dout)
    with save_on_cpu():
        out, _ = call(*leaves, deterministic=True)
    for a, b in zip(torch.autograd.grad(out, leaves, dout), expected, strict=True):
        assert torch.equal(a, b)


def test_saved_tensors_left_elsewhere_are_refused(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    call, leaves = in_form("q, k, v", seed)
    with saved_tensors_hooks(lambda t: t.cpu(), lambda t: t):
        out, _ = call(*leaves)
    monkeypatch.setattr(kernels._C, "backward", None)
    with pytest.raises(ValueError, match="a tensor saved for .* on cpu; it must be .* let the hook"):
        out.float().sum().backward()


@every_recipe
def test_flops(recipe: Fp8Recipe | None, seed: int) -> None:
    """As many as torch counts for its own attention, which it counts in full under a mask too."""
    q, k, v = (t.requires_grad_() for t in inputs(CASE, seed))
    with FlopCounterMode(display=False) as counter:
        attend(q, k, v, recipe=recipe)[0].sum().backward()
    q, k, v = (t.detach().repeat_interleave(4 // t.shape[2], 2).transpose(1, 2) for t in (q, k, v))
    with FlopCounterMode(display=False) as of_torch:
        heads = [t.requires_grad_() for t in (q, k, v)]
        torch.ops.aten._scaled_dot_product_flash_attention(*heads)[0].sum().backward()
    assert counter.get_total_flops() == of_torch.get_total_flops() > 0


@every_recipe
def test_meta_tensors_touch_no_gpu(recipe: Fp8Recipe | None, seed: int, no_launch: None) -> None:
    q, k, v = (t.to("meta").requires_grad_() for t in inputs(CASE, seed))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for backend in (None, "cuda"):
        out, lse = attend(q, k, v, backend=backend, recipe=recipe)
        assert out.is_meta and out.shape == q.shape and out.dtype == q.dtype
        assert lse.is_meta and lse.shape == (2, 4, 239) and lse.dtype == torch.float32
        for t, gradient in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert gradient.is_meta and gradient.shape == t.shape and gradient.dtype == t.dtype
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
