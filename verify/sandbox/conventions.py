"""What a kernel does otherwise than the oracle, and legitimately so, as it declares: which key head
a query head uses, the base of its LSE, what a row that sees no key gives. Translated where it is
called, so that every property judges it as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from verify.registry import Kernel
from verify.spec.case import has_empty_row, visibility
from verify.spec.problem import Problem


def translated(kernel: Kernel, problem: Problem) -> Callable[..., Any]:
    """The kernel's function, of our conventions."""
    cycles = kernel.head_map == "cycle" and 1 < problem.heads_kv < problem.heads_q
    averages = kernel.empty_row.startswith("mean") and has_empty_row(problem)
    sums_none = kernel.empty_row == "nan" and not problem.len_k
    if not (cycles or averages or sums_none or kernel.lse_base == "2"):
        return kernel.fn

    def run(q: Tensor, k: Tensor, v: Tensor, **others: Any) -> Any:
        if cycles:
            q = _dealt(q, problem.heads_kv)
            others |= {
                name: _dealt(t, problem.heads_kv, axis)
                for name, axis in (("mask", 1), ("bias", 1), ("slopes", 0))
                if (t := others.get(name)) is not None and t.dim() > axis
            }
        returned = kernel.fn(q, k, v, **others)
        out, lse, *rest = returned if isinstance(returned, tuple) else (returned, None)
        if cycles:
            out, lse = (t if t is None else _dealt(t, problem.group) for t in (out, lse))
        if sums_none:  # softmax of nothing, times nothing, is 0 where softmax of -inf is NaN
            out = torch.where(out == 0, torch.nan, out)
        if averages:
            seen = visibility(problem, q.device).any(-1, keepdim=True)
            out = torch.where(seen | ~out.isfinite(), out, 0.0)
            lse = lse if lse is None else torch.where(seen.squeeze(-1), lse, -torch.inf)
        if kernel.lse_base == "2" and lse is not None:
            lse = lse * math.log(2.0)
        return (out, lse, *rest) if isinstance(returned, tuple) else out

    return run


def _dealt(x: Tensor, piles: int, axis: int = 1) -> Tensor:
    """Heads dealt out like cards: h goes to place (h % n) * piles + h // n, with n to a pile."""
    if x.shape[axis] % piles or x.shape[axis] == 1:
        return x
    return x.unflatten(axis, (piles, -1)).transpose(axis, axis + 1).flatten(axis, axis + 1)
