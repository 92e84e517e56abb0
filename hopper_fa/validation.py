"""All checking of attention inputs, done once, before any pointer is taken. Every message is one sentence."""

from typing import NoReturn

import torch

from hopper_fa.arguments import as_flag, check_instance, check_tensor
from hopper_fa.kernels import DTYPE_NAMES, MAX_HEAD_DIM

# Kernels count keys and rows in int32, and look up to one tile past the end.
MAX_SEQLEN = 2**31 - 1024
# Of 64 query rows, the fewest a kernel chooses; counters in int32 run past the last tile by one a CTA.
MAX_TILES = 2**31 - 1024
# Larger factors push ordinary scores past the end of float32.
MAX_SCALE = 2.0**64
# What follows "causal is ...; it must be True or False".
CAUSAL_HOW = (
    "note that positional arguments follow FlashAttention-3 (q, k, v, softmax_scale, causal), and pass "
    "dropout_p by name"
)


def check_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softmax_scale: float | None, causal: bool
) -> None:
    """Everything a kernel relies on; see `check_shapes` and `check_memory`.

    Raises:
        TypeError: causal is no bool.
        ValueError: a dtype, device, shape, stride, alignment or scale the kernels do not take.
    """
    check_shapes(q, k, v)
    check_memory("q", q)
    check_memory("k", k)
    check_memory("v", v)
    check_softmax(softmax_scale, causal)


def check_backward(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> None:
    """What the backward takes besides q, k and v; of any strides.

    Raises:
        ValueError: dout or out is not like q, or dlse or lse is not (batch, heads_q, seqlen_q) float32.
    """
    batch, seqlen_q, heads_q, _ = q.shape
    rows = (batch, heads_q, seqlen_q)
    for name, t in (("dout", dout), ("out", out), ("lse", lse), ("dlse", dlse)):
        if t is None:
            continue
        shape, dtype = (rows, torch.float32) if name.endswith("lse") else (q.shape, q.dtype)
        if t.shape != shape or t.dtype != dtype or t.device != q.device:
            raise ValueError(
                f"{name} is {t.dtype} of shape {tuple(t.shape)} on {t.device}; it must be {dtype} of shape "
                f"{tuple(shape)} on {q.device}; convert or move it."
            )


def check_softmax(softmax_scale: float | None, causal: bool) -> None:
    """The arguments of an attention call that are no tensors.

    Raises:
        TypeError: causal is no bool.
        ValueError: a scale the kernels do not take.
    """
    if softmax_scale is not None and not -MAX_SCALE <= softmax_scale <= MAX_SCALE:
        raise ValueError(
            f"softmax_scale is {softmax_scale}; it must be from -2**64 to 2**64; pass another or None."
        )
    if causal is not True and causal is not False:
        as_flag("causal", causal, how=CAUSAL_HOW)


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """What does not depend on memory: dtype, device, shape. Works on fake tensors and symbolic sizes.

    NOTE: a batch or length that is symbolic is not held against its limit, for torch.export would take the
    comparison as a bound on that size; it is when the exported program runs.

    Raises:
        ValueError: they do not fit together, or no kernel takes them.
    """
    dtype = q.dtype
    if dtype not in DTYPE_NAMES or k.dtype != dtype or v.dtype != dtype:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; all must be torch.bfloat16, all "
            "torch.float16 or all torch.float8_e4m3fn; convert them with .to()."
        )
    check_sizes(q, k, v)


def check_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """`check_shapes` for any dtype.

    Raises:
        ValueError: they do not fit together, or no kernel takes them.
    """
    device = q.device
    if k.device != device or v.device != device:
        raise ValueError(
            f"q, k, v are on {q.device}, {k.device}, {v.device}; they must share a device; move them with "
            ".to()."
        )
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        _bad_shapes(q, k, v)
    batch, seqlen_q, heads_q, head_dim = q.shape
    batch_k, seqlen_k, heads_kv, head_dim_k = k.shape
    if batch_k != batch or head_dim_k != head_dim or k.shape != v.shape:
        _bad_shapes(q, k, v)
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim is {head_dim}; it must be a multiple of 8 from 8 to {MAX_HEAD_DIM}; pad q, k and v "
            "with zeros and pass the softmax_scale of the unpadded head_dim."
        )
    if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv:
        raise ValueError(
            f"q has {heads_q} heads and k, v have {heads_kv}; the heads of q must be a positive multiple of "
            "those of k and v; repeat or drop heads."
        )
    if _reaches(seqlen_q, MAX_SEQLEN) or _reaches(seqlen_k, MAX_SEQLEN):
        raise ValueError(
            f"sequence lengths are {seqlen_q} (q) and {seqlen_k} (k, v); each must be below {MAX_SEQLEN}; "
            "split the sequence and combine the parts with merge_attention."
        )
    if _reaches(batch * heads_q * ((seqlen_q + 63) // 64), MAX_TILES):
        raise ValueError(
            f"q of shape {tuple(q.shape)} makes {MAX_TILES} or more tiles of 64 rows; fewer are "
            "allowed; split the batch."
        )


def _reaches(size: int | torch.SymInt, limit: int) -> bool:
    """Whether a size that is known is not below its limit."""
    return isinstance(size, int) and size >= limit


def check_fp8_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """`check_shapes` for tensors that are float8_e4m3fn.

    Raises:
        ValueError: another dtype, they do not fit together, or no kernel takes them.
    """
    e4m3 = torch.float8_e4m3fn
    if q.dtype != e4m3 or k.dtype != e4m3 or v.dtype != e4m3:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; if one is torch.float8_e4m3fn all must "
            "be; convert them with .to()."
        )
    check_sizes(q, k, v)


def check_descale(name: str, descale: torch.Tensor, k: torch.Tensor) -> None:
    """A scale for each key/value head of k (batch, seqlen_k, heads_kv, head_dim), as in FlashAttention-3.

    Raises:
        TypeError: it is no tensor.
        ValueError: it is not (batch, heads_kv) float32 on k's device.
    """
    check_tensor(name, descale)
    shape = (k.shape[0], k.shape[2])
    if descale.shape != shape or descale.dtype != torch.float32 or descale.device != k.device:
        raise ValueError(
            f"{name} is {descale.dtype} of shape {tuple(descale.shape)} on {descale.device}; it must be "
            f"torch.float32 of shape (batch, heads_kv) = {shape} on {k.device}; expand or move it."
        )


def nan_if_negative(name: str, scale: torch.Tensor) -> torch.Tensor:
    """The float32 scales of Q or K, any shape, with NaN for what is negative, which the kernels take for 0.

    NOTE: on a CPU it is refused. A GPU's values are not waited for.

    Raises:
        ValueError: a scale on a CPU is negative.
    """
    if type(scale) is torch.Tensor and scale.device.type == "cpu":
        if (scale < 0).any():
            raise ValueError(
                f"{name} has the negative element {scale.min().item():g}; it must be at least 0; move the "
                "sign into the tensor that it scales."
            )
        return scale
    # NOTE: one launch. What is at most the largest negative float32 becomes NaN, and NaN stays.
    return torch.threshold(scale, -(2.0**-149), float("nan"))


def check_out_dtype(dtype: torch.dtype) -> None:
    """Raises TypeError or ValueError if attention over quantised tensors cannot return `dtype`."""
    check_instance("out_dtype", dtype, torch.dtype, "pass torch.bfloat16 or torch.float16")
    if dtype not in DTYPE_NAMES:
        raise ValueError(
            f"out_dtype is {dtype}; it must be torch.bfloat16 or torch.float16; convert the output itself."
        )


def check_memory(name: str, t: torch.Tensor) -> None:
    """Strides and alignment that TMA needs of a 16-bit (batch, seqlen, heads, head_dim) tensor.

    Raises:
        ValueError: the last dimension is not contiguous, another stride is no multiple of 16 bytes, or the
            data does not start at a multiple of 16 bytes.
    """
    if t.layout is not torch.strided:
        raise ValueError(f"{name} has layout {t.layout}; it must be torch.strided; call {name}.to_dense().")
    batch, row, head, last = t.stride()
    if last != 1:
        raise ValueError(
            f"{name} has strides {t.stride()}; the last dimension must have stride 1; call "
            f"{name}.contiguous()."
        )
    if (batch | row | head) & 7:
        # The stride of a dimension of size 1 is never used.
        if any(stride & 7 and size > 1 for stride, size in zip(t.stride()[:3], t.shape[:3], strict=True)):
            raise ValueError(
                f"{name} has strides {t.stride()}; all but the last must be multiples of 8 elements (16 "
                f"bytes); call {name}.contiguous()."
            )
    if t.data_ptr() & 15:
        raise ValueError(
            f"{name} starts {t.data_ptr() & 15} bytes past a multiple of 16 bytes; its data must be 16-byte "
            f"aligned; call {name}.clone()."
        )


def resolved(t: torch.Tensor) -> torch.Tensor:
    """t, or a copy of it if its memory does not hold its values.

    That is so where torch has put off a negation (the imaginary part of a conjugated complex tensor), or made
    zeros without memory.
    """
    return _materialised(t) if t.is_neg() or t._is_zerotensor() else t


def _materialised(t: torch.Tensor) -> torch.Tensor:
    if t.is_neg() and t.dtype == torch.float8_e4m3fn:  # of which torch has no negation
        return (torch._neg_view(t).view(torch.uint8) ^ 0x80).view(t.dtype)
    return t.clone()


def loadable(t: torch.Tensor) -> torch.Tensor:
    """t, or a contiguous copy of it if TMA cannot take its strides or alignment (see `check_memory`)."""
    try:
        check_memory("", t)
    except ValueError:
        return t.clone(memory_format=torch.contiguous_format)
    return t


def _bad_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> NoReturn:
    raise ValueError(
        f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; allowed are q (batch, "
        "seqlen_q, heads_q, head_dim) and k, v (batch, seqlen_k, heads_kv, head_dim); transpose or reshape "
        "them to that."
    )
