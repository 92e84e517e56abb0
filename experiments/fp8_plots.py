"""Plots of fp8_accuracy.py's experiments: rows in, figure out."""

from __future__ import annotations

import fp8_published as published
import results
from fp8_rows import Row, merged


def e1(rows: list[Row]):
    by_variant = merged(rows, "variant")
    figure, axes = results.new_figure(1, 1, 9, 4.2)
    axis, places = axes[0, 0], range(len(by_variant))
    colors = [
        results.COLORS["standard" if row["implementation"] == "torch" else "hopper_fa"]
        for row in by_variant.values()
    ]
    bars = axis.bar(places, [row["rmse"] for row in by_variant.values()], color=colors)
    axis.bar_label(bars, fmt="%.1e", fontsize=7, padding=2)
    marks = {
        "FlashAttention-3's paper": (
            "D",
            results.COLORS["fa3"],
            [r.get("published_rmse") for r in by_variant.values()],
        ),
        "target": ("_", "black", [published.TARGETS.get(("e1", name, "rmse")) for (name,) in by_variant]),
    }
    for label, (marker, color, values) in marks.items():
        points = [(x, y) for x, y in zip(places, values, strict=True) if y]
        size = 500 if marker == "_" else 30
        if points:
            axis.scatter(
                *zip(*points, strict=True), marker=marker, color=color, s=size, zorder=3, label=label
            )
    axis.set_xticks(places, [name for (name,) in by_variant], rotation=35, ha="right", fontsize=8)
    axis.set(yscale="log", ylabel="RMSE")
    axis.legend(frameon=False)
    return figure


def e4(rows: list[Row]):
    means = list(dict.fromkeys(row["v_mean"] for row in rows))
    shown = ("BF16", "default", "every block, fp32, smooth V off", "every 4, fp32, smooth V off")
    shown += ("every 64, fp32, smooth V off", "raw, fp32, smooth V off", "raw, product, smooth V off")
    figure, axes = results.new_figure(1, len(means), 4 * len(means), 4.4)
    for axis, v_mean in zip(axes[0], means, strict=True):
        cells = merged((row for row in rows if row["v_mean"] == v_mean), "variant", "keys")
        for variant in shown:
            points = sorted(
                (keys, row["relative_l2"]) for (name, keys), row in cells.items() if name == variant
            )
            if points:
                axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=variant)
        for (kernel, mean), values in published.H200_LONG.items():
            if mean == v_mean and kernel in ("FA3 FP8", "vLLM two-level"):
                marker = "D" if kernel == "FA3 FP8" else "s"
                axis.scatter(
                    values.keys(), values.values(), marker=marker, facecolors="none", edgecolors="black",
                    label=f"{kernel}, H200", zorder=3,
                )  # fmt: skip
        axis.set(yscale="log", title=f"mean of V {v_mean:g}", xlabel="keys", ylabel="relative L2")
        axis.set_xscale("log", base=2)
    _legend(figure, axes[0, -1], 3)
    return figure


def e5(rows: list[Row]):
    figure, axes = results.new_figure(2, 2, 9, 6.4)
    for column, seen in enumerate(("first", "last")):
        cells = merged((row for row in rows if row["seen"] == seen), "variant", "excess")
        for line, metric in enumerate(("relative_l2", "zero_share")):
            axis = axes[line, column]
            for index, variant in enumerate(dict.fromkeys(variant for variant, _ in cells)):
                of_variant = [(e, row) for (name, e), row in cells.items() if name == variant]
                axis.plot(
                    [e for e, _ in of_variant], [row[metric] for _, row in of_variant], "o-", markersize=3,
                    color=f"C{index}", label=variant,
                )  # fmt: skip
                predicted = [
                    (e, p) for e, row in of_variant if (p := row.get("predicted_zero_share")) is not None
                ]
                if metric == "zero_share" and predicted:
                    axis.plot(*zip(*predicted, strict=True), ":", color=f"C{index}")
            label = "relative L2" if metric == "relative_l2" else "share of P that is 0 (dotted: P-Cast)"
            axis.set(title=f"sinks seen {seen}", xlabel="excess (nats)", ylabel=label)
            axis.set_yscale("log" if metric == "relative_l2" else "linear")
    _legend(figure, axes[0, 0], 4)
    return figure


def e8(rows: list[Row]):
    figure, axes = results.new_figure(1, 2, 11, 4.8)
    cells = merged(rows, "precision", "variant", "keys", "block")
    longest = max(n for _, _, n, _ in cells)
    for index, precision in enumerate(dict.fromkeys(key[0] for key in cells)):
        for axis, points, style in (
            (
                axes[0, 0],
                [(n, r) for (p, v, n, b), r in cells.items() if (p, v, b) == (precision, "flash", 128)],
                "o-",
            ),
            (
                axes[0, 0],
                [(n, r) for (p, v, n, b), r in cells.items() if (p, v) == (precision, "standard")],
                "s:",
            ),
            (
                axes[0, 1],
                [(b, r) for (p, v, n, b), r in cells.items() if p == precision and n == longest and b],
                "o-",
            ),
        ):
            if len(points) > 1:
                values = [(x, row["max_abs"]) for x, row in points]
                label = precision if style == "o-" else None
                axis.plot(*zip(*values, strict=True), style, markersize=4, color=f"C{index}", label=label)
    axes[0, 0].set(xlabel="keys", ylabel="largest |error|", title="flash (blocks of 128), dotted: standard")
    axes[0, 1].set(xlabel="keys in a block", title=f"flash, {longest} keys")
    for axis in axes[0]:
        axis.set_yscale("log")
        axis.set_xscale("log", base=2)
    _legend(figure, axes[0, 0], 4)
    return figure


def e9(rows: list[Row]):
    figure, axes = results.new_figure(1, 2, 10, 4.6)
    cells = merged(rows, "variant", "ties")
    for axis, metric, title in zip(
        axes[0], ("relative_bias", "delta_relative_bias"), ("bias of O", "bias of delta"), strict=True
    ):
        for variant in dict.fromkeys(variant for variant, _ in cells):
            points = [(r, row[metric]) for (name, r), row in cells.items() if name == variant]
            axis.plot(*zip(*points, strict=True), "o-", markersize=4, label=variant)
        axis.set(xlabel="equal maxima", title=title)
        axis.set_xscale("log", base=2)
    _legend(figure, axes[0, 0], 4)
    return figure


def _legend(figure, axis, columns: int) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
