"""How far a result is from its reference."""

import torch

from hopper_fa.arguments import check_floating


def error_metrics(x: torch.Tensor, ref: torch.Tensor) -> dict[str, float]:
    """Errors of `x` against `ref`, in float64 whatever the inputs' dtype.

    Args:
        x: any shape, any floating-point dtype.
        ref: same shape, any floating-point dtype, taken as the truth. It may be on another device than x, and
            is copied to x's then.

    Returns:
        max_abs: largest |x - ref|.
        rmse: root mean square of x - ref.
        relative_l1, relative_l2: norm of x - ref over the norm of ref (0 if both are 0, inf if only ref is).
        cosine: cosine of the angle between x and ref as vectors (1 if both are 0).
        signed_bias: mean of (x - ref) * sign(ref): negative where x is on the whole too small in magnitude.
        relative_bias: signed_bias over the mean of |ref|.
        row_median, row_p99: median and 99th percentile, over rows of the last dimension, of the row's
            relative_l2.

    Raises:
        TypeError: one is no tensor.
        ValueError: one is not of floating point, or the shapes differ.
    """
    check_floating("x", x)
    check_floating("ref", ref)
    if x.shape != ref.shape:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and ref {tuple(ref.shape)}; they must be equal; pass two "
            "tensors of one shape."
        )
    names = (
        "max_abs",
        "rmse",
        "relative_l1",
        "relative_l2",
        "cosine",
        "signed_bias",
        "relative_bias",
        "row_median",
        "row_p99",
    )
    if x.numel() == 0:
        return dict.fromkeys(names, 0.0) | {"cosine": 1.0}
    x, ref = x.detach().double(), ref.detach().to(device=x.device, dtype=torch.float64)
    diff = x - ref
    rows = (
        _ratio(diff.norm(dim=-1), ref.norm(dim=-1)).flatten()
        if x.ndim
        else _ratio(diff.abs(), ref.abs())[None]
    )
    norms = x.norm() * ref.norm()
    bias = (diff * ref.sign()).mean()
    values = (
        diff.abs().max(),
        diff.square().mean().sqrt(),
        _ratio(diff.abs().sum(), ref.abs().sum()),
        _ratio(diff.norm(), ref.norm()),
        (x * ref).sum() / norms if norms > 0 else (x.norm() == ref.norm()).double(),
        bias,
        _ratio(bias, ref.abs().mean()),
        rows.median(),
        # Sorted, because torch.quantile refuses more than 2**24 values, and kthvalue to be deterministic.
        rows.sort().values[max(1, -(-99 * rows.numel() // 100)) - 1],
    )
    return {name: value.item() for name, value in zip(names, values, strict=True)}


def _ratio(error: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    """error / size, with 0 / 0 = 0."""
    return torch.where(error == 0, torch.zeros_like(error), error / size)
