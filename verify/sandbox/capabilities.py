"""What a kernel takes, asked once in a process: whether it takes a problem, and which of those that
a property needs is most like a wanted one.
"""

from __future__ import annotations

from functools import partial

from verify.registry import FOUND_OUT, Kernel
from verify.sandbox import domain
from verify.sandbox.call import call
from verify.sandbox.domain import PLAIN, changed, nearest
from verify.sandbox.options import Options
from verify.sandbox.probe import probe
from verify.spec.case import Case
from verify.spec.finding import Finding
from verify.spec.masks import FULL
from verify.spec.problem import Problem
from verify.spec.requirements import NOTHING, Requirements

_FOUND: dict[tuple[Kernel, str], Options] = {}
_ANCHORS: dict[tuple[Kernel, str, Requirements], tuple[Problem, ...]] = {}


def options(kernel: Kernel, device: str) -> Options:
    """What a kernel takes; probed once, here, unless another process has."""
    if (kernel, device) not in _FOUND:
        learn(kernel, device, probe(kernel, device, partial(tries, kernel, device)))
    return _FOUND[kernel, device]


def known(kernel: Kernel, device: str) -> Options | None:
    """What a kernel takes, if it was probed."""
    return _FOUND.get((kernel, device))


def learn(kernel: Kernel, device: str, found: Options) -> None:
    """Take over what was found, here or elsewhere."""
    _FOUND[kernel, device] = found
    FOUND_OUT[kernel, device] = found.raises


def anchors(kernel: Kernel, device: str, needs: Requirements = NOTHING) -> tuple[Problem, ...]:
    """Problems that the kernel takes and that are what a property needs; none where there are
    none.
    """
    key = kernel, device, needs
    if key not in _ANCHORS:
        _ANCHORS[key] = tuple(_anchors(kernel, device, needs))
    return _ANCHORS[key]


def _anchors(kernel: Kernel, device: str, needs: Requirements) -> list[Problem]:
    found, pinned = options(kernel, device), needs.pinned
    refuses = partial(kernel.unsupported, device=device)
    moved = [changed(anchor, pinned) for anchor in found.anchors]
    fitting = [p for p in dict.fromkeys(moved) if p is not None and refuses(p) is None]
    if not fitting and found.anchors:
        other = domain.first_accepted(refuses, pinned)
        fitting = [] if other is None else [other]
    if not needs.hides or any(p.mask != FULL for p in fitting):
        return [p for p in fitting if not needs.hides or p.mask != FULL]
    masks = [{"mask": mask} for mask in found.taken["mask"] if mask != FULL]
    more = (
        domain.anchor_with(p, m, refuses, pinned, domain.choices()) for p in fitting for m in masks
    )
    return list(dict.fromkeys(p for p in more if p is not None))


def fitted(kernel: Kernel, device: str, wanted: Problem, needs: Requirements = NOTHING) -> Problem:
    """The problem most like the wanted one that the kernel takes and a property can judge."""
    refuses = partial(kernel.unsupported, device=device)
    return nearest(wanted, anchors(kernel, device, needs), refuses, needs.pinned)


def tries(kernel: Kernel, device: str, case: Case) -> tuple[str, bool]:
    """(what is wrong with a call on this case, or nothing; whether it returns an LSE)"""
    try:
        return "", call(kernel, case.problem, case.inputs(device)).lse is not None
    except Finding as finding:
        return finding.sentence, True  # whatever is wrong is for a property to say


def plain_problem(kernel: Kernel, device: str) -> Problem:
    """The plainest problem that was found to be taken."""
    return next(iter(options(kernel, device).anchors), PLAIN)
