"""How the roundings reach the gradients: the proved bound of dq, dk, dv, dbias. Derived in
verify/bounds/BOUNDS.md.

    P recomputed from lse; dP = dO V^T; delta = rowsum(dO * out) or rowsum(P * dP); dS = P * (dP - delta);
    dQ = scale dS K;  dK = scale dS^T Q;  dV = P^T dO

Each carries the error of what it is formed from, its own rounding, and the rounding of its error.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from verify.bounds.constants import (
    CLAMP,
    STEPS,
    UNBOUNDED,
    Terms,
    Units,
    finite,
    total,
    unbounded,
)
from verify.bounds.exact import Block, by_key, from_keys, grouped, to_keys
from verify.bounds.forward import Rows
from verify.spec.arithmetic import Arithmetic
from verify.spec.problem import Problem


def gradients(
    problem: Problem, b: Block, units: Units, arithmetic: Arithmetic, rows: Rows, dq: Tensor
) -> dict[str, Terms]:
    """Terms of dq, dbias for these rows and what the rows add to dk, dv; the stores of dk, dv come
    after the sum. `dq`: exact.
    """
    e_p, overflow = _p_error(b, units, arithmetic, rows)
    e_ds, ds = _ds_error(problem, b, units, arithmetic, rows, e_p)
    over = overflow + _row_overflow(problem, b, units, arithmetic, ds + e_ds)
    result: dict[str, Terms] = {"dv": _dv(problem, b, units, arithmetic, e_p, overflow)}
    if problem.bias not in ("none", "alibi"):
        summed = (
            ("output", "batch_sum") if problem.bias != "bhqk" else ()
        )  # parts are stored before they are added up
        parts = units.u["dscores"] + max((units.u[name] for name in summed), default=0.0)
        floor = units.floor["dscores"] + max(units.floor["output"], units.floor["batch_sum"])
        result["dbias"] = {"dS": e_ds + over, "dS stored": parts * (ds + e_ds) + floor}
    if problem.softcap:
        slope = 1 - (b.capped / problem.softcap) ** 2
        e_slope = 2 * (rows.score / problem.softcap + units.tanh + units.u["stored_scores"]).clamp(
            max=1
        )
        ds, e_ds = ds * slope, e_ds * slope + (ds + e_ds) * e_slope
    scale, k, q = abs(problem.softmax_scale), b.k.abs(), b.q.abs()
    stores = (
        (5 if problem.softcap else 2) if units.stores_scores else 1
    )  # dS; softcap *, slope *, / softcap; scale *
    u_ds, floor_ds = (
        stores * units.u["dscores"],
        stores * units.floor["dscores"] / min(1.0, scale or 1.0, problem.softcap or 1.0),
    )
    name = f"dS in {units.format['dscores']}"
    for field in ("dscores", "accumulate"):
        over = over + units.row_overflow(field, ds, e_ds, max(1.0, scale))
    size, step = ds + e_ds, units.step["accumulate"]

    moved, mass = scale * from_keys(e_ds, k), scale * from_keys(ds, k)
    stored = u_ds * (mass + moved) + scale * floor_ds * k.sum(-2)[:, :, None, None, :] + over
    gamma, everything = units.gamma("accumulate", problem.len_k), mass + moved + stored
    lost = units.exp_floor * size.sum(-1, keepdim=True) + step * (problem.len_k + STEPS)
    lost = lost * (1 + scale)
    lost = lost + units.overflow("accumulate", everything / min(1.0, scale or 1.0))
    result["dq"] = {"dS": moved, name: stored, "sum over keys": gamma * everything + lost}
    if rows.operands is not None:
        result["dq"]["K quantised"] = scale * from_keys(
            (ds + e_ds) * (1 + u_ds) + floor_ds, rows.operands.k
        )
    if arithmetic.spill:
        spills = -(-problem.len_k // arithmetic.spill[1]) + arithmetic.atomic
        floor = (1 + arithmetic.atomic) * spills * units.floor["output"]
        stored = _repeated(units.u["output"], spills) * everything + floor
        result["dq"]["partial sums stored"] = stored + units.overflow("output", everything)
    units.store(result["dq"], "output", grouped(dq, problem))

    moved, mass = scale * to_keys(e_ds, q), scale * to_keys(ds, q)
    stored = (
        u_ds * (mass + moved)
        + scale * floor_ds * q.sum((2, 3))[:, :, None, :]
        + over.sum((2, 3))[:, :, None]
    )
    gamma, floor = _row_sum(problem, units, arithmetic)
    everything = mass + moved + stored
    rows_added = problem.len_q * problem.group + STEPS
    lost = (units.exp_floor * size.sum((2, 3))[..., None] + step * rows_added) * (1 + scale)
    lost = lost + _overflown(problem, units, arithmetic, everything / min(1.0, scale or 1.0))
    result["dk"] = {"dS": moved, name: stored, "sum over rows": gamma * everything + floor + lost}
    if rows.operands is not None:
        lost = grouped(rows.operands.q[:, :, b.rows], problem)
        result["dk"]["Q quantised"] = scale * to_keys((ds + e_ds) * (1 + u_ds) + floor_ds, lost)
    return result


def _row_overflow(
    problem: Problem, b: Block, units: Units, arithmetic: Arithmetic, ds: Tensor
) -> Tensor:
    """UNBOUNDED for rows in which dP, delta or dP - delta may overflow, or dS, of sizes `ds`, which
    a softcap multiplies before its slope does.
    """
    do, v = b.do.abs(), b.v.abs()
    over = units.sum_overflow("scores", do, v, 2.0)
    over = over + units.sum_overflow("stored_scores", do, v)
    if arithmetic.delta == "product":
        over = over + units.sum_overflow("inputs", do, v)
    nothing, cap = torch.zeros_like(ds), max(1.0, problem.softcap)
    return over + units.row_overflow("dscores", ds, nothing, cap)


def _dv(
    problem: Problem,
    b: Block,
    units: Units,
    arithmetic: Arithmetic,
    e_p: Tensor,
    overflow: Tensor,
) -> Terms:
    do = b.do.abs()
    moved, mass = to_keys(e_p, do), to_keys(b.p, do)
    stored = 0.0 * mass
    if not arithmetic.normalized_probs:
        stored = (
            units.u["probs"] * (mass + moved) + units.floor["probs"] * do.sum((2, 3))[:, :, None, :]
        )
    gamma, floor = _row_sum(problem, units, arithmetic)
    name, everything = f"P in {units.format['probs']}", mass + moved + stored
    weights = (b.p + e_p).sum((2, 3))[..., None]
    summed = problem.len_q * problem.group + STEPS
    lost = units.exp_floor * weights + units.step["accumulate"] * summed
    lost = lost + _overflown(problem, units, arithmetic, everything)
    lost = lost + overflow.sum((2, 3))[:, :, None]
    return {
        "scores and exponentials": moved,
        name: stored,
        "sum over rows": gamma * everything + floor + lost,
    }


def _overflown(problem: Problem, units: Units, arithmetic: Arithmetic, sizes: Tensor) -> Tensor:
    """UNBOUNDED where a sum over rows, or a part of it that is stored, may overflow."""
    over = units.overflow("accumulate", sizes)
    if problem.group > 1:
        over = over + units.overflow("group_sum", sizes)
    return over + units.overflow("output", sizes) if arithmetic.spill else over


def _row_sum(problem: Problem, units: Units, arithmetic: Arithmetic) -> tuple[float, float]:
    """(gamma, floor) of the sums over query rows and heads of a group, with the partial sums that
    are stored.
    """
    group = units.gamma("group_sum", problem.group) if problem.group > 1 else 0.0
    partial = problem.group * (
        1 + (-(-problem.len_q // arithmetic.spill[0]) if arithmetic.spill else 0)
    )
    gamma = units.gamma("accumulate", problem.len_q * problem.group) + group
    gamma += _repeated(units.u["output"], partial + arithmetic.atomic) if arithmetic.spill else 0.0
    floor = (1 + arithmetic.atomic) * max(units.floor["group_sum"], units.floor["output"])
    return gamma, partial * floor * (1 + abs(problem.softmax_scale))


def _repeated(u: float, stores: int) -> float:
    """What so many stores, one after the other, take of a sum of absolute values."""
    return math.expm1(stores * math.log1p(u))


def _ds_error(
    problem: Problem, b: Block, units: Units, arithmetic: Arithmetic, rows: Rows, e_p: Tensor
) -> tuple[Tensor, Tensor]:
    """(error of dS, |dS|), each [B,Hk,G,n,K], before dS is rounded and before the slope of a
    softcap. e_p: the error of P.
    """
    do, gamma, u, work = (
        b.do.abs(),
        units.gamma("scores", problem.dim_v),
        units.u["stored_scores"],
        STEPS * units.work,
    )
    dp, delta = by_key(b.do, b.v), (b.do * b.out).sum(-1, keepdim=True)
    few = work + (
        0.0 if units.stores_scores else u
    )  # roundings of dP in FP32: of the sum of sizes, which is no smaller
    step = by_key(do * (gamma * (1 + u) + few), b.v.abs())  # becomes the error of dP - delta
    step.add_(units.flushed(problem.dim_v, do, b.v))
    if rows.operands is not None:
        step.add_(by_key(do, rows.operands.v), alpha=(1 + gamma) * (1 + u))
    if units.stores_scores:
        step.add_(dp.abs(), alpha=u).add_(units.floor["stored_scores"])
    if arithmetic.delta == "out":
        o_error, o_size = total(rows.out), b.out.abs()
        e_delta = (do * (o_error + (problem.dim_v + STEPS) * units.work * (o_size + o_error))).sum(
            -1, keepdim=True
        )
    else:
        terms = e_p * dp.abs() + (b.p + e_p) * step
        if arithmetic.delta == "product":
            terms = (
                terms
                + units.u["inputs"] * (b.p * dp.abs() + terms)
                + units.floor["inputs"] * b.visible
            )
        e_delta = (terms + (problem.len_k + STEPS) * units.work * (b.p * dp.abs() + terms)).sum(
            -1, keepdim=True
        )
    product = dp.abs() if arithmetic.delta == "product" else None
    step.mul_(1 + work).add_((1 + work) * e_delta + work * delta.abs()).clamp_(max=UNBOUNDED)
    ds = dp.sub_(delta).abs_()
    factor = e_p
    if units.u["ds_probs"] > units.work:
        factor = (
            e_p * (1 + units.u["ds_probs"])
            + units.u["ds_probs"] * b.p
            + units.floor["ds_probs"] * b.visible
        )
    e_ds = (ds + step).mul_(factor).addcmul_(b.p, step).add_(STEPS * units.exp_floor)
    if product is not None:
        e_ds = (
            e_ds
            + units.u["inputs"] * (b.p + e_p) * (product + step)
            + units.floor["inputs"] * b.visible
        )
    return e_ds.clamp(max=UNBOUNDED), ds.mul_(b.p)


def _p_error(b: Block, units: Units, arithmetic: Arithmetic, rows: Rows) -> tuple[Tensor, Tensor]:
    """|P^ - P| of P recomputed from the LSE, or kept by a softmax function; UNBOUNDED for rows
    [B,Hk,G,n,1] that may overflow.
    """
    lse_error, probs = total(rows.lse), units.u["probs"]
    e_p = rows.exponent.add_(lse_error + STEPS * units.work * (finite(b.lse).abs() + lse_error))
    # 0 * NaN: a row that overflows, in S or in exp(s - lse), reaches the keys that are hidden from
    # it, too
    overflow = rows.overflow + (
        unbounded(e_p.amax(-1, keepdim=True) > CLAMP) if e_p.shape[-1] else 0.0
    )
    e_p.clamp_(max=CLAMP).expm1_().mul_(b.p)
    if arithmetic.normalized_probs:  # a softmax function keeps its rounded output for the backward
        e_p.mul_(1 + probs).add_(b.p, alpha=probs).add_(b.visible, alpha=units.floor["probs"])
    return e_p.add_(overflow + STEPS * units.exp_floor), overflow
