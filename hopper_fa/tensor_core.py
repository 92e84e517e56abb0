"""The FP8 tensor core's sums in torch: exact products, an accumulator of few bits that cuts toward zero."""

import itertools
import math
from dataclasses import dataclass

import torch

_ELEMENTS_AT_ONCE = 1 << 18  # products held at a time on a CPU: about its second-level cache
_ELEMENTS_AT_ONCE_GPU = 1 << 27


@dataclass(frozen=True)
class Accumulator:
    """How the tensor core adds products of two e4m3 numbers. The one place for these facts.

    Attributes:
        fraction_bits: kept below the largest exponent of a term; what is smaller is cut off. A product's
            exponent is the sum of its factors' (-6 for a denormal), so the product may be more than twice
            that power of two, and less than it.
        group: products that are added in one step.
        joins_alignment: the accumulator is one of the terms. Otherwise the products are added by themselves
            and their sum is then added to the accumulator.

    Source of the values: DeepSeek-AI, "Insights into DeepSeek-V3", arXiv 2505.09343, section 3.1.1, and
    experiments/accumulator_probe.py on an H200, with which they agree bit for bit. What an exponent is, and
    that the accumulator joins the alignment, is the probe's finding.
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
        m, k, n = *a.shape[-2:], b.shape[-1]
        batch = start.shape[:-2]
        count = math.prod(batch)
        a = a.expand(*batch, m, k).reshape(count, m, k)
        b = b.expand(*batch, k, n).reshape(count, k, n)
        a_power, b_power = _power_of_two(a), _power_of_two(b)
        sums = start.reshape(count, m, n)
        result = torch.empty_like(sums)
        limit = _ELEMENTS_AT_ONCE if a.device.type == "cpu" else _ELEMENTS_AT_ONCE_GPU
        rows = max(1, limit // (self.group * max(1, n)))
        matrices = max(1, rows // max(1, m))
        for first, row in itertools.product(range(0, count, matrices), range(0, m, rows)):
            part, block = slice(first, first + matrices), slice(row, row + rows)
            acc = sums[part, block]
            for j in range(0, k, self.group):
                steps = slice(j, j + self.group)
                products = a[part, block, steps, None] * b[part, None, steps]  # (matrices, rows, group, n)
                powers = a_power[part, block, steps, None] * b_power[part, None, steps]
                acc = self._add(products, powers.amax(-2), acc)
            result[part, block] = acc
        return result.reshape(start.shape)

    def _add(self, products: torch.Tensor, largest: torch.Tensor, acc: torch.Tensor) -> torch.Tensor:
        """One step: products (..., group, n) into acc (..., n). The products are overwritten.

        largest: (..., n), the largest power of two that a product's exponent stands for.
        """
        if self.joins_alignment:
            largest = torch.maximum(largest, acc.abs())
        # Exact powers of two; where all terms are below 2**-100 it does not matter where they are cut.
        exponent = (torch.frexp(largest).exponent - 1).clamp_(-100, 100)
        # NOTE: torch.ldexp raises 2 to them in torch's default dtype.
        biased = exponent.long() + (1023 - self.fraction_bits)
        unit = (biased << 52).view(torch.float64).float()
        per_unit = 1 / unit
        total = products.mul_(per_unit[..., None, :]).trunc_().sum(-2)  # below 2**24, so exact
        if self.joins_alignment:
            return self._cut(total + (acc * per_unit).trunc_()) * unit
        return self._cut((total * unit).double() + acc)

    def _cut(self, x: torch.Tensor) -> torch.Tensor:
        """x with the fraction bits beyond fraction_bits set to 0, float32."""
        return (x.double().view(torch.int64) & -(1 << (52 - self.fraction_bits))).view(torch.float64).float()


def _power_of_two(x: torch.Tensor) -> torch.Tensor:
    """2 to the exponent of e4m3 numbers in float32, which is -6 for the denormal ones; 0 for 0."""
    power = (x.contiguous().view(torch.int32) & 0x7F800000).view(torch.float32)
    return power.clamp_(min=2.0**-6).masked_fill_(x == 0, 0.0)


HOPPER = Accumulator()

PROBE_INPUTS = ("normal", "positive", "ones", "wide", "one_large", "subnormal", "zero", "start")


def probe_operands(
    name: str, problems: int, k: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Inputs on which models of the accumulator differ.

    Args:
        name: one of PROBE_INPUTS. "wide": products of all magnitudes, so that most of a step's bits are cut;
            "subnormal": the largest product has a denormal e4m3 factor; "zero": the largest factor meets a
            zero; "start": the accumulator begins with numbers of its own.
    Returns:
        a (problems, 64, k) and b (problems, 8, k) in e4m3, c (problems, 64, 8) in float32 of few bits, on
        the generator's device.
    """

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device=generator.device)

    a, b = normal(problems, 64, k), normal(problems, 8, k)
    c = torch.zeros(problems, 64, 8, dtype=torch.float32, device=generator.device)
    if name == "positive":  # one-signed sums, as of P V where V has a mean
        a, b = a.abs() * 64, b.abs() + 1
    elif name == "ones":
        a, b = torch.full_like(a, 256.0), torch.ones_like(b)
    elif name == "wide":
        a, b = a * 2.0 ** (6 * normal(problems, 64, k)).clamp(-9, 7), b * 2.0 ** normal(problems, 8, k)
    elif name == "one_large":
        a[..., 0], b[..., 0] = 448.0, 448.0
    elif name == "subnormal":
        a, b = a / 32, b / 32
        a[..., 0], b[..., 0] = 2.0**-9, 256.0
    elif name == "zero":
        a, b = a / 32, b / 32
        a[..., 0], b[..., 0] = 0.0, 448.0
    elif name == "start":
        c = (1000 * normal(problems, 64, 8)).bfloat16().float()
    return (
        a.clamp(-448, 448).to(torch.float8_e4m3fn),
        b.clamp(-448, 448).to(torch.float8_e4m3fn),
        c,
    )
