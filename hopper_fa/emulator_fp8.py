"""The FP8 forward's arithmetic, tile by tile, in torch on any device; see hopper_fa/emulator.py.

float32 where the kernel computes in float32, P rounded to e4m3, and the tensor core's accumulator as in
hopper_fa/tensor_core.py. Not modelled: the order of float32 additions, and the last bit of exp2.
"""

import math

import torch

from hopper_fa import kernels
from hopper_fa.emulator import heads_by_kv, key_blocks, positive_log2_scale, rescale
from hopper_fa.quantization import QuantizedQKV
from hopper_fa.recipe import E4M3_MAX, K_BLOCK
from hopper_fa.reference import attention_reference
from hopper_fa.tensor_core import HOPPER, Accumulator

# The kernel turns an integer score into a float by its bits, which adds this, and takes it off in the bias.
MAGIC = 1.5 * 2**23

# What the kernel adds to eight times the logarithm of P for its e4m3 code, in float32.
CODE_OF_ONE = torch.tensor(56.0 - kernels.EXP2_LINEAR_MEAN, dtype=torch.float32, device="cpu").item()

ACCUMULATORS = ("auto", "tensor_core", "fp32")


def attention_fp8_emulated(
    qkv: QuantizedQKV,
    softmax_scale: float | None = None,
    causal: bool = False,
    out_dtype: torch.dtype = torch.bfloat16,
    *,
    accumulator: str | Accumulator = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over quantised tensors with the numerics of the CUDA kernel.

    Args:
        qkv: from `quantize_qkv` or `from_fp8`.
        softmax_scale: factor on the scores; None means 1 / sqrt(head_dim).
        causal: bottom-right aligned causal mask.
        out_dtype: of out.
        accumulator: of e4m3 products (int8's are exact).
            "tensor_core": bit by bit as `tensor_core.HOPPER`, for which every single product is formed:
                about 2 ns each on one core. An `Accumulator` asks for that one.
            "fp32": float32 sums. 1e-4 away from the tensor core in Q K^T, whose sums are short, and in P V
                where the recipe's interval is 1.
            "auto": "fp32" in Q K^T, and in P V for interval 1; "tensor_core" in P V otherwise.

    Returns:
        out (batch, seqlen_q, heads_q, head_dim) and lse (batch, heads_q, seqlen_q) float32; 0 and -inf in
        rows that see no key.

    Raises:
        ValueError: unknown accumulator.
    """
    recipe, head_dim = qkv.recipe, qkv.head_dim
    heads_kv = qkv.k.shape[2]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    interval = recipe.interval(head_dim)
    qk_sums, pv_sums = _accumulators(accumulator, interval)
    if recipe.qk_dtype == "int8":
        qk_sums = None

    # Key blocks share k_scale, or every key has its own: then, and with key_bias, it scales the scores first.
    q = heads_by_kv(qkv.q[..., :head_dim].float(), heads_kv)
    k = qkv.k[..., :head_dim].float().permute(0, 2, 3, 1)[:, :, None]  # (batch, heads_kv, 1, head_dim, keys)
    v = qkv.v_codes().float().transpose(1, 2)[:, :, None]  # (batch, heads_kv, 1, keys, head_dim)
    if recipe.row_sum == "product":
        v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    k_scale = qkv.k_scale_of_keys()[:, :, None, None]  # (batch, heads_kv, 1, 1, keys)
    row_scale = heads_by_kv(qkv.q_scale_of_rows().transpose(1, 2)[..., None], heads_kv)  # (..., rows, 1)
    row_factor = row_scale * positive_log2_scale(scale)
    # Scores become S k_scale q_scale + key_bias first where every key has a scale or a bias.
    key_vectors = recipe.has_key_vectors
    key_bias = k_scale.new_zeros(1)
    if qkv.key_bias is not None:
        key_bias = qkv.key_bias.unflatten(1, (heads_kv, -1))[..., None, :]  # (..., 1, keys)
    if key_vectors:
        row_factor = torch.full_like(row_scale, positive_log2_scale(scale))

    integer = recipe.qk_dtype == "int8" and not key_vectors
    linear = recipe.has_linear_exp2(head_dim)
    p_offset, rescale_threshold = recipe.p_range(head_dim)

    shape = q.shape[:-1]
    row_max = q.new_full(shape, float("-inf"))
    row_sum = q.new_zeros(shape)
    out = q.new_zeros(*shape, v.shape[-1])
    partial = torch.zeros_like(out)  # in the tensor core's accumulator
    for first_row, keys, hidden in key_blocks(qkv.seqlen_q, qkv.seqlen_k, causal, K_BLOCK, q.device):
        rows = (..., slice(first_row, None), slice(None))
        block = keys.start // K_BLOCK
        s = _product(q[rows], k[..., keys], None, qk_sums)
        c = row_factor[rows]
        if key_vectors:
            bias = key_bias[..., keys] if qkv.key_bias is not None else key_bias
            s = _fused_multiply_add(s * k_scale[..., keys], row_scale[rows], bias)
        else:
            c = c * k_scale[..., keys.start : keys.start + 1]
        if scale < 0:
            s.neg_()
        log2_scores = s * c  # (..., rows - first_row, keys)
        if hidden is not None:
            log2_scores.masked_fill_(hidden, float("-inf"))
        of_rows = (..., slice(first_row, None))
        rescale(
            row_max[of_rows], log2_scores, 1.0, rescale_threshold,
            row_sum[of_rows], out[rows], partial[rows],
        )  # fmt: skip
        bias = p_offset - row_max[rows[:-1]][..., None]
        if linear:  # of P's code in place of its logarithm
            c = 8 * c
            bias = _fused_multiply_add(bias, 8.0, CODE_OF_ONE)
        if integer:
            s += MAGIC
            bias = _fused_multiply_add(c, -MAGIC, bias)
        p = _fused_multiply_add(s, c, bias)
        p = _e4m3_of_code(p) if linear else p.exp2_()
        if hidden is not None:
            p.masked_fill_(hidden, 0.0)
        row_sum[of_rows] += p.sum(-1)
        p = p.clamp_(max=E4M3_MAX).to(torch.float8_e4m3fn).float()
        partial[rows] = _product(p, v[..., keys, :], partial[rows], pv_sums)
        # NOTE: counted from key 0, so that a row's flushes do not depend on the rows beside it.
        if interval:
            moved = slice(None) if block % interval == 0 else slice(head_dim, None)  # row sums in every block
            out[(*rows[:-1], moved)] += partial[(*rows[:-1], moved)]
            partial[(*rows[:-1], moved)] = 0.0
    out += partial
    if recipe.row_sum == "product":
        row_sum = out[..., head_dim]

    empty = row_max == float("-inf")
    factor = (1 / row_sum).masked_fill_(empty, 0.0)
    out = out[..., :head_dim] * factor[..., None]
    out = out.flatten(1, 2)[:, :, : qkv.seqlen_q]  # (batch, heads_q, seqlen_q, head_dim)
    group = out.shape[1] // heads_kv
    out = out * qkv.v_scale.repeat_interleave(group, 1)[:, :, None]
    empty = empty.flatten(1, 2)[:, :, : qkv.seqlen_q]
    if qkv.v_mean is not None:
        mean = qkv.v_mean.repeat_interleave(group, 1)[:, :, None]
        out = out + mean
    out = out.masked_fill(empty[..., None], 0.0)
    lse = math.log(2) * (row_max - p_offset + row_sum.log2())
    lse = lse.flatten(1, 2)[:, :, : qkv.seqlen_q]
    if qkv.lse_shift is not None:
        lse = lse + scale * qkv.lse_shift
    lse = lse.masked_fill(empty, float("-inf"))
    return out.transpose(1, 2).to(out_dtype).contiguous(), lse.contiguous()


def attention_dequantized(
    qkv: QuantizedQKV, softmax_scale: float | None = None, causal: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Textbook attention in float64 of the dequantised tensors: what is left is the kernel's own error.

    Args, and returns in float64: as `attention_reference`.
    """
    q, k, v = (t.double() for t in qkv.dequantize())
    scale = qkv.head_dim**-0.5 if softmax_scale is None else softmax_scale
    if qkv.key_bias is not None:
        # One more channel adds it to the scores; it differs between query heads, so K does too.
        group = q.shape[2] // k.shape[2]
        k, v = k.repeat_interleave(group, 2), v.repeat_interleave(group, 2)
        q = torch.cat((q, torch.ones_like(q[..., :1])), -1)
        k = torch.cat((k, qkv.key_bias.transpose(1, 2)[..., None]), -1)
    out, lse = attention_reference(q, k, v, scale, causal)
    return out, lse if qkv.lse_shift is None else lse + scale * qkv.lse_shift.double()


def _e4m3_of_code(code: torch.Tensor) -> torch.Tensor:
    """The e4m3 numbers whose codes `code` is rounded to, as float32: see common/exp2_linear.h."""
    half = code.clamp(min=0.0).half()
    rounded = (half + 1024.0 - 1024.0).float()
    codes = rounded.nan_to_num(127.0).to(torch.uint8)  # 127 is NaN
    return codes.view(torch.float8_e4m3fn).float()


def _accumulators(
    accumulator: str | Accumulator, interval: int
) -> tuple[Accumulator | None, Accumulator | None]:
    """What adds the products of Q K^T and of P V; None is float32."""
    if isinstance(accumulator, Accumulator):
        return accumulator, accumulator
    if accumulator not in ACCUMULATORS:
        raise ValueError(
            f"accumulator is {accumulator!r}; allowed are {', '.join(ACCUMULATORS)} and an Accumulator; pass "
            "one of them."
        )
    if accumulator == "tensor_core":
        return HOPPER, HOPPER
    return None, HOPPER if accumulator == "auto" and interval != 1 else None


def _product(
    a: torch.Tensor, b: torch.Tensor, start: torch.Tensor | None, sums: Accumulator | None
) -> torch.Tensor:
    """start + a @ b (start None: 0), both of e4m3 or int8 values in float32."""
    if sums is None:
        return a @ b if start is None else start + a @ b
    if start is None:
        start = a.new_zeros(*a.shape[:-1], b.shape[-1])
    return sums.matmul_add(a, b, start)


def _fused_multiply_add(a: torch.Tensor, b: torch.Tensor | float, c: torch.Tensor | float) -> torch.Tensor:
    """a * b + c of float32 in one rounding; b and c may have to be broadcast."""
    return a.double().mul_(b).add_(c).float()
