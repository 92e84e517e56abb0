"""The public functions: arguments, packed layouts, backends, what is refused."""

import inspect

import pytest
import torch
from cases import Case

from hopper_fa import (
    attention_reference,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    merge_attention,
)


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOPPER_FA_BACKEND", raising=False)


def small_qkv(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=40, seqlen_k=70).qkv(torch.bfloat16, seed)


def test_positional_order_is_flash_attention_3s() -> None:
    # fmt: off
    assert list(inspect.signature(flash_attn_func).parameters)[:17] == [
        "q", "k", "v", "softmax_scale", "causal", "qv", "q_descale", "k_descale", "v_descale", "window_size",
        "attention_chunk", "softcap", "num_splits", "pack_gqa", "deterministic", "sm_margin",
        "return_attn_probs",
    ]
    # fmt: on


def test_reference_backend_is_the_reference(seed: int) -> None:
    q, k, v = small_qkv(seed)
    out, lse = flash_attn_func(q, k, v, softmax_scale=0.3, causal=True, return_lse=True, backend="reference")
    ref_out, ref_lse = attention_reference(q, k, v, 0.3, True)
    # Not bit for bit: the CPU's matrix products may split their sums differently from one call to the next.
    torch.testing.assert_close(out.double(), ref_out, rtol=torch.finfo(q.dtype).eps, atol=1e-6)
    torch.testing.assert_close(lse, ref_lse.float(), rtol=1e-6, atol=1e-6)
    assert out.is_contiguous() and out.dtype == q.dtype
    assert lse.shape == (2, 4, 40) and lse.dtype == torch.float32


def test_default_scale_and_single_return(seed: int) -> None:
    q, k, v = small_qkv(seed)
    out = flash_attn_func(q, k, v, backend="emulator")
    assert torch.equal(out, flash_attn_func(q, k, v, 64**-0.5, backend="emulator"))


def test_packed_layouts(seed: int) -> None:
    q, k, v = Case(batch=2, heads_q=3, heads_kv=3, seqlen_q=40, seqlen_k=40).qkv(torch.float16, seed)
    want = flash_attn_func(q, k, v, 0.2, True, backend="emulator")
    got = flash_attn_qkvpacked_func(torch.stack([q, k, v], 2), 0.2, True, backend="emulator")
    assert torch.equal(got, want)
    got, lse = flash_attn_kvpacked_func(
        q, torch.stack([k, v], 2), 0.2, True, backend="emulator", return_lse=True
    )
    assert torch.equal(got, want) and lse.shape == (2, 3, 40)


def test_packed_shapes_are_checked() -> None:
    x = torch.zeros(1, 8, 4, 2, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="stack q, k and v in dimension 2"):
        flash_attn_qkvpacked_func(x)
    with pytest.raises(ValueError, match="stack k and v in dimension 2"):
        flash_attn_kvpacked_func(x[:, :, 0], x)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("qv", torch.zeros(1)),
        ("window_size", (128, 0)),
        ("window_size", [-1, 0]),
        ("attention_chunk", 64),
        ("softcap", 30.0),
        ("num_splits", 4),
        ("pack_gqa", True),
        ("sm_margin", 8),
        ("return_attn_probs", True),
        ("dropout_p", 0.1),
        ("alibi_slopes", torch.ones(4)),
    ],
)
def test_options_not_built_are_named(name: str, value: object, seed: int) -> None:
    q, k, v = small_qkv(seed)
    with pytest.raises(NotImplementedError, match=rf"^{name} is "):
        flash_attn_func(q, k, v, backend="emulator", **{name: value})
    with pytest.raises(NotImplementedError, match=rf"^{name} is "):
        flash_attn_kvpacked_func(q, torch.stack([k, v], 2), backend="emulator", **{name: value})


def test_neutral_options_pass(seed: int) -> None:
    q, k, v = small_qkv(seed)
    want = flash_attn_func(q, k, v, backend="emulator")
    for options in (
        dict(window_size=(-1, -1), softcap=0.0, num_splits=1, dropout_p=0.0, alibi_slopes=None),
        dict(window_size=[-1, -1], softcap=0, num_splits=0, pack_gqa=False, deterministic=True),
        dict(window_size=(None, None), attention_chunk=0, sm_margin=0, return_attn_probs=False),
    ):
        assert torch.equal(flash_attn_func(q, k, v, backend="emulator", **options), want)


def test_auto_never_falls_back(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = small_qkv(seed)
    for backend in (None, "auto", "cuda"):
        with pytest.raises(RuntimeError, match=r'on cpu; .*backend="emulator"'):
            flash_attn_func(q, k, v, backend=backend)
    monkeypatch.setenv("HOPPER_FA_BACKEND", "cuda")
    with pytest.raises(RuntimeError, match="HOPPER_FA_BACKEND=emulator"):
        flash_attn_func(q, k, v)


def test_other_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from hopper_fa import backend

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    backend._is_hopper.cache_clear()
    with pytest.raises(RuntimeError, match=r"cuda:5 \(NVIDIA A100, compute capability 8.0\)"):
        backend.resolve(None, torch.device("cuda", 5))
    backend._is_hopper.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend.resolve(None, torch.device("cuda", 5)) == "cuda"
    assert backend.resolve("emulator", torch.device("cuda", 5)) == "emulator"
    backend._is_hopper.cache_clear()


def test_environment_chooses_and_argument_wins(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = small_qkv(seed)
    emulated = flash_attn_func(q, k, v, backend="emulator")
    reference = flash_attn_func(q, k, v, backend="reference")
    assert not torch.equal(emulated, reference)
    monkeypatch.setenv("HOPPER_FA_BACKEND", "emulator")
    assert torch.equal(flash_attn_func(q, k, v), emulated)
    assert torch.equal(flash_attn_func(q, k, v, backend="reference"), reference)
    monkeypatch.setenv("HOPPER_FA_BACKEND", "fastest")
    with pytest.raises(ValueError, match="backend is 'fastest'; allowed are auto, cuda, emulator, reference"):
        flash_attn_func(q, k, v)


@pytest.mark.parametrize("backend", ["emulator", "reference"])
def test_empty_inputs(backend: str) -> None:
    def zeros(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    for batch, seqlen_q in ((0, 8), (2, 0)):
        out, lse = flash_attn_func(
            zeros(batch, seqlen_q, 4, 64),
            zeros(batch, 8, 2, 64),
            zeros(batch, 8, 2, 64),
            return_lse=True,
            backend=backend,
        )
        assert out.shape == (batch, seqlen_q, 4, 64) and lse.shape == (batch, 4, seqlen_q)
    out, lse = flash_attn_func(
        zeros(2, 8, 4, 64) + 1, zeros(2, 0, 2, 64), zeros(2, 0, 2, 64), return_lse=True, backend=backend
    )
    assert (out == 0).all() and (lse == float("-inf")).all() and lse.shape == (2, 4, 8)


def test_merge_of_key_sets_is_attention_over_their_union(seed: int) -> None:
    case = Case(batch=2, heads_q=4, heads_kv=2, seqlen_q=70, seqlen_k=130)
    q, k, v = (t.double() for t in case.qkv(torch.bfloat16, seed))
    want_out, want_lse = attention_reference(q, k, v, 1.0)
    cuts = [(0, 50), (50, 50), (50, 51), (51, 130)]  # one of them empty, one a single key
    parts = [attention_reference(q, k[:, a:b], v[:, a:b], 1.0) for a, b in cuts]
    out, lse = merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(out, want_out, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=1e-12)


def test_merge_ignores_the_output_of_empty_partials() -> None:
    out = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    lse = torch.randn(1, 2, 3)
    empty_out, empty_lse = torch.full_like(out, float("nan")), torch.full_like(lse, float("-inf"))
    merged, merged_lse = merge_attention([empty_out, out], [empty_lse, lse])
    assert torch.equal(merged, out) and torch.equal(merged_lse, lse) and merged.dtype == torch.bfloat16
    merged, merged_lse = merge_attention([empty_out, empty_out], [empty_lse, empty_lse])
    assert (merged == 0).all() and torch.equal(merged_lse, empty_lse)


def test_merge_survives_extreme_lse() -> None:
    outs = [torch.full((1, 1, 1, 8), value) for value in (1.0, 3.0, 100.0)]
    lses = [torch.full((1, 1, 1), value) for value in (5000.0, 5000.0, -5000.0)]
    out, lse = merge_attention(outs, lses)
    torch.testing.assert_close(out, torch.full_like(out, 2.0))
    torch.testing.assert_close(lse, torch.full_like(lse, 5000.0 + 0.6931472))


def test_merge_checks_its_arguments() -> None:
    out, lse = torch.zeros(1, 3, 2, 8), torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match="0 outs and 0 lses"):
        merge_attention([], [])
    with pytest.raises(ValueError, match="2 outs and 1 lses"):
        merge_attention([out, out], [lse])
    with pytest.raises(ValueError, match=r"lses of shapes \[\(1, 3, 2\)\]"):
        merge_attention([out], [lse.transpose(1, 2)])
