"""Pairs of options: most bugs need two at a time, so cases are drawn from a covering array of all
pairs that a kernel takes.

Pairwise testing: Kuhn, Wallace, Gallo 2004, IEEE Trans. Software Eng. 30(6). The array is
allpairspy's.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import combinations
from typing import Any

from allpairspy import AllPairs

from verify.registry import Kernel
from verify.sandbox.capabilities import PLAIN, Options, options
from verify.spec.case import ARRANGED, Case
from verify.spec.masks import FULL, KINDS, TWO, Mask, ways
from verify.spec.problem import Problem
from verify.spec.requirements import NOTHING, Requirements

Row = dict[str, str]
ARRAYS = 6
"""Covering arrays, each with its levels in another order: what a pair leaves open is filled with
the first, which takes turns.
"""
ODD_SCALES = (0.0, -0.3, 1e-3)
"""No scale that anybody asks for, and yet legal."""


def levels(case: Case) -> Row:
    """Where a case stands in each option."""
    p, scale = case.problem, case.problem.scale
    names = [name for name, _ in case.layouts]
    return {
        "dtype": p.dtype,
        "mask": p.mask.way,
        "mask_as": p.mask_as,
        "bias": p.bias,
        "softcap": "softcap" if p.softcap else "none",
        "scale": "default" if scale is None else "odd" if scale in ODD_SCALES else "given",
        "heads": "grouped" if p.group > 1 else "one" if p.heads_q == 1 else "several",
        "batch": "one" if p.batch == 1 else "several",
        "dim_v": "dim_qk" if p.dim_v == p.dim_qk else "another",
        "lengths": "one query"
        if p.len_q == 1
        else "equal"
        if p.len_q == p.len_k
        else "more keys"
        if p.len_k > p.len_q
        else "more queries",
        "layout": "contiguous" if not names else names[0] if len(names) == 1 else "several",
    }


def example(way: str) -> Mask:
    """A mask of this way of drawing; of a conjunction, the one that models use most."""
    if way != TWO:
        return Mask.parse(ways()[way][1].example)
    of = [(KINDS[name], drawn) for name, drawn in ways().values()]
    diagonal = next(drawn for kind, drawn in of if kind.anchor == "last")
    lengths = next(drawn for kind, drawn in of if kind.per_batch)
    return Mask.parse(diagonal.example) & Mask.parse(lengths.example)


def _parameters(taken: Options, needs: Requirements) -> dict[str, list[str]]:
    t = taken.taken
    masks = [mask.way for mask in t["mask"]]
    masks += [TWO] * (len({name for mask in t["mask"] for name in mask.names}) > 2)
    plain = FULL.way
    if needs.full_mask:
        masks = [plain]
    if needs.hides:
        masks = [way for way in masks if way != plain] or [plain]
    left_out = {"do": not needs.grads, "bias": needs.no_bias}
    arranged = [
        name for name in ARRANGED if len(taken.layouts[name]) > 1 and not left_out.get(name, False)
    ]
    return {
        "dtype": list(t["dtype"]),
        "mask": masks,
        "mask_as": list(t["mask_as"]) or ["rule"],
        "bias": ["none"] if needs.no_bias else list(t["bias"]),
        "softcap": ["none"] + ["softcap"] * any(t["softcap"]),
        "scale": ["default"] + ["given", "odd"] * (len(t["scale"]) > 1),
        "heads": ["several", "one"] + ["grouped"] * any(q > k for q, k in t["heads"]),
        "batch": ["several", "one"],
        "dim_v": ["dim_qk"] + ["another"] * (len(t["dim_v"]) > 1),
        "lengths": ["more keys", "more queries", "equal", "one query"],
        "layout": ["contiguous", *arranged] + ["several"] * (len(arranged) > 1),
    }


def rows(kernel: Kernel, device: str, needs: Requirements = NOTHING) -> tuple[Row, ...]:
    """Covering arrays: every pair of levels that the kernel takes together is in one of the rows.

    Kernels that declare the same and take the same have the same rows, which are found once, here,
    unless another process has.
    """
    key = _key(kernel, device, needs)
    if key not in _ROWS:
        taken = options(kernel, device)
        parameters = _parameters(taken, needs)
        _ROWS[key] = _rows(kernel, device, taken, parameters, grads=needs.grads)
    return _ROWS[key]


def learn_rows(kernel: Kernel, device: str, needs: Requirements, found: tuple[Row, ...]) -> None:
    """Take over what was found elsewhere."""
    _ROWS[_key(kernel, device, needs)] = found


_ROWS: dict[Any, tuple[Row, ...]] = {}


def _key(kernel: Kernel, device: str, needs: Requirements) -> Any:
    parameters = _parameters(options(kernel, device), needs)
    declared = kernel.takes, kernel.dtypes, kernel.supports, device, needs.grads
    return declared, tuple((name, *values) for name, values in parameters.items())


def _rows(
    kernel: Kernel,
    device: str,
    taken: Options,
    parameters: dict[str, list[str]],
    *,
    grads: bool,
) -> tuple[Row, ...]:
    names = list(parameters)

    def legal(values: list[str]) -> bool:
        row = dict(zip(names, values, strict=False))
        if row.get("mask") == FULL.way and row.get("mask_as", "rule") != "rule":
            return False
        if row.get("layout") == "bias" and row.get("bias", "none") in ("none", "alibi"):
            return False
        if len(values) < 2:
            return True
        return kernel.unsupported(_problem(row, taken, grads=grads), device) is None

    # the first row is what a case shrinks to
    found: list[Row] = [{name: values[0] for name, values in parameters.items()}]
    for order in range(ARRAYS):
        mixed = [
            _turned(values, order + number) for number, values in enumerate(parameters.values())
        ]
        found += [dict(zip(names, row, strict=True)) for row in AllPairs(mixed, filter_func=legal)]
    return (*found, *(row for row in found if _usual(row)))


def _usual(row: Row) -> bool:
    """Rows that come twice: what models use most, and ALiBi where its heads differ."""
    common = {TWO, *(name for name, (_, drawn) in ways().items() if drawn.common)}
    return row["mask"] in common or (row["bias"] == "alibi" and row["heads"] != "one")


def _turned(values: list[str], by: int) -> list[str]:
    by %= len(values)
    return values[by:] + values[:by]


def _problem(row: Row, taken: Options, *, grads: bool) -> Problem:
    """The problem of a row, or of the first values of one, all else plain."""
    heads = (
        next((h for h in taken.taken["heads"] if h[0] > h[1]), (2, 2))
        if row.get("heads") == "grouped"
        else (2, 2)
    )
    mask = example(row.get("mask", FULL.way))
    return PLAIN.but(
        dtype=row["dtype"],
        heads_q=heads[0],
        heads_kv=heads[1],
        mask=mask,
        mask_as=row.get("mask_as", "rule") if mask != FULL else "rule",
        bias=row.get("bias", "none"),
        softcap=next((c for c in taken.taken["softcap"] if c), 0.0)
        if row.get("softcap") == "softcap"
        else 0.0,
        scale={"given": 0.5, "odd": 1e-3}.get(row.get("scale", ""), None),
        dim_v=next((d for d in taken.taken["dim_v"] if d != PLAIN.dim_v), PLAIN.dim_v)
        if row.get("dim_v") == "another"
        else PLAIN.dim_v,
        len_q={"one query": 1, "more queries": 17}.get(row.get("lengths", ""), 16),
        len_k={"more keys": 17}.get(row.get("lengths", ""), 16),
        grads=grads,
    )


def _pairs(row: Row) -> set[tuple[tuple[str, str], tuple[str, str]]]:
    return set(combinations(sorted(row.items()), 2))


def covering_rows(kernel: Kernel, device: str) -> list[Row]:
    """Few rows that hold every pair of levels that the kernel takes together."""
    had: set[tuple[tuple[str, str], tuple[str, str]]] = set()
    found = []
    for row in rows(kernel, device):
        if new := _pairs(row) - had:
            had |= new
            found.append(row)
    return found


def coverage(covering: Iterable[Row], cases: Iterable[Case]) -> tuple[int, int]:
    """(pairs of levels that these cases have had, pairs that there are in these rows)"""
    wanted = set().union(*map(_pairs, covering))
    had = set().union(*(_pairs(levels(case)) for case in cases))
    return len(wanted & had), len(wanted)
