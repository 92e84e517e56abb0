"""Tensors that are made once a device: which are kept, and that another thread makes them."""

import threading

import pytest
import torch

from hopper_fa import constants
from hopper_fa.constants import constant, lasting

HOPPER = torch.device("cuda", 0)


def test_a_cpu_keeps_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "_KEPT", {})
    device = torch.device("cpu")
    for count in (0, 1, 100):
        t = constant(0.5, count, device)
        assert t.dtype == torch.float32 and t.shape == (count,) and (t == 0.5).all()
    assert not any(constants._KEPT.values())


def test_what_a_gpu_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that this machine lacks: copies to it stay here."""
    capturing = False
    full, to = torch.full, torch.Tensor.to
    monkeypatch.setattr(constants, "_KEPT", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch, "full", lambda *a, device, **options: full(*a, device="cpu", **options))
    monkeypatch.setattr(torch.Tensor, "to", lambda t, device: to(t, "cpu"))

    capturing = True
    fresh = constant(1.0, 10, HOPPER)
    assert fresh.shape == (10,) and not any(constants._KEPT.values())
    capturing = False
    kept = constant(1.0, 10, HOPPER)
    assert kept.numel() >= 10 and (kept == 1).all()
    capturing = True
    assert constant(1.0, kept.numel(), HOPPER) is kept  # it was there before the graph
    capturing = False
    assert constant(1.0, 10, torch.device("cuda", 1)) is not kept
    zeros = constant(0.0, 10, HOPPER)
    assert (zeros == 0).all() and constant(0.0, 5, HOPPER) is zeros
    larger = constant(1.0, kept.numel() + 1, HOPPER)
    assert larger.numel() == 2 * kept.numel() and (larger == 1).all()
    assert constant(1.0, 10, HOPPER) is larger
    assert any(t is kept for t in constants._KEPT[HOPPER, 1.0])  # launches may still read it
    huge = constants._MOST + 1
    assert constant(1.0, huge, HOPPER) is not constant(1.0, huge, HOPPER)
    assert constant(1.0, 10, HOPPER) is larger


def test_another_thread_makes_what_lasts() -> None:
    """So that neither a graph's pool nor a mode of the calling thread is in its way."""
    makers = []

    def make() -> torch.Tensor:
        makers.append(threading.get_ident())
        return torch.zeros(3, device="cpu", dtype=torch.float32)

    with torch.inference_mode():
        made = lasting(make)
    assert makers != [threading.get_ident()] and len(makers) == 1
    assert not made.is_inference()
