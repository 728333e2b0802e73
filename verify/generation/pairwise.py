"""Pairs of options: most bugs need two at a time, so cases are drawn from a covering array of all
pairs that a kernel takes.

Pairwise testing: Kuhn, Wallace, Gallo 2004, IEEE Trans. Software Eng. 30(6). The array is
allpairspy's.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import combinations

from allpairspy import AllPairs

from verify.registry import Kernel
from verify.sandbox.capabilities import PLAIN, Options, options
from verify.spec.case import ARRANGED, Case
from verify.spec.masks import Mask
from verify.spec.problem import Problem

Row = dict[str, str]
ARRAYS = 6
"""Covering arrays, each with its levels in another order: what a pair leaves open is filled with
the first, which takes turns.
"""
ODD_SCALES = (0.0, -0.3, 1e-3)
"""No scale that anybody asks for, and yet legal."""
SLIDING = "sliding"
"""A window that ends at the diagonal, as most models' do, and which many kernels have a path
for.
"""
EXAMPLES = {
    "full": "full",
    "causal_upper_left": "causal_upper_left",
    "causal_lower_right": "causal_lower_right",
    "window": "window(3,1)",
    SLIDING: "window(3,0)",
    "prefix_lm": "prefix_lm(3)",
    "padding": "padding(5)",
    "blocks": "blocks(4,5)",
    "dense": "dense(60,1)",
    "two": "causal_lower_right&padding(5)",
}
"""A mask of each kind; `two`: two of them at once."""
USUAL = ("causal_lower_right", "two")
"""The masks that models use most."""


def levels(case: Case) -> Row:
    """Where a case stands in each option."""
    p, scale = case.problem, case.problem.scale
    names = [name for name, _ in case.layouts]
    return {
        "dtype": p.dtype,
        "mask": _kind(p.mask),
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


def _kind(mask: Mask) -> str:
    (name, arguments), *others = mask.parts
    return "two" if others else SLIDING if name == "window" and arguments[1] == 0 else name


def _parameters(
    taken: Options, *, full_mask: bool, hides: bool, no_bias: bool, grads: bool
) -> dict[str, list[str]]:
    t = taken.taken
    kinds = {name for mask in t["mask"] for name in mask.names}
    has = {"two": len(kinds) > 2, SLIDING: "window" in kinds}
    masks = ["full"] if full_mask else [k for k in EXAMPLES if has.get(k, k in kinds)]
    arranged = [
        name
        for name in ARRANGED
        if len(taken.layouts[name]) > 1
        and (name != "do" or grads)
        and (name != "bias" or not no_bias)
    ]
    return {
        "dtype": list(t["dtype"]),
        "mask": [m for m in masks if not (hides and m == "full")] or ["full"],
        "mask_as": list(t["mask_as"]) or ["rule"],
        "bias": ["none"] if no_bias else list(t["bias"]),
        "softcap": ["none"] + ["softcap"] * any(t["softcap"]),
        "scale": ["default"] + ["given", "odd"] * (len(t["scale"]) > 1),
        "heads": ["several", "one"] + ["grouped"] * any(q > k for q, k in t["heads"]),
        "batch": ["several", "one"],
        "dim_v": ["dim_qk"] + ["another"] * (len(t["dim_v"]) > 1),
        "lengths": ["more keys", "more queries", "equal", "one query"],
        "layout": ["contiguous", *arranged] + ["several"] * (len(arranged) > 1),
    }


@lru_cache(maxsize=256)
def rows(
    kernel: Kernel,
    device: str,
    *,
    full_mask: bool = False,
    hides: bool = False,
    no_bias: bool = False,
    grads: bool = False,
) -> tuple[Row, ...]:
    """Covering arrays: every pair of levels that the kernel takes together is in one of the
    rows.
    """
    taken = options(kernel, device)
    parameters = _parameters(taken, full_mask=full_mask, hides=hides, no_bias=no_bias, grads=grads)
    names = list(parameters)

    def legal(values: list[str]) -> bool:
        row = dict(zip(names, values, strict=False))
        if row.get("mask") == "full" and row.get("mask_as", "rule") != "rule":
            return False
        if row.get("layout") == "bias" and row.get("bias", "none") in ("none", "alibi"):
            return False
        return (
            len(values) < 2 or kernel.unsupported(_problem(row, taken, grads=grads), device) is None
        )

    found: list[Row] = [
        {name: values[0] for name, values in parameters.items()}
    ]  # what a case shrinks to
    for order in range(ARRAYS):
        mixed = [
            _turned(values, order + number) for number, values in enumerate(parameters.values())
        ]
        found += [dict(zip(names, row, strict=True)) for row in AllPairs(mixed, filter_func=legal)]
    return (*found, *(row for row in found if _usual(row)))


def _usual(row: Row) -> bool:
    """Rows that come twice: what models use most, and ALiBi where its heads differ."""
    return row["mask"] in USUAL or (row["bias"] == "alibi" and row["heads"] != "one")


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
    mask = Mask.parse(EXAMPLES[row.get("mask", "full")])
    return PLAIN.but(
        dtype=row["dtype"],
        heads_q=heads[0],
        heads_kv=heads[1],
        mask=mask,
        mask_as=row.get("mask_as", "rule") if row.get("mask", "full") != "full" else "rule",
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


def coverage(kernel: Kernel, device: str, cases: Iterable[Case]) -> tuple[int, int]:
    """(pairs of levels that these cases have had, pairs that the kernel takes at all)"""
    wanted = set().union(*(_pairs(row) for row in rows(kernel, device)))
    return len(wanted & set().union(*(_pairs(levels(case)) for case in cases))), len(wanted)
