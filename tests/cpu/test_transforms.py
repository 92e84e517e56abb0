"""What torch may do to a call to take derivatives of it or to map it: right, or refused in our words."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor
from torch.autograd import forward_ad

from hopper_fa import (
    Fp8Recipe,
    backend,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_quantized_func,
    merge_attention,
    quantize_qkv,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=17, seqlen_k=21, head_dim=16)
PACKED = Case(batch=2, heads_q=2, heads_kv=2, seqlen_q=19, seqlen_k=19, head_dim=16)
RECIPES = {"exact": None, "FP8": Fp8Recipe.default()}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
every_backend = pytest.mark.parametrize("backend", ["emulator", "reference"])


def attend(
    q: Tensor, k: Tensor, v: Tensor, backend: str = "emulator", **options: Any
) -> tuple[Tensor, Tensor]:
    return flash_attn_func(q, k, v, causal=True, return_lse=True, backend=backend, **options)


def loss(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    out, lse = attend(q, k, v, **options)
    return out.float().square().sum() + lse.masked_fill(lse.isinf(), 0.0).square().sum()


def gradients(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    return torch.autograd.grad(loss(*leaves, **options), leaves)


def assert_same(got: Any, expected: Any) -> None:
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def in_e4m3(seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
    return tuple(t.to(torch.float8_e4m3fn) for t in CASE.qkv(torch.float32, seed)), torch.rand(2, 2) + 0.5


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would compute fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the call was run")

    for module in (backend.emulator, backend.emulator_backward, backend.emulator_fp8, backend.reference):
        for name in vars(module):
            if name.startswith(("attention_", "gradients_")):
                monkeypatch.setattr(module, name, refuse)


def dual(call: Callable[..., Any], *inputs: Tensor, requires_grad: bool = False) -> None:
    """The call with tangents in its first input."""
    first, *others = (t.detach().requires_grad_(requires_grad) for t in inputs)
    with forward_ad.dual_level():
        call(forward_ad.make_dual(first, torch.ones_like(first)), *others)


FORWARD_MODE = {
    "jvp": lambda call, q, k, v: torch.func.jvp(lambda q: call(q, k, v), (q,), (q,)),
    "jvp of v": lambda call, q, k, v: torch.func.jvp(lambda v: call(q, k, v), (v,), (v,)),
    "jacfwd": lambda call, q, k, v: torch.func.jacfwd(lambda k: call(q, k, v))(k),
    "dual numbers": dual,
    "dual numbers and a graph": partial(dual, requires_grad=True),
}


@every_recipe
@every_backend
@pytest.mark.parametrize("mode", FORWARD_MODE)
def test_forward_mode_is_refused(
    mode: str, backend: str, recipe: Fp8Recipe | None, seed: int, nothing_runs: None
) -> None:
    call = partial(attend, backend=backend, recipe=recipe)
    with pytest.raises(NotImplementedError, match="carries a tangent .* only reverse mode is built; use"):
        FORWARD_MODE[mode](call, *CASE.qkv(torch.bfloat16, seed))


def test_forward_mode_after_another_call_is_refused(seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.func.linearize(lambda q: attend(q, k, v), q)  # which computes the value first
    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.func.hessian(loss)(q, k, v)
    leaf = q.detach().requires_grad_()
    result = loss(leaf, k, v)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.autograd.grad(result, leaf, forward_ad.make_dual(torch.ones(()), torch.ones(())))


def test_forward_mode_of_something_else(seed: int) -> None:
    """Inputs without tangents are computed as ever."""
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    expected = attend(q, k, v)[0]
    out, tangent = torch.func.jvp(lambda x: attend(q, k, v)[0] * x, (q,), (k.new_ones(q.shape),))
    assert torch.equal(out, expected * q) and torch.equal(tangent, expected)
    with forward_ad.dual_level():
        assert_same(attend(q, k, v), attend(q, k, v))
        assert_same(gradients(q, k, v), gradients(q, k, v))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_forward_mode_through_compile_is_refused(compiler: str, seed: int) -> None:
    qkv = CASE.qkv(torch.bfloat16, seed)
    compiled = torch.compile(attend, backend=compiler)
    for mode in ("jvp", "dual numbers"):
        with pytest.raises(Exception, match="carries a tangent"):
            FORWARD_MODE[mode](compiled, *qkv)


def test_forward_mode_in_e4m3_is_refused(seed: int, nothing_runs: None) -> None:
    qkv, descale = in_e4m3(seed)
    with pytest.raises(NotImplementedError, match="carries a tangent"):
        torch.func.jvp(lambda d: attend(*qkv, q_descale=d), (descale,), (descale,))
    with pytest.raises(NotImplementedError, match="carries a tangent"):
        dual(lambda d: attend(*qkv, v_descale=d), descale)


@every_recipe
@every_backend
def test_func_grad_and_vjp(backend: str, recipe: Fp8Recipe | None, seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    call = partial(loss, backend=backend, recipe=recipe)
    expected = gradients(q, k, v, backend=backend, recipe=recipe)
    assert_same(torch.func.grad(call, (0, 1, 2))(q, k, v), expected)
    value, vjp = torch.func.vjp(call, q, k, v)
    assert torch.equal(value, call(q, k, v))
    assert_same(vjp(torch.ones_like(value)), expected)
    with torch.no_grad():
        assert_same(vjp(torch.ones_like(value)), expected)


def test_vjp_of_out_alone_and_of_lse_alone(seed: int) -> None:
    qkv = CASE.qkv(torch.bfloat16, seed)
    leaves = [t.detach().requires_grad_() for t in qkv]
    for index in (0, 1):
        result = attend(*leaves)[index]
        cotangent = torch.randn(result.shape).to(result.dtype)
        _, vjp = torch.func.vjp(lambda *inputs, index=index: attend(*inputs)[index], *qkv)
        assert_same(vjp(cotangent), torch.autograd.grad(result, leaves, cotangent))


def test_func_grad_of_packed(seed: int) -> None:
    q, k, v = PACKED.qkv(torch.bfloat16, seed)
    dq, dk, dv = torch.func.grad(loss, (0, 1, 2))(q, k, v)

    def packed_loss(function: Callable[..., Any], *tensors: Tensor) -> Tensor:
        out, lse = function(*tensors, causal=True, return_lse=True, backend="emulator")
        return out.float().square().sum() + lse.square().sum()

    qkv, kv = torch.stack([q, k, v], 2), torch.stack([k, v], 2)
    dqkv = torch.func.grad(partial(packed_loss, flash_attn_qkvpacked_func))(qkv)
    assert torch.equal(dqkv, torch.stack([dq, dk, dv], 2))
    got = torch.func.grad(partial(packed_loss, flash_attn_kvpacked_func), (0, 1))(q, kv)
    assert_same(got, (dq, torch.stack([dk, dv], 2)))


def test_second_derivatives_are_refused(seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    with pytest.raises(NotImplementedError, match="a second derivative"):
        torch.func.grad(lambda q: torch.func.grad(loss)(q, k, v).float().sum())(q)
    leaf = q.detach().requires_grad_()
    (dq,) = torch.autograd.grad(loss(leaf, k, v), leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="a second derivative"):
        dq.float().sum().backward()


def test_second_derivative_that_nobody_wants(seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    leaf = q.detach().requires_grad_()
    (dq,) = torch.autograd.grad(loss(leaf, k, v), leaf, create_graph=True)
    (Ignore.apply(dq) + leaf.float().sum()).backward()
    assert torch.equal(leaf.grad, torch.ones_like(leaf))


def in_turn(call: Callable[..., Any], in_dims: tuple[int | None, ...], *inputs: Tensor) -> list[Tensor]:
    """torch.vmap as a loop."""
    size = next(t.shape[dim] for t, dim in zip(inputs, in_dims, strict=True) if dim is not None)
    results = [
        call(*(t if d is None else t.select(d, i).contiguous() for t, d in zip(inputs, in_dims, strict=True)))
        for i in range(size)
    ]
    return [torch.stack(parts) for parts in zip(*results, strict=True)]


def mapped(t: Tensor, dim: int | None, size: int = 3) -> Tensor:
    """Fresh values of t's shape, `size` of them along dim."""
    return t if dim is None else torch.randn(size, *t.shape).to(t.dtype).movedim(0, dim).contiguous()


IN_DIMS = [(0, 0, 0), (0, None, None), (None, 1, 0), (-1, None, 2), (None, None, 0)]


@every_recipe
@every_backend
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_vmap(in_dims: tuple, backend: str, recipe: Fp8Recipe | None, seed: int) -> None:
    inputs = [mapped(t, dim) for t, dim in zip(CASE.qkv(torch.bfloat16, seed), in_dims, strict=True)]
    call = partial(attend, backend=backend, recipe=recipe)
    assert_same(torch.vmap(call, in_dims)(*inputs), in_turn(call, in_dims, *inputs))


def test_vmap_of_vmap(seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    q, v = mapped(mapped(q, 0), 0, 2), mapped(v, 1, 2)
    got = torch.vmap(torch.vmap(attend, (0, None, None)), (0, None, 1))(q, k, v)
    expected = in_turn(lambda q, v: in_turn(attend, (0, None, None), q, k, v), (0, 1), q, v)
    assert_same(got, expected)


def test_vmap_of_one_batch_entry_copies_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What all elements share is a view where it can be one."""
    seen = []
    monkeypatch.setattr(
        backend.emulator,
        "attention_emulated",
        lambda q, k, v, *_: seen.append(k) or (q, q.new_zeros(q.shape[0], q.shape[2], q.shape[1])),
    )
    q, k, v = (t[:1] for t in CASE.qkv(torch.bfloat16, seed))
    torch.vmap(attend, (0, None, None))(mapped(q, 0), k, v)
    assert seen[0].shape[0] == 3 and seen[0].stride(0) == 0 and seen[0].data_ptr() == k.data_ptr()


@every_recipe
@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
def test_gradient_of_each_element(in_dims: tuple, recipe: Fp8Recipe | None, seed: int) -> None:
    """Keys and values that all elements share have a gradient for each, also where heads share them."""
    inputs = [mapped(t, dim) for t, dim in zip(CASE.qkv(torch.bfloat16, seed), in_dims, strict=True)]
    got = torch.vmap(torch.func.grad(partial(loss, recipe=recipe), (0, 1, 2)), in_dims)(*inputs)
    assert_same(got, in_turn(partial(gradients, recipe=recipe), in_dims, *inputs))


def test_gradient_of_vmap(seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    q = mapped(q, 0)

    def total(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, _ = torch.vmap(attend, (0, None, None))(q, k, v)
        return out.float().square().sum()

    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    expected = torch.autograd.grad(total(*leaves), leaves)
    assert_same(torch.func.grad(total, (0, 1, 2))(q, k, v), expected)
    each = [t.detach().requires_grad_() for t in (q, k, v)]
    sum(attend(query, *each[1:])[0].float().square().sum() for query in each[0]).backward()
    assert torch.equal(each[0].grad, expected[0])
    for got, wanted in zip(expected[1:], each[1:], strict=True):  # sums of 3 in another order
        assert (got - wanted.grad).float().norm() <= 0.01 * wanted.grad.float().norm()


@pytest.mark.parametrize("name", ["q_granularity", "k_granularity", "v_granularity"])
def test_vmap_of_scales_over_the_batch_is_refused(name: str, seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    call = partial(attend, recipe=Fp8Recipe(**{name: "tensor"}))
    with pytest.raises(NotImplementedError, match=f"{name} 'tensor', .* pass another"):
        torch.vmap(call, (0, None, None))(mapped(q, 0), k, v)


def test_vmap_in_e4m3(seed: int) -> None:
    qkv, descale = in_e4m3(seed)
    queries = torch.stack([qkv[0], qkv[0].flip(1).contiguous()], 1)

    def call(q: Tensor, descale: Tensor) -> tuple[Tensor, Tensor]:
        return attend(q, *qkv[1:], q_descale=descale, v_descale=descale)

    descales = torch.stack([descale, descale * 2])
    for in_dims, inputs in (((1, 0), (queries, descales)), ((None, 0), (qkv[0], descales))):
        assert_same(torch.vmap(call, in_dims)(*inputs), in_turn(call, in_dims, *inputs))


# Older ones cannot look at a transform from inside the graph, and leave such a call to eager execution.
TRACES_TRANSFORMS = torch.__version__ >= (2, 13)
every_compiler = pytest.mark.parametrize("compiler", ["eager", "aot_eager"])


@every_compiler
def test_compiled_vmap(compiler: str, seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    q = mapped(q, 0)
    call = torch.vmap(attend, (0, None, None))
    compiled = torch.compile(call, backend=compiler, fullgraph=TRACES_TRANSFORMS)
    assert_same(compiled(q, k, v), call(q, k, v))


@every_compiler
def test_compiled_func_grad(compiler: str, seed: int) -> None:
    """The call stays outside the graph, or is refused."""
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    call = torch.func.grad(loss, (0, 1, 2))
    torch._dynamo.reset()
    try:
        got = torch.compile(call, backend=compiler)(q, k, v)
    except NotImplementedError as error:
        assert not TRACES_TRANSFORMS and "inside a derivative of torch.func" in str(error)
    else:
        assert_same(got, call(q, k, v))


@every_recipe
def test_batched_cotangents(recipe: Fp8Recipe | None, seed: int) -> None:
    leaves = [t.requires_grad_() for t in CASE.qkv(torch.bfloat16, seed)]
    out, lse = attend(*leaves, recipe=recipe)
    douts, dlses = torch.randn(3, *out.shape).to(out.dtype), torch.randn(3, *lse.shape)
    for outputs, cotangents in (
        ((out,), (douts,)),
        ((lse,), (dlses,)),
        ((out, lse), (douts, dlses)),
    ):
        run = partial(torch.autograd.grad, outputs, leaves, retain_graph=True)
        got = run(cotangents, is_grads_batched=True)
        each = [run(parts) for parts in zip(*cotangents, strict=True)]
        assert_same(got, [torch.stack(parts) for parts in zip(*each, strict=True)])


def test_batched_cotangents_of_the_operator(seed: int) -> None:
    leaves = [t.requires_grad_() for t in CASE.qkv(torch.bfloat16, seed)]
    out, _ = torch.ops.hopper_fa.forward(leaves, None, True, False, "emulator", None)
    douts = torch.randn(3, *out.shape).to(out.dtype)
    got = torch.autograd.grad(out, leaves, douts, is_grads_batched=True, retain_graph=True)
    each = [torch.autograd.grad(out, leaves, dout, retain_graph=True) for dout in douts]
    assert_same(got, [torch.stack(parts) for parts in zip(*each, strict=True)])


def test_jacrev(seed: int) -> None:
    q, k, v = Case(heads_q=2, heads_kv=1, seqlen_q=2, seqlen_k=5, head_dim=8).qkv(torch.bfloat16, seed)
    jacobian = torch.func.jacrev(lambda q, k, v: attend(q, k, v)[1], (0, 1, 2))(q, k, v)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    lse = attend(*leaves)[1].flatten()
    rows = [torch.autograd.grad(element, leaves, retain_graph=True) for element in lse]
    for got, parts in zip(jacobian, zip(*rows, strict=True), strict=True):
        assert torch.equal(got.flatten(0, 2), torch.stack(parts))


class Ignore(torch.autograd.Function):
    """Zero, whose gradient is None and not zeros."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> Tensor:
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, ...]:
        return (None,) * len(ctx.needs_input_grad)


CALLS = {
    "q, k, v": lambda q, k, v: attend(q, k, v),
    "q, kv": lambda q, kv: flash_attn_kvpacked_func(q, kv, return_lse=True, backend="emulator"),
    "qkv": lambda qkv: flash_attn_qkvpacked_func(qkv, return_lse=True, backend="emulator"),
    "FP8": lambda q, k, v: attend(q, k, v, recipe=Fp8Recipe.default()),
    "operator": lambda *qkv: torch.ops.hopper_fa.forward(qkv, None, False, False, "emulator", None),
}


@pytest.mark.parametrize("call", CALLS)
def test_consumers_without_gradients(call: str, seed: int) -> None:
    q, k, v = PACKED.qkv(torch.bfloat16, seed)
    leaves = {"q, kv": (q, torch.stack([k, v], 2)), "qkv": (torch.stack([q, k, v], 2),)}.get(call, (q, k, v))
    leaves = [t.requires_grad_() for t in leaves]
    total = Ignore.apply(*CALLS[call](*leaves)) + sum(t.float().sum() for t in leaves)
    total.backward()
    assert_same([t.grad for t in leaves], [torch.ones_like(t) for t in leaves])


@pytest.mark.parametrize("through", ["call", "operator"])
def test_e4m3_consumers_without_gradients(through: str, seed: int) -> None:
    qkv, descale = in_e4m3(seed)
    descale.requires_grad_()
    if through == "call":
        results = attend(*qkv, k_descale=descale)
    else:
        results = torch.ops.hopper_fa.forward_e4m3(qkv, None, descale, None, None, True, "emulator", None)
    (Ignore.apply(*results) + descale.sum()).backward(retain_graph=True)
    assert torch.equal(descale.grad, torch.ones_like(descale))
    with pytest.raises(NotImplementedError, match="a gradient of attention over float8 tensors"):
        results[1].sum().backward()


def test_e4m3_func_grad_is_refused(seed: int) -> None:
    qkv, descale = in_e4m3(seed)
    with pytest.raises(NotImplementedError, match="a gradient of attention over float8 tensors"):
        torch.func.grad(lambda d: attend(*qkv, q_descale=d)[1].sum())(descale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_learned_softmax_scale_is_refused(dtype: torch.dtype, seed: int, nothing_runs: None) -> None:
    q, k, v = (t.to(dtype) for t in CASE.qkv(torch.float32, seed))
    scale = torch.tensor(0.25)

    def call(softmax_scale: Tensor) -> Tensor:
        return attend(q, k, v, softmax_scale=softmax_scale)[1].sum()

    for use in (
        lambda: call(scale.clone().requires_grad_()),
        lambda: torch.func.grad(call)(scale),
        lambda: torch.func.jvp(call, (scale,), (scale,)),
        lambda: torch.vmap(call)(scale.expand(2)),
        lambda: dual(call, scale),
    ):
        with pytest.raises(TypeError, match="^softmax_scale is of type Tensor; .* multiply q by it"):
            use()


def test_merge_attention_under_transforms(seed: int) -> None:
    """Torch operations throughout, so that every transform takes it as it is."""
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    parts = [attend(q, k[:, part], v[:, part]) for part in (slice(0, 9), slice(9, None))]
    outs, lses = (list(ts) for ts in zip(*parts, strict=True))
    outs = [t.double() for t in outs]
    lses = [t.double().clamp(min=-1e3) for t in lses]

    def merged(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return merge_attention(tensors[:2], tensors[2:])

    inputs = (*outs, *lses)
    tangents = tuple(torch.randn_like(t) for t in inputs)
    results, forward_mode = torch.func.jvp(merged, inputs, tangents)
    assert_same(results, merged(*inputs))
    cotangents = tuple(torch.randn_like(t) for t in results)
    _, vjp = torch.func.vjp(merged, *inputs)
    reverse_mode = vjp(cotangents)
    one = sum((a * b).sum() for a, b in zip(forward_mode, cotangents, strict=True))
    other = sum((a * b).sum() for a, b in zip(reverse_mode, tangents, strict=True))
    torch.testing.assert_close(one, other)
    stacked = tuple(torch.stack([t, t.flip(0)]) for t in inputs)
    assert_same(torch.vmap(merged)(*stacked), in_turn(merged, (0, 0, 0, 0), *stacked))
    small = tuple(t[:1, :2] if t.ndim == 4 else t[:1, :, :2] for t in inputs)
    leaves = [t.detach().requires_grad_() for t in small]
    assert torch.autograd.gradcheck(merged, leaves, check_forward_ad=True, check_batched_grad=True)


def test_quantised_tensors_under_transforms_are_refused(seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)

    def call(q: Tensor) -> Tensor:
        return flash_attn_quantized_func(quantize_qkv(q, k, v), backend="emulator").float().sum()

    with pytest.raises(NotImplementedError, match="quantize_qkv .* pass a recipe"):
        torch.func.grad(call)(q)
    with pytest.raises(NotImplementedError, match="quantize_qkv .* pass a recipe"):
        torch.func.jvp(call, (q,), (q,))
    with pytest.raises(NotImplementedError, match="quantize_qkv .* pass a recipe"):
        dual(call, q)
    with pytest.raises(NotImplementedError, match="quantize_qkv .* pass a recipe"):
        torch.vmap(call)(mapped(q, 0))
    assert call(q.requires_grad_()).isfinite()  # detached, as documented
