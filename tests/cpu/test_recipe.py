"""Fp8Recipe: what it refuses, what it says of itself."""

import copy
import json
import math
import pickle
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from cases import FP8_PRESETS

from hopper_fa import Fp8Recipe
from hopper_fa.quantization import rotation_signs


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
        ("accumulation", 2**31),
        ("rotation_seed", -(2**63) - 1),
        ("rotation_seed", 2**64),
        ("p_offset", None),
        ("rescale_threshold", None),
        ("p_offset", 9.0),
        ("p_offset", -1.0),
        ("p_offset", float("nan")),
        ("rescale_threshold", 1.0),
        ("rescale_threshold", -1.0),
        ("rescale_threshold", float("inf")),
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


TEXTS = ("qk_dtype", "q_granularity", "k_granularity", "v_granularity", "rotation", "row_sum")
FLAGS = ("smooth_k", "smooth_q", "smooth_v", "compensate_v", "sample_stats", "linear_exp2")
INTEGERS, FLOATS = ("rotation_seed", "accumulation"), ("p_offset", "rescale_threshold")
OPTIONAL = ("linear_exp2", "accumulation", *FLOATS)


@pytest.mark.parametrize("field", [field.name for field in fields(Fp8Recipe)])
def test_fields_of_another_type(field: str) -> None:
    """Every field; a field that none of the kinds names fails."""
    (kind,) = (kind for kind in (TEXTS, FLAGS, INTEGERS, FLOATS) if field in kind)
    wrong = [[], {}, (1,), 1j, b"none", torch.ones(()), np.ones(1), float]
    wrong += [] if field in OPTIONAL else [None]
    wrong += [] if kind is TEXTS else ["no", ""]
    wrong += [] if kind is FLAGS else [True, np.bool_(False)]
    wrong += [] if kind in (INTEGERS, FLOATS) else [0, 1, np.int64(1)]
    wrong += [] if kind is FLOATS else [0.0, np.float32(1)]
    for value in wrong:
        with pytest.raises(TypeError, match=rf"^{field} is ") as caught:
            Fp8Recipe(**{field: value})
        sentence = str(caught.value)
        assert sentence.count(";") == 2 and sentence.endswith("."), sentence


def test_numpy_numbers_become_pythons() -> None:
    """Equal recipes are equal in every respect, whatever their numbers were made of."""
    of_python = Fp8Recipe(
        smooth_k=True, linear_exp2=False, rotation_seed=3, accumulation=2, p_offset=8.0, rescale_threshold=0.0
    )
    of_numpy = Fp8Recipe(
        qk_dtype=np.str_("e4m3"), smooth_k=np.bool_(True), linear_exp2=np.False_, rotation_seed=np.int64(3),
        accumulation=np.uint8(2), p_offset=np.float32(8), rescale_threshold=-0.0,
    )  # fmt: skip
    of_integers = replace(of_python, p_offset=8, rescale_threshold=np.int32(0))
    for recipe in (of_numpy, of_integers):
        assert recipe == of_python and hash(recipe) == hash(of_python)
        assert recipe.to_text() == of_python.to_text() and repr(recipe) == repr(of_python)
        assert Fp8Recipe.from_text(recipe.to_text()) == recipe
    for recipe in (of_python, of_numpy, of_integers):
        for field in fields(recipe):
            assert type(getattr(recipe, field.name)) in (str, bool, int, float)
    assert list(json.loads(of_numpy.to_text())) == [field.name for field in fields(Fp8Recipe)]


@pytest.mark.parametrize("name", FP8_PRESETS)
def test_copies_are_equal(name: str) -> None:
    recipe = FP8_PRESETS[name]
    for other in (
        replace(recipe), copy.copy(recipe), copy.deepcopy(recipe), pickle.loads(pickle.dumps(recipe)),
        Fp8Recipe.from_text(recipe.to_text()),
    ):  # fmt: skip
        assert other == recipe and hash(other) == hash(recipe) and other.to_text() == recipe.to_text()
    changed = replace(recipe, rotation_seed=np.int32(7))
    assert changed != recipe and json.loads(changed.to_text())["rotation_seed"] == 7


@pytest.mark.parametrize("seed", [-(2**63), -1, 2**64 - 1])
def test_every_seed_of_a_torch_generator(seed: int) -> None:
    signs = rotation_signs(64, Fp8Recipe(rotation="hadamard", rotation_seed=seed).rotation_seed)
    assert signs.shape == (64,) and math.isclose(signs.abs().sum().item(), 64)
