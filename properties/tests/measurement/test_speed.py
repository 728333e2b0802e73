"""The speed table from a stored benchmark, and what `verify bench` counts as work."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from verify.errors import VerifyError
from verify.measurement.speed import operations, run_bench
from verify.reports import speed_table
from verify.spec.problem import Problem

ROWS = [
    {
        "kernel": "sdpa-flash",
        "problem": "b1.h2.q64.k64.d8.bf16.full",
        "forward": {"ms": 2.0, "tflops": 200.0, "rmse": 1e-3},
    },
    {
        "kernel": "mine",
        "problem": "b1.h2.q64.k64.d8.bf16.full",
        "forward": {"ms": 1.0, "tflops": 400.0, "rmse": 2e-3},
    },
    {
        "kernel": "theirs",
        "problem": "b1.h2.q64.k64.d8.bf16.full",
        "forward": {"reason": "out of memory"},
    },
]
ROWS[1]["stages"] = {"quantise": 0.2, "attention": 0.8}
REPORT = {
    "schema": 1,
    "repeats": 3,
    "rows": ROWS,
    "unavailable": [],
    "environment": {"device": "a GPU"},
}


def test_ratios_and_reasons(tmp_path: Path) -> None:
    speed_table.write(json.loads(json.dumps(REPORT)), tmp_path)
    page = (tmp_path / "speed.md").read_text(encoding="utf-8")
    mine = next(line for line in page.splitlines() if " mine " in line)
    assert [cell.strip() for cell in mine.split("|")[3:7]] == ["400", "2.00", "1.00", "2.00e-03"]
    assert (
        "mine, b1.h2.q64.k64.d8.bf16.full: quantise 0.200 ms, attention 0.800 ms, attention alone "
        "500 TFLOP/s, 2.50 x sdpa-flash" in page
    )
    assert "not measured: theirs forward: out of memory" in page
    with (tmp_path / "speed.csv").open(encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    assert [line["tflops"] for line in lines if line["direction"] == "forward"] == [
        "200.0",
        "400.0",
        "",
    ]


def test_the_plot_is_drawn_or_said_to_be_missing(tmp_path: Path) -> None:
    said = speed_table.plot(REPORT, tmp_path)
    assert (tmp_path / "speed.png").exists() == ("pip install" not in said)


@pytest.mark.parametrize(("mask", "share"), [("full", 1), ("causal_lower_right", 2)])
def test_operations_are_the_papers(mask: str, share: int) -> None:
    """4 B H N^2 D, half where causal: FlashAttention-3, section 4.1."""
    assert (
        operations(Problem.parse(f"b2.h3.q16.k16.d64.bf16.{mask}"))
        == 4 * 2 * 3 * 16**2 * 64 / share
    )


def test_without_a_gpu_nothing_is_timed(tmp_path: Path) -> None:
    shapes: dict[str, Any] = dict.fromkeys(("dims", "lengths", "masks")) | {
        "dtype": "bf16",
        "forward_only": False,
    }
    with pytest.raises(
        VerifyError, match="device=cpu: speed is measured with CUDA events, on a GPU"
    ):
        run_bench("cpu", targets=[], out=tmp_path, console=Console(), **shapes)
