"""Which problems a kernel takes: found from any one that it takes, never assumed.

The search starts from a plain problem and asks about one change, two changes, then many at once; a
refusal that gives a new reason is a step nearer, and is changed further. What is found are
*anchors*: accepted problems, one at least for every value that is taken. `nearest` moves an anchor
as far towards a wanted problem as the kernel goes along, so that options which need each other
(a diagonal and equal lengths, two head dims) are drawn together.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, product
from typing import Any

from verify.errors import VerifyError
from verify.spec.masks import FULL, Mask, hiding, ways
from verify.spec.problem import BIASES, HANDED, Problem

Refuses = Callable[[Problem], str | None]
"""Why a kernel does not take a problem; None where it does."""
Change = dict[str, Any]
"""Fields of a problem that change together, with their new values."""

DIMS = (64, 32, 128, 16, 80, 8, 1, 2, 3, 4, 24, 40, 72, 96, 192, 256, 12, 33, 70, 100)
"""The last four are no multiple of 8: of 4 alone, odd just past a tile, of 2 just past one, past it
by a part that is no multiple of 8.
"""
LARGE_DIMS = (48, 112, 160, 320, 384, 512, 576, 640, 768, 1024)
"""Those that are drawn only where a kernel takes nothing else."""
UNEQUAL_DIMS = ((192, 128), (576, 512), (128, 64), (64, 128), (96, 64), (64, 16), (40, 72))
"""(dim_qk, dim_v) of latent attention, and others."""
HEADS = (
    (2, 2),
    (2, 1),
    (1, 1),
    (3, 3),
    (4, 2),
    (5, 1),
    (6, 2),
    (6, 6),
    (7, 1),
    (8, 8),
    (14, 2),
    (16, 4),
    (12, 1),
    (16, 1),
    (34, 2),
)
SCALES = (None, 1.0, 0.5, 0.0, -0.3, 1e-3, 4.0)
LENGTHS = (
    (16, 16),
    (17, 17),
    (1, 16),
    (16, 17),
    (17, 16),
    (1, 1),
    (16, 1),
    (1, 17),
    (64, 64),
    (64, 128),
    (128, 64),
    (128, 128),
    (1, 64),
    (1, 128),
    (256, 256),
    (512, 512),
    (16, 0),
    (0, 16),
    (0, 0),
    (1, 0),
)
"""(len_q, len_k): equal, one query, more keys, more queries, around a tile or a multiple of one,
none.
"""
MULTIPLES = (8, 16, 32, 64, 128, 256)
"""What lengths may have to be multiples of."""
PLAIN = Problem(
    batch=1, heads_q=2, heads_kv=2, len_q=16, len_k=16, dim_qk=64, dim_v=64, dtype="fp32"
)
MASKED = PLAIN.but(batch=2, mask=hiding((5, 9)))
"""Plain but for a mask whose shapes all differ: entry by entry, the same for all queries."""
STARTS = 3
"""So many of the nearest anchors are moved towards a wanted problem; the one that comes nearest
counts."""
MOST_SAMPLES = 20_000
"""Problems that are asked about with many changes at once, before a kernel is said to take none."""


def choices() -> dict[str, tuple[Change, ...]]:
    """Every option that a kernel is asked about, with its values, the plain one first."""
    dims = [(d, d) for d in (*DIMS, *LARGE_DIMS)]
    masks = [Mask.parse(drawn.example) for _, drawn in ways().values()]
    return {
        "dtype": tuple({"dtype": d} for d in ("fp32", "fp16", "bf16", "fp64")),
        "dims": tuple({"dim_qk": a, "dim_v": b} for a, b in (*dims, *UNEQUAL_DIMS)),
        "heads": tuple({"heads_q": q, "heads_kv": k} for q, k in HEADS),
        "batch": tuple({"batch": n} for n in (1, 2)),
        "lengths": tuple({"len_q": q, "len_k": k} for q, k in LENGTHS),
        "mask": tuple({"mask": mask} for mask in masks),
        "mask_as": tuple({"mask_as": way} for way in HANDED),
        "bias": tuple({"bias": b} for b in BIASES),
        "scale": tuple({"scale": s} for s in SCALES),
        "softcap": tuple({"softcap": c} for c in (0.0, 1.0, 30.0)),
        "grads": tuple({"grads": g} for g in (False, True)),
    }


def changed(problem: Problem, *changes: Change) -> Problem | None:
    """The problem with these fields changed; None where that is no problem. A mask of single batch
    entries is given as many as there are.
    """
    fields = dict(changes[0])
    for change in changes[1:]:
        fields.update(change)
    batch, mask = fields.get("batch", problem.batch), fields.get("mask", problem.mask)
    if mask.batch_sizes - {batch}:
        fields["mask"] = mask.of_entries(lambda a: [a[n % len(a)] for n in range(batch)])
    if mask.names == FULL.names and fields.get("mask_as", problem.mask_as) != "rule":
        fields["mask_as"] = "rule"
    try:
        return problem.but(**fields)
    except VerifyError:
        return None


def first_accepted(refuses: Refuses, wanted: Change, most: int = MOST_SAMPLES) -> Problem | None:
    """Any problem that is taken, as plain as it is found; None where none of many is. wanted: what
    the plain one is changed by.
    """
    start = changed(PLAIN, wanted)
    for problem in _asked(start, refuses, most) if start else ():
        if refuses(problem) is None:
            return nearest(start, (problem,), refuses) if start else problem
    return None


def _asked(start: Problem, refuses: Refuses, most: int) -> Iterator[Problem]:
    """Plain; one change, from every refusal of a new reason; two changes; many."""
    yield start
    asked = choices()
    singles = [change for values in asked.values() for change in values]
    reasons, steps = {_kind(refuses(start))}, [start]
    while steps:
        step = steps.pop(0)
        for problem in _distinct(changed(step, change) for change in singles):
            yield problem
            if (reason := _kind(refuses(problem))) not in reasons:
                reasons.add(reason)
                steps.append(problem)
    for one, other in combinations(asked.values(), 2):
        yield from _distinct(changed(start, *pair) for pair in product(one, other))
    rng = random.Random(0)  # noqa: S311 - no secret
    values = list(asked.values())
    yield from _distinct(changed(start, *map(rng.choice, values)) for _ in range(most))


@functools.lru_cache(maxsize=1024)
def _kind(reason: str | None) -> str | None:
    """A refusal without its numbers: what it names may be the value that was asked about."""
    return None if reason is None else re.sub(r"\d+", "#", reason)


def _distinct(problems: Iterable[Problem | None]) -> Iterator[Problem]:
    yield from dict.fromkeys(problem for problem in problems if problem is not None)


NO_PROBLEM = "no such problem"


def anchor_with(
    base: Problem, change: Change, refuses: Refuses, along: Iterable[str]
) -> Problem | None:
    """An accepted problem with this change of an accepted one, and where it needs it with another,
    of the options `along`; with two where one gives another reason. None where none is found.
    """
    one = changed(base, change)
    if one is None or refuses(one) is None:
        return one
    asked, reason = choices(), _kind(refuses(one))
    others = [
        c for name in along for c in asked[name] if not (c.keys() & change.keys() or _none(c))
    ]
    nearer: list[Change] = []
    for other in others:
        problem = changed(base, change, other)
        found = NO_PROBLEM if problem is None else refuses(problem)
        if found is None:
            return problem
        if problem is not None and _kind(found) != reason:
            nearer.append(other)
    for n, other in enumerate(nearer):
        before = nearer[:n]
        for another in others:
            if other.keys() & another.keys() or another in before:
                continue
            problem = changed(base, change, other, another)
            if problem is not None and refuses(problem) is None:
                return problem
    return None


def _none(change: Change) -> bool:
    """Whether there are no queries or no keys then: what does nothing takes such a problem."""
    return 0 in (change.get("len_q"), change.get("len_k"))


def nearest(wanted: Problem, anchors: Iterable[Problem], refuses: Refuses) -> Problem:
    """The accepted problem that is most like the wanted one: of the nearest anchors, moved option
    by option as far as the kernel goes along, the one that differs in the fewest.
    """
    if refuses(wanted) is None:
        return wanted
    starts = sorted(anchors, key=lambda anchor: len(_differences(anchor, wanted)))[:STARTS]
    moved = [_moved(start, wanted, refuses) for start in starts]
    return min(moved, key=lambda problem: len(_differences(problem, wanted)))


def _moved(start: Problem, wanted: Problem, refuses: Refuses) -> Problem:
    problem, before = start, None
    while problem != before:  # an option may be taken only after another
        before = problem
        for moves in _moves(wanted, problem):
            problem = next(filter(None, (_after(problem, m, refuses) for m in moves)), problem)
    return problem


def _after(problem: Problem, move: Change, refuses: Refuses) -> Problem | None:
    """The problem after a move; None where it is not taken."""
    if all(getattr(problem, name) == value for name, value in move.items()):
        return problem
    one = changed(problem, move)
    return one if one is not None and refuses(one) is None else None


def _moves(wanted: Problem, now: Problem) -> Iterator[list[Change]]:
    """For each option what to try, the wanted value first, then those that are like it."""
    w = wanted
    for name in ("dtype", "grads", "bias", "softcap"):
        yield [{name: getattr(w, name)}]
    yield [{"heads_q": w.heads_q, "heads_kv": w.heads_kv}]
    yield [
        {"dim_qk": a, "dim_v": b}
        for a, b in ((w.dim_qk, w.dim_v), (w.dim_qk, w.dim_qk), (w.dim_v, w.dim_v))
    ]
    alone = [Mask((part,)) for part in w.mask.parts] if len(w.mask.parts) > 1 else []
    yield [{"batch": w.batch, "mask": mask} for mask in (w.mask, *alone)]
    yield [{"batch": w.batch}]
    yield [{"mask": mask} for mask in (w.mask, *alone)]
    yield [{"len_q": q, "len_k": k} for q, k in _lengths(w, now)]
    yield [{"mask_as": w.mask_as}]
    yield [{"scale": w.scale}]


def _lengths(w: Problem, now: Problem) -> Iterator[tuple[int, int]]:
    """The wanted lengths; equal ones, one query, the longer first or last; multiples of those."""
    q, k = w.len_q, w.len_k
    like = [(q, k), (k, k), (q, q), (1, k), (min(q, k), max(q, k)), (max(q, k), min(q, k))]
    like += [(q, now.len_k), (now.len_q, k)]
    yield from like
    for m in MULTIPLES:
        up = [(_up(a, m), _up(b, m)) for a, b in like[:6]]
        yield from (*up, (q, _up(k, m)), (_up(q, m), k), (1, _up(k, m)))


def _up(n: int, multiple: int) -> int:
    return max(multiple, -(-n // multiple) * multiple)


def _differences(one: Problem, other: Problem) -> list[str]:
    """The options in which two problems differ; masks by how they are drawn, lengths by which is
    longer.
    """
    plain = ("dtype", "grads", "bias", "softcap", "scale", "mask_as", "batch")
    found = [name for name in plain if getattr(one, name) != getattr(other, name)]
    pairs = {
        "heads": lambda p: (p.heads_q, p.heads_kv),
        "dims": lambda p: (p.dim_qk, p.dim_v),
        "mask": lambda p: p.mask.way,
        "lengths": relation,
        "kind of mask": lambda p: p.mask == FULL,
        "kind of heads": lambda p: (p.group > 1, p.heads_kv > 1),
    }
    return found + [name for name, value in pairs.items() if value(one) != value(other)]


def relation(problem: Problem) -> str:
    """How the lengths stand to each other."""
    q, k = problem.len_q, problem.len_k
    if q == 1:
        return "one query"
    return "equal" if q == k else "more keys" if k > q else "more queries"
