"""What a kernel takes, asked once in a process: whether it takes a problem, and which of those that
a property needs is most like a wanted one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from verify.registry import FOUND_OUT, Kernel
from verify.sandbox import domain
from verify.sandbox.call import call
from verify.sandbox.domain import PLAIN, Refuses, changed, nearest
from verify.sandbox.options import Options
from verify.sandbox.probe import NO_GRAPH, probe
from verify.spec.case import Case
from verify.spec.finding import Finding
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
    found, refuses = options(kernel, device), _refuses(kernel, device, needs)
    moved = (changed(anchor, needs.wanted) for anchor in found.anchors)
    fitting = [
        problem
        for problem in dict.fromkeys([*found.anchors, *moved])
        if problem is not None and refuses(problem) is None
    ]
    if not fitting and found.anchors:
        other = domain.first_accepted(refuses, needs.wanted)
        fitting = [] if other is None else [other]
    return fitting


def _refuses(kernel: Kernel, device: str, needs: Requirements) -> Refuses:
    """Why a problem is not one that the kernel takes and a property needs."""
    return lambda problem: needs.lacks(problem) or kernel.unsupported(problem, device)


def fitted(kernel: Kernel, device: str, wanted: Problem, needs: Requirements = NOTHING) -> Problem:
    """The problem most like the wanted one that the kernel takes and a property can judge."""
    return nearest(wanted, anchors(kernel, device, needs), _refuses(kernel, device, needs))


@cache
def variant(kernel: Kernel, device: str, changes: tuple[tuple[str, Any], ...]) -> Kernel:
    """The same kernel, with other values of these fields; it takes what the kernel takes, but for
    another mask of its own.
    """
    other = replace(kernel, **dict(changes))
    if other.own_mask == kernel.own_mask:
        like = known(kernel, device)
    else:
        masked = (("own_mask", other.own_mask),)
        like = known(variant(kernel, device, masked), device) if changes != masked else None
    if like:
        learn(other, device, like)
    return other


def as_variant(
    kernel: Kernel,
    device: str,
    changes: tuple[tuple[str, Any], ...],
    function: Callable[..., Any],
    *arguments: Any,
) -> Any:
    """function(kernel, device, *arguments) of the kernel with these changes."""
    return function(variant(kernel, device, changes), device, *arguments)


def tries(kernel: Kernel, device: str, case: Case) -> tuple[str, bool]:
    """(what is wrong with a call on this case, or nothing; whether it returns an LSE)"""
    try:
        output = call(kernel, case.problem, case.inputs(device))
        graph = "" if output.dq is not None or not case.problem.grads else NO_GRAPH
        return graph, output.lse is not None
    except Finding as finding:
        return finding.sentence, True  # whatever is wrong is for a property to say


def plain_problem(kernel: Kernel, device: str) -> Problem:
    """The plainest problem that was found to be taken."""
    return next(iter(options(kernel, device).anchors), PLAIN)
