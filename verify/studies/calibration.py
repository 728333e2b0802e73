"""How often honest kernels alarm at each level, observed and nominal: ``python -m
verify.studies.calibration --help``.

Honest kernels are emulations of the declared arithmetic in another order, with other roundings of
FP32. The problems are a grid, with those on which roundings depend on each other: a bias that
dominates, one column, few rows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Annotated

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from verify.oracles.emulator import emulate
from verify.oracles.formats import Jittered
from verify.reference.reference import truth
from verify.spec.arithmetic import FLASH, Arithmetic
from verify.spec.case import Case

LEVELS = (1e-1, 1e-2, 1e-3)
GRID = {
    "usual": "b1.h4.q128.k160.d32.{dtype}.full.grads",
    "causal, groups": "b2.h4:2.q96.k96.d16.{dtype}.causal_lower_right.grads",
    "window": "b1.h2.q200.k200.d8.{dtype}.window(17,0).grads",
    "softcap": "b1.h2.q64.k64.d16.{dtype}.full.softcap=30.0",
    "bias": "b1.h3.q96.k64.d16.{dtype}.full.bias=bhqk.grads",
    "ALiBi": "b1.h2.q215.k215.d16.{dtype}.full.bias=alibi",
    "ALiBi alone": "b1.h4.q256.k113.d1.{dtype}.full.bias=alibi.scale=1.0",
    "one column": "b1.h4.q160.k96.d1.{dtype}.full.grads",
    "one column of V": "b1.h4.q160.k96.d16:1.{dtype}.full.grads",
    "few rows": "b1.h2.q4.k300.d64.{dtype}.full.grads",
    "one row": "b1.h8.q1.k512.d64.{dtype}.full",
    "few keys": "b1.h4.q256.k3.d16.{dtype}.full.grads",
}
"""Problems by what is special about them."""
INPUTS = ("normal", "normal(5)", "tiny", "uniform", "one_sign", "rising(30)", "uneven_heads")
DECLARED = {"FA-2": FLASH, "row sum of rounded P": Arithmetic(rowsum="rounded")}
OTHERS = (
    Arithmetic(tile=16),
    Arithmetic(exp="binary", splits=3),
    Arithmetic(rowsum="rounded", tile=64),
)
"""Honest kernels."""


def main(
    seeds: Annotated[int, typer.Option(help="seeds of each problem and inputs")] = 4,
    seed: Annotated[int, typer.Option(help="the first of them")] = 0,
) -> None:
    """Print the share of judged tensors that alarm at each level, by problem."""
    torch.set_num_threads(1)
    judged: Counter[str] = Counter()
    alarms: Counter[tuple[str, float]] = Counter()
    for name, problem in GRID.items():
        for dtype in ("fp16", "bf16"):
            for inputs in INPUTS:
                for number in range(seed, seed + seeds):
                    case = Case.parse(f"{problem.format(dtype=dtype)}/{inputs}#{number}")
                    _count(name, case, judged, alarms)
    table = Table("problem", "tensors", *(f"at {level:g}" for level in LEVELS), box=box.MARKDOWN)
    for name in [*GRID, ""]:
        total = judged[name] if name else judged.total()
        counts = [
            sum(n for (of, at), n in alarms.items() if at == level and name in ("", of))
            for level in LEVELS
        ]
        table.add_row(name or "all", str(total), *(f"{n / max(1, total):.1e}" for n in counts))
    Console(width=120).print(table)


def _count(name: str, case: Case, judged: Counter[str], alarms: Counter[tuple[str, float]]) -> None:
    known = truth(case, "cpu")
    tensors = ("out", "lse", "dq", "dk", "dv") if case.problem.grads else ("out", "lse")
    for declared in DECLARED.values():
        expected = known.expectation(declared)
        if expected is None:
            continue
        for other in OTHERS:
            if other.rowsum != declared.rowsum:
                continue
            got = emulate(known.problem, known.inputs, other, Jittered())
            for tensor in tensors:
                judged[name] += 1
                for level in LEVELS:
                    found = replace(expected, alarm=level).surprise(tensor, getattr(got, tensor))
                    alarms[name, level] += found is not None


if __name__ == "__main__":
    typer.run(main)
