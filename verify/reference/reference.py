"""The truth about a case: its inputs, the exact answer, how far a kernel may be from it, and what
it could not tell apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from verify.bounds.constants import (
    ALIKE_PART,
    DISTINCT,
    FLOOR,
    LEVELS,
    UNBOUNDED,
    UNIT,
    Allowance,
    Units,
)
from verify.bounds.exact import Block, Exact, from_keys, ungrouped
from verify.bounds.expected import Expectation
from verify.bounds.metrics import distance
from verify.bounds.proved import allowance
from verify.oracles import certified, emulator, float64, formats, quantised
from verify.records.events import WRONG_OUTPUTS
from verify.spec.arithmetic import ROUNDED, Arithmetic, Quantisation
from verify.spec.case import Case, Inputs
from verify.spec.problem import Problem

KEPT = 8
"""Blocks are kept for reuse up to this fraction of the oracle's own block size."""
NARROWED = tuple(name for name in ROUNDED if name not in ("scores", "accumulate"))
"""Fields that an arithmetic without narrow roundings has in FP32."""
SAMPLE, ROWS = 2048, 32
"""So many scores of so many rows are looked at to see whether their roundings repeat."""
MIDDLE = 2.63
"""2 sqrt(pi) standard deviations of a normal distribution, in ranges of its middle half."""


@dataclass(frozen=True)
class Truth:
    """What is known about a case on a device before any kernel runs."""

    problem: Problem
    inputs: Inputs
    exact: Exact
    uncertainty: dict[str, Tensor] | None = None
    """What `exact` may be off by, where another oracle than the float64 one gave it."""

    @property
    def device(self) -> str:
        """cpu or cuda."""
        return self.inputs.q.device.type

    def blocks(self) -> Iterable[Block]:
        """The exact softmax, block by block; kept where it is one block."""
        if self._one_block is not None:
            return self._one_block
        return float64.blocks(self.problem, self.inputs)

    @cached_property
    def _one_block(self) -> list[Block] | None:
        p = self.problem
        small = (
            p.batch * p.heads_q * p.len_q * p.len_k <= float64.BLOCK_ELEMENTS[self.device] // KEPT
        )
        return list(float64.blocks(p, self.inputs)) if small else None

    def allowances(self, arithmetic: Arithmetic) -> dict[str, Allowance]:
        """How far each tensor of a kernel of this arithmetic may be from the exact answer."""
        return allowance(
            self.problem, self.inputs, self.exact, self.blocks, arithmetic, self.uncertainty
        )

    def left(self, arithmetic: Arithmetic) -> tuple[Exact, dict[str, Allowance]] | None:
        """(exact attention of what a kernel that quantises has left of its inputs, how far out of
        such a kernel may be from that, and lse, if no mean of K has to be added to it); None where
        it does not quantise.
        """
        how, problem = arithmetic.quantised, self.problem.but(grads=False)
        if how is None:
            return None
        units = Units(problem, arithmetic, self.device)
        problem, inputs, operands = quantised.left_over(problem, self.inputs, how, units)
        other = Truth(problem, inputs, float64.exact(problem, inputs))
        limits = allowance(
            problem, inputs, other.exact, other.blocks, arithmetic, operands=operands
        )
        return other.exact, {"out": limits["out"]} if how.centred else limits

    def expectation(self, arithmetic: Arithmetic) -> Expectation | None:
        """What honest kernels of this arithmetic are off by here; None where roundings repeat, so
        that no statistics apply: equal scores, or P or stored scores so flat that all of a row is
        rounded the same way.
        """
        unit, stored = (
            UNIT[arithmetic.format(name, self.problem.dtype)] for name in ("probs", "stored_scores")
        )
        flat = self.spread <= LEVELS * unit or self.relief <= LEVELS * stored
        if self.problem.dtype == "fp64" or flat or self._faint or self._repeats(unit):
            return None
        return Expectation(
            self.exact,
            partial(self._emulate, arithmetic),
            lambda: self.tilt,
            tests(self.problem),
            2 * arithmetic.exp_ulp * UNIT["fp32"],
            limits=None if arithmetic.quantised else partial(self.allowances, arithmetic),
            shared=arithmetic.quantised is not None,
            leans=arithmetic.rounding == "zero" or _ties(arithmetic.quantised),
            maximum=arithmetic.maximum,
            held=None if arithmetic.normalized_probs else partial(self._held, arithmetic),
        )

    def _emulate(self, arithmetic: Arithmetic, kind: str, above: float = 0.0) -> Exact:
        """`nearest`: every sum to nearest, which is cheaper and nearly always enough; the others:
        Expectation.fp32. above: what exponents are relative to, above the maximum.
        """
        if kind == "nearest":
            arithmetic = replace(arithmetic, summation="nearest")
        else:
            wide: dict[str, Any] = dict.fromkeys(NARROWED, "fp32") | {
                "quantised": None,
                "scaled_query": False,
                "spill": None,
                "atomic": False,
            }
            arithmetic = replace(arithmetic, **wide)
        if kind == "jittered fp32":
            arithmetic = replace(arithmetic, summation="nearest")
        rounding = formats.Jittered() if kind == "jittered fp32" else formats.Nearest(above)
        blocks = self.blocks() if arithmetic.quantised is None else None
        return emulator.emulate(self.problem, self.inputs, arithmetic, rounding, blocks)

    def _held(self, arithmetic: Arithmetic) -> Tensor:
        """What rounding each row's largest weight moves out by [B,H,Q,Dv]: of the sum of P V, and
        of the row sum where that adds rounded weights.
        """
        parts = [torch.zeros_like(self.exact.out[:, :, :0])]
        for b in self.blocks():
            if b.s.shape[-1]:
                top = b.p.argmax(-1, keepdim=True)
                v = b.v.unsqueeze(2).expand(*b.p.shape[:3], -1, -1)
                moved = v.take_along_dim(top.expand(*b.out.shape), -2)
                moved = moved - b.out if arithmetic.rowsum == "rounded" else moved
                parts.append(ungrouped(b.p.take_along_dim(top, -1) * moved))
        unit = UNIT[arithmetic.format("probs", self.problem.dtype)]
        return unit * torch.cat(parts, 2)

    @cached_property
    def _faint(self) -> bool:
        """Whether subnormal factors of scores, which may be flushed, are more than a rounding of
        FP32: emulations do not flush.
        """
        q, k = self.inputs.q, self.inputs.k
        if not (q.numel() and k.numel()):
            return False
        largest = max(q.abs().max().item(), k.abs().max().item())
        lost = FLOOR["fp32"] * self.problem.dim_qk * largest
        return lost * (1 + abs(self.problem.softmax_scale)) > UNIT["fp32"]

    def _repeats(self, unit: float) -> bool:
        """Whether roundings of P repeat, row after row: equal scores are rounded alike, and so are
        rows that are moved by a bias alone. unit: the roundoff of P.

        Of the last rows of two heads, the exponents s - max are put in bins of a fraction of a
        roundoff, in which errors are alike; as many bins must differ as of independent exponents of
        the same spread (normal ones meet as often as if they filled 2.63 times the range of their
        middle half evenly).
        """
        for b in self.blocks():
            last, seen = slice(-ROWS, None), b.visible.expand(b.s.shape)
            apart = (b.s - b.row_max)[..., last, :]
            heads = [apart[n, n, n][seen[n, n, n, last]] for n in (0, -1)]
            # a row's largest weight is 1, and not rounded
            some = [t[t < 0][:SAMPLE] for t in heads if int((t < 0).sum()) > 1]
            # a bias that is the same for all heads repeats them in each
            apart_heads = self.problem.batch * self.problem.heads_q > 1
            both = [torch.cat(some)] if len(some) > 1 and apart_heads else []
            return not some or any(_alike(t, unit / ALIKE_PART) for t in some + both)
        return True

    @cached_property
    def spread(self) -> float:
        """How far scores are below their row's largest, on average over the weights and the first
        rows.
        """
        for b in self.blocks():
            return (b.row_max - (b.p * b.s).sum(-1, keepdim=True)).mean().item()
        return 0.0

    @cached_property
    def relief(self) -> float:
        """How far scores spread, in the largest of their row, on average over the first rows: the
        standard deviation of those that are seen.
        """
        for b in self.blocks():
            seen = b.visible.expand(b.raw.shape)
            raw = torch.where(seen, b.raw, torch.nan)
            apart = (raw - raw.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt()
            largest = torch.where(seen, b.raw.abs(), 0.0).amax(-1)
            return (apart / largest.clamp(min=1 / UNBOUNDED)).nanmean().item()
        return 0.0

    @cached_property
    def tilt(self) -> Tensor:
        """d out / d log(scale) [B,H,Q,Dv]: sum_j p_j (x_j - sum p x) v_j with x the scores before
        softcap times its slope.
        """
        parts, cap = [torch.zeros_like(self.exact.out[:, :, :0])], self.problem.softcap
        for b in self.blocks():
            x = b.raw * (1 - (b.capped / cap) ** 2) if cap else b.raw
            parts.append(ungrouped(from_keys(b.p * (x - (b.p * x).sum(-1, keepdim=True)), b.v)))
        return torch.cat(parts, 2)

    def blind_to(
        self,
        limits: Mapping[str, Allowance],
        expected: Expectation | None,
        left: tuple[Exact, dict[str, Allowance]] | None = None,
    ) -> list[str]:
        """Return those of WRONG_OUTPUTS that this case would let pass."""
        p = self.problem
        near = [(self.exact.out, limits["out"].limit)]
        near += [(left[0].out, left[1]["out"].limit)] if left else []
        flat = p.but(scale=0.0, bias="none", softcap=0.0, grads=False)
        steep = p.but(scale=1.05 * p.softmax_scale, grads=False)
        wrong = (
            lambda: torch.zeros_like(self.exact.out),
            lambda: float64.exact(flat, self.inputs).out,
            lambda: float64.exact(steep, self.inputs).out,
        )
        outputs = zip(WRONG_OUTPUTS, wrong, strict=True)
        return [name for name, make in outputs if not _rejects(make(), near, expected)]


def _rejects(out: Tensor, near: list[tuple[Tensor, Tensor]], expected: Expectation | None) -> bool:
    beyond = any(bool((distance(out, exact) > limit).any()) for exact, limit in near)
    return beyond or (expected is not None and expected.surprise("out", out) is not None)


def _ties(how: Quantisation | None) -> bool:
    """Whether many numbers lie in the middle of two codes, where kernels that round to nearest
    differ: a scale of few bits is often a simple fraction of them.
    """
    return how is not None and how.scales != "fp32"


def tests(problem: Problem) -> int:
    """How many share the probability of a false alarm in a case: of each tensor, as a whole and
    by head.
    """
    return 4 * (6 if problem.grads else 2) * (1 + problem.batch * problem.heads_q)


def _alike(exponents: Tensor, bin_width: float) -> bool:
    """Whether more of them fall into the same bins than of independent ones."""
    low, high = exponents.quantile(torch.tensor([0.25, 0.75]).to(exponents)).tolist()
    bins, n = 1 + MIDDLE * (high - low) / bin_width, exponents.numel()
    independent = bins * -math.expm1(-n / bins)
    return (exponents / bin_width).floor().unique().numel() < DISTINCT * independent


@lru_cache(maxsize=2)
def truth(case: Case, device: str) -> Truth:
    """The truth about a case; the last two are kept, since several calls on one case follow each
    other.
    """
    return about(case.problem, case.inputs(device))


def about(problem: Problem, inputs: Inputs) -> Truth:
    """The truth about these values (already rounded)."""
    better = certified.exact(problem, inputs) if problem.dtype == "fp64" else None
    exact, uncertainty = better or (float64.exact(problem, inputs), None)
    return Truth(problem, inputs, exact, uncertainty)


def oracle_limit(problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """How far any float64 evaluation of these values may be from the exact answer, for each tensor
    of it.
    """
    wide = problem.but(dtype="fp64")
    blocks = partial(float64.blocks, wide, inputs)
    limits = allowance(wide, inputs, float64.exact(wide, inputs), blocks, Arithmetic())
    return {name: a.limit for name, a in limits.items()}
