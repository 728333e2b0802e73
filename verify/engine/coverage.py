"""How much of what can be combined the judged cases had."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from verify.generation.pairwise import Row, coverage
from verify.records.events import Event, PairsTaken
from verify.records.summary import tested
from verify.spec.case import Case


def pairs_judged(events: Iterable[Event]) -> Iterator[str]:
    """For each kernel, one line: how many pairs of its options the judged cases had."""
    events = list(events)
    rows: dict[str, list[Row]] = {}
    for event in events:
        if isinstance(event, PairsTaken):
            rows.setdefault(event.kernel, event.rows)
    for kernel, taken in sorted(rows.items()):
        cases = {case.case for case in tested(events) if case.kernel == kernel}
        had, pairs = coverage(taken, map(Case.parse, cases))
        share = 100 * had / max(1, pairs)
        yield f"{kernel}: pairs of options judged: {had} of {pairs} ({share:.0f} %)"
