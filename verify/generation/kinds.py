"""Kinds of cases that known bugs needed, to count how often each is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeAlias

from verify.generation.pairwise import ODD_SCALES
from verify.generation.unusual import UNUSUAL, Unusual
from verify.spec.case import Case
from verify.spec.inputs import DISTRIBUTIONS
from verify.spec.masks import FULL, KINDS, Anchor, window
from verify.spec.problem import Problem

Holds: TypeAlias = "Callable[[Case, str], bool]"
"""(case, device) -> whether it is of a kind."""
FAR = 128
"""A window's side is long from here."""
BLOCK = 64
"""Keys, columns that one scale or one tile holds at least."""
ENOUGH = 50
"""With fewer rows, or columns, no error of an honest size can alarm (bounds/BOUNDS.md)."""


def kinds() -> dict[str, Holds]:
    """Every kind, by what is said of it: unusual sizes, special values, masks, inputs."""
    sizes = {name.replace("_", " "): partial(_of_size, of) for name, of in UNUSUAL.items()}
    values = {name: partial(_of_family, name) for name in DISTRIBUTIONS}
    return {**sizes, **_SPECIAL, **_aligned(), **_MASKS, **_TOGETHER, **values}


def _of_size(of: Unusual, case: Case, device: str) -> bool:
    return of.of(case.problem, device)


def _of_family(name: str, case: Case, device: str) -> bool:
    return case.recipe.name == name


def _aligned() -> dict[str, Holds]:
    """One query, and one key, under a mask that is aligned with either end of the queries."""
    found: dict[str, Holds] = {}
    for length in ("len_q", "len_k"):
        one = "one query" if length == "len_q" else "one key"
        for anchor in ("first", "last"):
            found[f"{one}, mask from the {anchor} query"] = partial(_one, length, anchor)
    return found


def _one(length: str, anchor: Anchor, case: Case, device: str) -> bool:
    problem = case.problem
    return getattr(problem, length) == 1 and anchor in problem.mask.anchors


def _windows(problem: Problem) -> Iterator[tuple[int, int]]:
    for name, arguments in problem.mask.parts:
        if KINDS[name].rule is window:
            yield arguments[0], arguments[1]


def _far(case: Case, device: str) -> bool:
    sides = [side for sides in _windows(case.problem) for side in sides]
    return any(FAR <= side < case.problem.len_k - 1 for side in sides)


def _beside(case: Case, device: str) -> bool:
    diagonal = any(KINDS[name].mirror for name in case.problem.mask.names)
    return diagonal and any(_windows(case.problem))


def _padded(case: Case, device: str, *, before: bool) -> bool:
    """An entry of 0 or 1 keys before, or after, one of all."""
    problem = case.problem
    for name, lengths in problem.mask.parts:
        ordered = lengths if before else lengths[::-1]
        few = [n for n, length in enumerate(ordered) if length <= 1 < problem.len_k]
        if KINDS[name].per_batch and few and max(ordered[few[0] :]) >= problem.len_k:
            return True
    return False


def _several_lengths(case: Case, device: str) -> bool:
    problem = case.problem
    lengths = [set(a) for name, a in problem.mask.parts if KINDS[name].per_batch]
    return problem.batch == problem.heads_kv > 1 and any(len(some) > 1 for some in lengths)


def _small(case: Case, device: str, *, axis: int) -> bool:
    """A mask of several entries, or heads, that is handed over without queries."""
    shape = case.problem.mask_shape
    return case.problem.mask != FULL and shape[2] == 1 < case.problem.len_q and shape[axis] > 1


def _of_heads(case: Case, device: str, *, within: bool) -> bool:
    """A mask that differs from head to head, or within a group of them."""
    problem = case.problem
    return problem.mask.per_head and (problem.group if within else problem.heads_q) > 1


def _odd(dim: int) -> bool:
    return dim > 8 and dim % 8 > 0


_SPECIAL: dict[str, Holds] = {
    "scale 0": lambda case, device: case.problem.scale == 0,
    "negative scale": lambda case, device: (case.problem.scale or 0.0) < 0,
    "tiny scale": lambda case, device: 0 < (case.problem.scale or 0.0) <= max(ODD_SCALES),
    "head dim above 8, no multiple of it": lambda case, device: (
        _odd(case.problem.dim_qk) or _odd(case.problem.dim_v)
    ),
    "group of 12 or 16": lambda case, device: case.problem.group in (12, 16),
    "34 heads and more": lambda case, device: case.problem.heads_q >= 34,
    "batch of 64": lambda case, device: case.problem.batch == 64,
}
_MASKS: dict[str, Holds] = {
    "window without a left bound": lambda case, device: any(
        left < 0 <= right for left, right in _windows(case.problem)
    ),
    "window without a right bound": lambda case, device: any(
        right < 0 <= left for left, right in _windows(case.problem)
    ),
    f"window of {FAR} and more, short of all keys": _far,
    "window beside a causal mask": _beside,
    "0 or 1 keys before an entry of all": partial(_padded, before=True),
    "0 or 1 keys after an entry of all": partial(_padded, before=False),
    "as many entries as key heads, of different lengths": _several_lengths,
    "mask that differs from head to head": partial(_of_heads, within=False),
    "mask that differs within a group of heads": partial(_of_heads, within=True),
    "mask [B,.,1,K], several entries": partial(_small, axis=0),
    "mask [.,H,1,K], several heads": partial(_small, axis=1),
    "mask [B,H,Q,K], handed over whole": lambda case, device: (
        case.problem.mask != FULL and case.problem.mask_as.endswith("_bhqk")
    ),
}
_TOGETHER: dict[str, Holds] = {
    f"more than {ENOUGH} rows and columns of each head": lambda case, device: (
        min(case.problem.len_q, case.problem.dim_v) > ENOUGH
    ),
    f"both lengths above {BLOCK}": lambda case, device: (
        min(case.problem.len_q, case.problem.len_k) > BLOCK
    ),
    f"uneven values, more than {2 * BLOCK} keys": lambda case, device: (
        case.problem.len_k > 2 * BLOCK and "scales" in case.recipe.family.stresses
    ),
}
