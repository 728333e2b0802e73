"""What a kernel takes, found by asking it one option at a time and by trying each layout; and why not, for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from verify.case import ARRANGED, Case
from verify.finding import Finding
from verify.guard import call
from verify.layouts import LAYOUTS
from verify.masks import Mask
from verify.problem import Problem
from verify.registry import Kernel

DIMS = (1, 2, 3, 4, 8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 192, 256)
HEADS = ((1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (5, 1), (6, 2), (7, 1), (8, 8), (14, 2), (16, 4))
SCALES = (None, 1.0, 0.5, 0.0, -0.3, 1e-3, 4.0)


@dataclass(frozen=True)
class Options:
    """What a kernel takes, one option at a time, each probed on a plain problem; and why not, for the rest."""

    taken: dict[str, tuple[Any, ...]]
    refused: dict[str, dict[str, str]]
    layouts: dict[str, tuple[str, ...]]
    """By tensor: those that it takes without an exception."""
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
        layouts[name] = tuple(way for way, reason in reasons.items() if not reason)
    return Options(taken, refused, layouts, bool(taken["dtype"]) and _returns_lse(kernel, plain, device))


def _returns_lse(kernel: Kernel, plain: Problem, device: str) -> bool:
    try:
        return call(kernel, plain, Case(plain).inputs(device)).lse is not None
    except Finding:
        return True  # whatever is wrong is for a property to say


def _refuses(kernel: Kernel, plain: Problem, device: str, tensor: str, layout: str) -> str:
    """Why a kernel does not take a tensor in a layout: what it raises."""
    if kernel.layouts and layout not in kernel.layouts(device):
        return "is left out by its declaration"
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
