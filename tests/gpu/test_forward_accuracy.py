"""The kernel against float64, by FlashAttention's rule: dtypes, head dims, masks, head ratios, lengths."""

from dataclasses import replace

import pytest
from cases import ALL_CASES, DTYPES, HEAD_DIMS, INSTANCE_HEAD_DIMS, Case
from helpers import assert_kernel_accurate

from hopper_fa import kernels

both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])

# Query heads, key/value heads: ratios 1, 2, 4, 8, and every query head on one.
HEAD_RATIOS = [(4, 4), (4, 2), (8, 2), (8, 1), (13, 1)]

# (seqlen_q, seqlen_k): lengths just around tiles, long ones, and one far longer than the other, both ways.
LENGTHS = [(1, 1), (1, 4224), (64, 65), (127, 129), (192, 191), (1023, 1023), (1024, 1024), (4224, 4224)]
LENGTHS += [(113, 4224), (4224, 113), (799, 1023), (1023, 799), (239, 1), (1024, 0)]


def check(case: Case, dtype: str, seed: int, variant: str = "default") -> None:
    q, k, v = case.qkv(DTYPES[dtype], seed, "cuda")
    assert_kernel_accurate(q, k, v, case.softmax_scale, case.causal, variant)


@both_dtypes
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_shared_cases(instance: None, case: Case, dtype: str, seed: int) -> None:
    check(case, dtype, seed)


@both_masks
@pytest.mark.parametrize("heads", HEAD_RATIOS, ids=lambda heads: f"h{heads[0]}:{heads[1]}")
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_ratios_at_every_head_dim(
    instance: None, head_dim: int, heads: tuple[int, int], causal: bool, seed: int
) -> None:
    check(Case(2, *heads, 239, 323, head_dim, causal), "bf16", seed)


@both_dtypes
@both_masks
@pytest.mark.parametrize("lengths", LENGTHS, ids=lambda lengths: f"s{lengths[0]}:{lengths[1]}")
@pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
def test_lengths(
    instance: None, head_dim: int, lengths: tuple[int, int], causal: bool, dtype: str, seed: int
) -> None:
    check(Case(1, 2, 1, *lengths, head_dim, causal), dtype, seed)


@both_masks
@pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
def test_more_tiles_than_multiprocessors(instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """Every CTA runs several tiles, of several heads and batch entries."""
    check(Case(5, 12, 4, 1000, 1000, head_dim, causal), "bf16", seed)


@both_masks
@pytest.mark.parametrize(
    ("variant", "head_dim", "dtype"),
    [
        (row["variant"], row["head_dim"], dtype)
        for row in kernels.FORWARD_TILES
        for dtype in row["dtypes"]
        if row["variant"] != "default" and dtype in DTYPES
    ],
)
def test_experiment_variants(variant: str, head_dim: int, dtype: str, causal: bool, seed: int) -> None:
    case = Case(2, 6, 2, 799, 1023, head_dim, causal)
    check(case, dtype, seed, variant)
    check(replace(case, batch=4, heads_q=18, seqlen_q=1024), dtype, seed + 1, variant)
