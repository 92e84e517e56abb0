"""Every wrong type of every argument of every public function is refused by name, before anything runs."""

import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch

import hopper_fa
from hopper_fa import Fp8Recipe, QuantizedQKV, accuracy, attention, backend, ops, quantization
from hopper_fa.arguments import shown

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
Q = torch.ones(1, 8, 2, 64, dtype=BF16)
CODES = Q.to(E4M3)
LSE = torch.zeros(1, 2, 8)
QKV = hopper_fa.quantize_qkv(Q, Q, Q, Fp8Recipe(smooth_k=True, smooth_q=True, smooth_v=True))
SCALES = torch.ones(1, 2)

# What is no value of each kind of argument.
ARRAY = np.ones((1, 8, 2, 64), np.float32)
NO_TENSOR = ([1.0], [[Q]], (Q,), ARRAY, np.float32(1), "q", 3, 0.5, True, {}, (t for t in (Q,)), torch.Tensor)
NO_FLAG = (
    "yes",
    "",
    0,
    1,
    1.0,
    [True],
    (),
    1j,
    torch.tensor(True),
    torch.ones(2),
    np.ones(1, bool),
    {},
    object(),
)
NO_NUMBER = ("0.1", [0.1], (1,), 1j, True, np.bool_(True), np.ones(1), torch.tensor(0.1), Q, {}, 0.1 + 0j)
NO_INTEGER = (*NO_NUMBER, 1.0, np.float64(1))
NO_TEXT = (3, 0, b"cuda", ["cuda"], ("cuda",), True, np.ones(1), torch.ones(()), {}, [], b"", 0.0)
NO_RECIPE = ("default", {}, Fp8Recipe, Fp8Recipe.default, [], 3, 0, True, False, Q, np.ones(1))
NO_WINDOW = (
    3,
    -1,
    "full",
    (1,),
    (1, 2, 3),
    (-1.0, -1.0),
    (True, True),
    ("a", "b"),
    Q,
    [Q, Q],
    np.ones(2, int),
    {},
)
NO_DTYPE = ("bf16", 16, 1.0, None, [BF16], Q, np.float16, float, {})
NO_SEQUENCE = (Q, (t for t in (Q,)), iter([Q]), np.ones(3), "ab", 3, {0: Q}, {1})
WRONG_SEQUENCE = ([3], [None], [ARRAY], (Q, "q"), [[Q]])  # tensors are what is wrong in them

TENSOR = (*NO_TENSOR, None)
ATTENTION = {
    "softmax_scale": (NO_NUMBER, TypeError),
    "causal": ((*NO_FLAG, None), TypeError),
    "qv": (NO_TENSOR, TypeError),
    "q_descale": (NO_TENSOR, TypeError),
    "k_descale": (NO_TENSOR, TypeError),
    "v_descale": (NO_TENSOR, TypeError),
    "window_size": (NO_WINDOW, TypeError),
    "attention_chunk": ((*NO_INTEGER, None), TypeError),
    "softcap": ((*NO_NUMBER, None), TypeError),
    "num_splits": ((*NO_INTEGER, None), TypeError),
    "pack_gqa": (NO_FLAG, TypeError),
    "deterministic": ((*NO_FLAG, None), TypeError),
    "sm_margin": ((*NO_INTEGER, None), TypeError),
    "return_attn_probs": ((*NO_FLAG, None), TypeError),
    "return_lse": ((*NO_FLAG, None), TypeError),
    "dropout_p": ((*NO_NUMBER, None), TypeError),
    "alibi_slopes": (NO_TENSOR, TypeError),
    "backend": (NO_TEXT, TypeError),
    "recipe": (NO_RECIPE, TypeError),
}
THREE = {name: (TENSOR, TypeError) for name in "qkv"}
NUMBERS = {"softmax_scale": (NO_NUMBER, TypeError), "causal": ((*NO_FLAG, None), TypeError)}
INTEGERS = torch.ones(1, 8, 2, 64, dtype=torch.int32)
NO_FLOATS = (INTEGERS, INTEGERS.bool(), INTEGERS.to(torch.complex64))

FIELDS = {field.name: getattr(QKV, field.name) for field in fields(QuantizedQKV)}
SIZES = {name: ((*NO_INTEGER, None), TypeError) for name in ("head_dim", "seqlen_q", "seqlen_k")}
OPTIONAL_TENSORS = {
    name: (NO_TENSOR, TypeError) for name in ("v_mean", "lse_shift", "key_bias", "q_mean", "k_mean")
}
SIX = {name: (TENSOR, TypeError) for name in ("q", "k", "v", "q_scale", "k_scale", "v_scale")}

Rows = dict[str, tuple[tuple[Any, ...], type[Exception]]]

# Name: the function, arguments that are right, and for every argument what is wrong.
FUNCTIONS: dict[str, tuple[Callable[..., Any], dict[str, Any], Rows]] = {
    "flash_attn_func": (hopper_fa.flash_attn_func, dict(q=Q, k=Q, v=Q), THREE | ATTENTION),
    "flash_attn_func of e4m3": (
        hopper_fa.flash_attn_func,
        dict(q=CODES, k=CODES, v=CODES),
        THREE | ATTENTION,
    ),
    "flash_attn_func with a recipe": (
        hopper_fa.flash_attn_func,
        dict(q=Q, k=Q, v=Q, recipe=Fp8Recipe.default()),
        THREE | ATTENTION,
    ),
    "flash_attn_kvpacked_func": (
        hopper_fa.flash_attn_kvpacked_func,
        dict(q=Q, kv=torch.stack((Q, Q), 2)),
        {"q": (TENSOR, TypeError), "kv": (TENSOR, TypeError)} | ATTENTION,
    ),
    "flash_attn_qkvpacked_func": (
        hopper_fa.flash_attn_qkvpacked_func,
        dict(qkv=torch.stack((Q, Q, Q), 2)),
        {"qkv": (TENSOR, TypeError)} | ATTENTION,
    ),
    "flash_attn_quantized_func": (
        hopper_fa.flash_attn_quantized_func,
        dict(qkv=QKV),
        NUMBERS
        | {
            "qkv": ((*TENSOR, Q, QuantizedQKV), TypeError),
            "out_dtype": (NO_DTYPE, TypeError),
            "return_lse": ((*NO_FLAG, None), TypeError),
            "backend": (NO_TEXT, TypeError),
        },
    ),
    "quantize_qkv": (
        hopper_fa.quantize_qkv,
        dict(q=Q, k=Q, v=Q),
        THREE | {"recipe": (NO_RECIPE, TypeError), "backend": (NO_TEXT, TypeError)},
    ),
    "from_fp8": (
        quantization.from_fp8,
        dict(q=CODES, k=CODES, v=CODES),
        THREE
        | {"recipe": (NO_RECIPE, TypeError), "transpose_v": ((3, "v", Q), TypeError)}
        | {name: (NO_TENSOR, TypeError) for name in ("q_descale", "k_descale", "v_descale")},
    ),
    "merge_attention": (
        hopper_fa.merge_attention,
        dict(outs=[Q], lses=[LSE]),
        {name: ((*NO_SEQUENCE, None, *WRONG_SEQUENCE), TypeError) for name in ("outs", "lses")},
    ),
    "attention_reference": (hopper_fa.attention_reference, dict(q=Q, k=Q, v=Q), THREE | NUMBERS),
    "error_metrics": (
        hopper_fa.error_metrics,
        dict(x=Q, ref=Q),
        {"x": (TENSOR, TypeError), "ref": (TENSOR, TypeError)},
    ),
    "build_info": (hopper_fa.build_info, {}, {}),
    "QuantizedQKV": (
        QuantizedQKV,
        FIELDS,
        SIX | OPTIONAL_TENSORS | SIZES | {"recipe": ((*NO_RECIPE, None), TypeError)},
    ),
    "random_qkv": (
        accuracy.random_qkv,
        dict(batch=1, seqlen_q=2, seqlen_k=2, heads_q=1, heads_kv=1, head_dim=8, dtype=BF16),
        {
            name: ((*NO_INTEGER, None), TypeError)
            for name in ("batch", "seqlen_q", "seqlen_k", "heads_q", "heads_kv", "head_dim", "seed")
        }
        | {
            "dtype": (NO_DTYPE, TypeError),
            "device": ((3, None, b"cpu", [], Q), TypeError),
            "distribution": ((*NO_TEXT, None), TypeError),
        },
    ),
    "unfused_attention": (accuracy.unfused_attention, dict(q=Q, k=Q, v=Q), THREE | NUMBERS),
}
ELSEWHERE = {"Fp8Recipe", "__version__"}  # test_recipe.py; no function


def arguments_of(function: Callable[..., Any]) -> set[str]:
    """By the signature; **options of the packed functions are flash_attn_func's behind v."""
    parameters = inspect.signature(function).parameters
    names = {name for name, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    if len(names) < len(parameters):
        names |= inspect.signature(hopper_fa.flash_attn_func).parameters.keys() - set("qkv")
    return names


ROWS = [
    pytest.param(function, right, argument, values, error, id=f"{name}-{argument}")
    for name, (function, right, rows) in FUNCTIONS.items()
    for argument, (values, error) in rows.items()
]


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fails the test where a call gets as far as computing, and where one warns."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the call got past its checks")

    for module, name in (
        (ops, "forward"), (ops, "forward_e4m3"), (backend, "run_quantized"), (torch, "stack"),
        (quantization, "smooth_and_rotate"), (quantization, "_pad_channels"), (torch, "randn"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_every_public_function_has_rows() -> None:
    assert {name.split(" ")[0] for name in FUNCTIONS} | ELSEWHERE >= set(hopper_fa.__all__)
    for name, (function, right, rows) in FUNCTIONS.items():
        assert rows.keys() == arguments_of(function), f"an argument of {name} without a row, or too many"
        function(**right, **({"backend": "emulator"} if "backend" in rows else {}))  # the others are right


@pytest.mark.parametrize(("function", "right", "argument", "values", "error"), ROWS)
def test_wrong_type(
    nothing_runs: None,
    function: Callable[..., Any],
    right: dict[str, Any],
    argument: str,
    values: tuple[Any, ...],
    error: type[Exception],
) -> None:
    for value in values:
        print(f"{argument}={shown(value)}")  # of the failure
        with pytest.raises(error) as caught:
            function(**right | {argument: value})
        assert type(caught.value) is error
        sentence = str(caught.value)
        assert sentence.startswith((f"{argument} is ", f"{argument}[")), sentence
        assert sentence.count(";") >= 2 and sentence.endswith("."), "what came; what is allowed; what to do"


@pytest.mark.parametrize("value", NO_FLOATS, ids=[str(t.dtype) for t in NO_FLOATS])
def test_numbers_that_are_no_floats(nothing_runs: None, value: torch.Tensor) -> None:
    lse = value[..., 0].transpose(1, 2)
    for argument, call in {
        "x": lambda: hopper_fa.error_metrics(value, Q),
        "ref": lambda: hopper_fa.error_metrics(Q, value),
        "q": lambda: hopper_fa.attention_reference(value, Q, Q),
        "v": lambda: hopper_fa.attention_reference(Q, Q, value),
        r"outs\[1\]": lambda: hopper_fa.merge_attention([Q, value], [LSE, LSE]),
        r"lses\[0\]": lambda: hopper_fa.merge_attention([Q], [lse]),
        "q, k, v have": lambda: hopper_fa.quantize_qkv(value, Q, Q),
    }.items():
        with pytest.raises(ValueError, match=f"^{argument} .*{value.dtype}.*convert"):
            call()


def test_wrong_values_of_merge_attention(nothing_runs: None) -> None:
    for outs, lses, match in (
        ([Q, Q.half()], [LSE, LSE], "dtypes .*torch.float16.*share a dtype"),
        ([Q, Q.to("meta")], [LSE, LSE], "devices .*'meta'"),
        ([Q], [LSE.to("meta")], "devices .*'meta'"),
        ([Q[0]], [LSE], "each out must be"),
        ([Q.to(E4M3)], [LSE], "at least 16 bits"),
    ):
        with pytest.raises(ValueError, match=f"^outs.*{match}"):
            hopper_fa.merge_attention(outs, lses)


def test_error_metrics_takes_two_dtypes() -> None:
    assert hopper_fa.error_metrics(Q, Q.double())["max_abs"] == 0


def test_scales_out_of_range() -> None:
    values = (float("nan"), np.float32("nan"), float("inf"), 10**400, -(10**400), 2**65)
    for tensors, value in itertools.product(((Q, Q, Q), (CODES, CODES, CODES)), values):
        with pytest.raises(ValueError, match=r"^softmax_scale is (nan|inf|-inf|3.68934)"):
            hopper_fa.flash_attn_func(*tensors, softmax_scale=value, backend="emulator")


def test_a_scale_with_a_gradient_is_refused(nothing_runs: None) -> None:
    for scale in (torch.tensor(0.1, requires_grad=True), torch.nn.Parameter(torch.ones(1))):
        with pytest.raises(
            TypeError, match=r"^softmax_scale is .*pass its .item\(\), or for its gradient multiply q"
        ):
            hopper_fa.flash_attn_func(Q, Q, Q, scale)


def test_numbers_of_numpy_are_taken(seed: int) -> None:
    q, k, v = (torch.randn(1, 8, 2, 64, dtype=BF16) for _ in range(3))
    want = hopper_fa.flash_attn_func(q, k, v, 1.0, True, return_lse=True, backend="emulator")
    for scale in (1, np.int8(1), np.float32(1), np.float64(1), np.longdouble(1)):
        got = hopper_fa.flash_attn_func(
            q, k, v, scale, np.True_, deterministic=np.False_, return_lse=np.bool_(True),
            backend=np.str_("emulator"), softcap=np.float32(0), num_splits=np.int64(1),
            window_size=(np.int64(-1), None),
        )  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
        kv = torch.stack((k, v), 2)
        got = hopper_fa.flash_attn_kvpacked_func(
            q, kv, scale, np.True_, return_lse=np.True_, backend="emulator"
        )
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    exact = hopper_fa.attention_reference(q, k, v, np.float32(1), np.True_)
    assert all(
        torch.equal(a, b) for a, b in zip(exact, hopper_fa.attention_reference(q, k, v, 1, True), strict=True)
    )


def test_windows_that_hide_nothing() -> None:
    want = hopper_fa.flash_attn_func(Q, Q, Q, backend="emulator")
    for window in ((-1, -1), [-1, -1], (None, None), None, (-1, None), (np.int32(-1), -2)):
        assert torch.equal(hopper_fa.flash_attn_func(Q, Q, Q, window_size=window, backend="emulator"), want)
    for window in ((-1, 0), (0, None), [4, 4]):
        with pytest.raises(NotImplementedError, match=r"^window_size is .*\(-1, 0\) alone is causal=True"):
            hopper_fa.flash_attn_func(Q, Q, Q, window_size=window, backend="emulator")


@pytest.mark.parametrize("name", attention._OPTIONS)
def test_sentences_say_what_leaving_out_costs(name: str, nothing_runs: None) -> None:
    """Following the sentence must not change the result unawares."""
    value = {
        "qv": Q, "window_size": (3, 0), "attention_chunk": 4, "softcap": 30.0, "num_splits": 2,
        "pack_gqa": True, "sm_margin": 1, "return_attn_probs": True, "dropout_p": 0.1,
        "alibi_slopes": torch.ones(2),
    }[name]  # fmt: skip
    of_speed = name in ("num_splits", "pack_gqa", "sm_margin")
    advice = "leave it out, as it changes speed" if of_speed else "computes another result|return_lse=True"
    with pytest.raises(
        NotImplementedError, match=f"^{name} is .*, which would .*not do that yet.*({advice})"
    ):
        hopper_fa.flash_attn_func(Q, Q, Q, **{name: value})


def test_arguments_that_are_none(nothing_runs: None) -> None:
    for call in (
        lambda: hopper_fa.flash_attn_qkvpacked_func(torch.cat([Q[:, :, None]] * 3, 2), bogus=1),
        lambda: hopper_fa.flash_attn_kvpacked_func(Q, torch.cat([Q[:, :, None]] * 2, 2), bogus=None),
    ):
        with pytest.raises(TypeError, match="^bogus is no argument of flash_attn_func; allowed are .*; "):
            call()
    with pytest.raises(ValueError, match="^backend is ''"):
        hopper_fa.flash_attn_func(Q, Q, Q, backend="")


def test_meta_and_sparse_tensors() -> None:
    assert hopper_fa.flash_attn_func(*(Q.to("meta"),) * 3).is_meta
    with pytest.raises(ValueError, match="^k has layout torch.sparse_coo; it must be .*; call k.to_dense"):
        hopper_fa.flash_attn_func(Q, Q.to_sparse(), Q, backend="emulator")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("q", QKV.q[:, :4]),
        ("q", QKV.q.float()),
        ("q", QKV.q[0]),
        ("k", QKV.k[..., :32]),
        ("v", QKV.v.transpose(2, 3)),
        ("v", QKV.v[:, :, :64]),
        ("q_scale", QKV.q_scale.double()),
        ("q_scale", QKV.q_scale.expand(1, 2, 5)),
        ("k_scale", QKV.k_scale.to("meta")),
        ("v_scale", QKV.v_scale[:, :, ::2]),
        ("v_mean", QKV.v_mean[:, :1]),
        ("lse_shift", QKV.lse_shift[..., :1]),
        ("key_bias", QKV.key_bias.half()),
        ("head_dim", 60),
        ("head_dim", 264),
        ("seqlen_q", -1),
        ("seqlen_k", -8),
        ("q_scale", -QKV.q_scale),
        ("k_scale", -QKV.k_scale),
    ],
)
def test_quantized_tensors_that_do_not_fit(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} (is|has) .*; .*; .*\.$"):
        QuantizedQKV(**FIELDS | {name: value})


def test_quantized_tensors_that_fit() -> None:
    """What the functions make passes the checks that they go around."""
    for recipe in (
        Fp8Recipe.default(), Fp8Recipe.accurate(), Fp8Recipe.causal_safe(), Fp8Recipe.fa3(),
        Fp8Recipe(q_granularity="tensor", k_granularity="tensor", v_granularity="tensor"),
        Fp8Recipe(q_granularity="head", k_granularity="token", smooth_q=True),
    ):  # fmt: skip
        for batch, seqlen_q, seqlen_k in ((2, 130, 257), (1, 0, 3), (0, 3, 3), (1, 3, 0)):
            q, k = torch.randn(batch, seqlen_q, 4, 72), torch.randn(batch, seqlen_k, 2, 72)
            qkv = hopper_fa.quantize_qkv(q, k, k, recipe)
            again = QuantizedQKV(**{field.name: getattr(qkv, field.name) for field in fields(qkv)})
            assert all(
                getattr(again, field.name) is getattr(qkv, field.name)
                or torch.equal(getattr(again, field.name), getattr(qkv, field.name))
                for field in fields(qkv)
            )
