"""Which backend runs a call, and the sentence a user reads when none can. Nothing falls back silently."""

import functools
import os
from collections.abc import Sequence

import torch

from hopper_fa import emulator, emulator_backward, emulator_fp8, kernels, quantize_kernels, reference
from hopper_fa.quantization import (
    PITCH,
    QuantizedQKV,
    check_quantizable,
    from_fp8,
    quantize_qkv,
    sign_bits,
)
from hopper_fa.recipe import Fp8Recipe
from hopper_fa.validation import (
    check_backward,
    check_forward,
    check_fp8_shapes,
    check_out_dtype,
    check_shapes,
    check_softmax,
    loadable,
    resolved,
)

BACKENDS = ("auto", "cuda", "emulator", "reference")
ENVIRONMENT_VARIABLE = "HOPPER_FA_BACKEND"


def unpack(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, as views, of (q, k, v), of (q, kv) or of (qkv,); packed ones have them in dimension 2."""
    if len(tensors) == 3:
        return tuple(tensors)
    *q, packed = tensors
    return (*q, *packed.unbind(2))


def run_forward(
    tensors: Sequence[torch.Tensor],
    softmax_scale: float | None,
    causal: bool,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the inputs, choose the backend and compute attention on it.

    Args:
        tensors: see `unpack`.

    Returns:
        out: as q, contiguous; lse: (batch, heads_q, seqlen_q) float32, contiguous.

    Raises:
        TypeError, ValueError: see `validation.check_forward`; unknown backend.
        RuntimeError: the backend cannot run on the tensors' device, or has no kernel for them.
    """
    q, k, v = map(resolved, unpack(tensors))
    check_forward(q, k, v, softmax_scale, causal)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    name = resolve(backend, q.device)
    if name == "cuda":
        batch, seqlen_q, heads_q, _ = q.shape
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)
        if batch and seqlen_q:
            kernels.forward(q, k, v, out, lse, softmax_scale, causal)
        return out, lse
    attention = emulator.attention_emulated if name == "emulator" else reference.attention_reference
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        out, lse = attention(q, k, v, softmax_scale, causal)
    return out.to(q.dtype).contiguous(), lse.float().contiguous()


def run_backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    backend: str | None,
    recipe: Fp8Recipe | None = None,
) -> list[torch.Tensor]:
    """Gradients of what `run_forward` or, with a recipe, `run_recipe` computed.

    A recipe's are those of attention over the dequantised tensors, straight through the rounding. The tensors
    are quantised once more, to the same bits; `run_backward_quantized` does without that.

    Args:
        dout, dlse: gradients of out and lse; dlse None is zero.
        tensors, softmax_scale, causal, backend: of the forward. out, lse: its results. All tensors in any
            layout, for hooks on saved tensors may hand them back in another one: what the kernels cannot load
            is copied.
        deterministic: the same bits every time; torch.use_deterministic_algorithms asks for it too.

    Returns:
        a contiguous gradient for every one of `tensors`.

    Raises:
        as `run_forward`, but for layouts; ValueError: see `validation.check_backward`.
    """
    q, k, v = map(resolved, unpack(tensors))
    check_shapes(q, k, v)
    check_softmax(softmax_scale, causal)
    check_backward(dout, dlse, q, out, lse)
    if recipe is not None:
        qkv = quantize_inputs(tensors, softmax_scale, causal, backend, recipe, any_layout=True)
        if qkv is not None:
            options = (softmax_scale, causal, deterministic, backend)
            return run_backward_quantized(dout, dlse, qkv, len(tensors), out, lse, *options)
    dout, out, lse = resolved(dout), resolved(out), resolved(lse)
    dlse = None if dlse is None else resolved(dlse)
    q, k, v = loadable(q), loadable(k), loadable(v)
    if softmax_scale is None:
        softmax_scale = q.shape[-1] ** -0.5
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    gradients = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in tensors]
    results = unpack(gradients)
    name = resolve(backend, q.device)
    if name == "cuda":
        dlse = None if dlse is None else dlse.contiguous()
        inputs = (loadable(dout), q, k, v, loadable(out), lse.contiguous(), dlse)
        kernels.backward(*inputs, *results, softmax_scale, causal, deterministic)
        return gradients
    differentiate = (
        emulator_backward.gradients_emulated if name == "emulator" else reference.gradients_reference
    )
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        computed = differentiate(dout, dlse, q, k, v, out, lse, softmax_scale, causal)
        for result, gradient in zip(results, computed, strict=True):
            result.copy_(gradient)
    return gradients


def run_recipe(
    tensors: Sequence[torch.Tensor],
    softmax_scale: float | None,
    causal: bool,
    backend: str | None,
    recipe: Fp8Recipe,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`run_forward` with Q, K and V quantised by `recipe`; the backend "reference" leaves them as they are.

    Raises:
        TypeError, ValueError: see `validation.check_forward`; unknown backend.
        RuntimeError: the backend has no kernel for it.
    """
    qkv = quantize_inputs(tensors, softmax_scale, causal, backend, recipe)
    if qkv is None:
        return run_forward(tensors, softmax_scale, causal, "reference")
    return run_quantized(qkv, softmax_scale, causal, tensors[0].dtype, backend)


def quantize_inputs(
    tensors: Sequence[torch.Tensor],
    softmax_scale: float | None,
    causal: bool,
    backend: str | None,
    recipe: Fp8Recipe,
    any_layout: bool = False,
) -> QuantizedQKV | None:
    """What `run_recipe` runs on; None for the backend "reference", which leaves the tensors as they are.

    Args:
        any_layout: strides and alignment may be what a call refuses; then they are copied.

    Raises: as `run_recipe`.
    """
    q, k, v = map(resolved, unpack(tensors))
    if any_layout:
        check_shapes(q, k, v)
        check_softmax(softmax_scale, causal)
    else:
        check_forward(q, k, v, softmax_scale, causal)
    name = resolve_fp8(backend, q.device)
    if name == "reference":
        return None
    quantize = quantize_kernels.quantize_qkv if name == "cuda" else quantize_qkv
    return quantize(q, k, v, recipe)


def check_differentiable(recipe: Fp8Recipe, backend: str | None) -> None:
    """Raise NotImplementedError if the backend has no gradient for calls by the recipe."""
    problem = kernels.quantized_backward_problem(recipe)
    if problem is not None and _asked_for(backend) in ("auto", "cuda"):
        raise NotImplementedError(
            f"a gradient by a recipe with smooth_q {recipe.smooth_q} and k_granularity "
            f"{recipe.k_granularity!r} was asked for; the backward kernels take {problem}; change it, "
            f'call under torch.no_grad(), or ask for the slow emulation with backend="emulator" or '
            f"{ENVIRONMENT_VARIABLE}=emulator."
        )


def gradient_shapes(qkv: QuantizedQKV, packing: int) -> list[tuple[int, ...]]:
    """Shapes of the tensors that qkv was made of, which were 3, 2 or 1: see `unpack`."""
    batch, _, heads_q, _ = qkv.q.shape
    heads_kv, d = qkv.k.shape[2], qkv.head_dim
    q, k = (batch, qkv.seqlen_q, heads_q, d), (batch, qkv.seqlen_k, heads_kv, d)
    if packing == 3:
        return [q, k, k]
    kv = (batch, qkv.seqlen_k, 2, heads_kv, d)
    return [q, kv] if packing == 2 else [(batch, qkv.seqlen_q, 3, heads_q, d)]


def run_backward_quantized(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    qkv: QuantizedQKV,
    packing: int,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float | None,
    causal: bool,
    deterministic: bool,
    backend: str | None,
) -> list[torch.Tensor]:
    """`run_backward` of a call by a recipe, from the codes that its forward made.

    Args:
        qkv: what the forward ran on. packing: of how many tensors it was made, see `unpack`.

    Raises:
        ValueError, RuntimeError: as `run_backward`.
        NotImplementedError: see `check_differentiable`.
    """
    check_backward(dout, dlse, out, out, lse)
    batch, seqlen_q, heads_q, width = qkv.q.shape
    whole = -(-qkv.head_dim // PITCH) * PITCH
    if out.shape != (batch, seqlen_q, heads_q, qkv.head_dim) or not width == qkv.k.shape[3] == whole:
        raise ValueError(
            f"out has shape {tuple(out.shape)} and the codes of q and k {width} and {qkv.k.shape[3]} "
            f"columns; they must be {(batch, seqlen_q, heads_q, qkv.head_dim)} and {whole}; pass what the "
            "forward returned and what quantize_qkv made."
        )
    check_differentiable(qkv.recipe, backend)
    dout, out, lse = resolved(dout), resolved(out), resolved(lse)
    dlse = None if dlse is None else resolved(dlse)
    if softmax_scale is None:
        softmax_scale = qkv.head_dim**-0.5
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    shapes = gradient_shapes(qkv, packing)
    gradients = [torch.empty(shape, dtype=out.dtype, device=out.device) for shape in shapes]
    results = unpack(gradients)
    if resolve_fp8(backend, out.device) == "cuda":
        qkv = qkv.contiguous()
        dlse = None if dlse is None else dlse.contiguous()
        signs = sign_bits(qkv.head_dim, qkv.recipe.rotation_seed)
        inputs = (loadable(dout), qkv, loadable(out), lse.contiguous(), dlse)
        kernels.backward_quantized(*inputs, *results, softmax_scale, causal, deterministic, signs)
        return gradients
    with torch.no_grad(), torch.autocast(out.device.type, enabled=False):
        computed = emulator_backward.gradients_quantized_emulated(
            dout, dlse, qkv, out, lse, softmax_scale, causal
        )
        for result, gradient in zip(results, computed, strict=True):
            result.copy_(gradient)
    return gradients


def run_e4m3(
    tensors: Sequence[torch.Tensor],
    descales: Sequence[torch.Tensor | None],
    softmax_scale: float | None,
    causal: bool,
    backend: str | None,
    recipe: Fp8Recipe | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over tensors that are float8_e4m3fn, in bfloat16, by `from_fp8`; see `run_quantized`.

    Args:
        tensors: see `unpack`. descales: of Q, K and V.

    Raises:
        TypeError, ValueError: see `from_fp8`; an argument the kernels do not take; unknown backend.
        RuntimeError: the backend has no kernel for it.
    """
    q, k, v = unpack(tensors)
    check_fp8_shapes(q, k, v)
    check_softmax(softmax_scale, causal)
    name = resolve_fp8(backend, q.device)
    transpose_v = quantize_kernels.transpose_v if name == "cuda" else None
    qkv = from_fp8(q, k, v, *descales, recipe, transpose_v=transpose_v)
    return run_quantized(qkv, softmax_scale, causal, torch.bfloat16, name)


def run_quantize(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recipe: Fp8Recipe | None, backend: str | None
) -> QuantizedQKV:
    """`quantization.quantize_qkv` by what `resolve_quantize` says.

    Raises:
        ValueError: see `quantization.check_quantizable`, `resolve_quantize`.
        RuntimeError: see `resolve_quantize`.
    """
    check_quantizable(q, k, v)
    if resolve_quantize(backend, q.device, q.dtype) == "cuda":
        return quantize_kernels.quantize_qkv(q, k, v, recipe)
    return quantize_qkv(q, k, v, recipe)


def run_quantized(
    qkv: QuantizedQKV,
    softmax_scale: float | None,
    causal: bool,
    out_dtype: torch.dtype,
    backend: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over quantised tensors; the backend "reference" is float64 on what they stand for.

    Returns:
        out: (batch, seqlen_q, heads_q, head_dim) in out_dtype, contiguous; lse as in `run_forward`.

    Raises:
        TypeError, ValueError: an argument the kernels do not take; unknown backend.
        RuntimeError: the backend has no kernel for it.
    """
    check_softmax(softmax_scale, causal)
    check_out_dtype(out_dtype)
    name = resolve_fp8(backend, qkv.q.device)
    if name == "cuda":
        batch, seqlen_q, heads_q, _ = qkv.q.shape
        out = qkv.q.new_empty((batch, seqlen_q, heads_q, qkv.head_dim), dtype=out_dtype)
        lse = qkv.q.new_empty((batch, heads_q, seqlen_q), dtype=torch.float32)
        if batch and seqlen_q:
            scale = qkv.head_dim**-0.5 if softmax_scale is None else softmax_scale
            kernels.forward_fp8(qkv, out, lse, scale, causal)
        return out, lse
    with torch.no_grad(), torch.autocast(qkv.q.device.type, enabled=False):
        if name == "emulator":
            return emulator_fp8.attention_fp8_emulated(qkv, softmax_scale, causal, out_dtype)
        out, lse = emulator_fp8.attention_dequantized(qkv, softmax_scale, causal)
    return out.to(out_dtype).contiguous(), lse.float().contiguous()


def resolve_fp8(backend: str | None, device: torch.device) -> str:
    """The backend, "cuda", "emulator" or "reference", that runs a call in FP8; see `resolve`.

    Raises:
        ValueError: unknown backend.
        RuntimeError: the CUDA kernels were asked for, or nothing else was, and this build has none for FP8
            or `device` is not a Hopper GPU.
    """
    name = _asked_for(backend)
    if name == "auto" or name == "cuda":
        if kernels.HAS_FP8:
            return resolve(backend, device)
        raise RuntimeError(
            "this build of hopper_fa holds no FP8 kernel (HOPPER_FA_DTYPES left them out); ask for the slow "
            f'emulation of one with backend="emulator" or {ENVIRONMENT_VARIABLE}=emulator.'
        )
    return name


def resolve_quantize(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """What quantises tensors of `device`: "cuda", the kernels, or "emulator", torch operations.

    The backend "reference" quantises as the emulator does. If none is asked for, CUDA devices have the
    kernels, and all others torch operations, the only ones there.

    Raises:
        ValueError: unknown backend, or a dtype that the kernels do not take.
        RuntimeError: `device` is not a Hopper GPU, or this build holds no quantisation kernels for the dtype.
    """
    name = _asked_for(backend)
    if name == "emulator" or name == "reference" or (name == "auto" and device.type != "cuda"):
        return "emulator"
    resolve(name, device)
    if dtype not in kernels.DTYPE_NAMES:
        raise ValueError(
            f"q, k, v are {dtype} on {device}; the quantisation kernels take torch.bfloat16 and "
            "torch.float16; convert them with .to(torch.bfloat16), or ask for the slow torch operations with "
            f'backend="emulator" or {ENVIRONMENT_VARIABLE}=emulator.'
        )
    if kernels.DTYPE_NAMES[dtype] not in quantize_kernels.DTYPES:
        held = [str(t) for t, name in kernels.DTYPE_NAMES.items() if name in quantize_kernels.DTYPES]
        remedy = f"convert them with .to({held[0]})" if held else "rebuild it"
        raise RuntimeError(
            f"q, k, v are {dtype}; this build of hopper_fa holds quantisation kernels for "
            f"{' and '.join(held) or 'no dtype'} (HOPPER_FA_DTYPES); {remedy}, or ask for the slow torch "
            f'operations with backend="emulator" or {ENVIRONMENT_VARIABLE}=emulator.'
        )
    return "cuda"


def resolve(backend: str | None, device: torch.device) -> str:
    """The backend, "cuda", "emulator" or "reference", that runs a call on tensors of `device`.

    Args:
        backend: one of BACKENDS; None means the environment variable HOPPER_FA_BACKEND, or "auto".

    Raises:
        ValueError: unknown backend.
        RuntimeError: the CUDA kernels were asked for, or nothing else was, and `device` is not a Hopper GPU.
    """
    name = _asked_for(backend)
    if name == "auto" or name == "cuda":
        if device.type == "cuda" and _is_hopper(device.index):
            return "cuda"
        raise RuntimeError(_no_kernel_sentence(device))
    return name


def _asked_for(backend: str | None) -> str:
    name = backend or os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in BACKENDS:
        raise ValueError(
            f"backend is {name!r}; allowed are {', '.join(BACKENDS)}; pass one as backend= or in "
            f"{ENVIRONMENT_VARIABLE}."
        )
    return name


@functools.cache
def _is_hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) == (9, 0)


def _no_kernel_sentence(device: torch.device) -> str:
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        major, minor = torch.cuda.get_device_capability(device)
        found = f"{device} ({name}, compute capability {major}.{minor})"
    else:
        found = str(device)
    return (
        f"q, k, v are on {found}; the kernels run on Hopper GPUs (compute capability 9.0) only; move the "
        'tensors to one, or ask for the slow emulation of the kernels with backend="emulator" or '
        f"{ENVIRONMENT_VARIABLE}=emulator."
    )
