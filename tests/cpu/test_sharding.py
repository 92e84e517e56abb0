"""DTensors over two processes: by batch, by heads and replicated without communication; all else refused."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import Case
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.placement_types import Partial

from hopper_fa import (
    Fp8Recipe,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_quantized_func,
    merge_attention,
    quantize_qkv,
)

RANKS = 2
CASE = Case(batch=3, heads_q=4, heads_kv=2, seqlen_q=9, seqlen_k=12, head_dim=16)
PACKED = Case(batch=2, heads_q=2, heads_kv=2, seqlen_q=11, seqlen_k=11, head_dim=16)


def _rank(rank: int, store: str, seed: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    try:
        mesh = init_device_mesh("cpu", (RANKS,))
        for check in (check_results_and_gradients, check_e4m3_and_merging, check_refusals, check_two_axes):
            torch.manual_seed(seed)
            check(mesh, seed)
    finally:
        dist.destroy_process_group()


def test_two_ranks(tmp_path: Path, seed: int) -> None:
    """The checks below, in two processes on this CPU that are started once for all of them."""
    torch.multiprocessing.spawn(_rank, (str(tmp_path / "store"), seed), nprocs=RANKS)


def attend(function: Callable[..., Any], tensors: list[Tensor], **options: Any) -> tuple[Tensor, Tensor]:
    return function(*tensors, causal=True, return_lse=True, backend="emulator", **options)


def assert_close(got: DTensor, expected: Tensor) -> None:
    """All but equal: the order in which torch adds depends on sizes and strides."""
    error = (got.full_tensor() - expected).float().norm()
    assert error <= 0.005 * expected.float().norm()


def without_communication(call: Callable[[], Any]) -> Any:
    with CommDebugMode() as communication:
        result = call()
    assert communication.get_total_counts() == 0
    return result


def assert_sharded_as_whole(
    function: Callable[..., Any], whole: list[Tensor], mesh: Any, kind: str, **options: Any
) -> None:
    """Results and gradients of DTensors are those of the whole tensors, and lie where they should."""

    def placement(heads_dim: int) -> list[Any]:
        return {"batch": [Shard(0)], "heads": [Shard(heads_dim)], "replicated": [Replicate()]}[kind]

    def distributed(t: Tensor) -> DTensor:
        return distribute_tensor(t.detach(), mesh, placement(t.ndim - 2))

    whole = [t.requires_grad_() for t in whole]
    parts = [distributed(t).requires_grad_() for t in whole]
    out, lse = attend(function, whole, **options)
    douts = torch.randn_like(out), torch.randn_like(lse)
    dout_parts = distributed(douts[0]), distribute_tensor(douts[1], mesh, placement(1))
    gradients = torch.autograd.grad((out, lse), whole, douts)
    for quietly in (lambda call: call(), without_communication):  # around the operator and through it
        results = quietly(lambda: attend(function, parts, **options))
        assert results[0].placements == tuple(placement(2)) and results[1].placements == tuple(placement(1))
        got = quietly(partial(torch.autograd.grad, results, parts, dout_parts))
        for a, b, t in zip(got, gradients, parts, strict=True):
            assert a.placements == t.placements and a.shape == b.shape
        for a, b in zip((*results, *got), (out, lse, *gradients), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)
            assert_close(a, b)


def check_results_and_gradients(mesh: Any, seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    a, b, c = PACKED.qkv(torch.bfloat16, seed)
    for kind in ("batch", "heads", "replicated"):
        assert_sharded_as_whole(flash_attn_func, [q, k, v], mesh, kind)
        assert_sharded_as_whole(flash_attn_func, [q, k, v], mesh, kind, recipe=Fp8Recipe.default())
        assert_sharded_as_whole(flash_attn_kvpacked_func, [a, torch.stack([b, c], 2)], mesh, kind)
        assert_sharded_as_whole(flash_attn_qkvpacked_func, [torch.stack([a, b, c], 2)], mesh, kind)


def check_e4m3_and_merging(mesh: Any, seed: int) -> None:
    e4m3 = [t.to(torch.float8_e4m3fn) for t in CASE.qkv(torch.float32, seed)]
    descale = torch.rand(CASE.batch, CASE.heads_kv) + 0.5
    expected = attend(flash_attn_func, e4m3, q_descale=descale, v_descale=descale)
    for placement, of_descale in ((Shard(0), Shard(0)), (Shard(2), Shard(1)), (Replicate(), Replicate())):
        # NOTE: distribute_tensor cannot copy this dtype.
        parts = [
            DTensor.from_local(distribute_tensor(t.float(), mesh, [placement]).to_local().to(t.dtype), mesh,
                               [placement], run_check=False, shape=t.shape, stride=t.stride())
            for t in e4m3
        ]  # fmt: skip
        scale = distribute_tensor(descale, mesh, [of_descale])
        call = partial(attend, flash_attn_func, parts, q_descale=scale, v_descale=scale)
        for a, b in zip(without_communication(call), expected, strict=True):
            assert_close(a, b)
    if torch.__version__ < (2, 13):
        return  # DTensor itself lacks operations of merge_attention, in 2.6 at least
    outs, lses = ([t, t.flip(0)] for t in expected)
    merged = merge_attention(
        [distribute_tensor(t, mesh, [Shard(2)]) for t in outs],
        [distribute_tensor(t, mesh, [Shard(1)]) for t in lses],
    )
    for a, b in zip(merged, merge_attention(outs, lses), strict=True):
        assert_close(a, b)


def check_refusals(mesh: Any, seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)

    def placed(*placements: Any, tensors: Any = (q, k, v)) -> list[DTensor]:
        return [
            DTensor.from_local(t, mesh, [placement], run_check=False)
            for t, placement in zip(tensors, placements, strict=True)
        ]

    call = partial(flash_attn_func, backend="emulator")
    for placement in (Shard(1), Shard(3), Partial()):
        with pytest.raises(NotImplementedError, match="placements .* sharded by batch, sharded by heads"):
            call(*placed(placement, placement, placement))
    with pytest.raises(NotImplementedError, match="the same for all"):
        call(*placed(Shard(0), Replicate(), Replicate()))
    with pytest.raises(TypeError, match="DTensor, DTensor, Tensor; all must be DTensors, or none"):
        call(*placed(Shard(0), Shard(0), tensors=(q, k)), v)
    one = [distribute_tensor(t, mesh, [Shard(2)]) for t in (q, k[:, :, :1], v[:, :, :1])]
    with pytest.raises(ValueError, match="k and v have 1 heads over 2 ranks"):
        call(*one)
    for sharding in (Shard(0), Shard(2)):
        with pytest.raises(NotImplementedError, match="v_granularity 'tensor', .* pass another"):
            call(*placed(*[sharding] * 3), recipe=Fp8Recipe(v_granularity="tensor"))
    parts = placed(*[Replicate()] * 3)
    call(*parts, recipe=Fp8Recipe(v_granularity="tensor"))
    with pytest.raises(NotImplementedError, match="quantize_qkv got a DTensor; .* pass a recipe"):
        flash_attn_quantized_func(quantize_qkv(*parts))


def check_two_axes(mesh: Any, seed: int) -> None:
    """A mesh of one by two: batch over one axis, heads over the other."""
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("data", "tensor"))
    whole = [t.requires_grad_() for t in CASE.qkv(torch.bfloat16, seed)]
    parts = [distribute_tensor(t.detach(), mesh, [Shard(0), Shard(2)]).requires_grad_() for t in whole]
    out = flash_attn_func(*parts, backend="emulator")
    expected = flash_attn_func(*whole, backend="emulator")
    assert out.placements == (Shard(0), Shard(2))
    assert_close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for a, b in zip(parts, whole, strict=True):
        assert_close(a.grad, b.grad)
