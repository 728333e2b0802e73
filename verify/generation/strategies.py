"""Hypothesis strategies: what a kernel is tried on. They draw a problem, a recipe and a seed, never
tensor elements.

A case follows a row of a covering array of pairs (design.py), each option only some of the time: it
shrinks to batch 1, one head, the shortest lengths and head dims, FP32, no options, contiguous
tensors, the recipe `integers`. Values are those that triggered real bugs: lengths around tile
sizes, uneven pairs, GQA, alignment, composed masks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import product
from typing import Any

from hypothesis import strategies as st

from verify.generation.pairwise import ODD_SCALES, Row, example, rows
from verify.generation.sizes import Size, affordable
from verify.registry import Kernel
from verify.sandbox.capabilities import fitted, options, plain_problem
from verify.sandbox.domain import LARGE_DIMS, changed
from verify.spec.case import Case
from verify.spec.inputs import Recipe, Stress, drawn_from
from verify.spec.masks import FULL, KINDS, TWO, Kind, Mask, ways
from verify.spec.problem import Problem
from verify.spec.requirements import NOTHING, Requirements

LENGTHS = (
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    12,
    16,
    17,
    31,
    33,
    34,
    63,
    64,
    65,
    76,
    88,
    113,
    127,
    128,
    129,
    146,
    193,
    255,
    256,
    257,
)
FEW = 8
"""The first so many of LENGTHS see little: they come up a fifth as often."""
LONG = (441, 503, 512, 600, 1001, 1024, 2047)
BATCHES = (2, 3)
USED = {
    "mask": 7,
    "mask_as": 4,
    "bias": 5,
    "softcap": 3,
    "scale": 3,
    "heads": 7,
    "batch": 5,
    "dim_v": 3,
    "lengths": 7,
    "layout": 5,
}
"""In how many of 8 cases an option is as its row says; in the others it is plain, so that a case
does not have all at once.
"""


@cache
def _below(n: int) -> st.SearchStrategy[int]:
    """0 to n - 1; made once, since making a strategy takes longer than drawing from it."""
    return st.integers(0, n - 1)


def _pick(draw: Callable[..., Any], values: Sequence[Any]) -> Any:
    """One of the values; shrinks to the first."""
    return values[draw(_below(len(values)))]


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
    any two, else, as models have it, a diagonal and lengths; shrinks to the first.
    """
    wanted = [name for name in ways() if name in names] or [FULL.way]
    if not two:
        return draw(_part(_pick(draw, wanted), batch, len_q, len_k))
    pairs = list(product(wanted, wanted))
    usual = [(a, b) for a, b in pairs if _kind(a).anchor == "last" and _kind(b).per_batch]
    one, other = _pick(draw, pairs + usual * (len(pairs) // max(1, len(usual))))
    return draw(_part(one, batch, len_q, len_k)) & draw(_part(other, batch, len_q, len_k))


def _kind(way: str) -> Kind:
    return KINDS[ways()[way][0]]


def _part(way: str, batch: int, len_q: int, len_k: int) -> st.SearchStrategy[Mask]:
    name, drawn = ways()[way]
    return drawn.arguments(batch, len_q, len_k).map(lambda arguments: Mask(((name, arguments),)))


def _lengths(kernel: Kernel, device: str) -> st.SearchStrategy[int]:
    """Some that see little, those around usual tiles and the kernel's own, and any other."""
    tiles = tuple(
        sorted(
            {
                n
                for tile in kernel.tiles
                for n in (tile // 2, tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile + 1)
                if n > FEW
            }
        )
    )
    longest = (
        LENGTHS[FEW:]
        + tuple(n for n in tiles if n <= max(LENGTHS))
        + (LONG if device == "cuda" else ())
    )
    return st.sampled_from(LENGTHS + 3 * longest) | st.integers(FEW, max(LENGTHS))


@st.composite
def problems(
    draw: Callable[..., Any],
    kernel: Kernel,
    device: str,
    row: Row,
    needs: Requirements = NOTHING,
) -> Problem:
    """A problem that follows a row in part, as near to it as the kernel goes along. Every choice is
    drawn whether it is used or not, the mask's arguments last, so that shrinking one of them leaves
    the others as they are.
    """
    taken, used = (
        options(kernel, device).taken,
        {name: draw(_below(8)) >= 8 - often for name, often in USED.items()},
    )
    lengths = _lengths(kernel, device)
    len_q, len_k, shape = draw(lengths), draw(lengths), draw(_below(25))
    if shape > 21 and (16, 0) in taken["lengths"]:
        len_q, len_k = EMPTY[len_q % len(EMPTY)]
    elif used["lengths"]:
        len_q, len_k = _as_row(row["lengths"], len_q, len_k)
    used["bias"] |= row["layout"] == "bias"
    used["heads"] |= used["bias"] and row["bias"] == "alibi"  # a slope for each head
    alone = row["mask"] if used["mask"] and row["mask"] != TWO else FULL.way
    used["batch"] |= _kind(alone).per_batch or needs.several  # an argument for each entry
    used["heads"] |= needs.grouped
    several = _pick(draw, BATCHES)
    batch = several if used["batch"] and row["batch"] == "several" else 1
    kinds = {
        "one": lambda q, k: q == 1,
        "several": lambda q, k: q == k > 1,
        "grouped": lambda q, k: q > k,
    }
    wanted = [h for h in taken["heads"] if kinds[row["heads"]](*h)] or list(taken["heads"])
    heads = _pick(draw, sorted(wanted))
    heads_q, heads_kv = heads if used["heads"] else (1, 1)
    size = Size(batch, heads_q, heads_kv, len_q, len_k)
    interpreted = device == "cpu" and options(kernel, device).slow
    size = affordable(size, device, interpreted=interpreted)
    dim_qk, dim_v = draw(_dims(taken["dims"], apart=used["dim_v"] and row["dim_v"] == "another"))
    caps, scales = (
        [c for c in taken["softcap"] if c] or [0.0],
        [c for c in taken["scale"] if c is not None] or [None],
    )
    odd = [c for c in scales if c in ODD_SCALES] or scales
    usual = [c for c in scales if c not in ODD_SCALES] or scales
    cap, given, strange = (
        _pick(draw, caps),
        _pick(draw, usual),
        _pick(draw, odd),
    )
    mask = example(row["mask"]) if used["mask"] and not needs.full_mask else FULL
    if needs.hides and mask == FULL:
        mask = example(_pick(draw, sorted(_allowed(FULL.way, taken["mask"], needs))))
    whole = Problem(
        batch=size.batch,
        heads_q=size.heads_q,
        heads_kv=size.heads_kv,
        len_q=size.len_q,
        len_k=size.len_k,
        dim_qk=dim_qk,
        dim_v=dim_v,
        dtype=row["dtype"],
        bias=row["bias"] if used["bias"] else "none",
        scale={"given": given, "odd": strange}.get(row["scale"]) if used["scale"] else None,
        softcap=cap if used["softcap"] and row["softcap"] == "softcap" else 0.0,
        grads=needs.grads,
    )
    handed = row["mask_as"] if used["mask_as"] or "rule" not in taken["mask_as"] else "rule"
    near = fitted(kernel, device, changed(whole, {"mask": mask, "mask_as": handed}) or whole, needs)
    ways = _allowed(near.mask.way, taken["mask"], needs)
    drawn = draw(masks(ways, near.batch, near.len_q, near.len_k, two=near.mask.way == TWO))
    return fitted(kernel, device, changed(near, {"mask": drawn}) or near, needs)


@st.composite
def _dims(
    draw: Callable[..., Any], taken: tuple[tuple[int, int], ...], *, apart: bool
) -> tuple[int, int]:
    """(dim_qk, dim_v) of those that are taken; large ones where there are no others, unequal ones
    where there are no equal ones.
    """
    equal, pairs = ([p for p in sorted(taken) if (p[0] == p[1]) == same] for same in (True, False))
    usual, usual_pairs = (
        [p for p in of if not {*p} & {*LARGE_DIMS}] or of for of in (equal, pairs)
    )
    dims, others = (_pick(draw, usual or usual_pairs) for _ in range(2))
    pair = _pick(draw, usual_pairs or usual)
    together = draw(_below(4)) == 3 or len(usual) < 2
    if not apart:
        return dims
    return pair if together else (dims[0], others[0])


def _allowed(way: str, taken: Iterable[Mask], needs: Requirements) -> frozenset[str]:
    """Ways of drawing that a mask may be of; those that hide something where one must."""
    if way == TWO or (way == FULL.way and needs.hides):
        return frozenset(mask.way for mask in taken) - {FULL.way}
    return frozenset({way})


def _as_row(way: str, len_q: int, len_k: int) -> tuple[int, int]:
    low, high = sorted((len_q, len_k))
    return {
        "one query": (1, len_k),
        "equal": (len_k, len_k),
        "more keys": (low, high),
        "more queries": (high, low),
    }[way]


EMPTY = ((1, 0), (0, 1), (3, 0), (0, 0))
"""(len_q, len_k) where nothing is seen or nobody looks."""


@st.composite
def cases(
    draw: Callable[..., Any], kernel: Kernel, device: str, needs: Requirements = NOTHING
) -> Case:
    """A whole case for this kernel on this device ("cpu", "cuda")."""
    row = _pick(draw, rows(kernel, device, needs))
    hard_on: list[Stress] = ["delta"] if needs.grads else []
    if kernel.numerics(plain_problem(kernel, device), device).quantised is not None:
        hard_on.append("scales")
    recipe = Recipe.parse(_pick(draw, drawn_from(*hard_on)))
    seed = draw(_below(1000))
    problem = draw(problems(kernel, device, row, needs))
    problem = kernel.bucket(problem) if kernel.bucket else problem
    taken = options(kernel, device).layouts
    chosen = {name: _pick(draw, _layouts(ways, needs)) for name, ways in taken.items()}
    arranged = [
        name
        for name in chosen
        if name in problem.shapes
        and (name != "do" or needs.grads)
        and row["layout"] in ("several", name)
    ]
    used = draw(_below(8)) >= 8 - USED["layout"] or needs.arranged
    layouts = tuple((n, chosen[n]) for n in arranged if used and chosen[n] != "bhsd")
    return Case(problem, recipe, seed, layouts)


def _layouts(taken: tuple[str, ...], needs: Requirements) -> Sequence[str]:
    others = [layout for layout in taken if layout != "bhsd"]
    return others if needs.arranged and others else taken
