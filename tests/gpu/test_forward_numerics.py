"""Inputs with a known answer or a hard one, odd scales, and the emulator's prediction of the kernel."""

import pytest
import torch
from cases import DTYPES, INSTANCE_HEAD_DIMS, Case
from helpers import assert_kernel_accurate, run_poisoned
from torch.nn.attention import SDPBackend, sdpa_kernel

from hopper_fa.accuracy import DISTRIBUTIONS
from hopper_fa.emulator import attention_emulated
from hopper_fa.metrics import error_metrics
from hopper_fa.reference import attention_reference

every_instance = pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
both_dtypes = pytest.mark.parametrize("dtype", DTYPES)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


@both_masks
@both_dtypes
@every_instance
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_hard_inputs(
    instance: None, distribution: str, head_dim: int, dtype: str, causal: bool, seed: int
) -> None:
    case = Case(2, 4, 2, 799, 1023, head_dim, causal)
    q, k, v = case.qkv(DTYPES[dtype], seed, "cuda", distribution)
    assert_kernel_accurate(q, k, v, causal=causal)


@both_masks
@every_instance
def test_ones_stay_ones(instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """With V = 1 only the normalisation is left: P is rounded to bf16, its sum is not."""
    q, k, v = Case(1, 4, 4, 1023, 1023, head_dim, causal).qkv(torch.bfloat16, seed, "cuda", "v_ones")
    out, _ = run_poisoned(q, k, v, causal=causal)
    assert (out.float() - 1).abs().max() <= 2**-7  # one unit in the last place above 1


@every_instance
def test_one_key_is_copied(instance: None, head_dim: int, seed: int) -> None:
    """Softmax over one key is 1, so the output is that key's value, bit for bit, and LSE is the score."""
    q, k, v = Case(2, 4, 2, 300, 1, head_dim).qkv(torch.bfloat16, seed, "cuda")
    out, lse = run_poisoned(q, k, v)
    assert torch.equal(out, v.repeat_interleave(2, 2).expand_as(out))
    _, reference_lse = attention_reference(q, k, v)
    torch.testing.assert_close(lse.double(), reference_lse, atol=1e-4, rtol=1e-5)


@every_instance
def test_first_causal_row_is_the_first_value(instance: None, head_dim: int, seed: int) -> None:
    q, k, v = Case(2, 4, 4, 513, 513, head_dim, True).qkv(torch.bfloat16, seed, "cuda")
    out, _ = run_poisoned(q, k, v, causal=True)
    assert torch.equal(out[:, 0], v[:, 0])


@both_masks
@every_instance
@pytest.mark.parametrize("seqlen_k", [0, 65])
def test_rows_without_keys(instance: None, seqlen_k: int, head_dim: int, causal: bool, seed: int) -> None:
    """Output 0 and LSE -inf, exactly, in poisoned outputs."""
    seqlen_q = 300
    q, k, v = Case(2, 4, 2, seqlen_q, seqlen_k, head_dim).qkv(torch.bfloat16, seed, "cuda")
    out, lse = run_poisoned(q, k, v, causal=causal)
    empty = seqlen_q if seqlen_k == 0 else (seqlen_q - seqlen_k if causal else 0)
    assert (out[:, :empty] == 0).all() and (lse[:, :, :empty] == float("-inf")).all()
    assert lse[:, :, empty:].isfinite().all()


@both_masks
@every_instance
@pytest.mark.parametrize("softmax_scale", [0.0, -0.3, 2.0, 1e-30, -1e-30])
def test_scale(instance: None, softmax_scale: float, head_dim: int, causal: bool, seed: int) -> None:
    q, k, v = Case(1, 2, 1, 239, 799, head_dim, causal).qkv(torch.bfloat16, seed, "cuda")
    assert_kernel_accurate(q, k, v, softmax_scale, causal)


@both_masks
@every_instance
def test_growing_scores_are_rescaled(instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """Key blocks outgrow the rescaling threshold, in the order that blocks are visited and against it."""
    q, k, v = Case(1, 2, 2, 512, 2048, head_dim, causal).qkv(torch.bfloat16, seed, "cuda")
    ramp = torch.linspace(0, 40, 2048, device="cuda")[None, :, None, None]
    along = torch.zeros_like(q)
    along[..., 0] = head_dim**0.5
    for keys in (ramp, ramp.flip(1)):
        toward = (k * 0.1).clone()
        toward[..., :1] += keys.to(k.dtype)
        assert_kernel_accurate((q * 0.1 + along).to(q.dtype), toward, v, causal=causal)


@both_masks
@every_instance
def test_scores_far_below_zero(instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """Those of every second row, rising or falling in the order that blocks are visited."""
    q, k, v = Case(1, 2, 2, 512, 2048, head_dim, causal).qkv(torch.bfloat16, seed, "cuda")
    ramp = torch.linspace(-60, -10, 2048, device="cuda")[None, :, None, None]
    along = torch.zeros_like(q)
    along[:, ::2, :, 0] = head_dim**0.5
    along[:, 1::2, :, 0] = -(head_dim**0.5)
    for keys in (ramp, ramp.flip(1)):
        toward = (k * 0.1).clone()
        toward[..., :1] += keys.to(k.dtype)
        assert_kernel_accurate((q * 0.1 + along).to(q.dtype), toward, v, causal=causal)


@every_instance
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_key_that_is_not_finite(instance: None, value: float, head_dim: int, seed: int) -> None:
    """A score of inf or NaN makes its row NaN, one of -inf hides its key; rows before it see neither."""
    q, k, v = Case(2, 4, 2, 700, 700, head_dim, True).qkv(torch.bfloat16, seed, "cuda")
    q[..., 0] = q[..., 0].abs() + 1
    before = run_poisoned(q, k, v, causal=True)
    for key in (0, 300, 699):
        changed = k.clone()
        changed[:, key, :, 0] = value
        out, lse = run_poisoned(q, changed, v, causal=True)
        assert torch.equal(before[0][:, :key], out[:, :key])
        assert torch.equal(before[1][:, :, :key], lse[:, :, :key])
        if value == float("-inf"):
            hidden = out[:, max(key, 1) :], lse[:, :, max(key, 1) :]
            assert all(t.isfinite().all() for t in hidden)
            reference, _ = attention_reference(q, changed, v, causal=True)
            assert error_metrics(hidden[0], reference[:, max(key, 1) :])["relative_l2"] < 1e-2
        else:
            assert out[:, key:].isnan().all() and lse[:, :, key:].isnan().all()


@both_masks
@both_dtypes
@every_instance
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_emulator_predicts_the_kernel(
    instance: None, distribution: str, head_dim: int, dtype: str, causal: bool, seed: int
) -> None:
    """They differ by far less than the kernel's own rounding error: its numerics are the kernel's."""
    q, k, v = Case(1, 4, 2, 500, 777, head_dim, causal).qkv(DTYPES[dtype], seed, "cuda", distribution)
    out, lse = run_poisoned(q, k, v, causal=causal)
    emulated, emulated_lse = attention_emulated(q, k, v, causal=causal)
    truth, _ = attention_reference(q, k, v, causal=causal)
    own_error = error_metrics(out, truth)["rmse"]
    # Where the kernel is exact (one-hot rows, V = 1) rounding in the last place is all there is to differ by.
    last_place = torch.finfo(q.dtype).eps * truth.square().mean().sqrt().item()
    assert error_metrics(out, emulated)["rmse"] <= 0.35 * own_error + 0.02 * last_place
    torch.testing.assert_close(lse, emulated_lse, atol=1e-4, rtol=1e-5)


@every_instance
@pytest.mark.parametrize("position", [1, 16, 200, 333, 704, 1022])
def test_later_keys_do_not_matter(instance: None, position: int, head_dim: int, seed: int) -> None:
    """Causal: other keys and values from `position` on leave every bit before it as it was."""
    q, k, v = Case(2, 4, 2, 1023, 1023, head_dim, True).qkv(torch.bfloat16, seed, "cuda")
    before = run_poisoned(q, k, v, causal=True)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[:, position:] = 5 * torch.randn_like(k[:, position:])
    changed_v[:, position:] = 5 * torch.randn_like(v[:, position:])
    after = run_poisoned(q, changed_k, changed_v, causal=True)
    assert torch.equal(before[0][:, :position], after[0][:, :position])
    assert torch.equal(before[1][:, :, :position], after[1][:, :, :position])
    assert not torch.equal(before[0][:, position:], after[0][:, position:])


@every_instance
def test_rows_do_not_disturb_each_other(instance: None, head_dim: int, seed: int) -> None:
    """A row whose maximum grows block by block shares a warp with rows whose bits must not depend on it.

    NOTE: a warp votes on whether to rescale; what a row's maximum becomes must still be its own decision, or
    keys that only later rows see change the bits of earlier rows under a causal mask.
    """
    q, k, v = Case(1, 2, 2, 256, 1024, head_dim).qkv(torch.bfloat16, seed, "cuda")
    # Largest in the first keys, which are visited last.
    k[..., 0] = torch.linspace(40, 0, 1024, device="cuda")[None, :, None]
    q[..., 0] = 0
    before, lse_before = run_poisoned(q, k, v)
    loud = torch.arange(5, 256, 16, device="cuda")  # one row of every warp
    q[:, loud, :, 0] = head_dim**0.5
    after, lse_after = run_poisoned(q, k, v)
    quiet = torch.ones(256, dtype=torch.bool, device="cuda")
    quiet[loud] = False
    assert torch.equal(before[:, quiet], after[:, quiet])
    assert torch.equal(lse_before[:, :, quiet], lse_after[:, :, quiet])
    assert not torch.equal(before[:, ~quiet], after[:, ~quiet])


@both_dtypes
@every_instance
@pytest.mark.parametrize("deviation", [3.0, 10.0])
def test_peaked_rows_beside_flash_attention_2(
    instance: None, deviation: float, head_dim: int, dtype: str, seed: int
) -> None:
    """Scores of deviations 9 and 100: rows see a few keys, or one. experiments/peaked_rows.py has more."""
    q, k, v = Case(2, 8, 8, 1024, 1024, head_dim).qkv(torch.float32, seed, "cuda")
    q, k, v = ((deviation * t).to(DTYPES[dtype]) for t in (q, k, v))
    truth, _ = attention_reference(q, k, v)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    ours, _ = run_poisoned(q, k, v)
    yardstick, got = error_metrics(theirs, truth), error_metrics(ours, truth)
    assert got["rmse"] <= 1.02 * yardstick["rmse"]
    assert got["max_abs"] <= 1.25 * yardstick["max_abs"]  # of a few million outputs; 2 with lags of 2**8
