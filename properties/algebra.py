"""Laws of the formula: what scaling, shifting, splitting, repeating and hiding do to out and LSE."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from verify.bounds import Allowance
from verify.case import Case, Inputs
from verify.guard import call
from verify.problem import Problem
from verify.properties.property import BOTH, Verdict, agree, answer, both, doubled, holds, limits
from verify.properties.truth import Truth, about, truth
from verify.properties.verdict import compare
from verify.registry import Kernel

SHIFTS = (50.0, -50.0, 90.0, -90.0, 130.0, -130.0, 1e4, -1e4)
"""What all scores of a row are moved by: where exp, exp2 and FP16 over- and underflow."""
HUGE_CAP = 2.0**20


@holds()
def value_scaling(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(2 V) = 2 out(V), to the last bit where the kernel repeats its bits: V enters linearly."""
    known = truth(case, device)
    twice, factor = _scaled(known.inputs.v)
    if twice is None:
        return Verdict(unsupported="2 V and V / 2 are not both representable")
    other = about(known.problem, replace(known.inputs, v=twice))
    return _scales(kernel, known, other, factor, "out of V")


@holds()
def query_scaling(kernel: Kernel, case: Case, device: str) -> Verdict:
    """out(2 Q, scale / 2) = out(Q, scale), to the last bit where the kernel repeats its bits: only their product enters."""
    known = truth(case, device)
    twice, factor = _scaled(known.inputs.q)
    if twice is None:
        return Verdict(unsupported="2 Q and Q / 2 are not both representable")
    problem = known.problem.but(scale=known.problem.softmax_scale / factor)
    if reason := kernel.unsupported(problem, device):
        return Verdict(unsupported=reason)
    return _scales(kernel, known, about(problem, replace(known.inputs, q=twice)), 1.0, "out of Q and scale")


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
    """s_ij + c for all j, through one column of Q and K: dv the same, dq and dk the same in the other columns."""
    return _shifted(kernel, case, device)


def _shifted(kernel: Kernel, case: Case, device: str) -> Verdict:
    known = truth(case, device)
    p, x = known.problem, known.inputs
    if p.softcap or p.softmax_scale == 0:
        return Verdict(unsupported="a softcap bends the shift, a scale of 0 undoes it")
    q, k, moved = x.q.clone(), x.k.clone(), x.k.clone()
    q[..., 0], k[..., 0] = 1.0, 0.0
    moved[..., 0] = max(-1.0, min(1.0, SHIFTS[case.seed % len(SHIFTS)] / p.softmax_scale / torch.finfo(k.dtype).max * 2)) * (
        torch.finfo(k.dtype).max / 2
    )
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
    return Allowance(allowed.limit[part], {name: term[part] for name, term in allowed.terms.items()})


@holds()
def neutral_options(kernel: Kernel, case: Case, device: str) -> Verdict:
    """A bias of 0, ALiBi slopes of 0, a softcap far above every score and the default scale written out change nothing."""
    known = truth(case, device)
    p, x = known.problem, known.inputs
    zero = x.q.new_zeros((1, 1, p.len_q, p.len_k))
    ways: list[tuple[str, Problem, Inputs]] = []
    if p.bias == "none" and p.mask_as != "float":
        ways.append(("a bias of 0", p.but(bias="qk"), replace(x, bias=zero)))
        ways.append(("slopes of 0", p.but(bias="alibi"), replace(x, slopes=torch.zeros(p.heads_q, device=device))))
    if not p.softcap:
        ways.append((f"a softcap of {HUGE_CAP:g}", p.but(softcap=HUGE_CAP), x))
    if p.scale is None:
        ways.append(("the scale written out", p.but(scale=p.softmax_scale), x))
    ways = [way for way in ways if kernel.unsupported(way[1].but(grads=False), device) is None]
    if not ways:
        return Verdict(unsupported="has no option that is not in use")
    first, allowed, bitwise = call(kernel, p.but(grads=False), x), limits(kernel, known), True
    for name, problem, inputs in ways:
        other = about(problem.but(grads=False), inputs)
        moved = {n: (getattr(other.exact, n) - getattr(known.exact, n)).abs().nan_to_num() for n in ("out", "lse")}
        room = {n: both(both(allowed[n], limits(kernel, other)[n]), moved[n]) for n in ("out", "lse")}
        bitwise &= agree(answer(kernel, other), first, room, f"without {name}", BOTH, times=1)
    return Verdict(bitwise=bitwise)
