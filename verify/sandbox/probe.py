"""Find out what a kernel takes, by what it declares and by its own refusals, and which layouts, by
trying each.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from verify.registry import Kernel
from verify.sandbox import domain
from verify.sandbox.domain import MASKED, PLAIN, Refuses, changed
from verify.sandbox.options import Options, label, value_in, value_of
from verify.spec.case import ARRANGED, Case
from verify.spec.layouts import LAYOUTS
from verify.spec.masks import FULL
from verify.spec.problem import HANDED, Problem

RAISED = "raised"
"""How the finding of a call begins in which the kernel raises."""
MOST_CALLS = 100
"""Calls for each option, to find out what a kernel takes that declares nothing about it."""
SLOW_SECONDS, CRAWL_SECONDS = 0.3, 3.0
"""Of a call on a small problem: eager PyTorch takes a hundredth of the first; beyond the second, a
minute is gone before anything is judged if it is asked.
"""
FEW_CALLS = 4
"""The same where a call is slow: under Triton's interpreter, or where each shape is compiled."""
NOT_ASKED = "was not asked: the kernel declares nothing, and enough calls were made"
ALONG = {"mask": ("mask_as", "lengths"), "heads": ("lengths",), "grads": ("mask",)}
"""Options that may change with another so that it is taken, where nothing is declared: each costs
calls.
"""
NO_GRAPH = "its output carries no autograd graph"
OFTEN = 4
"""A reason counts that is given a fourth as often as the one given most."""
Tries = Callable[[Case], tuple[str, bool]]


class _Asked:
    """Asks what a kernel declares, and where that says nothing, calls it."""

    def __init__(self, kernel: Kernel, device: str, tries: Tries) -> None:
        self._kernel = kernel
        self._device = device
        self._tries = tries
        self._left: int | None = None
        self._known: dict[Problem, str | None] = {}

    def declared(self, problem: Problem) -> str | None:
        """What the kernel declares."""
        return self._kernel.unsupported(problem, self._device)

    def allow(self, calls: int) -> None:
        """From now on the kernel is called, at most so many times."""
        self._left = calls

    def stop(self) -> None:
        """From now on it is not."""
        self._left = None

    def __call__(self, problem: Problem) -> str | None:
        """Why it does not take the problem: declared, or raised; not what it does worse."""
        reason = self.declared(problem)
        if reason:
            return reason
        if self._known and problem in self._known:
            return self._known[problem]
        if self._left is None:
            return None
        if not self._left:
            return NOT_ASKED
        self._left -= 1
        sentence, _ = self._tries(Case(problem))
        raised = sentence.startswith(RAISED)
        if sentence and not raised and sentence != NO_GRAPH:
            self.stop()  # it ends or spoils its process: no need to do that again
        self._known[problem] = sentence if raised else None
        return self._known[problem]


def probe(kernel: Kernel, device: str, tries: Tries) -> Options:
    """Find a problem that the kernel takes, then each option's values, then layouts.

    Where a kernel declares no `supports`, it is called: what it refuses with an exception is not
    taken; on which it does something worse, it is.
    """
    asks = _Asked(kernel, device, tries)
    base = domain.first_accepted(asks.declared, {})
    if base is None:
        return Options({}, {"problem": _reasons(asks.declared)}, dict.fromkeys(ARRANGED, ()))
    sentence, returns_lse = tries(Case(base))
    deadly = bool(sentence) and not sentence.startswith(RAISED)
    calls = None
    declared_slow = kernel.affordable(device) is not None
    pace = 0.0 if declared_slow else _pace(base, asks.declared, tries)
    slow, crawls = declared_slow or pace >= SLOW_SECONDS, pace >= CRAWL_SECONDS
    if not (deadly or crawls) and (kernel.supports is None or not kernel.bundled):
        calls = FEW_CALLS if slow else MOST_CALLS
        asks.allow(2 * calls)
        base = domain.first_accepted(asks, {}, most=0) or base
        asks.stop()
        sentence, returns_lse = tries(Case(base))
        if sentence:  # it fails on every problem: what it declares counts; any case will show it
            asks, calls = _Asked(kernel, device, tries), None
    taken, refused, anchors = _values(base, asks, calls)
    raised = {} if calls is None else _raised(taken, refused)
    if not deadly and not _has_graph(anchors, tries):
        taken["grads"], anchors = (False,), [p for p in anchors if not p.grads]
        refused["grads"]["True"] = NO_GRAPH
        raised = raised | {"grads": {True: NO_GRAPH}}
    layouts, why = _layouts(kernel, device, anchors, None if deadly or crawls else tries)
    found = Options(
        taken, refused | why, layouts, returns_lse, slow, crawls, tuple(anchors), raised
    )
    if calls is None:
        return found
    one_query, one_key = (any(pair[axis] == 1 for pair in taken["lengths"]) for axis in (0, 1))
    multiples = _multiples(taken, refused)
    return replace(found, multiples=multiples, ones=(one_query, one_key))


def _has_graph(anchors: list[Problem], tries: Tries) -> bool:
    """Whether out can be backpropagated through, where that can be asked."""
    graded = next((p for p in anchors if p.grads), None)
    return graded is None or NO_GRAPH not in tries(Case(graded))[0]


def _pace(base: Problem, declared: Refuses, tries: Tries) -> float:
    """Seconds of a call on another small problem, once one was made: each is compiled, or
    interpreted. One that is fast says that all are; a busy machine does not delay each of them.
    """
    ways = ({"heads_q": 3, "heads_kv": 3}, {"batch": 2}, {"dim_qk": 32, "dim_v": 32})
    others = [p for way in ways if (p := changed(base, way)) and declared(p) is None]
    least = math.inf
    for problem in others or [base] * len(ways):
        start = time.monotonic()
        tries(Case(problem))
        spent = time.monotonic() - start
        least = min(least, spent)
        if not SLOW_SECONDS < spent < CRAWL_SECONDS:
            break
    return least


def _values(
    base: Problem, asks: _Asked, calls: int | None
) -> tuple[dict[str, tuple[Any, ...]], dict[str, dict[str, str]], list[Problem]]:
    """(values taken, values refused and why, an accepted problem for each that is taken); calls: so
    many may be made for each option, None: what is declared counts.
    """
    taken: dict[str, tuple[Any, ...]] = {}
    refused: dict[str, dict[str, str]] = {}
    found = [base]
    every = tuple(domain.choices())
    for option, changes in domain.choices().items():
        kept, reasons = [], {}
        along = every if calls is None else ALONG.get(option, ())
        if calls is not None:
            asks.allow(calls)
        for change in changes:
            value = value_of(change)
            start = _masked(base, found, asks) if value in HANDED[1:] else base
            anchor = domain.anchor_with(start, change, asks, along)
            if anchor is None:
                one = changed(base, change)
                reasons[label(value)] = (asks(one) if one else None) or domain.NO_PROBLEM
            else:
                kept.append(value)
                found.append(anchor)
        taken[option], refused[option] = tuple(dict.fromkeys(kept)), reasons
    asks.stop()
    return taken, refused, list(dict.fromkeys(found))


def _masked(base: Problem, found: list[Problem], asks: _Asked) -> Problem:
    """An accepted problem with a mask that has many shapes to be handed over in, or any, or none:
    how it is handed over is no question without one.
    """
    widest = changed(base, {"batch": 2, "mask": MASKED.mask})
    if widest and asks(widest) is None:
        return widest
    return next(
        (p for p in found if p.mask.per_batch), next((p for p in found if p.mask != FULL), base)
    )


def _multiples(
    taken: dict[str, tuple[Any, ...]], refused: dict[str, dict[str, str]]
) -> tuple[int, int]:
    """What lengths must be multiples of: the largest number that divides those that are taken, if
    it divides not all that are refused.
    """
    found = []
    for axis in (0, 1):
        good = {pair[axis] for pair in taken["lengths"]} - {0, 1}
        bad = {pair[axis] for pair in domain.LENGTHS if label(pair) in refused["lengths"]} - good
        fits = [m for m in domain.MULTIPLES if good and not any(n % m for n in good)]
        found.append(max((m for m in fits if any(n > 1 and n % m for n in bad)), default=1))
    return found[0], found[1]


def _raised(
    taken: dict[str, tuple[Any, ...]], refused: dict[str, dict[str, str]]
) -> dict[str, dict[Any, str]]:
    """What a kernel that declares nothing was found to raise on, by the values of problems."""
    found: dict[str, dict[Any, str]] = {}
    for option, changes in domain.choices().items():
        start = MASKED if option == "mask_as" else PLAIN  # the only option that needs a mask
        asked = [(value_in(option, p), value_of(c)) for c in changes if (p := changed(start, c))]
        accepted = {stands for stands, value in asked if value in taken[option]}
        reasons = {stands: refused[option].get(label(value), "") for stands, value in asked}
        kept = {v: r for v, r in reasons.items() if v not in accepted and _learned(r)}
        if kept:
            found[option] = kept
    return found


def _learned(reason: str) -> bool:
    return reason.startswith(RAISED) or reason == NOT_ASKED


def _reasons(declared: Refuses) -> dict[str, str]:
    """Why no problem is taken: the reason that is given most, and what else is given often."""
    asked = [changed(PLAIN, c) for values in domain.choices().values() for c in values]
    given = Counter(declared(p) for p in asked if p is not None).most_common()
    often = [str(reason) for reason, times in given if times >= given[0][1] / OFTEN]
    return {str(n): reason for n, reason in enumerate(often)}


def _layouts(
    kernel: Kernel, device: str, anchors: list[Problem], tries: Tries | None
) -> tuple[dict[str, tuple[str, ...]], dict[str, dict[str, str]]]:
    """(by tensor the layouts that are taken, why not the others). Each layout is tried with all
    tensors in it, and with each alone only if that is refused.
    """
    taken, refused = {}, dict[str, dict[str, str]]()
    at_once = _at_once(kernel, device, anchors, tries)
    for tensor in ARRANGED:
        reasons = {
            way: ""
            if (tensor, way) in at_once
            else _refuses(kernel, device, anchors, tensor, way, tries)
            for way in LAYOUTS
        }
        refused |= {f"{tensor} {way}": {"layout": why} for way, why in reasons.items() if why}
        taken[tensor] = tuple(way for way, why in reasons.items() if not why)
    return taken, refused


def _at_once(
    kernel: Kernel, device: str, anchors: list[Problem], tries: Tries | None
) -> set[tuple[str, str]]:
    """(tensor, layout) of those that are taken together."""
    allowed = kernel.layouts(device) if kernel.layouts else LAYOUTS
    found: set[tuple[str, str]] = set()
    if tries is None or not anchors:
        return found
    problem = max(anchors, key=lambda p: sum(_has(p, tensor) for tensor in ARRANGED))
    tensors = [tensor for tensor in ARRANGED if _has(problem, tensor)]
    for way in LAYOUTS:
        if way in allowed and way != "bhsd":
            arranged = tuple((tensor, way) for tensor in tensors)
            if not tries(Case(problem, layouts=arranged))[0].startswith(RAISED):
                found |= {*arranged}
    return found


def _refuses(
    kernel: Kernel,
    device: str,
    anchors: list[Problem],
    tensor: str,
    layout: str,
    tries: Tries | None,
) -> str:
    """Why a kernel does not take a tensor in a layout: what it raises."""
    if kernel.layouts and layout not in kernel.layouts(device):
        return "is left out by its declaration"
    problem = next((p for p in anchors if _has(p, tensor)), None)
    if layout == "bhsd" or tries is None or problem is None:
        return ""
    sentence, _ = tries(Case(problem, layouts=((tensor, layout),)))
    return sentence if sentence.startswith(RAISED) else ""


def _has(problem: Problem, tensor: str) -> bool:
    """Whether the problem has a tensor [B,H,L,D] that its layout changes."""
    return (tensor != "do" or problem.grads) and (tensor in problem.shapes)
