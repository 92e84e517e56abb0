"""Rows of fp8_accuracy.py's experiments, put together over their seeds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Row = dict[str, object]
ERRORS = {
    "rmse": "RMSE",
    "relative_l1": "rel. L1",
    "relative_l2": "rel. L2",
    "cosine": "1 - cos",
    "max_abs": "max",
    "relative_bias": "bias",
    "row_median": "row median",
    "row_p99": "row p99",
    "lse_max_abs": "LSE max",
}
_ROOT_MEAN_SQUARE = ("rmse", "relative_l2")  # over heads, as of one tensor that holds them all
_LARGEST = ("max_abs", "lse_max_abs", "from_standard")


def merged(rows: Iterable[Row], *columns: str) -> dict[tuple, Row]:
    """{values of columns: one row for all seeds}, in the rows' order; "heads" counts them."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column) for column in columns), []).append(row)
    return {key: _merge(group) for key, group in groups.items()}


def _merge(group: Sequence[Row]) -> Row:
    row: Row = {**group[0], "heads": len(group)}
    for name in _ROOT_MEAN_SQUARE:
        row[f"lowest_{name}"], row[f"highest_{name}"] = (
            f(r.get(name) or 0 for r in group) for f in (min, max)
        )
    for name, value in group[0].items():
        values = [r.get(name) for r in group]
        if not isinstance(value, float) or not all(isinstance(v, (int, float)) for v in values):
            continue
        if name in _ROOT_MEAN_SQUARE:
            row[name] = math.sqrt(sum(v * v for v in values) / len(values))
        else:
            row[name] = max(values) if name in _LARGEST else sum(values) / len(values)
    return row
