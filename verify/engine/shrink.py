"""Shrinking: a case that fails, made as small and as plain as it can be and still fail.

Option by option, the plainest value first; the lengths, heads and dims before all else, since small
cases are judged fast. A change that the kernel does not take alone is made with what it needs
(sandbox/domain.py). Hypothesis's own shrinking knows the choices that were drawn, not what they
mean: it took some ten times as many calls.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from verify.errors import VerifyError
from verify.registry import Kernel
from verify.sandbox.capabilities import fitted, options
from verify.sandbox.domain import Change, changed
from verify.spec.case import Case
from verify.spec.inputs import Recipe
from verify.spec.masks import Mask
from verify.spec.requirements import Requirements

SMALL = (0, 1, 2, 3, 4, 8, 16)
"""Sizes that are tried before halves."""
HEADS = ((1, 1), (2, 1), (2, 2), (4, 2))
PLAIN_RECIPES = ("integers", "normal")
MOST_PASSES = 6
"""Rounds through all options; the third seldom finds more."""


class Shrinker:
    """Shrinks the cases of one property of one kernel. `fails` says whether a case fails."""

    def __init__(
        self, kernel: Kernel, device: str, needs: Requirements, fails: Callable[[Case], bool]
    ) -> None:
        self._kernel = kernel
        self._device = device
        self._needs = needs
        self._fails = fails
        self._tried: set[Case] = set()

    def shrink(self, case: Case) -> Case:
        """The smallest case found. Ends after passes in which nothing more goes."""
        self._tried.add(case)
        for _ in range(MOST_PASSES):
            before = case
            for simpler in (_sizes, self._options, _masks, _values, _sizes):
                case = self._pass(case, simpler)
            if case == before:
                break
        return case

    def _pass(self, case: Case, simpler: Callable[[Case], Iterator[list[Case]]]) -> Case:
        """Of each list the first that fails; what comes next starts from there."""
        for number in range(sum(1 for _ in simpler(case))):
            lists = list(simpler(case))
            for candidate in lists[number] if number < len(lists) else ():
                taken = self._taken(candidate)
                if taken == case:
                    break
                if taken in self._tried or _size(taken) > _size(case):
                    continue
                self._tried.add(taken)
                if self._fails(taken):
                    case = taken
                    break
        return case

    def _taken(self, case: Case) -> Case:
        problem = fitted(self._kernel, self._device, case.problem, self._needs)
        problem = self._kernel.bucket(problem) if self._kernel.bucket else problem
        return replace(case, problem=problem)

    def _options(self, case: Case) -> Iterator[list[Case]]:
        """Each option plain, all of them first."""
        plain: list[Change] = [
            {"mask": Mask(), "mask_as": "rule"},
            {"mask_as": "rule"},
            {"mask_as": case.problem.mask_as.partition("_")[0]},
            {"bias": "none"},
            {"softcap": 0.0},
            {"scale": None},
            {"dtype": options(self._kernel, self._device).taken["dtype"][0]},
        ]
        yield [_with(replace(case, layouts=()), *plain)]
        for change in plain:
            yield [_with(case, change)]
        yield [replace(case, layouts=())]
        for n in range(len(case.layouts)):
            yield [replace(case, layouts=case.layouts[:n] + case.layouts[n + 1 :])]


def _with(case: Case, *changes: Change) -> Case:
    problem = changed(case.problem, *changes)
    return case if problem is None else replace(case, problem=problem)


def _sizes(case: Case) -> Iterator[list[Case]]:
    """Smaller batch, heads, lengths (both, then each) and dims (likewise)."""
    p = case.problem
    yield [_with(case, {"batch": n}) for n in _below(p.batch) if n]
    yield [
        _with(case, {"heads_q": q, "heads_kv": k})
        for q, k in HEADS
        if (q, k) < (p.heads_q, p.heads_kv)
    ]
    for both, name, other in (("len_q", "len_q", "len_k"), ("dim_qk", "dim_qk", "dim_v")):
        least = 0 if both == "len_q" else 1
        here, there = getattr(p, name), getattr(p, other)
        yield [
            _with(case, {name: min(n, here), other: min(n, there)})
            for n in _below(max(here, there))
            if n >= max(1, least)
        ]
        for one, value in ((name, here), (other, there)):
            yield [_with(case, {one: n}) for n in _below(value) if n >= least]


def _below(n: int) -> list[int]:
    """Smaller numbers than n, the smallest first, then what is near."""
    halves = []
    half = n // 2
    while half < n - 1:
        halves.append(half)
        half += max(1, (n - half) // 2)
    return sorted({m for m in (*SMALL, *halves, n - 1) if 0 <= m < n})


def _masks(case: Case) -> Iterator[list[Case]]:
    """A conjunction without one of its parts; smaller arguments."""
    parts = case.problem.mask.parts
    if len(parts) > 1:
        yield [_with(case, {"mask": Mask((part,))}) for part in parts]
    for n, (name, arguments) in enumerate(parts):
        for at, value in enumerate(arguments):
            yield [
                _with(case, {"mask": mask})
                for smaller in _below(value)
                if (mask := _replaced(parts, n, name, at, smaller)) is not None
            ]


def _replaced(
    parts: tuple[tuple[str, tuple[int, ...]], ...], n: int, name: str, at: int, value: int
) -> Mask | None:
    arguments = parts[n][1]
    new = (name, (*arguments[:at], value, *arguments[at + 1 :]))
    try:
        return Mask((*parts[:n], new, *parts[n + 1 :]))
    except VerifyError:
        return None


def _values(case: Case) -> Iterator[list[Case]]:
    """Plainer inputs, seed 0."""
    yield [
        replace(case, recipe=recipe, seed=seed)
        for recipe in (*map(Recipe.parse, PLAIN_RECIPES), case.recipe)
        for seed in (0, 1, case.seed)
    ]


def _size(case: Case) -> tuple[int, int]:
    p = case.problem
    return p.batch * p.heads_q * (p.len_q + 1) * (p.len_k + 1), p.dim_qk + p.dim_v
