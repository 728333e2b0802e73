"""How the roundings reach the gradients: the proved bound of dq, dk, dv, dbias. Derived in verify/BOUNDS.md.

    P recomputed from lse; dP = dO V^T; delta = rowsum(dO * out) or rowsum(P * dP); dS = P * (dP - delta);
    dQ = scale dS K;  dK = scale dS^T Q;  dV = P^T dO

Each carries the error of what it is formed from, its own rounding, and the rounding of its error.
"""

from __future__ import annotations

import torch
from torch import Tensor

from verify.arithmetic import Arithmetic
from verify.bounds import CLAMP, STEPS, TANH, Terms, Units, finite, total, unbounded
from verify.exact import Block, by_key, from_keys, grouped, to_keys
from verify.problem import Problem
from verify.propagation import Rows


def gradients(problem: Problem, b: Block, units: Units, arithmetic: Arithmetic, rows: Rows) -> dict[str, Terms]:
    """Terms of dq, dbias for these rows and what the rows add to dk, dv; the stores of dk, dv come after the sum."""
    k, q, do, scale = b.k.abs(), b.q.abs(), b.do.abs(), abs(problem.softmax_scale)
    e_p, e_ds, ds = _ds_error(problem, b, units, arithmetic, rows)
    result: dict[str, Terms] = {}
    if problem.bias not in ("none", "alibi"):
        parts = units.u["dscores"] + units.u["output"] if problem.bias != "bhqk" else units.u["dscores"]  # stored before summed
        result["dbias"] = {"dS": e_ds, "dS stored": parts * (ds.abs() + e_ds) + units.floor["dscores"] + units.floor["output"]}
    if problem.softcap:
        slope = 1 - (b.capped / problem.softcap) ** 2
        e_slope = 2 * (rows.score / problem.softcap + TANH * units.work + units.u["stored_scores"]).clamp(max=1)
        ds, e_ds = ds * slope, e_ds * slope + (ds.abs() + e_ds) * e_slope
    size = ds.abs() + e_ds
    stores = (5 if problem.softcap else 2) if units.stores_scores else 1  # dS; softcap *, slope *, / softcap; scale *
    floor_ds = units.floor["dscores"] / min(1.0, scale or 1.0, problem.softcap or 1.0)
    r_ds = stores * (units.u["dscores"] * size + floor_ds) + units.overflow("dscores", size)
    r_p = 0.0 * b.p if arithmetic.normalized_probs else units.u["probs"] * (b.p + e_p) + units.floor["probs"]
    key_sum = problem.len_q * problem.group
    names = (f"dS in {units.format['dscores']}", f"P in {units.format['probs']}")
    result["dq"] = {"dS": scale * from_keys(e_ds, k), names[0]: scale * from_keys(r_ds, k)}
    if rows.operands is not None:
        result["dq"]["K quantised"] = scale * from_keys(size + r_ds, rows.operands.k)
    result["dq"]["sum over keys"] = units.gamma("accumulate", problem.len_k) * scale * from_keys(size + r_ds, k)
    if arithmetic.spill:
        spills = -(-problem.len_k // arithmetic.spill[1])
        stored = units.u["output"] * scale * from_keys(size + r_ds, k) + units.floor["output"]
        result["dq"]["partial sums stored"] = spills * stored
    units.store(result["dq"], "output", problem.softmax_scale * from_keys(ds, b.k))
    gamma = units.gamma("accumulate", key_sum) + (units.gamma("group_sum", problem.group) if problem.group > 1 else 0.0)
    # stores of partial sums
    partial = problem.group * (1 + (-(-problem.len_q // arithmetic.spill[0]) if arithmetic.spill else 0))
    gamma += partial * units.u["output"] if arithmetic.spill else 0.0
    floor = partial * max(units.floor["group_sum"], units.floor["output"]) * (1 + scale)
    result["dk"] = {"dS": scale * to_keys(e_ds, q), names[0]: scale * to_keys(r_ds, q)}
    if rows.operands is not None:
        result["dk"]["Q quantised"] = scale * to_keys(size + r_ds, grouped(rows.operands.q[:, :, b.rows], problem))
    result["dk"]["sum over rows"] = gamma * scale * to_keys(size + r_ds, q) + floor
    result["dv"] = {"scores and exponentials": to_keys(e_p, do), names[1]: to_keys(r_p, do)}
    result["dv"]["sum over rows"] = gamma * to_keys(b.p + e_p + r_p, do) + floor
    return result


def _ds_error(problem: Problem, b: Block, units: Units, arithmetic: Arithmetic, rows: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(error of P, error of dS, dS), each [B,Hk,G,n,K], before dS is rounded and before the slope of a softcap."""
    lse_error = total(rows.lse)
    exponent = rows.exponent + lse_error + STEPS * units.work * (finite(b.lse).abs() + lse_error)
    e_p = b.p * torch.expm1(exponent.clamp(max=CLAMP))
    e_p = e_p + STEPS * units.exp_floor * b.visible
    # 0 * NaN: a row that overflows, in S or in exp(s - lse), reaches the keys that are hidden from it, too
    e_p = e_p + rows.overflow + unbounded((exponent * b.visible > CLAMP).any(-1, keepdim=True))
    if arithmetic.normalized_probs:  # a softmax function keeps its rounded output for the backward
        e_p = e_p + units.u["probs"] * (b.p + e_p) + units.floor["probs"] * b.visible
    dp, dp_size = by_key(b.do, b.v), by_key(b.do.abs(), b.v.abs())
    e_dp = units.gamma("scores", problem.dim_v) * dp_size
    if rows.operands is not None:
        lost = by_key(b.do.abs(), rows.operands.v)
        e_dp = e_dp + lost * (1 + units.gamma("scores", problem.dim_v))
    e_dp = e_dp + units.u["stored_scores"] * (dp.abs() + e_dp) + units.floor["stored_scores"]
    delta = (b.p * dp).sum(-1, keepdim=True)
    if arithmetic.delta == "out":
        o_error, o_size = total(rows.out), b.out.abs()
        e_delta = (b.do.abs() * (o_error + (problem.dim_v + STEPS) * units.work * (o_size + o_error))).sum(-1, keepdim=True)
    else:
        terms = e_p * dp.abs() + (b.p + e_p) * e_dp
        e_delta = (terms + (problem.len_k + STEPS) * units.work * (b.p * dp.abs() + terms)).sum(-1, keepdim=True)
    factor = e_p + units.u["ds_probs"] * (b.p + e_p) + units.floor["ds_probs"] * b.visible
    step = e_dp + e_delta + STEPS * units.work * (dp.abs() + e_dp + delta.abs() + e_delta)
    e_ds = factor * (dp - delta).abs() + (b.p + factor) * step + STEPS * units.exp_floor * b.visible
    return e_p, e_ds, b.p * (dp - delta)
