"""An exact answer with a certified error, for small problems: by ball arithmetic where python-flint
is installed, else by mpmath.

It takes over where the float64 oracle is no better than what it judges: for kernels that compute in
FP64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verify.bounds.exact import Exact
from verify.oracles import arb, mpmath_oracle
from verify.spec.case import Inputs
from verify.spec.problem import Problem

DIGITS = 50
ROUNDING, SMALLEST = 2.0**-53, 2.0**-1074
"""Of a number of so many digits to float64: relative, and among subnormals."""
AFFORDABLE = {"flint": 1_000_000, "mpmath": 20_000}
"""Multiply-adds per product, as arb.work counts them, or without what a score costs: some 30 ms."""


def exact(problem: Problem, inputs: Inputs) -> tuple[Exact, dict[str, Tensor]] | None:
    """(the answer rounded to float64, what each tensor may be off by) on the inputs' device; None
    where it is too large.
    """
    device = inputs.q.device
    if arb.available():
        if arb.work(problem) > AFFORDABLE["flint"]:
            return None
        answer, off = arb.exact(problem, inputs)
        if not all(bool(t.isfinite().all()) for t in off.values()):  # scores beyond 2^256
            return None
        moved = {name: getattr(answer, name).to(device) for name in off}
        return Exact(**moved, provenance=answer.provenance), {
            name: t.to(device) for name, t in off.items()
        }
    scores = problem.batch * problem.heads_q * problem.len_q * problem.len_k
    if scores * (problem.dim_qk + problem.dim_v) > AFFORDABLE["mpmath"]:
        return None
    found = mpmath_oracle.exact(problem, inputs, digits=DIGITS)
    values = {
        n: torch.tensor([float(x) for x in a.ravel()], dtype=torch.float64).view(a.shape).to(device)
        for n, a in found.items()
    }
    off = {n: v.abs().nan_to_num(posinf=0.0) * ROUNDING + SMALLEST for n, v in values.items()}
    return Exact(**values, provenance=f"mpmath, {DIGITS} digits"), off
