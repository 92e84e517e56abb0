"""Gradients against float64, by FlashAttention's rule: dtypes, head dims, masks, head ratios, lengths."""

import pytest
import torch
from backward_helpers import assert_backward_accurate, problem_of
from cases import ALL_CASES, DTYPES, HEAD_DIMS, INSTANCE_HEAD_DIMS, Case, gradients_float64
from torch.nn.functional import scaled_dot_product_attention

from hopper_fa import error_metrics, flash_attn_func, kernels

both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])

# Query heads, key/value heads: ratios 1, 2, 4, 8, and every query head on one.
HEAD_RATIOS = [(4, 4), (4, 2), (8, 2), (8, 1), (13, 1), (16, 1)]

# (seqlen_q, seqlen_k): as in test_forward_accuracy.py, and no query.
LENGTHS = [(1, 1), (1, 4224), (64, 65), (127, 129), (192, 191), (1023, 1023), (1024, 1024), (4224, 4224)]
LENGTHS += [(113, 4224), (4224, 113), (799, 1023), (1023, 799), (239, 1), (1024, 0), (0, 1024)]


@both_dtypes
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_shared_cases(backward_instance: None, case: Case, dtype: str, seed: int) -> None:
    assert_backward_accurate(problem_of(case, DTYPES[dtype], seed), deterministic=seed % 2 == 0)


@both_masks
@pytest.mark.parametrize("heads", HEAD_RATIOS, ids=lambda heads: f"h{heads[0]}:{heads[1]}")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_ratios_at_every_head_dim(
    backward_instance: None, head_dim: int, heads: tuple[int, int], causal: bool, seed: int
) -> None:
    problem = problem_of(Case(2, *heads, 239, 323, head_dim, causal), torch.bfloat16, seed, with_dlse=True)
    assert_backward_accurate(problem, deterministic=seed % 2 == 0)


@both_dtypes
@both_masks
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"s{lengths[0]}:{lengths[1]}")
@pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
def test_lengths(
    backward_instance: None, head_dim: int, lengths: tuple[int, int], causal: bool, dtype: str, seed: int
) -> None:
    case = Case(1, 2, 1, *lengths, head_dim, causal)
    problem = problem_of(case, DTYPES[dtype], seed, with_dlse=seed % 2 == 0)
    assert_backward_accurate(problem, deterministic=seed % 3 == 0)


@both_masks
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
def test_more_tiles_than_multiprocessors(
    backward_instance: None, head_dim: int, deterministic: bool, causal: bool, seed: int
) -> None:
    problem = problem_of(Case(5, 12, 4, 1000, 1000, head_dim, causal), torch.bfloat16, seed)
    assert_backward_accurate(problem, deterministic)


# (batch, heads_q, heads_kv, seqlen_q, seqlen_k): the usual; walks of no, one and two steps, also in a group
# of heads; more key blocks than multiprocessors, and more than one group of turns; queries that see no key.
EXPERIMENT_CASES = [(2, 6, 2, 799, 1023), (1, 1, 1, 0, 64), (1, 1, 1, 1, 1), (1, 1, 1, 64, 300)]
EXPERIMENT_CASES += [(1, 1, 1, 129, 128), (1, 3, 1, 100, 100), (5, 12, 4, 1000, 1000), (1, 1, 1, 700, 17500)]
EXPERIMENT_CASES += [(2, 4, 1, 799, 239), (1, 2, 1, 300, 0)]


@both_masks
@pytest.mark.parametrize("sizes", EXPERIMENT_CASES, ids=str)
@pytest.mark.parametrize(
    ("variant", "head_dim", "dtype"),
    [
        (row["variant"], row["head_dim"], dtype)
        for row in kernels.BACKWARD_TILES
        for dtype in row["dtypes"]
        if row["variant"] != "default" and not row["quantized"]
    ],
)
def test_experiment_variants(
    variant: str, head_dim: int, dtype: str, sizes: tuple[int, ...], causal: bool, seed: int
) -> None:
    problem = problem_of(Case(*sizes, head_dim, causal), DTYPES[dtype], seed, with_dlse=True)
    assert_backward_accurate(problem, False, variant)
    assert_backward_accurate(problem, True, variant)


@both_masks
@pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
def test_16k_tokens(backward_instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """Twice the error of torch's fused attention at most; float64 goes chunk by chunk of query rows."""
    case = Case(1, 1, 1, 16384, 16384, head_dim, causal)
    dout, _, q, k, v, *_ = problem_of(case, torch.bfloat16, seed)
    want = tuple(torch.zeros_like(t, dtype=torch.float64) for t in (q, k, v))
    for start in range(0, case.seqlen_q, 2048):
        rows = slice(start, start + 2048)
        keys = slice(0, rows.stop if causal else case.seqlen_k)
        part = gradients_float64(dout[:, rows], None, q[:, rows], k[:, keys], v[:, keys], causal=causal)
        want[0][:, rows] = part[0]
        want[1][:, keys] += part[1]
        want[2][:, keys] += part[2]

    leaves = [t.requires_grad_() for t in (q, k, v)]
    ours = torch.autograd.grad(flash_attn_func(*leaves, causal=causal), leaves, dout)
    fused = scaled_dot_product_attention(*(t.transpose(1, 2) for t in leaves), is_causal=causal)
    theirs = torch.autograd.grad(fused.transpose(1, 2), leaves, dout)
    for got, yardstick, truth in zip(ours, theirs, want, strict=True):
        error, allowed = error_metrics(got, truth), error_metrics(yardstick, truth)
        assert error["rmse"] <= 2 * allowed["rmse"] and error["max_abs"] <= 2 * allowed["max_abs"]
