"""Fp8Recipe: what it refuses, what it says of itself."""

from dataclasses import replace

import pytest
from cases import FP8_PRESETS

from hopper_fa import Fp8Recipe


def test_presets_say_what_they_leak() -> None:
    assert {name for name, recipe in FP8_PRESETS.items() if not recipe.leaks_future} == {"causal_safe"}
    safe = Fp8Recipe.causal_safe()
    for field in ("smooth_k", "smooth_q", "smooth_v", "compensate_v"):
        assert replace(safe, **{field: True}).leaks_future
    for field, values in {
        "q_granularity": ("tensor", "group", "head", "block"),
        "k_granularity": ("tensor", "head", "block"),
        "v_granularity": ("tensor", "head", "channel"),
    }.items():
        for value in values:
            assert replace(safe, **{field: value}).leaks_future
    same = replace(
        safe, rotation="none", linear_exp2=True, p_offset=4.0, rescale_threshold=4.0, accumulation=0,
        row_sum="fp32",
    )  # fmt: skip
    assert not same.leaks_future
    assert not replace(safe, k_granularity="token", qk_dtype="int8").leaks_future
    with pytest.raises(ValueError, match="scale"):
        replace(safe, qk_dtype="int8")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("qk_dtype", "e5m2"),
        ("q_granularity", "warp"),
        ("k_granularity", "group"),
        ("v_granularity", "block"),
        ("rotation", "random"),
        ("row_sum", "fp16"),
        ("k_granularity", "channel"),
        ("accumulation", -1),
        ("accumulation", 1.0),
        ("linear_exp2", 8),
        ("linear_exp2", "fast"),
        ("p_offset", None),
        ("rescale_threshold", None),
        ("p_offset", 9.0),
        ("p_offset", -1.0),
        ("p_offset", float("nan")),
        ("rescale_threshold", 1.0),
        ("rescale_threshold", -1.0),
    ],
)
def test_recipe_refuses(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        Fp8Recipe(**{field: value})
    Fp8Recipe(p_offset=8.0, rescale_threshold=0.8)  # 448 = 2**8.807


def test_size_of_the_sample() -> None:
    sampling, every = Fp8Recipe.default(), Fp8Recipe.accurate()
    for seqlen in (0, 1, 255, 256, 1023, 1024, 2048, 4095, 4096, 8191, 8192, 2**15, 2**17 + 5, 2**20):
        for_means, for_v = (f(seqlen) for f in (sampling.stats_shift, sampling.v_stats_shift))
        assert seqlen >> for_means >= min(seqlen, 128) and for_means <= 6
        assert for_means == 6 or seqlen >> for_means < 256  # no more than needed
        assert for_v <= for_means and seqlen >> for_v >= min(seqlen, 128 if for_v <= 3 else 1024)
        assert for_v >= min(for_means, 3) and (for_v in (3, 6, for_means) or seqlen >> for_v < 2048)
        assert every.stats_shift(seqlen) == every.v_stats_shift(seqlen) == 0
        assert replace(sampling, v_granularity="head").v_stats_shift(seqlen) == 0
    assert [sampling.v_stats_shift(2**n) for n in range(7, 18)] == [0, 1, 2, 3, 3, 3, 3, 4, 5, 6, 6]
