"""The RMSE report as plots: error against length, and of each row of Table 3 how much is
quantisation and how much arithmetic.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from verify.reports.rmse_table import pooled


def plot(report: dict[str, Any], folder: Path) -> str:
    """lengths.png and rows.png, of what the report has; a sentence to append to the names of what
    was written.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional, and slow to load
    except ImportError:
        return " (no plots: pip install matplotlib)"
    sections = {
        section["name"]: section["rows"] for section in report["sections"] if section["rows"]
    }
    written = []
    for name, draw in (("lengths", _lengths), ("table3", _rows)):
        if name in sections:
            figure = Figure(figsize=(11, 4.5), layout="constrained")
            draw(figure, sections[name])
            figure.savefig(folder / f"{name}.png", dpi=120)
            written.append(str(folder / f"{name}.png"))
    return "".join(f", {path}" for path in written)


def _lengths(figure: Any, rows: list[dict[str, Any]]) -> None:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    for axes, dtype in zip(figure.subplots(1, len(dtypes), squeeze=False)[0], dtypes, strict=True):
        lines: dict[str, list[tuple[int, float]]] = {}
        for row in rows:
            found = re.search(r"\.q(\d+)\.", row["problem"])
            if found and row["dtype"] == dtype:
                lines.setdefault(row["kernel"], []).append((int(found[1]), pooled(row, "total")))
        for kernel, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=kernel)
        axes.set(title=f"total RMSE, {dtype}", xlabel="length", xscale="log", yscale="log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="x-small")


def _rows(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Each row's input rounding or quantisation beside its own arithmetic."""
    axes = figure.subplots()
    names = [f"{row['kernel']} {row['dtype']}" for row in rows]
    places = range(len(rows))
    for shift, figure_name in ((-0.2, "input"), (0.2, "arithmetic")):
        axes.bar(
            [n + shift for n in places],
            [pooled(row, figure_name) for row in rows],
            width=0.4,
            label=figure_name,
        )
    axes.set(yscale="log", ylabel="RMSE")
    axes.set_xticks(list(places), names, rotation=60, ha="right", fontsize="x-small")
    axes.legend(["input rounding, quantisation", "kernel arithmetic"])
