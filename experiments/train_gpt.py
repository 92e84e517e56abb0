"""A GPT trained with torch's flash attention, with ours, and with our FP8 forward: same seed, same data.

    python experiments/train_gpt.py                               # 300 steps of 32k tokens, context 1024, d64
    python experiments/train_gpt.py --model gpt-d128              # context 8192, d128
    python experiments/train_gpt.py --steps 3000 --checkpoint-every 500 --resume
    python experiments/train_gpt.py --redraw experiments/results/train_gpt.json

BF16 autocast over FP32 weights, fused AdamW. The variants take turns of some steps each in one process, so
that all see the same clocks. Text: gpt_data.py. Writes JSON (a row a step), CSV and PNG; --readme writes
README.md's table from the JSON. Without a GPU it trains the model "tiny" on the emulator.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import command_line
import results
import torch
from gpt_data import Batches, Corpus, installed_roots, load_corpus
from gpt_model import MODELS, Gpt, GptConfig, attention_of
from timing import GpuMonitor, device_facts

VARIANTS = ("sdpa", "hopper_fa", "hopper_fa_fp8")
LABELS = {"sdpa": "torch SDPA, flash", "hopper_fa": "hopper_fa", "hopper_fa_fp8": "hopper_fa, FP8 forward"}
COLORS = {"sdpa": "#9aa5b1", "hopper_fa": "#d1495b", "hopper_fa_fp8": "#edae49"}
README = results.ROOT / "README.md"
WARM_UP_STEPS = 5  # not timed: compilation, memory


class Trainer:
    """One model in training; all of its state fits a checkpoint."""

    def __init__(
        self,
        variant: str,
        config: GptConfig,
        corpus: Corpus,
        options: argparse.Namespace,
        device: torch.device,
    ) -> None:
        self.variant, self.options, self.device = variant, options, device
        torch.manual_seed(options.seed)
        self.model = Gpt(config, attention_of(variant, device)).to(device)
        self.call = torch.compile(self.model) if options.compile else self.model
        matrices = [w for w in self.model.parameters() if w.ndim == 2]
        vectors = [w for w in self.model.parameters() if w.ndim != 2]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
        self.random_state = self._random_state()
        self.batches = Batches(corpus.train.to(device), config.context, options.batch, options.seed)
        validation = Batches(corpus.held_out.to(device), config.context, options.batch, seed=0)
        self.validation = [validation[i] for i in range(min(options.validation_batches, validation.in_epoch))]
        self.rows: list[dict] = []
        self.step = 0

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to a tenth at the last step."""
        warm_up = min(self.options.warm_up, self.options.steps // 2)
        if self.step < warm_up:
            return self.options.lr * (self.step + 1) / warm_up
        share = (self.step - warm_up) / max(1, self.options.steps - warm_up)
        return self.options.lr * (0.55 + 0.45 * math.cos(math.pi * share))

    def loss(self, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.call(*batch)

    def run(self, steps: int) -> None:
        """Train, then wait for the device. What each step gave is appended to `rows`."""
        self._set_random_state(self.random_state)
        marks, taken = [self._mark()], []
        first = self.step
        for _ in range(steps):
            for group in self.optimizer.param_groups:
                group["lr"] = self.learning_rate()
            loss = self.loss(self.batches[self.step])
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            taken.append((loss.detach(), norm.detach()))
            marks.append(self._mark())
            self.step += 1
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.random_state = self._random_state()
        for index, (loss, norm) in enumerate(taken):
            milliseconds = self._between(marks[index], marks[index + 1])
            row = {"variant": self.variant, "step": first + index + 1, "loss": loss.item()}
            self.rows.append({**row, "gradient_norm": norm.item(), "ms": milliseconds})

    @torch.no_grad()
    def validate(self) -> None:
        """The held-out loss, into the last row."""
        losses = [self.loss(batch).double() for batch in self.validation]
        self.rows[-1]["validation_loss"] = torch.stack(losses).mean().item()

    def _mark(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: torch.cuda.Event | float, end: torch.cuda.Event | float) -> float:
        return start.elapsed_time(end) if self.device.type == "cuda" else (end - start) * 1e3

    def _random_state(self) -> dict[str, torch.Tensor]:
        state = {"cpu": torch.get_rng_state()}
        return state | ({"cuda": torch.cuda.get_rng_state()} if self.device.type == "cuda" else {})

    def _set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"])

    def checkpoint_path(self) -> Path:
        return self.options.checkpoints / f"{self.options.name}.{self.variant}.pt"

    def save(self, settings: dict) -> None:
        """Write the checkpoint; a run that is killed meanwhile leaves the previous one whole."""
        state = {
            "settings": settings,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,  # also the place in the data: the number of the next batch
            "random_state": self.random_state,
            "rows": self.rows,
        }
        path = self.checkpoint_path()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, settings: dict) -> bool:
        """Continue from the checkpoint; False if there is none.

        Raises:
            ValueError: it was made with other settings.
        """
        path = self.checkpoint_path()
        if not path.exists():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        if differing := [name for name in settings if state["settings"].get(name) != settings[name]]:
            raise ValueError(
                f"{path} was made with other values of {', '.join(differing)}; pass the same, or leave out "
                "--resume"
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.rows, self.random_state = state["step"], state["rows"], state["random_state"]
        return True


class Progress:
    """A bar of all variants' steps: tqdm's if it is installed, else a line every tenth of the way."""

    def __init__(self, total: int, done: int) -> None:
        self.total, self.done, self.start, self.shown = total, done, time.monotonic(), -1
        try:
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="step", file=sys.stdout, mininterval=1.0)
        except ImportError:
            self.bar = None

    def advance(self, steps: int, text: str) -> None:
        self.done += steps
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(steps)
        elif self.done * 10 // self.total != self.shown:
            self.shown = self.done * 10 // self.total
            seconds = time.monotonic() - self.start
            print(f"{self.done:>6}/{self.total} steps, {seconds:6.1f} s, {text}", flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def settings_of(options: argparse.Namespace, config: GptConfig, corpus: Corpus) -> dict:
    """What must be equal for two runs to give the same numbers."""
    names = ("model", "steps", "batch", "seed", "lr", "warm_up", "turn", "validation_batches", "compile")
    return {**{name: getattr(options, name) for name in names}, **asdict(config), "text": corpus.digest}


def train(options: argparse.Namespace, corpus: Corpus, device: torch.device) -> list[Trainer]:
    """All variants to `options.steps`, in turns."""
    config = MODELS[options.model]
    settings = settings_of(options, config, corpus)
    trainers = [Trainer(variant, config, corpus, options, device) for variant in options.variants]
    for trainer in trainers:
        if options.resume and trainer.load(settings):
            print(f"{trainer.variant}: continued after step {trainer.step}")
    progress = Progress(options.steps * len(trainers), sum(trainer.step for trainer in trainers))
    stop = options.stop_after or options.steps
    while (step := min(trainer.step for trainer in trainers)) < stop:
        end = min((step // options.turn + 1) * options.turn, stop)
        for trainer in trainers:
            if (steps := end - trainer.step) <= 0:
                continue
            trainer.run(steps)
            trainer.validate()
            progress.advance(steps, f"{trainer.variant} loss {trainer.rows[-1]['loss']:.3f}")
            every = options.checkpoint_every
            if every and (end // every > (end - steps) // every or end == stop):
                trainer.save(settings)
    progress.close()
    return trainers


def summary(rows: list[dict], tokens_of_step: int) -> dict[str, dict[str, float]]:
    """For every variant: speed (median step) and losses at the end, and both beside torch's attention."""
    found: dict[str, dict[str, float]] = {}
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        last = own[-max(1, len(own) // 10) :]
        milliseconds = statistics.median(row["ms"] for row in own[WARM_UP_STEPS:] or own)
        values = {
            "steps": len(own),
            "ms": milliseconds,
            "tokens_per_second": tokens_of_step / milliseconds * 1e3,
            "loss_last_tenth": statistics.fmean(row["loss"] for row in last),
            "validation_loss": [row["validation_loss"] for row in own if "validation_loss" in row][-1],
            "highest_gradient_norm": max(row["gradient_norm"] for row in own[len(own) // 2 :]),
        }
        base = found.get("sdpa", values)
        values["speed_over_sdpa"] = base["ms"] / milliseconds
        values["validation_loss_minus_sdpa"] = values["validation_loss"] - base["validation_loss"]
        found[variant] = values
    return found


def plot(result: dict, path: Path) -> None:
    """Loss, its difference from torch's, gradient norm and speed."""
    figure, axes = results.new_figure(2, 2, 13, 7.5)
    loss, difference, norm, speed = axes.flat
    variants = list(dict.fromkeys(row["variant"] for row in result["rows"]))
    curves = {name: [row for row in result["rows"] if row["variant"] == name] for name in variants}
    base = {row["step"]: row["loss"] for row in curves.get("sdpa", [])}
    for name, rows in curves.items():
        steps, style = [row["step"] for row in rows], {"color": COLORS[name], "linewidth": 1.1}
        loss.plot(steps, [row["loss"] for row in rows], **style, label=LABELS[name], alpha=0.75)
        held_out = [row for row in rows if row.get("validation_loss") is not None]
        x, y = [row["step"] for row in held_out], [row["validation_loss"] for row in held_out]
        loss.plot(x, y, "o", markersize=3, color=COLORS[name])
        norm.plot(steps, [row["gradient_norm"] for row in rows], **style)
        if name != "sdpa" and base:
            gaps = [row["loss"] - base[row["step"]] for row in rows if row["step"] in base]
            difference.plot(steps[: len(gaps)], gaps, **style)
    loss.set_title("training loss, nats a byte (dots: held out)", fontsize=10)
    loss.legend(frameon=False)
    difference.set_title("training loss minus torch SDPA's", fontsize=10)
    norm.set_title("gradient norm", fontsize=10)
    norm.set_yscale("log")
    rates = [result["summary"][name]["tokens_per_second"] / 1e3 for name in variants]
    bars = speed.bar([LABELS[name] for name in variants], rates, color=[COLORS[name] for name in variants])
    speed.bar_label(bars, fmt="%.0f", fontsize=9)
    speed.set_title("thousand tokens/s, median step", fontsize=10)
    for axis in (loss, difference, norm):
        axis.set_xlabel("step")
    settings = result["settings"]
    text = f"{_sizes(settings)}, {result['tokens_of_step']} tokens a step, BF16 autocast"
    figure.suptitle(f"{text}\n{results.subtitle(result)}", fontsize=11, x=0.01, ha="left")
    results.save_figure(figure, path)


def _sizes(settings: dict) -> str:
    sizes = f"{settings['layers']} layers, width {settings['width']}, {settings['heads']} heads"
    return f"{settings['model']}: {sizes}, context {settings['context']}"


def readme_section(result: dict) -> str:
    """README.md's table and figure of a result."""
    settings = result["settings"]
    lines = [
        f"{_sizes(settings)}.",
        f"{settings['steps']} steps of {result['tokens_of_step']} tokens, {results.subtitle(result)}.",
        "",
        "| attention | tokens/s | over SDPA | held-out loss | minus SDPA's |",
        "|---|---|---|---|---|",
    ]
    for name, facts in result["summary"].items():
        cells = [LABELS[name], f"{facts['tokens_per_second']:.0f}", f"{facts['speed_over_sdpa']:.2f}"]
        cells += [f"{facts['validation_loss']:.4f}", f"{facts['validation_loss_minus_sdpa']:+.4f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![Training with each attention](experiments/results/train_gpt.png)"])


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = command_line.new_parser(__doc__)
    parser.add_argument("--model", choices=MODELS, help="default: gpt-124m, without a GPU tiny")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, help="sequences a step; default: 32k tokens, of gpt-d128 16k")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--warm-up", type=int, default=40, help="steps of rising learning rate")
    parser.add_argument("--turn", type=int, default=50, help="steps of one variant before the next one's")
    parser.add_argument("--validation-batches", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=48 * 2**20, help="of text, one a byte")
    parser.add_argument(
        "--text", type=Path, nargs="+", help="folders; default: Python's library and packages"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument(
        "--checkpoints", type=Path, default=results.ROOT / "build" / "checkpoints", help="their folder"
    )
    parser.add_argument("--checkpoint-every", type=int, default=0, help="steps, at ends of turns; 0: never")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the checkpoints, if there are any"
    )
    parser.add_argument("--stop-after", type=int, help="leave after this step of --steps")
    parser.add_argument("--name", default="train_gpt", help="file name of the results, without suffix")
    command_line.add_redraw(parser)
    parser.add_argument(
        "--readme", type=Path, metavar="JSON", help="write README.md's table from a result and leave"
    )
    options = parser.parse_args(arguments)
    if options.model is None:
        options.model = "gpt-124m" if torch.cuda.is_available() else "tiny"
    if options.batch is None:
        options.batch = {"gpt-124m": 32, "gpt-d128": 2, "tiny": 4}[options.model]
    return options


def main(arguments: list[str] | None = None) -> dict | None:
    options = parse(arguments)
    if options.readme:
        results.write_section(README, "train_gpt", readme_section(results.load(options.readme)))
        return None
    if command_line.redrawn(options, plot):
        return None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    start = time.monotonic()
    corpus = load_corpus(options.text or installed_roots(), options.max_tokens)
    print(f"{corpus.files} files, {len(corpus.train)} tokens, read in {time.monotonic() - start:.1f} s")
    trainers = train(options, corpus, device)
    config = MODELS[options.model]
    tokens_of_step = options.batch * config.context
    rows = [row for trainer in trainers for row in trainer.rows]
    result = {
        "experiment": "train_gpt",
        "made": results.provenance(),
        "device": device_facts(GpuMonitor()) if device.type == "cuda" else {"torch": torch.__version__},
        "settings": settings_of(options, config, corpus),
        "text": corpus.facts(),
        "tokens_of_step": tokens_of_step,
        "seconds": time.monotonic() - start,
        "summary": summary(rows, tokens_of_step),
        "rows": rows,
    }
    for name, facts in result["summary"].items():
        facts["model_tflops"] = facts["tokens_per_second"] * config.flops_of_token() / 1e12
        shown = "  ".join(f"{key} {value:.4g}" for key, value in facts.items())
        print(f"{name:<14} {shown}")
    results.save(result, options.out / options.name)
    plot(result, options.out / f"{options.name}.png")
    return result


if __name__ == "__main__":
    main()
