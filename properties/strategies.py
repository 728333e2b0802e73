"""Hypothesis strategies: what a kernel is tried on. They draw a problem, a recipe and a seed, never tensor elements.

A failing case shrinks to batch 1, one head, the shortest lengths and head dims, FP32, no options, the recipe `integers`.
Values are those that triggered real bugs: lengths around tile sizes, uneven pairs, GQA, alignment, composed masks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from hypothesis import strategies as st

from verify.arithmetic import Arithmetic, Quantisation
from verify.case import ARRANGED, Case
from verify.finding import Finding
from verify.guard import call
from verify.layouts import LAYOUTS
from verify.masks import FULL, Mask
from verify.problem import Problem
from verify.recipes import Recipe
from verify.registry import Kernel

LENGTHS = (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 17, 31, 33, 34, 63, 64, 65, 76, 88, 113, 127, 128, 129, 146, 193, 255, 256, 257)
FEW = 8
"""The first so many of LENGTHS see little: they come up a fifth as often."""
LONG = (441, 503, 512, 600, 1001, 1024, 2047)
DIMS = (1, 2, 3, 4, 8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 192, 256)
HEADS = ((1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (5, 1), (6, 2), (7, 1), (8, 8), (14, 2), (16, 4))
BATCHES = (1, 2, 3)
SCALES = (None, 1.0, 0.5, 0.0, -0.3, 1e-3, 4.0)
RECIPES = (
    "integers normal normal normal uniform normal(5) normal(0.1) outliers(0.01,10) one_sign sink hot_channel(30) shift(90) ties"
    " constant(1000) shift(-90) tiny shift(1e4) constant(133120) rising(30) rising(-30) outliers(0.01,10) one_sign sink uniform"
    " hot_channel(30) normal(5) normal normal"
).split()
"""Hypothesis likes the first and the last: those that tell little (equal scores, overflow, underflow) stand between."""
CONTIGUOUS = 8
"""So many times as likely as another layout is that a tensor is contiguous: a case is about something else, too."""
SCORES_AT_MOST = {"cpu": 2**17, "cuda": 2**23}
"""batch * heads * len_q * len_k: what a case may cost."""


@dataclass(frozen=True)
class Options:
    """What a kernel takes, one option at a time, each probed on a plain problem; and why not, for the rest."""

    taken: dict[str, tuple[Any, ...]]
    refused: dict[str, dict[str, str]]
    layouts: dict[str, tuple[str, ...]]
    """By tensor: those that it takes without an exception, `bhsd` several times."""

    returns_lse: bool
    """Whether it returns one."""

    def refusal(self, *, grads: bool = False, lse: bool = False) -> str | None:
        """Why the kernel takes no problem at all here, none with gradients, or returns no LSE; None where it does."""
        if not self.taken["dtype"]:
            return next(iter(self.refused["dtype"].values()))
        if lse and not self.returns_lse:
            return "returns no LSE"
        return self.refused["grads"].get("True") if grads else None


def _masks() -> tuple[Mask, ...]:
    texts = "full causal_upper_left causal_lower_right window(3,1) prefix_lm(3) padding(5) blocks(4,5) dense(60,1)"
    return tuple(Mask.parse(text) for text in texts.split())


CHOICES: dict[str, tuple[Any, ...]] = {
    "dtype": ("fp32", "fp16", "bf16", "fp64"),
    "dim_qk": DIMS,
    "dim_v": DIMS,
    "heads": HEADS,
    "len_q": (0, 1, 17),
    "len_k": (0, 1, 17),
    "mask": _masks(),
    "mask_as": ("rule", "bool", "float"),
    "bias": ("none", "bhqk", "hqk", "qk", "alibi"),
    "scale": SCALES,
    "softcap": (0.0, 1.0, 30.0),
    "grads": (False, True),
}


PLAIN = Problem(batch=1, heads_q=2, heads_kv=2, len_q=16, len_k=16, dim_qk=64, dim_v=64, dtype="fp16")


@lru_cache(maxsize=64)
def options(kernel: Kernel, device: str) -> Options:
    """Probe what a kernel declares it supports, one option away from a plain problem that it does support."""
    taken: dict[str, tuple[Any, ...]] = {}
    refused: dict[str, dict[str, str]] = {name: {} for name in CHOICES}
    plain = PLAIN
    for name, values in CHOICES.items():
        kept = []
        for value in values:
            reason = kernel.unsupported(_changed(plain, name, value), device)
            if reason is None:
                kept.append(value)
            else:
                refused[name][_label(value)] = reason
        taken[name] = tuple(kept)
        if name == "dtype" and kept:
            plain = plain.but(dtype=kept[0])
    layouts: dict[str, tuple[str, ...]] = {}
    for name in ARRANGED:
        reasons = {way: _refuses(kernel, plain, device, name, way) for way in LAYOUTS if taken["dtype"]}
        refused |= {f"{name} {way}": {"layout": reason} for way, reason in reasons.items() if reason}
        layouts[name] = ("bhsd",) * CONTIGUOUS + tuple(way for way, reason in reasons.items() if not reason)
    return Options(taken, refused, layouts, bool(taken["dtype"]) and _returns_lse(kernel, plain, device))


def _returns_lse(kernel: Kernel, plain: Problem, device: str) -> bool:
    try:
        return call(kernel, plain, Case(plain).inputs(device)).lse is not None
    except Finding:
        return True  # whatever is wrong is for a property to say


def _refuses(kernel: Kernel, plain: Problem, device: str, tensor: str, layout: str) -> str:
    """Why a kernel does not take a tensor in a layout: what it raises."""
    problem = plain.but(grads=tensor == "do", bias="bhqk" if tensor == "bias" else "none")
    if layout == "bhsd" or kernel.unsupported(problem, device):
        return ""
    try:
        call(kernel, problem, Case(problem, layouts=((tensor, layout),)).inputs(device))
    except Finding as finding:
        return finding.sentence if finding.sentence.startswith("raised") else ""
    return ""


def plain_problem(kernel: Kernel, device: str) -> Problem:
    """A small problem without options, in the first dtype that the kernel takes."""
    return PLAIN.but(dtype=next(iter(options(kernel, device).taken["dtype"]), PLAIN.dtype))


def _label(value: Any) -> str:
    return f"{value[0]}:{value[1]}" if isinstance(value, tuple) else str(value)


def _changed(plain: Problem, name: str, value: Any) -> Problem:
    if name == "heads":
        return plain.but(heads_q=value[0], heads_kv=value[1])
    if name == "dim_qk":
        return plain.but(dim_qk=value, dim_v=value)
    if name == "mask_as":
        return plain.but(mask=Mask.parse("causal_upper_left"), mask_as=value)
    return plain.but(**{name: value})


@st.composite
def masks(draw: Callable[..., Any], kinds: frozenset[str], batch: int, len_q: int, len_k: int) -> Mask:
    """One of these kinds with arguments that matter at these lengths, or two of them composed; shrinks to `full`."""
    name = draw(st.sampled_from([k for k in _KIND_ORDER if k in kinds] or ["full"]))
    mask = Mask(((name, draw(_arguments(name, batch, len_q, len_k))),))
    if name != "full" and draw(st.integers(0, 3)) == 3:
        other = draw(st.sampled_from([k for k in _KIND_ORDER if k in kinds]))
        mask = mask & Mask(((other, draw(_arguments(other, batch, len_q, len_k))),))
    return mask


_KIND_ORDER = ("full", "causal_upper_left", "causal_lower_right", "padding", "window", "prefix_lm", "blocks", "dense")


def _arguments(name: str, batch: int, len_q: int, len_k: int) -> st.SearchStrategy[tuple[int, ...]]:
    if name == "padding":
        return st.lists(st.integers(0, len_k), min_size=batch, max_size=batch).map(tuple)
    if name == "window":
        side = st.sampled_from([-1, 0, 1, 2, 7, 63, 64, 65, max(len_k - 1, 0)])
        return st.tuples(side, side)
    if name == "prefix_lm":
        return st.tuples(st.integers(0, len_k))
    if name == "blocks":
        return st.lists(st.integers(1, max(1, min(len_q, len_k))), min_size=1, max_size=4).map(tuple)
    if name == "dense":
        return st.tuples(st.sampled_from([50, 90, 10, 1]), st.integers(0, 3))
    return st.just(())


@st.composite
def problems(
    draw: Callable[..., Any], kernel: Kernel, device: str, *, full_mask: bool = False, hides: bool = False, grads: bool = False
) -> Problem:
    """A problem made of options that the kernel takes one at a time; a combination may still be unsupported.

    Every choice is drawn whether it is used or not, the mask last, so that shrinking one of them leaves the others as they are.
    """
    taken = options(kernel, device).taken
    lengths = st.sampled_from(LENGTHS + 4 * LENGTHS[FEW:] + (LONG if device == "cuda" else ())) | st.integers(FEW, max(LENGTHS))
    len_q, len_k, shape = draw(lengths), draw(lengths), draw(st.integers(0, 24))
    if shape == 24 and 0 in taken["len_k"]:
        len_q, len_k = EMPTY[len_q % len(EMPTY)]
    elif shape > 17:
        len_k = len_q
    batch, heads = _affordable(draw(st.sampled_from(BATCHES)), draw(st.sampled_from(taken["heads"])), device, len_q * len_k)
    plain: dict[str, Any] = {"dim_v": draw(st.sampled_from(taken["dim_qk"])), "bias": "none", "scale": None, "softcap": 0.0}
    drawn = {name: (draw(st.sampled_from(taken[name])), draw(st.integers(0, 3)) == 3) for name in plain}
    chosen = {name: value if used else plain[name] for name, (value, used) in drawn.items()}
    if set(taken["dim_v"]) <= {PLAIN.dim_v}:  # takes no other dim_v than dim_qk
        chosen["dim_v"] = plain["dim_v"]
    dtype, mask_as = draw(st.sampled_from(taken["dtype"])), draw(st.sampled_from(taken["mask_as"] or ("rule",)))
    kinds = frozenset(name for mask in taken["mask"] for name in mask.names) - ({"full"} if hides else set())
    mask = FULL if full_mask else draw(masks(kinds, batch, len_q, len_k))
    return Problem(
        batch=batch,
        heads_q=heads[0],
        heads_kv=heads[1],
        len_q=len_q,
        len_k=len_k,
        dim_qk=plain["dim_v"],
        dtype=dtype,
        mask=mask,
        mask_as=mask_as if mask != FULL else "rule",
        grads=grads,
        **chosen,
    )


EMPTY = ((1, 0), (0, 1), (3, 0), (0, 0))
"""(len_q, len_k) where nothing is seen or nobody looks."""


def _affordable(batch: int, heads: tuple[int, int], device: str, scores: int) -> tuple[int, tuple[int, int]]:
    """Batch and heads cut down to what a case of so many scores per head may cost."""
    most = SCORES_AT_MOST[device] // max(1, scores)
    batch = max(1, min(batch, most))
    return batch, heads if heads[0] * batch <= most else (1, 1)


@st.composite
def cases(
    draw: Callable[..., Any], kernel: Kernel, device: str, *, full_mask: bool = False, hides: bool = False, grads: bool = False
) -> Case:
    """A whole case for this kernel on this device ("cpu", "cuda")."""
    recipe, seed = Recipe.parse(draw(st.sampled_from(RECIPES))), draw(st.integers(0, 999))
    problem = draw(problems(kernel, device, full_mask=full_mask, hides=hides, grads=grads))
    ways = [(name, draw(st.sampled_from(taken))) for name, taken in options(kernel, device).layouts.items()]
    usual = tuple((n, w) for n, w in ways if w != "bhsd" and (n in problem.shapes) and (n != "do" or grads))
    return Case(problem, recipe, seed, usual)


QUANTISED = (
    Quantisation(),
    Quantisation("e5m2", 0),
    Quantisation("e4m3", 4, values="head"),
    Quantisation("e4m3", 3, rotated=True),
    Quantisation("e4m3", 16, rotated=True, values="columns", centred=True),
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
