"""Every class of bad input is refused with a sentence that says what came, what is allowed, what to do."""

import pytest
import torch

from hopper_fa import flash_attn_func, kernels
from hopper_fa.validation import check_shapes

BF16 = torch.bfloat16


def tensor(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def refused(error: type[Exception], match: str, q: object, k: object, v: object, **options: object) -> None:
    with pytest.raises(error, match=match) as caught:
        flash_attn_func(q, k, v, **{"backend": "emulator"} | options)
    sentence = str(caught.value)
    assert sentence.endswith(".") and ";" in sentence, "one sentence: what came; what is allowed; what to do"


def test_dtype() -> None:
    q = tensor(1, 8, 2, 64)
    refused(ValueError, "have dtypes torch.float32", *[tensor(1, 8, 2, 64, dtype=torch.float32)] * 3)
    refused(ValueError, "torch.bfloat16, torch.float16, torch.bfloat16", q, q.half(), q)
    refused(ValueError, "torch.bfloat16, torch.bfloat16, torch.float16", q, q, q.half())


def test_device() -> None:
    q = tensor(1, 8, 2, 64)
    refused(ValueError, "are on cpu, meta, cpu", q, q.to("meta"), q)
    refused(ValueError, "are on cpu, cpu, meta", q, q, q.to("meta"))


def test_no_tensors() -> None:
    q = tensor(1, 8, 2, 64)
    refused(TypeError, r"^k is \[1, 2\]; it must be a torch.Tensor", q, [1, 2], q)


@pytest.mark.parametrize(
    "shapes",
    [
        [(8, 2, 64), (8, 2, 64), (8, 2, 64)],
        [(1, 8, 2, 64), (8, 2, 64), (8, 2, 64)],
        [(1, 8, 2, 64), (2, 8, 2, 64), (2, 8, 2, 64)],
        [(1, 8, 2, 64), (1, 8, 2, 72), (1, 8, 2, 72)],
        [(1, 8, 2, 64), (1, 8, 2, 64), (1, 9, 2, 64)],
        [(1, 8, 2, 64), (1, 8, 2, 64), (1, 8, 1, 64)],
        [(1, 8, 2, 64), (1, 8, 2, 64), (1, 8, 2, 56)],
    ],
)
def test_shapes(shapes: list[tuple[int, ...]]) -> None:
    refused(ValueError, "allowed are q ", *(tensor(*shape) for shape in shapes))


@pytest.mark.parametrize("head_dim", [0, 4, 60, 264])
def test_head_dim(head_dim: int) -> None:
    refused(
        ValueError, f"head_dim is {head_dim}; it must be a multiple of 8", *[tensor(1, 8, 2, head_dim)] * 3
    )


@pytest.mark.parametrize(("heads_q", "heads_kv"), [(3, 2), (2, 4), (4, 0), (0, 2)])
def test_head_ratio(heads_q: int, heads_kv: int) -> None:
    refused(
        ValueError, f"q has {heads_q} heads", tensor(1, 8, heads_q, 64), *[tensor(1, 8, heads_kv, 64)] * 2
    )


def test_strides() -> None:
    q = tensor(2, 8, 2, 64)
    transposed = tensor(2, 8, 64, 2).transpose(2, 3)
    odd = tensor(2, 8, 2, 68)[..., :64]
    for position, name in enumerate("qkv"):
        inputs = [q, q, q]
        inputs[position] = transposed
        refused(ValueError, f"^{name} has strides .* stride 1", *inputs)
        inputs[position] = odd
        refused(ValueError, f"^{name} has strides .* multiples of 8 elements", *inputs)


def test_strides_of_size_one_do_not_matter() -> None:
    # One batch entry, row and head, with strides of 3, 5 and 7 elements.
    q = tensor(64).as_strided((1, 1, 1, 64), (3, 5, 7, 1))
    assert torch.equal(flash_attn_func(q, q, q, backend="emulator"), q)


def test_alignment() -> None:
    q = tensor(1, 8, 2, 64)
    shifted = tensor(1024 + 8)[4 : 4 + 1024].view(1, 8, 2, 64)
    for position, name in enumerate("qkv"):
        inputs = [q, q, q]
        inputs[position] = shifted
        refused(ValueError, f"^{name} starts 8 bytes past", *inputs)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1e39])
def test_scale(scale: float) -> None:
    refused(ValueError, "softmax_scale is", *[tensor(1, 8, 2, 64)] * 3, softmax_scale=scale)


def test_causal_that_is_no_bool() -> None:
    # What FlashAttention-2's positional (dropout_p, softmax_scale, causal) would put there.
    refused(TypeError, r"causal is 0.125; .*dropout_p by name", *[tensor(1, 8, 2, 64)] * 3, causal=0.125)


def test_lengths_that_overflow() -> None:
    # Expanded: billions of rows that share one row's memory.
    row = tensor(1, 1, 1, 64)
    long = row.expand(1, 2**31 - 1024, 1, 64)
    refused(ValueError, "sequence lengths are 2147482624", long, row, row)
    refused(ValueError, r"and 2147482624 \(k, v\)", row, long, long)
    check_shapes(row.expand(1, 2**31 - 1025, 1, 64), row, row)
    many = row.expand(2**16, 64, 2**15, 64)
    refused(ValueError, "makes 2147482624 or more tiles", many, *[row.expand(2**16, 1, 1, 64)] * 2)


def test_instance_that_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    q = tensor(1, 8, 2, 64)
    monkeypatch.setattr(kernels, "_INSTANCES", {})
    with pytest.raises(
        RuntimeError, match=r"no forward kernel for bf16 with head_dim 64 .*HOPPER_FA_HEAD_DIMS"
    ):
        kernels.forward(q, q, q, q, torch.zeros(1, 2, 8), 1.0, False)


def test_status_of_a_refused_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    q = tensor(1, 8, 2, 64)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    monkeypatch.setattr(kernels, "_workspace", lambda index, stream: torch.zeros(2, dtype=torch.int32))
    monkeypatch.setitem(kernels._INSTANCES, (BF16, 64, "default"), (0, 0))
    for name, status in kernels._C.STATUS.items():
        monkeypatch.setattr(kernels._C, "forward", lambda *arguments, status=status: status)
        with pytest.raises(RuntimeError, match="was not launched") as caught:
            kernels.forward(q, q, q, q, torch.zeros(1, 2, 8), 1.0, False)
        assert kernels.STATUS_SENTENCES[kernels._C.STATUS[name]] in str(caught.value)
