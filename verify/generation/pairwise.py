"""Pairs of options: most bugs need two at a time, so cases are drawn from a covering array of all
pairs that a kernel takes (covering.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from itertools import combinations
from typing import Any

from verify.generation.covering import Row, covering
from verify.registry import Kernel
from verify.sandbox.capabilities import fitted, options
from verify.sandbox.domain import PLAIN, changed, relation
from verify.sandbox.options import Options
from verify.spec.case import ARRANGED, Case
from verify.spec.masks import FULL, KINDS, TWO, Mask, ways
from verify.spec.problem import Problem
from verify.spec.requirements import NOTHING, Requirements

ARRAYS = 6
"""Covering arrays, each with its levels in another order: what a pair leaves open is filled with
the first, which takes turns. One takes a tenth of a second, and short runs need one.
"""
ODD_SCALES = (0.0, -0.3, 1e-3)
"""No scale that anybody asks for, and yet legal."""

HEADS: dict[str, Callable[[int, int], bool]] = {
    "several": lambda q, k: q == k > 1,
    "one": lambda q, k: q == 1,
    "grouped": lambda q, k: q > k,
}
"""The levels of (heads_q, heads_kv)."""


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
        "lengths": relation(p),
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
    masks = [mask.way for mask in t["mask"] if needs.allows(mask)]
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
    dims = {"dim_qk": lambda a, b: a == b, "another": lambda a, b: a != b}
    relations = {_relation(q, k) for q, k in t["lengths"]}
    return {
        "dtype": list(t["dtype"]),
        "mask": masks,
        "mask_as": list(t["mask_as"]) or ["rule"],
        "bias": ["none"] if needs.no_bias else list(t["bias"]),
        "softcap": _either("none", "softcap", t["softcap"]),
        "scale": ["default"] * (None in t["scale"]) + ["given", "odd"] * (len(t["scale"]) > 1),
        "heads": ["grouped"]
        if needs.grouped
        else [name for name, of in HEADS.items() if any(of(*h) for h in t["heads"])],
        "batch": ["several"] * (2 in t["batch"])
        + ["one"] * (1 in t["batch"] and not needs.several),
        "dim_v": [name for name, of in dims.items() if any(of(*d) for d in t["dims"])],
        "lengths": [name for name in RELATIONS if name in relations],
        "layout": ["contiguous"] * (not (needs.arranged and arranged))
        + arranged
        + ["several"] * (len(arranged) > 1),
    }


RELATIONS = ("more keys", "more queries", "equal", "one query")


def _either(without: str, with_it: str, values: tuple[Any, ...]) -> list[str]:
    return [without] * (not all(values)) + [with_it] * any(values)


def rows(
    kernel: Kernel, device: str, needs: Requirements = NOTHING, number: int = 0
) -> tuple[Row, ...]:
    """The covering array of this number: every pair of levels that the kernel takes together is in
    one of its rows.

    Kernels that declare the same and take the same have the same rows, which are found once, here,
    unless another process has.
    """
    number %= ARRAYS
    about = kernel, device, needs, number
    if about not in _OF_KERNEL:
        key = _key(*about)
        if key not in _ROWS:
            taken = options(kernel, device)
            parameters = _parameters(taken, needs)
            _ROWS[key] = _rows(kernel, device, taken, parameters, needs, number)
        _OF_KERNEL[about] = _ROWS[key]
    return _OF_KERNEL[about]


def plainest(kernel: Kernel, device: str, needs: Requirements) -> Row:
    """The levels of what a case shrinks to: one head, the rest as plain as the kernel takes it."""
    wanted = PLAIN.but(heads_q=1, heads_kv=1)
    return levels(Case(fitted(kernel, device, wanted, needs)))


def learn_rows(kernel: Kernel, device: str, needs: Requirements, found: tuple[Row, ...]) -> None:
    """Take over the first of them, as it was found elsewhere."""
    _ROWS[_key(kernel, device, needs, 0)] = found


_ROWS: dict[Any, tuple[Row, ...]] = {}
_OF_KERNEL: dict[tuple[Kernel, str, Requirements, int], tuple[Row, ...]] = {}


def _key(kernel: Kernel, device: str, needs: Requirements, number: int) -> Any:
    parameters = _parameters(options(kernel, device), needs)
    declared = kernel.takes, kernel.dtypes, kernel.lacks, kernel.supports, kernel.own_mask, needs
    return declared, device, number, tuple((name, *values) for name, values in parameters.items())


def _rows(
    kernel: Kernel,
    device: str,
    taken: Options,
    parameters: dict[str, list[str]],
    needs: Requirements,
    number: int,
) -> tuple[Row, ...]:

    @cache
    def together(one: tuple[str, str], other: tuple[str, str]) -> bool:
        return _reached(kernel, device, dict((one, other)), taken, needs)

    # the first row is what a case shrinks to
    found: list[Row] = [{name: values[0] for name, values in parameters.items()}]
    turned = enumerate(parameters.items())
    found += covering({name: _turned(of, number + n) for n, (name, of) in turned}, together)
    return (*found, *(row for row in found if _usual(row)))


def _reached(kernel: Kernel, device: str, row: Row, taken: Options, needs: Requirements) -> bool:
    """Whether the kernel takes a problem of these levels, whatever else it is."""
    if row.get("mask") == FULL.way and row.get("mask_as", "rule") != "rule":
        return False
    if row.get("layout") == "bias" and row.get("bias") in ("none", "alibi"):
        return False
    wanted = _problem(row, taken, needs)
    if kernel.unsupported(wanted, device) is None:
        return True
    found = levels(Case(fitted(kernel, device, wanted, needs)))
    return all(found[name] == level for name, level in row.items() if name != "layout")


def _usual(row: Row) -> bool:
    """Rows that come twice: what models use most, and what differs from head to head, with
    several.
    """
    common = {TWO, *(name for name, (_, drawn) in ways().items() if drawn.common)}
    apart = row["bias"] == "alibi" or example(row["mask"]).per_head
    return row["mask"] in common or (apart and row["heads"] != "one")


def _turned(values: list[str], by: int) -> list[str]:
    by %= len(values)
    return values[by:] + values[:by]


def _problem(row: Row, taken: Options, needs: Requirements) -> Problem:
    """The problem of a row, or of some of its levels, all else plain."""
    t, plain = taken.taken, taken.anchors[0]
    mask = example(row["mask"]) if "mask" in row else plain.mask
    heads = {"grouped": lambda q, k: q > k, "one": lambda q, k: q == 1}
    wanted_heads = heads.get(row.get("heads", ""), lambda q, k: q == k > 1)
    unequal = row.get("dim_v") == "another"
    chosen: dict[str, Any] = {
        "dtype": row.get("dtype", plain.dtype),
        "mask": mask,
        "mask_as": row.get("mask_as", "rule") if mask != FULL else "rule",
        "bias": row.get("bias", plain.bias),
        "softcap": {"softcap": max(t["softcap"]), "none": 0.0}.get(
            row.get("softcap", ""), plain.softcap
        ),
        "scale": {"given": 0.5, "odd": 1e-3, "default": None}.get(
            row.get("scale", ""), plain.scale
        ),
        "batch": {"several": 2, "one": 1}.get(row.get("batch", ""), plain.batch),
    }
    if "heads" in row:
        pair = next(h for h in t["heads"] if wanted_heads(*h))
        chosen |= {"heads_q": pair[0], "heads_kv": pair[1]}
    if "dim_v" in row:
        dims = next(d for d in t["dims"] if (d[0] != d[1]) == unequal)
        chosen |= {"dim_qk": dims[0], "dim_v": dims[1]}
    if "lengths" in row:
        one = next(p for p in t["lengths"] if _relation(*p) == row["lengths"])
        chosen |= {"len_q": one[0], "len_k": one[1]}
    return changed(plain, chosen, needs.wanted) or plain


def _relation(len_q: int, len_k: int) -> str:
    return relation(Problem(len_q=len_q, len_k=len_k))


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
