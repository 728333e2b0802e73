"""The law of dropout. With V = identity a kernel shows its weights P * M / (1 - p), element by
element; M is read off them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from verify.bounds.constants import (
    FALSE_ALARM,
    UNBOUNDED,
    Allowance,
    Terms,
    Units,
    dropout_error,
    total,
    unbounded,
)
from verify.bounds.exact import from_keys, grouped, to_keys, ungrouped
from verify.properties.property import Verdict, agree, holds, limits
from verify.reference.compare import compare
from verify.reference.reference import Truth, about, truth
from verify.registry import Kernel
from verify.sandbox.call import call
from verify.spec.case import Case
from verify.spec.finding import Finding
from verify.spec.layouts import laid_out

RATES = (0.1, 0.5, 0.9)
COMPARED = 1024
"""Heads of all batch entries that are compared in pairs."""


@holds(takes="dropout")
def dropout(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out = (P * M / (1 - p)) V and dV = (P * M / (1 - p))^T dO with one mask M: Bernoulli(1 - p),
    independent over heads, batch entries and calls, the same again from the same seed of torch's
    generator. p = 0 drops nothing."""
    rate = RATES[case.seed % len(RATES)]
    shown = _readable(kernel, case, device, rate)
    if why := _refusal(kernel, case, shown, device, rate):
        return Verdict(unsupported=why)
    known = truth(shown, device)
    bitwise = _nothing_is_dropped(kernel, known, shown.seed)
    weights, again = _weights(kernel, known, rate, shown.seed)
    if not weights.told.any():
        return Verdict(unsupported="no weight can be told from a dropped one")
    _kept_as_often(weights)
    _heads_differ(weights)
    _calls_differ(weights, again)
    _same_mask(kernel, known, weights, shown.seed)
    return Verdict(bitwise=bitwise)


@dataclass(frozen=True)
class _Weights:
    """P, what a kept P / (1 - p) may be off by, which are large enough that kept and dropped
    differ, which of these were kept: each [B,H,Q,K]."""

    rate: float
    p: Tensor
    error: Tensor
    told: Tensor
    kept: Tensor

    @property
    def scaled(self) -> Tensor:
        """P / (1 - p)"""
        return self.p / (1 - self.rate)


def _readable(kernel: Kernel, case: Case, device: str, rate: float) -> Case:
    """The case, with no more keys than V has columns, and with gradients where the kernel has
    them.
    """
    problem, layouts = case.problem, case.layouts
    if problem.len_k > problem.dim_v:
        problem, layouts = (
            problem.but(dim_v=problem.dim_qk, len_k=min(problem.len_k, problem.dim_qk)),
            (),
        )
    graded = problem.but(grads=True)
    takes = kernel.unsupported(graded, device, dropout=rate) is None
    return replace(case, problem=graded if takes else problem, layouts=layouts)


def _refusal(kernel: Kernel, case: Case, shown: Case, device: str, rate: float) -> str | None:
    if why := kernel.unsupported(shown.problem, device, dropout=rate):
        return why
    if kernel.numerics(shown.problem, device).quantised is not None:
        return "V = identity does not show what quantisation does to another V"
    issue = kernel.known_issue(shown, device, "dropout")
    if issue and not kernel.known_issue(case, device, "dropout"):
        return f"known: {issue.summary}"
    return None


def _nothing_is_dropped(kernel: Kernel, known: Truth, seed: int) -> bool:
    """Without dropout the generator does not matter. Returns whether not a bit differed."""
    torch.manual_seed(seed)
    one = call(kernel, known.problem, known.inputs)
    torch.manual_seed(seed + 1)
    two = call(kernel, known.problem, known.inputs)
    bitwise = agree(one, two, limits(kernel, known), "p = 0, another seed", ("out",))
    if not bitwise and kernel.numerics(known.problem, known.device).deterministic:
        raise Finding("out: p = 0, and yet the seed of torch's generator changes bits")
    return bitwise


def _weights(kernel: Kernel, known: Truth, rate: float, seed: int) -> tuple[_Weights, Tensor]:
    """What V = identity shows: the weights with the generator seeded, each of them checked, and
    what the next call keeps.
    """
    p, like = known.problem, known.inputs.v
    eye = torch.eye(p.len_k, p.dim_v, dtype=like.dtype, device=like.device).expand(like.shape)
    inputs = replace(known.inputs, v=laid_out(eye))
    exact = about(p.but(grads=False), inputs)
    allowed, want = limits(kernel, exact)["out"], exact.exact.out
    units = Units(p, kernel.numerics(p, known.device), known.device)
    error = dropout_error(units, want, allowed.limit.clamp(max=UNBOUNDED), rate)
    if kernel.empty_row == "nan":
        error = error.masked_fill((exact.exact.lse == -torch.inf).unsqueeze(-1), UNBOUNDED)
    torch.manual_seed(seed)
    first, second = (call(kernel, p, inputs, dropout=rate).out for _ in range(2))
    scaled, terms = (
        want / (1 - rate),
        {name: part / (1 - rate) for name, part in allowed.terms.items()},
    )
    against = f"with p = {rate:g} and V = identity (P * M / (1 - p)); exact, if kept,"
    compare(
        "out", first, torch.where(first == 0, 0.0, scaled), _allowed(terms, error), against=against
    )
    told, columns = scaled > error, slice(0, p.len_k)
    found = (want, error, told, told & (first != 0), told & (second != 0))
    *mine, again = (t[..., columns] for t in found)
    return _Weights(rate, *mine), again


def _kept_as_often(w: _Weights) -> None:
    kept, n = int(w.kept.sum()), int(w.told.sum())
    low, high = _interval(n, 1 - w.rate)
    if not low <= kept <= high:
        raise Finding(
            f"{kept} of {n} weights are kept at p = {w.rate:g}: allowed {low:.0f} to {high:.0f}"
            f" (Bernoulli({1 - w.rate:g}), but for a probability of {FALSE_ALARM:g})",
            measured={"kept": kept / n},
        )


def _heads_differ(w: _Weights) -> None:
    """Any two (batch entry, head), the first ones of very many."""
    some = (t.flatten(0, 1)[:COMPARED].flatten(1) for t in (w.told, w.kept))
    told, kept = (t.to(torch.float64) for t in some)
    dropped = told - kept
    alike, seen = kept @ kept.mT + dropped @ dropped.mT, told @ told.mT
    one, two = torch.triu_indices(len(told), len(told), 1, device=told.device)
    if not len(one):
        return
    mine = kept @ told.mT  # what each keeps of what is told of both
    counts, n, first, second = (t[one, two].cpu().numpy() for t in (alike, seen, mine, mine.mT))
    low, high = _interval(n, _by_chance(first, second, n), tests=len(one))
    far = np.maximum(counts - high, low - counts)
    at = int(far.argmax())
    if far[at] > 0:
        names = [f"b{i // w.p.shape[1]},h{i % w.p.shape[1]}" for i in (int(one[at]), int(two[at]))]
        raise Finding(
            f"the heads {names[0]} and {names[1]} {_alike(counts[at], n[at], low[at], high[at])} "
            f"at p = {w.rate:g}"
        )


def _calls_differ(w: _Weights, again: Tensor) -> None:
    alike, n = int((w.kept == again)[w.told].sum()), int(w.told.sum())
    low, high = _interval(n, _by_chance(int(w.kept.sum()), int(again.sum()), n))
    if not low <= alike <= high:
        raise Finding(
            f"two calls {_alike(alike, n, low, high)} at p = {w.rate:g}, torch's generator not "
            "seeded in between"
        )


def _by_chance(first, second, n):
    """How likely two masks that keep so many of n agree on one, if they are independent, whatever
    the rate that they have.
    """
    one, two = first / np.maximum(n, 1), second / np.maximum(n, 1)
    return one * two + (1 - one) * (1 - two)


def _alike(count: float, n: float, low: float, high: float) -> str:
    what = "drop the same weights:" if count == n else "have masks that depend on each other:"
    return f"{what} {count:.0f} of {n:.0f} agree, of independent ones {low:.0f} to {high:.0f}"


def _interval(n, probability: float, *, tests: int = 1):
    """Outside of these counts lies a binomial variable with at most FALSE_ALARM in all tests.
    Numbers, or arrays of them.
    """
    from scipy.stats import binom  # noqa: PLC0415 - it takes as long to import as half of torch

    share = FALSE_ALARM / (2 * tests)
    return np.maximum(binom.ppf(share, n, probability), 0), np.minimum(
        binom.isf(share, n, probability), n
    )


def _same_mask(kernel: Kernel, known: Truth, w: _Weights, seed: int) -> None:
    """From the same seed the case's own V and dO meet the weights that were seen; one that was not
    told may be kept or not.
    """
    p, x = known.problem, known.inputs.exact(known.device)
    torch.manual_seed(seed)
    output = call(kernel, p, known.inputs, dropout=w.rate)
    units = Units(p, kernel.numerics(p, known.device), known.device)
    seen, error = (grouped(t, p) for t in (torch.where(w.kept, w.scaled, 0.0), w.error))
    doubt = grouped(torch.where(w.told, 0.0, w.scaled), p)
    against = f"p = {w.rate:g}, {{}} of the weights seen with V = identity from the same seed,"

    beyond = unbounded((w.error >= UNBOUNDED).any(-1, keepdim=True))
    terms = {
        name: ungrouped(from_keys(t, x.v.abs())) + beyond
        for name, t in (("weights", error), ("weights too small", doubt))
    }
    want = ungrouped(from_keys(seen, x.v))
    units.store(terms, "output", want)
    compare(
        "out",
        output.out,
        want,
        _allowed(terms, total(terms)),
        against=against.format("product with V"),
    )
    if output.dv is None:
        return
    do, beyond = grouped(x.do, p), grouped(beyond, p).sum((2, 3))[:, :, None]
    terms = {
        name: to_keys(t, do.abs()) + beyond
        for name, t in (("weights", error), ("weights too small", doubt))
    }
    limit = limits(kernel, known)["dv"].limit.clamp(max=UNBOUNDED)
    terms["without dropout"] = dropout_error(units, torch.zeros_like(limit), limit, w.rate)
    want = to_keys(seen, do)
    units.store(terms, "output", want)
    compare(
        "dv",
        output.dv,
        want,
        _allowed(terms, total(terms)),
        against=against.format("product with dO"),
    )


def _allowed(terms: Terms, limit: Tensor) -> Allowance:
    return Allowance(limit.masked_fill(limit >= UNBOUNDED, torch.inf), terms)
