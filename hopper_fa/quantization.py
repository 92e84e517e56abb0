"""From Q, K and V to 8-bit tensors and their scales: smoothing, rotation, rounding, V's layout.

All arithmetic is float32 in a fixed order of operations, so that a kernel can reproduce every bit; where a
tensor core adds in the kernel, `_mix_sixteens` and `token_stats.mean_error` add as it does. What a recipe
asks for is in hopper_fa/recipe.py.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from hopper_fa.arguments import as_sizes, check_instance, check_tensor, check_tensors, shown
from hopper_fa.constants import constant
from hopper_fa.kernels import MAX_HEAD_DIM
from hopper_fa.recipe import E4M3_MAX, INT8_MAX, K_BLOCK, Q_BLOCK, Fp8Recipe
from hopper_fa.token_stats import mean_error, sampled_tokens, token_mean, tree_sum
from hopper_fa.transforms import refuse_transforms
from hopper_fa.validation import (
    check_descale,
    check_fp8_shapes,
    check_sizes,
    nan_if_negative,
    resolved,
)

PITCH = 16  # bytes that rows of the 8-bit tensors are a multiple of, and keys that V is permuted among
_SIXTEEN = 16  # columns that the rotation's first step mixes
_KEPT_BITS = 25  # below the exponent of the largest of 16 terms, in that step
# Below it a group is all zeros to us: it stays clear of denormal scales and of an infinite inverse.
_SMALLEST_AMAX = 2.0**-100
# Where V's maxima are a sample's, its largest code is E4M3_MAX / _HEADROOM: what the sample left out may be
# so much larger. Codes are denormal below 1/896 of the sample's maximum, and the largest is not 448 exactly.
_HEADROOM = 32
_SATURATES = 432.0  # from here on all is rounded to 448
_CODE_OF_ONE = 0x38  # in e4m3. NOTE: a number, as a tensor's copy to a GPU would be waited for.
_FA3 = Fp8Recipe.fa3()
# Its fields that a recipe for tensors that are e4m3 already must have.
_FIXED_OF_E4M3 = ("qk_dtype", "q_granularity", "k_granularity", "v_granularity", "rotation")
_FIXED_OF_E4M3 += ("smooth_q", "smooth_k", "smooth_v", "compensate_v", "sample_stats")
_SIZES = ("head_dim", "seqlen_q", "seqlen_k")  # of QuantizedQKV


@dataclass(frozen=True)
class QuantizedQKV:
    """8-bit Q, K and V with all that attention over them needs. Made by `quantize_qkv` or `from_fp8`.

    tile_d is the smallest of 64, 128, 256 that holds head_dim; keys_pitch is seqlen_k rounded up to 16. All
    tensors are on one device. `quantize_qkv` makes them contiguous, and fills the rows of q and k up with
    zeros to a multiple of 16 bytes. From `from_fp8`, q and k may be views of the caller's tensors, and
    q_scale and k_scale may have any strides, also 0.

    Attributes:
        q: (batch, seqlen_q, heads_q, head_dim or more), float8_e4m3fn or int8. Nothing reads what lies past
            head_dim. The last dimension is contiguous, the other strides are multiples of 16 bytes, and the
            data starts at one.
        k: (batch, seqlen_k, heads_kv, head_dim or more), as q.
        v: (batch, heads_kv, tile_d + 1, keys_pitch), float8_e4m3fn: V transposed. Row c < head_dim is channel
            c, row tile_d is 1 for every key (its product with P is the row sum), the other rows and the keys
            from seqlen_k on are 0. Among 16 keys, position 4 t + 2 h + i holds key 8 h + 2 t + i (t 0..3, h
            0..1, i 0..1): the order in which a warp's registers of Q K^T are its operand of P V.
        q_scale: (batch, heads_q, q_groups) float32; row r of Q is q * q_scale[..., r // q_group_rows].
        k_scale: (batch, heads_kv, k_groups) float32, the same for keys and k_group_rows.
        v_scale: (batch, heads_kv, head_dim) float32, contiguous; multiplies V and so the output.
        v_mean: as v_scale, to be added to the output: what smooth_v took from V, or the mean of what rounding
            took from it (compensate_v), or their sum; None without both.
        lse_shift: (batch, heads_q, seqlen_q) float32, q . mean(k): what smooth_k took out of every score of
            a row, before softmax_scale; None without smooth_k.
        key_bias: (batch, heads_q, seqlen_k) float32, mean(q) . (k - mean(k)): what smooth_q took out of the
            scores of a key, before softmax_scale; None without smooth_q.
        q_mean, k_mean: (batch, heads, head_dim) float32, what smooth_q and smooth_k subtracted, for the
            backward; None without them.

    q_scale and k_scale must not be negative, because a row's maximum is looked for before it is scaled. On a
    GPU, whose values are not waited for, a negative one becomes NaN, and so does what is computed with it.
    v_scale has any sign.

    Raises:
        TypeError: a field is of another type.
        ValueError: dtypes, devices, shapes or strides that do not fit, or on a CPU a negative q_scale or
            k_scale.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    q_scale: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    v_mean: torch.Tensor | None
    lse_shift: torch.Tensor | None
    key_bias: torch.Tensor | None
    recipe: Fp8Recipe
    head_dim: int
    seqlen_q: int
    seqlen_k: int
    q_mean: torch.Tensor | None = None
    k_mean: torch.Tensor | None = None

    def __post_init__(self) -> None:
        for name, value in _checked_fields(self).items():
            object.__setattr__(self, name, value)

    @classmethod
    def trusted(cls, **fields: Any) -> "QuantizedQKV":
        """One of all fields, which are right by construction and not checked, for that takes a while."""
        qkv = object.__new__(cls)
        qkv.__dict__.update(fields)
        return qkv

    @property
    def q_group_rows(self) -> int:
        """Rows of Q that share an element of q_scale."""
        return {"token": 1, "block": Q_BLOCK}.get(self.recipe.q_granularity, max(1, self.seqlen_q))

    @property
    def k_group_rows(self) -> int:
        """Keys that share an element of k_scale."""
        return {"token": 1, "block": K_BLOCK}.get(self.recipe.k_granularity, max(1, self.seqlen_k))

    def q_scale_of_rows(self) -> torch.Tensor:
        """q_scale spread over the rows: (batch, heads_q, seqlen_q)."""
        return self.q_scale.repeat_interleave(self.q_group_rows, -1)[..., : self.seqlen_q]

    def k_scale_of_keys(self) -> torch.Tensor:
        """k_scale spread over the keys: (batch, heads_kv, seqlen_k)."""
        return self.k_scale.repeat_interleave(self.k_group_rows, -1)[..., : self.seqlen_k]

    @cached_property
    def key_vectors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and bias of every key, in whole blocks of K_BLOCK, 0 past the last key.

        (batch, heads_kv, blocks, K_BLOCK) float32, contiguous, and (batch, heads_q, blocks, K_BLOCK); without
        smooth_q the biases are zeros of that shape in K_BLOCK floats.
        """
        padding = (0, -self.seqlen_k % K_BLOCK)
        k_scale = torch.nn.functional.pad(self.k_scale_of_keys(), padding).unflatten(-1, (-1, K_BLOCK))
        if self.key_bias is None:
            size = (self.q.shape[0], self.q.shape[2], k_scale.shape[2], K_BLOCK)
            bias = k_scale.new_zeros(K_BLOCK).expand(size)
        else:
            bias = torch.nn.functional.pad(self.key_bias, padding).unflatten(-1, (-1, K_BLOCK)).contiguous()
        return k_scale.contiguous(), bias

    @cached_property
    def is_resolved(self) -> bool:
        """Whether every tensor's memory holds its values; see `validation.resolved`."""
        return all(resolved(t) is t for t in vars(self).values() if isinstance(t, torch.Tensor))

    def resolved(self) -> "QuantizedQKV":
        """This, or a copy of it of which `is_resolved` is true."""
        if self.is_resolved:
            return self
        tensors = {name: t for name, t in vars(self).items() if isinstance(t, torch.Tensor)}
        return self._with({name: resolved(t) for name, t in tensors.items()})

    def _with(self, changed: dict[str, torch.Tensor]) -> "QuantizedQKV":
        """A copy with other tensors, and without what this one has cached."""
        return QuantizedQKV.trusted(
            **{field.name: getattr(self, field.name) for field in fields(self)} | changed
        )

    def contiguous(self) -> "QuantizedQKV":
        """This, or a copy of it whose tensors are contiguous, resolved and start at multiples of 16 bytes."""

        def sound(t: torch.Tensor) -> bool:
            return t.is_contiguous() and t.data_ptr() % 16 == 0

        ours = self.resolved()
        tensors = {name: getattr(ours, name) for name in _TENSORS}
        copies = {
            name: t.clone(memory_format=torch.contiguous_format)
            for name, t in tensors.items()
            if t is not None and not sound(t)
        }
        return ours._with(copies) if copies else ours

    def to_tensors(self) -> tuple[list[torch.Tensor], tuple[int, int, int, int]]:
        """The tensors that there are, and (head_dim, seqlen_q, seqlen_k, bits that say which there are).

        NOTE: e4m3 as bytes: torch multiplies no float8, as its checks of operators do, and differentiates it.
        """
        tensors = [getattr(self, name) for name in _TENSORS]
        present = sum(1 << i for i, t in enumerate(tensors) if t is not None)
        form = (self.head_dim, self.seqlen_q, self.seqlen_k, present)
        return [_as_bytes(t) for t in tensors if t is not None], form

    @staticmethod
    def from_tensors(
        tensors: Sequence[torch.Tensor], form: Sequence[int], recipe: Fp8Recipe
    ) -> "QuantizedQKV":
        """What `to_tensors` was called on."""
        *sizes, present = form
        left = iter(tensors)
        named = {name: next(left) if present >> i & 1 else None for i, name in enumerate(_TENSORS)}
        for name in ("q", "k", "v"):
            t = named[name]
            named[name] = t.view(torch.float8_e4m3fn) if t.dtype == torch.uint8 else t
        head_dim, seqlen_q, seqlen_k = sizes
        return QuantizedQKV.trusted(
            **named, recipe=recipe, head_dim=head_dim, seqlen_q=seqlen_q, seqlen_k=seqlen_k
        )

    def v_codes(self) -> torch.Tensor:
        """V as it was rounded, unscaled: (batch, seqlen_k, heads_kv, head_dim) float8_e4m3fn."""
        v = _unpermute_keys(self.v.view(torch.uint8)[:, :, : self.head_dim])[..., : self.seqlen_k]
        return v.permute(0, 3, 1, 2).contiguous().view(torch.float8_e4m3fn)

    def dequantize(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v as attention sees them: (batch, seqlen, heads, head_dim) float32.

        q and k are still rotated and without their means, so the scores of the original tensors are
        q . k + key_bias + lse_shift. v includes v_mean.
        """
        q = self.q[..., : self.head_dim].float() * self.q_scale_of_rows().transpose(1, 2)[..., None]
        k = self.k[..., : self.head_dim].float() * self.k_scale_of_keys().transpose(1, 2)[..., None]
        v = self.v_codes().float() * self.v_scale[:, None]
        return q, k, v if self.v_mean is None else v + self.v_mean[:, None]


def _as_bytes(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.uint8) if t.dtype == torch.float8_e4m3fn else t


_TENSORS = tuple(field.name for field in fields(QuantizedQKV) if "Tensor" in str(field.type))


def _checked_fields(qkv: QuantizedQKV) -> dict[str, Any]:
    """The sizes as Python's integers, and the scales that must not be negative by `nan_if_negative`.

    Raises:
        TypeError, ValueError: see QuantizedQKV.
    """
    for name in ("q", "k", "v", "q_scale", "k_scale", "v_scale"):
        check_tensor(name, getattr(qkv, name))
    for name in ("v_mean", "lse_shift", "key_bias", "q_mean", "k_mean"):
        if getattr(qkv, name) is not None:
            check_tensor(name, getattr(qkv, name))
    recipe = qkv.recipe
    check_instance("recipe", recipe, Fp8Recipe, "pass the one that the tensors were made by")
    head_dim, seqlen_q, seqlen_k = sizes = as_sizes(**{name: getattr(qkv, name) for name in _SIZES})
    if head_dim % 8 or not 8 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"head_dim is {head_dim}; it must be a multiple of 8 from 8 to {MAX_HEAD_DIM}; quantise "
            "tensors of such a head dim."
        )
    for name in ("q", "k"):
        if getattr(qkv, name).ndim != 4:
            raise ValueError(
                f"{name} has shape {tuple(getattr(qkv, name).shape)}; it must be (batch, seqlen, heads, "
                "head_dim or more); use quantize_qkv or from_fp8."
            )
    (batch, _, heads_q, _), heads_kv = qkv.q.shape, qkv.k.shape[2]
    if heads_kv == 0 or heads_q == 0 or heads_q % heads_kv:
        raise ValueError(
            f"q has {heads_q} heads and k {heads_kv}; the heads of q must be a positive multiple of those of "
            "k; repeat or drop heads."
        )
    codes = torch.int8 if recipe.qk_dtype == "int8" else torch.float8_e4m3fn
    q_groups = {"token": seqlen_q, "block": -(-seqlen_q // Q_BLOCK)}.get(recipe.q_granularity, 1)
    k_groups = {"token": seqlen_k, "block": -(-seqlen_k // K_BLOCK)}.get(recipe.k_granularity, 1)
    for name, shape in (("q", (batch, seqlen_q, heads_q)), ("k", (batch, seqlen_k, heads_kv))):
        t = getattr(qkv, name)
        fits = (t.dtype, t.shape[:3], t.device) == (codes, shape, qkv.q.device) and t.shape[3] >= head_dim
        if not fits or _loadable_rows(t) is not t:
            raise ValueError(
                f"{name} is {t.dtype} of shape {tuple(t.shape)} and strides {t.stride()} on {t.device}; it "
                f"must be {codes} of shape {(*shape, head_dim)} or wider, in rows that start at multiples of "
                f"16 bytes, on {qkv.q.device}; use quantize_qkv or from_fp8."
            )
    wanted: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "v": (torch.float8_e4m3fn, (batch, heads_kv, _tile_d(head_dim) + 1, _padded(seqlen_k))),
        "q_scale": (torch.float32, (batch, heads_q, q_groups)),
        "k_scale": (torch.float32, (batch, heads_kv, k_groups)),
        "v_scale": (torch.float32, (batch, heads_kv, head_dim)),
        "v_mean": (torch.float32, (batch, heads_kv, head_dim)),
        "lse_shift": (torch.float32, (batch, heads_q, seqlen_q)),
        "key_bias": (torch.float32, (batch, heads_q, seqlen_k)),
        "q_mean": (torch.float32, (batch, heads_q, head_dim)),
        "k_mean": (torch.float32, (batch, heads_kv, head_dim)),
    }
    for name, (dtype, shape) in wanted.items():
        t = getattr(qkv, name)
        fits = t is None or (t.dtype, t.shape, t.device) == (dtype, shape, qkv.q.device)
        if fits and (t is None or name in ("q_scale", "k_scale") or t.is_contiguous()):
            continue
        raise ValueError(
            f"{name} is {t.dtype} of shape {tuple(t.shape)} and strides {t.stride()} on {t.device}; it "
            f"must be {dtype} of shape {shape}, contiguous, on {qkv.q.device}; use quantize_qkv or from_fp8."
        )
    scales = {name: nan_if_negative(name, getattr(qkv, name)) for name in ("q_scale", "k_scale")}
    return scales | dict(zip(_SIZES, sizes, strict=True))


@torch.no_grad()
def quantize_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recipe: Fp8Recipe | None = None
) -> QuantizedQKV:
    """Q, K and V in 8 bits by `recipe`, in torch operations; every device gives the same result.

    This is what the kernels must reproduce. `hopper_fa.quantize_qkv` runs the kernels where they can run.

    NaN and infinity stay out of means and scales. In e4m3 they become NaN, and so do the elements that the
    rotation mixes them with, all of the same token. int8 has no NaN: the scale of their group becomes NaN.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim), bfloat16, float16 or float32; head_dim a multiple of 8 up to
            256, heads_q a multiple of heads_kv. Any strides.
        k, v: (batch, seqlen_k, heads_kv, head_dim), dtype and device of q.
        recipe: None means Fp8Recipe.default().

    Raises:
        TypeError: an argument is of another type.
        ValueError: dtypes, devices or shapes that do not fit.
        NotImplementedError: a transform of torch.func or a tangent is in them, which would vanish here.
    """
    refuse_transforms((q, k, v), "quantize_qkv")
    check_tensors(("q", "k", "v"), (q, k, v))
    recipe = Fp8Recipe.default() if recipe is None else recipe
    check_instance("recipe", recipe, Fp8Recipe, "pass Fp8Recipe.default(), another preset or None")
    check_quantizable(q, k, v)
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    heads_kv, head_dim = k.shape[2:]
    group = q.shape[2] // heads_kv
    # (batch, heads, seqlen, head_dim) float32 from here on.
    q32, k32, v32 = (t.transpose(1, 2).float().contiguous() for t in (q, k, v))

    lse_shift = key_bias = q_mean = k_mean = v_mean = signs = None
    if recipe.smooth_k:
        k_mean = token_mean(k32, recipe.stats_shift(seqlen_k))[:, :, None]
        lse_shift = _dot(q32, k_mean.repeat_interleave(group, 1))
    if recipe.smooth_q:
        q_mean = token_mean(q32, recipe.stats_shift(seqlen_q))[:, :, None]
        smoothed = k32 if k_mean is None else k32 - k_mean
        key_bias = _dot(smoothed.repeat_interleave(group, 1), q_mean)
    if recipe.smooth_v:
        v_mean = token_mean(v32, recipe.v_stats_shift(seqlen_k))
        v32 = v32 - v_mean[:, :, None]
    if recipe.rotation == "hadamard":
        signs = rotation_signs(head_dim, recipe.rotation_seed).to(q.device)

    limit = INT8_MAX if recipe.qk_dtype == "int8" else E4M3_MAX
    q_rows, k_rows = smooth_and_rotate(q32, q_mean, signs), smooth_and_rotate(k32, k_mean, signs)
    q_codes, q_scale = _quantize_rows(*q_rows, recipe.q_granularity, Q_BLOCK, limit, group)
    k_codes, k_scale = _quantize_rows(*k_rows, recipe.k_granularity, K_BLOCK, limit)
    v_scale, v_inverse = _v_scale(v32, recipe.v_granularity, recipe.v_stats_shift(seqlen_k))
    v_scaled = v32 * v_inverse[:, :, None]
    v_codes = _to_e4m3(v_scaled)
    if recipe.compensate_v:
        error = v_scale * mean_error(v_scaled, v_codes)
        v_mean = error if v_mean is None else v_mean + error
    return QuantizedQKV.trusted(
        q=_pad_channels(q_codes.transpose(1, 2)),
        k=_pad_channels(k_codes.transpose(1, 2)),
        v=_transposed_v(v_codes.transpose(-1, -2)),
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        v_mean=v_mean,
        lse_shift=lse_shift,
        key_bias=key_bias,
        recipe=recipe,
        head_dim=head_dim,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
        q_mean=None if q_mean is None else q_mean[:, :, 0],
        k_mean=None if k_mean is None else k_mean[:, :, 0],
    )


def check_quantizable(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """What `quantize_qkv` takes.

    Raises:
        ValueError: dtypes, devices or shapes that do not fit.
    """
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    if q.dtype not in dtypes or k.dtype != q.dtype or v.dtype != q.dtype:
        raise ValueError(
            f"q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; all must be torch.bfloat16, all "
            "torch.float16 or all torch.float32; convert them with .to()."
        )
    check_sizes(q, k, v)


@torch.no_grad()
def from_fp8(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_descale: torch.Tensor | None = None,
    k_descale: torch.Tensor | None = None,
    v_descale: torch.Tensor | None = None,
    recipe: Fp8Recipe | None = None,
    *,
    transpose_v: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> QuantizedQKV:
    """Tensors that are in e4m3 already, as FlashAttention-3 takes them; no value is rounded again.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim) float8_e4m3fn, standing for q * q_descale.
        k, v: (batch, seqlen_k, heads_kv, head_dim) float8_e4m3fn. Q and K are used as they are where the last
            dimension is contiguous, the other strides are multiples of 16 and the data is 16-byte aligned;
            otherwise they are copied. V is always rewritten.
        q_descale, k_descale, v_descale: (batch, heads_kv) float32, any strides, or None for 1. One element
            of q_descale is for all query heads that read the key/value head. Those of q and k must not be
            negative: on a GPU, whose values are not waited for, a negative one acts as NaN.
        recipe: of which only linear_exp2, p_offset, rescale_threshold, accumulation and row_sum are free;
            None means Fp8Recipe.fa3().
        transpose_v: brings V into the layout of `QuantizedQKV.v`; None: torch operations do.

    Raises:
        TypeError: an argument is of another type.
        ValueError: dtypes, devices or shapes that do not fit, a negative descale of q or k on a CPU, or a
            recipe that would have to quantise.
    """
    check_tensors(("q", "k", "v"), (q, k, v))
    recipe = _FA3 if recipe is None else recipe
    check_instance("recipe", recipe, Fp8Recipe, "change a copy of Fp8Recipe.fa3(), or pass None")
    if transpose_v is not None and not callable(transpose_v):
        raise TypeError(
            f"transpose_v is {shown(transpose_v)}; it must be a function of V, or None for torch operations; "
            "pass None."
        )
    for name in () if recipe is _FA3 else _FIXED_OF_E4M3:
        if getattr(recipe, name) != getattr(_FA3, name):
            raise ValueError(
                f"recipe is for tensors that are e4m3 already and has {name} {getattr(recipe, name)!r}; it "
                f"must be {getattr(_FA3, name)!r}; change a copy of Fp8Recipe.fa3() with "
                "dataclasses.replace, or pass unquantised tensors."
            )
    check_fp8_shapes(q, k, v)
    q, k, v = resolved(q), resolved(k), resolved(v)
    batch, seqlen_q, heads_q, head_dim = q.shape
    seqlen_k, heads_kv = k.shape[1:3]
    scales = []
    for name, descale in (("q_descale", q_descale), ("k_descale", k_descale), ("v_descale", v_descale)):
        if descale is None:
            scales.append(constant(1.0, 1, q.device)[:1].expand(batch, heads_kv))
        else:
            check_descale(name, descale, k)
            descale = _indexable(resolved(descale))
            scales.append(descale if name == "v_descale" else nan_if_negative(name, descale))
    q_scale, k_scale, v_scale = (scale[..., None] for scale in scales)
    if v_descale is None:
        size = (batch, heads_kv, head_dim)
        v_scale = constant(1.0, math.prod(size), q.device)[: math.prod(size)].view(size)
    else:
        v_scale = v_scale.expand(batch, heads_kv, head_dim).contiguous()
    return QuantizedQKV.trusted(
        q=_loadable_rows(q),
        k=_loadable_rows(k),
        v=_transposed_v(v.permute(0, 2, 3, 1)) if transpose_v is None else transpose_v(v),
        # A view if each key/value head has one query head, or all have one scale.
        q_scale=q_scale.expand(batch, heads_kv, heads_q // heads_kv).reshape(batch, heads_q, 1),
        k_scale=k_scale,
        v_scale=v_scale,
        v_mean=None,
        lse_shift=None,
        key_bias=None,
        recipe=recipe,
        head_dim=head_dim,
        seqlen_q=seqlen_q,
        seqlen_k=seqlen_k,
    )


@functools.lru_cache(maxsize=256)
def sign_bits(head_dim: int, seed: int) -> bytes:
    """The rotation's signs, bit i of byte n set where that of channel 8 n + i is negative; 32 bytes."""
    # NOTE: vmap knows no random numbers, and these are the same for all of its elements.
    with temporarily_clear_interpreter_stack():
        generator = torch.Generator(device="cpu").manual_seed(seed)
        signs = torch.randint(0, 2, (head_dim,), generator=generator, dtype=torch.int64, device="cpu")
        bits = sum((1 - sign) << i for i, sign in enumerate(signs.tolist()))
    return bits.to_bytes(32, "little")


def rotation_signs(head_dim: int, seed: int) -> torch.Tensor:
    """The rotation's random signs: (head_dim,) float32 of +-1 on the CPU, the same on every machine."""
    bits = sign_bits(head_dim, seed)
    signs = [1.0 - 2 * (bits[c // 8] >> c % 8 & 1) for c in range(head_dim)]
    return torch.tensor(signs, dtype=torch.float32, device="cpu")


def smooth_and_rotate(
    x: torch.Tensor, mean: torch.Tensor | None, signs: torch.Tensor | None
) -> tuple[torch.Tensor, float]:
    """x (..., head_dim) float32 without its mean (None: 0), rotated unless signs is None; and a factor left.

    The rotation is the signs, then an orthogonal matrix of Hadamard blocks: the powers of two that head_dim
    is the sum of, largest first (72 = 64 + 8). If head_dim is one block, its factor 1 / sqrt(head_dim) is
    left to the scales; otherwise every element has its block's, and 1 is left. NOTE: x is rotated before the
    rotated mean is subtracted, so that a tensor core can do the first steps on the 16-bit elements.
    """
    if signs is None:
        return (x if mean is None else x - mean), 1.0
    blocks = _hadamard_blocks(x.shape[-1])
    rows = _butterflies(_mix_sixteens(x * signs), blocks, _SIXTEEN)
    if mean is not None:
        rows = rows - _butterflies(mean * signs, blocks, 1)
    if len(blocks) == 1:
        return rows, 1 / math.sqrt(blocks[0])
    norms = [torch.full_like(signs[:size], 1 / math.sqrt(size)) for size in blocks]
    return rows * torch.cat(norms), 1.0


def rotate_back(x: torch.Tensor, signs: torch.Tensor | None) -> torch.Tensor:
    """Rows x (..., head_dim) from the basis of `smooth_and_rotate` to the tensor's own; signs None: x.

    The rotation is orthogonal, so this is its transpose too: gradients go back the same way.
    """
    if signs is None:
        return x
    blocks = _hadamard_blocks(x.shape[-1])
    norms = [x.new_full((size,), 1 / math.sqrt(size)) for size in blocks]
    return _butterflies(x, blocks, 1) * (torch.cat(norms) * signs.to(x.device, x.dtype))


def _hadamard_blocks(head_dim: int) -> list[int]:
    """The powers of two that head_dim is the sum of, largest first."""
    return [1 << bit for bit in reversed(range(head_dim.bit_length())) if head_dim >> bit & 1]


def _butterflies(x: torch.Tensor, blocks: list[int], first: int) -> torch.Tensor:
    """Steps (a, b) -> (a + b, a - b) at distances first, 2 first, ... within blocks of the columns."""
    parts = []
    for part, size in zip(x.split(blocks, -1), blocks, strict=True):
        distance = first
        while distance < size:
            a, b = part.unflatten(-1, (-1, 2, distance)).unbind(-2)
            part = torch.stack((a + b, a - b), -2).flatten(-3)
            distance *= 2
        parts.append(part)
    return torch.cat(parts, -1)


def _mix_sixteens(x: torch.Tensor) -> torch.Tensor:
    """The steps at distances 1, 2, 4 and 8 at once, as a Hopper tensor core adds 16 products of 16 bits.

    Measured (mma.sync m16n8k16, bf16 and fp16, accumulator 0): terms are cut toward zero at 25 bits below the
    exponent of the largest, added exactly, and the sum is cut to float32. The last group is filled up with
    zeros; of an 8-block in it the first 8 sums are right. What meets a NaN or an infinity becomes NaN.
    """
    head_dim = x.shape[-1]
    x = torch.nn.functional.pad(x, (0, -head_dim % _SIXTEEN)).unflatten(-1, (-1, _SIXTEEN))
    largest = x.abs().amax(-1, keepdim=True)
    finite = largest.isfinite()
    # In units of the lowest bit that is kept; frexp's exponent is one above the IEEE one.
    shift = _KEPT_BITS + 1 - torch.where(finite, largest, 0.0).frexp().exponent
    sums = (torch.where(finite, x, 0.0).double() * _power_of_two(shift)).trunc_()
    sums = _butterflies(sums, [_SIXTEEN], 1)
    rounded = sums.float()
    too_large = rounded.double().abs() > sums.abs()
    rounded = torch.where(too_large, rounded.nextafter(torch.zeros_like(rounded)), rounded)
    rounded = (rounded.double() * _power_of_two(-shift)).float()
    return torch.where(finite, rounded, float("nan")).flatten(-2)[..., :head_dim]


def _dot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum over the last dimension of x * y: each product rounded, then `tree_sum`."""
    return tree_sum(x * y, -1)


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    """2**exponent in float64, of integers within its range."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _quantize_rows(
    x: torch.Tensor, norm: float, granularity: str, block: int, limit: float, group: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of x (batch, heads, seqlen, head_dim), same shape, and scales (batch, heads, groups) float32.

    The codes times the scales are x times norm.
    """
    seqlen = x.shape[2]
    if granularity == "none":
        return _to_e4m3(x * norm), x.new_ones(*x.shape[:2], 1)
    shared = granularity not in ("token", "block")
    rows = max(1, seqlen) if shared else {"token": 1, "block": block}[granularity]
    groups = 1 if shared else -(-seqlen // rows)

    def largest(of_rows: torch.Tensor) -> torch.Tensor:
        """Maximum over a group of what is (batch, heads, seqlen) and not negative: (batch, heads, groups)."""
        padded = of_rows.new_zeros(*of_rows.shape[:2], groups * rows)
        padded[..., :seqlen] = of_rows
        of_groups = padded.unflatten(-1, (groups, rows)).amax(-1)
        if granularity == "group":
            of_groups = of_groups.unflatten(1, (-1, group)).amax(2).repeat_interleave(group, 1)
        elif granularity == "tensor" and of_groups.numel():
            of_groups = of_groups.amax().expand(of_groups.shape)
        return of_groups

    finite = x.isfinite()
    scale, inverse = _scale_of(largest(torch.where(finite, x.abs(), 0.0).amax(-1)), limit, norm)
    inverse = inverse.repeat_interleave(rows, -1)[..., :seqlen, None]
    if limit == E4M3_MAX:
        return _to_e4m3(x * inverse), scale
    broken = largest((~finite).any(-1).float()) > 0
    # NOTE: the exact product is rounded, once, as by an FMA that adds 1.5 * 2^23.
    codes = torch.where(finite, x, 0.0).double().mul_(inverse.double()).round_()
    return codes.to(torch.int8), scale.masked_fill(broken, float("nan"))


def _v_scale(v: torch.Tensor, granularity: str, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and inverse of v (batch, heads, seqlen, head_dim), both (batch, heads, head_dim)."""
    batch, heads, seqlen, head_dim = v.shape
    amax = v.new_zeros(batch, heads, head_dim)
    if granularity == "none":
        return torch.ones_like(amax), torch.ones_like(amax)
    sizes = torch.where(v.isfinite(), v.abs(), 0.0)
    if seqlen:
        amax = sizes.amax(2)
    if granularity == "head":
        amax = amax.amax(-1, keepdim=True).expand(amax.shape)
    elif granularity == "tensor" and amax.numel():
        amax = amax.amax().expand(amax.shape)
    scale, inverse = _scale_of(amax, E4M3_MAX)
    if shift == 0:
        return scale, inverse
    of_sample = sizes[:, :, sampled_tokens(seqlen, shift).to(v.device)].amax(2)
    sample = _scale_of(of_sample.clamp(min=_SMALLEST_AMAX), E4M3_MAX / _HEADROOM)
    outgrown = amax * sample[1] >= _SATURATES
    return torch.where(outgrown, scale, sample[0]), torch.where(outgrown, inverse, sample[1])


def _scale_of(amax: torch.Tensor, limit: float, norm: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """(amax * norm / limit, limit / amax); both 1 where amax is below 2**-100, so that the codes become 0."""
    zero = amax < _SMALLEST_AMAX
    # NOTE: torch divides by (CUDA) or into (everywhere) a Python number by way of a rounded reciprocal.
    limits = torch.full_like(amax, limit)
    norms = torch.full_like(amax, norm)
    return (amax * norms / limits).masked_fill(zero, 1.0), (limits / amax).masked_fill(zero, 1.0)


def _to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """x float32 to the nearest e4m3, ties to even, saturating at 448; NaN and infinity to the code 0x7f."""
    x = torch.where(x.isfinite(), x.clamp(-E4M3_MAX, E4M3_MAX), float("nan"))
    return x.to(torch.float8_e4m3fn)


def _padded(size: int) -> int:
    """`size` rounded up to PITCH."""
    return -(-size // PITCH) * PITCH


def _tile_d(head_dim: int) -> int:
    """The smallest of 64, 128, 256 that holds head_dim."""
    return max(64, 1 << (head_dim - 1).bit_length())


def _pad_channels(codes: torch.Tensor) -> torch.Tensor:
    """(batch, seqlen, heads, head_dim) 8-bit codes, zeros after head_dim up to a multiple of PITCH."""
    padded = codes.new_zeros(*codes.shape[:3], _padded(codes.shape[3]), dtype=torch.uint8)
    padded[..., : codes.shape[3]] = codes.view(torch.uint8)
    return padded.view(codes.dtype)


def _loadable_rows(codes: torch.Tensor) -> torch.Tensor:
    """(batch, seqlen, heads, head_dim) 8-bit codes, or a copy of them if TMA cannot load them where they are.

    The rows of a copy are a multiple of PITCH bytes apart, with anything between them: the kernel's tensor
    maps end at head_dim, past which TMA fills in zeros.
    """
    batch, row, head, last = codes.stride()
    aligned = last == 1 and codes.data_ptr() % PITCH == 0
    if aligned and (batch | row | head) % PITCH == 0:
        return codes
    # The stride of a dimension of size 1 is never used, but the kernel refuses an odd one.
    strides = [s if n > 1 else 0 for s, n in zip(codes.stride()[:3], codes.shape[:3], strict=True)]
    if aligned and all(stride % PITCH == 0 for stride in strides):
        return codes.as_strided(codes.shape, (*strides, 1))
    head_dim = codes.shape[3]
    rows = codes.new_empty(*codes.shape[:3], -(-head_dim // PITCH) * PITCH)[..., :head_dim]
    return rows.copy_(codes)


def _indexable(scale: torch.Tensor) -> torch.Tensor:
    """scale, or a copy of it if its elements lie too far apart for the kernel's int32 offsets."""
    span = sum(size * stride for size, stride in zip(scale.shape, scale.stride(), strict=True))
    return scale if span < 2**31 else scale.clone(memory_format=torch.contiguous_format)


def _transposed_v(codes: torch.Tensor) -> torch.Tensor:
    """(batch, heads, head_dim, seqlen) e4m3 codes in the layout of QuantizedQKV.v."""
    batch, heads, head_dim, seqlen = codes.shape
    tile_d = _tile_d(head_dim)
    rows = codes.new_zeros(batch, heads, tile_d + 1, _padded(seqlen), dtype=torch.uint8)
    rows[:, :, :head_dim, :seqlen] = codes.view(torch.uint8)
    rows[:, :, tile_d, :seqlen] = _CODE_OF_ONE
    return _permute_keys(rows).view(codes.dtype)


def _permute_keys(x: torch.Tensor) -> torch.Tensor:
    """Among every 16 of the last dimension, element 8 h + 2 t + i to position 4 t + 2 h + i."""
    return x.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).contiguous().flatten(-4)


def _unpermute_keys(x: torch.Tensor) -> torch.Tensor:
    """The inverse of `_permute_keys`."""
    return x.unflatten(-1, (-1, 4, 2, 2)).transpose(-3, -2).contiguous().flatten(-4)
