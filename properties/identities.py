"""Laws of the formula: what scaling, shifting, splitting, repeating and hiding do to out and
LSE.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from verify.bounds.constants import Allowance
from verify.properties.property import (
    BOTH,
    Verdict,
    agree,
    answer,
    both,
    doubled,
    holds,
    limits,
    sound,
)
from verify.reference.compare import compare
from verify.reference.reference import Truth, about, truth
from verify.registry import Kernel
from verify.sandbox.call import call
from verify.spec.case import Case, Inputs
from verify.spec.layouts import laid_out
from verify.spec.problem import Problem

SHIFTS = (50.0, -50.0, 90.0, -90.0, 130.0, -130.0, 1e4, -1e4)
"""What all scores of a row are moved by: where exp, exp2 and FP16 over- and underflow."""
HUGE_CAP = 2.0**20
HUNDREDS = 8
"""Scores are scaled up until the largest is 128 to 256, by 256 at most; and a softcap down to 1/256
to 1/512 of it.
"""


@holds()
def value_scaling(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(2 V) = 2 out(V), to the last bit where the kernel repeats its bits: V enters linearly."""
    known = truth(case, device)
    twice, factor = _scaled(known.inputs.v)
    if twice is None:
        return Verdict(unsupported="2 V and V / 2 are not both representable")
    other = about(known.problem, replace(known.inputs, v=twice))
    return _scales(kernel, known, other, factor, "out of V")


@holds(calls=4)
def query_scaling(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(-Q, -scale) = out(Q, scale), and out(2 Q, scale / 2) = out(Q, scale) to the last bit
    where the kernel repeats its bits: only their product enters.
    """
    known = truth(case, device)
    twice, factor = _scaled(known.inputs.q)
    if twice is None:
        return Verdict(unsupported="2 Q and Q / 2 are not both representable")
    problem = known.problem.but(scale=known.problem.softmax_scale / factor)
    if reason := kernel.unsupported(problem, device):
        return Verdict(unsupported=reason)
    _turned(kernel, case, known)
    return _scales(
        kernel, known, about(problem, replace(known.inputs, q=twice)), 1.0, "out of Q and scale"
    )


def _turned(kernel: Kernel, case: Case, known: Truth) -> None:
    """The sign of the scale, where scores reach into the hundreds: P overflows if the maximum is
    sought on the wrong side.
    """
    more = min(max(0, HUNDREDS - math.frexp(_largest(known))[1]), HUNDREDS)
    scale = known.problem.softmax_scale * 2.0**more
    p, turned = known.problem.but(scale=scale), known.problem.but(scale=-scale)
    if not all(
        sound(kernel, replace(case, problem=way), known.device, "query-scaling")
        for way in (p, turned)
    ):
        return
    one, two = (
        about(p, known.inputs),
        about(turned, replace(known.inputs, q=laid_out(-known.inputs.q))),
    )
    room = _room(kernel, one, limits(kernel, one), two)
    agree(
        answer(kernel, two),
        answer(kernel, one),
        room,
        "of Q and scale; here -Q, -scale:",
        BOTH,
        times=1,
    )


def _largest(known: Truth) -> float:
    """The largest magnitude of a visible score, before softcap and bias."""
    return max(
        (
            b.raw.abs().masked_fill(~b.visible, 0.0).max().item()
            for b in known.blocks()
            if b.raw.numel()
        ),
        default=0.0,
    )


def _scaled(x: Tensor) -> tuple[Tensor | None, float]:
    """(x times 2 or 1/2, which of them), exact; None where neither is."""
    for factor in (2.0, 0.5):
        scaled = x * factor
        if bool((scaled.double() == x.double() * factor).all()):
            return scaled, factor
    return None, 1.0


def _scales(kernel: Kernel, known: Truth, other: Truth, factor: float, against: str) -> Verdict:
    once, scaled = answer(kernel, known).out, answer(kernel, other).out
    allowed = both(limits(kernel, other)["out"], limits(kernel, known)["out"].limit * factor)
    compare("out", scaled, once.double() * factor, allowed, against=f"{factor:g} times {against}")
    if kernel.numerics(known.problem, known.device).deterministic:
        doubled("out", scaled, once, factor, against)
    return Verdict(bitwise=bool((scaled.double() == once.double() * factor).all()))


@holds()
def shift(kernel: Kernel, case: Case, device: str) -> Verdict:
    """s_ij + c for all j: out the same, lse + c."""
    return _shifted(kernel, case, device)


@holds(grads=True)
def shift_gradients(kernel: Kernel, case: Case, device: str) -> Verdict:
    """s_ij + c for all j, through one column of Q and K: dv the same, dq and dk the same in the
    other columns.
    """
    return _shifted(kernel, case, device)


def _shifted(kernel: Kernel, case: Case, device: str) -> Verdict:
    known = truth(case, device)
    p, x = known.problem, known.inputs
    if p.softcap or p.softmax_scale == 0:
        return Verdict(unsupported="a softcap bends the shift, a scale of 0 undoes it")
    q, k, moved = x.q.clone(), x.k.clone(), x.k.clone()
    q[..., 0], k[..., 0] = 1.0, 0.0
    moved[..., 0] = max(
        -1.0,
        min(1.0, SHIFTS[case.seed % len(SHIFTS)] / p.softmax_scale / torch.finfo(k.dtype).max * 2),
    ) * (torch.finfo(k.dtype).max / 2)
    c = moved.flatten()[0].double().item() * p.softmax_scale if moved.numel() else 0.0
    still, shifted = (about(p, replace(x, q=q, k=keys)) for keys in (k, moved))
    one, two = answer(kernel, still), answer(kernel, shifted)
    before, after = limits(kernel, still), limits(kernel, shifted)
    columns = {"dq": slice(1, None), "dk": slice(1, None)}
    for name in ("out", "lse", "dv", "dq", "dk"):
        got, want = getattr(two, name), getattr(one, name)
        if got is None or want is None or (name in columns and p.dim_qk == 1):
            continue
        part: Any = (..., columns.get(name, slice(None)))
        allowed = both(_part(after[name], part), before[name].limit[part])
        want = want[part].double() + (c if name == "lse" else 0.0)
        compare(name, got[part], want, allowed, against=f"before all scores moved by {c:g}")
    return Verdict(bitwise=torch.equal(one.out, two.out))


def _part(allowed: Allowance, part: Any) -> Allowance:
    return Allowance(
        allowed.limit[part], {name: term[part] for name, term in allowed.terms.items()}
    )


@holds(calls=3)
def neutral_options(kernel: Kernel, case: Case, device: str) -> Verdict:
    """A bias of 0, ALiBi slopes of 0, a softcap far above every score and the default scale written
    out change nothing.
    """
    known = truth(case, device)
    p, x = known.problem, known.inputs
    zero = x.q.new_zeros((1, 1, p.len_q, p.len_k))
    ways: list[tuple[str, Problem, Inputs]] = []
    if p.bias == "none" and not p.mask_is_bias:
        ways.append(("a bias of 0", p.but(bias="qk"), replace(x, bias=zero)))
        ways.append(
            (
                "slopes of 0",
                p.but(bias="alibi"),
                replace(x, slopes=torch.zeros(p.heads_q, device=device)),
            )
        )
    if not p.softcap and p.softmax_scale > 0:  # nobody asks for a cap of negated scores
        ways.append((f"a softcap of {HUGE_CAP:g}", p.but(softcap=HUGE_CAP), x))
    if p.scale is None:
        ways.append(("the scale written out", p.but(scale=p.softmax_scale), x))
    ways = [way for way in ways if kernel.unsupported(way[1].but(grads=False), device) is None]
    if not ways:
        return Verdict(unsupported="has no option that is not in use")
    first, allowed, bitwise = call(kernel, p.but(grads=False), x), limits(kernel, known), True
    for name, problem, inputs in ways:
        other = about(problem.but(grads=False), inputs)
        bitwise &= agree(
            answer(kernel, other),
            first,
            _room(kernel, known, allowed, other),
            f"without {name}",
            BOTH,
            times=1,
        )
    return Verdict(bitwise=bitwise)


@holds(takes="softcap")
def saturated_softcap(kernel: Kernel, case: Case, device: str) -> Verdict:
    """A softcap far below the scores: s_ij -> cap tanh(s_ij / cap), which is cap sign(s_ij) for
    most.
    """
    known = truth(case, device)
    if (largest := _largest(known)) < 1.0:
        return Verdict(unsupported="no score is above 1")
    problem = known.problem.but(softcap=2.0 ** (math.frexp(largest)[1] - HUNDREDS - 1))
    if reason := kernel.unsupported(problem, device):
        return Verdict(unsupported=reason)
    other = about(problem, known.inputs)
    output, allowed, sees = (
        answer(kernel, other),
        limits(kernel, other),
        other.exact.lse.unsqueeze(-1) != -torch.inf,
    )
    compare(
        "out", torch.where(sees, output.out, 0.0), other.exact.out, allowed["out"], against="exact"
    )
    if output.lse is not None:
        compare("lse", output.lse, other.exact.lse, allowed["lse"], against="exact")
    return Verdict()


@holds(no_bias=True, takes="slopes")
def alibi_bias(kernel: Kernel, case: Case, device: str) -> Verdict:
    """ALiBi is the bias -slope_h |i + K - Q - j|: the same out and LSE."""
    known = truth(replace(case, problem=case.problem.but(bias="alibi")), device)
    p, x = known.problem.but(bias="hqk"), known.inputs
    if reason := kernel.unsupported(p, device) or kernel.unsupported(known.problem, device):
        return Verdict(unsupported=reason)
    assert x.slopes is not None
    distance = (
        torch.arange(p.len_q, device=device)[:, None]
        + p.len_k
        - p.len_q
        - torch.arange(p.len_k, device=device)
    ).abs()
    bias = laid_out((-x.slopes[:, None, None] * distance).to(x.q).unsqueeze(0))
    other = about(p, replace(x, bias=bias, slopes=None))
    room = _room(kernel, known, limits(kernel, known), other)
    return Verdict(
        bitwise=agree(
            answer(kernel, known), answer(kernel, other), room, "with a bias", BOTH, times=1
        )
    )


def _room(
    kernel: Kernel, known: Truth, allowed: dict[str, Allowance], other: Truth
) -> dict[str, Allowance]:
    """How far apart out and LSE of two problems may be: each off by its own (`allowed`: of
    `known`), and what the exact are.
    """
    theirs = limits(kernel, other)
    moved = {
        n: (getattr(other.exact, n) - getattr(known.exact, n)).abs().nan_to_num() for n in BOTH
    }
    return {n: both(both(allowed[n], theirs[n]), moved[n]) for n in BOTH}
