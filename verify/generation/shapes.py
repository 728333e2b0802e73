"""Which sizes a drawn problem usually has: those that a kernel takes, lengths around tiles."""

from __future__ import annotations

from functools import cache

from verify.generation.choices import Choices
from verify.generation.pairwise import HEADS
from verify.sandbox.domain import LARGE_DIMS

LENGTHS = (
    *(1, 2, 3, 4, 5, 7, 8, 9),
    *(12, 16, 17, 31, 33, 34, 63, 64, 65, 76, 88, 113, 127, 128, 129, 146, 193, 255, 256, 257),
)
FEW = 8
"""The first so many of LENGTHS see little."""
OFTEN = 4
"""So many times as often come the others."""
LEAST = 33
"""Of lengths that are no tile's."""
LONG = (441, 503, 512, 600, 1001, 1024, 2047)
SEVERAL = (2, 3)
"""Usual batches of more than one."""
Pairs = tuple[tuple[int, int], ...]


@cache
def _longer(tiles: tuple[int, ...], device: str) -> tuple[int, ...]:
    around = {
        n
        for tile in tiles
        for n in (tile // 2, tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile + 1)
        if FEW < n <= max(LENGTHS)
    }
    return (*LENGTHS[FEW:], *sorted(around), *(LONG if device == "cuda" else ()))


def usual_length(choose: Choices, tiles: tuple[int, ...], device: str) -> int:
    """One that sees little, those around usual tiles and the kernel's own, or any other."""
    if choose.below(2):
        return LEAST + choose.below(max(LENGTHS) + 1 - LEAST)
    return choose.of(LENGTHS + OFTEN * _longer(tiles, device))


@cache
def _dims(taken: Pairs) -> tuple[Pairs, Pairs]:
    """(equal pairs, unequal ones): large ones where there are no others."""
    equal, unequal = (
        [p for p in sorted(taken) if (p[0] == p[1]) == same] for same in (True, False)
    )
    usual = [[p for p in of if not {*p} & {*LARGE_DIMS}] or of for of in (equal, unequal)]
    return tuple(usual[0]), tuple(usual[1])


def usual_dims(choose: Choices, taken: Pairs, *, apart: bool) -> tuple[int, int]:
    """(dim_qk, dim_v) of those that are taken; unequal ones where there are no equal ones."""
    usual, unequal = _dims(taken)
    dims, others = (choose.of(usual or unequal) for _ in range(2))
    if not apart:
        return dims
    together = choose.often(1, 4) or len(usual) < 2
    return choose.of(unequal or usual) if together else (dims[0], others[0])


@cache
def _heads(taken: Pairs, kind: str) -> Pairs:
    return tuple(sorted([h for h in taken if HEADS[kind](*h)] or taken))


def usual_heads(choose: Choices, taken: Pairs, kind: str) -> tuple[int, int]:
    """(heads_q, heads_kv) of a level of the covering arrays, or any where none is taken."""
    return choose.of(_heads(taken, kind))
