"""A few tiny problems for compute-sanitizer, each kernel once with and once without a mask:

    compute-sanitizer --tool memcheck --kernel-name kns=hopper_fa python tests/gpu/sanitizer_cases.py

and the same with racecheck and synccheck. torch's caching allocator is switched off, so that memcheck sees a
step past a tensor's end. Every output is compared with float64 as well.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch

from hopper_fa import Fp8Recipe, flash_attn_func, kernels
from hopper_fa.metrics import error_metrics
from hopper_fa.reference import attention_reference

# Input dtype, recipe of 8-bit kernels, largest relative L2 error.
DTYPES = {
    "bf16": (torch.bfloat16, None, 1.5e-2),
    "fp16": (torch.float16, None, 2e-3),
    "e4m3": (torch.bfloat16, replace(Fp8Recipe.default(), qk_dtype="e4m3"), 0.1),
    "int8": (torch.bfloat16, Fp8Recipe.default(), 0.1),
}

# (batch, heads_q, heads_kv, seqlen_q, seqlen_k): odd tails, several key blocks, one key, no key, many tiles.
PROBLEMS = [(1, 2, 1, 113, 239), (2, 2, 2, 200, 520), (1, 1, 1, 1, 1), (1, 2, 2, 70, 0), (10, 16, 8, 130, 90)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, action="append", help="default: every one built, and 40")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="default: every one built")
    options = parser.parse_args()
    built = {(row["head_dim"], dtype) for row in kernels.FORWARD_TILES for dtype in row["dtypes"]}
    wanted = [(d, dtype) for d, dtype in sorted(built | {(40, dtype) for d, dtype in built if d == 64})]
    generator = torch.Generator("cuda").manual_seed(0)
    runs = 0
    for head_dim, name in wanted:
        if head_dim not in (options.head_dim or [head_dim]) or name not in (options.dtype or [name]):
            continue
        dtype, recipe, allowed = DTYPES[name]
        for batch, heads_q, heads_kv, seqlen_q, seqlen_k in PROBLEMS:
            sizes = [
                (batch, s, h, head_dim)
                for s, h in ((seqlen_q, heads_q), (seqlen_k, heads_kv), (seqlen_k, heads_kv))
            ]
            q, k, v = (torch.randn(size, generator=generator, device="cuda").to(dtype) for size in sizes)
            for causal in (False, True):
                out, lse = flash_attn_func(q, k, v, causal=causal, recipe=recipe, return_lse=True)
                truth, true_lse = attention_reference(q.cpu(), k.cpu(), v.cpu(), causal=causal)
                error = error_metrics(out.cpu(), truth)["relative_l2"]
                problem = (
                    f"d{head_dim} {name} {tuple(q.shape)} on {seqlen_k} keys {'causal' if causal else 'full'}"
                )
                if not error <= allowed:
                    raise SystemExit(f"{problem}: relative L2 error {error:.2e} exceeds {allowed}")
                atol = 1e-3 if recipe is None else 0.25  # a row of few keys has few errors to average
                torch.testing.assert_close(lse.cpu().double(), true_lse, atol=atol, rtol=1e-6)
                runs += 1
    if runs == 0:
        raise SystemExit("nothing ran: this build holds no instance of the head dim and dtype asked for")
    print(f"{runs} problems agree with float64")


if __name__ == "__main__":
    main()
