"""The calls that a property makes beside that of its case: a shifted, permuted, shortened problem,
a neighbour in a sequence. Each has a name, PROPERTY:NUMBER; `CASE~PROPERTY:NUMBER` replays it.
"""

from __future__ import annotations

import re
from contextlib import suppress
from dataclasses import dataclass, replace

from verify.diagnosis.trial import Trial
from verify.errors import VerifyError
from verify.properties.catalogue import named
from verify.reference.reference import about
from verify.registry import Kernel
from verify.sandbox.call import Called, recorded
from verify.spec.case import Case
from verify.spec.finding import Finding

MOST = 40
"""So many calls of a property are looked at."""


@dataclass(frozen=True)
class Derived:
    """One call of a property on a case."""

    case: Case
    prop: str
    number: int
    """From 1, in the order in which the property makes them."""

    def __str__(self) -> str:
        return f"{self.case}~{self.prop}:{self.number}"

    @classmethod
    def parse(cls, text: str) -> Derived | None:
        """Inverse of str(); None for the id of a case. Raises VerifyError where it is neither."""
        case, mark, call = text.partition("~")
        if not mark:
            return None
        found = re.fullmatch(r"([\w-]+):(\d+)", call)
        if not found:
            raise VerifyError(f"call {call!r} does not parse: write it like CASE~prefix:2")
        return cls(Case.parse(case), named(found[1]).name, int(found[2]))


def calls(kernel: Kernel, device: str, case: Case, prop: str) -> list[Called]:
    """What a property calls the kernel with on a case, until it breaks."""
    with recorded() as made, suppress(Finding):
        named(prop).check(kernel, case, device)
    return made[:MOST]


def call_of(kernel: Kernel, device: str, derived: Derived) -> Called:
    """The call of that name. Raises VerifyError where the property makes fewer."""
    made = calls(kernel, device, derived.case, derived.prop)
    if not 1 <= derived.number <= len(made):
        raise VerifyError(f"{derived}: {derived.prop} makes {len(made)} calls on this case")
    return made[derived.number - 1]


def wrong_call(kernel: Kernel, device: str, case: Case, prop: str) -> tuple[Derived, Trial] | None:
    """The first call that is wrong by itself, judged against the exact answer; None where each is
    right.
    """
    for number, made in enumerate(calls(kernel, device, case, prop), 1):
        if made.output is not None and not made.dropout and _finite(made):
            known = about(made.problem, made.inputs)
            trial = Trial(kernel, replace(case, problem=made.problem), known, made.output)
            if trial.wrong:
                return Derived(case, prop, number), trial
    return None


def _finite(made: Called) -> bool:
    """Whether the oracle has an answer to it."""
    x = made.inputs
    return all(bool(t.isfinite().all()) for t in (x.q, x.k, x.v, x.do))
