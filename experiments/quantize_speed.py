"""Speed of the quantisation kernels: each beside a device copy that moves as many bytes.

    python experiments/quantize_speed.py

Inputs of self-attention over 16k tokens and 2048 channels, normal random. `bytes` is what a kernel must move:
every input and output once, of an input that it reads in two passes both; `bandwidth_tb_s` is bytes over
time, and `of_copy` the time of a copy of as many bytes, half of them read and half written, over the
kernel's. Kernels and copies are captured in CUDA graphs and interleaved. L2 holds most of a tensor: above 1,
`of_copy` says that a kernel found there what an earlier one had read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import command_line
import results
import torch
from shapes import HEAD_DIMS, HIDDEN, TOKENS, Shape
from timing import GpuMonitor, Runner, device_facts, interleave

from hopper_fa import quantize_kernels
from hopper_fa.recipe import Fp8Recipe


@dataclass(frozen=True)
class Subject:
    """One call and the bytes that it must move."""

    call: Callable[[], object]
    bytes: int


def subjects(shape: Shape, seed: int) -> dict[str, Subject]:
    """What is timed, by name: the kernels one by one, then all that a preset needs."""
    q, k, v = shape.inputs(seed)
    heads = shape.heads * shape.batch
    default, fa3 = Fp8Recipe.default(), Fp8Recipe.fa3()
    every = replace(default, sample_stats=False)
    k_shift, v_shift = default.stats_shift(shape.seqlen), default.v_stats_shift(shape.seqlen)
    k_mean = quantize_kernels.token_stats(k, k_shift).mean
    v_stats = quantize_kernels.v_stats(v, default)
    e4m3 = v.to(torch.float8_e4m3fn)
    read, codes = q.nbytes, q.nbytes // 2  # of one tensor in 16 and in 8 bits
    v_codes = codes * (shape.head_dim + 1) // shape.head_dim
    scores = 4 * heads * shape.seqlen  # a float32 a row
    channel = 4 * heads * shape.head_dim * -(-shape.seqlen // 128)  # a float32 a channel and 128 tokens

    def rows(t: torch.Tensor, recipe: Fp8Recipe, queries: bool) -> Callable[[], object]:
        means = (None, k_mean) if queries else (k_mean, None)
        means = means if recipe.smooth_k else (None, None)
        return lambda: quantize_kernels.quantize_rows(t, recipe, *means, 1, queries)

    plain = replace(default, rotation="none")
    uncompensated = replace(default, compensate_v=False)
    return {
        "mean of K, every token": Subject(lambda: quantize_kernels.token_stats(k), read),
        "mean of K": Subject(lambda: quantize_kernels.token_stats(k, k_shift), read >> k_shift),
        "mean and maxima of V, every token": Subject(lambda: quantize_kernels.v_stats(v, every), read),
        "mean and maxima of V": Subject(lambda: quantize_kernels.v_stats(v, default), read >> v_shift),
        "Q, block scales": Subject(rows(q, default, True), read + codes + scores),
        "Q, token scales": Subject(rows(q, Fp8Recipe.accurate(), True), read + codes + 2 * scores),
        "K, block scales": Subject(rows(k, default, False), read + codes),
        "K, block scales, no rotation": Subject(rows(k, plain, False), read + codes),
        "K, e4m3, head scales, no rotation": Subject(rows(k, fa3, False), 2 * read + codes),
        "V": Subject(lambda: quantize_kernels.quantize_v(v, uncompensated, v_stats), read + v_codes),
        "V, compensated": Subject(
            lambda: quantize_kernels.quantize_v(v, default, v_stats), read + v_codes + 2 * channel
        ),
        "V, e4m3 already": Subject(lambda: quantize_kernels.transpose_v(e4m3), codes + v_codes),
        "preset default": Subject(
            lambda: quantize_kernels.quantize_qkv(q, k, v, default),
            3 * read + (read >> k_shift) + (read >> v_shift) + 2 * codes + v_codes,
        ),
        "preset default, every token": Subject(
            lambda: quantize_kernels.quantize_qkv(q, k, v, every), 5 * read + 2 * codes + v_codes
        ),
        "preset causal_safe": Subject(
            lambda: quantize_kernels.quantize_qkv(q, k, v, Fp8Recipe.causal_safe()),
            3 * read + 2 * codes + v_codes,
        ),
        "preset fa3": Subject(
            lambda: quantize_kernels.quantize_qkv(q, k, v, fa3), 6 * read + 2 * codes + v_codes
        ),
    }


def copy_of(size: int) -> Subject:
    """A device copy that reads size / 2 bytes and writes as many."""
    source, target = (torch.empty(size // 2, dtype=torch.uint8, device="cuda") for _ in range(2))
    return Subject(lambda: target.copy_(source), size // 2 * 2)


def measure(shape: Shape, options, monitor: GpuMonitor) -> list[dict]:
    """One row a subject of `shape`."""
    timed = subjects(shape, command_line.seed_of(options))
    runners = {name: Runner(subject.call, options.batch_ms) for name, subject in timed.items()}
    sizes = sorted({subject.bytes for subject in timed.values()})
    runners |= {f"copy of {size}": Runner(copy_of(size).call, options.batch_ms) for size in sizes}
    samples = interleave(runners, options.rounds, monitor)
    rows = []
    for name, subject in timed.items():
        ms, copy_ms = samples[name].median_ms, samples[f"copy of {subject.bytes}"].median_ms
        speed = {"bytes": subject.bytes, "copy_ms": copy_ms, "of_copy": copy_ms / ms}
        speed["bandwidth_tb_s"] = subject.bytes / (ms * 1e9)
        note = {"note": runners[name].note} if runners[name].note else {}
        rows.append({**shape.as_row(), "kernel": name, **samples[name].as_row(), **speed, **note})
    return rows


def main() -> None:
    parser = command_line.new_parser(__doc__)
    command_line.add_timing(parser, rounds=7, batch_ms=10.0)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[4096])
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    options = parser.parse_args()
    command_line.require_gpu()
    if options.dtype not in quantize_kernels.DTYPES:
        raise SystemExit(f"this build has no quantisation kernels for {options.dtype}; see instances.cmake.")
    monitor = GpuMonitor()
    result = {
        "experiment": "quantize_speed",
        "made": results.provenance(),
        "device": device_facts(monitor),
        "settings": {"rounds": options.rounds, "batch_ms": options.batch_ms},
        "rows": [],
    }
    start = time.monotonic()
    for head_dim in options.head_dims:
        for seqlen in options.seqlens:
            heads = HIDDEN // head_dim
            shape = Shape(max(1, TOKENS // seqlen), seqlen, heads, heads, head_dim, False, options.dtype)
            rows = measure(shape, options, monitor)
            result["rows"] += rows
            header = (str(shape), "us", "TB/s", "% of copy")
            table = [(r["kernel"], 1e3 * r["ms"], r["bandwidth_tb_s"], 100 * r["of_copy"]) for r in rows]
            print(results.table(header, table), flush=True)
    result["seconds"] = time.monotonic() - start
    results.save(result, options.out / "quantize_speed")


if __name__ == "__main__":
    main()
