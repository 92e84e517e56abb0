"""What users call: FlashAttention's names, argument order and tensor layout."""

from collections.abc import Sequence
from typing import Any

import torch

from hopper_fa import ops
from hopper_fa.quantization import QuantizedQKV
from hopper_fa.recipe import Fp8Recipe

# Arguments of FlashAttention that are not built yet, with the values that ask for nothing, the default first.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "qv": (None,),
    "q_descale": (None,),
    "k_descale": (None,),
    "v_descale": (None,),
    "window_size": ((-1, -1), [-1, -1], (None, None), None),
    "attention_chunk": (0,),
    "softcap": (0.0,),
    "num_splits": (1, 0),
    "pack_gqa": (None, False),
    "sm_margin": (0,),
    "return_attn_probs": (False,),
    "dropout_p": (0.0,),
    "alibi_slopes": (None,),
}
_NEUTRAL = tuple(values[0] for values in _NEUTRAL_VALUES.values())


def flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: torch.Tensor | None = None,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    num_splits: int = 1,
    pack_gqa: bool | None = None,
    deterministic: bool = False,
    sm_margin: int = 0,
    return_attn_probs: bool = False,
    *,
    return_lse: bool = False,
    dropout_p: float = 0.0,
    alibi_slopes: torch.Tensor | None = None,
    backend: str | None = None,
    recipe: Fp8Recipe | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact attention O = softmax(softmax_scale * Q K^T + mask) V, without the score matrix in memory.

    Positional arguments follow FlashAttention-3. Those of FlashAttention-2 that it lacks (dropout_p,
    alibi_slopes) are keyword-only.
    NOTE: FlashAttention-2 has dropout_p before softmax_scale: code that passes a positional dropout_p of 0.0
    asks for a softmax_scale of 0.0 here.

    Differentiable once, through out and lse, with respect to q, k and v. Under autocast the inputs become the
    autocast dtype.

    Under torch's machinery: vmap folds its dimension into the batch (what is not mapped is repeated, where
    the batch is more than 1). torch.func.grad, vjp and jacrev work; forward mode is refused. DTensors may be
    replicated, or all sharded by batch, or all by heads; results and gradients are placed likewise. Meta
    tensors give meta tensors. FlopCounterMode counts what it counts for torch's own attention. torch.export
    takes open batches and lengths.

    In FP8, which is not exact: with a recipe, bfloat16 and float16 tensors are quantised by it inside the
    call; tensors that are float8_e4m3fn already are used as they are, times their descales. The gradient of a
    recipe is straight-through: that of exact attention of the unquantised tensors, computed in their dtype,
    with the FP8 call's out and lse in place of the exact ones. float8_e4m3fn tensors have no gradient.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), bfloat16, float16 or float8_e4m3fn, head_dim a multiple of 8
            up to 256. Strides multiples of 16 bytes, the last one 1; data 16-byte aligned. float8_e4m3fn may
            have any; q and k are copied where they are not like that (as with most head_dim that are no
            multiple of 16), and v always is.
        k, v: (batch, seqlen_k, heads_kv, head_dim), same dtype and device; heads_q must be a multiple of
            heads_kv, and query head h reads key/value head h // (heads_q // heads_kv).
        softmax_scale: factor on the scores, from -2**64 to 2**64, also 0; None means 1 / sqrt(head_dim). The
            scaled scores must stay within float32.
        causal: bottom-right aligned: row i sees keys j <= i + seqlen_k - seqlen_q.
        return_lse: also return the log-sum-exp of each row.
        deterministic: the gradient of q has the same bits every time too, at some cost; out, lse and the
            gradients of k and v always have. torch.use_deterministic_algorithms(True) asks for it as well.
        backend: "auto" (the CUDA kernels), "cuda", "emulator" (their arithmetic in torch, slow, any device)
            or "reference" (float64, slow; with a recipe it still takes the tensors unquantised). None: the
            environment variable HOPPER_FA_BACKEND, or "auto". In FP8 the kernels run what
            `kernels.fp8_problem` has nothing against, the emulator every recipe. The backward runs on
            the same.
        recipe: compute in FP8, by this recipe. For float8_e4m3fn tensors None means Fp8Recipe.fa3(), and see
            `quantization.from_fp8` for what another may change.
        q_descale, k_descale, v_descale: of float8_e4m3fn tensors: (batch, heads_kv) float32, what to multiply
            them by; None means 1.
        qv, window_size, attention_chunk, softcap, num_splits, pack_gqa,
            sm_margin, return_attn_probs, dropout_p, alibi_slopes: not built yet; neutral values only.

    Returns:
        out: (batch, seqlen_q, heads_q, head_dim) in q's dtype (bfloat16 for float8_e4m3fn), contiguous; 0 in
            rows that see no key.
        lse, if return_lse: natural logarithm, (batch, heads_q, seqlen_q), float32; -inf where no key is seen.

    Raises:
        TypeError, ValueError: an input the kernels do not take, found before anything is launched.
        RuntimeError: no backend can run the call (device is not Hopper, instance not built, a recipe that the
            FP8 kernels do not know).
        NotImplementedError: an argument is not at its neutral value; an input carries a tangent, or
            softmax_scale wants a gradient; vmap or DTensors meet a recipe with a scale for a whole tensor; a
            DTensor is sharded otherwise; from backward(), a second derivative or a gradient of
            float8_e4m3fn tensors was asked for.
    """
    # fmt: off
    options = (
        qv, q_descale, k_descale, v_descale, window_size, attention_chunk, softcap, num_splits, pack_gqa,
        sm_margin, return_attn_probs, dropout_p, alibi_slopes,
    )
    # fmt: on
    out, lse = _attention((q, k, v), softmax_scale, causal, options, deterministic, backend, recipe)
    return (out, lse) if return_lse else out


def _attention(
    tensors: tuple[torch.Tensor, ...],
    softmax_scale: float | None,
    causal: bool,
    options: tuple[Any, ...],
    deterministic: bool = False,
    backend: str | None = None,
    recipe: Fp8Recipe | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out and lse of `flash_attn_func` of (q, k, v), (q, kv) or (qkv,).

    options: one value for each name in _NEUTRAL_VALUES.
    """
    if tensors[0].dtype == torch.float8_e4m3fn:
        _, *descales = options[:4]
        _refuse_options((options[0], None, None, None, *options[4:]))
        return ops.forward_e4m3(tensors, tuple(descales), softmax_scale, causal, backend, recipe)
    if options != _NEUTRAL:
        _refuse_options(options)
    device_type = tensors[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        tensors = _autocast(tensors, device_type)
        with torch.autocast(device_type, enabled=False):
            return _attention(tensors, softmax_scale, causal, options, deterministic, backend, recipe)
    return ops.forward(tensors, softmax_scale, causal, deterministic, backend, recipe)


def _autocast(tensors: tuple[torch.Tensor, ...], device_type: str) -> tuple[torch.Tensor, ...]:
    """As torch's own attention under autocast: everything but float64 becomes the autocast dtype."""
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t if t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def quantize_qkv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    recipe: Fp8Recipe | None = None,
    *,
    backend: str | None = None,
) -> QuantizedQKV:
    """Q, K and V in 8 bits, for `flash_attn_quantized_func`; what a call with a recipe does. No gradient.

    CUDA tensors are quantised by the kernels, all others by torch operations (`quantization.quantize_qkv`,
    which also says what becomes of NaN and infinity). Both give the same bits, but for lse_shift and
    key_bias: those are float32 sums over head_dim, which the kernels add in another order.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), bfloat16 or float16, or float32 where torch operations
            quantise it; head_dim a multiple of 8 up to 256, heads_q a multiple of heads_kv. Any strides;
            what the kernels cannot load where it is, they copy.
        k, v: (batch, seqlen_k, heads_kv, head_dim), dtype and device of q.
        recipe: None means Fp8Recipe.default().
        backend: "cuda" (the kernels), "emulator" or "reference" (torch operations, slow, on any device), or
            "auto". None: the environment variable HOPPER_FA_BACKEND, or "auto".

    Raises:
        ValueError: dtypes, devices or shapes that do not fit; float32 for the kernels; unknown backend.
        RuntimeError: the kernels were to run, but the device is not a Hopper GPU, or this build holds none
            for the dtype.
    """
    return backends.run_quantize(q, k, v, recipe, backend)


def flash_attn_quantized_func(
    qkv: QuantizedQKV,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention over tensors that `quantize_qkv` made, by the recipe they carry. Not differentiable.

    It does not matter which backend quantised them, so long as they are on the device that runs this.
    Transforms of torch.func, vmap, tangents and DTensors are refused; use `flash_attn_func` with a recipe.

    Args:
        softmax_scale, causal, return_lse: as in `flash_attn_func`.
        out_dtype: of the output, bfloat16 or float16.
        backend: as in `flash_attn_func`; "reference" is float64 on what the quantised tensors stand for.

    Returns and raises: as `flash_attn_func`.
    """
    out, lse = ops.forward_quantized(qkv, softmax_scale, causal, out_dtype, backend)
    return (out, lse) if return_lse else out


def flash_attn_qkvpacked_func(
    qkv: torch.Tensor, softmax_scale: float | None = None, causal: bool = False, **options: Any
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` on one tensor that holds Q, K and V; nothing is copied, nor is its gradient.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim).
        softmax_scale, causal, **options: as in `flash_attn_func`.

    Returns and raises: as `flash_attn_func`; ValueError also if qkv has another shape.
    """
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; it must be (batch, seqlen, 3, heads, head_dim); stack q, k "
            "and v in dimension 2."
        )
    return _packed((qkv,), softmax_scale, causal, **options)


def flash_attn_kvpacked_func(
    q: torch.Tensor,
    kv: torch.Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """`flash_attn_func` on Q and one tensor that holds K and V; nothing is copied, nor are gradients.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        kv: (batch, seqlen_k, 2, heads_kv, head_dim).
        softmax_scale, causal, **options: as in `flash_attn_func`.

    Returns and raises: as `flash_attn_func`; ValueError also if kv has another shape.
    """
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(
            f"kv has shape {tuple(kv.shape)}; it must be (batch, seqlen_k, 2, heads_kv, head_dim); stack k "
            "and v in dimension 2."
        )
    return _packed((q, kv), softmax_scale, causal, **options)


def _packed(
    tensors: tuple[torch.Tensor, ...],
    softmax_scale: float | None,
    causal: bool,
    *,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    recipe: Fp8Recipe | None = None,
    **options: Any,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    for name in options:
        if name not in _NEUTRAL_VALUES:
            raise TypeError(f"{name} is no argument of flash_attn_func; leave it out.")
    values = tuple(options.get(name, neutral[0]) for name, neutral in _NEUTRAL_VALUES.items())
    out, lse = _attention(tensors, softmax_scale, causal, values, deterministic, backend, recipe)
    return (out, lse) if return_lse else out


def merge_attention(
    outs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over a union of disjoint key sets from the attention over each of them.

    With lse_i = log(sum over the keys j of set i of exp(s_j)):

        lse = log(sum_i exp(lse_i)),    out = sum_i exp(lse_i - lse) out_i

    which is exact, because out_i is normalised by exp(lse_i). Computed in float32, or float64 if an input is;
    torch operations throughout, on any device.

    Args:
        outs: partial outputs, (batch, seqlen_q, heads_q, head_dim) each, one dtype.
        lses: their log-sum-exps (natural logarithm), (batch, heads_q, seqlen_q) each. Where one is -inf the
            partial saw no key, and its output is ignored.

    Returns:
        out, in the dtype of the partial outputs (0 where every partial is empty), and lse (-inf there).

    Raises:
        ValueError: no partials, or their numbers or shapes differ.
    """
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"merge_attention got {len(outs)} outs and {len(lses)} lses; pass as many of one as of the "
            "other, at least one."
        )
    batch, seqlen_q, heads_q, _ = outs[0].shape
    lse_shape = (batch, heads_q, seqlen_q)
    if any(out.shape != outs[0].shape for out in outs) or any(lse.shape != lse_shape for lse in lses):
        raise ValueError(
            f"merge_attention got outs of shapes {[tuple(out.shape) for out in outs]} and lses of shapes "
            f"{[tuple(lse.shape) for lse in lses]}; each out must be (batch, seqlen_q, heads_q, head_dim) "
            "and each lse (batch, heads_q, seqlen_q); reshape them."
        )
    partial_lse = torch.stack([lse if lse.dtype == torch.float64 else lse.float() for lse in lses])
    largest = partial_lse.amax(0)
    # NOTE: -inf - -inf is NaN: a row that no partial has keys for is shifted by 0 instead.
    shift = largest.masked_fill(largest == float("-inf"), 0.0)
    # NOTE: relative to the largest and not to the merged lse, whose own rounding would scale the output.
    weights = (partial_lse - shift).exp()
    total = weights.sum(0)
    merged = torch.zeros((), dtype=weights.dtype, device=weights.device)
    for out, weight in zip(outs, weights, strict=True):
        weight = weight.transpose(1, 2)[..., None]  # (batch, seqlen_q, heads_q, 1)
        merged = merged + torch.where(weight > 0, weight * out, torch.zeros_like(weight))
    merged = merged / total.masked_fill(total == 0, 1.0).transpose(1, 2)[..., None]
    return merged.to(outs[0].dtype), shift + total.log()


def _refuse_options(options: tuple[Any, ...]) -> None:
    """Raise NotImplementedError for the first option that asks for something."""
    for (name, neutral), value in zip(_NEUTRAL_VALUES.items(), options, strict=True):
        if isinstance(value, torch.Tensor) or value not in neutral:
            shown = f"a {type(value).__name__}" if isinstance(value, torch.Tensor) else repr(value)
            raise NotImplementedError(
                f"{name} is {shown}; this is not built yet and only {name}={neutral[0]!r} is allowed; leave "
                "it out."
            )
