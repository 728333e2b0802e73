"""How the roundings of a declared arithmetic reach the output: the proved bound, element by element, from the case's own inputs.

With s the scores, p the softmax, D_i = sum_j p_ij d_ij:

    weights     p^_j = p_j (1 + delta_j) / sum_j p_j (1 + delta_j),  |delta_j| <= d_j = expm1(e_j),
                e_j the error of the score and of the argument of its exponential, rescalings included
    out         |o^ - o| <= sum_j p_j d_j |v_j - o| / (1 - D), then P rounded, the sum over keys, the store
    lse         |l^ - l| <= -log1p(-D) + gamma + the rounding of its terms
    gradients   P recomputed from lse, dP = dO V^T, delta = rowsum(dO * out), dS = P * (dP - delta): each with its error,
                carried into the products that follow

Errors are propagated in the order in which they arise, so products of two errors are in the bound. Where it cannot be formed
(a declared format overflows, D >= 1) it is infinite: such a case says nothing there, and is counted as uninformative.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from verify.arithmetic import Arithmetic
from verify.bounds import (
    CLAMP,
    EXP,
    STEPS,
    TANH,
    UNBOUNDED,
    UNIT,
    Allowance,
    Terms,
    Units,
    finite,
    mapped,
    reciprocal,
    total,
    unbounded,
)
from verify.exact import Block, Exact, by_key, from_keys, to_keys, ungrouped
from verify.problem import Problem


def allowance(problem: Problem, exact: Exact, blocks: Iterable[Block], arithmetic: Arithmetic) -> dict[str, Allowance]:
    """The proved bound for out, lse and, where problem.grads, dq, dk, dv, dbias of a kernel of this arithmetic.

    `blocks` is the exact softmax of the same inputs. The float64 oracle's own error is included: every part grows at least
    linearly with the unit roundoffs, so the oracle's share is at most the ratio of FP64's to the working format's.
    """
    units = Units(problem, arithmetic)
    by_row: dict[str, list[Terms]] = {"out": [], "lse": []}
    if problem.grads:
        by_row |= {"dq": []} | ({"dbias": []} if exact.dbias is not None else {})
    by_key_sums: dict[str, Terms] = {"dk": {}, "dv": {}}
    for block in blocks:
        rows = _Rows(problem, block, units, arithmetic)
        by_row["out"].append(mapped(rows.out, ungrouped))
        by_row["lse"].append(mapped(rows.lse, lambda t: ungrouped(t).squeeze(-1)))
        if problem.grads:
            gradients = _gradients(problem, block, units, arithmetic, rows)
            for name, sums in by_key_sums.items():
                _accumulate(sums, gradients.pop(name))
            for name, terms in gradients.items():
                by_row[name].append(mapped(terms, ungrouped))
    result = {name: _joined(pieces) for name, pieces in by_row.items()}
    if problem.grads:
        for name, terms in by_key_sums.items():
            if terms:
                units.store(terms, "output", getattr(exact, name))
        result |= by_key_sums
    if "dbias" in result and exact.dbias is not None:
        result["dbias"] = _broadcast_sum(result["dbias"], exact.dbias, units)
    return {name: _closed(terms, getattr(exact, name), UNIT["fp64"] / units.work) for name, terms in result.items()}


class _Rows:
    """The forward bound for a block of rows: out and lse as terms, and what the backward needs of the weights' error."""

    def __init__(self, problem: Problem, b: Block, units: Units, arithmetic: Arithmetic) -> None:
        self.problem, self.block, self.units, self.arithmetic = problem, b, units, arithmetic
        self.score, self.overflow = _score_error(problem, b, units)
        argument = STEPS * units.work * (b.s.abs() + b.row_max.abs()) + (1 + units.tiles) * (EXP + 1) * units.work
        self.exponent = self.score + argument
        p_d = b.p * torch.expm1(self.exponent.clamp(max=CLAMP))
        spread = p_d.sum(-1, keepdim=True)
        self.out = self._out(p_d, spread)
        self.lse = self._lse(spread)

    def _out(self, p_d: Tensor, spread: Tensor) -> Terms:
        b, units, rounded_sum = self.block, self.units, float(self.arithmetic.rowsum == "rounded")
        v, o, u_p = b.v.abs(), b.out.abs(), units.u["probs"]
        hull = (v.amax(-2, keepdim=True) if self.problem.len_k else v.new_zeros(1, 1, 1, 1)).unsqueeze(2)  # [B,Hk,1,1,Dv]
        grow = reciprocal(1 - spread)
        moved = from_keys(p_d, v)
        mass = torch.minimum((from_keys(b.p, v) + moved) * grow, hull)
        terms = {"scores and exponentials": torch.minimum((moved + o * spread) * grow, hull + o) + self.overflow}
        held = 1.0 if self.arithmetic.normalized_probs else torch.exp(b.row_max - finite(b.lse))  # 1/l, at most 1
        flushed = units.floor["probs"] * held * v.sum(-2, keepdim=True).unsqueeze(2)
        terms[f"P in {units.format['probs']}"] = u_p * (mass + rounded_sum * o) + flushed
        gamma = units.gamma("accumulate", self.problem.len_k + units.tiles)
        terms["sum over keys"] = gamma * (mass * (1 + u_p) + o + total(terms))
        units.store(terms, "output", b.out)
        return terms

    def _lse(self, spread: Tensor) -> Terms:
        units, len_k, lse = self.units, self.problem.len_k, finite(self.block.lse)
        rounded = units.u["probs"] + units.floor["probs"] * len_k if self.arithmetic.rowsum == "rounded" else 0.0
        moved = -torch.log1p(-spread.clamp(max=1 - UNIT["fp64"])) + unbounded(spread >= 1)
        return {
            "scores and exponentials": moved + self.overflow,
            "row sum": torch.full_like(lse, rounded + units.work * (len_k + units.tiles + STEPS)),
            "logarithm": STEPS * units.work * (lse.abs() + 2 * self.block.row_max.abs() + 1),
        }


def _score_error(problem: Problem, b: Block, units: Units) -> tuple[Tensor, Tensor]:
    """|s^ - s| [B,Hk,G,n,K]: the product Q K^T, each store of S in the declared format, softcap, bias. And where a row may
    overflow that format, whichever way the scale is applied: UNBOUNDED [B,Hk,G,n,1].
    """
    size, u = by_key(b.q.abs(), b.k.abs()), units.u["stored_scores"]
    error = abs(problem.softmax_scale) * units.gamma("scores", problem.dim_qk) * size
    error = error + 2 * u * (b.raw.abs() + error)
    if problem.softcap:
        error = error + TANH * units.work * problem.softcap + 2 * u * (b.capped.abs() + error)
    if b.bias is not None:
        error = error + (units.work + u) * b.bias.abs() + u * (b.s.abs() + error)
    if not problem.len_k:
        return error, torch.zeros_like(b.row_max)
    largest = (size * max(1.0, abs(problem.softmax_scale)) + b.s.abs()).amax(-1, keepdim=True)
    return error, units.overflow("stored_scores", largest)


def _gradients(problem: Problem, b: Block, units: Units, arithmetic: Arithmetic, rows: _Rows) -> dict[str, Terms]:
    """Terms of dq, dbias for these rows and what the rows add to dk, dv; the stores of dk, dv come after the sum."""
    k, q, do, scale = b.k.abs(), b.q.abs(), b.do.abs(), abs(problem.softmax_scale)
    e_p, e_ds, ds = _ds_error(problem, b, units, arithmetic, rows)
    result: dict[str, Terms] = {}
    if problem.bias not in ("none", "alibi"):
        parts = units.u["dscores"] + units.u["output"] if problem.bias != "bhqk" else units.u["dscores"]  # stored before summed
        result["dbias"] = {"dS": e_ds, "dS stored": parts * (ds.abs() + e_ds) + units.floor["dscores"] + units.floor["output"]}
    if problem.softcap:
        slope = 1 - (b.capped / problem.softcap) ** 2
        e_slope = 2 * (rows.score / problem.softcap + TANH * units.work).clamp(max=1)
        ds, e_ds = ds * slope, e_ds * slope + (ds.abs() + e_ds) * e_slope
    size = ds.abs() + e_ds
    stores = 2 if units.stores_scores else 1  # dS, and scale * dS
    r_ds = stores * (units.u["dscores"] * size + units.floor["dscores"] / min(1.0, scale or 1.0)) + units.overflow(
        "dscores", size
    )
    r_p = 0.0 * b.p if arithmetic.normalized_probs else units.u["probs"] * (b.p + e_p) + units.floor["probs"]
    key_sum = problem.len_q * problem.group
    names = (f"dS in {units.format['dscores']}", f"P in {units.format['probs']}")
    result["dq"] = {"dS": scale * from_keys(e_ds, k), names[0]: scale * from_keys(r_ds, k)}
    result["dq"]["sum over keys"] = units.gamma("accumulate", problem.len_k) * scale * from_keys(size + r_ds, k)
    if arithmetic.spill:
        spills = -(-problem.len_k // arithmetic.spill[1])
        result["dq"]["partial sums stored"] = spills * (
            units.u["output"] * scale * from_keys(size + r_ds, k) + units.floor["output"]
        )
    units.store(result["dq"], "output", problem.softmax_scale * from_keys(ds, b.k))
    gamma = units.gamma("accumulate", key_sum) + (units.gamma("group_sum", problem.group) if problem.group > 1 else 0.0)
    partial = problem.group * (
        1 + (-(-problem.len_q // arithmetic.spill[0]) if arithmetic.spill else 0)
    )  # stores of partial sums
    gamma += partial * units.u["output"] if arithmetic.spill else 0.0
    floor = partial * max(units.floor["group_sum"], units.floor["output"]) * (1 + scale)
    result["dk"] = {"dS": scale * to_keys(e_ds, q), names[0]: scale * to_keys(r_ds, q)}
    result["dk"]["sum over rows"] = gamma * scale * to_keys(size + r_ds, q) + floor
    result["dv"] = {"scores and exponentials": to_keys(e_p, do), names[1]: to_keys(r_p, do)}
    result["dv"]["sum over rows"] = gamma * to_keys(b.p + e_p + r_p, do) + floor
    return result


def _ds_error(problem: Problem, b: Block, units: Units, arithmetic: Arithmetic, rows: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """(error of P, error of dS, dS), each [B,Hk,G,n,K], before dS is rounded and before the slope of a softcap."""
    lse_error = total(rows.lse)
    exponent = rows.exponent + lse_error + STEPS * units.work * finite(b.lse).abs()
    e_p = b.p * (torch.expm1(exponent.clamp(max=CLAMP)) + unbounded(exponent > CLAMP))
    e_p = e_p + rows.overflow  # 0 * NaN: a row that overflows reaches the keys that are hidden from it, too
    if arithmetic.normalized_probs:  # a softmax function keeps its rounded output for the backward
        e_p = e_p + units.u["probs"] * (b.p + e_p) + units.floor["probs"] * b.visible
    dp = by_key(b.do, b.v)
    e_dp = (units.gamma("scores", problem.dim_v) + units.u["stored_scores"]) * by_key(b.do.abs(), b.v.abs())
    delta = (b.p * dp).sum(-1, keepdim=True)
    if arithmetic.delta == "out":
        o_error, o_size = total(rows.out), b.out.abs()
        e_delta = (b.do.abs() * (o_error + (problem.dim_v + STEPS) * units.work * (o_size + o_error))).sum(-1, keepdim=True)
    else:
        terms = e_p * dp.abs() + (b.p + e_p) * e_dp
        e_delta = (terms + (problem.len_k + STEPS) * units.work * (b.p * dp.abs() + terms)).sum(-1, keepdim=True)
    factor = e_p + units.u["ds_probs"] * (b.p + e_p) + units.floor["ds_probs"] * b.visible
    e_ds = factor * (dp - delta).abs() + (b.p + factor) * (e_dp + e_delta + STEPS * units.work * (dp.abs() + delta.abs()))
    return e_p, e_ds, b.p * (dp - delta)


def _broadcast_sum(terms: Terms, dbias: Tensor, units: Units) -> Terms:
    """dBias is summed over the dimensions that the bias is broadcast in, in the group-sum format, and stored."""
    over = [n for n in (0, 1) if dbias.shape[n] == 1]
    summed = mapped(terms, lambda t: t.sum(over, keepdim=True) if over else t)
    if summed:
        units.store(summed, "output", dbias)
    return summed


def _closed(terms: Terms, exact: Tensor, oracle_share: float) -> Allowance:
    terms = mapped(terms, lambda t: t.expand_as(exact)) if terms else {"empty sum": torch.zeros_like(exact)}
    limit = total(terms) * (1 + oracle_share)
    if limit.isnan().any():
        raise AssertionError("a bound is NaN: that is a defect of verify/bounds.py, report it with the case")
    return Allowance(limit.masked_fill(limit >= UNBOUNDED, torch.inf), terms)


def _accumulate(sums: Terms, terms: Terms) -> None:
    for name, part in terms.items():
        sums[name] = sums[name] + part if name in sums else part


def _joined(pieces: list[Terms]) -> Terms:
    return {name: torch.cat([piece[name] for piece in pieces], dim=2) for name in (pieces[0] if pieces else ())}
