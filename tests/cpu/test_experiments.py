"""The experiments' tables, ratios, files and plots on made-up measurements; no GPU."""

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import forward_speed
import gpu_run
import peers
import results
import shapes

SPEEDS = {"hopper_fa": 600.0, "fa2": 300.0, "fa3": 500.0, "fa4": 400.0, "cudnn": 450.0}


def made_up_result() -> dict:
    rows = [
        {**shape.as_row(), "peer": peer, "tflops": tflops * (1 + shape.causal), "ms": 1.0}
        for shape in shapes.standard_grid()
        for peer, tflops in SPEEDS.items()
    ]
    return {
        "experiment": "forward_speed",
        "made": results.provenance(),
        "device": {"gpu": "none", "driver": "none", "torch": "none"},
        "matmul_ceiling": {"before": {"tflops": 700.0}, "after": {"tflops": 700.0}},
        "rows": rows,
    }


def test_standard_grid() -> None:
    grid = shapes.standard_grid()
    assert len(set(grid)) == 36
    assert all(s.batch * s.seqlen == 16384 and s.heads * s.head_dim == 2048 for s in grid)
    full = shapes.Shape(1, 16384, 16, 16, 128, False)
    causal = shapes.Shape(1, 16384, 16, 16, 128, True)
    assert full.flops == 2 * causal.flops == 4 * 16384**2 * 128 * 16
    assert full.tflops(2.0) == pytest.approx(full.flops / 2e-3 / 1e12)


def test_summary_is_ratio_to_the_fastest_peer() -> None:
    summary = forward_speed.summary(made_up_result()["rows"])
    assert summary["shapes"] == summary["shapes_where_fastest"] == 36
    assert summary["ours_over_best_geomean"] == pytest.approx(1.2, abs=1e-3)
    assert summary["ours_over_fa2_geomean"] == pytest.approx(2.0, abs=1e-3)


def test_summary_names_the_worst_shape() -> None:
    rows = made_up_result()["rows"]
    worst = next(r for r in rows if r["peer"] == "hopper_fa" and r["seqlen"] == 4096 and r["causal"])
    worst["tflops"] = 500.0
    summary = forward_speed.summary(rows)
    assert summary["ours_over_best_min"] == pytest.approx(0.5, abs=1e-3)
    assert "S4096" in summary["ours_over_best_min_shape"]
    assert summary["shapes_where_fastest"] == 35


def test_files_and_plot(tmp_path: Path) -> None:
    result = made_up_result()
    results.save(result, tmp_path / "speed")
    loaded = results.load(tmp_path / "speed.json")
    assert loaded["rows"] == result["rows"] and math.isclose(loaded["rows"][0]["tflops"], 600.0)
    assert len((tmp_path / "speed.csv").read_text().splitlines()) == 1 + 36 * 5
    forward_speed.plot(loaded, tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes()[:4] == b"\x89PNG"


def test_missing_peers_are_named() -> None:
    found, missing = peers.find_peers(["fa2", "fa4"])
    assert {peer.name for peer in found} | set(missing) == {"fa2", "fa4"}
    assert all(missing.values())


def test_committed_result_supports_the_readme() -> None:
    committed = results.load(results.RESULTS / "forward_speed.json")
    assert len(committed["rows"]) == 36 * 5
    assert committed["made"]["commit"] and not committed["made"]["dirty"]
    summary = forward_speed.summary(committed["rows"])
    assert summary["ours_over_best_geomean"] == pytest.approx(
        committed["summary"]["standard grid"]["ours_over_best_geomean"], abs=1e-3
    )


READ_TILE = (
    "Read access at hopper_fa::TileReader<(bool)0>::next(hopper_fa::Tile &)+0xa40 in tile_queue.cuh:78"
)
WRITE_TILE = "Write access at hopper_fa::TileWriter::publish(int)+0xed60 in tile_queue.cuh:51 [112 hazards]"
BULK_COPY = (
    "Write access at cute::SM90_BULK_COPY_G2S::copy(const void *, unsigned long *, void *, int)+0xa570 in "
    "copy_sm90_tma.hpp:1450"
)
READ_BIAS = (
    "Read access at void hopper_fa::probabilities<cute::Tensor<cute::ViewEngine<float *>, cute::Layout<"
    "cute::C<(int)32>, cute::C<(int)1>>>>(const hopper_fa::BackwardArguments &, int, T1 &)+0x2150 in a:62"
)
READ_DELTA = (
    "Read access at void hopper_fa::KeysMainloop<hopper_fa::BackwardTraits<(hopper_fa::DType)0, (int)0>>::"
    "half_step<(int)0>(int, int, int)+0x2ef0 in mainloop_keys.cuh:118 [5120 hazards]"
)


@pytest.mark.parametrize(
    ("hazards", "status", "verdict"),
    [
        ([[READ_TILE, WRITE_TILE]], 9, 0),
        ([[READ_TILE, WRITE_TILE], [BULK_COPY, READ_BIAS, READ_DELTA]], 9, 0),
        ([[READ_TILE, BULK_COPY]], 9, 9),
        ([[BULK_COPY, READ_BIAS, WRITE_TILE]], 9, 9),
        ([[BULK_COPY, READ_BIAS.replace("probabilities", "write_ds")]], 9, 9),
        ([], 9, 9),
        ([], 1, 1),
        ([], 0, 0),
    ],
)
def test_racecheck_excuses_what_barriers_order(hazards: list[list[str]], status: int, verdict: int) -> None:
    lines = [
        f"========= {'    and' if i else 'Error: Race reported between'} {access}"
        for accesses in hazards
        for i, access in enumerate(accesses)
    ]
    assert gpu_run.judge_racecheck("\n".join(lines), status) == verdict
