"""Every public function as a call without arguments: for tests of what surrounds a call."""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
from cases import FP8_PRESETS, Case
from torch import Tensor

from hopper_fa import (
    Fp8Recipe,
    QuantizedQKV,
    attention_reference,
    build_info,
    error_metrics,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_quantized_func,
    merge_attention,
    quantize_qkv,
)
from hopper_fa.accuracy import DISTRIBUTIONS, random_qkv, unfused_attention
from hopper_fa.accuracy_fp8 import study_inputs
from hopper_fa.tensor_core import PROBE_INPUTS, probe_operands

E4M3 = torch.float8_e4m3fn

# Without a batch entry, a query, a key, and both.
EMPTY_CASES = (Case(batch=0), Case(seqlen_q=0), Case(seqlen_k=0), Case(seqlen_q=0, seqlen_k=0))

# What torch makes tensors of where a call does not say so, and where: a dtype, a device context, or a default
# device.
AMBIENTS: dict[str, torch.dtype | str] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "in cpu": "cpu",
    "in cuda": "cuda",
    "in meta": "meta",
    "default device": "default meta",
}


@contextmanager
def ambient(what: torch.dtype | str) -> Iterator[None]:
    """One of AMBIENTS inside."""
    if isinstance(what, str) and not what.startswith("default "):
        with torch.device(what):
            yield
        return
    dtype = torch.get_default_dtype()
    try:
        if isinstance(what, torch.dtype):
            torch.set_default_dtype(what)
        else:
            torch.set_default_device(what.removeprefix("default "))
        yield
    finally:
        torch.set_default_dtype(dtype)
        if isinstance(what, str):
            torch.set_default_device(None)


@contextmanager
def deterministic_algorithms(warn_only: bool) -> Iterator[None]:
    """torch.use_deterministic_algorithms inside; every warning is an error."""
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@dataclass(frozen=True)
class Inputs:
    """q, k, v and dout in one 16-bit dtype; dlse; descales for q, k and v in e4m3; all on one device."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    dlse: Tensor
    q_descale: Tensor
    k_descale: Tensor
    v_descale: Tensor
    causal: bool

    @classmethod
    def random(
        cls, case: Case, seed: int, device: str = "cpu", dtype: torch.dtype = torch.bfloat16
    ) -> "Inputs":
        """Of a seed the same values on every device. The seqlen_k of `case` is at least 2."""
        q, k, v = case.qkv(dtype, seed)
        generator = torch.Generator("cpu").manual_seed(seed + 1)

        def normal(*size: int) -> Tensor:
            return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")

        batch, seqlen_q, heads_q, _ = q.shape
        descales = [normal(batch, k.shape[2]).exp() for _ in range(3)]
        tensors = (q, k, v, normal(*q.shape).to(dtype), normal(batch, heads_q, seqlen_q), *descales)
        return cls(*(t.to(device) for t in tensors), case.causal)

    def map(self, change: Callable[[Tensor], Tensor]) -> "Inputs":
        """The same with `change` of every tensor in its place."""
        values = (getattr(self, field.name) for field in fields(self))
        return Inputs(*(change(t) if isinstance(t, Tensor) else t for t in values))

    def in_e4m3(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v; lazily negated where those are."""
        return tuple(
            lazily_negated(t.resolve_neg().to(E4M3)) if t.is_neg() else t.to(E4M3)
            for t in (self.q, self.k, self.v)
        )


def lazily_negated(t: Tensor) -> Tensor:
    """A view with the values of t, whose memory holds their negation."""
    negated = (t.view(torch.uint8) ^ 0x80).view(E4M3) if t.dtype == E4M3 else -t
    return torch._neg_view(negated)


def public_calls(
    inputs: Inputs, backend: str, recipes: Mapping[str, Fp8Recipe] = FP8_PRESETS, deterministic: bool = True
) -> dict[str, Callable[[], Any]]:
    """Name -> a call of everything that hopper_fa exports, with gradients where it has some.

    Args:
        backend: "cuda", "emulator" or "reference".
        recipes: what the backend runs at the inputs' head dim.
        deterministic: the argument of flash_attn_func.
    """
    q, k, v = inputs.q, inputs.k, inputs.v
    options = {"causal": inputs.causal, "return_lse": True, "backend": backend}
    exact = options | {"deterministic": deterministic}
    descales = {name: getattr(inputs, name) for name in ("q_descale", "k_descale", "v_descale")}
    codes = inputs.in_e4m3()
    half = k.shape[1] // 2
    packed = torch.stack((k, k, v), 2), torch.stack((k, v), 2)
    if k.is_neg():
        packed = tuple(lazily_negated(t) for t in packed)
    qkv, kv = packed

    def train(
        function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor, **named: Any
    ) -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in tensors]
        results = function(*leaves, **named)
        # Packed Q, K and V may have other heads and rows than Q, so their results are their own gradients.
        fits = results[0].shape == q.shape
        grads = (inputs.dout, inputs.dlse) if fits else [t.detach().clone() for t in results]
        return *results, *torch.autograd.grad(results, leaves, grads)

    def merge() -> tuple[Tensor, Tensor]:
        parts = [(k[:, :half], v[:, :half]), (k[:, half:], v[:, half:])]
        unmasked = options | {"causal": False}
        outs, lses = zip(*(flash_attn_func(q, *part, **unmasked) for part in parts), strict=True)
        return merge_attention(outs, lses)

    calls: dict[str, Callable[[], Any]] = {
        "forward": lambda: flash_attn_func(q, k, v, **exact),
        "gradients": lambda: train(flash_attn_func, q, k, v, **exact),
        "qkvpacked": lambda: train(flash_attn_qkvpacked_func, qkv, **exact),
        "kvpacked": lambda: train(flash_attn_kvpacked_func, q, kv, **exact),
        "e4m3": lambda: flash_attn_func(*codes, **options),
        "e4m3 with descales": lambda: flash_attn_func(*codes, **descales, **options),
        "merge": merge,
        "error_metrics": lambda: error_metrics(q, q.float() + inputs.dout),
        "build_info": build_info,
    }
    for name, recipe in recipes.items():
        calls |= {
            f"recipe {name}": lambda r=recipe: train(flash_attn_func, q, k, v, recipe=r, **exact),
            f"quantize {name}": lambda r=recipe: tensors_of(quantize_qkv(q, k, v, r)),
            f"quantized {name}": lambda r=recipe: flash_attn_quantized_func(
                quantize_qkv(q, k, v, r), **options
            ),
        }
    return calls


def torch_calls(inputs: Inputs, device: str) -> dict[str, Callable[[], Any]]:
    """Name -> a call of what is torch operations on any device, matrix products among them, and of inputs."""
    q, k, v, causal = inputs.q, inputs.k, inputs.v, inputs.causal
    sizes = (1, 5, 7, 2, 1, 24)

    def reference() -> tuple[Tensor, ...]:
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        results = attention_reference(*leaves, causal=causal)
        grads = inputs.dout.double(), inputs.dlse.double()
        return *results, *torch.autograd.grad(results, leaves, grads)

    calls: dict[str, Callable[[], Any]] = {
        "attention_reference": reference,
        "unfused_attention": lambda: unfused_attention(q, k, v, causal=causal),
    }
    for distribution in DISTRIBUTIONS:
        calls[f"random_qkv {distribution}"] = lambda d=distribution: random_qkv(
            *sizes, dtype=torch.float32, device=device, distribution=d
        )
    for kind in ("normal", "qk_bias", "long"):
        calls[f"study_inputs {kind}"] = lambda kind=kind: study_inputs(kind, 3, 5, device=device)
    for name in PROBE_INPUTS:
        calls[f"probe_operands {name}"] = lambda name=name: probe_operands(
            name, 1, 64, torch.Generator(device).manual_seed(1)
        )
    return calls


def tensors_of(qkv: QuantizedQKV) -> dict[str, Tensor]:
    values = {field.name: getattr(qkv, field.name) for field in fields(qkv)}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def results_of(calls: Mapping[str, Callable[[], Any]]) -> dict[str, Any]:
    return {name: call() for name, call in calls.items()}


def assert_same_results(got: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Bit for bit, with dtypes and devices; every tensor's memory holds its values."""
    wrong = [name for name in want if not _same(got[name], want[name])]
    assert got.keys() == want.keys() and not wrong, f"{wrong} gave other results"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and not a.is_neg()
        return alike and torch.equal(_bytes(a), _bytes(b))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


def _bytes(t: Tensor) -> Tensor:
    return t.detach().contiguous().flatten().view(torch.uint8)
