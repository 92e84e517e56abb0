"""report.md and plots of fp8_accuracy.py, drawn from its JSON files and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import fp8_plots
import fp8_published as published
import results
from fp8_rows import ERRORS, Row, merged


def write(folder: Path) -> Path:
    """Write folder/report.md and a PNG an experiment from the JSON files in `folder`.

    Raises:
        FileNotFoundError: there are none.
    """
    paths = {name: folder / f"{name}.json" for name in SECTIONS}
    loaded = {name: results.load(path) for name, path in paths.items() if path.is_file()}
    found = {name: result for name, result in loaded.items() if result["rows"]}
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no {'.json, '.join(SECTIONS)}.json; run fp8_accuracy.py first"
        )
    lines = ["# FP8 accuracy", "", *_preamble(found), *_targets(found)]
    for name, result in found.items():
        title, section, plot = SECTIONS[name]
        lines += [f"## {name.upper()}: {title}", "", *_made(result), "", *section(result["rows"]), ""]
        if plot:
            figure = plot(result["rows"])
            figure.suptitle(f"{title}\n{results.subtitle(result)}", fontsize=10, x=0.01, ha="left")
            results.save_figure(figure, folder / f"{name}.png")
            lines += [f"![{title}]({name}.png)", ""]
    path = folder / "report.md"
    path.write_text("\n".join(lines).rstrip() + "\n")
    return path


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table: numbers in three digits, None as an empty cell."""

    def text(cell: object) -> str:
        if cell is None:
            return ""
        return f"{cell:.2e}" if isinstance(cell, float) else str(cell)

    rule = "|".join("---" for _ in header)
    rows = ["| " + " | ".join(map(text, line)) + " |" for line in lines]
    return ["| " + " | ".join(header) + " |", f"|{rule}|", *rows, ""]


def _errors(row: Row, names: Iterable[str] = ERRORS) -> list[object]:
    """The cells of a row's errors; 1 - cosine in place of the cosine, and signs on the bias."""
    cells: list[object] = []
    for name in names:
        value = row.get(name)
        if isinstance(value, (int, float)):
            value = f"{1 - value:.1e}" if name == "cosine" else float(value)
            value = f"{value:+.1e}" if name == "relative_bias" else value
        cells.append(value)
    return cells


def _preamble(found: dict[str, dict]) -> list[str]:
    text = (
        "Errors of attention's output against float64 attention of the inputs before they were rounded to "
        "BF16. Head dim 128, full mask, a head a seed. RMSE and relative L2 are of all heads together, max "
        "is the largest, the rest are means. bias is the mean of (x - ref) sign(ref) over the mean of |ref|: "
        "negative where the output is too small. row median and row p99 are of the rows' relative L2; LSE "
        "max is the largest error of a log-sum-exp."
    )
    by = {row.get("implementation") for result in found.values() for row in result["rows"]}
    if "kernel" in by:
        text += " Run by the CUDA kernels where a table says so."
    else:
        text += (
            " **Run by the emulator**: the kernels' arithmetic in torch, with the tensor core's accumulator "
            "as in `hopper_fa/tensor_core.py`."
        )
    sources = (
        "H200: the peers' own kernels on an H200, same distributions, other seeds. Sources of all published "
        "values: `experiments/fp8_published.py`."
    )
    return [text, "", sources, ""]


def _made(result: dict) -> list[str]:
    made, sizes = result["made"], result.get("sizes", {})
    parts = [f"`{made['command']}`", results.subtitle(result), f"run by the {result['runs_on']}"]
    parts.append(", ".join(f"{name} {sizes[name]}" for name in ("heads", "seed") if name in sizes))
    if not result.get("complete", True):
        parts.append("**cut short**")
    return [" · ".join(parts)]


def _targets(found: dict[str, dict]) -> list[str]:
    choose = {
        "e1": ("outliers (E1)", lambda row: True),
        "kb": ("K bias of std 3 (KB)", lambda row: True),
        "e4": ("128k keys, V of mean 1 (E4)", lambda row: row["v_mean"] == 1.0 and row["keys"] == 131072),
    }
    lines = []
    for (name, variant, metric), target in published.TARGETS.items():
        title, wanted = choose[name]
        rows = merged(filter(wanted, found.get(name, {"rows": []})["rows"]), "variant")
        if (variant,) in rows:
            row = rows[(variant,)]
            sizes = f"{row['keys']} keys, {row['queries']} queries, {row['heads']} heads"
            span = None
            if row["heads"] > 1 and f"lowest_{metric}" in row:
                span = f"{row[f'lowest_{metric}']:.2e} to {row[f'highest_{metric}']:.2e}"
            verdict = "met" if abs(row[metric]) <= target else "missed"
            lines.append([title, sizes, variant, ERRORS[metric], float(row[metric]), span, target, verdict])
    if not lines:
        return []
    header = ("inputs", "sizes", "recipe", "error", "ours", "of single heads", "target", "")
    return ["## Targets of the project", "", *markdown(header, lines)]


def _e1(rows: list[Row]) -> list[str]:
    by_variant = merged(rows, "variant")
    lines = []
    for (variant,), row in by_variant.items():
        span = f"{row['lowest_rmse']:.1e} to {row['highest_rmse']:.1e}"
        target = published.TARGETS.get(("e1", variant, "rmse"))
        lines.append([variant, row["implementation"], *_errors(row), span, row.get("published_rmse"), target])
    first = next(iter(by_variant.values()))
    return [
        f"Q, K, V ~ N(0, 1) + N(0, 100) · Bernoulli(0.001); {first['keys']} keys, {first['queries']} rows of "
        f"queries, {first['heads']} heads. The paper gives RMSE, and neither N, d nor seeds. FP16 FA2 and "
        "FA3 are one algorithm: ours. The FP8 standard is unfused, with FP16 softmax.",
        "",
        *markdown(["", "run by", *ERRORS.values(), "RMSE of heads", "paper RMSE", "target"], lines),
        "Peers on an H200, 16 heads:",
        "",
        *markdown(["kernel", "RMSE"], published.H200_OUTLIERS.items()),
    ]


def _kb(rows: list[Row]) -> list[str]:
    lines = [
        [
            variant,
            row["implementation"],
            *_errors(row),
            f"{row['lowest_relative_l2']:.2e} to {row['highest_relative_l2']:.2e}",
            published.TARGETS.get(("kb", variant, "relative_l2")),
        ]
        for (variant,), row in merged(rows, "variant").items()
    ]
    return [
        f"N(0, 1), and one N(0, 9) vector added to all keys of a head; {rows[0]['keys']} keys, "
        f"{rows[0]['queries']} rows of queries. RMSE hardly differs between heads; relative L2 does, with "
        "the size of the output.",
        "",
        *markdown(["", "run by", *ERRORS.values(), "rel. L2 of heads", "target"], lines),
        "Peers on an H200, 4096 keys, 16 heads:",
        "",
        *markdown(["kernel", "rel. L2"], published.H200_K_BIAS.items()),
    ]


def _grid(rows: list[Row], *columns: str) -> list[str]:
    """Every error, a line a combination of columns."""
    lines = [[*key, *_errors(row)] for key, row in merged(rows, *columns).items()]
    return markdown([*(column if column != "variant" else "" for column in columns), *ERRORS.values()], lines)


def _e2(rows: list[Row]) -> list[str]:
    others = [[f"{qk} / {pv}", *values] for (qk, pv), values in published.SAGE1.items()]
    return [
        "The default recipe with int8 and with e4m3 Q and K; V and P are e4m3 in every recipe, so that the "
        "other types of SageAttention's Table 2 have no row of ours.",
        "",
        *_grid(rows, "inputs", "variant"),
        "SageAttention, Table 2 (other data: mean over the layers of two models):",
        "",
        *markdown(["QK / PV", "cosine", "rel. L1", "RMSE"], others),
    ]


def _e3(rows: list[Row]) -> list[str]:
    text = ["k_bias: one N(0, 9) vector added to all keys; qk_bias: to all queries another one too.", ""]
    beside = {
        "smoothing": (published.SAGE2_SMOOTHING, "Table 4, int4 Q and K"),
        "granularity of Q and K": (published.SAGE2_GRANULARITY, "Table 6, int4 Q and K"),
        "V of mean 1": (published.SAGE2_SMOOTH_V, "Table 10"),
    }
    for grid in dict.fromkeys(row["grid"] for row in rows):
        of_grid = [row for row in rows if row["grid"] == grid]
        text += [f"### {grid}", "", *_grid(of_grid, "inputs", "qk", "variant")]
        if grid in beside:
            table, source = beside[grid]
            text += [f"SageAttention2, {source} (other data: CogVideoX):", ""]
            text += markdown(
                ["", "cosine", "rel. L1", "RMSE"], ([name, *values] for name, values in table.items())
            )
    return text


def _e4(rows: list[Row]) -> list[str]:
    text = [
        "64 rows of queries, N(0, 1), V = mean + N(0, 1), the default recipe but for what is named (smooth V "
        "includes compensate_v). The BF16 output's own rounding is 1.7e-3 of the relative L2 for mean 1.",
        "",
    ]
    for metric in ("relative_l2", "relative_bias", "lse_max_abs"):
        for v_mean in dict.fromkeys(row["v_mean"] for row in rows):
            of_mean = merged((row for row in rows if row["v_mean"] == v_mean), "variant", "keys")
            lengths = sorted({keys for _, keys in of_mean})
            lines = [
                [variant, *(_errors(of_mean.get((variant, n), {}), [metric])[0] for n in lengths)]
                for variant in dict.fromkeys(variant for variant, _ in of_mean)
            ]
            if metric == "relative_l2":
                for (kernel, mean), values in published.H200_LONG.items():
                    if mean == v_mean:
                        lines.append([f"{kernel}, H200", *(values.get(n) for n in lengths)])
            text += [f"{ERRORS[metric]}, mean of V {v_mean:g}, by keys:", ""]
            text += markdown(["", *map(str, lengths)], lines)
    return text


def _e5(rows: list[Row]) -> list[str]:
    text = [
        "Four keys score `excess` (nats) above the others, whose scores are N(0, 1), and have a tenth of the "
        "V. The kernel walks the keys from the last to the first: first-seen sinks are what a kernel meets "
        "that walks them forward.",
        "",
    ]
    for metric, title in (("relative_l2", "rel. L2"), ("zero_share", "share of the other keys' P that is 0")):
        for seen in ("first", "last"):
            cells = merged((row for row in rows if row["seen"] == seen), "variant", "excess")
            excesses = sorted({excess for _, excess in cells})
            lines = []
            for variant in dict.fromkeys(variant for variant, _ in cells):
                of_variant = [cells.get((variant, excess), {}) for excess in excesses]
                lines.append([variant, *(_number(row.get(metric), metric) for row in of_variant)])
                predicted = [row.get("predicted_zero_share") for row in of_variant]
                if metric == "zero_share" and any(p is not None for p in predicted):
                    lines.append([f"{variant}, P-Cast predicts", *(_number(p, metric) for p in predicted)])
            text += [f"{title}, sinks seen {seen}, by excess:", ""]
            text += markdown(["", *map(str, excesses)], lines)
    return text


def _number(value: object, metric: str) -> object:
    return f"{value:.3f}" if metric == "zero_share" and value is not None else value


def _e8(rows: list[Row]) -> list[str]:
    text = [
        "After Golden et al. (arXiv 2405.02803; its values are in figures only: flash attention in BF16 "
        "deviates about ten times as far as standard attention, more with length, less with larger tiles). "
        "Largest |error| against float64 of the BF16 inputs, which falls with the length as the "
        "output does; every intermediate is rounded unless `fp32 sums`. The hopper_fa rows are the kernels' "
        "own arithmetic, with BF16 output.",
        "",
    ]
    cells = merged(rows, "precision", "variant", "keys", "block")
    lengths = sorted({key[2] for key in cells})

    def errors(precision: str, variant: str) -> list[float | None]:
        block = 128 if variant == "flash" else None
        return [cells.get((precision, variant, n, block), {}).get("max_abs") for n in lengths]

    lines = []
    for precision in dict.fromkeys(key[0] for key in cells):
        flash, standard = errors(precision, "flash"), errors(precision, "standard")
        lines.append([precision, "flash", *flash])
        if any(standard):
            ratios = [f"{f / s:.1f}" if f and s else None for f, s in zip(flash, standard, strict=True)]
            lines += [[precision, "standard", *standard], [precision, "flash / standard", *ratios]]
    text += ["By keys, blocks of 128 keys:", "", *markdown(["precision", "", *map(str, lengths)], lines)]
    longest = lengths[-1]
    blocks = sorted({b for _, _, n, b in cells if n == longest and b})
    lines = [
        [precision, *(cells.get((precision, "flash", longest, b), {}).get("max_abs") for b in blocks)]
        for precision in dict.fromkeys(p for p, _, n, b in cells if n == longest and b == blocks[0])
    ]
    text += [f"Flash, {longest} keys, by block:", "", *markdown(["precision", *map(str, blocks)], lines)]
    return text


def _e9(rows: list[Row]) -> list[str]:
    text = [
        "Each row's r largest scores are equal, 8 nats above the rest, and V is negative throughout; dO is "
        "positive. 1024 keys. After arXiv 2510.04212 (no values stored): P = 1 for tied keys makes BF16 "
        "rounding of P V one-signed; maxima spread is its remedy.",
        "",
    ]
    for metric, title in (
        ("relative_bias", "bias of O"),
        ("delta_relative_bias", "bias of delta"),
        ("relative_l2", "rel. L2 of O"),
    ):  # fmt: skip
        cells = merged(rows, "variant", "ties")
        ties = sorted({r for _, r in cells})
        lines = [
            [variant, *(_signed(cells.get((variant, r), {}).get(metric), metric) for r in ties)]
            for variant in dict.fromkeys(variant for variant, _ in cells)
        ]
        text += [f"{title}, by r:", "", *markdown(["", *map(str, ties)], lines)]
    return text


def _signed(value: object, metric: str) -> object:
    return f"{value:+.1e}" if "bias" in metric and value is not None else value


def _e11(rows: list[Row]) -> list[str]:
    cells = merged(rows, "variant", "place")
    variants = list(dict.fromkeys(variant for variant, _ in cells))
    lines = []
    for place in dict.fromkeys(place for _, place in cells):
        found = [cells.get((variant, place), {"differing": 0.0, "relative_l2": 0.0}) for variant in variants]
        lines.append(
            [
                place,
                *(
                    "0" if not row["differing"] else f"{row['differing']:.0%}, {row['relative_l2']:.1e}"
                    for row in found
                ),
            ]
        )
    errors = [
        float(cells[variant, place]["error_relative_l2"]) for variant, place in cells if place == lines[0][0]
    ]
    return [
        "128 rows alone over 1024 keys, and the same rows at another place: share of the BF16 output's "
        "elements that differ, and relative L2 of the difference. Last line: the error itself.",
        "",
        *markdown(["", *variants], [*lines, ["error against float64", *errors]]),
    ]


# experiment -> title, the section's text, its plot.
SECTIONS: dict[str, tuple[str, Callable[[list[Row]], list[str]], Callable | None]] = {
    "e1": ("outliers, FlashAttention-3's Table 3", _e1, fp8_plots.e1),
    "kb": ("a bias that all keys share", _kb, None),
    "e2": ("element types of Q and K", _e2, None),
    "e3": ("granularity and smoothing", _e3, None),
    "e4": ("long contexts and the accumulator", _e4, fp8_plots.e4),
    "e5": ("attention sinks and the range of P", _e5, fp8_plots.e5),
    "e8": ("flash against standard attention, by precision", _e8, fp8_plots.e8),
    "e9": ("tied maxima and a V of one sign", _e9, fp8_plots.e9),
    "e11": ("the same rows at another place", _e11, None),
}
