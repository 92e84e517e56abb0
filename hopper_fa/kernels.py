"""The compiled module's Python face: tensors in, integers across, status out.

Only this file and quantize_kernels.py touch the compiled module.
"""

import itertools
from typing import Any

import torch

try:
    from hopper_fa import _C
except ImportError as error:
    raise ImportError(
        f"hopper_fa's compiled module did not load ({error}); run `pip install .` in the source checkout, "
        "and start Python from another folder, where the bare sources do not hide the installed package"
    ) from error

DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
MAX_HEAD_DIM = 256

# Rows of the tile table (its fields: common/tile_table.h), each with the `dtypes` that are built.
FORWARD_TILES: tuple[dict[str, Any], ...] = tuple(_C.forward_tiles())

# 2**r on [-1/2, 1/2] as c0 + c1 r + c2 r**2 + c3 r**3.
EXP2_POLYNOMIAL: tuple[float, ...] = tuple(_C.exp2_polynomial())

VERSIONS = {"cuda": _C.cuda_version, "cutlass": _C.cutlass_version}

block_range = _C.block_range
tile_order = _C.tile_order
choose_warpgroups = _C.choose_warpgroups

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
    rows = [row for row in FORWARD_TILES if row["variant"] == variant and row["head_dim"] >= head_dim]
    if not rows:
        known = ", ".join(f"{row['variant']}/{row['head_dim']}" for row in FORWARD_TILES)
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
            for dtype, name in DTYPE_NAMES.items():
                if name in row["dtypes"]:
                    instances[dtype, head_dim, variant] = (_C.DTYPES[name], row["tile"])
    return instances


_INSTANCES = _built_instances()


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
        # NOTE: a copy from pageable memory ends before it returns: every stream finds the zeros.
        self._slots = torch.zeros(self._SLOTS, self._SLOT_INTS, dtype=torch.int32).to(f"cuda:{device}")
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


def _not_built(dtype: torch.dtype, head_dim: int, variant: str) -> str:
    built = "; ".join(
        f"{'/'.join(row['dtypes'])} up to head_dim {row['head_dim']} ({row['variant']})"
        for row in FORWARD_TILES
        if row["dtypes"]
    )
    return (
        f"this build of hopper_fa has no forward kernel for {DTYPE_NAMES[dtype]} with head_dim {head_dim} "
        f"({variant}); it holds {built or 'none'}; rebuild with -DHOPPER_FA_HEAD_DIMS and "
        "-DHOPPER_FA_DTYPES listing it."
    )
