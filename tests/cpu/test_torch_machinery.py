"""FLOP counts, export with open sizes, meta tensors, hooks on saved tensors, a copy of the folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.export import Dim, export
from torch.utils.flop_counter import FlopCounterMode

import hopper_fa
from hopper_fa import (
    Fp8Recipe,
    attention_reference,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_quantized_func,
    merge_attention,
    quantize_qkv,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CASE = Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=17, seqlen_k=21, head_dim=24)
RECIPES = {"exact": None, "FP8": Fp8Recipe.default()}
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def counted(call: Callable[[], Tensor]) -> dict[str, int]:
    """FLOPs of the call and of its gradient, by operator; nothing has been compiled or run before."""
    with FlopCounterMode(display=False) as counter:
        call().sum().backward()
    return {str(packet): count for packet, count in counter.get_flop_counts()["Global"].items()}


@every_recipe
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("heads_kv", [4, 2, 1])
def test_flops_are_torch_counts(heads_kv: int, causal: bool, recipe: Fp8Recipe | None, seed: int) -> None:
    q, k, v = (t.requires_grad_() for t in Case(2, 4, heads_kv, 17, 21, 24, causal).qkv(torch.bfloat16, seed))
    got = counted(lambda: flash_attn_func(q, k, v, causal=causal, backend="emulator", recipe=recipe))

    def of_torch() -> Tensor:
        # Every query head with keys of its own: before 2.7 or so torch counts no others.
        heads = (t.detach().repeat_interleave(4 // t.shape[2], 2).transpose(1, 2) for t in (q, k, v))
        inputs = [t.to("meta").requires_grad_() for t in heads]
        return torch.ops.aten._scaled_dot_product_flash_attention(*inputs, is_causal=causal)[0]

    expected = counted(of_torch)
    backward = "hopper_fa.backward" if recipe is None else "hopper_fa.backward_by_recipe"
    assert got == {
        "hopper_fa.forward": expected["aten._scaled_dot_product_flash_attention"],
        backward: expected["aten._scaled_dot_product_flash_attention_backward"],
    }
    assert got["hopper_fa.forward"] == 4 * 2 * 4 * 17 * 21 * 24


def test_flops_of_packed_and_8_bit_tensors() -> None:
    def forward_flops(call: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            call()
        return counter.get_total_flops()

    q = torch.randn(2, 17, 4, 24, dtype=torch.bfloat16)
    kv = torch.randn(2, 21, 2, 2, 24, dtype=torch.bfloat16)
    qkv = torch.randn(2, 17, 3, 4, 24, dtype=torch.bfloat16)
    e4m3 = [t.to(torch.float8_e4m3fn) for t in (q, *kv.unbind(2))]
    quantised = quantize_qkv(q, *kv.unbind(2))
    count, square = (4 * 2 * 4 * 17 * seqlen_k * 24 for seqlen_k in (21, 17))
    assert forward_flops(lambda: flash_attn_kvpacked_func(q, kv, backend="emulator")) == count
    assert forward_flops(lambda: flash_attn_qkvpacked_func(qkv, backend="emulator")) == square
    assert forward_flops(lambda: flash_attn_func(*e4m3, backend="emulator")) == count
    assert forward_flops(lambda: flash_attn_quantized_func(quantised, backend="emulator")) == count


@pytest.mark.parametrize("counter_first", [False, True], ids=["package first", "counter first"])
def test_flops_in_any_order_of_imports(counter_first: bool) -> None:
    """The package itself must not import the counter, which imports Triton."""
    imports = ["import hopper_fa, sys", "from torch.utils.flop_counter import FlopCounterMode"]
    if counter_first:
        imports.reverse()
    else:
        imports.insert(1, "assert 'torch.utils.flop_counter' not in sys.modules")
    lines = [
        *imports,
        "import torch",
        "q = torch.ones(1, 2, 1, 8, dtype=torch.bfloat16)",
        "with FlopCounterMode(display=False) as counter:",
        "    torch.ops.hopper_fa.forward([q, q, q], None, False, False, 'emulator', None)",
        "assert counter.get_total_flops() == 4 * 2 * 2 * 8",
    ]
    run_python("\n".join(lines), Path(hopper_fa.__file__).parents[1])


def run_python(code: str, path: Path, *flags: str) -> str:
    """What Python prints, with `path` in front of its search path."""
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, *flags, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_copy_without_metadata(tmp_path: Path) -> None:
    """The folder alone works, where no installed distribution tells a version."""
    ignored = shutil.ignore_patterns("__pycache__", "build_log")
    shutil.copytree(Path(hopper_fa.__file__).parent, tmp_path / "hopper_fa", ignore=ignored)
    lines = [
        "import importlib.metadata as metadata",
        "def missing(name): raise metadata.PackageNotFoundError(name)",
        "metadata.version = missing",
        "import hopper_fa",
        "print(hopper_fa.__file__)",
        "print(hopper_fa.build_info()['version'])",
    ]
    file, version = run_python("\n".join(lines), tmp_path).splitlines()
    assert Path(file).is_relative_to(tmp_path) and version == "unknown (no installed metadata)"


class Attention(torch.nn.Module):
    def __init__(self, recipe: Fp8Recipe | None = None) -> None:
        super().__init__()
        self.recipe = recipe

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flash_attn_func(
            q * 2, k, v, causal=True, return_lse=True, backend="emulator", recipe=self.recipe
        )


def open_sizes(kind: str) -> tuple[dict[int, Any], ...]:
    if kind == "named":
        batch, seqlen_q, seqlen_k = (Dim(name) for name in ("batch", "seqlen_q", "seqlen_k"))
        return {0: batch, 1: seqlen_q}, {0: batch, 1: seqlen_k}, {0: batch, 1: seqlen_k}
    return tuple({0: getattr(Dim, kind), 1: getattr(Dim, kind)} for _ in range(3))


@every_recipe
@pytest.mark.parametrize("kind", ["AUTO", "DYNAMIC", "named"])
def test_export_with_open_sizes(kind: str, recipe: Fp8Recipe | None, seed: int) -> None:
    module = Attention(recipe)
    example = CASE.qkv(torch.bfloat16, seed)
    program = export(module, example, dynamic_shapes=open_sizes(kind))
    largest = [bounds.upper for bounds in program.range_constraints.values()]
    assert len(largest) == 3 and all(bound > 2**40 for bound in largest)
    for batch, seqlen_q, seqlen_k in ((3, 40, 300), (2, 2, 7), (5, 130, 9)):
        inputs = Case(batch, 4, 2, seqlen_q, seqlen_k, 24).qkv(torch.bfloat16, seed)
        for a, b in zip(program.module()(*inputs), module(*inputs), strict=True):
            assert torch.equal(a, b)


def test_exported_program_checks_its_inputs(seed: int) -> None:
    program = export(Attention(), CASE.qkv(torch.bfloat16, seed), dynamic_shapes=open_sizes("AUTO"))
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    odd = torch.zeros(2, 21, 2, 28, dtype=torch.bfloat16)[..., 1:25]
    with pytest.raises(ValueError, match="k has strides|k starts"):
        program.module()(q, odd, v)


def as_real(meta: Any, real: Any) -> None:
    for a, b in zip(meta, real, strict=True):
        assert a.device.type == "meta"
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


@every_recipe
@pytest.mark.parametrize("backend", [None, "cuda", "emulator"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_meta_tensors(layout: str, backend: str | None, recipe: Fp8Recipe | None, seed: int) -> None:
    real = CASE.qkv(torch.float16, seed)
    if layout == "transposed":
        real = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in real]
    real = [t.requires_grad_() for t in real]
    meta = [t.detach().to("meta").requires_grad_() for t in real]
    results = [
        flash_attn_func(*tensors, return_lse=True, backend=name, recipe=recipe)
        for tensors, name in ((meta, backend), (real, "emulator"))
    ]
    as_real(*results)
    as_real(
        *(
            torch.autograd.grad(out.float().sum() + lse.sum(), tensors)
            for (out, lse), tensors in zip(results, (meta, real), strict=True)
        )
    )


def test_meta_tensors_of_other_calls(seed: int) -> None:
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    of_meta = {"return_lse": True}
    of_real = of_meta | {"backend": "emulator"}
    kv, qkv = torch.stack([k, v], 2), torch.stack([k, k, v], 2)
    as_real(
        flash_attn_kvpacked_func(q.to("meta"), kv.to("meta"), **of_meta),
        flash_attn_kvpacked_func(q, kv, **of_real),
    )
    as_real(flash_attn_qkvpacked_func(qkv.to("meta"), **of_meta), flash_attn_qkvpacked_func(qkv, **of_real))
    e4m3 = [t.to(torch.float8_e4m3fn) for t in (q, k, v)]
    descale = torch.ones(2, 2)
    as_real(
        flash_attn_func(*(t.to("meta") for t in e4m3), k_descale=descale.to("meta"), **of_meta),
        flash_attn_func(*e4m3, k_descale=descale, **of_real),
    )
    for recipe in (Fp8Recipe.default(), Fp8Recipe.fa3(), Fp8Recipe.causal_safe()):
        quantised = quantize_qkv(*(t.to("meta") for t in (q, k, v)), recipe)
        expected = quantize_qkv(q, k, v, recipe)
        names = [name for name, t in vars(expected).items() if isinstance(t, Tensor)]
        as_real([getattr(quantised, name) for name in names], [getattr(expected, name) for name in names])
        options = {"out_dtype": torch.float16}
        as_real(
            flash_attn_quantized_func(quantised, **options, **of_meta),
            flash_attn_quantized_func(expected, **options, **of_real),
        )
    out, lse = flash_attn_func(q, k, v, **of_real)
    as_real(merge_attention([out.to("meta")], [lse.to("meta")]), merge_attention([out], [lse]))


def test_meta_tensors_are_checked() -> None:
    q = torch.empty(1, 8, 2, 60, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="head_dim is 60"):
        flash_attn_func(q, q, q)
    k = torch.empty(1, 8, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="are on meta, cpu, cpu; they must share a device"):
        flash_attn_func(k.to("meta"), k, k)
    with pytest.raises(ValueError, match="out_dtype is torch.float32"):
        flash_attn_quantized_func(quantize_qkv(*[k.to("meta")] * 3), out_dtype=torch.float32)


def test_quantised_operator(seed: int) -> None:
    """The operator that compiled calls and modes see gives the same bits."""
    qkv = quantize_qkv(*CASE.qkv(torch.bfloat16, seed))
    names = ("q", "k", "v", "q_scale", "k_scale", "v_scale", "v_mean", "lse_shift", "key_bias")
    tensors = [getattr(qkv, name) for name in names]
    sizes = (qkv.head_dim, qkv.seqlen_q, qkv.seqlen_k)
    options = (qkv.recipe.to_text(), *sizes, None, True, torch.float16, "emulator")
    # NOTE: the schema's test compares inputs before and after, which torch cannot in float8.
    torch.library.opcheck(
        torch.ops.hopper_fa.forward_quantized.default, (*tensors, *options), test_utils="test_faketensor"
    )

    def call() -> tuple[Tensor, Tensor]:
        return flash_attn_quantized_func(qkv, causal=True, return_lse=True, backend="emulator")

    for got in (torch.compile(call, fullgraph=True, backend="aot_eager")(), with_counter(call)):
        for a, b in zip(got, call(), strict=True):
            assert torch.equal(a, b)


def with_counter(call: Callable[[], Any]) -> Any:
    with FlopCounterMode(display=False):
        return call()


def unaligned(t: Tensor) -> Tensor:
    return t.new_empty(t.numel() + 1)[1:].view(t.shape).copy_(t)


LAYOUTS = {
    "unaligned": unaligned,
    "last dimension apart": lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
    "odd rows": lambda t: t.new_empty(*t.shape[:-1], t.shape[-1] + 3)[..., : t.shape[-1]].copy_(t),
    "dimensions the other way round": lambda t: t.permute(*range(t.ndim)[::-1]).clone().permute(
        *range(t.ndim)[::-1]
    ),
}  # fmt: skip


def in_form(form: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[Callable[..., Any], list[Tensor]]:
    if form == "q, kv":
        return flash_attn_kvpacked_func, [q, torch.stack([k, v], 2)]
    if form == "qkv":
        return flash_attn_qkvpacked_func, [torch.stack([q, k, v], 2)]
    return flash_attn_func, [q, k, v]


@every_recipe
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["q, k, v", "q, kv", "qkv"])
@pytest.mark.parametrize("backend", ["emulator", "reference"])
def test_saved_tensors_in_another_layout(
    backend: str, form: str, layout: str, recipe: Fp8Recipe | None, seed: int
) -> None:
    function, leaves = in_form(form, *Case(2, 2, 2, 19, 19, 16).qkv(torch.bfloat16, seed))
    leaves = [t.requires_grad_() for t in leaves]

    def gradients() -> tuple[Tensor, ...]:
        out, lse = function(*leaves, return_lse=True, backend=backend, recipe=recipe)
        return torch.autograd.grad(out.float().square().sum() + lse.square().sum(), leaves)

    expected = gradients()
    with saved_tensors_hooks(lambda t: t, lambda t: LAYOUTS[layout](t.detach())):
        got = gradients()
    for a, b in zip(got, expected, strict=True):
        assert a.is_contiguous()
        # NOTE: the order in which torch adds depends on strides.
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)


def test_saved_on_the_cpu(seed: int) -> None:
    leaves = [t.requires_grad_() for t in CASE.qkv(torch.bfloat16, seed)]
    expected = torch.autograd.grad(flash_attn_func(*leaves, backend="emulator").float().sum(), leaves)
    with save_on_cpu():
        out = flash_attn_func(*leaves, backend="emulator")
    for a, b in zip(torch.autograd.grad(out.float().sum(), leaves), expected, strict=True):
        assert torch.equal(a, b)


OTHERS = {
    "dtype": (lambda t: t.to(torch.float16 if t.dtype == torch.bfloat16 else t.dtype), "torch.float16"),
    "shape": (lambda t: t[:, :-1], "shape"),
    "device": (lambda t: t.to("meta"), "on meta"),
}


@pytest.mark.parametrize("through", ["call", "operator"])
@pytest.mark.parametrize("other", OTHERS)
def test_saved_tensors_that_are_others_are_refused(other: str, through: str, seed: int) -> None:
    leaves = [t.requires_grad_() for t in CASE.qkv(torch.bfloat16, seed)]
    change, shown = OTHERS[other]
    with saved_tensors_hooks(lambda t: t, change):
        if through == "call":
            out, _ = flash_attn_func(*leaves, return_lse=True, backend="emulator")
        else:
            out, _ = torch.ops.hopper_fa.forward(leaves, None, False, False, "emulator", None)
    with pytest.raises(ValueError, match=f"a tensor saved for .*{shown}.* let the hook"):
        out.float().sum().backward()


def test_saved_tensors_that_were_quantised_and_restored(seed: int) -> None:
    """Hooks that change values are the caller's own: the gradient is that of the values they return."""
    q, k, v = CASE.qkv(torch.bfloat16, seed)
    leaves = [t.requires_grad_() for t in (q, k, v)]
    with saved_tensors_hooks(
        lambda t: t.half(), lambda t: t.to(torch.bfloat16) if t.ndim == 4 else t.float()
    ):
        out = flash_attn_func(*leaves, backend="reference")
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, leaves, dout)
    expected = torch.autograd.grad(attention_reference(*leaves)[0], leaves, dout.double())
    for a, b in zip(got, expected, strict=True):
        assert (a - b).float().norm() <= 0.02 * b.float().norm()
