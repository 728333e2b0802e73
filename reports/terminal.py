"""What a run looks like in a terminal: kernel x property, findings in other people's kernels, known
issues, what was not judged and why. From events alone.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from verify.records.events import (
    TESTED,
    WRONG_OUTPUTS,
    CaseFinished,
    CaseUnfinished,
    DeclaredOtherwise,
    Ended,
    Event,
    FindingShrunk,
    KernelInspected,
    Outcome,
    PropertyFinished,
)
from verify.records.summary import findings, tested

LEGEND = "cases judged; = bitwise equal; ! known issue; ? zeros, mean(V), scale 5 % off all pass"
CALLED_MENDED = 0.01
"""A known issue is said to be mended where, were it not, it would have been missed this rarely."""
NOT_JUDGED = (Ended.NO_TIME, Ended.INTERRUPTED, Ended.UNSUPPORTED)


def show_run(events: Iterable[Event], *, write: Callable[[str], None], width: int = 150) -> None:
    """Write the closing tables of a run, line by line."""
    events = list(events)
    about = [e for e in events if isinstance(e, CaseFinished | PropertyFinished)]
    if not about:
        return
    for line in (*lines(matrix(events), width=width), LEGEND):
        write(line)
    for line in (sight(events), *ratios(events), *not_judged(events), *unfinished(events)):
        write(line)
    if any(reasons(events)):
        for line in lines(unsupported(events), width=width):
            write(line)
    for line in (*known_issues(events), *others(events)):
        write(line)


def counted(number: int, noun: str) -> str:
    """`1 finding`, `2 findings`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def lines(table: Table, *, width: int = 150) -> list[str]:
    """A table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, color_system=None).print(table)
    return [line.rstrip() for line in buffer.getvalue().splitlines()]


Pair = tuple[str, str]
"""(kernel, property)"""


def matrix(events: Iterable[Event]) -> Table:
    """A row for each property, a column for each kernel: judged cases, findings, and what the
    numbers hide.
    """
    cases: dict[Pair, list[CaseFinished]] = defaultdict(list)
    ended: dict[Pair, Ended] = {}
    found: set[Pair] = set()
    for event in events:
        if isinstance(event, CaseFinished):
            cases[event.kernel, event.property].append(event)
        elif isinstance(event, PropertyFinished):
            ended[event.kernel, event.property] = event.ended
        elif isinstance(event, FindingShrunk):
            found.add((event.kernel, event.property))
        elif isinstance(event, DeclaredOtherwise):
            found.discard((event.kernel, event.property))
    pairs = {*cases, *ended}
    kernels = sorted({kernel for kernel, _ in pairs})
    table = Table()
    table.add_column("property")
    for kernel in kernels:
        table.add_column(kernel, justify="right")
    for prop in sorted({prop for _, prop in pairs}):
        of = [(kernel, prop) for kernel in kernels]
        table.add_row(prop, *(_cell(cases[p], ended.get(p), found=p in found) for p in of))
    return table


def _cell(cases: list[CaseFinished], ended: Ended | None, *, found: bool) -> str:
    counts = Counter(case.outcome for case in cases)
    judged = sum(counts[outcome] for outcome in TESTED)
    if not judged:
        return ended.value if ended in NOT_JUDGED else "unsupported" if cases else "-"
    marks = []
    if any(case.bitwise is not None for case in cases):
        marks.append(f"={sum(case.bitwise is True for case in cases)}")
    for mark, outcome in (("?", Outcome.INCONCLUSIVE), ("!", Outcome.KNOWN_ISSUE)):
        if counts[outcome]:
            marks.append(f"{mark}{counts[outcome]}")
    text = " ".join([str(judged), *marks])
    if not found:
        return text
    return f"[bold]FOUND[/bold] in {text}"


def not_judged(events: Iterable[Event]) -> list[str]:
    """The properties of each kernel that got no case, because time was up or the run was cut
    short.
    """
    why = {Ended.NO_TIME: "no time for", Ended.INTERRUPTED: "interrupted before"}
    left: dict[tuple[str, Ended], list[str]] = defaultdict(list)
    for event in events:
        if isinstance(event, PropertyFinished) and event.ended in why and not event.judged:
            left[event.kernel, event.ended].append(event.property)
    return [
        f"NOT JUDGED: {kernel}: {why[ended]} {', '.join(sorted(props))}"
        for (kernel, ended), props in sorted(left.items())
    ]


def known_issues(events: Iterable[Event]) -> list[str]:
    """For each known issue: in how many of the cases that could show it, it showed. It is only said
    to be mended where it was looked for often enough to know.
    """
    possible: Counter[Pair] = Counter()
    shown: Counter[Pair] = Counter()
    facts: dict[Pair, dict[str, Any]] = {}
    for event in events:
        if isinstance(event, CaseFinished) and event.known:
            possible[event.kernel, event.known] += 1
            shown[event.kernel, event.known] += event.outcome is Outcome.KNOWN_ISSUE
        elif isinstance(event, KernelInspected):
            facts |= {(event.kernel, summary): what for summary, what in event.issues.items()}
    found = []
    for (kernel, summary), cases in sorted(possible.items()):
        fact = facts.get((kernel, summary), {})
        times = shown[kernel, summary]
        tail = ""
        if not times and (1 - fact.get("shows_in", 1.0)) ** cases < CALLED_MENDED:
            tail = ": NOT SEEN, is it mended?"
        where = f"; {fact['tracker']}" if fact.get("tracker") else ""
        counts = f"shown by {times} of {counted(cases, 'case')}{tail}"
        found.append(f"known issue of {kernel}: {summary}; {counts}{where}")
    return found


def others(events: Iterable[Event]) -> list[str]:
    """What was found in other people's kernels, with the smallest case of each: it fails a run only
    if that was asked for.
    """
    theirs = [found for found in findings(events) if found.vendor]
    if not theirs:
        return []
    head = f"{counted(len(theirs), 'finding')} in other people's kernels (they fail a strict run):"
    return [head] + [
        f"  {f.kernel} ({f.vendor}) breaks {f.property}: {f.case}: {f.reason}" for f in theirs
    ]


def unfinished(events: Iterable[Event]) -> list[str]:
    """The cases at which a process ended."""
    return [
        f"NOT FINISHED: {e.kernel}, {e.property}: {e.case}: the process ended here, or was killed"
        for e in events
        if isinstance(e, CaseUnfinished)
    ]


def ratios(events: Iterable[Event]) -> list[str]:
    """For each kernel the median of RMSE / expected, tensor by tensor: 1 where errors are those of
    the declared arithmetic.
    """
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for case in tested(events):
        if case.outcome in (Outcome.PASSED, Outcome.INCONCLUSIVE):
            for name, value in case.measured.items():
                if name.endswith("/expected"):
                    found[case.kernel][name.removesuffix("/expected")].append(value)
    return [
        f"{kernel}: RMSE / expected, median: "
        + ", ".join(f"{tensor} {median(values):.3f}" for tensor, values in tensors.items())
        for kernel, tensors in sorted(found.items())
    ]


def sight(events: Iterable[Event]) -> str:
    """How many of the oracle's cases could have seen each of the wrong outputs."""
    held = (Outcome.PASSED, Outcome.INCONCLUSIVE)
    judged = [c for c in tested(events) if c.property == "oracle" and c.outcome in held]
    blind = Counter(name for case in judged for name in case.blind_to)
    caught = ", ".join(f"{name} {len(judged) - blind[name]}" for name in WRONG_OUTPUTS)
    cases = counted(len(judged), "case")
    return f"of {cases} against the oracle, those that would catch: {caught}"


def reasons(events: Iterable[Event]) -> Counter[Pair]:
    """How many cases and properties were not judged, by kernel and reason."""
    found: Counter[Pair] = Counter()
    for event in events:
        if isinstance(event, CaseFinished) and event.outcome not in TESTED:
            found[event.kernel, event.reason] += 1
        elif isinstance(event, PropertyFinished) and event.ended is Ended.UNSUPPORTED:
            found[event.kernel, event.reason] += not event.judged
    return found


def unsupported(events: Iterable[Event]) -> Table:
    """Why problems were not judged, by kernel and reason."""
    table = Table(title="unsupported")
    for heading in ("kernel", "cases", "reason"):
        table.add_column(
            heading, justify="right" if heading == "cases" else "left", overflow="fold"
        )
    for (kernel, reason), number in sorted(reasons(events).items()):
        if number and reason:
            table.add_row(kernel, str(number), reason)
    return table


def changed(machine: str, changes: Iterable[Any]) -> Table:
    """What `verify record` found: each figure beside the recorded one."""
    table = Table(title=f"RMSE on {machine}", title_justify="left")
    figures = ("recorded", "now", "ratio")
    for heading in ("kernel", "case", "tensor", *figures, ""):
        table.add_column(heading, justify="right" if heading in figures else "left", no_wrap=True)
    for c in changes:
        rmse = ["-" if value is None else f"{value:.3e}" for value in (c.recorded, c.now)]
        ratio = "-" if c.ratio is None else f"{c.ratio:.3f}"
        table.add_row(*c.entry.rsplit(" ", 1), c.tensor, *rmse, ratio, c.mark)
    return table
