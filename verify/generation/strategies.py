"""Hypothesis strategies: what a kernel is tried on. They draw a problem, a recipe and a seed, never
tensor elements.

A case follows a row of a covering array of pairs (design.py), each option only some of the time: it
shrinks to batch 1, one head, the shortest lengths and head dims, FP32, no options, contiguous
tensors, the recipe `integers`. Values are those that triggered real bugs: lengths around tile
sizes, uneven pairs, GQA, alignment, composed masks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from hypothesis import strategies as st

from verify.generation.pairwise import ODD_SCALES, SLIDING, Row, rows
from verify.registry import Kernel
from verify.sandbox.capabilities import options, plain_problem
from verify.spec.arithmetic import Arithmetic, Quantisation
from verify.spec.case import Case
from verify.spec.inputs import Recipe
from verify.spec.masks import FULL, Mask
from verify.spec.problem import Problem

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
SIDES = (0, 1, 2, 7, 17, 63, 64, 65, 130)
"""How far a window reaches; one that reaches over all keys hides nothing."""
BATCHES = (2, 3)
RECIPES = (
    "integers normal normal normal uniform normal(5) normal(0.1) outliers(0.01,10) one_sign sink "
    "hot_channel(30) shift(90) ties"
    " constant(1000) shift(-90) tiny shift(1e4) constant(133120) rising(30) rising(-30) "
    "outliers(0.01,10) one_sign one_sign sink"
    " tiny growing tiny uniform one_sign hot_channel(30) uneven_heads normal(5) uneven_heads "
    "one_sign normal normal"
).split()
"""Hypothesis likes the first and the last: those that tell little (equal scores, overflow,
underflow) stand between.
"""
OF_SCALES = "hot_channel(30) uneven_heads growing growing".split()
"""What no scale can take that is shared too widely, or found too early: several times as often for
kernels that quantise.
"""
OF_DELTA = 4 * ["one_sign"]
"""dP and delta are large and nearly cancel: twice as often in laws of gradients."""
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
SCORES_AT_MOST = {"cpu": 2**17, "cuda": 2**23}
"""batch * heads * len_q * len_k: what a case may cost."""


@st.composite
def masks(
    draw: Callable[..., Any],
    kinds: frozenset[str],
    batch: int,
    len_q: int,
    len_k: int,
    *,
    two: bool = False,
) -> Mask:
    """One of these kinds with arguments that matter at these lengths, or two of them composed: half
    the time any two, else, as models have it, a diagonal and padding; shrinks to `full`.
    """
    wanted = [k for k in _KIND_ORDER if k in kinds] or ["full"]
    if not two:
        return draw(_part(draw(st.sampled_from(wanted)), batch, len_q, len_k))
    pairs = list(product(wanted, wanted))
    usual = [(a, b) for a, b in pairs if a in _DIAGONAL and b == "padding"]
    one, other = draw(st.sampled_from(pairs + usual * (len(pairs) // max(1, len(usual)))))
    return draw(_part(one, batch, len_q, len_k)) & draw(_part(other, batch, len_q, len_k))


_KIND_ORDER = (
    "full",
    "causal_upper_left",
    "causal_lower_right",
    "padding",
    SLIDING,
    "window",
    "prefix_lm",
    "blocks",
    "dense",
)
_DIAGONAL = ("causal_lower_right", SLIDING, "window")


def _part(name: str, batch: int, len_q: int, len_k: int) -> st.SearchStrategy[Mask]:
    arguments = _arguments(name, batch, len_q, len_k)
    return arguments.map(lambda a: Mask((("window", (a[0], 0)) if name == SLIDING else (name, a),)))


def _arguments(name: str, batch: int, len_q: int, len_k: int) -> st.SearchStrategy[tuple[int, ...]]:
    if name == "padding":
        return st.lists(st.integers(0, len_k), min_size=batch, max_size=batch).map(tuple)
    if name in ("window", SLIDING):
        side = st.sampled_from(
            [-1, *2 * [side for side in SIDES if side < len_k - 1], max(len_k - 1, 0)]
        )
        return st.tuples(side, side)
    if name == "prefix_lm":
        return st.tuples(st.integers(0, len_k))
    if name == "blocks":
        return st.lists(st.integers(1, max(1, min(len_q, len_k))), min_size=1, max_size=4).map(
            tuple
        )
    if name == "dense":
        return st.tuples(st.sampled_from([50, 90, 10, 1]), st.integers(0, 3))
    return st.just(())


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
    *,
    full_mask: bool = False,
    hides: bool = False,
    grads: bool = False,
) -> Problem:
    """A problem that follows a row in part. Every choice is drawn whether it is used or not, the
    mask last, so that shrinking one of them leaves the others as they are; a combination of three
    may still be unsupported.
    """
    taken, used = (
        options(kernel, device).taken,
        {name: draw(st.integers(1, 8)) > 8 - often for name, often in USED.items()},
    )
    lengths = _lengths(kernel, device)
    len_q, len_k, shape = draw(lengths), draw(lengths), draw(st.integers(0, 24))
    if shape > 21 and 0 in taken["len_k"]:
        len_q, len_k = EMPTY[len_q % len(EMPTY)]
    elif used["lengths"]:
        len_q, len_k = _as_row(row["lengths"], len_q, len_k)
    used["bias"] |= row["layout"] == "bias"
    used["heads"] |= used["bias"] and row["bias"] == "alibi"  # a slope for each head
    used["batch"] |= used["mask"] and row["mask"] == "padding"  # a length for each entry
    several = draw(st.sampled_from(BATCHES))
    batch = several if used["batch"] and row["batch"] == "several" else 1
    kinds = {
        "one": lambda q, k: q == 1,
        "several": lambda q, k: q == k > 1,
        "grouped": lambda q, k: q > k,
    }
    wanted = [h for h in taken["heads"] if kinds[row["heads"]](*h)] or list(taken["heads"])
    heads = draw(st.sampled_from(wanted))
    batch, heads = _affordable(batch, heads if used["heads"] else (1, 1), device, len_q * len_k)
    dim, other = draw(st.sampled_from(taken["dim_qk"])), draw(st.sampled_from(taken["dim_v"]))
    caps, scales = (
        [c for c in taken["softcap"] if c] or [0.0],
        [c for c in taken["scale"] if c is not None] or [None],
    )
    odd = [c for c in scales if c in ODD_SCALES] or scales
    usual = [c for c in scales if c not in ODD_SCALES] or scales
    cap, given, strange = (
        draw(st.sampled_from(caps)),
        draw(st.sampled_from(usual)),
        draw(st.sampled_from(odd)),
    )
    every = frozenset(name for mask in taken["mask"] for name in mask.names)
    allowed = _kinds(row["mask"] if used["mask"] else "full", every, hides=hides)
    mask = (
        FULL
        if full_mask
        else draw(masks(allowed, batch, len_q, len_k, two=used["mask"] and row["mask"] == "two"))
    )
    return Problem(
        batch=batch,
        heads_q=heads[0],
        heads_kv=heads[1],
        len_q=len_q,
        len_k=len_k,
        dim_qk=dim,
        dim_v=other if used["dim_v"] and row["dim_v"] == "another" else dim,
        dtype=row["dtype"],
        mask=mask,
        mask_as=row["mask_as"]
        if mask != FULL and (used["mask_as"] or "rule" not in taken["mask_as"])
        else "rule",
        bias=row["bias"] if used["bias"] else "none",
        scale={"given": given, "odd": strange}.get(row["scale"]) if used["scale"] else None,
        softcap=cap if used["softcap"] and row["softcap"] == "softcap" else 0.0,
        grads=grads,
    )


def _kinds(kind: str, every: frozenset[str], *, hides: bool) -> frozenset[str]:
    """Kinds of masks that a row's may be of; one that hides something where it must."""
    return every - {"full"} if kind == "two" or (kind == "full" and hides) else frozenset({kind})


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


def _affordable(
    batch: int, heads: tuple[int, int], device: str, scores: int
) -> tuple[int, tuple[int, int]]:
    """Batch and heads cut down to what a case of so many scores per head may cost."""
    most = SCORES_AT_MOST[device] // max(1, scores)
    batch = max(1, min(batch, most))
    fewest = (1, 1) if heads == (1, 1) else (2, 1) if heads[0] > heads[1] else (2, 2)
    return batch, heads if heads[0] * batch <= most else fewest


@st.composite
def cases(
    draw: Callable[..., Any],
    kernel: Kernel,
    device: str,
    *,
    full_mask: bool = False,
    hides: bool = False,
    no_bias: bool = False,
    grads: bool = False,
) -> Case:
    """A whole case for this kernel on this device ("cpu", "cuda")."""
    row = draw(
        st.sampled_from(
            rows(kernel, device, full_mask=full_mask, hides=hides, no_bias=no_bias, grads=grads)
        )
    )
    quantises = kernel.numerics(plain_problem(kernel, device), device).quantised is not None
    recipes = RECIPES + 2 * OF_SCALES * quantises + OF_DELTA * grads
    recipe, seed = Recipe.parse(draw(st.sampled_from(recipes))), draw(st.integers(0, 999))
    problem = draw(problems(kernel, device, row, full_mask=full_mask, hides=hides, grads=grads))
    problem = kernel.bucket(problem) if kernel.bucket else problem
    ways = {
        name: draw(st.sampled_from(taken))
        for name, taken in options(kernel, device).layouts.items()
    }
    mine = [
        n
        for n in ways
        if n in problem.shapes and (n != "do" or grads) and row["layout"] in ("several", n)
    ]
    used = draw(st.integers(1, 8)) > 8 - USED["layout"]
    return Case(
        problem, recipe, seed, tuple((n, ways[n]) for n in mine if used and ways[n] != "bhsd")
    )


QUANTISED = (
    Quantisation(),
    Quantisation("e5m2", 0),
    Quantisation("e4m3", 4, values="head"),
    Quantisation("e4m3", 3, rotated=True),
    Quantisation("e4m3", 16, rotated=True, values="columns", centred=True),
    Quantisation(
        "e4m3", 16, rotated=True, values="columns", centred=True, fitted=True, balanced=True
    ),
    Quantisation("e5m2", 3, fitted=True, balanced=True),
)


@st.composite
def arithmetics(draw: Callable[..., Any]) -> Arithmetic:
    """Anything that a kernel may declare; shrinks to the defaults."""

    def one_of(*values: Any) -> Any:
        return draw(st.sampled_from(values))

    narrow = one_of("input", "fp32", "bf16", "fp16", "e4m3", "e5m2", "tf32")
    return Arithmetic(
        quantised=one_of(None, None, None, None, None, *QUANTISED),
        scaled_query=one_of(False, False, False, True),
        scores=one_of("fp32", "tf32", "fp22"),
        stored_scores=one_of("fp32", "fp32", "input"),
        exp=one_of("natural", "binary", "fused"),
        exp_ulp=one_of(2.0, 2.0, 20.0, 65536.0),
        tile=one_of(0, 16),
        splits=one_of(1, 1, 2, 3),
        probs=narrow,
        probs_scale=256.0 if narrow == "e4m3" else 1.0,
        normalized_probs=one_of(False, True),
        rowsum=one_of("unrounded", "rounded"),
        accumulate=one_of("fp32", "tf32", "fp22"),
        summation=one_of("hardware", "truncated"),
        output=one_of("input", "fp32"),
        dscores=one_of("input", "fp32", "bf16"),
        scaled_dscores=one_of(False, True),
        ds_probs=one_of("fp32", "input"),
        delta=one_of("out", "probs", "product"),
        group_sum=one_of("fp32", "input"),
        batch_sum=one_of("fp32", "input"),
        spill=one_of(None, None, (16, 32)),
    )
