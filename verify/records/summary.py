"""What the events of a run come to: findings, whose they are, and what was never judged."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from verify.records.events import (
    TESTED,
    CaseFinished,
    DeclaredOtherwise,
    Ended,
    Event,
    FindingExplained,
    FindingShrunk,
    KernelInspected,
    Outcome,
    PropertyFinished,
)

OTHERWISE = 3
"""The exit code of a kernel that is right, but not as declared."""


@dataclass(frozen=True)
class Found:
    """One finding: the case that breaks a property of a kernel, and what is known of it."""

    kernel: str
    property: str
    case: str
    reason: str
    shrunk: bool
    """False where the run ended before the case was as small as it gets."""
    worst: str = ""
    worst_reason: str = ""
    vendor: str = ""
    """Whose kernel it is, where it is somebody else's."""
    explained: FindingExplained | None = None
    style: bool = False
    """It is no wrong result: shown last, and no failure unless that is asked for."""
    also: tuple[str, ...] = ()
    """Other properties that the same cause breaks."""


def findings(events: Iterable[Event]) -> list[Found]:
    """Every finding, one for each kernel and cause: wrong results first, in the order in which they
    were found, then what is a matter of style.
    """
    events = list(events)
    vendor = {e.kernel: e.vendor for e in events if isinstance(e, KernelInspected) and e.vendor}
    style = {e.property for e in events if isinstance(e, PropertyFinished) and e.style}
    same = {
        (e.kernel, e.property): e.same_as
        for e in events
        if isinstance(e, FindingExplained) and e.same_as
    }
    explained = {
        (e.kernel, e.property, e.case): e for e in events if isinstance(e, FindingExplained)
    }
    found: dict[tuple[str, str], CaseFinished | FindingShrunk] = {}
    for event in events:
        if isinstance(event, CaseFinished) and event.outcome is Outcome.FAILED:
            found.setdefault((event.kernel, event.property), event)
        elif isinstance(event, FindingShrunk):
            found[event.kernel, event.property] = event
        elif isinstance(event, DeclaredOtherwise):
            found.pop((event.kernel, event.property), None)
    also = {
        about: tuple(prop for (kernel, prop), by in same.items() if (kernel, by) == about)
        for about in found
    }
    all_found = [
        Found(
            event.kernel,
            event.property,
            event.case,
            event.reason,
            shrunk=isinstance(event, FindingShrunk) and not event.cut,
            worst=event.worst if isinstance(event, FindingShrunk) else "",
            worst_reason=event.worst_reason if isinstance(event, FindingShrunk) else "",
            vendor=vendor.get(event.kernel, ""),
            explained=explained.get((event.kernel, event.property, event.case)),
            style=event.property in style,
            also=also[event.kernel, event.property],
        )
        for event in found.values()
        if (event.kernel, event.property) not in same
    ]
    return sorted(all_found, key=lambda one: one.style)


def declare(events: Iterable[Event], *, harmless: bool = True) -> dict[str, str]:
    """By kernel that is right, but not as declared: what to declare. harmless: also where it is
    free to choose, and declared nothing.
    """
    lines: dict[str, dict[str, str]] = {}
    for event in events:
        if isinstance(event, DeclaredOtherwise) and (harmless or not event.harmless):
            lines.setdefault(event.kernel, {})[event.declare.partition("=")[0]] = event.declare
    return {kernel: ", ".join(of.values()) for kernel, of in lines.items()}


def tested(events: Iterable[Event]) -> list[CaseFinished]:
    """The cases in which a kernel was called and judged."""
    return [e for e in events if isinstance(e, CaseFinished) and e.outcome in TESTED]


def exit_code(events: Iterable[Event], *, strict: bool) -> int:
    """1 where something was found, or where nothing was judged; 3 where a kernel is right, but not
    as it declares; else 0. Only if strict: where it was found in other people's kernels, is a
    matter of style, or is a problem that the kernel declares and refuses.
    """
    events = list(events)
    if not tested(events):
        return 1
    refused = any(isinstance(e, CaseFinished) and e.outcome is Outcome.REFUSED for e in events)
    fails = any(strict or not (found.vendor or found.style) for found in findings(events))
    if fails or (strict and refused):
        return 1
    return OTHERWISE if declare(events, harmless=False) else 0


@dataclass(frozen=True)
class Result:
    """What the events of one search come to."""

    judged: int
    finding: FindingShrunk | None
    ended: Ended
    reason: str

    @classmethod
    def of(cls, events: Iterator[Event]) -> Result:
        """Run through the events of one search."""
        finding: FindingShrunk | None = None
        for event in events:
            if isinstance(event, FindingShrunk):
                finding = event
        if not isinstance(event, PropertyFinished):
            raise TypeError(f"{event}: a search ends with PropertyFinished")
        return cls(event.judged, finding, event.ended, event.reason)
