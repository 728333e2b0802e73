"""A kernel on a failing case, judged tensor by tensor, and called again in other circumstances to
see whether they matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from verify.bounds.constants import ALIKE, Allowance
from verify.bounds.expected import Expectation
from verify.bounds.metrics import distance, measure, same
from verify.generation.sizes import SCORES_AT_MOST
from verify.oracles import float64
from verify.properties.property import TENSORS
from verify.reference.reference import Truth, tests, truth
from verify.registry import Kernel
from verify.sandbox.allocations import zeroed
from verify.sandbox.call import Output, call
from verify.spec.case import ARRANGED, Case, Inputs
from verify.spec.finding import Finding
from verify.spec.inputs import NORMAL
from verify.spec.layouts import laid_out, same_memory
from verify.spec.problem import Problem

CALLS = 3
"""So many calls on the same inputs show whether anything else matters."""
AMPLE = 8
"""Hypotheses are told apart on a case of at least so many rows, keys and columns, if the same
tensors are wrong there, too.
"""


@dataclass(frozen=True)
class Trial:
    """What a kernel gave on a case, beside the truth: the case's, or that of something else that it
    may have computed.
    """

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
        """How large their errors should be, as many tests as the case itself has."""
        arithmetic = self.kernel.numerics(self.known.problem, self.known.device)
        expected = self.known.expectation(arithmetic)
        as_many = tests(self.case.problem)
        return None if expected is None else replace(expected, tests=as_many)

    @cached_property
    def names(self) -> list[str]:
        """The tensors that can be judged."""
        return [
            n
            for n in TENSORS
            if getattr(self.output, n) is not None and getattr(self.known.exact, n) is not None
        ]

    @cached_property
    def wrong(self) -> list[str]:
        """Those of them that are wrong."""
        return [name for name in self.names if not self.right(name, self.got(name))]

    @property
    def tiles(self) -> tuple[int, ...]:
        """The sizes of the blocks that the kernel works in."""
        return tuple(dict.fromkeys(self.kernel.tiles)) or (64,)

    def ends(self, length: int) -> list[int]:
        """Where a loop may end too early: before the last, partial tile, or before the last
        element.
        """
        return sorted(
            ({length - length % tile for tile in self.tiles} | {length - 1}) - {-1, 0, length}
        )

    def got(self, name: str) -> Tensor:
        """The kernel's tensor, float64."""
        return getattr(self.output, name).to(torch.float64)

    def want(self, name: str) -> Tensor:
        """The exact one, in a row without a visible key what the kernel declares."""
        want, empty = (
            getattr(self.known.exact, name),
            (self.known.exact.lse == -torch.inf).unsqueeze(-1),
        )
        return (
            want.masked_fill(empty, torch.nan)
            if name == "out" and self.kernel.empty_row == "nan"
            else want
        )

    def off(self, name: str, got: Tensor) -> Tensor:
        """Which elements are farther from it than allowed."""
        return distance(got, self.want(name)) > self.limits[name].limit

    def right(self, name: str, got: Tensor) -> bool:
        """Whether an honest kernel may give this."""
        return not self.off(name, got).any() and (
            self.expected is None or self.expected.surprise(name, got) is None
        )

    def again(self, name: str, inputs: Inputs) -> Tensor | None:
        """This tensor from another call, with these inputs; None where that fails."""
        asked = self.case.problem if name in ("out", "lse") else self.known.problem
        try:
            return getattr(call(self.kernel, asked, inputs), name)
        except Finding:
            return None

    def mended(self, name: str, inputs: Inputs) -> bool:
        """Whether it is right when the kernel finds the same values in other surroundings, and
        wrong again in its own.
        """
        other = self.again(name, inputs)
        if other is None or not self.right(name, other):
            return False
        back = self.again(name, self.known.inputs)
        return back is None or not self.right(name, back)

    def fits(self, name: str, problem: Problem, inputs: Inputs) -> bool:
        """Whether what the kernel gave is right for these, and nearer to their exact answer."""
        other = replace(self, known=Truth(problem, inputs, float64.exact(problem, inputs)))
        got, telling = self.got(name), bool(other.limits[name].limit.isfinite().all())
        there, here = (measure(got, trial.want(name)).rmse for trial in (other, self))
        nearer = (
            there < here if other.expected is not None else ALIKE * there**2 < here**2
        )  # bounds alone may be wide
        return telling and nearer and other.right(name, got)


def tried(kernel: Kernel, case: Case, device: str) -> tuple[Trial, list[Output]]:
    """The kernel on the case: the first of a few calls that is wrong, with gradients where it has
    some; and all of the calls.

    Raises Finding where a call itself fails.
    """
    graded = replace(case, problem=case.problem.but(grads=True))
    known = truth(case if kernel.unsupported(graded.problem, device) else graded, device)
    calls = [call(kernel, case.problem, known.inputs) for _ in range(CALLS)]
    chosen = next(
        (output for output in calls if Trial(kernel, case, known, output).wrong), calls[0]
    )
    if known.problem != case.problem:
        try:
            chosen = replace(
                call(kernel, known.problem, known.inputs), out=chosen.out, lse=chosen.lse
            )
        except Finding:  # of gradients that nobody asked for
            known = truth(case, device)
    return Trial(kernel, case, known, chosen), calls


def ample(trial: Trial) -> Trial | None:
    """The kernel on a larger case where the same tensors are wrong, and perhaps others; None where
    they are not.
    """
    p = trial.case.problem
    times = max(-(-AMPLE // max(1, n)) for n in (p.len_q, p.len_k))
    problem = p.but(
        len_q=times * p.len_q,
        len_k=times * p.len_k,
        dim_qk=max(AMPLE, p.dim_qk),
        dim_v=max(AMPLE, p.dim_v),
    )
    case = replace(
        trial.case,
        problem=problem,
        recipe=NORMAL if trial.case.recipe.family.whole else trial.case.recipe,
    )
    costly = (
        p.batch * p.heads_q * problem.len_q * problem.len_k > SCORES_AT_MOST[trial.known.device]
    )
    if costly or case == trial.case or trial.kernel.unsupported(problem, trial.known.device):
        return None
    try:
        larger, _ = tried(trial.kernel, case, trial.known.device)
    except Finding:
        return None
    return larger if set(trial.wrong) <= set(larger.wrong) else None


def unsteady(trial: Trial, calls: list[Output]) -> Iterator[str]:
    """Tensors that differ between calls on the same inputs, or do not differ where the inputs
    do.
    """
    repeats = trial.kernel.numerics(trial.known.problem, trial.known.device).deterministic
    for name in (n for n in TENSORS if getattr(calls[0], n) is not None):
        first, *others = (getattr(output, name) for output in calls)
        if any(
            bool((distance(first, other) > 2 * trial.limits[name].limit).any()) for other in others
        ):
            yield (
                f"state kept between calls, or a race ({name} differs by more than two right "
                "answers may)"
            )
        elif repeats and not all(bool(same(first, other).all()) for other in others):
            yield f"a race, or atomics ({name} differs in some bits from call to call)"
    if "out" in trial.wrong and trial.output.out.nan_to_num().any():
        negated = trial.again(
            "out", replace(trial.known.inputs, v=_altered(trial.known.inputs.v, Tensor.neg_))
        )
        if negated is not None and bool(same(trial.output.out, negated).all()):
            yield "state kept between calls (out is the same for -V)"


def strides(case: Case, inputs: Inputs, mended: Callable[[Inputs], bool]) -> list[str]:
    """The tensors whose layout matters: `mended` when the same values are contiguous."""
    plain = {
        name: laid_out(getattr(inputs, name))
        for name, _ in case.layouts
        if getattr(inputs, name) is not None
    }
    which = [name for name, tensor in plain.items() if mended(replace(inputs, **{name: tensor}))]
    which = which or (list(plain) if plain and mended(replace(inputs, **plain)) else [])
    layouts = dict(case.layouts)
    return [
        f"the strides or the alignment of {name} (right where it is contiguous, not "
        f"{layouts[name]})"
        for name in which
    ]


def memory(trial: Trial, name: str) -> list[str]:
    """What the kernel reads and should not: beside its inputs, or allocated and not filled."""
    x, got = trial.known.inputs, trial.got(name)
    beside = [
        t
        for t in ARRANGED
        if getattr(x, t) is not None
        and trial.mended(name, replace(x, **{t: _clean(getattr(x, t))}))
    ]
    if not beside and trial.mended(name, x.map(_clean)):
        beside = ["several inputs"]
    if beside:
        return [
            f"reads memory that it does not own ({name} is right with 0 beside {tensor})"
            for tensor in beside
        ]
    with zeroed():
        other = trial.again(name, x)
    if other is not None and trial.right(name, other):
        return [
            f"uses memory that it allocated and did not fill ({name} is right where that holds 0, "
            "not NaN)"
        ]
    unset = got.isnan() & trial.off(name, got)
    if other is not None and unset.any() and not other[unset].any():
        return [
            f"the store of {name} ({int(unset.sum())} elements are never stored: they hold what "
            "their memory held)"
        ]
    if trial.mended(name, x.map(lambda t: t.contiguous().clone())):
        return [
            f"where a tensor lies in memory ({name} is right where each starts an allocation of "
            "its own)"
        ]
    return []


def _altered(x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """The same tensor with all of the memory that it lies in changed, in place."""
    copy = same_memory(x)
    change(copy.new_empty(0).set_(copy.untyped_storage()))
    return copy


def _clean(x: Tensor) -> Tensor:
    """The same values, 0 in the memory beside them."""
    return (
        _altered(x, Tensor.zero_).copy_(x)
        if 0 not in x.stride()
        else _altered(x, Tensor.nan_to_num_)
    )
