"""Memory: strided, broadcast and huge tensors; nothing touched outside them or allocated but outputs."""

import gc

import pytest
import torch
from cases import INSTANCE_HEAD_DIMS, Case, assert_accurate, assert_surroundings_nan, nan_outputs
from helpers import assert_kernel_accurate

from hopper_fa import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, kernels

every_instance = pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def nan_like(*shape: int) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=torch.bfloat16, device="cuda")


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> None:
    """The public call, whose output must be contiguous, on tensors of any layout."""
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    assert out.is_contiguous() and lse.is_contiguous()
    assert_accurate(out, lse, q, k, v, causal=causal)


@both_masks
@every_instance
@pytest.mark.parametrize("sliced", ["batch", "seqlen", "heads", "head_dim", "every dimension"])
def test_slices_of_nan(instance: None, sliced: str, head_dim: int, causal: bool, seed: int) -> None:
    """Only the slice is read: one NaN beside it would show in the output."""
    q, k, v = Case(2, 4, 2, 239, 323, head_dim, causal).qkv(torch.bfloat16, seed, "cuda")
    dimensions = {
        "batch": [0],
        "seqlen": [1],
        "heads": [2],
        "head_dim": [3],
        "every dimension": [0, 1, 2, 3],
    }[sliced]

    def embed(t: torch.Tensor) -> torch.Tensor:
        before = [{0: 1, 1: 70, 2: 1, 3: 8}[d] if d in dimensions else 0 for d in range(4)]
        whole = nan_like(*(2 * b + size for b, size in zip(before, t.shape, strict=True)))
        view = whole[tuple(slice(b, b + size) for b, size in zip(before, t.shape, strict=True))]
        return view.copy_(t)

    check(embed(q), embed(k), embed(v), causal)


@both_masks
@every_instance
def test_other_head_dims_of_the_buffer_are_not_read(
    instance: None, head_dim: int, causal: bool, seed: int
) -> None:
    """head_dim 40 below the tile's: the columns that pad the tile to its width hold NaN in memory."""
    narrow = head_dim - 24
    q, k, v = Case(1, 2, 2, 200, 300, narrow, causal).qkv(torch.bfloat16, seed, "cuda")
    q, k, v = (nan_like(*t.shape[:3], head_dim)[..., :narrow].copy_(t) for t in (q, k, v))
    check(q, k, v, causal)


@both_masks
@every_instance
def test_transposed_views(instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """(batch, heads, seqlen, head_dim) memory, as torch's attention takes it."""
    q, k, v = Case(2, 4, 2, 239, 323, head_dim, causal).qkv(torch.bfloat16, seed, "cuda")
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    check(q, k, v, causal)


@both_masks
@every_instance
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "seqlen", "heads"])
def test_expanded_keys_and_values(
    instance: None, dimension: int, head_dim: int, causal: bool, seed: int
) -> None:
    """Stride 0: one batch entry, key or head of K and V stands for all."""
    q, k, v = Case(3, 4, 4, 239, 323, head_dim, causal).qkv(torch.bfloat16, seed, "cuda")
    k, v = (t.narrow(dimension, 0, 1).expand_as(t) for t in (k, v))
    check(q, k, v, causal)


@every_instance
def test_packed(instance: None, head_dim: int, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    qkv = torch.randn(2, 300, 3, 4, head_dim, generator=generator, device="cuda", dtype=torch.bfloat16)
    q, k, v = (t.contiguous() for t in qkv.unbind(2))
    plain = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, causal=True), plain)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], causal=True), plain)


@both_masks
@pytest.mark.parametrize("dimension", [0, 1, 2], ids=["batch", "seqlen", "heads"])
def test_offsets_beyond_2_31_elements(dimension: int, causal: bool, seed: int) -> None:
    """The last index of one dimension lies more than 2**31 elements after the first, in inputs and output."""
    sizes = {0: (3, 200, 2), 1: (1, 200, 2), 2: (1, 200, 3)}[dimension]
    batch, seqlen, heads = sizes
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free GPU memory")
    dense = Case(batch, heads, heads, seqlen, seqlen, 128, causal).qkv(torch.bfloat16, seed, "cuda")
    strides = list(dense[0].stride())
    strides[dimension] = (2**31 // (sizes[dimension] - 1) + 8) // 8 * 8
    extent = sum((size - 1) * stride for size, stride in zip(dense[0].shape, strides, strict=True)) + 1
    assert (sizes[dimension] - 1) * strides[dimension] > 2**31
    views = []
    for t in dense:
        view = torch.empty(extent, dtype=torch.bfloat16, device="cuda").as_strided(t.shape, strides)
        views.append(view.copy_(t))
    out = nan_like(extent).as_strided(dense[0].shape, strides)
    lse = torch.full((batch, heads, seqlen), float("nan"), device="cuda")
    kernels.forward(*views, out, lse, 128**-0.5, causal)
    assert_accurate(out, lse, *dense, causal=causal)
    written = out.clone()
    del views
    flat = torch.as_strided(out, (extent,), (1,), 0)
    out.fill_(float("nan"))
    # In pieces: isnan of everything at once would take another 2 GiB.
    assert all(piece.isnan().all() for piece in flat.split(2**28)), "the kernel wrote outside its output"
    assert written.isfinite().all()
    del flat, out
    gc.collect()
    torch.cuda.empty_cache()


@both_masks
@every_instance
def test_output_layout(instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """The kernel called directly writes an output of any strides, and nothing around it."""
    q, k, v = Case(2, 4, 2, 239, 323, head_dim, causal).qkv(torch.bfloat16, seed, "cuda")
    out, lse = nan_outputs(q.transpose(1, 2))
    lse = lse.new_full((2, 4, 239), float("nan"))
    kernels.forward(q, k, v, out.transpose(1, 2), lse, head_dim**-0.5, causal)
    assert_surroundings_nan(out)
    assert_accurate(out.transpose(1, 2), lse, q, k, v, causal=causal)


@pytest.mark.parametrize("which", [0, 1, 2], ids=["q", "k", "v"])
def test_unaligned_tensor_is_refused(which: int, seed: int) -> None:
    tensors = list(Case(head_dim=64).qkv(torch.bfloat16, seed, "cuda"))
    t = tensors[which]
    tensors[which] = torch.empty(t.numel() + 8, dtype=t.dtype, device="cuda")[1 : t.numel() + 1].view_as(t)
    with pytest.raises(ValueError, match=r"aligned"):
        flash_attn_func(*tensors)


def test_unaligned_stride_is_refused(seed: int) -> None:
    q, k, v = Case(head_dim=64).qkv(torch.bfloat16, seed, "cuda")
    odd = torch.empty(*k.shape[:3], 68, dtype=k.dtype, device="cuda")[..., :64]
    with pytest.raises(ValueError, match=r"multiples of 8"):
        flash_attn_func(q, odd, v)


@both_masks
@every_instance
def test_allocates_the_outputs_alone(instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """No temporary, whatever the length: bytes asked of torch's allocator are those of out and lse."""
    q, k, v = Case(1, 4, 2, 4224, 4224, head_dim, causal).qkv(torch.bfloat16, seed, "cuda")
    flash_attn_func(q, k, v, causal=causal)  # what a stream's first call sets up stays
    counter = "requested_bytes.all.allocated"
    before = torch.cuda.memory_stats()[counter]
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    asked = torch.cuda.memory_stats()[counter] - before
    assert asked == out.numel() * out.element_size() + lse.numel() * lse.element_size()


def test_longest_sequence_of_a_head(seed: int) -> None:
    """64k queries on 128k keys: judged on rows at both ends and in the middle."""
    q, k, v = Case(1, 1, 1, 65536, 131072, 128).qkv(torch.bfloat16, seed, "cuda")
    out, lse = flash_attn_func(q, k, v, causal=True, return_lse=True)
    for start in (0, 32000, 65536 - 128):
        rows = slice(start, start + 128)
        seen = start + 128 + 65536  # keys that the last of these rows sees
        part = (q[:, rows], k[:, :seen], v[:, :seen])
        assert_accurate(out[:, rows], lse[:, :, rows], *part, causal=True)


def test_helper_sees_a_write_outside() -> None:
    """The tests above rely on it."""
    out, _ = nan_outputs(torch.zeros(1, 4, 2, 64, dtype=torch.bfloat16, device="cuda"))
    assert_surroundings_nan(out)
    out.as_strided((1,), (1,), out.storage_offset() + 64)[0] = 1.0  # the element after a row
    with pytest.raises(AssertionError, match="outside"):
        assert_surroundings_nan(out)


@every_instance
def test_direct_call_agrees_with_public_call(instance: None, head_dim: int, seed: int) -> None:
    q, k, v = Case(2, 4, 2, 239, 323, head_dim).qkv(torch.bfloat16, seed, "cuda")
    out, lse = torch.full_like(q, float("nan")), torch.full((2, 4, 239), float("nan"), device="cuda")
    kernels.forward(q, k, v, out, lse, head_dim**-0.5, False)
    public_out, public_lse = flash_attn_func(q, k, v, return_lse=True)
    assert torch.equal(out, public_out) and torch.equal(lse, public_lse)
    assert_kernel_accurate(q, k, v)
