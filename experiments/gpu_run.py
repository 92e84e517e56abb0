"""Everything that needs a Hopper GPU in one command: build, tests, sanitizer, experiments, profile.

    python experiments/gpu_run.py --kernels build/kernels --tests "-k graph" --speed "--budget-seconds 120"

Installs the package into a scratch folder (compiling only the Python binding if --kernels names the kernels
folder of a build tree, which serves any Python), then runs the stages asked for, each with a time limit and a
log in --out. A stage that fails does not stop the next; the exit code is 1 if any failed. Without a stage, it
builds and ends. Arguments of a stage that begin with a dash and hold no space need "=": --speed=--quick.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = {  # flag: (script, seconds it may take, what it does)
    "speed": ("forward_speed.py", 420, "forward beside its peers"),
    "backward": ("backward_speed.py", 420, "backward beside its peers"),
    "fp8": ("fp8_speed.py", 420, "FP8 forward beside its peers"),
    "probe": ("accumulator_probe.py", 60, "how the FP8 tensor core adds"),
    "ablation": ("forward_ablation.py", 120, "what each part of the schedule is worth"),
    "tiles": ("forward_tiles.py", 600, "every built tile, each checked in a process of its own"),
    "train": ("train_gpt.py", 240, "a GPT trained with each attention"),
    "memory": ("memory.py", 90, "peak memory"),
    "overhead": ("overhead.py", 60, "CPU time of a call"),
    "quantize": ("quantize_speed.py", 120, "quantisation beside a device copy"),
    "recipe_backward": ("recipe_backward.py", 60, "the backward of recipes beside the 16-bit one"),
    "peaked_rows": ("peaked_rows.py", 120, "rounding of peaked rows beside FlashAttention-2"),
}
SANITIZERS = ("memcheck", "racecheck", "synccheck")
SANITIZER_ERROR = 9
CUDA_BIN = "/usr/local/cuda/bin"
SEARCH_PATH = f"{os.environ.get('PATH', os.defpath)}{os.pathsep}{CUDA_BIN}"
# As `python -m pytest`, but the bare sources in the current folder do not hide the installed package.
PYTEST = "import sys; sys.path.remove(''); import pytest; sys.exit(pytest.main(sys.argv[1:]))"


@dataclass
class Stage:
    """One command with its log and limits."""

    name: str
    command: list[str]
    seconds: float
    judge: Callable[[str, int], int] = lambda log, status: status  # may overrule the exit status


@dataclass
class Outcome:
    """How a stage ended: exit status (124: out of time, 127: no program), duration, last line of output."""

    stage: Stage
    status: int
    seconds: float
    last_line: str


def run_stage(stage: Stage, out: Path, environment: dict[str, str]) -> Outcome:
    """Run a stage in the repository root, its output on the terminal and in `out`/<name>.log.

    The stage's whole process group is ended once its time is up.
    """
    print(f"== {stage.name} (at most {stage.seconds:.0f} s): {shlex.join(stage.command)}", flush=True)
    start = time.monotonic()
    program = shutil.which(stage.command[0], path=SEARCH_PATH)
    if program is None:
        return Outcome(stage, 127, 0.0, f"{stage.command[0]} is neither on PATH nor in {CUDA_BIN}")
    log_path = out / f"{stage.name}.log"
    with open(log_path, "wb") as log:
        # The log is a file that both write to, not a pipe: nothing is lost when a stage is killed.
        process = subprocess.Popen(
            [program, *stage.command[1:]],
            cwd=ROOT,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        with open(log_path, "rb") as reader:
            while process.poll() is None:
                _copy(reader)
                if time.monotonic() - start > stage.seconds:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    status = 124
                    break
                time.sleep(0.1)
            else:
                status = process.returncode
            _copy(reader)
    text = log_path.read_text(errors="replace")
    lines = text.strip().splitlines()
    status = stage.judge(text, status)
    return Outcome(stage, status, time.monotonic() - start, lines[-1] if lines else "")


def _copy(reader) -> None:
    if chunk := reader.read():
        sys.stdout.write(chunk.decode(errors="replace"))
        sys.stdout.flush()


def build_stage(options: argparse.Namespace, site: Path) -> Stage:
    """pip installs the package into `site`, offline and without its dependencies."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
    ]
    command += ["--upgrade", "--target", str(site), str(ROOT)]
    if options.kernels:
        command += ["-C", f"cmake.define.HOPPER_FA_KERNELS_LIBRARY={options.kernels}"]
    for define in options.define:
        command += ["-C", f"cmake.define.{define}"]
    return Stage("build", command, 120 if options.kernels else 1200)


# Pairs of accesses that mbarriers order, an ordering that racecheck does not follow for ordinary accesses.
ORDERED_BY_BARRIERS = [
    # The reader waits on `full` before it reads a tile, and arrives on `empty` after.
    {"TileReader::next", "TileWriter::publish"},
    # A query block's rows of bias and delta come by bulk copy. Both readers wait on the block's full barrier
    # before, and arrive on its empty barrier after.
    {"SM90_BULK_COPY_G2S::copy", "probabilities"},
    {"SM90_BULK_COPY_G2S::copy", "KeysMainloop::half_step"},
    # Factors and delta of query rows, scaled in place by a warp between two full barriers.
    {"SM90_BULK_COPY_G2S::copy", "scale_rows_by_keys"},
    {"scale_rows_by_keys", "probabilities"},
    {"scale_rows_by_keys", "KeysMainloop::half_step"},
    {"scale_rows_by_keys", "put_scaled_chunk"},
    {"SM90_BULK_COPY_G2S::copy", "put_scaled_chunk"},
    # The scales of a tile's rows and the place of K's, between Q's empty and full barriers, as Q itself.
    {"Loader::store_scales", "Fp8Mainloop::read_q_scales"},
    {"Loader::store_scales", "Fp8Mainloop::run"},
    # V's scales and means. Their slot is filled again after Q of the next tile was released, which every warp
    # does after it has read them.
    {"SM90_BULK_COPY_G2S::copy", "load_shared_pair"},
    {"SM90_BULK_COPY_G2S::copy", "load_affine"},  # the same, where it was inlined
]


def accessing_function(line: str) -> str:
    """The function in one of racecheck's lines, without namespace, template arguments and parameters.

    Of a lambda that is a template the function that it stands in.
    """
    access = line.partition(" access at ")[2].partition(" in ")[0]
    name = _bare_name(access)
    return _bare_name(access.partition("::[lambda")[0]) if name == "const" else name


def _bare_name(name: str) -> str:
    while (shorter := re.sub(r"<[^<>]*>|\([^()]*\)", "", name)) != name:
        name = shorter
    name = re.sub(r"\+0x[0-9a-f]+.*", "", name).split()[-1]
    return re.sub(r"^(hopper_fa|cute)::", "", name)


def judge_racecheck(log: str, status: int) -> int:
    """Hazards between accesses that barriers order are no errors; all others are."""
    hazards = []
    first = ""
    for line in log.splitlines():
        if "Race reported between" in line:
            first = accessing_function(line)
        elif " access at " in line:
            hazards.append({first, accessing_function(line)})
    if status != SANITIZER_ERROR or not hazards:
        return status
    return 0 if all(hazard in ORDERED_BY_BARRIERS for hazard in hazards) else status


def stages(options: argparse.Namespace) -> list[Stage]:
    """The stages asked for, in the order in which they run: correctness first."""
    chosen = []
    if options.tests is not None:
        command = [sys.executable, "-c", PYTEST, "-q", "--durations=8", "-p", "no:cacheprovider", "tests/gpu"]
        chosen.append(Stage("tests", command + shlex.split(options.tests), options.tests_seconds))
    if options.sanitize is not None:
        for tool in SANITIZERS:
            command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=hopper_fa"]
            command += ["--error-exitcode", str(SANITIZER_ERROR)]
            command += [sys.executable, "tests/gpu/sanitizer_cases.py", *shlex.split(options.sanitize)]
            stage = Stage(f"sanitize_{tool}", command, options.sanitize_seconds)
            if tool == "racecheck":
                stage.judge = judge_racecheck
            chosen.append(stage)
    for flag, (script, seconds, _) in EXPERIMENTS.items():
        arguments = getattr(options, flag)
        if arguments is not None:
            command = [
                sys.executable,
                f"experiments/{script}",
                "--out",
                str(options.out),
                *shlex.split(arguments),
            ]
            chosen.append(Stage(flag, command, getattr(options, f"{flag}_seconds") or seconds))
    if options.ncu is not None:
        # Clocks are left alone: other work may share the machine.
        command = ["ncu", "--clock-control", "none", "--set", "full", "--import-source", "yes", "-f"]
        command += ["--kernel-name", "regex:forward", "--launch-skip", "2", "--launch-count", "1"]
        command += ["-o", str(options.out / "forward"), sys.executable, "experiments/profile_forward.py"]
        chosen.append(Stage("ncu", command + shlex.split(options.ncu), 180))
    return chosen


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    build = ROOT / "build" / "gpu"
    parser.add_argument("--out", type=Path, default=build / "results", help="folder of logs and results")
    parser.add_argument("--build-dir", type=Path, default=build, help="where hopper_fa is installed")
    parser.add_argument("--kernels", help="kernels folder of a build tree; default: compile the kernels here")
    parser.add_argument(
        "--define", action="append", default=[], metavar="NAME=VALUE", help="another CMake option"
    )
    parser.add_argument("--no-build", action="store_true", help="use what an earlier run built")
    parser.add_argument(
        "--commit", help="recorded in results where the tree was copied without its git history"
    )

    def stage(flag: str, what: str) -> None:
        parser.add_argument(f"--{flag}", nargs="?", const="", metavar="ARGUMENTS", help=what)

    stage("tests", "pytest tests/gpu; ARGUMENTS go to pytest, as in --tests '-k graph'")
    parser.add_argument("--tests-seconds", type=float, default=240)
    stage("sanitize", "compute-sanitizer: " + ", ".join(SANITIZERS))
    parser.add_argument("--sanitize-seconds", type=float, default=150, help="for each tool")
    for flag, (script, seconds, what) in EXPERIMENTS.items():
        stage(flag, f"{script}: {what}")
        parser.add_argument(f"--{flag}-seconds", type=float, help=f"default: {seconds}")
    stage("ncu", "Nsight Compute on one launch; ARGUMENTS go to profile_forward.py")
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()
    if options.kernels:
        library = Path(options.kernels).resolve()
        options.kernels = library / "libhopper_fa_kernels.a" if library.is_dir() else library
        if not options.kernels.is_file():
            parser.error(
                f"--kernels is {library}, which holds no libhopper_fa_kernels.a; name the kernels folder"
            )
    return options


def main() -> None:
    options = parse()
    options.out.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if options.commit:
        environment["HOPPER_FA_COMMIT"] = options.commit
    site = options.build_dir.resolve() / "site"
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{site}{os.pathsep}{path}" if path else str(site)
    outcomes = []
    if not options.no_build:
        shutil.rmtree(site, ignore_errors=True)
        outcomes.append(run_stage(build_stage(options, site), options.out, environment))
    if not outcomes or outcomes[0].status == 0:
        outcomes += [run_stage(stage, options.out, environment) for stage in stages(options)]
    print("== summary")
    for outcome in outcomes:
        verdict = {0: "ok", 124: "OUT OF TIME"}.get(outcome.status, f"FAILED ({outcome.status})")
        print(f"{outcome.stage.name:<20} {verdict:<12} {outcome.seconds:6.1f} s  {outcome.last_line[:120]}")
    raise SystemExit(any(outcome.status != 0 for outcome in outcomes))


if __name__ == "__main__":
    main()
