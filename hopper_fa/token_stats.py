"""Statistics over all tokens of a head or a sample, in an order of additions that a kernel can keep.

The kernels: cutlass_kernels/quantize/token_stats.cuh, and quantize_v.cuh for `mean_error`.
"""

import torch

_CHUNK = 128  # tokens whose sum is formed first in a mean
_LANES = 16  # sums a chunk, that are then added pairwise
_CTAS = 8  # sums of chunks a head, likewise


def sampled_tokens(seqlen: int, shift: int) -> torch.Tensor:
    """Indices of the tokens that statistics are taken over: int64, ascending; all of them if shift is 0.

    One in each whole group of 2**shift neighbours, by a multiplicative hash of the group's number, so that no
    short period of the tokens (a rotary embedding's, a pattern's) meets one of the sample.
    """
    group = torch.arange(seqlen >> shift, dtype=torch.int64, device="cpu")
    return (group << shift) + (group * 0x9E3779B1 % 2**32 >> 32 - shift)


def token_mean(x: torch.Tensor, shift: int) -> torch.Tensor:
    """Mean over `sampled_tokens` of x (batch, heads, seqlen, head_dim): (batch, heads, head_dim).

    Non-finite elements count as 0. The order of the additions: 128 tokens make a chunk (the last is filled up
    with zeros); lane r of 16 adds its tokens r, r + 16, r + 32, ... one after the other; then `tree_sum` of
    the lanes. Of the chunks, CTA r of 8 adds r, r + 8, ... to zero, one after the other; then `tree_sum`.
    """
    x = x[:, :, sampled_tokens(x.shape[2], shift).to(x.device)]
    tokens = x.shape[2]
    chunks = max(1, -(-tokens // _CHUNK))
    padded = x.new_zeros(*x.shape[:2], chunks * _CHUNK, x.shape[3])
    padded[:, :, :tokens] = torch.where(x.isfinite(), x, 0.0)
    lanes = padded.unflatten(2, (chunks, _CHUNK // _LANES, _LANES))
    total = lanes[:, :, :, 0]
    for i in range(1, _CHUNK // _LANES):
        total = total + lanes[:, :, :, i]  # (batch, heads, chunks, _LANES, head_dim)
    of_chunks = torch.nn.functional.pad(tree_sum(total, 3), (0, 0, 0, -chunks % _CTAS))
    of_ctas = torch.zeros_like(of_chunks[:, :, :_CTAS])
    for chunk in range(0, of_chunks.shape[2], _CTAS):
        of_ctas = of_ctas + of_chunks[:, :, chunk : chunk + _CTAS]
    total = tree_sum(of_ctas, 2)
    return total / torch.full_like(total, max(1, tokens))


def mean_error(x: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of x (batch, heads, seqlen, head_dim) less its e4m3 codes: (batch, heads, head_dim).

    What is not finite counts as 0 in both. Of a chunk of 128 tokens, the sums of codes over the even and over
    the odd groups of 16 are exact, as multiples of 2^-9 up to 448 * 64; the two are added. x is added in the
    order in which a thread has it: thread t of 4 holds tokens 2 t, 2 t + 1, 2 t + 8, 2 t + 9 of every 16, and
    adds them one after the other; then come the sums of threads t and t ^ 1, and of t and t ^ 2. Last the
    difference, `tree_sum` of the chunks and the division.
    """
    seqlen = codes.shape[2]
    padding = (0, 0, 0, max(1, -(-seqlen // _CHUNK)) * _CHUNK - seqlen)
    finite = x.isfinite()
    values = torch.nn.functional.pad(torch.where(finite, codes.float(), 0.0), padding)
    of_codes = values.unflatten(2, (-1, 4, 2, 16)).sum((3, 5), dtype=torch.float64).float()
    of_codes = of_codes[:, :, :, 0] + of_codes[:, :, :, 1]
    x = torch.nn.functional.pad(torch.where(finite, x, 0.0), padding)
    x = x.unflatten(2, (-1, 8, 2, 4, 2))  # chunk, group of 16, h, t, i
    sums = torch.zeros_like(x[:, :, :, 0, 0, :, 0])  # (batch, heads, chunks, t, head_dim)
    for group in range(8):
        for h in range(2):
            for i in range(2):
                sums = sums + x[:, :, :, group, h, :, i]
    sums = sums[:, :, :, 0::2] + sums[:, :, :, 1::2]
    sums = sums[:, :, :, 0] + sums[:, :, :, 1]
    total = tree_sum(sums - of_codes, 2)
    return total / torch.full_like(total, max(1, seqlen))


def tree_sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over `dim`: filled up with zeros to a power of two, then s[i] + s[i + half] until one is left."""
    size = 1 << (x.shape[dim] - 1).bit_length()
    if size > x.shape[dim]:
        filler = list(x.shape)
        filler[dim] = size - x.shape[dim]
        x = torch.cat((x, x.new_zeros(filler)), dim)
    while size > 1:
        size //= 2
        x = x.narrow(dim, 0, size) + x.narrow(dim, size, size)
    return x.squeeze(dim)
