"""experiments/train_gpt.py with a small model on the emulator: learning, resuming, agreement with torch."""

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "experiments"))

import gpt_data
import results
import torch
import train_gpt
from gpt_model import MODELS, GptConfig

SMALL = GptConfig(layers=2, width=64, heads=1, context=64)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(MODELS, "tiny", SMALL)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A folder of sixty files of words."""
    chance = random.Random(0)
    folder = tmp_path / "text"
    folder.mkdir()
    for index in range(60):
        words = " ".join(chance.choice(("query", "key", "value", "scale")) for _ in range(200))
        (folder / f"{index:02}.txt").write_text(words)
    return folder


def run(text: Path, out: Path, *arguments: str) -> dict:
    common = ["--text", str(text), "--out", str(out), "--batch", "2", "--warm-up", "2", "--lr", "3e-3"]
    return train_gpt.main([*common, "--validation-batches", "1", "--turn", "4", *arguments])


def column(result: dict, variant: str, name: str) -> list[float]:
    return [row[name] for row in result["rows"] if row["variant"] == variant]


def test_every_variant_learns_and_agrees_with_torch(text: Path, tmp_path: Path) -> None:
    result = run(text, tmp_path, "--steps", "12")
    losses = {variant: column(result, variant, "loss") for variant in train_gpt.VARIANTS}
    for variant, tolerance in (("sdpa", 0.0), ("hopper_fa", 1e-2), ("hopper_fa_fp8", 5e-2)):
        assert len(losses[variant]) == 12
        assert losses[variant][-1] < losses[variant][0] - 1
        assert losses[variant] == pytest.approx(losses["sdpa"], abs=max(tolerance, 1e-9))
    assert losses["hopper_fa"] != losses["sdpa"] and losses["hopper_fa_fp8"] != losses["hopper_fa"]

    loaded = results.load(tmp_path / "train_gpt.json")
    assert loaded["text"]["sha256"] and loaded["settings"]["seed"] == 1
    assert set(loaded["summary"]) == set(train_gpt.VARIANTS)
    train_gpt.plot(loaded, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes()[:4] == b"\x89PNG"
    section = train_gpt.readme_section(loaded)
    assert section.count("\n| ") == 4 and "FP8 forward" in section


def test_resumed_run_gives_the_numbers_of_an_uninterrupted_one(text: Path, tmp_path: Path) -> None:
    variants = ("--variants", "sdpa", "hopper_fa", "--steps", "8")
    whole = run(text, tmp_path / "whole", *variants)
    checkpoints = ("--checkpoints", str(tmp_path / "checkpoints"), "--checkpoint-every", "4")
    half = run(text, tmp_path, *variants, *checkpoints, "--stop-after", "4")
    assert len(half["rows"]) == 8
    resumed = run(text, tmp_path, *variants, *checkpoints, "--resume")
    for name in ("step", "loss", "gradient_norm"):
        for variant in ("sdpa", "hopper_fa"):
            assert column(resumed, variant, name) == column(whole, variant, name)
    assert not list((tmp_path / "checkpoints").glob("*.partial"))
    with pytest.raises(ValueError, match="other values of batch"):
        run(text, tmp_path, *variants, *checkpoints, "--resume", "--batch", "4")


def test_corpus_is_of_contents_not_of_places(text: Path, tmp_path: Path) -> None:
    first = gpt_data.load_corpus([text], 10**6)
    (tmp_path / "copies").mkdir()
    for index, path in enumerate(sorted(text.iterdir(), reverse=True)):
        (tmp_path / "copies" / f"{index:02}.md").write_bytes(path.read_bytes())
        (tmp_path / "copies" / f"{index:02}_twice.md").write_bytes(path.read_bytes())
    second = gpt_data.load_corpus([tmp_path / "copies"], 10**6)
    assert first.digest == second.digest and first.files == second.files == 60
    assert torch.equal(first.train, second.train) and torch.equal(first.held_out, second.held_out)
    assert (first.train == gpt_data.END_OF_FILE).sum() + (first.held_out == gpt_data.END_OF_FILE).sum() == 60
    assert sum(map(len, (first.train, first.held_out))) == sum(
        len(p.read_bytes()) + 1 for p in text.iterdir()
    )
    short = gpt_data.load_corpus([text], len(first.train))
    assert len(short.train) + len(short.held_out) <= len(first.train)
    with pytest.raises(ValueError, match="too few"):
        gpt_data.load_corpus([tmp_path / "none"], 10**6)


def test_batches_visit_every_window_once_an_epoch() -> None:
    batches = gpt_data.Batches(torch.arange(101, dtype=torch.int16), context=10, batch=3, seed=5)
    assert batches.in_epoch == 3
    epochs = [[batches[i] for i in range(start, start + 3)] for start in (0, 3)]
    starts = [[int(s) for tokens, _ in epoch for s in tokens[:, 0]] for epoch in epochs]
    assert all(len(set(s)) == 9 and all(x % 10 == 0 for x in s) for s in starts) and starts[0] != starts[1]
    tokens, targets = batches[1]
    assert torch.equal(targets, tokens + 1) and torch.equal(batches[1][0], tokens)
    with pytest.raises(ValueError, match="less than a batch"):
        gpt_data.Batches(torch.arange(10), context=10, batch=1, seed=0)
