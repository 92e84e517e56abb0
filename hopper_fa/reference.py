"""Textbook attention in float64: what everything else is judged against."""

import torch

from hopper_fa.arguments import as_flag, as_float, check_attention


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """O = softmax(softmax_scale * Q K^T + mask) V with the whole score matrix in float64.

    Query head h reads key/value head h // (heads_q // heads_kv). The causal mask is bottom-right aligned: row
    i sees keys j <= i + seqlen_k - seqlen_q. A row that sees no key gives out = 0 and lse = -inf. Memory and
    time grow with seqlen_q * seqlen_k, on any device; differentiable.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), any floating-point dtype.
        k, v: (batch, seqlen_k, heads_kv, head_dim), heads_q a multiple of heads_kv. The head_dim of v, which
            out has then, may be another.
        softmax_scale: factor on the scores; None means 1 / sqrt(head_dim).
        causal: hide keys after the query's own position.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim) and lse = log(sum(exp(scores))) (batch, heads_q,
        seqlen_q), float64.

    Raises:
        TypeError: an argument is of another type.
        ValueError: dtypes, devices or shapes that do not fit.
    """
    check_attention(q, k, v)
    softmax_scale, causal = as_float("softmax_scale", softmax_scale, optional=True), as_flag("causal", causal)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    q, k, v = _heads_first(q, k, v)
    scores = _scores(q, k, scale, causal)
    lse = scores.logsumexp(-1)  # (batch, heads_q, seqlen_q)
    return (_probabilities(scores, lse) @ v).transpose(1, 2), lse


def gradients_reference(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `attention_reference` by their formulas, where autograd cannot record; float64.

    Args:
        dout: gradient of the output, as q. dlse: of lse (batch, heads_q, seqlen_q); None is zero.
        out, lse: not looked at: they are computed again, without their rounding.

    Returns:
        dq, dk, dv, of the shapes of q, k, v.
    """
    heads_kv = k.shape[2]
    q, k, v = _heads_first(q, k, v)
    dout = dout.double().transpose(1, 2)
    scores = _scores(q, k, softmax_scale, causal)
    p = _probabilities(scores, scores.logsumexp(-1))  # (batch, heads_q, seqlen_q, seqlen_k)
    dp = dout @ v.transpose(-1, -2)
    delta = (dp * p).sum(-1) if dlse is None else (dp * p).sum(-1) - dlse
    # NOTE: a gradient of an infinite LSE may be infinite too, and 0 * inf is NaN.
    ds = (p * (dp - delta[..., None])).masked_fill(p == 0, 0.0)

    def of_group(t: torch.Tensor) -> torch.Tensor:
        """(batch, heads_q, seqlen_k, head_dim), summed over the query heads of each key/value head."""
        return t.unflatten(1, (heads_kv, t.shape[1] // heads_kv)).sum(2).transpose(1, 2)

    dq = softmax_scale * (ds @ k)
    dk = softmax_scale * (ds.transpose(-1, -2) @ q)
    return dq.transpose(1, 2), of_group(dk), of_group(p.transpose(-1, -2) @ dout)


def _heads_first(q: torch.Tensor, *kv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(batch, heads_q, seqlen, head_dim) each, in float64."""
    group = q.shape[2] // kv[0].shape[2]
    return (
        q.double().transpose(1, 2),
        *(t.double().transpose(1, 2).repeat_interleave(group, 1) for t in kv),
    )


def _scores(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> torch.Tensor:
    scores = scale * (q @ k.transpose(-1, -2))  # (batch, heads_q, seqlen_q, seqlen_k)
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        row = torch.arange(seqlen_q, dtype=torch.int64, device=q.device)[:, None]
        key = torch.arange(seqlen_k, dtype=torch.int64, device=q.device)[None, :]
        scores = scores.masked_fill(key > row + seqlen_k - seqlen_q, float("-inf"))
    return scores


def _probabilities(scores: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    # NOTE: -inf - -inf is NaN: a row without keys is shifted by 0 instead, so that its probabilities are 0.
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    return (scores - shift[..., None]).exp()
