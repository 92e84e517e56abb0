"""The implementations of backward attention that backward_speed.py compares, each behind one adapter.

As in peers.py: a peer is used if a plain import finds it, all get the same tensors, and the forward, the
gradients' memory, graphs and workspaces are prepared before the timed part. A timed call of "backward" and
"deterministic" is the peer's own backward operator, without autograd; "combined" is forward and backward,
through autograd where the peer's package offers it.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peers import (
    MAX_DIFFERENCE,
    OURS,
    CudnnForward,
    _version,
    build_graph,
    graph_call,
    heads_layout,
    reason,
    relative_l2,
)
from shapes import DTYPES, Shape

MODES = ("backward", "deterministic", "combined")
FLOPS_OF_FORWARD = {"backward": 2.5, "deterministic": 2.5, "combined": 3.5}

Gradients = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
GradientCall = Callable[[], Gradients]


@dataclass(frozen=True)
class Problem:
    """Inputs of one backward: q, k, v and the output's gradient, (batch, seqlen, heads, head_dim) each."""

    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor

    @classmethod
    def random(cls, shape: Shape, seed: int, device: str = "cuda") -> Problem:
        """Normal random tensors; q, k and v are those of the forward experiments."""
        generator = torch.Generator(device=device).manual_seed(seed + 2**31)
        size = (shape.batch, shape.seqlen, shape.heads, shape.head_dim)
        dout = torch.randn(size, generator=generator, device=device, dtype=DTYPES[shape.dtype])
        return cls(shape, *shape.inputs(seed, device), dout)

    @property
    def scale(self) -> float:
        return self.shape.head_dim**-0.5

    def gradients(self) -> Gradients:
        """Memory for dq, dk and dv, poisoned: what a kernel leaves unwritten fails the check."""
        return tuple(torch.full_like(t, math.nan) for t in (self.q, self.k, self.v))

    def leaves(self) -> Gradients:
        """q, k and v as leaves of an autograd graph."""
        return tuple(t.detach().requires_grad_() for t in (self.q, self.k, self.v))


@dataclass(frozen=True)
class BackwardPeer:
    """One implementation. `prepare(problem, mode)` does everything that is not to be timed."""

    name: str
    version: str
    prepare: Callable[[Problem, str], GradientCall]


def through_autograd(
    attention: Callable[..., torch.Tensor], leaves: Gradients, dout: torch.Tensor
) -> GradientCall:
    """Forward and backward of `attention(q, k, v)`; a fresh graph every call."""
    return lambda: torch.autograd.grad(attention(*leaves), leaves, dout)


def _hopper_fa(variant: str = "default") -> BackwardPeer:
    from hopper_fa import flash_attn_func, kernels

    def prepare(problem: Problem, mode: str) -> GradientCall:
        causal = problem.shape.causal
        tile = kernels.backward_tile(problem.shape.head_dim, variant)
        if problem.shape.head_dim != tile["head_dim"] and variant != "default":
            raise ValueError(f"{variant} has no tile of its own for head dim {problem.shape.head_dim}")
        if mode == "combined" and variant != "default":
            raise ValueError("a variant runs the backward alone")
        if mode == "combined":
            leaves = problem.leaves()
            return through_autograd(
                lambda q, k, v: flash_attn_func(q, k, v, causal=causal), leaves, problem.dout
            )
        q, k, v = problem.q, problem.k, problem.v
        out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
        gradients = problem.gradients()
        arguments = (problem.dout, q, k, v, out, lse, None, *gradients, problem.scale, causal)

        def call() -> Gradients:
            kernels.backward(*arguments, deterministic=mode == "deterministic", variant=variant)
            return gradients

        return call

    name = OURS if variant == "default" else f"{OURS}:{variant}"
    return BackwardPeer(name, _version("hopper-fa", "hopper_fa"), prepare)


@contextlib.contextmanager
def _deterministic_torch():
    """torch's switch for deterministic kernels, without its filling of fresh memory."""
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = filling


def _fa2() -> BackwardPeer:
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward

    def prepare(problem: Problem, mode: str) -> GradientCall:
        causal = problem.shape.causal

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return forward(*(t.transpose(1, 2) for t in (q, k, v)), 0.0, causal)[0].transpose(1, 2)

        if mode == "combined":
            return through_autograd(attention, problem.leaves(), problem.dout)
        # (batch, heads, seqlen, head_dim) views
        dout, q, k, v = (t.transpose(1, 2) for t in (problem.dout, problem.q, problem.k, problem.v))
        out, lse, starts_q, starts_k, longest_q, longest_k, random_state, unused, _ = forward(
            q, k, v, 0.0, causal
        )
        lengths = (starts_q, starts_k, longest_q, longest_k)
        arguments = (dout, q, k, v, out, lse, *lengths, 0.0, causal, random_state, unused)

        def call() -> Gradients:
            context = _deterministic_torch() if mode == "deterministic" else contextlib.nullcontext()
            with context:
                gradients = backward(*arguments)
            return tuple(t.transpose(1, 2) for t in gradients)

        return call

    return BackwardPeer("fa2", f"torch {torch.__version__}, its flash operators", prepare)


def _fa3_functions() -> tuple[str, Callable, Callable]:
    """(version, forward, backward) of FlashAttention-3: `fa3_xf`, a face of xformers' library, or its own."""
    try:
        library = importlib.import_module("fa3_xf")
    except ImportError:
        importlib.import_module("flash_attn_interface")  # registers torch.ops.flash_attn_3
        operators = torch.ops.flash_attn_3

        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> list[torch.Tensor]:
            scale = q.shape[-1] ** -0.5
            return operators.fwd(q, k, v, softmax_scale=scale, is_causal=causal, num_splits=1)[:2]

        def backward(*tensors: torch.Tensor, causal: bool, deterministic: bool) -> None:
            scale = tensors[1].shape[-1] ** -0.5
            # No sequence starts, used or longest lengths; no window, no softcap.
            options = (*[None] * 6, scale, causal, -1, -1, 0.0, deterministic, 0)
            operators.bwd(*tensors, *options)

        operators.bwd  # noqa: B018 - some builds hold the forward alone
        return _version("flash-attn-3", "flash_attn_3"), forward, backward
    return f"FlashAttention-3 of {_version('xformers')}", library.fwd, library.bwd


def _fa3() -> BackwardPeer:
    version, forward, backward = _fa3_functions()

    def prepare(problem: Problem, mode: str) -> GradientCall:
        q, k, v, causal = problem.q, problem.k, problem.v, problem.shape.causal
        gradients = problem.gradients()
        out, lse = forward(q, k, v, causal=causal)

        def call() -> Gradients:
            saved = forward(q, k, v, causal=causal) if mode == "combined" else (out, lse)
            deterministic = mode == "deterministic"
            backward(problem.dout, q, k, v, *saved, *gradients, causal=causal, deterministic=deterministic)
            return gradients

        return call

    return BackwardPeer("fa3", version, prepare)


def _fa4() -> BackwardPeer:
    interface = importlib.import_module("flash_attn.cute.interface")

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
        out = interface.flash_attn_func(q, k, v, causal=causal)
        return out[0] if isinstance(out, tuple) else out

    def prepare(problem: Problem, mode: str) -> GradientCall:
        q, k, v, causal = problem.q, problem.k, problem.v, problem.shape.causal
        if mode == "combined":
            return through_autograd(lambda *t: attention(*t, causal), problem.leaves(), problem.dout)
        out, lse, *_ = interface._flash_attn_fwd(q, k, v, causal=causal, return_lse=True)
        gradients = problem.gradients()
        options = {"deterministic": mode == "deterministic"}
        options |= dict(zip(("dq", "dk", "dv"), gradients, strict=True))

        def call() -> Gradients:
            interface._flash_attn_bwd(q, k, v, out, problem.dout, lse, None, causal, 0.0, **options)
            return gradients

        return call

    return BackwardPeer("fa4", _version("flash-attn-4"), prepare)


class CudnnBackward:
    """cuDNN's backward of fused attention, as `peers.CudnnForward`."""

    def __init__(
        self,
        shape: Shape,
        deterministic: bool,
        handle: object | None = None,
        device_property: object | None = None,
    ) -> None:
        import cudnn

        self.handle = handle
        io_type = {"bf16": cudnn.data_type.BFLOAT16, "fp16": cudnn.data_type.HALF}[shape.dtype]
        fp32 = cudnn.data_type.FLOAT
        target = {"handle": handle} if handle is not None else {"device_property": device_property}
        graph = cudnn.pygraph(
            io_data_type=io_type, intermediate_data_type=fp32, compute_data_type=fp32, **target
        )
        queries, keys = (heads_layout(shape, heads) for heads in (shape.heads, shape.heads_kv))
        b, h, s = shape.batch, shape.heads, shape.seqlen
        layouts = {"q": queries, "k": keys, "v": keys, "o": queries, "dO": queries}
        inputs = {
            name: graph.tensor(name=name, data_type=io_type, **layout) for name, layout in layouts.items()
        }
        inputs["stats"] = graph.tensor(
            name="stats", data_type=fp32, dim=[b, h, s, 1], stride=[h * s, s, 1, 1]
        )
        written = graph.sdpa_backward(
            **inputs,
            attn_scale=1 / math.sqrt(shape.head_dim),
            use_causal_mask=shape.causal,
            use_deterministic_algorithm=deterministic,
            name="sdpa_backward",
        )
        for tensor, layout in zip(written, (queries, keys, keys), strict=True):
            tensor.set_output(True).set_dim(layout["dim"]).set_stride(layout["stride"]).set_data_type(io_type)
        build_graph(graph)
        self.graph, self.tensors = graph, (*inputs.values(), *written)

    def bind(self, problem: Problem, out: torch.Tensor, stats: torch.Tensor) -> GradientCall:
        """The call that runs the graph on a problem and what its forward wrote, current stream."""
        gradients = problem.gradients()
        inputs = (problem.q, problem.k, problem.v, out, problem.dout, stats)
        pack: dict[Any, torch.Tensor] = dict(zip(self.tensors, (*inputs, *gradients), strict=True))
        run = graph_call(self.graph, self.handle, pack, gradients[0])

        def call() -> Gradients:
            run()
            return gradients

        return call


def _cudnn() -> BackwardPeer:
    import cudnn

    handle = cudnn.create_handle()

    def prepare(problem: Problem, mode: str) -> GradientCall:
        shape = problem.shape
        size = (shape.batch, shape.heads, shape.seqlen, 1)
        stats = torch.empty(size, dtype=torch.float32, device=problem.q.device)
        forward = CudnnForward(shape, handle).bind(problem.q, problem.k, problem.v, stats)
        backward = CudnnBackward(shape, mode == "deterministic", handle).bind(problem, forward(), stats)
        if mode != "combined":
            return backward

        def call() -> Gradients:
            forward()
            return backward()

        return call

    version = f"cuDNN {cudnn.backend_version()}, {_version('nvidia-cudnn-frontend')}"
    return BackwardPeer("cudnn", version, prepare)


BUILDERS: dict[str, Callable[[], BackwardPeer]] = {
    OURS: _hopper_fa,
    "fa2": _fa2,
    "fa3": _fa3,
    "fa4": _fa4,
    "cudnn": _cudnn,
}


def find_backward_peers(
    names: Iterable[str], variants: Iterable[str] = ()
) -> tuple[list[BackwardPeer], dict[str, str]]:
    """As `peers.find_peers`. variants: tile-table variants to run beside, as "hopper_fa:VARIANT"."""
    found, missing = [], {}
    for name in names:
        try:
            found.append(BUILDERS[name]())
        except Exception as error:  # a broken installation of a peer must not end the comparison
            missing[name] = reason(error)
    if OURS not in missing:
        found += [_hopper_fa(variant) for variant in variants]
    return found, missing


Subject = tuple[str, str]  # peer, mode


def prepare_checked(
    peers: Iterable[BackwardPeer], problem: Problem, modes: Iterable[str]
) -> tuple[dict[Subject, GradientCall], dict[Subject, str]]:
    """Prepare every peer in every mode and compare the gradients, so that nothing wrong is timed.

    The gradients compared with are FlashAttention-2's, or the first peer's that works. A deterministic call
    must also give the same bits twice.

    Returns:
        ({(peer, mode): call} of those that agree, {(peer, mode): one line why} of the others).
    """
    calls: dict[Subject, GradientCall] = {}
    failed: dict[Subject, str] = {}
    reference: tuple[Subject, list[torch.Tensor]] | None = None
    peers, modes = list(peers), list(modes)
    subjects = [(peer, mode) for mode in modes for peer in peers]
    # The reference comes from FlashAttention-2's own backward, if it is among them.
    subjects.sort(key=lambda subject: subject[0].name != "fa2")
    for peer, mode in subjects:
        subject = (peer.name, mode)
        try:
            call = peer.prepare(problem, mode)
            gradients = [t.detach().clone() for t in call()]
            torch.cuda.synchronize()
            same_bits = mode != "deterministic" or all(
                torch.equal(x, y) for x, y in zip(gradients, call(), strict=True)
            )
            if reference is None and not all(t.isfinite().all() for t in gradients):
                raise ValueError("its gradients hold NaN or infinities")
            reference = (subject, gradients) if reference is None else reference
            found = [relative_l2(x, y) for x, y in zip(gradients, reference[1], strict=True)]
        except Exception as error:  # unsupported shape, compile error of a peer
            failed[subject] = reason(error)
            continue
        if not all(difference <= MAX_DIFFERENCE for difference in found):  # also of NaN
            named = ", ".join(
                f"{name} {value:.1e}" for name, value in zip(("dq", "dk", "dv"), found, strict=True)
            )
            failed[subject] = f"gradients differ from {reference[0][0]}'s by {named} (relative L2)"
        elif not same_bits:
            failed[subject] = "deterministic gradients differ between two calls"
        else:
            calls[subject] = call
    ordered = [(peer.name, mode) for mode in modes for peer in peers]
    return {subject: calls[subject] for subject in ordered if subject in calls}, failed
