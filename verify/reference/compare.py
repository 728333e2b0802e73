"""A kernel's tensors against the truth: each element within the proved bound, and errors as large
and even as honest ones.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from verify.bounds.constants import FALSE_ALARM, Allowance
from verify.bounds.exact import Exact
from verify.bounds.expected import DIRECTIONS, Expectation, Surprise
from verify.bounds.metrics import distance, worst
from verify.reference.reference import Truth
from verify.registry import Kernel
from verify.sandbox.call import Output
from verify.spec.finding import Finding


@dataclass(frozen=True)
class Judged:
    """What a kernel was judged by: the proved bounds, the expectation (None where it does not
    apply), and by tensor the largest error / proved bound and RMSE / expected.
    """

    limits: dict[str, Allowance]
    expected: Expectation | None
    left: tuple[Exact, dict[str, Allowance]] | None = None
    """Of a kernel that quantises: the exact answer of its own codes, and the bounds from that."""
    measured: dict[str, float] = field(default_factory=dict)


def judge(kernel: Kernel, output: Output, known: Truth, *, names: tuple[str, ...]) -> Judged:
    """Raise a Finding for the first of these tensors that is farther from the exact answer than it
    may be, or farther on the whole than an honest kernel of the declared arithmetic.
    """
    arithmetic = kernel.numerics(known.problem, known.device)
    left = known.left(arithmetic) if "out" in names else None
    judged = Judged(known.allowances(arithmetic), known.expectation(arithmetic), left)
    tensors = {
        n: getattr(output, n)
        for n in names
        if getattr(output, n) is not None and getattr(known.exact, n) is not None
    }
    for name, got in tensors.items():
        try:
            want = _wanted(kernel, known.exact, name)
            compare(name, got, want, judged.limits[name], against="exact")
            if left is not None and name in left[1]:
                want = _wanted(kernel, left[0], name)
                compare(name, got, want, left[1][name], against="exact, of its own codes,")
        except Finding as finding:
            raise Finding(
                finding.sentence + _expected(judged, name, got), measured=finding.measured
            ) from None
    for name, got in tensors.items():
        error, limit = distance(got, getattr(known.exact, name)), judged.limits[name].limit
        within = (limit > 0) & limit.isfinite()
        if within.any():
            judged.measured[f"{name}/proved"] = (error[within] / limit[within]).max().item()
        if judged.expected is not None:
            _judge_expected(judged, judged.expected, name, got)
    return judged


def _wanted(kernel: Kernel, exact: Exact, name: str) -> Tensor:
    """The exact tensor; NaN in rows of out that the kernel declares to be NaN."""
    want = getattr(exact, name)
    if name == "out" and kernel.empty_row == "nan":
        return want.masked_fill((exact.lse == -torch.inf).unsqueeze(-1), torch.nan)
    return want


def _judge_expected(judged: Judged, expected: Expectation, name: str, got: Tensor) -> None:
    mine, honest = expected.rmse(name, got)
    if honest:
        judged.measured[f"{name}/expected"] = mine / honest
    if found := expected.surprise(name, got):
        raise Finding(
            _surprise(name, found, mine, honest, judged.limits[name]), measured=judged.measured
        )


def _expected(judged: Judged, name: str, got: Tensor) -> str:
    """What to add to the message about one element."""
    if judged.expected is None:
        return ""
    mine, honest = judged.expected.rmse(name, got)
    return f"; RMSE {mine:.2e}, expected {honest:.2e}" + (
        f", {mine / honest:.3g} times" if honest else ""
    )


def _surprise(name: str, found: Surprise, mine: float, honest: float, allowed: Allowance) -> str:
    ratio = f", {mine / honest:.3g} times" if honest else ""
    what = DIRECTIONS.get(found.what, f"too much {found.what} for the declared arithmetic")
    terms = sorted(
        ((part.nan_to_num().mean().item(), term) for term, part in allowed.terms.items()),
        reverse=True,
    )
    return (
        f"{name}: {what}: RMSE {mine:.2e}, expected {honest:.2e}{ratio}; its score is "
        f"{found.score:.1f}, an honest kernel's"
        f" exceeds {found.level:.1f} in {FALSE_ALARM:g} of cases. No element is farther off than "
        "allowed (on average"
        f" {allowed.limit.mean().item():.1e}, most of it {terms[0][1]})"
    )


def compare(
    name: str, got: Tensor, want: Tensor, allowed: Allowance, *, against: str, times: int = 1
) -> None:
    """Raise a Finding where |got - want| exceeds `times` the allowance, at the element that exceeds
    it most.
    """
    error, limit = distance(got, want), times * allowed.limit
    at = worst(error, limit)
    if at is None:
        return
    terms = sorted(
        ((times * part[at].item(), term) for term, part in allowed.terms.items()), reverse=True
    )
    why = " + ".join(f"{value:.1e} {term}" for value, term in terms[:2])
    where = ",".join(f"{letter}{n}" for letter, n in zip(_AXES[name], at, strict=True))
    raise Finding(
        f"{name}[{where}] = {got[at].item():.6g}, {against} {want[at].item():.6g}:"
        f" off by {error[at].item():.2e}, allowed {limit[at].item():.2e} ({why})",
        measured={"error": error[at].item(), "allowed": limit[at].item()},
    )


_AXES = {"out": "bhqc", "lse": "bhq", "dq": "bhqc", "dk": "bhkc", "dv": "bhkc", "dbias": "bhqk"}
