"""The implementations of forward attention that the experiments compare, each behind one adapter.

A peer is used if a plain import finds it; whoever is missing is reported with the reason and left out. All
peers get the same tensors, q (batch, seqlen, heads, head_dim) and k, v (batch, seqlen, heads_kv, head_dim),
and return the output in that layout. Views, graphs and workspaces are prepared before the timed part.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from shapes import Shape

Call = Callable[[], torch.Tensor]
Prepare = Callable[[Shape, torch.Tensor, torch.Tensor, torch.Tensor], Call]

OURS = "hopper_fa"
# Kernels of one dtype differ by rounding, 2e-3 to 5e-3 in bf16; a wrong layout or mask differs by about 1.
MAX_DIFFERENCE = 2e-2


@dataclass(frozen=True)
class Peer:
    """One implementation.

    `prepare(shape, q, k, v)` does everything that is not to be timed and returns the call that is. Its output
    may differ from the others' by `tolerance` (relative L2).
    """

    name: str
    version: str
    prepare: Prepare
    tolerance: float = MAX_DIFFERENCE


def _version(*distributions: str) -> str:
    for name in distributions:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name} {importlib.metadata.version(name)}"
    return "unknown version"


def _hopper_fa() -> Peer:
    from hopper_fa import flash_attn_func

    def prepare(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        return lambda: flash_attn_func(q, k, v, causal=shape.causal)

    return Peer(OURS, _version("hopper-fa", "hopper_fa"), prepare)


def _fa2() -> Peer:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    def prepare(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (batch, heads, seqlen, head_dim) views
        grouped = shape.heads != shape.heads_kv

        def call() -> torch.Tensor:
            with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
                out = scaled_dot_product_attention(q, k, v, is_causal=shape.causal, enable_gqa=grouped)
            return out.transpose(1, 2)

        return call

    return Peer("fa2", f"torch {torch.__version__} SDPA, flash backend", prepare)


def _fa3() -> Peer:
    importlib.import_module("flash_attn_interface")  # registers torch.ops.flash_attn_3
    forward = torch.ops.flash_attn_3.fwd

    def prepare(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        scale = shape.head_dim**-0.5
        # One split, as in its own training interface; the default would search for a number of splits.
        return lambda: forward(q, k, v, softmax_scale=scale, is_causal=shape.causal, num_splits=1)[0]

    return Peer("fa3", _version("flash-attn-3", "flash_attn_3", "tokenspeed-fa3"), prepare)


def _fa4() -> Peer:
    forward = importlib.import_module("flash_attn.cute.interface")._flash_attn_fwd

    def prepare(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        return lambda: forward(q, k, v, causal=shape.causal, return_lse=True)[0]

    return Peer("fa4", _version("flash-attn-4"), prepare)


def build_graph(graph: Any) -> None:
    """Everything of a finished cuDNN graph that comes before its first execution."""
    import cudnn

    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()


def graph_call(graph: Any, handle: object, tensors: dict, out: torch.Tensor) -> Call:
    """The call that runs a built graph on these tensors in the current stream; `out` is among them."""
    import cudnn

    workspace = torch.empty(max(graph.get_workspace_size(), 1), dtype=torch.uint8, device=out.device)

    def call() -> torch.Tensor:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)
        graph.execute(tensors, workspace, handle=handle)
        return out

    return call


def heads_layout(shape: Shape, heads: int) -> dict[str, list[int]]:
    """Dimensions in cuDNN's order (batch, heads, seqlen, head_dim), strides those of our layout."""
    b, s, d = shape.batch, shape.seqlen, shape.head_dim
    return {"dim": [b, heads, s, d], "stride": [s * heads * d, d, heads * d, 1]}


class CudnnForward:
    """cuDNN's fused attention as a graph of nvidia-cudnn-frontend; writes LSE too, as the others do.

    Args:
        shape: the problem.
        handle: of cuDNN; None builds for `device_property` without a GPU.
        device_property: a cudnn.device_properties to build for when there is no handle.
    """

    def __init__(
        self, shape: Shape, handle: object | None = None, device_property: object | None = None
    ) -> None:
        import cudnn

        self.handle = handle
        io_type = {"bf16": cudnn.data_type.BFLOAT16, "fp16": cudnn.data_type.HALF}[shape.dtype]
        fp32 = cudnn.data_type.FLOAT
        target = {"handle": handle} if handle is not None else {"device_property": device_property}
        graph = cudnn.pygraph(
            io_data_type=io_type, intermediate_data_type=fp32, compute_data_type=fp32, **target
        )

        self.q = graph.tensor(name="q", data_type=io_type, **heads_layout(shape, shape.heads))
        self.k = graph.tensor(name="k", data_type=io_type, **heads_layout(shape, shape.heads_kv))
        self.v = graph.tensor(name="v", data_type=io_type, **heads_layout(shape, shape.heads_kv))
        out, stats = graph.sdpa(
            q=self.q,
            k=self.k,
            v=self.v,
            attn_scale=1 / math.sqrt(shape.head_dim),
            use_causal_mask=shape.causal,
            generate_stats=True,
            name="sdpa",
        )
        out_layout = heads_layout(shape, shape.heads)
        out.set_output(True).set_dim(out_layout["dim"]).set_stride(out_layout["stride"]).set_data_type(
            io_type
        )
        b, h, s = shape.batch, shape.heads, shape.seqlen
        stats.set_output(True).set_dim([b, h, s, 1]).set_stride([h * s, s, 1, 1]).set_data_type(fp32)
        build_graph(graph)
        self.graph, self.out, self.stats = graph, out, stats

    def bind(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, stats: torch.Tensor | None = None
    ) -> Call:
        """The call that runs the graph on these tensors, current stream, into an output allocated here.

        stats: (batch, heads, seqlen, 1) float32, the LSE, written; None allocates it here too.
        """
        batch, seqlen, heads, _ = q.shape
        out = torch.empty_like(q)
        if stats is None:
            stats = torch.empty(batch, heads, seqlen, 1, dtype=torch.float32, device=q.device)
        tensors = {self.q: q, self.k: k, self.v: v, self.out: out, self.stats: stats}
        return graph_call(self.graph, self.handle, tensors, out)


def _cudnn() -> Peer:
    import cudnn

    handle = cudnn.create_handle()

    def prepare(shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Call:
        return CudnnForward(shape, handle).bind(q, k, v)

    version = f"cuDNN {cudnn.backend_version()}, {_version('nvidia-cudnn-frontend')}"
    return Peer("cudnn", version, prepare)


# In the order of tables and plots.
_BUILDERS: dict[str, Callable[[], Peer]] = {
    OURS: _hopper_fa,
    "fa2": _fa2,
    "fa3": _fa3,
    "fa4": _fa4,
    "cudnn": _cudnn,
}
PEER_NAMES = tuple(_BUILDERS)


def find_peers(names: Iterable[str] = PEER_NAMES) -> tuple[list[Peer], dict[str, str]]:
    """Import the peers named.

    Args:
        names: some of PEER_NAMES.
    Returns:
        (peers that can run, {name: one line why} for those that cannot).
    Raises:
        ValueError: a name is not one of PEER_NAMES.
    """
    found, missing = [], {}
    for name in names:
        if name not in _BUILDERS:
            raise ValueError(f"peer {name!r} is unknown; choose from {', '.join(PEER_NAMES)}")
        try:
            found.append(_BUILDERS[name]())
        except Exception as error:  # a broken installation of a peer must not end the comparison
            missing[name] = reason(error)
    return found, missing


def reason(error: BaseException) -> str:
    """An exception in one line of at most 200 characters."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:200]


def relative_l2(x: torch.Tensor, reference: torch.Tensor) -> float:
    """||x - reference|| / ||reference||, summed in float32; NaN stays NaN."""
    reference = reference.float()
    return ((x.float() - reference).norm() / reference.norm()).item()


def prepare_checked(
    peers: Iterable[Peer], shape: Shape, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[dict[str, Call], dict[str, str]]:
    """Prepare the peers for one shape and compare their outputs, so that no wrong layout or mask is timed.

    The output compared with is FlashAttention-2's, or without it that of the first peer with the tightest
    tolerance.

    Returns:
        ({name: call} of the peers that agree, {name: one line why} of those that fail or disagree).
    """
    calls: dict[str, Call] = {}
    failed: dict[str, str] = {}
    reference = None
    # Stable: the rest keep their order.
    order = sorted(peers, key=lambda peer: (peer.name != "fa2", peer.tolerance))
    for peer in order:
        try:
            call = peer.prepare(shape, q, k, v)
            out = call()
            torch.cuda.synchronize()
            reference = (peer.name, out.clone()) if reference is None else reference
            difference = relative_l2(out, reference[1])
        except Exception as error:  # unsupported shape, compile error of a peer
            failed[peer.name] = reason(error)
            continue
        if difference <= peer.tolerance:  # false for NaN
            calls[peer.name] = call
        else:
            failed[peer.name] = f"output differs from {reference[0]}'s by {difference:.1e} (relative L2)"
    return {peer.name: calls[peer.name] for peer in peers if peer.name in calls}, failed
