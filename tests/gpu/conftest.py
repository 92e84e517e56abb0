"""GPU tests: skipped, with the reason, where no Hopper GPU can run the kernels."""

from pathlib import Path

import pytest
import torch

from hopper_fa import kernels

HERE = Path(__file__).parent


def why_no_gpu() -> str:
    """One line that says why the kernels cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA GPU"
    capability = torch.cuda.get_device_capability()
    if capability != (9, 0):
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, the kernels need (9, 0)"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_no_gpu()
    if reason:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=reason))


def skip_unless_built(request: pytest.FixtureRequest, family: str) -> None:
    """By (dtype, head dim, variant), read off the test's parameters."""
    parameters = request.node.callspec.params
    case = parameters.get("case")
    head_dim = parameters.get("head_dim", case.head_dim if case else 128)
    dtype = parameters.get("dtype", "bf16")
    variant = parameters.get("variant", "default")
    tile = getattr(kernels, f"{family}_tile")(head_dim, variant)
    if dtype not in tile["dtypes"]:
        pytest.skip(f"this build holds no {dtype} {family} for head_dim {tile['head_dim']} ({variant})")


@pytest.fixture
def instance(request: pytest.FixtureRequest) -> None:
    """Skip a test whose forward kernel this build does not hold."""
    skip_unless_built(request, "forward")


@pytest.fixture
def backward_instance(request: pytest.FixtureRequest) -> None:
    """Skip a test whose backward kernel this build does not hold."""
    skip_unless_built(request, "backward")
