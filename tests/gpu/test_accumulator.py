"""The FP8 tensor core's accumulator against its model in hopper_fa/tensor_core.py, bit for bit."""

import pytest
import torch

from hopper_fa import kernels
from hopper_fa.tensor_core import HOPPER

PROBLEMS = 4


def operands(
    distribution: str, k: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """a (PROBLEMS, 64, k), b (PROBLEMS, 8, k) in e4m3 and c (PROBLEMS, 64, 8) in float32 of few bits."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda")

    a, b = normal(PROBLEMS, 64, k), normal(PROBLEMS, 8, k)
    c = torch.zeros(PROBLEMS, 64, 8, device="cuda")
    if distribution == "positive":  # one-signed sums, as of P V where V has a mean
        a, b = a.abs() * 64, b.abs() + 1
    elif distribution == "ones":
        a, b = torch.full_like(a, 256.0), torch.ones_like(b)
    elif distribution == "wide":  # products of all magnitudes, so that most of a step's bits are cut
        a, b = a * 2.0 ** (6 * normal(PROBLEMS, 64, k)).clamp(-9, 7), b * 2.0 ** normal(PROBLEMS, 8, k)
    elif distribution == "one_large":
        a[..., 0], b[..., 0] = 448.0, 448.0
    elif distribution == "start":
        c = (1000 * normal(PROBLEMS, 64, 8)).bfloat16().float()
    return (
        a.clamp(-448, 448).to(torch.float8_e4m3fn),
        b.clamp(-448, 448).to(torch.float8_e4m3fn),
        c,
    )


@pytest.mark.parametrize("k", [32, 64, 128, 4096])
@pytest.mark.parametrize("distribution", ["normal", "positive", "ones", "wide", "one_large", "start"])
def test_model_of_the_accumulator(distribution: str, k: int, seed: int) -> None:
    generator = torch.Generator("cuda").manual_seed(seed)
    a, b, c = operands(distribution, k, generator)
    measured = kernels.accumulator_probe(a, b, c)
    modelled = HOPPER.matmul_add(a.float(), b.float().transpose(1, 2), c)
    wrong = (measured != modelled).float().mean().item()
    exact = a.double() @ b.double().transpose(1, 2) + c
    scale = exact.abs().max().item()
    assert wrong == 0, (
        f"{100 * wrong:.1f}% of the sums differ, by at most {(measured - modelled).abs().max().item():.3e}; "
        f"the tensor core is {(measured - exact).abs().max().item():.3e} from exact, of {scale:.3e}"
    )
