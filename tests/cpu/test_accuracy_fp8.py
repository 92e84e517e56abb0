"""The FP8 study's inputs, reference, published values and verdicts."""

import dataclasses

import pytest
import torch

from hopper_fa import Fp8Recipe, attention_reference, quantize_qkv
from hopper_fa.accuracy_fp8 import (
    RECIPES,
    SETUPS,
    attend,
    forward_16bit,
    fp8_accuracy,
    implementation,
    reference,
    study_inputs,
    table_line,
)


@pytest.mark.parametrize("kind", ["normal", "outliers", "k_bias", "qk_bias", "long"])
def test_inputs(kind: str, seed: int) -> None:
    q, k, v = study_inputs(kind, 300, 2000, 2, seed=seed)
    again = study_inputs(kind, 300, 2000, 2, seed=seed)
    assert all(torch.equal(a, b) for a, b in zip((q, k, v), again, strict=True))
    assert (
        q.dtype == torch.float32 and q.shape == (1, 300, 2, 128) and k.shape == v.shape == (1, 2000, 2, 128)
    )
    # One vector of standard deviation 3 for all tokens of a head.
    for t, biased in ((q, kind == "qk_bias"), (k, kind in ("k_bias", "qk_bias"))):
        spread = t.mean(1).std().item()
        assert 2.3 < spread < 3.8 if biased else spread < 0.2
    assert v.mean().item() == pytest.approx(1.0 if kind == "long" else 0.0, abs=0.02)
    assert (v.abs().max() > 8) == (kind == "outliers")


def test_inputs_refuse_unknown_kinds() -> None:
    with pytest.raises(ValueError, match="kind is .*it must be one of 'normal'"):
        study_inputs("strange", 8, 8)


def test_reference_in_parts(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    q, k, v = study_inputs("normal", 37, 64, 2, seed=seed)
    whole = attention_reference(q, k, v)
    monkeypatch.setattr("hopper_fa.accuracy_fp8._SCORES_AT_ONCE", 64 * 2 * 10)
    for part, ref in zip(reference(q, k, v), whole, strict=True):
        torch.testing.assert_close(part, ref)


def test_emulator_runs_on_a_cpu(seed: int) -> None:
    assert implementation("cpu") == "emulator"
    q, k, v = (t.bfloat16() for t in study_inputs("normal", 64, 64, seed=seed))
    qkv = quantize_qkv(q, k, v, Fp8Recipe.causal_safe())
    with pytest.warns(UserWarning, match="the emulator runs what the kernel did not"):
        out, _, ran_on = attend(qkv, "kernel", causal=True)  # no kernel on a CPU, whoever promises one
    assert ran_on == "emulator"
    assert torch.equal(out[:, :1], attend(qkv, "emulator", causal=True)[0][:, :1])
    assert forward_16bit(q, k, v)[2] == "emulator"


def test_every_published_value_and_target_has_a_row() -> None:
    for setup in SETUPS.values():
        assert set(setup.beside) | set(setup.targets) <= {"BF16", *RECIPES}


def test_rows_and_verdicts(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    setup = dataclasses.replace(SETUPS["k_bias"], targets={"default": 1.0, "accurate": 1e-9}, bias_target=1.0)
    monkeypatch.setitem(SETUPS, "k_bias", setup)
    rows = {
        row["attention"]: row for row in fp8_accuracy(["k_bias"], heads=1, keys=256, queries=64, seed=seed)
    }
    assert list(rows) == ["BF16", *RECIPES]
    assert rows["default"]["met"] is True and rows["accurate"]["met"] is False and rows["fa3"]["met"] is None
    assert table_line(rows["default"]).endswith("rel. L2 1.0e+00 met")
    assert table_line(rows["accurate"]).endswith("missed")
    assert "rel. L2 9.6e-02 H200" in table_line(rows["fa3"])
    # Smoothing K is what these inputs need.
    assert rows["default"]["relative_l2"] < 0.6 * rows["fa3"]["relative_l2"]
    monkeypatch.setitem(SETUPS, "k_bias", dataclasses.replace(setup, bias_target=0.0))
    rows = list(fp8_accuracy(["k_bias"], heads=1, keys=256, queries=64, seed=seed))
    assert [row["met"] for row in rows if row["attention"] == "default"] == [False]
