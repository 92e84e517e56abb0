"""Training calls: autograd, torch.compile, checkpoints, autocast, packed tensors and the backward."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cases import Case, assert_gradients_accurate, gradients_float64, random_gradients
from torch.utils.checkpoint import checkpoint

from hopper_fa import (
    Fp8Recipe,
    backend,
    error_metrics,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    kernels,
    ops,
)
from hopper_fa.emulator_backward import gradients_emulated, gradients_quantized_emulated
from hopper_fa.emulator_fp8 import attention_fp8_emulated
from hopper_fa.quantization import quantize_qkv

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=33, seqlen_k=70, head_dim=40),
    Case(heads_q=3, heads_kv=3, seqlen_q=16, seqlen_k=5, causal=True),
]
SQUARE = Case(batch=2, heads_q=3, heads_kv=3, seqlen_q=40, seqlen_k=40, causal=True)
Tensors = tuple[torch.Tensor, ...]


@pytest.fixture(autouse=True)
def emulator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOPPER_FA_BACKEND", "emulator")


def leaves_of(tensors: Tensors) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradients_of(call: Callable[..., torch.Tensor], tensors: Tensors, dout: torch.Tensor) -> Tensors:
    leaves = leaves_of(tensors)
    return torch.autograd.grad(call(*leaves), leaves, dout)


def assert_same(a: Tensors, b: Tensors) -> None:
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("name", ["emulator", "reference"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradients_of_out_and_lse(case: Case, name: str, seed: int) -> None:
    q, k, v = case.qkv(torch.bfloat16, seed)
    dout, dlse = random_gradients(q)
    zeros = torch.zeros_like(dout), torch.zeros_like(dlse)
    for grads, used in (((dout, dlse), (0, 1)), ((dout, zeros[1]), (0,)), ((zeros[0], dlse), (1,))):
        leaves = leaves_of((q, k, v))
        results = flash_attn_func(*leaves, 0.2, case.causal, return_lse=True, backend=name)
        got = torch.autograd.grad([results[i] for i in used], leaves, [grads[i] for i in used])
        assert_gradients_accurate(got, (*grads, q, k, v, 0.2, case.causal))


def test_gradients_are_the_emulators(seed: int) -> None:
    q, k, v = CASES[0].qkv(torch.float16, seed)
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    dout, _ = random_gradients(q)
    want = gradients_emulated(dout, None, q, k, v, out, lse, q.shape[-1] ** -0.5)
    assert_same(gradients_of(flash_attn_func, (q, k, v), dout), want)


def test_lse_without_a_gradient_costs_nothing(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def run(dout: torch.Tensor, dlse: torch.Tensor | None, *rest: object) -> list[torch.Tensor]:
        seen.append(dlse)
        return backend.run_backward(dout, dlse, *rest)

    monkeypatch.setattr(ops, "run_backward", run)
    q, k, v = leaves_of(CASES[0].qkv(torch.bfloat16, seed))
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    out.sum().backward(retain_graph=True)
    assert seen == [None]
    lse.sum().backward()
    assert seen[1] is not None


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_some_gradients_are_not_wanted(wanted: tuple[int, ...], seed: int) -> None:
    tensors = CASES[1].qkv(torch.bfloat16, seed)
    dout = torch.randn_like(tensors[0])
    want = gradients_of(flash_attn_func, tensors, dout)
    leaves = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    flash_attn_func(*leaves).backward(dout)
    for i, leaf in enumerate(leaves):
        assert torch.equal(leaf.grad, want[i]) if i in wanted else leaf.grad is None


def test_no_graph_without_need(seed: int) -> None:
    q, k, v = CASES[0].qkv(torch.bfloat16, seed)
    assert not flash_attn_func(q, k, v).requires_grad
    q.requires_grad_()
    assert flash_attn_func(q, k, v).requires_grad
    with torch.no_grad():
        assert not flash_attn_func(q, k, v).requires_grad
    with torch.inference_mode():
        assert not flash_attn_func(q, k, v).requires_grad


@pytest.mark.parametrize("layout", ["summed", "transposed", "misaligned", "odd rows", "one row for all"])
def test_dout_of_any_layout(layout: str, seed: int) -> None:
    q, k, v = CASES[0].qkv(torch.bfloat16, seed)
    dout = torch.randn_like(q)
    dout = {
        "summed": lambda: dout.new_ones(()).expand_as(dout),
        "transposed": lambda: dout.transpose(-1, -2).contiguous().transpose(-1, -2),
        "misaligned": lambda: dout.new_empty(dout.numel() + 1)[1:].view(dout.shape).copy_(dout),
        "odd rows": lambda: dout.new_empty(*dout.shape[:3], 41)[..., :40].copy_(dout),
        "one row for all": lambda: dout[:1, :1, :1].expand_as(dout),
    }[layout]()
    got = gradients_of(flash_attn_func, (q, k, v), dout)
    assert_same(got, gradients_of(flash_attn_func, (q, k, v), dout.contiguous().clone()))


@pytest.mark.parametrize("compiler", [None, "aot_eager"])
def test_packed_gradients_are_one_tensor(
    compiler: str | None, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The backend writes into slices of the tensor that autograd hands out: nothing is copied."""
    written = []

    def run(*arguments: object) -> list[torch.Tensor]:
        written.append(backend.run_backward(*arguments))
        return written[-1]

    monkeypatch.setattr(ops, "run_backward", run)
    tensors = SQUARE.qkv(torch.bfloat16, seed)
    dout = torch.randn_like(tensors[0])
    want = gradients_of(lambda *t: flash_attn_func(*t, causal=True), tensors, dout)

    def qkvpacked(qkv: torch.Tensor) -> torch.Tensor:
        return flash_attn_qkvpacked_func(qkv, causal=True)

    def kvpacked(q: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return flash_attn_kvpacked_func(q, kv, causal=True)

    if compiler is not None:
        qkvpacked, kvpacked = (
            torch.compile(f, fullgraph=True, backend=compiler) for f in (qkvpacked, kvpacked)
        )
    packed = torch.stack(tensors, 2)
    (dqkv,) = gradients_of(qkvpacked, (packed,), dout)
    assert dqkv.data_ptr() == written[-1][0].data_ptr() and dqkv.is_contiguous()
    assert_same(dqkv.unbind(2), want)
    dq, dkv = gradients_of(kvpacked, (tensors[0], packed[:, :, 1:]), dout)
    assert dkv.data_ptr() == written[-1][1].data_ptr() and dkv.is_contiguous()
    assert_same((dq, *dkv.unbind(2)), want)


def test_packed_unknown_option() -> None:
    qkv = torch.zeros(1, 8, 3, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="window is no argument of flash_attn_func"):
        flash_attn_qkvpacked_func(qkv, window=(1, 1))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("with_dlse", [False, True])
def test_opcheck(with_dlse: bool, packed: bool, seed: int) -> None:
    tensors = [*SQUARE.qkv(torch.bfloat16, seed)]
    dout, dlse = random_gradients(tensors[0])
    if packed:
        tensors = [torch.stack(tensors, 2)]
    options = (0.2, True, False, "emulator")
    out, lse = torch.ops.hopper_fa.forward(tensors, *options, None)
    leaves = [t.requires_grad_() for t in tensors]
    torch.library.opcheck(torch.ops.hopper_fa.forward.default, (leaves, *options, None))
    tensors = [t.detach() for t in leaves]
    arguments = (dout.transpose(1, 2).contiguous().transpose(1, 2), dlse if with_dlse else None)
    arguments = (*arguments, tensors, out, lse, *options)
    torch.library.opcheck(torch.ops.hopper_fa.backward.default, arguments)


@pytest.mark.parametrize(
    ("compiler", "dynamic"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_compile_trains(compiler: str, dynamic: bool, seed: int) -> None:
    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = flash_attn_func(q * 2, k, v, causal=True, return_lse=True)
        return out.float().square().mean() + 1e-2 * lse.clamp_min(-9).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend=compiler, dynamic=dynamic)
    for seqlen in (16, 40):
        tensors = Case(seqlen_q=seqlen, seqlen_k=2 * seqlen).qkv(torch.bfloat16, seed)
        one = torch.ones(())
        for a, b in zip(gradients_of(compiled, tensors, one), gradients_of(loss, tensors, one), strict=True):
            torch.testing.assert_close(a, b, rtol=2**-6, atol=1e-6)


def test_compile_under_autocast(seed: int) -> None:
    tensors = CASES[0].qkv(torch.float32, seed)
    dout = torch.randn_like(tensors[0]).bfloat16()

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return flash_attn_func(*qkv)

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    assert_same(gradients_of(compiled, tensors, dout), gradients_of(attend, tensors, dout))


@pytest.mark.parametrize("packed", [False, True])
def test_autocast(packed: bool, seed: int) -> None:
    """FP32 inputs become the autocast dtype, their gradients FP32 again; backward() inside or after."""
    tensors = SQUARE.qkv(torch.float32, seed)
    dout = torch.randn_like(tensors[0]).bfloat16()
    want = gradients_of(
        lambda *t: flash_attn_func(*t, causal=True), tuple(t.bfloat16() for t in tensors), dout
    )
    leaves = leaves_of((torch.stack(tensors, 2),) if packed else tensors)
    call = flash_attn_qkvpacked_func if packed else flash_attn_func
    with torch.autocast("cpu", torch.bfloat16):
        out = call(*leaves, causal=True)
        inside = torch.autograd.grad(out, leaves, dout, retain_graph=True)
    outside = torch.autograd.grad(out, leaves, dout)
    assert out.dtype == torch.bfloat16
    for gradients in (inside, outside):
        gradients = gradients[0].unbind(2) if packed else gradients
        assert_same(gradients, tuple(t.float() for t in want))
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="torch.float64"):
        flash_attn_func(*(t.double() for t in tensors))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool, seed: int) -> None:
    tensors = CASES[0].qkv(torch.bfloat16, seed)
    dout = torch.randn_like(tensors[0])
    got = leaves_of(tensors)
    checkpoint(flash_attn_func, *got, use_reentrant=reentrant).backward(dout)
    assert_same(tuple(t.grad for t in got), gradients_of(flash_attn_func, tensors, dout))


def test_saved_tensors_may_be_moved(seed: int) -> None:
    """Offloading: what comes back is another tensor, whose layout is its own."""
    tensors = CASES[0].qkv(torch.bfloat16, seed)
    dout = torch.randn_like(tensors[0])
    want = gradients_of(flash_attn_func, tensors, dout)

    def to_bytes(t: torch.Tensor) -> tuple[torch.dtype, torch.Tensor]:
        return t.dtype, t.detach().contiguous().view(torch.uint8).clone()

    with torch.autograd.graph.saved_tensors_hooks(to_bytes, lambda saved: saved[1].view(saved[0])):
        leaves = leaves_of(tensors)
        out = flash_attn_func(*leaves)
    assert_same(torch.autograd.grad(out, leaves, dout), want)


@pytest.mark.parametrize("compiled", [False, True])
def test_second_derivatives_are_refused(compiled: bool, seed: int) -> None:
    q, k, v = leaves_of(CASES[0].qkv(torch.bfloat16, seed))
    call = torch.ops.hopper_fa.forward if compiled else ops.forward
    out, _ = call([q, k, v], None, False, False, None, None)
    (dq,) = torch.autograd.grad(out.float().square().sum(), q, create_graph=True)
    assert dq.requires_grad
    with pytest.raises(NotImplementedError, match="second derivative of hopper_fa attention"):
        dq.sum().backward()


def test_operator_and_function_agree(seed: int) -> None:
    tensors = CASES[0].qkv(torch.bfloat16, seed)
    dout = torch.randn_like(tensors[0])

    def by_operator(*qkv: torch.Tensor) -> torch.Tensor:
        return torch.ops.hopper_fa.forward(list(qkv), None, False, False, None, None)[0]

    assert_same(gradients_of(by_operator, tensors, dout), gradients_of(flash_attn_func, tensors, dout))


def test_parameters_and_several_uses(seed: int) -> None:
    """A module's own tensors, q given twice, and a graph that is kept."""
    q, *_ = Case(seqlen_q=30, seqlen_k=30).qkv(torch.bfloat16, seed)
    parameter = torch.nn.Parameter(q.clone())
    out = flash_attn_func(parameter, parameter, parameter, causal=True)
    dout = torch.randn_like(q)
    out.backward(dout, retain_graph=True)
    first = parameter.grad.clone()
    want = gradients_float64(dout, None, q, q, q, causal=True)
    # Three gradients, each with its error (0.5 to 1%, since the first rows see few keys), two additions in 16
    # bits; the sum may be smaller than its parts.
    assert (first.double() - sum(want)).norm() < 0.02 * sum(part.norm() for part in want)
    out.backward(dout)
    assert torch.equal(parameter.grad, 2 * first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fp8_is_straight_through(dtype: torch.dtype, seed: int) -> None:
    tensors = SQUARE.qkv(dtype, seed)
    dout, dlse = random_gradients(tensors[0])
    recipe = Fp8Recipe.default()
    qkv = quantize_qkv(*tensors, recipe)
    out, lse = attention_fp8_emulated(qkv, 0.2, True, dtype)
    want = gradients_quantized_emulated(dout, dlse, qkv, out, lse, 0.2, True)
    leaves = leaves_of(tensors)
    results = flash_attn_func(*leaves, 0.2, True, recipe=recipe, return_lse=True)
    assert_same(torch.autograd.grad(results, leaves, (dout, dlse)), want)
    packed = leaves_of((torch.stack(tensors, 2),))
    results = flash_attn_qkvpacked_func(*packed, 0.2, True, recipe=recipe, return_lse=True)
    assert_same(torch.autograd.grad(results, packed, (dout, dlse))[0].unbind(2), want)
    exact = gradients_float64(dout, dlse, *tensors, 0.2, True)
    for got, truth in zip(want, exact, strict=True):
        assert 1e-3 < error_metrics(got, truth)["relative_l2"] < 0.1


def test_bad_gradients_are_named(seed: int) -> None:
    q, k, v = CASES[0].qkv(torch.bfloat16, seed)
    out, lse = flash_attn_func(q, k, v, return_lse=True)
    options = (None, False, False, None)
    backward = torch.ops.hopper_fa.backward
    with pytest.raises(ValueError, match="dout is torch.float32 of shape"):
        backward(q.float(), None, [q, k, v], out, lse, *options)
    with pytest.raises(ValueError, match="dlse is torch.bfloat16"):
        backward(q, lse.bfloat16(), [q, k, v], out, lse, *options)
    with pytest.raises(ValueError, match=r"lse is .* it must be torch.float32 of shape \(2, 4, 33\)"):
        backward(q, None, [q, k, v], out, lse.transpose(1, 2), *options)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Tensors]:
    """Lets CPU tensors through to a backward launch that notes its arguments and writes zeros."""
    noted: list[Tensors] = []

    def launch(*arguments: object) -> None:
        noted.append(arguments)
        for gradient in arguments[7:10]:
            gradient.zero_()

    monkeypatch.setattr(kernels, "backward", launch)
    return noted


def train(monkeypatch: pytest.MonkeyPatch, tensors: Tensors, dout: torch.Tensor, **options: object) -> None:
    leaves = leaves_of(tensors)
    out = flash_attn_func(*leaves, 0.25, True, **options)
    with monkeypatch.context() as patch:
        patch.setattr(backend, "resolve", lambda name, device: "cuda")
        out.backward(dout)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("asked", [False, True])
def test_deterministic_reaches_the_kernels(
    asked: bool, everywhere: bool, launches: list[Tensors], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = CASES[0].qkv(torch.bfloat16, seed)
    torch.use_deterministic_algorithms(everywhere)
    try:
        train(monkeypatch, tensors, torch.randn_like(tensors[0]), deterministic=asked)
    finally:
        torch.use_deterministic_algorithms(False)
    ((*_, scale, causal, deterministic),) = launches
    assert (scale, causal, deterministic) == (0.25, True, asked or everywhere)


def test_kernels_get_what_tma_can_take(
    launches: list[Tensors], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = CASES[0].qkv(torch.bfloat16, seed)
    fine = torch.randn_like(tensors[0]).transpose(1, 2).contiguous().transpose(1, 2)
    train(monkeypatch, tensors, fine)
    assert launches[0][0].data_ptr() == fine.data_ptr()
    train(monkeypatch, tensors, torch.ones(()).bfloat16().expand_as(tensors[0]))
    train(monkeypatch, tensors, fine.new_ones(fine.numel() + 1)[1:].view(fine.shape))
    for dout, *_ in launches[1:]:
        assert dout.is_contiguous() and dout.data_ptr() % 16 == 0 and (dout == 1).all()


@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 128, 136, 256])
@pytest.mark.parametrize(
    ("batch", "seqlen_q", "heads_q"), [(1, 1, 1), (2, 129, 3), (3, 0, 2), (1, 2**20, 64)]
)
def test_scratch_is_what_the_docs_say(batch: int, seqlen_q: int, heads_q: int, head_dim: int) -> None:
    """The formula in kernels.backward_scratch_bytes and docs/backward.md, and what the launch is given."""
    if head_dim <= 64:
        tile_head_dim, block_m = 64, 128
    else:
        tile_head_dim, block_m = 128 if head_dim <= 128 else 256, 64
    tile = kernels.backward_tile(head_dim)
    assert (tile["head_dim"], tile["block_m"]) == (tile_head_dim, block_m)
    rows = batch * heads_q * -(-seqlen_q // block_m) * block_m
    stated = rows * (4 * tile_head_dim + 8) + 8 * rows // block_m
    assert kernels.backward_scratch_bytes(batch, seqlen_q, heads_q, head_dim) == stated
    sum_floats, row_floats, turn_ints = kernels._C.backward_workspace(tile["tile"], batch, seqlen_q, heads_q)
    assert (sum_floats, row_floats) == (rows * tile_head_dim, rows * 2)
    assert turn_ints == 2 * rows // block_m and 4 * (sum_floats + row_floats + turn_ints) == stated


def test_scratch_in_the_docs_table() -> None:
    """Every row of docs/backward.md's table: bytes a query row, and over those of dQ in 16 bits."""
    text = (Path(__file__).parents[2] / "docs" / "backward.md").read_text()
    table = re.findall(r"^\| (\d+) \| (\d+), (\d+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert [int(row[0]) for row in table] == [8, 40, 64, 72, 128, 136, 256]
    for head_dim, tile_head_dim, block_m, row_bytes, ratio in table:
        tile = kernels.backward_tile(int(head_dim))
        assert (tile["head_dim"], tile["block_m"]) == (int(tile_head_dim), int(block_m))
        got = kernels.backward_scratch_bytes(1, 1280, 1, int(head_dim)) / 1280
        assert abs(got - float(row_bytes)) < 0.006
        assert abs(got / (2 * int(head_dim)) - float(ratio)) < 0.051


@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16])
def test_autocast_casts_no_other_numbers(cast_to: torch.dtype) -> None:
    """Dtypes whose elements are no plain values, and mixtures with them, are refused as without autocast."""
    good = torch.ones(1, 8, 2, 64, dtype=torch.bfloat16)
    for dtype in (
        torch.int8, torch.int32, torch.int64, torch.uint8, torch.bool, torch.complex64, torch.float8_e5m2,
        torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float64,
    ):  # fmt: skip
        other = good.to(dtype)
        for tensors in ((other, other, other), (other, good, good), (good, other, good), (good, good, other)):
            sentences = []
            for enabled in (False, True):
                with torch.autocast("cpu", cast_to, enabled=enabled), pytest.raises(ValueError) as caught:
                    flash_attn_func(*tensors)
                sentences.append(str(caught.value))
            assert sentences[0] == sentences[1] and str(dtype) in sentences[0]


@pytest.mark.parametrize("cast_to", [torch.bfloat16, torch.float16])
def test_autocast_and_e4m3(cast_to: torch.dtype, seed: int) -> None:
    """All e4m3: as without autocast. e4m3 beside 16 bits: refused, whichever it is."""
    tensors = SQUARE.qkv(torch.bfloat16, seed)
    codes = tuple(t.to(torch.float8_e4m3fn) for t in tensors)
    descales = [torch.rand(2, 3) + 0.5 for _ in range(3)]
    want = flash_attn_func(*codes, None, True, None, *descales)
    with torch.autocast("cpu", cast_to):
        assert torch.equal(flash_attn_func(*codes, None, True, None, *descales), want)
    for position in range(3):
        for one, others in ((codes, tensors), (tensors, codes)):
            mixed = [*others]
            mixed[position] = one[position]
            with torch.autocast("cpu", cast_to), pytest.raises(ValueError, match="torch.float8_e4m3fn"):
                flash_attn_func(*mixed)


def test_autocast_casts_floats_of_16_and_32_bits(seed: int) -> None:
    q, k, v = SQUARE.qkv(torch.float32, seed)
    with torch.autocast("cpu", torch.float16):
        got = flash_attn_func(q, k.bfloat16(), v.half())
    assert torch.equal(got, flash_attn_func(q.half(), k.bfloat16().half(), v.half()))
