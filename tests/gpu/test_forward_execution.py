"""How the kernel runs: repeatably, on the caller's stream and device, unsynchronised, in graphs, compiled."""

import pytest
import torch
from cases import DTYPES, INSTANCE_HEAD_DIMS, Case, assert_accurate
from helpers import (
    assert_does_not_synchronise,
    assert_reads_what_the_last_call_wrote,
    assert_runs_on_the_current_stream,
    in_a_new_thread,
    same,
)

from hopper_fa import flash_attn_func

every_instance = pytest.mark.parametrize("head_dim", INSTANCE_HEAD_DIMS)
both_masks = pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return flash_attn_func(q, k, v, causal=causal, return_lse=True)


@both_masks
@pytest.mark.parametrize("dtype", DTYPES)
@every_instance
def test_same_bits_100_times(instance: None, head_dim: int, dtype: str, causal: bool, seed: int) -> None:
    q, k, v = Case(3, 8, 4, 799, 1023, head_dim, causal).qkv(DTYPES[dtype], seed, "cuda")
    first = attend(q, k, v, causal)
    differing = [i for i in range(100) if not same(first, attend(q, k, v, causal))]
    assert not differing, f"repeats {differing} gave other bits"


def test_batch_entries_do_not_depend_on_each_other(seed: int) -> None:
    q, k, v = Case(4, 4, 2, 500, 500, 128, True).qkv(torch.bfloat16, seed, "cuda")
    before = attend(q, k, v, True)
    for t in (q, k, v):
        t[1] = float("nan")
    after = attend(q, k, v, True)
    kept = [0, 2, 3]
    assert same(tuple(t[kept] for t in before), tuple(t[kept] for t in after))
    assert after[0][1].isnan().all()


@every_instance
def test_two_streams_at_once(instance: None, head_dim: int, seed: int) -> None:
    problems = [Case(2, 8, 8, 1024, 2048, head_dim, True), Case(1, 16, 2, 1500, 700, head_dim, False)]
    inputs = [case.qkv(torch.bfloat16, seed + i, "cuda") for i, case in enumerate(problems)]
    alone = [attend(*qkv, case.causal) for qkv, case in zip(inputs, problems, strict=True)]
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    together: list[list] = [[], []]
    for _ in range(20):
        for i, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                together[i].append(attend(*inputs[i], problems[i].causal))
    torch.cuda.synchronize()
    for i in range(2):
        assert all(same(alone[i], result) for result in together[i]), f"problem {i} gave other bits"


def test_runs_on_the_current_stream(seed: int) -> None:
    source = Case(1, 4, 4, 512, 512, 128).qkv(torch.bfloat16, seed, "cuda")
    assert_runs_on_the_current_stream(lambda qkv: attend(*qkv, False), source)


def test_first_cuda_work_of_a_thread(seed: int) -> None:
    qkv = Case(1, 4, 4, 512, 512, 128).qkv(torch.bfloat16, seed, "cuda")
    assert same(in_a_new_thread(lambda: attend(*qkv, False)), attend(*qkv, False))


def test_does_not_synchronise(seed: int) -> None:
    qkv = Case(1, 4, 4, 512, 512, 128).qkv(torch.bfloat16, seed, "cuda")
    assert_does_not_synchronise(lambda: attend(*qkv, False))


def capture(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, calls: int = 1):
    """(graph, outputs) of `calls` calls on these tensors."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            result = attend(q, k, v, causal)
    return graph, result


@both_masks
@every_instance
def test_cuda_graph(instance: None, head_dim: int, causal: bool, seed: int) -> None:
    case = Case(2, 8, 2, 1000, 1000, head_dim, causal)
    static = case.qkv(torch.bfloat16, seed, "cuda")
    attend(*static, causal)
    graph, result = capture(*static, causal, calls=3)
    for i in range(1, 6):
        for t, fresh in zip(static, case.qkv(torch.bfloat16, seed + i, "cuda"), strict=True):
            t.copy_(fresh)
        for t in result:
            t.fill_(float("nan"))
        graph.replay()
        assert same(result, attend(*static, causal))
    assert_accurate(*result, *static, causal=causal)


def test_capture_as_the_first_call_on_a_stream(seed: int) -> None:
    """Whatever a stream's first call sets up must be capturable too."""
    q, k, v = Case(1, 4, 4, 600, 600, 128, True).qkv(torch.bfloat16, seed, "cuda")
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
        result = attend(q, k, v, True)
    for _ in range(3):
        for t in result:
            t.fill_(float("nan"))
        graph.replay()
        assert same(result, attend(q, k, v, True))


def test_graphs_and_eager_calls_at_once(seed: int) -> None:
    """Two graphs replayed on two streams while eager calls run on a third: nothing is shared between them.

    NOTE: torch captures all graphs on one stream, so state kept by stream would be shared by both.
    """
    cases = [Case(2, 16, 16, 1000 + 100 * i, 2000, 128, True) for i in range(3)]
    inputs = [case.qkv(torch.bfloat16, seed + i, "cuda") for i, case in enumerate(cases)]
    alone = [attend(*qkv, True) for qkv in inputs]
    graphs = [capture(*qkv, True) for qkv in inputs[:2]]
    streams = [torch.cuda.Stream() for _ in range(3)]
    for round_ in range(20):
        for _, result in graphs:
            for t in result:
                t.fill_(float("nan"))
        torch.cuda.synchronize()
        for (graph, _), stream in zip(graphs, streams, strict=False):
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(streams[2]):
            eager = attend(*inputs[2], True)
        torch.cuda.synchronize()
        for i, result in enumerate([graphs[0][1], graphs[1][1], eager]):
            assert same(alone[i], result), f"problem {i} gave other bits in round {round_}"


@pytest.mark.parametrize("seqlen", [64, 300, 2048])
@every_instance
def test_reads_what_the_last_call_wrote(instance: None, head_dim: int, seqlen: int, seed: int) -> None:
    """Launches begin before the one before ends, the more so the fewer tiles it has."""
    q, k, v = Case(2, 8, 8, seqlen, seqlen, head_dim).qkv(torch.bfloat16, seed, "cuda")
    assert_reads_what_the_last_call_wrote(lambda last: attend(q, k, last[0], False), (v,))
    assert_reads_what_the_last_call_wrote(lambda last: attend(last[0], k, v, True), (q,))


@every_instance
def test_graph_of_two_streams(instance: None, head_dim: int, seed: int) -> None:
    """Two calls side by side, and one that reads what both wrote."""
    case = Case(1, 4, 4, 500, 500, head_dim)
    static = case.qkv(torch.bfloat16, seed, "cuda")
    attend(*static, True)
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph):
        q, k, v = static
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            b, _ = attend(k, q, v, True)
        a, _ = attend(q, k, v, False)
        torch.cuda.current_stream().wait_stream(side)
        result = attend(a, b, v, False)
    for i in range(20):
        q, k, v = case.qkv(torch.bfloat16, seed + i, "cuda")
        for t, values in zip(static, (q, k, v), strict=True):
            t.copy_(values)
        graph.replay()
        assert same(result, attend(attend(q, k, v, False)[0], attend(k, q, v, True)[0], v, False))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current(seed: int) -> None:
    q, k, v = Case(1, 4, 4, 300, 300, 128).qkv(torch.bfloat16, seed, "cuda:1")
    out, lse = attend(q, k, v, False)
    assert out.device == q.device and torch.cuda.current_device() == 0
    assert_accurate(out, lse, q, k, v)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str, seed: int) -> None:
    case = Case(2, 4, 2, 300, 300, 64, True)

    def layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, lse = flash_attn_func(q * 2, k, v, causal=True, return_lse=True)
        return out.float() + lse.transpose(1, 2)[..., None]

    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for i in range(2):
        qkv = case.qkv(torch.bfloat16, seed + i, "cuda")
        torch.testing.assert_close(compiled(*qkv), layer(*qkv), atol=1e-5, rtol=1e-5)


@both_masks
def test_operator_contract(causal: bool, seed: int) -> None:
    q, k, v = Case(2, 4, 2, 113, 239, 64, causal).qkv(torch.bfloat16, seed, "cuda")
    operator = torch.ops.hopper_fa.forward.default
    arguments = ([q, k, v], 0.125, causal, False, None, None)
    torch.library.opcheck(operator, arguments)
    assert same(operator(*arguments), attend(q, k, v, causal))


def test_empty_batch_and_no_queries(seed: int) -> None:
    for case in (Case(batch=0, head_dim=64), Case(seqlen_q=0, head_dim=64)):
        q, k, v = case.qkv(torch.bfloat16, seed, "cuda")
        out, lse = attend(q, k, v, False)
        assert out.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1])
        torch.cuda.synchronize()
