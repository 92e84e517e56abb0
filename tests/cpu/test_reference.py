"""The reference against torch's float64 attention; error metrics against numbers worked out by hand."""

import math

import pytest
import torch
from cases import Case
from torch.nn.functional import scaled_dot_product_attention

from hopper_fa import attention_reference, error_metrics
from hopper_fa.accuracy import DISTRIBUTIONS, random_qkv


@pytest.mark.parametrize("causal", [False, True])
def test_reference_is_torch_attention_in_float64(causal: bool, seed: int) -> None:
    q, k, v = (
        t.double()
        for t in Case(batch=2, heads_q=6, heads_kv=2, seqlen_q=30, seqlen_k=50).qkv(torch.float16, seed)
    )
    out, lse = attention_reference(q, k, v, 0.3, causal)
    visible = torch.ones(30, 50, dtype=torch.bool)
    if causal:
        visible = visible.tril(50 - 30)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    want = scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, want.transpose(1, 2), atol=1e-13, rtol=1e-12)
    scores = (0.3 * q @ k.repeat_interleave(3, 1).mT).masked_fill(~visible, float("-inf"))
    torch.testing.assert_close(lse, scores.exp().sum(-1).log(), atol=1e-12, rtol=1e-12)


def test_reference_rows_without_keys(seed: int) -> None:
    q, k, v = Case(heads_q=1, heads_kv=1, seqlen_q=5, seqlen_k=2).qkv(torch.float16, seed)
    out, lse = attention_reference(q, k, v, causal=True)
    assert (out[:, :3] == 0).all() and (lse[:, :, :3] == float("-inf")).all()
    torch.testing.assert_close(out[:, 3], v[:, 0].double())  # the fourth row sees the first key alone
    assert lse[:, :, 3:].isfinite().all()


def test_reference_does_not_overflow() -> None:
    q = torch.full((1, 2, 1, 8), 1e3, dtype=torch.float64)
    out, lse = attention_reference(q, q, q, softmax_scale=1.0)
    torch.testing.assert_close(out, q)
    torch.testing.assert_close(lse, torch.full_like(lse, 8e6 + math.log(2)))


def test_error_metrics_by_hand() -> None:
    ref = torch.tensor([[3.0, -4.0], [0.0, 2.0], [0.0, 0.0]])
    x = torch.tensor([[3.0, -3.0], [0.0, 4.0], [0.0, 0.0]])
    metrics = error_metrics(x.bfloat16(), ref)
    assert metrics == pytest.approx(
        {
            "max_abs": 2.0,
            "rmse": math.sqrt(5 / 6),
            "relative_l1": 3 / 9,
            "relative_l2": math.sqrt(5 / 29),
            "cosine": 29 / math.sqrt(34 * 29),
            "signed_bias": (-1 + 2) / 6,
            "relative_bias": (-1 + 2) / 9,
            "row_median": 0.2,  # of 0.2, 1 and 0
            "row_p99": 1.0,
        }
    )


def test_error_metrics_of_equal_empty_and_misshapen() -> None:
    zero = torch.zeros(3, 4)
    same = error_metrics(zero, zero)
    assert same.pop("cosine") == 1.0 and set(same.values()) == {0.0}
    assert error_metrics(zero[:0], zero[:0])["max_abs"] == 0.0
    assert error_metrics(zero + 1, zero)["relative_l2"] == math.inf
    with pytest.raises(ValueError, match="pass two tensors of one shape"):
        error_metrics(zero, zero[0])


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_distributions_are_what_they_say(distribution: str, seed: int) -> None:
    def draw(seed: int) -> tuple[torch.Tensor, ...]:
        return random_qkv(1, 512, 512, 2, 2, 64, dtype=torch.float32, distribution=distribution, seed=seed)

    q, k, v = draw(seed)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), draw(seed), strict=True))
    assert not torch.equal(q, draw(seed + 1)[0])
    if distribution == "normal":
        assert all(0.9 < t.std() < 1.1 and t.abs().max() < 7 for t in (q, k, v))
    elif distribution == "outliers":
        assert all(t.abs().max() > 8 and t.abs().median() < 1 for t in (q, k, v))
    elif distribution == "v_ones":
        assert (v == 1).all() and 0.9 < k.std() < 1.1
    elif distribution == "k_offset":
        assert k.mean(1).abs().mean() > 3 and 0.9 < (k - k.mean(1, keepdim=True)).std() < 1.1
    else:
        probs = (q.transpose(1, 2) @ k.transpose(1, 2).mT / 8).softmax(-1)
        assert probs.diagonal(dim1=-2, dim2=-1).median() > 0.9


def test_unknown_distribution() -> None:
    with pytest.raises(ValueError, match="distribution is 'cauchy'; it must be one of 'normal'"):
        random_qkv(1, 8, 8, 1, 1, 8, dtype=torch.float16, distribution="cauchy")
