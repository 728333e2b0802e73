"""The truth about a case: its inputs, the exact answer, how far a kernel may be from it, and what it could not tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from verify.arithmetic import Arithmetic
from verify.bounds import Allowance
from verify.case import Case, Inputs
from verify.exact import Exact
from verify.finding import Finding
from verify.guard import Output
from verify.measure import distance, worst
from verify.oracles import dense
from verify.problem import Problem
from verify.propagation import allowance
from verify.registry import Kernel

IN_FLOAT64 = Arithmetic(
    scores="fp64", stored_scores="fp64", probs="fp64", accumulate="fp64", dscores="fp64", output="fp64", group_sum="fp64"
)


@dataclass(frozen=True)
class Truth:
    """What is known about a case on a device before any kernel runs."""

    problem: Problem
    inputs: Inputs
    exact: Exact

    def allowances(self, arithmetic: Arithmetic) -> dict[str, Allowance]:
        """How far each tensor of a kernel of this arithmetic may be from the exact answer."""
        return allowance(self.problem, self.exact, dense.blocks(self.problem, self.inputs), arithmetic)

    def blind_to(self, limits: Mapping[str, Allowance]) -> list[str]:
        """Which of three wrong kernels this case would let pass: all zeros, the mean of the visible V, a scale 5 % off."""
        p, limit = self.problem, limits["out"].limit
        wrong = {
            "zeros": torch.zeros_like(self.exact.out),
            "mean(V)": dense.exact(p.but(scale=0.0, bias="none", softcap=0.0, grads=False), self.inputs).out,
            "scale*1.05": dense.exact(p.but(scale=1.05 * p.softmax_scale, grads=False), self.inputs).out,
        }
        return [name for name, out in wrong.items() if not bool((distance(out, self.exact.out) > limit).any())]


@lru_cache(maxsize=2)
def truth(case: Case, device: str) -> Truth:
    """The truth about a case; the last two are kept, since several calls on one case follow each other."""
    inputs = case.inputs(device)
    return Truth(case.problem, inputs, dense.exact(case.problem, inputs))


def oracle_limit(problem: Problem, inputs: Inputs) -> dict[str, Tensor]:
    """How far any float64 evaluation of these values may be from the exact answer, for each tensor of it."""
    wide = problem.but(dtype="fp64")
    limits = allowance(wide, dense.exact(wide, inputs), dense.blocks(wide, inputs), IN_FLOAT64)
    return {name: a.limit for name, a in limits.items()}


def judge(kernel: Kernel, output: Output, exact: Exact, limits: Mapping[str, Allowance], *, names: tuple[str, ...]) -> None:
    """Raise a Finding for the first of these tensors that is farther from the exact answer than it may be."""
    for name in names:
        got, want = getattr(output, name), getattr(exact, name)
        if got is None or want is None:
            continue
        if name == "out" and kernel.empty_row == "nan":
            want = want.masked_fill((exact.lse == -torch.inf).unsqueeze(-1), torch.nan)
        compare(name, got, want, limits[name], against="exact")


def compare(name: str, got: Tensor, want: Tensor, allowed: Allowance, *, against: str, times: int = 1) -> None:
    """Raise a Finding where |got - want| exceeds `times` the allowance, at the element that exceeds it most."""
    error, limit = distance(got, want), times * allowed.limit
    at = worst(error, limit)
    if at is None:
        return
    terms = sorted(((times * part[at].item(), term) for term, part in allowed.terms.items()), reverse=True)
    why = " + ".join(f"{value:.1e} {term}" for value, term in terms[:2])
    where = ",".join(f"{letter}{n}" for letter, n in zip(_AXES[name], at, strict=True))
    raise Finding(
        f"{name}[{where}] = {got[at].item():.6g}, {against} {want[at].item():.6g}:"
        f" off by {error[at].item():.2e}, allowed {limit[at].item():.2e} ({why})",
        measured={"error": error[at].item(), "allowed": limit[at].item()},
    )


_AXES = {"out": "bhqc", "lse": "bhq", "dq": "bhqc", "dk": "bhkc", "dv": "bhkc", "dbias": "bhqk"}
