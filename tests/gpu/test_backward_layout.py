"""Memory of the backward: strides, slices, packed gradients, huge tensors, what is allocated."""

import gc

import pytest
import torch
from backward_helpers import (
    assert_backward_accurate,
    poisoned_scratch,
    problem_of,
    run_backward_poisoned,
    run_plain,
)
from cases import INSTANCE_HEAD_DIMS, Case, assert_gradients_accurate, gradients_float64
from helpers import same

from hopper_fa import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, kernels

every_instance = pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@both_masks
@every_instance
def test_public_call_agrees_with_the_kernel(
    backward_instance: None, head_dim: int, causal: bool, seed: int
) -> None:
    problem = problem_of(Case(2, 4, 2, 239, 323, head_dim, causal), torch.bfloat16, seed, with_dlse=True)
    direct = assert_backward_accurate(problem, deterministic=True)
    with poisoned_scratch():  # asks for the deterministic mode too
        public = run_plain(problem)
    assert same(public, direct) and same(run_plain(problem, deterministic=True), direct)
    assert all(t.is_contiguous() for t in public)


@both_masks
@every_instance
def test_transposed_views(backward_instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """(batch, heads, seqlen, head_dim) memory of inputs and of dout."""
    dout, _, q, k, v, *options = problem_of(Case(2, 4, 2, 239, 323, head_dim, causal), torch.bfloat16, seed)
    tensors = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (dout, q, k, v)]
    problem = (tensors[0], None, *tensors[1:], *options)
    assert_gradients_accurate(run_plain(problem), problem)


@every_instance
@pytest.mark.parametrize("layout", ["summed", "transposed", "misaligned", "odd rows", "one row for all"])
def test_gradients_of_any_layout(backward_instance: None, layout: str, head_dim: int, seed: int) -> None:
    """What TMA cannot take of dout is copied; stride 0 is fine."""
    dout, dlse, *rest = problem_of(
        Case(2, 4, 2, 239, 323, head_dim, True), torch.bfloat16, seed, with_dlse=True
    )
    size = dout.numel()
    dout = {
        "summed": lambda: dout.new_ones(()).expand_as(dout),
        "transposed": lambda: dout.transpose(-1, -2).contiguous().transpose(-1, -2),
        "misaligned": lambda: dout.new_empty(size + 1)[1:].view(dout.shape).copy_(dout),
        "odd rows": lambda: dout.new_empty(*dout.shape[:3], head_dim + 1)[..., :head_dim].copy_(dout),
        "one row for all": lambda: dout[:1, :1, :1].expand_as(dout),
    }[layout]()
    dlse = dlse.transpose(1, 2).contiguous().transpose(1, 2)
    problem = (dout, dlse, *rest)
    assert_gradients_accurate(run_plain(problem), problem)


def test_sum_backward(seed: int) -> None:
    """The gradients that users' first tries give: of out.sum(), of lse.sum(), of both."""
    q, k, v = Case(2, 4, 2, 200, 300, 64, True).qkv(torch.bfloat16, seed, "cuda")
    ones = torch.ones((), device="cuda")
    out_ones, lse_ones = ones.to(q.dtype).expand_as(q), ones.expand(2, 4, 200)
    for dout, dlse in ((out_ones, None), (torch.zeros_like(q), lse_ones), (out_ones, lse_ones)):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        out, lse = flash_attn_func(*leaves, causal=True, return_lse=True)
        loss = lse.sum() if (dout == 0).all() else out.sum() + (0 if dlse is None else lse.sum())
        loss.backward()
        assert_gradients_accurate(tuple(t.grad for t in leaves), (dout, dlse, q, k, v, 64**-0.5, True))


@both_masks
@every_instance
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "seqlen", "heads"])
def test_expanded_keys_and_values(
    backward_instance: None, dimension: int, head_dim: int, causal: bool, seed: int
) -> None:
    """Stride 0: one batch entry, key or head of K and V stands for all."""
    dout, _, q, k, v, *options = problem_of(Case(3, 4, 4, 239, 323, head_dim, causal), torch.bfloat16, seed)
    problem = (dout, None, q, *(t.narrow(dimension, 0, 1).expand_as(t) for t in (k, v)), *options)
    assert_gradients_accurate(run_plain(problem), problem)


@every_instance
def test_packed(backward_instance: None, head_dim: int, seed: int) -> None:
    """The gradient of a packed tensor is one tensor, with the bits of the separate gradients in it."""
    qkv = torch.randn(2, 300, 3, 4, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    q, k, v = (t.detach().contiguous() for t in qkv.unbind(2))
    dout = torch.randn_like(q)
    want = run_plain((dout, None, q, k, v, head_dim**-0.5, True), deterministic=True)
    with poisoned_scratch():
        flash_attn_qkvpacked_func(qkv, causal=True, deterministic=True).backward(dout)
    assert qkv.grad.is_contiguous() and same(qkv.grad.unbind(2), want)
    q, kv = q.requires_grad_(), qkv.detach()[:, :, 1:].requires_grad_()
    flash_attn_kvpacked_func(q, kv, causal=True, deterministic=True).backward(dout)
    assert same((q.grad, *kv.grad.unbind(2)), want)


@both_masks
@every_instance
@pytest.mark.parametrize("deterministic", [False, True])
def test_allocates_one_fp32_dq(
    backward_instance: None, deterministic: bool, head_dim: int, causal: bool, seed: int
) -> None:
    """Bytes asked of torch's allocator: the gradients, FP32 of dQ, two numbers a row; integers a block."""
    dout, _, q, k, v, *_ = problem_of(Case(1, 4, 2, 4200, 4200, head_dim, causal), torch.bfloat16, seed)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    counter = "requested_bytes.all.allocated"
    for _ in range(2):  # what a first call sets up stays
        out = flash_attn_func(*leaves, causal=causal, deterministic=deterministic)
        before = torch.cuda.memory_stats()[counter]
        torch.autograd.grad(out, leaves, dout)
        asked = torch.cuda.memory_stats()[counter] - before
    tile = kernels.backward_tile(head_dim)
    blocks = 4 * -(-4200 // tile["block_m"])
    scratch = 4 * blocks * tile["block_m"] * (tile["head_dim"] + 2)
    integers = 4 * blocks * 2
    assert asked <= 2 * sum(t.numel() for t in leaves) + scratch + integers


@both_masks
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "seqlen", "heads"])
def test_offsets_beyond_2_31_elements(dimension: int, causal: bool, seed: int) -> None:
    """The last index of one dimension lies more than 2**31 elements after the first, in every tensor."""
    sizes = {0: (3, 200, 2), 1: (1, 200, 2), 2: (1, 200, 3)}[dimension]
    batch, seqlen, heads = sizes
    if torch.cuda.mem_get_info()[0] < 48 * 2**30:
        pytest.skip("needs 48 GiB of free GPU memory")
    problem = problem_of(Case(batch, heads, heads, seqlen, seqlen, 128, causal), torch.bfloat16, seed)
    dout, _, q, k, v, scale, _ = problem
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    strides = list(q.stride())
    strides[dimension] = (2**31 // (sizes[dimension] - 1) + 8) // 8 * 8
    extent = sum((size - 1) * stride for size, stride in zip(q.shape, strides, strict=True)) + 1

    def far(t: torch.Tensor) -> torch.Tensor:
        return torch.empty(extent, dtype=t.dtype, device="cuda").as_strided(t.shape, strides).copy_(t)

    gradients = [far(torch.full_like(t, float("nan"))) for t in (q, k, v)]
    kernels.backward(*(far(t) for t in (dout, q, k, v, out)), lse, None, *gradients, scale, causal)
    assert_gradients_accurate(tuple(gradients), problem)
    del gradients
    gc.collect()
    torch.cuda.empty_cache()


def test_dq_beyond_2_31_elements(seed: int) -> None:
    """FP32 dQ of more than 2**31 elements: judged on the last rows."""
    if torch.cuda.mem_get_info()[0] < 32 * 2**30:
        pytest.skip("needs 32 GiB of free GPU memory")
    heads, seqlen_q, rows = 129, 131072, slice(131072 - 128, None)
    dout, _, q, k, v, *_ = problem_of(Case(1, 1, 1, seqlen_q, 64, 128), torch.bfloat16, seed)
    q = q.expand(-1, -1, heads, -1).requires_grad_()
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v), q, dout.expand(-1, -1, heads, -1))
    dq = dq[:, rows, -1:]
    q, dout = q.detach()[:, rows, -1:], dout[:, rows]
    want = gradients_float64(dout, None, q, k, v)[0]
    torch.testing.assert_close(dq.double(), want, atol=2e-2 * want.abs().max().item(), rtol=2e-2)
    del dq
    gc.collect()
    torch.cuda.empty_cache()


@every_instance
def test_some_gradients_are_not_wanted(backward_instance: None, head_dim: int, seed: int) -> None:
    problem = problem_of(Case(2, 4, 2, 239, 323, head_dim, True), torch.bfloat16, seed)
    want = run_backward_poisoned(problem, deterministic=True)
    dout, _, *tensors, scale, causal = problem
    for wanted in ([0], [1], [2], [0, 2], [1, 2]):
        leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
        flash_attn_func(*leaves, scale, causal, deterministic=True).backward(dout)
        for i, leaf in enumerate(leaves):
            assert torch.equal(leaf.grad, want[i]) if i in wanted else leaf.grad is None
