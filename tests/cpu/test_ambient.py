"""What surrounds a call does not change it: default dtypes and devices, lazy bits, deterministic mode."""

import ast
import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import FP8_PRESETS, Case
from public_calls import (
    AMBIENTS,
    E4M3,
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
from torch.utils._device import _device_constructors

import hopper_fa
from hopper_fa import (
    Fp8Recipe,
    backend,
    error_metrics,
    flash_attn_func,
    flash_attn_quantized_func,
    kernels,
    quantize_kernels,
    quantize_qkv,
)
from hopper_fa.emulator import attention_emulated
from hopper_fa.quantization import from_fp8
from hopper_fa.tensor_core import Accumulator, probe_operands

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [Case(2, 4, 2, 40, 170, 72), Case(1, 2, 1, 70, 150, 96, True)]
FLUSHED = Case(1, 1, 1, 3, 4200, 256)  # more than 32 key blocks
FLUSHED_RECIPES = {name: FP8_PRESETS[name] for name in ("default", "accurate")}
every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_backend = pytest.mark.parametrize("backend_name", ["emulator", "reference"])
every_ambient = pytest.mark.parametrize("what", AMBIENTS.values(), ids=AMBIENTS)

# Functions of torch that make a tensor of nothing, so of the default dtype or on the default device.
FACTORIES = {
    "arange", "as_tensor", "asarray", "bartlett_window", "blackman_window", "empty", "empty_permuted",
    "empty_quantized", "empty_strided", "eye", "fft_fftfreq", "fft_rfftfreq", "full", "hamming_window",
    "hann_window", "kaiser_window", "linspace", "logspace", "nested_tensor", "normal", "ones", "rand",
    "randint", "randn", "randperm", "range", "scalar_tensor", "sparse_bsc_tensor", "sparse_bsr_tensor",
    "sparse_compressed_tensor", "sparse_coo_tensor", "sparse_csc_tensor", "sparse_csr_tensor", "tensor",
    "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
# Classes whose construction does that too.
CLASSES = {"Tensor", "FloatTensor", "HalfTensor", "BFloat16Tensor", "DoubleTensor", "IntTensor", "LongTensor"}
# Functions that look at the defaults without making a tensor of nothing, or change them.
FORBIDDEN = {
    "ldexp": "raises 2 to its powers in the default dtype",
    "get_default_dtype": "reads the default dtype",
    "get_default_device": "reads the default device",
    "set_default_dtype": "changes the default dtype",
    "set_default_device": "changes the default device",
    "set_default_tensor_type": "changes the default dtype",
    "fill": "is given a device by torch 2.6, which it does not take",
    "vander": "is given a device by torch 2.6, which it does not take",
}
SOURCES = Path(hopper_fa.__file__).parent
EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def ambient_uses(source: str) -> list[str]:
    """`LINE: what is wrong` of every use of torch's default dtype or device in Python source."""
    tree = ast.parse(source)
    modules: set[str] = {"torch"}
    names: dict[str, str] = {}  # that were imported from torch
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname for alias in node.names if alias.asname and alias.name == "torch"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "torch":
            names |= {alias.asname or alias.name: alias.name for alias in node.names}

    def torch_name(node: ast.AST) -> str | None:
        """The last part of torch.NAME, torch.x.NAME or a name that was imported from torch."""
        if isinstance(node, ast.Name):
            return names.get(node.id)
        root = node
        while isinstance(root, ast.Attribute):
            root = root.value
        of_torch = isinstance(root, ast.Name) and root.id in modules | names.keys()
        return node.attr if of_torch and isinstance(node, ast.Attribute) else None

    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    called = {id(call.func): call for call in calls}
    found = []
    for node in ast.walk(tree):
        name = torch_name(node)
        call = called.get(id(node))
        given = {keyword.arg for keyword in call.keywords} if call else set()
        if name in FORBIDDEN:
            found.append((node.lineno, f"torch.{name} {FORBIDDEN[name]}"))
        elif name in FACTORIES and call is None:
            found.append((node.lineno, f"torch.{name} is used without a call that states dtype and device"))
        elif name in FACTORIES:
            missing = [need for need in ("dtype", "device") if need not in given]
            found += [(node.lineno, f"torch.{name} without {need}=") for need in missing]
        elif name in CLASSES and call:
            found.append((node.lineno, f"torch.{name} is called, which takes the defaults"))
        elif name == "Generator" and call and not call.args and "device" not in given:
            found.append((node.lineno, "torch.Generator without a device"))
        elif name == "where" and call and all(isinstance(arg, ast.Constant) for arg in call.args[1:3]):
            found.append((node.lineno, "torch.where of two numbers gives the default dtype"))
    return [f"{line}: {what}" for line, what in sorted(found)]


@pytest.mark.parametrize("folder", [SOURCES, EXPERIMENTS], ids=["package", "experiments"])
def test_every_factory_call_states_dtype_and_device(folder: Path) -> None:
    if not folder.is_dir():
        pytest.skip("the experiments are no part of an installed package")
    files = sorted(folder.rglob("*.py"))
    found = [f"{path.name}:{use}" for path in files for use in ambient_uses(path.read_text())]
    assert len(files) > 10 and not found, "\n".join(found)


def test_lint_knows_every_factory() -> None:
    """What torch.device as a context has an influence on."""
    assert {function.__name__ for function in _device_constructors()} <= FACTORIES | FORBIDDEN.keys()


BOTH = ["without dtype=", "without device="]


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("torch.empty(3, device='cpu')", ["torch.empty without dtype="]),
        ("torch.zeros(3, dtype=torch.int32)", ["torch.zeros without device="]),
        ("import torch as t; t.ones(3)", [f"torch.ones {what}" for what in BOTH]),
        ("from torch import full as fill; fill((3,), 1.0)", [f"torch.full {what}" for what in BOTH]),
        ("torch.tensor(1.0, dtype=torch.float32)", ["torch.tensor without device="]),
        ("torch.randn(3, **options)", [f"torch.randn {what}" for what in BOTH]),
        ("from torch import nested; nested.nested_tensor(x)", [f"torch.nested_tensor {w}" for w in BOTH]),
        ("make = torch.empty", ["torch.empty is used without a call that states dtype and device"]),
        ("torch.Generator().manual_seed(1)", ["torch.Generator without a device"]),
        ("torch.Tensor(3)", ["torch.Tensor is called, which takes the defaults"]),
        ("torch.cuda.FloatTensor(3)", ["torch.FloatTensor is called, which takes the defaults"]),
        ("torch.ldexp(x, y)", ["torch.ldexp raises 2 to its powers in the default dtype"]),
        ("torch.where(x > 0, 1.0, 0.0)", ["torch.where of two numbers gives the default dtype"]),
        ("torch.set_default_dtype(x)", ["torch.set_default_dtype changes the default dtype"]),
        ("torch.empty(3, dtype=torch.int8, device=x.device)", []),
        ("torch.empty_like(x), x.new_zeros(3), x.float(), isinstance(x, torch.Tensor)", []),
        ("def f(g: torch.Generator) -> torch.Tensor: return torch.where(a, b, 0.0)", []),
        ("torch.Generator(device='cpu'), torch.Generator('cuda')", []),
        ("def empty(n): return n\nempty(3), numpy.zeros(3)", []),
    ],
)
def test_lint_finds(source: str, wrong: list[str]) -> None:
    assert sorted(ambient_uses(f"import torch\n{source}")) == sorted(f"2: {what}" for what in wrong)


@every_ambient
@every_backend
@every_case
def test_public_calls_do_not_read_defaults(
    case: Case, backend_name: str, what: torch.dtype | str, seed: int
) -> None:
    calls = public_calls(Inputs.random(case, seed), backend_name)
    want = results_of(calls)
    with ambient(what):
        got = results_of(calls)
    assert_same_results(got, want)


@every_ambient
def test_torch_calls_do_not_read_defaults(what: torch.dtype | str, seed: int) -> None:
    calls = torch_calls(Inputs.random(CASES[1], seed), "cpu")
    want = results_of(calls)
    with ambient(what):
        got = results_of(calls)
    assert_same_results(got, want)


@pytest.mark.parametrize("name", ["bfloat16", "float16", "float64", "in meta"])
def test_long_sums_do_not_read_defaults(name: str, seed: int) -> None:
    """Where the tensor core's sum is modelled in steps, of 16 and 32 key blocks and of all."""
    q, k, v = FLUSHED.qkv(torch.bfloat16, seed)
    accumulator = Accumulator(joins_alignment=False)
    a, b, c = probe_operands("wide", 2, 96, torch.Generator("cpu").manual_seed(seed))
    recipes = FLUSHED_RECIPES | {"fa3": Fp8Recipe.fa3()}
    calls: dict[str, Callable[[], object]] = {
        key: lambda r=recipe: flash_attn_func(q, k, v, recipe=r, return_lse=True, backend="emulator")
        for key, recipe in recipes.items()
    }
    calls["probe"] = lambda: accumulator.matmul_add(a.float(), b.float().transpose(1, 2), c)
    calls["polynomial"] = lambda: attention_emulated(q, k, v, fma_exp2_octets=3)
    want = results_of(calls)
    with ambient(AMBIENTS[name]):
        got = results_of(calls)
    assert_same_results(got, want)


# NOTE: a fork for each, because importing torch takes seconds.
IMPORT = """
import json, os, sys, torch

def say() -> None:
    import hopper_fa
    from hopper_fa import cli, emulator, emulator_fp8
    q = (torch.arange(1024, dtype=torch.float32, device="cpu") % 7 - 3).view(1, 16, 1, 64).bfloat16()
    out = hopper_fa.flash_attn_func(q, q, q, recipe=hopper_fa.Fp8Recipe.default(), backend="emulator")
    values = [emulator_fp8.CODE_OF_ONE, emulator.log2_scale(0.3), *out.double().flatten().tolist()]
    print(json.dumps(values), flush=True)

for what in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        if what.startswith("default "):
            torch.set_default_device(what.split()[1])
        elif what in ("bfloat16", "float16", "float64"):
            torch.set_default_dtype(getattr(torch, what))
        elif what != "nothing":
            torch.device(what).__enter__()
        say()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, what
"""


def test_import_does_not_read_defaults(tmp_path: Path) -> None:
    """What processes say that import hopper_fa under these defaults, and call it once."""
    ambients = ["nothing", "bfloat16", "float16", "float64", "cpu", "cuda", "meta", "default meta"]
    command = [sys.executable, "-c", IMPORT, *ambients]
    # NOTE: in the checkout, the bare sources would hide the installed package.
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    want, *others = (json.loads(line) for line in run.stdout.splitlines())
    assert len(want) == 2 + 1024 and len(others) == len(ambients) - 1
    for name, values in zip(ambients[1:], others, strict=True):
        assert values == want, f"under {name}"


@every_backend
@every_case
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_lazy_negations(dtype: torch.dtype, case: Case, backend_name: str, seed: int) -> None:
    inputs = Inputs.random(case, seed, dtype=dtype)
    negated = inputs.map(lazily_negated)
    assert negated.q.is_neg() and negated.in_e4m3()[0].is_neg() and torch.equal(negated.dlse, inputs.dlse)
    want = results_of(public_calls(inputs, backend_name))
    assert_same_results(results_of(public_calls(negated, backend_name)), want)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
def test_parts_of_complex_tensors(seed: int) -> None:
    """The lazy bit as users meet it, in views of every other number; inputs and gradients."""
    parts = [t.half() for t in CASES[0].qkv(torch.float32, seed)]
    q, k, v = (torch.complex(t, -t).conj().imag for t in parts)  # complex32
    assert q.is_neg() and q.dtype == torch.float16 and q.stride(-1) == 2
    want = flash_attn_func(*parts, return_lse=True, backend="emulator")
    got = flash_attn_func(q, k, v, return_lse=True, backend="emulator")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

    dout, dlse = (torch.randn_like(t) for t in want)
    gradients = []
    for of_out, of_lse in ((dout, dlse), (torch.complex(t, -t).conj().imag for t in (dout, dlse))):
        assert of_out.is_neg() == of_lse.is_neg() == bool(gradients)
        leaves = [t.clone().requires_grad_() for t in parts]
        results = flash_attn_func(*leaves, return_lse=True, backend="emulator")
        gradients.append(torch.autograd.grad(results, leaves, (of_out, of_lse)))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.fixture
def seen_by_kernels(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The tensors whose memory kernels were to read, of calls on a CPU; all kernels write zeros."""
    seen: list[torch.Tensor] = []

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *outputs: object) -> None:
        seen.extend((q, k, v))
        outputs[0].zero_(), outputs[1].zero_()

    def backward(*arguments: object) -> None:
        seen.extend(arguments[:7])
        for gradient in arguments[7:10]:
            gradient.zero_()

    def forward_fp8(qkv: hopper_fa.QuantizedQKV, *outputs: object) -> None:
        seen.extend(tensors_of(qkv).values())
        outputs[0].zero_(), outputs[1].zero_()

    def backward_quantized(dout, qkv, out, lse, dlse, *others) -> None:
        seen.extend((dout, out, lse, dlse, *tensors_of(qkv).values()))
        for gradient in others[:3]:
            gradient.zero_()

    def quantize(x: torch.Tensor) -> torch.Tensor:
        x = aligned(x)
        seen.append(x)
        return x

    aligned = quantize_kernels._aligned
    monkeypatch.setattr(quantize_kernels, "_aligned", quantize)
    monkeypatch.setattr(quantize_kernels, "_run", lambda *arguments: None)
    monkeypatch.setattr(kernels, "forward", forward)
    monkeypatch.setattr(kernels, "backward", backward)
    monkeypatch.setattr(kernels, "forward_fp8", forward_fp8)
    monkeypatch.setattr(kernels, "backward_quantized", backward_quantized)
    for name in ("resolve", "resolve_fp8"):
        monkeypatch.setattr(backend, name, lambda name, device: "cuda")
    return seen


def holds_values(t: torch.Tensor) -> bool:
    return not t.is_neg() and not t._is_zerotensor() and (t.data_ptr() != 0 or t.numel() == 0)


@pytest.mark.parametrize("zeros", [False, True], ids=["negated", "zeros"])
def test_kernels_get_memory_that_holds_values(
    zeros: bool, seen_by_kernels: list[torch.Tensor], seed: int
) -> None:
    """Every input in turn, so that no other is what makes a copy."""
    inputs = Inputs.random(CASES[0], seed)

    def lazy(t: torch.Tensor) -> torch.Tensor:
        if zeros:
            return torch._efficientzerotensor(t.shape, dtype=t.dtype, device=t.device)
        return lazily_negated(t)

    def train(problem: Inputs, **options: object) -> None:
        leaves = [t.detach().requires_grad_() for t in (problem.q, problem.k, problem.v)]
        results = flash_attn_func(*leaves, return_lse=True, **options)
        torch.autograd.grad(results, leaves, (problem.dout, problem.dlse))

    codes = inputs.in_e4m3()
    names = ("q_descale", "k_descale", "v_descale")
    descales = {name: getattr(inputs, name) for name in names}
    calls: dict[str, Callable[[], object]] = {}
    for name in ("q", "k", "v", "dout", "dlse"):
        problem = replace(inputs, **{name: lazy(getattr(inputs, name))})
        calls[name] = lambda p=problem: train(p)
        calls[f"{name} with a recipe"] = lambda p=problem: train(p, recipe=Fp8Recipe.default())
        if name in ("q", "k", "v"):
            qkv = (problem.q, problem.k, problem.v)
            calls[f"{name} quantised"] = lambda t=qkv: quantize_kernels.quantize_qkv(*t, Fp8Recipe.accurate())
    for i in range(3 if not zeros else 0):
        changed = (*codes[:i], lazily_negated(codes[i]), *codes[i + 1 :])
        calls[f"e4m3 {i}"] = lambda t=changed: flash_attn_func(*t)
    for name in names:
        changed = descales | {name: lazy(descales[name])}
        calls[name] = lambda d=changed: flash_attn_func(*codes, **d)
    quantized = quantize_qkv(inputs.q, inputs.k, inputs.v, replace(Fp8Recipe.default(), smooth_q=True))
    for name, t in tensors_of(quantized).items():
        if t.dtype != torch.int8 or not zeros:
            changed = replace(quantized, **{name: lazy(t)}) if t.dtype != E4M3 or not zeros else quantized
            calls[f"quantised {name}"] = lambda qkv=changed: flash_attn_quantized_func(qkv)
    for name, call in calls.items():
        seen_by_kernels.clear()
        call()
        tensors = [t for t in seen_by_kernels if t is not None]
        assert len(tensors) >= 3 and all(map(holds_values, tensors)), name


def test_values_of_resolved_tensors(seed: int) -> None:
    inputs = Inputs.random(CASES[0], seed)
    descales = (inputs.q_descale, inputs.k_descale, inputs.v_descale)
    want = tensors_of(from_fp8(*inputs.in_e4m3(), *descales))
    negated = inputs.map(lazily_negated)
    lazy = (negated.q_descale, negated.k_descale, negated.v_descale)
    assert_same_results(tensors_of(from_fp8(*negated.in_e4m3(), *lazy)), want)
    quantized = quantize_qkv(inputs.q, inputs.k, inputs.v)
    assert quantized.resolved() is quantized
    tensors = tensors_of(quantized)
    other = replace(quantized, **{name: lazily_negated(t) for name, t in tensors.items()})
    assert not other.is_resolved
    assert_same_results(tensors_of(other.resolved()), tensors)
    a, b = (flash_attn_quantized_func(t, return_lse=True, backend="emulator") for t in (quantized, other))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_zeros_without_memory_as_gradient(seed: int) -> None:
    q, k, v = (t.requires_grad_() for t in CASES[0].qkv(torch.bfloat16, seed))
    out = flash_attn_func(q, k, v, backend="emulator")
    zeros = torch._efficientzerotensor(out.shape, dtype=out.dtype)
    for gradient in torch.autograd.grad(out, (q, k, v), zeros):
        assert (gradient == 0).all()


@every_backend
@pytest.mark.parametrize("warn_only", [False, True], ids=["raise", "warn"])
@every_case
def test_deterministic_algorithms(case: Case, warn_only: bool, backend_name: str, seed: int) -> None:
    """No error and no warning, nor a value of torch.empty, which is NaN then, in a result."""
    inputs = Inputs.random(case, seed)
    calls = public_calls(inputs, backend_name) | torch_calls(inputs, "cpu")
    want = results_of(calls)
    with deterministic_algorithms(warn_only):
        assert torch.empty(3, dtype=torch.float32, device="cpu").isnan().all()
        got = results_of(calls)
    assert_same_results(got, want)


@pytest.mark.parametrize("recipe", [None, *FP8_PRESETS.values()], ids=["exact", *FP8_PRESETS])
def test_empty_tensors_under_deterministic_algorithms(recipe: Fp8Recipe | None, seed: int) -> None:
    """Where nothing is computed no NaN of torch.empty is left."""
    with deterministic_algorithms(warn_only=False):
        for case in EMPTY_CASES:
            leaves = [t.requires_grad_() for t in case.qkv(torch.bfloat16, seed)]
            out, lse = flash_attn_func(*leaves, recipe=recipe, return_lse=True, backend="emulator")
            assert (out == 0).all() and (lse == float("-inf")).all()
            for gradient in torch.autograd.grad(
                (out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse))
            ):
                assert (gradient == 0).all()


def test_percentile_is_the_kth_value(seed: int) -> None:
    for rows in (1, 2, 99, 100, 101, 1000):
        x, ref = torch.randn(2, rows, 8, dtype=torch.float64)
        errors = (x - ref).norm(dim=-1) / ref.norm(dim=-1)
        kth = errors.kthvalue(max(1, -(-99 * rows // 100))).values.item()
        assert error_metrics(x, ref)["row_p99"] == pytest.approx(kth, rel=1e-12)


def test_operator_resolves_what_the_call_around_it_does(seed: int) -> None:
    q, k, v = CASES[1].qkv(torch.bfloat16, seed)
    operator = importlib.import_module("hopper_fa.ops") and torch.ops.hopper_fa.forward.default
    want = operator([q, k, v], None, True, False, "emulator", None)
    got = operator([lazily_negated(t) for t in (q, k, v)], None, True, False, "emulator", None)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
