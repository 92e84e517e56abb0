"""Derivatives and transforms that torch may ask for: what is refused, and where a mapped dimension goes."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from hopper_fa.recipe import Fp8Recipe

VMAP = "vmap calls attention for each of its elements"  # for `refuse_shared_scales`


def refuse_tangents(tensors: Iterable[Tensor | None]) -> None:
    """Raise NotImplementedError if a tensor carries a tangent: forward-mode derivatives are not built."""
    if forward_ad._current_level < 0:
        return
    for t in tensors:
        if t is not None and forward_ad.unpack_dual(t).tangent is not None:
            refuse_jvp()


def refuse_jvp(*_: Any) -> NoReturn:
    """Raise NotImplementedError."""
    raise NotImplementedError(
        "an attention input carries a tangent (forward-mode derivatives: torch.func.jvp, jacfwd, linearize, "
        "hessian, dual numbers); only reverse mode is built; use torch.func.vjp, jacrev or backward(), or "
        "attention_reference, which has both."
    )


def refuse_shared_scales(recipe: Fp8Recipe | None, what: str) -> None:
    """Raise NotImplementedError if `recipe` has a scale for a whole tensor, which is another one in a call.

    Args:
        what: the words for who calls with another part, as the subject of a sentence.
    """
    if recipe is None:
        return
    for name in ("q_granularity", "k_granularity", "v_granularity"):
        if getattr(recipe, name) == "tensor":
            raise NotImplementedError(
                f"{what}, and the recipe has {name} 'tensor', one scale for all of the batch and heads; "
                f"only scales within a batch entry and head stay as they are; pass another {name}."
            )


def refuse_transforms(tensors: Sequence[Tensor], function: str) -> None:
    """Raise NotImplementedError if `tensors` hold a transform's or a tangent, which `function` would lose."""
    if any(type(t).__name__ == "DTensor" for t in tensors):
        raise NotImplementedError(
            f"{function} got a DTensor; it takes plain tensors only; pass a recipe to flash_attn_func, which "
            "takes DTensors, or pass the local parts."
        )
    transformed = torch._C._are_functorch_transforms_active() and any(
        torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors
    )
    if transformed or (
        forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)
    ):
        raise NotImplementedError(
            f"{function} got a tensor of a transform (torch.func, vmap) or with a tangent; it has no "
            "derivative and takes plain tensors only; pass a recipe to flash_attn_func, which has both."
        )


def fold(t: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """The mapped dimension `dim` of t in front of its batch and in one with it: (size * batch, ...).

    Where t is not mapped (dim None) all see the same t. It is repeated in memory unless its batch is 1: as
    another batch entry and not as another head of a group, so that its gradient stays apart for each.
    """
    if t is None:
        return None
    t = t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)
    t = t.flatten(0, 1)
    # NOTE: under vmap nobody sees where the mapped dimension lies in memory, so nobody could repair this.
    return t if t.stride(-1) == 1 else t.contiguous()


def unfold(t: Tensor, size: int) -> Tensor:
    """(size * batch, ...) to (size, batch, ...)."""
    return t.unflatten(0, (size, t.shape[0] // size))


def batched_level(*gradients: Tensor | None) -> int:
    """The level of the vmap in which torch.autograd.grad(is_grads_batched=True) runs a backward; 0: none.

    Args:
        gradients: of the outputs, of which one has the hidden dimension if there is such a vmap.
    """
    if not any(t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in gradients):
        return 0
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    # NOTE: a CUDA device's backward runs in a thread of its own, which does not know of the vmap.
    return max(1, level)


def over_batched(
    run: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor | None], level: int
) -> tuple[Tensor, ...]:
    """What `run` returns for each element of the dimension that torch.autograd.grad(is_grads_batched) hides.

    Args:
        inputs: tensors, some of them with a hidden dimension; `run` is called with that folded into theirs.
        level: `batched_level`.
    """
    # NOTE: the size of the hidden dimension is told by the tensors that have it; the others get size 1 here.
    plain = [None if t is None else torch._remove_batch_dim(t, level, 1, 0) for t in inputs]
    size = max(t.shape[0] for t in plain if t is not None)
    folded = (None if t is None else t.expand(size, *t.shape[1:]).flatten(0, 1) for t in plain)
    return tuple(torch._add_batch_dim(unfold(t, size), 0, level) for t in run(*folded))
