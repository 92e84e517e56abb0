"""The backward kernel's arithmetic, step by step, in torch on any device.

The same blocks with the same roundings as cutlass_kernels/backward: what the kernel does in float32 is
float32 here, and P and dS are rounded to the inputs' dtype before they are multiplied. What is not modelled:
the order of additions inside a matrix product, in the row sums of dO * O and over the key blocks of dQ, and
the last bit of the hardware's exp2. All of it is far below the rounding of P and dS.
"""

import math

import torch

from hopper_fa import kernels
from hopper_fa.emulator import LOG2_E, log2_scale
from hopper_fa.quantization import QuantizedQKV, rotate_back, rotation_signs
from hopper_fa.reference import gradients_reference

# Powers of two that codes of a type may be multiplied by in float16 and stay exact; bfloat16 takes all.
_FP16_EXPONENTS = {"e4m3": (-15, 7), "int8": (-24, 9)}


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


def gradients_quantized_emulated(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    qkv: QuantizedQKV,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`gradients_emulated` of attention over 8-bit tensors, with the numerics of the kernel.

    The products are those of 16-bit inputs, on codes times powers of two; the rest of the scales acts in
    float32 (cutlass_kernels/backward/codes.cuh has the formulas). The kernel knows no scale and no addend of
    single keys; here they are taken too.

    Args:
        dout: gradient of out; both (batch, seqlen_q, heads_q, head_dim), bfloat16 or float16. dlse: gradient
            of lse, (batch, heads_q, seqlen_q) float32; None is zero.
        qkv: what the forward ran on. out, lse: its results.
        causal: bottom-right aligned causal mask.

    Returns:
        dq, dk, dv in dout's dtype: gradients of the unquantised tensors, straight through the rounding.
    """
    recipe, head_dim, dtype = qkv.recipe, qkv.head_dim, dout.dtype
    tile = kernels.backward_tile(head_dim, kernels.quantized_backward_variant(recipe, head_dim))
    block_m, block_n = tile["block_m"], tile["block_n"]
    seqlen_q, seqlen_k, heads_kv = qkv.seqlen_q, qkv.seqlen_k, qkv.k.shape[2]
    heads = (heads_kv, qkv.q.shape[2] // heads_kv)
    scale_log2 = log2_scale(softmax_scale)

    # (batch, heads_kv, heads of a group, seqlen_q, ...) and (batch, heads_kv, blocks, block_n, ...)
    row_full = (scale_log2 * qkv.q_scale_of_rows())[..., None]
    row_factor, row_power = _split_scale(row_full, recipe.qk_dtype, dtype)
    key_factor, key_power = _split_scale(qkv.k_scale_of_keys()[..., None], recipe.qk_dtype, dtype)
    q32 = qkv.q[..., :head_dim].float().transpose(1, 2) * row_power
    q32, row_factor = (t.contiguous().unflatten(1, heads) for t in (q32, row_factor))
    k32 = (qkv.k[..., :head_dim].float().transpose(1, 2) * key_power).transpose(1, 2)
    k32, v32 = (_in_blocks(t, block_n) for t in (k32, _dequantised_v(qkv, dtype)))
    kappa = _in_blocks(key_factor.transpose(1, 2), block_n).transpose(-1, -2)  # (..., blocks, 1, block_n)
    kappa = kappa.masked_fill(kappa == 0, 1.0)
    dout32, out32 = (t.transpose(1, 2).float().contiguous().unflatten(1, heads) for t in (dout, out))
    lse32 = lse.unflatten(1, heads)[..., None]
    delta = (dout32 * out32).sum(-1, keepdim=True)
    if dlse is not None:
        delta -= dlse.unflatten(1, heads)[..., None]
    empty = lse32 == float("-inf")
    if qkv.lse_shift is not None:
        lse32 = lse32 - softmax_scale * qkv.lse_shift.unflatten(1, heads)[..., None]
    delta = (delta * row_factor).masked_fill_(empty, 0.0)
    bias = (lse32 * -LOG2_E).masked_fill_(empty, 0.0)
    key_bias = None
    if qkv.key_bias is not None:  # (batch, heads_kv, heads of a group, blocks, 1, block_n)
        padded = qkv.key_bias.new_zeros(*qkv.key_bias.shape[:2], k32.shape[2] * block_n)
        padded[..., :seqlen_k] = qkv.key_bias
        key_bias = (scale_log2 * padded).unflatten(1, heads).unflatten(-1, (-1, 1, block_n))

    dq, dk, dv = torch.zeros_like(q32), torch.zeros_like(k32), torch.zeros_like(v32)
    from_q_mean = torch.zeros_like(dk)
    keys = torch.arange(k32.shape[2] * block_n, dtype=torch.int64, device=dout.device).view(-1, 1, block_n)
    for head in range(q32.shape[2]):
        for start in range(0, seqlen_q, block_m):
            rows = (slice(None), slice(None), head, slice(start, start + block_m))
            # (batch, heads_kv, 1, rows, ...)
            q_rows, dout_rows, factor, row_bias, row_delta = (
                t[rows].unsqueeze(2) for t in (q32, dout32, row_factor, bias, delta)
            )
            row = torch.arange(start, start + q_rows.shape[-2], dtype=torch.int64, device=dout.device)[
                :, None
            ]
            last_key = row + (seqlen_k - seqlen_q) if causal else seqlen_k - 1
            hidden = (keys > last_key) | (keys >= seqlen_k) | empty[rows].unsqueeze(2)

            s = q_rows @ k32.transpose(-1, -2)  # (batch, heads_kv, blocks, rows, block_n)
            f = factor * kappa
            x = s.double().mul_(f).add_(row_bias)
            if key_bias is not None:
                x += key_bias[:, :, head]
            p = x.float().exp2_().masked_fill_(hidden, 0.0)
            dv += p.to(dtype).float().transpose(-1, -2) @ dout_rows
            dp = dout_rows @ v32.transpose(-1, -2)
            ds = p * (dp.double() * f - row_delta * kappa).float()
            ds = ds.to(dtype).float()
            dk += ds.transpose(-1, -2) @ q_rows
            dq[rows] = (ds @ k32).sum(2)
            if qkv.q_mean is not None:
                of_keys = torch.where(f == 0, 0.0, ds / f).sum(-2)[..., None]
                mean = qkv.q_mean.unflatten(1, heads)[:, :, head, None, None]
                from_q_mean += of_keys * mean

    signs = None
    if recipe.rotation == "hadamard":
        signs = rotation_signs(head_dim, recipe.rotation_seed)
    kappa = kappa.transpose(-1, -2)
    dq = rotate_back(dq * torch.where(row_factor == 0, 0.0, softmax_scale / row_factor), signs)
    if dlse is not None and qkv.k_mean is not None:
        of_rows = (softmax_scale * dlse).unflatten(1, heads)[..., None].masked_fill(empty, 0.0)
        dq = dq + of_rows * qkv.k_mean[:, :, None, None]
    dk = rotate_back(math.log(2) * dk / kappa, signs)
    if qkv.q_mean is not None:
        dk = dk + softmax_scale * from_q_mean
    dk, dv = (t.flatten(2, 3)[:, :, :seqlen_k].transpose(1, 2) for t in (dk, dv))
    return dq.flatten(1, 2).transpose(1, 2).to(dtype), dk.to(dtype), dv.to(dtype)


def gradients_dequantized(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    qkv: QuantizedQKV,
    softmax_scale: float,
    causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The float64 gradients of textbook attention over the dequantised tensors: what a recipe's gradient is.

    Args:
        dout: gradient of out, (batch, seqlen_q, heads_q, head_dim). dlse: of lse, (batch, heads_q, seqlen_q);
            None is zero.

    Returns:
        dq, dk, dv by the tensors before quantisation, straight through the rounding.
    """
    q, k, v = (t.double() for t in qkv.dequantize())
    if qkv.recipe.rotation == "hadamard":
        signs = rotation_signs(qkv.head_dim, qkv.recipe.rotation_seed)
        q, k = rotate_back(q, signs), rotate_back(k, signs)
    if qkv.q_mean is not None:
        q = q + qkv.q_mean[:, None]
    if qkv.k_mean is not None:
        k = k + qkv.k_mean[:, None]
    # NOTE: gradients_reference does not look at out and lse.
    return gradients_reference(dout, dlse, q, k, v, dout, dout, softmax_scale, causal)


def _split_scale(full: torch.Tensor, codes: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """full as a factor times a power of two that codes of that type can be multiplied by in `dtype`."""
    lowest, highest = _FP16_EXPONENTS[codes] if dtype == torch.float16 else (-100, 100)
    bits = full.view(torch.int32) >> 23 & 255
    power = ((bits - 127).clamp(lowest, highest) + 127 << 23).view(torch.float32)
    return full / power, power


def _dequantised_v(qkv: QuantizedQKV, dtype: torch.dtype) -> torch.Tensor:
    """V (batch, seqlen_k, heads_kv, head_dim) as attention sees it, rounded to `dtype`, in float32."""
    v = qkv.v_codes().double() * qkv.v_scale[:, None]
    if qkv.v_mean is not None:
        v = v + qkv.v_mean[:, None]
    return v.float().to(dtype).float()


def _in_blocks(t: torch.Tensor, block_n: int) -> torch.Tensor:
    """(batch, seqlen_k, heads_kv, d) to (batch, heads_kv, blocks, block_n, d) float32, zero-padded."""
    batch, seqlen_k, heads_kv, d = t.shape
    blocks = -(-seqlen_k // block_n)
    padded = t.new_zeros((batch, heads_kv, blocks * block_n, d), dtype=torch.float32)
    padded[:, :, :seqlen_k] = t.transpose(1, 2)
    return padded.unflatten(2, (blocks, block_n))
