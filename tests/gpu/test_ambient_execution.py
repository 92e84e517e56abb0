"""What surrounds a call of the kernels does not change it: torch's defaults and modes, lazy bits, devices."""

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import FP8_PRESETS, Case
from public_calls import (
    AMBIENTS,
    EMPTY_CASES,
    Inputs,
    ambient,
    assert_same_results,
    deterministic_algorithms,
    lazily_negated,
    public_calls,
    results_of,
    tensors_of,
    torch_calls,
)

from hopper_fa import Fp8Recipe, error_metrics, flash_attn_func, kernels, merge_attention, quantize_kernels
from hopper_fa.quantization import sign_bits
from hopper_fa.tensor_core import probe_operands

# Head dims that are no power of two, and more than 32 key blocks where O is flushed to scratch.
CASES = [
    Case(2, 4, 2, 300, 700, 72),
    Case(1, 4, 2, 500, 500, 96, True),
    Case(1, 4, 4, 300, 700, 128, True),
    Case(1, 2, 1, 700, 4300, 256),
]
SMALL = Case(1, 4, 2, 70, 150, 72, True)

pytestmark = pytest.mark.skipif(
    not (kernels.HAS_FP8 and {"bf16", "e4m3"} <= set(quantize_kernels.DTYPES)),
    reason="this build holds no FP8 kernel, or no quantisation kernels (HOPPER_FA_DTYPES)",
)
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_ambient = pytest.mark.parametrize("what", AMBIENTS.values(), ids=AMBIENTS)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def kernel_calls(inputs: Inputs, deterministic: bool = True) -> dict[str, Callable[[], Any]]:
    """`public_calls` by the kernels, and quantisation by its kernels."""
    head_dim = inputs.q.shape[-1]
    recipes = {
        name: recipe for name, recipe in FP8_PRESETS.items() if not kernels.fp8_problem(recipe, head_dim)
    }
    calls = public_calls(inputs, "cuda", recipes, deterministic)
    qkv = (inputs.q, inputs.k, inputs.v)
    for name, recipe in recipes.items():
        calls[f"kernels quantize {name}"] = lambda r=recipe: tensors_of(
            quantize_kernels.quantize_qkv(*qkv, r)
        )
    return calls


def test_cases_reach_every_preset_and_the_flush() -> None:
    recipes = FP8_PRESETS.values()
    assert not any(kernels.fp8_problem(recipe, case.head_dim) for case in CASES for recipe in recipes)
    assert kernels.fp8_variant(Fp8Recipe.default(), CASES[-1].head_dim) == "fp8_flush"
    assert CASES[-1].seqlen_k > 32 * 128


@every_ambient
@every_case
def test_kernels_do_not_read_defaults(
    instance: None,
    backward_instance: None,
    case: Case,
    what: torch.dtype | str,
    seed: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = kernel_calls(Inputs.random(case, seed, "cuda"))
    want = results_of(calls)
    # What the first call leaves for the later ones is made under the defaults too.
    monkeypatch.setattr(kernels, "_WORKSPACES", {})
    sign_bits.cache_clear()
    with ambient(what):
        got = results_of(calls)
        torch.cuda.synchronize()
    assert_same_results(got, want)


@every_ambient
@pytest.mark.parametrize("backend", ["emulator", "reference"])
def test_other_backends_do_not_read_defaults(backend: str, what: torch.dtype | str, seed: int) -> None:
    inputs = Inputs.random(SMALL, seed, "cuda")
    calls = public_calls(inputs, backend) | torch_calls(inputs, "cuda")
    want = results_of(calls)
    with ambient(what):
        got = results_of(calls)
    assert_same_results(got, want)


@every_ambient
def test_accumulator_probe_does_not_read_defaults(what: torch.dtype | str, seed: int) -> None:
    def probe() -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return kernels.accumulator_probe(*probe_operands("start", 2, 96, generator))

    want = probe()
    with ambient(what):
        assert torch.equal(probe(), want)


@every_case
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_lazy_negations(instance: None, backward_instance: None, dtype: str, case: Case, seed: int) -> None:
    inputs = Inputs.random(case, seed, "cuda", {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype])
    negated = inputs.map(lazily_negated)
    assert negated.q.is_neg() and torch.equal(negated.q, inputs.q)
    assert_same_results(results_of(kernel_calls(negated)), results_of(kernel_calls(inputs)))


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_parts_of_complex_tensors(seed: int) -> None:
    """The lazy bit as users meet it, in views of every other number; inputs and gradients."""
    parts = [t.half() for t in CASES[2].qkv(torch.float32, seed, "cuda")]
    views = [torch.complex(t, -t).conj().imag for t in parts]  # complex32
    assert all(t.is_neg() and t.stride(-1) == 2 for t in views)
    want = flash_attn_func(*parts, causal=True, return_lse=True)
    got = flash_attn_func(*views, causal=True, return_lse=True)
    assert_same_results({"views": got}, {"views": want})
    dout, dlse = (torch.randn_like(t) for t in want)
    gradients = []
    for grads in ((dout, dlse), tuple(torch.complex(t, -t).conj().imag for t in (dout, dlse))):
        leaves = [t.clone().requires_grad_() for t in parts]
        results = flash_attn_func(*leaves, causal=True, deterministic=True, return_lse=True)
        gradients.append(torch.autograd.grad(results, leaves, grads))
    assert_same_results({"gradients": gradients[1]}, {"gradients": gradients[0]})


def test_zeros_without_memory(seed: int) -> None:
    """torch's zeros that have no address: as V, and as gradients of out and LSE."""
    q, k, v = CASES[2].qkv(torch.bfloat16, seed, "cuda")
    nothing = torch._efficientzerotensor(v.shape, dtype=v.dtype, device=v.device)
    assert (flash_attn_func(q, k, nothing) == 0).all()
    leaves = [t.requires_grad_() for t in (q, k, v)]
    out, lse = flash_attn_func(*leaves, return_lse=True)
    zeros = [torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device) for t in (out, lse)]
    for gradient in torch.autograd.grad((out, lse), leaves, zeros):
        assert (gradient == 0).all()


def moved(value: Any, device: str) -> Any:
    """Every tensor of a nested result on `device`."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: moved(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(moved(item, device) for item in value)
    return value


@two_gpus
@pytest.mark.parametrize("current", [0, 1])
@every_case
def test_tensors_on_another_device_than_the_current(
    instance: None, backward_instance: None, case: Case, current: int, seed: int
) -> None:
    """Every public function and gradient: on the tensors' device, whatever the current one is."""
    inputs = Inputs.random(case, seed, f"cuda:{current}")
    other = f"cuda:{1 - current}"
    with torch.cuda.device(current):
        here = kernel_calls(inputs)
        there = kernel_calls(inputs.map(lambda t: t.to(other)))
        want, got = results_of(here), results_of(there)
        assert torch.cuda.current_device() == current
        # With its devices: a result that was made on the current one is found.
        assert_same_results(got, moved(want, other))


@two_gpus
@pytest.mark.parametrize("backend", ["emulator", "reference"])
def test_other_backends_on_another_device(backend: str, seed: int) -> None:
    inputs = Inputs.random(SMALL, seed, "cuda:0")
    there = inputs.map(lambda t: t.to("cuda:1"))
    want = results_of(public_calls(inputs, backend))
    assert_same_results(results_of(public_calls(there, backend)), moved(want, "cuda:1"))
    want = results_of(torch_calls(inputs, "cuda:0"))
    assert_same_results(results_of(torch_calls(there, "cuda:1")), moved(want, "cuda:1"))


@two_gpus
def test_metrics_merge_and_probe_on_another_device(seed: int) -> None:
    q, k, v = SMALL.qkv(torch.bfloat16, seed, "cuda:1")
    halves = (slice(64), slice(64, None))
    parts = [flash_attn_func(q, k[:, half], v[:, half], return_lse=True) for half in halves]
    out, lse = merge_attention(*zip(*parts, strict=True))
    assert out.device == lse.device == q.device and torch.cuda.current_device() == 0
    whole = flash_attn_func(q, k, v)
    assert error_metrics(out, whole.to("cuda:0"))["relative_l2"] < 1e-2  # x and ref may be on two devices
    a, b, c = probe_operands("start", 1, 64, torch.Generator("cuda:1").manual_seed(seed))
    here = kernels.accumulator_probe(*(t.to("cuda:0") for t in (a, b, c)))
    assert torch.equal(kernels.accumulator_probe(a, b, c).to("cuda:0"), here)


@pytest.mark.parametrize("warn_only", [False, True], ids=["raise", "warn"])
@every_case
def test_deterministic_algorithms(
    instance: None, backward_instance: None, case: Case, warn_only: bool, seed: int
) -> None:
    """No error and no warning, no value of torch.empty, which is NaN then, and dQ's bits without asking."""
    inputs = Inputs.random(case, seed, "cuda")
    want = results_of(kernel_calls(inputs, deterministic=True))
    calls = kernel_calls(inputs, deterministic=False)
    for _ in range(3):
        with deterministic_algorithms(warn_only):
            assert torch.empty(3, dtype=torch.float32, device="cuda").isnan().all()
            got = results_of(calls)
        assert_same_results(got, want)


@pytest.mark.parametrize("recipe", [None, *FP8_PRESETS.values()], ids=["exact", *FP8_PRESETS])
def test_empty_tensors_under_deterministic_algorithms(recipe: Fp8Recipe | None, seed: int) -> None:
    """Where nothing is computed no NaN of torch.empty is left."""
    with deterministic_algorithms(warn_only=False):
        for case in EMPTY_CASES:
            leaves = [t.requires_grad_() for t in case.qkv(torch.bfloat16, seed, "cuda")]
            out, lse = flash_attn_func(*leaves, recipe=recipe, return_lse=True)
            assert (out == 0).all() and (lse == float("-inf")).all()
            for gradient in torch.autograd.grad(
                (out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse))
            ):
                assert (gradient == 0).all()


# NOTE: torch wants this to be there before its first matrix product, or refuses all under deterministic mode.
CUBLAS = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
DETERMINISTIC = """
import sys
sys.path.insert(0, sys.argv[1])
from cases import Case
from public_calls import (
    Inputs, assert_same_results, deterministic_algorithms, public_calls, results_of, torch_calls
)

inputs = Inputs.random(Case(1, 4, 2, 70, 150, 72, True), int(sys.argv[2]), "cuda")
for backend in ("emulator", "reference"):
    calls = public_calls(inputs, backend) | torch_calls(inputs, "cuda")
    want = results_of(calls)
    for warn_only in (False, True):
        with deterministic_algorithms(warn_only):
            got = results_of(calls)
        assert_same_results(got, want)
print("the same")
"""


def test_other_backends_under_deterministic_algorithms(seed: int) -> None:
    tests = str(Path(__file__).parents[1])
    command = [sys.executable, "-c", DETERMINISTIC, tests, str(seed)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | CUBLAS)
    assert run.returncode == 0 and run.stdout.endswith("the same\n"), run.stderr
