"""An exact answer with a certified error, for small problems, by ball arithmetic.

It takes over where the float64 oracle is no better than what it judges: for kernels that compute in
FP64.
"""

from __future__ import annotations

from torch import Tensor

from verify.bounds.exact import Exact
from verify.oracles import arb
from verify.spec.case import Inputs
from verify.spec.problem import Problem

AFFORDABLE = 1_000_000
"""Multiply-adds per product, as arb.work counts them: some 30 ms."""
BITS = (256, 1280)
"""Tried in turn: scores beyond 2**200 need more than the first; float64 ends at 2**1024."""
ENOUGH = 2.0**-50
"""An error of this part of a tensor's largest element needs no more bits."""


def exact(problem: Problem, inputs: Inputs) -> tuple[Exact, dict[str, Tensor]] | None:
    """(the answer rounded to float64, what each tensor may be off by) on the inputs' device; None
    where the problem is too large or the answer beyond float64, and without python-flint.
    """
    if not arb.available() or arb.work(problem) > AFFORDABLE:
        return None
    for bits in BITS:
        answer, off = arb.exact(problem, inputs, bits=bits)
        if all(_enough(getattr(answer, name), error) for name, error in off.items()):
            break
    if not all(bool(error.isfinite().all()) for error in off.values()):
        return None
    device = inputs.q.device
    moved = {name: getattr(answer, name).to(device) for name in off}
    return Exact(**moved, provenance=answer.provenance), {n: t.to(device) for n, t in off.items()}


def _enough(value: Tensor, error: Tensor) -> bool:
    sizes = value.abs().nan_to_num(posinf=0.0)  # an empty row's LSE is exact
    return not value.numel() or bool(error.max() <= ENOUGH * sizes.max())
