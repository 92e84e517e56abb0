"""DTensors: sharded by batch or by heads, or replicated. Every rank attends to its own part, and none waits.

Imported only when a DTensor shows up, for torch.distributed.tensor takes as long to import as half of torch.
"""

from collections.abc import Callable, Sequence
from typing import NoReturn

from torch import Tensor
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from hopper_fa.recipe import Fp8Recipe
from hopper_fa.transforms import refuse_shared_scales

_BATCH, _HEADS = "batch", "heads"


def over_shards(
    run: Callable[[tuple[Tensor, ...], tuple[Tensor | None, ...]], tuple[Tensor, Tensor]],
    tensors: Sequence[Tensor],
    descales: Sequence[Tensor | None],
    recipe: Fp8Recipe | None,
) -> tuple[DTensor, DTensor]:
    """out and lse as DTensors that are sharded as the tensors are; gradients are sharded so too.

    Args:
        run: attention over the local parts of tensors and descales.
        tensors: see `backend.unpack`; (batch, seqlen, heads, head_dim) or (batch, seqlen, 2 or 3, heads,
            head_dim), global shapes.
        descales: (batch, heads_kv) or None.

    Raises:
        TypeError: some of them are DTensors and others not.
        ValueError: they are on different meshes or sharded differently, or the heads do not divide.
        NotImplementedError: a placement that attention would have to communicate for.
    """
    given = [*tensors, *(t for t in descales if t is not None)]
    if not all(isinstance(t, DTensor) for t in given):
        raise TypeError(
            f"attention inputs are {', '.join(type(t).__name__ for t in given)}; all must be DTensors, or "
            "none; call distribute_tensor on the others, or to_local on the DTensors."
        )
    mesh = given[0].device_mesh
    if any(t.device_mesh != mesh for t in given):
        raise ValueError(
            f"attention inputs are on meshes {[t.device_mesh for t in given]}; they must share one; "
            "redistribute them."
        )
    heads_dims = [t.ndim - 2 if t.ndim > 2 else 1 for t in given]
    split = [_split_of(t, dim) for t, dim in zip(given, heads_dims, strict=True)]
    if any(other != split[0] for other in split):
        _refuse([t.placements for t in given])
    ranks = 1
    for axis, kind in enumerate(split[0]):
        ranks *= mesh.size(axis) if kind == _HEADS else 1
    if tensors[-1].shape[-2] % ranks:
        raise ValueError(
            f"k and v have {tensors[-1].shape[-2]} heads over {ranks} ranks; the heads of k and v must be a "
            "multiple of the ranks that they are sharded over; shard fewer, or repeat heads."
        )
    if any(split[0]):
        refuse_shared_scales(recipe, "every rank of sharded DTensors calls attention for its part")

    local = iter([t.to_local(grad_placements=t.placements) for t in given])
    parts = tuple(next(local) for _ in tensors)
    out, lse = run(parts, tuple(None if t is None else next(local) for t in descales))
    batch, seqlen_q, heads_q, head_dim = (*tensors[0].shape[:2], *tensors[0].shape[-2:])
    return (
        _global(out, (batch, seqlen_q, heads_q, head_dim), mesh, split[0], heads_dim=2),
        _global(lse, (batch, heads_q, seqlen_q), mesh, split[0], heads_dim=1),
    )


def _split_of(t: DTensor, heads_dim: int) -> tuple[str | None, ...]:
    """For each axis of the mesh what it splits: _BATCH, _HEADS, or None for a replica."""
    split: list[str | None] = []
    for placement in t.placements:
        if type(placement) is Replicate:
            split.append(None)
        elif type(placement) is Shard and placement.dim in (0, heads_dim):
            split.append(_BATCH if placement.dim == 0 else _HEADS)
        else:
            _refuse([t.placements])
    return tuple(split)


def _refuse(placements: list[tuple[Placement, ...]]) -> NoReturn:
    raise NotImplementedError(
        f"attention inputs have placements {placements}; allowed are, the same for all, sharded by batch, "
        "sharded by heads, and replicated; redistribute them."
    )


def _global(
    local: Tensor, shape: tuple[int, ...], mesh: object, split: tuple[str | None, ...], heads_dim: int
) -> DTensor:
    of = {None: Replicate(), _BATCH: Shard(0), _HEADS: Shard(heads_dim)}
    stride = [1]
    for size in reversed(shape[1:]):
        stride.insert(0, stride[0] * max(size, 1))
    placements = [of[kind] for kind in split]
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=tuple(stride))
