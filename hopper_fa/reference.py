"""Textbook attention in float64: what everything else is judged against."""

import torch


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
        k, v: (batch, seqlen_k, heads_kv, head_dim), heads_q a multiple of heads_kv.
        softmax_scale: factor on the scores; None means 1 / sqrt(head_dim).
        causal: hide keys after the query's own position.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim) and lse = log(sum(exp(scores))) (batch, heads_q,
        seqlen_q), float64.
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    heads_q, heads_kv = q.shape[2], k.shape[2]
    q = q.double().transpose(1, 2)  # (batch, heads_q, seqlen_q, head_dim)
    k = k.double().transpose(1, 2).repeat_interleave(heads_q // heads_kv, 1)
    v = v.double().transpose(1, 2).repeat_interleave(heads_q // heads_kv, 1)

    scores = scale * (q @ k.transpose(-1, -2))  # (batch, heads_q, seqlen_q, seqlen_k)
    if causal:
        seqlen_q, seqlen_k = scores.shape[-2:]
        row = torch.arange(seqlen_q, device=q.device)[:, None]
        key = torch.arange(seqlen_k, device=q.device)[None, :]
        scores = scores.masked_fill(key > row + seqlen_k - seqlen_q, float("-inf"))

    lse = scores.logsumexp(-1)  # (batch, heads_q, seqlen_q)
    # NOTE: -inf - -inf is NaN: a row without keys is shifted by 0 instead, so that its probabilities are 0.
    shift = lse.masked_fill(lse == float("-inf"), 0.0)
    out = (scores - shift[..., None]).exp() @ v
    return out.transpose(1, 2), lse
