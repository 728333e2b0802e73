"""Right, but not as declared: a kernel whose conventions or arithmetic are others than it declares,
and legitimate ones. It is judged as what it is from then on, and the line to declare is said.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

from verify.bounds.constants import UNIT
from verify.engine.causes import state_changed
from verify.engine.evaluate import evaluate
from verify.inspection import conventions
from verify.inspection.identify import identified, ordinary
from verify.inspection.questions import TORCH_CPU_ULP
from verify.properties.catalogue import PROPERTIES, Property, named
from verify.records.events import DeclaredOtherwise, FindingShrunk
from verify.registry import CONVENTIONS, Kernel
from verify.sandbox.capabilities import as_variant, learn, options, variant
from verify.sandbox.process import Interrupted
from verify.spec.arithmetic import EAGER, FLASH, ROUNDED, SHORT, Arithmetic
from verify.spec.case import Case, has_empty_row
from verify.spec.finding import Finding

FREE = frozenset({"tile", "splits", "normalized_probs", "rowsum", "exp", "summation"})
"""Fields of Arithmetic in which nobody is wrong who declared nothing."""


USUAL = tuple(
    replace(EAGER, delta=delta, scaled_query=scaled, stored_exponents=stored)
    for stored in (False, True)
    for scaled in (False, True)
    for delta in ("probs", "product")
)
"""Eager code, on a CPU and on a GPU, with Q scaled beforehand, the maximum subtracted apart."""
COMPILED = (replace(FLASH, exp_ulp=TORCH_CPU_ULP),)
"""FlexAttention of 16 bits as torch compiles it for a CPU."""
MOST_EXCUSED = 8
"""States of torch; a kernel that changes one to something else each time has no end of them."""


class Otherwise:
    """What the kernels of a run turn out to be other than they declare."""

    def __init__(self, device: str, run: Callable[..., Any]) -> None:
        """run: runs (target, function, *arguments) where the target's kernel is called, as a kernel
        with `changes`.
        """
        self._device = device
        self._run = run
        self._changes: dict[str, dict[str, Any]] = defaultdict(dict)
        self._identified: dict[str, Arithmetic | None] = {}
        self._explained: dict[str, list[tuple[Property, str]]] = defaultdict(list)
        """Cases that hold in the arithmetic that was found."""

    def changes(self, target: str) -> tuple[tuple[str, Any], ...]:
        """Fields of the kernel, with the values that it is judged by."""
        return tuple(sorted(self._changes[target].items()))

    def conventions(self, target: str, kernel: Kernel) -> tuple[Kernel, list[DeclaredOtherwise]]:
        """The kernel as its conventions were found to be, and an event where they are not those
        that it declares.
        """
        try:
            found = self._run(target, conventions.detected)
        except (Finding, Interrupted):
            return kernel, []
        if "head_map" in found and not self._holds(target, found):
            del found["head_map"]  # one shape looked like it
        if not found:
            return kernel, []
        self._changes[target] |= found
        line = ", ".join(f"{name}={value!r}" for name, value in found.items())
        event = DeclaredOtherwise(kernel=kernel.name, declare=line)
        if "own_mask" in found:
            masked = variant(kernel, self._device, (("own_mask", found["own_mask"]),))
            learn(masked, self._device, self._run(target, options))
        return variant(kernel, self._device, self.changes(target)), [event]

    def _holds(self, target: str, found: dict[str, str]) -> bool:
        """Whether the kernel of these conventions is right on a larger problem."""
        changes = tuple(sorted(found.items()))
        try:
            done = self._run(target, as_variant, changes, conventions.grouped)
        except (Finding, Interrupted):
            return False
        return bool(done)

    def excuses(self, target: str, found: FindingShrunk) -> bool:
        """Whether a finding is a state of torch that the kernel changes. It is looked for no more,
        since all properties would show it and nothing else.
        """
        before = self._changes[target].get("excused", frozenset())
        state = state_changed(found.reason)
        if not state or len(before) == MOST_EXCUSED:
            return False
        self._changes[target]["excused"] = before | {state}
        return True

    def explains(
        self, target: str, kernel: Kernel, found: FindingShrunk, *, hurried: bool = False
    ) -> DeclaredOtherwise | None:
        """Whether a finding is none in the arithmetic that the kernel was found to have: then it is
        judged by that. hurried: whether it is one of the usual ones is all that is asked.
        """
        prop = named(found.property)
        if prop.style or not found.measured:
            return None
        taken = options(kernel, self._device)
        cases = [(prop, case) for case in dict.fromkeys((found.case, found.worst))]
        if taken.crawls and (event := self._empty_row(target, found, cases)):
            return event
        if not isinstance(kernel.arithmetic, Arithmetic):
            return None
        cases = self._explained[target] + cases
        if one := self._ordinary(target):
            cases = [*cases, (PROPERTIES["oracle"], str(one))]
        short = all(Case.parse(case).problem.dtype in SHORT for _, case in cases)
        usual = self._first(target, (*COMPILED, *USUAL) if short else USUAL, cases)
        if hurried and not usual:
            return None
        known = None if taken.slow and usual else self._known(target)
        # what is not found by its bits may round less often than what most code does; a kernel
        # that calls one of several, as SDPA does, has now this arithmetic and now that
        arithmetic = self._first(target, (known,), cases) or usual
        if known and not arithmetic:
            arithmetic = self._first(target, [_coarser(known, other) for other in USUAL], cases)
        if arithmetic is None:
            return None
        self._explained[target] = list(dict.fromkeys(cases))
        self._changes[target]["arithmetic"] = arithmetic
        return DeclaredOtherwise(
            kernel=kernel.name,
            property=found.property,
            case=found.case,
            declare=f"arithmetic={arithmetic}",
            harmless=kernel.arithmetic == FLASH and _differ(arithmetic, FLASH) <= FREE,
        )

    def _empty_row(
        self, target: str, found: FindingShrunk, cases: list[tuple[Property, str]]
    ) -> DeclaredOtherwise | None:
        """Whether a finding, of these cases, is none where a row that sees no key may be another
        value. It is asked of kernels whose conventions were not read off, since their calls take
        seconds.
        """
        if "empty_row" in self._changes[target] or not all(
            has_empty_row(Case.parse(case).problem) for _, case in cases
        ):
            return None
        for value in CONVENTIONS["empty_row"][1:]:
            if self._excused(target, {"empty_row": value}, cases):
                self._changes[target]["empty_row"] = value
                return DeclaredOtherwise(
                    kernel=found.kernel,
                    property=found.property,
                    case=found.case,
                    declare=f"empty_row={value!r}",
                )
        return None

    def _ordinary(self, target: str) -> Case | None:
        """A case that tells an arithmetic from a defect."""
        try:
            return self._run(target, ordinary)
        except (Finding, Interrupted):
            return None

    def _known(self, target: str) -> Arithmetic | None:
        """What the kernel's arithmetic is found to be, if there is time to find it."""
        if target not in self._identified:
            try:
                self._identified[target] = self._run(target, identified)
            except Finding:
                self._identified[target] = None
            except Interrupted:
                return None
        return self._identified[target]

    def _first(
        self,
        target: str,
        possible: Iterable[Arithmetic | None],
        cases: list[tuple[Property, str]],
    ) -> Arithmetic | None:
        """The first arithmetic in which all of these cases hold."""
        return next(
            (a for a in possible if a and self._excused(target, {"arithmetic": a}, cases)), None
        )

    def _excused(
        self, target: str, changes: dict[str, Any], cases: list[tuple[Property, str]]
    ) -> bool:
        """Whether all of these cases hold for a kernel with these changes; others are judged by
        what is known meanwhile.
        """
        same = tuple(changes.items())
        try:
            for prop, case in cases:
                self._run(target, as_variant, same, evaluate, prop, Case.parse(case))
        except (Finding, Interrupted):
            return False
        return True


def _coarser(one: Arithmetic, other: Arithmetic) -> Arithmetic:
    """An arithmetic that errs as either does, or more."""
    formats = {
        name: max((getattr(one, name), getattr(other, name)), key=_roundoff) for name in ROUNDED
    }
    return replace(
        other,
        **formats,
        exp_ulp=max(one.exp_ulp, other.exp_ulp),
        tanh_ulp=max(one.tanh_ulp, other.tanh_ulp),
        rounding=max(one.rounding, other.rounding),  # nearest, stochastic, zero
        scaled_query=one.scaled_query or other.scaled_query,
        stored_exponents=one.stored_exponents or other.stored_exponents,
        spill=one.spill or other.spill,
        delta="out" if "out" in (one.delta, other.delta) else other.delta,
    )


def _roundoff(fmt: str) -> float:
    """Of a format; the inputs' own is taken for the narrowest of them."""
    return UNIT["bf16" if fmt == "input" else fmt]


def _differ(one: Arithmetic, other: Arithmetic) -> set[str]:
    return {f.name for f in fields(one) if getattr(one, f.name) != getattr(other, f.name)}
