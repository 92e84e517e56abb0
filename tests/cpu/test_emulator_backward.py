"""The emulated gradients against float64 by FlashAttention's rule, and the formulas of the float64 ones."""

from dataclasses import replace

import pytest
import torch
from cases import (
    ALL_CASES,
    DTYPES,
    GQA_CASES,
    SEQLEN_CASES,
    Case,
    assert_gradients_accurate,
    gradients_float64,
    in_nan,
    random_gradients,
)

from hopper_fa import attention_reference, error_metrics
from hopper_fa.accuracy import DISTRIBUTIONS
from hopper_fa.emulator import attention_emulated
from hopper_fa.emulator_backward import gradients_emulated
from hopper_fa.reference import gradients_reference

pytestmark = pytest.mark.usefixtures("one_thread")

HEAD_RATIOS = [(4, 4), (4, 2), (8, 2), (8, 1), (16, 1)]
LENGTHS = [(1, 1), (113, 113), (128, 128), (239, 239), (128, 239), (239, 128), (1, 239), (239, 1), (64, 300)]


def scale_of(case: Case) -> float:
    return case.head_dim**-0.5 if case.softmax_scale is None else case.softmax_scale


def emulate(
    case: Case, dtype: torch.dtype, seed: int, distribution: str = "normal", with_dlse: bool = True
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """The emulator's gradients, and (dout, dlse, q, k, v, scale, causal)."""
    q, k, v = case.qkv(dtype, seed, distribution=distribution)
    out, lse = attention_emulated(q, k, v, case.softmax_scale, case.causal)
    dout, dlse = random_gradients(q)
    dlse = dlse if with_dlse else None
    options = (scale_of(case), case.causal)
    return gradients_emulated(dout, dlse, q, k, v, out, lse, *options), (dout, dlse, q, k, v, *options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [c for c in ALL_CASES if max(c.seqlen_q, c.seqlen_k) < 1023], ids=str)
def test_accuracy(case: Case, dtype: str, seed: int) -> None:
    assert_gradients_accurate(*emulate(case, DTYPES[dtype], seed, with_dlse=False))


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads", HEAD_RATIOS, ids=lambda heads: f"h{heads[0]}:{heads[1]}")
@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_accuracy_with_a_gradient_of_lse(
    head_dim: int, heads: tuple[int, int], causal: bool, seed: int
) -> None:
    lengths = LENGTHS[seed % len(LENGTHS)]
    assert_gradients_accurate(*emulate(Case(2, *heads, *lengths, head_dim, causal), torch.bfloat16, seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_accuracy_on_difficult_inputs(distribution: str, dtype: str, seed: int) -> None:
    case = Case(seqlen_q=200, seqlen_k=500, head_dim=128)
    assert_gradients_accurate(*emulate(case, DTYPES[dtype], seed, distribution), distribution)


@pytest.mark.parametrize("case", SEQLEN_CASES[:6] + SEQLEN_CASES[-14:] + GQA_CASES, ids=str)
def test_formulas_are_the_derivative(case: Case, seed: int) -> None:
    """`gradients_reference` is what autograd makes of `attention_reference`."""
    q, k, v = case.qkv(torch.float64, seed)
    out, lse = attention_reference(q, k, v, 0.3, case.causal)
    dout, dlse = random_gradients(q)
    got = gradients_reference(dout, dlse, q, k, v, out, lse, 0.3, case.causal)
    want = gradients_float64(dout, dlse, q, k, v, 0.3, case.causal)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


def test_finite_differences(seed: int) -> None:
    """The derivative along one direction, of a loss with out and lse in it, by two forward calls."""
    case = Case(heads_q=4, heads_kv=2, seqlen_q=37, seqlen_k=50, causal=True)
    inputs = case.qkv(torch.float64, seed)
    directions = [torch.randn_like(t) for t in inputs]
    dout, dlse = random_gradients(inputs[0])

    def loss(step: float) -> torch.Tensor:
        out, lse = attention_reference(
            *(t + step * d for t, d in zip(inputs, directions, strict=True)), 0.2, True
        )
        return (out * dout).sum() + (lse * dlse).sum()

    out, lse = attention_reference(*inputs, 0.2, True)
    gradients = gradients_reference(dout, dlse, *inputs, out, lse, 0.2, True)
    analytic = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close((loss(1e-5) - loss(-1e-5)) / 2e-5, analytic, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lengths", [(300, 65), (130, 0)])
def test_rows_without_keys(lengths: tuple[int, int], seed: int) -> None:
    """Their dQ is 0, and whatever their gradients hold reaches nothing else."""
    case = Case(1, 2, 1, *lengths, causal=True)
    q, k, v = case.qkv(torch.bfloat16, seed)
    out, lse = attention_emulated(q, k, v, causal=True)
    dout, dlse = random_gradients(q)
    empty = lengths[0] - lengths[1]
    want = gradients_emulated(dout, dlse, q, k, v, out, lse, 0.125, True)
    assert (want[0][:, :empty] == 0).all() and all(t.isfinite().all() for t in want)
    dout[:, :empty] *= -3
    dlse[:, :, :empty] = float("inf")
    for a, b in zip(gradients_emulated(dout, dlse, q, k, v, out, lse, 0.125, True), want, strict=True):
        assert torch.equal(a, b)


def test_keys_without_rows(seed: int) -> None:
    q, k, v = Case(seqlen_q=0, seqlen_k=130).qkv(torch.bfloat16, seed)
    dq, dk, dv = gradients_emulated(q, None, q, k, v, q, torch.zeros(1, 2, 0), 0.125)
    assert dq.shape == q.shape and (dk == 0).all() and (dv == 0).all() and dk.shape == k.shape


def test_inputs_may_lie_in_nan(seed: int) -> None:
    case = Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=113, seqlen_k=239, head_dim=72)
    q, k, v = case.qkv(torch.bfloat16, seed)
    out, lse = attention_emulated(q, k, v)
    dout, dlse = random_gradients(q)
    want = gradients_emulated(dout, dlse, q, k, v, out, lse, 0.1)
    views = [in_nan(t) for t in (q, k, v, out)]
    got = gradients_emulated(in_nan(dout), dlse, *views, lse, 0.1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_negative_scale_is_the_scale_of_negated_queries(seed: int) -> None:
    case = Case(seqlen_q=70, seqlen_k=300)
    (dq, dk, dv), (dout, dlse, q, k, v, *_) = emulate(replace(case, softmax_scale=-0.2), torch.bfloat16, seed)
    out, lse = attention_emulated(-q, k, v, 0.2)
    negated = gradients_emulated(dout, dlse, -q, k, v, out, lse, 0.2)
    assert all(torch.equal(a, b) for a, b in zip((-dq, dk, dv), negated, strict=True))


def test_causal_rows_do_not_depend_on_later_keys(seed: int) -> None:
    """The gradient of queries before a position neither, and keys after the last row have none."""
    q, k, v = Case(seqlen_q=239, seqlen_k=239).qkv(torch.bfloat16, seed)
    dout, _ = random_gradients(q)
    position = 130
    dout[:, position:] = 0
    before = gradients_emulated(dout, None, q, k, v, *attention_emulated(q, k, v, causal=True), 0.125, True)
    k[:, position:] = torch.randn_like(k[:, position:])
    v[:, position:] = 1000.0
    after = gradients_emulated(dout, None, q, k, v, *attention_emulated(q, k, v, causal=True), 0.125, True)
    assert all(torch.equal(a[:, :position], b[:, :position]) for a, b in zip(before, after, strict=True))
    assert all((t[:, position:] == 0).all() for t in after)


def test_roundings_are_those_of_p_and_ds(seed: int) -> None:
    """FP16 rounds 8 times finer than BF16: so do the errors that the emulator makes."""
    case = Case(seqlen_q=300, seqlen_k=300, head_dim=128)
    errors = []
    for dtype in (torch.bfloat16, torch.float16):
        got, (dout, dlse, *rest) = emulate(case, dtype, seed, with_dlse=False)
        want = gradients_float64(dout, dlse, *rest)
        errors.append([error_metrics(a, b)["relative_l2"] for a, b in zip(got, want, strict=True)])
    for coarse, fine in zip(*errors, strict=True):
        assert 1e-3 < coarse < 5e-3 and 4 < coarse / fine < 12
