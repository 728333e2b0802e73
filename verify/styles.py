"""Call styles: how a kernel is called in the shape that people have it in, one definition each. A
style is added here and nowhere else.

A style maps our call (registry.py: tensors [B,H,L,D] and keywords) to theirs, and says which
problems theirs cannot express. A parameter that a function does not have is not passed, and what it
would express is unsupported; one whose default stands for an option that is not in use is left to
its default, so that defaults are tested, too. Tensors [B,S,H,D] are transposed views of ours: they
lie in memory as the case has it, and gradients flow through them.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from verify.errors import VerifyError
from verify.spec.problem import Problem

Given = Mapping[str, Any]
"""Our keywords that a style takes (registry.py), with their values."""
Defaults = Mapping[str, Any]
"""The parameters of a style that a function has, by the style's own name for each, with their
defaults, Parameter.empty where there is none."""
Lacks = Callable[[Problem], str | None]
"""Why a call cannot express a problem; None where it can."""
NONE = (0, -1, (-1, -1), (None, None))
"""Defaults that, beside None and False, stand for an option that is not in use."""
UNBOUNDED = (-1, -1)


@dataclass(frozen=True)
class Argument:
    """What a style hands to a function beside its three tensors."""

    names: tuple[str, ...]
    """What functions call it, the style's own name first."""
    value: Callable[[Given, Defaults], Any]
    """What it is; None where the problem does not use it."""
    plain: Any = None
    """What is handed where the problem does not use it and the default is something else."""
    takes: tuple[str, ...] = ()
    """Those of our keywords that it is made from, beside `problem`."""


@dataclass(frozen=True)
class Style:
    """A way to call a kernel, and which problems it cannot express."""

    arguments: tuple[Argument, ...] | None
    """None: our own keywords, those that the function names."""
    lacks: Callable[[Problem, Defaults], str | None]
    """Why a function that has these parameters cannot be asked for a problem, where the keywords
    that it takes do not say it."""
    bshd: bool
    """Tensors are [B,S,H,D], out too, instead of [B,H,S,D]."""

    def __str__(self) -> str:
        """The call, as errors show it."""
        known = [" | ".join(argument.names) for argument in self.arguments or ()]
        return f"f({', '.join(['q, k, v', *known])})"


def adapted(fn: Callable[..., Any], style: str, label: str) -> tuple[Callable[..., Any], Lacks]:
    """(a kernel as registry.py has it, which calls fn in this style; why it cannot express a
    problem).

    The kernel returns out [B,H,Q,Dv], or (out, lse) where fn returns a tuple or list of at least
    two; whatever else it returns is handed on. Its keywords are those that the parameters of fn
    serve; a function without a signature, as a builtin is, is taken to have all of the style's.
    Raises VerifyError for an unknown style, for a function that does not begin with three tensors,
    and for one with a parameter that needs a value and that the style does not know.
    """
    if style not in STYLES:
        raise VerifyError(f"kernel {label!r}: style={style!r}: one of {', '.join(STYLES)}")
    known, signature = STYLES[style], _signature(fn, style, label)
    handed = _handed(known, signature, style, label)
    defaults = {argument.names[0]: default for argument, (_, default) in handed.items()}

    @functools.wraps(fn, updated=())
    def call(q: Any, k: Any, v: Any, **given: Any) -> Any:
        tensors = [t.swapaxes(1, 2) for t in (q, k, v)] if known.bshd else [q, k, v]
        arguments = given if known.arguments is None else _arguments(handed, given, defaults)
        return _answer(fn(*tensors, **arguments), bshd=known.bshd)

    ours = signature if known.arguments is None else _ours(handed)
    call.__dict__["__signature__"] = ours
    return call, lambda problem: known.lacks(problem, defaults)


Handed = dict[Argument, tuple[str, Any]]
"""The arguments that a function has: what it calls each, and its default."""


def _signature(fn: Callable[..., Any], style: str, label: str) -> inspect.Signature | None:
    """What fn takes, a module by its `forward`; None where nobody knows it."""
    try:
        found = inspect.signature(getattr(fn, "forward", fn))
    except ValueError:
        if STYLES[style].arguments is not None:
            return None
        raise VerifyError(
            f"kernel {label!r}: its signature is not known; style {style!r} needs it: write a def "
            "that calls it"
        ) from None
    by_position = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    first = list(found.parameters.values())[:3]
    if len(first) < 3 or any(p.kind not in by_position for p in first):
        raise VerifyError(
            f"kernel {label!r}: takes {found}, which does not begin with three tensors by "
            f"position; style {style!r} calls {STYLES[style]}"
        )
    return found


def _handed(known: Style, signature: inspect.Signature | None, style: str, label: str) -> Handed:
    if known.arguments is None:
        return {}
    if signature is None:
        return {argument: (argument.names[0], None) for argument in known.arguments}
    others = list(signature.parameters.values())[3:]
    by_name = {
        p.name: p.default
        for p in others
        if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    }
    anything = any(p.kind is Parameter.VAR_KEYWORD for p in others)
    handed: Handed = {}
    for argument in known.arguments:
        theirs = next((name for name in argument.names if name in by_name), None)
        if theirs or anything:
            handed[argument] = theirs or argument.names[0], by_name.get(theirs or "")
    served = {name for name, _ in handed.values()}
    variable = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)
    for p in others:
        if p.default is p.empty and p.kind not in variable and p.name not in served:
            raise VerifyError(
                f"kernel {label!r}: its parameter `{p}` has no default, and style {style!r} does "
                f"not know it: it calls {known}"
            )
    return handed


def _ours(handed: Handed) -> inspect.Signature:
    """The signature of a kernel that takes what these arguments are made from."""
    keywords = {"problem": None} | {n: None for argument in handed for n in argument.takes}
    return inspect.Signature(
        [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in ("q", "k", "v")]
        + [Parameter(name, Parameter.KEYWORD_ONLY) for name in keywords]
    )


def _arguments(handed: Handed, given: Given, defaults: Defaults) -> dict[str, Any]:
    found = {}
    for argument, (theirs, default) in handed.items():
        value = argument.value(given, defaults)
        if value is not None or not _stands_for_none(default):
            found[theirs] = argument.plain if value is None else value
    return found


def _stands_for_none(default: Any) -> bool:
    return default is None or (isinstance(default, int | float | tuple) and default in NONE)


def _answer(returned: Any, *, bshd: bool) -> Any:
    """(out, lse), or out alone, out as [B,H,Q,Dv]."""
    out, *others = returned if isinstance(returned, tuple | list) and returned else (returned,)
    if bshd and getattr(out, "ndim", 0) == 4:
        out = out.swapaxes(1, 2)
    return (out, others[0]) if others else out


def _scale(given: Given, defaults: Defaults, *, name: str) -> Any:
    """The usual scale is left to a function that forms it itself."""
    return given["problem"].scale if defaults[name] is None else given["scale"]


def _by_flag(problem: Problem, defaults: Defaults) -> bool:
    """Whether SDPA is asked for the mask by `is_causal`, which starts in the upper-left corner."""
    plain = problem.mask_as == "rule" and problem.bias == "none"
    upper_left = str(problem.mask) == "causal_upper_left" or (
        str(problem.mask) == "causal_lower_right" and problem.len_q == problem.len_k
    )
    return "is_causal" in defaults and plain and upper_left


def _attn_mask(given: Given, defaults: Defaults) -> Any:
    mask, bias = given["mask"], given["bias"]
    if _by_flag(given["problem"], defaults):
        return None
    return mask if bias is None else bias if mask is None else bias.masked_fill(~mask, -math.inf)


def _sdpa_lacks(problem: Problem, defaults: Defaults) -> str | None:
    if problem.group > 1 and "enable_gqa" not in defaults:
        return "has no `enable_gqa`: every query head needs a key head of its own"
    unmasked = problem.mask.names == {"full"} or _by_flag(problem, defaults)
    if unmasked or "attn_mask" in defaults:
        return None
    other = " but causal_upper_left" if "is_causal" in defaults else ""
    return f"has no `attn_mask`: takes no mask{other}"


def _band(problem: Problem, defaults: Defaults) -> tuple[bool, tuple[int, int]] | None:
    """(causal, window_size) as flash-attn calls the mask, aligned with the last query and key;
    None for one that it has no name for. A window that ends at the diagonal is asked for as models
    do, window_size=(left, 0) with causal=True; others, and (-1, 0), without.
    """
    causal, sides = False, [UNBOUNDED]
    for name, arguments in problem.mask.parts:
        if name == "window":
            sides.append((arguments[0], arguments[1]))
        elif name == "causal_lower_right" or (
            name == "causal_upper_left" and problem.len_q == problem.len_k
        ):
            causal = True
        elif name != "full":
            return None
    left, right = (min((n for n in side if n >= 0), default=-1) for side in zip(*sides))
    sliding = left >= 0 and right == 0 and "causal" in defaults
    if causal:
        right = 0 if left >= 0 else -1
    return causal or sliding, (left, right)


def _causal(given: Given, defaults: Defaults) -> bool | None:
    band = _band(given["problem"], defaults)
    return True if band and band[0] else None


def _window_size(given: Given, defaults: Defaults) -> tuple[int | None, int | None] | None:
    """In the function's own word for a side without a bound, -1 or None."""
    band = _band(given["problem"], defaults)
    if band is None or band[1] == UNBOUNDED:
        return None
    left, right = band[1]
    without = None if defaults["window_size"] == (None, None) else -1
    return without if left < 0 else left, without if right < 0 else right


def _flash_lacks(problem: Problem, defaults: Defaults) -> str | None:
    band = _band(problem, defaults)
    if band is None:
        return "has no mask but full, windows and causal, lower right"
    needs = [("causal", band[0]), ("window_size", band[1] != UNBOUNDED)]
    return next((f"has no `{n}`" for n, needed in needs if needed and n not in defaults), None)


def _dropout(given: Given, defaults: Defaults) -> float | None:
    return given["dropout"] or None


STYLES: dict[str, Style] = {
    "sdpa": Style(
        (
            Argument(("attn_mask",), _attn_mask, takes=("mask", "bias")),
            Argument(("dropout_p",), _dropout, 0.0, takes=("dropout",)),
            Argument(("is_causal",), lambda g, d: _by_flag(g["problem"], d) or None, plain=False),
            Argument(("scale",), functools.partial(_scale, name="scale"), takes=("scale",)),
            Argument(("enable_gqa",), lambda g, d: g["problem"].group > 1 or None, plain=False),
        ),
        _sdpa_lacks,
        bshd=False,
    ),
    "flash_attn": Style(
        (
            Argument(("dropout_p",), _dropout, 0.0, takes=("dropout",)),
            Argument(
                ("softmax_scale", "scale", "sm_scale"),
                functools.partial(_scale, name="softmax_scale"),
                takes=("scale",),
            ),
            Argument(("causal", "is_causal"), _causal, plain=False),
            Argument(("window_size", "window"), _window_size, UNBOUNDED),
            Argument(("softcap",), lambda g, d: g["softcap"] or None, 0.0, takes=("softcap",)),
            Argument(("alibi_slopes",), lambda g, d: g["slopes"], takes=("slopes",)),
        ),
        _flash_lacks,
        bshd=True,
    ),
    "bshd": Style(None, lambda problem, defaults: None, bshd=True),
}
"""sdpa: torch.nn.functional.scaled_dot_product_attention. flash_attn: flash_attn.flash_attn_func
(2.1 and later: masks are aligned lower-right). bshd: our own keywords, other tensors.
"""
