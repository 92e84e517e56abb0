"""The command line, on a machine with or without a GPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from hopper_fa import accuracy_fp8, build_info, cli

STUDY = ["--inputs", "outliers", "long", "--keys", "300", "--queries", "40", "--heads", "2"]
STUDY16 = ["--seqlens", "16", "48", "--distributions", "normal", "v_ones", "--head-dim", "64", "--seed", "3"]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_has_hopper", lambda: False)


def test_info_json(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["build"] == build_info()
    assert info["machine"]["python"].split(".")[0] == "3" and isinstance(info["machine"]["gpus"], list)
    assert (info["machine"]["driver"] is not None) == (info["machine"]["nvml"] == "ok")


def test_info_text(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    info = build_info()
    assert f"hopper_fa {info['version']}, CUDA {info['cuda_version']}" in text
    assert text.count(" bytes") == len(info["instances"])


def test_demo_without_gpu(no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture, seed: int) -> None:
    assert cli.main(["demo", "--output", str(tmp_path / "new"), "--seed", str(seed), *STUDY]) == 0
    result = json.loads((tmp_path / "new" / "fp8_accuracy.json").read_text())
    assert (tmp_path / "new" / "fp8_accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert result["runs_on"] == "emulator" and result["problem"]["seed"] == seed
    rows = {(row["inputs"], row["attention"]): row for row in result["rows"]}
    names = ["BF16", *accuracy_fp8.RECIPES]
    assert list(rows) == [(inputs, name) for inputs in ("outliers", "long") for name in names]
    text = capsys.readouterr().out
    assert "No Hopper GPU here" in text and text.count(" emulator ") >= len(rows)
    for column in ("inputs", "attention", "rel. L2", "bias", "row p99", "LSE", "beside", "target"):
        assert f"\n{column}" in text  # explained
    # Of N(0, 1) with a mean of 1 the rounding of BF16 leaves 2e-3, that of e4m3 without smoothing more.
    assert 1e-3 < rows["long", "BF16"]["relative_l2"] < 3e-3 < rows["long", "fa3"]["relative_l2"] < 5e-2
    assert rows["outliers", "accurate"]["rmse"] < rows["outliers", "fa3"]["rmse"]


def test_accuracy_of_16_bits(no_gpu: None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["accuracy16", "--output", str(tmp_path), *STUDY16]) == 0
    result = json.loads((tmp_path / "forward_accuracy.json").read_text())
    assert (tmp_path / "forward_accuracy.png").read_bytes().startswith(b"\x89PNG")
    rows = {(r["distribution"], r["seqlen"], r["dtype"], r["implementation"]): r for r in result["rows"]}
    assert len(rows) == len(result["rows"]) == 2 * 2 * 2 * 3
    assert capsys.readouterr().out.count("hopper_fa emulator") == 8
    for seqlen in (16, 48):
        errors = {d: rows["normal", seqlen, d, "hopper_fa emulator"]["relative_l2"] for d in ("bf16", "fp16")}
        assert 1e-4 < errors["fp16"] * 4 < errors["bf16"] < 1e-2  # three bits apart
        assert rows["v_ones", seqlen, "bf16", "hopper_fa emulator"]["max_abs"] <= 2.0**-8


def test_demo_with_gpu_runs_the_speed_comparison(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli, "_has_hopper", lambda: True)
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "experiments" / "forward_speed.py"
    script.parent.mkdir()
    script.write_text("import sys; open('ran', 'w').write(' '.join(sys.argv[1:])); sys.exit(3)")
    assert cli.main(["demo", "--output", "there"]) == 3
    assert (tmp_path / "ran").read_text() == "--out there"


def test_demo_says_where_the_experiments_are(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli, "_has_hopper", lambda: True)
    monkeypatch.setattr(cli, "SPEED_SCRIPT", Path("experiments", "no_such_script.py"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["demo"]) == 2
    assert "part of the source checkout" in capsys.readouterr().err


def test_entry_point(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "from hopper_fa.cli import main; raise SystemExit(main())", "info", "--json"],
        cwd=tmp_path,  # where the bare sources do not hide the installed package
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0 and "instances" in json.loads(run.stdout)["build"]
