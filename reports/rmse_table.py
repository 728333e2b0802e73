"""The RMSE tables of a stored report: what is in a cell. Needs neither torch nor a GPU.

A figure is the root mean square over the draws, in brackets its 95 % confidence interval: Student's
t on the mean squares, the draws being independent. Draws are the same for every row, so that rows
are compared draw by draw (reports/comparison.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from scipy import stats

from verify.reports import pages

SCHEMA = 2
CONFIDENCE = 0.95
PAPER = {
    "naive": ("baseline FP16", 3.2e-4),
    "sdpa-flash": ("FlashAttention-2 FP16", 1.9e-4),
    "fa3": ("FlashAttention-3 FP16", 1.9e-4),
    "naive-fp8": ("baseline FP8", 2.4e-2),
    "fp8-blocks-rotated": ("FlashAttention-3 FP8", 9.1e-3),
    "fp8-rotated": ("FlashAttention-3 FP8, no block quantisation", 9.3e-3),
    "fp8-head": ("FlashAttention-3 FP8, no incoherent processing", 2.4e-2),
}
"""FlashAttention-3's Table 3 (arXiv 2407.08608): total RMSE, inputs in FP16, of the kernel that
does what that row says.
"""
PAPER_CASE = ("b1.h16.q8192.k8192.d128.fp16.full", "outliers(0.001,10)")
HEADINGS = (
    "total",
    "input rounding, quantisation",
    "kernel arithmetic",
    "expected",
    "measured / expected",
    "alpha - 1",
    "bias",
)
NOTES = (
    "total: against FP64 attention of the unrounded inputs (what the paper prints)",
    "input rounding, quantisation: FP64 attention of the values that the kernel multiplies against "
    "that of the unrounded inputs",
    "kernel arithmetic, alpha, bias: against FP64 attention of the values that the kernel "
    "multiplies",
    "expected: FP64 emulation of the declared roundings, against the same; of the first draw, as "
    "is measured / expected",
    "where a kernel quantises, its error is split in the first few draws; total is of all",
)


def squares(row: dict[str, Any], figure: str) -> list[float]:
    """The figure's square in each draw that has it."""
    return [draw[figure] ** 2 for draw in row["draws"] if figure in draw]


def student(values: Sequence[float]) -> tuple[float, float] | None:
    """Student's confidence interval of the mean of independent values; None where there are fewer
    than two.
    """
    if len(values) < 2:
        return None
    if min(values) == max(values):
        return values[0], values[0]
    low, high = stats.ttest_1samp(values, 0.0).confidence_interval(CONFIDENCE)
    return float(low), float(high)


def pooled(row: dict[str, Any], figure: str) -> float:
    """Root mean square over the draws; NaN without any."""
    found = squares(row, figure)
    return math.sqrt(sum(found) / len(found)) if found else math.nan


def interval(row: dict[str, Any], figure: str) -> tuple[float, float] | None:
    """Confidence interval of `pooled`; None where fewer than two draws have the figure."""
    bounds = student(squares(row, figure))
    return bounds and (math.sqrt(max(0.0, bounds[0])), math.sqrt(bounds[1]))


def ratio(row: dict[str, Any]) -> float:
    """Kernel arithmetic over expected, in the draws that were emulated."""
    both = [draw for draw in row["draws"] if "expected" in draw]
    below = sum(draw["expected"] ** 2 for draw in both)
    return math.sqrt(sum(draw["arithmetic"] ** 2 for draw in both) / below) if below else math.nan


def cells(section: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of text) of one section."""
    rows = section["rows"]
    several = (
        len({(row["problem"].replace(f".{row['dtype']}.", "."), row["recipe"]) for row in rows}) > 1
    )
    tensors = any(row["tensor"] != "out" for row in rows)
    paper = any(_paper(row) for row in rows)
    headings = [
        "kernel",
        *(["inputs"] if several else ["dtype"]),
        *(["tensor"] if tensors else []),
        *HEADINGS,
    ]
    shown = []
    for row in rows:
        where = f"{row['problem']}/{row['recipe']}" if several else row["dtype"]
        words = [row["kernel"], where, *([row["tensor"]] if tensors else [])]
        shown.append([*words, *_figures(row), *(_beside(row) if paper else [])])
    return [*headings, *(["paper", "ours / paper"] if paper else [])], shown


def _figures(row: dict[str, Any]) -> list[str]:
    bounds = interval(row, "total")
    spread = f" [{bounds[0]:.2e}, {bounds[1]:.2e}]" if bounds else ""
    parts = [f"{pooled(row, name):.2e}" for name in ("input", "arithmetic", "expected")]
    split = [draw for draw in row["draws"] if "alpha" in draw]
    alpha, bias = (
        sum(draw[name] for draw in split) / max(1, len(split)) for name in ("alpha", "bias")
    )
    return [
        f"{pooled(row, 'total'):.2e}{spread}",
        *parts,
        f"{ratio(row):.3f}",
        f"{alpha - 1:+.1e}",
        f"{bias:+.1e}",
    ]


def _paper(row: dict[str, Any]) -> tuple[str, float] | None:
    return PAPER.get(row["kernel"]) if (row["problem"], row["recipe"]) == PAPER_CASE else None


def _beside(row: dict[str, Any]) -> list[str]:
    figure = _paper(row)
    return (
        [f"{figure[1]:.1e} {figure[0]}", f"{pooled(row, 'total') / figure[1]:.2f}"]
        if figure
        else ["-", "-"]
    )


def table(section: dict[str, Any], *, reduced: bool) -> Table:
    """A section for a terminal."""
    headings, rows = cells(section)
    shown = Table(title=title(section, reduced=reduced), title_justify="left", box=box.SIMPLE_HEAD)
    for name in headings:
        side: Any = "left" if name in pages.LEFT else "right"
        shown.add_column(
            name.replace(", ", ",\n").replace(" / ", " /\n"), justify=side, no_wrap=name != "paper"
        )
    for row in rows:
        shown.add_row(*row)
    return shown


def title(section: dict[str, Any], *, reduced: bool) -> str:
    """What was measured, and plainly whether it was reduced."""
    note = "REDUCED for the CPU (the full table needs a GPU): " if reduced else ""
    draws = max((len(row["draws"]) for row in section["rows"]), default=0)
    return f"{note}{section['title']}; {draws} draws"


def footnotes(report: dict[str, Any]) -> list[str]:
    """What the columns are, what could not be measured and why, and what can change a number."""
    reasons: dict[tuple[str, str], dict[str, None]] = {}
    for entry in report["unsupported"]:
        reasons.setdefault((entry["kernel"], entry["reason"]), {})[entry["dtype"]] = None
    lines = [
        f"not measured: {kernel} {', '.join(filter(None, dtypes))}: {reason}"
        for (kernel, reason), dtypes in reasons.items()
    ]
    return [
        *NOTES,
        *lines,
        ", ".join(f"{name} {value}" for name, value in report["environment"].items()),
    ]


def rows_of(report: dict[str, Any]) -> dict[tuple[str, ...], dict[str, Any]]:
    """Every row by what it measures."""
    keys = ("kernel", "problem", "recipe", "tensor")
    return {
        tuple(row[k] for k in keys): row
        for section in report["sections"]
        for row in section["rows"]
    }
