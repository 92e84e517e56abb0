"""What the backward of a recipe costs: beside the 16-bit backward of the same problem.

    python experiments/recipe_backward.py

16k tokens and 2048 channels, normal random. A recipe's backward runs on the forward's codes: it widens them
to 16 bits, then runs the products of the 16-bit backward with scales in float32, and brings the gradients
back from the rotated basis. `over_16_bit` is its time over that of the 16-bit backward. Launches are captured
in CUDA graphs and interleaved.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import command_line
import results
import torch
from shapes import HEAD_DIMS, HIDDEN, TOKENS, Shape
from timing import GpuMonitor, Runner, device_facts, interleave

from hopper_fa import flash_attn_func, kernels, quantize_kernels
from hopper_fa.backend import run_quantized
from hopper_fa.quantization import sign_bits
from hopper_fa.recipe import Fp8Recipe

PRESETS = ("default", "accurate", "causal_safe", "fa3", "fa3_paper")


def subjects(shape: Shape, presets: list[str], seed: int) -> dict[str, Callable[[], object]]:
    """The backward of the call in 16 bits, and of each preset's."""
    tensors = shape.inputs(seed)
    dout = torch.randn_like(tensors[0])
    scale = shape.head_dim**-0.5
    gradients = [torch.empty_like(t) for t in tensors]
    out, lse = flash_attn_func(*tensors, scale, shape.causal, return_lse=True)

    def plain() -> None:
        kernels.backward(dout, *tensors, out, lse, None, *gradients, scale, shape.causal)

    calls: dict[str, Callable[[], object]] = {"16 bit": plain}
    for name in presets:
        recipe: Fp8Recipe = getattr(Fp8Recipe, name)()
        qkv = quantize_kernels.quantize_qkv(*tensors, recipe)
        forward = run_quantized(qkv, scale, shape.causal, dout.dtype, "cuda")
        signs = sign_bits(shape.head_dim, recipe.rotation_seed)

        def quantized(qkv=qkv, forward=forward, signs=signs) -> None:
            kernels.backward_quantized(
                dout, qkv, *forward, None, *gradients, scale, shape.causal, False, signs
            )

        calls[name] = quantized
    return calls


def main() -> None:
    parser = command_line.new_parser(__doc__)
    command_line.add_timing(parser, rounds=7, batch_ms=10.0)
    parser.add_argument("--seqlens", type=int, nargs="+", default=[1024, 4096, 16384])
    parser.add_argument("--head-dims", type=int, nargs="+", default=list(HEAD_DIMS))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS), choices=PRESETS)
    options = parser.parse_args()
    command_line.require_gpu()
    monitor = GpuMonitor()
    result = {
        "experiment": "recipe_backward",
        "made": results.provenance(),
        "device": device_facts(monitor),
        "settings": {"rounds": options.rounds, "batch_ms": options.batch_ms},
        "rows": [],
    }
    start = time.monotonic()
    for head_dim in options.head_dims:
        for seqlen in options.seqlens:
            for causal in (False, True):
                heads = HIDDEN // head_dim
                shape = Shape(max(1, TOKENS // seqlen), seqlen, heads, heads, head_dim, causal, options.dtype)
                calls = subjects(shape, options.presets, command_line.seed_of(options))
                runners = {name: Runner(call, options.batch_ms) for name, call in calls.items()}
                samples = interleave(runners, options.rounds, monitor)
                base = samples["16 bit"].median_ms
                rows = [
                    {
                        **shape.as_row(),
                        "recipe": name,
                        **sample.as_row(),
                        "over_16_bit": sample.median_ms / base,
                    }
                    for name, sample in samples.items()
                ]
                result["rows"] += rows
                ratios = ", ".join(f"{r['recipe']} {r['over_16_bit']:.3f}" for r in rows[1:])
                print(f"{shape}: 16 bit {1e3 * base:.0f} us; {ratios}", flush=True)
    result["seconds"] = time.monotonic() - start
    results.save(result, options.out / "recipe_backward")


if __name__ == "__main__":
    main()
