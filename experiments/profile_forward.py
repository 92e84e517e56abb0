"""A few launches of our forward kernel on one shape, to be run under a profiler:

    ncu --set full -k regex:forward -s 2 -c 1 python experiments/profile_forward.py --head-dim 128

or by gpu_run.py --ncu.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import torch
from fp8_peers import fp8_peer
from shapes import Shape
from tiles import variant_call

from hopper_fa import Fp8Recipe


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--seqlen", type=int, default=4096)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "e4m3", "int8"), default="bf16")
    parser.add_argument("--variant", default="default", help="of the tile table")
    parser.add_argument("--launches", type=int, default=4)
    options = parser.parse_args()
    heads = 2048 // options.head_dim
    batch = max(16384 // options.seqlen, 1)
    fp8 = options.dtype in ("e4m3", "int8")
    dtype = "bf16" if fp8 else options.dtype
    shape = Shape(batch, options.seqlen, heads, heads, options.head_dim, options.causal, dtype)
    inputs = shape.inputs(seed=0)
    if fp8:
        recipe = replace(Fp8Recipe.default(), qk_dtype=options.dtype)
        call = fp8_peer("profiled", recipe, options.variant).prepare(shape, *inputs)
    else:
        call = variant_call(options.variant, *inputs, shape.causal)
    for _ in range(options.launches):
        call()
    torch.cuda.synchronize()
    print(shape)


if __name__ == "__main__":
    main()
