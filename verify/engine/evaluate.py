"""One case of one property: what is judged, what is a known issue, what is not run at all."""

from __future__ import annotations

import shlex
from typing import Any

from verify.properties.catalogue import Property
from verify.properties.property import Verdict
from verify.records.events import WRONG_OUTPUTS, CaseFinished, Outcome
from verify.registry import Kernel
from verify.sandbox.probe import RAISED
from verify.spec.case import Case
from verify.spec.finding import Finding


def evaluate(kernel: Kernel, device: str, prop: Property, case: Case) -> CaseFinished:
    """Check one property on one case. Raises Finding where it is broken by no known issue."""
    if reason := kernel.unsupported(case.problem, device):
        return finished(kernel, prop, case, Outcome.UNSUPPORTED, reason=reason)
    issue = kernel.known_issue(case, device, prop.name)
    if issue and issue.fatal:
        reason = f"not run: {issue.summary}"
        return finished(kernel, prop, case, Outcome.UNSUPPORTED, reason=reason)
    known = issue.summary if issue else ""
    try:
        verdict = prop.check(kernel, case, device)
    except Finding as finding:
        if _refused(kernel, finding):
            return finished(kernel, prop, case, Outcome.REFUSED, reason=finding.sentence)
        if not known:
            raise
        measured = finding.measured
        outcome, reason = Outcome.KNOWN_ISSUE, finding.sentence
        return finished(kernel, prop, case, outcome, reason=reason, known=known, measured=measured)
    if verdict.unsupported:
        return finished(kernel, prop, case, Outcome.UNSUPPORTED, reason=verdict.unsupported)
    saw_nothing = set(verdict.blind_to) == set(WRONG_OUTPUTS)
    return finished(
        kernel,
        prop,
        case,
        Outcome.INCONCLUSIVE if saw_nothing else Outcome.PASSED,
        known=known,
        blind_to=verdict.blind_to,
        bitwise=verdict.bitwise,
        measured=verdict.measured,
    )


def _refused(kernel: Kernel, finding: Finding) -> bool:
    """Whether the kernel said that it does not take the case: of its own accord, or, where it
    declares nothing, by any exception but what the GPU raises.
    """
    ran_into = finding.sentence.startswith(RAISED) and "CUDA" not in finding.sentence
    return finding.refused or (ran_into and kernel.supports is None)


def check(kernel: Kernel, device: str, prop: Property, case: Case) -> Verdict:
    """Check one property on one case, known issues or not. Raises Finding where it is broken."""
    return prop.check(kernel, case, device)


def finished(
    kernel: Kernel, prop: Property, case: Case, outcome: Outcome, **rest: Any
) -> CaseFinished:
    """The event of one case."""
    return CaseFinished(
        kernel=kernel.name, property=prop.name, case=str(case), outcome=outcome, **rest
    )


def replay_command(target: str, prop: Property, case: Case) -> str:
    """The one line that shows a finding again. `target`: a kernel's name, or path/file.py::name."""
    return f"verify replay {shlex.quote(target)} {shlex.quote(str(case))} --property {prop.name}"
