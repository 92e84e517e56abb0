"""FP8 forward attention of ours and of others, as adapters like those of peers.py.

All of them get the same 16-bit tensors and quantise them before the timed part, the others with one e4m3
scale a tensor, which is what they take without more work. What is timed is attention on quantised tensors;
of hopper_fa_end_to_end, quantisation and attention.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from peers import Call, Peer, _fa2, _hopper_fa, _version, build_graph, graph_call, heads_layout, reason
from shapes import Shape

from hopper_fa import Fp8Recipe, kernels, quantize_qkv

TOLERANCE = 0.12  # FP8 attention of normal inputs is 4e-2 to 7e-2 from 16 bits; a wrong layout about 1
E4M3_MAX = 448.0


def _quantize(t: torch.Tensor) -> tuple[torch.Tensor, float]:
    """One e4m3 scale for the tensor: codes, and the factor that takes them back."""
    descale = t.abs().amax().float().item() / E4M3_MAX
    return (t.float() / descale).to(torch.float8_e4m3fn), descale


def fp8_peer(name: str, recipe: Fp8Recipe, variant: str | None = None, end_to_end: bool = False) -> Peer:
    """Our kernel on one row of the tile table.

    Args:
        recipe: by which tensors are quantised: beforehand, or with end_to_end in every call.
        variant: row of the tile table; None: the recipe's.
    """
    if not kernels.HAS_FP8:
        raise RuntimeError("this build of hopper_fa holds no FP8 kernel")

    def prepare(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        beforehand = None if end_to_end else quantize_qkv(q, k, v, recipe)
        out = torch.empty_like(q)
        size = (shape.batch, shape.heads, shape.seqlen)
        lse = torch.empty(size, dtype=torch.float32, device=q.device)

        def call() -> torch.Tensor:
            qkv = quantize_qkv(q, k, v, recipe) if end_to_end else beforehand
            kernels.forward_fp8(qkv, out, lse, shape.head_dim**-0.5, shape.causal, variant)
            return out

        return call

    return Peer(name, _version("hopper-fa", "hopper_fa"), prepare, TOLERANCE)


def _fa3() -> Peer:
    importlib.import_module("flash_attn_interface")  # registers torch.ops.flash_attn_3
    forward = torch.ops.flash_attn_3.fwd

    def prepare(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        (q, q_descale), (k, k_descale), (v, v_descale) = map(_quantize, (q, k, v))
        size = (shape.batch, shape.heads_kv)
        descales = (q_descale, k_descale, v_descale)
        scales = [torch.full(size, x, dtype=torch.float32, device=q.device) for x in descales]
        named = dict(zip(("q_descale", "k_descale", "v_descale"), scales, strict=True))
        scale = shape.head_dim**-0.5
        return lambda: forward(q, k, v, softmax_scale=scale, is_causal=shape.causal, num_splits=1, **named)[0]

    return Peer("fa3", _version("flash-attn-3", "flash_attn_3", "tokenspeed-fa3"), prepare, TOLERANCE)


def _vllm() -> Peer:
    """vLLM's fork of FlashAttention-3, which accumulates in two levels; by its bare operator."""
    forward = importlib.import_module("fa3_vllm").fwd

    def prepare(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        (q, q_descale), (k, k_descale), (v, v_descale) = map(_quantize, (q, k, v))
        size = (shape.batch, shape.heads_kv)
        descales = (q_descale, k_descale, v_descale)
        scales = tuple(torch.full(size, x, dtype=torch.float32, device=q.device) for x in descales)
        s = shape.seqlen
        bounds = torch.arange(0, (shape.batch + 1) * s, s, dtype=torch.int32, device=q.device)
        return lambda: forward(q, k, v, bounds, bounds, s, s, causal=shape.causal, descales=scales)[0]

    return Peer("vllm", _version("vllm"), prepare, TOLERANCE)


class CudnnFp8Forward:
    """cuDNN's FP8 attention as a graph of nvidia-cudnn-frontend, 16-bit output."""

    def __init__(self, shape: Shape, handle: object) -> None:
        import cudnn

        self.handle = handle
        e4m3, fp32 = cudnn.data_type.FP8_E4M3, cudnn.data_type.FLOAT
        graph = cudnn.pygraph(
            handle=handle, io_data_type=e4m3, intermediate_data_type=fp32, compute_data_type=fp32
        )

        self.inputs = [
            graph.tensor(name=name, data_type=e4m3, **heads_layout(shape, heads))
            for name, heads in (("q", shape.heads), ("k", shape.heads_kv), ("v", shape.heads_kv))
        ]
        names = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")
        self.scales = {
            name: graph.tensor(name=name, dim=[1] * 4, stride=[1] * 4, data_type=fp32) for name in names
        }
        out, stats, amax_s, amax_o = graph.sdpa_fp8(
            **dict(zip("qkv", self.inputs, strict=True)),
            **self.scales,
            attn_scale=1 / math.sqrt(shape.head_dim),
            use_causal_mask=shape.causal,
            generate_stats=True,
            name="sdpa_fp8",
        )
        whole = heads_layout(shape, shape.heads)
        out.set_output(True).set_dim(whole["dim"]).set_stride(whole["stride"]).set_data_type(e4m3)
        b, h, s = shape.batch, shape.heads, shape.seqlen
        stats.set_output(True).set_dim([b, h, s, 1]).set_stride([h * s, s, 1, 1]).set_data_type(fp32)
        for amax in (amax_s, amax_o):
            amax.set_output(True).set_dim([1] * 4).set_stride([1] * 4).set_data_type(fp32)
        build_graph(graph)
        self.graph, self.outputs = graph, (out, stats, amax_s, amax_o)

    def bind(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, descales: list[float]) -> Call:
        """The call on e4m3 tensors. Its e4m3 output counts in units of 1, which the check can read."""
        batch, seqlen, heads, _ = q.shape

        def number(x: float, *shape: int) -> torch.Tensor:
            return torch.full(shape or (1, 1, 1, 1), x, dtype=torch.float32, device=q.device)

        out = torch.empty_like(q)
        tensors = dict(zip(self.inputs, (q, k, v), strict=True))
        # P in [0, 1] times 256, as FlashAttention-3 has it.
        values = (*descales, 1 / 256, 256.0, 1.0)
        tensors |= {t: number(x) for t, x in zip(self.scales.values(), values, strict=True)}
        written = (out, number(0.0, batch, heads, seqlen, 1), number(0.0), number(0.0))
        tensors |= dict(zip(self.outputs, written, strict=True))
        return graph_call(self.graph, self.handle, tensors, out)


def _cudnn() -> Peer:
    import cudnn

    handle = cudnn.create_handle()

    def prepare(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        (q, q_descale), (k, k_descale), (v, v_descale) = map(_quantize, (q, k, v))
        return CudnnFp8Forward(shape, handle).bind(q, k, v, [q_descale, k_descale, v_descale])

    version = f"cuDNN {cudnn.backend_version()}, {_version('nvidia-cudnn-frontend')}"
    # NOTE: its output is e4m3 too, and long averages of normal V lie among e4m3's denormals.
    return Peer("cudnn", version, prepare, 1.0)


def _ours_16_bit() -> Peer:
    return replace(_hopper_fa(), name="hopper_fa_bf16")


BUILDERS: dict[str, Callable[[], Peer]] = {
    "hopper_fa": lambda: fp8_peer("hopper_fa", Fp8Recipe.default()),
    "hopper_fa_e4m3": lambda: fp8_peer("hopper_fa_e4m3", replace(Fp8Recipe.default(), qk_dtype="e4m3")),
    "hopper_fa_accurate": lambda: fp8_peer("hopper_fa_accurate", Fp8Recipe.accurate()),
    "hopper_fa_causal_safe": lambda: fp8_peer("hopper_fa_causal_safe", Fp8Recipe.causal_safe()),
    "hopper_fa_end_to_end": lambda: fp8_peer("hopper_fa_end_to_end", Fp8Recipe.default(), end_to_end=True),
    "hopper_fa_bf16": _ours_16_bit,
    "fa2": _fa2,
    "fa3": _fa3,
    "vllm": _vllm,
    "cudnn": _cudnn,
}


def find_fp8_peers(names: Iterable[str], variants: Iterable[str] = ()) -> tuple[list[Peer], dict[str, str]]:
    """As `peers.find_peers`. variants: tile-table variants to run beside, as "hopper_fa:VARIANT" with e4m3 Q
    and K and "hopper_fa_int8:VARIANT" with int8."""
    found, missing = [], {}
    builders = {name: BUILDERS[name] for name in names}
    for variant in variants:
        for kind, dtype in (("hopper_fa", "e4m3"), ("hopper_fa_int8", "int8")):
            recipe = replace(Fp8Recipe.default(), qk_dtype=dtype)
            name = f"{kind}:{variant}"
            builders[name] = lambda n=name, r=recipe, v=variant: fp8_peer(n, r, v)
    for name, builder in builders.items():
        try:
            found.append(builder())
        except Exception as error:  # a broken installation of a peer must not end the comparison
            missing[name] = reason(error)
    return found, missing
