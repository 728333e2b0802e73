"""A kernel on a failing case, judged tensor by tensor, and called again in other circumstances to see whether they matter."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from verify.bounds import Allowance
from verify.case import ARRANGED, Case, Inputs
from verify.expectation import Expectation
from verify.finding import Finding
from verify.guard import Output, call
from verify.layouts import same_memory
from verify.measure import distance, measure, same
from verify.oracles import dense
from verify.problem import Problem
from verify.properties.strategies import SCORES_AT_MOST
from verify.properties.truth import Truth, truth
from verify.recipes import NORMAL
from verify.registry import Kernel

TENSORS = ("out", "lse", "dq", "dk", "dv", "dbias")
CALLS = 3
"""So many calls on the same inputs show whether anything else matters."""
AMPLE = 8
"""Hypotheses are told apart on a case of at least so many rows, keys and columns, if the same tensors are wrong there."""


@dataclass(frozen=True)
class Trial:
    """What a kernel gave on a case, beside the truth: the case's, or that of something else that it may have computed."""

    kernel: Kernel
    case: Case
    known: Truth
    output: Output

    @cached_property
    def limits(self) -> dict[str, Allowance]:
        """How far each tensor may be from the exact one."""
        return self.known.allowances(self.kernel.numerics(self.known.problem, self.known.device))

    @cached_property
    def expected(self) -> Expectation | None:
        """How large their errors should be."""
        return self.known.expectation(self.kernel.numerics(self.known.problem, self.known.device))

    @cached_property
    def names(self) -> list[str]:
        """The tensors that can be judged."""
        return [n for n in TENSORS if getattr(self.output, n) is not None and getattr(self.known.exact, n) is not None]

    @cached_property
    def wrong(self) -> list[str]:
        """Those of them that are wrong."""
        return [name for name in self.names if not self.right(name, self.got(name))]

    @property
    def tiles(self) -> tuple[int, ...]:
        """The sizes of the blocks that the kernel works in."""
        return tuple(getattr(self.kernel, "tiles", ())) or (64,)

    def got(self, name: str) -> Tensor:
        """The kernel's tensor, float64."""
        return getattr(self.output, name).to(torch.float64)

    def want(self, name: str) -> Tensor:
        """The exact one, in a row without a visible key what the kernel declares."""
        want, empty = getattr(self.known.exact, name), (self.known.exact.lse == -torch.inf).unsqueeze(-1)
        return want.masked_fill(empty, torch.nan) if name == "out" and self.kernel.empty_row == "nan" else want

    def off(self, name: str, got: Tensor) -> Tensor:
        """Which elements are farther from it than allowed."""
        return distance(got, self.want(name)) > self.limits[name].limit

    def right(self, name: str, got: Tensor) -> bool:
        """Whether an honest kernel may give this."""
        return not self.off(name, got).any() and (self.expected is None or self.expected.surprise(name, got) is None)

    def mended(self, name: str, inputs: Inputs) -> bool:
        """Whether this tensor is right when the kernel finds the same values in other surroundings."""
        asked = self.case.problem if name in ("out", "lse") else self.known.problem
        try:
            return self.right(name, getattr(call(self.kernel, asked, inputs), name))
        except Finding:
            return False

    def fits(self, name: str, problem: Problem, inputs: Inputs) -> bool:
        """Whether what the kernel gave is right for these, and nearer to their exact answer."""
        other = replace(self, known=Truth(problem, inputs, dense.exact(problem, inputs)))
        got = self.got(name)
        return measure(got, other.want(name)).rmse < measure(got, self.want(name)).rmse and other.right(name, got)


def tried(kernel: Kernel, case: Case, device: str) -> tuple[Trial, list[Output]]:
    """The kernel on the case: the first of a few calls that is wrong, with gradients where it has some; and all of the calls.

    Raises Finding where a call itself fails.
    """
    graded = replace(case, problem=case.problem.but(grads=True))
    known = truth(case if kernel.unsupported(graded.problem, device) else graded, device)
    calls = [call(kernel, case.problem, known.inputs) for _ in range(CALLS)]
    chosen = next((output for output in calls if Trial(kernel, case, known, output).wrong), calls[0])
    if known.problem != case.problem:
        try:
            chosen = replace(call(kernel, known.problem, known.inputs), out=chosen.out, lse=chosen.lse)
        except Finding:  # of gradients that nobody asked for
            known = truth(case, device)
    return Trial(kernel, case, known, chosen), calls


def ample(trial: Trial) -> Trial | None:
    """The kernel on a larger case where the same tensors are wrong; None where they are not."""
    p = trial.case.problem
    times = max(-(-AMPLE // max(1, n)) for n in (p.len_q, p.len_k))
    problem = p.but(len_q=times * p.len_q, len_k=times * p.len_k, dim_qk=max(AMPLE, p.dim_qk), dim_v=max(AMPLE, p.dim_v))
    case = replace(trial.case, problem=problem, recipe=NORMAL if trial.case.recipe.name == "integers" else trial.case.recipe)
    costly = p.batch * p.heads_q * problem.len_q * problem.len_k > SCORES_AT_MOST[trial.known.device]
    if costly or case == trial.case or trial.kernel.unsupported(problem, trial.known.device):
        return None
    try:
        larger, _ = tried(trial.kernel, case, trial.known.device)
    except Finding:
        return None
    return larger if larger.wrong == trial.wrong else None


def unsteady(trial: Trial, calls: list[Output]) -> Iterator[str]:
    """Tensors that differ between calls on the same inputs."""
    for name in (n for n in TENSORS if getattr(calls[0], n) is not None):
        first, *others = (getattr(output, name) for output in calls)
        if any(bool((distance(first, other) > 2 * trial.limits[name].limit).any()) for other in others):
            yield f"state kept between calls, or a race ({name} differs by more than two right answers may)"
        elif not all(bool(same(first, other).all()) for other in others) and _repeats(trial):
            yield f"a race, or atomics ({name} differs in some bits from call to call)"


def _repeats(trial: Trial) -> bool:
    return trial.kernel.numerics(trial.known.problem, trial.known.device).deterministic


def strides(kernel: Kernel, case: Case, device: str, name: str) -> list[str]:
    """The tensors whose layout matters: without it `name` is right, or the call succeeds."""

    def mended(kept: tuple[tuple[str, str], ...]) -> bool:
        try:
            trial, _ = tried(kernel, replace(case, layouts=kept), device)
        except Finding:
            return False
        return name not in trial.wrong

    alone = [pair for pair in case.layouts if mended(tuple(other for other in case.layouts if other != pair))]
    which = alone or (case.layouts if case.layouts and mended(()) else ())
    return [f"the strides or the alignment of {tensor} (right where it is contiguous, not {layout})" for tensor, layout in which]


def memory(trial: Trial, name: str) -> list[str]:
    """What the kernel reads and should not: beside its inputs, or allocated and not filled."""
    x = trial.known.inputs
    beside = [t for t in ARRANGED if getattr(x, t) is not None and trial.mended(name, replace(x, **{t: _clean(getattr(x, t))}))]
    if not beside and trial.mended(name, x.map(_clean)):
        beside = ["several inputs"]
    stages = [f"reads memory that it does not own ({name} is right with 0, not NaN, beside {tensor})" for tensor in beside]
    with _Zeroed():
        if not stages and trial.mended(name, x):
            stages = [f"uses memory that it allocated and did not fill ({name} is right where that holds 0, not NaN)"]
    return stages


def _clean(x: Tensor) -> Tensor:
    """The same tensor in the same memory, 0 where that holds NaN."""
    copy = same_memory(x)
    copy.new_empty(0).set_(copy.untyped_storage()).nan_to_num_(0.0)
    return copy


class _Zeroed(TorchFunctionMode):
    """Around a call, zeros in place of the NaN that verify.guard fills memory with."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (Tensor.fill_, torch.full):
            args = tuple(0.0 if isinstance(a, float) and math.isnan(a) else a for a in args)
        return func(*args, **(kwargs or {}))
