"""The truth about a case: its inputs, the exact answer, how far a kernel may be from it, and what
it could not tell apart.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from verify.bounds.constants import DISTINCT, LEVELS, UNIT, Allowance
from verify.bounds.exact import Block, Exact, from_keys, ungrouped
from verify.bounds.expected import Expectation
from verify.bounds.metrics import distance
from verify.bounds.proved import allowance
from verify.oracles import certified, emulator, float64, formats
from verify.records.events import WRONG_OUTPUTS
from verify.spec.arithmetic import ROUNDED, Arithmetic
from verify.spec.case import Case, Inputs
from verify.spec.problem import Problem

KEPT = 8
"""Blocks are kept for reuse up to this fraction of the oracle's own block size."""
NARROWED = tuple(name for name in ROUNDED if name not in ("scores", "accumulate"))
"""Fields that an arithmetic without narrow roundings has in FP32."""
SAMPLE = 4096
"""So many scores are looked at to see whether they repeat."""


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

    def expectation(self, arithmetic: Arithmetic) -> Expectation | None:
        """What honest kernels of this arithmetic are off by here; None where roundings repeat, so
        that no statistics apply: equal scores, or P so flat that all of it is rounded the same way.
        """
        flat = self.spread <= LEVELS * UNIT[arithmetic.format("probs", self.problem.dtype)]
        if self.problem.dtype == "fp64" or not self.generic or flat:
            return None
        return Expectation(
            self.exact,
            partial(self._emulate, arithmetic),
            lambda: self.tilt,
            tests(self.problem),
            2 * arithmetic.exp_ulp * UNIT["fp32"],
            None if arithmetic.quantised else partial(self.allowances, arithmetic),
        )

    def _emulate(self, arithmetic: Arithmetic, kind: str) -> Exact:
        """`nearest`: every sum to nearest, which is cheaper and nearly always enough; the others:
        Expectation.fp32.
        """
        if kind == "nearest":
            arithmetic = replace(arithmetic, summation="nearest")
        else:
            wide: dict[str, Any] = dict.fromkeys(NARROWED, "fp32") | {
                "quantised": None,
                "scaled_query": False,
                "spill": None,
            }
            arithmetic = replace(arithmetic, **wide)
        if kind == "jittered fp32":
            arithmetic = replace(arithmetic, summation="nearest")
        rounding = formats.Jittered() if kind == "jittered fp32" else formats.Nearest()
        blocks = self.blocks() if arithmetic.quantised is None else None
        return emulator.emulate(self.problem, self.inputs, arithmetic, rounding, blocks)

    @cached_property
    def generic(self) -> bool:
        """Whether the scores are all different, as far as a sample shows: equal ones are rounded
        alike, row after row.
        """
        for block in self.blocks():
            seen = block.raw.masked_select(block.visible)
            sample = seen[:: max(1, seen.numel() // SAMPLE)]
            return sample.unique().numel() > DISTINCT * sample.numel()
        return False

    @cached_property
    def spread(self) -> float:
        """How far scores are below their row's largest, on average over the weights and the first
        rows.
        """
        for b in self.blocks():
            return (b.row_max - (b.p * b.s).sum(-1, keepdim=True)).mean().item()
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

    def blind_to(self, limits: Mapping[str, Allowance], expected: Expectation | None) -> list[str]:
        """Return those of WRONG_OUTPUTS that this case would let pass."""
        p, limit = self.problem, limits["out"].limit
        flat = p.but(scale=0.0, bias="none", softcap=0.0, grads=False)
        steep = p.but(scale=1.05 * p.softmax_scale, grads=False)
        wrong = (
            lambda: torch.zeros_like(self.exact.out),
            lambda: float64.exact(flat, self.inputs).out,
            lambda: float64.exact(steep, self.inputs).out,
        )
        outputs = zip(WRONG_OUTPUTS, wrong, strict=True)
        return [name for name, make in outputs if not self._rejects(make(), limit, expected)]

    def _rejects(self, out: Tensor, limit: Tensor, expected: Expectation | None) -> bool:
        beyond = bool((distance(out, self.exact.out) > limit).any())
        return beyond or (expected is not None and expected.surprise("out", out) is not None)


def tests(problem: Problem) -> int:
    """How many share the probability of a false alarm in a case: of each tensor, as a whole and
    by head.
    """
    return 4 * (6 if problem.grads else 2) * (1 + problem.batch * problem.heads_q)


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
