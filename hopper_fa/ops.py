"""torch.library operator of the forward: schema, fake, autograd. torch.compile sees only this."""

from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from hopper_fa.backend import run_forward
from hopper_fa.validation import check_shapes

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state


def forward(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    """out (as q, contiguous) and lse (batch, heads_q, seqlen_q) float32, by the operator or around it.

    NOTE: the operator's dispatch costs more CPU time than everything else in a call
    (tests/cpu/test_call_overhead.py), so plain eager calls go around it. Whatever has to see the operator
    (torch.compile, autograd, function transforms, dispatch modes, tensor subclasses) does.
    """
    if (
        not torch.compiler.is_compiling()
        and type(q) is Tensor
        and type(k) is Tensor
        and type(v) is Tensor
        and not ((q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled())
        and not _dispatch_modes()
        and _functorch_level() is None
        and _tracing_state() is None
    ):
        return run_forward(q, k, v, softmax_scale, causal, backend)
    return torch.ops.hopper_fa.forward(q, k, v, softmax_scale, causal, backend)


@torch.library.custom_op(
    "hopper_fa::forward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, float? softmax_scale, bool causal, str? backend) "
    "-> (Tensor out, Tensor lse)",
)
def _forward_op(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    return run_forward(q, k, v, softmax_scale, causal, backend)


@_forward_op.register_fake
def _forward_fake(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool, backend: str | None
) -> tuple[Tensor, Tensor]:
    check_shapes(q, k, v)
    batch, seqlen_q, heads_q, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> NoReturn:
    raise NotImplementedError(
        "a gradient through hopper_fa attention was asked for; the backward is not built yet; call it under "
        "torch.no_grad(), or detach q, k and v."
    )


_forward_op.register_autograd(_backward)


class _WithoutBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Callable[[], tuple[Tensor, Tensor]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        return run()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        _backward(ctx, *grads)


def without_backward(run: Callable[[], tuple[Tensor, Tensor]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
    """run(), whose outputs depend on `inputs` as far as autograd is concerned; the backward raises.

    For what is no operator yet: the calls in FP8.
    """
    return _WithoutBackward.apply(run, *inputs)
