"""Fixtures of both test trees. This file also puts tests/ on sys.path, so that a test can `import cases`."""

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

SESSION_SEED = int(os.environ.get("HOPPER_FA_TEST_SEED") or int.from_bytes(os.urandom(3), "little"))


def pytest_report_header(config: pytest.Config) -> str:
    return f"hopper_fa: inputs are random; repeat this run with HOPPER_FA_TEST_SEED={SESSION_SEED}"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For many operations on small tensors, where threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """A seed that differs from test to test and from run to run; printed, to repeat a failure.

    torch's own generator starts from it too, so that no test draws anything that cannot be repeated.
    """
    value = (SESSION_SEED + zlib.crc32(request.node.name.encode())) % 2**31
    print(f"seed {value} (HOPPER_FA_TEST_SEED={SESSION_SEED})")
    torch.manual_seed(value)
    return value
