"""The engine: Hypothesis draws cases for one kernel and one property until enough were judged or the time is up."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from verify.case import Case
from verify.finding import Finding
from verify.properties.laws import Property
from verify.properties.strategies import cases
from verify.records import Record
from verify.registry import Kernel

CHUNK = 50
"""Cases that Hypothesis draws at a time; a new chunk has a new seed."""


@dataclass(frozen=True)
class Budget:
    """When to stop: after this many judged cases or seconds, whichever comes first; and how long to shrink."""

    judged: int | None = None
    seconds: float | None = None
    shrink_seconds: float = 20.0


@dataclass
class Hunt:
    """What a hunt found: judged cases, why others were not, and the smallest case that breaks the law."""

    judged: int = 0
    unsupported: dict[str, int] = field(default_factory=dict)
    finding: tuple[Case, Finding] | None = None


class _ShrunkEnough(BaseException):
    """Leaves Hypothesis when the time for shrinking is over; not an Exception, so that Hypothesis lets it through."""


def hunt(
    kernel: Kernel, law: Property, device: str, *, budget: Budget, seed: int, record: Callable[[Record], None] = lambda r: None
) -> Hunt:
    """Try to break a law. Stops at the first failing case, shrunk; every judged case is recorded as it is judged."""
    state, start, chunk = Hunt(), time.monotonic(), 0
    shrinking_since: list[float] = []

    def over() -> bool:
        spent = budget.seconds is not None and time.monotonic() - start > budget.seconds
        return spent or (budget.judged is not None and state.judged >= budget.judged)

    def attempt(case: Case) -> None:
        if not shrinking_since and over():
            return
        if shrinking_since and time.monotonic() - shrinking_since[0] > budget.shrink_seconds:
            raise _ShrunkEnough
        try:
            judged = judge(kernel, law, case, device)
        except Finding as finding:
            if not shrinking_since:
                shrinking_since.append(time.monotonic())
                record(_record(kernel, law, case, "failed", finding.sentence, measured=finding.measured))
            if state.finding is None or _size(case) <= _size(state.finding[0]):
                state.finding = (case, finding)
            raise
        if not shrinking_since:
            _count(state, judged)
            record(judged)

    while state.finding is None and not over() and not (state.judged == 0 and chunk > 40):
        try:
            _chunk(attempt, kernel, law, device, seed=seed + chunk)
        except (Finding, _ShrunkEnough):
            pass
        chunk += 1
    if state.finding is not None:
        case, finding = state.finding
        record(_record(kernel, law, case, "finding", finding.sentence, measured=finding.measured))
    return state


def judge(kernel: Kernel, law: Property, case: Case, device: str) -> Record:
    """Check one law on one case; raises Finding where it is broken, unless by a known defect."""
    reason = kernel.unsupported(case.problem, device)
    if reason:
        return _record(kernel, law, case, "unsupported", reason)
    known = kernel.known_defect(case.problem, device)
    try:
        verdict = law.check(kernel, case, device)
    except Finding as finding:
        if known:
            return _record(kernel, law, case, "known", finding.sentence, known=known, measured=finding.measured)
        raise
    if verdict.unsupported:
        return _record(kernel, law, case, "unsupported", verdict.unsupported)
    blind = len(verdict.blind_to) == 3  # zeros, mean(V) and a wrong scale would all have passed
    name = "uninformative" if blind else "held"
    return _record(kernel, law, case, name, known=known, blind_to=verdict.blind_to, bitwise=verdict.bitwise)


def replay_command(target: str, law: Property, case: Case) -> str:
    """The one line that shows a finding again. `target` is a kernel's name, or path/to/file.py::name."""
    return f"verify replay {shlex.quote(target)} {shlex.quote(str(case))} --property {law.name}"


def _chunk(attempt: Callable[[Case], None], kernel: Kernel, law: Property, device: str, *, seed: int) -> None:
    strategy = cases(kernel, device, full_mask=law.full_mask, grads=law.grads)
    config = settings(
        max_examples=CHUNK,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    seeded(seed)(config(given(strategy)(attempt)))()
    if device == "cuda":
        torch.cuda.synchronize()


def _record(kernel: Kernel, law: Property, case: Case, verdict: str, reason: str = "", **rest) -> Record:
    return Record(kernel.name, law.name, str(case), verdict, reason, **rest)


def _count(state: Hunt, record: Record) -> None:
    if record.verdict == "unsupported":
        state.unsupported[record.reason] = state.unsupported.get(record.reason, 0) + 1
    else:
        state.judged += 1


def _size(case: Case) -> tuple[int, int, int]:
    p = case.problem
    return p.batch * p.heads_q * p.len_q * p.len_k, p.dim_qk + p.dim_v, len(str(case))
