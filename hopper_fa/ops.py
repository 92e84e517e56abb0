"""torch.library operators of forward and backward: schema, fake, autograd. torch.compile sees only these.

All take Q, K and V as a list of 3, 2 or 1 tensors (see `backend.unpack`), so that the gradient of a packed
tensor is one tensor too.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from hopper_fa.backend import run_backward, run_e4m3, run_forward, run_recipe, unpack
from hopper_fa.recipe import Fp8Recipe
from hopper_fa.validation import check_fp8_shapes, check_shapes

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


def forward(
    tensors: tuple[Tensor, ...],
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    backend: str | None,
    recipe: Fp8Recipe | None = None,
) -> tuple[Tensor, Tensor]:
    """out (as q, contiguous) and lse (batch, heads_q, seqlen_q) float32, by the operator or around it.

    With a recipe in FP8, and the gradient is that of the unquantised attention.

    NOTE: the operators' dispatch costs more CPU time than everything else in a call
    (tests/cpu/test_call_overhead.py), so plain eager calls go around it. Whatever has to see the operator
    (torch.compile, function transforms, dispatch modes, tensor subclasses) does.
    """
    if not _goes_around(tensors):
        text = None if recipe is None else recipe.to_text()
        return torch.ops.hopper_fa.forward(tensors, softmax_scale, causal, deterministic, backend, text)
    if _wants_gradient(tensors):
        return _Attention.apply(softmax_scale, causal, deterministic, backend, recipe, *tensors)
    return _run(tensors, softmax_scale, causal, backend, recipe)


def _run(
    tensors: Sequence[Tensor],
    softmax_scale: float | None,
    causal: bool,
    backend: str | None,
    recipe: Fp8Recipe | None,
) -> tuple[Tensor, Tensor]:
    if recipe is None:
        return run_forward(tensors, softmax_scale, causal, backend)
    return run_recipe(tensors, softmax_scale, causal, backend, recipe)


def _wants_gradient(tensors: tuple[Tensor, ...]) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _goes_around(tensors: tuple[Tensor, ...]) -> bool:
    if (
        torch.compiler.is_compiling()
        or _dispatch_modes()
        or _functorch_level() is not None
        or _tracing_state() is not None
    ):
        return False
    for t in tensors:
        if type(t) is not Tensor:
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"an attention input is a {type(t).__name__}; it must be a torch.Tensor; convert it."
                )
            return False
    return True


class _Attention(torch.autograd.Function):
    """What `forward` and the gradient of the operator are together, for eager calls."""

    @staticmethod
    def forward(
        ctx: Any,
        softmax_scale: float | None,
        causal: bool,
        deterministic: bool,
        backend: str | None,
        recipe: Fp8Recipe | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        output = _run(tensors, softmax_scale, causal, backend, recipe)
        _save(ctx, (tensors, softmax_scale, causal, deterministic, backend), output)
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        return (None, None, None, None, None, *(_gradients(ctx, dout, dlse) or ()))


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, *ctx.options = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # a gradient of LSE that nobody asked for stays None


def _gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> list[Tensor] | None:
    *tensors, out, lse = ctx.saved_tensors
    if dout is None:
        if dlse is None:
            return None
        dout = out.new_zeros(out.shape[-1]).expand_as(out)
    arguments = (dout, dlse, tensors, out, lse, *ctx.options)
    # Graphs of graphs (create_graph=True) meet the operator, which says that there is no second derivative.
    if torch.is_grad_enabled() or not _goes_around((dout, *tensors)):
        return torch.ops.hopper_fa.backward(*arguments)
    return run_backward(*arguments)


@torch.library.custom_op(
    "hopper_fa::forward",
    mutates_args=(),
    schema="(Tensor[] qkv, float? softmax_scale, bool causal, bool deterministic, str? backend, "
    "str? recipe) -> (Tensor out, Tensor lse)",
)
def _forward_op(
    qkv: list[Tensor],
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    backend: str | None,
    recipe: str | None,
) -> tuple[Tensor, Tensor]:
    parsed = None if recipe is None else Fp8Recipe.from_text(recipe)
    return _run(qkv, softmax_scale, causal, backend, parsed)


@_forward_op.register_fake
def _forward_fake(qkv: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    q, k, v = unpack(qkv)
    check_shapes(q, k, v)
    batch, seqlen_q, heads_q, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)


def _forward_gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    return _gradients(ctx, dout, dlse), None, None, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs[:5], output)


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_context)


@torch.library.custom_op(
    "hopper_fa::backward",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor[] qkv, Tensor out, Tensor lse, float? softmax_scale, "
    "bool causal, bool deterministic, str? backend) -> Tensor[]",
)
def _backward_op(
    dout: Tensor,
    dlse: Tensor | None,
    qkv: list[Tensor],
    out: Tensor,
    lse: Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    backend: str | None,
) -> list[Tensor]:
    return run_backward(dout, dlse, qkv, out, lse, softmax_scale, causal, deterministic, backend)


@_backward_op.register_fake
def _backward_fake(dout: Tensor, dlse: Tensor | None, qkv: list[Tensor], *_: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in qkv]


def _no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError(
        "a second derivative of hopper_fa attention was asked for; only the first is built; leave out "
        "create_graph=True, or use attention_reference, which can be differentiated again."
    )


_backward_op.register_autograd(_no_second_derivative)


@torch.library.custom_op(
    "hopper_fa::forward_e4m3",
    mutates_args=(),
    schema="(Tensor[] qkv, Tensor? q_descale, Tensor? k_descale, Tensor? v_descale, float? softmax_scale, "
    "bool causal, str? backend, str? recipe) -> (Tensor out, Tensor lse)",
)
def _e4m3_op(
    qkv: list[Tensor],
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    backend: str | None,
    recipe: str | None,
) -> tuple[Tensor, Tensor]:
    parsed = None if recipe is None else Fp8Recipe.from_text(recipe)
    return run_e4m3(qkv, (q_descale, k_descale, v_descale), softmax_scale, causal, backend, parsed)


@_e4m3_op.register_fake
def _e4m3_fake(qkv: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    q, k, v = unpack(qkv)
    check_fp8_shapes(q, k, v)
    batch, seqlen_q, heads_q, _ = q.shape
    lse = q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)
    return q.new_empty(q.shape, dtype=torch.bfloat16), lse


def _no_e4m3_gradient(ctx: Any, *grads: Any) -> NoReturn:
    raise NotImplementedError(
        "a gradient of attention over float8 tensors was asked for; it has none; pass bfloat16 or float16 "
        "tensors and a recipe, whose gradient is straight-through, or call it under torch.no_grad()."
    )


_e4m3_op.register_autograd(_no_e4m3_gradient)


class _WithoutGradient(torch.autograd.Function):
    """What `forward_e4m3` and the gradient of the operator are together, for eager calls."""

    @staticmethod
    def forward(ctx: Any, run: Callable[[], tuple[Tensor, Tensor]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return run()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        _no_e4m3_gradient(ctx, *grads)


def forward_e4m3(
    tensors: tuple[Tensor, ...],
    descales: tuple[Tensor | None, ...],
    softmax_scale: float | None,
    causal: bool,
    backend: str | None,
    recipe: Fp8Recipe | None,
) -> tuple[Tensor, Tensor]:
    """`forward` of tensors that are float8_e4m3fn, see `quantization.from_fp8`: out in bfloat16, and lse."""
    inputs = (*tensors, *(t for t in descales if t is not None))
    if not _goes_around(inputs):
        text = None if recipe is None else recipe.to_text()
        return torch.ops.hopper_fa.forward_e4m3(tensors, *descales, softmax_scale, causal, backend, text)
    run = functools.partial(run_e4m3, tensors, descales, softmax_scale, causal, backend, recipe)
    return _WithoutGradient.apply(run, *inputs) if _wants_gradient(inputs) else run()
