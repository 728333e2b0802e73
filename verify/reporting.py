"""`verify report`: measure every kernel's RMSE on the same draws, split into input rounding and kernel arithmetic.

total              kernel's out against exact attention of the unrounded inputs (what FlashAttention-3's Table 3 prints)
input rounding     exact attention of the rounded inputs against exact attention of the unrounded ones
kernel arithmetic  kernel's out against exact attention of the rounded inputs
expected           the emulation of the kernel's declared arithmetic against exact attention of the rounded inputs
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from verify import environment, registry
from verify.arithmetic import Arithmetic
from verify.case import Case
from verify.errors import VerifyError
from verify.exact import Exact
from verify.finding import Finding
from verify.guard import call
from verify.measure import measure
from verify.oracles import dense, rounded
from verify.problem import Problem
from verify.recipes import Recipe
from verify.reports import rmse_table

PAPER_SHAPE = "b1.h16.q8192.k8192.d128.fp16.full"
REDUCED = "b1.h2.q512.k512.d128.fp16.full"
DRAWS = {"cuda": 4, "cpu": 2}
DTYPES = ("fp16", "bf16")


def run_report(
    device: str,
    *,
    problem: str | None,
    recipe: str,
    targets: list[str],
    dtypes: list[str],
    draws: int | None,
    out: Path,
    console: Console,
) -> None:
    """Measure, print the table and write table.md, table.csv, table.json below `out`.

    Raises VerifyError for a bad id, an unknown kernel or a folder that cannot be written, before anything is measured.
    """
    shape, family = Problem.parse(problem or (PAPER_SHAPE if device == "cuda" else REDUCED)), Recipe.parse(recipe)
    wanted = dtypes or list(DTYPES if problem is None else (shape.dtype,))
    problems = [shape.but(dtype=name) for name in wanted]
    registry.load_bundled()
    kernels = [k for t in targets for k in registry.find(t)] or list(registry.REGISTRY.values())
    path = writable(out / "table.json")
    report: dict[str, Any] = {
        "schema": 1,
        "problem": str(shape),
        "recipe": str(family),
        "draws": draws or DRAWS[device],
        "reduced": problem is None and device == "cpu",
        "environment": environment.describe(device),
        "rows": [],
        "unsupported": [
            {"kernel": name, "dtype": "", "reason": reason} for name, reason in registry.UNAVAILABLE.items() if not targets
        ],
    }
    _measure(report, Case(shape, family), problems, kernels, device, path, console)
    rmse_table.write(report, out)
    console.print(rmse_table.table(report))
    console.print(rmse_table.footnotes(report), markup=False)
    console.print(f"written: {', '.join(str(out / f'table.{suffix}') for suffix in ('md', 'csv', 'json'))}", markup=False)


def _measure(
    report: dict[str, Any],
    case: Case,
    problems: list[Problem],
    kernels: list[registry.Kernel],
    device: str,
    path: Path,
    console: Console,
) -> None:
    """Fill in the report's rows, a draw at a time, and store it after every figure."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=report["draws"] * len(problems) * len(kernels))
        for seed in range(report["draws"]):
            for name, dtype, figures in _draw(replace(case, seed=seed), problems, kernels, device):
                progress.update(task, advance=1, description=f"draw {seed}: {name} {dtype}")
                if isinstance(figures, str):
                    reason = {"kernel": name, "dtype": dtype, "reason": figures}
                    report["unsupported"] += [reason] if reason not in report["unsupported"] else []
                else:
                    row = rows.setdefault((name, dtype), {"kernel": name, "dtype": dtype, "draws": []})
                    row["draws"].append(figures)
                report["rows"] = list(rows.values())
                path.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _draw(
    case: Case, problems: list[Problem], kernels: list[registry.Kernel], device: str
) -> Iterator[tuple[str, str, dict[str, float] | str]]:
    """(kernel, dtype, its figures on this draw, or why there are none)"""
    wide = case.problem.but(dtype="fp64")
    drawn = case.draw().map(lambda t: t.to(device))
    unrounded = dense.exact(wide, drawn).out
    for problem in problems:
        inputs = drawn.rounded(problem.dtype)
        exact = dense.exact(problem, inputs)
        emulated: dict[Arithmetic, Exact] = {}
        for kernel in kernels:
            reason = kernel.unsupported(problem, device)
            if reason:
                yield kernel.name, problem.dtype, reason
                continue
            arithmetic = replace(kernel.numerics(problem, device), summation="nearest")  # ten times as fast, the same RMSE
            if arithmetic not in emulated:
                emulated[arithmetic] = rounded.emulate(problem, inputs, arithmetic)
            try:
                result = call(kernel, problem, inputs).out
            except Finding as finding:
                yield kernel.name, problem.dtype, finding.sentence
                continue
            yield kernel.name, problem.dtype, _figures(result, unrounded, exact.out, emulated[arithmetic].out)


def _figures(out: torch.Tensor, unrounded: torch.Tensor, exact: torch.Tensor, emulated: torch.Tensor) -> dict[str, float]:
    own = measure(out, exact)
    return {
        "total": measure(out, unrounded).rmse,
        "input": measure(exact, unrounded).rmse,
        "arithmetic": own.rmse,
        "expected": measure(emulated, exact).rmse,
        "alpha": own.alpha,
        "bias": own.bias,
        "max": own.max_abs,
        "size": own.size,
    }


def writable(path: Path) -> Path:
    """The path of a file that exists and can be written. Raises VerifyError, naming its folder, where it can't."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError as error:
        raise VerifyError(f"out={path.parent}: {error.strerror}; name a folder that can be written") from error
    return path
