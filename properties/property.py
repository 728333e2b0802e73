"""Property: a law as a short function. It raises a Finding where the law is broken; its docstring
is the law in symbols.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from verify.bounds.constants import Allowance
from verify.bounds.metrics import same
from verify.errors import VerifyError
from verify.reference.compare import compare
from verify.reference.reference import Truth
from verify.registry import Kernel
from verify.sandbox.call import Output, call
from verify.sandbox.capabilities import anchors, options
from verify.spec.case import Case
from verify.spec.finding import Finding
from verify.spec.requirements import NOTHING, Requirements


@dataclass
class Verdict:
    """The law held. `unsupported` says why nothing was judged; `blind_to` what the case could not
    have seen; `bitwise` whether two results that must agree agreed to the last bit; `measured`
    errors over what was expected and proved."""

    unsupported: str | None = None
    blind_to: list[str] = field(default_factory=list)
    bitwise: bool | None = None
    measured: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Property:
    """A law of attention, and what it needs of a case and of a kernel."""

    name: str
    law: str
    check: Callable[[Kernel, Case, str], Verdict]
    needs: Requirements = NOTHING
    """What its cases must be."""
    lse: bool = False
    """The kernel must return an LSE."""
    takes: str = ""
    """The keyword that the kernel must take."""
    calls: int = 2
    """So many times, or so, it calls the kernel on a case."""
    core: bool = False
    """It compares every element with the exact answer; such properties get a large share."""
    style: bool = False
    """What it finds is no wrong result: shown last, and a failure only where that is asked for."""
    declares: str = ""
    """The field of the kernel that must be set."""

    def refusal(self, kernel: Kernel, device: str) -> str | None:
        """Return why it cannot be judged on this kernel at all, or None where it can."""
        if self.takes and self.takes not in kernel.takes:
            return f"takes no `{self.takes}`"
        if self.declares and not getattr(kernel, self.declares):
            return f"does not declare {self.declares}"
        if refusal := options(kernel, device).refusal(lse=self.lse):
            return refusal
        if anchors(kernel, device, self.needs):
            return None
        return f"takes no problem {self.needs}"


PROPERTIES: dict[str, Property] = {}
BOTH = ("out", "lse")
TENSORS = ("out", "lse", "dq", "dk", "dv", "dbias")


def holds(
    *,
    full_mask: bool = False,
    hides: bool = False,
    no_bias: bool = False,
    grads: bool = False,
    grouped: bool = False,
    several: bool = False,
    arranged: bool = False,
    same_heads: bool = False,
    lse: bool = False,
    takes: str = "",
    calls: int = 2,
    core: bool = False,
    style: bool = False,
    backward: bool = False,
    declares: str = "",
) -> Callable[[Callable[..., Verdict]], Callable[..., Verdict]]:
    """Register a function (kernel, case, device) -> Verdict as a property, by its name.

    The arguments are the fields of Requirements and of Property. With `backward` it is registered
    as NAME-gradients, too, whose cases have gradients.
    """
    needs = Requirements(
        full_mask=full_mask,
        hides=hides,
        no_bias=no_bias,
        grads=grads,
        grouped=grouped,
        several=several,
        arranged=arranged,
        same_heads=same_heads,
    )

    def register(check: Callable[..., Verdict]) -> Callable[..., Verdict]:
        name = check.__name__.replace("_", "-")
        text = (check.__doc__ or "").strip()
        law = Property(name, text, check, needs, lse, takes, calls, core, style, declares)
        PROPERTIES[name] = law
        if backward:
            other = f"{name}-gradients"
            PROPERTIES[other] = replace(law, name=other, needs=replace(needs, grads=True))
        return check

    return register


def named(name: str) -> Property:
    """Return the property of this name. Raises VerifyError for another."""
    if name not in PROPERTIES:
        raise VerifyError(f"property {name!r} is unknown: one of {', '.join(PROPERTIES)}")
    return PROPERTIES[name]


def rng(case: Case) -> np.random.Generator:
    """What a law draws for itself, from the case's seed."""
    return np.random.Generator(np.random.Philox(case.seed))


def limits(kernel: Kernel, known: Truth) -> dict[str, Allowance]:
    """How far this kernel may be from that truth."""
    return known.allowances(kernel.numerics(known.problem, known.device))


def sound(kernel: Kernel, case: Case, device: str, law: str) -> bool:
    """Whether the kernel takes a case that a law has changed, and is not known to be wrong on
    it.
    """
    return not kernel.unsupported(case.problem, device) and not kernel.known_issue(
        case, device, law
    )


def answer(kernel: Kernel, known: Truth) -> Output:
    """What the kernel makes of it."""
    return call(kernel, known.problem, known.inputs)


def both(one: Allowance, two: Allowance | Tensor) -> Allowance:
    """How far two results may be apart: each off by its own allowance, or by that and what is known
    of the difference.
    """
    other = two.limit if isinstance(two, Allowance) else two
    return Allowance(one.limit + other, one.terms | {"the other": other.expand_as(one.limit)})


def difference(one: Output, two: Output) -> str:
    """The first element in which two outputs are not the same to the last bit; empty where they
    are.
    """
    for name in TENSORS:
        a, b = getattr(one, name), getattr(two, name)
        if a is not None and b is not None and not (equal := same(a, b)).all():
            at = tuple((~equal).nonzero()[0].tolist())
            return (
                f"{name}{list(at)} is {b[at].item():.9g}, was {a[at].item():.9g}; "
                f"{int((~equal).sum())} of {a.numel()} elements"
            )
    return ""


def agree(
    one: Output,
    two: Output,
    allowed: dict[str, Allowance],
    against: str,
    names: tuple[str, ...] = TENSORS,
    *,
    times: int = 2,
) -> bool:
    """Whether two outputs for the same exact answer agree to the last bit. Raises a Finding where
    they are farther apart than so many times the allowance: each may be off by its own.
    """
    bitwise = True
    for name in names:
        got, want = getattr(one, name), getattr(two, name)
        if got is not None and want is not None:
            compare(name, got, want, allowed[name], against=against, times=times)
            bitwise &= bool(same(got, want).all())
    return bitwise


def doubled(name: str, got: Tensor, once: Tensor, factor: float, against: str) -> bool:
    """Whether got = factor * once to the last bit, where nothing on the way overflows, a change of
    base included, and the last places of FP32 and of the result are normal numbers. `factor` is a
    power of two.
    """
    form, want = torch.finfo(once.dtype), once.double() * factor
    smallest = max(f.tiny / f.eps for f in (form, torch.finfo(torch.float32)))
    inside = (want.abs() <= form.max / 4) & (
        torch.minimum(want.abs(), once.abs().double()) >= smallest
    )
    wrong = inside & (got.double() != want)
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise Finding(
            f"{name}{list(at)} = {got[at].item():.9g}, {factor:g} times {against} "
            f"{once[at].item():.9g}: must be exact"
        )
    return True
