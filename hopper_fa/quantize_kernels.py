"""`quantization.quantize_qkv` by CUDA kernels: the same tensors, bit for bit but for lse_shift and key_bias.

Those two are float32 sums over head_dim in another order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hopper_fa.kernels import _C, DTYPE_NAMES, STATUS_SENTENCES
from hopper_fa.quantization import PITCH, QuantizedQKV, sign_bits
from hopper_fa.recipe import K_BLOCK, Q_BLOCK, Fp8Recipe
from hopper_fa.validation import resolved

# Input types ("bf16", "fp16", "e4m3") that this build holds kernels for.
DTYPES: tuple[str, ...] = tuple(_C.quantize_dtypes())

_CODES = {"e4m3": torch.float8_e4m3fn, "int8": torch.int8}
Launches = list[Callable[[], None]]  # each keeps the tensors that its kernels use
_ONE_PASS = {"none", "token", "block"}  # granularities of Q and K that need no scratch


def quantize_qkv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recipe: Fp8Recipe | None = None
) -> QuantizedQKV:
    """See `quantization.quantize_qkv`, whose checks the caller has made. Runs in the current stream.

    Args:
        q: (batch, seqlen_q, heads_q, head_dim) bfloat16 or float16 of a CUDA device; k, v: (batch, seqlen_k,
            heads_kv, head_dim). Copied if the last dimension is not contiguous, or another stride or the
            start is no multiple of 16 bytes.

    Raises:
        RuntimeError: a launch was refused, or this build holds no kernels for the dtype (see DTYPES).
    """
    recipe = Fp8Recipe.default() if recipe is None else recipe
    q, k, v = (_aligned(t) for t in (q, k, v))
    seqlen_q, heads_q, head_dim = q.shape[1:]
    seqlen_k, heads_kv = k.shape[1:3]
    group = heads_q // heads_kv

    # NOTE: see Overlap in cutlass_kernels/include/hopper_fa/quantize.h. Statistics need inputs only, all else
    # inputs and statistics. So the first launch waits, and K's rows do; without keys they have no launch, and
    # the others wait. All memory is allocated before the first launch and none freed before the last, so that
    # no launch is given what one that it runs beside still uses, in whatever thread.
    launches: Launches = []
    overlap = "none"
    of_q, of_k, of_v = TokenStats(), TokenStats(), TokenStats()
    if recipe.smooth_q:
        of_q, overlap = token_stats(q, recipe.stats_shift(seqlen_q), launches=launches), "all"
    v_stats_last = recipe.v_stats_shift(seqlen_k) == 0
    if _has_v_stats(recipe) and not v_stats_last:  # before K's, which take less time
        of_v, overlap = v_stats(v, recipe, overlap, launches), "all"
    if recipe.smooth_k:
        shift = recipe.stats_shift(seqlen_k)
        of_k, overlap = token_stats(k, shift, overlap=overlap, launches=launches), "all"
    overlap = "loads" if overlap == "all" else "none"
    k_codes, k_scale, key_bias = quantize_rows(
        k, recipe, of_k.mean, of_q.mean, group, queries=False, overlap=overlap, launches=launches
    )
    overlap = "all" if seqlen_k > 0 else overlap
    of_rows = "loads" if overlap == "all" and recipe.q_granularity not in _ONE_PASS else overlap
    q_codes, q_scale, lse_shift = quantize_rows(
        q, recipe, of_q.mean, of_k.mean, group, queries=True, overlap=of_rows, launches=launches
    )
    if _has_v_stats(recipe) and v_stats_last:  # then V is rounded at once, as L2 still holds half of it
        per_channel = recipe.v_granularity in ("none", "channel")
        of_v = v_stats(v, recipe, overlap if per_channel else "none", launches)
        overlap = "loads"
    v_codes, v_scale, v_mean = quantize_v(v, recipe, of_v, overlap, launches)
    for launch in launches:
        launch()
    return QuantizedQKV.trusted(
        q=q_codes,
        k=k_codes,
        v=v_codes,
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
        q_mean=of_q.mean,
        k_mean=of_k.mean,
    )


class TokenStats(NamedTuple):
    """What `token_stats` returns; None for what was not asked for.

    Attributes:
        mean: (batch, heads, head_dim) float32.
        amax: the largest finite |x - mean| (|x| without mean) as float32 bits in int32: (1,), (batch, heads)
            or (batch, heads, head_dim).
        outgrown: (batch, heads, head_dim) int32 zeros, where amax is a sample's: `quantize_v` notes there
            what is larger than amax allows for, as amax does.
    """

    mean: torch.Tensor | None = None
    amax: torch.Tensor | None = None
    outgrown: torch.Tensor | None = None


def token_stats(
    x: torch.Tensor,
    shift: int = 0,
    mean: bool = True,
    granularity: str | None = None,
    overlap: str = "none",
    launches: Launches | None = None,
) -> TokenStats:
    """Statistics over the tokens of x (batch, seqlen, heads, head_dim), bfloat16 or float16.

    Args:
        shift: one token in 2**shift is looked at, see `hopper_fa.token_stats.sampled_tokens`; 0 to 6.
        mean: whether it is wanted.
        granularity: "tensor", "head", "channel": whose maxima are wanted; None: none.
        overlap: see `quantize_qkv`; "all" not for maxima that channels share.
        launches: where the launch is put, to be made by the caller; None: it is made.
    """
    batch, seqlen, heads, head_dim = x.shape
    of_x = torch.empty(batch, heads, head_dim, dtype=torch.float32, device=x.device) if mean else None
    amax = outgrown = None
    if granularity is not None:
        shape = {"tensor": (1,), "head": (batch, heads)}.get(granularity, (batch, heads, head_dim))
        amax = torch.empty(shape, dtype=torch.int32, device=x.device)
        if shift:
            outgrown = torch.empty_like(amax)

    def launch() -> None:
        # fmt: off
        _run(
            _C.token_stats, x, shift, _pointer(of_x), _pointer(amax),
            _C.GRANULARITIES[granularity or "none"], _pointer(outgrown), _C.OVERLAPS[overlap],
        )
        # fmt: on

    _make(launch, launches)
    return TokenStats(of_x, amax, outgrown)


def v_stats(
    v: torch.Tensor, recipe: Fp8Recipe, overlap: str = "none", launches: Launches | None = None
) -> TokenStats:
    """The statistics of V that `quantize_v` needs by `recipe`; overlap, launches: as in `token_stats`."""
    if not _has_v_stats(recipe):
        return TokenStats()
    granularity = None if recipe.v_granularity == "none" else recipe.v_granularity
    return token_stats(v, recipe.v_stats_shift(v.shape[1]), recipe.smooth_v, granularity, overlap, launches)


def _has_v_stats(recipe: Fp8Recipe) -> bool:
    return recipe.smooth_v or recipe.v_granularity != "none"


def quantize_rows(
    x: torch.Tensor,
    recipe: Fp8Recipe,
    mean: torch.Tensor | None,
    other_mean: torch.Tensor | None,
    group: int,
    queries: bool,
    overlap: str = "none",
    launches: Launches | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Q or K in 8 bits.

    Args:
        x: (batch, seqlen, heads, head_dim), bfloat16 or float16.
        mean: (batch, heads, head_dim) float32, subtracted from x; other_mean: that of K for Q, of Q for K.
        group: query heads a key/value head.
        queries: x is Q.
        overlap: see `quantize_qkv`; "all" not for scales of more rows than a block.
        launches: as in `token_stats`.

    Returns:
        codes (batch, seqlen, heads, pitch), scales (batch, heads, groups), and the products of rows and
        other_mean, (batch, query heads, seqlen) float32: of the unsmoothed rows for Q (lse_shift), of the
        smoothed ones for K (key_bias); None without other_mean.
    """
    batch, seqlen, heads, head_dim = x.shape
    granularity = recipe.q_granularity if queries else recipe.k_granularity
    block = Q_BLOCK if queries else K_BLOCK
    groups = {"token": seqlen, "block": -(-seqlen // block)}.get(granularity, 1)
    pitch = -(-head_dim // PITCH) * PITCH
    codes = torch.empty(batch, seqlen, heads, pitch, dtype=_CODES[recipe.qk_dtype], device=x.device)
    scale = torch.empty(batch, heads, groups, dtype=torch.float32, device=x.device)
    dots = None
    if other_mean is not None:
        query_heads = heads if queries else heads * group
        dots = torch.empty(batch, query_heads, seqlen, dtype=torch.float32, device=x.device)
    amax = None
    if granularity not in _ONE_PASS:
        amax = torch.empty(max(1, batch * heads), 2, dtype=torch.int32, device=x.device)
    rotate = recipe.rotation == "hadamard"
    signs = sign_bits(head_dim, recipe.rotation_seed) if rotate else b""

    def launch() -> None:
        # fmt: off
        _run(
            _C.quantize_rows, x, _C.DTYPES[recipe.qk_dtype], queries, group, _C.GRANULARITIES[granularity],
            block, _pointer(mean), rotate, signs, _pointer(other_mean), _pointer(dots), _pointer(amax),
            _pointer(codes), _pointer(scale), _C.OVERLAPS[overlap],
        )
        # fmt: on

    _make(launch, launches)
    return codes, scale, dots


def quantize_v(
    v: torch.Tensor,
    recipe: Fp8Recipe,
    stats: TokenStats,
    overlap: str = "none",
    launches: Launches | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """V in e4m3 in the layout of `QuantizedQKV.v`; v_scale and v_mean, (batch, heads, head_dim).

    Args:
        v: (batch, seqlen, heads, head_dim), bfloat16 or float16.
        stats: of `v_stats`. Its mean becomes v_mean in its place, its outgrown is written.
        overlap: see `quantize_qkv`; launches: as in `token_stats`.
    """
    batch, seqlen, heads, head_dim = v.shape
    scale = torch.empty(batch, heads, head_dim, dtype=torch.float32, device=v.device)
    out = _empty_v(v)
    mean, workspace = stats.mean, None
    if recipe.compensate_v:
        mean = torch.empty_like(scale) if mean is None else mean
        floats = _C.quantize_v_workspace(batch, seqlen, heads, head_dim)
        workspace = torch.empty(max(1, floats), dtype=torch.float32, device=v.device)

    def launch() -> None:
        # fmt: off
        _run(
            _C.quantize_v, v, _pointer(mean), recipe.smooth_v, recipe.compensate_v, _pointer(stats.amax),
            _C.GRANULARITIES[recipe.v_granularity], _pointer(stats.outgrown), _pointer(out), _pointer(scale),
            _pointer(workspace), _C.OVERLAPS[overlap],
        )
        # fmt: on

    _make(launch, launches)
    return out, scale, mean


def transpose_v(v: torch.Tensor) -> torch.Tensor:
    """V (batch, seqlen, heads, head_dim) that is float8_e4m3fn already, in the layout of `QuantizedQKV.v`."""
    v = _aligned(v)
    out = _empty_v(v)
    none, after_all = _C.GRANULARITIES["none"], _C.OVERLAPS["none"]
    _run(_C.quantize_v, v, 0, False, False, 0, none, 0, _pointer(out), 0, 0, after_all)
    return out


def _empty_v(v: torch.Tensor) -> torch.Tensor:
    batch, seqlen, heads, head_dim = v.shape
    shape = (batch, heads, _C.tile_columns(head_dim) + 1, -(-seqlen // PITCH) * PITCH)
    return torch.empty(shape, dtype=torch.float8_e4m3fn, device=v.device)


def _pointer(t: torch.Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


def _aligned(t: torch.Tensor) -> torch.Tensor:
    """`validation.resolved` t, copied if the kernels could not read its rows 16 bytes at a time."""
    t = resolved(t)
    *strides, last = t.stride()
    sound = last == 1 and t.data_ptr() % 16 == 0
    if sound and any(stride % 8 for stride in strides):
        sound = all(stride % 8 == 0 or size <= 1 for stride, size in zip(strides, t.shape[:3], strict=True))
    return t if sound else t.clone(memory_format=torch.contiguous_format)


def _make(launch: Callable[[], None], launches: Launches | None) -> None:
    """Make a launch now, or leave it to whoever has `launches`."""
    if launches is None:
        launch()
    else:
        launches.append(launch)


def _run(function: Any, x: torch.Tensor, *arguments: Any) -> None:
    """Call one of _C's functions with x's dtype, address, strides and sizes before `arguments`."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return _run(function, x, *arguments)
    dtype = "e4m3" if x.dtype == torch.float8_e4m3fn else DTYPE_NAMES[x.dtype]
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    status = function(_C.DTYPES[dtype], x.data_ptr(), *x.stride()[:3], *x.shape, *arguments, stream)
    if status != _C.STATUS_OK:
        raise RuntimeError(f"hopper_fa quantisation was not launched: {STATUS_SENTENCES[status]}.")
