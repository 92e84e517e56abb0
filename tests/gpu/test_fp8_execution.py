"""How a call with a recipe runs, quantisation and attention: as test_forward_execution.py has it for BF16."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from cases import INSTANCE_HEAD_DIMS, Case
from helpers import (
    assert_does_not_synchronise,
    assert_reads_what_the_last_call_wrote,
    assert_runs_on_the_current_stream,
    in_a_new_thread,
    same,
)

from hopper_fa import (
    Fp8Recipe,
    flash_attn_func,
    flash_attn_quantized_func,
    kernels,
    quantize_kernels,
    quantize_qkv,
)

RECIPES = {name: getattr(Fp8Recipe, name)() for name in ("default", "accurate", "causal_safe", "fa3")}
RECIPES["smooth_q"] = replace(Fp8Recipe.default(), smooth_q=True)

pytestmark = pytest.mark.skipif(
    not (kernels.HAS_FP8 and "bf16" in quantize_kernels.DTYPES),
    reason="this build holds no FP8 kernel, or no quantisation kernels (HOPPER_FA_DTYPES)",
)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
every_instance = pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attend(qkv: QKV, recipe: Fp8Recipe, causal: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_attn_func(*qkv, causal=causal, return_lse=True, recipe=recipe)


@every_recipe
@every_instance
def test_same_bits_50_times(head_dim: int, recipe: Fp8Recipe, seed: int) -> None:
    qkv = Case(3, 8, 4, 799, 1223, head_dim, True).qkv(torch.bfloat16, seed, "cuda")
    first = attend(qkv, recipe)
    differing = [i for i in range(50) if not same(first, attend(qkv, recipe))]
    assert not differing, f"repeats {differing} gave other bits"


@every_recipe
@every_instance
def test_cuda_graph(head_dim: int, recipe: Fp8Recipe, seed: int) -> None:
    """Three calls in one graph, replayed on other inputs, one of which outgrows V's sample."""
    case = Case(2, 8, 2, 1000, 1100, head_dim, True)
    static = case.qkv(torch.bfloat16, seed, "cuda")
    attend(static, recipe)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(3):
            result = attend(static, recipe)
    for i in range(1, 6):
        fresh = case.qkv(torch.bfloat16, seed + i, "cuda")
        if i == 3:
            fresh[2][0, 77, 1, 5] = 5000.0
        for t, values in zip(static, fresh, strict=True):
            t.copy_(values)
        for t in result:
            t.fill_(float("nan"))
        graph.replay()
        assert same(result, attend(fresh, recipe))


@every_recipe
@pytest.mark.parametrize("seqlen", [64, 300, 2048])
@every_instance
def test_reads_what_the_last_call_wrote(head_dim: int, seqlen: int, recipe: Fp8Recipe, seed: int) -> None:
    """Kernels of quantisation and attention begin before the ones before them end."""
    q, k, v = Case(2, 8, 8, seqlen, seqlen, head_dim).qkv(torch.bfloat16, seed, "cuda")
    assert_reads_what_the_last_call_wrote(lambda last: attend((q, k, last[0]), recipe, False), (v,))
    assert_reads_what_the_last_call_wrote(lambda last: attend((last[0], last[0], v), recipe), (k,))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_recipe
def test_tensors_on_another_device_than_the_current(recipe: Fp8Recipe, seed: int) -> None:
    here = Case(1, 4, 4, 300, 300, 128).qkv(torch.bfloat16, seed, "cuda:0")
    there = tuple(t.to("cuda:1") for t in here)
    got = attend(there, recipe)
    assert all(t.device.index == 1 for t in got) and torch.cuda.current_device() == 0
    assert same(tuple(t.to("cuda:0") for t in got), attend(here, recipe))


def together(inputs: list[QKV], recipe: Fp8Recipe, streams: list[torch.cuda.Stream]) -> None:
    """Calls of two threads, each in its stream, give the bits of calls alone."""
    alone = [attend(qkv, recipe) for qkv in inputs]
    torch.cuda.synchronize()

    def calls(i: int) -> list[tuple[torch.Tensor, ...]]:
        with torch.cuda.stream(streams[i]):
            return [attend(inputs[i], recipe) for _ in range(30)]

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(calls, range(2)))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(same(alone[i], result) for result in results[i]), f"problem {i} gave other bits"


@every_recipe
@pytest.mark.parametrize("shared", [False, True], ids=["two streams", "one stream"])
def test_two_threads(shared: bool, recipe: Fp8Recipe, seed: int) -> None:
    cases = [Case(2, 8, 8, 1024, 2048, 128), Case(1, 16, 2, 1500, 700, 128)]
    inputs = [case.qkv(torch.bfloat16, seed + i, "cuda") for i, case in enumerate(cases)]
    inputs[0][2][1, 99, 3, 7] = 5000.0  # outgrows V's sample
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    together(inputs, recipe, [streams[0], streams[0]] if shared else streams)


@every_recipe
def test_runs_on_the_current_stream(recipe: Fp8Recipe, seed: int) -> None:
    source = Case(1, 4, 4, 512, 512, 128).qkv(torch.bfloat16, seed, "cuda")
    assert_runs_on_the_current_stream(lambda qkv: attend(qkv, recipe), source)


def test_first_cuda_work_of_a_thread(seed: int) -> None:
    qkv = Case(1, 4, 4, 512, 512, 128).qkv(torch.bfloat16, seed, "cuda")
    recipe = RECIPES["default"]
    expected = attend(qkv, recipe, False)
    assert same(in_a_new_thread(lambda: attend(qkv, recipe, False)), expected)
    quantized = quantize_qkv(*qkv, recipe)
    attention = in_a_new_thread(lambda: flash_attn_quantized_func(quantized, return_lse=True))
    assert same(attention, flash_attn_quantized_func(quantized, return_lse=True))


@every_recipe
def test_does_not_synchronise(recipe: Fp8Recipe, seed: int) -> None:
    qkv = Case(1, 4, 4, 512, 512, 128).qkv(torch.bfloat16, seed, "cuda")
    assert_does_not_synchronise(lambda: attend(qkv, recipe))


@every_recipe
def test_compile_fullgraph(recipe: Fp8Recipe, seed: int) -> None:
    case = Case(2, 4, 2, 300, 300, 64, True)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = attend((q * 2, k, v), recipe)
        return out.float() + lse.transpose(1, 2)[..., None]

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for i in range(2):
        qkv = case.qkv(torch.bfloat16, seed + i, "cuda")
        torch.testing.assert_close(compiled(*qkv), layer(*qkv), atol=1e-5, rtol=1e-5)


@every_recipe
def test_operator_contract(recipe: Fp8Recipe, seed: int) -> None:
    q, k, v = Case(2, 4, 2, 113, 239, 64).qkv(torch.bfloat16, seed, "cuda")
    operator = torch.ops.hopper_fa.forward.default
    arguments = ([q, k, v], None, True, False, None, recipe.to_text())
    torch.library.opcheck(operator, arguments)
    assert same(operator(*arguments), attend((q, k, v), recipe))


@every_recipe
def test_empty_batch_and_no_queries(recipe: Fp8Recipe, seed: int) -> None:
    for case in (Case(batch=0, head_dim=64), Case(seqlen_q=0, head_dim=64), Case(seqlen_k=0, head_dim=64)):
        q, k, v = case.qkv(torch.bfloat16, seed, "cuda")
        out, lse = attend((q, k, v), recipe)
        assert out.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        assert (out == 0).all()
        torch.cuda.synchronize()


# Of tensors that are e4m3 already: the raw kernel, exact exponentials and P by its code.
FIXED = dict(q_granularity="group", k_granularity="head", v_granularity="head")
E4M3_RECIPES = {
    "fa3": Fp8Recipe.fa3(),
    "exact": Fp8Recipe(**FIXED),
    "linear": Fp8Recipe(**FIXED, linear_exp2=True, p_offset=None, rescale_threshold=None),
}
e4m3_recipes = pytest.mark.parametrize("recipe", E4M3_RECIPES.values(), ids=E4M3_RECIPES)
GROUPED = Case(2, 4, 2, 200, 300, 128)  # descales are (2, 2)


def e4m3_qkv(seed: int) -> QKV:
    q, k, v = (t.to(torch.float8_e4m3fn) for t in GROUPED.qkv(torch.float32, seed, "cuda"))
    return q, k, v


@e4m3_recipes
@pytest.mark.parametrize("broken", [-0.75, -1e-30, float("-inf"), float("nan")])
@pytest.mark.parametrize("name", ["q_descale", "k_descale"])
def test_descales_of_q_and_k_that_are_no_scales(
    name: str, broken: float, recipe: Fp8Recipe, seed: int
) -> None:
    """NaN in what reads the head, kernel and emulator alike; no other bit changes."""
    q, k, v = e4m3_qkv(seed)
    sound = torch.rand(2, 2, device="cuda") + 0.5
    scales = sound.clone()
    scales[1, 0] = broken
    for backend in ("cuda", "emulator"):
        options = dict(return_lse=True, recipe=recipe, backend=backend)
        want_out, want_lse = flash_attn_func(q, k, v, **options, **{name: sound})
        out, lse = flash_attn_func(q, k, v, **options, **{name: scales})
        assert out[1, :, :2].isnan().all() and lse[1, :2].isnan().all(), backend
        assert torch.equal(out[0], want_out[0]) and torch.equal(out[1, :, 2:], want_out[1, :, 2:]), backend
        assert torch.equal(lse[0], want_lse[0]) and torch.equal(lse[1, 2:], want_lse[1, 2:]), backend
    both = torch.full((2, 2), -1.0, device="cuda")
    out = flash_attn_func(q, k, v, q_descale=both, k_descale=both, recipe=recipe)
    assert out.isnan().all(), "not even where the signs would cancel"


@e4m3_recipes
def test_v_descale_has_any_sign(recipe: Fp8Recipe, seed: int) -> None:
    q, k, v = e4m3_qkv(seed)
    sizes = torch.rand(2, 2, device="cuda") + 0.5
    sizes[0, 1] = 0.0
    signs = torch.tensor([[1.0, 1.0], [-1.0, 1.0]], device="cuda")
    heads = torch.tensor([0, 0, 1, 1], device="cuda")  # the key/value head of each query head
    for backend in ("cuda", "emulator"):
        options = dict(return_lse=True, recipe=recipe, backend=backend)
        want, want_lse = flash_attn_func(q, k, v, v_descale=sizes, **options)
        out, lse = flash_attn_func(q, k, v, v_descale=sizes * signs, **options)
        assert torch.equal(out, want * signs.bfloat16()[:, None, heads, None]), backend
        assert torch.equal(lse, want_lse) and want[1].abs().max() > 0
    broken = sizes.clone()
    broken[1, 0] = float("nan")
    out, lse = flash_attn_func(q, k, v, v_descale=broken, return_lse=True, recipe=recipe)
    bare = flash_attn_func(q, k, v, v_descale=sizes, recipe=recipe)
    assert out[1, :, :2].isnan().all() and lse.isfinite().all()
    assert torch.equal(out[0], bare[0]) and torch.equal(out[1, :, 2:], bare[1, :, 2:])


@e4m3_recipes
def test_descales_are_not_waited_for(recipe: Fp8Recipe, seed: int) -> None:
    q, k, v = e4m3_qkv(seed)
    scales = torch.rand(2, 2, device="cuda") - 0.5
    descales = dict(q_descale=scales, k_descale=scales, v_descale=scales)
    assert_does_not_synchronise(lambda: flash_attn_func(q, k, v, **descales, recipe=recipe))


@pytest.mark.parametrize("name", ["q_scale", "k_scale"])
@every_recipe
def test_negative_scales_of_quantized_tensors(recipe: Fp8Recipe, name: str, seed: int) -> None:
    """In tensors put together by hand: NaN in the rows that a scale of Q belongs to, or the head of K."""
    case = Case(1, 2, 2, 200, 300, 128)
    qkv = quantize_qkv(*case.qkv(torch.bfloat16, seed, "cuda"), recipe)
    scales = getattr(qkv, name).clone()
    scales[0, 1] *= -1
    negated = replace(qkv, **{name: scales})
    want, want_lse = flash_attn_quantized_func(qkv, return_lse=True)
    for backend in ("cuda", "emulator"):
        out, lse = flash_attn_quantized_func(negated, return_lse=True, backend=backend)
        assert out[0, :, 1].isnan().all() and lse[0, 1].isnan().all(), backend
        assert out[0, :, 0].isfinite().all() and lse[0, 0].isfinite().all(), backend
    out, lse = flash_attn_quantized_func(negated, return_lse=True)
    assert torch.equal(out[0, :, 0], want[0, :, 0]) and torch.equal(lse[0, 0], want_lse[0, 0])
