"""The FP8 tensor core's sums in torch: exact products, an accumulator of few bits that cuts toward zero."""

import itertools
from dataclasses import dataclass

import torch

_ELEMENTS_AT_ONCE = 1 << 18  # products held at a time on a CPU: about its second-level cache
_ELEMENTS_AT_ONCE_GPU = 1 << 27


@dataclass(frozen=True)
class Accumulator:
    """How the tensor core adds products of two e4m3 numbers. The one place for these facts.

    Attributes:
        fraction_bits: kept below the leading bit of the largest term; what is smaller is cut off.
        group: products that are added in one step.
        joins_alignment: the accumulator is one of the terms. Otherwise the products are added by themselves
            and their sum is then added to the accumulator.

    Source of the values: DeepSeek-AI, "Insights into DeepSeek-V3", arXiv 2505.09343, section 3.1.1. Whether
    the accumulator joins the alignment is not said there.
    """

    fraction_bits: int = 13
    group: int = 32
    joins_alignment: bool = True

    def matmul_add(self, a: torch.Tensor, b: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """start + a @ b, `group` products a step.

        In a step the terms are cut, toward zero, at fraction_bits below the largest exponent among them,
        added exactly, and the sum is cut to fraction_bits of its own.

        Args:
            a: (..., m, k) float32 holding e4m3 values; b: (..., k, n), the same, broadcast against a.
            start: (..., m, n) float32, the shape of the result.
        """
        result = torch.empty_like(start)
        batch = start.shape[:-2]
        m, k = a.shape[-2:]
        n = b.shape[-1]
        a, b = a.expand(*batch, m, k), b.expand(*batch, k, n)
        limit = _ELEMENTS_AT_ONCE if a.device.type == "cpu" else _ELEMENTS_AT_ONCE_GPU
        rows = max(1, limit // (self.group * max(1, n)))
        for index in itertools.product(*map(range, batch)):
            for row in range(0, m, rows):
                block = slice(row, row + rows)
                acc = start[index][block]
                for j in range(0, k, self.group):
                    steps = slice(j, j + self.group)
                    products = a[index][block, steps, None] * b[index][steps]  # (rows, group, n)
                    acc = self._add(products, acc)
                result[index][block] = acc
        return result

    def _add(self, products: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
        """One step: products (rows, group, n) into acc (rows, n). The products are overwritten."""
        largest = torch.linalg.vector_norm(products, ord=float("inf"), dim=1)
        if self.joins_alignment:
            largest = torch.maximum(largest, acc.abs())
        # Exact powers of two; where all terms are below 2**-100 it does not matter where they are cut.
        exponent = (torch.frexp(largest).exponent - 1).clamp_(-100, 100)
        unit = torch.ldexp(torch.ones_like(largest), exponent - self.fraction_bits)
        per_unit = 1 / unit
        total = products.mul_(per_unit[:, None]).trunc_().sum(1)  # below 2**24, so exact
        if self.joins_alignment:
            return self._cut(total + (acc * per_unit).trunc_()) * unit
        return self._cut((total * unit).double() + acc)

    def _cut(self, x: torch.Tensor) -> torch.Tensor:
        """x with the fraction bits beyond fraction_bits set to 0, float32."""
        return (x.double().view(torch.int64) & -(1 << (52 - self.fraction_bits))).view(torch.float64).float()


HOPPER = Accumulator()
