"""The backward kernel's arithmetic, step by step, in torch on any device.

The same blocks with the same roundings as cutlass_kernels/backward: what the kernel does in float32 is
float32 here, and P and dS are rounded to the inputs' dtype before they are multiplied. What is not modelled:
the order of additions inside a matrix product, in the row sums of dO * O and over the key blocks of dQ, and
the last bit of the hardware's exp2. All of it is far below the rounding of P and dS.
"""

import torch

from hopper_fa import kernels
from hopper_fa.emulator import LOG2_E, log2_scale


def gradients_emulated(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool = False,
    variant: str = "default",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients with the CUDA kernel's numerics, vectorised over all but query blocks and a group's heads.

    Args:
        dout: gradient of out; both as q, (batch, seqlen_q, heads_q, head_dim), bfloat16 or float16.
        dlse: gradient of lse, (batch, heads_q, seqlen_q) float32; None is zero.
        k, v: (batch, seqlen_k, heads_kv, head_dim), heads_q a multiple of heads_kv.
        out, lse: of the forward.
        causal: bottom-right aligned causal mask.
        variant: of the backward's tile table, which gives block_m and block_n.

    Returns:
        dq, dk, dv, as q, k, v.
    """
    tile = kernels.backward_tile(q.shape[-1], variant)
    block_m, block_n = tile["block_m"], tile["block_n"]
    seqlen_q, seqlen_k, heads_kv = q.shape[1], k.shape[1], k.shape[2]
    heads = (heads_kv, q.shape[2] // heads_kv)
    scale_log2 = log2_scale(softmax_scale)

    k32, v32 = (_in_blocks(t, block_n) for t in (k, v))  # (batch, heads_kv, blocks, block_n, head_dim)
    # (batch, heads_kv, heads of a group, seqlen_q, head_dim or 1); contiguous, because the order in which
    # torch adds depends on strides.
    q32, dout32, out32 = (t.transpose(1, 2).float().contiguous().unflatten(1, heads) for t in (q, dout, out))
    lse32 = lse.unflatten(1, heads)[..., None]
    delta = (dout32 * out32).sum(-1, keepdim=True)
    if dlse is not None:
        delta -= dlse.unflatten(1, heads)[..., None]
    empty = lse32 == float("-inf")
    delta.masked_fill_(empty, 0.0)
    bias = (lse32 * -LOG2_E).masked_fill_(empty, 0.0)

    dq, dk, dv = torch.zeros_like(q32), torch.zeros_like(k32), torch.zeros_like(v32)
    keys = torch.arange(k32.shape[2] * block_n, dtype=torch.int64, device=q.device).view(-1, 1, block_n)
    for head in range(q32.shape[2]):
        for start in range(0, seqlen_q, block_m):
            rows = (slice(None), slice(None), head, slice(start, start + block_m))
            q_rows, dout_rows = (t[rows].unsqueeze(2) for t in (q32, dout32))  # (batch, heads_kv, 1, rows, d)
            stop = start + q_rows.shape[-2]
            row = torch.arange(start, stop, dtype=torch.int64, device=q.device)[:, None]
            last_key = row + (seqlen_k - seqlen_q) if causal else seqlen_k - 1
            hidden = (keys > last_key) | (keys >= seqlen_k) | empty[rows].unsqueeze(2)

            s = q_rows @ k32.transpose(-1, -2)  # (batch, heads_kv, blocks, rows, block_n)
            # NOTE: float64 and one rounding, as in a fused multiply-add.
            x = s.double().mul_(scale_log2).add_(bias[rows].unsqueeze(2)).float()
            p = x.exp2_().masked_fill_(hidden, 0.0)
            dv += p.to(q.dtype).float().transpose(-1, -2) @ dout_rows
            ds = p * (dout_rows @ v32.transpose(-1, -2) - delta[rows].unsqueeze(2))
            ds = ds.to(q.dtype).float()
            dk += ds.transpose(-1, -2) @ q_rows
            dq[rows] = (ds @ k32).sum(2)

    dk, dv = (t.flatten(2, 3)[:, :, :seqlen_k].transpose(1, 2) for t in (dk * softmax_scale, dv))
    dq = (dq * softmax_scale).flatten(1, 2).transpose(1, 2)
    return dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype)


def _in_blocks(t: torch.Tensor, block_n: int) -> torch.Tensor:
    """(batch, seqlen_k, heads_kv, d) to (batch, heads_kv, blocks, block_n, d) float32, zero-padded."""
    batch, seqlen_k, heads_kv, d = t.shape
    blocks = -(-seqlen_k // block_n)
    padded = t.new_zeros((batch, heads_kv, blocks * block_n, d), dtype=torch.float32)
    padded[:, :, :seqlen_k] = t.transpose(1, 2)
    return padded.unflatten(2, (blocks, block_n))
