"""The emulator against float64 by FlashAttention's rule, and the pieces of its arithmetic one by one."""

import time

import pytest
import torch
from cases import ALL_CASES, DTYPES, Case, assert_accurate, in_nan

from hopper_fa import attention_reference, emulator, error_metrics
from hopper_fa.accuracy import DISTRIBUTIONS
from hopper_fa.emulator import attention_emulated, exp2_polynomial


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ALL_CASES, ids=str)
def test_accuracy(case: Case, dtype: str, seed: int) -> None:
    q, k, v = case.qkv(DTYPES[dtype], seed)
    options = (case.softmax_scale, case.causal)
    assert_accurate(*attention_emulated(q, k, v, *options), q, k, v, *options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_accuracy_on_difficult_inputs(distribution: str, dtype: str, seed: int) -> None:
    q, k, v = Case(seqlen_q=200, seqlen_k=500, head_dim=128).qkv(
        DTYPES[dtype], seed, distribution=distribution
    )
    assert_accurate(*attention_emulated(q, k, v), q, k, v)


@pytest.mark.parametrize("threshold", [0.0, 8.0])
@pytest.mark.parametrize("octets", [0, 2, 8])
def test_accuracy_of_every_softmax_option(octets: int, threshold: float, seed: int) -> None:
    case = Case(seqlen_q=239, seqlen_k=200, causal=True)  # the first rows see no key
    q, k, v = case.qkv(torch.bfloat16, seed)
    # Scores grow towards the first keys, which the kernel visits last: the maximum keeps moving.
    k *= torch.linspace(4, 0, 200, dtype=k.dtype)[:, None, None]
    out, lse = attention_emulated(q, k, v, causal=True, fma_exp2_octets=octets, rescale_threshold=threshold)
    assert_accurate(out, lse, q, k, v, causal=True)


def test_the_rescale_threshold_changes_roundings_only(seed: int) -> None:
    q, k, v = Case(seqlen_q=64, seqlen_k=1023).qkv(torch.bfloat16, seed)
    eager, eager_lse = attention_emulated(q, k, v, rescale_threshold=0.0)
    lazy, lazy_lse = attention_emulated(q, k, v, rescale_threshold=8.0)
    assert not torch.equal(eager, lazy)
    torch.testing.assert_close(eager_lse, lazy_lse, atol=1e-5, rtol=0)


def test_inputs_may_lie_in_nan(seed: int) -> None:
    case = Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=113, seqlen_k=239, head_dim=72)
    q, k, v = case.qkv(torch.bfloat16, seed)
    for a, b in zip(attention_emulated(q, k, v), attention_emulated(*map(in_nan, (q, k, v))), strict=True):
        assert torch.equal(a, b)


def test_causal_rows_do_not_depend_on_later_keys(seed: int) -> None:
    q, k, v = Case(seqlen_q=239, seqlen_k=239).qkv(torch.bfloat16, seed)
    out, lse = attention_emulated(q, k, v, causal=True)
    position = 130
    k[:, position:] = torch.randn_like(k[:, position:])
    v[:, position:] = 1000.0
    changed_out, changed_lse = attention_emulated(q, k, v, causal=True)
    assert torch.equal(out[:, :position], changed_out[:, :position])
    assert torch.equal(lse[:, :, :position], changed_lse[:, :, :position])
    assert not torch.equal(out[:, position:], changed_out[:, position:])


def test_nan_stays_in_its_row(seed: int) -> None:
    q, k, v = Case(seqlen_q=20, seqlen_k=300).qkv(torch.bfloat16, seed)
    want, want_lse = attention_emulated(q, k, v)
    q[0, 7, 1] = float("nan")
    out, lse = attention_emulated(q, k, v)
    assert out[0, 7, 1].isnan().all() and lse[0, 1, 7].isnan()
    others = torch.arange(20) != 7
    assert torch.equal(out[:, others], want[:, others])
    assert torch.equal(lse[:, :, others], want_lse[:, :, others])


def test_negative_scale_is_the_scale_of_negated_queries(seed: int) -> None:
    q, k, v = Case(seqlen_q=70, seqlen_k=300).qkv(torch.bfloat16, seed)
    negated = attention_emulated(-q, k, v, 0.2, True)
    for a, b in zip(attention_emulated(q, k, v, -0.2, True), negated, strict=True):
        assert torch.equal(a, b)


def test_rows_rescale_on_their_own() -> None:
    # Row 3 outgrows the threshold of 8, row 2 just reaches it, row 5 has seen no key, row 6 sees its first.
    row_max = torch.zeros(8)
    row_max[5] = row_max[6] = float("-inf")
    scores = torch.full((8, 4), 1.0)
    scores[3, 2], scores[2, 1] = 9.0, 8.0
    scores[5] = float("-inf")
    row_sum, out = torch.ones(8), torch.ones(8, 8)
    row_sum[6] = out[6] = 0
    emulator.rescale(row_max, scores, 1.0, 8.0, row_sum, out)

    want_max = torch.zeros(8)
    want_max[3], want_max[5], want_max[6] = 9.0, float("-inf"), 1.0
    assert torch.equal(row_max, want_max)
    want_sum = torch.ones(8)
    want_sum[3], want_sum[6] = 2.0**-9, 0.0
    assert torch.equal(row_sum, want_sum)
    assert torch.equal(out, want_sum[:, None].expand(8, 8))


def test_exp2_polynomial() -> None:
    # Every value near the boundaries too: below -125.5 the result may be a denormal (the next assertion).
    x = torch.linspace(-125.5, 0, 400_001)
    relative = (exp2_polynomial(x).double() / x.double().exp2() - 1).abs().max()
    assert relative < 8e-5  # of a BF16 half-ulp of 2e-3
    edge = torch.linspace(-126, -125.5, 100_001)
    assert ((exp2_polynomial(edge) / edge.exp2() - 1).abs() < 2e-4).all()
    below = torch.tensor([-126.0, -126.5, -127.0, -128.0, -1e4, -1e38, float("-inf")])
    assert ((0 <= exp2_polynomial(below)) & (exp2_polynomial(below) <= 2.0**-126)).all()
    assert exp2_polynomial(torch.tensor([float("nan")])).isnan().all()


def test_speed(seed: int) -> None:
    # On one core: where cores are busy, two threads that wait for each other measure the other work.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    q, k, v = Case(heads_q=1, heads_kv=1, seqlen_q=4096, seqlen_k=4096, head_dim=128).qkv(
        torch.bfloat16, seed
    )
    try:
        start = time.perf_counter()
        attention_emulated(q, k, v)
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    assert seconds < 5


@pytest.mark.parametrize("deviation", [3, 10])
def test_peaked_rows_are_as_accurate_as_with_eager_rescaling(deviation: int, seed: int) -> None:
    """A maximum whose P is a large part of its row's sum is followed, so that this P is exactly 1."""
    q, k, v = Case(heads_q=4, heads_kv=4, seqlen_q=128, seqlen_k=2048, head_dim=64).qkv(torch.float32, seed)
    q, k, v = ((deviation * t).bfloat16() for t in (q, k, v))
    truth = attention_reference(q, k, v)[0]

    def rmse(**options: float) -> float:
        return error_metrics(attention_emulated(q, k, v, **options)[0], truth)["rmse"]

    eager = rmse(rescale_threshold=0.0)
    assert rmse() < 1.02 * eager
    assert rmse(peak_bits=-20) > 1.08 * eager  # the maximum may lag by 2**8 whatever the row's sum is
