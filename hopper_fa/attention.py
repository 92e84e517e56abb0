"""What users call: FlashAttention's names, argument order and tensor layout."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hopper_fa import backend as backends
from hopper_fa import ops
from hopper_fa.arguments import (
    as_flag,
    as_float,
    as_int,
    as_text,
    check_floating,
    check_instance,
    check_tensor,
    check_tensors,
    shown,
)
from hopper_fa.quantization import QuantizedQKV
from hopper_fa.recipe import Fp8Recipe
from hopper_fa.validation import CAUSAL_HOW, check_out_dtype

_NO_WINDOW = (-1, -1)
_CAST_BY_AUTOCAST = {torch.float32, torch.bfloat16, torch.float16}
_ANOTHER_RESULT = "leaving it out computes another result, without it"
_ONLY_SPEED = "leave it out, as it changes speed and at most the last bits"


class _Option(NamedTuple):
    """An argument of FlashAttention that is not built yet.

    Attributes:
        read: (name, value) to the value, or TypeError.
        neutral: values that ask for nothing, beside the default.
        effect: what others ask for. advice: what to do without.
    """

    read: Callable[[str, Any], Any]
    neutral: tuple[Any, ...]
    effect: str
    advice: str


def _optional_tensor(name: str, value: Any) -> Tensor | None:
    if value is not None:
        check_tensor(name, value)
    return value


def _optional_flag(name: str, value: Any) -> bool | None:
    return as_flag(name, value, optional=True)


def _window(name: str, value: Any) -> tuple[int, int]:
    """(left, right), -1 where it is unbounded."""
    sides = (None, None) if value is None else value
    integers = (int, np.integer, torch.SymInt)
    if not (
        isinstance(sides, (tuple, list))
        and len(sides) == 2
        and all(x is None or (isinstance(x, integers) and not isinstance(x, bool)) for x in sides)
    ):
        raise TypeError(
            f"{name} is {shown(value)}; it must be a pair (left, right) of ints, None or -1 where unbounded; "
            "pass (-1, -1), with causal=True for a causal mask."
        )
    left, right = (-1 if x is None or x < 0 else x for x in sides)
    return left, right


def _is_no_window(value: Any) -> bool:
    """Whether it is (-1, -1) of plain integers, which need no closer look."""
    return type(value) is tuple and [type(x) for x in value] == [int, int] and value == _NO_WINDOW


_OPTIONS = {
    "qv": _Option(_optional_tensor, (), "add the products of qv and v to the scores", _ANOTHER_RESULT),
    "window_size": _Option(
        _window,
        (),
        "hide the keys outside of a window",
        f"{_ANOTHER_RESULT}; (-1, 0) alone is causal=True",
    ),
    "attention_chunk": _Option(
        as_int,
        (),
        "hide the keys of other chunks",
        f"{_ANOTHER_RESULT}; make whole chunks of self-attention entries of the batch",
    ),
    "softcap": _Option(as_float, (), "bound the scores by softcap * tanh(score / softcap)", _ANOTHER_RESULT),
    "num_splits": _Option(as_int, (0,), "split the keys among CTAs", _ONLY_SPEED),
    "pack_gqa": _Option(
        _optional_flag, (False,), "put query heads that share keys into one tile", _ONLY_SPEED
    ),
    "sm_margin": _Option(as_int, (), "leave SMs to other kernels", _ONLY_SPEED),
    "return_attn_probs": _Option(
        as_flag,
        (),
        "return what the softmax makes too",
        "pass return_lse=True for the log-sum-exps, and form the probabilities from them and the scores",
    ),
    "dropout_p": _Option(
        as_float, (), "drop probabilities at random", f"{_ANOTHER_RESULT}; 0.0 is right for inference"
    ),
    "alibi_slopes": _Option(
        _optional_tensor, (), "add a bias that grows with the distance of a key", _ANOTHER_RESULT
    ),
}
_DESCALES = ("q_descale", "k_descale", "v_descale")


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    qv: Tensor | None = None,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    window_size: tuple[int, int] = _NO_WINDOW,
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
    alibi_slopes: Tensor | None = None,
    backend: str | None = None,
    recipe: Fp8Recipe | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Exact attention O = softmax(softmax_scale * Q K^T + mask) V, without the score matrix in memory.

    Positional arguments follow FlashAttention-3. Those of FlashAttention-2 that it lacks (dropout_p,
    alibi_slopes) are keyword-only.
    NOTE: FlashAttention-2 has dropout_p before softmax_scale: code that passes a positional dropout_p of 0.0
    asks for a softmax_scale of 0.0 here.

    Differentiable once, through out and lse, with respect to q, k and v. Under autocast float32, bfloat16 and
    float16 inputs become the autocast dtype; others are treated as without autocast.
    NOTE: the backward takes scratch while it runs: of a query row 264 bytes up to head dim 64, 520 up to 128
    and 1032 above, and of the last rows a whole block of 128 or 64 (`kernels.backward_scratch_bytes`); with a
    recipe 4 bytes a row more, and Q, K and V in 16 bits.

    Under torch's machinery: vmap folds its dimension into the batch (what is not mapped is repeated, where
    the batch is more than 1). torch.func.grad, vjp and jacrev work; forward mode is refused. DTensors may be
    replicated, or all sharded by batch, or all by heads; results and gradients are placed likewise. Meta
    tensors give meta tensors. FlopCounterMode counts what it counts for torch's own attention. torch.export
    takes open batches and lengths.

    In FP8, which is not exact: with a recipe, bfloat16 and float16 tensors are quantised by it inside the
    call; tensors that are float8_e4m3fn already are used as they are, times their descales. The gradient of a
    recipe is that of attention over the dequantised tensors, straight through the rounding: the backward
    computes in 16 bits on the forward's codes, so its probabilities are the forward's. Eager calls keep the
    codes in place of q, k and v; compiled ones quantise again. float8_e4m3fn tensors have no gradient.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), bfloat16, float16 or float8_e4m3fn, head_dim a multiple of 8
            up to 256. Strides multiples of 16 bytes, the last one 1; data 16-byte aligned. float8_e4m3fn may
            have any; q and k are copied where they are not like that (as with most head_dim that are no
            multiple of 16), and v always is.
        k, v: (batch, seqlen_k, heads_kv, head_dim), same dtype and device; heads_q must be a multiple of
            heads_kv, and query head h reads key/value head h // (heads_q // heads_kv).
        softmax_scale: factor on the scores, from -2**64 to 2**64, also 0; None means 1 / sqrt(head_dim). The
            scaled scores must stay within float32. A Python or NumPy number, and no tensor.
        causal: bottom-right aligned: row i sees keys j <= i + seqlen_k - seqlen_q.
        return_lse: also return the log-sum-exp of each row. Flags are True or False, of Python or NumPy.
        deterministic: the gradient of q has the same bits every time too, at some cost; out, lse and the
            gradients of k and v always have. torch.use_deterministic_algorithms(True) asks for it as well.
        backend: "auto" (the CUDA kernels), "cuda", "emulator" (their arithmetic in torch, slow, any device)
            or "reference" (float64, slow; with a recipe it still takes the tensors unquantised). None: the
            environment variable HOPPER_FA_BACKEND, or "auto". In FP8 the kernels run what
            `kernels.fp8_problem` has nothing against, with a gradient also
            `kernels.quantized_backward_problem`; the emulator every recipe. The backward runs on the same.
        recipe: compute in FP8, by this recipe. For float8_e4m3fn tensors None means Fp8Recipe.fa3(), and see
            `quantization.from_fp8` for what another may change.
        q_descale, k_descale, v_descale: of float8_e4m3fn tensors: (batch, heads_kv) float32, what to multiply
            them by; None means 1. v_descale has any sign. A negative element of q_descale or k_descale is
            refused on a CPU; on a GPU, whose values are not waited for, it acts as NaN.
        qv, window_size, attention_chunk, softcap, num_splits, pack_gqa, sm_margin, return_attn_probs,
            dropout_p, alibi_slopes: not built yet; only the defaults, and what else asks for nothing.

    Returns:
        out: (batch, seqlen_q, heads_q, head_dim) in q's dtype (bfloat16 for float8_e4m3fn), contiguous; 0 in
            rows that see no key.
        lse, if return_lse: natural logarithm, (batch, heads_q, seqlen_q), float32; -inf where no key is seen.

    Raises:
        TypeError, ValueError: an input the kernels do not take, found before anything is launched.
        RuntimeError: no backend can run the call (device is not Hopper, instance not built, a recipe that the
            FP8 kernels do not know).
        NotImplementedError: an argument asks for what is not built yet; an input carries a tangent; vmap or
            DTensors meet a recipe with a scale for a whole tensor; a DTensor is sharded otherwise; a gradient
            is wanted by a recipe with smooth_q or a scale a key, on the kernels; from backward(), a second
            derivative or a gradient of float8_e4m3fn tensors was asked for.
    """
    # NOTE: nothing is compared before its type is known: to compare an array or a tensor may run anything.
    # fmt: off
    options = descales = None
    if not (
        qv is None
        and (window_size is _NO_WINDOW or _is_no_window(window_size))
        and type(attention_chunk) is int and attention_chunk == 0
        and type(softcap) is float and softcap == 0.0
        and type(num_splits) is int and num_splits == 1
        and pack_gqa is None
        and type(sm_margin) is int and sm_margin == 0
        and return_attn_probs is False
        and type(dropout_p) is float and dropout_p == 0.0
        and alibi_slopes is None
    ):
        options = (
            qv, window_size, attention_chunk, softcap, num_splits, pack_gqa, sm_margin, return_attn_probs,
            dropout_p, alibi_slopes,
        )
    if q_descale is not None or k_descale is not None or v_descale is not None:
        descales = (q_descale, k_descale, v_descale)
    return _attention(
        ("q", "k", "v"), (q, k, v), softmax_scale, causal, options, descales, deterministic, return_lse,
        backend, recipe,
    )
    # fmt: on


_PARAMETERS = inspect.signature(flash_attn_func).parameters
_NEUTRAL = tuple(_PARAMETERS[name].default for name in _OPTIONS)


def _attention(
    names: tuple[str, ...],
    tensors: tuple[Tensor, ...],
    softmax_scale: float | None,
    causal: bool,
    options: tuple[Any, ...] | None,
    descales: tuple[Tensor | None, ...] | None,
    deterministic: bool,
    return_lse: bool,
    backend: str | None,
    recipe: Fp8Recipe | None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` of (q, k, v), (q, kv) or (qkv,), called `names`.

    options: one value for each name in _OPTIONS; None: the defaults. descales: None without any.
    """
    for t in tensors:
        if type(t) is not Tensor:
            check_tensors(names, tensors)
    if options is not None:
        _check_options(options)
    if not (
        (softmax_scale is None or type(softmax_scale) is float)
        and (causal is False or causal is True)
        and (deterministic is False or deterministic is True)
        and (return_lse is False or return_lse is True)
        and (backend is None or (type(backend) is str and backend in backends.BACKENDS))
        and (recipe is None or type(recipe) is Fp8Recipe)
    ):
        softmax_scale, causal, deterministic, return_lse, backend = _plain_arguments(
            softmax_scale, causal, deterministic, return_lse, backend, recipe
        )
    if tensors[0].dtype == torch.float8_e4m3fn:
        if descales is None:
            descales = (None, None, None)
        for name, descale in zip(_DESCALES, descales, strict=True):
            _optional_tensor(name, descale)
        out, lse = ops.forward_e4m3(tensors, descales, softmax_scale, causal, backend, recipe)
        return (out, lse) if return_lse else out
    if descales is not None:
        _refuse_descales(descales, tensors[0].dtype)
    device_type = tensors[0].device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        tensors = _autocast(tensors, device_type)
        with torch.autocast(device_type, enabled=False):
            out, lse = ops.forward(tensors, softmax_scale, causal, deterministic, backend, recipe)
    else:
        out, lse = ops.forward(tensors, softmax_scale, causal, deterministic, backend, recipe)
    return (out, lse) if return_lse else out


def _plain_arguments(
    softmax_scale: Any,
    causal: Any,
    deterministic: Any,
    return_lse: Any,
    backend: Any,
    recipe: Any,
) -> tuple[float | None, bool, bool, bool, str | None]:
    """All but recipe, of Python's own types.

    Raises:
        TypeError: one is of another type. ValueError: unknown backend.
    """
    if recipe is not None:
        check_instance("recipe", recipe, Fp8Recipe, "pass Fp8Recipe.default(), another preset or None")
    return (
        as_float("softmax_scale", softmax_scale, optional=True),
        as_flag("causal", causal, how=CAUSAL_HOW),
        as_flag("deterministic", deterministic),
        as_flag("return_lse", return_lse),
        None if backend is None else as_text("backend", backend, backends.BACKENDS),
    )


def _check_options(options: tuple[Any, ...]) -> None:
    """Raises TypeError for a value of another type than its option takes.

    And NotImplementedError for the first value that asks for something.
    """
    for (name, option), value, default in zip(_OPTIONS.items(), options, _NEUTRAL, strict=True):
        if value is default:
            continue
        read = option.read(name, value)
        if not isinstance(read, Tensor) and (read == default or read in option.neutral):
            continue
        raise NotImplementedError(
            f"{name} is {shown(value)}, which would {option.effect}; hopper_fa does not do that yet and "
            f"takes only {name}={default!r}; {option.advice}."
        )


def _refuse_descales(descales: tuple[Any, ...], dtype: torch.dtype) -> None:
    """Raises TypeError or ValueError for the first that is not None."""
    for name, descale in zip(_DESCALES, descales, strict=True):
        if descale is not None:
            check_tensor(name, descale)
            raise ValueError(
                f"{name} is given beside tensors of {dtype}; it belongs to torch.float8_e4m3fn tensors; "
                f"multiply {name[0]} by it before the call, or pass q, k and v in torch.float8_e4m3fn."
            )


def _autocast(tensors: tuple[Tensor, ...], device_type: str) -> tuple[Tensor, ...]:
    """Float32, bfloat16 and float16 become the autocast dtype. With another dtype among them nothing does.

    NOTE: it is refused then. Codes and integers would be cast as if they were the numbers meant.
    """
    if any(t.dtype not in _CAST_BY_AUTOCAST for t in tensors):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) for t in tensors)


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
        TypeError: an argument is of another type.
        ValueError: dtypes, devices or shapes that do not fit; float32 for the kernels; unknown backend.
        RuntimeError: the kernels were to run, but the device is not a Hopper GPU, or this build holds none
            for the dtype.
    """
    check_tensors(("q", "k", "v"), (q, k, v))
    if recipe is not None:
        check_instance("recipe", recipe, Fp8Recipe, "pass Fp8Recipe.default(), another preset or None")
    backend = None if backend is None else as_text("backend", backend, backends.BACKENDS)
    return backends.run_quantize(q, k, v, recipe, backend)


def flash_attn_quantized_func(
    qkv: QuantizedQKV,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    out_dtype: torch.dtype = torch.bfloat16,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over tensors that `quantize_qkv` made, by the recipe they carry. Not differentiable.

    It does not matter which backend quantised them, so long as they are on the device that runs this.
    Transforms of torch.func, vmap, tangents and DTensors are refused; use `flash_attn_func` with a recipe.

    Args:
        qkv: of `quantize_qkv` or `quantization.from_fp8`.
        softmax_scale, causal, return_lse: as in `flash_attn_func`.
        out_dtype: of the output, bfloat16 or float16.
        backend: as in `flash_attn_func`; "reference" is float64 on what the quantised tensors stand for.

    Returns and raises: as `flash_attn_func`.
    """
    check_instance("qkv", qkv, QuantizedQKV, "make one with quantize_qkv")
    check_out_dtype(out_dtype)
    softmax_scale, causal, _, return_lse, backend = _plain_arguments(
        softmax_scale, causal, False, return_lse, backend, None
    )
    out, lse = ops.forward_quantized(qkv, softmax_scale, causal, out_dtype, backend)
    return (out, lse) if return_lse else out


def flash_attn_qkvpacked_func(
    qkv: Tensor, softmax_scale: float | None = None, causal: bool = False, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` on one tensor that holds Q, K and V; nothing is copied, nor is its gradient.

    Args:
        qkv: (batch, seqlen, 3, heads, head_dim).
        softmax_scale, causal, **options: as in `flash_attn_func`.

    Returns and raises: as `flash_attn_func`; ValueError also if qkv has another shape.
    """
    check_tensor("qkv", qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}; it must be (batch, seqlen, 3, heads, head_dim); stack q, k "
            "and v in dimension 2."
        )
    return _packed(("qkv",), (qkv,), softmax_scale, causal, **options)


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`flash_attn_func` on Q and one tensor that holds K and V; nothing is copied, nor are gradients.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim).
        kv: (batch, seqlen_k, 2, heads_kv, head_dim).
        softmax_scale, causal, **options: as in `flash_attn_func`.

    Returns and raises: as `flash_attn_func`; ValueError also if kv has another shape.
    """
    check_tensors(("q", "kv"), (q, kv))
    if kv.ndim != 5 or kv.shape[2] != 2:
        raise ValueError(
            f"kv has shape {tuple(kv.shape)}; it must be (batch, seqlen_k, 2, heads_kv, head_dim); stack k "
            "and v in dimension 2."
        )
    return _packed(("q", "kv"), (q, kv), softmax_scale, causal, **options)


def _packed(
    names: tuple[str, ...],
    tensors: tuple[Tensor, ...],
    softmax_scale: float | None,
    causal: bool,
    *,
    q_descale: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    deterministic: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
    recipe: Fp8Recipe | None = None,
    **options: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    for name in options.keys() - _OPTIONS.keys():
        raise TypeError(
            f"{name} is no argument of flash_attn_func; allowed are those behind its v; correct the name, or "
            "leave it out."
        )
    values = descales = None
    if options:
        values = tuple(options.get(name, neutral) for name, neutral in zip(_OPTIONS, _NEUTRAL, strict=True))
    if q_descale is not None or k_descale is not None or v_descale is not None:
        descales = (q_descale, k_descale, v_descale)
    return _attention(
        names, tensors, softmax_scale, causal, values, descales, deterministic, return_lse, backend, recipe
    )


def merge_attention(outs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
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
        TypeError: outs or lses is no list or tuple of tensors.
        ValueError: no partials, or their numbers, shapes, dtypes or devices do not fit.
    """
    _check_partials(outs, lses)
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


def _check_partials(outs: Any, lses: Any) -> None:
    """Raises TypeError or ValueError for what `merge_attention` does not take."""
    for name, partials in (("outs", outs), ("lses", lses)):
        if not isinstance(partials, (list, tuple)):
            raise TypeError(
                f"{name} is {shown(partials)}; it must be a list or tuple of tensors; pass list({name})."
            )
        for index, t in enumerate(partials):
            check_floating(f"{name}[{index}]", t, smallest=2)
    if len(outs) == 0 or len(outs) != len(lses):
        raise ValueError(
            f"outs and lses hold {len(outs)} outs and {len(lses)} lses; there must be as many of one as of "
            "the other, at least one; pass those of the same calls."
        )
    shape = outs[0].shape
    lse_shape = (shape[0], shape[2], shape[1]) if len(shape) == 4 else None
    if any(out.shape != shape for out in outs) or any(lse.shape != lse_shape for lse in lses):
        raise ValueError(
            f"outs and lses are outs of shapes {[tuple(out.shape) for out in outs]} and lses of shapes "
            f"{[tuple(lse.shape) for lse in lses]}; each out must be (batch, seqlen_q, heads_q, head_dim) "
            "and each lse (batch, heads_q, seqlen_q); reshape them."
        )
    if len({out.dtype for out in outs}) > 1 or len({t.device for t in (*outs, *lses)}) > 1:
        raise ValueError(
            f"outs and lses have dtypes {[out.dtype for out in outs]} and devices "
            f"{[str(t.device) for t in (*outs, *lses)]}; outs must share a dtype, and all a device; convert "
            "or move them."
        )
