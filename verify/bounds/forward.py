"""How the roundings of a declared arithmetic reach out and lse: the proved bound, element by
element (derived in BOUNDS.md).

With s the scores, p the softmax, o the exact output, e_j the error of the argument of key j's
exponential:

    weights     p^_j = p_j (1 + delta_j) / sum_j p_j (1 + delta_j),  |delta_j| <= d_j = expm1(e_j),  D = sum_j p_j d_j
    out         |o^ - o| <= (sum_j p_j d_j (|v_j| + |o|) / (1 - D) + P stored + V quantised + the sum) / (1 - eta) + the store,
                eta the relative error of the row sum
    lse         |l^ - l| <= -log1p(-D) - log1p(-eta) + the logarithm

Errors are propagated in the order in which they arise, so products of two errors are in the bound.
Where it cannot be formed (a declared format overflows, D >= 1) it is infinite: such a case says
nothing there, and is counted as uninformative.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from verify.bounds.constants import (
    CLAMP,
    LARGEST,
    SATURATED,
    STEPS,
    UNBOUNDED,
    UNIT,
    Terms,
    Units,
    finite,
    reciprocal,
    total,
    unbounded,
)
from verify.bounds.exact import Block, from_keys
from verify.bounds.score_error import Operands, score_error
from verify.spec.arithmetic import Arithmetic
from verify.spec.problem import Problem

REACH_ELEMENTS = 1 << 24
"""Elements, rows times keys times columns, up to which the V that a row sees are looked through."""


class Rows:
    """The forward bound for a block of rows: out and lse as terms, and what the backward needs of
    the weights' error.
    """

    def __init__(
        self,
        problem: Problem,
        b: Block,
        units: Units,
        arithmetic: Arithmetic,
        operands: Operands | None,
    ) -> None:
        self.problem, self.block, self.units, self.arithmetic, self.operands = (
            problem,
            b,
            units,
            arithmetic,
            operands,
        )
        self.score, size, self.overflow = score_error(problem, b, units, arithmetic, operands)
        longest = max(1.0, abs(problem.softmax_scale)) * b.q
        self.overflow = self.overflow + units.split_overflow(longest, b.k, b.v, b.do)
        if operands is not None:
            self.overflow = self.overflow + operands.overflow
        self.raised = math.exp(arithmetic.maximum)
        """What the weights may be multiplied or divided by, before they are divided by their sum."""
        rescaled = STEPS * units.work * (b.row_max.abs() + arithmetic.maximum)
        rescaled = rescaled + (1 + units.tiles) * (units.exp + units.work)
        self.exponent = (
            self.score.add(size, alpha=STEPS * units.work) if size is not None else self.score
        )
        self.exponent = (
            self.exponent + rescaled if problem.softcap else self.exponent.add_(rescaled)
        )
        if arithmetic.stored_exponents and problem.len_k:
            apart = b.row_max - b.s + self.score + self.score.amax(-1, keepdim=True)
            u, floor = units.u["stored_scores"], units.floor["stored_scores"]
            self.exponent = self.exponent + (u * apart + floor)
        if arithmetic.exp == "fused" and problem.len_k:  # the argument may be positive
            largest = (b.s.abs() + self.score).amax(-1, keepdim=True)
            argument = STEPS * units.work * (largest + b.row_max.abs()) + arithmetic.maximum
            self.overflow = self.overflow + unbounded(argument > CLAMP)
        p_d = self._weights_error()
        spread = p_d.sum(-1, keepdim=True)
        self.saturated = bool((spread > SATURATED).any())
        """Whether the bound of some row does not grow in proportion to the unit roundoff."""
        held = torch.exp(b.row_max - finite(b.lse))  # 1 / row sum of exp(s - max)
        held = torch.ones_like(held) if arithmetic.normalized_probs else held
        flushed = max(units.floor["probs"] / arithmetic.probs_scale, units.exp_floor) * self.raised
        self.flushed = flushed * (held * reciprocal(1 - spread)).clamp(
            max=1.0
        )  # of each P, over the row sum, at least 1
        self.overflow = self.overflow + units.overflow(
            "probs", torch.full_like(b.lse, arithmetic.probs_scale * self.raised)
        )
        sees = b.visible.sum(-1, keepdim=True)
        rounded = (
            units.u["probs"] + self.flushed * sees
            if arithmetic.rowsum == "rounded"
            else torch.zeros_like(b.lse)
        )
        # a rounded P may be added up by tensor cores, as a product with ones
        cut = units.cut["accumulate"] if arithmetic.rowsum == "rounded" else 1
        summed = units.work * (cut * problem.len_k + units.tiles + STEPS)
        self.eta = (rounded + summed).clamp(max=1 - UNIT["fp64"])
        self.out = self._out(p_d, spread)
        self.lse = self._lse(spread)

    def _weights_error(self) -> Tensor:
        """p_j d_j with d_j = expm1(e_j) [B,Hk,G,n,K], as exp(s_j - lse + e_j) where d_j is large: a
        weight that is nothing in the exact answer may be all of the kernel's.
        """
        b, e = self.block, self.exponent
        p_d = e.clamp(max=CLAMP).expm1_().mul_(b.p)
        beyond = b.visible & (e > CLAMP)
        if not bool(beyond.any()):
            return p_d
        most = math.log(UNBOUNDED)
        return torch.where(beyond, (b.s - finite(b.lse) + e).clamp(max=most).exp(), p_d)

    def _out(self, p_d: Tensor, spread: Tensor) -> Terms:
        b, units = self.block, self.units
        mean = 0.0 if self.operands is None else self.operands.v_mean
        v, o, u_p = (b.v - mean).abs(), b.out.abs(), units.u["probs"]
        if self.operands is not None:
            o = (b.out - self.operands.v_mean.unsqueeze(2)).abs()
        everything = v.sum(-2, keepdim=True).unsqueeze(2)
        hull = (
            v.amax(-2, keepdim=True) if self.problem.len_k else v.new_zeros(1, 1, 1, 1)
        ).unsqueeze(2)  # [B,Hk,1,1,Dv]
        grow, held_grow = reciprocal(1 - spread), reciprocal(1 - self.eta)
        moved = from_keys(p_d, v)
        mass = torch.minimum((from_keys(b.p, v) + moved) * grow, hull)
        farthest = torch.minimum(hull + o, self._reach())
        terms = {
            "scores and exponentials": torch.minimum((moved + o * spread) * grow, farthest)
            + self.overflow
        }
        if self.operands is not None:
            lost = (from_keys(b.p + p_d, self.operands.v) * grow).clamp(max=UNBOUNDED)
            terms["V quantised"], mass, o_size = lost, mass + lost, o + lost
        else:
            o_size = o
        flushed = self.flushed * (
            from_keys(b.visible.to(v.dtype).expand(b.p.shape), v) if self._short() else everything
        )
        terms[f"P in {units.format['probs']}"] = u_p * mass + flushed
        gamma = units.gamma("accumulate", self.problem.len_k + units.tiles)
        added = mass * (1 + u_p) + flushed
        terms["sum over keys"] = gamma * added + self._lost(added, hull)
        if self.arithmetic.splits > 1 and units.u["partials"] > units.work:
            part = units.u["partials"] * (mass + total(terms)) + units.floor["partials"]
            part = part + units.overflow("partials", hull + total(terms))
            terms[f"splits in {units.format['partials']}"] = part
        if self.arithmetic.splits > 1:
            terms["merge of splits"] = self._merge() * (mass + total(terms))
        terms["row sum"] = self.eta * (o_size + total(terms))
        terms = {name: (part * held_grow).clamp(max=UNBOUNDED) for name, part in terms.items()}
        if self.operands is not None:
            terms["mean of V"] = (
                STEPS * units.work * (o + total(terms) + self.operands.v_mean.unsqueeze(2).abs())
            )
        units.store(terms, "output", b.out)
        return terms

    def _reach(self) -> Tensor:
        """How far the V of a row's visible keys lie from its output: no weights take a mean of them
        farther. It matters where scores err so much that weights are arbitrary, and is infinite
        where they do not, or where it would take too long to find.
        """
        b = self.block
        v = b.v[:, :, None, None]
        visible = b.visible.expand(b.p.shape).unsqueeze(-1)
        quick = visible.numel() * v.shape[-1] <= REACH_ELEMENTS
        if not (self.saturated and quick and b.p.shape[-1]) or self.operands is not None:
            return b.out.new_full((), torch.inf)
        above = torch.where(visible, v, -torch.inf).amax(-2) - b.out
        below = b.out - torch.where(visible, v, torch.inf).amin(-2)
        return torch.maximum(above, below).clamp(min=0.0)

    def _lost(self, added: Tensor, hull: Tensor) -> Tensor | float:
        """What the sum of P V loses near zero; UNBOUNDED where it may overflow before it is divided
        by the row sum: relative to the maximum so far, the weights of all keys so far may be 1.
        """
        units, len_k = self.units, self.problem.len_k
        scaled = self.arithmetic.probs_scale
        steps = units.step["accumulate"] * (len_k + units.tiles + STEPS)
        lost = steps * self.raised / min(1.0, scaled)
        scaled = scaled * self.raised
        largest = LARGEST[units.format["accumulate"]] / scaled
        if self.arithmetic.normalized_probs:
            return lost + unbounded(added > largest)
        if not hull.numel() or hull.amax().item() * len_k <= largest:
            return lost
        sees = self.block.visible.sum(-1, keepdim=True).clamp(min=1)
        return lost + unbounded(torch.maximum(added, hull * sees) > largest)

    def _merge(self) -> Tensor:
        """What the weights exp(lse_i - lse) of splits may be off by: they are not normalised again,
        so out may leave V's hull.
        """
        lse = finite(self.block.lse).abs()
        largest = self.block.row_max.abs() + self.arithmetic.maximum
        argument = STEPS * self.units.work * (lse + largest + 1) + self.units.exp
        return torch.expm1(argument.clamp(max=CLAMP)) + unbounded(argument > CLAMP)

    def _short(self) -> bool:
        """Whether P's format has a short exponent: then it matters which keys are visible, since
        only those can be flushed.
        """
        return self.units.floor["probs"] > self.units.exp_floor

    def _lse(self, spread: Tensor) -> Terms:
        lse = finite(self.block.lse)
        moved = -torch.log1p(-spread.clamp(max=1 - UNIT["fp64"])) + unbounded(spread >= 1)
        largest = self.block.row_max.abs() + self.arithmetic.maximum
        return {
            "scores and exponentials": moved + self.overflow,
            "row sum": -torch.log1p(-self.eta) + unbounded(self.eta >= 1 - UNIT["fp64"]),
            "logarithm": STEPS * self.units.work * (lse.abs() + 2 * largest + 1),
        }
