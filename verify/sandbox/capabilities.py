"""What a kernel takes, found by asking it one option at a time and by trying each layout; and why
not, for the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from verify.registry import Kernel
from verify.sandbox.call import call
from verify.spec.case import ARRANGED, Case
from verify.spec.finding import Finding
from verify.spec.layouts import LAYOUTS
from verify.spec.masks import Mask, ways
from verify.spec.problem import Problem

DIMS = (1, 2, 3, 4, 8, 16, 24, 32, 40, 64, 72, 80, 96, 128, 192, 256)
HEADS = (
    (1, 1),
    (2, 1),
    (2, 2),
    (3, 3),
    (4, 2),
    (5, 1),
    (6, 2),
    (6, 6),
    (7, 1),
    (8, 8),
    (14, 2),
    (16, 4),
)
RAISED = "raised"
"""How guard.call begins where the kernel raises."""
SCALES = (None, 1.0, 0.5, 0.0, -0.3, 1e-3, 4.0)


@dataclass(frozen=True)
class Options:
    """What a kernel takes, one option at a time, each probed on a plain problem; and why not, for
    the rest.
    """

    taken: dict[str, tuple[Any, ...]]
    refused: dict[str, dict[str, str]]
    layouts: dict[str, tuple[str, ...]]
    """By tensor: those that it takes without an exception."""
    returns_lse: bool
    """Whether it returns one."""

    def refusal(self, *, grads: bool = False, lse: bool = False) -> str | None:
        """Why the kernel takes no problem at all here, none with gradients, or returns no LSE; None
        where it does.
        """
        if not self.taken["dtype"]:
            return next(iter(self.refused["dtype"].values()))
        if lse and not self.returns_lse:
            return "returns no LSE"
        return self.refused["grads"].get("True") if grads else None


def _masks() -> tuple[Mask, ...]:
    """One of each way in which a mask is drawn."""
    return tuple(Mask.parse(drawn.example) for _, drawn in ways().values())


OPTIONS: dict[str, tuple[Any, ...]] = {
    "dtype": ("fp32", "fp16", "bf16", "fp64"),
    "dim_qk": DIMS,
    "dim_v": DIMS,
    "heads": HEADS,
    "len_q": (0, 1, 17),
    "len_k": (0, 1, 17),
    "mask": (),
    "mask_as": ("rule", "bool", "float"),
    "bias": ("none", "bhqk", "hqk", "qk", "alibi"),
    "scale": SCALES,
    "softcap": (0.0, 1.0, 30.0),
    "grads": (False, True),
}
"""Values of each option that a kernel is asked about; masks are those of spec/masks.py."""


def choices() -> dict[str, tuple[Any, ...]]:
    """Every value of every option that a kernel is asked about."""
    return OPTIONS | {"mask": _masks()}


PLAIN = Problem(
    batch=1, heads_q=2, heads_kv=2, len_q=16, len_k=16, dim_qk=64, dim_v=64, dtype="fp16"
)


_FOUND: dict[tuple[Kernel, str], Options] = {}


def options(kernel: Kernel, device: str) -> Options:
    """What a kernel takes; probed once, here, unless another process has."""
    if (kernel, device) not in _FOUND:
        learn(kernel, device, probe(kernel, device, partial(tries, kernel, device)))
    return _FOUND[kernel, device]


def known(kernel: Kernel, device: str) -> Options | None:
    """What a kernel takes, if it was probed."""
    return _FOUND.get((kernel, device))


def learn(kernel: Kernel, device: str, found: Options) -> None:
    """Take over what was found elsewhere."""
    _FOUND[kernel, device] = found


def tries(kernel: Kernel, device: str, case: Case) -> tuple[str, bool]:
    """(what is wrong with a call on this case, or nothing; whether it returns an LSE)"""
    try:
        return "", call(kernel, case.problem, case.inputs(device)).lse is not None
    except Finding as finding:
        return finding.sentence, True  # whatever is wrong is for a property to say


def probe(kernel: Kernel, device: str, tries: Callable[[Case], tuple[str, bool]]) -> Options:
    """Ask what a kernel declares it supports, one option away from a plain problem that it does
    support; try each layout. One that the kernel refuses with an exception is not taken; on which
    it does something worse, it is.
    """
    taken: dict[str, tuple[Any, ...]] = {}
    asked = choices()
    refused: dict[str, dict[str, str]] = {name: {} for name in asked}
    plain = PLAIN
    for name, values in asked.items():
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
    layouts: dict[str, tuple[str, ...]] = {name: ("bhsd",) for name in ARRANGED}
    returns_lse = False
    if taken["dtype"]:
        fails, returns_lse = tries(Case(plain))
        deadly = bool(fails) and not fails.startswith(
            RAISED
        )  # any call may end its process: no need to try forty
        for name in ARRANGED:
            reasons = {
                way: _refuses(kernel, plain, device, name, way, None if deadly else tries)
                for way in LAYOUTS
            }
            refused |= {
                f"{name} {way}": {"layout": reason} for way, reason in reasons.items() if reason
            }
            layouts[name] = tuple(way for way, reason in reasons.items() if not reason)
    return Options(taken, refused, layouts, returns_lse)


def _refuses(
    kernel: Kernel,
    plain: Problem,
    device: str,
    tensor: str,
    layout: str,
    tries: Callable[[Case], tuple[str, bool]] | None,
) -> str:
    """Why a kernel does not take a tensor in a layout: what it raises."""
    if kernel.layouts and layout not in kernel.layouts(device):
        return "is left out by its declaration"
    problem = plain.but(grads=tensor == "do", bias="bhqk" if tensor == "bias" else "none")
    if layout == "bhsd" or tries is None or kernel.unsupported(problem, device):
        return ""
    sentence, _ = tries(Case(problem, layouts=((tensor, layout),)))
    return sentence if sentence.startswith(RAISED) else ""


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
