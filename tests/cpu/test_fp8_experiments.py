"""The FP8 accuracy experiments, tiny, and their report."""

import math
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import fp8_accuracy
import fp8_published
import fp8_report
import fp8_stability
import fp8_studies
import results
from fp8_rows import merged

from hopper_fa import Fp8Recipe, attention_reference, error_metrics, quantize_qkv
from hopper_fa.accuracy_fp8 import one_thread, study_inputs

TINY = fp8_studies.Sizes(heads=1, keys=256, queries=32, short=128, long=(256,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of every experiment."""
    out = tmp_path_factory.mktemp("fp8")
    with one_thread():
        for name in fp8_accuracy.EXPERIMENTS:
            fp8_accuracy.run(name, TINY, out, float("inf"))
    return out


def rows_of(folder: Path, name: str) -> list[dict]:
    return results.load(folder / f"{name}.json")["rows"]


def test_report_has_every_experiment(folder: Path) -> None:
    text = fp8_report.write(folder).read_text()
    for name, (title, _, plot) in fp8_report.SECTIONS.items():
        assert f"## {name.upper()}: {title}" in text
        if plot:
            assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "Run by the emulator" in text and "cut short" not in text
    for value in (*fp8_published.FA3.values(), *fp8_published.H200_OUTLIERS.values()):
        assert f"{value:.2e}" in text


def test_report_of_runs_that_were_cut_short(folder: Path, tmp_path: Path) -> None:
    for name in fp8_accuracy.EXPERIMENTS:
        result = results.load(folder / f"{name}.json")
        results.save(
            {**result, "complete": False, "rows": result["rows"][:7]}, tmp_path / name, with_csv=False
        )
    text = fp8_report.write(tmp_path).read_text()
    assert text.count("cut short") == len(fp8_accuracy.EXPERIMENTS)


def test_report_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="run fp8_accuracy.py first"):
        fp8_report.write(tmp_path)


def test_every_row_has_every_metric(folder: Path) -> None:
    for name in ("e1", "kb", "e2", "e3", "e4", "e5", "e8", "e9"):
        for row in rows_of(folder, name):
            assert all(math.isfinite(row[metric]) for metric in fp8_report.ERRORS if metric != "lse_max_abs")
            assert row["implementation"] in ("emulator", "torch")


def test_e1_has_the_papers_seven(folder: Path) -> None:
    rows = {row["variant"]: row for row in rows_of(folder, "e1")}
    assert {name: rows[name]["published_rmse"] for name in fp8_published.FA3} == fp8_published.FA3
    assert (
        rows["FP16 standard"]["rmse"] < rows["BF16"]["rmse"] < rows["default"]["rmse"] < rows["fa3"]["rmse"]
    )


def test_e5_finds_the_predicted_share_of_zeros(folder: Path) -> None:
    rows = [row for row in rows_of(folder, "e5") if row["predicted_zero_share"] is not None]
    assert rows
    for row in rows:
        assert row["zero_share"] == pytest.approx(row["predicted_zero_share"], abs=0.12)
    assert fp8_published.p_cast_share(6.93 + math.log(256) - 1, 8.0) == pytest.approx(0.5, abs=0.01)


def test_e8_agrees_with_the_reference_in_float32(folder: Path) -> None:
    q, k, v = (t.bfloat16().float() for t in study_inputs("normal", 16, 100, 2))
    ref, _ = attention_reference(q, k, v)
    for out in (
        fp8_stability.standard_in("fp32", q, k, v),
        fp8_stability.flash_in("fp32", q, k, v, 32),
        fp8_stability.flash_in("fp32", q, k, v, 32, spread_maxima=True),
    ):
        torch.testing.assert_close(out.double(), ref, atol=2e-6, rtol=0)
    errors = {
        row["precision"]: row["max_abs"] for row in rows_of(folder, "e8") if row["variant"] == "standard"
    }
    assert errors["fp32"] < errors["fp16"] < errors["bf16"] < errors["e4m3, fp32 sums"]


def test_e9_truncation_shrinks(folder: Path) -> None:
    rows = merged(rows_of(folder, "e9"), "variant", "ties")
    assert rows["fa3", 1]["relative_bias"] < -3e-3 < rows["fa3, two-level", 1]["relative_bias"]
    assert abs(rows["BF16", 64]["relative_bias"]) < 1e-3


def test_e11_what_no_statistic_touches_has_the_same_bits(folder: Path) -> None:
    rows = merged(rows_of(folder, "e11"), "variant", "place")
    for place in (
        "among 1024 rows",
        "17 rows further down",
        "in a batch of two",
        "causal: later keys absent",
    ):
        assert rows["BF16", place]["differing"] == rows["causal_safe", place]["differing"] == 0
    assert rows["default", "causal: later keys absent"]["differing"] > 0.5


def test_zero_share_counts_what_e4m3_rounds_to_zero(seed: int) -> None:
    q, k, v = (t.bfloat16() for t in study_inputs("normal", 8, 64, seed=seed))
    qkv = quantize_qkv(q, k, v, Fp8Recipe(p_offset=0.0, qk_dtype="int8", q_granularity="token"))
    deq_q, deq_k, _ = qkv.dequantize()
    scores = deq_q[0, :, 0] @ deq_k[0, :, 0].T * 128**-0.5
    p = (scores - scores.amax(-1, keepdim=True)).exp()
    expected = (p[:, 4:] < 2.0**-10).double().mean().item()
    assert fp8_studies.zero_share(qkv, qkv.recipe, slice(0, 4)) == pytest.approx(expected, abs=1e-6)


def test_fp8_standard_attention_is_attention(seed: int) -> None:
    q, k, v = study_inputs("normal", 40, 100, 2, seed=seed)
    ref, _ = attention_reference(q, k, v)
    out = fp8_studies.fp8_standard_attention(q, k, v)
    assert 0.01 < (out.double() - ref).norm() / ref.norm() < 0.1


def test_a_budget_ends_a_run_between_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(sizes: fp8_studies.Sizes) -> Iterator[dict]:
        while True:
            yield {"variant": "x", "relative_l2": 0.5, "heads": sizes.heads}

    monkeypatch.setitem(fp8_accuracy.EXPERIMENTS, "e1", endless)
    result = fp8_accuracy.run("e1", TINY, tmp_path, 0.05)
    assert not result["complete"] and result["rows"]
    assert results.load(tmp_path / "e1.json")["complete"] is False
    assert fp8_accuracy.run("e1", TINY, tmp_path, 0.0)["rows"] == []


def test_merged_is_of_all_heads_together(seed: int) -> None:
    heads = [(torch.randn(5, 8), scale * torch.randn(5, 8)) for scale in (0.1, 0.3, 1.0)]
    rows = [{"variant": "a", "seed": i, **error_metrics(ref + e, ref)} for i, (ref, e) in enumerate(heads)]
    row = merged(rows, "variant")[("a",)]
    ref, error = (torch.cat(tensors) for tensors in zip(*heads, strict=True))
    whole = error_metrics(ref + error, ref)
    for name in ("rmse", "relative_l2", "max_abs"):
        assert row[name] == pytest.approx(whole[name], rel=1e-5)
    assert row["heads"] == 3 and row["relative_l1"] == pytest.approx(sum(r["relative_l1"] for r in rows) / 3)
    assert (row["lowest_rmse"], row["highest_rmse"]) == (rows[0]["rmse"], rows[2]["rmse"])


def test_committed_results_support_the_readme() -> None:
    """What README.md and docs/fp8.md say of the targets."""
    folder = results.RESULTS / "fp8_accuracy"
    found = {name: results.load(folder / f"{name}.json") for name in fp8_report.SECTIONS}
    assert all(result["complete"] and not result["made"]["dirty"] for result in found.values())
    rows = {name: merged(found[name]["rows"], "variant") for name in ("e1", "kb")}
    rows["e4"] = merged(
        (row for row in found["e4"]["rows"] if row["keys"] == 131072 and row["v_mean"] == 1.0), "variant"
    )
    missed = {
        key for key, target in fp8_published.TARGETS.items() if abs(rows[key[0]][(key[1],)][key[2]]) > target
    }
    assert missed == set()
    for name, value in fp8_published.FA3.items():
        assert rows["e1"][(name,)]["rmse"] == pytest.approx(value, rel=0.12)


def test_sizes_follow_the_machine_and_the_options() -> None:
    sizes = fp8_accuracy.sizes_of(fp8_accuracy.parse(["--quick", "--device", "cpu", "--heads", "2"]))
    assert sizes.heads == 2 and sizes.queries == fp8_accuracy.QUICK.queries and sizes.device == "cpu"
    sizes = fp8_accuracy.sizes_of(fp8_accuracy.parse(["--device", "cuda", "--long", "4096"]))
    assert sizes.heads == 16 and sizes.keys == 8192 and sizes.long == (4096,)
