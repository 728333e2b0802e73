"""The proved bound of every tensor of a problem, a block of rows at a time beside the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from verify.bounds.backward import gradients
from verify.bounds.constants import (
    LARGEST,
    UNBOUNDED,
    UNIT,
    Allowance,
    Terms,
    Units,
    mapped,
    total,
)
from verify.bounds.exact import Block, Exact, ungrouped
from verify.bounds.forward import Rows
from verify.bounds.score_error import Operands
from verify.spec.arithmetic import Arithmetic
from verify.spec.case import Inputs
from verify.spec.problem import Problem


def allowance(
    problem: Problem,
    inputs: Inputs,
    exact: Exact,
    blocks: Callable[[], Iterable[Block]],
    arithmetic: Arithmetic,
    uncertainty: dict[str, Tensor] | None = None,
    operands: Operands | None = None,
) -> dict[str, Allowance]:
    """The proved bound for out, lse and, where problem.grads, dq, dk, dv, dbias of a kernel of this
    arithmetic.

    `blocks` gives the exact softmax of the same inputs. The error of `exact` itself is included:
    `uncertainty` where it is known (an interval oracle's); else the float64 oracle's own. That is
    at most the ratio of FP64's unit roundoff to the working format's of the same bound, as long as
    every part of it grows at least linearly with the unit roundoffs; where a row's does not, the
    bound is evaluated once more, for FP64. `operands`: what the kernel's operands may be off by,
    where it is not what quantisation takes.
    """
    units = Units(problem, arithmetic, exact.out.device.type)
    operands = operands or Operands.of(problem, inputs, arithmetic)
    by_row: dict[str, list[Terms]] = {"out": [], "lse": []}
    if problem.grads:
        by_row |= {"dq": []} | ({"dbias": []} if exact.dbias is not None else {})
    by_key_sums: dict[str, Terms] = {"dk": {}, "dv": {}}
    saturated = False
    for block in blocks():
        rows = Rows(problem, block, units, arithmetic, operands)
        saturated |= rows.saturated
        by_row["out"].append(mapped(rows.out, ungrouped))
        by_row["lse"].append(mapped(rows.lse, lambda t: ungrouped(t).squeeze(-1)))
        if problem.grads:
            assert exact.dq is not None
            found = gradients(problem, block, units, arithmetic, rows, exact.dq[:, :, block.rows])
            for name, sums in by_key_sums.items():
                _accumulate(sums, found.pop(name))
            for name, terms in found.items():
                by_row[name].append(mapped(terms, ungrouped))
    result = {name: _joined(pieces) for name, pieces in by_row.items()}
    if problem.grads:
        for name, terms in by_key_sums.items():
            if terms:
                units.store(terms, "output", getattr(exact, name))
        result |= by_key_sums
    if "dbias" in result and exact.dbias is not None:
        result["dbias"] = _broadcast_sum(result["dbias"], exact.dbias, units)
    share = UNIT["fp64"] / units.work
    if saturated and uncertainty is None and share < 1:
        wide = allowance(problem.but(dtype="fp64"), inputs, exact, blocks, Arithmetic())
        uncertainty = {name: a.limit for name, a in wide.items()}
    most = UNBOUNDED if problem.dtype == "fp64" else LARGEST["fp32"]
    return {
        n: _closed(terms, getattr(exact, n), uncertainty[n] if uncertainty else share, most)
        for n, terms in result.items()
    }


def _broadcast_sum(terms: Terms, dbias: Tensor, units: Units) -> Terms:
    """dBias is summed over the dimensions that the bias is broadcast in, in the group-sum format,
    and stored.
    """
    over = [n for n in (0, 1) if dbias.shape[n] == 1]
    summed = mapped(terms, lambda t: t.sum(over, keepdim=True) if over else t)
    if summed:
        units.store(summed, "output", dbias)
    return summed


def _closed(terms: Terms, exact: Tensor, oracle: Tensor | float, most: float) -> Allowance:
    """`oracle`: what the exact answer is off by, or which part of the kernel's bound that is at
    most. Beyond `most` anything may have overflown.
    """
    terms = (
        mapped(terms, lambda t: t.expand_as(exact))
        if terms
        else {"empty sum": torch.zeros_like(exact)}
    )
    terms["oracle"] = oracle.to(exact) if isinstance(oracle, Tensor) else total(terms) * oracle
    limit = total(terms)
    if limit.isnan().any():
        raise AssertionError(
            "a bound is NaN: that is a defect of verify/bounds/constants.py, report it with the "
            "case"
        )
    return Allowance(limit.masked_fill(limit >= most, torch.inf), terms)


def _accumulate(sums: Terms, terms: Terms) -> None:
    for name, part in terms.items():
        sums[name] = sums[name] + part if name in sums else part


def _joined(pieces: list[Terms]) -> Terms:
    return {
        name: torch.cat([piece[name] for piece in pieces], dim=2)
        for name in (pieces[0] if pieces else ())
    }
