"""What each choice of FP8 quantisation is worth, without a kernel: ``python -m
verify.studies.fp8_choices``.

RMSE of exact attention of the quantised operands against that of the operands; each choice against
FlashAttention-3's (blocks, incoherent processing), paired draws: mean ratio and its 95 % interval.
The table stands in kernels/FP8.md.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from verify import environment
from verify.bounds.metrics import measure
from verify.oracles import float64
from verify.oracles.quantised import dequantised
from verify.reports.comparison import change
from verify.reports.rmse_table import pooled
from verify.spec.case import Case

environment.prepare()  # before anything imports Triton
from verify.kernels.fp8_choices import CHOICES as KERNELS  # noqa: E402
from verify.kernels.triton.fp8 import BEST  # noqa: E402

PAPER = KERNELS["fp8-blocks-rotated"]
CHOICES = {
    "per tensor": KERNELS["fp8-tensor"],
    "per head": KERNELS["fp8-head"],
    "blocks": KERNELS["fp8-blocks"],
    "rotated, per head": replace(PAPER, rows=0),
    "V by column": KERNELS["fp8-blocks-rotated-columns"],
    "centred": replace(PAPER, centred=True),
    "Q fitted": replace(PAPER, fitted=True),
    "V balanced": replace(PAPER, balanced=True),
    "all (triton-fp8)": BEST,
    "all, e5m2": KERNELS["fp8-e5m2"],
}
RECIPES = (
    "outliers(0.001,10)",
    "normal",
    "sink",
    "one_sign",
    "uniform",
    "shift(90)",
    "hot_channel",
    "rising",
)


def main(
    length: Annotated[int, typer.Option(help="queries and keys")] = 1024,
    heads: Annotated[int, typer.Option()] = 4,
    draws: Annotated[int, typer.Option(min=2)] = 12,
    device: Annotated[str | None, typer.Option()] = None,
) -> None:
    """Print the table."""
    device = environment.prepare(device)
    table = Table("inputs", "FlashAttention-3's", *CHOICES, box=box.MARKDOWN)
    for recipe in track(RECIPES, transient=True):
        rows: dict[str, dict[str, Any]] = {name: {"draws": []} for name in ("", *CHOICES)}
        for seed in range(draws):
            case = Case.parse(f"b1.h{heads}.q{length}.k{length}.d128.fp16.full/{recipe}#{seed}")
            inputs = case.inputs(device)
            exact = float64.exact(case.problem, inputs).out
            for name, how in {"": PAPER, **CHOICES}.items():
                left = float64.exact(case.problem, dequantised(case.problem, inputs, how)).out
                rows[name]["draws"].append({"total": measure(left, exact).rmse})
        ratios = []
        for name in CHOICES:
            ratio, bounds = change(rows[""], rows[name], "total")
            low, high = bounds or (ratio, ratio)
            ratios.append(f"{ratio:.3f} [{low:.2f}, {high:.2f}]")
        table.add_row(recipe, f"{pooled(rows[''], 'total'):.2e}", *ratios)
    Console(width=260, highlight=False).print(table)


if __name__ == "__main__":
    typer.run(main)
