"""The RMSE table from a stored report: terminal, markdown, CSV. Needs neither torch nor a GPU.

A figure is the root mean square over the draws, with the lowest and highest draw in brackets where there are several.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from verify.reports.markdown import page

WIDTH = 150
"""Columns that the widest table needs."""
PAPER = {("naive", "fp16"): 3.2e-4, ("sdpa-flash", "fp16"): 1.9e-4, ("triton-fa2", "fp16"): 1.9e-4}
"""FlashAttention-3, Table 3 (arXiv 2407.08608): baseline FP16 and FlashAttention-2 FP16; total RMSE."""
PAPER_CASE = ("b1.h16.q8192.k8192.d128.fp16.full", "outliers(0.001,10)")
COLUMNS = (
    "kernel",
    "dtype",
    "total",
    "input rounding",
    "kernel arithmetic",
    "expected",
    "measured/expected",
    "alpha - 1",
    "bias",
    "paper",
)


def pooled(row: dict[str, Any], figure: str) -> float:
    """Root mean square over the draws."""
    return math.sqrt(sum(d[figure] ** 2 for d in row["draws"]) / len(row["draws"]))


def table(report: dict[str, Any], *, style: box.Box = box.SIMPLE_HEAD) -> Table:
    """The table for a terminal, or with style=rich.box.MARKDOWN for a page."""
    shown = Table(title=title(report) if style is not box.MARKDOWN else None, box=style)
    paper = (report["problem"], report["recipe"]) == PAPER_CASE
    for name in COLUMNS if paper else COLUMNS[:-1]:
        heading = name if style is box.MARKDOWN else name.replace(" ", "\n").replace("/", "/\n")
        shown.add_column(heading, justify="left" if name in ("kernel", "dtype") else "right", no_wrap=True)
    for row in sorted(report["rows"], key=lambda r: (r["dtype"] != "fp16", r["dtype"])):
        cells = [row["kernel"], row["dtype"], *_figures(row)]
        figure = PAPER.get((row["kernel"], row["dtype"]))
        shown.add_row(*cells, *([f"{figure:.1e}" if figure else "-"] if paper else []))
    return shown


def _figures(row: dict[str, Any]) -> list[str]:
    draws, many = row["draws"], len(row["draws"]) > 1
    alpha, bias = (sum(d[name] for d in draws) / len(draws) for name in ("alpha", "bias"))
    low, high = min(d["total"] for d in draws), max(d["total"] for d in draws)
    spread = f" [{low:.1e}, {high:.1e}]" if many else ""
    expected = pooled(row, "expected")
    ratio = f"{pooled(row, 'arithmetic') / expected:.3f}" if expected else "-"
    parts = [f"{pooled(row, name):.2e}" for name in ("input", "arithmetic", "expected")]
    return [f"{pooled(row, 'total'):.2e}{spread}", *parts, ratio, f"{alpha - 1:+.1e}", f"{bias:+.1e}"]


def title(report: dict[str, Any]) -> str:
    """What was measured, and plainly whether it was reduced."""
    reduced = "REDUCED for the CPU (the full table needs a GPU): " if report["reduced"] else ""
    return f"{reduced}RMSE of out, {report['problem']}, inputs {report['recipe']}, {report['draws']} draws"


def footnotes(report: dict[str, Any]) -> str:
    """What the columns are, what could not be measured and why, and what can change a number."""
    lines = [
        "total: against FP64 attention of the unrounded inputs",
        "input rounding: FP64 attention of the rounded inputs against FP64 attention of the unrounded inputs",
        "kernel arithmetic, alpha, bias: against FP64 attention of the rounded inputs",
        "expected: FP64 emulation of the declared roundings, against FP64 attention of the rounded inputs",
    ]
    reasons: dict[tuple[str, str], list[str]] = {}
    for entry in report["unsupported"]:
        reasons.setdefault((entry["kernel"], entry["reason"]), []).append(entry["dtype"])
    lines += [
        f"not measured: {kernel} {', '.join(filter(None, dtypes))}: {reason}" for (kernel, reason), dtypes in reasons.items()
    ]
    return "\n".join([*lines, ", ".join(f"{name} {value}" for name, value in report["environment"].items())])


def write(report: dict[str, Any], folder: Path) -> None:
    """table.md and table.csv (one line for each kernel, dtype and draw) beside the stored table.json."""
    written = page(title(report), table(report, style=box.MARKDOWN), footnotes(report))
    (folder / "table.md").write_text(written, encoding="utf-8")
    figures = sorted({name for row in report["rows"] for draw in row["draws"] for name in draw})
    with (folder / "table.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "recipe", "kernel", "dtype", "draw", *figures])
        for row in report["rows"]:
            for number, draw in enumerate(row["draws"]):
                writer.writerow(
                    [report["problem"], report["recipe"], row["kernel"], row["dtype"], number, *(draw[f] for f in figures)]
                )
