"""The compiled module's Python face: tensors in, integers across, status out.

Only this file and quantize_kernels.py touch the compiled module.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

try:
    from hopper_fa import _C
except ImportError as error:
    raise ImportError(
        f"hopper_fa's compiled module did not load ({error}); run `pip install .` in the source checkout, "
        "and start Python from another folder, where the bare sources do not hide the installed package"
    ) from error

from hopper_fa.constants import constant, lasting
from hopper_fa.recipe import Fp8Recipe

if TYPE_CHECKING:
    from hopper_fa.quantization import QuantizedQKV

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
FP8_DTYPE_NAMES = {torch.float8_e4m3fn: "e4m3", torch.int8: "int8"}  # of quantised Q and K
MAX_HEAD_DIM = 256

# Rows of the tile table (its fields: common/tile_table.h), each with the `dtypes` that are built.
FORWARD_TILES: tuple[dict[str, Any], ...] = tuple(_C.forward_tiles())

# The same of the backward's table.
BACKWARD_TILES: tuple[dict[str, Any], ...] = tuple(_C.backward_tiles())

# What is taken off P's e4m3 code before rounding (common/exp2_linear.h).
EXP2_LINEAR_MEAN: float = _C.EXP2_LINEAR_MEAN

# 2**r on [-1/2, 1/2] as c0 + c1 r + c2 r**2 + c3 r**3.
EXP2_POLYNOMIAL: tuple[float, ...] = tuple(_C.exp2_polynomial())

VERSIONS = {"cuda": _C.cuda_version, "cutlass": _C.cutlass_version}

block_range = _C.block_range
tile_order = _C.tile_order
choose_warpgroups = _C.choose_warpgroups
query_walk = _C.query_walk

_STATUS_OK = _C.STATUS_OK
STATUS_SENTENCES = {
    _C.STATUS[
        "no_instance"
    ]: "this build holds no kernel for the dtype and head dim; see hopper_fa.build_info()",
    _C.STATUS[
        "invalid_argument"
    ]: "the kernel refused a size, stride or alignment; please report the shapes and strides",
    _C.STATUS["wrong_device"]: "the tensors' device is not a Hopper GPU (compute capability 9.0); use one",
    _C.STATUS[
        "driver_error"
    ]: "the driver refused a TMA tensor map; check that it is new enough for CUDA 12.0",
    _C.STATUS[
        "launch_error"
    ]: "the CUDA runtime refused the launch; look for an earlier error with CUDA_LAUNCH_BLOCKING=1",
}


def forward_tile(head_dim: int, variant: str = "default") -> dict[str, Any]:
    """The row of the tile table that `head_dim` runs on, built or not: the narrowest one that holds it.

    Raises:
        ValueError: the table has no such row.
    """
    return _narrowest(FORWARD_TILES, head_dim, variant)


def backward_tile(head_dim: int, variant: str = "default") -> dict[str, Any]:
    """`forward_tile` of the backward's table.

    Raises:
        ValueError: the table has no such row.
    """
    return _narrowest(BACKWARD_TILES, head_dim, variant)


def _narrowest(tiles: tuple[dict[str, Any], ...], head_dim: int, variant: str) -> dict[str, Any]:
    rows = [row for row in tiles if row["variant"] == variant and row["head_dim"] >= head_dim]
    if not rows:
        known = ", ".join(f"{row['variant']}/{row['head_dim']}" for row in tiles)
        raise ValueError(
            f"no tile for head_dim {head_dim}, variant {variant!r}; the table (variant/head_dim) has "
            f"{known}; add a row to common/tile_table.h"
        )
    return min(rows, key=lambda row: row["head_dim"])


def _built_instances() -> dict[tuple[torch.dtype, int, str], tuple[int, int]]:
    """(dtype, head_dim, variant) -> (dtype code, tile row), for every head dim a built instance takes."""
    instances = {}
    for variant in {row["variant"] for row in FORWARD_TILES}:
        widest = max(row["head_dim"] for row in FORWARD_TILES if row["variant"] == variant)
        for head_dim in range(8, widest + 1, 8):
            row = forward_tile(head_dim, variant)
            for dtype, name in (DTYPE_NAMES | FP8_DTYPE_NAMES).items():
                if name in row["dtypes"]:
                    instances[dtype, head_dim, variant] = (_C.DTYPES[name], row["tile"])
    return instances


_INSTANCES = _built_instances()
HAS_FP8 = any(dtype in FP8_DTYPE_NAMES for dtype, _, _ in _INSTANCES)


_PER_THREAD_STREAM = 2  # cudaStreamPerThread: one handle, another stream in every thread


class _Workspaces:
    """Zeros of one device in which launches count their tiles, and which they leave zero again.

    Launches into one stream run one after the other, so they share a slot. A captured launch has a slot of
    its own, because its graph may be replayed in any stream, beside others.
    """

    _SLOTS = 16384
    _SLOT_INTS = max(8, _C.FORWARD_WORKSPACE_INTS)  # a sector, so that neighbours do not contend

    def __init__(self, device: int) -> None:
        self._device = device
        zeros = torch.zeros(self._SLOTS, self._SLOT_INTS, dtype=torch.int32, device="cpu")
        self._slots = lasting(lambda: zeros.to(f"cuda:{device}"))
        self._used = itertools.count()
        self._of_stream: dict[int, torch.Tensor] = {}

    def slot(self, stream: int, capturing: bool) -> torch.Tensor:
        if stream == _PER_THREAD_STREAM:
            return self.fresh_slot(self._device)
        slot = None if capturing else self._of_stream.get(stream)
        if slot is None:
            index = next(self._used)
            slot = self._slots[index] if index < self._SLOTS else self.fresh_slot(self._device)
            if not capturing:
                self._of_stream[stream] = slot
        return slot

    @classmethod
    def fresh_slot(cls, device: int) -> torch.Tensor:
        """For one launch into the current stream. Captured, it costs the graph a memset."""
        return torch.zeros(cls._SLOT_INTS, dtype=torch.int32, device=f"cuda:{device}")


_WORKSPACES: dict[int, _Workspaces] = {}


def _workspace(device: int, stream: int) -> torch.Tensor:
    """int32 zeros for one launch into `stream`, the current one of `device`."""
    capturing = torch.cuda.is_current_stream_capturing()
    workspaces = _WORKSPACES.get(device)
    if workspaces is None:
        if capturing:
            return _Workspaces.fresh_slot(device)
        workspaces = _WORKSPACES[device] = _Workspaces(device)
    return workspaces.slot(stream, capturing)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    variant: str = "default",
) -> None:
    """Put the forward kernel into the current stream of q's device; checks nothing, waits for nothing.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim) CUDA tensor; k, v: (batch, seqlen_k, heads_kv, head_dim).
        out: as q, written. lse: (batch, heads_q, seqlen_q) float32, contiguous, written.
        variant: tile-table variant; others than "default" exist in experiment builds.

    Raises:
        RuntimeError: no instance is built for the dtype, head dim and variant, or the launch was refused.
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    _, seqlen_k, heads_kv, _ = k.shape
    instance = _INSTANCES.get((q.dtype, head_dim, variant))
    if instance is None:
        raise RuntimeError(_not_built(q.dtype, head_dim, variant))
    index = q.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return forward(q, k, v, out, lse, softmax_scale, causal, variant)
    q_batch, q_row, q_head, _ = q.stride()
    k_batch, k_row, k_head, _ = k.stride()
    v_batch, v_row, v_head, _ = v.stride()
    out_batch, out_row, out_head, _ = out.stride()
    stream = torch._C._cuda_getCurrentRawStream(index)
    workspace = _workspace(index, stream)
    # fmt: off
    status = _C.forward(
        *instance,
        q.data_ptr(), q_batch, q_row, q_head,
        k.data_ptr(), k_batch, k_row, k_head,
        v.data_ptr(), v_batch, v_row, v_head,
        out.data_ptr(), out_batch, out_row, out_head,
        lse.data_ptr(), workspace.data_ptr(),
        batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, softmax_scale, causal, stream,
    )
    # fmt: on
    if status != _STATUS_OK:
        raise RuntimeError(f"hopper_fa forward was not launched: {STATUS_SENTENCES[status]}.")


def backward_scratch_bytes(
    batch: int, seqlen_q: int, heads_q: int, head_dim: int, variant: str = "default"
) -> int:
    """Bytes of GPU memory that `backward` takes while it runs, beside its arguments.

    With rows = batch * heads_q * (seqlen_q rounded up to whole query blocks):

        rows * (4 * tile_head_dim + 8) + 8 * rows / block_m

    That is dQ in FP32, two FP32 numbers a row, and two int32 a query block. The quantized variants take one
    FP32 number a row more, and `backward_quantized` besides Q, K and V in 16 bits. NOTE: the tile decides,
    not the call: its head dim is 64 up to 64, 128 up to 128 and 256 above, its block_m 128, 64 and 64.

    Raises:
        ValueError: the table has no such row.
    """
    tile = backward_tile(head_dim, variant)["tile"]
    return 4 * sum(_C.backward_workspace(tile, batch, seqlen_q, heads_q))


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool = False,
    variant: str = "default",
) -> None:
    """Put the backward's kernels into the current stream of q's device; checks nothing, waits for nothing.

    Takes `backward_scratch_bytes` of scratch: above all dQ in FP32, padded to the tile. That is twice the
    size of dq at head dims 64, 128 and 256, and 16 times at 8.

    Args:
        dout: gradient of out; both as q, (batch, seqlen_q, heads_q, head_dim). k, v: (batch, seqlen_k,
            heads_kv, head_dim). Strides as for `forward`, all of them.
        lse: of the forward, (batch, heads_q, seqlen_q) float32, contiguous. dlse: its gradient, or None.
        dq, dk, dv: as q, k, v, written.
        deterministic: sum dQ in a fixed order; dK and dV always are.
        variant: tile-table variant.

    Raises:
        RuntimeError: no instance is built for the dtype, head dim and variant, or the launch was refused.
    """
    batch, seqlen_q, heads_q, head_dim = q.shape
    _, seqlen_k, heads_kv, _ = k.shape
    tile = backward_tile(head_dim, variant)
    if DTYPE_NAMES[q.dtype] not in tile["dtypes"]:
        raise RuntimeError(_not_built(q.dtype, head_dim, variant, "backward", BACKWARD_TILES))
    index = q.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return backward(
                dout, q, k, v, out, lse, dlse, dq, dk, dv, softmax_scale, causal, deterministic, variant
            )
    sum_floats, row_floats, turn_ints = _C.backward_workspace(tile["tile"], batch, seqlen_q, heads_q)
    floats = torch.empty(sum_floats + row_floats, dtype=torch.float32, device=q.device)
    turns = torch.empty(turn_ints, dtype=torch.int32, device=q.device)
    # fmt: off
    status = _C.backward(
        _C.DTYPES[DTYPE_NAMES[q.dtype]], tile["tile"],
        *((t.data_ptr(), *t.stride()[:3]) for t in (q, k, v, out, dout, dq, dk, dv)),
        lse.data_ptr(), 0 if dlse is None else dlse.data_ptr(),
        floats.data_ptr(), floats.data_ptr() + 4 * sum_floats, turns.data_ptr(),
        batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, softmax_scale, causal, deterministic,
        torch._C._cuda_getCurrentRawStream(index),
    )
    # fmt: on
    if status != _STATUS_OK:
        raise RuntimeError(f"hopper_fa backward was not launched: {STATUS_SENTENCES[status]}.")


def backward_quantized(
    dout: torch.Tensor,
    qkv: QuantizedQKV,
    out: torch.Tensor,
    lse: torch.Tensor,
    dlse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    deterministic: bool,
    signs: bytes,
) -> None:
    """`backward` of attention over 8-bit tensors: from the forward's codes, so that P is the forward's P.

    The products run in 16 bits. Takes scratch for Q, K and V in 16 bits, and that of `backward` with one
    number a query row more.

    Args:
        dout, out: gradient and output of the forward, bfloat16 or float16. lse, dlse: as for `backward`.
        qkv: what the forward ran on, without `quantized_backward_problem`.
        dq, dk, dv: (batch, seqlen, heads, head_dim) in out's dtype, written: gradients of the unquantised
            tensors, straight through the rounding.
        signs: of the rotation, see `quantization.sign_bits`; looked at if the recipe rotates.

    Raises:
        RuntimeError: no instance is built for the dtype and head dim, or the launch was refused.
    """
    batch, seqlen_q, heads_q, head_dim = dq.shape
    _, seqlen_k, heads_kv, _ = dk.shape
    variant = quantized_backward_variant(qkv.recipe, head_dim)
    tile = backward_tile(head_dim, variant)
    if DTYPE_NAMES[out.dtype] not in tile["dtypes"]:
        raise RuntimeError(_not_built(out.dtype, head_dim, variant, "backward", BACKWARD_TILES))
    index = out.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return backward_quantized(
                dout, qkv, out, lse, dlse, dq, dk, dv, softmax_scale, causal, deterministic, signs
            )
    sum_floats, row_floats, turn_ints = _C.backward_workspace(tile["tile"], batch, seqlen_q, heads_q)
    floats = torch.empty(sum_floats + row_floats, dtype=torch.float32, device=out.device)
    turns = torch.empty(turn_ints, dtype=torch.int32, device=out.device)
    # NOTE: as dq, dk and dv, which have the same sizes; but those may be parts of one packed tensor.
    wide = [torch.empty(t.shape, dtype=out.dtype, device=out.device) for t in (dq, dk, dv)]
    # fmt: off
    status = _C.backward_quantized(
        _C.DTYPES[DTYPE_NAMES[out.dtype]], tile["tile"],
        *((t.data_ptr(), *t.stride()[:3]) for t in (*wide, out, dout, dq, dk, dv)),
        lse.data_ptr(), 0 if dlse is None else dlse.data_ptr(),
        floats.data_ptr(), floats.data_ptr() + 4 * sum_floats, turns.data_ptr(),
        batch, seqlen_q, seqlen_k, heads_q, heads_kv, head_dim, softmax_scale, causal, deterministic,
        torch._C._cuda_getCurrentRawStream(index),
        _C.DTYPES[qkv.recipe.qk_dtype], qkv.q.data_ptr(), qkv.k.data_ptr(), qkv.v.data_ptr(), qkv.v.shape[2],
        (qkv.q_scale.data_ptr(), *qkv.q_scale.stride()), (qkv.k_scale.data_ptr(), *qkv.k_scale.stride()),
        qkv.q_group_rows, qkv.k_group_rows,
        *(0 if t is None else t.data_ptr() for t in (qkv.v_scale, qkv.v_mean, qkv.lse_shift, qkv.k_mean)),
        qkv.recipe.rotation == "hadamard", signs,
    )
    # fmt: on
    if status != _STATUS_OK:
        raise RuntimeError(f"hopper_fa backward was not launched: {STATUS_SENTENCES[status]}.")


def quantized_backward_variant(recipe: Fp8Recipe, head_dim: int) -> str:
    """The variant of the backward's tile table that runs the recipe."""
    return "quantized_rows" if recipe.q_granularity == "token" and head_dim <= 128 else "quantized"


def quantized_backward_problem(recipe: Fp8Recipe) -> str | None:
    """What `backward_quantized` cannot do of a recipe, or None. The emulator can do all of it."""
    if recipe.has_key_vectors:
        return 'no smooth_q, and k_granularity "none", "tensor", "head" or "block"'
    return None


def fp8_variant(recipe: Fp8Recipe, head_dim: int) -> str | None:
    """The tile-table variant that runs the recipe; None if none does. The emulator runs all of them."""
    interval = recipe.interval(head_dim)
    if recipe.has_linear_exp2(head_dim):
        return "fp8_linear" if recipe.takes_linear_exp2(head_dim) else None
    if recipe.row_sum == "product" and interval == 1:
        return "fp8_keys" if recipe.has_key_vectors else "fp8"
    if recipe.has_key_vectors:
        return None
    if recipe.row_sum == "product" and interval > 1 and head_dim > 128:
        return "fp8_flush"
    if recipe.row_sum == "fp32" and interval == 0 and recipe.qk_dtype == "e4m3":
        return "fp8_raw"
    return None


def fp8_problem(recipe: Fp8Recipe, head_dim: int) -> str | None:
    """What the FP8 kernels cannot do of a recipe, or None. The emulator can do all of it."""
    if fp8_variant(recipe, head_dim) is not None:
        return None
    if recipe.has_key_vectors:
        return 'k_granularity="token" and smooth_q only with accumulation=1 and row_sum="product"'
    if recipe.linear_exp2 and fp8_variant(replace(recipe, linear_exp2=False), head_dim) is not None:
        return "linear_exp2 only up to head dim 128, without scales or addends of single keys"
    return (
        'only row_sum="product" with accumulation=1, or above head dim 128 more, and row_sum="fp32" with '
        'accumulation=0 and qk_dtype="e4m3"'
    )


def forward_fp8(
    qkv: QuantizedQKV,
    out: torch.Tensor,
    lse: torch.Tensor,
    softmax_scale: float,
    causal: bool,
    variant: str | None = None,
) -> None:
    """Put the FP8 forward kernel into the current stream of the tensors' device; waits for nothing.

    Args:
        qkv: on a CUDA device, of a recipe without `fp8_problem`.
        out: (batch, seqlen_q, heads_q, head_dim) bfloat16 or float16, written; strides as for `forward`.
        lse: (batch, heads_q, seqlen_q) float32, contiguous, written.
        variant: tile-table variant; None: the recipe's (`fp8_variant`).

    Raises:
        RuntimeError: no instance is built for the dtype, head dim and variant, the recipe has a field the
            kernel does not know, or the launch was refused.
    """
    if problem := fp8_problem(qkv.recipe, qkv.head_dim):
        raise RuntimeError(f"the FP8 kernel takes {problem}; the recipe is {qkv.recipe}; change it.")
    variant = variant or fp8_variant(qkv.recipe, qkv.head_dim)
    instance = _INSTANCES.get((qkv.q.dtype, qkv.head_dim, variant))
    if instance is None:
        raise RuntimeError(_not_built(qkv.q.dtype, qkv.head_dim, variant))
    batch, _, heads_q, _ = qkv.q.shape
    heads_kv = qkv.k.shape[2]
    index = qkv.q.device.index
    if index != torch.cuda.current_device():
        with torch.cuda.device(index):
            return forward_fp8(qkv, out, lse, softmax_scale, causal, variant)
    v_mean = constant(0.0, qkv.v_scale.numel(), qkv.v_scale.device) if qkv.v_mean is None else qkv.v_mean
    q_batch, q_row, q_head, _ = qkv.q.stride()
    k_batch, k_row, k_head, _ = qkv.k.stride()
    v_batch, v_head, v_row, _ = qkv.v.stride()
    out_batch, out_row, out_head, _ = out.stride()
    k_group = 1 if qkv.recipe.k_granularity == "block" else 0
    k_scale, key_bias = (qkv.k_scale.data_ptr(), *qkv.k_scale.stride()[:2], k_group), (0, 0, 0, 0)
    if variant == "fp8_keys":
        scales, biases = qkv.key_vectors
        k_scale = (scales.data_ptr(), *scales.stride()[:3])
        key_bias = (biases.data_ptr(), *biases.stride()[:3])
    interval = qkv.recipe.interval(qkv.head_dim)
    flush = None
    if floats := FORWARD_TILES[instance[1]]["flush_floats"]:
        sms = torch.cuda.get_device_properties(index).multi_processor_count
        flush = torch.empty(sms * floats, dtype=torch.float32, device=qkv.q.device)
    stream = torch._C._cuda_getCurrentRawStream(index)
    # fmt: off
    status = _C.forward_fp8(
        *instance,
        qkv.q.data_ptr(), q_batch, q_row, q_head,
        qkv.k.data_ptr(), k_batch, k_row, k_head,
        qkv.v.data_ptr(), v_batch, v_row, v_head,
        out.data_ptr(), out_batch, out_row, out_head,
        lse.data_ptr(), _workspace(index, stream).data_ptr(),
        batch, qkv.seqlen_q, qkv.seqlen_k, heads_q, heads_kv, qkv.head_dim, softmax_scale, causal, stream,
        _C.DTYPES[DTYPE_NAMES[out.dtype]],
        (qkv.q_scale.data_ptr(), *qkv.q_scale.stride()), qkv.q_group_rows,
        k_scale,
        qkv.v_scale.data_ptr(), v_mean.data_ptr(),
        0 if qkv.lse_shift is None else qkv.lse_shift.data_ptr(),
        *qkv.recipe.p_range(qkv.head_dim), key_bias,
        interval, 0 if flush is None else flush.data_ptr(),
    )
    # fmt: on
    if status != _STATUS_OK:
        raise RuntimeError(f"hopper_fa FP8 forward was not launched: {STATUS_SENTENCES[status]}.")


def accumulator_probe(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """c + a @ b^T by WGMMA m64n8k32, all of k in one tensor-core accumulator; what the FP8 sums really are.

    Args:
        a: (problems, 64, k) float8_e4m3fn, contiguous, CUDA, k a positive multiple of 32.
        b: (problems, 8, k) float8_e4m3fn, contiguous. c: (problems, 64, 8) float32, contiguous.

    Returns:
        (problems, 64, 8) float32.

    Raises:
        RuntimeError: the launch was refused.
    """
    d = torch.empty_like(c)
    problems, _, k = a.shape
    stream = torch._C._cuda_getCurrentRawStream(a.device.index)
    with torch.cuda.device(a.device):
        status = _C.accumulator_probe(
            a.data_ptr(), b.data_ptr(), c.data_ptr(), d.data_ptr(), problems, k, stream
        )
    if status != _STATUS_OK:
        raise RuntimeError(f"the accumulator probe was not launched: {STATUS_SENTENCES[status]}.")
    return d


def _not_built(
    dtype: torch.dtype,
    head_dim: int,
    variant: str,
    family: str = "forward",
    tiles: tuple[dict[str, Any], ...] = FORWARD_TILES,
) -> str:
    built = "; ".join(
        f"{'/'.join(row['dtypes'])} up to head_dim {row['head_dim']} ({row['variant']})"
        for row in tiles
        if row["dtypes"]
    )
    name = (DTYPE_NAMES | FP8_DTYPE_NAMES)[dtype]
    if variant == "fp8_keys":
        return (
            f"this build of hopper_fa has no kernel for recipes with smooth_q or a scale a key ({name}, "
            f"head_dim {head_dim}); it holds {built or 'none'}; rebuild with "
            "HOPPER_FA_KEY_SCALES=ON, take another recipe, or ask for the slow emulation with "
            'backend="emulator".'
        )
    return (
        f"this build of hopper_fa has no {family} kernel for {name} with head_dim {head_dim} "
        f"({variant}); it holds {built or 'none'}; rebuild with -DHOPPER_FA_HEAD_DIMS and "
        "-DHOPPER_FA_DTYPES listing it."
    )
