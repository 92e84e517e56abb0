"""How the backward runs: repeatably, race-free, on the caller's stream and device, in graphs, compiled."""

from collections.abc import Sequence

import pytest
import torch
from backward_helpers import Problem, off_by_order, poisoned_scratch, problem_of, run_plain
from cases import DTYPES, INSTANCE_HEAD_DIMS, Case, assert_gradients_accurate
from helpers import (
    assert_reads_what_the_last_call_wrote,
    assert_runs_on_the_current_stream,
    in_a_new_thread,
    same,
)
from torch.utils.checkpoint import checkpoint

from hopper_fa import Fp8Recipe, error_metrics, flash_attn_func, kernels

every_instance = pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def launcher(problem: Problem, deterministic: bool, variant: str = "default"):
    """A function of nothing that runs the kernels once, with scratch of NaN, and returns dq, dk, dv."""
    dout, dlse, q, k, v, scale, causal = problem
    out, lse = flash_attn_func(q, k, v, scale, causal, return_lse=True)

    def run() -> tuple[torch.Tensor, ...]:
        gradients = tuple(torch.full_like(t, float("nan")) for t in (q, k, v))
        with poisoned_scratch():
            kernels.backward(dout, q, k, v, out, lse, dlse, *gradients, scale, causal, deterministic, variant)
        return gradients

    return run


def count_differences(problem: Problem, deterministic: bool, repeats: int, variant: str = "default") -> None:
    """dK and dV always, dQ if deterministic, have the bits of the first run; dQ is always close to it."""
    run = launcher(problem, deterministic, variant)
    first = run()
    assert_gradients_accurate(first, problem)
    differing = torch.zeros(4, dtype=torch.int64, device="cuda")
    for _ in range(repeats):
        again = run()
        # != is true of NaN.
        changed = [(a != b).any() for a, b in zip(again, first, strict=True)]
        differing += torch.stack([*changed, off_by_order(again[0], first[0]) | again[0].isnan().any()])
    dq, dk, dv, far = differing.tolist()
    assert dk == 0 and dv == 0, f"of {repeats} repeats {dk} gave other bits of dK, {dv} of dV"
    assert far == 0, f"of {repeats} repeats {far} gave a dQ that no order of additions explains"
    assert not deterministic or dq == 0, f"of {repeats} repeats {dq} gave other bits of dQ"


@both_masks
@every_instance
@pytest.mark.parametrize("deterministic", [False, True])
def test_1000_repeats_of_a_small_problem(
    backward_instance: None, deterministic: bool, head_dim: int, causal: bool, seed: int
) -> None:
    """A few blocks that start together: a wrong barrier shows as a wrong gradient once in a while."""
    problem = problem_of(Case(2, 4, 2, 200, 330, head_dim, causal), torch.bfloat16, seed, with_dlse=True)
    count_differences(problem, deterministic, 1000)


@both_masks
@pytest.mark.parametrize(
    ("variant", "head_dim"),
    [
        (row["variant"], row["head_dim"])
        for row in kernels.BACKWARD_TILES
        if row["variant"] != "default" and not row["quantized"]
    ],
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_repeats_of_experiment_variants(
    backward_instance: None, deterministic: bool, variant: str, head_dim: int, causal: bool, seed: int
) -> None:
    """Key blocks that start together and want the same query block's sum first."""
    problem = problem_of(Case(2, 4, 2, 200, 2500, head_dim, causal), torch.bfloat16, seed, with_dlse=True)
    count_differences(problem, deterministic, 300, variant)


@both_masks
@pytest.mark.parametrize("dtype", DTYPES)
@every_instance
@pytest.mark.parametrize("deterministic", [False, True])
def test_50_repeats_of_many_tiles(
    backward_instance: None, deterministic: bool, head_dim: int, dtype: str, causal: bool, seed: int
) -> None:
    problem = problem_of(Case(3, 8, 4, 799, 1023, head_dim, causal), DTYPES[dtype], seed)
    count_differences(problem, deterministic, 50)


@both_masks
@every_instance
def test_deterministic_differs_by_order_only(
    backward_instance: None, head_dim: int, causal: bool, seed: int
) -> None:
    problem = problem_of(Case(2, 4, 2, 799, 1023, head_dim, causal), torch.bfloat16, seed)
    (dq, *others), (dq_any, *others_any) = (launcher(problem, fixed)() for fixed in (True, False))
    assert not off_by_order(dq_any, dq)
    # Without a mask the deterministic walk begins elsewhere, so dK and dV are summed in another order too.
    if causal:
        assert same(others, others_any)
    else:
        assert not any(off_by_order(a, b) for a, b in zip(others_any, others, strict=True))


def test_batch_entries_do_not_depend_on_each_other(seed: int) -> None:
    dout, _, *rest = problem_of(Case(4, 4, 2, 500, 500, 128, True), torch.bfloat16, seed)
    before = launcher((dout, None, *rest), True)()
    for t in (dout, *rest[:3]):
        t[1] = float("nan")
    after = launcher((dout, None, *rest), True)()
    kept = [0, 2, 3]
    assert same(tuple(t[kept] for t in before), tuple(t[kept] for t in after))
    assert all(t[1].isnan().any() for t in after)


@every_instance
def test_first_cuda_work_of_a_thread(backward_instance: None, head_dim: int, seed: int) -> None:
    """As in the thread of torch that computes gradients, if its first work is ours."""
    problem = problem_of(Case(2, 4, 4, 300, 300, head_dim, True), torch.bfloat16, seed)
    dout, dlse, q, k, v, scale, causal = problem
    out, lse = flash_attn_func(q, k, v, scale, causal, return_lse=True)
    gradients = tuple(torch.empty_like(t) for t in (q, k, v))

    def launch() -> None:
        kernels.backward(dout, q, k, v, out, lse, dlse, *gradients, scale, causal, deterministic=True)

    in_a_new_thread(launch)
    assert same(gradients, run_plain(problem, deterministic=True))


@every_instance
def test_two_streams_at_once(backward_instance: None, head_dim: int, seed: int) -> None:
    cases = [Case(2, 8, 8, 1024, 2048, head_dim, True), Case(1, 16, 2, 1500, 700, head_dim, False)]
    problems = [problem_of(case, torch.bfloat16, seed + i) for i, case in enumerate(cases)]
    alone = [run_plain(problem, deterministic=True) for problem in problems]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    together: list[list] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(run_plain(problems[i], deterministic=True))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(same(alone[i], result) for result in together[i]), f"problem {i} gave other bits"


def test_runs_on_the_current_stream(seed: int) -> None:
    """Both kernels: autograd runs the backward in that stream too."""
    dout, _, q, k, v, *options = problem_of(Case(1, 4, 4, 512, 512, 128), torch.bfloat16, seed)

    def call(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        dout, *qkv = tensors
        return run_plain((dout, None, *qkv, *options), deterministic=True)

    assert_runs_on_the_current_stream(call, (dout, q, k, v))


@both_masks
@every_instance
def test_cuda_graph(backward_instance: None, head_dim: int, causal: bool, seed: int) -> None:
    """Forward and backward captured together, replayed on other inputs."""
    case = Case(2, 8, 2, 700, 700, head_dim, causal)
    static = problem_of(case, torch.bfloat16, seed)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run_plain(static, deterministic=True)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run_plain(static, deterministic=True)
    for i in range(1, 4):
        fresh = problem_of(case, torch.bfloat16, seed + i)
        for t, values in zip(static, fresh, strict=True):
            if isinstance(t, torch.Tensor):
                t.copy_(values)
        for t in result:
            t.fill_(float("nan"))
        graph.replay()
        assert same(result, run_plain(static, deterministic=True))
    assert_gradients_accurate(result, static)


@both_masks
@pytest.mark.parametrize("seqlen", [64, 300, 2048])
@every_instance
def test_reads_what_the_last_call_wrote(
    backward_instance: None, head_dim: int, seqlen: int, causal: bool, seed: int
) -> None:
    """Its kernels, and the forward's, begin before the ones before them end."""
    dout, _, q, k, v, scale, _ = problem_of(Case(2, 8, 8, seqlen, seqlen, head_dim), torch.bfloat16, seed)

    def call(last: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        v, dout = last[:2]
        out, lse = flash_attn_func(q, k, v, scale, causal, return_lse=True)
        dq, dk, dv = (torch.empty_like(t) for t in (q, k, v))
        kernels.backward(dout, q, k, v, out, lse, None, dq, dk, dv, scale, causal, deterministic=True)
        return out, dv, dq, dk

    assert_reads_what_the_last_call_wrote(call, (v, dout))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current(seed: int) -> None:
    problem = problem_of(Case(1, 4, 4, 300, 300, 128), torch.bfloat16, seed)
    moved = tuple(t.to("cuda:1") if isinstance(t, torch.Tensor) else t for t in problem)
    got = run_plain(moved, deterministic=True)
    assert all(t.device.index == 1 for t in got) and torch.cuda.current_device() == 0
    assert same(tuple(t.to("cuda:0") for t in got), run_plain(problem, deterministic=True))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_trains(compiler: str, seed: int) -> None:
    def loss(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = flash_attn_func(q * 2, k, v, causal=True, deterministic=True, return_lse=True)
        return out.float().square().mean() + 1e-2 * lse.square().mean()

    q, k, v = Case(2, 4, 2, 300, 300, 64, True).qkv(torch.bfloat16, seed, "cuda")
    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend=compiler)):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        gradients.append(torch.autograd.grad(function(*leaves), leaves))
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=2**-6, atol=1e-6)


@both_masks
def test_operator_contract(causal: bool, seed: int) -> None:
    dout, dlse, q, k, v, scale, _ = problem_of(
        Case(2, 4, 2, 113, 239, 64, causal), torch.bfloat16, seed, with_dlse=True
    )
    out, lse = flash_attn_func(q, k, v, causal=causal, return_lse=True)
    tensors = [t.requires_grad_() for t in (q, k, v)]
    torch.library.opcheck(torch.ops.hopper_fa.forward.default, (tensors, scale, causal, True, None, None))
    tensors = [t.detach() for t in tensors]
    options = (scale, causal, True, None)
    torch.library.opcheck(torch.ops.hopper_fa.backward.default, (dout, dlse, tensors, out, lse, *options))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant: bool, seed: int) -> None:
    problem = problem_of(Case(2, 4, 2, 300, 300, 64, True), torch.bfloat16, seed)
    dout, _, *tensors, scale, causal = problem
    leaves = [t.detach().requires_grad_() for t in tensors]

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(*qkv, scale, causal, deterministic=True)

    checkpoint(attend, *leaves, use_reentrant=reentrant).backward(dout)
    assert same(tuple(t.grad for t in leaves), run_plain(problem, deterministic=True))


def test_autocast(seed: int) -> None:
    tensors = [t.requires_grad_() for t in Case(2, 4, 2, 300, 300, 64, True).qkv(torch.float32, seed, "cuda")]
    with torch.autocast("cuda", torch.bfloat16):
        out = flash_attn_func(*tensors, causal=True)
    assert out.dtype == torch.bfloat16
    dout = torch.randn_like(out)
    out.backward(dout)
    rounded = [t.detach().bfloat16() for t in tensors]
    gradients = tuple(t.grad.bfloat16() for t in tensors)
    assert tensors[0].grad.dtype == torch.float32
    assert_gradients_accurate(gradients, (dout, None, *rounded, 64**-0.5, True))


@pytest.mark.skipif(not kernels.HAS_FP8, reason="this build holds no FP8 kernel")
@both_masks
@every_instance
def test_fp8_recipe_has_straight_through_gradients(
    backward_instance: None, head_dim: int, causal: bool, seed: int
) -> None:
    problem = problem_of(Case(2, 4, 2, 500, 500, head_dim, causal), torch.bfloat16, seed)
    dout, _, *tensors, scale, causal = problem
    exact = run_plain(problem)
    leaves = [t.detach().requires_grad_() for t in tensors]
    flash_attn_func(*leaves, scale, causal, recipe=Fp8Recipe.default()).backward(dout)
    for leaf, want in zip(leaves, exact, strict=True):
        assert 1e-4 < error_metrics(leaf.grad, want)["relative_l2"] < 0.1


def test_empty_batch_and_no_queries(seed: int) -> None:
    for case in (Case(batch=0), Case(seqlen_q=0), Case(seqlen_q=0, seqlen_k=0), Case(seqlen_k=0)):
        problem = problem_of(case, torch.bfloat16, seed, with_dlse=True)
        for deterministic in (False, True):
            for t, gradient in zip(problem[2:5], run_plain(problem, deterministic), strict=True):
                assert gradient.shape == t.shape and (gradient == 0).all()
