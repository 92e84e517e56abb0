"""The FP8 tensor core's accumulator against its model in hopper_fa/tensor_core.py, bit for bit."""

import pytest
import torch

from hopper_fa import kernels
from hopper_fa.tensor_core import HOPPER, PROBE_INPUTS, probe_operands

PROBLEMS = 4


@pytest.mark.parametrize("k", [32, 64, 128, 4096])
@pytest.mark.parametrize("distribution", PROBE_INPUTS)
def test_model_of_the_accumulator(distribution: str, k: int, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    a, b, c = probe_operands(distribution, PROBLEMS, k, generator)
    measured = kernels.accumulator_probe(a, b, c)
    modelled = HOPPER.matmul_add(a.float(), b.float().transpose(1, 2), c)
    wrong = (measured != modelled).float().mean().item()
    exact = a.double() @ b.double().transpose(1, 2) + c
    scale = exact.abs().max().item()
    assert wrong == 0, (
        f"{100 * wrong:.1f}% of the sums differ, by at most {(measured - modelled).abs().max().item():.3e}; "
        f"the tensor core is {(measured - exact).abs().max().item():.3e} from exact, of {scale:.3e}"
    )
