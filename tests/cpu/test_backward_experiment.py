"""experiments/backward_speed.py on made-up measurements and made-up peers; no GPU."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import backward_peers
import backward_speed
import gpu_run
import results
import shapes
from backward_peers import BackwardPeer, Problem
from timing import Samples

SMALL = shapes.Shape(2, 64, 4, 2, 64, True)
SPEEDS = [
    {"hopper_fa": 500.0, "fa2": 250.0, "fa3": 400.0, "hopper_fa:variant": 800.0},
    {"hopper_fa": 600.0, "fa2": 300.0, "cudnn": 750.0},
]


def made_up_rows(process: int) -> list[dict]:
    shapes_of = [*shapes.standard_grid(), *[s for s in shapes.extra_shapes() if s.heads != s.heads_kv]]
    return [
        {**shape.as_row(), "peer": peer, "mode": mode, "tflops": tflops, "ms": 1.0}
        for shape in shapes_of
        for mode in backward_peers.MODES
        for peer, tflops in SPEEDS[process].items()
    ]


def made_up_part(process: int) -> dict:
    return {
        "experiment": "backward_speed",
        "made": results.provenance(),
        "device": {"gpu": "none", "driver": "none", "torch": "none"},
        "peers": dict.fromkeys(SPEEDS[process], "1.0"),
        "missing": {} if process == 0 else {"fa3": "left out"},
        "matmul_ceiling": {"before": {"tflops": 700.0}, "after": {"tflops": 690.0}},
        "rows": made_up_rows(process),
    }


def test_ratios_never_cross_processes() -> None:
    result = backward_speed.merge([made_up_part(0), made_up_part(1)])
    assert result["missing"] == {} and set(result["peers"]) == {*SPEEDS[0], *SPEEDS[1]}
    grid = [row for row in result["rows"] if backward_speed.on_grid(row)]
    by_shape = backward_speed.ratios(grid, "backward")
    assert len(by_shape) == 36
    for by_peer in by_shape.values():
        assert by_peer == pytest.approx({"fa2": 2.0, "fa3": 1.25, "cudnn": 0.8})
    summary = backward_speed.summary(result["rows"])
    assert summary["backward_shapes"] == 38
    assert summary["deterministic_ours_over_best_geomean"] == pytest.approx(0.8)
    assert summary["combined_ours_over_fa3_min"] == pytest.approx(1.25)
    assert backward_speed.shown_rates(grid, "backward")[shapes.Shape.of_row(grid[0])]["hopper_fa"] == 500.0


def test_plot_and_readme_section(tmp_path: Path) -> None:
    result = backward_speed.merge([made_up_part(0), made_up_part(1)])
    result["summary"] = {"standard grid": backward_speed.summary(result["rows"])}
    results.save(result, tmp_path / "backward")
    loaded = results.load(tmp_path / "backward.json")
    backward_speed.plot(loaded, tmp_path / "backward.png")
    assert (tmp_path / "backward.png").read_bytes()[:4] == b"\x89PNG"
    readme = tmp_path / "README.md"
    readme.write_text("above\n<!-- backward_speed -->\nold\n<!-- /backward_speed -->\nbelow\n")
    for _ in range(2):
        results.write_section(readme, "backward_speed", backward_speed.readme_section(loaded))
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("\nbelow\n") and "old" not in text
    assert text.count("| 64 full | 500 (0.80 cudnn), 500 (0.80 cudnn) |") == 1
    with pytest.raises(ValueError, match="has no lines"):
        results.write_section(readme, "other", "")


def test_readme_holds_the_sections() -> None:
    text = backward_speed.README.read_text()
    for name in ("backward_speed", "train_gpt"):
        assert text.count(f"<!-- {name} -->\n") == text.count(f"<!-- /{name} -->") == 1


def torch_peer(name: str, wrong: str = "") -> BackwardPeer:
    """Attention by torch's autograd; `wrong` spoils it in one way."""

    def prepare(problem: Problem, mode: str) -> backward_peers.GradientCall:
        if wrong == "refused":
            raise RuntimeError("no such kernel")
        leaves, calls = problem.leaves(), []

        def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            causal = problem.shape.causal and wrong != "mask"
            return scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True).transpose(1, 2)

        def call() -> backward_peers.Gradients:
            if wrong == "unwritten":
                return problem.gradients()
            calls.append(None)
            dq, dk, dv = backward_peers.through_autograd(attention, leaves, problem.dout)()
            noise = 1 + 1e-2 * len(calls) if wrong == "random" and mode == "deterministic" else 1
            return dq * noise, dk, dv

        return call

    return BackwardPeer(name, "0", prepare)


def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)


@pytest.mark.parametrize("d", [64, 128])
def test_check_takes_right_gradients_only(d: int, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    without_gpu(monkeypatch)
    shape = shapes.Shape(1, 48, 4, 2, d, True)
    names = ("", "mask", "unwritten", "refused", "random")
    peers = [*(torch_peer(wrong or "hopper_fa", wrong) for wrong in names), torch_peer("fa2")]
    calls, failed = backward_peers.prepare_checked(
        peers, Problem.random(shape, seed, "cpu"), backward_peers.MODES
    )
    modes = backward_peers.MODES
    right = {("hopper_fa", mode) for mode in modes} | {("fa2", mode) for mode in modes}
    assert set(calls) == right | {("random", "backward"), ("random", "combined")}
    assert "differ from fa2's by dq" in failed["mask", "backward"]
    assert "nan" in failed["unwritten", "combined"]
    assert failed["refused", "backward"] == "RuntimeError: no such kernel"
    assert "between two calls" in failed["random", "deterministic"]


class FakeRunner:
    """A Runner that runs its call once and measures 2 ms."""

    def __init__(self, call, batch_ms: float, method: str) -> None:
        call()
        self.method, self.note = method, "no capture"

    def measure(self, samples: Samples, monitor: object) -> None:
        samples.milliseconds.append(2.0)


def test_one_group_from_shapes_to_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_gpu(monkeypatch)
    random = Problem.random
    monkeypatch.setattr(Problem, "random", staticmethod(lambda shape, seed: random(shape, seed, "cpu")))
    monkeypatch.setattr(backward_speed, "Runner", FakeRunner)
    monkeypatch.setattr(backward_speed, "chosen_shapes", lambda options: [SMALL])
    found = [torch_peer("hopper_fa"), torch_peer("fa2"), torch_peer("fa3", "mask"), torch_peer("fa4")]
    monkeypatch.setattr(backward_speed, "find_backward_peers", lambda *_: (found, {"cudnn": "absent"}))
    monkeypatch.setattr(backward_speed, "matmul_ceiling", lambda monitor: {"tflops": 700.0})
    monkeypatch.setattr(
        backward_speed, "new_result", lambda *arguments: {**made_up_part(0), "settings": {}, "rows": []}
    )
    arguments = ["--peers", "fa2,fa3,fa4,cudnn", "--out", str(tmp_path), "--budget-seconds", "5"]
    options = backward_speed.parse([*arguments, "--fa4-seqlens", "8192"])
    result = backward_speed.run_group(options, options.peers[0].split(","))
    rows = {(row["peer"], row["mode"]): row for row in result["rows"]}
    assert {peer for peer, _ in rows} == {"hopper_fa", "fa2", "fa3"}  # FlashAttention-4 at 8192 alone
    assert "differ" in rows["fa3", "backward"]["error"]
    assert rows["hopper_fa", "backward"]["tflops"] == pytest.approx(2.5 * SMALL.flops / 2e9)
    assert rows["hopper_fa", "combined"]["tflops"] == pytest.approx(3.5 * SMALL.flops / 2e9)
    assert rows["hopper_fa", "backward"]["rounds"] == 7
    assert len(results.load(tmp_path / "backward_speed.json")["rows"]) == 9


def test_groups_run_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    commands = []

    class Ended:
        returncode = 0

    def fake_run(command: list[str]) -> Ended:
        commands.append(command)
        options = backward_speed.parse(command[2:])
        results.save(made_up_part(len(commands) - 1), options.out / options.name)
        return Ended()

    monkeypatch.setattr(backward_speed, "subprocess", SimpleNamespace(run=fake_run))
    arguments = ["--out", str(tmp_path), "--budget-seconds", "100", "--seqlens", "512"]
    result = backward_speed.run_groups(backward_speed.parse(arguments), arguments)
    parsed = [backward_speed.parse(command[2:]) for command in commands]
    assert [options.peers for options in parsed] == [["fa2,fa3,fa4"], ["fa2,cudnn"]]
    assert parsed[0].seed == parsed[1].seed and parsed[0].budget_seconds == 50
    assert {row["process"] for row in result["rows"]} == {0, 1}
    assert list(tmp_path.iterdir()) == []


def test_shapes_and_options() -> None:
    assert len(backward_speed.chosen_shapes(backward_speed.parse([]))) == 38
    few = backward_speed.parse(["--causal", "--grid-only", "--seqlens", "512", "--head-dims", "64"])
    assert [str(s) for s in backward_speed.chosen_shapes(few)] == ["bf16 d64 S512 B32 H32 causal"]
    with pytest.raises(SystemExit):
        backward_speed.parse(["--peers", "fa2,fa9"])
    stages = {
        s.name: s for s in gpu_run.stages(gpu_run.parse(["--backward", "--budget-seconds 60", "--train"]))
    }
    assert stages["backward"].command[-2:] == ["--budget-seconds", "60"]
    assert set(stages) == {"backward", "train"}
