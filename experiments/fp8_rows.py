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
_SPANNED = ("rmse", "relative_l2")  # whose lowest and highest head a merged row has too
_LARGEST = ("max_abs", "lse_max_abs", "from_standard")


def merged(rows: Iterable[Row], *columns: str) -> dict[tuple, Row]:
    """{values of columns: one row for all seeds}, in the rows' order; "heads" counts them.

    RMSE and relative L2 are those of one tensor that holds all heads, max is the largest, the rest are means.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(column) for column in columns), []).append(row)
    return {key: _merge(group) for key, group in groups.items()}


def _merge(group: Sequence[Row]) -> Row:
    row: Row = {**group[0], "heads": len(group)}
    for name, value in group[0].items():
        values = [r.get(name) for r in group]
        if not isinstance(value, float) or not all(isinstance(v, (int, float)) for v in values):
            continue
        if name in _SPANNED:
            row[f"lowest_{name}"], row[f"highest_{name}"] = min(values), max(values)
        row[name] = max(values) if name in _LARGEST else sum(values) / len(values)
    errors = [(r.get("rmse"), r.get("relative_l2")) for r in group]
    if all(rmse and relative for rmse, relative in errors):
        row["rmse"] = math.sqrt(sum(rmse**2 for rmse, _ in errors) / len(errors))
        size = math.sqrt(sum((rmse / relative) ** 2 for rmse, relative in errors) / len(errors))
        row["relative_l2"] = row["rmse"] / size
    return row
