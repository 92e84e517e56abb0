"""The forward kernel's arithmetic, tile by tile, in torch on any device.

The same blocks in the same order with the same roundings as cutlass_kernels/forward: what the kernel does in
float32 is float32 here, and P is rounded to the inputs' dtype before P V. What is not modelled: the order of
additions inside a matrix product and a row sum, the last bit of the hardware's exp2, and single roundings of
multiply-adds in the exp2 polynomial. All of it is far below the rounding of P.
"""

import math
from collections.abc import Iterator

import torch

from hopper_fa import kernels

LOG2_E = math.log2(math.e)
_ROWS = 64  # of a warpgroup, the unit whose key blocks are counted
_SMALLEST_SCALE = 2.0**-149  # stands in for 0, because 0 * -inf would turn masked scores into NaN
_ROUND = 12582912.0  # 1.5 * 2**23: adding it to a float32 leaves the rounded integer in the low mantissa bits


def attention_emulated(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    variant: str = "default",
    *,
    fma_exp2_octets: int | None = None,
    rescale_threshold: float | None = None,
    peak_bits: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the numerics of the CUDA kernel, vectorised over all but the key blocks.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), bfloat16 or float16.
        k, v: (batch, seqlen_k, heads_kv, head_dim), heads_q a multiple of heads_kv.
        softmax_scale: factor on the scores; None means 1 / sqrt(head_dim).
        causal: bottom-right aligned causal mask.
        variant: of the tile table, which gives block_n, rescale_threshold, peak_bits and fma_exp2_octets.
        fma_exp2_octets, rescale_threshold, peak_bits: in place of the tile table's, to study them.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim) in q's dtype and lse (batch, heads_q, seqlen_q) float32; 0
        and -inf in rows that see no key.
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_kv = k.shape[1:3]
    tile = kernels.forward_tile(head_dim, variant)
    block_n = tile["block_n"]
    octets = tile["fma_exp2_octets"] if fma_exp2_octets is None else fma_exp2_octets
    threshold = tile["rescale_threshold"] if rescale_threshold is None else rescale_threshold
    peak_bits = tile["peak_bits"] if peak_bits is None else peak_bits
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    scale_log2 = positive_log2_scale(scale)

    q32 = heads_by_kv(-q if scale < 0 else q, heads_kv)
    k32 = k.transpose(1, 2)[:, :, None].float()  # (batch, heads_kv, 1, seqlen_k, head_dim)
    v32 = v.transpose(1, 2)[:, :, None].float()
    out = torch.zeros_like(q32)
    row_max = q32.new_full(q32.shape[:-1], float("-inf"))
    row_sum = torch.zeros_like(row_max)

    for first_row, keys, hidden in key_blocks(seqlen_q, seqlen_k, causal, block_n, q.device):
        visiting = (..., slice(first_row, None))
        s = q32[..., first_row:, :] @ k32[..., keys, :].transpose(-1, -2)  # (..., rows - first_row, keys)
        if hidden is not None:
            s.masked_fill_(hidden, float("-inf"))
        sums = row_sum[visiting], out[..., first_row:, :]
        lag = _allowed_lag(row_sum[visiting], peak_bits, threshold)
        rescale(row_max[visiting], s, scale_log2, lag, *sums)
        p = _probabilities(s, row_max[visiting], scale_log2, octets)
        row_sum[visiting] += p.sum(-1)
        out[..., first_row:, :] += p.to(q.dtype).float() @ v32[..., keys, :]

    empty = row_max == float("-inf")
    factor = (1 / row_sum).masked_fill_(empty, 0.0)
    log2_sum = torch.addcmul(row_sum.log2(), row_max, torch.full_like(row_max, scale_log2))
    lse = (math.log(2) * log2_sum).masked_fill_(empty, float("-inf"))
    out = (out * factor[..., None]).flatten(1, 2)[:, :, :seqlen_q]
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.flatten(1, 2)[:, :, :seqlen_q].contiguous()


def log2_scale(softmax_scale: float) -> float:
    """softmax_scale * log2 e, both and their product in float32, as the kernels have it."""
    factors = torch.tensor([softmax_scale, LOG2_E], dtype=torch.float32, device="cpu")
    return (factors[0] * factors[1]).item()


def positive_log2_scale(softmax_scale: float) -> float:
    """|log2_scale|, never 0; for a negative scale the scores are negated instead."""
    return abs(log2_scale(softmax_scale)) or _SMALLEST_SCALE


def heads_by_kv(t: torch.Tensor, heads_kv: int) -> torch.Tensor:
    """Query heads that share K and V side by side, rows zero-padded to whole warpgroups, as by the loads.

    (batch, seqlen_q, heads_q, d) to (batch, heads_kv, heads_q / heads_kv, rows, d) float32.
    """
    batch, seqlen_q, heads_q, d = t.shape
    padded = t.new_zeros((batch, heads_q, -(-seqlen_q // _ROWS) * _ROWS, d), dtype=torch.float32)
    padded[:, :, :seqlen_q] = t.transpose(1, 2)
    return padded.unflatten(1, (heads_kv, heads_q // heads_kv))


def key_blocks(
    seqlen_q: int, seqlen_k: int, causal: bool, block_n: int, device: torch.device
) -> Iterator[tuple[int, slice, torch.Tensor | None]]:
    """The key blocks in the kernel's order, last to first.

    Yields:
        first_row: the rows from it on visit the block, because later rows see more keys.
        keys: of the block, those that exist.
        hidden: (rows - first_row, keys) bool, True where the causal mask hides a key; None if not causal.
    """
    rows = -(-seqlen_q // _ROWS) * _ROWS
    ends = [
        kernels.block_range(row, _ROWS, seqlen_q, seqlen_k, causal, block_n)[0]
        for row in range(0, rows, _ROWS)
    ]
    last_key = torch.arange(rows, dtype=torch.int64, device=device) + (seqlen_k - seqlen_q)
    for block in reversed(range(max(ends, default=0))):
        first_row = _ROWS * next(i for i, end in enumerate(ends) if end > block)
        keys = slice(block * block_n, min((block + 1) * block_n, seqlen_k))
        columns = torch.arange(keys.start, keys.stop, dtype=torch.int64, device=device)
        yield first_row, keys, columns > last_key[first_row:, None] if causal else None


def _allowed_lag(row_sum: torch.Tensor, peak_bits: int, threshold: float) -> torch.Tensor:
    """Growth of each row's maximum, in log2, that the row need not follow: see OnlineSoftmax in softmax.cuh.

    Until a new maximum's P is 2**-peak_bits of row_sum, by a logarithm that is linear between powers of two.
    """
    log2_part = row_sum.view(torch.int32).float().mul_(2.0**-23).sub_(127 + peak_bits)
    return log2_part.clamp_(min=0.0).clamp_(max=threshold)


def rescale(
    row_max: torch.Tensor,
    scores: torch.Tensor,
    scale_log2: float,
    threshold: float | torch.Tensor,
    *sums: torch.Tensor,
) -> None:
    """Lazy rescaling, in place: a row follows its maximum once that outgrew the threshold.

    Args:
        row_max: (..., rows), what P is relative to; scores: (..., rows, keys), -inf where masked.
        scale_log2: from their units to log2. threshold: in log2, one for all or (..., rows).
        sums: (..., rows) or (..., rows, d), what was summed relative to row_max so far.
    """
    new_max = torch.maximum(row_max, scores.amax(-1))
    outgrown = ~((new_max - row_max) * scale_log2 <= threshold)  # True for NaN and for -inf - -inf
    outgrown &= new_max != float("-inf")
    if not outgrown.any():
        return
    alpha = ((row_max - new_max) * scale_log2).exp2_().masked_fill_(~outgrown, 1.0)
    row_max.copy_(torch.where(outgrown, new_max, row_max))
    for t in sums:
        t.mul_(alpha[..., None] if t.ndim > alpha.ndim else alpha)


def _probabilities(
    scores: torch.Tensor, row_max: torch.Tensor, scale_log2: float, fma_exp2_octets: int
) -> torch.Tensor:
    """exp2(scale_log2 * (scores - row_max)), the first octets of every 64 columns by the polynomial."""
    bias = (row_max * -scale_log2).masked_fill_(row_max == float("-inf"), 0.0)
    # NOTE: float64 and one rounding, as in a fused multiply-add: with large scores the difference shows.
    x = scores.double().mul_(scale_log2).add_(bias[..., None]).float()
    if fma_exp2_octets == 0:
        return x.exp2_()
    octet = torch.arange(x.shape[-1], dtype=torch.int64, device=x.device) // 8 % 8
    return torch.where(octet < fma_exp2_octets, exp2_polynomial(x), x.exp2())


def exp2_polynomial(x: torch.Tensor) -> torch.Tensor:
    """2**x of float32 as on the FP32 pipe: n = round(x), 2**(x - n) by a cubic, 2**n by exponent bits.

    Any shape. Below 2**-126 the result is 2**-126 or less instead of 2**x.
    """
    c0, c1, c2, c3 = kernels.EXP2_POLYNOMIAL
    clamped = x.clamp_min(-126.0)
    shifted = clamped + _ROUND
    r = clamped - (shifted - _ROUND)
    p = ((c3 * r + c2) * r + c1) * r + c0
    return (p.view(torch.int32) + (shifted.view(torch.int32) << 23)).view(torch.float32)
