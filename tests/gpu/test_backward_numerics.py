"""Gradients of hard inputs and odd scales, exact ones, and the emulator's prediction of the kernel."""

import pytest
import torch
from backward_helpers import assert_backward_accurate, problem_of, run_backward_poisoned
from cases import DTYPES, INSTANCE_HEAD_DIMS, Case, assert_gradients_accurate, gradients_float64
from helpers import same

from hopper_fa import flash_attn_func
from hopper_fa.accuracy import DISTRIBUTIONS
from hopper_fa.emulator_backward import gradients_emulated
from hopper_fa.metrics import error_metrics

every_instance = pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@both_masks
@both_dtypes
@every_instance
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_hard_inputs(
    backward_instance: None, distribution: str, head_dim: int, dtype: str, causal: bool, seed: int
) -> None:
    case = Case(2, 4, 2, 799, 1023, head_dim, causal)
    problem = problem_of(case, DTYPES[dtype], seed, distribution)
    assert_gradients_accurate(run_backward_poisoned(problem), problem, distribution)


@both_masks
@every_instance
@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 2.0, 1e-30, -1e-30])
def test_scale(backward_instance: None, softmax_scale: float, head_dim: int, causal: bool, seed: int) -> None:
    case = Case(1, 2, 1, 239, 799, head_dim, causal, softmax_scale)
    dq, dk, _ = assert_backward_accurate(problem_of(case, torch.bfloat16, seed, with_dlse=True))
    if softmax_scale == 0:
        assert (dq == 0).all() and (dk == 0).all()


@both_masks
@both_dtypes
@every_instance
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_emulator_predicts_the_kernel(
    backward_instance: None, distribution: str, head_dim: int, dtype: str, causal: bool, seed: int
) -> None:
    """They differ by far less than the kernel's own rounding error: its numerics are the kernel's."""
    case = Case(1, 4, 2, 500, 777, head_dim, causal)
    problem = problem_of(case, DTYPES[dtype], seed, distribution, with_dlse=True)
    dout, dlse, q, k, v, scale, _ = problem
    got = run_backward_poisoned(problem)
    out, lse = flash_attn_func(q, k, v, scale, causal, return_lse=True)
    emulated = gradients_emulated(dout, dlse, q, k, v, out, lse, scale, causal)
    eps = torch.finfo(q.dtype).eps
    # Where gradients cancel to nothing, FP32 noise is all that both have.
    floor = 1e-3 * eps * dout.abs().max().item()
    for name, ours, theirs, truth in zip("qkv", got, emulated, gradients_float64(*problem), strict=True):
        last_place = eps * truth.square().mean().sqrt().item()
        # NOTE: FP32 scores of hundreds, whose sums the tensor core cuts, move P by a twentieth of FP16's
        # last place.
        share = 0.5 if dtype == "fp16" and distribution in ("outliers", "one_hot") else 0.35
        flips = 0.0
        if dtype == "fp16" and distribution == "outliers":
            # NOTE: one large element that rounds the other way can be all of the difference.
            flips = 2 * eps * truth.abs().max().item() / truth.numel() ** 0.5
        allowed = share * error_metrics(ours, truth)["rmse"] + 0.02 * last_place + floor + flips
        difference = error_metrics(ours, theirs)["rmse"]
        assert difference <= allowed, f"d{name}: {difference:.3e} exceeds {allowed:.3e}"


@both_masks
@every_instance
@pytest.mark.parametrize("seqlen_k", [0, 65])
def test_rows_without_keys(
    backward_instance: None, seqlen_k: int, head_dim: int, causal: bool, seed: int
) -> None:
    """dQ is 0 there, and their gradients, infinite ones of LSE among them, change no bit of dK and dV."""
    case = Case(2, 4, 2, 300, seqlen_k, head_dim, causal)
    dout, dlse, *rest = problem_of(case, torch.bfloat16, seed, with_dlse=True)
    before = run_backward_poisoned((dout, dlse, *rest), deterministic=True)
    empty = 300 if seqlen_k == 0 else (300 - seqlen_k if causal else 0)
    assert (before[0][:, :empty] == 0).all() and all(t.isfinite().all() for t in before)
    dout[:, :empty] = 1000.0
    dlse[:, :, :empty] = float("-inf")
    assert same(before, run_backward_poisoned((dout, dlse, *rest), deterministic=True))


@every_instance
@pytest.mark.parametrize("seqlen_k", [324, 1000])
def test_keys_that_no_row_sees(backward_instance: None, seqlen_k: int, head_dim: int, seed: int) -> None:
    """Rows that contribute nothing (dout 0) leave the keys that only they see a gradient of 0."""
    case = Case(2, 4, 2, 300, seqlen_k, head_dim, True)
    dout, _, *rest = problem_of(case, torch.bfloat16, seed)
    dout[:, 130:] = 0
    seen = seqlen_k - 300 + 130
    _, dk, dv = run_backward_poisoned((dout, None, *rest))
    assert (dk[:, seen:] == 0).all() and (dv[:, seen:] == 0).all()
    assert (dv[:, :seen] != 0).any(-1).all()


@every_instance
def test_no_queries(backward_instance: None, head_dim: int, seed: int) -> None:
    _, dk, dv = run_backward_poisoned(problem_of(Case(2, 4, 2, 0, 300, head_dim), torch.bfloat16, seed))
    assert (dk == 0).all() and (dv == 0).all()


@every_instance
def test_one_key(backward_instance: None, head_dim: int, seed: int) -> None:
    """Softmax over one key is 1: dV is the sum of dout, dQ and dK are 0 but for FP32 noise."""
    problem = problem_of(Case(2, 4, 2, 300, 1, head_dim), torch.bfloat16, seed)
    dq, dk, dv = run_backward_poisoned(problem)
    exact = problem[0].double().unflatten(2, (2, 2)).sum((1, 3))[:, None]
    torch.testing.assert_close(dv.double(), exact, rtol=2**-8, atol=1e-3)
    assert dq.abs().max() < 1e-3 and dk.abs().max() < 1e-2


@every_instance
@pytest.mark.parametrize("position", [1, 16, 200, 333, 704, 1022])
def test_later_rows_and_keys_do_not_matter(
    backward_instance: None, position: int, head_dim: int, seed: int
) -> None:
    """Causal: other keys from `position` on change no gradient before it, if later rows have none."""
    case = Case(2, 4, 2, 1023, 1023, head_dim, True)
    dout, dlse, q, k, v, *rest = problem_of(case, torch.bfloat16, seed)
    dout[:, position:] = 0
    before = run_backward_poisoned((dout, dlse, q, k, v, *rest), deterministic=True)
    k[:, position:] = 5 * torch.randn_like(k[:, position:])
    v[:, position:] = 5 * torch.randn_like(v[:, position:])
    after = run_backward_poisoned((dout, dlse, q, k, v, *rest), deterministic=True)
    assert same(*(tuple(t[:, :position] for t in gradients) for gradients in (before, after)))


@both_masks
@every_instance
def test_growing_scores(backward_instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """Scores up to 40 * log2 e apart between the first and the last keys."""
    case = Case(1, 2, 2, 512, 2048, head_dim, causal)
    dout, _, q, k, v, *rest = problem_of(case, torch.bfloat16, seed)
    along = torch.zeros_like(q)
    along[..., 0] = head_dim**0.5
    toward = 0.1 * k
    toward[..., :1] += torch.linspace(0, 40, 2048, device="cuda")[None, :, None, None].to(k.dtype)
    assert_backward_accurate((dout, None, 0.1 * q + along, toward, v, *rest))


@both_dtypes
@every_instance
def test_fp32_sums(backward_instance: None, head_dim: int, dtype: str, seed: int) -> None:
    """dV of a key that 4224 rows see alike: summed in the 16-bit dtype it would stop growing."""
    case = Case(1, 1, 1, 4224, 64, head_dim, False, 0.0)
    dout, _, *rest = problem_of(case, DTYPES[dtype], seed)
    _, _, dv = run_backward_poisoned((torch.ones_like(dout), None, *rest))
    assert (dv == 66.0).all()  # 4224 / 64, exact in both dtypes
