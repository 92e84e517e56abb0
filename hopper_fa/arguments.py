"""Types of arguments: what public functions take, and the sentence that refuses everything else.

Every sentence begins with the argument's name. Values are judged in validation.py. This file knows no other
of the package.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout)
_SYMBOLIC = (torch.SymInt, torch.SymFloat)


def shown(value: object) -> str:
    """`value` as a sentence has it: short, and of a tensor or an array only the type."""
    items = value if type(value) in (tuple, list) else (value,)
    if len(items) <= 8 and all(item is None or isinstance(item, _PLAIN) for item in items):
        text = repr(value)
        if len(text) <= 80:
            return text
    return f"of type {type(value).__name__}"


def check_tensor(name: str, value: Any) -> None:
    """Raises TypeError unless `value` is a torch.Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is {shown(value)}; it must be a torch.Tensor; convert it to one.")


def check_tensors(names: tuple[str, ...], values: tuple[Any, ...]) -> None:
    """`check_tensor` of each."""
    for name, value in zip(names, values, strict=True):
        check_tensor(name, value)


def check_floating(name: str, value: Any, smallest: int = 1) -> None:
    """Raises TypeError unless `value` is a tensor, ValueError unless its floats have `smallest` bytes."""
    check_tensor(name, value)
    if not value.dtype.is_floating_point or value.dtype.itemsize < smallest:
        kind = "a real floating-point dtype" if smallest == 1 else f"one of at least {8 * smallest} bits"
        raise ValueError(
            f"{name} is a tensor of {value.dtype}; its dtype must be {kind}; convert it with .to()."
        )


def check_attention(q: Any, k: Any, v: Any) -> None:
    """Floats q (batch, seqlen_q, heads_q, head_dim) and k, v (batch, seqlen_k, heads_kv, head_dim).

    The head_dim of v may be another.

    Raises:
        TypeError: one is no tensor.
        ValueError: dtypes, devices or shapes that do not fit.
    """
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_floating(name, t)
    if k.device != q.device or v.device != q.device:
        raise ValueError(
            f"q, k, v are on {q.device}, {k.device}, {v.device}; they must share a device; move them with "
            ".to()."
        )
    fits = q.ndim == k.ndim == v.ndim == 4 and k.shape[:3] == v.shape[:3]
    if not fits or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(
            f"q, k, v have shapes {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}; allowed are q "
            "(batch, seqlen_q, heads_q, head_dim) and k, v (batch, seqlen_k, heads_kv, head_dim); transpose "
            "or reshape them to that."
        )
    if k.shape[2] == 0 or q.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads and k, v have {k.shape[2]}; the heads of q must be a positive "
            "multiple of those of k and v; repeat or drop heads."
        )


def check_instance(name: str, value: Any, kinds: type | tuple[type, ...], how: str) -> None:
    """Raises TypeError unless `value` is one of `kinds`; how: what to do, the sentence's last part."""
    if not isinstance(value, kinds):
        allowed = " or ".join(kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
        raise TypeError(f"{name} is {shown(value)}; it must be of type {allowed}; {how}.")


def as_flag(name: str, value: Any, optional: bool = False, how: str = "pass one of them") -> bool | None:
    """`value` as a bool; NumPy's are converted. optional: None is allowed.

    Raises:
        TypeError: it is no bool. NOTE: 0 and 1 are none.
    """
    if value is True or value is False or (optional and value is None):
        return value
    if isinstance(value, np.bool_):
        return bool(value)
    if isinstance(value, torch.SymBool):
        return value
    raise TypeError(f"{name} is {shown(value)}; it must be True or False{' or None' * optional}; {how}.")


def as_float(name: str, value: Any, optional: bool = False) -> float | None:
    """`value` as a float; integers and NumPy's numbers are converted. optional: None is allowed.

    Raises:
        TypeError: it is no real number. NOTE: a tensor is none, as its gradient would be lost and a GPU's
            value waited for.
    """
    if type(value) is float or (optional and value is None):
        return value
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    if isinstance(value, _SYMBOLIC):
        return value
    how = "pass a float"
    if isinstance(value, Tensor):
        how = "pass its .item(), or for its gradient multiply q by it and pass softmax_scale=1.0"
        how = how if name == "softmax_scale" else "pass its .item(), which has no gradient"
    raise TypeError(f"{name} is {shown(value)}; it must be a real number{' or None' * optional}; {how}.")


def as_sizes(**values: Any) -> tuple[int, ...]:
    """`as_int` of each, by its name.

    Raises:
        TypeError: one is no integer. ValueError: one is negative.
    """
    sizes = tuple(as_int(name, value) for name, value in values.items())
    for name, size in zip(values, sizes, strict=True):
        if size < 0:
            raise ValueError(f"{name} is {size}; it must be at least 0; pass another.")
    return sizes


def as_int(name: str, value: Any, optional: bool = False) -> int | None:
    """`value` as an int; NumPy's integers are converted. optional: None is allowed.

    Raises:
        TypeError: it is no integer. NOTE: a float or a bool is none.
    """
    if type(value) is int or (optional and value is None):
        return value
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, torch.SymInt):
        return value
    raise TypeError(f"{name} is {shown(value)}; it must be an int{' or None' * optional}; pass one.")


def as_text(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` as a str, one of `choices`.

    Raises:
        TypeError: it is no str. ValueError: it is another.
    """
    if isinstance(value, str) and value in choices:
        return str.__str__(value)
    raise (ValueError if isinstance(value, str) else TypeError)(
        f"{name} is {shown(value)}; it must be one of {', '.join(map(repr, choices))}; pass one of them."
    )
