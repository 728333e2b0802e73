"""Hypothesis strategies: what a kernel is tried on. They draw a problem, a recipe and a seed, never
tensor elements.

A case follows a row of a covering array of pairs (pairwise.py), each option only some of the time.
Its sizes are usual or unusual ones (shapes.py, unusual.py), its values of a family that has
something to say of the problem (spec/inputs.py). Values are those that triggered real bugs: lengths
around tile sizes, uneven pairs, GQA, alignment, composed masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from typing import Any

from hypothesis import strategies as st

from verify.generation.choices import CHOICES, Choices
from verify.generation.pairwise import ODD_SCALES, Row, example, rows
from verify.generation.shapes import SEVERAL, usual_dims, usual_heads, usual_length
from verify.generation.sizes import Cost, Size
from verify.generation.unusual import ENTRIES, Unusual, turns
from verify.registry import Kernel
from verify.sandbox.capabilities import fitted, options, plain_problem
from verify.sandbox.domain import changed
from verify.spec.case import Case
from verify.spec.distribution import Stress, drawn_from
from verify.spec.inputs import Recipe
from verify.spec.masks import FULL, KINDS, TWO, Kind, Mask, ways
from verify.spec.problem import Problem
from verify.spec.requirements import NOTHING, Requirements

USED = {
    "mask": 7,
    "mask_as": 2,
    "bias": 5,
    "softcap": 3,
    "scale": 4,
    "heads": 7,
    "batch": 5,
    "dim_v": 3,
    "lengths": 7,
    "layout": 5,
}
"""In how many of 8 cases an option is as its row says; in the others it is plain, so that a case
does not have all at once.
"""
SMALL = 5
"""In how many of 8 cases a mask that does not look at queries is handed over without them."""
STRANGE = {0.0: 2, -0.3: 3}
"""So many times for once of other odd scales: what they break is known of several kernels."""


@st.composite
def masks(
    draw: Callable[..., Any],
    names: frozenset[str],
    batch: int,
    len_q: int,
    len_k: int,
    *,
    two: bool = False,
) -> Mask:
    """One of these ways of drawing a mask (spec/masks.py), or two of them composed: half the time
    any two, else, as models have it, a diagonal and lengths, or a diagonal and what it contradicts;
    shrinks to the first.
    """
    choose = draw(CHOICES)
    wanted = [name for name in ways() if name in names] or [FULL.way]
    if not two:
        return draw(_part(choose.of(wanted), batch, len_q, len_k))
    one, other = choose.of(_pairs(tuple(wanted))[choose.of((0, 0, 1, 2))])
    return draw(_part(one, batch, len_q, len_k)) & draw(_part(other, batch, len_q, len_k))


@cache
def _pairs(wanted: tuple[str, ...]) -> tuple[list[tuple[str, str]], ...]:
    """(any two, a diagonal and lengths, a causal mask and another that is aligned with the last
    query); any two in place of those that there are not.
    """
    any_two = list(product(wanted, wanted))
    lengths = [(a, b) for a, b in any_two if _kind(a).anchor == "last" and _kind(b).per_batch]
    beside = [(a, b) for a, b in any_two if _kind(a).mirror and _kind(b).anchor == "last"]
    beside = [(a, b) for a, b in beside if a != b]
    return any_two, lengths or any_two, beside or any_two


def _kind(way: str) -> Kind:
    return KINDS[ways()[way][0]]


def _part(way: str, batch: int, len_q: int, len_k: int) -> st.SearchStrategy[Mask]:
    name, drawn = ways()[way]
    return drawn.arguments(batch, len_q, len_k).map(lambda arguments: Mask(((name, arguments),)))


def _size(
    choose: Choices,
    kernel: Kernel,
    device: str,
    row: Row,
    used: dict[str, bool],
    of: Unusual | None,
) -> Size:
    """The size that a row says, as far as it is used, or an unusual one."""
    taken = options(kernel, device).taken
    len_q, len_k = (usual_length(choose, kernel.tiles, device) for _ in range(2))
    if used["lengths"]:
        len_q, len_k = _as_row(row["lengths"], len_q, len_k)
    several, heads = choose.of(SEVERAL), usual_heads(choose, taken["heads"], row["heads"])
    heads_q, heads_kv = heads if used["heads"] else (1, 1)
    apart = used["dim_v"] and row["dim_v"] == "another"
    dim_qk, dim_v = usual_dims(choose, taken["dims"], apart=apart)
    size = Size(
        batch=several if used["batch"] and row["batch"] == "several" else 1,
        heads_q=heads_q,
        heads_kv=heads_kv,
        len_q=len_q,
        len_k=len_k,
        dim_qk=dim_qk,
        dim_v=dim_v,
    )
    return of.change(choose, size, taken, device) if of else size


def _as_row(way: str, len_q: int, len_k: int) -> tuple[int, int]:
    low, high = sorted((len_q, len_k))
    return {
        "one query": (1, len_k),
        "equal": (len_k, len_k),
        "more keys": (low, high),
        "more queries": (high, low),
    }[way]


def _problem(
    choose: Choices,
    draw: Callable[..., Any],
    kernel: Kernel,
    device: str,
    row: Row,
    needs: Requirements,
) -> Problem:
    """A problem that follows a row in part, as near to it as the kernel goes along. The mask's
    arguments are drawn last, for the lengths that it then has.
    """
    taken = options(kernel, device).taken
    used = {name: choose.often(often, 8) for name, often in USED.items()}
    quantised = kernel.numerics(plain_problem(kernel, device), device).quantised is not None
    of = choose.of(turns(device, quantised=quantised))
    used["bias"] |= row["layout"] == "bias"
    used["heads"] |= used["bias"] and row["bias"] == "alibi"  # a slope for each head
    alone = row["mask"] if used["mask"] and row["mask"] != TWO else FULL.way
    used["batch"] |= _kind(alone).per_batch or needs.several  # an argument for each entry
    used["heads"] |= _kind(alone).per_head
    used["heads"] |= needs.grouped
    slow = device == "cpu" and options(kernel, device).slow
    cost = Cost(device, slow, needs.grads, of.times if of else 1)
    shorter = of.shorter if of else choose.often(2 if _kind(alone).per_batch else 1, 4)
    size = cost.cut(_size(choose, kernel, device, row, used, of), lengths=shorter)
    mask = example(row["mask"]) if used["mask"] and not needs.full_mask else FULL
    if of and of.padded and not (mask.per_batch or needs.full_mask):
        mask = example(choose.of([m.way for m in taken["mask"] if m.per_batch] or [mask.way]))
    if needs.hides and mask == FULL:
        hiding = sorted(_allowed(FULL.way, taken["mask"], needs))
        mask = example(choose.of(hiding)) if hiding else FULL
    if size.batch > max(ENTRIES) and mask.per_batch:
        mask = FULL
    cap = choose.of([c for c in taken["softcap"] if c] or [0.0])
    whole = Problem(
        **size.fields,
        dtype=row["dtype"],
        bias=row["bias"] if used["bias"] else "none",
        scale=_scale(choose, row["scale"], taken["scale"]) if used["scale"] else None,
        softcap=cap if used["softcap"] and row["softcap"] == "softcap" else 0.0,
        grads=needs.grads,
    )
    handed = row["mask_as"] if used["mask_as"] or "rule" not in taken["mask_as"] else "rule"
    if not mask.per_row and choose.often(SMALL, 8):  # the shapes that others do not have
        handed = choose.of([way for way in taken["mask_as"] if way.endswith("_small")] or [handed])
    near = fitted(kernel, device, changed(whole, {"mask": mask, "mask_as": handed}) or whole, needs)
    near = _affordable(kernel, device, near, needs, cost)
    allowed = _allowed(near.mask.way, taken["mask"], needs)
    if near.batch > max(ENTRIES):
        allowed = frozenset(way for way in allowed if not _kind(way).per_batch)
    drawn = draw(masks(allowed, near.batch, near.len_q, near.len_k, two=near.mask.way == TWO))
    return fitted(kernel, device, changed(near, {"mask": drawn}) or near, needs)


def _affordable(
    kernel: Kernel, device: str, near: Problem, needs: Requirements, cost: Cost
) -> Problem:
    """The problem, or where a kernel takes only a dearer one than was wanted, one with shorter
    lengths that it takes.
    """
    size = Size.of(near)
    if cost.affords(size):
        return near
    found = [near]
    for cut in (cost.cut(size, lengths=True), cost.thinner(size), cost.cut(size)):
        found.append(fitted(kernel, device, changed(near, cut.fields) or near, needs))
        if cost.affords(Size.of(found[-1])):
            return found[-1]
    return min(found, key=lambda problem: Size.of(problem).cost((1, 1)))


def _bucketed(kernel: Kernel, device: str, problem: Problem) -> Problem:
    """The problem that is drawn in its place, if its shape is one of few; cut once more where that
    costs more than a case may.
    """
    if kernel.bucket is None:
        return problem
    cost, chosen = Cost(device, grads=problem.grads), kernel.bucket(problem)
    size = Size.of(chosen)
    if cost.affords(size):
        return chosen
    cut = cost.cut(size, lengths=True)
    shorter = changed(problem, {"batch": cut.batch, "len_q": cut.len_q, "len_k": cut.len_k})
    return kernel.bucket(shorter or problem)


def _scale(choose: Choices, level: str, taken: Iterable[float | None]) -> float | None:
    given: list[float | None] = [scale for scale in taken if scale is not None] or [None]
    odd = [c for c in given if c in ODD_SCALES for _ in range(STRANGE.get(c or 0.0, 1))]
    usual = [c for c in given if c not in ODD_SCALES]
    drawn = {"given": usual or given, "odd": odd or given}
    return choose.of(drawn[level]) if level in drawn else None


def _allowed(way: str, taken: Iterable[Mask], needs: Requirements) -> frozenset[str]:
    """Ways of drawing that a mask may be of; those that hide something where one must."""
    if way == TWO or (way == FULL.way and needs.hides):
        return frozenset(mask.way for mask in taken if needs.allows(mask)) - {FULL.way}
    return frozenset({way})


@st.composite
def cases(
    draw: Callable[..., Any],
    kernel: Kernel,
    device: str,
    needs: Requirements = NOTHING,
    number: int = 0,
) -> Case:
    """A whole case for this kernel on this device ("cpu", "cuda"), which follows the covering array
    of this number.
    """
    choose: Choices = draw(CHOICES)
    row = choose.of(rows(kernel, device, needs, number))
    seed = choose.below(1000)
    problem = _bucketed(kernel, device, _problem(choose, draw, kernel, device, row, needs))
    hard_on: list[Stress] = ["delta"] if needs.grads else []
    if kernel.numerics(problem, device).quantised is not None:
        hard_on.append("scales")
    recipe = Recipe.parse(choose.of(drawn_from(*hard_on, problem=problem)))
    taken = options(kernel, device).layouts
    chosen = {name: choose.of(_layouts(ways, needs)) for name, ways in taken.items()}
    arranged = [
        name
        for name in chosen
        if name in problem.shapes
        and (name != "do" or needs.grads)
        and row["layout"] in ("several", name)
    ]
    used = choose.often(USED["layout"], 8) or needs.arranged
    layouts = tuple((n, chosen[n]) for n in arranged if used and chosen[n] != "bhsd")
    return Case(problem, recipe, seed, layouts)


def _layouts(taken: tuple[str, ...], needs: Requirements) -> Sequence[str]:
    others = [layout for layout in taken if layout != "bhsd"]
    return others if needs.arranged and others else taken
