"""The speed table from a stored benchmark: terminal, markdown, CSV, plot. Needs neither torch nor a
GPU.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from verify.reports import pages

BASELINE = "sdpa-flash"
FIGURES = ("ms", "tflops", "rmse")


HEADINGS = [
    "problem",
    "kernel",
    *(f"{w} {x}" for w in ("fwd", "bwd") for x in ("TFLOP/s", "x flash", "x best", "RMSE")),
]


def rows(report: dict[str, Any]) -> list[list[str]]:
    """A line for each problem and kernel, forward and backward."""
    both = ("forward", "backward")
    return [
        [row["problem"], row["kernel"], *(c for w in both for c in _cells(report, row, w))]
        for row in report["rows"]
    ]


def table(report: dict[str, Any]) -> Table:
    """The table for a terminal."""
    shown = Table(title="speed, beside the error of the same call", box=box.SIMPLE_HEAD)
    for name in HEADINGS:
        left: Any = "left" if name in pages.LEFT else "right"
        shown.add_column(name.replace(" ", "\n", 1), justify=left, no_wrap=True)
    before = None
    for problem, *cells in rows(report):
        shown.add_row(problem if problem != before else "", *cells)
        before = problem
    return shown


def _cells(report: dict[str, Any], row: dict[str, Any], which: str) -> list[str]:
    if "tflops" not in row.get(which, {}):
        return ["-"] * 4
    own, others = (
        row[which],
        [
            r
            for r in report["rows"]
            if r["problem"] == row["problem"] and "tflops" in r.get(which, {})
        ],
    )
    flash = next((r[which]["tflops"] for r in others if r["kernel"] == BASELINE), None)
    best = max(r[which]["tflops"] for r in others)
    relative = [f"{own['tflops'] / other:.2f}" if other else "-" for other in (flash, best)]
    return [f"{own['tflops']:.0f}", *relative, f"{own['rmse']:.2e}"]


def _stages(report: dict[str, Any], row: dict[str, Any]) -> str:
    """The parts of a forward, in ms; of `attention` also how fast it is."""
    others = {
        r["kernel"]: r["forward"]["tflops"]
        for r in report["rows"]
        if r["problem"] == row["problem"] and "tflops" in r["forward"]
    }
    parts = [f"{name} {ms:.3f} ms" for name, ms in row["stages"].items()]
    if "attention" in row["stages"]:
        speed = row["forward"]["tflops"] * row["forward"]["ms"] / row["stages"]["attention"]
        ratios = [
            f"{speed / tflops:.2f} x {kernel}"
            for kernel, tflops in others.items()
            if kernel != row["kernel"]
        ]
        parts.append(f"attention alone {speed:.0f} TFLOP/s, {', '.join(ratios)}")
    return f"{row['kernel']}, {row['problem']}: {', '.join(parts)}"


def footnotes(report: dict[str, Any]) -> list[str]:
    """What a figure is, what was not measured and why, and what can change a number."""
    lines = [
        "TFLOP/s: 4 B H N^2 D operations forward, half where causal, 2.5 times that backward, over "
        "the median of"
        f" {report['repeats']} calls between CUDA events; launches are queued ahead, so the host's "
        "time is not in it",
        f"x flash: against {BASELINE} in this run; x best: against the fastest of this run",
        "RMSE: of out, and of dq, dk, dv together, in the first batch entry, against FP64 "
        "attention of the same N(0,1) inputs",
    ]
    lines += [_stages(report, row) for row in report["rows"] if row.get("stages")]
    measured = [
        (r["kernel"], which, r[which])
        for r in report["rows"]
        for which in ("forward", "backward")
        if which in r
    ]
    reasons = dict.fromkeys(
        (kernel, which, found["reason"]) for kernel, which, found in measured if "reason" in found
    )
    lines += [f"not measured: {kernel} {which}: {reason}" for kernel, which, reason in reasons]
    lines += [
        f"unavailable: {entry['kernel']}: {entry['reason']}" for entry in report["unavailable"]
    ]
    return [*lines, ", ".join(f"{name} {value}" for name, value in report["environment"].items())]


def write(report: dict[str, Any], folder: Path) -> None:
    """speed.md and speed.csv beside the stored speed.json."""
    written = pages.markdown("Speed", HEADINGS, rows(report), footnotes(report))
    (folder / "speed.md").write_text(written, encoding="utf-8")
    with (folder / "speed.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "kernel", "direction", *FIGURES, "reason"])
        for row in report["rows"]:
            for which in ("forward", "backward"):
                found = row.get(which, {})
                writer.writerow(
                    [
                        row["problem"],
                        row["kernel"],
                        which,
                        *(found.get(f, "") for f in (*FIGURES, "reason")),
                    ]
                )


def plot(report: dict[str, Any], folder: Path) -> str:
    """speed.png, TFLOP/s against length for each head dim, mask and direction; a sentence to append
    where it cannot be drawn.
    """
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 - optional, and slow to load
    except ImportError:
        return " (no plot: pip install matplotlib)"
    series: dict[tuple[int, str, str], dict[str, list[tuple[int, float]]]] = {}
    for row in report["rows"]:
        found = re.search(r"\.q(\d+)\.k\d+\.d(\d+)\.\w+\.(\w+)", row["problem"])
        for which in ("forward", "backward"):
            if found and "tflops" in row.get(which, {}):
                panel = series.setdefault((int(found[2]), found[3], which), {})
                panel.setdefault(row["kernel"], []).append((int(found[1]), row[which]["tflops"]))
    if not series:
        return ""
    down, across = (
        sorted({(mask, which) for _, mask, which in series}),
        sorted({dim for dim, _, _ in series}),
    )
    figure = Figure(figsize=(4.5 * len(across), 3.2 * len(down)), layout="constrained")
    panels = figure.subplots(len(down), len(across), squeeze=False)
    for (dim, mask, which), lines in series.items():
        axes = panels[down.index((mask, which))][across.index(dim)]
        for kernel, points in lines.items():
            axes.plot(*zip(*sorted(points), strict=True), marker="o", label=kernel)
        axes.set(
            title=f"{which}, D {dim}, {mask}", xlabel="length", ylabel="TFLOP/s", ylim=(0, None)
        )
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    fullest = max(series, key=lambda panel: len(series[panel]))
    panels[down.index(fullest[1:])][across.index(fullest[0])].legend(fontsize="small")
    figure.savefig(folder / "speed.png", dpi=120)
    return ", .png"
