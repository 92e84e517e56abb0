"""torch.library operators of forward and backward: schema, fake, autograd. torch.compile sees only these.

All take Q, K and V as a list of 3, 2 or 1 tensors (see `backend.unpack`), so that the gradient of a packed
tensor is one tensor too.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter
from torch.autograd import forward_ad

from hopper_fa import flops
from hopper_fa.backend import (
    check_differentiable,
    gradient_shapes,
    quantize_inputs,
    run_backward,
    run_backward_quantized,
    run_e4m3,
    run_forward,
    run_quantized,
    run_recipe,
    unpack,
)
from hopper_fa.quantization import QuantizedQKV
from hopper_fa.recipe import Fp8Recipe
from hopper_fa.transforms import (
    VMAP,
    batched_level,
    fold,
    over_batched,
    refuse_jvp,
    refuse_shared_scales,
    refuse_tangents,
    refuse_transforms,
    unfold,
)
from hopper_fa.validation import check_fp8_shapes, check_out_dtype, check_shapes, check_softmax

_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_level = torch._C._functorch.peek_interpreter_stack
_tracing_state = torch._C._get_tracing_state
# None without hooks. Older torch cannot say, and pays for the records that hooks need.
_saved_tensors_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", lambda _: True)


def forward(
    tensors: tuple[Tensor, ...],
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    backend: str | None,
    recipe: Fp8Recipe | None = None,
) -> tuple[Tensor, Tensor]:
    """out (as q, contiguous) and lse (batch, heads_q, seqlen_q) float32, by the operator or around it.

    With a recipe in FP8; the gradient is that of attention over the dequantised tensors.

    NOTE: the operators' dispatch costs more CPU time than everything else in a call
    (tests/cpu/test_call_overhead.py), so plain eager calls go around it. Whatever has to see the operator
    (torch.compile, dispatch modes, tensor subclasses, meta tensors) does.

    Raises:
        NotImplementedError: a derivative is wanted that is not built; see `transforms` and
            `backend.check_differentiable`.
    """
    if recipe is not None and _wants_gradient(tensors):
        check_differentiable(recipe, backend)
    if not _goes_around(tensors):
        if _has_dtensor(tensors):
            from hopper_fa.sharding import over_shards

            return over_shards(
                lambda parts, _: forward(parts, softmax_scale, causal, deterministic, backend, recipe),
                tensors,
                (),
                recipe,
            )
        refuse_tangents(tensors)
        if _is_transformed() and not _is_compiled_vmap():
            return _Transformed.apply(softmax_scale, causal, deterministic, backend, recipe, *tensors)
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
        or forward_ad._current_level >= 0
    ):
        return False
    for t in tensors:
        if type(t) is not Tensor:
            if not isinstance(t, Tensor):
                raise TypeError(
                    f"an attention input is a {type(t).__name__}; it must be a torch.Tensor; convert it."
                )
            return False
    return not tensors[0].is_meta


def _has_dtensor(tensors: Sequence[Tensor]) -> bool:
    # NOTE: by its name, since the class itself takes a second to import.
    return any(type(t).__name__ == "DTensor" for t in tensors)


def _is_transformed() -> bool:
    """Whether a transform of torch.func or vmap is under way."""
    return torch._C._are_functorch_transforms_active()


def _is_compiled_vmap() -> bool:
    """Whether torch.compile is looking at a transform, where it must see the operator.

    Raises:
        NotImplementedError: the transform is one for derivatives.
    """
    if not torch.compiler.is_compiling():
        return False
    if retrieve_current_functorch_interpreter().key() != TransformType.Vmap:
        raise NotImplementedError(
            "torch.compile met attention inside a derivative of torch.func (grad, vjp, jacrev); it can "
            "compile the call and vmap of it only; compile the function and take the derivative outside."
        )
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
        qkv = None if recipe is None else quantize_inputs(tensors, softmax_scale, causal, backend, recipe)
        if qkv is None:
            output = _run(tensors, softmax_scale, causal, backend, recipe)
            text = None if recipe is None else recipe.to_text()
            _save(ctx, (tensors, softmax_scale, causal, deterministic, backend, text), output)
        else:
            output = run_quantized(qkv, softmax_scale, causal, tensors[0].dtype, backend)
            codes, form = qkv.to_tensors()
            _save(ctx, (codes, softmax_scale, causal, deterministic, backend), output)
            ctx.form = (form, recipe.to_text(), len(tensors))
        return output

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        gradients = _gradients if ctx.form is None else _gradients_of_codes
        return (None, None, None, None, None, *gradients(ctx, dout, dlse))


class _Transformed(torch.autograd.Function):
    """`_Attention` for torch.func, which takes its levels off one by one: the inner call meets the next.

    NOTE: a Function of this form takes torch longer to call, so plain calls have `_Attention`. Its rules run
    while a transform is under way, where torch.compile fails on what it would otherwise trace.
    """

    @staticmethod
    def forward(
        softmax_scale: float | None,
        causal: bool,
        deterministic: bool,
        backend: str | None,
        recipe: Fp8Recipe | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return forward(tensors, softmax_scale, causal, deterministic, backend, recipe)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        recipe = inputs[4]
        text = None if recipe is None else recipe.to_text()
        _save(ctx, (inputs[5:], *inputs[:4], text), output)

    jvp = staticmethod(refuse_jvp)

    @staticmethod
    @_disable_dynamo
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        # NOTE: saved tensors can be wrappers of a level that has ended, which only a Function unwraps.
        return (None, None, None, None, None, *_gradients(ctx, dout, dlse, transformed=True))

    @staticmethod
    @_disable_dynamo
    def vmap(
        info: Any,
        in_dims: tuple[int | None, ...],
        softmax_scale: float | None,
        causal: bool,
        deterministic: bool,
        backend: str | None,
        recipe: Fp8Recipe | None,
        *tensors: Tensor,
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        refuse_shared_scales(recipe, VMAP)
        size = info.batch_size
        folded = tuple(fold(t, dim, size) for t, dim in zip(tensors, in_dims[5:], strict=True))
        out, lse = forward(folded, softmax_scale, causal, deterministic, backend, recipe)
        return (unfold(out, size), unfold(lse, size)), (0, 0)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, *ctx.options = inputs
    ctx.form = None
    ctx.save_for_backward(*tensors, *output)
    ctx.saved = None
    if _saved_tensors_hooks(False) is not None:
        ctx.saved = [(t.shape, t.dtype, t.device) for t in (*tensors, *output)]
    ctx.set_materialize_grads(False)  # a gradient of LSE that nobody asked for stays None


def _gradients(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, transformed: bool = False
) -> Sequence[Tensor | None]:
    """A gradient for each of the tensors; None for each where out and lse have none."""
    saved = ctx.saved_tensors
    if dout is None and dlse is None:
        return [None] * (len(saved) - 2)
    if ctx.saved is not None:
        _check_saved(saved, ctx.saved)
    *tensors, out, lse = saved
    if dout is None:
        dout = out.new_zeros(out.shape[-1]).expand_as(out)
    refuse_tangents((dout, dlse, *tensors))
    inputs = (dout, dlse, out, lse, *tensors)
    if transformed or _is_transformed():
        return _TransformedGradients.apply(*ctx.options, *inputs)
    if level := batched_level(dout, dlse):
        run = functools.partial(_TransformedGradients.apply, *ctx.options)
        return over_batched(run, inputs, level)
    return _run_gradients(dout, dlse, tensors, out, lse, *ctx.options)


def _gradients_of_codes(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> Sequence[Tensor | None]:
    """`_gradients` where the forward has saved what it quantised, so that nothing is quantised again."""
    form, recipe, count = ctx.form
    saved = ctx.saved_tensors
    if dout is None and dlse is None:
        return [None] * count
    if ctx.saved is not None:
        _check_saved(saved, ctx.saved)
    *codes, out, lse = saved
    if dout is None:
        dout = out.new_zeros(out.shape[-1]).expand_as(out)
    refuse_tangents((dout, dlse))

    def run(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, *codes: Tensor) -> Sequence[Tensor]:
        arguments = (dout, dlse, out, lse, codes, form, recipe, count, *ctx.options)
        if torch.is_grad_enabled() or not _goes_around((dout, *codes)):
            return torch.ops.hopper_fa.backward_quantized(*arguments)
        return _run_backward_quantized(*arguments)

    inputs = (dout, dlse, out, lse, *codes)
    if level := batched_level(dout, dlse):
        return over_batched(run, inputs, level)
    return run(*inputs)


def _check_saved(saved: Sequence[Tensor], before: list[tuple[Any, ...]]) -> None:
    """Raise ValueError if a tensor that came back from a hook on saved tensors is not what was saved."""
    for t, (shape, dtype, device) in zip(saved, before, strict=True):
        if t.dtype != dtype or t.shape != shape or t.device != device:
            raise ValueError(
                f"a tensor saved for attention's backward came back as {t.dtype} of shape {tuple(t.shape)} "
                f"on {t.device}; it must be {dtype} of shape {tuple(shape)} on {device}, in any layout; let "
                "the hook on saved tensors undo what it did."
            )


def _run_gradients(
    dout: Tensor, dlse: Tensor | None, tensors: Sequence[Tensor], out: Tensor, lse: Tensor, *options: Any
) -> list[Tensor]:
    arguments = (dout, dlse, tensors, out, lse, *options)
    # Graphs of graphs (create_graph=True) meet the operator, which says that there is no second derivative.
    if torch.is_grad_enabled() or not _goes_around((dout, *tensors)):
        return _call_backward(*arguments)
    return _run_backward(*arguments)


class _TransformedGradients(torch.autograd.Function):
    """The backward under torch.func, and under vmap over gradients (is_grads_batched, jacrev)."""

    @staticmethod
    def forward(
        softmax_scale: float | None,
        causal: bool,
        deterministic: bool,
        backend: str | None,
        recipe: str | None,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        options = (softmax_scale, causal, deterministic, backend, recipe)
        return tuple(_run_gradients(dout, dlse, tensors, out, lse, *options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.inputs = len(inputs)
        ctx.set_materialize_grads(False)

    jvp = staticmethod(refuse_jvp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        _refuse_second_derivative(grads)
        return (None,) * ctx.inputs

    @staticmethod
    @_disable_dynamo
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        size = info.batch_size
        options = inputs[:5]
        folded = (fold(t, dim, size) for t, dim in zip(inputs[5:], in_dims[5:], strict=True))
        gradients = _TransformedGradients.apply(*options, *folded)
        return tuple(unfold(t, size) for t in gradients), (0,) * len(gradients)


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
    refuse_tangents(qkv)  # of compiled calls
    parsed = None if recipe is None else Fp8Recipe.from_text(recipe)
    return _run(qkv, softmax_scale, causal, backend, parsed)


@_forward_op.register_fake
def _forward_fake(qkv: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    q, k, v = unpack(qkv)
    check_shapes(q, k, v)
    batch, seqlen_q, heads_q, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)


def _forward_gradient(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Any, ...]:
    return list(_gradients(ctx, dout, dlse)), None, None, None, None, None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _save(ctx, inputs, output)


_forward_op.register_autograd(_forward_gradient, setup_context=_setup_context)


@_forward_op.register_vmap
@_disable_dynamo
def _forward_vmap(
    info: Any, in_dims: tuple[Any, ...], qkv: list[Tensor], *options: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    recipe = options[-1]
    if recipe is not None:
        refuse_shared_scales(Fp8Recipe.from_text(recipe), VMAP)
    size = info.batch_size
    folded = [fold(t, dim, size) for t, dim in zip(qkv, in_dims[0], strict=True)]
    out, lse = torch.ops.hopper_fa.forward(folded, *options)
    return (unfold(out, size), unfold(lse, size)), (0, 0)


_BACKWARD = (
    "Tensor dout, Tensor? dlse, Tensor[] qkv, Tensor out, Tensor lse, float? softmax_scale, bool causal, "
    "bool deterministic, str? backend"
)


# NOTE: two operators, because the schema of the first stays what compiled code of others' caches expects.
@torch.library.custom_op("hopper_fa::backward", mutates_args=(), schema=f"({_BACKWARD}) -> Tensor[]")
def _backward_op(
    dout: Tensor, dlse: Tensor | None, qkv: list[Tensor], out: Tensor, lse: Tensor, *options: Any
) -> list[Tensor]:
    return _run_backward(dout, dlse, qkv, out, lse, *options, None)


@torch.library.custom_op(
    "hopper_fa::backward_by_recipe", mutates_args=(), schema=f"({_BACKWARD}, str recipe) -> Tensor[]"
)
def _backward_by_recipe_op(
    dout: Tensor, dlse: Tensor | None, qkv: list[Tensor], out: Tensor, lse: Tensor, *options: Any
) -> list[Tensor]:
    return _run_backward(dout, dlse, qkv, out, lse, *options)


def _call_backward(*arguments: Any) -> list[Tensor]:
    """The operator for these arguments, of which the last is the recipe's text or None."""
    if arguments[-1] is None:
        return torch.ops.hopper_fa.backward(*arguments[:-1])
    return torch.ops.hopper_fa.backward_by_recipe(*arguments)


def _run_backward(
    dout: Tensor, dlse: Tensor | None, qkv: Sequence[Tensor], out: Tensor, lse: Tensor, *options: Any
) -> list[Tensor]:
    *others, recipe = options
    parsed = None if recipe is None else Fp8Recipe.from_text(recipe)
    return run_backward(dout, dlse, qkv, out, lse, *others, parsed)


def _backward_fake(dout: Tensor, dlse: Tensor | None, qkv: list[Tensor], *_: Any) -> list[Tensor]:
    return [t.new_empty(t.shape) for t in qkv]


def _refuse_second_derivative(grads: Sequence[Tensor | None]) -> None:
    """Raise NotImplementedError if one of `grads`, the gradients of gradients, is there."""
    if any(grad is not None for grad in grads):
        raise NotImplementedError(
            "a second derivative of hopper_fa attention was asked for; only the first is built; leave out "
            "create_graph=True, or use attention_reference, which can be differentiated again."
        )


def _backward_gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    _refuse_second_derivative(grads)
    return None, None, [None] * ctx.tensors, *(None,) * (ctx.inputs - 3)


def _setup_backward_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.tensors, ctx.inputs = len(output), len(inputs)
    ctx.set_materialize_grads(False)


def _backward_vmap(
    op: Any,
    info: Any,
    in_dims: tuple[Any, ...],
    dout: Tensor,
    dlse: Tensor | None,
    qkv: list[Tensor],
    *others: Any,
) -> tuple[list[Tensor], list[int]]:
    size = info.batch_size
    dout, dlse, out, lse = (
        fold(t, dim, size)
        for t, dim in zip((dout, dlse, *others[:2]), (*in_dims[:2], *in_dims[3:5]), strict=True)
    )
    qkv = [fold(t, dim, size) for t, dim in zip(qkv, in_dims[2], strict=True)]
    gradients = op(dout, dlse, qkv, out, lse, *others[2:])
    return [unfold(t, size) for t in gradients], [0] * len(gradients)


for _op in (_backward_op, _backward_by_recipe_op):
    _op.register_fake(_backward_fake)
    _op.register_autograd(_backward_gradient, setup_context=_setup_backward_context)
    _op.register_vmap(_disable_dynamo(functools.partial(_backward_vmap, _op._opoverload)))


@torch.library.custom_op(
    "hopper_fa::backward_quantized",
    mutates_args=(),
    schema="(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor[] codes, SymInt[] form, str recipe, "
    "int packing, float? softmax_scale, bool causal, bool deterministic, str? backend) -> Tensor[]",
)
def _backward_quantized_op(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, codes: list[Tensor], *others: Any
) -> list[Tensor]:
    return _run_backward_quantized(dout, dlse, out, lse, codes, *others)


def _run_backward_quantized(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    codes: Sequence[Tensor],
    form: Sequence[int],
    recipe: str,
    packing: int,
    *options: Any,
) -> list[Tensor]:
    """`run_backward_quantized`; packing: of how many tensors there are gradients, see `unpack`."""
    qkv = QuantizedQKV.from_tensors(codes, form, Fp8Recipe.from_text(recipe))
    return run_backward_quantized(dout, dlse, qkv, packing, out, lse, *options)


@_backward_quantized_op.register_fake
def _backward_quantized_fake(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    lse: Tensor,
    codes: list[Tensor],
    form: Sequence[int],
    recipe: str,
    packing: int,
    *_: Any,
) -> list[Tensor]:
    qkv = QuantizedQKV.from_tensors(codes, form, Fp8Recipe.from_text(recipe))
    return [dout.new_empty(shape) for shape in gradient_shapes(qkv, packing)]


def _backward_quantized_gradient(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    _refuse_second_derivative(grads)
    return None, None, None, None, [None] * ctx.codes, *(None,) * 7


def _setup_backward_quantized(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.codes = len(inputs[4])
    ctx.set_materialize_grads(False)


_backward_quantized_op.register_autograd(
    _backward_quantized_gradient, setup_context=_setup_backward_quantized
)


@_backward_quantized_op.register_vmap
@_disable_dynamo
def _backward_quantized_vmap(
    info: Any, in_dims: tuple[Any, ...], *inputs: Any
) -> tuple[list[Tensor], list[int]]:
    size = info.batch_size
    rows = (fold(t, dim, size) for t, dim in zip(inputs[:4], in_dims[:4], strict=True))
    codes = [fold(t, dim, size) for t, dim in zip(inputs[4], in_dims[4], strict=True)]
    gradients = torch.ops.hopper_fa.backward_quantized(*rows, codes, *inputs[5:])
    return [unfold(t, size) for t in gradients], [0] * len(gradients)


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
    refuse_tangents((*qkv, q_descale, k_descale, v_descale))
    parsed = None if recipe is None else Fp8Recipe.from_text(recipe)
    return run_e4m3(qkv, (q_descale, k_descale, v_descale), softmax_scale, causal, backend, parsed)


@_e4m3_op.register_fake
def _e4m3_fake(qkv: list[Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    q, k, v = unpack(qkv)
    check_fp8_shapes(q, k, v)
    batch, seqlen_q, heads_q, _ = q.shape
    lse = q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)
    return q.new_empty(q.shape, dtype=torch.bfloat16), lse


def _refuse_e4m3_gradient(grads: Sequence[Tensor | None]) -> None:
    """Raise NotImplementedError if one of `grads`, those of out and lse, is there."""
    if any(grad is not None for grad in grads):
        raise NotImplementedError(
            "a gradient of attention over float8 tensors was asked for; it has none; pass bfloat16 or "
            "float16 tensors and a recipe, whose gradient is straight-through, or call it under "
            "torch.no_grad()."
        )


def _e4m3_gradient(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
    _refuse_e4m3_gradient(grads)
    return [None] * ctx.tensors, *(None,) * 7


def _setup_e4m3_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.tensors = len(inputs[0])
    ctx.set_materialize_grads(False)


_e4m3_op.register_autograd(_e4m3_gradient, setup_context=_setup_e4m3_context)


@_e4m3_op.register_vmap
@_disable_dynamo
def _e4m3_vmap(
    info: Any, in_dims: tuple[Any, ...], qkv: list[Tensor], *others: Any
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    size = info.batch_size
    folded = [fold(t, dim, size) for t, dim in zip(qkv, in_dims[0], strict=True)]
    descales = [fold(t, dim, size) for t, dim in zip(others[:3], in_dims[1:4], strict=True)]
    out, lse = torch.ops.hopper_fa.forward_e4m3(folded, *descales, *others[3:])
    return (unfold(out, size), unfold(lse, size)), (0, 0)


class _TransformedE4m3(torch.autograd.Function):
    """`forward_e4m3` for torch.func (see `_Transformed`), and where a gradient would be wanted."""

    @staticmethod
    def forward(
        softmax_scale: float | None,
        causal: bool,
        backend: str | None,
        recipe: Fp8Recipe | None,
        q_descale: Tensor | None,
        k_descale: Tensor | None,
        v_descale: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return forward_e4m3(
            tensors, (q_descale, k_descale, v_descale), softmax_scale, causal, backend, recipe
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.inputs = len(inputs)
        ctx.set_materialize_grads(False)

    jvp = staticmethod(refuse_jvp)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, ...]:
        _refuse_e4m3_gradient(grads)
        return (None,) * ctx.inputs

    @staticmethod
    @_disable_dynamo
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], *inputs: Any
    ) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        size = info.batch_size
        folded = (fold(t, dim, size) for t, dim in zip(inputs[4:], in_dims[4:], strict=True))
        out, lse = _TransformedE4m3.apply(*inputs[:4], *folded)
        return (unfold(out, size), unfold(lse, size)), (0, 0)


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
    around = _goes_around(inputs)
    if not around:
        if _has_dtensor(inputs):
            from hopper_fa.sharding import over_shards

            return over_shards(
                lambda *parts: forward_e4m3(*parts, softmax_scale, causal, backend, recipe),
                tensors,
                descales,
                recipe,
            )
        refuse_tangents(inputs)
    transformed = _is_transformed() and not _is_compiled_vmap()
    if transformed or (around and _wants_gradient(inputs)):
        return _TransformedE4m3.apply(softmax_scale, causal, backend, recipe, *descales, *tensors)
    if around:
        return run_e4m3(tensors, descales, softmax_scale, causal, backend, recipe)
    text = None if recipe is None else recipe.to_text()
    return torch.ops.hopper_fa.forward_e4m3(tensors, *descales, softmax_scale, causal, backend, text)


@torch.library.custom_op(
    "hopper_fa::forward_quantized",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor q_scale, Tensor k_scale, Tensor v_scale, Tensor? v_mean, "
    "Tensor? lse_shift, Tensor? key_bias, str recipe, SymInt head_dim, SymInt seqlen_q, SymInt seqlen_k, "
    "float? softmax_scale, bool causal, ScalarType out_dtype, str? backend) -> (Tensor out, Tensor lse)",
)
def _quantized_op(*arguments: Any) -> tuple[Tensor, Tensor]:
    *tensors, recipe, head_dim, seqlen_q, seqlen_k, softmax_scale, causal, out_dtype, backend = arguments
    refuse_tangents(tensors)
    qkv = QuantizedQKV(*tensors, Fp8Recipe.from_text(recipe), head_dim, seqlen_q, seqlen_k)
    return run_quantized(qkv, softmax_scale, causal, out_dtype, backend)


@_quantized_op.register_fake
def _quantized_fake(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    head_dim, seqlen_q, _, softmax_scale, causal, out_dtype, _ = arguments[9:]
    check_softmax(softmax_scale, causal)
    check_out_dtype(out_dtype)
    batch, _, heads_q, _ = q.shape
    lse = q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)
    return q.new_empty((batch, seqlen_q, heads_q, head_dim), dtype=out_dtype), lse


def forward_quantized(
    qkv: QuantizedQKV,
    softmax_scale: float | None,
    causal: bool,
    out_dtype: torch.dtype,
    backend: str | None,
) -> tuple[Tensor, Tensor]:
    """out in out_dtype and lse of tensors that are quantised already, by the operator or around it.

    Raises:
        NotImplementedError: a derivative is wanted, or a transform of torch.func or vmap is under way.
    """
    scales = (qkv.q_scale, qkv.k_scale, qkv.v_scale)
    tensors = (qkv.q, qkv.k, qkv.v, *scales, qkv.v_mean, qkv.lse_shift, qkv.key_bias)
    present = tuple(t for t in tensors if t is not None)
    refuse_transforms(present, "flash_attn_quantized_func")
    if _goes_around(present):
        return run_quantized(qkv.resolved(), softmax_scale, causal, out_dtype, backend)
    sizes = (qkv.head_dim, qkv.seqlen_q, qkv.seqlen_k)
    return torch.ops.hopper_fa.forward_quantized(
        *tensors, qkv.recipe.to_text(), *sizes, softmax_scale, causal, out_dtype, backend
    )


flops.register()
