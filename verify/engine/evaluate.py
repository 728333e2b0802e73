"""One case under one property: what is judged, what is known to be wrong, what is not run at
all.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from typing import Any

from verify.properties.catalogue import Property
from verify.records.journal import Record
from verify.registry import Kernel
from verify.spec.case import Case
from verify.spec.finding import Finding

Judging = Callable[[Kernel, Property, Case, str], Record]
"""As `judge`."""


def judge(kernel: Kernel, law: Property, case: Case, device: str) -> Record:
    """Check one law on one case; raises Finding where it is broken, unless by a known defect."""
    reason = kernel.unsupported(case.problem, device)
    if reason:
        return recorded(kernel, law, case, "unsupported", reason)
    defect = kernel.defect(case, device, law.name)
    if defect and defect.crashes:
        return recorded(kernel, law, case, "unsupported", f"not run: {defect.what}")
    known = defect.what if defect else ""
    try:
        verdict = law.check(kernel, case, device)
    except Finding as finding:
        if known:
            return recorded(
                kernel, law, case, "known", finding.sentence, known=known, measured=finding.measured
            )
        raise
    if verdict.unsupported:
        return recorded(kernel, law, case, "unsupported", verdict.unsupported)
    blind = len(verdict.blind_to) == 3  # zeros, mean(V) and a wrong scale would all have passed
    name = "uninformative" if blind else "held"
    return recorded(
        kernel,
        law,
        case,
        name,
        known=known,
        blind_to=verdict.blind_to,
        bitwise=verdict.bitwise,
        measured=verdict.measured,
    )


def replay_command(target: str, law: Property, case: Case) -> str:
    """The one line that shows a finding again. `target` is a kernel's name, or
    path/to/file.py::name.
    """
    return f"verify replay {shlex.quote(target)} {shlex.quote(str(case))} --property {law.name}"


def recorded(
    kernel: Kernel, law: Property, case: Case, verdict: str, reason: str = "", **rest: Any
) -> Record:
    """A record of one case."""
    return Record(kernel.name, law.name, str(case), verdict, reason, **rest)
