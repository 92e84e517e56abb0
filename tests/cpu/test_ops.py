"""The torch.library operator: contract, fake, torch.compile, gradients, and who goes around it."""

import pytest
import torch
from cases import Case
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hopper_fa import Fp8Recipe, attention_reference, flash_attn_func, ops

CASES = [
    Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=33, seqlen_k=70, head_dim=40),
    Case(heads_q=3, heads_kv=3, seqlen_q=16, seqlen_k=5, causal=True),
]
RECIPES = {"exact": None, "FP8": Fp8Recipe.default()}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def emulated(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, recipe: Fp8Recipe | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_attn_func(q, k, v, causal=True, return_lse=True, backend="emulator", recipe=recipe)


def in_e4m3(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, descale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    descales = {"q_descale": descale, "v_descale": descale}
    return flash_attn_func(q, k, v, causal=True, **descales, return_lse=True, backend="emulator")


@every_recipe
@pytest.mark.parametrize("case", CASES, ids=str)
def test_opcheck(case: Case, recipe: Fp8Recipe | None, seed: int) -> None:
    q, k, v = case.qkv(torch.bfloat16, seed)
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)  # (batch, heads, seqlen, head_dim) in memory
    for query in (q, transposed):
        torch.library.opcheck(
            torch.ops.hopper_fa.forward.default,
            ([query, k, v], 0.2, case.causal, False, "emulator", recipe and recipe.to_text()),
            test_utils=(
                "test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static",
                "test_aot_dispatch_dynamic",
            ),
        )  # fmt: skip


@pytest.mark.parametrize("backend", ["emulator", "reference"])
def test_fake_matches_real(backend: str, seed: int) -> None:
    q, k, v = CASES[0].qkv(torch.float16, seed)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    real = flash_attn_func(q, k, v, return_lse=True, backend=backend)
    with FakeTensorMode() as mode:
        fake = flash_attn_func(*(mode.from_tensor(t) for t in (q, k, v)), return_lse=True, backend=backend)
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.stride(), a.dtype, a.device) == (b.shape, b.stride(), b.dtype, b.device)


def test_fake_checks_shapes() -> None:
    with FakeTensorMode():
        q = torch.empty(1, 8, 2, 60, dtype=torch.bfloat16)
        with pytest.raises(ValueError, match="head_dim is 60"):
            flash_attn_func(q, q, q, backend="emulator")


@every_recipe
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str, recipe: Fp8Recipe | None, seed: int) -> None:
    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse = emulated(q * 2, k, v, recipe)
        return out.float() + 1, lse

    q, k, v = CASES[0].qkv(torch.bfloat16, seed)
    got = torch.compile(block, fullgraph=True, backend=compiler)(q, k, v)
    for a, b in zip(got, block(q, k, v), strict=True):
        assert torch.equal(a, b)


@every_recipe
def test_compiled_gradient(recipe: Fp8Recipe | None, seed: int) -> None:
    qkv = [t.requires_grad_() for t in CASES[0].qkv(torch.bfloat16, seed)]
    gradients = [
        torch.autograd.grad(attend(*qkv, recipe)[0].float().square().sum(), qkv)
        for attend in (emulated, torch.compile(emulated, fullgraph=True, backend="aot_eager"))
    ]
    for a, b in zip(*gradients, strict=True):
        assert torch.equal(a, b)


def test_e4m3_operator(seed: int) -> None:
    q, k, v = (t.to(torch.float8_e4m3fn) for t in CASES[0].qkv(torch.float32, seed))
    descale = torch.rand(2, 2) + 0.5
    arguments = ([q, k, v], descale, None, descale, None, True, "emulator", Fp8Recipe.fa3().to_text())
    # NOTE: the schema's test compares inputs before and after, which torch cannot in this dtype.
    torch.library.opcheck(
        torch.ops.hopper_fa.forward_e4m3.default, arguments, test_utils=("test_faketensor",)
    )
    expected = in_e4m3(q, k, v, descale)
    compiled = torch.compile(in_e4m3, fullgraph=True, backend="aot_eager")(q, k, v, descale)
    for a, b, c in zip(expected, compiled, torch.ops.hopper_fa.forward_e4m3(*arguments), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_recipes_as_text() -> None:
    for recipe in (Fp8Recipe(), Fp8Recipe.default(), Fp8Recipe.fa3(), Fp8Recipe.causal_safe()):
        assert Fp8Recipe.from_text(recipe.to_text()) == recipe


def test_compile_dynamic_shapes(seed: int) -> None:
    compiled = torch.compile(emulated, fullgraph=True, backend="aot_eager", dynamic=True)
    for seqlen in (16, 40, 99):
        q, k, v = Case(seqlen_q=seqlen, seqlen_k=2 * seqlen).qkv(torch.bfloat16, seed)
        for a, b in zip(compiled(q, k, v), emulated(q, k, v), strict=True):
            assert torch.equal(a, b)


def test_compiled_bad_input_is_refused() -> None:
    q = torch.zeros(1, 8, 2, 68, dtype=torch.bfloat16)[..., :64]
    with pytest.raises(ValueError, match="multiples of 8 elements"):
        torch.compile(emulated, fullgraph=True, backend="eager")(q, q, q)


class SeenOperators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@every_recipe
def test_dispatch_modes_see_the_operator(recipe: Fp8Recipe | None, seed: int) -> None:
    q, k, v = CASES[0].qkv(torch.bfloat16, seed)
    with SeenOperators() as seen:
        emulated(q, k, v, recipe)
    assert seen.names[0] == "hopper_fa::forward"


def test_plain_calls_go_around(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "run_forward", lambda tensors, *_: attention_reference(*tensors))
    q, k, v = CASES[0].qkv(torch.bfloat16, seed)
    assert emulated(q, k, v)[0].dtype == torch.float64
