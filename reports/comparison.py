"""Two stored reports side by side: what moved, by how much, and whether by more than the noise.
Needs neither torch nor a GPU.

Draw n is of the same inputs in both, so rows are compared draw by draw: the mean logarithm of the
ratio and Student's t interval.
"""

from __future__ import annotations

import math
from typing import Any

from rich import box
from rich.table import Table

from verify.reports.rmse_table import pooled, rows_of, student

COMPARED = ("total", "arithmetic")


def change(
    old: dict[str, Any], new: dict[str, Any], figure: str
) -> tuple[float, tuple[float, float] | None]:
    """(new / old, its confidence interval), over the draws that both have; no interval for one
    draw, 1 where all are equal.
    """
    pairs = [
        (a[figure], b[figure])
        for a, b in zip(old["draws"], new["draws"], strict=False)
        if figure in a and figure in b
    ]
    if any(min(pair) <= 0 for pair in pairs) or not pairs:
        return (1.0 if all(a == b for a, b in pairs) else math.nan), None
    logs = [math.log(b / a) for a, b in pairs]
    bounds = student(logs)
    return math.exp(sum(logs) / len(logs)), bounds and (math.exp(bounds[0]), math.exp(bounds[1]))


def verdict(found: float, bounds: tuple[float, float] | None) -> str:
    """One word or two: same, moved (more than the noise), within noise, or that one draw cannot
    tell.
    """
    if found == 1.0 and bounds in (None, (1.0, 1.0)):
        return "same"
    if bounds is None:
        return "one draw: cannot tell" if not math.isnan(found) else "not comparable"
    return "within noise" if bounds[0] <= 1.0 <= bounds[1] else "moved"


def table(old: dict[str, Any], new: dict[str, Any]) -> Table:
    """A line for each row and figure that both have."""
    shown = Table(title="new / old, paired draws", title_justify="left", box=box.SIMPLE_HEAD)
    for name in (
        "kernel",
        "inputs",
        "tensor",
        "figure",
        "old",
        "new",
        "new / old",
        "95 %",
        "verdict",
    ):
        shown.add_column(
            name, justify="right" if name in ("old", "new", "new / old", "95 %") else "left"
        )
    before, after = rows_of(old), rows_of(new)
    for key in before.keys() & after.keys():
        kernel, problem, recipe, tensor = key
        for figure in COMPARED:
            found, bounds = change(before[key], after[key], figure)
            spread = f"[{bounds[0]:.3f}, {bounds[1]:.3f}]" if bounds else "-"
            figures = [f"{pooled(row[key], figure):.2e}" for row in (before, after)]
            shown.add_row(
                kernel,
                f"{problem}/{recipe}",
                tensor,
                figure,
                *figures,
                f"{found:.3f}",
                spread,
                verdict(found, bounds),
            )
    return shown


def only_in_one(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Rows without a counterpart, and what differs between the machines."""
    before, after = rows_of(old), rows_of(new)
    lines = [f"only in the old report: {' '.join(key)}" for key in before.keys() - after.keys()]
    lines += [f"only in the new report: {' '.join(key)}" for key in after.keys() - before.keys()]
    names = dict.fromkeys([*old["environment"], *new["environment"]])
    was, now = (
        {name: report["environment"].get(name, "none") for name in names} for report in (old, new)
    )
    return sorted(lines) + [
        f"{name}: {was[name]}, now {now[name]}" for name in names if was[name] != now[name]
    ]
